"""What a node of a computation graph can be, and what its parameters are for."""

from __future__ import annotations

from collections.abc import Sequence

# Names and order of the published hypernetworks (GHN-2 and after).
PUBLISHED_OPS = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat", "input",
    "bias", "bn", "ln", "pos_enc", "glob_avg",
)  # fmt: skip

OPS = (*PUBLISHED_OPS, "linear", "embed", "rms_norm", "gate", "scale", "param")
"""Every operation that :func:`graph_from_module` writes, in the order of ``NetGraph.ops``."""

# What a vocabulary without the newer names calls them: there every matrix is a convolution and
# every table a code of positions.
_OLDER_NAMES = {"linear": "conv", "embed": "pos_enc", "rms_norm": "ln", "gate": "sum"}


def positions(ops: Sequence[str]) -> tuple[list[int], dict[str, None]]:
    """Where a vocabulary keeps each of :data:`OPS`.

    Args:
        ops: The vocabulary; has to hold ``"input"``.

    Returns:
        For each name of :data:`OPS` its index in ``ops``, or -1; and the names that are missing.

    Raises:
        ValueError: ``ops`` has a name twice, one that is not in :data:`OPS`, or no ``"input"``.
    """
    unknown = [name for name in ops if name not in OPS]
    if unknown:
        raise ValueError(f"ops has {unknown}; known are {list(OPS)}")
    if len(set(ops)) != len(ops):
        raise ValueError(f"ops names an operation twice: {list(ops)}")
    if "input" not in ops:
        raise ValueError("ops has to hold 'input', the node that every graph starts from")
    index = {name: i for i, name in enumerate(ops)}
    found = [index.get(name, index.get(_OLDER_NAMES.get(name, ""), -1)) for name in OPS]
    return found, dict.fromkeys(name for name, at in zip(OPS, found, strict=True) if at < 0)
