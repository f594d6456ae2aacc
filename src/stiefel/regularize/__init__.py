"""Penalties that keep layers close to orthogonal while something else is being trained."""

from stiefel.regularize.conv_orthogonality import LayerReport as LayerReport
from stiefel.regularize.conv_orthogonality import OrthogonalityPenalty as OrthogonalityPenalty
