"""The same mean and variance from neural-tangents, for ``permutation.py``: prints one JSON line.

    PYTHON_WITH_NEURAL_TANGENTS benchmarks/permutation_peer.py K N_ONES ROUNDS

neural-tangents 0.6.5, the last release, needs an older JAX and numpy below 2, so it runs in an
environment of its own: jax 0.4.25, tf2jax 0.3.6, numpy 1.26, scipy 1.12.
"""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import neural_tangents as nt
from neural_tangents import stax


def main() -> None:
    """Time a compiled prediction at one input, kernels included, in float64 and one process."""
    k, ones, rounds = (int(v) for v in sys.argv[1:])
    jax.config.update("jax_enable_x64", True)
    layers = stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1))
    kernel_fn = jax.jit(layers[2], static_argnums=(2,))
    train = jnp.eye(k, dtype=jnp.float64)
    x = (jnp.arange(k) < ones).astype(jnp.float64)[None] / ones**0.5

    def whole() -> tuple:
        predict = nt.predict.gradient_descent_mse_ensemble(kernel_fn, train, train, diag_reg=0.0)
        return jax.block_until_ready(predict(x_test=x, get="ntk", compute_cov=True))

    predict = nt.predict.gradient_descent_mse_ensemble(kernel_fn, train, train, diag_reg=0.0)

    def query() -> tuple:
        return jax.block_until_ready(predict(x_test=x, get="ntk", compute_cov=True))

    result = {"version": nt.__version__, "jax": jax.__version__}
    for name, task in (("whole", whole), ("query", query)):
        mean, cov = task()
        times = []
        for _ in range(rounds):
            start = time.process_time()
            task()
            times.append(time.process_time() - start)
        result[f"{name}_seconds"] = statistics.median(times)
        result["moments"] = [float(mean[0, 0]), float(mean[0, -1]), float(cov[0, 0])]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
