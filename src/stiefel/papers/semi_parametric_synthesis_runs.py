"""Small diffusion models with and without a memory, judged by a classifier of real images.

At laptop scale the 1,797 digits of scikit-learn (every third one is for testing), flat networks; at
the authors' scale CIFAR-10 from ``cifar-10-batches-bin`` in ``STIEFEL_DATA``, with a U-Net.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn

from stiefel.data import table
from stiefel.generate import (
    ConditionedNetwork,
    DCTEncoder,
    ImageDatabase,
    RetrievalDenoiser,
    RetrievalDiffusion,
    RetrievalUNet,
    copy_report,
    frechet_distance,
    precision_recall,
)
from stiefel.papers.paper import Scale, UnavailableError
from stiefel.papers.sequence_digits import CIFAR_TEST, CIFAR_TRAIN, VARIABLE, cifar10

Report = Callable[[float, str], None]

# Width, blocks, inner width (sheet): 201,720, 51,432 and 32,632 parameters.
SIZES = {"large": (96, 3, 48), "middle": (48, 2, 32), "small": (32, 2, 32)}
# Width, inner width of the U-Net at the authors' scale.
UNET_SIZES = {"large": (96, 64), "middle": (48, 64), "small": (36, 64)}
KEEP, K = 24, 4
SEEN = 5
"""The swap trains on the classes below this and draws from the others."""
DELETED = 7
SHOWN = 8
TOP_M = (0.01, 0.1, 0.5)
DETAILED = 5
"""Draws of which everything else is measured too."""
JUDGE_STEPS, JUDGE_BATCH = 1500, 128
CIFAR_JUDGE = (20_000, "cuda")
"""Its steps, and where it is trained."""

LAPTOP = {
    "data": "digits", "device": "cpu", "steps": 1200, "samples": 600, "swapped": 400, "draws": 20,
    "ddim": 25, "batch": 128, "sizes": "flat",
}  # fmt: skip
SMOKE = {**LAPTOP, "steps": 30, "samples": 120, "swapped": 120, "draws": 1, "ddim": 5}
PAPER = {
    **LAPTOP, "data": "cifar10", "device": "cuda", "steps": 200_000, "samples": 10_000,
    "swapped": 5_000, "draws": 1, "ddim": 100, "sizes": "unet",
}  # fmt: skip


def settings(scale: Scale) -> dict[str, Any]:
    """What all trainings of one scale have in common.

    Raises:
        UnavailableError: diffusers is not installed; no CUDA device or no CIFAR-10 at paper scale.
            Names all that is missing.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UnavailableError("sampling needs diffusers: pip install 'stiefel[generate]'")
    if scale is not Scale.PAPER:
        return dict(SMOKE if scale is Scale.SMOKE else LAPTOP)
    missing = [] if torch.cuda.is_available() else ["a CUDA device"]
    folder = os.environ.get(VARIABLE)
    wanted = (*CIFAR_TRAIN, *CIFAR_TEST)
    if not folder:
        missing.append(f"CIFAR-10: set {VARIABLE} to a folder with {', '.join(wanted)}")
    else:
        missing += [str(Path(folder) / f) for f in wanted if not (Path(folder) / f).is_file()]
    if missing:
        raise UnavailableError(f"paper scale needs {'; '.join(missing)}")
    return dict(PAPER)


@dataclass(frozen=True)
class Lab:
    """Real images, and a classifier that never saw a sample."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    judge: nn.Sequential
    """Its last layer classifies the 48 features before it."""
    accuracy: float
    spread: float
    """Standard deviation of the training images' features."""
    sha256: str

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """``[n, 48]``, divided by their spread over the training images."""
        return self.judge[:-1](images) / self.spread

    @torch.no_grad()
    def classes(self, images: Tensor) -> Tensor:
        """``[n]`` labels as the judge sees them."""
        return self.judge(images).argmax(1)


@lru_cache(maxsize=2)
def lab(data: str) -> Lab:
    """The images of ``"digits"`` or ``"cifar10"`` and their judge, the same for every seed."""
    if data == "cifar10":
        folder = os.environ.get(VARIABLE)
        if folder is None:
            raise UnavailableError(f"CIFAR-10: {VARIABLE} is not set")
        (x, y, test_x, test_y), digest = cifar10(Path(folder))
        x, test_x = (v.mT.reshape(-1, 3, 32, 32).contiguous() for v in (x, test_x))
        torch.manual_seed(0)
        body: list[nn.Module] = []
        for come, go in ((3, 64), (64, 128), (128, 256)):
            body += [nn.Conv2d(come, go, 3, padding=1), nn.BatchNorm2d(go), nn.ReLU()]
            body += [nn.MaxPool2d(2)]
        body += [nn.Flatten(), nn.Linear(256 * 16, 48), nn.ReLU(), nn.Linear(48, 10)]
        steps, device = CIFAR_JUDGE
    else:
        found = table("digits")
        images, labels = (found.x / 8 - 1).float().reshape(-1, 8, 8), found.y
        digest = found.sha256
        test = torch.arange(len(images)) % 3 == 2
        x, y, test_x, test_y = images[~test], labels[~test], images[test], labels[test]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            body = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 48), nn.ReLU()]
            body += [nn.Linear(48, 10)]
        steps, device = JUDGE_STEPS, "cpu"
    judge = nn.Sequential(*body).to(device)
    _train_judge(judge, x, y, steps, device)
    judge.cpu()
    with torch.no_grad():
        spread = float(judge[:-1](x).std())
        accuracy = float((judge(test_x).argmax(1) == test_y).double().mean())
    return Lab(x, y, test_x, test_y, judge, accuracy, spread, digest)


def _train_judge(judge: nn.Module, x: Tensor, y: Tensor, steps: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    judge.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (JUDGE_BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(judge(x[rows].to(device)), y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()


def start(config: Mapping[str, Any]) -> int:
    """The seed of weights and batches: another one for each training of a seed."""
    return 10 * int(config["seed"]) + int(config["repeat"])


def build(config: Mapping[str, Any], shape: tuple[int, ...], width: int) -> ConditionedNetwork:
    """The network of a run, its weights drawn from the seed."""
    generator = torch.Generator().manual_seed(start(config))
    if config["sizes"] == "unet":
        channels, inner = UNET_SIZES[config["size"]]
        network: ConditionedNetwork = RetrievalUNet(
            shape, width, width=channels, inner=inner, generator=generator
        )
    else:
        w, blocks, inner = SIZES[config["size"]]
        network = RetrievalDenoiser(
            shape[0] * shape[1], width, width=w, blocks=blocks, inner=inner, generator=generator
        )
    return network.to(config["device"])


def run(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train one model and measure it.

    ``config``: what :func:`settings` gives; ``seed``, ``repeat``; ``size``, of :data:`SIZES`;
    ``memory``: ``"neighbours"``, ``"random"`` (others in their place), or ``"none"`` (the null
    context in their place: equal parameters, equal cost); ``classes``: ``"all"``, or ``"seen"`` for
    those below :data:`SEEN`.
    """
    here = lab(config["data"])
    everything = config["classes"] == "all"
    images = here.images if everything else here.images[here.labels < SEEN]
    encoder = DCTEncoder(KEEP).fit(images)
    database = ImageDatabase(images, encoder)
    network = build(config, database.shape, database.width)
    neighbours = None
    if config["memory"] == "random":
        generator = torch.Generator().manual_seed(1000 + start(config))
        neighbours = torch.randint(len(images), (len(images), K), generator=generator)
    model = RetrievalDiffusion(network).fit(
        images,
        database,
        k=K,
        steps=config["steps"],
        p_uncond=1.0 if config["memory"] == "none" else 0.1,
        seed=start(config),
        batch_size=config["batch"],
        neighbours=neighbours,
        progress=lambda part, word: report(0.9 * part, word),
    )
    parameters = sum(p.numel() for p in network.parameters())
    result: dict[str, Any] = {"parameters": parameters, "sha256": here.sha256}
    result["judge_accuracy"] = here.accuracy
    if not everything:
        return {**result, **_swapped(model, here, config)}
    result |= _quality(model, here, config)
    if config["memory"] == "neighbours" and config["size"] == "middle" and not config["repeat"]:
        result |= _baselines(here, config) | _deletion(model, here, config)
        result |= _top_m(model, here, config)
    return result


def drawn(rows: int, n: int, generator: torch.Generator) -> Tensor:
    """``[n]`` of so many rows, each before any comes again."""
    rounds = [torch.randperm(rows, generator=generator) for _ in range(-(-n // rows))]
    return torch.cat(rounds)[:n]


def draw(
    model: RetrievalDiffusion,
    config: Mapping[str, Any],
    n: int,
    generator: torch.Generator,
    entries: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """n samples, the entries that stood in, and the neighbours seen: never the entry itself."""
    if entries is None:
        entries = drawn(len(model.database), n, generator)
    found = model.sample(
        n,
        entries=entries,
        include_query=False,
        steps=config["ddim"],
        generator=generator,
        return_neighbours=True,
        batch_size=600,
        **options,
    )
    images, neighbours = cast("tuple[Tensor, Tensor]", found)
    return images.cpu(), entries, neighbours


def measures(images: Tensor, here: Lab) -> dict[str, float]:
    """Fréchet distance, precision and recall against the test images."""
    real, fake = here.features(here.test_images), here.features(images)
    precision, recall = precision_recall(real, fake)
    return {"fd": frechet_distance(real, fake), "precision": precision, "recall": recall}


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(f[name] for f in found) for name in found[0]}


def _quality(model: RetrievalDiffusion, here: Lab, config: Mapping[str, Any]) -> dict[str, Any]:
    """Means over several draws: the Fréchet distance of one draw scatters by a tenth or two."""
    generator = torch.Generator().manual_seed(2000 + start(config))
    conditional, n = config["memory"] != "none", config["samples"]
    real = here.features(here.test_images)
    distances, independent, found = [], [], []
    first: Tensor | None = None
    for place in range(config["draws"]):
        images, entries, _ = draw(model, config, n, generator, conditional=conditional)
        distances.append(frechet_distance(real, here.features(images)))
        first = images if first is None else first
        if place >= DETAILED:
            continue
        precision, recall = precision_recall(real, here.features(images))
        same = here.classes(images) == here.labels[entries]
        own = {"precision": precision, "recall": recall}
        found.append({**own, "agreement": float(same.double().mean())})
        if conditional:
            # Stand-ins drawn one by one: classes too frequent by chance count as an error.
            again = torch.randint(len(here.images), (n,), generator=generator)
            images_again, *_ = draw(model, config, n, generator, again)
            independent.append(frechet_distance(real, here.features(images_again)))
    return {
        **_mean(found),
        "distance": copy_report(cast("Tensor", first), model.database).mean,
        "fd": fmean(distances),
        # Without memory nothing stands in: its draws are independent anyway.
        "fd_independent": fmean(independent or distances),
    }


def _baselines(here: Lab, config: Mapping[str, Any]) -> dict[str, Any]:
    """What no model gets: copies of entries; and what real test images get."""
    generator = torch.Generator().manual_seed(3000 + start(config))
    count = config["samples"]
    copies = [
        measures(here.images[drawn(len(here.images), count, generator)], here)
        for _ in range(config["draws"])
    ]
    database = ImageDatabase(here.images, DCTEncoder(KEEP).fit(here.images))
    reference = copy_report(here.test_images, database)
    floor = frechet_distance(here.features(here.test_images), here.features(here.images))
    baseline = {f"copy_{name}": value for name, value in _mean(copies).items()}
    return {**baseline, "test_distance": reference.mean, "fd_floor": floor}


def _deletion(model: RetrievalDiffusion, here: Lab, config: Mapping[str, Any]) -> dict[str, float]:
    """One class removed from the database alone, then everything but that class."""
    generator = torch.Generator().manual_seed(4000 + start(config))
    gone = here.labels == DELETED
    n = config["samples"]
    before, *_ = draw(model, config, n, generator)
    without = model.swap_database(model.database.subset(~gone))
    after, entries, _ = draw(without, config, n, generator)
    labels = here.labels[~gone][entries]
    alone = model.swap_database(model.database.subset(gone))
    only, *_ = draw(alone, config, min(n, 200), generator)

    def share(images: Tensor) -> float:
        return float((here.classes(images) == DELETED).double().mean())

    return {
        "share_before": share(before),
        "share_deleted": share(after),
        "share_only": share(only),
        "agreement_deleted": float((here.classes(after) == labels).double().mean()),
    }


def _top_m(model: RetrievalDiffusion, here: Lab, config: Mapping[str, Any]) -> dict[str, Any]:
    """Quality where only the entries retrieved most often stand in."""
    generator = torch.Generator().manual_seed(5000 + start(config))
    found = []
    for m in TOP_M:
        images = model.sample(
            config["samples"],
            top_m=m,
            include_query=False,
            steps=config["ddim"],
            generator=generator,
            batch_size=600,
        )
        found.append(measures(cast("Tensor", images).cpu(), here))
    return {f"top_{name}": [f[name] for f in found] for name in found[0]}


def _swapped(model: RetrievalDiffusion, here: Lab, config: Mapping[str, Any]) -> dict[str, Any]:
    """A model of the seen classes, drawing from a database of the unseen ones."""
    generator = torch.Generator().manual_seed(6000 + start(config))
    unseen = here.labels >= SEEN
    other = ImageDatabase(here.images[unseen], model.database.encoder)
    swapped = model.swap_database(other)
    images, entries, neighbours = draw(
        swapped, config, config["swapped"], generator, conditional=config["memory"] != "none"
    )
    classes = here.classes(images)
    real = here.features(here.test_images)
    fake = here.features(images)
    new = here.test_labels >= SEEN
    return {
        "share": float((classes >= SEEN).double().mean()),
        "agreement": float((classes == here.labels[unseen][entries]).double().mean()),
        "fd_unseen": frechet_distance(real[new], fake),
        "fd_seen": frechet_distance(real[~new], fake),
        "samples": _flat(images[:SHOWN]),
        "neighbours": _flat(other.images[neighbours[:SHOWN]]),
    }


def _flat(images: Tensor) -> list[float]:
    return [round(v, 2) for v in images.flatten().tolist()]
