"""Ours beside torch.optim.AdamW, as PyTorch's own optimizer table describes optimizers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_table import CLASSES as LAW_CLASSES
from law_table import noise
from torch import nn
from torch.optim import lr_scheduler
from torch_internal import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)

from stiefel.optim import ARO, RMNP, ROOT, AuON, DCTAdamW, HybridAuON, Muon, NorMuon, Trion

LEARNING_RATES = [
    OptimizerInput(params=None, kwargs={}, desc="default"),
    OptimizerInput(params=None, kwargs={"lr": 0.01}, desc="non-default lr"),
    OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.001)}, desc="Tensor lr"),
    OptimizerInput(params=None, kwargs={"weight_decay": 0.2}, desc="non-default weight_decay"),
]


def inputs(*own: dict[str, Any]) -> Callable[..., list[OptimizerInput]]:
    def make(device, dtype=None):
        extra = [OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)) for kwargs in own]
        return [copy.deepcopy(each) for each in LEARNING_RATES] + extra

    return make


def errors(device, dtype):
    return [
        *get_error_inputs_for_all_optims(device, dtype),
        ErrorOptimizerInput(
            OptimizerInput(
                params=[nn.Parameter(torch.rand(3, dtype=dtype))], kwargs={}, desc="no matrix"
            ),
            error_type=ValueError,
            error_regex="parameter 0 of group 0 has shape",
        ),
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs={"lr": -0.1}, desc="negative lr"),
            error_type=ValueError,
            error_regex="lr must be finite and ≥ 0",
        ),
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs={"weight_decay": -1.0}, desc="negative decay"),
            error_type=ValueError,
            error_regex="weight_decay must be finite and ≥ 0",
        ),
    ]


def info(cls, *own):
    return OptimizerInfo(
        cls,
        optim_inputs_func=inputs(*own),
        optim_error_inputs_func=errors,
        scheduler_inputs=(
            [lambda o: lr_scheduler.StepLR(o, gamma=0.9, step_size=10)],
            [lambda o: lr_scheduler.ReduceLROnPlateau(o, threshold=1e-2)],
            [
                lambda o: lr_scheduler.StepLR(o, gamma=0.99, step_size=10),
                lambda o: lr_scheduler.ExponentialLR(o, gamma=0.99),
            ],
        ),
        supported_impls=(),
        not_og_supported_flags=(),
        supports_complex=False,
    )


OURS = [
    info(Muon, {"momentum": 0.8}, {"scale": "rms", "nesterov": False}, {"ns": "classic"}),
    info(NorMuon, {"betas": (0.8, 0.9)}, {"bias_correction": True}, {"reduce": "long"}),
    info(RMNP, {"momentum": 0.8}, {"nesterov": False, "scale": "rms"}),
    info(ROOT, {"momentum": 0.8}, {"quantile": 0.7}, {"coefficients": "classic"}),
    info(AuON, {"momentum": 0.8}, {"nesterov": False}, {"variant": "code", "gamma": 1.5}),
    info(HybridAuON, {"momentum": 0.8}, {"variant": "paper"}, {"variant": "code"}),
    info(ARO, {"beta": 0.8}, {"base": "adam"}, {"rotation_every": 2, "rms": None}),
    info(Trion, {"rank": 0.6}, {"rank": 3, "ns": "classic"}, {"scale": "kimi", "norm": 2}),
    info(DCTAdamW, {"betas": (0.8, 0.9)}, {"rank": 3, "error_feedback": 8}, {"update_gap": 2}),
]
ADAMW = next(each for each in optim_db if each.optim_cls is torch.optim.AdamW)
SETTINGS = [
    pytest.param(each.optim_cls, case.kwargs, id=f"{each.name}-{case.desc}")
    for each in [*OURS, ADAMW]
    for case in each.optim_inputs_func("cpu", torch.float64)
    if not {"maximize", "amsgrad", "capturable"} & case.kwargs.keys()
]
assert {each.optim_cls for each in OURS} == set(LAW_CLASSES)
CLASSES = [each.optim_cls for each in [*OURS, ADAMW]]
every_setting = pytest.mark.parametrize(("cls", "kwargs"), SETTINGS)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
SHAPES = ((10, 5), (5, 10), (10, 5))


def set_gradients(params, step=0):
    for i, p in enumerate(params):
        p.grad = noise(tuple(p.shape), 10 * step + i, p.dtype)
