"""What k, λ and the training clock say in words: classes, drift, attribution, reference models.

Source: arXiv 2605.18898, F2, F3, F5, F6 and F8; the reference table is the paper's published
database (CC BY 4.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stiefel.diagnose.weibull import half_normal_anchor, weibull_std

# F2: the band of what passes signals on, and below it what selects.
BAND = (1.18, 1.21)
STRONG = 0.95
LEAST_R2 = 0.95
# F5, in per cent.
INVARIANT, STRONG_DRIFT = 1.0, 30.0


def classify_k(
    k: float | int, r2: float | None = None, *, se: float | None = None, anchor: float | None = None
) -> str:
    """The class of one matrix.

    Args:
        k: Shape.
        r2: Of the fit; None is taken for good.
        se: Standard error of k. With it, a k within two of them of the anchor and outside the band
            is ``"undecided"``: a 64 × 64 matrix has an error of 0.021.
        anchor: What untrained weights would have; None: 1.2054, the Gaussian.

    Returns:
        ``"transmission"`` (1.18 to 1.21), ``"mild_selection"`` (0.95 to 1.18),
        ``"strong_selection"`` (below), ``"above_anchor"`` (above 1.21: uniform or quantised
        weights), ``"no_line"`` (R² below 0.95: no Weibull line), ``"undecided"``, ``"no_fit"``.
    """
    if not math.isfinite(k):
        return "no_fit"
    if r2 is not None and r2 < LEAST_R2:
        return "no_line"
    centre = half_normal_anchor().k if anchor is None else anchor
    if BAND[0] <= k <= BAND[1]:
        return "transmission"
    if se is not None and abs(k - centre) < 2 * se:
        return "undecided"
    if k > BAND[1]:
        return "above_anchor"
    return "mild_selection" if k >= STRONG else "strong_selection"


class Drift(NamedTuple):
    """How far k has moved.

    Attributes:
        percent: |k − k_start| / k_start · 100.
        state: ``"invariant"`` (below 1 %), ``"mild"`` (to 30 %) or ``"strong"``.
    """

    percent: float
    state: str


def k_drift(k_start: float | int, k: float | int) -> Drift:
    """F5: the move of k since the start of training.

    Raises:
        ValueError: k is not positive.
    """
    for name, value in (("k_start", k_start), ("k", k)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    percent = 100 * abs(k - k_start) / k_start
    state = "invariant" if percent < INVARIANT else "mild" if percent <= STRONG_DRIFT else "strong"
    return Drift(percent, state)


class Growth(NamedTuple):
    """What made the standard deviation of |w| grow along a run.

    Attributes:
        sigma: At each checkpoint.
        lam_factor, k_factor: Last over first of λ and of the factor that depends on k; their
            product is that of σ.
        state: ``"lambda_dominated"``, ``"mixed"`` or ``"k_dominated"``, by the drift of k.
    """

    sigma: list[float]
    lam_factor: float
    k_factor: float
    state: str


def growth(k: Sequence[float | int], lam: Sequence[float | int]) -> Growth:
    """F3: σ = λ · C_k along the checkpoints of a run.

    Raises:
        ValueError: fewer than two checkpoints, or as many k as λ do not come.
    """
    if len(k) != len(lam) or len(k) < 2:
        raise ValueError(f"two checkpoints or more are needed, got {len(k)} k and {len(lam)} λ")
    factors = [weibull_std(shape, 1.0) for shape in k]
    drift = k_drift(k[0], k[-1])
    state = {"invariant": "lambda_dominated", "mild": "mixed", "strong": "k_dominated"}
    sigma = [scale * factor for scale, factor in zip(lam, factors, strict=True)]
    return Growth(sigma, lam[-1] / lam[0], factors[-1] / factors[0], state[drift.state])


class Clock(NamedTuple):
    """AdamW's own time.

    Attributes:
        tau: 1 / (η λ_wd), steps over which weight decay forgets.
        ratio: T / τ.
        state: ``"saturated"`` (1 and more), ``"approaching"`` (0.2 and more) or ``"transition"``.
        fine: The database's finer scale: ``"saturated"`` from 1.2, ``"near_saturated"`` from 0.8,
            ``"approaching"`` from 0.4, ``"partial"`` from 0.25, else ``"transition"``.
    """

    tau: float
    ratio: float
    state: str
    fine: str


def training_clock(lr: float | int, weight_decay: float | int, steps: int) -> Clock:
    """F6: how often the weights have been renewed, T · η · λ_wd.

    Raises:
        ValueError: an argument is not positive.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("steps", steps)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    tau = 1 / (lr * weight_decay)
    ratio = steps / tau
    fine = [(1.2, "saturated"), (0.8, "near_saturated"), (0.4, "approaching"), (0.25, "partial")]
    return Clock(
        tau,
        ratio,
        "saturated" if ratio >= 1 else "approaching" if ratio >= 0.2 else "transition",
        next((name for bound, name in fine if ratio >= bound), "transition"),
    )


def attention_kind(query_heads: int, kv_heads: int) -> str:
    """F8: ``"MHA"``, ``"GQA"`` or ``"MQA"``.

    Raises:
        ValueError: heads below 1, or query heads that are not a multiple of the others.
    """
    if query_heads < 1 or kv_heads < 1 or query_heads % kv_heads:
        raise ValueError(
            f"query heads must be a positive multiple of the key-value heads, got {query_heads} "
            f"and {kv_heads}"
        )
    if kv_heads == query_heads:
        return "MHA"
    return "MQA" if kv_heads == 1 else "GQA"


class Reference(NamedTuple):
    """Published medians of k of one model.

    Attributes:
        name: Of the model.
        attention: ``"fused"`` or the kind of attention.
        ratio: T/τ of its training.
        k: Median k by kind; ``ffn`` is the median over the feed-forward matrices.
        lam_o: λ of the attention's output matrix.
    """

    name: str
    attention: str
    ratio: float
    k: Mapping[str, float | int]
    lam_o: float


def _entry(
    name: str, attention: str, ratio: float | int, lam_o: float | int, **k: float | int
) -> Reference:
    return Reference(name, attention, ratio, k, lam_o)


# fmt: off
REFERENCES = (
    _entry("pythia-70m", "fused", 1.43, .01860, qkv=1.0488, o=1.1838, ffn=1.1900),
    _entry("pythia-160m", "fused", .86, .01568, qkv=1.0982, o=1.1917, ffn=1.1940),
    _entry("pythia-410m", "fused", .43, .01797, qkv=1.1466, o=1.1988, ffn=1.2001),
    _entry("pythia-1b", "fused", .43, .01877, qkv=1.1758, o=1.1990, ffn=1.1995),
    _entry("pythia-6.9b", "fused", .17, .01302, qkv=1.1726, o=1.1986, ffn=1.2018),
    _entry("olmo-1-7b", "MHA", 14.3, .00240, q=.8123, k=.7601, v=1.0601, o=1.0409, ffn=1.2039),
    _entry("olmo-2-7b", "MHA", 18, .01634, q=.9895, k=.9716, v=1.1930, o=1.1958, ffn=1.2031),
    _entry("llama-3-8b", "GQA", 30, .00829, q=1.1352, k=1.1462, v=1.1710, o=1.1841, ffn=1.1931),
    _entry("mistral-7b", "GQA", 15, .00240, q=1.1485, k=1.1291, v=1.1702, o=1.1902, ffn=1.1947),
    _entry("qwen2.5-7b", "GQA", 33, .01307, q=1.1328, k=1.1033, v=1.1430, o=1.1665, ffn=1.1888),
    _entry("qwen2.5-14b", "GQA", 33, .01703, q=1.1638, k=1.1413, v=1.1628, o=1.1903, ffn=1.1926),
    _entry("qwen3-8b", "GQA", 66, .02265, q=1.1623, k=1.1539, v=1.1581, o=1.1802, ffn=1.1872),
)
# fmt: on


class Neighbour(NamedTuple):
    """A published model and how far it is.

    Attributes:
        reference: The model.
        distance: Root mean square difference of the median k of the kinds that both have.
        kinds: Which those are.
    """

    reference: Reference
    distance: float
    kinds: tuple[str, ...]


def compare_to_reference(medians: Mapping[str, float | int]) -> list[Neighbour]:
    """Published models, nearest first, by median k per kind.

    Args:
        medians: By kind: ``q``, ``k``, ``v``, ``o``, ``qkv``, ``ffn``. ``ffn`` is made from
            ``gate``, ``up`` and ``down`` where it is missing. Models without a common kind are
            left out.
    """
    known = dict(medians)
    parts = [known[kind] for kind in ("gate", "up", "down") if kind in known]
    if "ffn" not in known and parts:
        known["ffn"] = sorted(parts)[len(parts) // 2] if len(parts) % 2 else sum(parts) / len(parts)
    found = []
    for reference in REFERENCES:
        kinds = tuple(kind for kind in reference.k if math.isfinite(known.get(kind, math.nan)))
        if kinds:
            squares = [(known[kind] - reference.k[kind]) ** 2 for kind in kinds]
            found.append(Neighbour(reference, math.sqrt(sum(squares) / len(kinds)), kinds))
    return sorted(found, key=lambda neighbour: neighbour.distance)
