"""A solver for a sequence of systems that tunes its own ω (arXiv 2310.02246)."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from stiefel.numerics.bandits import BinnedTsallisINF, TsallisINF
from stiefel.numerics.relaxation import (
    MAXITER,
    ORDERINGS,
    TOL,
    SolveResult,
    check_omega,
    sor_solve,
    ssor_pcg,
)
from stiefel.numerics.relaxation_chebyshev import ChebCB

METHODS = ("sor", "ssor-cg")
POLICIES = ("tsallis", "binned", "chebcb")


class RelaxedSolver:
    """Solve A_t x = b_t for t = 1, 2, …: draws ω, solves, tells the bandit the iteration count.

    Args:
        method: ``"sor"`` or ``"ssor-cg"``.
        policy: ``"tsallis"`` (no context), ``"binned"`` or ``"chebcb"`` (with a context), a number
            (fixed ω), or any object with ``predict(context)`` and ``update(loss)``.
        tol: As for :func:`~stiefel.numerics.sor_solve` and :func:`~stiefel.numerics.ssor_pcg`.
        maxiter: Iterations after which a solve gives up; the bandit is told so many.
        ordering: ``"natural"`` or, for SOR, ``"red-black"``.
        grid: The ω to choose from; 20 from 1 to 1.95 if None.
        low: Smallest context; for a policy with a context.
        high: Largest context.
        degree: Of ChebCB's polynomials.
        bins: Of the binned policy.
        random_state: NumPy generator, seed, ``RandomState``, ``torch.Generator`` or None.

    Attributes:
        policy_: The bandit, or the fixed ω.
        history_: ``(omega, cost)`` of every solve.

    Raises:
        ValueError: unknown names, ω outside (0, 2), a context policy without low < high.
        TypeError: a policy that is none of these.
    """

    def __init__(
        self,
        method: str = "sor",
        policy: Any = "tsallis",
        tol: float | int = TOL,
        maxiter: int = MAXITER,
        *,
        ordering: str = "natural",
        grid: Any = None,
        low: float | int | None = None,
        high: float | int | None = None,
        degree: int = 5,
        bins: int = 5,
        random_state: Any = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if ordering not in ORDERINGS:
            raise ValueError(f"ordering must be one of {', '.join(ORDERINGS)}, got {ordering!r}")
        if method == "ssor-cg" and ordering != "natural":
            raise ValueError("method 'ssor-cg' goes in natural ordering only")
        self.method, self.tol, self.maxiter, self.ordering = method, tol, maxiter, ordering
        self.policy_: Any = policy
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
            if policy == "tsallis":
                self.policy_ = TsallisINF(grid, random_state)
            elif low is None or high is None:
                raise ValueError(f"policy {policy!r} needs low and high, the range of its context")
            elif policy == "chebcb":
                self.policy_ = ChebCB(grid, low, high, degree, random_state)
            else:
                self.policy_ = BinnedTsallisINF(grid, low, high, bins, random_state)
        elif isinstance(policy, Real):
            (self.policy_,) = check_omega(policy)
        elif not (hasattr(policy, "predict") and hasattr(policy, "update")):
            raise TypeError(
                f"policy must be a name, a number or have predict and update, got {policy!r}"
            )
        self.history_: list[tuple[float, float]] = []

    def solve(self, A: Any, b: Any, x0: Any = None, context: Any = None) -> SolveResult:
        """Solve one system, or a batch of them with one ω, and learn from the cost.

        Args:
            A: As for :func:`~stiefel.numerics.sor_solve`.
            b: ``(n,)``, or ``(B, n)``: the cost is then the mean iteration count.
            x0: Start; the last solution is a good one in time stepping.
            context: For a policy that takes one.

        Returns:
            A :class:`SolveResult`. A solve that did not converge counts ``maxiter``.

        Raises:
            ValueError, TypeError: as the solver; what it refuses the bandit is not told.
        """
        learns = not isinstance(self.policy_, float)
        omega = float(self.policy_.predict(context)) if learns else self.policy_
        if self.method == "sor":
            result = sor_solve(A, b, x0, omega, self.tol, self.maxiter, self.ordering)
        else:
            result = ssor_pcg(A, b, x0, omega, self.tol, self.maxiter)
        cost = float(np.mean(np.maximum(result.iterations, 1)))
        if learns:
            self.policy_.update(cost)
        self.history_.append((omega, cost))
        return result
