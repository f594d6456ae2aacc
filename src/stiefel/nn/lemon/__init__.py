"""LeMON: one network for many differential equations, adapted to a new one with few simulations.

>>> import torch
>>> from stiefel.nn.lemon import PROSE, PolishTokenizer
>>> tokenizer = PolishTokenizer()
>>> model = PROSE(n_x=32, vocab=len(tokenizer), dim=32, heads=4, layers=(1, 1, 1, 2))
>>> tokens = tokenizer.encode_batch(["ut - 0.003*uxx"] * 2)
>>> model(torch.randn(2, 8, 32, 1), torch.linspace(0, 1, 8), torch.tensor([1.5]), tokens).shape
torch.Size([2, 1, 32, 1])
"""

from stiefel.nn.lemon import pde as pde
from stiefel.nn.lemon.finetune import finetune as finetune
from stiefel.nn.lemon.low_rank import LoRALinear as LoRALinear
from stiefel.nn.lemon.low_rank import lora as lora
from stiefel.nn.lemon.low_rank import merge_lora as merge_lora
from stiefel.nn.lemon.meta import MetaLearner as MetaLearner
from stiefel.nn.lemon.meta_step_size import SymbolicStepSize as SymbolicStepSize
from stiefel.nn.lemon.meta_tasks import split_task as split_task
from stiefel.nn.lemon.prose import PROSE as PROSE
from stiefel.nn.lemon.prose import Symbols as Symbols
from stiefel.nn.lemon.tokenizer import PolishTokenizer as PolishTokenizer
from stiefel.nn.lemon.training import TrainingReport as TrainingReport
from stiefel.nn.lemon.training import evaluate as evaluate
from stiefel.nn.lemon.training import predict as predict
from stiefel.nn.lemon.training import pretrain as pretrain
from stiefel.nn.lemon.training_data import OperatorData as OperatorData
from stiefel.nn.lemon.training_data import add_noise as add_noise
from stiefel.nn.lemon.training_data import normalise as normalise
from stiefel.nn.lemon.training_data import operator_data as operator_data
from stiefel.nn.lemon.training_data import relative_l2 as relative_l2

__all__ = [
    "PROSE",
    "LoRALinear",
    "MetaLearner",
    "OperatorData",
    "PolishTokenizer",
    "SymbolicStepSize",
    "Symbols",
    "TrainingReport",
    "add_noise",
    "evaluate",
    "finetune",
    "lora",
    "merge_lora",
    "normalise",
    "operator_data",
    "pde",
    "predict",
    "pretrain",
    "relative_l2",
    "split_task",
]
