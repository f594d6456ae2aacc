"""PEFT adapters on disk (LoRA, OFT): their factors, and folding them into weights.

A LoRA of module W ``[out, in]`` is ΔW = s B A with B ``[out, r]`` and A ``[r, in]``. Only the
module asked for is ever read, and ΔW is added to the weight without standing in memory by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.checkpoint import Checkpoint
from stiefel.linalg._checks import compute_dtype
from stiefel.merge.adapter_config import (
    PICKLE_FILE,
    WEIGHTS_FILE,
    Layout,
    lay_out,
    lora_rank,
    lora_scaling,
    read_config,
)
from stiefel.merge.adapter_factors import LowRank
from stiefel.merge.adapter_rotation import (
    block_size,
    project_blocks,
    rotate_inputs,
    rotation_blocks,
)

# Version from which Cayley-Neumann rotations have today's numbers.
_NEUMANN_SINCE = (0, 18)


class Adapter:
    """A PEFT adapter folder, read by its headers; tensors are read when they are asked for.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors.
        unknown: what to do with keys that fit nothing: ``"error"`` or ``"warn"``.

    Raises:
        FileNotFoundError: the folder, its settings or its safetensors file are not there.
        ValueError: a pickle (adapter_model.bin) in place of safetensors; unknown keys, named;
            settings that cannot be taken (:func:`~stiefel.merge.adapter_config.check_config`);
            factors that are missing or do not fit each other or the settings, named.
    """

    def __init__(self, path: str | Path, *, unknown: str = "error") -> None:
        if unknown not in ("error", "warn"):
            raise ValueError(f"unknown must be 'error' or 'warn', got {unknown!r}")
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a folder; an adapter is a folder")
        self.config: dict[str, Any] = read_config(self.path)
        self.kind: str = self.config["peft_type"]
        self.file = self.path / WEIGHTS_FILE
        if not self.file.is_file():
            if (self.path / PICKLE_FILE).is_file():
                raise ValueError(
                    f"{self.path} holds {PICKLE_FILE}, a pickle, which can run code when it is "
                    f"read. Save the adapter as {WEIGHTS_FILE} (safe_serialization=True)"
                )
            raise FileNotFoundError(f"{self.path} holds no {WEIGHTS_FILE}")
        self._stored = Checkpoint(self.file)
        self._shapes = {key: tuple(info.shape) for key, info in self._stored.tensors.items()}
        self._layout: Layout = lay_out(self._shapes, self.config)
        self.unknown: tuple[str, ...] = self._layout.unknown
        if self.unknown:
            text = f"{self.path}: keys that fit nothing in a {self.kind} adapter: " + ", ".join(
                self.unknown
            )
            if unknown == "error":
                raise ValueError(text)
            warnings.warn(text, stacklevel=2)
        self._check()

    def __repr__(self) -> str:
        return f"Adapter({str(self.path)!r}, {self.kind}, {len(self.modules)} modules)"

    # What is in it: headers only.

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted modules, sorted."""
        return tuple(sorted(self._layout.parts))

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the base tensors that are replaced whole (modules_to_save, biases)."""
        return tuple(sorted(self._layout.replaced))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all base tensors that :meth:`fold` changes, sorted."""
        names = {f"{module}.weight" for module in self.modules}
        names |= {f"{m}.bias" for m, p in self._layout.parts.items() if "lora_B.bias" in p}
        return tuple(sorted(names | set(self.replaced)))

    def parts(self, module: str) -> tuple[str, ...]:
        """Stored tensors of a module (``"lora_A.weight"``, …); empty if it is not adapted."""
        return tuple(self._layout.parts.get(module, ()))

    def shape(self, module: str) -> tuple[int, ...]:
        """What has to agree between adapters of a module: of a LoRA the shape ``[out, in, …]`` of
        ΔW, of an OFT that of the stored triangles ``[blocks, b(b - 1)/2]``."""
        if self.kind == "OFT":
            return self._shapes[next(iter(self._parts(module).values()))]
        return self._weight_shape(module)

    def is_dora(self, module: str) -> bool:
        """Whether the module's rows are rescaled as well (DoRA), which no sum of updates does."""
        return any(part.startswith("lora_magnitude_vector") for part in self.parts(module))

    def resolve(self, names: Iterable[str]) -> dict[str, str]:
        """Tensor of a checkpoint → tensor of this adapter, for all that :meth:`fold` changes.

        Names agree exactly, or after a first component (``model.``) is added on either side.

        Raises:
            KeyError: tensors that the adapter changes and the checkpoint lacks, all named.
        """
        have = set(names)
        stripped = {name.partition(".")[2]: name for name in have if "." in name}
        found, missing = {}, []
        for tensor in self.tensors:
            rest = tensor.partition(".")[2]
            for candidate in (tensor, stripped.get(tensor), rest if rest in have else None):
                if candidate in have:
                    found[candidate] = tensor
                    break
            else:
                missing.append(tensor)
        if missing:
            raise KeyError(f"{self.path} changes tensors that are not there: {', '.join(missing)}")
        return found

    def check_shape(self, name: str, shape: Iterable[int]) -> None:
        """Raise ``ValueError`` unless base tensor ``name`` may have this shape; headers only."""
        shape = tuple(shape)
        if name in self._layout.replaced:
            allowed = [self._shapes[self._layout.replaced[name]]]
        elif name.endswith(".bias"):
            allowed = [self._shapes[self._parts(name[:-5])["lora_B.bias"]]]
        elif self.kind == "OFT":
            self._rotation_axis(name, shape)
            return
        else:
            allowed = [self._weight_shape(name.removesuffix(".weight"))]
            if len(allowed[0]) == 2 and not self._is_embedding(name.removesuffix(".weight")):
                allowed.append(allowed[0][::-1])
        if shape not in allowed:
            raise ValueError(
                f"{name} has shape {shape}, but {self.path} is made for "
                f"{' or '.join(map(str, allowed))}"
            )

    # Its numbers.

    def tensor(self, module: str, part: str) -> Tensor:
        """One stored tensor, checked to be finite; ``part`` as in the file: ``"lora_A.weight"``."""
        parts = self._parts(module)
        if part not in parts:
            raise KeyError(f"{module} of {self.path} has no {part}; it has {', '.join(parts)}")
        return self._read(parts[part])

    def low_rank(self, module: str) -> LowRank:
        """The factors of a LoRA module, in the dtype of the file.

        Raises ``KeyError`` for a module that is not adapted, ``TypeError`` for an OFT adapter.
        """
        if self.kind != "LORA":
            raise TypeError(f"{self.path} is an {self.kind} adapter: it has no low-rank factors")
        scaling = lora_scaling(self.config, module)
        if self._is_embedding(module):
            a, b = (self.tensor(module, f"lora_embedding_{x}") for x in "AB")
            return LowRank(a.T, b.T, scaling, embedding=True)
        a, b = (self.tensor(module, f"lora_{x}.weight") for x in "AB")
        return LowRank(b.flatten(1), a.flatten(1), scaling, tuple(a.shape[2:]))

    def rotation(self, module: str) -> Float[Tensor, "blocks b b"]:
        """Blocks R of an OFT module, x → x R; a single block if all share it.

        Raises ``KeyError`` for a module that is not adapted, ``TypeError`` for a LoRA.
        """
        if self.kind != "OFT":
            raise TypeError(f"{self.path} is a {self.kind} adapter: it has no rotations")
        (part,) = self._parts(module)
        triangle = self.tensor(module, part)
        triangle = triangle.to(compute_dtype(triangle.dtype))
        if self.config.get("coft"):
            triangle = project_blocks(triangle, self.config.get("eps", 6e-5))
        terms = None
        if self.config.get("use_cayley_neumann", False):
            terms = self.config.get("num_cayley_neumann_terms", 5)
        return rotation_blocks(triangle, neumann_terms=terms)

    def replacement(self, name: str) -> Tensor:
        """What stands in place of base tensor ``name`` (one of :attr:`replaced`)."""
        return self._read(self.key(name))

    def key(self, name: str) -> str:
        """The key in the file under which replaced tensor ``name`` stands."""
        if name not in self._layout.replaced:
            raise KeyError(f"{self.path} does not replace {name}")
        return self._layout.replaced[name]

    def fold(self, name: str, base: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor that the adapted model has in place of ``base``, a new tensor.

        LoRA: W + s B A; DoRA: its rows rescaled to the stored magnitudes; OFT: W blockdiag(R)ᵀ;
        modules_to_save and biases: what the adapter stores. A weight stored ``[in, out]``
        (fan_in_fan_out) is recognised by its shape, a square one by the settings. Computed in
        float32 (float64 for a float64 base) and rounded once.

        Args:
            name: base tensor as the adapter calls it, one of :attr:`tensors`.
            base: its values.
            dtype: of the result; None: as ``base``.

        Raises:
            KeyError: the adapter does not change ``name``.
            ValueError: wrong shape, or numbers that are not finite.
            TypeError: ``base`` is not real floating point (quantised weights).
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path} does not change {name}")
        if not base.is_floating_point():
            raise TypeError(f"{name} must be real floating point to fold into, got {base.dtype}")
        self.check_shape(name, base.shape)
        target = base.dtype if dtype is None else dtype
        work = compute_dtype(base.dtype)
        if name in self._layout.replaced:
            value = self.replacement(name).to(base.device, work)
        else:
            value = base.to(work, copy=True)
        module, _, parameter = name.rpartition(".")
        parts = self._layout.parts.get(module, {})
        if parameter == "bias" and "lora_B.bias" in parts:
            shift = self.tensor(module, "lora_B.bias").to(base.device, work)
            value = value.add_(shift, alpha=lora_scaling(self.config, module))
        elif parameter == "weight" and parts:
            fold = self._fold_rotation if self.kind == "OFT" else self._fold_low_rank
            value = fold(module, value)
        return value.to(target)

    def _fold_low_rank(self, module: str, weight: Tensor) -> Tensor:
        factors = self.low_rank(module)
        up, down = (x.to(weight.device, weight.dtype) for x in (factors.up, factors.down))
        turned = self._is_transposed(factors.shape, weight.shape)
        matrix = (weight.T if turned else weight).reshape(up.shape[0], -1)
        matrix = matrix.addmm_(up, down, alpha=factors.scaling)
        if self.is_dora(module):
            part = next(p for p in self._parts(module) if p.startswith("lora_magnitude_vector"))
            size = self.tensor(module, part).to(weight.device, weight.dtype).flatten()
            # Rows of a layer, columns of an embedding: what belongs to one output.
            along = 0 if factors.embedding else 1
            norm = torch.linalg.vector_norm(matrix, dim=along)
            matrix *= (size / norm).unsqueeze(along)
            if not bool(torch.isfinite(matrix).all()):
                raise ValueError(f"{module}: an output of W + ΔW is zero, DoRA cannot scale it")
        return matrix.T if turned else matrix.reshape(weight.shape)

    def _fold_rotation(self, module: str, weight: Tensor) -> Tensor:
        blocks = self.rotation(module).to(weight.device, weight.dtype)
        turned = self._rotation_axis(f"{module}.weight", tuple(weight.shape))
        matrix = weight.T if turned else weight.flatten(1)
        embedding = "oft_embedding_R.weight" in self._parts(module)
        matrix = rotate_inputs(matrix, blocks, outputs=embedding)
        return matrix.T if turned else matrix.reshape(weight.shape)

    # Within.

    def _parts(self, module: str) -> dict[str, str]:
        if module not in self._layout.parts:
            raise KeyError(f"{self.path} does not adapt {module}")
        return self._layout.parts[module]

    def _is_embedding(self, module: str) -> bool:
        return "lora_embedding_A" in self._parts(module)

    def _read(self, key: str) -> Tensor:
        value = self._stored.read(key)
        bad = value.numel() - int(value.isfinite().sum())
        if bad:
            raise ValueError(
                f"{key} of {self.path} must be finite, but {bad} of its {value.numel()} entries "
                "are NaN or infinite"
            )
        return value

    def _weight_shape(self, module: str) -> tuple[int, ...]:
        parts = self._parts(module)
        if self._is_embedding(module):
            a, b = (self._shapes[parts[f"lora_embedding_{x}"]] for x in "AB")
            return (a[1], b[0])
        a, b = (self._shapes[parts[f"lora_{x}.weight"]] for x in "AB")
        return (b[0], *a[1:])

    def _is_transposed(self, expected: tuple[int, ...], shape: Iterable[int]) -> bool:
        shape = tuple(shape)
        if len(shape) != 2 or expected[0] != expected[1]:
            return shape != expected
        return bool(self.config.get("fan_in_fan_out"))

    def _rotation_axis(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the weight is stored ``[in, out]``; raises where its input does not fit."""
        module = name.removesuffix(".weight")
        parts = self._parts(module)
        (part,) = parts
        count, elements = self._shapes[parts[part]]
        b = block_size(elements)
        turned = bool(self.config.get("fan_in_fan_out")) and len(shape) == 2
        width = shape[0] if turned else torch.Size(shape[1:]).numel()
        fits = width % b == 0 if self.config.get("block_share") else width == count * b
        if len(shape) < 2 or not fits:
            raise ValueError(
                f"{name} has shape {shape}, but {self.path} turns inputs in "
                f"{'shared' if self.config.get('block_share') else count} blocks of {b}"
            )
        return turned

    def _check(self) -> None:
        """Factors are complete and fit each other and the settings; headers only."""
        check = self._check_rotation if self.kind == "OFT" else self._check_low_rank
        for module in self.modules:
            check(module)
        if not self.tensors:
            raise ValueError(f"{self.path} changes nothing: {self.file.name} has no known keys")
        if self.kind == "OFT" and self.config.get("use_cayley_neumann"):
            version = str(self.config.get("peft_version") or "0.0")
            if _version(version) < _NEUMANN_SINCE:
                warnings.warn(
                    f"{self.path}: the Cayley-Neumann rotations of PEFT before 0.18 had other "
                    f"numbers (peft_version: {self.config.get('peft_version')}); today's are used",
                    stacklevel=3,
                )

    def _check_low_rank(self, module: str) -> None:
        parts = self._parts(module)
        pair = (
            ("lora_embedding_A", "lora_embedding_B")
            if any(p.startswith("lora_embedding") for p in parts)
            else ("lora_A.weight", "lora_B.weight")
        )
        absent = [part for part in pair if part not in parts]
        if absent:
            raise ValueError(f"{self.path}: {module} has no {', '.join(absent)}")
        a, b = (self._shapes[parts[part]] for part in pair)
        if len(a) != len(b) or len(a) < 2 or a[0] != b[1]:
            raise ValueError(
                f"{self.path}: factors of {module} do not fit: {pair[0]} {a}, {pair[1]} {b}; "
                "[r, in] and [out, r] are needed (LoRA of grouped convolutions has no such product)"
            )
        rank = lora_rank(self.config, module)
        if a[0] != rank:
            raise ValueError(
                f"{self.path}: {module} has rank {a[0]} in the file, {rank} by r and rank_pattern"
            )

    def _check_rotation(self, module: str) -> None:
        parts = self._parts(module)
        if len(parts) != 1:
            raise ValueError(f"{self.path}: {module} has both {' and '.join(parts)}")
        shape = self._shapes[next(iter(parts.values()))]
        if len(shape) != 2 or (self.config.get("block_share") and shape[0] != 1):
            raise ValueError(f"{self.path}: oft_R of {module} has shape {shape}, not [blocks, n]")
        block_size(shape[1])


def _version(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0]
    return (int(major) if major.isdigit() else 0, int(minor) if minor.isdigit() else 0)
