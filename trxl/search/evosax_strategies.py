"""evosax's algorithms (Lange 2022, arXiv 2212.04180) by name, behind their ask and tell."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.errors import ConfigError, did_you_mean, shortened


def make_algorithm(name: str, population: int, num_dims: int, std: float, lr: float) -> Any:
    """An algorithm of evosax that moves `num_dims` numbers.

    Args:
      name: as evosax has it; underscores and case don't matter.
      population: how many it proposes at a time.
      std: its first deviation, where it has one.
      lr: the learning rate of Adam, where it has an optimiser.

    Raises:
      ConfigError: evosax is not installed, or has none of that name, or it takes no such sizes.
    """
    try:
        import optax
        from evosax import algorithms
    except ImportError as error:
        raise ConfigError(
            f"STRATEGY={name} is one of evosax's: pip install evosax, or use halving or pbt"
        ) from error

    def plain(text: str) -> str:
        return text.replace("_", "").lower()

    names = [known for known in dir(algorithms) if isinstance(getattr(algorithms, known), type)]
    found = [known for known in names if plain(known) == plain(name)]
    if not found:
        hint = did_you_mean(name, ["halving", "pbt", *names])
        raise ConfigError(f"unknown STRATEGY {shortened(name)}{hint}")
    kind = getattr(algorithms, found[0])
    parameters = inspect.signature(kind).parameters
    options = {}
    if "optimizer" in parameters:
        options["optimizer"] = optax.adam(lr)
    if "std_schedule" in parameters:
        options["std_schedule"] = optax.constant_schedule(std)
    try:
        algorithm = kind(population_size=population, solution=jnp.zeros(num_dims), **options)
    except Exception as error:  # of a package that is not ours
        raise ConfigError(f"STRATEGY={name} with {population} members: {error}") from error
    return algorithm


def start(algorithm: Any, key: jax.Array, mean: jax.Array, std: float) -> tuple[Any, Any]:
    """An algorithm's parameters and first state, around a mean (dims,)."""
    params = algorithm.default_params
    if hasattr(params, "std_init"):
        params = params.replace(std_init=std)
    if "population" not in inspect.signature(type(algorithm).init).parameters:
        return params, algorithm.init(key, mean, params)
    population = mean + std * jax.random.normal(key, (algorithm.population_size, mean.size))
    fitness = jnp.full(algorithm.population_size, jnp.inf)
    return params, algorithm.init(key, population, fitness, params)


def as_fitness(scores: Sequence[float]) -> jax.Array:
    """What evosax minimises: of scores that are not finite it is a little worse than the worst."""
    given = np.asarray(scores, np.float32)
    finite = np.isfinite(given)
    if not finite.any():
        return jnp.zeros(len(given))
    low, high = given[finite].min(), given[finite].max()
    return -jnp.asarray(np.where(finite, given, low - (high - low) / len(given) - 1e-6))


class Proposals:
    """Points between 0 and 1 that an algorithm proposes, and is told the scores of.

    It moves in numbers whose normal distribution function they are: its first proposals, of
    deviation 1 around 0, are spread evenly.

    Args:
      algorithm: of `make_algorithm`.
      seed: of all that is random.
      std: its first deviation.
    """

    def __init__(self, algorithm: Any, seed: int, std: float = 1.0):
        self._algorithm = algorithm
        self._key = jax.random.key(int(seed))
        mean = jnp.zeros(algorithm.num_dims)
        self._params, self._state = start(algorithm, self._next_key(), mean, std)

    def _next_key(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key

    def ask(self) -> np.ndarray:
        """(population, dims), from 0 to 1."""
        self._asked, self._state = self._algorithm.ask(self._next_key(), self._state, self._params)
        return np.asarray(jax.scipy.special.ndtr(self._asked))

    def tell(self, scores: Sequence[float]) -> None:
        """Takes the scores of what was asked for, in its order."""
        self._state, _ = self._algorithm.tell(
            self._next_key(), self._asked, as_fitness(scores), self._state, self._params
        )
