"""Layers that map functions to functions: the same weights on any grid.

>>> import torch
>>> from stiefel.nn.operators import FNO
>>> model = FNO(n_modes=16, in_channels=1, out_channels=1, hidden_channels=8)
>>> [tuple(model(torch.zeros(2, 1, n)).shape) for n in (32, 100)]
[(2, 1, 32), (2, 1, 100)]
"""

from stiefel.nn.operators.activation import FilteredActivation as FilteredActivation
from stiefel.nn.operators.attention import IntegralAttention as IntegralAttention
from stiefel.nn.operators.attention import integral_attention as integral_attention
from stiefel.nn.operators.convert import convert as convert
from stiefel.nn.operators.deep_operator import DeepONet as DeepONet
from stiefel.nn.operators.deep_operator import LowRankIntegral as LowRankIntegral
from stiefel.nn.operators.differential import DifferentialConv as DifferentialConv
from stiefel.nn.operators.discretization import DiscretizationReport as DiscretizationReport
from stiefel.nn.operators.discretization import LayerError as LayerError
from stiefel.nn.operators.discretization import discretization_error as discretization_error
from stiefel.nn.operators.fno import FNO as FNO
from stiefel.nn.operators.fno import FNOBlock as FNOBlock
from stiefel.nn.operators.interpolation import InputOutputInterpolation as InputOutputInterpolation
from stiefel.nn.operators.kernel_integral import KernelIntegral as KernelIntegral
from stiefel.nn.operators.kernel_integral_neighbors import Neighbors as Neighbors
from stiefel.nn.operators.kernel_integral_neighbors import radius_neighbors as radius_neighbors
from stiefel.nn.operators.local_integral import LocalIntegralConv as LocalIntegralConv
from stiefel.nn.operators.losses import relative_l2 as relative_l2
from stiefel.nn.operators.norm import FunctionNorm as FunctionNorm
from stiefel.nn.operators.point_wise import PointwiseLinear as PointwiseLinear
from stiefel.nn.operators.point_wise import PointwiseMLP as PointwiseMLP
from stiefel.nn.operators.point_wise import SinusoidalEmbedding as SinusoidalEmbedding
from stiefel.nn.operators.point_wise import append_coordinates as append_coordinates
from stiefel.nn.operators.point_wise import grid_coordinates as grid_coordinates
from stiefel.nn.operators.quadrature import quadrature as quadrature
from stiefel.nn.operators.quadrature import quadrature_points as quadrature_points
from stiefel.nn.operators.report import ConversionError as ConversionError
from stiefel.nn.operators.report import ConversionReport as ConversionReport
from stiefel.nn.operators.report import LayerReport as LayerReport
from stiefel.nn.operators.report import report as report
from stiefel.nn.operators.resample import resample as resample
from stiefel.nn.operators.spectral import SpectralConv as SpectralConv
from stiefel.nn.operators.taps import hat_taps as hat_taps
from stiefel.nn.operators.taps import official_taps as official_taps
from stiefel.nn.operators.u_no import UNO as UNO

__all__ = [
    "FNO",
    "UNO",
    "ConversionError",
    "ConversionReport",
    "DeepONet",
    "DifferentialConv",
    "DiscretizationReport",
    "FNOBlock",
    "FilteredActivation",
    "FunctionNorm",
    "InputOutputInterpolation",
    "IntegralAttention",
    "KernelIntegral",
    "LayerError",
    "LayerReport",
    "LocalIntegralConv",
    "LowRankIntegral",
    "Neighbors",
    "PointwiseLinear",
    "PointwiseMLP",
    "SinusoidalEmbedding",
    "SpectralConv",
    "append_coordinates",
    "convert",
    "discretization_error",
    "grid_coordinates",
    "hat_taps",
    "integral_attention",
    "official_taps",
    "quadrature",
    "quadrature_points",
    "radius_neighbors",
    "relative_l2",
    "report",
    "resample",
]
