"""Small models whose tangent kernels the tests look at, and a meter for memory."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Cell(nn.Module):
    """A recurrent network of Linear layers that are called at every step."""

    def __init__(self):
        super().__init__()
        self.i, self.h, self.o = nn.Linear(5, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 12)
        for t in range(x.shape[1]):
            h = torch.relu(self.i(x[:, t]) + self.h(h))
        return self.o(h)


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.o(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Outside(nn.Module):
    """The weight of a layer is used outside of it too."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(torch.tanh(x @ self.a.weight))


def mlp(width=16, inputs=6, outputs=3):
    # In-place activations and dropout on purpose.
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(inplace=True),
        nn.Linear(width, width, bias=False),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(width, outputs),
    )


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                # Of an expanded view only what it stands on takes memory.
                self.numel = max(
                    self.numel,
                    min(item.numel(), item.untyped_storage().nbytes() // item.element_size()),
                )
        return result
