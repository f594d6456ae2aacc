"""Which parameters are hidden matrices: from modules to parameter groups."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Blocks = int | Sequence[int]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm)  # two-dimensional where they normalise over two dimensions
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def split_parameters(
    model: nn.Module,
    *,
    head: str | Sequence[str] | None = "auto",
    elementwise: Sequence[str] = (),
    matrix: Sequence[str] = (),
    split: Mapping[str, Blocks] | None = None,
    experts: Sequence[str] = (),
    first_conv: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups for a matrix optimizer: hidden matrices by matrix rule, the rest by AdamW.

    Module types decide, never the number of dimensions alone. By the matrix rule go the 2-D weights
    of every module that is not an embedding, a head or a normalisation (``nn.Linear``, attention
    projections, recurrent cells, plain ``nn.Parameter`` of two dimensions), and the kernels of
    convolutions, flattened to (out, in·kh·kw). Everything else goes elementwise: embeddings and
    whatever is tied to them, heads, biases, norms, scalars, depthwise kernels.

    Args:
        model: Any module. Parameters with ``requires_grad=False`` are left out.
        head: ``"auto"`` treats as head what ``model.get_output_embeddings()`` returns, else the
            last linear layer from the largest embedding's width to its vocabulary, and without any
            embedding the last linear layer registered. ``None``: no heads. Else name patterns.
        elementwise: Name patterns that must go elementwise.
        matrix: Name patterns that must go by the matrix rule, over all other rules.
        split: Pattern → number of equal row blocks, or their sizes. Each block is a matrix of its
            own: ``{"qkv": 3}``, or ``{"qkv": (4096, 1024, 1024)}`` for grouped-query attention.
        experts: Patterns of 3-D weights (E, R, C) that hold E matrices.
        first_conv: Whether the first convolution is a hidden matrix too.

    Returns:
        Groups with ``"params"`` (name, parameter) pairs, ``"rule"`` (``"matrix"`` or
        ``"elementwise"``), and for matrices ``"view"`` and ``"blocks"``. The first group of each
        rule is present even if empty, so that the optimizer can warn of it.

    A pattern matches a name that it equals, that contains it as whole dotted parts (``"qkv"``
    matches ``blocks.0.qkv.weight``), or, with wildcards, that it matches as in a shell.

    Raises:
        ValueError: a pattern that matches nothing, blocks that do not add up to the rows, an expert
            weight that is not 3-D, a name forced both ways.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    split = dict(split or {})
    owners = _owners(model)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    heads = _heads(model, head, names)
    forced = _Patterns(names)
    to_matrix, to_elementwise = forced("matrix", matrix), forced("elementwise", elementwise)
    if both := to_matrix & to_elementwise:
        raise ValueError(f"{sorted(both)[0]!r} is asked for both as matrix and as elementwise")
    to_batch = forced("experts", experts)
    blocks = {
        name: count for pattern, count in split.items() for name in forced("split", [pattern])
    }
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, _EMBEDDINGS)}
    skipped = set() if first_conv else _first_convolution(model)

    groups: dict[tuple, dict[str, Any]] = {
        ("matrix", "flatten", None): _group("matrix", "flatten", None),
        ("elementwise",): {"params": [], "rule": "elementwise"},
    }
    for name, parameter in names.items():
        module, own = owners[id(parameter)]
        is_matrix = name in to_matrix or (
            name not in to_elementwise
            and id(parameter) not in embedded
            and id(parameter) not in heads
            and id(parameter) not in skipped
            and (name in to_batch or _is_hidden_matrix(module, own, parameter))
        )
        if not is_matrix:
            groups[("elementwise",)]["params"].append((name, parameter))
            continue
        view, count = _view(name, module, parameter, to_batch, blocks)
        key = ("matrix", view, count)
        groups.setdefault(key, _group("matrix", view, count))
        groups[key]["params"].append((name, parameter))
    return list(groups.values())


def describe_groups(groups: torch.optim.Optimizer | Iterable[Mapping[str, Any]]) -> str:
    """Print, and return, what went where: rule, shapes, numbers of tensors and of parameters.

    Args:
        groups: An optimizer, or the groups that :func:`split_parameters` made.
    """
    if isinstance(groups, torch.optim.Optimizer):
        groups = groups.param_groups
    lines = [
        f"{'rule':<12} {'view':<10} {'blocks':<16} {'shape':<20} {'tensors':>8} {'numbers':>14}"
    ]
    totals: dict[str, int] = {}
    for group in groups:
        rule = group.get("rule", "matrix")
        totals.setdefault(rule, 0)
        counts: dict[tuple[int, ...], int] = {}
        for entry in group["params"]:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            shape = tuple(parameter.shape)
            counts[shape] = counts.get(shape, 0) + 1
            totals[rule] += parameter.numel()
        view = group.get("view", "") if rule == "matrix" else ""
        blocks = group.get("blocks") if rule == "matrix" else None
        for shape, count in sorted(counts.items(), key=lambda item: -len(item[0])):
            size = "×".join(map(str, shape)) or "scalar"
            number = count * torch.Size(shape).numel()
            lines.append(
                f"{rule:<12} {view:<10} {blocks or ''!s:<16} {size:<20} {count:>8} {number:>14,}"
            )
    lines += [f"{rule}: {count:,} numbers in all" for rule, count in totals.items()]
    text = "\n".join(lines)
    print(text)
    return text


class _Patterns:
    """Resolve name patterns, and refuse those that match nothing: a typo must not pass silently."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)

    def __call__(self, argument: str, patterns: Sequence[str]) -> set[str]:
        if isinstance(patterns, str):
            patterns = [patterns]
        found: set[str] = set()
        for pattern in patterns:
            hits = {name for name in self._names if _matches(name, pattern)}
            if not hits:
                raise ValueError(
                    f"{argument}: pattern {pattern!r} matches no trainable parameter; names look "
                    f"like {', '.join(self._names[:3])}"
                )
            found |= hits
        return found


def _matches(name: str, pattern: str) -> bool:
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _group(rule: str, view: str, blocks: Any) -> dict[str, Any]:
    return {"params": [], "rule": rule, "view": view, "blocks": blocks}


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Parameter id → (module that holds it, attribute name); the first holder of a tied one."""
    owners: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), (module, own))
    return owners


def _heads(model: nn.Module, head: Any, names: Mapping[str, Tensor]) -> set[int]:
    if head is None:
        return set()
    if head != "auto":
        return {id(names[name]) for name in _Patterns(names)("head", head)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(output, nn.Module):
        return {id(p) for p in output.parameters(recurse=False)}
    embeddings = [m for m in model.modules() if isinstance(m, _EMBEDDINGS)]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if embeddings:
        # Positions and types are embeddings too, and hidden layers may be as wide as a vocabulary:
        # only the last layer that undoes the largest embedding counts.
        largest = max(embeddings, key=lambda m: m.num_embeddings)
        shape = (largest.num_embeddings, largest.embedding_dim)
        linear = [m for m in linear if (m.out_features, m.in_features) == shape]
    return {id(m.weight) for m in linear[-1:]}


def _first_convolution(model: nn.Module) -> set[int]:
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS):
            return {id(module.weight)}
    return set()


def _is_hidden_matrix(module: nn.Module, own: str, parameter: Tensor) -> bool:
    if isinstance(module, _EMBEDDINGS + _NORMS) or min(parameter.shape, default=0) == 0:
        return False
    if isinstance(module, _CONVOLUTIONS + _TRANSPOSED):
        rows = parameter.shape[0] // module.groups
        if own != "weight" or min(rows, parameter.numel() // parameter.shape[0]) == 1:
            return False
        if isinstance(module, _TRANSPOSED):  # stored (in, out, ...): rows are input channels here
            return module.groups == 1
        return module.groups == 1 or parameter.shape[1] > 1  # depthwise kernels are no matrix
    return parameter.ndim == 2 and min(parameter.shape) > 1


def _is_input_major(module: nn.Module) -> bool:
    """Whether a module stores (in, out), as GPT-2's ``Conv1D`` in transformers does."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _view(
    name: str,
    module: nn.Module,
    parameter: Tensor,
    batched: set[str],
    blocks: Mapping[str, Blocks],
) -> tuple[str, Blocks | None]:
    if name in batched:
        if parameter.ndim != 3:
            raise ValueError(
                f"experts: {name!r} must have shape (E, R, C), got {tuple(parameter.shape)}"
            )
        return "batch", None
    view = "transpose" if _is_input_major(module) else "flatten"
    count = blocks.get(name)
    if count is None and isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        count = module.groups
    if count is not None:
        block_sizes(name, parameter.shape[1 if view == "transpose" else 0], count)
        count = count if isinstance(count, int) else tuple(count)
    return view, count


def block_sizes(name: str, rows: int, blocks: Blocks | None) -> tuple[int, ...]:
    """Row counts of a matrix's blocks.

    Raises:
        ValueError: blocks do not add up to the rows, or one is empty.
    """
    if blocks is None:
        return (rows,)
    if isinstance(blocks, int):
        if blocks < 1 or rows % blocks:
            raise ValueError(f"{name!r} has {rows} rows, not divisible into {blocks} equal blocks")
        return (rows // blocks,) * blocks
    sizes = tuple(int(size) for size in blocks)
    if sum(sizes) != rows or min(sizes, default=0) < 1:
        raise ValueError(f"{name!r} has {rows} rows, blocks {sizes} add up to {sum(sizes)}")
    return sizes


def matrices(
    tensor: Tensor, view: str, sizes: tuple[int, ...], order: tuple[int, ...]
) -> list[Tensor]:
    """The matrices that ``tensor`` holds, each (R, C); views into it where its strides allow.

    Args:
        tensor: Parameter, gradient or momentum.
        view: ``"flatten"`` (out, rest), ``"batch"`` (E matrices) or ``"transpose"`` (a 2-D weight
            stored as (in, out)).
        sizes: Row counts of the blocks.
        order: Dimensions of the *parameter* from :func:`dimension_order`.
    """
    if view == "batch":
        return list(tensor.unbind(0))
    if view == "transpose":
        tensor = tensor.mT
    elif tensor.ndim > 2:
        tensor = tensor.permute(order).flatten(1)
    return [tensor] if len(sizes) == 1 else list(tensor.split(sizes))


def dimension_order(parameter: Tensor) -> tuple[int, ...]:
    """Rows first, then the other dimensions as they lie in memory.

    In this order a kernel flattens to (out, rest) without a copy, in channels-last memory too. The
    columns may come out permuted, which none of the matrix rules can tell.
    """
    rest = sorted(range(1, parameter.ndim), key=lambda d: (-parameter.stride(d), d))
    return (0, *rest)


def warn_of_empty_groups(groups: Sequence[Mapping[str, Any]], explicit: bool) -> None:
    """Say when a rule got nothing, as when FSDP1 has flattened every parameter to one dimension."""
    rules = {"matrix": 0, "elementwise": 0}
    for group in groups:
        rules[group["rule"]] += len(group["params"])
    if not rules["matrix"]:
        warnings.warn(
            "no parameter is updated by the matrix rule; every one goes to AdamW. Under FSDP1 all "
            "parameters are flattened to one dimension, and no matrix is left",
            UserWarning,
            stacklevel=3,
        )
    elif explicit and not rules["elementwise"]:
        warnings.warn(
            "the elementwise rule got no parameter; embeddings, norms and biases are usually there",
            UserWarning,
            stacklevel=3,
        )
