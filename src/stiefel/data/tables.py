"""Small real tables without a download: those that scikit-learn brings along."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stiefel.data.text import MissingDataError

# What each measures, and the classes or the quantity to predict.
TABLES = {
    "digits": "1797 handwritten digits, 8 × 8 pixels of 0 to 16 (test part of Optdigits, UCI)",
    "breast_cancer": "569 cell nuclei, 30 measurements, malignant or benign (Wisconsin, UCI)",
    "diabetes": "442 patients, 10 measurements, progression of the disease (Efron et al.)",
    "iris": "150 flowers, 4 measurements, 3 species (Fisher, UCI)",
    "wine": "178 wines, 13 measurements, 3 cultivars (UCI)",
}


@dataclass(frozen=True)
class Table:
    """Rows with one target each, as they come: nothing is scaled or shuffled."""

    x: Float[Tensor, "rows columns"]
    """Float64."""
    y: Shaped[Tensor, " rows"]
    """Classes as int64, quantities as float64."""
    source: str
    version: str
    """Of the package that holds the file."""
    sha256: str
    """Checksum of both arrays."""
    licence: str


def table(name: str) -> Table:
    """One of scikit-learn's own tables: digits, breast_cancer, diabetes, iris or wine.

    The diabetes measurements are the raw ones, not those that scikit-learn scales.

    Raises:
        ValueError: another name.
        MissingDataError: scikit-learn is not installed.
    """
    if name not in TABLES:
        raise ValueError(f"name must be one of {', '.join(TABLES)}, got {name!r}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDataError(
            f"the table {name!r} comes with scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
    options = {"scaled": False} if name == "diabetes" else {}
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True, **options)
    x = np.ascontiguousarray(x, dtype=np.float64)
    y = np.ascontiguousarray(y, dtype=np.float64 if name == "diabetes" else np.int64)
    return Table(
        x=torch.from_numpy(x),
        y=torch.from_numpy(y),
        source=TABLES[name],
        version=f"scikit-learn {version('scikit-learn')}",
        sha256=hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest(),
        licence="UCI: CC BY 4.0"
        if name != "diabetes"
        else "as published with least angle regression",
    )
