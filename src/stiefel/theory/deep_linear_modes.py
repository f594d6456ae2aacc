"""What a deep linear network can learn of a task: the modes of its covariances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.theory.deep_linear_covariances import Array, Covariances

# Input directions with less than this part of the largest variance count as absent.
_RANK_TOLERANCE = 1e-10
# Sheet, check E: modes weaker than this part of the strongest are an arbitrary null-space basis.
_MODE_TOLERANCE = 1e-8


@dataclass(frozen=True)
class TaskModes:
    """Modes of a task, strongest first; made by :func:`task_modes`. All tensors are float64."""

    U: Float[Tensor, "outputs modes"]
    """Output side, orthonormal columns."""
    S: Float[Tensor, " modes"]
    """Strengths: the singular values of Σ31 that are not 0."""
    V: Float[Tensor, "inputs modes"]
    """Input side, orthonormal columns; of the whitened inputs where they were whitened."""
    sigma11: Float[Tensor, "inputs inputs"]
    """Covariance of the (whitened) inputs."""
    sigma31: Float[Tensor, "outputs inputs"]
    """Covariance of outputs with (whitened) inputs."""
    loss_floor: float | None
    """½⟨|y − Wx|²⟩ of the best linear map; None where ⟨|y|²⟩ is not known."""
    optimum: Float[Tensor, "outputs inputs"]
    """That map."""
    whitening: Float[Tensor, "raw inputs"] | None
    """Takes raw inputs to whitened ones, x ↦ x·whitening; None where they were not whitened."""
    dropped_energy: float
    """Part of the inputs' variance in the directions that whitening left out."""
    mean: Float[Tensor, " raw"] | None
    """What centring subtracts from raw inputs; None where nothing was centred."""

    @property
    def delta(self) -> Float[Tensor, " modes"]:
        """Input variance along each mode, vᵀ Σ11 v: ``delta`` of :func:`mode_curve`."""
        return (self.V * (self.sigma11 @ self.V)).sum(0)

    @property
    def mixing(self) -> float:
        """‖Σ11 V − V·diag(δ)‖ / ‖Σ11 V‖ (Frobenius): 0 where V is an eigenbasis of Σ11.

        Above 0 the modes do not learn independently, and :func:`mode_curve` is approximate.
        """
        image = self.sigma11 @ self.V
        return float(torch.linalg.norm(image - self.V * self.delta) / torch.linalg.norm(image))

    def transform(self, x: Array) -> Tensor:
        """Raw inputs ``[..., raw]`` as these modes see them: centred and whitened as the data were.

        Raises:
            ValueError: another number of features.
        """
        rows = torch.as_tensor(x).double()
        raw = self.whitening.shape[0] if self.whitening is not None else self.V.shape[0]
        if rows.shape[-1] != raw:
            raise ValueError(f"x must have {raw} features, got {tuple(rows.shape)}")
        rows = rows if self.mean is None else rows - self.mean
        return rows if self.whitening is None else rows @ self.whitening

    def strengths(self, product: Float[Tensor, "*batch outputs inputs"]) -> Tensor:
        """uᵀ W v of every mode, ``[..., modes]``, for whole maps W = W_D…W_1."""
        u, v = self.U.to(product), self.V.to(product)
        return ((u.mT @ product) * v.mT).sum(-1)

    def excess(self, product: Float[Tensor, "*batch outputs inputs"]) -> Tensor:
        """Loss above the floor, ½ tr (W − W*) Σ11 (W − W*)ᵀ, ``[...]``."""
        apart = product - self.optimum.to(product)
        if self.whitening is not None:
            return apart.square().sum((-2, -1)) / 2
        return ((apart @ self.sigma11.to(product)) * apart).sum((-2, -1)) / 2


def task_modes(
    X: Array | Covariances | Iterable[tuple[Array, Array]],
    Y: Array | None = None,
    *,
    whiten: bool = True,
    k: int | None = None,
    center: bool = False,
    reduction: str = "mean",
) -> TaskModes:
    """Modes of the task that takes X to Y: the singular vectors and values of Σ31.

    Args:
        X: Inputs ``[P, N_in]`` with ``Y``; or :class:`Covariances`; or a stream of batches
            ``(x, y)``, each seen once.
        Y: Outputs ``[P, N_out]``, row by row those of X.
        whiten: Turn the inputs so that Σ11 = I, as the closed forms assume; inputs without
            variance are left out.
        k: Principal components of the inputs that whitening keeps; all that have variance if None.
        center: Subtract the means of X and Y. Centred one-hot targets of C classes have C − 1
            modes.
        reduction: ``"mean"`` or ``"sum"`` over examples; sums make the strengths of raw inputs P
            times as large.

    Returns:
        :class:`TaskModes`; ``dropped_energy`` says how much of the inputs whitening left out.

    Raises:
        ValueError: rows that do not match, NaN, k without whitening or above the rank, inputs and
            outputs without any correlation.

    Source: arXiv 1312.6120, section 1 (eqs. 3 to 5).
    """
    gathered = _gather(X, Y)
    sigma11, sigma31, energy = gathered.matrices(center=center, reduction=reduction)
    whitening, dropped = None, 0.0
    if whiten:
        whitening, dropped = _whitening(sigma11, k)
        sigma31 = sigma31 @ whitening
        sigma11 = torch.eye(whitening.shape[1], dtype=sigma11.dtype, device=sigma11.device)
        optimum = sigma31
    elif k is not None:
        raise ValueError(f"k counts the components that whitening keeps; whiten=False, k={k}")
    else:
        inverse = torch.linalg.pinv(sigma11, rtol=_RANK_TOLERANCE, hermitian=True)
        optimum = sigma31 @ inverse
    u, s, vh = torch.linalg.svd(sigma31, full_matrices=False)
    count = int((s > _MODE_TOLERANCE * s[0]).sum())
    if count == 0:
        raise ValueError("Y does not depend linearly on X: there is no mode to learn")
    explained = float((optimum * sigma31).sum())
    return TaskModes(
        U=u[:, :count],
        S=s[:count],
        V=vh[:count].mT,
        sigma11=sigma11,
        sigma31=sigma31,
        loss_floor=None if energy is None else max(energy - explained, 0.0) / 2,
        optimum=optimum,
        whitening=whitening,
        dropped_energy=dropped,
        mean=gathered.mean if center else None,
    )


def pretraining_consistency(X: Array | Covariances, Y: Array | None = None) -> float:
    """How far the task's input modes are from an eigenbasis of Σ11: 0 is consistent, 1 the worst.

    Greedy pre-training as an autoencoder leaves weights in the basis of the inputs' principal
    components. It starts the task's own modes decoupled, and so helps, where those are (nearly)
    the same: where Σ11 V = V·diag(δ). Only modes with s > 1e-8 s₁ count. Random bases show what
    is large: on digits 0.21 against 0.88. Centre the data first if the network will see it centred.

    Args:
        X: Inputs ``[P, N_in]``, or :class:`Covariances`.
        Y: Outputs ``[P, N_out]``.

    Returns:
        ‖Σ11 V − V·diag(Vᵀ Σ11 V)‖_F / ‖Σ11 V‖_F.

    Raises:
        ValueError: as :func:`task_modes`.

    Source: arXiv 1312.6120, section 3 (when pre-training helps), as a number.
    """
    return task_modes(X, Y, whiten=False).mixing


def _gather(X: Array | Covariances | Iterable[tuple[Array, Array]], Y: Array | None) -> Covariances:
    if Y is not None:
        if isinstance(X, Covariances):
            raise ValueError("Y must be left out where X is Covariances")
        return Covariances().update(X, Y)  # pyrefly: ignore
    if isinstance(X, Covariances):
        return X
    if isinstance(X, Tensor) or hasattr(X, "__array__"):
        raise ValueError("X alone says nothing of a task: pass Y, Covariances or batches (x, y)")
    gathered = Covariances()
    for x, y in X:
        gathered.update(x, y)
    return gathered


def _whitening(sigma11: Tensor, k: int | None) -> tuple[Tensor, float]:
    """The map that makes the first ``k`` principal components white; the variance it leaves out."""
    values, vectors = torch.linalg.eigh(sigma11)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > _RANK_TOLERANCE * values[0]).sum())
    if rank == 0 or float(values[0]) <= 0:
        raise ValueError("X has no variance: there is nothing to whiten")
    keep = rank if k is None else k
    if not 1 <= keep <= rank:
        raise ValueError(f"k must be between 1 and the rank of the inputs, {rank}, got {k}")
    dropped = float(values[keep:].clamp_min(0).sum() / values.clamp_min(0).sum())
    return vectors[:, :keep] * values[:keep].rsqrt(), dropped
