"""Networks whose features are points of the Poincaré ball, and the geometry that they need.

>>> import torch
>>> from stiefel.nn.poincare import poincare_resnet20
>>> poincare_resnet20(classes=10)(torch.zeros(2, 3, 32, 32)).shape
torch.Size([2, 10])
"""

from stiefel.nn.poincare.ball import PoincareBall as PoincareBall
from stiefel.nn.poincare.batch_norm import PoincareBatchNorm2d as PoincareBatchNorm2d
from stiefel.nn.poincare.conv import PoincareConv2d as PoincareConv2d
from stiefel.nn.poincare.conv import beta_ratio as beta_ratio
from stiefel.nn.poincare.conv import poincare_conv2d as poincare_conv2d
from stiefel.nn.poincare.linear import PoincareLinear as PoincareLinear
from stiefel.nn.poincare.linear import poincare_linear_tangent as poincare_linear_tangent
from stiefel.nn.poincare.operations import conformal_factor as conformal_factor
from stiefel.nn.poincare.operations import dist as dist
from stiefel.nn.poincare.operations import expmap as expmap
from stiefel.nn.poincare.operations import expmap0 as expmap0
from stiefel.nn.poincare.operations import frechet_mean as frechet_mean
from stiefel.nn.poincare.operations import gyration as gyration
from stiefel.nn.poincare.operations import logmap as logmap
from stiefel.nn.poincare.operations import logmap0 as logmap0
from stiefel.nn.poincare.operations import midpoint as midpoint
from stiefel.nn.poincare.operations import mobius_add as mobius_add
from stiefel.nn.poincare.operations import project as project
from stiefel.nn.poincare.operations import tangent_add as tangent_add
from stiefel.nn.poincare.operations import transp as transp
from stiefel.nn.poincare.resnet import PoincareResidualBlock as PoincareResidualBlock
from stiefel.nn.poincare.resnet import PoincareResNet as PoincareResNet
from stiefel.nn.poincare.resnet import poincare_resnet20 as poincare_resnet20
from stiefel.nn.poincare.resnet import poincare_resnet32 as poincare_resnet32
from stiefel.nn.poincare.riemannian import RiemannianHook as RiemannianHook

__all__ = [
    "PoincareBall",
    "PoincareBatchNorm2d",
    "PoincareConv2d",
    "PoincareLinear",
    "PoincareResNet",
    "PoincareResidualBlock",
    "RiemannianHook",
    "beta_ratio",
    "conformal_factor",
    "dist",
    "expmap",
    "expmap0",
    "frechet_mean",
    "gyration",
    "logmap",
    "logmap0",
    "midpoint",
    "mobius_add",
    "poincare_conv2d",
    "poincare_linear_tangent",
    "poincare_resnet20",
    "poincare_resnet32",
    "project",
    "tangent_add",
    "transp",
]
