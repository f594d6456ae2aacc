"""Maps between the vectors of an old and a new embedding model, trained on frozen features.

The backward map B takes new vectors to where the old ones are, orthogonally or up to a distance λ
from that, so that what the new model learned survives; the forward map F takes the old gallery to
where B puts the new vectors. Source: arXiv 2509.16664.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from stiefel.linalg.relaxed_orthogonality import (
    ALPHA,
    check_gate,
    lambda_orthogonality,
    orthogonality_distance,
)
from stiefel.linalg.rotation import cayley, rotation_exp

MODES, ROTATIONS, FORWARDS = ("strict", "lambda"), ("cayley", "exp"), ("linear", "mlp")
# The paper's λ = 12 at n = 1024, as a part of ‖I‖_F.
AUTO_LAMBDA = 0.37


class OrthogonalMap(nn.Module):
    """h ↦ W h (+ b) with W orthogonal, or free to stray up to about λ under :meth:`penalty`.

    Args:
        features: n; W is ``[n, n]``.
        mode: ``"strict"``: W = R · start with R a rotation, no bias. ``"lambda"``: W and b free.
        lam: λ ≥ 0 of the mode ``"lambda"``; None: 0.37 √n, the paper's choice.
        alpha: Steepness of the penalty's gate.
        rotation: How R comes from its skew coordinates: ``"cayley"``, or ``"exp"`` as the paper
            has it. Both reach every rotation (but turns by exactly π, for Cayley); the exponential
            costs several times more.
        start: Orthogonal ``[n, n]`` to start from; None: the identity.

    Raises:
        ValueError: another mode or rotation, λ < 0, α ≤ 0, fewer than one feature, a start that is
            not orthogonal.
    """

    def __init__(
        self,
        features: int,
        mode: str = "strict",
        *,
        lam: float | int | None = None,
        alpha: float | int = ALPHA,
        rotation: str = "cayley",
        start: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_choice("mode", mode, MODES)
        _check_choice("rotation", rotation, ROTATIONS)
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.features, self.mode, self.rotation = features, mode, rotation
        self.lam = AUTO_LAMBDA * math.sqrt(features) if lam is None else float(lam)
        self.alpha = float(alpha)
        check_gate(self.lam, self.alpha)
        eye = torch.eye(features)
        if start is not None:
            if start.shape != (features, features):
                raise ValueError(
                    f"start must be [{features}, {features}], got {tuple(start.shape)}"
                )
            distance = float(orthogonality_distance(start))
            if not distance <= 1e-3 * math.sqrt(features):
                raise ValueError(f"start must be orthogonal, but ‖WWᵀ − I‖ is {distance:.1e}")
        self.register_buffer("start", eye if start is None else start.detach().float().clone())
        self.start: Tensor
        if mode == "strict":
            self.coordinates = nn.Parameter(torch.empty(features * (features - 1) // 2))
            upper = torch.triu_indices(features, features, 1)
            self.register_buffer("upper", upper[0] * features + upper[1], persistent=False)
        else:
            self.free = nn.Parameter(torch.empty(features, features))
            self.bias = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to W = start, b = 0."""
        with torch.no_grad():
            if self.mode == "strict":
                self.coordinates.zero_()
            else:
                self.free.copy_(self.start)
                self.bias.zero_()

    @property
    def weight(self) -> Float[Tensor, "n n"]:
        """W, differentiable."""
        if self.mode == "lambda":
            return self.free
        n = self.features
        flat = self.coordinates.new_zeros(n * n).index_copy(0, self.upper, self.coordinates)
        half = flat.view(n, n)
        turn = cayley if self.rotation == "cayley" else rotation_exp
        return turn(half - half.T) @ self.start

    def forward(self, h: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """W h (+ b) for vectors in the last dimension."""
        return nn.functional.linear(h, self.weight, None if self.mode == "strict" else self.bias)

    def penalty(self) -> Float[Tensor, ""]:
        """L_λ of W; 0 in mode ``"strict"``."""
        if self.mode == "strict":
            return self.coordinates.new_zeros(())
        return lambda_orthogonality(self.free, self.lam, self.alpha)

    def extra_repr(self) -> str:
        """Sizes, mode and, where it acts, λ."""
        how = f"rotation={self.rotation!r}" if self.mode == "strict" else f"lam={self.lam:g}"
        return f"features={self.features}, mode={self.mode!r}, {how}"


def contrastive_loss(
    a: Float[Tensor, "b d"],
    b: Float[Tensor, "b d"],
    labels: Int[Tensor, " b"] | None = None,
    temperature: float | int = 0.1,
) -> Float[Tensor, ""]:
    """Supervised contrastive loss between paired rows, on the unit sphere; mean over anchors.

    −Σ_j p_ij log q_ij with q_i the softmax of ⟨a_i, b_j⟩ / τ over the batch and p_i uniform over
    the rows of i's class, its own included. Without labels p_i is one at i.

    Source: arXiv 2509.16664, the contrastive term L_contr.
    """
    logs = log_softmax(normalize(a, dim=1) @ normalize(b, dim=1).T / temperature, dim=1)
    if labels is None:
        return -logs.diagonal().mean()
    same = (labels[:, None] == labels).to(logs.dtype)
    return -((same / same.sum(1, keepdim=True)) * logs).sum(1).mean()


@dataclass(frozen=True)
class CompatibleSettings:
    """How :func:`fit_compatible_maps` trains; the defaults are those of the sheet's recipe.

    Attributes:
        mode, lam, alpha, rotation: Of the backward map, see :class:`OrthogonalMap`.
        weights: w1, w2, w3 of L_F, L_B and the contrastive term. w3 is to stay small: at 1 the
            order of backfilling loses its meaning.
        temperature: τ of the contrastive term.
        forward: ``"linear"``, or ``"mlp"`` with one hidden layer of twice the new width.
        center: Take each model's mean off and divide by the mean length, of the training vectors.
        start: ``"identity"`` or ``"procrustes"``, the closed-form best rotation.
        epochs, lr, batch_size: Of Adam.
    """

    mode: str = "strict"
    lam: float | int | None = None
    alpha: float | int = ALPHA
    rotation: str = "cayley"
    weights: Sequence[float | int] = (1.0, 1.0, 0.1)
    temperature: float | int = 0.1
    forward: str = "linear"
    center: bool = True
    start: str = "identity"
    epochs: int = 60
    lr: float | int = 1e-3
    batch_size: int = 128

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("rotation", self.rotation, ROTATIONS)
        _check_choice("forward", self.forward, FORWARDS)
        _check_choice("start", self.start, ("identity", "procrustes"))
        check_gate(0.0 if self.lam is None else self.lam, self.alpha)
        if len(self.weights) != 3 or not all(0 <= w < math.inf for w in self.weights):
            raise ValueError(f"weights must be three numbers from 0 up, got {self.weights}")
        for name in ("temperature", "lr"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, least in (("epochs", 0), ("batch_size", 2)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class CompatibleMaps(nn.Module):
    """The pair B, F with the means and scales that both models' vectors are brought to first.

    Args:
        old_features: d, the width of old vectors.
        new_features: n, the width of new vectors; B is n → n and F d → n.
        settings: What kind of maps.
        start: Where B starts; None: the identity.
    """

    def __init__(
        self,
        old_features: int,
        new_features: int,
        settings: CompatibleSettings,
        start: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, width in (("old", old_features), ("new", new_features)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(()))
        self.backward_map = OrthogonalMap(
            new_features,
            settings.mode,
            lam=settings.lam,
            alpha=settings.alpha,
            rotation=settings.rotation,
            start=start,
        )
        hidden = 2 * new_features
        self.forward_map: nn.Module = (
            nn.Linear(old_features, new_features)
            if settings.forward == "linear"
            else nn.Sequential(
                nn.Linear(old_features, hidden), nn.ReLU(), nn.Linear(hidden, new_features)
            )
        )

    @torch.no_grad()
    def center(self, old: Tensor, new: Tensor) -> None:
        """Take the means and mean lengths from these vectors."""
        for name, rows in (("old", old), ("new", new)):
            mean = rows.mean(0)
            length = torch.linalg.vector_norm(rows - mean, dim=1).mean()
            if not length > 0:
                raise ValueError(f"all {name} vectors are the same, so there is nothing to map")
            self.get_buffer(f"{name}_mean").copy_(mean)
            self.get_buffer(f"{name}_scale").copy_(length)

    def place_old(self, old: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Old vectors where B's are compared with them: centred and scaled, nothing else."""
        return (old - self.get_buffer("old_mean")) / self.get_buffer("old_scale")

    def place_new(self, new: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """New vectors centred and scaled, before B."""
        return (new - self.get_buffer("new_mean")) / self.get_buffer("new_scale")

    def map_new(self, new: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """B: new vectors into the common space."""
        return self.backward_map(self.place_new(new))

    def map_old(self, old: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
        """F: old vectors into the common space."""
        return self.forward_map(self.place_old(old))

    def forward(
        self, old: Float[Tensor, "m d"], new: Float[Tensor, "m n"]
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m n"]]:
        """F(old) and B(new)."""
        return self.map_old(old), self.map_new(new)


def fit_compatible_maps(
    old: Float[Tensor, "*a d"],
    new: Float[Tensor, "*b n"],
    labels: Int[Tensor, " c"] | None = None,
    settings: CompatibleSettings | None = None,
    *,
    generator: torch.Generator | None = None,
    report: Callable[[float, float], None] | None = None,
) -> CompatibleMaps:
    """Train B and F on pairs of vectors of the same items.

    L = w1 ‖F(h_old) − B(h_new)‖² + w2 ‖B(h_new) − h_old‖² + w3 L_C + L_λ, squares summed over the
    common coordinates and averaged over items; B learns from all of it. L_C pulls F(h_old) to the
    class mates among B(h_new) and among h_old.

    Args:
        old: Vectors of the old model ``[m, d]``.
        new: Vectors of the new one ``[m, n]``, same items in the same order.
        labels: Classes ``[m]``; without them the contrastive term knows each item only as itself.
        settings: See :class:`CompatibleSettings`.
        generator: Draws F's start and the order of the items; None: seeded with 0.
        report: Called with the part done and the last loss, once an epoch.

    Returns:
        The trained pair, in evaluation mode.

    Raises:
        ValueError: sizes that do not fit, fewer than two items, NaN or infinity, fewer than two
            classes under w3 > 0.
        RuntimeError: the loss is not finite any more.

    Source: arXiv 2509.16664, L_F, L_B, L_C and L_λ.
    """
    settings = settings or CompatibleSettings()
    old, new = check_pairs(old, new, labels)
    w1, w2, w3 = settings.weights
    if w3 > 0 and labels is not None and len(labels.unique()) < 2:
        raise ValueError("labels must have at least two classes under a contrastive weight w3 > 0")
    generator = generator or torch.Generator().manual_seed(0)
    # Modules draw from the global generator: theirs comes from ours, and nobody notices.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        maps = CompatibleMaps(old.shape[1], new.shape[1], settings)
    if settings.center:
        maps.center(old, new)
    old, new = maps.place_old(old), maps.place_new(new)
    k = min(old.shape[1], new.shape[1])
    if settings.start == "procrustes":
        maps.backward_map.start.copy_(_best_rotation(new, old))
        maps.backward_map.reset_parameters()
    optimizer = torch.optim.Adam(maps.parameters(), lr=settings.lr, fused=True)
    for epoch in range(settings.epochs):
        for part in torch.randperm(len(old), generator=generator).split(settings.batch_size):
            ho, hn = old[part], new[part]
            y = None if labels is None else labels[part]
            zf, zb = maps.forward_map(ho), maps.backward_map(hn)
            loss = maps.backward_map.penalty()
            loss = loss + w1 * (zf - zb).square().sum(1).mean()
            loss = loss + w2 * (zb[:, :k] - ho[:, :k]).square().sum(1).mean()
            if w3 > 0:
                near = contrastive_loss(zf, zb, y, settings.temperature)
                own = contrastive_loss(zf[:, :k], ho[:, :k], y, settings.temperature)
                loss = loss + w3 * (near + own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        last = float(loss.detach())
        if not math.isfinite(last):
            raise RuntimeError(f"the loss is {last} after epoch {epoch + 1}; a smaller lr may help")
        if report is not None:
            report((epoch + 1) / settings.epochs, last)
    return maps.eval().requires_grad_(False)


def check_pairs(old: Tensor, new: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sets in float32.

    Raises:
        ValueError: not matrices of as many rows, fewer than two of them, NaN or infinity.
    """
    for name, rows in (("old", old), ("new", new)):
        if rows.ndim != 2 or rows.shape[1] < 1:
            raise ValueError(f"{name} must be [items, width], got shape {tuple(rows.shape)}")
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name} must be finite, but has NaN or infinity")
    counts = [len(old), len(new), *(() if labels is None else (len(labels),))]
    if len(set(counts)) > 1:
        raise ValueError(f"old, new and labels must have as many items, got {counts}")
    if counts[0] < 2:
        raise ValueError(f"at least two items are needed, got {counts[0]}")
    return old.float(), new.float()


def _best_rotation(new: Tensor, old: Tensor) -> Tensor:
    """Orthogonal W of least ‖W h_new − h_old‖², over the common coordinates; [n, n]."""
    padded = nn.functional.pad(old, (0, max(0, new.shape[1] - old.shape[1])))[:, : new.shape[1]]
    u, _, vh = torch.linalg.svd(padded.double().T @ new.double())
    return (u @ vh).float()


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
