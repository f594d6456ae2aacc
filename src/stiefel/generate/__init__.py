"""Images from a small network and a swappable database: retrieval-augmented diffusion.

>>> from stiefel.generate import DCTEncoder, ImageDatabase, RetrievalDiffusion
>>> database = ImageDatabase(images, DCTEncoder(24).fit(images))
>>> model = RetrievalDiffusion().fit(images, database, seed=0)
>>> model.swap_database(others).sample(64)
"""

from stiefel.generate.attention import ConditionedNetwork as ConditionedNetwork
from stiefel.generate.database import ImageDatabase as ImageDatabase
from stiefel.generate.denoiser import RetrievalDenoiser as RetrievalDenoiser
from stiefel.generate.diffusion import RetrievalDiffusion as RetrievalDiffusion
from stiefel.generate.encoders import DCTEncoder as DCTEncoder
from stiefel.generate.encoders import PCAEncoder as PCAEncoder
from stiefel.generate.metrics import CopyReport as CopyReport
from stiefel.generate.metrics import copy_report as copy_report
from stiefel.generate.metrics import frechet_distance as frechet_distance
from stiefel.generate.metrics import precision_recall as precision_recall
from stiefel.generate.pictures import ImageError as ImageError
from stiefel.generate.pictures import read_images as read_images
from stiefel.generate.pictures import save_grid as save_grid
from stiefel.generate.proposals import Proposal as Proposal
from stiefel.generate.proposals import proposal_counts as proposal_counts
from stiefel.generate.proposals import top_m as top_m
from stiefel.generate.schedules import alpha_bars as alpha_bars
from stiefel.generate.schedules import ddim_grid as ddim_grid
from stiefel.generate.schedules import ddim_scheduler as ddim_scheduler
from stiefel.generate.unet import RetrievalUNet as RetrievalUNet

__all__ = [
    "ConditionedNetwork",
    "CopyReport",
    "DCTEncoder",
    "ImageDatabase",
    "ImageError",
    "PCAEncoder",
    "Proposal",
    "RetrievalDenoiser",
    "RetrievalDiffusion",
    "RetrievalUNet",
    "alpha_bars",
    "copy_report",
    "ddim_grid",
    "ddim_scheduler",
    "frechet_distance",
    "precision_recall",
    "proposal_counts",
    "read_images",
    "save_grid",
    "top_m",
]
