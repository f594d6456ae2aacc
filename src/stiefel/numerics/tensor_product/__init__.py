"""Matrix-free solvers on Cartesian grids: Kronecker operators, direct Poisson and Helmholtz."""

from stiefel.numerics.tensor_product.adi import ADIHeat as ADIHeat
from stiefel.numerics.tensor_product.adi import adi_amplification as adi_amplification
from stiefel.numerics.tensor_product.axes import Axis as Axis
from stiefel.numerics.tensor_product.axis_apply import axis_apply as axis_apply
from stiefel.numerics.tensor_product.axis_kinds import grid1d as grid1d
from stiefel.numerics.tensor_product.axis_kinds import pencil_axis as pencil_axis
from stiefel.numerics.tensor_product.bsplines import bspline_matrices as bspline_matrices
from stiefel.numerics.tensor_product.bsplines import bspline_values as bspline_values
from stiefel.numerics.tensor_product.bsplines import gauss_points as gauss_points
from stiefel.numerics.tensor_product.bsplines_mass import MassInverse as MassInverse
from stiefel.numerics.tensor_product.bsplines_mass import bspline_load as bspline_load
from stiefel.numerics.tensor_product.checks import IncompatibleDataError as IncompatibleDataError
from stiefel.numerics.tensor_product.checks import SingularOperatorError as SingularOperatorError
from stiefel.numerics.tensor_product.compact import compact_derivative as compact_derivative
from stiefel.numerics.tensor_product.compact import compact_gradient as compact_gradient
from stiefel.numerics.tensor_product.fast_diagonalization import (
    FastDiagonalization as FastDiagonalization,
)
from stiefel.numerics.tensor_product.fast_diagonalization import (
    IncompatibleDataWarning as IncompatibleDataWarning,
)
from stiefel.numerics.tensor_product.kronecker import KroneckerOperator as KroneckerOperator
from stiefel.numerics.tensor_product.kronecker import KroneckerSum as KroneckerSum
from stiefel.numerics.tensor_product.lines import BandedLineSolver as BandedLineSolver
from stiefel.numerics.tensor_product.pencils import PencilGrid as PencilGrid
from stiefel.numerics.tensor_product.pencils_solve import pencil_solve as pencil_solve
from stiefel.numerics.tensor_product.poisson import poisson_solve as poisson_solve
from stiefel.numerics.tensor_product.preconditioner import DiffusionOperator as DiffusionOperator
from stiefel.numerics.tensor_product.sum_factorization import (
    sum_factorization_choices as sum_factorization_choices,
)
from stiefel.numerics.tensor_product.sum_factorization import sum_factorize as sum_factorize
from stiefel.numerics.tensor_product.sum_factorization import (
    sum_factorize_transpose as sum_factorize_transpose,
)

__all__ = [
    "ADIHeat",
    "Axis",
    "BandedLineSolver",
    "DiffusionOperator",
    "FastDiagonalization",
    "IncompatibleDataError",
    "IncompatibleDataWarning",
    "KroneckerOperator",
    "KroneckerSum",
    "MassInverse",
    "PencilGrid",
    "SingularOperatorError",
    "adi_amplification",
    "axis_apply",
    "bspline_load",
    "bspline_matrices",
    "bspline_values",
    "compact_derivative",
    "compact_gradient",
    "gauss_points",
    "grid1d",
    "pencil_axis",
    "pencil_solve",
    "poisson_solve",
    "sum_factorization_choices",
    "sum_factorize",
    "sum_factorize_transpose",
]
