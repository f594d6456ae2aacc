"""Layers: state spaces and convolutions whose orthogonality or spectrum is known."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stiefel.extras import estimator
from stiefel.linalg.conv_geometry import ExistenceReport as ExistenceReport
from stiefel.linalg.conv_geometry import conv_orth_case as conv_orth_case
from stiefel.linalg.conv_geometry import orthogonal_conv_exists as orthogonal_conv_exists
from stiefel.linalg.conv_penalty import frobenius_error as frobenius_error
from stiefel.linalg.conv_penalty import lorth as lorth
from stiefel.linalg.conv_penalty import lorth_alpha as lorth_alpha
from stiefel.linalg.conv_penalty import lorth_sigma_bounds as lorth_sigma_bounds
from stiefel.linalg.conv_spectrum import conv_singular_values as conv_singular_values
from stiefel.linalg.conv_spectrum import conv_spectral_norm as conv_spectral_norm
from stiefel.linalg.hippo import hippo_legs as hippo_legs
from stiefel.linalg.hippo import legs_normal as legs_normal
from stiefel.linalg.hippo import transfer_function as transfer_function
from stiefel.linalg.hippo_ptd import fourier_noise as fourier_noise
from stiefel.linalg.hippo_ptd import hippo_ptd as hippo_ptd
from stiefel.linalg.hippo_ptd import legs_transfer as legs_transfer
from stiefel.linalg.hippo_ptd import spike_frequencies as spike_frequencies
from stiefel.nn import poincare as poincare
from stiefel.nn.lipschitz import certified_lipschitz as certified_lipschitz
from stiefel.nn.orthogonal_conv import BlockOrthogonal as BlockOrthogonal
from stiefel.nn.orthogonal_conv import OrthogonalConv1d as OrthogonalConv1d
from stiefel.nn.orthogonal_conv import OrthogonalConv2d as OrthogonalConv2d
from stiefel.nn.orthogonal_conv import orthogonal_conv as orthogonal_conv
from stiefel.nn.orthogonal_conv import orthogonalize_ as orthogonalize_
from stiefel.nn.s4_ptd import S4PTD as S4PTD
from stiefel.nn.s4d import S4D as S4D
from stiefel.nn.s4d_init import s4d_init as s4d_init
from stiefel.nn.s4d_kernel import S4DKernel as S4DKernel
from stiefel.nn.s4d_kernel import vandermonde_kernel as vandermonde_kernel
from stiefel.nn.s4d_model import S4DBlock as S4DBlock
from stiefel.nn.s4d_model import S4DModel as S4DModel
from stiefel.nn.s4d_model import ssm_param_groups as ssm_param_groups
from stiefel.nn.s5 import S5 as S5
from stiefel.nn.s5_block import S5Block as S5Block
from stiefel.nn.s5_init import s5_init as s5_init
from stiefel.nn.scan import associative_scan as associative_scan

if TYPE_CHECKING:
    from stiefel.nn.s4d_classifier import S4DClassifier as S4DClassifier

# Estimators inherit from scikit-learn's classes, and scikit-learn is an extra: imported when asked
# for, so that the layers do without.
_ESTIMATORS = {"S4DClassifier": "stiefel.nn.s4d_classifier"}


# Homes of their own, loaded when touched.
_SUB_HOMES = ("lemon", "operators")


def __getattr__(name: str) -> Any:
    if name in _SUB_HOMES:
        return import_module(f"{__name__}.{name}")
    return estimator(__name__, _ESTIMATORS, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ESTIMATORS, *_SUB_HOMES})
