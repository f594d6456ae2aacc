"""A real time series that comes with this package: the carbon dioxide record of Mauna Loa."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.data.text import MissingDataError

_FILE = Path(__file__).with_name("mauna_loa_co2.txt")


@dataclass(frozen=True)
class WeeklyRecord:
    """One value a week, some missing."""

    values: Float[Tensor, " weeks"]
    """Float64, in ppm; NaN where a week has none."""
    start: date
    """Of the first value."""
    source: str
    sha256: str
    """Checksum of the file."""
    licence: str


def carbon_dioxide() -> WeeklyRecord:
    """CO2 in air at Mauna Loa, March 1958 to December 2001: 2,284 weeks, 59 without a value.

    Raises:
        MissingDataError: the file that belongs to this package is not there.
    """
    try:
        content = _FILE.read_bytes()
    except OSError as error:
        raise MissingDataError(
            f"{_FILE.name}, a part of this package, cannot be read ({error.strerror}): "
            "install stiefel again"
        ) from None
    words = [
        word
        for line in content.decode("ascii").splitlines()
        if not line.startswith("#")
        for word in line.split()
    ]
    values = [float("nan") if word == "." else float(word) for word in words]
    return WeeklyRecord(
        values=torch.tensor(values, dtype=torch.float64),
        start=date(1958, 3, 29),
        source="Keeling and Whorf, weekly CO2 at Mauna Loa, Scripps Institution of Oceanography",
        sha256=hashlib.sha256(content).hexdigest(),
        licence="public domain",
    )
