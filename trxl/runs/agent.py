"""Trained agent, for a loop of your own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trxl.config import expanded
from trxl.distributions import sample_per_row, sample_uniformly
from trxl.environments import named_by_user
from trxl.errors import ConfigError
from trxl.rollout import empty_memory
from trxl.runs.parameters import file_of_seed, fits, read_file, read_params, saved_seeds
from trxl.runs.saved_config import check_saved
from trxl.spaces import obs_space
from trxl.statistics import init_normalizer, network_input
from trxl.training import Algorithm, Start, init_params

ENVIRONMENT_ARGUMENT = 'environment="{0}" (on the command line ENV_NAME={0})'


class AgentMemory(NamedTuple):
    """Caches of the last steps, and the number of steps that belong to the current episode."""

    caches: Any
    t: jax.Array  # () int32, slot that the next step writes
    reach: jax.Array  # (B,) int32


class Agent(NamedTuple):
    """Trained agent for a loop of your own, as jitted functions."""

    initial_memory: Callable
    """`initial_memory(batch)` returns the empty memory of `batch` environments."""
    act: Callable
    """`act(memory, obs, done, key)` does a step of all environments and returns (action, memory).

    obs is (batch, obs_size) float32, as from `make_env`. done is (batch,) bool, whether obs begins
    a new episode, which resets the memory.
    """
    config: dict[str, Any]
    """Config of the run, with the suite's default reset strategy and without mirrored rows."""
    look: Callable
    """`look(memory, obs, done, key)` is `act` and returns (action, memory, attention).

    attention is (batch, L, H, M+1), the weights of ages 0 .. M. Without attention layers L is 0.
    """
    make_env: Callable
    """`make_env(config, num_envs)` of the algorithm."""

    def environment(self, num_envs: int = 1) -> Any:
        """Returns the batched environment of the agent's config."""
        return self.make_env(self.config, num_envs)


def load_agent(
    folder: str | Path,
    known: Mapping[str, Algorithm],
    seed: int | None = None,
    greedy: bool = False,
    algorithm: Algorithm | None = None,
    environment: str | None = None,
) -> Agent:
    """Loads the agent of a run, see `evaluate_PPO_trXL.load_agent`.

    Args:
      known: algorithms by the name in a saved config.
    """
    paths = saved_seeds(Path(expanded(str(folder))))
    path = file_of_seed(paths, min(paths) if seed is None else seed)
    beside = path.with_name(path.name.replace("params", "config"))
    start = read_params(path)
    config = read_file(beside)
    algorithm = resolve_algorithm(str(config.pop("ALGORITHM", "PPO")), known, algorithm)
    config = check_saved(config, algorithm, str(beside))
    config["ENV_NAME"] = named_by_user(config["ENV_NAME"], environment, ENVIRONMENT_ARGUMENT)
    misfit = f"{path} does not fit {beside.name} beside it"
    return make_agent(config, start, algorithm, greedy, misfit)


def make_agent(
    config: dict[str, Any], start: Start, algorithm: Algorithm, greedy: bool, misfit: str
) -> Agent:
    """Makes an agent of parameters and statistics.

    Args:
      config: checked config.
      misfit: message of the error if they don't fit the config.

    Raises:
      ConfigError: they don't fit, or the environment can't be made.
    """
    # Shared levels would correlate the returns, and mirrored rows don't play.
    config = {**config, "RESET_STRATEGY": None, "MIRRORS": False}
    env = algorithm.make_env(config, 1)
    network = algorithm.make_network(config, env.action_space, obs_space(env))
    window_mem = config["WINDOW_MEM"]
    if not fits(start, fresh_agent(config, env, network, algorithm)):
        raise ConfigError(misfit)
    params, normalizer = start

    def initial_memory(batch: int) -> AgentMemory:
        caches = network.apply(params, empty_memory(config, batch), method="init_cache")
        return AgentMemory(caches, jnp.int32(0), jnp.zeros(batch, jnp.int32))

    def look(memory: AgentMemory, obs: jax.Array, done: jax.Array, key: jax.Array):
        obs, done, batch = jnp.asarray(obs), jnp.asarray(done), memory.reach.shape
        for name, x, wanted in (("obs", obs, (*batch, env.obs_size)), ("done", done, batch)):
            if x.shape != wanted:
                raise ConfigError(f"{name} must have the shape {wanted}, not {x.shape}")
        reach = jnp.where(done, 0, memory.reach)
        (policy, _, caches, _), seen = network.apply(
            params,
            *(network_input(normalizer, obs), memory.caches, memory.t, reach),
            method="step",
            mutable=["intermediates"],
        )
        keys = jax.random.split(key, len(obs))
        action = policy.mode() if greedy else sample_per_row(policy, keys)
        t = (memory.t + 1) % (window_mem + 1)
        memory = AgentMemory(caches, t, jnp.minimum(reach + 1, window_mem))
        return action, memory, attention_of(seen)

    def act(memory: AgentMemory, obs: jax.Array, done: jax.Array, key: jax.Array):
        return look(memory, obs, done, key)[:2]

    functions = jax.jit(initial_memory, static_argnums=0), jax.jit(act), jax.jit(look)
    return Agent(functions[0], functions[1], config, functions[2], algorithm.make_env)


def resolve_algorithm(
    name: str, known: Mapping[str, Algorithm], given: Algorithm | None = None
) -> Algorithm:
    """Returns the algorithm that a run was trained with.

    Args:
      name: name in the saved config.
      known: algorithms by name.
      given: the user's own algorithm.

    Raises:
      ConfigError: the run was trained with another algorithm, or with an unknown one.
    """
    if given is not None and given.name != name:
        raise ConfigError(f"the run was trained by {name}, not by {given.name}")
    if given is None and name not in known:
        raise ConfigError(
            f"the run was trained by {name}, which is none of {', '.join(known)}; give it as"
            " the argument `algorithm`"
        )
    return given or known[name]


def fresh_agent(config: dict[str, Any], env: Any, network: Any, algorithm: Algorithm) -> Start:
    """Returns the shapes of fresh `behaviour_params` and statistics."""

    def fresh() -> Start:
        params = init_params(config, network, env.obs_size, jax.random.key(0))
        acting = algorithm.behaviour_params(algorithm.init(config, params))
        return Start(acting, init_normalizer(config, env))

    return jax.eval_shape(fresh)


def attention_of(seen: Any) -> jax.Array:
    """Stacks the attention weights that layers recorded, (B, L, H, M+1)."""
    layers = seen.get("intermediates", {}).get("transformer", {})
    weights = [layers[f"layers_{i}"]["attention"][0] for i in range(len(layers))]
    return jnp.stack(weights, axis=1) if weights else jnp.zeros((1, 0))


def random_agent(agent: Agent) -> Agent:
    """Makes an agent for the same environment that acts uniformly over legal actions."""
    action_space = agent.environment().action_space

    def act(memory: Any, obs: jax.Array, done: jax.Array, key: jax.Array):
        return sample_uniformly(action_space, obs, jax.random.split(key, len(obs))), memory

    def look(memory: Any, obs: jax.Array, done: jax.Array, key: jax.Array):
        return *act(memory, obs, done, key), attention_of({})

    return Agent(lambda batch: (), act, agent.config, look, agent.make_env)
