"""Numerical methods in the style of NumPy, SciPy and scikit-learn."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stiefel.extras import estimator
from stiefel.numerics.bandits import BinnedTsallisINF as BinnedTsallisINF
from stiefel.numerics.bandits import TsallisINF as TsallisINF
from stiefel.numerics.bandits import tsallis_probabilities as tsallis_probabilities
from stiefel.numerics.dictionary import DictionaryState as DictionaryState
from stiefel.numerics.dictionary import NoGradientWarning as NoGradientWarning
from stiefel.numerics.dictionary import frank_wolfe_gap as frank_wolfe_gap
from stiefel.numerics.dictionary import fw_step as fw_step
from stiefel.numerics.dictionary import fw_update as fw_update
from stiefel.numerics.dictionary import linear_oracle as linear_oracle
from stiefel.numerics.dictionary import power_gradient as power_gradient
from stiefel.numerics.dictionary import recovery_error as recovery_error
from stiefel.numerics.dictionary import start_dictionary as start_dictionary
from stiefel.numerics.dictionary_codes import keep_largest as keep_largest
from stiefel.numerics.dictionary_codes import soft_threshold as soft_threshold
from stiefel.numerics.dpp_continuous import HermiteDPP as HermiteDPP
from stiefel.numerics.dpp_continuous import JacobiDPP as JacobiDPP
from stiefel.numerics.dpp_continuous import LegendreDPP as LegendreDPP
from stiefel.numerics.dpp_design import Design as Design
from stiefel.numerics.dpp_design import LeastSquaresFit as LeastSquaresFit
from stiefel.numerics.dpp_design import sample_design as sample_design
from stiefel.numerics.dpp_design import solve_design as solve_design
from stiefel.numerics.dpp_sampling import sample_dpp as sample_dpp
from stiefel.numerics.dpp_sampling import sample_leverage as sample_leverage
from stiefel.numerics.least_squares_basis import Basis as Basis
from stiefel.numerics.least_squares_basis import fit_basis as fit_basis
from stiefel.numerics.least_squares_bounds import chernoff_rate as chernoff_rate
from stiefel.numerics.least_squares_bounds import error_bound as error_bound
from stiefel.numerics.least_squares_bounds import instability_bound as instability_bound
from stiefel.numerics.least_squares_bounds import samples_for_stability as samples_for_stability
from stiefel.numerics.least_squares_polynomials import hyperbolic_cross as hyperbolic_cross
from stiefel.numerics.least_squares_polynomials import (
    orthonormal_polynomials as orthonormal_polynomials,
)
from stiefel.numerics.least_squares_polynomials import tensor_polynomials as tensor_polynomials
from stiefel.numerics.least_squares_polynomials import total_degree as total_degree
from stiefel.numerics.relaxation import SolveResult as SolveResult
from stiefel.numerics.relaxation import optimal_omega as optimal_omega
from stiefel.numerics.relaxation import sor_radius as sor_radius
from stiefel.numerics.relaxation import sor_solve as sor_solve
from stiefel.numerics.relaxation import ssor_pcg as ssor_pcg
from stiefel.numerics.relaxation_chebyshev import ChebCB as ChebCB
from stiefel.numerics.relaxation_solver import RelaxedSolver as RelaxedSolver
from stiefel.numerics.sor_operators import GridOperator as GridOperator

if TYPE_CHECKING:
    from stiefel.numerics.dictionary_sklearn import (
        OnlineOrthogonalDictionary as OnlineOrthogonalDictionary,
    )
    from stiefel.numerics.dpp_sklearn import DPPLeastSquares as DPPLeastSquares

__all__ = [
    "Basis",
    "BinnedTsallisINF",
    "ChebCB",
    "DPPLeastSquares",
    "Design",
    "DictionaryState",
    "GridOperator",
    "HermiteDPP",
    "JacobiDPP",
    "LeastSquaresFit",
    "LegendreDPP",
    "NoGradientWarning",
    "OnlineOrthogonalDictionary",
    "RelaxedSolver",
    "SolveResult",
    "TsallisINF",
    "chernoff_rate",
    "error_bound",
    "fit_basis",
    "frank_wolfe_gap",
    "fw_step",
    "fw_update",
    "hyperbolic_cross",
    "instability_bound",
    "keep_largest",
    "linear_oracle",
    "optimal_omega",
    "orthonormal_polynomials",
    "power_gradient",
    "recovery_error",
    "sample_design",
    "sample_dpp",
    "sample_leverage",
    "samples_for_stability",
    "soft_threshold",
    "solve_design",
    "sor_radius",
    "sor_solve",
    "ssor_pcg",
    "start_dictionary",
    "tensor_polynomials",
    "total_degree",
    "tsallis_probabilities",
]

# Built on scikit-learn, an extra: imported when asked for.
_ESTIMATORS = {
    "DPPLeastSquares": "stiefel.numerics.dpp_sklearn",
    "OnlineOrthogonalDictionary": "stiefel.numerics.dictionary_sklearn",
}


# Homes of their own, loaded when touched.
_SUB_HOMES = ("sampled", "tensor_product")


def __getattr__(name: str) -> Any:
    """The scikit-learn estimators of this home, and what is a home of its own."""
    if name in _SUB_HOMES:
        return import_module(f"{__name__}.{name}")
    return estimator(__name__, _ESTIMATORS, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUB_HOMES, *_ESTIMATORS})
