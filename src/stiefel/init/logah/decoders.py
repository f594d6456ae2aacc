"""From the vector of a node to its weights: low-rank factors, or copies of a tile."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from stiefel.init.logah.graph import Shape


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """Rows and columns of the matrix that becomes a tensor of this shape.

    A kernel (out, in, *k, k_w) has its height (and depth) beside the outputs and its width beside
    the inputs.

    Raises:
        ValueError: the shape has fewer than two axes, or an empty one.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"shape is {tuple(shape)}; a matrix or kernel with no empty axis is needed"
        )
    if len(shape) == 2:
        return shape[0], shape[1]
    return shape[0] * math.prod(shape[2:-1]), shape[1] * shape[-1]


def as_kernel(matrix: Float[Tensor, "B rows columns"], shape: Shape) -> Float[Tensor, "B ..."]:
    """(B, out·k_h, in·k_w) → (B, out, in, k_h, k_w); matrices stay as they are."""
    if len(shape) == 2:
        return matrix
    taken = matrix.view(-1, shape[0], math.prod(shape[2:-1]), shape[1], shape[-1])
    return taken.transpose(2, 3).reshape(-1, *shape)


def _perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Decoder(nn.Module, ABC):
    """From vectors of nodes to tensors; what depends on the node alone is computed once."""

    @abstractmethod
    def codes(self, h: Float[Tensor, "B hid"]) -> Float[Tensor, "B ..."]:
        """What steers the weights of each node, whatever their shape."""

    @abstractmethod
    def matrices(
        self, codes: Float[Tensor, "B ..."], rows: int, columns: int, absolute_rows: bool
    ) -> Float[Tensor, "B rows columns"]:
        """Matrices of the nodes with these codes."""

    @abstractmethod
    def vectors(
        self, codes: Float[Tensor, "B ..."], n: int, absolute_rows: bool
    ) -> Float[Tensor, "B 2 n"]:
        """Pairs of vectors of the nodes with these codes."""

    def tensors(
        self, codes: Float[Tensor, "B ..."], shape: Shape, absolute_rows: bool
    ) -> Float[Tensor, "B ..."]:
        """Tensors of this shape, two axes or more, of the nodes with these codes."""
        return as_kernel(self.matrices(codes, *matrix_shape(shape), absolute_rows), shape)

    def forward(
        self, h: Float[Tensor, "B hid"], shape: Shape, absolute_rows: bool = False
    ) -> Float[Tensor, "B ..."]:
        """Predicted tensors, before normalisation.

        Args:
            h: (B, hid) vectors of nodes.
            shape: Of the tensor, two axes or more.
            absolute_rows: Row i is row i of the decoder's table whatever the length of the axis:
                for axes whose entries have a meaning each, such as the words of a vocabulary.

        Returns:
            One tensor of this shape for each node, along a first axis.

        Raises:
            ValueError: the shape needs more rows than the decoder has.
        """
        return self.tensors(self.codes(h), shape, absolute_rows)

    def pair(
        self, h: Float[Tensor, "B hid"], n: int, absolute_rows: bool = False
    ) -> Float[Tensor, "B 2 n"]:
        """Weight and bias of a norm of ``n`` channels (row 0, row 1); a bias takes row 1."""
        return self.vectors(self.codes(h), n, absolute_rows)

    def gain(self, fan_in: int, beta: float | int = 2) -> float:
        """What a matrix is multiplied by: sqrt(beta / fan_in), as for weights that are random."""
        return math.sqrt(beta / fan_in)


class FactorDecoder(Decoder):
    """A decoder of matrices A Bᵀ."""

    @abstractmethod
    def factors(
        self, codes: Float[Tensor, "B ..."], rows: int, columns: int, absolute_rows: bool = False
    ) -> tuple[Float[Tensor, "B rows rank"], Float[Tensor, "B columns rank"]]:
        """The two factors of the nodes with these codes.

        Raises:
            ValueError: more rows than the decoder has.
        """

    def matrices(
        self, codes: Float[Tensor, "B ..."], rows: int, columns: int, absolute_rows: bool
    ) -> Float[Tensor, "B rows columns"]:
        """Products of the factors."""
        A, B = self.factors(codes, rows, columns, absolute_rows)
        return A @ B.mT


class LowRankDecoder(FactorDecoder):
    """Weights of any shape as a product of two thin factors, the paper's decoder (LoGAH, App. B).

    A node's vector h gives 2r rows of r numbers, z = M₃ relu(M₂ relu(M₁ h)); M₄ widens each row to
    ``max_width`` numbers; read in order as 2·``max_width`` rows of r, the first half holds the
    rows of A and the second those of B, and W = A Bᵀ. Only the numbers that the asked shape needs
    are computed. For the default width that is one row of z for each factor.

    Args:
        hid: Width d of a node's vector.
        rank: r, the largest rank of a predicted matrix.
        max_width: K, the most rows and columns; vectors may have K / 2 entries.
    """

    def __init__(self, hid: int, rank: int, max_width: int = 32768) -> None:
        super().__init__()
        _positive(hid=hid, rank=rank, max_width=max_width)
        self.hid, self.rank, self.max_width = hid, rank, max_width
        self.trunk = _perceptron(hid, 4 * hid, 8 * hid)
        self.latent = nn.Linear(8 * hid, 2 * rank * rank)
        self.widen = nn.Linear(rank, max_width)

    def codes(self, h: Float[Tensor, "B hid"]) -> Float[Tensor, "B D"]:
        """What the last layers read: relu(M₂ relu(M₁ h))."""
        return F.relu(self.trunk(h))

    def vectors(
        self, codes: Float[Tensor, "B D"], n: int, absolute_rows: bool
    ) -> Float[Tensor, "B 2 n"]:
        """Products of the first 2n rows of A with the first of B, one half after the other."""
        A, B = self.factors(codes, 2 * n, 1)
        return (A @ B.mT).view(-1, 2, n)

    def factors(
        self, codes: Float[Tensor, "B D"], rows: int, columns: int, absolute_rows: bool = False
    ) -> tuple[Float[Tensor, "B rows rank"], Float[Tensor, "B columns rank"]]:
        """The two factors; row i is the same whatever their length, ``absolute_rows`` or not."""
        for needed in (rows, columns):
            if needed > self.max_width:
                raise ValueError(
                    f"a factor of {needed} rows needs max_width >= {needed}; it is {self.max_width}"
                )
        return self._rows(codes, 0, rows), self._rows(codes, self.rank, columns)

    def _rows(
        self, x: Float[Tensor, "B D"], start: int, count: int
    ) -> Float[Tensor, "B count rank"]:
        """The first ``count`` rows of r numbers in what rows ``start`` … of the latent become."""
        r, wanted = self.rank, count * self.rank
        latent_rows = -(-wanted // self.max_width)
        window = slice(start * r, (start + latent_rows) * r)
        z = F.relu(F.linear(x, self.latent.weight[window], self.latent.bias[window]))
        # A single row of the latent need not be widened further than it is read.
        width = wanted if latent_rows == 1 else self.max_width
        T = F.linear(z.view(-1, latent_rows, r), self.widen.weight[:width], self.widen.bias[:width])
        return T.flatten(1)[:, :wanted].reshape(-1, count, r)


class MeanFieldDecoder(FactorDecoder):
    """Low-rank weights whose rows are samples of a function of their relative place.

    Not in the paper: three changes that let widths be extrapolated. The rows of the factors are
    read from one table T(z) = M z + b of P rows, by linear interpolation at the place
    ``(i + ½) P / n − ½`` of row i of n; so axes of equal length share their channels, and a wider
    layer is a finer sampling of the same network. And W is scaled by sqrt(2·base_width) / fan_in
    (see :meth:`gain`): predicted weights add up coherently, in proportion to the width.

    Args:
        hid: Width d of a node's vector.
        rank: r, the largest rank of a predicted matrix.
        latent: q, numbers that steer each factor.
        table: P, rows of the table.
        base_width: Fan-in at which the scale equals sqrt(2 / fan_in).
        vocabulary: Rows of a table of its own for axes that are longer than ``table`` and whose
            entries have a meaning each. It is one matrix (vocabulary, rank), which the node does
            not steer; the other factor is.
    """

    def __init__(
        self,
        hid: int,
        rank: int,
        latent: int = 32,
        table: int = 96,
        base_width: int = 64,
        vocabulary: int = 0,
    ) -> None:
        super().__init__()
        _positive(hid=hid, rank=rank, latent=latent, table=table, base_width=base_width)
        self.hid, self.rank, self.q, self.base_width = hid, rank, latent, base_width
        self.trunk = _perceptron(hid, 4 * hid, 8 * hid, 2 * latent)
        self.M = nn.Parameter(torch.empty(table, rank, latent))
        self.b = nn.Parameter(torch.empty(table, rank))
        self.words = nn.Parameter(torch.empty(vocabulary, rank)) if vocabulary else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Table uniform within ± latent^-½; layers as torch does."""
        bound = self.q**-0.5
        for table in (self.M, self.b, self.words):
            if table is not None:
                nn.init.uniform_(table, -bound, bound)
        for layer in self.trunk:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    @property
    def table(self) -> int:
        """Rows P of the table."""
        return self.M.shape[0]

    def codes(self, h: Float[Tensor, "B hid"]) -> Float[Tensor, "B 2 latent"]:
        """What steers the two factors of each node."""
        return F.relu(self.trunk(h)).view(-1, 2, self.q)

    def factors(
        self,
        codes: Float[Tensor, "B 2 latent"],
        rows: int,
        columns: int,
        absolute_rows: bool = False,
    ) -> tuple[Float[Tensor, "B rows rank"], Float[Tensor, "B columns rank"]]:
        """The two factors: ``rows`` and ``columns`` samples of the table.

        Raises:
            ValueError: more absolute rows than the tables have.
        """
        zA, zB = codes.unbind(1)
        return self.rows(zA, rows, absolute_rows), self.rows(zB, columns)

    def vectors(
        self, codes: Float[Tensor, "B 2 latent"], n: int, absolute_rows: bool
    ) -> Float[Tensor, "B 2 n"]:
        """Products of the first two rows of the table for B with ``n`` samples of that for A."""
        zA, zB = codes.unbind(1)
        return self._table(zB, self.M[:2], self.b[:2]) @ self.rows(zA, n, absolute_rows).mT

    def rows(
        self, z: Float[Tensor, "B latent"], n: int, absolute: bool = False
    ) -> Float[Tensor, "B n rank"]:
        """``n`` rows of a factor."""
        P = self.table
        if absolute:
            if n > P:
                if self.words is None or n > len(self.words):
                    raise ValueError(
                        f"{n} rows with a meaning each need table or vocabulary >= {n}; table is "
                        f"{P}, vocabulary {0 if self.words is None else len(self.words)}"
                    )
                return self.words[:n].expand(len(z), -1, -1)
            M, b = self.M[:n], self.b[:n]
        else:
            below, weight = places(n, P)
            below, weight = below.to(self.M.device), weight.to(self.M)
            above = (below + 1).clamp(max=P - 1)
            if n < P:
                M = _mix(self.M, 0, below, above, weight[:, None, None])
                b = _mix(self.b, 0, below, above, weight[:, None])
            else:
                T = self._table(z, self.M, self.b)
                return _mix(T, 1, below, above, weight[:, None])
        return self._table(z, M, b)

    def _table(self, z: Tensor, M: Tensor, b: Tensor) -> Float[Tensor, "B n rank"]:
        return torch.addmm(b.flatten(), z, M.flatten(0, 1).T).view(-1, *b.shape)

    def gain(self, fan_in: int, beta: float | int = 2) -> float:
        """What a matrix is multiplied by: sqrt(beta·base_width) / fan_in."""
        return math.sqrt(beta * self.base_width) / fan_in


def _mix(table: Tensor, axis: int, below: Tensor, above: Tensor, weight: Tensor) -> Tensor:
    """Rows between rows. index_select, as its gradient is an addition and not a sort."""
    return torch.lerp(table.index_select(axis, below), table.index_select(axis, above), weight)


def places(n: int, table: int) -> tuple[Tensor, Tensor]:
    """Where ``n`` rows lie in a table: the row below each, and the weight of the row above."""
    at = ((torch.arange(n, dtype=torch.float64) + 0.5) * (table / n) - 0.5).clamp(0, table - 1)
    below = at.floor()
    return below.long(), at - below


class TileDecoder(Decoder):
    """Weights that are copies of one square tile, as the decoder of GHN-3 makes them.

    There to compare with: everything beyond the tile repeats.

    Args:
        hid: Width d of a node's vector.
        tile: Side of the tile.
    """

    def __init__(self, hid: int, tile: int = 24) -> None:
        super().__init__()
        _positive(hid=hid, tile=tile)
        self.hid, self.tile = hid, tile
        self.trunk = _perceptron(hid, 4 * hid, 8 * hid)
        self.square, self.line = nn.Linear(8 * hid, tile * tile), nn.Linear(8 * hid, 2 * tile)

    def codes(self, h: Float[Tensor, "B hid"]) -> Float[Tensor, "B D"]:
        """What the last layers read."""
        return F.relu(self.trunk(h))

    def matrices(
        self, codes: Float[Tensor, "B D"], rows: int, columns: int, absolute_rows: bool
    ) -> Float[Tensor, "B rows columns"]:
        """Copies of the tile; ``absolute_rows`` has no effect."""
        tile = self.square(codes).view(-1, self.tile, self.tile)
        i, j = (torch.arange(n, device=codes.device) % self.tile for n in (rows, columns))
        return tile[:, i][:, :, j]

    def vectors(
        self, codes: Float[Tensor, "B D"], n: int, absolute_rows: bool
    ) -> Float[Tensor, "B 2 n"]:
        """Copies of a line."""
        line = self.line(codes).view(-1, 2, self.tile)
        return line[..., torch.arange(n, device=codes.device) % self.tile]


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it has to be at least 1")


DECODERS: dict[str, Callable[..., Decoder]] = {
    "meanfield": MeanFieldDecoder, "reshape": LowRankDecoder, "tile": TileDecoder,
}  # fmt: skip
