"""Penalties that keep layers close to orthogonal while something else is being trained."""

from stiefel.linalg.relaxed_orthogonality import lambda_orthogonality as lambda_orthogonality
from stiefel.regularize.conv_orthogonality import LayerReport as LayerReport
from stiefel.regularize.conv_orthogonality import OrthogonalityPenalty as OrthogonalityPenalty
from stiefel.regularize.lambda_penalty import LambdaOrthogonality as LambdaOrthogonality
from stiefel.regularize.orthoreg import OrthoReg as OrthoReg
from stiefel.regularize.orthoreg_loss import orthoreg_loss as orthoreg_loss
from stiefel.regularize.orthoreg_loss import orthoreg_loss_lowrank as orthoreg_loss_lowrank
