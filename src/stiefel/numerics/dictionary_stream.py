"""What a stream of samples goes through before the dictionary sees it: mean, whitening, scale."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# Directions with less than this part of the largest variance count as empty.
_EMPTY = 1e-10


@dataclass
class SampleStream:
    """Running statistics of the samples seen, ``n²`` numbers at most.

    ``center``: ``"sample"`` takes the mean of every sample off it (the DC of a patch),
    ``"feature"`` the running mean of every feature, ``"none"`` nothing. ``whiten``: multiply by
    C^(-1/2), with C the running second moment of what is left.
    """

    n: int
    center: str
    whiten: bool
    dtype: np.dtype
    seen: int = 0
    scale: float = 0.0
    """Root mean square of the first batch that is not zero; 0 before."""
    mean: np.ndarray = field(init=False)
    scatter: np.ndarray = field(init=False)
    """Σ of outer products of centred samples, if whitening."""

    def __post_init__(self) -> None:
        self.mean = np.zeros(self.n)
        self.scatter = np.zeros((self.n, self.n) if self.whiten else (0, 0))

    def learn(self, rows: np.ndarray) -> np.ndarray:
        """Count ``rows`` ``(B, n)`` in; return them centred, whitened, scaled, transposed.

        All zero if they have nothing left after centring.
        """
        if self.center == "feature":
            self._merge_mean(rows)
        self.seen += len(rows)
        y = self.centred(rows)
        if self.whiten:
            if self.center != "feature":
                self.scatter += _moment(y)
            y = y @ self.whitening()[0]
        if self.scale == 0.0:
            # The largest entry first: squares of the entries may leave the range.
            largest = float(np.abs(y).max())
            if largest > 0:
                self.scale = largest * float(np.sqrt(np.square(y / largest).mean()))
        if self.scale > 0:
            y = y / self.scale
        return np.ascontiguousarray(y.T, dtype=self.dtype)

    def _merge_mean(self, rows: np.ndarray) -> None:
        """Chan, Golub and LeVeque's merge of means and scatters: no cancellation."""
        batch = rows.mean(0, dtype=np.float64)
        total = self.seen + len(rows)
        shift = batch - self.mean
        if self.whiten:
            rest = rows - batch
            self.scatter += _moment(rest)
            self.scatter += _moment(shift[None]) * (self.seen * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)

    def centred(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` without their mean, in float64."""
        rows = np.asarray(rows, dtype=np.float64)
        if self.center == "sample":
            y = rows - rows.mean(1, keepdims=True)
            # A constant sample is zero; its mean is not always exact.
            size = np.abs(rows).max(1, keepdims=True)
            y[np.abs(y).max(1) <= 4 * np.finfo(rows.dtype).eps * size[:, 0]] = 0.0
            return y
        return rows - self.mean if self.center == "feature" else rows

    def whitening(self) -> tuple[np.ndarray, np.ndarray]:
        """C^(-1/2) and C^(1/2), symmetric; both zero in directions without variance."""
        values, vectors = np.linalg.eigh(self.scatter / max(self.seen, 1))
        full = values > _EMPTY * max(values[-1], 0.0)
        root = np.sqrt(np.where(full, values, 0.0))
        inverse = np.where(full, 1 / np.where(full, root, 1.0), 0.0)
        return (vectors * inverse) @ vectors.T, (vectors * root) @ vectors.T

    def principal(self, rows: np.ndarray, chunk: int = 4096) -> np.ndarray:
        """Eigenvectors of the second moment of centred ``rows``, as rows, largest first."""
        moment = np.zeros((self.n, self.n))
        mean = self.mean
        if self.center == "feature":
            self.mean = rows.mean(0, dtype=np.float64)
        for start in range(0, len(rows), chunk):
            part = self.centred(rows[start : start + chunk])
            moment += _moment(part)
        self.mean = mean
        return np.linalg.eigh(moment)[1].T[::-1].copy()


def _moment(rows: np.ndarray) -> np.ndarray:
    """Σ of outer products of ``rows``, ``(n, n)``."""
    with np.errstate(over="ignore", invalid="ignore"):
        moment = rows.T @ rows
    if not np.isfinite(moment).all():
        raise ValueError("squares of X overflow: divide all data by one number")
    return moment
