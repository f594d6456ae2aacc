"""Layers: state spaces and convolutions whose orthogonality or spectrum is known."""
