import io
import math
import warnings

import pytest
import torch
from torch import nn

from stiefel.theory import PermutationEnsemble, nonzero_inputs, ntk_relu, permutation_moments
from stiefel.theory import permutation_ensemble as module
from stiefel.theory.permutation import REGIMES, auto_step, spectrum

REVERSAL = [7, 6, 5, 4, 3, 2, 1, 0]
CYCLE = [1, 2, 3, 4, 0]


class Net(nn.Module):
    """One member, the obvious way."""

    def __init__(self, hidden, readout):
        super().__init__()
        self.k, self.width = hidden.shape
        self.w1 = nn.Parameter(hidden.T * math.sqrt(self.k))
        self.w2 = nn.Parameter(readout.clone())

    def forward(self, x):
        return torch.relu(x @ self.w1.T / math.sqrt(self.k)) @ self.w2.T / math.sqrt(self.width)


def started(*args, **kwargs):
    """An ensemble with its random start, and one module for each member."""
    ensemble = PermutationEnsemble(*args, **kwargs)
    for part in ensemble._parts():
        ensemble._draw(part)
    return [Net(h, r) for h, r in zip(ensemble.hidden, ensemble.readout, strict=True)]


def train(net, perm, steps, lr, parameters):
    eye = torch.eye(net.k, dtype=net.w1.dtype)
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (net(eye) - eye[:, perm]).square().sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("regime", REGIMES)
def test_every_member_is_the_module_trained_alone(regime):
    settings = {"regime": regime, "seed": 3, "chunk": 2, "dtype": torch.float64}
    lr = 0.5 * auto_step(5, regime)
    with pytest.warns(RuntimeWarning, match="after 6 steps"):
        ensemble = PermutationEnsemble(5, 3, 16, **settings).fit(CYCLE, steps=6, lr=lr)
    inputs = nonzero_inputs(5)
    unit = inputs.double() / inputs.sum(1, keepdim=True).double().sqrt()
    outputs = ensemble.member_outputs(inputs)
    for net, out in zip(started(5, 3, 16, **settings), outputs, strict=True):
        moving = [net.w1, net.w2] if regime == "ntk" else [net.w2]
        train(net, CYCLE, 6, lr, moving)
        torch.testing.assert_close(out, net(unit).detach(), rtol=0, atol=1e-12)


def test_the_exact_solve_is_where_gradient_descent_goes():
    settings = {"regime": "last_layer", "dtype": torch.float64}
    ensemble = PermutationEnsemble(5, 2, 32, **settings).fit(CYCLE)
    long = PermutationEnsemble(5, 2, 32, **settings).fit(
        CYCLE, steps=20_000, lr=auto_step(5, "last_layer") / 2
    )
    torch.testing.assert_close(ensemble.readout, long.readout, rtol=0, atol=1e-9)
    for i, net in enumerate(started(5, 2, 32, **settings)):
        features = torch.relu(ensemble.hidden[i])
        wanted = torch.eye(5).double()[:, CYCLE]
        step = torch.linalg.pinv(features) @ (wanted - net(torch.eye(5).double()).detach())
        expected = net.w2.detach() + math.sqrt(32) * step.T
        torch.testing.assert_close(ensemble.readout[i], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("regime", REGIMES)
def test_networks_follow_theory(regime):
    ensemble = PermutationEnsemble(6, 400, 512, regime, seed=5).fit([3, 1, 4, 0, 5, 2])
    inputs = nonzero_inputs(6)
    outputs = ensemble.member_outputs(inputs).double()
    source = inputs[:, ensemble.perm].bool()
    for n in range(2, 7):
        on, off, var = permutation_moments(6, n, regime=regime)
        chosen = outputs[:, inputs.sum(1) == n]
        wanted = torch.where(source[inputs.sum(1) == n], on, off)
        allowed = 4 * float(var.sqrt()) / 20 + 0.01
        assert float((chosen.mean(0) - wanted).abs().max()) < allowed
        assert float(chosen.var(0).mean() / var) == pytest.approx(1, abs=0.15)


def test_networks_stopped_early_follow_theory_at_that_time():
    lr, steps = 0.05, 12
    for regime in REGIMES:
        with pytest.warns(RuntimeWarning, match="Theory asks for"):
            ensemble = PermutationEnsemble(6, 400, 512, regime).fit(range(6), steps=steps, lr=lr)
        outputs = ensemble.member_outputs(nonzero_inputs(6)).double()
        chosen = outputs[:, nonzero_inputs(6).sum(1) == 3]
        bits = nonzero_inputs(6)[nonzero_inputs(6).sum(1) == 3].bool()
        on, off, var = permutation_moments(6, 3, regime=regime, t=steps, lr=lr)
        mean = chosen.mean(0)
        assert float(mean[bits].mean()) == pytest.approx(float(on), abs=0.01)
        assert float(mean[~bits].mean()) == pytest.approx(float(off), abs=0.01)
        assert float(chosen.var(0).mean() / var) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize(
    ("perm", "members", "width", "regime"),
    [(REVERSAL, 160, 1024, "last_layer"), ([2, 0, 3, 1], 500, 512, "ntk")],
)
def test_exact_on_all_inputs_and_one_network_is_not(perm, members, width, regime):
    k = len(perm)
    ensemble = PermutationEnsemble(k, members, width, regime).fit(perm)
    inputs = nonzero_inputs(k)
    assert torch.equal(ensemble.predict(inputs), inputs[:, perm])
    assert torch.equal(ensemble(inputs), ensemble.predict(inputs))
    assert ensemble.score() == 1.0
    needed, have = ensemble.certificate(0.1)
    assert have == members >= needed
    assert ensemble.certificate(0.1).holds
    assert not ensemble.certificate(1e-30).holds
    assert PermutationEnsemble(k, 1, width, regime).fit(perm).score() < 0.9


def test_many_wide_networks_tend_to_kernel_regression():
    ensemble = PermutationEnsemble(4, 2000, 512, "last_layer").fit([2, 0, 3, 1])
    inputs = nonzero_inputs(4)
    unit = inputs.double() / inputs.double().norm(dim=1, keepdim=True)
    eye = torch.eye(4, dtype=torch.float64)
    kernel = ntk_relu(unit, eye, kind="nngp") @ torch.linalg.inv(ntk_relu(eye, kind="nngp"))
    expected = kernel[:, [2, 0, 3, 1]]
    torch.testing.assert_close(ensemble.decision(inputs), expected, rtol=0, atol=0.012)


def test_members_do_not_depend_on_chunks_and_split_over_processes(monkeypatch):
    inputs = nonzero_inputs(5)
    whole = PermutationEnsemble(5, 12, 64, seed=4, chunk=5).fit(CYCLE)
    again = PermutationEnsemble(5, 12, 64, seed=4, chunk=12).fit(CYCLE)
    torch.testing.assert_close(whole.decision(inputs), again.decision(inputs), rtol=0, atol=1e-6)
    parts = [PermutationEnsemble(5, 4, 64, seed=4, first=i).fit(CYCLE) for i in (0, 4, 8)]
    mean = sum(p.decision(inputs) for p in parts) / 3
    torch.testing.assert_close(mean, whole.decision(inputs), rtol=0, atol=1e-6)
    # Rows in blocks give the same as all at once.
    monkeypatch.setattr(module, "ACTIVATIONS", 5 * 64 * 4)
    blocks = whole.decision(inputs)
    torch.testing.assert_close(blocks, again.decision(inputs), rtol=0, atol=1e-6)
    outputs = whole.member_outputs(inputs)
    assert outputs.shape == (12, 31, 5)
    torch.testing.assert_close(outputs.double().mean(0), blocks, rtol=0, atol=1e-12)


def test_memory_of_prediction_is_bounded(monkeypatch):
    largest = 0
    matmul = torch.matmul

    def watched(a, b):
        nonlocal largest
        out = matmul(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch, "matmul", watched)
    ensemble = PermutationEnsemble(10, 40, 1024, "last_layer", chunk=32).fit(range(10))
    ensemble.decision(nonzero_inputs(10).repeat(3, 1))
    assert largest <= module.ACTIVATIONS


def test_members_and_seeds_differ():
    starts = [
        PermutationEnsemble(4, 3, 8, seed=s, first=f, regime="last_layer").fit(range(4)).hidden
        for s, f in ((0, 0), (1, 0), (0, 3))
    ]
    rows = torch.cat(starts).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 9
    same = PermutationEnsemble(4, 3, 8, regime="last_layer").fit(range(4)).hidden
    assert torch.equal(same, starts[0])


def test_inputs_of_any_kind_and_scale_free_rows():
    ensemble = PermutationEnsemble(5, 3, 64, "last_layer").fit(CYCLE)
    inputs = nonzero_inputs(5)
    wanted = ensemble.decision(inputs)
    assert wanted.dtype == torch.float64
    for dtype in (torch.bool, torch.int64, torch.float16, torch.float64):
        assert torch.equal(ensemble.decision(inputs.to(dtype)), wanted)
    torch.testing.assert_close(ensemble.decision(inputs[6]), wanted[6], rtol=0, atol=1e-6)
    assert torch.equal(ensemble.decision(inputs[:30].reshape(5, 6, 5)), wanted[:30].view(5, 6, 5))
    assert ensemble.member_outputs(inputs[6]).shape == (3, 5)
    assert ensemble.decision(inputs[:0]).shape == (0, 5)
    assert ensemble.member_outputs(inputs[:0]).shape == (3, 0, 5)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_inputs_come_out_exact(regime, dtype):
    ensemble = PermutationEnsemble(9, 16, 256, regime, dtype=dtype).fit([8, *range(8)])
    eye = torch.eye(9, dtype=torch.uint8)
    assert float(ensemble.train_error) < 5e-7
    assert torch.equal(ensemble.predict(eye), eye[:, [8, *range(8)]])


def test_targets_as_a_matrix():
    eye = torch.eye(5)
    by_matrix = PermutationEnsemble(5, 2, 32, "last_layer").fit(eye[:, CYCLE])
    by_index = PermutationEnsemble(5, 2, 32, "last_layer").fit(torch.tensor(CYCLE))
    assert by_matrix.perm.tolist() == CYCLE
    assert torch.equal(by_matrix.readout, by_index.readout)


def test_saved_and_loaded():
    ensemble = PermutationEnsemble(5, 3, 32, "last_layer", seed=9, first=2).fit(CYCLE)
    file = io.BytesIO()
    torch.save(ensemble.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = PermutationEnsemble(5, 3, 32, "last_layer")
    with pytest.raises(RuntimeError, match="not fitted"):
        other.predict(nonzero_inputs(5))
    other.load_state_dict(state)
    assert (other.seed, other.first) == (9, 2)
    assert torch.equal(other.decision(nonzero_inputs(5)), ensemble.decision(nonzero_inputs(5)))
    assert "regime='last_layer', seed=9, first=2" in repr(other)
    with pytest.raises(ValueError, match="state is of regime 'last_layer'"):
        PermutationEnsemble(5, 3, 32, "ntk").load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PermutationEnsemble(5, 4, 32, "last_layer").load_state_dict(state)


def test_progress_is_reported_chunk_by_chunk():
    seen = []
    PermutationEnsemble(4, 10, 16, "last_layer", chunk=4).fit(
        range(4), callback=lambda fraction, message: seen.append((fraction, message))
    )
    assert [f for f, _ in seen] == [0.4, 0.8, 1.0]
    assert seen[-1][1] == "10 members trained"


def test_too_few_steps_warn_with_the_number_that_theory_asks_for():
    with pytest.warns(RuntimeWarning, match=r"after 3 steps .* about (\d+) steps") as caught:
        PermutationEnsemble(5, 2, 512).fit(CYCLE, steps=3)
    steps = int(str(caught[0].message).split("about ")[1].split()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PermutationEnsemble(5, 2, 4096).fit(CYCLE, steps=2 * steps)


def test_divergence_of_a_narrow_network_is_an_error_and_leaves_no_ensemble():
    ensemble = PermutationEnsemble(6, 64, 6, "last_layer")
    with pytest.raises(FloatingPointError, match="diverged at width 6"):
        ensemble.fit(range(6), lr=1.6 * auto_step(6, "last_layer"), steps=2000)
    with pytest.raises(RuntimeError, match="not fitted"):
        ensemble.predict(nonzero_inputs(6))
    with pytest.raises(ValueError, match="linearly dependent"):
        PermutationEnsemble(6, 64, 6, "last_layer").fit(range(6))


def test_bad_settings():
    for name, bad, least in (
        ("n_members", 0, 1),
        ("width", 4, 5),
        ("chunk", 0, 1),
        ("seed", -1, 0),
        ("first", -1, 0),
    ):
        with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {bad}"):
            PermutationEnsemble(5, **{"n_members": 2, name: bad})
    with pytest.raises(ValueError, match="at least 2 bits"):
        PermutationEnsemble(1, 2)
    with pytest.raises(ValueError, match="regime must be one of"):
        PermutationEnsemble(5, 2, regime="lazy")
    with pytest.raises(TypeError, match="must be torch"):
        PermutationEnsemble(5, 2, dtype=torch.bfloat16)


def test_bad_permutations_and_steps():
    ensemble = PermutationEnsemble(3, 2, 16)
    for bad, error, match in (
        ([0, 1, 1], ValueError, "1 comes 2 times"),
        ([0, 1], ValueError, "3 indices"),
        ([0, 1, 3], ValueError, "got 3"),
        ([0, 1, -1], ValueError, "got -1"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "integers"),
        (torch.ones(3, 3), ValueError, "permutation matrix"),
        (2 * torch.eye(3), ValueError, "permutation matrix"),
        (torch.eye(3) - 0.5 * torch.eye(3).roll(1, 0), ValueError, "permutation matrix"),
    ):
        with pytest.raises(error, match=match):
            ensemble.fit(bad)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        ensemble.fit([0, 1, 2], steps=0)
    with pytest.raises(ValueError, match='number or "auto"'):
        ensemble.fit([0, 1, 2], lr="fast")
    for regime in REGIMES:
        for bad in (6 / spectrum(3, regime)[1], 0, -1.0, math.nan):
            with pytest.raises(ValueError, match="diverges"):
                PermutationEnsemble(3, 2, 16, regime).fit([0, 1, 2], lr=bad)


def test_bad_inputs():
    ensemble = PermutationEnsemble(3, 2, 16, "last_layer").fit([0, 1, 2])
    for function in (ensemble.decision, ensemble.predict, ensemble.member_outputs, ensemble.score):
        with pytest.raises(ValueError, match="defined for nonzero binary inputs; row 1"):
            function(torch.tensor([[1, 0, 0], [0, 0, 0]]))
        for bad in ([[1, 2, 0]], [[0.5, 1, 0]], [[math.nan, 1, 0]], [[-1, 1, 0]]):
            with pytest.raises(ValueError, match="binary"):
                function(torch.tensor(bad))
        with pytest.raises(ValueError, match="3 columns"):
            function(torch.ones(2, 4))
        with pytest.raises(TypeError, match="real"):
            function(torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="delta"):
        ensemble.certificate(0.0)
    with pytest.raises(ValueError, match="at least one row"):
        ensemble.score(torch.ones(0, 3))
    wide = PermutationEnsemble(26, 1, 64, "last_layer").fit(range(26))
    with pytest.raises(ValueError, match="k = 26 bits do not fit"):
        wide.score()
