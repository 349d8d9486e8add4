"""Checks of an environment before a run is compiled, by shapes and by random play."""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.config import SHARED_KEYS
from trxl.distributions import sample_uniformly
from trxl.environments.base import Mirror, SingleEnvironment
from trxl.errors import OWN_PACKAGE, ConfigError, one_line, shortened
from trxl.spaces import (
    ActionSpace,
    Box,
    Discrete,
    Grid,
    MultiDiscrete,
    action_mask,
    mask_size,
    obs_space,
    pack_obs,
    unpack_obs,
)

NUMBERS = (jnp.floating, jnp.integer, jnp.bool_)

A_COUNT = "a whole number from 1 to 2**31 - 1"

RESULTS = ("obs", "state", "reward", "terminated", "truncated", "info")

STEPS_PLAYED = 100
"""Number of steps that `check_values` plays."""


def check_environment(name: str, env: SingleEnvironment, own: Any = None) -> dict[str, Any]:
    """Checks that an environment follows `SingleEnvironment`, by tracing `reset` and `step`.

    Args:
      name: name of the environment in messages.
      own: the user's object, to which `reset` and `step` must not write.

    Returns:
      the info of a step, as shapes.

    Raises:
      ConfigError: an attribute or a method is wrong. One line says what was expected.
    """
    check_attributes(name, env)
    return check_shapes(name, env, own)


def check_attributes(name: str, env: SingleEnvironment) -> None:
    """Raises a ConfigError if a space or a size is invalid."""
    space = getattr(env, "action_space", None)
    kinds = "action_space must be a Discrete, MultiDiscrete or Box of `environments`"
    require(name, isinstance(space, ActionSpace), kinds, shortened(space))
    check_action_space(name, space)
    obs_size: Any = getattr(env, "obs_size", None)
    binary, mask = env.num_binary, mask_size(env.action_space)
    since = ", as the action mask has so many 0s and 1s" if mask else ""
    wanted = f"obs_size must be a whole number of at least {max(mask, 1)}{since}"
    require(name, is_count(obs_size, max(mask, 1)), wanted, shortened(obs_size))
    wanted = f"num_binary must be a whole number from {mask} to obs_size = {obs_size}{since}"
    require(name, is_count(binary, mask) and binary <= obs_size, wanted, shortened(binary))
    if env.grid is not None:
        require(name, isinstance(env.grid, Grid), "grid must be a Grid", shortened(env.grid))
        first, end = env.grid.start, env.grid.start + env.grid.size
        wanted = f"grid must be among the num_binary = {binary} binary entries"
        require(name, first >= 0 and end <= binary, wanted, f"entries {first} to {end}")
    metrics = env.episode_metrics
    texts = isinstance(metrics, tuple) and all(isinstance(metric, str) for metric in metrics)
    require(name, texts, "episode_metrics must be a tuple of texts", shortened(metrics))
    agents, trial = env.num_agents, env.episodes_per_trial
    none_or_count = agents is None or is_count(agents)
    require(name, none_or_count, f"num_agents must be None or {A_COUNT}", shortened(agents))
    require(name, is_count(trial), f"episodes_per_trial must be {A_COUNT}", shortened(trial))
    strategy, choices = env.default_reset_strategy, SHARED_KEYS["RESET_STRATEGY"].choices
    wanted = f"default_reset_strategy must be one of {', '.join(choices)}"
    require(name, strategy in choices, wanted, shortened(strategy))


def check_action_space(name: str, space: Any) -> None:
    """Raises a ConfigError if the space has no actions, or invalid bounds."""
    match space:
        case Discrete(n=n):
            require(name, is_count(n), f"action_space.n must be {A_COUNT}", shortened(n))
        case MultiDiscrete(sizes=sizes):
            counts = isinstance(sizes, tuple) and sizes and all(map(is_count, sizes))
            what = f"action_space.sizes must be a tuple, each of it {A_COUNT}"
            require(name, counts, what, shortened(sizes))
        case Box(low=low, high=high):
            tuples = isinstance(low, tuple) and isinstance(high, tuple)
            same = tuples and len(low) == len(high) > 0
            what = "action_space.low and .high must be tuples of the same length"
            require(name, same, what, shortened(space))
            below = all(a < b for a, b in zip(low, high, strict=True))
            require(name, below, "action_space.low must be below .high", shortened(space))


def check_shapes(name: str, env: SingleEnvironment, own: Any) -> dict[str, Any]:
    """Traces the methods, and raises a ConfigError for wrong results or exceptions.

    Returns:
      the info of a step, as shapes.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    obs_size = () if env.num_agents is None else (env.num_agents,)

    def trace(method: str, *arguments: Any) -> Any:
        where = f"{name}.{method}"
        call = partial(traced, where, getattr(env, method), arguments)
        return without_writing(where, call, own)

    def check_first(method: str, given: Any) -> Any:
        pair = isinstance(given, tuple) and len(given) == 2
        require(f"{name}.{method}", pair, "must return (obs, state)", described(given))
        check_obs(f"{name}.{method}", given[0], (*obs_size, env.obs_size))
        return given[1]

    state = check_first("reset", trace("reset", key))
    given = trace("step", key, state, action_of(env))
    whole = isinstance(given, tuple) and len(given) == len(RESULTS)
    require(f"{name}.step", whole, f"must return ({', '.join(RESULTS)})", described(given))
    obs, next_state, reward, terminated, truncated, info = given
    check_obs(f"{name}.step", obs, (*obs_size, env.obs_size))
    check_same_state(f"{name}.step", state, next_state)
    check_array(f"{name}.step", "reward", reward, obs_size, NUMBERS, "float32")
    for what, flag in (("terminated", terminated), ("truncated", truncated)):
        check_array(f"{name}.step", what, flag, (), (jnp.bool_, jnp.integer), "bool")
    require(f"{name}.step", isinstance(info, dict), "info must be a dict", described(info))
    metrics = dict(flat(info))
    for metric in env.episode_metrics:
        what = f"info must have {metric!r} of episode_metrics"
        require(f"{name}.step", metric in metrics, what, shortened(list(metrics)))
        check_array(f"{name}.step", metric, metrics[metric], (), NUMBERS, "float32")
    if "memory_boundary" in info:
        boundary = info["memory_boundary"]
        check_array(f"{name}.step", "memory_boundary", boundary, (), (jnp.bool_,), "bool")
    if env.num_agents is not None:
        out = trace("agents_done", state)
        check_array(f"{name}.agents_done", "what it returns", out, obs_size, (jnp.bool_,), "bool")
    check_mirrors(name, env)
    later = check_first("next_episode", trace("next_episode", key, state))
    check_same_state(f"{name}.next_episode", state, later)
    return info


def check_mirrors(name: str, env: SingleEnvironment) -> None:
    """Raises a ConfigError if `mirrors` are no functions of an observation and of an action."""
    tuples = isinstance(env.mirrors, tuple) and all(isinstance(x, Mirror) for x in env.mirrors)
    require(name, tuples, "mirrors must be a tuple of Mirror", shortened(env.mirrors))
    obs, action = jax.ShapeDtypeStruct((env.obs_size,), jnp.float32), action_of(env)
    kinds = (jnp.floating,) if isinstance(env.action_space, Box) else (jnp.integer,)
    for mirror in env.mirrors:
        where = f"{name}.mirrors"
        check_obs(where, traced(where, mirror.obs, (obs,)), obs.shape)
        mirrored = traced(where, mirror.action, (action,))
        check_array(where, "action", mirrored, action.shape, kinds, str(action.dtype))


def action_of(env: SingleEnvironment) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of the action that `step` receives."""
    agents = () if env.num_agents is None else (env.num_agents,)
    match env.action_space:
        case Discrete():
            return jax.ShapeDtypeStruct(agents, jnp.int32)
        case MultiDiscrete(sizes=sizes):
            return jax.ShapeDtypeStruct((*agents, len(sizes)), jnp.int32)
        case box:
            return jax.ShapeDtypeStruct((*agents, box.size), jnp.float32)


def traced(name: str, method: Callable, arguments: tuple[Any, ...]) -> Any:
    """Traces a method; returns its result as shapes.

    Raises:
      ConfigError: the method raises an exception.
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
                f"{name} must return arrays and numbers, in dicts, NamedTuples or dataclasses of"
                f" flax.struct, but {one_line(error)}"
            ) from error
        raise ConfigError(f"{name} raises {one_line(error)}") from error


def without_writing(name: str, call: Callable, own: Any) -> Any:
    """Returns a call's result, and checks that the call does not write to the user's object.

    If it does, it is called again: a cached constant is only written in the first call.

    Raises:
      ConfigError: the call writes every time, or writes a traced value.
    """
    for again in (False, True):
        before = dict(contents(own))
        result = call()
        written = {what: x for what, x in contents(own) if not is_same(x, before.get(what))}
        for what, x in written.items():
            if again or isinstance(x, jax.core.Tracer):
                raise ConfigError(
                    f"{name} writes {what}, but is called once for all steps; keep it in the state"
                )
        if not written:
            break
    return result


def contents(own: Any) -> Iterator[tuple[str, Any]]:
    """Yields the values in an object, its classes and the globals of its file, by name.

    Containers, and objects of the user's own classes, are searched.
    """
    attributes: dict[str, Any] = {}
    for owner in (*reversed(type(own).__mro__), own):
        attributes |= getattr(owner, "__dict__", {})
    module = type(own).__module__
    file = vars(sys.modules[module]) if is_own_module(module) else {}
    left = [(f"self.{name}", x) for name, x in attributes.items()]
    left += [(name, x) for name, x in file.items() if not name.startswith("__")]
    searched = {id(own)}
    for name, x in left:  # grows in the loop
        inside = isinstance(x, dict | list | tuple) or is_own_module(type(x).__module__)
        if not inside:
            yield name, x
        elif id(x) not in searched:
            searched.add(id(x))
            if isinstance(x, dict):
                left += [(f"{name}[{key!r}]", entry) for key, entry in x.items()]
            elif isinstance(x, list | tuple):
                left += [(f"{name}[{index}]", entry) for index, entry in enumerate(x)]
            else:
                left += [
                    (f"{name}.{key}", entry) for key, entry in getattr(x, "__dict__", {}).items()
                ]


def is_own_module(name: Any) -> bool:
    """Returns whether a module is a file of the user's own."""
    return str(name).startswith(f"{OWN_PACKAGE}.")


def is_same(x: Any, y: Any) -> bool:
    """Returns whether x is y, or an equal number or text."""
    return x is y or (isinstance(x, int | float | str) and isinstance(y, type(x)) and x == y)


def flat(info: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the arrays of info by name, with `/` between the names of nested dicts."""
    leaves = jax.tree.leaves_with_path(info)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def is_number(x: jax.ShapeDtypeStruct) -> bool:
    """Returns whether x is a scalar that can be averaged."""
    return x.shape == () and any(jnp.issubdtype(x.dtype, kind) for kind in NUMBERS)


def check_values(name: str, env: SingleEnvironment) -> None:
    """Checks binary entries, the grid and the action mask by random play.

    Args:
      env: after `check_environment`.

    Raises:
      ConfigError: a binary entry is neither 0 nor 1, the grid's groups are wrong, or no action is
        legal.
    """
    if not env.num_binary:
        return
    key = jax.random.key(0)
    acted_on, active, observed, restored = jax.device_get(jax.jit(partial(play, env))(key))
    binary = observed[:, : env.num_binary]
    for row, index in np.argwhere((binary != 0) & (binary != 1))[:1]:
        raise ConfigError(
            f"{name}: {place(env, index)} of an observation is {binary[row, index]:g}, but"
            f" num_binary = {env.num_binary} says that it is 0 or 1"
        )
    for _, index in np.argwhere(restored[:, : env.num_binary] != binary)[:1]:
        raise ConfigError(
            f"{name}: {place(env, index)} of an observation is not as the Grid says: at most one"
            " channel of a group is 1"
        )
    legal = action_mask(acted_on, env.action_space)
    if legal is None or isinstance(env.action_space, Box):
        return
    if isinstance(env.action_space, MultiDiscrete):
        options = legal.reshape(*active.shape, *env.action_space.table) & env.action_space.exists()
        found = options.any(axis=-1).all(axis=-1)
    else:
        found = legal.any(axis=-1)
    for step, _ in np.argwhere(active & ~found)[:1]:
        raise ConfigError(
            f"{name}: the action mask has no legal action after {step} steps of random play; allow"
            " one, or end the episode before"
        )


def play(env: SingleEnvironment, key: jax.Array) -> tuple[jax.Array, ...]:
    """Plays random legal actions in one environment, S steps of A agents.

    Returns:
      the observations (S, A, obs_size) before each step, active agents (S, A) bool, all
      observations (N, obs_size), and the same packed and unpacked.
    """
    agents, space = env.num_agents or 1, obs_space(env)

    def strong(tree: Any) -> Any:
        arrays = jax.tree.map(jnp.asarray, tree)
        return jax.tree.map(lambda x: jnp.array(x, x.dtype), arrays)

    def step(carry: tuple[jax.Array, Any], key: jax.Array):
        obs, state = carry
        act_key, step_key, next_key = jax.random.split(key, 3)
        rows, keys = obs.reshape(agents, -1), jax.random.split(act_key, agents)
        action, active = sample_uniformly(env.action_space, rows, keys), jnp.ones(1, bool)
        if env.num_agents is None:
            action = action[0]
        else:
            active = ~env.agents_done(state)
        later, after, _, terminated, truncated, _ = strong(env.step(step_key, state, action))
        carry = jax.lax.cond(
            jnp.logical_or(terminated, truncated),
            lambda: strong(env.next_episode(next_key, after)),
            lambda: (later, after),
        )
        return carry, (rows, active, later.reshape(agents, -1))

    first = strong(env.reset(key))
    keys = jax.random.split(key, STEPS_PLAYED)
    _, (acted_on, active, later) = jax.lax.scan(step, first, keys)
    observed = jnp.concatenate([acted_on, later]).reshape(-1, env.obs_size)
    return acted_on, active, observed, unpack_obs(pack_obs(observed, space), space)


def place(env: SingleEnvironment, index: int) -> str:
    """Describes an entry of an observation."""
    grid = env.grid or Grid(0, 0, 0, ())
    if grid.start <= index < grid.start + grid.size:
        cells = np.asarray(grid.join(jnp.arange(grid.size)))
        row, column, channel = np.argwhere(cells == index - grid.start)[0]
        return f"row {row}, column {column}, channel {channel} of the grid"
    masked = index < mask_size(env.action_space)
    return f"entry {index}{', of the action mask,' if masked else ''}"


def check_obs(name: str, obs: Any, shape: tuple[int, ...]) -> None:
    if isinstance(obs, jax.ShapeDtypeStruct) and len(obs.shape) > len(shape):
        kind = "an image" if len(obs.shape) == len(shape) + 2 else "an array"
        agents = shape[:-1]
        flat = f"obs.reshape({agents[0]}, -1)" if agents else "obs.ravel()"
        raise ConfigError(
            f"{name}: obs is {kind}, {described(obs)}, but the network reads vectors; return"
            f" {flat}{' / 255' * (obs.dtype == jnp.uint8)} and set obs_size ="
            f" {math.prod(obs.shape[len(agents) :])}"
        )
    check_array(name, "obs", obs, shape, NUMBERS, "float32")


def check_array(
    name: str, what: str, x: Any, shape: tuple[int, ...], kinds: tuple[Any, ...], dtype: str
) -> None:
    """Raises a ConfigError if `x` has another shape, or a dtype of none of the kinds."""
    right = isinstance(x, jax.ShapeDtypeStruct) and x.shape == shape
    right = right and any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
    require(name, right, f"{what} must be {dtype} of shape {shape}", described(x))


def check_same_state(name: str, before: Any, after: Any) -> None:
    """Raises a ConfigError if two states differ in structure, shapes or dtypes."""
    old_structure, new_structure = map(str, map(jax.tree.structure, (before, after)))
    what = f"state must have the structure of reset's, {old_structure[:80]}"
    require(name, old_structure == new_structure, what, new_structure[:80])
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        same = old.shape == new.shape and old.dtype == new.dtype
        what = f"state{jax.tree_util.keystr(path)} must be {described(old)} as reset's"
        require(name, same, what, described(new))


def require(name: str, condition: Any, what: str, found: str) -> None:
    """Raises a ConfigError if a condition is not met.

    Args:
      name: name of what is checked.
      what: expected state.
      found: actual state.
    """
    if not condition:
        raise ConfigError(f"{name}: {what}, not {found}")


def is_count(x: Any, low: int = 1) -> bool:
    """Returns whether x is an integer from `low` to 2**31 - 1."""
    whole = isinstance(x, int | np.integer) and not isinstance(x, bool)
    return whole and low <= int(x) < 2**31


def described(x: Any) -> str:
    """Describes a method's result in a few words."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return f"{x.dtype} of shape {x.shape}"
    if isinstance(x, tuple):
        return f"a tuple of {len(x)}"
    return f"a {type(x).__name__}" if x is not None else "None"
