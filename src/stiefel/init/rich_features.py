"""Rich feature construction (RFC, "Bonsai"): find features round by round, then join them.

Source: Zhang, Lopez-Paz, Bottou, "Rich Feature Construction for the Optimization-Generalization
Dilemma", arXiv 2203.15516, and its code. The constants are those of its ColoredMNIST.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from stiefel.init.environments import Part, targets
from stiefel.linalg._checks import check_finite, check_floating


def discovery_sets(correct: Bool[Tensor, "n k"]) -> list[Int[Tensor, " size"]]:
    """For each model the examples that it gets right, and those that it gets wrong: A_0, B_0, A_1 …

    Empty sets are left out with a warning: the mean over one would be NaN.

    Args:
        correct: ``[n, k]``, whether model i is right on an example.

    Returns:
        At most 2k index tensors.

    Raises:
        ValueError: every model is right on all examples, so nothing is left to discover.
    """
    if bool(correct.all()):
        raise ValueError(
            f"round {correct.shape[1] - 1} fits the training set perfectly; "
            "lower erm_steps or raise l2"
        )
    sets, empty = [], []
    for i, right in enumerate(correct.T):
        for name, chosen in (("right", right), ("wrong", ~right)):
            rows = chosen.nonzero()[:, 0]
            if len(rows):
                sets.append(rows)
            else:
                empty.append(f"model {i} is {name} on no example")
    if empty:
        warnings.warn(f"left out of the sets: {'; '.join(empty)}", UserWarning, stacklevel=2)
    return sets


def averaging_matrix(
    sets: Sequence[Int[Tensor, " _size"]], n: int, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "sets n"]:
    """One row for each set, 1/|S| at its examples: M @ losses are the means of all sets at once.

    Raises:
        ValueError: no sets, an empty one, or an index outside 0 to n − 1.
    """
    if not sets or any(len(rows) == 0 for rows in sets):
        raise ValueError("sets must hold at least one set and no empty one")
    matrix = torch.zeros(len(sets), n, dtype=dtype, device=sets[0].device)
    for row, members in zip(matrix, sets, strict=True):
        if int(members.min()) < 0 or int(members.max()) >= n:
            raise ValueError(
                f"sets must hold indices from 0 to {n - 1}, "
                f"got {int(members.min())} to {int(members.max())}"
            )
        row[members] = 1 / len(members)
    return matrix


def group_dro_loss(
    per_sample_loss: Float[Tensor, "*runs n"], M: Float[Tensor, "sets n"]
) -> Float[Tensor, "*runs"]:
    """The largest of the sets' mean losses; the gradient goes through that one only.

    Args:
        per_sample_loss: ``[n]``, or ``[..., n]`` for several runs.
        M: averaging matrix ``[sets, n]`` of :func:`averaging_matrix`.

    Raises:
        ValueError: losses that are not finite.

    Source: arXiv 2203.15516 (discovery episode); all means in one product.
    """
    check_finite(per_sample_loss, "per_sample_loss")
    return (per_sample_loss @ M.to(per_sample_loss).mT).max(-1).values


def synthesis_sample(
    correct: Bool[Tensor, "_n k"], n: int, generator: torch.Generator | None = None
) -> Int[Tensor, " n"]:
    """n/2 examples on which all models are right or all wrong, then n/2 on which they disagree.

    Drawn uniformly with replacement.

    Args:
        correct: ``[N, k]``, whether model i is right on an example.
        n: how many, even.
        generator: source of randomness, torch's own if left out.

    Raises:
        ValueError: ``n`` is odd or below 2; the models agree on all examples, or on none.
    """
    if n < 2 or n % 2:
        raise ValueError(f"n must be even and at least 2, got {n}")
    agree = (correct == correct[:, :1]).all(1)
    halves = []
    for name, chosen in (("agree", agree), ("disagree", ~agree)):
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            raise ValueError(
                f"there is no example on which the {correct.shape[1]} models {name}: "
                + ("they are each other's opposite" if name == "agree" else "they are identical")
            )
        device = generator.device if generator is not None else "cpu"
        draw = torch.randint(len(rows), (n // 2,), generator=generator, device=device)
        halves.append(rows[draw.to(rows.device)])
    return torch.cat(halves)


class RichFeatures:
    """Builds a feature network that holds the features of several training rounds.

    Round 0 is a short plain training. Every later round trains a new network on the worst of the
    sets of examples that each earlier model gets right, or wrong: on these an earlier model scores
    1 and 0, so its features alone cannot lower the worst. Synthesis then distils all models into
    one network on a sample in which half of the examples divide the models.

    Args:
        make_net: returns a new feature network, a module from ``[n, ...]`` to ``[n, h]``.
        make_head: returns a new ``nn.Linear(h, 1)`` (binary) or ``nn.Linear(h, classes)``.
        rounds: models to discover, at least 2.
        erm_steps, dro_steps, synth_steps: steps of round 0, of each later round, of synthesis.
            Round 0 must stop before it learns the noise of the labels by heart; ``error_shares_``
            tells.
        lr: Adam's rate; each stage has an Adam of its own.
        l2: factor of the squared norm of all parameters, added to the loss.
        generator: seeds initial weights and samples; torch's own generator if left out.
        batch_size: examples a step; all of them if left out. Later rounds draw as many from each
            set.

    After :meth:`fit`:
        ``features_``: the joint feature network. ``head_``: the mean of its heads, so that
        ``nn.Sequential(features_, head_)`` is a classifier. ``models_``: one such module a round.
        ``groups_``: ``[N, rounds]``, whether each model is right. ``error_shares_``: share of
        examples that each model gets wrong. ``worst_accuracies_``: accuracy of each later round on
        the worst of the sets it was trained on.

    Source: arXiv 2203.15516, discovery and synthesis episodes.
    """

    models_: nn.ModuleList
    groups_: Tensor
    features_: nn.Module
    head_: nn.Linear
    error_shares_: list[float]
    worst_accuracies_: list[float]
    _chance: float

    def __init__(
        self,
        make_net: Callable[[], nn.Module],
        make_head: Callable[[], nn.Linear],
        rounds: int = 2,
        erm_steps: int = 51,
        dro_steps: int = 501,
        synth_steps: int = 501,
        lr: float | int = 5e-4,
        l2: float | int = 1.1e-3,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> None:
        if rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {rounds}")
        if min(erm_steps, dro_steps, synth_steps) < 1:
            raise ValueError(
                "erm_steps, dro_steps and synth_steps must be at least 1, "
                f"got {erm_steps}, {dro_steps} and {synth_steps}"
            )
        if not 0 < lr < float("inf") or not 0 <= l2 < float("inf"):
            raise ValueError(f"lr must be positive, l2 at least 0, both finite; got {lr} and {l2}")
        if batch_size is not None and batch_size < 2 * rounds:
            raise ValueError(f"batch_size must be at least 2 · rounds, got {batch_size}")
        self.make_net, self.make_head, self.rounds = make_net, make_head, rounds
        self.erm_steps, self.dro_steps, self.synth_steps = erm_steps, dro_steps, synth_steps
        self.lr, self.l2, self.generator, self.batch_size = lr, l2, generator, batch_size

    def fit(
        self,
        X: Shaped[Tensor, "n ..."],
        y: Shaped[Tensor, " _labels"],
        env: Shaped[Tensor, " _ids"] | None = None,
    ) -> RichFeatures:
        """Run discovery and synthesis on the pooled examples of all environments.

        Args:
            X: inputs ``[n, ...]``.
            y: labels ``[n]``: 0 and 1, or class ids.
            env: environment ids ``[n]``. Only their number is checked: discovery pools.

        Raises:
            ValueError: lengths differ, ``X`` not finite, labels that the head has no class for,
                a round that fits everything, a first round after round 0 that finds nothing, or
                models that agree on every example.
            TypeError: ``X`` is not floating point, or a head is not ``nn.Linear``.
        """
        check_floating(X, "X")
        check_finite(X, "X")
        for name, other in (("y", y), ("env", env)):
            if other is not None and len(other) != len(X):
                raise ValueError(f"{name} has {len(other)} entries, X has {len(X)} examples")
        everything = torch.arange(len(X), device=X.device)
        models: list[nn.Module] = []
        correct = torch.zeros(len(X), 0, dtype=torch.bool, device=X.device)
        self.worst_accuracies_ = []
        for k in range(self.rounds):
            sets = discovery_sets(correct) if k else [everything]
            model = self._discover(X, y, sets, self.dro_steps if k else self.erm_steps)
            right = self._predict(model, X) == y
            if k and not self._keep(right, sets, k):
                break
            models.append(model)
            correct = torch.cat([correct, right[:, None]], 1)
        self.models_, self.groups_ = nn.ModuleList(models), correct
        self.error_shares_ = (~correct).double().mean(0).tolist()
        self._synthesise(X, models)
        return self

    @torch.no_grad()
    def transform(self, X: Float[Tensor, "n ..."]) -> Float[Tensor, "n h"]:
        """Features of ``X`` by the joint network, ``[n, h]``, without gradients.

        Raises:
            RuntimeError: :meth:`fit` has not been called.
        """
        if not hasattr(self, "features_"):
            raise RuntimeError("RichFeatures has no features yet: call fit first")
        return torch.cat([self.features_(rows) for rows in X.split(self.batch_size or len(X))])

    def _discover(self, X: Tensor, y: Tensor, sets: Sequence[Tensor], steps: int) -> nn.Sequential:
        net, head = self._build(self.make_net, X), self._head(X)
        target = targets(y, len(X), head.out_features, X.dtype)
        self._chance = 1 / max(head.out_features, 2)

        def losses(rows: Tensor | slice) -> Tensor:
            return Part(head(net(X[rows])).mT, target[:, rows]).losses()

        self._train([net, head], losses, sets, len(X), steps)
        return nn.Sequential(net, head).eval()

    def _keep(self, right: Tensor, sets: Sequence[Tensor], k: int) -> bool:
        """Whether a round beats chance on the worst set; notes how well it does there."""
        worst = min(float(right[rows].double().mean()) for rows in sets)
        self.worst_accuracies_.append(worst)
        if worst > self._chance:
            return True
        found = f"round {k} is no better than chance on its worst set (accuracy {worst:.3f})"
        if k == 1:
            raise ValueError(
                f"{found}: nothing new was found; change erm_steps (round 0 must use some features "
                "and not yet know its errors by heart), dro_steps or l2"
            )
        warnings.warn(f"{found}: discovery stops with {k} models", UserWarning, stacklevel=3)
        return False

    def _synthesise(self, X: Tensor, models: Sequence[nn.Module]) -> None:
        rows = synthesis_sample(self.groups_, 2 * (len(X) // 2), self.generator)
        inputs = X[rows]
        net, heads = self._build(self.make_net, X), [self._head(X) for _ in models]
        classes = heads[0].out_features
        taught = [targets(self._predict(m, inputs), len(rows), classes, X.dtype) for m in models]

        def losses(rows: Tensor | slice) -> Tensor:
            phi = net(inputs[rows])
            parts = zip(heads, taught, strict=True)
            each = [Part(head(phi).mT, target[:, rows]).losses() for head, target in parts]
            return torch.stack(each).mean(0)

        everything = torch.arange(len(rows), device=X.device)
        self._train([net, *heads], losses, [everything], len(rows), self.synth_steps)
        # The mean of linear heads is the linear head with the mean weights.
        joint = heads[0]
        with torch.no_grad():
            for name, parameter in joint.named_parameters():
                parameter.copy_(torch.stack([h.get_parameter(name) for h in heads]).mean(0))
        self.features_, self.head_ = net, joint

    def _train(
        self,
        modules: Sequence[nn.Module],
        losses: Callable[[Tensor | slice], Tensor],
        sets: Sequence[Tensor],
        n: int,
        steps: int,
    ) -> None:
        """Minimise the largest of the sets' mean losses + l2 Σ‖w‖²."""
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        # Adam's weight_decay adds weight_decay · w to the gradient: that of l2 ‖w‖² is 2 l2 w.
        optimizer = torch.optim.Adam(parameters, lr=self.lr, weight_decay=2 * self.l2)
        for module in modules:
            module.train()
        rows: Tensor | slice = slice(None)
        matrix = averaging_matrix(sets, n)
        for _ in range(steps):
            if self.batch_size is not None:
                rows, matrix = self._batch(sets, self.batch_size // len(sets))
            optimizer.zero_grad()
            group_dro_loss(losses(rows), matrix).backward()
            optimizer.step()
        for module in modules:
            module.eval()

    def _batch(self, sets: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor]:
        """As many examples of each set, and the matrix that averages each set's."""
        device = self.generator.device if self.generator is not None else "cpu"
        rows = []
        for members in sets:
            draw = torch.randint(len(members), (size,), generator=self.generator, device=device)
            rows.append(members[draw.to(members.device)])
        places = torch.arange(size * len(sets), device=sets[0].device).split(size)
        return torch.cat(rows), averaging_matrix(places, size * len(sets))

    @torch.no_grad()
    def _predict(self, model: nn.Module, X: Tensor) -> Tensor:
        z = torch.cat([model(rows) for rows in X.split(self.batch_size or len(X))])
        return (z[:, 0] > 0).long() if z.shape[1] == 1 else z.argmax(1)

    def _build(self, make: Callable[[], nn.Module], X: Tensor) -> nn.Module:
        if self.generator is None:
            return make().to(X)
        device = self.generator.device
        seed = int(torch.randint(2**62, (), generator=self.generator, device=device))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return make().to(X)

    def _head(self, X: Tensor) -> nn.Linear:
        head = self._build(self.make_head, X)
        if not isinstance(head, nn.Linear):
            raise TypeError(
                f"make_head must return nn.Linear, got {type(head).__name__}: only the mean of "
                "linear heads is a head that predicts their mean"
            )
        return head
