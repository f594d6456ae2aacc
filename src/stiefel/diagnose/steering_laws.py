"""Steering directions that peers use, and the law of sine and cosine with an honest p-value."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stiefel.linalg._checks import check_finite, check_matrix, compute_dtype

# The authors' probe: logistic regression by Adam.
PROBE_STEPS, PROBE_RATE = 200, 0.1


def mean_difference(with_concept: Tensor, without: Tensor) -> Float[Tensor, " d"]:
    """Mean activation with the concept ``[n, d]`` minus mean activation without ``[m, d]``.

    Raises:
        TypeError, ValueError: not matrices of one width, empty, or NaN or infinite entries.
    """
    a, b = _activations(with_concept, without)
    return a.mean(0) - b.mean(0)


def pca_direction(D: Tensor) -> Float[Tensor, " d"]:
    """First right singular vector of the uncentred differences ``D [n, d]``, of unit length.

    Its sign, which the decomposition leaves open, is that of the mean: ⟨direction, mean⟩ ≥ 0.

    Raises:
        TypeError, ValueError: not a matrix, empty or zero, or NaN or infinite entries.
    """
    check_matrix(D, "D")
    check_finite(D, "D")
    if D.ndim != 2 or not bool(D.any()):
        raise ValueError(f"D must be a matrix that is not zero, got shape {tuple(D.shape)}")
    work = D.to(compute_dtype(D.dtype))
    direction = torch.linalg.svd(work, full_matrices=False).Vh[0]
    return -direction if float(direction @ work.mean(0)) < 0 else direction


def probe_direction(
    with_concept: Tensor,
    without: Tensor,
    *,
    steps: int = PROBE_STEPS,
    lr: float | int = PROBE_RATE,
) -> Float[Tensor, " d"]:
    """Weights of a logistic regression that tells the two apart, at the mean difference's length.

    Adam from zero weights on the mean loss of all samples, as in the authors' code. The activations
    are ``[n, d]`` and ``[m, d]``.

    Raises:
        TypeError, ValueError: not matrices of one width, empty, NaN or infinite entries, equal
            means, ``steps`` < 1 or ``lr`` ≤ 0.
    """
    a, b = _activations(with_concept, without)
    if steps < 1 or not lr > 0:
        raise ValueError(f"steps must be at least 1 and lr positive, got {steps} and {lr}")
    x = torch.cat([a, b]).detach()
    y = torch.cat([x.new_ones(len(a)), x.new_zeros(len(b))])
    weight = x.new_zeros(x.shape[1]).requires_grad_()
    bias = x.new_zeros(()).requires_grad_()
    with torch.enable_grad():
        optimizer = torch.optim.Adam([weight, bias], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y)
            loss.backward()
            optimizer.step()
    found = weight.detach()
    norm = torch.linalg.vector_norm(found)
    length = torch.linalg.vector_norm(a.mean(0) - b.mean(0)).detach()
    if not float(norm) > 0 or not float(length) > 0:
        raise ValueError("the two sets of activations have one mean: the vector has no length")
    return found * (length / norm)


class SinCosLaw(NamedTuple):
    """The exponents of sin^m θ · cos^n θ that follow a quantity best."""

    m: float
    n: float
    r: float
    """Pearson's correlation at these exponents."""
    p: float
    """One-sided, by permutation of the quantity, with the search repeated in each permutation."""


def sin_cos_law(
    theta: Tensor,
    y: Tensor,
    ms: Sequence[float | int],
    ns: Sequence[float | int],
    n_perm: int = 999,
    *,
    generator: torch.Generator | None = None,
) -> SinCosLaw:
    """How well y follows sin^m θ · cos^n θ, at the best of all pairs of exponents.

    The best of many pairs correlates with anything; so every permutation of y is searched in the
    same way, and p is the share of permutations (the given order counted as one) that do as well.

    Args:
        theta: Angles between samples and the axis, ``[samples]``, radians.
        y: What is to be explained, ``[samples]``, such as each sample's gain.
        ms: Exponents of the sine, ≥ 0.
        ns: Exponents of the cosine, ≥ 0; whole numbers where a cosine is negative.
        n_perm: Permutations.
        generator: For the permutations; seed 0 where None.

    Raises:
        ValueError: fewer than three samples, shapes that differ, NaN or infinite entries, negative
            exponents, a negative cosine to a broken power, a constant y, or no pair of exponents
            that varies over the samples.
    """
    if theta.ndim != 1 or theta.shape != y.shape or len(theta) < 3:
        raise ValueError(
            "theta and y must be rows of one length, three samples or more; got shapes "
            f"{tuple(theta.shape)} and {tuple(y.shape)}"
        )
    check_finite(theta, "theta")
    check_finite(y, "y")
    pairs = list(itertools.product(ms, ns))
    if not pairs or min(min(pair) for pair in pairs) < 0 or n_perm < 1:
        raise ValueError("ms and ns must hold exponents ≥ 0 and n_perm be at least 1")
    angle = theta.detach().to(torch.float64)
    sin, cos = angle.sin(), angle.cos()
    for base, exponents, name in ((sin, ms, "sine"), (cos, ns, "cosine")):
        if bool((base < 0).any()) and any(e != int(e) for e in exponents):
            raise ValueError(f"a negative {name} has no powers that are not whole numbers")
    features = torch.stack([sin**m * cos**n for m, n in pairs])
    spread = features.std(dim=1) / features.abs().amax(1).clamp_min(1e-300)
    varying = spread > 1e-12
    values = y.detach().to(torch.float64)
    if not bool(varying.any()) or float(values.std()) == 0:
        raise ValueError("y, or every sin^m·cos^n, is constant: no correlation exists")
    features = _standard(features[varying])
    pairs = [pair for pair, kept in zip(pairs, varying.tolist(), strict=True) if kept]
    values = _standard(values[None])[0]
    found = features @ values
    best = int(found.argmax())
    generator = generator or torch.Generator().manual_seed(0)
    order = torch.rand(n_perm, len(values), generator=generator, dtype=torch.float64).argsort(1)
    others = (features @ values[order].mT).amax(0)
    # An order that gives the same values counts, whatever the last digit says.
    as_good = int((others >= found[best] - 1e-12).sum())
    m, n = pairs[best]
    return SinCosLaw(float(m), float(n), float(found[best]), (1 + as_good) / (1 + n_perm))


def _standard(rows: Tensor) -> Tensor:
    """Rows of mean 0 and length 1: their products are Pearson's correlations."""
    centred = rows - rows.mean(1, keepdim=True)
    return centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True)


def _activations(with_concept: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    for x, name in ((with_concept, "with_concept"), (without, "without")):
        check_matrix(x, name)
        check_finite(x, name)
        if x.ndim != 2 or len(x) < 1:
            raise ValueError(f"{name} must be [samples, d] with a sample at least")
    if with_concept.shape[1] != without.shape[1]:
        raise ValueError(
            f"with_concept and without must be of one width, got {with_concept.shape[1]} "
            f"and {without.shape[1]}"
        )
    dtype = compute_dtype(with_concept.dtype)
    return with_concept.to(dtype), without.to(dtype)
