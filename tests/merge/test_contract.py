"""Public names of the merge and regularize homes, and what their arguments are called."""

import inspect

import pytest

import stiefel.merge
import stiefel.regularize

ARGUMENTS = {
    "orthomerge": "base experts variant residual residual_scale weights map include exclude "
    "generator",
    "merge_rotations": "Qs weights intensity correct eps",
    "merge_oft_adapters": "paths out_path weights",
    "procrustes_rotation": "source target proper null rtol",
    "OrthogonalAdapter": "base r adapter_id scheme basis seed slot alpha",
    "add_orthogonal_adapters": "model r adapter_id target_modules",
    "merge_adapters": "handles weights mode",
    "free_slots": "m r used",
    "shared_basis": "m cols basis seed dtype device",
    "TaskVector": "base finetuned",
    "disentanglement_error": "f theta0 tau1 tau2 loaders alphas",
    "CompatibleAdapter": "mode lam alpha w temperature forward center epochs lr batch_size "
    "random_state",
    "retrieval_metrics": "Q G yq yg exclude_self chunk",
    "backfill_order": "F_old labels metric",
    "merge": "recipe out",
}
REGULARIZE = {
    "OrthoReg": "model lam power target params reference every",
    "orthoreg_loss": "delta power",
    "orthoreg_loss_lowrank": "B A scaling power",
    "lambda_orthogonality": "W lam alpha",
    "LambdaOrthogonality": "lam alpha weight",
}
CASES = [
    (home, name, names.split())
    for home, table in ((stiefel.merge, ARGUMENTS), (stiefel.regularize, REGULARIZE))
    for name, names in table.items()
]


@pytest.mark.parametrize(
    ("home", "name", "names"), CASES, ids=lambda x: x if type(x) is str else ""
)
def test_arguments_are_called_as_promised(home, name, names):
    found = getattr(home, name)
    assert callable(found), f"{name} is a {type(found).__name__}"
    assert [n for n in inspect.signature(found).parameters if n in names] == names


def test_checkpoints_are_read_and_written_from_here(tmp_path):
    import torch

    with stiefel.merge.CheckpointWriter(tmp_path / "m", [("w", torch.float32, (2,))]) as writer:
        writer.write("w", torch.ones(2))
    with stiefel.merge.Checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.read("w").tolist() == [1, 1]
    with pytest.raises(stiefel.merge.CheckpointError):
        stiefel.merge.Checkpoint(tmp_path)
