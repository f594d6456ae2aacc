"""Optimizers that treat weight matrices as matrices, drop-in for ``torch.optim``.

>>> import torch
>>> from stiefel.optim import NorMuon, split_parameters
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> optimizer = NorMuon(split_parameters(model), lr=1e-3)
>>> model(torch.ones(2, 8)).sum().backward()
>>> _ = optimizer.step()
"""

from stiefel.linalg.cholesky_qr import shifted_cholesky_qr as shifted_cholesky_qr
from stiefel.optim.aro import ARO as ARO
from stiefel.optim.aro_layout import aro_param_groups as aro_param_groups
from stiefel.optim.aro_update import aro_direction as aro_direction
from stiefel.optim.aro_update import aro_rotation as aro_rotation
from stiefel.optim.aro_update import rotation_objective as rotation_objective
from stiefel.optim.auon import AuON as AuON
from stiefel.optim.auon import HybridAuON as HybridAuON
from stiefel.optim.auon import auon_direction as auon_direction
from stiefel.optim.columns import ColumnSelector as ColumnSelector
from stiefel.optim.columns import low_rank_svd_projector as low_rank_svd_projector
from stiefel.optim.dct_adamw import DCTAdamW as DCTAdamW
from stiefel.optim.distributed.plan import DistributionPlan as DistributionPlan
from stiefel.optim.distributed.plan import distribution_plan as distribution_plan
from stiefel.optim.fit import fit_coefficients as fit_coefficients
from stiefel.optim.groups import describe_groups as describe_groups
from stiefel.optim.groups import split_parameters as split_parameters
from stiefel.optim.muon import Muon as Muon
from stiefel.optim.normuon import NorMuon as NorMuon
from stiefel.optim.normuon import normuon_direction as normuon_direction
from stiefel.optim.racing import race as race
from stiefel.optim.rmnp import RMNP as RMNP
from stiefel.optim.rmnp import polar_cosine as polar_cosine
from stiefel.optim.rmnp import rmnp_direction as rmnp_direction
from stiefel.optim.rmnp import row_dominance as row_dominance
from stiefel.optim.root import ROOT as ROOT
from stiefel.optim.root import soft_clip as soft_clip
from stiefel.optim.sinkhorn import sinkhorn_normalize as sinkhorn_normalize
from stiefel.optim.trainer import trainer_optimizer as trainer_optimizer
from stiefel.optim.trion import Trion as Trion
from stiefel.optim.trion import trion_direction as trion_direction
