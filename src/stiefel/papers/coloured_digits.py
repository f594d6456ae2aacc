"""Digits whose colour misleads, and the networks that are trained on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stiefel.papers.paper import UnavailableError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stiefel.init import RichFeatures

LR = 5e-4
TEST_RATES = (0.9, 0.1, 0.5)
# 75 % of the 1797 digits; the rest is the test set.
TRAIN_SHARE = 0.75


@dataclass(frozen=True)
class Task:
    """How labels and colours are drawn, and the authors' schedule for it."""

    noise: float
    """Chance that a label is wrong: the best that shape can tell is 1 − noise."""
    rates: tuple[float, float]
    """Chance that the colour contradicts the label, in the two training environments."""
    l2: float
    erm_steps: int
    dro_steps: int
    synth_steps: int = 501


COLOURED = Task(noise=0.25, rates=(0.1, 0.2), l2=1.1e-3, erm_steps=51, dro_steps=501)
INVERSE = Task(noise=0.10, rates=(0.2, 0.25), l2=1e-4, erm_steps=151, dro_steps=401)


@dataclass(frozen=True)
class Digits:
    """Training rows, and the test rows once in each test environment."""

    x: Tensor
    """``[n, 128]``: 8 × 8 pixels of 0 to 1 in two colours, one of them dark."""
    y: Tensor
    """``[n]``: whether the digit is below 5, but for the noise."""
    env: Tensor
    grey: Tensor
    """``x`` with colours that say nothing, for the oracle."""
    tests: tuple[Tensor, ...]
    y_test: Tensor

    def accuracies(self, predict: Callable[[Tensor], Tensor]) -> list[float]:
        """Accuracy in each test environment of what maps rows to logits ``[n]``."""
        import torch

        with torch.no_grad():
            return [
                float(((predict(x).reshape(-1) > 0).long() == self.y_test).double().mean())
                for x in self.tests
            ]

    def worst(self, predict: Callable[[Tensor], Tensor]) -> float:
        """The least of :meth:`accuracies`."""
        return min(self.accuracies(predict))


@dataclass(frozen=True)
class Images:
    """Grey digits, not yet coloured."""

    x: Tensor
    """Float32 ``[n, pixels]``, 0 to 1."""
    y: Tensor
    """Digits, int64 ``[n]``."""
    train: int
    """How many are for training: the first, after shuffling."""
    sha256: str
    own_test: bool = False
    """Whether the rest is a test set of its own, not to be mixed with the training digits."""


def small_digits(rows: int | None = None) -> Images:
    """scikit-learn's 1797 digits of 8 × 8 pixels, 75 % for training; ``rows``: only the first.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    import torch

    from stiefel.data import MissingDataError, table

    try:
        digits = table("digits")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    x, y = digits.x[:rows], digits.y[:rows]
    return Images((x / 16).to(torch.float32), y, int(TRAIN_SHARE * len(y)), digits.sha256)


def mnist() -> Images:
    """MNIST at every second pixel, 50 000 digits for training and 10 000 for tests, on the GPU.

    Read from ``mnist.npz`` in the folder that ``STIEFEL_DATA`` names: arrays ``x_train``
    (60000, 28, 28), ``y_train``, ``x_test`` and ``y_test``, as Keras stores them.

    Raises:
        UnavailableError: no CUDA device, or the file is missing; names all that is.
        ValueError: the file holds other shapes.
    """
    import hashlib

    import torch

    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA device (torch.cuda.is_available() is False)")
    folder = os.environ.get("STIEFEL_DATA")
    path = Path(folder or "") / "mnist.npz"
    if not folder:
        missing.append("MNIST: set STIEFEL_DATA to a folder with mnist.npz (as Keras stores it)")
    elif not path.is_file():
        missing.append(str(path))
    if missing:
        raise UnavailableError(f"the paper scale needs {'; and '.join(missing)}")
    return _read_mnist(path, hashlib.sha256(path.read_bytes()).hexdigest())


def _read_mnist(path: Path, sha256: str) -> Images:
    import numpy as np
    import torch

    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    for name, n in (("x_train", 60_000), ("x_test", 10_000)):
        if arrays[name].shape != (n, 28, 28):
            raise ValueError(f"{name} in {path} must be ({n}, 28, 28), got {arrays[name].shape}")
    x = np.concatenate([arrays["x_train"][:50_000], arrays["x_test"]])[:, ::2, ::2]
    y = np.concatenate([arrays["y_train"][:50_000], arrays["y_test"]]).astype(np.int64)
    pixels = torch.from_numpy(x.reshape(len(x), -1).astype(np.float32) / 255)
    return Images(pixels.cuda(), torch.from_numpy(y).cuda(), 50_000, sha256, own_test=True)


def draw(task: Task, seed: int, images: Images) -> Digits:
    """Shuffle, split and colour the digits with ``RandomState(seed)``.

    Rows of the training set belong to the two environments in turn.
    """
    import numpy as np
    import torch

    random, device, n = np.random.RandomState(seed), images.x.device, images.train
    order = random.permutation(len(images.y))
    if images.own_test:
        order = np.concatenate([order[order < n], order[order >= n]])
    x = images.x[torch.from_numpy(order).to(device)]
    y = (images.y.cpu().numpy()[order] < 5) ^ (random.rand(len(order)) < task.noise)
    env = np.arange(n) % 2

    def paint(rows: slice, rate: np.ndarray | float) -> Tensor:
        colour = y[rows] ^ (random.rand(len(y[rows])) < rate)
        chosen = torch.from_numpy(colour.astype(np.int64)).to(device)
        both = x.new_zeros(len(colour), 2, x.shape[1])
        both[torch.arange(len(colour), device=device), chosen] = x[rows]
        return both.flatten(1)

    train, test = slice(0, n), slice(n, None)
    labels = torch.from_numpy(y.astype(np.int64)).to(device)
    return Digits(
        x=paint(train, np.array(task.rates)[env]),
        y=labels[train],
        env=torch.from_numpy(env).to(device),
        grey=paint(train, 0.5),
        tests=tuple(paint(test, rate) for rate in TEST_RATES),
        y_test=labels[test],
    )


def make_net(inputs: int, hidden: int) -> nn.Sequential:
    """Two hidden layers, weights after Xavier and Glorot, no biases at the start."""
    from torch import nn

    layers: list[nn.Module] = []
    for fan_in in (inputs, hidden):
        linear = nn.Linear(fan_in, hidden)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def make_head(hidden: int) -> nn.Linear:
    """A linear head with one logit, weights as in :func:`make_net`."""
    from torch import nn

    head = nn.Linear(hidden, 1)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def new_model(inputs: int, hidden: int, seed: int) -> nn.Sequential:
    """Network and head whose weights depend on ``seed`` alone."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(make_net(inputs, hidden), make_head(hidden))


def rich_features(
    data: Digits, task: Task, hidden: int, seed: int, scale: float = 1.0
) -> RichFeatures:
    """Discovery in two rounds and synthesis on the authors' schedule, times ``scale``."""
    import torch

    from stiefel.init import RichFeatures

    steps = (task.erm_steps, task.dro_steps, task.synth_steps)
    return RichFeatures(
        lambda: make_net(data.x.shape[1], hidden),
        lambda: make_head(hidden),
        2,
        *(max(1, round(scale * s)) for s in steps),
        lr=LR,
        l2=task.l2,
        generator=torch.Generator().manual_seed(seed),
    ).fit(data.x, data.y, data.env)


def train(
    model: nn.Sequential,
    x: Tensor,
    data: Digits,
    penalty: str,
    weight: float,
    steps: int,
    l2: float,
) -> nn.Sequential:
    """Train all weights of ``model`` by full-batch Adam on the penalised loss; returns it."""
    import torch

    from stiefel.init import penalised_loss

    model.to(x)
    net, head = model[0], model[1]
    size = max(1.0, weight) if penalty != "erm" else 1.0
    # As the authors' code has it: Fishr's L2 spares the head, CLOvE has none.
    groups = [
        {"params": net.parameters(), "weight_decay": 0.0 if penalty == "clove" else 2 * l2 / size},
        {
            "params": head.parameters(),
            "weight_decay": 0.0 if penalty in ("fishr", "clove") else 2 * l2 / size,
        },
    ]
    optimizer = torch.optim.Adam(groups, lr=LR)
    order = data.env.argsort(stable=True)
    y, env = data.y[order], data.env[order]
    # Each environment goes through the network alone, so that the gradient of its loss, of which
    # IGA takes one each, does not run through all examples.
    blocks = x[order].split(env.bincount().tolist())
    for _ in range(steps):
        optimizer.zero_grad()
        phi = torch.cat([net(block) for block in blocks])
        parameters = list(model.parameters())
        z = head(phi)[:, 0]
        loss = penalised_loss(penalty, weight, z, y, env, phi=phi, parameters=parameters)
        loss.backward()
        optimizer.step()
    return model


def train_on_frozen(
    rich: RichFeatures, data: Digits, l2: float, runs: Sequence[tuple[str, float, int]]
) -> list[list[float]]:
    """Train a head on frozen features for each (penalty, weight, steps), all as one.

    Returns the accuracies of each in the test environments. All start from the synthesis' head.
    """
    from stiefel.init import Heads, train_heads

    heads = train_heads(
        rich.transform(data.x),
        data.y,
        data.env,
        [penalty for penalty, _, _ in runs],
        [weight for _, weight, _ in runs],
        steps=[steps for _, _, steps in runs],
        lr=LR,
        l2=l2,
        start=Heads(rich.head_.weight[None], rich.head_.bias[None]),
    )
    logits = [heads(rich.transform(x)) for x in data.tests]
    right = [((z > 0).long() == data.y_test).double().mean(1).tolist() for z in logits]
    return [list(row) for row in zip(*right, strict=True)]
