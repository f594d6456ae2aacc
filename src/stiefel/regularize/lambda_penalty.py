"""The λ-orthogonality penalty of arXiv 2509.16664 as a module, usable on any weight."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from stiefel.linalg.relaxed_orthogonality import ALPHA, check_gate, lambda_orthogonality


class LambdaOrthogonality(nn.Module):
    """``weight`` · σ(α(x − λ)) · x of a matrix, x = ‖WWᵀ − I‖_F: add it to a loss.

    Args:
        lam: λ ≥ 0, the distance from orthogonality that costs next to nothing; 0.37 √n is the
            paper's choice for a matrix of side n.
        alpha: Steepness α > 0 of the gate.
        weight: Factor. The paper finds 1 and 0.1 alike and 0.01 too weak to hold λ.

    Raises:
        ValueError: λ < 0, α ≤ 0 or a negative weight.
    """

    def __init__(
        self, lam: float | int, alpha: float | int = ALPHA, weight: float | int = 1.0
    ) -> None:
        super().__init__()
        check_gate(lam, alpha)
        if not weight >= 0:
            raise ValueError(f"weight must be at least 0, got {weight}")
        self.lam, self.alpha, self.weight = float(lam), float(alpha), float(weight)

    def forward(self, w: Float[Tensor, "*batch m n"]) -> Float[Tensor, ""]:
        """The penalty of ``w``, summed over leading dimensions; a scalar."""
        return self.weight * lambda_orthogonality(w, self.lam, self.alpha)

    def extra_repr(self) -> str:
        """λ, α and the weight."""
        return f"lam={self.lam:g}, alpha={self.alpha:g}, weight={self.weight:g}"
