"""The computation graph of a network: operations, shapes of parameters, distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor, nn

from stiefel.init.logah.ops import OPS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One operation, with the parameters that it owns."""

    op: str
    """One of :data:`stiefel.init.OPS`."""
    parents: tuple[int, ...] = ()
    """Nodes that it reads, all of them earlier."""
    parameters: tuple[str, ...] = ()
    """Names as in ``named_parameters()``. A norm owns its weight and its bias."""
    transposed: bool = False
    """Whether a matrix is stored as (in, out), as by ``Conv1D`` of transformers."""


@dataclass(frozen=True)
class NetGraph:
    """A network as a hypernetwork reads it.

    Made by :func:`graph_from_module`, :func:`gpt_graph` or :func:`vit_graph`.
    """

    nodes: tuple[Node, ...]
    parameter_shapes: dict[str, Shape]
    """Of every parameter, in the order of ``named_parameters()``."""
    A: Int[Tensor, "N N"]
    """int16: length of the shortest directed path from row to column; 0 where there is none, or
    none of at most ``max_path`` edges."""
    tied: dict[str, str] = field(default_factory=dict)
    """Further names of a parameter → the first one."""

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def ops(self) -> Int[Tensor, " N"]:
        """Index of each node's operation in :data:`stiefel.init.OPS`."""
        return torch.tensor([OPS.index(node.op) for node in self.nodes])

    @cached_property
    def names(self) -> list[str]:
        """Of each node: its first parameter, or its operation and number."""
        return [
            node.parameters[0] if node.parameters else f"{node.op}.{i}"
            for i, node in enumerate(self.nodes)
        ]

    @cached_property
    def shapes(self) -> list[Shape | None]:
        """Of each node: the shape of its first parameter, or None."""
        return [
            self.parameter_shapes[node.parameters[0]] if node.parameters else None
            for node in self.nodes
        ]

    @cached_property
    def edges(self) -> int:
        """How many direct edges there are."""
        return sum(len(node.parents) for node in self.nodes)

    @cached_property
    def degrees(self) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Direct edges into and out of each node."""
        direct = self.A == 1
        return direct.sum(0), direct.sum(1)

    @cached_property
    def pairs(self) -> tuple[Int[Tensor, "U 2"], Int[Tensor, "N N"]]:
        """The distinct pairs (A_ij, A_ji), and which of them each (i, j) has.

        There are a few dozen in a graph of hundreds of nodes, so what depends on a pair alone is
        computed for these.
        """
        key = self.A.to(torch.int32) * 65536 + self.A.T.to(torch.int32)
        distinct, index = torch.unique(key, return_inverse=True)
        return torch.stack([distinct // 65536, distinct % 65536], 1).long(), index

    @cached_property
    def heads(self) -> frozenset[int]:
        """Nodes whose output leaves the network: with parameters, and only their bias behind."""
        readers: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for parent in node.parents:
                readers[parent].append(i)
        ends = {i for i, node in enumerate(self.nodes) if node.parameters and not readers[i]}
        biases = {i for i in ends if self.nodes[i].op == "bias"}
        before = {p for i in biases for p in self.nodes[i].parents if readers[p] == [i]}
        return frozenset(ends | {p for p in before if self.nodes[p].parameters})

    def refill(self, model: nn.Module) -> NetGraph:
        """The same graph for a model that differs in sizes alone.

        Topology does not depend on widths, so one export serves all widths of one depth.

        Raises:
            ValueError: the names of the parameters differ.
        """
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if shapes.keys() != self.parameter_shapes.keys():
            odd = sorted(shapes.keys() ^ self.parameter_shapes.keys())
            raise ValueError(
                f"model is of another architecture than the graph: {odd[:5]} "
                f"{'and more ' if len(odd) > 5 else ''}are in only one of them"
            )
        fresh = replace(self, parameter_shapes=shapes)
        # What follows from the nodes alone need not be computed again.
        for name in ("ops", "names", "edges", "degrees", "pairs", "heads"):
            if name in self.__dict__:
                fresh.__dict__[name] = self.__dict__[name]
        return fresh


def path_lengths(parents: Sequence[Sequence[int]], max_path: int) -> Int[Tensor, "N N"]:
    """Length of the shortest directed path between every two nodes.

    Args:
        parents: Of each node, the nodes with an edge to it.
        max_path: Longer paths count as none.

    Returns:
        (N, N) int16; 0 where there is no path, and on the diagonal.

    Raises:
        ValueError: there is a cycle, or ``max_path`` is not in 1 … 32767.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components, shortest_path

    if not 1 <= max_path <= 32767:
        raise ValueError(f"max_path is {max_path}; it has to be in 1 … 32767")
    n = len(parents)
    rows = [p for ps in parents for p in ps]
    columns = [i for i, ps in enumerate(parents) for _ in ps]
    edges = csr_array(([1] * len(rows), (rows, columns)), shape=(n, n))
    strongly, labels = connected_components(edges, directed=True, connection="strong")
    if strongly != n or any(p == i for i, ps in enumerate(parents) for p in ps):
        counts = [0] * n
        for label in labels:
            counts[label] += 1
        inside = [i for i in range(n) if counts[labels[i]] > 1 or i in parents[i]]
        raise ValueError(f"the graph has a cycle through nodes {inside[:10]}")
    lengths = shortest_path(edges, method="D", unweighted=True)
    found = torch.from_numpy(lengths)
    return torch.where(found <= max_path, found, 0.0).to(torch.int16)
