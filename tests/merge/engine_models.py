"""Small checkpoints and plans for the tests of the engine."""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

from stiefel.checkpoint import Checkpoint
from stiefel.merge.plan_types import MergePlan, PlannedModel, TensorRef, TensorTask

SHAPES = {
    "model.embed_tokens.weight": (40, 12),
    "model.layers.0.mlp.weight": (24, 12),
    "model.layers.0.norm.weight": (12,),
    "model.layers.1.mlp.weight": (12, 24),
    "model.layers.1.conv.weight": (6, 3, 2),
    "scale": (),
}


def random_model(seed, dtype=torch.bfloat16, base=None, shapes=SHAPES):
    """Random tensors; with ``base``, a small change of it."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if base is not None:
        made = {name: base[name].float() + 0.3 * value for name, value in made.items()}
    return {name: value.to(dtype) for name, value in made.items()}


def save(folder, tensors, config=None):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def plan(folders, method, *, base=True, parameters=None, each=None, dtype=None, **settings):
    """A plan over whole models; the first folder is the base, if there is one."""
    with Checkpoint(folders[0]) as first:
        infos = dict(first.tensors)
    names = [folder.name for folder in folders]
    count = len(folders) - base
    each = each or [{"weight": 1.0}] * count

    def refs(name):
        return [TensorRef(model, name, number) for number, model in enumerate(names)]

    tasks = tuple(
        TensorTask(
            name,
            dtype or info.dtype,
            info.shape,
            method,
            refs(name)[0] if base else None,
            tuple(refs(name)[base:]),
            parameters or {},
            tuple(each),
        )
        for name, info in infos.items()
    )
    models = tuple(PlannedModel(folder.name, folder) for folder in folders)
    settings = {"config": {"model_type": "test"}, "recipe_text": f"merge_method: {method}\n"} | (
        settings
    )
    return MergePlan(models, tasks, **settings)


def only(plan, name, **changes):
    """The plan of one tensor, its task changed."""
    task = next(task for task in plan.tasks if task.name == name)
    return replace(plan, tasks=(replace(task, **changes),))
