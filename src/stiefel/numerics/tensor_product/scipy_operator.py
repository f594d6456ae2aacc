"""A linear map between fields as a ``scipy.sparse.linalg.LinearOperator``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NUMPY_TYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}


def linear_operator(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    outputs: Sequence[int],
    inputs: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Any:
    """SciPy's operator for maps that take ``(*batch, *inputs)`` to ``(*batch, *outputs)``.

    Columns of a block of vectors become the batch. Vectors are converted to ``dtype`` (to its
    complex form if they are complex).
    """
    import numpy as np
    import scipy.sparse.linalg

    # Its maps are arguments of a subclass that __new__ picks, which a type checker cannot see.
    make: Any = scipy.sparse.linalg.LinearOperator

    def run(map_: Callable[[Tensor], Tensor], sizes: Sequence[int], x: Any) -> Any:
        values = np.asarray(x)
        columns = values.reshape(len(values), -1).T
        kind = dtype.to_complex() if np.iscomplexobj(values) else dtype
        field = torch.from_numpy(np.ascontiguousarray(columns)).to(device, kind)
        with torch.no_grad():
            out = map_(field.reshape(-1, *sizes))
        found = out.reshape(len(columns), -1).cpu().numpy().T
        return found.reshape(-1) if values.ndim == 1 else found

    shape = (math.prod(outputs), math.prod(inputs))
    return make(
        shape,
        matvec=lambda x: run(forward, inputs, x),
        rmatvec=lambda x: run(adjoint, outputs, x),
        matmat=lambda x: run(forward, inputs, x),
        rmatmat=lambda x: run(adjoint, outputs, x),
        dtype=np.dtype(NUMPY_TYPES[dtype]),
    )
