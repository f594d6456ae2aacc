"""The two covariances that are all a linear network ever sees of its data."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Array = Tensor | np.ndarray


class Covariances:
    """Σ11 = ⟨x xᵀ⟩, Σ31 = ⟨y xᵀ⟩ and ⟨|y|²⟩, gathered batch by batch, in float64.

    The batches may come from a stream or from shards: :meth:`merge` joins two, :meth:`all_reduce`
    those of all processes by one sum of N_in² + N_out·N_in numbers. Deviations from the running
    mean are summed, so a large mean costs no digits.
    """

    def __init__(self) -> None:
        """Nothing seen yet; the first batch decides the sizes."""
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None
        self._inputs = 0
        self._given: tuple[Tensor, Tensor, float | None] | None = None

    @classmethod
    def from_matrices(
        cls,
        sigma11: Float[Tensor, "inputs columns"],
        sigma31: Float[Tensor, "outputs others"],
        output_energy: float | None = None,
    ) -> Covariances:
        """Covariances that are known already; they are taken as they are.

        Args:
            sigma11: Symmetric, positive semi-definite.
            sigma31: Outputs by inputs.
            output_energy: ⟨|y|²⟩ in the same units; without it no loss can be told, only its excess
                over the floor.

        Raises:
            ValueError: sizes that do not fit, NaN or infinity, an asymmetric ``sigma11``.
        """
        n = sigma11.shape[0]
        if sigma11.shape != (n, n) or sigma31.shape[-1] != n:
            raise ValueError(
                "sigma11 must be [inputs, inputs] and sigma31 [outputs, inputs], got "
                f"{tuple(sigma11.shape)} and {tuple(sigma31.shape)}"
            )
        first, cross = sigma11.double(), sigma31.double()
        if not bool(first.isfinite().all() and cross.isfinite().all()):
            raise ValueError("sigma11 and sigma31 must be finite, but hold NaN or infinity")
        if float((first - first.mT).abs().max()) > 1e-6 * float(first.abs().max()):
            raise ValueError("sigma11 must be symmetric, as the covariance of the inputs is")
        made = cls()
        made._given = (first, cross, output_energy)
        return made

    def update(self, x: Array, y: Array) -> Covariances:
        """Take in a batch of P examples, ``x`` ``[P, N_in]`` and ``y`` ``[P, N_out]``.

        Raises:
            ValueError: rows or columns that do not match, NaN or infinity, no rows, covariances
                that were given as matrices.
        """
        self._refuse_given("update")
        x, y = _rows(x, "X"), _rows(y, "Y")
        if x.shape[0] != y.shape[0]:
            raise ValueError(
                f"X and Y must have the same number of rows, got {x.shape[0]} and {y.shape[0]}"
            )
        joint = torch.cat([x, y.to(x.device)], dim=1)
        mean = joint.mean(0)
        apart = joint - mean
        self._take(x.shape[0], mean, apart.mT @ apart, x.shape[1])
        return self

    def merge(self, other: Covariances) -> Covariances:
        """Take in what another has gathered.

        Raises:
            ValueError: other sizes; covariances that were given as matrices.
        """
        self._refuse_given("merge")
        other._refuse_given("merge")
        if other._mean is not None and other._scatter is not None:
            self._take(other.count, other._mean, other._scatter, other._inputs)
        return self

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Covariances:
        """Replace what every process has gathered by the whole; all of them must call it.

        Raises:
            ValueError: nothing was gathered here, or covariances were given as matrices.
        """
        self._refuse_given("all_reduce")
        mean, scatter = self._seen()
        # Raw moments add up; deviations do not.
        raw = scatter + self.count * torch.outer(mean, mean)
        packed = torch.cat([mean.new_tensor([self.count]), self.count * mean, raw.flatten()])
        torch.distributed.all_reduce(packed, group=group)
        self.count = round(float(packed[0]))
        self._mean = packed[1 : 1 + mean.numel()] / self.count
        whole = packed[1 + mean.numel() :].view_as(scatter)
        self._scatter = whole - self.count * torch.outer(self._mean, self._mean)
        return self

    def matrices(
        self, *, center: bool = False, reduction: str = "mean"
    ) -> tuple[Tensor, Tensor, float | None]:
        """Σ11 ``[N_in, N_in]``, Σ31 ``[N_out, N_in]`` and ⟨|y|²⟩.

        Args:
            center: Of deviations from the mean.
            reduction: ``"mean"`` over the examples, or ``"sum"``: then strengths are P times as
                large and everything happens P times as fast.

        Raises:
            ValueError: nothing gathered, another reduction, centring matrices that were given.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if self._given is not None:
            if center or reduction == "sum":
                raise ValueError(
                    "covariances that were given as matrices are taken as they are: "
                    "center and reduction='sum' need data"
                )
            return self._given
        mean, scatter = self._seen()
        if not center:
            scatter = scatter + self.count * torch.outer(mean, mean)
        if reduction == "mean":
            scatter = scatter / self.count
        n = self._inputs
        return scatter[:n, :n], scatter[n:, :n], float(scatter[n:, n:].trace())

    def _take(self, count: int, mean: Tensor, scatter: Tensor, inputs: int) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter, self._inputs = count, mean, scatter, inputs
            return
        if (inputs, mean.numel()) != (self._inputs, self._mean.numel()):
            raise ValueError(
                f"this batch has {inputs} inputs and {mean.numel() - inputs} outputs, those before "
                f"had {self._inputs} and {self._mean.numel() - self._inputs}"
            )
        # Chan, Golub and LeVeque 1983: joining means and sums of squared deviations.
        mean, scatter = mean.to(self._mean.device), scatter.to(self._mean.device)
        total, shift = self.count + count, mean - self._mean
        self._mean = self._mean + shift * (count / total)
        joint = torch.outer(shift, shift) * (self.count * count / total)
        self._scatter = self._scatter + scatter + joint
        self.count = total

    def _seen(self) -> tuple[Tensor, Tensor]:
        if self._mean is None or self._scatter is None:
            raise ValueError("no data yet: call update(x, y) first")
        return self._mean, self._scatter

    def _refuse_given(self, what: str) -> None:
        if self._given is not None:
            raise ValueError(f"{what} needs counts; these covariances were given as matrices")

    @property
    def mean(self) -> Tensor | None:
        """Mean of the inputs; None for covariances that were given as matrices."""
        return None if self._given is not None else self._seen()[0][: self._inputs]


def _rows(values: Array, name: str) -> Tensor:
    tensor = torch.as_tensor(values)
    if tensor.ndim != 2 or tensor.shape[0] == 0:
        raise ValueError(f"{name} must be [examples, features], got {tuple(tensor.shape)}")
    tensor = tensor.double()
    bad = ~tensor.isfinite()
    if bool(bad.any()):
        raise ValueError(f"{name} must be finite, but {int(bad.sum())} entries are NaN or infinite")
    return tensor
