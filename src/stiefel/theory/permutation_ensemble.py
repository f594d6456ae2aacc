"""The finite networks of :mod:`stiefel.theory.permutation`, all trained as one batch.

Each member is f(x) = (1/√m) W₂ relu((1/√k) W₁ x), no biases, standard normal start. The training
inputs are the basis vectors, so the pre-activations are the columns of W₁ themselves: they are
kept, scaled and transposed, as ``hidden`` ``[N, k, m]``, and W₂ as ``readout`` ``[N, k, m]``.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from stiefel.theory.permutation import (
    auto_step,
    check_bits,
    check_regime,
    check_step,
    ensemble_size,
    nonzero_inputs,
    spectrum,
)
from stiefel.theory.permutation_training import TRAINED, descend, solve

# Sheet, "Traps": averages this small count as 0. At a training input the zeros are exact in
# theory, and what a finite network leaves of them must not be read as ones.
READ_AS_ZERO = 1e-6
# An untrained output has size 1/√k and a target is 0 or 1: errors of this size come from growth.
DIVERGED = 1e3
# Hidden activations that prediction holds at one time: 16 MB in float32.
ACTIVATIONS = 2**22

Callback = Callable[[float, str], object]


class Certificate(NamedTuple):
    """How many members the theory asks for, and how many there are."""

    needed: int
    have: int

    @property
    def holds(self) -> bool:
        """Whether there are enough."""
        return self.have >= self.needed


class PermutationEnsemble(nn.Module):
    """N independent ReLU networks that learn y = x[perm] from the k basis vectors.

    ::

        ensemble = PermutationEnsemble(8, 128, regime="last_layer").fit([7, 6, 5, 4, 3, 2, 1, 0])
        ensemble.predict(torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0]]))  # 0 0 0 0 1 0 1 1

    Weights are buffers, so ``state_dict``, ``to`` and ``torch.save`` work as for any module. A
    member's start depends only on ``seed`` and its number, not on ``chunk`` or on the other
    members: processes may hold members ``first … first + n_members − 1`` each and average their
    decisions. Random numbers come from the CPU, so devices agree on them.

    Args:
        k: number of bits.
        n_members: number of networks N; :func:`ensemble_size` tells how many are needed.
        width: hidden units m of each; at least k.
        regime: ``"ntk"`` (both layers trained) or ``"last_layer"`` (W₂ alone; solved exactly).
        seed: at least 0.
        chunk: members trained and evaluated at one time. Memory beyond the 2·N·k·m weights is
            about 3·chunk·k·m numbers in training.
        first: number of the first member.
        dtype: float32 or float64; None means torch's default.
        device: where the weights are; None means torch's default.

    Raises:
        TypeError: a count is not an integer, or the dtype is another.
        ValueError: k < 2, n_members < 1, width < k, chunk < 1, seed or first negative, or an
            unknown regime.

    Source: arXiv 2502.16763.
    """

    hidden: Tensor
    readout: Tensor
    perm: Tensor
    train_error: Tensor
    """Largest error of the averaged outputs at the training inputs; NaN before :meth:`fit`."""

    def __init__(
        self,
        k: int,
        n_members: int,
        width: int = 1024,
        regime: str = "ntk",
        seed: int = 0,
        chunk: int = 32,
        *,
        first: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.k = check_bits(k)
        check_regime(regime)
        self.regime = regime
        self.n_members = _count("n_members", n_members, 1)
        self.width = _count("width", width, self.k)
        self.seed = _count("seed", seed, 0)
        self.chunk = _count("chunk", chunk, 1)
        self.first = _count("first", first, 0)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        shape = (self.n_members, self.k, self.width)
        self.register_buffer("hidden", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("readout", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("perm", torch.full((self.k,), -1, device=device))
        nan = torch.tensor(math.nan, dtype=torch.float64, device=device)
        self.register_buffer("train_error", nan)

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return (
            f"k={self.k}, n_members={self.n_members}, width={self.width}, "
            f"regime={self.regime!r}, seed={self.seed}, first={self.first}"
        )

    def get_extra_state(self) -> dict[str, Any]:
        """What the weights mean: part of ``state_dict``."""
        return {"regime": self.regime, "seed": self.seed, "first": self.first}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over seed and first member; ``ValueError`` if the weights are of the other regime.

        The two regimes need ensembles of different size, so mixing them voids the certificate.
        """
        if state["regime"] != self.regime:
            raise ValueError(
                f"the state is of regime {state['regime']!r}, this ensemble of {self.regime!r}; "
                f"build it with regime={state['regime']!r}"
            )
        self.seed, self.first = state["seed"], state["first"]

    def fit(
        self,
        perm_or_targets: Sequence[int] | np.ndarray | Tensor,
        steps: int = 150,
        lr: float | int | str = "auto",
        *,
        callback: Callback | None = None,
    ) -> PermutationEnsemble:
        """Draw and train all members from the k basis vectors; returns itself.

        ``"ntk"`` runs at most ``steps`` steps of full-batch gradient descent on ½ Σ (f − y)² and
        stops early where every output is within 3e-7 of its target. ``"last_layer"`` with
        ``lr="auto"`` takes the solution that gradient descent converges to, by one k × k solve a
        member; with a number, what exactly ``steps`` steps of that size give, by an
        eigendecomposition.

        Args:
            perm_or_targets: index vector with y = x[perm], or the k × k permutation matrix whose
                row i is the target of basis vector i.
            steps: gradient steps, at least 1.
            lr: step size, or ``"auto"`` for 1.2 k/D.
            callback: called with the fraction done and a word after each chunk.

        Raises:
            TypeError: indices or ``steps`` are not integer.
            ValueError: not a permutation of k bits, steps < 1, lr outside (0, 2k/D), or a width so
                small that the features of the training inputs are linearly dependent.
            FloatingPointError: training diverged (an output is 1000 off), as a network much
                narrower than the theory's may.

        Warns:
            RuntimeWarning: an averaged output at a training input is more than 1e-6 off, so that
                :meth:`predict` may read its zeros as ones; take more steps.
        """
        perm = self._permutation(perm_or_targets)
        steps = operator.index(steps)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if isinstance(lr, str) and lr != "auto":
            raise ValueError(f'lr must be a number or "auto", got {lr!r}')
        step = None if isinstance(lr, str) else check_step(lr, self.k, self.regime)
        self.perm.fill_(-1)  # not fitted until all members are
        targets = torch.eye(self.k, dtype=self.hidden.dtype, device=self.hidden.device)[perm].mT
        with torch.no_grad():
            for part in self._parts():
                self._draw(part)
                hidden, readout = self.hidden[part], self.readout[part]
                if self.regime == "ntk":
                    size = auto_step(self.k, self.regime) if step is None else step
                    error = descend(hidden, readout, targets, steps, size)
                else:
                    error = solve(hidden, readout, targets, steps, step)
                if not error < DIVERGED:
                    raise FloatingPointError(
                        f"training diverged at width {self.width}: its kernel is further from the "
                        "limit than the step allows. Use more width or a smaller lr"
                    )
                if callback is not None:
                    callback(part.stop / self.n_members, f"{part.stop} members trained")
        self.perm.copy_(perm)
        off = self.decision(torch.eye(self.k, device=perm.device)) - targets
        self.train_error.copy_(off.abs().max())
        if float(self.train_error) > READ_AS_ZERO:
            self._warn(steps, auto_step(self.k, self.regime) if step is None else step)
        return self

    def _warn(self, steps: int, step: float) -> None:
        factors = [1 - step * value / self.k for value in spectrum(self.k, self.regime)]
        needed = math.log(TRAINED) / math.log(min(max(map(abs, factors)), 1 - 1e-15))
        warnings.warn(
            f"after {steps} steps the averaged outputs are up to {float(self.train_error):.1e} off "
            f"at the training inputs, more than {READ_AS_ZERO:.0e}: their zeros may be read as "
            f"ones. Theory asks for about {math.ceil(needed)} steps of size {step:.4g}"
            + ("" if self.hidden.dtype == torch.float64 else "; or use dtype=torch.float64"),
            RuntimeWarning,
            stacklevel=3,
        )

    def _permutation(self, given: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        values = torch.as_tensor(given).to(self.hidden.device)
        k = self.k
        if values.shape == (k, k):
            ones = values == 1
            once = bool((ones.sum(0) == 1).all() and (ones.sum(1) == 1).all())
            if not once or bool(((values != 0) & ~ones).any()):
                raise ValueError(
                    f"targets must be a {k} × {k} permutation matrix: one 1 in each row and column"
                )
            return ones.mT.to(torch.uint8).argmax(1)
        if values.shape != (k,):
            raise ValueError(
                f"perm must have {k} indices, or be a {k} × {k} matrix of targets; "
                f"got shape {tuple(values.shape)}"
            )
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"perm must hold integers, got {values.dtype}")
        bad = (values < 0) | (values >= k)
        if bool(bad.any()):
            raise ValueError(f"perm must hold indices 0..{k - 1}, got {int(values[bad][0])}")
        counts = torch.bincount(values.long(), minlength=k)
        if bool((counts != 1).any()):
            raise ValueError(
                f"perm must name each of 0..{k - 1} once, "
                f"but {int(counts.argmax())} comes {int(counts.max())} times"
            )
        return values.long()

    def _parts(self) -> Iterator[slice]:
        for start in range(0, self.n_members, self.chunk):
            yield slice(start, min(start + self.chunk, self.n_members))

    def _draw(self, part: slice) -> None:
        """Standard normal W₁ (kept as W₁ᵀ/√k) and W₂, each member from a generator of its own."""
        # torch's CPU generator uses 32 bits of its seed; counting on from a scrambled start keeps
        # members apart for certain and ensembles of different seeds almost surely.
        base = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        shape = (2, self.k, self.width)
        for member in range(part.start, part.stop):
            generator = torch.Generator().manual_seed((base + self.first + member) % 2**32)
            weights = torch.randn(shape, generator=generator, dtype=self.hidden.dtype)
            self.hidden[member] = weights[0] / math.sqrt(self.k)
            self.readout[member] = weights[1]

    def member_outputs(self, X: Shaped[Tensor, "*batch d"]) -> Float[Tensor, "members *batch d"]:
        """Outputs of every single member at X, ``[N, ..., k]``; X as for :meth:`decision`.

        Raises:
            ValueError, TypeError, RuntimeError: as :meth:`decision`.
        """
        inputs = self._unit(X)
        outputs = [out for _, out in self._outputs(inputs)]
        blocks = len(outputs) // len(list(self._parts()))  # of rows, the same for every chunk
        columns = [torch.cat(outputs[i::blocks]) for i in range(blocks)]
        return torch.cat(columns, 1).reshape(self.n_members, *X.shape)

    def decision(self, X: Shaped[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Outputs at X averaged over the members, ``[..., k]`` in float64.

        Inputs are scaled to length 1 first. Members are computed in the dtype of the weights and
        averaged in float64; memory is bounded by ``chunk`` and blocks of rows.

        Args:
            X: zeros and ones of any real dtype, no row all zero.

        Raises:
            TypeError: X is complex.
            ValueError: a row is zero, an entry is neither 0 nor 1, or rows do not have k columns.
            RuntimeError: the ensemble is not fitted.
        """
        inputs = self._unit(X)
        total = torch.zeros(inputs.shape, dtype=torch.float64, device=inputs.device)
        for rows, out in self._outputs(inputs):
            total[rows] += out.sum(0, dtype=torch.float64)
        return (total / self.n_members).reshape(X.shape)

    def predict(self, X: Shaped[Tensor, "*batch d"]) -> UInt8[Tensor, "*batch d"]:
        """The permuted bits: 1 where the average is positive (above 1e-6). X as for decision.

        Raises:
            ValueError, TypeError, RuntimeError: as :meth:`decision`.
        """
        return (self.decision(X) > READ_AS_ZERO).to(torch.uint8)

    forward = predict

    def score(self, X: Shaped[Tensor, "*batch d"] | None = None) -> float:
        """Share of inputs all of whose bits come out right; None means all 2^k − 1 inputs.

        Raises:
            ValueError: X is empty, or None where 2^k inputs do not fit (k > 24).
            TypeError, RuntimeError: as :meth:`decision`.
        """
        inputs = (nonzero_inputs(self.k) if X is None else X).to(self.hidden.device)
        if inputs.numel() == 0:
            raise ValueError("X must have at least one row to score")
        right = (self.predict(inputs) == inputs[..., self.perm]).all(-1)
        return float(right.double().mean())

    def certificate(self, delta: float = 0.1) -> Certificate:
        """Members needed to be right on all inputs with probability 1 − delta, and members here.

        The number is that of infinitely wide networks trained to the end; at widths of a thousand
        the outputs' variance agrees with it to a few per cent.

        Raises:
            ValueError: delta outside (0, 1).
        """
        needed = ensemble_size(self.k, delta, n_ones="all", regime=self.regime)
        return Certificate(needed, self.n_members)

    def _unit(self, X: Tensor) -> Tensor:
        """Rows of X, scaled to length 1, ``[b, k]``."""
        if int(self.perm[0]) < 0:
            raise RuntimeError("the ensemble is not fitted; call fit(perm) first")
        if X.is_complex():
            raise TypeError(f"X must be real, got {X.dtype}")
        if X.ndim < 1 or X.shape[-1] != self.k:
            raise ValueError(f"X must have {self.k} columns, got shape {tuple(X.shape)}")
        rows = X.to(self.hidden.device).reshape(-1, self.k)
        if not bool(((rows == 0) | (rows == 1)).all()):
            raise ValueError("X must be binary: every entry 0 or 1")
        ones = rows.to(self.hidden.dtype)
        count = ones.sum(-1, keepdim=True)
        if not bool(count.all()):
            raise ValueError(
                "permutation learning is defined for nonzero binary inputs; "
                f"row {int((count == 0).nonzero()[0, 0])} of X is zero"
            )
        return ones / count.sqrt()

    def _outputs(self, inputs: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their outputs ``[members, rows, k]``, a chunk of members at a time."""
        block = max(1, ACTIVATIONS // (min(self.chunk, self.n_members) * self.width))
        for part in self._parts():
            hidden, readout = self.hidden[part], self.readout[part]
            for start in range(0, max(len(inputs), 1), block):
                rows = slice(start, start + block)
                active = torch.matmul(inputs[rows], hidden).clamp_min_(0)
                yield rows, torch.bmm(active, readout.mT) / math.sqrt(self.width)


def _count(name: str, value: int, lowest: int) -> int:
    value = operator.index(value)
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}")
    return value
