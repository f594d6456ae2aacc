"""Low-rank linear algebra by length-squared sampling, in time that does not depend on the rows.

One pass over a matrix, in blocks and without a copy, builds sampling access to it; rows may change
or come later. After that singular vectors, thresholded rows, least squares and functions of AᴴA
take a few hundred rows, however many there are. Source: arXiv 1910.06151.

>>> import numpy as np
>>> from stiefel.numerics.sampled import SampledMatrix, lowrank
>>> tall = np.outer(np.arange(1, 1001), [3.0, 4.0])
>>> sigma, V = lowrank(SampledMatrix(tall), 1, generator=0)
>>> V.ravel().round(6)
array([0.6, 0.8])
"""

from typing import TYPE_CHECKING, Any

from stiefel.extras import estimator
from stiefel.numerics.sampled.bounds import ComplexEstimate as ComplexEstimate
from stiefel.numerics.sampled.bounds import ErrorBound as ErrorBound
from stiefel.numerics.sampled.bounds import Estimate as Estimate
from stiefel.numerics.sampled.bounds import gram_error_rms as gram_error_rms
from stiefel.numerics.sampled.clusters import centroid_distance as centroid_distance
from stiefel.numerics.sampled.discriminant import Discriminant as Discriminant
from stiefel.numerics.sampled.discriminant import discriminant_analysis as discriminant_analysis
from stiefel.numerics.sampled.hamiltonian import Evolution as Evolution
from stiefel.numerics.sampled.hamiltonian import hamiltonian_simulation as hamiltonian_simulation
from stiefel.numerics.sampled.low_rank import Components as Components
from stiefel.numerics.sampled.low_rank import GapWarning as GapWarning
from stiefel.numerics.sampled.low_rank import LowRank as LowRank
from stiefel.numerics.sampled.low_rank import Solution as Solution
from stiefel.numerics.sampled.low_rank import lowrank as lowrank
from stiefel.numerics.sampled.low_rank import lowrank_solve as lowrank_solve
from stiefel.numerics.sampled.low_rank import pca_topk as pca_topk
from stiefel.numerics.sampled.matrix import SampledMatrix as SampledMatrix
from stiefel.numerics.sampled.sdp import GibbsState as GibbsState
from stiefel.numerics.sampled.sdp import SDPResult as SDPResult
from stiefel.numerics.sampled.sdp import sdp_feasibility as sdp_feasibility
from stiefel.numerics.sampled.sketching import Sketch as Sketch
from stiefel.numerics.sampled.sketching import sketch as sketch
from stiefel.numerics.sampled.svm import LinearSVM as LinearSVM
from stiefel.numerics.sampled.svm import least_squares_svm as least_squares_svm
from stiefel.numerics.sampled.transform import LowRankFunction as LowRankFunction
from stiefel.numerics.sampled.transform import Recommendation as Recommendation
from stiefel.numerics.sampled.transform import recommend as recommend
from stiefel.numerics.sampled.transform import svt as svt
from stiefel.numerics.sampled.transform import threshold as threshold
from stiefel.numerics.sampled.vector import Combination as Combination
from stiefel.numerics.sampled.vector import SampledVector as SampledVector
from stiefel.numerics.sampled.vector import combine as combine

if TYPE_CHECKING:
    from stiefel.numerics.sampled.classifiers import (
        SampledDiscriminantAnalysis as SampledDiscriminantAnalysis,
    )
    from stiefel.numerics.sampled.classifiers import (
        SampledNearestCentroid as SampledNearestCentroid,
    )
    from stiefel.numerics.sampled.classifiers import SampledSVC as SampledSVC
    from stiefel.numerics.sampled.estimators import (
        SampledLowRankRegressor as SampledLowRankRegressor,
    )
    from stiefel.numerics.sampled.estimators import SampledPCA as SampledPCA
    from stiefel.numerics.sampled.estimators import SampledRecommender as SampledRecommender

__all__ = [
    "Combination",
    "ComplexEstimate",
    "Components",
    "Discriminant",
    "ErrorBound",
    "Estimate",
    "Evolution",
    "GapWarning",
    "GibbsState",
    "LinearSVM",
    "LowRank",
    "LowRankFunction",
    "Recommendation",
    "SDPResult",
    "SampledDiscriminantAnalysis",
    "SampledLowRankRegressor",
    "SampledMatrix",
    "SampledNearestCentroid",
    "SampledPCA",
    "SampledRecommender",
    "SampledSVC",
    "SampledVector",
    "Sketch",
    "Solution",
    "centroid_distance",
    "combine",
    "discriminant_analysis",
    "gram_error_rms",
    "hamiltonian_simulation",
    "least_squares_svm",
    "lowrank",
    "lowrank_solve",
    "np",
    "pca_topk",
    "recommend",
    "sdp_feasibility",
    "sketch",
    "svt",
    "threshold",
]

# Built on scikit-learn, an extra: imported when asked for.
_ESTIMATORS = {
    "SampledDiscriminantAnalysis": "stiefel.numerics.sampled.classifiers",
    "SampledLowRankRegressor": "stiefel.numerics.sampled.estimators",
    "SampledNearestCentroid": "stiefel.numerics.sampled.classifiers",
    "SampledPCA": "stiefel.numerics.sampled.estimators",
    "SampledRecommender": "stiefel.numerics.sampled.estimators",
    "SampledSVC": "stiefel.numerics.sampled.classifiers",
}


def __getattr__(name: str) -> Any:
    """The scikit-learn estimators of this home."""
    return estimator(__name__, _ESTIMATORS, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ESTIMATORS})
