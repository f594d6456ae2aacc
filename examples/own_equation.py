"""A network trained on an equation of your own, then adapted to other coefficients of it.

The equation here is Fisher's, with a drift. Replace ``FORMULA`` and ``PARAMETERS`` by yours.

python examples/own_equation.py --steps 200 --out build/equation
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from tiny_gpt2 import arguments

from stiefel.nn.lemon import (
    PROSE,
    PolishTokenizer,
    evaluate,
    finetune,
    operator_data,
    pde,
    pretrain,
)

FORMULA = "ut - nu*uxx + v*ux - r*u*(1 - u)"
PARAMETERS = {"nu": 3e-3, "v": 0.4, "r": 1.5}
SIZES = {"nx": 32, "nt": 32, "grid": 128}


def main() -> None:
    options = arguments("Train a network on an equation of your own.")

    # All that is needed for an equation: its formula. The solver is made from it.
    pde.register("own", None, FORMULA, PARAMETERS)
    data = operator_data(pde.sample("own", 200, seed=0, **SIZES))
    test = operator_data(pde.sample("own", 50, seed=1, **SIZES))
    generator = torch.Generator().manual_seed(0)
    model = PROSE(
        n_x=32, vocab=len(PolishTokenizer()), dim=32, heads=4, layers=(1, 1, 1, 2),
        generator=generator,
    )  # fmt: skip

    # Two rounds with a schedule each, so that a run can go on from between them.
    half = options.steps // 2
    checkpoint = options.out / "model.safetensors" if options.out else None
    if checkpoint and checkpoint.exists():
        model.load_state_dict(load_file(checkpoint))
        print(f"going on from step {half}")
    else:
        pretrain(model, data, half, batch=32, lr=2e-3, generator=generator)
        if checkpoint:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), checkpoint)
    generator.manual_seed(1)
    pretrain(model, data, options.steps - half, batch=32, lr=1e-3, generator=generator)
    print(f"relative L2 error on new trajectories {evaluate(model, test):.4f}")

    # Coefficients far from those of the training, and 20 trajectories of them.
    other = {"parameters": {"nu": 6e-3, "v": 0.8}, **SIZES}
    few = operator_data(pde.sample("own", 20, seed=2, **other))
    new = operator_data(pde.sample("own", 50, seed=3, **other))
    before = evaluate(model, new)
    finetune(model, few, steps=max(2, options.steps // 2), generator=generator)
    print(f"other coefficients: {before:.4f} before 20 trajectories of them")
    print(f"held-out loss {evaluate(model, new):.6f}")


if __name__ == "__main__":
    main()
