"""Merging and adapting trained models: task arithmetic, rotations, orthogonal adapters."""

from typing import TYPE_CHECKING, Any

from stiefel.checkpoint import Checkpoint as Checkpoint
from stiefel.checkpoint import CheckpointError as CheckpointError
from stiefel.checkpoint import CheckpointWriter as CheckpointWriter
from stiefel.extras import estimator
from stiefel.linalg import cayley as cayley
from stiefel.linalg import inverse_cayley as inverse_cayley
from stiefel.linalg import procrustes_rotation as procrustes_rotation
from stiefel.merge.adapter_factors import LowRank as LowRank
from stiefel.merge.adapter_merge import AdapterMerge as AdapterMerge
from stiefel.merge.adapter_merge import MergedModule as MergedModule
from stiefel.merge.adapter_merge import merge_lora_adapters as merge_lora_adapters
from stiefel.merge.additive import linear as linear
from stiefel.merge.additive import linear_rows as linear_rows
from stiefel.merge.additive import slerp as slerp
from stiefel.merge.additive import slerp_coefficients as slerp_coefficients
from stiefel.merge.additive import slerp_moments as slerp_moments
from stiefel.merge.additive import task_arithmetic as task_arithmetic
from stiefel.merge.additive import task_arithmetic_rows as task_arithmetic_rows
from stiefel.merge.arithmetic import all_finite as all_finite
from stiefel.merge.compatible import CompatibleMaps as CompatibleMaps
from stiefel.merge.compatible import CompatibleSettings as CompatibleSettings
from stiefel.merge.compatible import OrthogonalMap as OrthogonalMap
from stiefel.merge.compatible import contrastive_loss as contrastive_loss
from stiefel.merge.compatible import fit_compatible_maps as fit_compatible_maps
from stiefel.merge.dare import dare as dare
from stiefel.merge.dare import dare_mask as dare_mask
from stiefel.merge.dare import dare_rows as dare_rows
from stiefel.merge.disentanglement import Addition as Addition
from stiefel.merge.disentanglement import AlphaChoice as AlphaChoice
from stiefel.merge.disentanglement import Negation as Negation
from stiefel.merge.disentanglement import absolute_accuracy as absolute_accuracy
from stiefel.merge.disentanglement import disentanglement_error as disentanglement_error
from stiefel.merge.disentanglement import evaluate_addition as evaluate_addition
from stiefel.merge.disentanglement import evaluate_negation as evaluate_negation
from stiefel.merge.disentanglement import normalised_accuracy as normalised_accuracy
from stiefel.merge.disentanglement import select_alpha as select_alpha
from stiefel.merge.engine import merge as merge
from stiefel.merge.engine_progress import MergeProgress as MergeProgress
from stiefel.merge.engine_report import MergeReport as MergeReport
from stiefel.merge.engine_work import NonFiniteError as NonFiniteError
from stiefel.merge.exact_search import CosineIndex as CosineIndex
from stiefel.merge.exact_search import nearest as nearest
from stiefel.merge.explain import explain as explain
from stiefel.merge.lie_average import CancellationWarning as CancellationWarning
from stiefel.merge.lie_average import merge_rotations as merge_rotations
from stiefel.merge.oft import fold_oft as fold_oft
from stiefel.merge.oft import merge_oft_adapters as merge_oft_adapters
from stiefel.merge.orthogonal_adapter import LayerUpdate as LayerUpdate
from stiefel.merge.orthogonal_adapter import OrthogonalAdapter as OrthogonalAdapter
from stiefel.merge.orthogonal_adapter import Projection as Projection
from stiefel.merge.orthogonal_handle import OrthogonalAdapters as OrthogonalAdapters
from stiefel.merge.orthogonal_handle import add_orthogonal_adapters as add_orthogonal_adapters
from stiefel.merge.orthogonal_handle import load_orthogonal_adapters as load_orthogonal_adapters
from stiefel.merge.orthogonal_merge import MergedAdapters as MergedAdapters
from stiefel.merge.orthogonal_merge import crosstalk as crosstalk
from stiefel.merge.orthogonal_merge import merge_adapters as merge_adapters
from stiefel.merge.orthogonal_merge import shared_columns as shared_columns
from stiefel.merge.orthogonal_peft import export_peft as export_peft
from stiefel.merge.orthogonal_peft import freeze_down_projections as freeze_down_projections
from stiefel.merge.orthogonal_peft import share_basis as share_basis
from stiefel.merge.orthomerge import orthomerge as orthomerge
from stiefel.merge.orthomerge import orthomerge_tensor as orthomerge_tensor
from stiefel.merge.peft_adapters import Adapter as Adapter
from stiefel.merge.plan import build_plan as build_plan
from stiefel.merge.plan_adapters import build_adapter_plan as build_adapter_plan
from stiefel.merge.plan_adapters import run_adapter_plan as run_adapter_plan
from stiefel.merge.plan_types import MergePlan as MergePlan
from stiefel.merge.prepared import OrthoReport as OrthoReport
from stiefel.merge.prepared import OrthoSettings as OrthoSettings
from stiefel.merge.recipe import parse_recipe as parse_recipe
from stiefel.merge.recipe import read_recipe as read_recipe
from stiefel.merge.recipe_errors import PlanError as PlanError
from stiefel.merge.recipe_errors import RecipeError as RecipeError
from stiefel.merge.residual import tsvm as tsvm
from stiefel.merge.retrieval import BackfillCurve as BackfillCurve
from stiefel.merge.retrieval import backfill_curve as backfill_curve
from stiefel.merge.retrieval import backfill_order as backfill_order
from stiefel.merge.retrieval import retrieval_metrics as retrieval_metrics
from stiefel.merge.shared_basis import free_slots as free_slots
from stiefel.merge.shared_basis import shared_basis as shared_basis
from stiefel.merge.task_vector import TaskVector as TaskVector
from stiefel.merge.ties import Cut as Cut
from stiefel.merge.ties import MagnitudeCounter as MagnitudeCounter
from stiefel.merge.ties import ties as ties
from stiefel.merge.ties import ties_rows as ties_rows
from stiefel.merge.ties import ties_threshold as ties_threshold
from stiefel.merge.turning import HalfTurnWarning as HalfTurnWarning

if TYPE_CHECKING:
    from stiefel.merge.compatible_sklearn import CompatibleAdapter as CompatibleAdapter

__all__ = [
    "Adapter",
    "AdapterMerge",
    "Addition",
    "AlphaChoice",
    "BackfillCurve",
    "CancellationWarning",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "CompatibleAdapter",
    "CompatibleMaps",
    "CompatibleSettings",
    "CosineIndex",
    "Cut",
    "HalfTurnWarning",
    "LayerUpdate",
    "LowRank",
    "MagnitudeCounter",
    "MergePlan",
    "MergeProgress",
    "MergeReport",
    "MergedAdapters",
    "MergedModule",
    "Negation",
    "NonFiniteError",
    "OrthoReport",
    "OrthoSettings",
    "OrthogonalAdapter",
    "OrthogonalAdapters",
    "OrthogonalMap",
    "PlanError",
    "Projection",
    "RecipeError",
    "TaskVector",
    "absolute_accuracy",
    "add_orthogonal_adapters",
    "all_finite",
    "backfill_curve",
    "backfill_order",
    "build_adapter_plan",
    "build_plan",
    "cayley",
    "contrastive_loss",
    "crosstalk",
    "dare",
    "dare_mask",
    "dare_rows",
    "disentanglement_error",
    "evaluate_addition",
    "evaluate_negation",
    "explain",
    "export_peft",
    "fit_compatible_maps",
    "fold_oft",
    "free_slots",
    "freeze_down_projections",
    "inverse_cayley",
    "linear",
    "linear_rows",
    "load_orthogonal_adapters",
    "merge",
    "merge_adapters",
    "merge_lora_adapters",
    "merge_oft_adapters",
    "merge_rotations",
    "nearest",
    "normalised_accuracy",
    "orthomerge",
    "orthomerge_tensor",
    "parse_recipe",
    "procrustes_rotation",
    "read_recipe",
    "retrieval_metrics",
    "run_adapter_plan",
    "select_alpha",
    "share_basis",
    "shared_basis",
    "shared_columns",
    "slerp",
    "slerp_coefficients",
    "slerp_moments",
    "task_arithmetic",
    "task_arithmetic_rows",
    "ties",
    "ties_rows",
    "ties_threshold",
    "tsvm",
]

# Built on scikit-learn, an extra: imported when it is asked for.
_ESTIMATORS = {"CompatibleAdapter": "stiefel.merge.compatible_sklearn"}


def __getattr__(name: str) -> Any:
    """The scikit-learn estimators of this home."""
    return estimator(__name__, _ESTIMATORS, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ESTIMATORS})
