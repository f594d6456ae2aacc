"""OrthoReg: what the penalty costs, alone and in a training step, each ratio beside its bound.

    python benchmarks/orthoreg.py --json build/orthoreg.json

CPU times of one thread, candidates in turn, median over rounds: on a shared machine only the ratios
mean something. The steps need transformers and peft; without them they are left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from layers import row, speed
from rich.console import Console
from rich.table import Table as RichTable
from timing import in_turn
from torch import Tensor, nn

from stiefel.regularize import OrthoReg, orthoreg_loss, orthoreg_loss_lowrank

SIZE, RANK = 1024, 8


def formula(delta: Tensor) -> Tensor:
    """The authors' line, left to autograd."""
    gram = delta @ delta.T if delta.shape[0] < delta.shape[1] else delta.T @ delta
    return torch.linalg.norm(gram - torch.eye(gram.shape[0]))


def penalties(rounds: int) -> list[dict]:
    """Forward and backward of one layer of 1,024 × 1,024."""
    generator = torch.Generator().manual_seed(0)
    delta = (torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5).requires_grad_()
    b = torch.randn(SIZE, RANK, generator=generator, requires_grad=True)
    a = torch.randn(RANK, SIZE, generator=generator, requires_grad=True)
    dense = {
        "ours": lambda: torch.autograd.grad(orthoreg_loss(delta), delta),
        "peer": lambda: torch.autograd.grad(formula(delta), delta),
    }
    low = {
        "ours": lambda: torch.autograd.grad(orthoreg_loss_lowrank(b, a, 0.5), (b, a)),
        "peer": lambda: torch.autograd.grad(formula(0.5 * b @ a), (b, a)),
    }
    many = [torch.randn(64, 64, generator=generator).requires_grad_() for _ in range(48)]
    layers = nn.ParameterList(many)
    reg = OrthoReg(layers, reference={f"{i}": torch.zeros(64, 64) for i in range(48)})

    def each() -> object:
        return torch.autograd.grad(sum(formula(x) for x in layers), list(layers))

    grouped = {
        "ours": lambda: torch.autograd.grad(reg.loss(), list(layers)),
        "peer": each,
    }
    return [
        speed(
            f"LoRA, {SIZE}², r = {RANK} / the dense formula on s·B·A",
            in_turn(low, rounds, fill=0.05),
            "≥ 100",
        ),
        speed(f"dense, {SIZE}² / the formula under autograd", in_turn(dense, rounds), "≥ 1.3"),
        speed(
            "48 layers of 64² together / one by one",
            in_turn(grouped, rounds, fill=0.05),
            "≥ 1",
        ),
    ]


def language_model() -> nn.Module:
    """A Llama of four layers, width 256, that starts at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def step_of(
    model: nn.Module, task: Callable[[], Tensor], penalty: OrthoReg | None
) -> Callable[[], None]:
    """A training step by AdamW with clipping, with or without the penalty."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        loss = task()
        if penalty is not None:
            loss = loss + penalty.loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def compare(
    what: str, model: nn.Module, task: Callable[[], Tensor], rounds: int, bound: str, **options: int
) -> dict:
    """Time of a step with the penalty over that of one without.

    A sample holds as many steps as the penalty's period.
    """
    penalised = step_of(model, task, OrthoReg(model, lam=0.1, **options))
    plain = step_of(model, task, None)
    every = options.get("every", 1)

    def repeated(step: Callable[[], None]) -> Callable[[], None]:
        return lambda: [step() for _ in range(every)] and None

    seconds = in_turn({"ours": repeated(penalised), "peer": repeated(plain)}, rounds, fill=0.2)
    ours, peer = (1e3 * seconds[n] / every for n in ("ours", "peer"))
    return row(what, ours, peer, ours / peer, bound)


def steps(rounds: int) -> list[dict]:
    """A step with the penalty over a step without, same model, batch and optimizer."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (16, 64), generator=generator)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(
        language_model(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linear)
    )
    whole = language_model()
    whole.get_input_embeddings().requires_grad_(False)

    def of(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: model(input_ids=tokens, labels=tokens).loss

    torch.manual_seed(0)
    digits = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)
    )
    x, y = torch.randn(64, 64, generator=generator), torch.randint(2, (64,), generator=generator)

    def answer() -> Tensor:
        return nn.functional.cross_entropy(digits(x), y)

    batch = "1,024 tokens"
    return [
        compare(f"step, LoRA r = {RANK}, Llama of width 256, {batch}", adapted, of(adapted),
                rounds, "≤ 1.15"),
        compare(f"step, all matrices, the same, {batch}", whole, of(whole), rounds, "≤ 1.6"),
        compare("step, all matrices, the same, every = 4", whole, of(whole), rounds, "≤ 1.6",
                every=4),
        compare("step, trunk of the card, 64 rows (no bound)", digits, answer, rounds, "≥ 0"),
        compare("the same, every = 4 (no bound)", digits, answer, rounds, "≥ 0", every=4),
    ]  # fmt: skip


def main() -> None:
    """Run all, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds per timing, at least 5")
    parser.add_argument("--json", type=Path, default=Path("build/orthoreg.json"))
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    torch.set_num_threads(1)
    console = Console()
    rows = penalties(options.rounds)
    missing = [n for n in ("transformers", "peft") if not importlib.util.find_spec(n)]
    if missing:
        console.print(f"steps are left out; for them: pip install {' '.join(missing)}")
    else:
        rows += steps(options.rounds)
    shown = RichTable(title="OrthoReg", title_justify="left")
    for key in rows[0]:
        shown.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for line in rows:
        shown.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in line.values()))
    console.print(shown)
    result = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "rounds": options.rounds,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()
