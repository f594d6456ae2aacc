"""The papers: what each claims and the experiment that checks it.

>>> from stiefel.papers import get
>>> get("rmnp").arxiv
'2603.20527'
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from stiefel.papers.paper import Claim as Claim
from stiefel.papers.paper import Judgement as Judgement
from stiefel.papers.paper import Measurement as Measurement
from stiefel.papers.paper import Paper as Paper
from stiefel.papers.paper import Scale as Scale
from stiefel.papers.paper import UnavailableError as UnavailableError
from stiefel.papers.paper import Verdict as Verdict
from stiefel.papers.progress import Progress as Progress

# In the order of the page. Each name is a module here with a ``paper`` in it.
MODULES = (
    "rmnp",
    "normuon",
    "root",
    "auon",
    "aro",
    "dct_low_rank",
    "rich_lazy",
    "rich_features",
    "warm_starting",
    "permutation_learning",
    "deep_linear_dynamics",
    "s4d",
    "ptd",
    "orthogonal_conv",
    "poincare_resnet",
    "lambda_orthogonality",
    "orthoreg",
    "orthomerge",
    "orthogonal_adaptation",
    "weibull_diagnostics",
    "representational_capacity",
    "cylindrical_steering",
    "online_dictionary",
    "dpp_least_squares",
    "learned_sor",
)


@cache
def all_papers() -> tuple[Paper, ...]:
    """Every paper, in the order of the page."""
    return tuple(import_module(f"stiefel.papers.{name}").paper for name in MODULES)


def get(slug: str) -> Paper:
    """The paper with this slug.

    Raises:
        KeyError: no such paper; the message names near matches.
    """
    papers = {paper.slug: paper for paper in all_papers()}
    if slug not in papers:
        from difflib import get_close_matches

        near = get_close_matches(slug, papers, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(papers)}."
        raise KeyError(f"no paper {slug!r}. {hint}")
    return papers[slug]
