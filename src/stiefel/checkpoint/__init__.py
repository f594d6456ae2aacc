"""Checkpoints on disk: safetensors, read and written a tensor at a time.

Nothing here unpickles, and no file is ever held in memory whole.
"""

from stiefel.checkpoint.errors import CheckpointError as CheckpointError
from stiefel.checkpoint.header import TensorInfo as TensorInfo
from stiefel.checkpoint.reader import Checkpoint as Checkpoint
from stiefel.checkpoint.writer import CheckpointWriter as CheckpointWriter

__all__ = ["Checkpoint", "CheckpointError", "CheckpointWriter", "TensorInfo"]
