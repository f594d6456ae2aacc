"""What methods that never gather see of a matrix: the part that this rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stiefel.optim.distributed.planner import Entry


@dataclass(frozen=True)
class Shard:
    """A rank's part of a matrix (R, C): views, the matrix's rows first, possibly empty."""

    entry: Entry
    param: Tensor
    grad: Tensor
    momentum: Tensor
    first_row: int
    """Number of its first row in the matrix."""
    counts: bool
    """Whether sums over ranks must contain it: one copy of each part does."""

    @classmethod
    def of(cls, entry: Entry, rank: int, param: Tensor, grad: Tensor, momentum: Tensor) -> Shard:
        """The part that ``rank`` holds, of a parameter's own local tensors."""
        piece = entry.piece_of(rank)
        dim = entry.row_dimension

        def rows_first(tensor: Tensor) -> Tensor:
            part = tensor[piece.local]
            if not piece.numel:
                return part.reshape(0, 0)
            if entry.matrix.transposed:
                return part.mT
            return part[0] if dim else part

        return cls(
            entry,
            rows_first(param),
            rows_first(grad),
            rows_first(momentum),
            piece.inside[dim].start,
            entry.layout.replicas[rank] == 0,
        )

    @property
    def size(self) -> tuple[int, int]:
        """(R, C) of the whole matrix."""
        return self.entry.matrix.rows, self.entry.matrix.cols
