"""Merging and adapting trained models: task arithmetic, rotations, orthogonal adapters."""

__all__: list[str] = []
