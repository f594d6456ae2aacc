"""A computation that several fake papers share."""

import os
import time
from pathlib import Path


def square(config, report):
    with (Path(os.environ["STIEFEL_TEST_DIR"]) / "squares.txt").open("a") as file:
        file.write(f"{config['n']}\n")
    time.sleep(0.3)
    return {"value": config["n"] ** 2, "loss": float("inf")}
