"""OFT adapters: their merge, which is exact on what they store, and folding into weights.

Part B of OrthoMerge (arXiv 2602.05943). An OFT adapter stores the strict upper triangles v of skew
blocks: Lie-algebra coordinates already. Merging them needs neither the base nor any rotation.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import compute_dtype
from stiefel.merge.adapter_config import KEY_PREFIX
from stiefel.merge.adapter_files import free_folder, write_adapter
from stiefel.merge.adapter_rotation import project_blocks, rotate_inputs, rotation_blocks
from stiefel.merge.arithmetic import Number
from stiefel.merge.lie_average import check_rotation_weights, merge_coordinates
from stiefel.merge.peft_adapters import Adapter

# Settings that say what the stored numbers mean: they have to agree.
_MEANING = ("block_share", "fan_in_fan_out")


def fold_oft(
    weight: Float[Tensor, "out in"],
    triangle: Float[Tensor, "blocks elements"],
    *,
    neumann_terms: int | None = None,
) -> Float[Tensor, "out in"]:
    """The weight that an OFT adapter makes of ``weight``: W blockdiag(Rᵀ), in O(out in b).

    Args:
        weight: ``[out, in]``; its dtype is the result's, half types are computed in float32.
        triangle: strict upper triangles, ``[in / b, b (b - 1) / 2]``, or one that all share.
        neumann_terms: PEFT's convention. None is ``use_cayley_neumann: false``, the exact rotation
            W (I + Q)(I - Q)⁻¹; a number of terms is ``true``, a series that turns the other way.

    Raises:
        ValueError: the blocks do not fill the input, or are not finite.

    Differentiable. Source: Qiu et al., arXiv 2306.07280; PEFT 0.21 for the series.
    """
    work = compute_dtype(torch.promote_types(weight.dtype, triangle.dtype))
    blocks = rotation_blocks(triangle.to(work), neumann_terms=neumann_terms)
    return rotate_inputs(weight.to(work), blocks).to(weight.dtype)


def merge_oft_adapters(
    paths: Sequence[str | Path],
    out_path: str | Path,
    *,
    weights: Sequence[Number] | None = None,
    intensity: Number = 1.0,
    overwrite: bool = False,
) -> dict[str, float]:
    """Merge PEFT OFT adapters into one, by magnitude-corrected averages of what they store.

    One correction factor a module. A module that an adapter lacks is not turned by it (Q = 0) and
    counts in the mean. Other tensors (biases, saved heads): mean over the adapters that have them.
    The base model is not read.

    Args:
        paths: adapter folders (adapter_config.json and adapter_model.safetensors).
        out_path: folder of the result, which PEFT loads; settings are those of the first adapter.
        weights: not negative, one an adapter; 1 by default.
        intensity: factor of the merged coordinates.
        overwrite: replace what is at ``out_path``.

    Returns:
        c of every module: how much longer its merged coordinate is than the plain mean.

    Raises:
        ValueError: no paths; blocks, settings or shapes that do not agree; NaN or infinities; see
            also :class:`stiefel.merge.Adapter`.
        TypeError: not an OFT adapter.
        FileNotFoundError, FileExistsError: a folder is missing, or in the way.

    Warns:
        UserWarning: adapters of different base models, or with rotations of opposite conventions
            (those are brought to the first's). CancellationWarning: rotations that cancel.

    Source: arXiv 2602.05943, merging of OFT adapters.
    """
    if len(paths) == 0:
        raise ValueError("paths must not be empty")
    found = check_rotation_weights(weights, len(paths))
    folder = free_folder(out_path, overwrite)
    adapters = [Adapter(path) for path in paths]
    _check(adapters)
    signs = _signs(adapters)
    tensors: dict[str, Tensor] = {}
    corrections = {}
    for module in sorted({m for a in adapters for m in a.modules}):
        part, triangles = _triangles(adapters, signs, module)
        merged = merge_coordinates(triangles, found, intensity)
        plain = merge_coordinates(triangles, found, intensity, correct=False)
        size = float(torch.linalg.vector_norm(plain))
        corrections[module] = float(torch.linalg.vector_norm(merged)) / size if size > 0 else 0.0
        dtype = next(a for a in adapters if module in a.modules).tensor(module, part).dtype
        tensors[f"{KEY_PREFIX}{module}.{part}"] = merged.to(dtype)
    for name in sorted({n for a in adapters for n in a.replaced}):
        owners = [(a, w) for a, w in zip(adapters, found, strict=True) if name in a.replaced]
        tensors[owners[0][0].key(name)] = _mean(name, owners)
    write_adapter(folder, _settings(adapters), tensors)
    return corrections


def _check(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for adapter in adapters:
        if adapter.kind != "OFT":
            raise TypeError(f"{adapter.path} is a {adapter.kind} adapter, not OFT")
        for key in _MEANING:
            given, expected = bool(adapter.config.get(key)), bool(first.config.get(key))
            if given != expected:
                raise ValueError(
                    f"{key} is {given} in {adapter.path}, but {expected} in {first.path}"
                )
        names = [a.config.get("base_model_name_or_path") for a in (adapter, first)]
        if names[0] != names[1]:
            warnings.warn(
                f"{adapter.path} was made for {names[0]!r}, {first.path} for {names[1]!r}: "
                "rotations of different bases do not mix",
                stacklevel=3,
            )


def _signs(adapters: Sequence[Adapter]) -> list[float]:
    """-1 for adapters whose stored numbers turn the other way than the first one's."""
    series = [bool(a.config.get("use_cayley_neumann")) for a in adapters]
    if len(set(series)) > 1:
        warnings.warn(
            "some adapters use Cayley-Neumann series and others exact rotations, which turn the "
            f"other way: all are brought to the convention of {adapters[0].path}",
            stacklevel=3,
        )
    return [1.0 if s == series[0] else -1.0 for s in series]


def _triangles(
    adapters: Sequence[Adapter], signs: Sequence[float], module: str
) -> tuple[str, list[Tensor]]:
    """The stored triangles of a module, zero where an adapter lacks it, and their key's end."""
    owner = next(a for a in adapters if module in a.modules)
    (part,) = owner.parts(module)
    shape = tuple(owner.tensor(module, part).shape)
    triangles = []
    for adapter, sign in zip(adapters, signs, strict=True):
        if module not in adapter.modules:
            triangles.append(torch.zeros(shape))
            continue
        if part not in adapter.parts(module):
            raise ValueError(
                f"{module}: {owner.path} stores {part}, {adapter.path} "
                f"{', '.join(adapter.parts(module))}"
            )
        triangle = adapter.tensor(module, part).float()
        if tuple(triangle.shape) != shape:
            raise ValueError(
                f"{module}: blocks of {adapter.path} are {tuple(triangle.shape)} numbers, those "
                f"of {owner.path} {shape}: only equal block sizes can be merged"
            )
        if adapter.config.get("coft"):
            triangle = project_blocks(triangle, adapter.config.get("eps", 6e-5))
        triangles.append(sign * triangle)
    return part, triangles


def _mean(name: str, owners: Sequence[tuple[Adapter, float]]) -> Tensor:
    """Weighted mean of a tensor that adapters replace whole, in float32."""
    values = [adapter.replacement(name) for adapter, _ in owners]
    for (adapter, _), value in zip(owners, values, strict=True):
        if value.shape != values[0].shape:
            raise ValueError(
                f"{name} of {adapter.path} has shape {tuple(value.shape)}, that of "
                f"{owners[0][0].path} {tuple(values[0].shape)}"
            )
    weights = [weight for _, weight in owners]
    if sum(weights) == 0:  # nobody who counts has it
        weights = [1.0] * len(owners)
    total = sum(w * v.float() for w, v in zip(weights, values, strict=True))
    return (total / sum(weights)).to(values[0].dtype)  # pyrefly: ignore


def _settings(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The first adapter's settings, for the modules of all."""
    config = dict(adapters[0].config)
    targets = [a.config.get("target_modules") for a in adapters]
    if any(t != targets[0] for t in targets):
        config["target_modules"] = sorted({m for a in adapters for m in a.modules})
    saved = [_listed(a.config, "modules_to_save") for a in adapters]
    if any(saved):
        config["modules_to_save"] = sorted(set().union(*saved))
    if any(a.config.get("coft") for a in adapters):
        config["coft"] = False  # the bound was applied before the merge
    return config


def _listed(config: Mapping[str, Any], key: str) -> set[str]:
    return set(config.get(key) or ())
