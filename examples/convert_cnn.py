"""A CNN trained on one grid, converted, and evaluated on others with the same weights.

It learns what the heat equation does to a function on a circle. Replace ``Net`` and ``heated`` by a
network and fields of your own: ``convert`` and the two reports stay as they are.

python examples/convert_cnn.py --steps 300 --out build/cnn
"""

from __future__ import annotations

import math

import torch
from tiny_gpt2 import arguments
from torch import Tensor, nn

from stiefel.nn.operators import convert, discretization_error, relative_l2, report

BASE, FINEST, BATCH = 64, 512, 16
TIME = 0.002  # the longest waves live on, the shortest are gone


class Net(nn.Module):
    """Three circular convolutions of nine taps."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        circle = {"kernel_size": 9, "padding": 4, "padding_mode": "circular"}
        self.first = nn.Conv1d(1, width, **circle)
        self.second = nn.Conv1d(width, width, **circle)
        self.third = nn.Conv1d(width, 1, **circle)

    def forward(self, u: Tensor) -> Tensor:
        """``[batch, 1, N]`` to the same."""
        v = nn.functional.gelu(self.first(u))
        return self.third(nn.functional.gelu(self.second(v)))


def heated(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random functions on the finest grid, and the same after a while."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.arange(FINEST // 2 + 1)
    size = torch.where(k <= 16, 1 / (1 + k), 0.0)
    noise = torch.randn(count, 1, len(k), 2, generator=generator)
    start = torch.view_as_complex(noise) * size
    end = start * torch.exp(-TIME * (2 * math.pi * k) ** 2)
    return tuple(torch.fft.irfft(x, n=FINEST, norm="forward") for x in (start, end))


def on(x: Tensor, points: int) -> Tensor:
    """The same functions on a coarser grid."""
    return x[..., :: FINEST // points]


def main() -> None:
    options = arguments("Train a CNN on 64 points, convert it, evaluate it on 32 to 512.")
    torch.manual_seed(0)
    net = Net()
    u, target = heated(256, seed=1)
    test_u, test_target = heated(64, seed=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    start = 0
    checkpoint = options.out / "checkpoint.pt" if options.out else None
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
        print(f"going on from step {start}")
    for step in range(start, options.steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(u), (BATCH,), generator=generator)
        loss = relative_l2(net(on(u, BASE)[rows]), on(target, BASE)[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, options.steps // 4) == 0:
            print(f"step {step + 1}: training loss {loss.item():.3f}")
        if checkpoint and step + 1 == options.steps // 2:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            states = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "step": step + 1}, checkpoint)

    net.eval()
    print(report(net, BASE))  # what conversion does to each layer, before it does it
    operator = convert(net, BASE)
    with torch.no_grad():
        for points in (32, 64, 128, 256, 512):
            x, y = on(test_u, points), on(test_target, points)
            plain, converted = relative_l2(net(x), y), relative_l2(operator(x), y)
            print(f"{points} points: error {plain:.3f} as it is, {converted:.3f} converted")
        held_out = relative_l2(net(on(test_u, BASE)), on(test_target, BASE))
    # Without any data: how much does the answer to one function depend on the grid, and why?
    print(discretization_error(net, test_u[:1], [64, 128, 256, 512]))
    print(discretization_error(operator, test_u[:1], [64, 128, 256, 512]))
    print(f"held-out loss {held_out:.6f}")


if __name__ == "__main__":
    main()
