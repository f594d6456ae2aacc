"""Orthogonal Adaptation: LoRA with a frozen, shared, orthonormal down-projection.

Formulas of arXiv 2312.02432 for a layer W ``[n, m]``, y = W x: ΔW = s A Bᵀ with A ``[n, r]``
trained from zero and B ``[m, r]`` fixed. Two adapters with B_iᵀB_j = 0 do not meet: ΔW_i acts on
inputs that ΔW_j leaves alone, and ΔW_i ΔW_jᵀ = A_i (B_iᵀB_j) A_jᵀ = 0, so they may be summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from stiefel.linalg._checks import HALF_TYPES, compute_dtype
from stiefel.merge.adapter_factors import LowRank
from stiefel.merge.shared_basis import (
    BASES,
    Basis,
    gaussian_columns,
    identity_word,
    random_columns,
    shared_basis,
    slot_columns,
)

Scheme = Literal["columns", "slots", "gaussian"]
SCHEMES = ("columns", "slots", "gaussian")
# Largest difference of a stored B to the one its seed gives: two units of bfloat16.
_SAME = 2e-2


@dataclass(frozen=True)
class Projection:
    """Which B an adapter has in one layer: all that has to be told to others."""

    m: int
    """Width of the input: ``in``, of a convolution channels × kernel, of an embedding rows."""
    r: int
    adapter_id: str | int
    layer: str = ""
    scheme: Scheme = "columns"
    basis: Basis = "dct"
    seed: int = 0
    slot: int | None = None

    def __post_init__(self) -> None:
        identity_word(self.adapter_id)
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if self.basis not in BASES:
            raise ValueError(f"basis must be one of {', '.join(BASES)}, got {self.basis!r}")
        if (self.slot is None) == (self.scheme == "slots"):
            raise ValueError(f"slot is for scheme='slots' and needed there, got {self.slot}")
        if not 1 <= self.r <= self.m:
            where = f" of {self.layer}" if self.layer else ""
            raise ValueError(f"r must be in 1..{self.m}, the input's width{where}, got {self.r}")
        if self.slot is not None:
            slot_columns(self.m, self.r, self.slot)

    @cached_property
    def columns(self) -> tuple[int, ...] | None:
        """Columns of the shared basis, in B's order; None for a Gaussian B."""
        if self.scheme == "gaussian":
            return None
        if self.slot is not None:
            return tuple(slot_columns(self.m, self.r, self.slot))
        return tuple(
            random_columns(
                self.m, self.r, seed=self.seed, adapter_id=self.adapter_id, layer=self.layer
            )
        )

    def matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "m r"]:
        """B, computed anew."""
        if self.columns is None:
            b = gaussian_columns(
                self.m, self.r, seed=self.seed, adapter_id=self.adapter_id, layer=self.layer
            )
            return b.to(dtype)
        return shared_basis(self.m, self.columns, basis=self.basis, seed=self.seed, dtype=dtype)

    def to_json(self) -> dict[str, Any]:
        """As plain values, the columns among them."""
        return {**asdict(self), "columns": self.columns and list(self.columns)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Projection:
        """Back from :meth:`to_json`.

        Raises ``ValueError`` where the stored columns are not those that the seed gives.
        """
        stored = values.get("columns")
        found = cls(**{name: value for name, value in values.items() if name != "columns"})
        if (stored is None) != (found.columns is None) or list(found.columns or ()) != (
            stored or []
        ):
            raise ValueError(
                f"{found.layer}: stored columns {stored} are not those of adapter "
                f"{found.adapter_id!r} under seed {found.seed}, {found.columns}"
            )
        return found


@dataclass(frozen=True)
class LayerUpdate:
    """ΔW = scaling · A Bᵀ of one layer, with where B comes from."""

    projection: Projection
    a: Float[Tensor, "n r"]
    scaling: float
    kernel: tuple[int, ...] = ()
    kind: str = "linear"
    """``linear``, ``conv``, ``embedding``, or ``turned`` (a weight stored ``[in, out]``)."""
    down: Float[Tensor, "r m"] | None = None
    """Bᵀ where it is at hand; computed where a better precision is needed."""

    def b(self, dtype: torch.dtype) -> Float[Tensor, "m r"]:
        """B on the device of ``a``."""
        if self.down is not None and self.down.dtype.itemsize >= dtype.itemsize:
            return self.down.T.to(dtype)
        return self.projection.matrix(dtype).to(self.a.device)

    def low_rank(self) -> LowRank:
        """The factors in the orientation of the module's weight; float32 or better."""
        work = compute_dtype(self.a.dtype)
        b, a = self.b(work), self.a.detach().to(work)
        if self.kind == "embedding":
            return LowRank(b, a.T, self.scaling, embedding=True)
        return LowRank(a, b.T, self.scaling, self.kernel)


def geometry(base: nn.Module, name: str = "base") -> tuple[str, int, int, tuple[int, ...]]:
    """Kind, output width n, input width m and kernel of a layer that can be adapted.

    Raises:
        TypeError: neither Linear, Conv2d, Embedding nor a layer that stores ``[in, out]``
            (transformers' Conv1D), or quantised.
        ValueError: a grouped convolution, whose groups have inputs of their own.
    """
    if not isinstance(base, nn.Linear | nn.Conv2d | nn.Embedding) and not _is_turned(base):
        raise TypeError(
            f"{name} must be Linear, Conv2d, Embedding or transformers' Conv1D, got "
            f"{type(base).__name__}"
        )
    weight = base.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point weight (not quantised)")
    if isinstance(base, nn.Conv2d):
        if base.groups != 1:
            raise ValueError(f"{name} is a convolution in {base.groups} groups; one is supported")
        n, _, *kernel = weight.shape
        return "conv", n, weight[0].numel(), tuple(kernel)
    if isinstance(base, nn.Embedding):
        return "embedding", weight.shape[1], weight.shape[0], ()
    if _is_turned(base):
        return "turned", weight.shape[1], weight.shape[0], ()
    return "linear", weight.shape[0], weight.shape[1], ()


def _is_turned(base: nn.Module) -> bool:
    # By name, so that transformers need not be there.
    return type(base).__name__ == "Conv1D" and hasattr(base, "nf")


class OrthogonalAdapter(nn.Module):
    """A frozen layer plus s A Bᵀ, B orthonormal columns of a basis that everybody shares.

    Args:
        base: Linear, Conv2d (one group), Embedding or transformers' Conv1D; its parameters are
            frozen here.
        r: rank; the paper's 20.
        adapter_id: who this is; with ``layer`` and ``seed`` it decides on the columns.
        scheme: ``"columns"`` (the paper's) draws r columns at random: two adapters share r²/m of
            them on average. ``"slots"`` gives columns slot·r … : none shared between slots.
            ``"gaussian"`` needs no basis and is orthogonal only on average.
        basis, seed: of :func:`shared_basis`; the same for all adapters that will be merged.
        slot: number of the slot, for ``"slots"``.
        alpha: s = alpha / r; None: r, so s = 1.
        layer: name of the layer in its model.

    ``A`` ``[n, r]`` is the only parameter (zero: the start is the base); ``down`` = Bᵀ ``[r, m]``
    a buffer. Both are float32, or float64 for a float64 base; ``.to(torch.bfloat16)`` leaves B in
    float32, for rounded columns are orthogonal to 1e-2 only.

    Raises:
        ValueError: r or slot out of range, a grouped convolution.
        TypeError: another layer, quantised weights.
    """

    down: Tensor

    def __init__(
        self,
        base: nn.Module,
        r: int = 20,
        *,
        adapter_id: str | int,
        scheme: Scheme = "columns",
        basis: Basis = "dct",
        seed: int = 0,
        slot: int | None = None,
        alpha: float | int | None = None,
        layer: str = "",
    ) -> None:
        super().__init__()
        self.kind, n, m, self.kernel = geometry(base, layer or "base")
        self.projection = Projection(m, r, adapter_id, layer, scheme, basis, seed, slot)
        self.scaling = 1.0 if alpha is None else float(alpha) / r
        self.base = base.requires_grad_(False)
        weight = base.weight
        assert isinstance(weight, Tensor)  # noqa: S101 - geometry checked it
        work = compute_dtype(weight.dtype)
        self.A = nn.Parameter(torch.zeros(n, r, dtype=work, device=weight.device))
        down = self.projection.matrix(work).T.contiguous()
        self.register_buffer("down", down.to(weight.device))

    @property
    def B(self) -> Float[Tensor, "m r"]:
        """The fixed columns."""
        return self.down.T

    @property
    def update(self) -> LayerUpdate:
        """What this adapter adds, apart from its base."""
        return LayerUpdate(self.projection, self.A, self.scaling, self.kernel, self.kind, self.down)

    def forward(self, x: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*output"]:
        """The layer's output plus s A Bᵀ x; in the dtype of the layer's output."""
        y = self.base(x)
        down = self.down.to(self.A.dtype)
        if self.kind == "embedding":
            h = functional.embedding(x, down.T)
            scale = getattr(self.base, "embed_scale", 1.0)
            return y + (functional.linear(h, self.A) * (self.scaling * scale)).to(y.dtype)
        x = x.to(self.A.dtype)
        if self.kind == "conv":
            assert isinstance(self.base, nn.Conv2d)  # noqa: S101 - for the type checker
            kernel = down.reshape(len(down), -1, *self.kernel)
            h = self.base._conv_forward(x, kernel, None)
            added = functional.conv2d(h, self.A[..., None, None])
            return torch.add(y, added.to(y.dtype), alpha=self.scaling)
        h = functional.linear(x, down)
        if y.dtype == h.dtype == self.A.dtype:
            # One pass over y instead of two: the product is added where it arises.
            flat = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.A.T, alpha=self.scaling)
            return flat.view(y.shape)
        added = functional.linear(h, self.A)
        return torch.add(y, added.to(y.dtype), alpha=self.scaling)

    def extra_repr(self) -> str:
        """What tells this adapter from others."""
        p = self.projection
        return f"r={p.r}, adapter_id={p.adapter_id!r}, scheme={p.scheme}, seed={p.seed}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthogonalAdapter:
        super()._apply(fn, recurse)
        if self.down.dtype in HALF_TYPES:
            self.down = self.projection.matrix().T.contiguous().to(self.down.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = state_dict.get(f"{prefix}down")
        if stored is not None:
            if not self._is_own(stored):
                error_msgs.append(
                    f"{prefix}down is not the B of {self.projection}: it was made with another "
                    "seed, basis, adapter or slot"
                )
            state_dict[f"{prefix}down"] = self.down
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _is_own(self, stored: Tensor) -> bool:
        if stored.shape != self.down.shape:
            return False
        return bool((stored.to(self.down) - self.down).abs().max() <= _SAME * self.down.abs().max())
