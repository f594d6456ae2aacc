"""The runner that re-checks the papers, and the page that shows what came out.

>>> from stiefel.atlas import build_page, reproduce
>>> results = reproduce(["rmnp"], scale="smoke")        # doctest: +SKIP
>>> build_page("results", out="build/atlas")          # doctest: +SKIP
"""

from stiefel.atlas.page import build_page as build_page
from stiefel.atlas.record import Record as Record
from stiefel.atlas.result import Result as Result
from stiefel.atlas.runner import reproduce as reproduce

__all__ = ["Record", "Result", "build_page", "reproduce"]
