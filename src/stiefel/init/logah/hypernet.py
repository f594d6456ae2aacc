"""LoGAH: a network that reads the graph of a network and gives all its weights."""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stiefel.init.logah.decoders import DECODERS, FactorDecoder
from stiefel.init.logah.encoder import GraphEncoder
from stiefel.init.logah.export_walk import graph_from_module
from stiefel.init.logah.graph import NetGraph
from stiefel.init.logah.ops import OPS, PUBLISHED_OPS, positions
from stiefel.init.logah.parts import Part, parts, squash

# (rank, layers, hid, heads) of the published sizes.
_PRESETS = {
    "tiny": (32, 3, 64, 8),
    "small": (90, 5, 128, 16),
    "base": (128, 5, 256, 16),
    "large": (256, 12, 256, 16),
}


@dataclass(frozen=True)
class InitReport:
    """What :meth:`LoGAH.init_` does to a model."""

    predicted: tuple[str, ...]
    """Parameters that get predicted values."""
    kept: tuple[str, ...]
    """Parameters that keep their own start: there is no rule for them, or they are frozen."""
    tied: Mapping[str, str]
    """Further names of a predicted parameter."""


class LoGAH(nn.Module):
    """Hypernetwork with a low-rank decoder (Zhou et al. 2024, arXiv 2405.16287).

    Trained once on many small networks (:class:`LoGAHTrainer`), it gives larger and wider ones a
    start in one pass. Expect a head start of some hundred steps, not a better end.

    Args:
        hid: Width of the vectors of nodes; a multiple of 4 and of ``heads``.
        layers: Attention layers of the graph encoder.
        heads: Attention heads.
        rank: Largest rank of a predicted matrix.
        decoder: ``"meanfield"`` extrapolates widths (:class:`MeanFieldDecoder`); ``"reshape"`` is
            the paper's (:class:`LowRankDecoder`); ``"tile"`` is GHN-3's, to compare with.
        max_width: Most rows of a factor of ``"reshape"``.
        vocab: Rows with a meaning each (words, classes): ``"table"`` predicts each row,
            ``"tile"`` repeats rows beyond the decoder's table, ``"keep"`` leaves such tensors at
            their own start.
        ops: Operations that it tells apart; any subset of :data:`OPS` with ``"input"``.
        norm: ``"fan_in"`` scales by the fan-in alone; ``"std"`` first divides by the standard
            deviation of the prediction, with a learned factor.
        strict: Refuse operations outside ``ops`` instead of reading them as ``"param"``.
        latent, table, base_width, vocabulary: Of :class:`MeanFieldDecoder`.
        tile: Of :class:`TileDecoder`.

    Raises:
        ValueError: sizes that do not fit one another, unknown names.
    """

    def __init__(
        self,
        hid: int = 64,
        layers: int = 3,
        heads: int = 8,
        rank: int = 32,
        decoder: Literal["meanfield", "reshape", "tile"] = "meanfield",
        max_width: int = 32768,
        vocab: Literal["table", "tile", "keep"] = "table",
        ops: Sequence[str] = OPS,
        *,
        norm: Literal["fan_in", "std"] = "fan_in",
        strict: bool = False,
        latent: int = 32,
        table: int = 96,
        base_width: int = 64,
        vocabulary: int = 0,
        tile: int = 24,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "hid": hid, "layers": layers, "heads": heads, "rank": rank, "decoder": decoder,
            "max_width": max_width, "vocab": vocab, "ops": list(ops), "norm": norm,
            "strict": strict, "latent": latent, "table": table, "base_width": base_width,
            "vocabulary": vocabulary, "tile": tile,
        }  # fmt: skip
        for name, value in (("hid", hid), ("layers", layers), ("heads", heads), ("rank", rank)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it has to be at least 1")
        if hid % 4 or hid % heads:
            raise ValueError(f"hid is {hid}; it has to be a multiple of 4 and of heads = {heads}")
        for name, value, known in (
            ("decoder", decoder, tuple(DECODERS)),
            ("vocab", vocab, ("table", "tile", "keep")),
            ("norm", norm, ("fan_in", "std")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; known are {', '.join(known)}")
        at, missing = positions(ops)
        self.vocab, self.norm, self.strict = vocab, norm, strict
        self._missing = set(missing)
        other = ops.index("param") if "param" in ops else ops.index("input")
        rows = torch.tensor([other if i < 0 else i for i in at])
        self.register_buffer("_rows", rows, persistent=False)
        self.encoder = GraphEncoder(len(ops), hid, layers, heads)
        own = {
            "meanfield": {"rank": rank, "latent": latent, "table": table,
                          "base_width": base_width, "vocabulary": vocabulary},
            "reshape": {"rank": rank, "max_width": max_width},
            "tile": {"tile": tile},
        }[decoder]  # fmt: skip
        self.decoder = DECODERS[decoder](hid, **own)
        # Predictions have to start small: near zero the first losses are those of a network that
        # says nothing, with unit variance they are worse and training sticks.
        self.log_gain = nn.Parameter(torch.tensor(-3.0)) if norm == "std" else None

    @classmethod
    def preset(cls, name: Literal["tiny", "small", "base", "large"], **changes: Any) -> LoGAH:
        """The published sizes (2.5, 21.4, 78.2 and 289.4 million parameters), paper's decoder.

        Args:
            name: ``"tiny"``, ``"small"``, ``"base"`` or ``"large"``.
            **changes: Arguments of the constructor that differ.

        Raises:
            ValueError: unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset is {name!r}; known are {', '.join(_PRESETS)}")
        rank, layers, hid, heads = _PRESETS[name]
        settings: dict[str, Any] = {"rank": rank, "layers": layers, "hid": hid, "heads": heads,
                    "decoder": "reshape", "ops": PUBLISHED_OPS, **changes}  # fmt: skip
        return cls(**settings)

    def extra_repr(self) -> str:
        """The settings in one line."""
        shown = {k: v for k, v in self.config.items() if k != "ops"}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())

    def embed(self, graph: NetGraph) -> Float[Tensor, "N hid"]:
        """Vectors of the nodes of a graph.

        Raises:
            KeyError: with ``strict``, a node's operation is not in the vocabulary.
        """
        foreign = {n.op: name for n, name in zip(graph.nodes, graph.names, strict=True)
                   if n.op in self._missing}  # fmt: skip
        if foreign:
            text = ", ".join(f"{op} (at {where})" for op, where in foreign.items())
            if self.strict:
                raise KeyError(f"unknown operations: {text}; known are {self.config['ops']}")
            warnings.warn(f"operations read as 'param': {text}", stacklevel=3)
        return self.encoder(graph, self._rows[graph.ops.to(self._rows.device)])

    def parts(self, graph: NetGraph) -> tuple[list[Part], list[str]]:
        """What of this graph is predicted, and the names of what keeps its own start."""
        return parts(graph, keep_vocabulary=self.vocab == "keep")

    def predict(self, graph: NetGraph) -> dict[str, Tensor]:
        """Weights of the network with this graph; differentiable.

        Args:
            graph: From :func:`graph_from_module`.

        Returns:
            Name → tensor, for ``torch.func.functional_call``; only predicted parameters, tied ones
            under their first name.

        Raises:
            ValueError: a tensor does not fit the decoder; names it.
            KeyError: with ``strict``, an unknown operation.
        """
        codes = self.decoder.codes(self.embed(graph))
        groups: dict[tuple[Any, ...], list[Part]] = defaultdict(list)
        for part in self.parts(graph)[0]:
            vector = part.form in ("gain", "offset")
            groups[(vector, part.decoded_shape, part.vocabulary, part.form)].append(part)
        found: dict[str, Tensor] = {}
        for members in groups.values():
            index = torch.tensor([part.node for part in members], device=codes.device)
            # index_select, as its gradient is an addition and not a sort.
            values = self._decode(codes.index_select(0, index), members[0])
            found.update((p.name, p.place(v)) for p, v in zip(members, values, strict=True))
        return found

    def forward(self, graph: NetGraph) -> dict[str, Tensor]:
        """The same as :meth:`predict`."""
        return self.predict(graph)

    def _decode(self, codes: Float[Tensor, "B ..."], part: Part) -> Float[Tensor, "B ..."]:
        """Scaled predictions for nodes that have parts of the same form and shape."""
        shape, words = part.decoded_shape, part.vocabulary
        rows = self._table_rows(shape[0]) if words else shape[0]
        try:
            if part.form in ("gain", "offset"):
                line = self.decoder.vectors(codes, rows, words)[:, 0 if part.form == "gain" else 1]
                value = squash(part.form, line)
            else:
                value = self.decoder.tensors(codes, (rows, *shape[1:]), words)
        except ValueError as error:
            raise ValueError(f"tensor {part.name} of shape {part.shape}: {error}") from error
        if part.form == "matrix":
            value = value * self._gain(part, value)
        if rows < shape[0]:
            value = value[:, torch.arange(shape[0], device=value.device) % rows]
        return value

    def _table_rows(self, n: int) -> int:
        """How many different rows an axis of ``n`` words has."""
        known = getattr(self.decoder, "table", n) if self.vocab == "tile" else n
        return min(n, max(known, self.config["vocabulary"]))

    def _repeats(self, part: Part) -> bool:
        rows = part.decoded_shape[0]
        return part.vocabulary and self._table_rows(rows) < rows

    def _gain(self, part: Part, value: Tensor) -> Tensor | float:
        if self.log_gain is None:
            return self.decoder.gain(part.fan_in(), part.beta)
        spread = value.std(dim=tuple(range(1, value.ndim)), keepdim=True)
        return self.log_gain.exp() / (spread + 1e-12) / part.fan_in() ** 0.5

    # Models ----------------------------------------------------------------------------------

    @torch.no_grad()
    def init_(
        self, model: nn.Module, graph: NetGraph | None = None, example_inputs: Any = None
    ) -> nn.Module:
        """Fill a model with predicted weights, in place, one tensor at a time.

        The memory beyond the model is that of the hypernetwork and, at most, one tensor. Types and
        devices of the parameters stay. What is not predicted is left alone: see :meth:`report`.

        Args:
            model: Any module on a real device; parameters may be DTensors.
            graph: Its graph; made here if not given.
            example_inputs: For :func:`graph_from_module`.

        Returns:
            ``model``.

        Raises:
            ValueError: the model is on the ``meta`` device, does not fit the graph or the decoder.
        """
        if graph is None:
            graph = graph_from_module(model, example_inputs)
        for _ in self.fill(model, graph):
            pass
        return model

    @torch.no_grad()
    def fill(self, model: nn.Module, graph: NetGraph) -> Iterator[str]:
        """:meth:`init_` step by step: yields the name of each parameter after it is filled."""
        graph = graph.refill(model)
        parameters = dict(model.named_parameters())
        lost = [name for name, p in parameters.items() if p.is_meta]
        if lost:
            raise ValueError(
                f"{lost[0]} is on the meta device; model.to_empty(device='cpu') gives it memory"
            )
        codes = self.decoder.codes(self.embed(graph))
        for part in self.parts(graph)[0]:
            target = parameters[part.name]
            if target.requires_grad:
                with torch.no_grad():
                    self._write(target, codes[part.node][None], part)
                yield part.name

    def _write(self, target: Tensor, codes: Float[Tensor, "1 ..."], part: Part) -> None:
        """One prediction into one parameter."""
        decoder = self.decoder
        direct = (
            type(target) in (nn.Parameter, Tensor)
            and len(part.shape) == 2
            and (target.dtype, target.device) == (codes.dtype, codes.device)
            and target.is_contiguous()
            and self.log_gain is None
            and not self._repeats(part)
        )
        if not (direct and isinstance(decoder, FactorDecoder)):
            target.copy_(_like(target, part.place(self._decode(codes, part)[0])))
            return
        rows, columns = part.decoded_shape
        try:
            A, B = decoder.factors(codes, rows, columns, part.vocabulary)
        except ValueError as error:
            raise ValueError(f"tensor {part.name} of shape {part.shape}: {error}") from error
        if part.form == "matrix":
            # On the thin factor, not on the product.
            B = B * decoder.gain(part.fan_in(), part.beta)
        left, right = (B[0], A[0]) if part.transposed else (A[0], B[0])
        torch.mm(left, right.T, out=target.data)

    def report(self, model: nn.Module, graph: NetGraph | None = None,
               example_inputs: Any = None) -> InitReport:  # fmt: skip
        """What :meth:`init_` would do to a model, without doing it."""
        if graph is None:
            graph = graph_from_module(model, example_inputs)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        found, kept = self.parts(graph.refill(model))
        predicted = tuple(part.name for part in found if part.name not in frozen)
        stay = tuple(dict.fromkeys([*kept, *sorted(frozen)]))
        return InitReport(predicted, stay, dict(graph.tied))

    # Files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the hypernetwork to one safetensors file, settings in its header; atomic."""
        from safetensors.torch import save

        from stiefel.storage import write_bytes

        header = {"stiefel.logah": json.dumps(self.config)}
        tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
        write_bytes(Path(path), save(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LoGAH:
        """A hypernetwork that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no such hypernetwork, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("stiefel.logah")
                if text is None:
                    raise ValueError(f"{path} was not written by LoGAH.save")
                settings = json.loads(text)
                # On the meta device first: a header that claims gigabytes gets none.
                with torch.device("meta"):
                    claimed = {n: list(t.shape) for n, t in cls(**settings).state_dict().items()}
                there = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                if claimed != there:
                    odd = next(n for n in claimed | there if claimed.get(n) != there.get(n))
                    raise ValueError(f"{path}: settings and tensors differ at {odd}")
                model = cls(**settings)
                model.load_state_dict({name: file.get_tensor(name) for name in there})
        except (SafetensorError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a hypernetwork: {error}") from error
        return model


def _like(target: Tensor, value: Tensor) -> Tensor:
    """``value`` in the type of ``target``, spread over devices if that is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(target.dtype)
    if isinstance(target, DTensor):
        return distribute_tensor(value.contiguous(), target.device_mesh, target.placements)
    return value
