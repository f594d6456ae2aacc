"""Closed forms for how networks learn, and the measurements to hold against them."""

from __future__ import annotations

from stiefel.linalg.gaussian_map import critical_gain as critical_gain
from stiefel.linalg.gaussian_map import length_map as length_map
from stiefel.linalg.gaussian_map import q_fixed_point as q_fixed_point
from stiefel.theory.ctrnn import CTRNN as CTRNN
from stiefel.theory.ctrnn import ctrnn_states as ctrnn_states
from stiefel.theory.deep_linear import mode_curve as mode_curve
from stiefel.theory.deep_linear_covariances import Covariances as Covariances
from stiefel.theory.deep_linear_modes import TaskModes as TaskModes
from stiefel.theory.deep_linear_modes import pretraining_consistency as pretraining_consistency
from stiefel.theory.deep_linear_modes import task_modes as task_modes
from stiefel.theory.deep_linear_signal import JacobianSpectrum as JacobianSpectrum
from stiefel.theory.deep_linear_signal import jacobian_spectrum as jacobian_spectrum
from stiefel.theory.deep_linear_simulator import DeepLinearSimulator as DeepLinearSimulator
from stiefel.theory.deep_linear_simulator import SimulatedRuns as SimulatedRuns
from stiefel.theory.deep_linear_times import max_stable_lr as max_stable_lr
from stiefel.theory.deep_linear_times import mode_time as mode_time
from stiefel.theory.deep_linear_times import mode_time_infinite as mode_time_infinite
from stiefel.theory.deep_linear_times import optimal_lr as optimal_lr
from stiefel.theory.deep_linear_times import unbalanced_curve as unbalanced_curve
from stiefel.theory.deep_linear_times import unbalanced_time as unbalanced_time
from stiefel.theory.effective_rank import effective_rank as effective_rank
from stiefel.theory.laziness import LazinessProbe as LazinessProbe
from stiefel.theory.laziness import LazinessReport as LazinessReport
from stiefel.theory.laziness import kernel_alignment as kernel_alignment
from stiefel.theory.laziness import representation_alignment as representation_alignment
from stiefel.theory.laziness import sign_similarity as sign_similarity
from stiefel.theory.linear_laziness import expected_kernel_alignment as expected_kernel_alignment
from stiefel.theory.linear_laziness import (
    expected_representation_alignment as expected_representation_alignment,
)
from stiefel.theory.linear_laziness import linear_kernel_alignment as linear_kernel_alignment
from stiefel.theory.neuro_tasks import Trials as Trials
from stiefel.theory.neuro_tasks import context_decision as context_decision
from stiefel.theory.neuro_tasks import delay_match as delay_match
from stiefel.theory.neuro_tasks import sequential_digits as sequential_digits
from stiefel.theory.neuro_tasks import two_alternative as two_alternative
from stiefel.theory.ntk import ntk_relu as ntk_relu
from stiefel.theory.permutation import ensemble_size as ensemble_size
from stiefel.theory.permutation import nonzero_inputs as nonzero_inputs
from stiefel.theory.permutation import permutation_moments as permutation_moments
from stiefel.theory.permutation_ensemble import PermutationEnsemble as PermutationEnsemble
from stiefel.theory.tangent_kernel import AlignmentEstimate as AlignmentEstimate
from stiefel.theory.tangent_kernel import estimate_kernel_alignment as estimate_kernel_alignment
from stiefel.theory.tangent_kernel import tangent_kernel as tangent_kernel
from stiefel.theory.tangent_kernel import tangent_kernel_alignment as tangent_kernel_alignment
