"""Orthogonal adapters and adapter merges against PEFT's LoRA, each ratio beside its bound.

    python benchmarks/adapters.py [--json FILE] [--rounds N]

CPU time, one thread, candidates in turn, median over rounds: on a shared machine only ratios mean
something. PEFT is needed; the merges use the shapes of a model of one billion parameters (hidden
2,048, 16 blocks, 7 matrices each), random adapters of rank 16 and no model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from layers import row, speed
from safetensors.torch import save_file
from timing import in_turn
from torch import Tensor, nn

from stiefel.merge import (
    Adapter,
    LayerUpdate,
    OrthogonalAdapter,
    OrthogonalAdapters,
    Projection,
    add_orthogonal_adapters,
    merge_adapters,
    merge_lora_adapters,
)

RANK = 16
TOKENS = 1024
BLOCKS = 16
# Llama 3.2 1B: out × in of a block.
SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}
ADAPTERS = 10


class Constant(nn.Module):
    """In place of a base layer: its output, already there."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        """The same whatever comes."""
        return self.y


def layers(n: int, m: int) -> dict[str, nn.Module]:
    """One linear layer with our adapter and with PEFT's LoRA."""
    ours = OrthogonalAdapter(nn.Linear(m, n), RANK, adapter_id="a")
    model = nn.Sequential(nn.Linear(m, n))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    return {"ours": ours, "peer": peft.get_peft_model(model, config).base_model.model[0]}


def adapter_passes(rounds: int) -> list[dict[str, Any]]:
    """The adapter alone: the base's product is the same on both sides and taken out."""
    found = []
    for n, m in ((2048, 2048), (2048, 512), (512, 2048)):
        pair, x = layers(n, m), torch.randn(TOKENS, m, requires_grad=True)
        y, g = torch.randn(TOKENS, n, requires_grad=True), torch.randn(TOKENS, n)
        pair["ours"].base = Constant(y)
        pair["peer"].base_layer = Constant(y)
        outputs = {name: layer(x) for name, layer in pair.items()}
        learned = {
            name: [p for p in layer.parameters() if p.requires_grad] for name, layer in pair.items()
        }

        def backward(name: str, out=outputs, x=x, g=g, learned=learned) -> None:
            torch.autograd.grad(out[name], [x, *learned[name]], g, retain_graph=True)

        def forward(name: str, pair=pair, x=x) -> None:
            with torch.no_grad():
                pair[name](x)

        what = f"adapter {m} → {n}, {TOKENS} tokens"
        for kind, run, bound in (("backward", backward, "≥ 1.2"), ("forward", forward, "≥ 1")):
            seconds = in_turn({k: lambda k=k, run=run: run(k) for k in pair}, rounds, fill=0.05)
            found.append(speed(f"{what}, {kind}: LoRA / ours", seconds, bound))
    return found


def training_step(rounds: int) -> list[dict[str, Any]]:
    """Forward, backward and AdamW of a stack of adapted layers with their base."""
    torch.manual_seed(0)
    widths = (512, 1024, 512, 1024, 512)
    names = [str(2 * i) for i in range(len(widths) - 1)]

    def stack() -> nn.Sequential:
        parts = [
            p for i in range(len(names)) for p in (nn.Linear(widths[i], widths[i + 1]), nn.GELU())
        ]
        return nn.Sequential(*parts)

    ours = stack()
    handle = add_orthogonal_adapters(ours, RANK, adapter_id=0, target_modules=names)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
    theirs = peft.get_peft_model(stack(), config)
    models = {"ours": ours, "peer": theirs}
    learned = {
        "ours": list(handle.parameters()),
        "peer": [p for p in theirs.parameters() if p.requires_grad],
    }
    x = torch.randn(TOKENS, widths[0])
    optimizers = {name: torch.optim.AdamW(p, lr=1e-4, fused=True) for name, p in learned.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        models[name](x).square().mean().backward()
        optimizers[name].step()

    seconds = in_turn({name: lambda name=name: step(name) for name in models}, rounds)
    ours_ms, peer_ms = (1e3 * seconds[name] for name in ("ours", "peer"))
    sizes = {
        name: sum(s["exp_avg"].numel() for s in o.state.values()) / 1e3
        for name, o in optimizers.items()
    }
    return [
        row("training step, 4 layers: ours / LoRA", ours_ms, peer_ms, ours_ms / peer_ms, "≤ 1"),
        row(
            "optimizer state: ours / LoRA", sizes["ours"], sizes["peer"],
            sizes["ours"] / sizes["peer"], "≤ 0.6", "k numbers",
        ),
    ]  # fmt: skip


def names() -> dict[str, tuple[int, int]]:
    """All adapted layers of the model of one billion parameters."""
    return {
        f"model.layers.{i}.{name}": shape for i in range(BLOCKS) for name, shape in SHAPES.items()
    }


def handle(identity: int) -> OrthogonalAdapters:
    """An adapter as read from a compact file: A alone, B has to be computed."""
    g = torch.Generator().manual_seed(identity)
    layers = {
        name: LayerUpdate(
            Projection(m, RANK, identity, name), torch.randn(n, RANK, generator=g), 1.0
        )
        for name, (n, m) in names().items()
    }
    return OrthogonalAdapters(identity, layers)


def seconds_of(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def absolute(what: str, seconds: float, bound: str) -> dict[str, Any]:
    """A row whose bound is on seconds."""
    return {**row(what, seconds, 0.0, seconds, bound, "CPU s"), "peer": None}


def merges(folder: Path) -> list[dict[str, Any]]:
    """Ten adapters of the large model: summed, written, folded."""
    handles = [handle(i) for i in range(ADAPTERS)]
    found = []
    seconds = seconds_of(lambda: merge_adapters(handles))
    found.append(absolute(f"{ADAPTERS} orthogonal adapters summed, 1 B shapes", seconds, "≤ 10"))
    block = {n: s for n, s in names().items() if ".layers.0." in n}
    parts = [OrthogonalAdapters(h.adapter_id, {n: h.layers[n] for n in block}) for h in handles]
    model = nn.Module()
    for name, (n, m) in block.items():
        parent = model
        for step in name.split(".")[:-1]:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        layer = nn.Linear(m, n, bias=False, dtype=torch.bfloat16)
        parent.add_module(name.rpartition(".")[2], layer)
    seconds = BLOCKS * seconds_of(lambda: merge_adapters(parts, mode="fold", model=model))
    what = f"the same folded into bfloat16 weights ({BLOCKS} × one block)"
    found.append(absolute(what, seconds, "≤ 10"))
    paths = [write_lora(folder / f"lora{i}", i) for i in range(ADAPTERS)]
    seconds = seconds_of(lambda: merge_lora_adapters(paths, folder / "cat"))
    found.append(absolute(f"{ADAPTERS} LoRA files into one, linear, 1 B shapes", seconds, "≤ 10"))
    few = [write_lora(folder / f"few{i}", i, blocks=1) for i in range(ADAPTERS)]
    seconds = BLOCKS * seconds_of(lambda: merge_lora_adapters(few, folder / "svd", rank=RANK))
    what = f"the same back to rank {RANK} ({BLOCKS} × one block)"
    found.append(absolute(what, seconds, "≤ 10"))
    return found


def write_lora(folder: Path, seed: int, blocks: int = BLOCKS) -> Path:
    """A LoRA of the large model as PEFT stores it, bfloat16."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (n, m) in names().items():
        if int(name.split(".")[2]) < blocks:
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, m, generator=g).bfloat16()
            tensors[f"{key}.lora_B.weight"] = torch.randn(n, RANK, generator=g).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=sorted({n.rpartition(".")[2] for n in SHAPES})
    )
    config.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def errors(folder: Path) -> list[dict[str, Any]]:
    """Relative error of the merged update, weights (1, 1), (1, -1) and (0.5, 0.5)."""
    found = []
    for weights in ([1.0, 1.0], [1.0, -1.0], [0.5, 0.5]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(256, 256))
        base = plain[0].weight.detach().clone()
        config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(plain, config, adapter_name="one")
        model.add_adapter("two", config)
        place = Path(tempfile.mkdtemp(dir=folder))
        model.save_pretrained(str(place))
        layer = model.base_model.model[0]
        wanted = sum(
            w * layer.get_delta_weight(name)
            for w, name in zip(weights, ("one", "two"), strict=True)
        )
        model.add_weighted_adapter(["one", "two"], weights, "sum", combination_type="linear")
        merge_lora_adapters([place / "one", place / "two"], place / "out", weights)
        merged = Adapter(place / "out").fold("0.weight", torch.zeros_like(base))

        def error(delta: Tensor, wanted=wanted) -> float:
            return float((delta - wanted).norm() / wanted.norm())

        ours, theirs = error(merged), error(layer.get_delta_weight("sum"))
        what = f"error of the merged ΔW, linear, weights {weights}"
        found.append(row(what, ours, theirs, ours, "≤ 1e-6", "relative"))
    return found


def main() -> None:
    """Run all, print each figure beside its bound, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds per timing, at least 5")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = [
            *adapter_passes(options.rounds),
            *training_step(options.rounds),
            *merges(Path(name)),
            *errors(Path(name)),
        ]
    for line in rows:
        peer = "" if line["peer"] is None else f"PEFT {line['peer']:.4g}"
        print(
            f"{line['what']:<66} ours {line['ours']:10.4g}  {peer:<15} {line['unit']:<9} "
            f"{line['ratio']:8.3g}  {line['bound']:<7} {line['met']}"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"torch": torch.__version__, "peft": peft.__version__, "rows": rows})
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
