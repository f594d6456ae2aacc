"""Real data that is already on the machine: no loader here opens a connection.

>>> from stiefel.data import python_source
>>> text = python_source(100_000)
>>> len(text.train) + len(text.validation)
100000
"""

from stiefel.data.clutter import ClutteredDigits as ClutteredDigits
from stiefel.data.clutter import cluttered_digits as cluttered_digits
from stiefel.data.images import Picture as Picture
from stiefel.data.images import photograph as photograph
from stiefel.data.tables import Table as Table
from stiefel.data.tables import table as table
from stiefel.data.text import MissingDataError as MissingDataError
from stiefel.data.text import Text as Text
from stiefel.data.text import python_source as python_source

__all__ = [
    "ClutteredDigits",
    "MissingDataError",
    "Picture",
    "Table",
    "Text",
    "cluttered_digits",
    "photograph",
    "python_source",
    "table",
]
