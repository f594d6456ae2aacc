"""Real data that is already on the machine: no loader here opens a connection.

>>> from stiefel.data import python_source
>>> text = python_source(100_000)
>>> len(text.train) + len(text.validation)
100000
"""

from stiefel.data.bpe import BytePairEncoding as BytePairEncoding
from stiefel.data.clutter import ClutteredDigits as ClutteredDigits
from stiefel.data.clutter import cluttered_digits as cluttered_digits
from stiefel.data.gguf import GGUF as GGUF
from stiefel.data.images import Picture as Picture
from stiefel.data.images import photograph as photograph
from stiefel.data.onnx import onnx_tensors as onnx_tensors
from stiefel.data.pretrained import pretrained as pretrained
from stiefel.data.pretrained import weights_file as weights_file
from stiefel.data.tables import Table as Table
from stiefel.data.tables import table as table
from stiefel.data.text import MissingDataError as MissingDataError
from stiefel.data.text import Text as Text
from stiefel.data.text import python_source as python_source
from stiefel.data.weekly import WeeklyRecord as WeeklyRecord
from stiefel.data.weekly import carbon_dioxide as carbon_dioxide

__all__ = [
    "GGUF",
    "BytePairEncoding",
    "ClutteredDigits",
    "MissingDataError",
    "Picture",
    "Table",
    "Text",
    "WeeklyRecord",
    "carbon_dioxide",
    "cluttered_digits",
    "onnx_tensors",
    "photograph",
    "pretrained",
    "python_source",
    "table",
    "weights_file",
]
