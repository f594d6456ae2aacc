"""Training of a denoiser on images whose neighbours are known. It can stop and go on anywhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stiefel.generate import files
from stiefel.generate._checks import choice, number, whole
from stiefel.generate.attention import ConditionedNetwork
from stiefel.generate.schedules import PREDICTIONS

Report = Callable[[float, str], None]
KIND = "training checkpoint"
# Sheet of the paper: warm-up steps, last rate as a part of the first, decay, norm of gradients.
WARMUP, LAST_RATE, WEIGHT_DECAY, CLIP = 50, 0.05, 1e-4, 1.0
# Averaged weights: min(AVERAGE, (1 + i) / (10 + i)).
AVERAGE = 0.995


@dataclass(frozen=True)
class Settings:
    """Of one training; all JSON-able, and part of a checkpoint's identity."""

    steps: int
    batch_size: int
    lr: float
    p_uncond: float
    prediction: str
    min_snr: float
    seed: int

    def __post_init__(self) -> None:
        whole(self.steps, "steps")
        whole(self.batch_size, "batch_size")
        whole(self.seed, "seed", least=0)
        number(self.lr, "lr", least=0)
        number(self.p_uncond, "p_uncond", least=0, most=1)
        number(self.min_snr, "min_snr", least=0)
        choice(self.prediction, "prediction", tuple(PREDICTIONS))

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine."""
        part = step / max(1, self.steps - 1)
        fall = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * part))
        return self.lr * fall * min(1.0, (step + 1) / WARMUP)


@dataclass(frozen=True)
class Examples:
    """What is trained on: images, and their neighbours as rows of a table of embeddings."""

    images: Tensor
    """``[M, *input_shape]``."""
    embeddings: Tensor
    """``[N, e]``."""
    neighbours: Tensor
    """``[M, k]`` rows of ``embeddings``. Gathered for each batch: M·k·e numbers are never held."""

    def digest(self) -> str:
        """SHA-256 of all three."""
        sha = hashlib.sha256()
        for part in (self.images, self.embeddings, self.neighbours):
            sha.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


class Training:
    """The state of a training: weights, their average, the optimizer, the generator, the losses."""

    def __init__(
        self, network: ConditionedNetwork, examples: Examples, bars: Tensor, settings: Settings
    ) -> None:
        self.network = network
        self.examples = examples
        self.settings = settings
        self.done = 0
        self.losses = torch.zeros(settings.steps)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self._names, self._weights = zip(*network.named_parameters(), strict=True)
        self.average = [p.detach().clone() for p in self._weights]
        self._optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.lr, weight_decay=WEIGHT_DECAY, fused=True
        )
        like = self._weights[0].detach()
        # In float64 first: 1 − ᾱ of the first steps has few digits left in float32.
        self._signal = bars.sqrt().to(like)
        self._noise = (1 - bars).sqrt().to(like)
        self._weight = (bars / (1 - bars)).clamp_max(settings.min_snr).to(like)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Clean images, time steps, noise, contexts, and which contexts are left out."""
        images, size = self.examples.images, (self.settings.batch_size,)
        device = images.device
        draw = self.generator
        rows = torch.randint(len(images), size, generator=draw).to(device)
        times = torch.randint(len(self._signal), size, generator=draw).to(device)
        left_out = (torch.rand(size, generator=draw) < self.settings.p_uncond).to(device)
        x0 = images[rows]
        noise = torch.randn(x0.shape, generator=draw, dtype=x0.dtype).to(device)
        table = self.examples.embeddings
        context = table[self.examples.neighbours[rows].long()].to(x0.dtype)
        return x0, times, noise, context, left_out

    def loss(self) -> Tensor:
        """E‖prediction − target‖² over a new batch, summed over pixels; x0 weighted by min(SNR, γ).

        The sum is what the paper writes. Its gradient is mostly longer than the clipping norm, so
        that steps have one length, which trains these networks slightly better than the mean.
        """
        x0, times, noise, context, left_out = self.batch()
        one = (-1, *[1] * (x0.ndim - 1))
        a, s = self._signal[times].view(one), self._noise[times].view(one)
        # The learned null stands here inside the graph, so that it gets a gradient.
        context = torch.where(left_out[:, None, None], self.network.null, context)
        out = self.network(torch.addcmul(a * x0, s, noise), times, context)
        if self.settings.prediction == "x0":
            return ((out - x0).square().flatten(1).sum(1) * self._weight[times]).mean()
        target = noise if self.settings.prediction == "eps" else a * noise - s * x0
        return (out - target).square().flatten(1).sum(1).mean()

    def step(self) -> None:
        """One step of the optimizer and of the average.

        Raises:
            FloatingPointError: the loss is NaN or infinite; names the step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate(self.done)
        loss = self.loss()
        value = float(loss.detach()) / self.examples.images[0].numel()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss is {value} at step {self.done}: lower lr")
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, CLIP)
        self._optimizer.step()
        keep = min(AVERAGE, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self._weights], 1 - keep)
        self.losses[self.done] = value
        self.done += 1

    def finish(self) -> None:
        """Give the network the averaged weights."""
        with torch.no_grad():
            for weight, average in zip(self._weights, self.average, strict=True):
                weight.copy_(average)
        self.network.eval()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the training that goes on from it."""
        return {
            **asdict(self.settings),
            "network": self.network.settings,
            "data": self.examples.digest(),
        }

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write a checkpoint, atomically: a kill leaves the one before whole.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {"losses": self.losses, "generator": self.generator.get_state()}
        for name, weight, average in zip(self._names, self._weights, self.average, strict=True):
            tensors[f"weight.{name}"] = weight
            tensors[f"average.{name}"] = average
            for key, value in self._optimizer.state[weight].items():
                tensors[f"{key}.{name}"] = value
        files.save(path, KIND, {"done": self.done, "identity": identity}, tensors)

    def resume(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on from a checkpoint; the steps to come are those of an uninterrupted training.

        Raises:
            ValueError: damaged, or of other data, another network or other settings; names them.
        """
        settings, tensors = files.load(path, KIND)
        saved = settings["identity"]
        other = sorted(n for n in identity if saved.get(n) != identity[n])
        if other:
            raise ValueError(
                f"{path} is a checkpoint of another training: {', '.join(other)} differ; remove it "
                "to start anew"
            )
        self.done = settings["done"]
        self.losses = tensors["losses"]
        self.generator.set_state(tensors["generator"])
        with torch.no_grad():
            for name, weight, average in zip(self._names, self._weights, self.average, strict=True):
                weight.copy_(tensors[f"weight.{name}"])
                average.copy_(tensors[f"average.{name}"])
                self._optimizer.state[weight] = {
                    key: tensors[f"{key}.{name}"].to(weight.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }


def train(
    training: Training,
    *,
    checkpoint: Path | None = None,
    every: int = 200,
    progress: Report | None = None,
) -> None:
    """Run a training to its end, from its checkpoint if there is one.

    Raises:
        ValueError: ``every`` < 1, or a checkpoint of another training.
        FloatingPointError: the loss is not finite any more.
        OSError: the checkpoint cannot be written.
    """
    whole(every, "checkpoint_every")
    steps = training.settings.steps
    identity = training.identity() if checkpoint is not None else {}
    if checkpoint is not None and checkpoint.is_file():
        training.resume(checkpoint, identity)
    training.network.train()
    while training.done < steps:
        training.step()
        done = training.done
        if checkpoint is not None and (done % every == 0 or done == steps):
            training.save(checkpoint, identity)
        if progress is not None and (done % 20 == 0 or done == steps):
            recent = float(training.losses[max(0, done - 20) : done].mean())
            progress(done / steps, f"loss {recent:.4f}")
    training.finish()
