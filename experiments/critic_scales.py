"""Compares scales of critics that classify: `python experiments/critic_scales.py [SCALE ...]`.

Trains critics on known returns, without an environment: 60 updates as PPO makes them, each of 4
epochs of 8 minibatches over 1,024 new states. The mean return of a state is (0.5 + 0.25 f) c, f a
random function with mean 0 and variance 1. Prints for each task the root mean square error of the
predicted mean over the last 5 updates, before each trains on its states, and the mean error, both
in standard deviations of the mean return over states.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trxl.distributions import Bins, squash, unsquash
from trxl.statistics import (
    init_decaying_moments,
    preserve_outputs,
    update_return_moments,
    value_scale,
)

INPUTS, WIDTH, STATES, MINIBATCHES, EPOCHS, UPDATES = 8, 64, 1024, 8, 4, 60
SEEDS = (100, 101)
TASKS = [("exact", 1), ("exact", 22), ("exact", 500), ("exact", -1000)]
TASKS += [("noisy", 1), ("noisy", 22), ("noisy", 500), ("noisy", -1000)]
TASKS += [("win", 1), ("win", 500), ("rare", 1)]


def make_task(kind: str, c: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns states (UPDATES, STATES, INPUTS), their returns and mean returns.

    `noisy`: the noise varies as much as the means. `win`, `rare`: the return is c or 0.
    """
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(INPUTS, 32)) / INPUTS**0.5 * 1.5
    second = rng.normal(size=32) / 32**0.5
    states = rng.normal(size=(UPDATES, STATES, INPUTS)).astype(np.float32)
    f = np.tanh(states @ first) @ second
    f = (f - f.mean()) / f.std()
    if kind in ("win", "rare"):
        chance = 1 / (1 + np.exp(-1.5 * f if kind == "win" else 7 - 2.5 * f))
        returns, mean = c * (rng.random(f.shape) < chance), c * chance
        return states, returns.astype(np.float32), mean.astype(np.float32)
    mean = c * (0.5 + 0.25 * f)
    noise = (kind != "exact") * 0.25 * c * rng.normal(size=f.shape)
    return states, (mean + noise).astype(np.float32), mean.astype(np.float32)


def symlog(x: jax.Array) -> jax.Array:
    """sgn(x) ln(|x| + 1) (Hafner et al. 2023, arXiv 2301.04104)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(y: jax.Array) -> jax.Array:
    """The inverse of `symlog`."""
    return jnp.sign(y) * jnp.expm1(jnp.abs(y))


class Scale(NamedTuple):
    """A critic: in which units it predicts, and whether it classifies."""

    bins: Bins | None = None  # None: a number, by the squared error
    popart: bool = False  # whether it predicts returns normalised by their moments
    to: Callable = lambda x: x  # from these to those of the bins, and back
    back: Callable = lambda x: x

    def value(self, outputs: jax.Array) -> jax.Array:
        """(..., outputs) to (...), the mean that they stand for."""
        if self.bins is None:
            return outputs[..., 0]
        return self.back(self.bins.mean(outputs))

    def loss(self, outputs: jax.Array, returns: jax.Array) -> jax.Array:
        """The mean loss of outputs (..., outputs) for returns (...)."""
        if self.bins is None:
            return 0.5 * jnp.mean((outputs[..., 0] - returns) ** 2)
        return jnp.mean(self.bins.cross_entropy(outputs, self.to(returns)))


def gaussian(number: int, limit: float) -> Bins:
    """Returns bins with the targets of HL-Gauss."""
    return Bins(number, limit, squashed=False, sigma=0.75)


SCALES = {
    "number-popart": Scale(popart=True),
    "popart-10-51": Scale(gaussian(51, 10), popart=True),
    "symlog": Scale(gaussian(101, 10), to=symlog, back=symexp),
    "h": Scale(gaussian(101, 100), to=squash, back=unsquash),
}


def network(params: Any, states: jax.Array) -> jax.Array:
    """The critic: states (..., INPUTS) to outputs (..., outputs)."""
    for name in ("first", "second"):
        states = jax.nn.relu(states @ params[name]["kernel"] + params[name]["bias"])
    return states @ params["last"]["kernel"] + params["last"]["bias"]


def init(scale: Scale) -> Any:
    """Returns fresh parameters of the network."""
    outputs, gain = (1, 1.0) if scale.bins is None else (scale.bins.number, 0.01)
    layers = (INPUTS, WIDTH, 2**0.5), (WIDTH, WIDTH, 2**0.5), (WIDTH, outputs, gain)
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        name: {
            "kernel": jax.nn.initializers.orthogonal(gain)(key, (rows, columns)),
            "bias": jnp.zeros(columns),
        }
        for name, key, (rows, columns, gain) in zip(
            ("first", "second", "last"), keys, layers, strict=True
        )
    }


def train(scale: Scale, data: Any) -> tuple[jax.Array, jax.Array]:
    """Trains on a task: mean squared and mean error, (UPDATES,) each, before each update."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-4, eps=1e-5))

    def update(carry, inputs):
        params, opt_state, moments, key = carry
        states, returns, mean = inputs
        old = value_scale(moments)
        error = old.denormalize(scale.value(network(params, states))) - mean
        if scale.popart:
            moments = update_return_moments(moments, returns, None, 0.95, None)
            new = value_scale(moments)
            returns = new.normalize(returns)
            if scale.bins is None:
                params = params | {"last": preserve_outputs(params["last"], old, new)}
        key, *keys = jax.random.split(key, 1 + EPOCHS)
        rows = jnp.stack([jax.random.permutation(key, STATES) for key in keys])

        def step(carry, rows):
            params, opt_state = carry
            gradient = jax.grad(lambda p: scale.loss(network(p, states[rows]), returns[rows]))(
                params
            )
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        batches = rows.reshape(EPOCHS * MINIBATCHES, -1)
        (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), batches)
        errors = jnp.mean(error**2) / jnp.var(mean), jnp.mean(error) / jnp.std(mean)
        return (params, opt_state, moments, key), errors

    params = init(scale)
    start = params, optimizer.init(params), init_decaying_moments(), jax.random.key(1)
    return jax.lax.scan(update, start, data)[1]


def main(names: list[str]) -> None:
    """Prints the errors of each scale as rows of a table."""
    data = [make_task(*task, seed) for task in TASKS for seed in SEEDS]
    data = jax.tree.map(lambda *x: jnp.stack(x), *data)
    print("| scale | " + " | ".join(f"{kind} {c:,}" for kind, c in TASKS) + " |")
    print("| --- " * (1 + len(TASKS)) + "|")
    for name in names:
        squared, error = jax.jit(jax.vmap(partial(train, SCALES[name])))(data)
        shape = len(TASKS), len(SEEDS), UPDATES
        last = (np.asarray(x).reshape(shape)[..., -5:].mean((1, 2)) for x in (squared, error))
        cells = [f"{square**0.5:.2f} ({mean:+.2f})" for square, mean in zip(*last, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [*SCALES])
