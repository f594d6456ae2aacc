"""The papers: what each claims and the experiment that checks it.

>>> from stiefel.papers import get
>>> get("rmnp").arxiv
'2603.20527'
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from stiefel.papers.paper import Claim as Claim
from stiefel.papers.paper import Judgement as Judgement
from stiefel.papers.paper import Measurement as Measurement
from stiefel.papers.paper import Paper as Paper
from stiefel.papers.paper import Scale as Scale
from stiefel.papers.paper import UnavailableError as UnavailableError
from stiefel.papers.paper import Verdict as Verdict
from stiefel.papers.progress import Progress as Progress

log = logging.getLogger(__name__)

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
    "logah",
    "s4d",
    "ptd",
    "orthogonal_conv",
    "poincare_resnet",
    "neural_operators",
    "lemon",
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
    "dequantized_linear_algebra",
    "tensor_product_pde",
    "semi_parametric_synthesis",
)


ENTRY_POINTS = "stiefel.papers"
"""Group under which other packages make papers known: ``my-method = "my_package:paper"``."""


@cache
def all_papers() -> tuple[Paper, ...]:
    """Every paper, in the order of the page: ours, then those of other installed packages.

    A paper of another package that does not load, or whose slug is taken, is left out with a
    warning in the log.
    """
    ours = tuple(import_module(f"stiefel.papers.{name}").paper for name in MODULES)
    return ours + _installed({paper.slug for paper in ours})


def _installed(taken: set[str]) -> tuple[Paper, ...]:
    found = []
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: (p.name, p.value)):
        try:
            paper = point.load()
        except Exception as error:
            # Whatever another package does wrong must not take the others away.
            log.warning("paper %s (%s) does not load: %s", point.name, point.value, error)
            continue
        if not isinstance(paper, Paper):
            kind = type(paper).__name__
            log.warning("%s (%s) is a %s, not a Paper", point.name, point.value, kind)
        elif paper.slug in taken:
            log.warning("%s (%s): the slug %s is taken", point.name, point.value, paper.slug)
        else:
            taken.add(paper.slug)
            found.append(paper)
    return tuple(found)


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
