"""The steering experiment on one model, layer and seed: differences, scans, controls.

The score of a vector on a stem is the log-odds, in nats, that the next token is a word of the
concept's lexicon, the vector being added to the last token at the input of the layer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stiefel.data import MissingDataError
from stiefel.diagnose.cylinder import (
    ConceptCylinder,
    calibrate_sector,
    circular_summary,
    minimal_strength,
    sector_scan,
    sin_cos_law,
)
from stiefel.papers.paper import UnavailableError
from stiefel.papers.progress import Report
from stiefel.papers.smollm2 import Decoder, Shape, Tail, load, padded, random_weights
from stiefel.papers.steering_prompts import CONCEPTS, NEUTRAL, STEMS

AXIS, RADIUS, ANGLES = 1.5, 1.0, 16
# Lengths at which the least that works is looked for, in units of ‖a‖, and what counts as working.
GRID = tuple(0.25 * step for step in range(1, 17))
THRESHOLD = 1.0
EXPONENTS = range(5)
# Fewer pairs than this decide nothing: their correlation counts as 1, which fails the claim.
FEWEST_PAIRS = 10
# Candidates read out at once: 256 rows of 49,152 logits are 50 MB.
ROWS = 256
TINY = Shape(6, 32, 4, 2, 48, 400, 1e4, 1e-5)


class Words:
    """A word a token: the tokenizer of the random model."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """Ids in the order in which words first came."""
        return [self.ids.setdefault(word, len(self.ids)) for word in text.split()]


def steering(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Everything that is measured at the layers of ``config``; numbers by layer and name.

    Raises:
        UnavailableError: the model's weights are not on this machine.
    """
    model, tokenizer, concepts = _model(config["model"])
    names = list(concepts)[: config["concepts"]]
    stems = STEMS[: config["stems"]]
    rng = np.random.default_rng(config["seed"])
    order = rng.permutation(len(stems))
    test = torch.from_numpy(order[: config["test"]].copy())
    train = torch.from_numpy(order[config["test"] :].copy())
    drawn = [[(int(rng.integers(6)), int(rng.integers(6))) for _ in stems] for _ in names]
    with_, without = (
        [
            f"{stem} {phrases[pair[side]]}"
            for name, row in zip(names, drawn, strict=True)
            for stem, pair in zip(stems, row, strict=True)
            for phrases in [concepts[name][0] if side == 0 else NEUTRAL]
        ]
        for side in (0, 1)
    )
    stem_ids, lengths = padded([tokenizer.encode(stem) for stem in stems])
    layers = config["layers"]
    with torch.no_grad():
        start = model(stem_ids, lengths)
        acts = _last_inputs(model, tokenizer, start.past, stems, with_ + without, layers)
        found: dict[str, Any] = {}
        for at, layer in enumerate(layers):
            half = len(with_)
            D = (acts[layer][:half] - acts[layer][half:]).view(len(names), len(stems), -1)
            tails = [Tail(model, stem_ids[i], lengths[i], layer) for i in (test, train[:12])]
            cells = []
            for number, name in enumerate(names):
                lexicon = lexicon_ids(tokenizer, concepts[name][1])
                seed = 1000 * config["seed"] + number
                cells.append(_cell(tails, D[number], train, test, lexicon, seed))
                done = (at + (number + 1) / len(names)) / len(layers)
                report(done, f"block {layer}, {name}")
            found[str(layer)] = _summary(cells)
    return found


def _model(name: str) -> tuple[Decoder, Any, Mapping[str, tuple[Sequence[str], str]]]:
    if name == "random":
        return Decoder(TINY, random_weights(TINY, 0)), Words(), CONCEPTS
    try:
        return *_loaded(name), CONCEPTS
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error


@lru_cache(maxsize=1)
def _loaded(name: str) -> tuple[Decoder, Any]:
    """Kept for the next split: decoding 4-bit weights takes longer than a block's scan."""
    return load(None if name == "smollm2" else Path(name))


def model_at_hand() -> str:
    """``smollm2`` where its package is installed, else ``random``."""
    from stiefel.data import weights_file
    from stiefel.papers.smollm2 import PACKAGE

    try:
        weights_file(PACKAGE)
    except MissingDataError:
        return "random"
    return "smollm2"


def paper_model() -> tuple[str, int]:
    """Path and number of blocks of the larger decoder that ``STIEFEL_DATA`` holds.

    Raises:
        UnavailableError: it is not there.
    """
    folder = os.environ.get("STIEFEL_DATA")
    path = Path(folder or "STIEFEL_DATA") / "cylindrical-steering" / "model.gguf"
    if not folder or not path.is_file():
        raise UnavailableError(
            "paper scale steers a larger decoder: set STIEFEL_DATA to a folder with "
            "cylindrical-steering/model.gguf (llama architecture, byte-level BPE, weights in F32, "
            f"F16, Q8_0 or Q4_1); there is none at {path}"
        )
    from stiefel.data import GGUF

    with GGUF(path) as file:
        return str(path), int(file.metadata["llama.block_count"])


def lexicon_ids(tokenizer: Any, lexicon: str) -> Tensor:
    """Ids of the words that are one token with a space before them.

    Raises:
        ValueError: none is.
    """
    encoded = [tokenizer.encode(f" {word}") for word in lexicon.split()]
    single = [ids[0] for ids in encoded if len(ids) == 1]
    if not single:
        raise ValueError(f"no word of the lexicon is one token: {lexicon}")
    return torch.tensor(single)


def _last_inputs(
    model: Decoder,
    tokenizer: Any,
    past: Any,
    stems: Sequence[str],
    texts: Sequence[str],
    layers: Sequence[int],
) -> dict[int, Tensor]:
    """Inputs of the layers at each text's last token; text i begins with stem i mod len(stems)."""
    rows = torch.arange(len(texts)) % len(stems)
    tails = []
    for text, row in zip(texts, rows.tolist(), strict=True):
        stem, ids = tokenizer.encode(stems[row]), tokenizer.encode(text)
        if ids[: len(stem)] != stem:
            raise RuntimeError(f"the tokens of {text!r} do not begin with those of its stem")
        tails.append(ids[len(stem) :])
    ids, lengths = padded(tails)
    return model(ids, lengths, past.rows(rows), keep=layers, logits=False).kept


def log_odds(tail: Tail, vectors: Tensor, lexicon: Tensor) -> Tensor:
    """Log-odds of the lexicon as the next token, ``[prompts, candidates]``.

    Args:
        tail: Of the prompts.
        vectors: ``[prompts or 1, candidates, d]``.
        lexicon: Token ids.
    """
    step = max(1, ROWS // len(tail.last))
    found = []
    for piece in vectors.split(step, dim=1):
        logits = tail.logits(piece)
        inside = logits[..., lexicon].logsumexp(-1)
        logits[..., lexicon] = -torch.inf
        found.append(inside - logits.logsumexp(-1))
    return torch.cat(found, dim=1)


def _cell(
    tails: Sequence[Tail], D: Tensor, train: Tensor, test: Tensor, lexicon: Tensor, seed: int
) -> dict[str, Any]:
    """One concept at one layer: every gain on the test stems, ``[stems]`` or ``[stems, n]``."""
    cyl = ConceptCylinder().fit(D[train])
    a, own = cyl.axis_norm_, D[test]
    coordinates = cyl.transform(own)
    across = own - coordinates.h[:, None] * cyl.axis_
    across = across / across.norm(dim=-1, keepdim=True)
    g = torch.Generator().manual_seed(seed)
    noise = _across(torch.randn(own.shape, generator=g), cyl.axis_)
    other = _other_plane(cyl, g)

    tail = tails[0]
    axis = cyl.axis_.expand_as(own)
    single = {
        "none": 0 * axis,
        "axis": a * axis,
        "own": cyl.steering_vector(own, a),
        "own axis part": cyl.steering_vector(own, a, 1.0),
        "own across": a * across,
        "random across": a * noise / noise.norm(dim=-1, keepdim=True),
        "base": AXIS * a * axis,
        "longer axis": math.hypot(AXIS, RADIUS) * a * axis,
        "base and own across": AXIS * a * axis + RADIUS * a * across,
    }
    scores = log_odds(tail, torch.stack(list(single.values()), dim=1), lexicon)
    gain = {name: scores[:, i] - scores[:, 0] for i, name in enumerate(single)}

    def score(vectors: Tensor) -> Tensor:
        return log_odds(tail, vectors[None], lexicon)

    base = scores[:, list(single).index("base"), None]
    profile = sector_scan(score, cyl, AXIS, RADIUS, ANGLES)
    elsewhere = sector_scan(score, other, AXIS, RADIUS, ANGLES)
    learned = sector_scan(lambda v: log_odds(tails[1], v[None], lexicon), cyl, AXIS, RADIUS, ANGLES)
    at = round(calibrate_sector(learned.score) * ANGLES / (2 * math.pi))
    least = _least_strengths(tail, own, a, scores[:, 0], lexicon)
    return {
        **gain,
        "theta": torch.atan2(coordinates.sin, coordinates.cos),
        "profile": profile.score - base,
        "elsewhere": elsewhere.score - base,
        "at": at,
        "best phi": profile.best_phi,
        "least": least,
        "alike": torch.nn.functional.cosine_similarity(own[:, None], own[None], dim=-1),
    }


def _across(x: Tensor, axis: Tensor) -> Tensor:
    return x - (x @ axis)[..., None] * axis


def _other_plane(cyl: ConceptCylinder, g: torch.Generator) -> ConceptCylinder:
    """The same axis with a random plane around it."""
    rows = _across(torch.randn(cyl.plane_.shape, generator=g), cyl.axis_)
    other = ConceptCylinder()
    other.axis_, other.axis_norm_ = cyl.axis_, cyl.axis_norm_
    other.plane_ = torch.linalg.qr(rows.mT).Q.mT
    return other


def _least_strengths(
    tail: Tail, own: Tensor, a: float, unsteered: Tensor, lexicon: Tensor
) -> list[float]:
    """The shortest own difference that gains a nat, per stem, in units of ‖a‖; NaN where none."""
    grid = torch.tensor(GRID)
    unit = own / own.norm(dim=-1, keepdim=True)
    # All stems and lengths in one pass; each stem then looks only at its own row.
    table = log_odds(tail, a * grid[None, :, None] * unit[:, None], lexicon) - unsteered[:, None]
    return [
        minimal_strength(lambda _, row=row: row, direction, grid, THRESHOLD)
        for row, direction in zip(table, own, strict=True)
    ]


def _summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers for the claims and curves for the figure, over concepts and test stems."""

    def mean(name: str) -> float:
        return float(torch.cat([cell[name] for cell in cells]).mean())

    profile = torch.cat([cell["profile"] for cell in cells])
    elsewhere = torch.cat([cell["elsewhere"] for cell in cells])
    turned = torch.cat([cell["profile"].roll(-cell["at"], 1) for cell in cells])
    calibrated, opposite = turned[:, 0], turned[:, ANGLES // 2]
    base = torch.cat([cell["base"] for cell in cells])
    helped = torch.cat([cell["base and own across"] for cell in cells]) > base
    alike, strength_gap = _pairs(cells, "least")
    _, phi_gap = _pairs(cells, "best phi")
    law = sin_cos_law(
        torch.cat([cell["theta"] for cell in cells]),
        torch.cat([cell["own"] for cell in cells]),
        list(EXPONENTS),
        list(EXPONENTS),
    )
    r, pairs = _correlation(alike, strength_gap)
    return {
        "axis_gain": mean("axis"),
        "own_gain": mean("own"),
        "own_axis_part_gain": mean("own axis part"),
        "own_across_gain": mean("own across"),
        "random_across_gain": mean("random across"),
        "plane_best": float(profile.amax(1).mean()),
        "plane_worst": float(profile.amin(1).mean()),
        "plane_range": float((profile.amax(1) - profile.amin(1)).mean()),
        "random_plane_range": float((elsewhere.amax(1) - elsewhere.amin(1)).mean()),
        "own_across_helps": float(helped.double().mean()),
        "strength_correlation": r,
        "strength_pairs": float(pairs),
        "angle_correlation": _correlation(alike, phi_gap)[0],
        "law_r": law.r,
        "law_p": law.p,
        "resultant": float(
            np.mean([circular_summary(cell["best phi"]).resultant for cell in cells])
        ),
        "calibrated_gain": float(calibrated.mean()),
        "calibrated_share": float((calibrated > 0).double().mean()),
        "opposite_gain": float(opposite.mean()),
        "longer_axis_gain": mean("longer axis") - float(base.mean()),
        "profiles": [turned_cell.tolist() for turned_cell in _by_cell(turned, cells)],
        "alike": [x for x, y in zip(alike, strength_gap, strict=True) if math.isfinite(y)],
        "strength gap": [y for y in strength_gap if math.isfinite(y)],
    }


def _by_cell(rows: Tensor, cells: Sequence[Mapping[str, Any]]) -> Tensor:
    """Mean over the stems of each concept, ``[concepts, angles]``."""
    return rows.unflatten(0, (len(cells), -1)).mean(1)


def _pairs(cells: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Over all pairs of stems of one concept: cosine of their differences, and a gap.

    Gaps of angles are taken round the circle; a gap is NaN where a strength is.
    """
    alike, gaps = [], []
    for cell in cells:
        values = torch.as_tensor(cell[name], dtype=torch.float64)
        i, j = torch.triu_indices(len(values), len(values), 1)
        gap = (values[i] - values[j]).abs()
        if name == "best phi":
            gap = torch.minimum(gap, 2 * math.pi - gap)
        alike += cell["alike"][i, j].tolist()
        gaps += gap.tolist()
    return alike, gaps


def _correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, int]:
    """Pearson's r over the pairs whose y is a number, and how many those are."""
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if len(kept) < FEWEST_PAIRS or np.ptp([b for _, b in kept]) == 0:
        return 1.0, len(kept)
    return float(np.corrcoef(np.array(kept).T)[0, 1]), len(kept)
