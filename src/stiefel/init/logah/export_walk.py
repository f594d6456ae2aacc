"""The computation graph of any module, by ``torch.export``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stiefel.init.logah.graph import NetGraph, Node, path_lengths

# A parameter that passes through one of these is still that parameter.
_SAME_PARAMETER = {
    "t", "transpose", "permute", "view", "reshape", "slice", "select", "expand", "unsqueeze",
    "squeeze", "to", "_to_copy", "alias", "detach", "detach_", "contiguous", "clone", "flatten",
    "unflatten", "split", "split_with_sizes", "chunk", "unbind", "getitem", "numpy_T", "lift_fresh",
    "expand_as", "view_as", "narrow", "mT", "adjoint",
}  # fmt: skip
_TURNS = {"t", "transpose", "permute", "numpy_T", "mT", "adjoint"}

_NORMS = {
    "layer_norm": "ln", "native_layer_norm": "ln", "group_norm": "ln", "native_group_norm": "ln",
    "instance_norm": "ln", "rms_norm": "rms_norm", "_fused_rms_norm": "rms_norm",
    "batch_norm": "bn", "cudnn_batch_norm": "bn", "native_batch_norm": "bn",
    "_native_batch_norm_legit": "bn", "_native_batch_norm_legit_no_training": "bn",
}  # fmt: skip
# Their matrix is stored as (in, out) unless it has been turned on the way.
_PRODUCTS = {"addmm", "mm", "matmul", "bmm", "baddbmm"}
_SUMS = {"add", "add_", "sub", "sub_", "rsub"}
_SCALINGS = {"mul", "mul_", "div", "div_"}


def default_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Inputs for models of transformers and timm, on the ``meta`` device.

    Raises:
        ValueError: the model is neither, so ``example_inputs`` have to be given.
    """
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        return {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}
    size = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", 3)
    if name == "pixel_values" and size is not None:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {name: torch.zeros(1, channels, height, width, device="meta")}
    shape = (getattr(model, "default_cfg", None) or {}).get("input_size")
    if shape is not None:
        return {"x": torch.zeros(1, *shape, device="meta")}
    raise ValueError(
        f"{type(model).__name__} does not say what it takes: give example_inputs, "
        "one batch as the tuple of its arguments or the dictionary of its keyword arguments"
    )


def graph_from_module(
    model: nn.Module,
    example_inputs: Any = None,
    max_path: int = 50,
) -> NetGraph:
    """The computation graph of a network, as the hypernetworks of the papers read it.

    A node is a parameter or an operation that matters (sums, attention, pooling, ...); a norm is
    one node with its weight and its bias; activations, reshapes and dropout are left out, their
    ends joined; one node ``input`` feeds what has no other source (Zhou et al. 2024, after GHN-3).
    Built from ``torch.export``, so any module that exports has a graph, whatever its code calls
    its layers. Nothing is computed: the model may lie on the ``meta`` device.

    Args:
        model: Any module. Exported in eval mode; its mode and parameters are left as they were.
        example_inputs: One batch: a tensor, the tuple of arguments, or a dictionary of keyword
            arguments. Values do not matter. May be left out for models of transformers and timm.
        max_path: Longest path that counts in ``A``.

    Returns:
        The graph; nodes in the order in which the network runs.

    Raises:
        TypeError: a parameter is not of a real floating type.
        ValueError: a parameter is not used by the network (named), the inputs are
            needed, or torch.export refuses the module.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise TypeError(f"parameter {name} is {parameter.dtype}; only real floats have a role")
    args, kwargs = _arguments(model, example_inputs)
    training = {m: m.training for m in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = torch.utils._pytree.tree_map(
        lambda v: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else
        torch.zeros_like(v, device=device) if isinstance(v, torch.Tensor) else v,
        (args, kwargs),
    )  # fmt: skip
    try:
        model.eval()
        with warnings.catch_warnings():
            # torch's own deprecations inside the export are none of the caller's business.
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} has no graph, torch.export refuses it: {reason}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    return _graph_of(model, exported, max_path)


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None:
        inputs = default_inputs(model)
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
        if hasattr(getattr(model, "config", None), "use_cache"):
            # The cache of keys and values is no part of the network.
            kwargs.setdefault("use_cache", False)
        return (), kwargs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


@dataclass(frozen=True)
class _Value:
    """What an intermediate value comes from: parameters (name → turned?), or nodes, or neither."""

    parameters: tuple[tuple[str, bool], ...] = ()
    nodes: frozenset[int] = frozenset()


class _Walk:
    """One pass over an exported program that collects the nodes."""

    def __init__(self) -> None:
        self.nodes = [Node("input")]
        self.owner: dict[str, int] = {}

    def add(
        self,
        op: str,
        parents: frozenset[int],
        parameters: tuple[str, ...] = (),
        turned: bool = False,
    ) -> int:
        self.nodes.append(Node(op, tuple(sorted(parents)) or (0,), parameters, turned))
        return len(self.nodes) - 1

    def call(self, op: str, inputs: list[_Value], ndims: Mapping[str, int]) -> _Value:
        """The value that an operation gives."""
        parameters = [pair for value in inputs for pair in value.parameters]
        active = [value.nodes for value in inputs if value.nodes]
        union = frozenset().union(*active)
        if not parameters:
            return _Value(nodes=self.operation(op, active, union))
        if len(parameters) == 1 and not active and op in _SAME_PARAMETER:
            name, turned = parameters[0]
            return _Value(parameters=((name, turned ^ (op in _TURNS)),))
        parameters.sort(key=lambda pair: -ndims[pair[0]] if ndims[pair[0]] > 1 else 0)
        if op in _NORMS:
            return _Value(nodes=self.norm(_NORMS[op], union, [name for name, _ in parameters]))
        for name, turned in parameters:
            union = self.parameter(op, name, turned, union, ndims[name])
        return _Value(nodes=union)

    def operation(
        self, op: str, active: list[frozenset[int]], union: frozenset[int]
    ) -> frozenset[int]:
        """What an operation without parameters leads on to."""
        if not union:
            return union
        joined = {
            "cat": "concat",
            **dict.fromkeys(_SUMS, "sum"),
            **dict.fromkeys(_SCALINGS, "gate"),
        }
        if op in {"softmax", "_softmax", "_safe_softmax"} or "scaled_dot_product" in op:
            kind = "msa"
        elif op == "mean" or op.startswith("adaptive_avg_pool"):
            kind = "glob_avg"
        elif op.startswith(("max_pool", "adaptive_max_pool")):
            kind = "max_pool"
        elif op.startswith("avg_pool"):
            kind = "avg_pool"
        elif op in joined and len(active) > 1 and len(union) > 1:
            kind = joined[op]
        else:
            return union
        return frozenset({self.add(kind, union)})

    def parameter(
        self, op: str, name: str, turned: bool, current: frozenset[int], ndim: int
    ) -> frozenset[int]:
        """The node of one parameter, behind the current ones."""
        if name in self.owner:
            return frozenset({self.add("sum", current | {self.owner[name]})})
        kind, transposed = _role(op, ndim, turned)
        if kind == "embed" and not current:
            # Looked up by constants: a table of positions.
            kind = "pos_enc"
        node = self.add(kind, current, (name,), transposed)
        self.owner[name] = node
        return frozenset({node})

    def norm(self, kind: str, current: frozenset[int], names: list[str]) -> frozenset[int]:
        """One node with weight and bias."""
        if any(name in self.owner for name in names):
            owners = frozenset(self.owner[name] for name in names if name in self.owner)
            return frozenset({self.add("sum", current | owners)})
        node = self.add(kind, current, tuple(names))
        self.owner.update(dict.fromkeys(names, node))
        return frozenset({node})


def _role(op: str, ndim: int, turned: bool) -> tuple[str, bool]:
    """Kind of a parameter's node, and whether its matrix is stored as (in, out)."""
    if op == "embedding" or op == "embedding_bag":
        return "embed", False
    if op == "linear" or op in _PRODUCTS:
        # linear takes (out, in); a plain product takes (in, out) unless it was turned on the way.
        return ("linear", turned if op == "linear" else not turned) if ndim > 1 else ("bias", False)
    if op.startswith(("conv", "_conv", "cudnn_conv", "mkldnn_conv")):
        return ("conv" if ndim > 1 else "bias"), "transpose" in op
    if op in _SUMS:
        return ("pos_enc" if ndim > 1 else "bias"), False
    if op in _SCALINGS:
        return "scale", False
    return "param", False


def _graph_of(model: nn.Module, exported: Any, max_path: int) -> NetGraph:
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        if canonical != name:
            tied[name] = canonical
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ndims = {name: len(shape) for name, shape in shapes.items()}
    inputs = exported.graph_signature.inputs_to_parameters
    users = set(exported.graph_signature.user_inputs)
    walk = _Walk()
    values: dict[Any, _Value] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in inputs:
                name = inputs[node.name]
                values[node] = _Value(parameters=((tied.get(name, name), False),))
            else:
                values[node] = _Value(nodes=frozenset({0}) if node.name in users else frozenset())
        elif node.op == "call_function":
            values[node] = walk.call(
                _aten_name(node.target), [values[n] for n in node.all_input_nodes], ndims
            )
        else:
            values[node] = _Value()
    missing = [name for name in shapes if name not in walk.owner]
    if missing:
        raise ValueError(
            f"the network does not use {missing[:5]}{' and more' if len(missing) > 5 else ''}: "
            "there is nothing to read about them in its graph"
        )
    A = path_lengths([node.parents for node in walk.nodes], max_path)
    return NetGraph(tuple(walk.nodes), shapes, A, tied)


def _aten_name(target: Any) -> str:
    """``aten.add.Tensor`` → ``add``."""
    packet = getattr(target, "overloadpacket", None)
    return getattr(packet, "__name__", None) or getattr(target, "__name__", str(target))
