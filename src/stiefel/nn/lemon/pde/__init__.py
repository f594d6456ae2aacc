"""Families of partial differential equations with documented solvers, and data from them."""

from __future__ import annotations

from stiefel.nn.lemon.pde.family import Family as Family
from stiefel.nn.lemon.pde.family import Parameter as Parameter
from stiefel.nn.lemon.pde.registry import FAMILIES as FAMILIES
from stiefel.nn.lemon.pde.registry import register as register
from stiefel.nn.lemon.pde.residual import residual as residual
from stiefel.nn.lemon.pde.sampling import Trajectories as Trajectories
from stiefel.nn.lemon.pde.sampling import TrajectoryError as TrajectoryError
from stiefel.nn.lemon.pde.sampling import sample as sample
from stiefel.nn.lemon.pde.sampling import solve as solve

__all__ = [
    "FAMILIES", "Family", "Parameter", "Trajectories", "TrajectoryError", "register", "residual",
    "sample", "solve",
]  # fmt: skip
