"""Two generations of an embedding model for digits, and the maps between their vectors.

What the card on λ-orthogonality trains: an old and a new network, features of images as they are
and turned by 90°, adapters from one to the other, and how well each finds the other's images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stiefel.data import MissingDataError, table
from stiefel.linalg.relaxed_orthogonality import orthogonality_distance
from stiefel.merge.compatible import CompatibleSettings, fit_compatible_maps
from stiefel.merge.retrieval import backfill_curve, backfill_order, retrieval_metrics
from stiefel.papers.attribute_digits import Part
from stiefel.papers.paper import UnavailableError

Report = Callable[[float, str], None]
HIDDEN = {"old": 32, "new": 256}
TRAIN = 1200


def split(seed: int) -> tuple[Part, Part]:
    """1,200 digits to train on and the 597 others, in an order drawn from ``seed``.

    Raises:
        UnavailableError: scikit-learn, which holds them, is not installed.
    """
    try:
        content = table("digits")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    order = torch.randperm(len(content.y), generator=torch.Generator().manual_seed(seed))
    x, y = (content.x / 16).float()[order], content.y[order]
    return Part(x[:TRAIN], y[:TRAIN]), Part(x[TRAIN:], y[TRAIN:])


def embed(
    part: Part, hidden: int, width: int, epochs: int, classes: int, seed: int
) -> nn.Sequential:
    """Train 64 – hidden – width with a linear head on digits below ``classes``; without the head.

    Adam at 1e-3 with weight decay 1e-4 in batches of 64.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, width))
        head = nn.Linear(width, classes)
    known = part.y < classes
    x, y = part.x[known], part.y[known]
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(head(body(x[index])), y[index]).backward()
            optimizer.step()
    return body.eval().requires_grad_(False)


def turned(x: Tensor) -> Tensor:
    """Images turned by 90°."""
    return torch.rot90(x.unflatten(1, (8, 8)), 1, (1, 2)).flatten(1)


def _scores(found: Mapping[str, float]) -> list[float]:
    return [100 * found["cmc1"], 100 * found["map"]]


def forward_only(old: Tensor, new: Tensor, epochs: int, lr: float, seed: int) -> nn.Linear:
    """Forward-compatible training: F alone, by least squares on the new vectors, with B = I."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        forward = nn.Linear(old.shape[1], new.shape[1])
    optimizer = torch.optim.Adam(forward.parameters(), lr=lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(old), generator=generator).split(128):
            optimizer.zero_grad()
            (forward(old[index]) - new[index]).square().sum(1).mean().backward()
            optimizer.step()
    return forward.requires_grad_(False)


def extend(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The old model knew five classes, the new one knows ten: both ways of serving its vectors.

    Returns:
        ``[CMC, mAP]`` in percent by pair of query and gallery, and the areas under backfilling.
    """
    seed, epochs = int(config["seed"]), int(config["epochs"])
    train, test = split(seed)
    old = embed(train, HIDDEN["old"], 32, int(config["old_epochs"]), 5, seed)
    report(0.1, "old model")
    new = embed(train, HIDDEN["new"], 32, int(config["new_epochs"]), 10, 100 + seed)
    report(0.4, "new model")
    settings = CompatibleSettings(rotation="exp", epochs=epochs, lr=3e-3)
    maps = fit_compatible_maps(
        old(train.x),
        new(train.x),
        train.y,
        settings,
        generator=torch.Generator().manual_seed(seed),
        report=lambda part, loss: report(0.4 + 0.4 * part, f"loss {loss:.3f}"),
    )
    placed_old, placed_new = maps.place_old(old(test.x)), maps.place_new(new(test.x))
    control = forward_only(
        maps.place_old(old(train.x)), maps.place_new(new(train.x)), epochs, 3e-3, seed
    )

    def found(queries: Tensor, gallery: Tensor) -> list[float]:
        return _scores(retrieval_metrics(queries, gallery, test.y, test.y, exclude_self=True))

    result: dict[str, Any] = {
        "old/old": found(placed_old, placed_old),
        "new/old": found(placed_new, placed_old),
        "new/new": found(placed_new, placed_new),
    }
    random = torch.randperm(len(test.y), generator=torch.Generator().manual_seed(seed))
    pairs = {
        "ours": (maps.map_old(old(test.x)), maps.map_new(new(test.x))),
        "fct": (control(placed_old), placed_new),
    }
    for name, (f, b) in pairs.items():
        result[f"{name} F/old"] = found(f, placed_old)
        result[f"{name} F/F"] = found(f, f)
        result[f"{name} B/F"] = found(b, f)
        result[f"{name} B/old"] = found(b, placed_old)
        result[f"{name} B/B"] = found(b, b)
        orders = {
            "random": random,
            "far": backfill_order(f, test.y),
            "cosine": backfill_order(f, test.y, "cosine"),
        }
        for kind, order in orders.items():
            curve = backfill_curve(b, f, b, order, test.y, test.y, exclude_self=True)
            result[f"{name} area {kind}"] = 100 * curve.area
            result[f"{name} curve {kind}"] = [100 * v for v in curve.values]
    return result


def adapt(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Both models know upright digits; the maps are trained on digits turned by 90°.

    Returns:
        By mode or λ: ``[CMC, mAP]`` of B/B turned, B/B upright and B/old turned, and the distance
        of B from orthogonality.
    """
    seed = int(config["seed"])
    train, test = split(seed)
    old = embed(train, HIDDEN["old"], 16, int(config["old_epochs"]), 10, seed)
    new = embed(train, HIDDEN["new"], 32, int(config["new_epochs"]), 10, 100 + seed)
    report(0.3, "models")
    x = turned(train.x)
    result: dict[str, Any] = {}
    for place, lam in enumerate(config["lambdas"]):
        settings = CompatibleSettings(
            mode="strict" if lam == "strict" else "lambda",
            lam=None if lam == "strict" else float(lam),
            rotation="exp",
            weights=(1.0, 1.0, 1.0),
            epochs=int(config["epochs"]),
        )
        generator = torch.Generator().manual_seed(seed)
        maps = fit_compatible_maps(old(x), new(x), train.y, settings, generator=generator)
        turned_test = turned(test.x)
        placed = maps.place_old(old(turned_test))
        queries = {"turned": maps.map_new(new(turned_test)), "upright": maps.map_new(new(test.x))}
        row: dict[str, Any] = {
            name: _scores(retrieval_metrics(q, q, test.y, test.y, exclude_self=True))
            for name, q in queries.items()
        }
        row["old"] = _scores(
            retrieval_metrics(queries["turned"], placed, test.y, test.y, exclude_self=True)
        )
        row["distance"] = float(orthogonality_distance(maps.backward_map.weight))
        result[str(lam)] = row
        report(0.3 + 0.7 * (place + 1) / len(config["lambdas"]), f"λ {lam}")
    return result
