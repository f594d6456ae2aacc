"""Muon, NorMuon and RMNP written as the papers write them: loops, lists, float64, no shortcuts."""

import math

import torch
from torch import Tensor

from stiefel.linalg import as_table


def slow_newton_schulz(u: Tensor, ns, eps=None) -> Tensor:
    table = as_table(ns)
    eps = table.eps if eps is None else eps
    norm = math.sqrt(sum(float(x) ** 2 for x in u.flatten()))
    if norm == 0:
        return torch.zeros_like(u)
    x = u / (table.safety * norm + eps)
    for a, b, c in table.triples:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def size(scale, rows, cols):
    return {
        "spectral": math.sqrt(max(1.0, rows / cols)),
        "rms": 0.2 * math.sqrt(max(rows, cols)),
        "dion": math.sqrt(rows / cols),
        None: 1.0,
    }[scale]


def frobenius(x):
    return math.sqrt(sum(float(entry) ** 2 for entry in x.flatten()))


class SlowMuon:
    def __init__(self, w, lr, wd, momentum, nesterov, ns, scale, rescale):
        self.w, self.lr, self.wd, self.mu = w.clone(), lr, wd, momentum
        self.nesterov, self.ns, self.scale, self.rescale = nesterov, ns, scale, rescale
        self.m = torch.zeros_like(w)

    def look_ahead(self, g):
        self.m = self.mu * self.m + (1 - self.mu) * g
        return (1 - self.mu) * g + self.mu * self.m if self.nesterov else self.m

    def step(self, g):
        rows, cols = self.w.shape
        o = slow_newton_schulz(self.look_ahead(g), self.ns)
        factor = size(self.scale, rows, cols)
        if self.rescale == "rms":
            factor = 0.2 * math.sqrt(rows * cols) / frobenius(o)
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * factor * o


class SlowNorMuon(SlowMuon):
    def __init__(self, w, lr, wd, betas, eps, nesterov, ns, rescale, scale, reduce, corrected):
        super().__init__(w, lr, wd, betas[0], nesterov, ns, scale, rescale)
        self.beta2, self.eps, self.corrected = betas[1], eps, corrected
        self.transposed = reduce == "long" and w.shape[0] < w.shape[1]
        count = w.shape[1] if self.transposed else w.shape[0]
        self.v, self.age = [0.0] * count, [0] * count

    def step(self, g):
        rows, cols = self.w.shape
        o = slow_newton_schulz(self.look_ahead(g), self.ns)
        lines = list(o.T if self.transposed else o)
        out = []
        for r, line in enumerate(lines):
            mean = sum(float(x) ** 2 for x in line) / len(line)
            self.v[r] = self.beta2 * self.v[r] + (1 - self.beta2) * mean
            v = self.v[r]
            if v > 0:
                self.age[r] += 1
                if self.corrected:
                    v /= 1 - self.beta2 ** self.age[r]
            out.append(line / (math.sqrt(v) + self.eps))
        hat = torch.stack(out, dim=1 if self.transposed else 0)
        target = 0.2 * math.sqrt(rows * cols)
        if self.rescale == "preserve":
            target = frobenius(o) * size(self.scale, rows, cols)
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * target / frobenius(hat) * hat


class SlowRMNP(SlowMuon):
    def __init__(self, w, lr, wd, momentum, nesterov, eps, scale):
        super().__init__(w, lr, wd, momentum, nesterov, None, scale, None)
        self.eps = eps

    def step(self, g):
        rows, cols = self.w.shape
        u = self.look_ahead(g)
        factor = 0.2 * math.sqrt(cols) if self.scale == "rms" else size(self.scale, rows, cols)
        unit = torch.stack([row / max(frobenius(row), self.eps) for row in u])
        self.w = (1 - self.lr * self.wd) * self.w - self.lr * factor * unit
