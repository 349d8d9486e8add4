"""Algorithms of evosax (Lange 2022, arXiv 2212.04180) by name, with ask and tell."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.errors import ConfigError, did_you_mean, shortened


@contextmanager
def default_jax() -> Iterator[None]:
    """Runs evosax without JAX_ENABLE_X64 and JAX_DEBUG_NANS, since its states start with NaN."""
    with jax.enable_x64(False), jax.debug_nans(False):
        yield


class Evosax:
    """Algorithm of evosax over vectors, and its `state`.

    Args:
      name: name in evosax; underscores and case are ignored.
      population: proposals per generation.
      mean: (dims,), initial mean.
      std: initial standard deviation, if the algorithm has one.
      lr: learning rate of Adam, if the algorithm has an optimiser.
      key: key of the initial state.

    Raises:
      ConfigError: evosax is not installed, the name is unknown, or the sizes are invalid.
    """

    @default_jax()
    def __init__(
        self, name: str, population: int, mean: jax.Array, std: float, lr: float, key: jax.Array
    ):
        self._algorithm = make_algorithm(name, population, mean.size, std, lr)
        self._params = self._algorithm.default_params
        if hasattr(self._params, "std_init"):
            self._params = self._params.replace(std_init=std)
        init = self._algorithm.init
        if "population" not in inspect.signature(init).parameters:
            self.state = init(key, mean, self._params)
        else:
            members = mean + std * jax.random.normal(key, (population, mean.size))
            self.state = init(key, members, jnp.full(population, jnp.inf), self._params)

    @default_jax()
    def ask(self, key: jax.Array) -> jax.Array:
        """Returns proposals to evaluate, (population, dims)."""
        self._asked, self.state = self._algorithm.ask(key, self.state, self._params)
        return self._asked

    @default_jax()
    def tell(self, key: jax.Array, scores: Sequence[float] | np.ndarray) -> None:
        """Updates the state with the scores (population,) of the last proposals.

        Scores that are not finite rank worst. Signs change, since evosax minimises.
        """
        scores = np.asarray(scores, np.float32)
        finite = scores[np.isfinite(scores)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
        worst = low - (high - low) / len(scores) - 1e-6
        fitness = -jnp.asarray(np.where(np.isfinite(scores), scores, worst))
        self.state, _ = self._algorithm.tell(key, self._asked, fitness, self.state, self._params)

    def solution(self) -> jax.Array:
        """Returns the mean of the distribution (dims,), else the best proposal."""
        mean = getattr(self.state, "mean", None)
        return self.state.best_solution if mean is None else mean


def make_algorithm(name: str, population: int, num_dims: int, std: float, lr: float) -> Any:
    """Makes evosax's own object, see `Evosax`."""
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
    options = {"optimizer": optax.adam(lr), "std_schedule": optax.constant_schedule(std)}
    parameters = inspect.signature(kind).parameters
    options = {option: x for option, x in options.items() if option in parameters}
    try:
        return kind(population_size=population, solution=jnp.zeros(num_dims), **options)
    except Exception as error:  # evosax may raise anything
        raise ConfigError(f"STRATEGY={name} with {population} members: {error}") from error
