"""The merge methods as a recipe sees them: their names, parameters, and what they need.

This table is what recipes are checked against and what the documentation lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stiefel.merge.recipe_settings import Parameter

BASES = ("optional", "required", "none")


@dataclass(frozen=True)
class Method:
    """One method."""

    name: str
    summary: str
    parameters: tuple[Parameter, ...]
    base: str = "optional"
    """Whether it needs ``base_model``; ``optional``: one only gives names, shapes and the
    configuration."""
    differences: bool = False
    """Works on differences to the base, which is then no model of the merge itself."""
    at_least: int = 1
    """Models besides the base; for ``slerp`` the base counts as one of the two."""
    at_most: int | None = None
    adapters_only: bool = False
    """Merges OFT adapters into one, and nothing else."""
    low_rank: str = ""
    """Name of the same method for LoRA adapters alone, merged into one; empty: there is none."""

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of this name, or None."""
        return next((p for p in self.parameters if p.name == name), None)


def _weight(default: float | None = None, at_least: float | int | None = None) -> Parameter:
    return Parameter(
        "weight",
        float,
        default=default,
        required=default is None,
        each=True,
        at_least=float("-inf") if at_least is None else at_least,
        help="factor of a model",
    )


_T = Parameter(
    "t", float, required=True, at_least=0, at_most=1, help="0 is the base, 1 the other model"
)
_LAMBDA = Parameter("lambda", float, default=1.0, help="factor of the merged difference")
_DENSITY = Parameter(
    "density",
    float,
    default=1.0,
    each=True,
    at_least=0,
    at_most=1,
    help="part of a difference that is kept",
)
_INT8 = Parameter("int8_mask", bool, default=False, help="no effect: masks cost nothing here")


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", bool, default=default, help="divide by the sum of the weights")


def _rescale(default: bool) -> Parameter:
    return Parameter("rescale", bool, default=default, help="divide what was kept by the density")


_NO_RESCALE = Parameter(
    "rescale", bool, default=False, only=False, help="false: what was kept stays as it is"
)


def _differences(
    name: str,
    summary: str,
    normalize: bool,
    rescale: bool | None,
    *,
    sparse: bool = True,
    low_rank: str = "",
) -> Method:
    density = (_DENSITY,) if sparse else ()
    rescales = (_NO_RESCALE if rescale is None else _rescale(rescale),) if sparse else ()
    parameters = (_weight(), *density, _LAMBDA, _normalize(normalize), *rescales, _INT8)
    return Method(name, summary, parameters, base="required", differences=True, low_rank=low_rank)


_INTENSITY = Parameter("intensity", float, default=1.0, help="factor of the merged rotation")
_ORTHOMERGE = Method(
    "orthomerge",
    "rotations averaged in their Lie algebra, the rest merged additively (arXiv 2602.05943)",
    (
        _weight(1.0, at_least=0),
        Parameter(
            "variant",
            str,
            default="G",
            allowed=("G", "C"),
            help="G: rotation to the whole expert; C: only to rows that contradict the mean",
        ),
        Parameter(
            "residual",
            str,
            default="ties",
            allowed=("ta", "ties", "dare", "tsvm"),
            help="how what is no rotation is merged",
        ),
        Parameter(
            "residual_scale",
            float,
            help="factor of the merged rest; 1, with ta and dare 1 / sum of weights",
        ),
        Parameter("map", str, default="cayley", allowed=("cayley", "log"), help="coordinates"),
        Parameter(
            "density", float, default=0.2, above=0, at_most=1, help="of ties and dare on the rest"
        ),
        _INTENSITY,
    ),
    base="required",
    differences=True,
)

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "weighted mean", (_weight(), _normalize(True)), low_rank="linear"),
        Method(
            "slerp",
            "on the arc between two models",
            (_T,),
            base="required",
            at_least=2,
            at_most=2,
        ),
        _differences(
            "task_arithmetic",
            "base + weighted differences",
            False,
            None,
            sparse=False,
            low_rank="linear",
        ),
        _differences("ties", "largest differences, where signs agree", True, None, low_rank="ties"),
        _differences("dare_linear", "random part of the differences", False, True, low_rank="dare"),
        _differences("dare_ties", "random part, where signs agree", False, True),
        _ORTHOMERGE,
        Method(
            "orthomerge_oft",
            "OFT adapters into one OFT adapter, in the Lie algebra",
            (_weight(1.0, at_least=0), _INTENSITY),
            adapters_only=True,
        ),
        Method(
            "passthrough",
            "tensors as they are: layers of models stacked",
            (Parameter("scale", float, each=True, help="factor"),),
            at_most=1,
        ),
    )
}
ALIASES: Mapping[str, str] = {"dare": "dare_linear"}

# mergekit's methods and parameters that are not here: told apart from a misspelt name.
NOT_OFFERED = (
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "karcher",
    "model_stock", "multislerp", "nearswap", "nuslerp", "ram", "ramplus_tl", "sce",
)  # fmt: skip
FOREIGN_PARAMETERS = frozenset(
    ("weight", "density", "lambda", "normalize", "rescale", "int8_mask", "t", "scale", "gamma",
     "epsilon", "select_topk", "filter_wise", "nuslerp_row_wise", "nuslerp_flatten",
     "normalize_weights", "eps", "max_iter", "tol", "r", "alpha", "embed_slerp")
)  # fmt: skip
