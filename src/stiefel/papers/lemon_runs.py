"""The experiments behind the LeMON card: pretraining on families, then few samples of a new one.

Data come from the solvers of ``stiefel.nn.lemon.pde`` alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from stiefel.nn.lemon import (
    PROSE,
    MetaLearner,
    OperatorData,
    PolishTokenizer,
    evaluate,
    finetune,
    operator_data,
    pde,
    predict,
    pretrain,
    split_task,
)
from stiefel.nn.lemon.tokenizer import LAPTOP_OPERATORS, LAPTOP_VARIABLES

Report = Callable[[float, str], None]

# Sheet: ε of the conservation laws, raised so that 128 points resolve the shocks.
PARAMETERS = {"burgers": {"eps": 0.03}, "sin_flux": {"eps": 0.03}}
# Trajectories per drawn parameter set; the paper has 50 of 512,000.
PER_DRAW = 5
# Embeddings, feed-forward maps of the decoder, head: 6,672 of 82,688 weights at rank 8.
LORA_TARGETS = (r"_embedding\.", r"^decoder\..*\.ffn\.", r"^head\.")
RATES = {"pretrain": 2e-3, "scratch": 2e-3, "full": 1e-3, "lora": 3e-3}
WEIGHT_DECAY, NOISE = 1e-4, 0.02
META = {"inner_lr": 0.05, "inner_steps": 5, "tasks": 2, "support": 10, "query": 20}
# Streams of random numbers: what is drawn for one purpose does not move what another draws.
TEST, TRAIN, FEW = 1, 2, 3
STARTS = 1_000_000


def tokenizer() -> PolishTokenizer:
    """The 1,036 tokens of the laptop experiment."""
    return PolishTokenizer(LAPTOP_VARIABLES, LAPTOP_OPERATORS)


def trajectories(family: str, count: int, config: Mapping[str, Any], part: int) -> OperatorData:
    """Examples of one family: 16 of its first times in, 16 of its last times out, half of each."""
    sample = pde.sample(
        family,
        count,
        nx=config["nx"],
        nt=config["nt"],
        grid=config["grid"],
        seed=10 * config["seed"] + part,
        parameters=PARAMETERS.get(family),
        per_draw=config["per_draw"],
        tokenizer=tokenizer(),
    )
    return operator_data(sample)


def network(config: Mapping[str, Any], start: int = 0) -> PROSE:
    """Untrained; every seed has several starts."""
    generator = torch.Generator().manual_seed(config["seed"] + STARTS * start)
    model = PROSE(
        config["nx"],
        len(tokenizer()),
        config["dim"],
        config["heads"],
        config["layers"],
        ffn=config["ffn"],
        generator=generator,
    )
    return model.to(config["device"])


def run(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """One way to start (untrained, or pretrained on ``families``), and every held-out family.

    Config: seed, families, held_out, few (sample counts), starts, lora, meta, and the sizes.

    Returns:
        Relative L2 errors on new trajectories by ``"method family count"``, means over ``starts``;
        losses, weights counted, and a picture of fields.
    """
    families = config["families"]
    parts = [trajectories(f, config["count"], config, TRAIN) for f in families]
    result: dict[str, Any] = {}
    found: list[dict[str, float]] = []
    for start in range(config["starts"]):
        model = network(config, start)
        if families:
            result["losses"] = pretrained(model, parts, config)
            report((start + 0.5) / config["starts"], f"{len(families)} families")
        models = {"full": model}
        if config["meta"]:
            models["meta"] = meta_trained(model, parts, config)
        found.append({})
        for family in config["held_out"]:
            found[-1] |= adapt(models, family, config, start, result)
        report((start + 1) / config["starts"], f"adapted after {len(families)} families")
    result["errors"] = {name: fmean(e[name] for e in found) for name in found[0]}
    result["total"] = sum(p.numel() for p in model.parameters())
    return result


def pretrained(
    model: PROSE, parts: Sequence[OperatorData], config: Mapping[str, Any]
) -> list[float]:
    """Train on all families together; the losses."""
    done = pretrain(
        model,
        OperatorData.cat(parts),
        config["pretrain_steps"],
        batch=config["batch"],
        lr=RATES["pretrain"],
        weight_decay=WEIGHT_DECAY,
        noise=NOISE,
        generator=torch.Generator().manual_seed(config["seed"]),
        progress=False,
    )
    return list(done.losses)


def adapt(
    models: Mapping[str, PROSE],
    family: str,
    config: Mapping[str, Any],
    start: int,
    result: dict[str, Any],
) -> dict[str, float]:
    """Fine-tune copies of every model on few samples of ``family``; their errors."""
    test = trajectories(family, config["test"], config, TEST)
    few = trajectories(family, max(config["few"]), config, FEW)
    errors = {}
    if config["families"]:
        errors[f"zero {family}"] = evaluate(models["full"], test)
    for method, count in methods(models, config):
        model = copy.deepcopy(models.get(method, models["full"]))
        way = "lora" if method == "lora" else "full"
        done = finetune(
            model,
            few[:count],
            config["steps"],
            way,
            lr=RATES[way if config["families"] else "scratch"],
            rank=config["rank"],
            targets=LORA_TARGETS,
            noise=NOISE,
            generator=torch.Generator().manual_seed(config["seed"] + STARTS * start),
            progress=False,
        )
        errors[f"{method} {family} {count}"] = evaluate(model, test)
        if method == "lora":
            result["trained"] = done.trained
        if method == "full" and count == min(config["few"]):
            last = predict(model, test[:1])[0, -1, :, 0]
            result[f"field {family}"] = {
                "input": test.u_in[0, 0, :, 0].tolist(),
                "target": test.u_out[0, -1, :, 0].tolist(),
                "prediction": last.tolist(),
            }
    return errors


def methods(models: Mapping[str, PROSE], config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What is tried with how many samples; meta-trained weights with the fewest only."""
    tried = [("full", count) for count in config["few"]]
    if config["lora"]:
        tried += [("lora", count) for count in config["few"]]
    return tried + [("meta", min(config["few"]))] * ("meta" in models)


def meta_trained(start: PROSE, parts: Sequence[OperatorData], config: Mapping[str, Any]) -> PROSE:
    """PAML from the pretrained weights: tasks drawn uniformly from the families."""
    model = copy.deepcopy(start)
    learner = MetaLearner(
        model,
        META["inner_lr"],
        int(META["inner_steps"]),
        outer_lr=RATES["full"],
        weight_decay=WEIGHT_DECAY,
    )
    generator = torch.Generator().manual_seed(config["seed"])
    for _ in range(config["meta"]):
        drawn = torch.randint(len(parts), (int(META["tasks"]),), generator=generator)
        learner.outer_step([
            split_task(
                parts[i], int(META["support"]), int(META["query"]), generator=generator
            )
            for i in drawn.tolist()
        ])  # fmt: skip
    return model
