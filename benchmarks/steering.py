"""Many steering vectors on a few prompts: one batched tail pass against whole passes with a hook.

    python benchmarks/steering.py --json build/steering.json

SmolLM2 where its package is installed, else random weights of the same shape. Times are CPU times
of one thread, candidates in turn, median over rounds: on a shared machine only the ratios mean
something.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from layers import speed
from timing import SHORT, in_turn, run_sections

from stiefel.data import MissingDataError
from stiefel.diagnose.cylinder import ConceptCylinder, steer
from stiefel.papers.smollm2 import Decoder, Shape, Tail, load, padded, random_weights
from stiefel.papers.steering_prompts import STEMS

PROMPTS, ANGLES, LAYER = 10, 16, 25
SMOLLM2 = Shape(30, 576, 9, 3, 1536, 49152, 1e5, 1e-5)


def prompts() -> tuple[Decoder, list[list[int]], str]:
    """The model, token ids of ten prompts, and which model it is."""
    try:
        model, tokenizer = load()
    except MissingDataError:
        g = torch.Generator().manual_seed(0)
        ids = [torch.randint(49152, (6 + i % 3,), generator=g).tolist() for i in range(PROMPTS)]
        return Decoder(SMOLLM2, random_weights(SMOLLM2, 0)), ids, "random weights"
    return model, [tokenizer.encode(stem) for stem in STEMS[:PROMPTS]], "SmolLM2-135M-Instruct"


def scans(rounds: int) -> list[dict]:
    """A scan of 16 angles over 10 prompts, by tails from blocks 25 and 10 and by whole passes.

    A whole pass costs the same wherever the vector goes in, so it is timed for block 25 only.
    """
    model, rows, _ = prompts()
    ids, lengths = padded(rows)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    vectors = 50 * torch.randn(ANGLES, 576, generator=torch.Generator().manual_seed(1))
    block = model.blocks[LAYER]

    def whole() -> torch.Tensor:
        """A pass for every prompt and angle."""
        logits = []
        for row in rows:
            for vector in vectors:
                with steer(block, vector, "last", site="input"):
                    logits.append(model(torch.tensor([row])).logits[0])
        return torch.stack(logits).view(PROMPTS, ANGLES, -1)

    def batched() -> torch.Tensor:
        """A pass for every angle, the prompts as a batch."""
        logits = []
        for vector in vectors:
            with steer(block, vector, "last", site="input", mask=mask):
                logits.append(model(ids, lengths).logits)
        return torch.stack(logits, dim=1)

    found = []
    with torch.no_grad():
        tails = {layer: Tail(model, ids, lengths, layer) for layer in (LAYER, 10)}
        tasks: dict[str, Callable[[], object]] = {"whole": whole, "batched": batched}
        for layer, tail in tails.items():
            tasks[f"tail {layer}"] = lambda tail=tail: tail.logits(vectors[None])
            tasks[f"fresh {layer}"] = lambda layer=layer: Tail(model, ids, lengths, layer).logits(
                vectors[None]
            )
        torch.testing.assert_close(
            tails[LAYER].logits(vectors[None]), whole(), atol=2e-3, rtol=1e-3
        )
        seconds = in_turn(tasks, rounds)
    for layer, bound in ((LAYER, "≥ 10"), (10, "≥ 1")):
        for what, mine, peer, limit in (
            ("tail pass / 160 whole passes", "tail", "whole", bound),
            ("prompts and tail pass / 160 whole passes", "fresh", "whole", "≥ 1"),
            ("prompts and tail pass / 16 batched whole passes", "fresh", "batched", "≥ 1"),
        ):
            pair = {"ours": seconds[f"{mine} {layer}"], "peer": seconds[peer]}
            found.append(speed(f"block {layer}: {what}", pair, limit))
    return found


def planes(rounds: int) -> list[dict]:
    """Axis and plane of 26 differences of width 4096 against the plain decomposition."""
    D = torch.randn(26, 4096, generator=torch.Generator().manual_seed(0)) + 0.2

    def plain() -> torch.Tensor:
        axis = D.mean(0) / D.mean(0).norm()
        residuals = (D - (D @ axis)[:, None] * axis).double()
        return torch.linalg.svd(residuals, full_matrices=False).Vh[:2]

    ours = ConceptCylinder().fit(D).plane_
    torch.testing.assert_close((ours.double() * plain()).sum(-1).abs(), torch.ones(2).double())
    seconds = in_turn({"ours": lambda: ConceptCylinder().fit(D), "peer": plain}, rounds, fill=SHORT)
    return [speed("cylinder of 26 × 4096 / svd in float64", seconds, "≥ 1")]


SECTIONS: dict[str, Callable[[int], list[dict]]] = {"scans": scans, "planes": planes}


if __name__ == "__main__":
    description = __doc__.split("\n")[0]
    output = Path("build/steering.json")
    run_sections("Steering", description, SECTIONS, {}, output, about={"model": prompts()[2]})
