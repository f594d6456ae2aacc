"""Draw from a database of images, then from another one, without training again.

    python examples/generate/image_database.py --steps 1200 --out grid.png

A small network is trained on the handwritten digits 0 to 4. It then gets a database of 5 to 9,
which it has never seen. The picture shows each sample above the database images that it saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from stiefel.generate import (
    DCTEncoder,
    ImageDatabase,
    RetrievalDenoiser,
    RetrievalDiffusion,
    copy_report,
    save_grid,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=Path("grid.png"))
    options = parser.parse_args()

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 8, 8)
    low, high = images[labels < 5], images[labels >= 5]

    encoder = DCTEncoder(24).fit(low)
    database = ImageDatabase(low, encoder)
    generator = torch.Generator().manual_seed(0)
    network = RetrievalDenoiser(
        64, database.width, width=48, blocks=2, inner=32, generator=generator
    )
    model = RetrievalDiffusion(network).fit(low, database, steps=options.steps, seed=0)
    print(f"loss {model.losses[:20].mean():.4f} -> {model.losses[-20:].mean():.4f}")

    swapped = model.swap_database(ImageDatabase(high, encoder))
    samples, rows = swapped.sample(16, steps=25, generator=generator, return_neighbours=True)
    save_grid(options.out, samples, swapped.database.images[rows])
    for name, other in (("old", model.database), ("new", swapped.database)):
        print(f"distance to the {name} database {copy_report(samples, other).mean:.2f}")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
