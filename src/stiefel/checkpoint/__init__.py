"""Checkpoints on disk: safetensors, read and written a tensor at a time.

Nothing here unpickles, and no file is ever held in memory whole.
"""

__all__: list[str] = []
