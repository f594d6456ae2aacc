"""How :func:`report` and :func:`convert` tell what a sub-module needs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from stiefel.nn.operators import converted_layers as layers
from stiefel.nn.operators import converted_layers_norm as norms
from stiefel.nn.operators.report_context import (
    ADAPTIVE,
    OPERATORS,
    POOLS,
    TORCH,
    Context,
    context_of,
    is_global,
)

OK, CONVERTED, UNSEEN, BLOCKS = "ok", "converted", "unseen", "blocks conversion"
_SHUFFLES = (nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle)
_PADS = tuple(
    getattr(nn, f"{kind}Pad{n}d")
    for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
    for n in (1, 2, 3)
)
_REFUSED: tuple[tuple[tuple[type, ...], str], ...] = (
    (_PADS, "pads a number of points; use padding and padding_mode of the convolution instead"),
    ((nn.RNNBase, nn.RNNCellBase), "a recurrence counts steps; use a convolution or attention"),
    ((nn.Fold, nn.Unfold), "cuts patches of a number of points; use a convolution"),
    (
        (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d, nn.FractionalMaxPool2d,
         nn.FractionalMaxPool3d),
        "works with indices of points; use nn.Upsample",
    ),
)  # fmt: skip
# Functions that count points, as code calls them.
_PER_AXES = (
    "conv", "conv_transpose", "max_pool", "avg_pool", "lp_pool", "adaptive_avg_pool",
    "adaptive_max_pool",
)  # fmt: skip
INDEX_FUNCTIONS = frozenset((
    "interpolate", "upsample", "pad", "unfold", "fold", "roll", "diff", "cumsum", "grid_sample",
    "pixel_shuffle", "pixel_unshuffle", *(f"{name}{n}d" for name in _PER_AXES for n in (1, 2, 3)),
))  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What one sub-module needs."""

    name: str
    module: nn.Module
    status: str
    reason: str
    target: type[layers.Converted] | None = None
    """Stands before the module's class in the bases of its new one."""


def examine(
    module: nn.Module, base: tuple[int, ...] | None, interpolation: str
) -> Iterator[Verdict]:
    """A verdict for every sub-module, in the order of ``named_modules``."""
    context = context_of(module, base, interpolation)
    for name, child in module.named_modules():
        status, reason, target = _judge(name, child, context)
        if isinstance(child, layers.Converted):
            target = None
        yield Verdict(name, child, status, reason, target)


Found = tuple[str, str, type[layers.Converted] | None]


def _judge(name: str, module: nn.Module, context: Context) -> Found:
    """Status, reason, and what is to be put before the module's class."""
    if any(
        isinstance(p, UninitializedParameter | UninitializedBuffer)
        for p in module.parameters(recurse=False)
    ):
        return BLOCKS, "has no sizes yet; call the network once before", None
    for kinds, why in _REFUSED:
        if isinstance(module, kinds):
            return BLOCKS, why, None
    rules: tuple[tuple[Any, Callable[[str, Any, Context], Found]], ...] = (
        (_ConvTransposeNd, _counting),
        (_ConvNd, _convolution),
        (POOLS, _counting),
        (ADAPTIVE, _adaptive),
        (_SHUFFLES, _counting),
        (_BatchNorm, _batch_norm),
        (_InstanceNorm, _instance_norm),
        (nn.GroupNorm, _group_norm),
        (nn.LayerNorm, _layer_norm),
        (nn.MultiheadAttention, _attention),
        (nn.TransformerEncoderLayer, _encoder_layer),
        (nn.Linear, _linear),
        (nn.Embedding, _embedding),
    )
    for kinds, rule in rules:
        if isinstance(module, kinds):
            return rule(name, module, context)
    return _other(module, context)


def _own_forward(module: nn.Module) -> bool:
    """Whether a subclass of a torch layer has another forward than torch's and ours."""
    where = next((k for k in type(module).__mro__ if "forward" in vars(k)), nn.Module)
    return not where.__module__.startswith((TORCH, OPERATORS))


def _convolution(name: str, module: Any, context: Context) -> Found:
    if _own_forward(module):
        return BLOCKS, "a convolution with a forward of its own, which is not known", None
    if all(k == 1 for k in module.kernel_size) and _keeps_size(module):
        return OK, "acts at each point", None
    if any(s > 1 for s in module.stride):
        return _counting(name, module, context)
    if not _keeps_size(module):
        why = "its padding does not keep the size of the grid; use padding='same', on a circle with"
        return BLOCKS, f"{why} padding_mode='circular'", None
    if context.interpolation == "hat" and any(k % 2 == 0 for k in module.kernel_size):
        return BLOCKS, f"kernel {module.kernel_size} is even: it has no centre tap for hats", None
    target = layers.FixedField
    return CONVERTED, f"receptive field is a length; border: {module.padding_mode}", target


def _keeps_size(module: Any) -> bool:
    if any(s > 1 for s in module.stride):
        return False
    if module.padding == "same":
        return True
    padding = (0,) * len(module.kernel_size) if module.padding == "valid" else module.padding
    return all(
        2 * p == d * (k - 1)
        for p, d, k in zip(padding, module.dilation, module.kernel_size, strict=True)
    )


def _counting(name: str, module: Any, context: Context) -> Found:
    if _own_forward(module):
        return BLOCKS, "counts points, with a forward of its own, which is not known", None
    if getattr(module, "return_indices", False):
        return BLOCKS, "returns indices of points; set return_indices=False", None
    if getattr(module, "size", None) is not None and isinstance(module, nn.Upsample):
        why = "runs at its base grid, where its size holds, resampled"
        return CONVERTED, why, layers.CountsPoints
    return CONVERTED, "counts points: runs at its base grid, resampled", layers.CountsPoints


def _adaptive(name: str, module: Any, context: Context) -> Found:
    if is_global(module):
        if "Avg" in type(module).__name__ and not _own_forward(module):
            return (
                CONVERTED,
                "the mean is a quadrature once weights are given",
                norms.QuadratureMean,
            )
        return OK, "the maximum over the grid", None
    return _counting(name, module, context)


def _batch_norm(name: str, module: Any, context: Context) -> Found:
    if isinstance(module, nn.SyncBatchNorm) or _own_forward(module):
        return OK, "statistics of equal weights; quadrature weights are not used", None
    return CONVERTED, "moments are quadratures once weights are given", norms.QuadratureBatchNorm


def _instance_norm(name: str, module: Any, context: Context) -> Found:
    return CONVERTED, "moments are quadratures once weights are given", norms.QuadratureInstanceNorm


def _group_norm(name: str, module: Any, context: Context) -> Found:
    return CONVERTED, "moments are quadratures once weights are given", norms.QuadratureGroupNorm


def _layer_norm(name: str, module: Any, context: Context) -> Found:
    shape, base = tuple(module.normalized_shape), context.base
    over_grid = base is not None and shape[-len(base) :] == base
    if len(shape) == 1 and shape[0] in context.features:
        over_grid = False
    if not over_grid:
        return OK, "over channels, at each point", None
    if module.elementwise_affine:
        why = "has a learned number per point; use elementwise_affine=False or GroupNorm(1, C)"
        return BLOCKS, why, None
    return CONVERTED, "moments of whatever grid it gets", norms.QuadratureLayerNorm


def _attention(name: str, module: Any, context: Context) -> Found:
    if _own_forward(module):
        return UNSEEN, "attention with a forward of its own: quadrature weights are not used", None
    return CONVERTED, "adds log w once weights are given", norms.QuadratureAttention


def _encoder_layer(name: str, module: Any, context: Context) -> Found:
    if _own_forward(module):
        return _other(module, context)
    return CONVERTED, "its attention uses weights once given", norms.QuadratureEncoderLayer


def _linear(name: str, module: Any, context: Context) -> Found:
    count = module.in_features
    fix = "use SpectralConv or KernelIntegral, or a mean over the grid before it"
    if name in context.flattened:
        return BLOCKS, f"dense over the flattened grid ({count} inputs); {fix}", None
    factors = (1, *context.channels)
    if name not in context.fed and any(
        count == c * n for n in context.levels if n > 1 for c in factors
    ):
        return BLOCKS, f"dense over the grid {context.base} ({count} inputs); {fix}", None
    if count in context.levels and not _own_forward(module):
        why = f"{count} inputs, taken as channels; checked when called"
        return CONVERTED, why, norms.ChannelLinear
    return OK, "acts on channels at each point", None


def _embedding(name: str, module: Any, context: Context) -> Found:
    if module.num_embeddings in context.tokens and module.num_embeddings not in context.channels:
        return BLOCKS, _table(f"{module.num_embeddings} rows"), None
    return OK, "a table that does not follow the grid", None


def _table(what: str) -> str:
    return f"{what}, one per point of the grid; use a function of the coordinates instead"


def _other(module: nn.Module, context: Context) -> Found:
    """Containers, activations, and modules with code of their own."""
    kind = type(module)
    if kind.__module__.startswith(OPERATORS):
        return OK, "an operator", None
    ours = not kind.__module__.startswith(TORCH)
    if ours or isinstance(module, nn.ParameterList | nn.ParameterDict):
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, values in own:
            if not values.is_complex() and _per_point(tuple(values.shape), context):
                return BLOCKS, _table(f"{name} {tuple(values.shape)}"), None
    if not ours:
        return (
            OK,
            "contains layers" if next(module.children(), None) else "acts at each point",
            None,
        )
    called = _index_functions(kind)
    if called:
        return UNSEEN, f"its code calls {', '.join(called)}, which counts points", None
    return OK, "its own code, as far as it shows", None


def _per_point(shape: tuple[int, ...], context: Context) -> bool:
    base = context.base
    if base is None:
        return False
    if len(base) > 1:
        span = len(base)
        if any(shape[i : i + span] == base for i in range(len(shape) - span + 1)):
            return True
    rows = [n for n in shape if n in context.tokens and n > 1]
    if len(shape) == 3 and shape[0] == 1 and min(shape[1:]) > 1 and rows:
        return True  # [1, points, channels], whatever else is of that size
    return any(n not in context.channels for n in rows)


def _index_functions(kind: type) -> list[str]:
    """Names of functions that count points which the class calls; [] where the source is hidden."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # made in a shell, or not Python: nothing to read
        return []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", None) or getattr(function, "id", "")
            names.add(name)
    return sorted(names & INDEX_FUNCTIONS)
