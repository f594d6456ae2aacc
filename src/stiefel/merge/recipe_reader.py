"""From what a recipe's YAML holds to a :class:`~stiefel.merge.recipe_types.Recipe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stiefel.merge.recipe_errors import Problem, dotted, nearest, shown
from stiefel.merge.recipe_methods import FOREIGN_PARAMETERS, Method
from stiefel.merge.recipe_settings import Setting, parse_setting
from stiefel.merge.recipe_types import ModelRef, OutputSlice, Policies, Recipe, Source
from stiefel.merge.recipe_yaml import Document


class Reader:
    """From the schema's objects to a :class:`Recipe`; collects problems and warnings."""

    def __init__(self, document: Document, method: Method, problems: list[Problem]) -> None:
        self.document = document
        self.method = method
        self.problems = problems
        self.warnings: list[str] = []

    def recipe(self, schema: Any, text: str, name: str) -> Recipe:
        """The recipe that the checked ``schema`` says; problems gather on the way."""
        stacked = schema.slices is not None
        base = self._ref(schema.base_model, ("base_model",))
        if stacked:
            slices = tuple(self._slice(s, ("slices", i)) for i, s in enumerate(schema.slices))
        else:
            sources = tuple(self._entry(e, ("models", i)) for i, e in enumerate(schema.models))
            slices = (OutputSlice(sources, {}, key="models"),)
        parameters = self._settings(schema.parameters, ("parameters",), each=False)
        for one in slices:
            self._check_slice(one, base)
        if schema.allow_nonfinite == "base" and self.method.base != "required":
            with_base = f"{self.method.name} does not read the base: choose error or keep"
            self._say(("allow_nonfinite",), with_base)
        tokenizer, union = self._tokenizer(schema)
        return Recipe(
            method=self.method,
            slices=slices,
            stacked=stacked,
            base=base,
            parameters=parameters,
            dtype=schema.out_dtype or schema.dtype,
            tokenizer=tokenizer,
            union=union,
            chat_template=self._chat_template(schema.chat_template),
            policies=Policies(
                schema.allow_missing,
                schema.allow_extra,
                schema.allow_shape,
                schema.allow_vocabulary,
                schema.allow_tied,
                schema.allow_nonfinite,
            ),
            seed=schema.seed,
            text=text,
            name=name,
            warnings=tuple(self.warnings),
        )

    def parameters(self) -> None:
        """Check the parameters alone, of a recipe whose keys are wrong elsewhere."""

        def items(value: Any, *path: str | int) -> list[tuple[Any, tuple[str | int, ...]]]:
            found = value if isinstance(value, list) else []
            return [(item, (*path, i)) for i, item in enumerate(found) if isinstance(item, dict)]

        content = self.document.content
        slices = items(content.get("slices"), "slices")
        models = items(content.get("models"), "models")
        for one, path in slices:
            models += items(one.get("sources"), *path, "sources")
        places = [*((p, True) for p in models), *((p, False) for p in [*slices, (content, ())])]
        for (holder, path), each in places:
            raw = holder.get("parameters")
            if isinstance(raw, dict):
                self._settings(raw, (*path, "parameters"), each=each)

    def _say(self, path: Sequence[str | int], message: str) -> None:
        self.problems.append(Problem(message, dotted(path), self.document.line(tuple(path))))

    def _ref(self, ref: Any, path: Sequence[str | int]) -> ModelRef | None:
        if ref is None:
            return None
        lora = ref.lora
        return ModelRef(
            ref.model.path,
            ref.model.revision,
            None if lora is None else lora.path,
            None if lora is None else lora.revision,
            self.document.line(tuple(path)),
        )

    def _entry(self, entry: Any, path: tuple[str | int, ...]) -> Source:
        settings = self._settings(entry.parameters, (*path, "parameters"), each=True)
        key = dotted(path)
        if entry.adapter is not None:
            line = self.document.line((*path, "adapter"))
            ref = ModelRef(entry.adapter.path, entry.adapter.revision, line=line)
            return Source(ref, settings, is_adapter=True, key=key)
        ref = self._ref(entry.model, (*path, "model"))
        assert ref is not None  # noqa: S101 - the schema has one of both
        return Source(ref, settings, key=key)

    def _slice(self, one: Any, path: tuple[str | int, ...]) -> OutputSlice:
        sources = []
        for index, source in enumerate(one.sources):
            place = (*path, "sources", index)
            ref = self._ref(source.model, (*place, "model"))
            assert ref is not None  # noqa: S101 - required by the schema
            settings = self._settings(source.parameters, (*place, "parameters"), each=True)
            first, end = source.layer_range
            sources.append(Source(ref, settings, (first, end), key=dotted(place)))
        lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers}
        if len(lengths) > 1:
            self._say(path, f"sources of one slice need equally many layers, got {sorted(lengths)}")
        settings = self._settings(one.parameters, (*path, "parameters"), each=False)
        base = self._ref(one.base_model, (*path, "base_model"))
        return OutputSlice(tuple(sources), settings, base, dotted(path))

    def _settings(
        self, raw: dict[str, Any] | None, path: tuple[str | int, ...], each: bool
    ) -> dict[str, Setting]:
        """Parameters in one place, each value checked; ``each``: the place is a model's."""
        settings: dict[str, Setting] = {}
        names = [parameter.name for parameter in self.method.parameters]
        for name, value in (raw or {}).items():
            parameter = self.method.parameter(name)
            if parameter is None:
                if name in FOREIGN_PARAMETERS:
                    self._warn((*path, name), f"{self.method.name} has no such parameter")
                else:
                    said = f"no parameter of {self.method.name}; it has {', '.join(names)}"
                    self._say((*path, name), said + nearest(name, names))
                continue
            try:
                settings[name] = parse_setting(parameter, value)
            except ValueError as error:
                self._say((*path, name), str(error))
                continue
            if each and not parameter.each:
                del settings[name]
                self._warn((*path, name), "is of the whole merge, not of one model")
        return settings

    def _warn(self, path: tuple[str | int, ...], why: str) -> None:
        line = self.document.line(path)
        self.warnings.append(f"line {line}: {dotted(path)} has no effect: {why}")

    def _check_slice(self, one: OutputSlice, default: ModelRef | None) -> None:
        """Whether the method can work on these models."""
        method, base = self.method, one.base or default
        line = one.sources[0].ref.line
        if not self._check_kinds(one, base):
            return
        alone = base is None and all(source.is_adapter for source in one.sources)
        if method.base == "required" and base is None and not alone:
            self.problems.append(Problem(f"{method.name} needs base_model", one.key, line))
            return
        if one.base is not None and not any(_same(s.ref, one.base) for s in one.sources):
            self.problems.append(
                Problem("base_model must be one of the slice's sources", one.key, line)
            )
        others = [s for s in one.sources if base is None or not _same(s.ref, base)]
        count = len(one.sources)
        if method.base == "required":
            count = len(others) + (0 if method.differences else 1)
        if count < method.at_least or (method.at_most and count > method.at_most):
            wanted = str(method.at_least)
            if method.at_most is None:
                wanted = f"at least {wanted}"
            elif method.at_most > method.at_least:
                wanted = f"{wanted} to {method.at_most}"
            what = " models besides the base" if method.differences else " models"
            message = f"{method.name} takes {wanted}{what}, got {count}"
            self.problems.append(Problem(message, one.key, line))

    def _check_kinds(self, one: OutputSlice, base: ModelRef | None) -> bool:
        """Whether adapters stand where the method takes them."""
        method, before = self.method, len(self.problems)
        alone = base is None and all(source.is_adapter for source in one.sources)
        for source in one.sources:
            said = ""
            if method.adapters_only and not source.is_adapter:
                said = f"{method.name} merges adapters: write adapter: PATH"
            elif source.is_adapter and base is None and not alone:
                said = "an adapter beside whole models needs base_model, on which it is put"
            elif source.is_adapter and alone and not (method.adapters_only or method.low_rank):
                said = f"{method.name} does not merge adapters alone; name the base_model"
            if said:
                self.problems.append(Problem(said, source.key, source.ref.line))
        return len(self.problems) == before

    def _tokenizer(self, schema: Any) -> tuple[ModelRef | None, bool]:
        source, path = schema.tokenizer_source, ("tokenizer_source",)
        if schema.tokenizer is not None:
            source, path = schema.tokenizer.source, ("tokenizer", "source")
        ref = self._ref(source, path)
        if ref is None or ref.model == "base":
            return None, False
        return (None, True) if ref.model == "union" else (ref, False)

    def _chat_template(self, text: str | None) -> str | None:
        if text is None or text == "auto":
            return None
        if "{" not in text:
            self._say(
                ("chat_template",),
                "templates by name are not offered: write auto (the tokenizer's own) or the "
                f"Jinja text, got {shown(text)}",
            )
        return text


def _same(first: ModelRef, second: ModelRef) -> bool:
    """Whether both name one model, as far as text can tell."""
    return _clean(first) == _clean(second)


def _clean(ref: ModelRef) -> tuple[str | None, ...]:
    paths = [None if p is None else str(Path(p)) for p in (ref.model, ref.adapter)]
    return (*paths, ref.revision, ref.adapter_revision)
