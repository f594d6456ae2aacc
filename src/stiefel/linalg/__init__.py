"""Pure tensor functions: polar factors, rotations, the discrete cosine transform.

No state and no knowledge of anything above. All functions are batched over leading dimensions.
"""

from stiefel.linalg.coefficients import Table as Table
from stiefel.linalg.coefficients import as_table as as_table
from stiefel.linalg.coefficients import check_guards as check_guards
from stiefel.linalg.dct import dct as dct
from stiefel.linalg.dct import dct_matrix as dct_matrix
from stiefel.linalg.dct import idct as idct
from stiefel.linalg.diagonalize import IllConditionedError as IllConditionedError
from stiefel.linalg.diagonalize import PTDResult as PTDResult
from stiefel.linalg.diagonalize import ptd_diagonalize as ptd_diagonalize
from stiefel.linalg.hippo_ptd import fourier_noise as fourier_noise
from stiefel.linalg.hippo_ptd import hippo_ptd as hippo_ptd
from stiefel.linalg.hippo_ptd import legs_transfer as legs_transfer
from stiefel.linalg.hippo_ptd import spike_frequencies as spike_frequencies
from stiefel.linalg.polar import newton_schulz as newton_schulz
from stiefel.linalg.polar import orthogonality_error as orthogonality_error
from stiefel.linalg.polar import polar as polar
from stiefel.linalg.procrustes import procrustes_rotation as procrustes_rotation
from stiefel.linalg.relaxed_orthogonality import lambda_orthogonality as lambda_orthogonality
from stiefel.linalg.relaxed_orthogonality import orthogonality_distance as orthogonality_distance
from stiefel.linalg.rotation import cayley as cayley
from stiefel.linalg.rotation import haar as haar
from stiefel.linalg.rotation import inverse_cayley as inverse_cayley
from stiefel.linalg.rotation import rotation_exp as rotation_exp
from stiefel.linalg.rotation import rotation_log as rotation_log
from stiefel.linalg.rotation import skew as skew
from stiefel.linalg.schulz import orthogonalize as orthogonalize
