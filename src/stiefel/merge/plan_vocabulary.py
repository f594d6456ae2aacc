"""Bringing the vocabularies of a recipe's models into one order of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from stiefel.merge.plan_layers import has_vocabulary_rows
from stiefel.merge.plan_models import Model
from stiefel.merge.plan_tokens import (
    Vocabulary,
    VocabularyError,
    read_vocabulary,
    rows_by_place,
    rows_for,
    same_files,
    union,
)
from stiefel.merge.recipe_errors import Problem


@dataclass(frozen=True)
class Alignment:
    """Where each row of the output's embedding is found in each model."""

    count: int | None = None
    """Rows of the output's embedding; None where no embedding was found."""
    giver: Model | None = None
    """Whose tokenizer the output has, where that is not the leader's."""
    index: Mapping[int, Tensor | None] = field(default_factory=dict)
    """Number of a model → rows as in :class:`~stiefel.merge.plan_types.TensorRef`."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Files of the tokenizer that changed."""

    def rows(self, model: Model) -> Tensor | None:
        """Rows of this model; None where row i is row i."""
        return self.index.get(model.number)

    def shape(self, model: Model, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """What ``shape`` of a tensor of ``model`` becomes in the output's vocabulary."""
        own = embedding_rows(model)
        is_table = has_vocabulary_rows(name) and bool(shape) and shape[0] == own
        if not is_table or self.count is None or self.rows(model) is None:
            return tuple(shape)
        return (self.count, *shape[1:])


def embedding_rows(model: Model) -> int | None:
    """Rows of its token embedding."""
    return None if model.embedding is None else model.tensors[model.embedding].shape[0]


class Aligner:
    """Finds the :class:`Alignment`; what is wrong gathers in ``problems``, the rest in ``notes``.

    Args:
        leader: the model whose tokenizer the output has by default.
        models: all of them.
        giver: the model of ``tokenizer_source``, if the recipe names one.
        with_union: tokens of all models are wanted.
        policy: ``error``, or ``base``: where tokenizers cannot be compared, rows count by place.
    """

    def __init__(
        self,
        leader: Model,
        models: Sequence[Model],
        giver: Model | None,
        *,
        with_union: bool,
        policy: str,
    ) -> None:
        self.leader = leader
        self.models = tuple(models)
        self.giver = giver
        self.with_union = with_union
        self.policy = policy
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._read: dict[str, Vocabulary | None] = {}

    def align(self) -> Alignment:
        """The alignment; what goes wrong is a problem, and the result then of no use."""
        target = self.giver or self.leader
        count = embedding_rows(target)
        if count is None:
            return Alignment()
        try:
            return self._aligned(target, count)
        except VocabularyError as error:
            self.problems.append(Problem(str(error), "tokenizer"))
            return Alignment(count)

    def _aligned(self, target: Model, count: int) -> Alignment:
        texts: dict[str, str] = {}
        wanted = None
        if self.with_union and not all(same_files(target.folder, m.folder) for m in self.models):
            base = self._vocabulary(target)
            others = [v for m in self.models if m is not target and (v := self._vocabulary(m))]
            if base is None:
                raise VocabularyError(f"union needs a tokenizer.json, and {target.name} has none")
            wanted, text = union(base, others)
            if text is not None:
                texts["tokenizer.json"] = text
                added = len(wanted.ids) - len(base.ids)
                self.notes.append(f"tokenizer: {added} tokens added to those of {target.name}")
            count = max(count, 1 + max(wanted.ids.values(), default=-1))
        index = {m.number: self._rows(target, wanted, m, count) for m in self.models}
        giver = target if target is not self.leader else None
        return Alignment(count, giver, index, texts)

    def _vocabulary(self, model: Model) -> Vocabulary | None:
        key = str(model.folder)
        if key not in self._read:
            self._read[key] = read_vocabulary(model.folder)
        return self._read[key]

    def _rows(
        self, target: Model, wanted: Vocabulary | None, model: Model, count: int
    ) -> Tensor | None:
        own = embedding_rows(model)
        if own is None:
            return None
        same = True if wanted is None and model is target else same_files(
            target.folder, model.folder
        )  # fmt: skip
        if same and wanted is None:
            return rows_by_place(count, own)
        first = wanted or (None if same is None else self._vocabulary(target))
        second = None if same is None and wanted is None else self._vocabulary(model)
        if first is not None and second is not None:
            rows = rows_for(first, second, count, own)
            if rows is not None:
                lacking = sum(1 for token in first.ids if token not in second.ids)
                self.notes.append(
                    f"{model.name}: its {own} rows of the vocabulary are matched token by token "
                    f"with {count}; {lacking} tokens are not in it"
                )
            return rows
        if own == count:
            if same is False:
                self.notes.append(
                    f"{model.name}: its tokenizer is another file than that of {target.name} and "
                    "cannot be read here; rows are taken as the same tokens"
                )
            return None
        if self.policy == "error":
            self.problems.append(
                Problem(
                    f"its vocabulary has {own} rows, that of {target.name} {count}, and there is "
                    "no tokenizer.json or vocab.json on both sides to match them by. "
                    "allow_vocabulary: base matches them by place",
                    model.name,
                )
            )
        return rows_by_place(count, own)
