"""The Poincaré layers as the paper composes them, slow and obvious: twins for the tests."""

import math

import torch

from stiefel.nn.poincare import (
    beta_ratio,
    dist,
    expmap,
    expmap0,
    logmap,
    logmap0,
    mobius_add,
    transp,
)

EPS = 1e-5  # of the projection in float64


def exp0(v, c):
    root = c**0.5
    n = v.norm(dim=-1, keepdim=True).clamp_min(1e-15)
    return torch.tanh(root * n) * v / (root * n)


def log0(y, c):
    root = c**0.5
    n = y.norm(dim=-1, keepdim=True).clamp_min(1e-15)
    return torch.atanh(root * n) * y / (root * n)


def fully_connected(x, z, r, c):
    """Points to points: signed distances to hyperplanes, then coordinates."""
    root, n = c**0.5, z.norm(dim=0).clamp_min(1e-15)
    lam = 2 / (1 - c * x.square().sum(-1, keepdim=True))
    inner = lam * root * x @ (z / n) * torch.cosh(2 * root * r)
    v = 2 * n / root * torch.asinh(inner - (lam - 1) * torch.sinh(2 * root * r))
    w = torch.sinh(root * v) / root
    return v, w / (1 + (1 + c * w.square().sum(-1, keepdim=True)).sqrt())


def project(x, c):
    n = x.norm(dim=-1, keepdim=True)
    most = (1 - EPS) / c**0.5
    return torch.where(n > most, x / n * most, x)


def linear(u, z, r, c, projected=False):
    x = exp0(u, c)
    y = fully_connected(project(x, c) if projected else x, z, r, c)[1]
    return log0(project(y, c) if projected else y, c)


def conv(u, z, r, c, k, stride, padding, dilation):
    taps = k[0] * k[1]
    scaled = u * beta_ratio(u.shape[1], taps)
    patches = torch.nn.functional.unfold(scaled, k, dilation, padding, stride)
    out = linear(patches.mT, z, r, c).mT
    sizes = [
        (n + 2 * p - g * (m - 1) - 1) // s + 1
        for n, p, g, m, s in zip(u.shape[2:], padding, dilation, k, stride, strict=True)
    ]
    return out.unflatten(2, sizes)


def midpoint(x, c):
    lam = 2 / (1 - c * x.square().sum(-1, keepdim=True))
    m = (lam * x).sum(0) / (lam - 1).sum(0)
    return m / (1 + (1 - c * m.square().sum()).sqrt())


def karcher(x, c, steps=300):
    mean = torch.zeros_like(x[0])
    for _ in range(steps):
        mean = expmap(mean, logmap(mean[None], x, c).mean(0), c)
    return mean


def batch_norm(u, mean, weight, bias, c, eps=1e-6):
    """[batch, C, H, W], by points, transport and exponential maps."""
    rows = expmap0(u.movedim(1, -1).flatten(0, 2), c)
    mu, beta = mean(rows, c), expmap0(bias, c)
    variance = dist(rows, mu[None], c).square().mean()
    moved = transp(mu[None], beta[None], logmap(mu[None], rows, c), c)
    out = expmap(beta[None], (weight / (variance + eps)).sqrt() * moved, c)
    shape = (u.shape[0], *u.shape[2:], u.shape[1])
    return logmap0(out, c).reshape(shape).movedim(-1, 1), mu, variance


def tangent_sum(a, b, c):
    return logmap0(mobius_add(expmap0(a, c), expmap0(b, c), c), c)


def saturation(eps=EPS):
    """√c times the length at which the authors' projection stops tangent vectors."""
    return math.atanh(1 - eps)
