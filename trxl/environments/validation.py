"""Checks of an environment, in shapes, before anything is compiled."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments.base import SingleEnvironment
from trxl.errors import ConfigError, one_line, shortened
from trxl.spaces import ActionSpace, Box, Discrete, MultiDiscrete, mask_size

NUMBERS = (jnp.floating, jnp.integer, jnp.bool_)

A_COUNT = "a whole number of at least 1"

RESULTS = ("obs", "state", "reward", "terminated", "truncated", "info")


def check_environment(name: str, env: SingleEnvironment, source: str = "") -> None:
    """Sees that an environment is what `SingleEnvironment` says; traces `reset` and `step` once.

    Args:
      name: how a message calls the environment.
      source: its file, if it is one; a message says in which line of it something was raised.

    Raises:
      ConfigError: it is not; one line names the attribute or the method, and what was expected.
    """
    check_attributes(name, env)
    check_shapes(name, env, source)


def check_attributes(name: str, env: SingleEnvironment) -> None:
    """Raises a ConfigError where a space or a size makes no sense."""
    require = requiring(name)
    space = getattr(env, "action_space", None)
    kinds = "action_space must be a Discrete, MultiDiscrete or Box of `environments`"
    require(isinstance(space, ActionSpace), kinds, shortened(space))
    check_action_space(name, space)
    obs_size: Any = getattr(env, "obs_size", None)
    require(is_count(obs_size), f"obs_size must be {A_COUNT}", shortened(obs_size))
    least = mask_size(env.action_space)
    require(obs_size >= least, f"obs_size must be at least {least}, the mask's size", str(obs_size))
    binary = env.num_binary
    wanted = f"num_binary must be at least {least}, since the mask is 0s and 1s"
    require(not least or (is_count(binary, 0) and binary >= least), wanted, shortened(binary))
    wanted = f"num_binary must be a whole number from 0 to obs_size = {obs_size}"
    require(is_count(binary, 0) and binary <= obs_size, wanted, shortened(binary))
    if env.grid is not None:
        first, end = env.grid.start, env.grid.start + env.grid.size
        wanted = f"grid must be among the num_binary = {binary} binary entries"
        require(first >= 0 and end <= binary, wanted, f"entries {first} to {end}")
    metrics = env.episode_metrics
    texts = isinstance(metrics, tuple) and all(isinstance(metric, str) for metric in metrics)
    require(texts, "episode_metrics must be a tuple of texts", shortened(metrics))
    agents, trial = env.num_agents, env.episodes_per_trial
    none_or_count = agents is None or is_count(agents)
    require(none_or_count, f"num_agents must be None or {A_COUNT}", shortened(agents))
    require(is_count(trial), f"episodes_per_trial must be {A_COUNT}", shortened(trial))


def check_action_space(name: str, space: Any) -> None:
    """Raises a ConfigError where it has no action, or bounds that are none."""
    require = requiring(name)
    match space:
        case Discrete(n=n):
            require(is_count(n), f"action_space.n must be {A_COUNT}", shortened(n))
        case MultiDiscrete(sizes=sizes):
            counts = isinstance(sizes, tuple) and sizes and all(map(is_count, sizes))
            what = f"action_space.sizes must be a tuple, each of it {A_COUNT}"
            require(counts, what, shortened(sizes))
        case Box(low=low, high=high):
            tuples = isinstance(low, tuple) and isinstance(high, tuple)
            same = tuples and len(low) == len(high) > 0
            what = "action_space.low and .high must be tuples of the same length"
            require(same, what, shortened((low, high)))
            below = all(a < b for a, b in zip(low, high, strict=True))
            require(below, "action_space.low must be below .high", shortened((low, high)))


def check_shapes(name: str, env: SingleEnvironment, source: str) -> None:
    """Raises a ConfigError where `reset` or `step` does not give what it should, or raises."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    obs_size = () if env.num_agents is None else (env.num_agents,)

    def trace(method: str, *arguments: Any) -> Any:
        return traced(f"{name}.{method}", getattr(env, method), arguments, source)

    def check_first(method: str, given: Any) -> Any:
        require = requiring(f"{name}.{method}")
        pair = isinstance(given, tuple) and len(given) == 2
        require(pair, "must return (obs, state)", described(given))
        check_obs(f"{name}.{method}", given[0], (*obs_size, env.obs_size))
        return given[1]

    state = check_first("reset", trace("reset", key))
    given = trace("step", key, state, action_of(env))
    require = requiring(f"{name}.step")
    whole = isinstance(given, tuple) and len(given) == len(RESULTS)
    require(whole, f"must return ({', '.join(RESULTS)})", described(given))
    obs, next_state, reward, terminated, truncated, info = given
    check_obs(f"{name}.step", obs, (*obs_size, env.obs_size))
    check_same_state(f"{name}.step", state, next_state)
    check_array(f"{name}.step", "reward", reward, obs_size, NUMBERS, "float32")
    for what, flag in (("terminated", terminated), ("truncated", truncated)):
        check_array(f"{name}.step", what, flag, (), (jnp.bool_, jnp.integer), "bool")
    require(isinstance(info, dict), "info must be a dict", described(info))
    for metric in env.episode_metrics:
        require(
            metric in info, f"info must have {metric!r} of episode_metrics", shortened(list(info))
        )
        check_array(f"{name}.step", metric, info[metric], (), NUMBERS, "float32")
    if "memory_boundary" in info:
        boundary = info["memory_boundary"]
        check_array(f"{name}.step", "memory_boundary", boundary, (), (jnp.bool_,), "bool")
    if env.num_agents is not None:
        out = trace("agents_done", state)
        check_array(f"{name}.agents_done", "what it returns", out, obs_size, (jnp.bool_,), "bool")
    later = check_first("next_episode", trace("next_episode", key, state))
    check_same_state(f"{name}.next_episode", state, later)


def action_of(env: SingleEnvironment) -> jax.ShapeDtypeStruct:
    """An action as `step` gets it."""
    agents = () if env.num_agents is None else (env.num_agents,)
    match env.action_space:
        case Discrete():
            return jax.ShapeDtypeStruct(agents, jnp.int32)
        case MultiDiscrete(sizes=sizes):
            return jax.ShapeDtypeStruct((*agents, len(sizes)), jnp.int32)
        case box:
            return jax.ShapeDtypeStruct((*agents, box.size), jnp.float32)


def traced(name: str, method: Callable, arguments: tuple[Any, ...], source: str) -> Any:
    """Traces a method: its result in shapes.

    Raises:
      ConfigError: it raises.
    """
    outputs = []

    def keep_structure(*given: Any) -> Any:
        outputs.append(method(*given))
        leaves, structure = jax.tree.flatten(outputs[0])
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        return jax.tree.unflatten(structure, arrays)

    try:
        return jax.eval_shape(keep_structure, *arguments)
    except (Exception, SystemExit) as error:
        if outputs and not isinstance(error, SystemExit):
            raise ConfigError(
                f"{name} must return arrays and numbers, but {one_line(error)}"
            ) from error
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if source and Path(frame.filename).resolve() == Path(source).resolve()
        ]
        where = f" in line {lines[-1]}" if lines else ""
        raise ConfigError(f"{name} raises {one_line(error)}{where}") from error


def check_obs(name: str, obs: Any, shape: tuple[int, ...]) -> None:
    check_array(name, "obs", obs, shape, (jnp.floating,), "float32")


def check_array(
    name: str, what: str, x: Any, shape: tuple[int, ...], kinds: tuple[Any, ...], dtype: str
) -> None:
    """Raises a ConfigError where `x` has another shape, or a type that is none of the kinds."""
    right = isinstance(x, jax.ShapeDtypeStruct) and x.shape == shape
    right = right and any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
    requiring(name)(right, f"{what} must be {dtype} of shape {shape}", described(x))


def check_same_state(name: str, before: Any, after: Any) -> None:
    """Raises a ConfigError where a state has other arrays than the first one."""
    require = requiring(name)
    old_structure, new_structure = map(str, map(jax.tree.structure, (before, after)))
    what = f"state must have the structure of reset's, {old_structure[:80]}"
    require(old_structure == new_structure, what, new_structure[:80])
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        same = old.shape == new.shape and old.dtype == new.dtype
        what = f"state{jax.tree_util.keystr(path)} must be {described(old)} as reset's"
        require(same, what, described(new))


def requiring(name: str) -> Callable[[Any, str, str], None]:
    """(condition, what must be, what is): raises a ConfigError where it does not hold."""

    def require(condition: Any, what: str, found: str) -> None:
        if not condition:
            raise ConfigError(f"{name}: {what}, not {found}")

    return require


def is_count(x: Any, low: int = 1) -> bool:
    """Returns whether x is an integer of at least `low` that an array can have."""
    whole = isinstance(x, int | np.integer) and not isinstance(x, bool)
    return whole and low <= int(x) < 2**31


def described(x: Any) -> str:
    """Describes a method's result in a few words."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return f"{x.dtype} of shape {x.shape}"
    if isinstance(x, tuple):
        return f"a tuple of {len(x)}"
    return f"a {type(x).__name__}" if x is not None else "None"
