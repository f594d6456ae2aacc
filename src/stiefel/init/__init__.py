"""How weights start: orthogonal, of chosen rank, shrunk and perturbed, rich in features."""

from typing import Any

from stiefel.extras import estimator
from stiefel.init.connectivity import block_init as block_init
from stiefel.init.connectivity import dale_init as dale_init
from stiefel.init.head_training import Heads as Heads
from stiefel.init.head_training import train_heads as train_heads
from stiefel.init.logah.architectures import gpt_graph as gpt_graph
from stiefel.init.logah.architectures import sample_gpt as sample_gpt
from stiefel.init.logah.architectures import sample_vit as sample_vit
from stiefel.init.logah.architectures import vit_graph as vit_graph
from stiefel.init.logah.decoders import LowRankDecoder as LowRankDecoder
from stiefel.init.logah.decoders import MeanFieldDecoder as MeanFieldDecoder
from stiefel.init.logah.decoders import TileDecoder as TileDecoder
from stiefel.init.logah.export_walk import graph_from_module as graph_from_module
from stiefel.init.logah.graph import NetGraph as NetGraph
from stiefel.init.logah.hypernet import InitReport as InitReport
from stiefel.init.logah.hypernet import LoGAH as LoGAH
from stiefel.init.logah.ops import OPS as OPS
from stiefel.init.logah.trainer import LoGAHTrainer as LoGAHTrainer
from stiefel.init.low_rank import aligned_init as aligned_init
from stiefel.init.low_rank import low_rank_init as low_rank_init
from stiefel.init.low_rank import spectrum_init as spectrum_init
from stiefel.init.orthogonal import decoupled_init_ as decoupled_init_
from stiefel.init.orthogonal import orthogonal_init_ as orthogonal_init_
from stiefel.init.penalties import clove as clove
from stiefel.init.penalties import environment_losses as environment_losses
from stiefel.init.penalties import fishr as fishr
from stiefel.init.penalties import fishr_linear as fishr_linear
from stiefel.init.penalties import iga as iga
from stiefel.init.penalties import iga_linear as iga_linear
from stiefel.init.penalties import irmv1 as irmv1
from stiefel.init.penalties import penalised_loss as penalised_loss
from stiefel.init.penalties import spectral_decoupling as spectral_decoupling
from stiefel.init.penalties import vrex as vrex
from stiefel.init.rich_features import RichFeatures as RichFeatures
from stiefel.init.rich_features import averaging_matrix as averaging_matrix
from stiefel.init.rich_features import discovery_sets as discovery_sets
from stiefel.init.rich_features import group_dro_loss as group_dro_loss
from stiefel.init.rich_features import synthesis_sample as synthesis_sample
from stiefel.init.shrink_perturb_state import shrink_perturb as shrink_perturb
from stiefel.init.shrink_perturb_state import shrink_perturb_file as shrink_perturb_file
from stiefel.init.warm_start import shrink_perturb_ as shrink_perturb_
from stiefel.init.warm_start_rounds import Epoch as Epoch
from stiefel.init.warm_start_rounds import RoundReport as RoundReport
from stiefel.init.warm_start_rounds import ShrinkPerturb as ShrinkPerturb
from stiefel.init.warm_start_rounds import TrainAccuracy as TrainAccuracy
from stiefel.init.warm_start_rounds import TrainLoss as TrainLoss
from stiefel.init.warm_start_rounds import gradient_balance as gradient_balance

# Imported when asked for: they need scikit-learn.
_ESTIMATORS = {
    "InvariantHead": "stiefel.init.invariant_head",
    "ShrinkPerturbMLPClassifier": "stiefel.init.warm_start_sklearn",
}


def __getattr__(name: str) -> Any:
    """The scikit-learn estimators of this home."""
    return estimator(__name__, _ESTIMATORS, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ESTIMATORS})
