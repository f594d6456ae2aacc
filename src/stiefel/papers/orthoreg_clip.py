"""The authors' scale of OrthoReg: CLIP ViT-B/32, fine-tuned on eight image tasks of the user's.

``STIEFEL_DATA`` holds ``clip`` (a transformers checkpoint with its tokenizer) and, for every task
and for ``control`` (ImageNet for the authors), images ``TASK/train/CLASS/*`` and
``TASK/test/CLASS/*``, in folders named by their class.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from stiefel.merge import TaskVector
from stiefel.papers.orthoreg_runs import Bench, Report, State, evaluate
from stiefel.papers.paper import UnavailableError
from stiefel.regularize import orthoreg_loss

VARIABLE = "STIEFEL_DATA"
CONTROL = "control"
# The authors' epochs; a task that is not among them gets the median.
EPOCHS = {
    "cars": 35, "dtd": 76, "eurosat": 12, "gtsrb": 11, "mnist": 5, "resisc45": 15, "sun397": 14,
    "svhn": 4,
}  # fmt: skip
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SETTINGS: dict[str, Any] = {
    "device": "cuda", "tasks": list(EPOCHS), "lams": ["0", "0.1", "1", "10", "100"],
    "lr": 1e-5, "weight_decay": 0.1, "warmup": 500, "batch": 128, "clip": 1.0, "epochs": EPOCHS,
    "mapped": ["0", "1"], "grid": [-1 + i / 4 for i in range(13)], "map_images": 512,
}  # fmt: skip

Item = tuple[Path, int]


def settings() -> dict[str, Any]:
    """What a run takes.

    Raises:
        UnavailableError: no CUDA device, transformers or Pillow, or a folder is missing; names all.
    """
    missing = [] if torch.cuda.is_available() else ["a CUDA device"]
    missing += [
        f"{name} (not installed)" for name in ("transformers", "PIL") if not find_spec(name)
    ]
    folder = os.environ.get(VARIABLE)
    parts = ["clip", *(f"{t}/{p}" for t in (*EPOCHS, CONTROL) for p in ("train", "test"))]
    if not folder:
        missing.append(f"CLIP and images: set {VARIABLE} to a folder with {', '.join(parts)}")
    else:
        missing += [str(Path(folder, part)) for part in parts if not Path(folder, part).is_dir()]
    if missing:
        raise UnavailableError(f"the paper scale needs {'; and '.join(missing)}")
    return {**SETTINGS, "folder": folder}


class Encoder(nn.Module):
    """The image half of CLIP: pixels to features of length 1."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        """``[n, 3, size, size]`` to ``[n, d]``."""
        pooled = self.vision_model(pixel_values=pixels).pooler_output
        return nn.functional.normalize(self.visual_projection(pooled), dim=-1)


def run(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """As ``orthoreg_runs.run``: ``runs`` by λ, ``base`` (mean zero-shot accuracy), a checksum."""
    from transformers import AutoTokenizer, CLIPModel

    folder, device = Path(config["folder"]), config["device"]
    clip = CLIPModel.from_pretrained(folder / "clip").to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    size: Any = clip.vision_model.config.image_size
    names = [*config["tasks"], CONTROL]
    data = {name: parts_of(folder / name, config["seed"]) for name in names}
    heads = {name: head(clip, tokenizer, data[name][0], device) for name in names}
    images = {name: data[name][1] for name in names}
    encoder = Encoder(clip)
    theta0 = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    bench = _bench(encoder, theta0, heads, images, size, config)
    runs = {}
    for done, lam in enumerate(config["lams"]):
        taus = {}
        for task in config["tasks"]:
            state = finetune(
                encoder, theta0, heads[task], images[task]["train"], size, task, float(lam), config
            )
            taus[task] = TaskVector(theta0, state)
            report(done / len(config["lams"]), f"λ = {lam}: {task} is trained")
        runs[lam] = evaluate(bench, taus, config["grid"] if lam in config["mapped"] else ())
    base = sum(bench.accuracy(theta0, t, "test") for t in config["tasks"]) / len(config["tasks"])
    names_of = [
        str(p.relative_to(folder)) for d in images.values() for i in d.values() for p, _ in i
    ]
    checksum = hashlib.sha256("\n".join(sorted(names_of)).encode()).hexdigest()
    return {"runs": runs, "base": base, "sha256": checksum}


def parts_of(folder: Path, seed: int) -> tuple[list[str], dict[str, list[Item]]]:
    """Class names, and images with classes: a tenth of ``train``, 5,000 at most, validates.

    Raises:
        UnavailableError: a part has no image, or ``test`` has a class that ``train`` has not.
    """
    classes = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
    found: dict[str, list[Item]] = {}
    for part in ("train", "test"):
        for path in sorted((folder / part).glob("*/*")):
            if path.parent.name not in classes:
                raise UnavailableError(f"{path.parent} is a class that {folder / 'train'} has not")
            found.setdefault(part, []).append((path, classes.index(path.parent.name)))
        if part not in found:
            raise UnavailableError(f"there are no images in {folder / part}/CLASS/")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(found["train"]), generator=generator).tolist()
    held = max(1, min(5000, len(order) // 10))
    shuffled = [found["train"][i] for i in order]
    return classes, {
        "train": shuffled[held:],
        "validation": shuffled[:held],
        "test": found["test"],
    }


def head(clip: Any, tokenizer: Any, classes: Sequence[str], device: str) -> Tensor:
    """Frozen zero-shot weights ``[classes, d]``: CLIP's text features at its temperature."""
    prompts = [f"a photo of a {name.replace('_', ' ')}." for name in classes]
    tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
    with torch.no_grad():
        pooled = clip.text_model(**tokens).pooler_output
        rows = nn.functional.normalize(clip.text_projection(pooled), dim=-1)
        return clip.logit_scale.exp() * rows


def pixels(items: Sequence[Item], size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images as CLIP sees them, ``[n, 3, size, size]``, and their classes."""
    from PIL import Image

    rows = []
    for path, _ in items:
        with Image.open(path) as image:
            colour = image.convert("RGB")
        scale = size / min(colour.size)
        wide, high = (max(size, round(scale * n)) for n in colour.size)
        colour = colour.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - size) // 2, (high - size) // 2
        rows.append(np.asarray(colour.crop((left, top, left + size, top + size))))
    x = torch.from_numpy(np.stack(rows)).to(device).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, DEVIATION))
    return (x - mean) / deviation, torch.tensor([label for _, label in items], device=device)


def groups(encoder: nn.Module) -> list[list[str]]:
    """Names of the penalised matrices; query, key and value of a layer are one, as published."""
    names = [name for name, p in encoder.named_parameters() if p.ndim == 2]
    found: dict[str, list[str]] = {}
    for name in names:
        key = name
        for part in ("q_proj", "k_proj", "v_proj"):
            key = key.replace(part, "qkv")
        found.setdefault(key, []).append(name)
    return list(found.values())


def penalty(encoder: nn.Module, theta0: State) -> Tensor:
    """Σ ‖G(ΔW) − I‖_F over :func:`groups`."""
    now = dict(encoder.named_parameters())
    parts = [
        orthoreg_loss(torch.cat([now[name] - theta0[name] for name in names]))
        for names in groups(encoder)
    ]
    return torch.stack(parts).sum()


def finetune(
    encoder: nn.Module,
    theta0: State,
    weights: Tensor,
    items: Sequence[Item],
    size: int,
    task: str,
    lam: float,
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    """One expert: AdamW, cosine after a warm-up, the whole gradient clipped."""
    encoder.load_state_dict(dict(theta0))
    encoder.requires_grad_(True).train()
    epochs = config["epochs"].get(task, sorted(EPOCHS.values())[len(EPOCHS) // 2])
    steps = epochs * -(-len(items) // config["batch"])
    parameters = list(encoder.parameters())
    optimizer = torch.optim.AdamW(parameters, config["lr"], weight_decay=config["weight_decay"])
    warm = min(config["warmup"], max(1, steps // 2))

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(config["seed"])
    for _ in range(epochs):
        for index in torch.randperm(len(items), generator=generator).split(config["batch"]):
            x, y = pixels([items[i] for i in index.tolist()], size, config["device"])
            loss = nn.functional.cross_entropy(encoder(x) @ weights.T, y)
            if lam:
                loss = loss + lam * penalty(encoder, theta0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config["clip"])
            optimizer.step()
            schedule.step()
    encoder.requires_grad_(False).eval()
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def _bench(
    encoder: nn.Module,
    theta0: State,
    heads: Mapping[str, Tensor],
    images: Mapping[str, Mapping[str, Sequence[Item]]],
    size: int,
    config: Mapping[str, Any],
) -> Bench:
    def batches(items: Sequence[Item]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(items), config["batch"]):
            yield pixels(items[start : start + config["batch"]], size, config["device"])

    def outputs(task: str) -> Callable[[State, Tensor], Tensor]:
        return lambda state, x: functional_call(encoder, dict(state), (x,)) @ heads[task].T

    def accuracy(state: State, task: str, part: str) -> float:
        right, score = 0, outputs(task)
        with torch.no_grad():
            for x, y in batches(images[task][part]):
                right += int((score(state, x).argmax(1) == y).sum())
        return 100 * right / len(images[task][part])

    return Bench(
        theta0,
        accuracy,
        lambda state, part: accuracy(state, CONTROL, part),
        outputs,
        lambda task: (x for x, _ in batches(images[task]["test"][: config["map_images"]])),
    )
