"""The shape of a recipe, for Pydantic: which keys there are and what each holds.

Imported only where a recipe is read, since Pydantic is an extra.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

DTYPES = ("float32", "float16", "bfloat16", "float64")
Dtype = Literal["float32", "float16", "bfloat16", "float64"]

# Keys of mergekit that are not offered, and what to say.
REFUSED = {
    "modules": "merging parts of a multimodal model by separate rules is not offered; "
    "models with filters on tensor names does most of it",
    "residual_weight": "not offered",
    "override_architecture": "not needed: tensors are matched by their names",
    "tokens": "moving single tokens is not offered",
    "pad_to_multiple_of": "padding the vocabulary is not offered",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Place(_Strict):
    """``path[@revision]``: a folder, or a model of the hub that is in the local cache."""

    path: str = Field(min_length=1)
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        path, at, revision = value.rpartition("@")
        return {"path": path, "revision": revision} if at and path else {"path": value}


class Ref(_Strict):
    """``model[+lora]``, as a string or as an object."""

    model: Place
    lora: Place | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.count("+") > 1:
            raise ValueError(
                f"at most one +adapter, got {value!r}; where a path has a + of its own, "
                "write {model: PATH, lora: PATH}"
            )
        model, plus, lora = value.partition("+")
        if not model or (plus and not lora):
            raise ValueError(f"must be path or path+adapter, got {value!r}")
        return {"model": model, "lora": lora} if plus else {"model": model}


class Entry(_Strict):
    """One of ``models``."""

    model: Ref | None = None
    adapter: Place | None = None
    parameters: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Entry:
        if (self.model is None) == (self.adapter is None):
            raise ValueError("needs model: PATH or adapter: PATH, one of them")
        return self


class Source(_Strict):
    """One of the ``sources`` of a slice."""

    model: Ref
    layer_range: list[int] = Field(min_length=2, max_length=2)
    parameters: dict[str, Any] | None = None

    @field_validator("layer_range")
    @classmethod
    def _ordered(cls, value: list[int]) -> list[int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError(f"must be [first, last + 1] with 0 <= first < last + 1, got {value}")
        return value


class OutputSlice(_Strict):
    """One of ``slices``."""

    sources: list[Source] = Field(min_length=1)
    base_model: Ref | None = None
    parameters: dict[str, Any] | None = None


class Tokenizer(_Strict):
    """mergekit's newer way to say ``tokenizer_source``."""

    source: Ref = Ref(model=Place(path="base"))


def _without_torch(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


class Schema(_Strict):
    """A whole recipe."""

    merge_method: str
    models: list[Entry] | None = Field(default=None, min_length=1)
    slices: list[OutputSlice] | None = Field(default=None, min_length=1)
    base_model: Ref | None = None
    parameters: dict[str, Any] | None = None
    dtype: Annotated[Dtype | None, BeforeValidator(_without_torch)] = None
    out_dtype: Annotated[Dtype | None, BeforeValidator(_without_torch)] = None
    tokenizer_source: Ref | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    allow_missing: Literal["error", "base"] = "error"
    allow_extra: Literal["error", "drop"] = "error"
    allow_shape: Literal["error", "base"] = "error"
    allow_vocabulary: Literal["error", "base"] = "error"
    allow_tied: Literal["untie", "error"] = "untie"
    allow_nonfinite: Literal["error", "keep", "base"] = "error"

    @model_validator(mode="after")
    def _one_of_each(self) -> Schema:
        if (self.models is None) == (self.slices is None):
            raise ValueError("needs models or slices, one of them")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("tokenizer and tokenizer_source say the same: keep one of them")
        return self
