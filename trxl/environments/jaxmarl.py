"""JaxMARL: several agents with shared parameters and separate memories.

Rutherford et al. 2024, "JaxMARL" (arXiv 2311.10090).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments.adapters import choose, each, import_suite, making, read_action_space
from trxl.environments.base import SingleEnvironment
from trxl.errors import ConfigError
from trxl.spaces import ActionSpace, Box, Discrete, MultiDiscrete, mask_size

NAMES = [
    *each("MPE_simple_{}_v3", "adversary crypto push reference spread tag world_comm"),
    *("MPE_simple_v3", "MPE_simple_facmac_v1", "MPE_simple_speaker_listener_v4"),
    *each("MPE_simple_facmac_{}v1", "3a_ 6a_ 9a_"),
    *("SMAX", "HeuristicEnemySMAX", "LearnedPolicyEnemySMAX", "switch_riddle", "hanabi"),
    *("ant_4x2", "halfcheetah_6x1", "hopper_3x1", "humanoid_9|8", "walker2d_2x3"),
    *("overcooked", "overcooked_v2", "storm", "storm_2p", "storm_np", "coin_game", "jaxnav"),
    *each("JaxRobotarium_{}", "navigation discovery material_transport warehouse"),
    *each("JaxRobotarium_{}", "arctic_transport foraging rware predator_prey"),
]

OWN_RESET = {
    name: {"auto_reset": False}
    for name in ("ant_4x2", "halfcheetah_6x1", "hopper_3x1", "humanoid_9|8", "walker2d_2x3")
}
"""Arguments for environments that would reset themselves."""


def registered() -> list[str]:
    """Returns the names in the installed JaxMARL."""
    return list(import_suite("jaxmarl").registered_envs)


def make(name: str, env_kwargs: dict[str, Any]) -> SingleEnvironment:
    """Makes an environment of JaxMARL."""
    return JaxMARLAdapter(name, env_kwargs)


class Team(NamedTuple):
    """State of JaxMARL, and the agents that have left the episode."""

    state: Any
    done: jax.Array  # (A,) bool


class JaxMARLAdapter(SingleEnvironment):
    """Environment of JaxMARL, for `wrappers.FlattenAgents`.

    Observations are flattened, padded with zeros to the longest, and end with the agent's index as
    one-hot. Action spaces are padded to the largest; padding and illegal actions are masked.
    Rewards are the suite's, per agent. The suite doesn't report time limits, so no step is
    truncated.

    ENV_KWARGS: arguments of the environment's constructor. SMAX's `scenario` and Overcooked's
    `layout` are given by name.
    """

    can_truncate = False

    def __init__(self, name: str, env_kwargs: dict[str, Any]):
        jaxmarl = import_suite("jaxmarl")
        attempt = making(name, env_kwargs)
        arguments = {key: named_argument(name, key, value) for key, value in env_kwargs.items()}
        arguments = OWN_RESET.get(name, {}) | arguments
        self._env = attempt(lambda: jaxmarl.make(name, **arguments))
        self._agents = tuple(self._env.agents)
        self.num_agents = len(self._agents)
        obs, state = attempt(lambda: jax.eval_shape(self._env.reset, jax.random.key(0)))
        self._sizes = attempt(lambda: [obs[agent].size for agent in self._agents])
        self._spaces = [read_action_space(name, self._env.action_space(a)) for a in self._agents]
        self._has_legal = isinstance(self._spaces[0], Discrete) and has_legal(self._env, state)
        self.action_space, self._usable = join_spaces(name, self._spaces, self._has_legal)
        self.num_binary = mask_size(self.action_space)
        self.obs_size = self.num_binary + max(self._sizes) + self.num_agents

    def reset(self, key: jax.Array):
        obs, state = self._env.reset(key)
        return self._observe(obs, state), Team(state, jnp.zeros(self.num_agents, bool))

    def step(self, key: jax.Array, state: Team, action: jax.Array):
        actions = {
            agent: own_part(space, action[i])
            for i, (agent, space) in enumerate(zip(self._agents, self._spaces, strict=True))
        }
        obs, new_state, rewards, dones, _ = self._env.step_env(key, state.state, actions)
        done = state.done | self._stack(dones)
        reward = self._stack(rewards).astype(jnp.float32)
        terminated = dones["__all__"]
        obs = self._observe(obs, new_state)
        return obs, Team(new_state, done), reward, terminated, jnp.zeros_like(terminated), {}

    def agents_done(self, state: Team) -> jax.Array:
        """Returns (A,) bool, which agents have left the episode."""
        return state.done

    def _stack(self, by_agent: dict[str, jax.Array]) -> jax.Array:
        return jnp.stack([by_agent[agent] for agent in self._agents])

    def _observe(self, obs: dict[str, jax.Array], state: Any) -> jax.Array:
        """Returns the observations (A, obs_size) float32."""
        longest = max(self._sizes)
        padded = [
            jnp.pad(jnp.ravel(obs[agent]).astype(jnp.float32), (0, longest - size))
            for agent, size in zip(self._agents, self._sizes, strict=True)
        ]
        parts = [jnp.stack(padded), jnp.eye(self.num_agents)]
        if self.action_space.masked:
            parts.insert(0, self._legal(state))
        return jnp.concatenate(parts, axis=-1)

    def _legal(self, state: Any) -> jax.Array:
        """Returns the action masks (A, num_outputs) float32."""
        usable = jnp.asarray(self._usable, jnp.float32)
        if not self._has_legal:
            return usable
        most = self.action_space.num_outputs
        by_agent = legal_actions(self._env, state)
        legal = [jnp.ravel(by_agent[agent]) for agent in self._agents]
        padded = [jnp.pad(x.astype(jnp.float32), (0, most - x.size)) for x in legal]
        return jnp.stack(padded) * usable


def legal_actions(env: Any, state: Any) -> dict[str, jax.Array]:
    """Returns each agent's legal actions (n,), by either method of JaxMARL.

    Raises:
      NotImplementedError: the environment has none.
    """
    return getattr(env, "get_legal_moves", env.get_avail_actions)(state)


def has_legal(env: Any, state: Any) -> bool:
    """Returns whether the environment reports legal actions."""
    try:
        jax.eval_shape(lambda state: legal_actions(env, state), state)
    except NotImplementedError:
        return False
    return True


def join_spaces(
    name: str, spaces: list[ActionSpace], has_legal: bool
) -> tuple[ActionSpace, np.ndarray]:
    """Returns an action space for all agents, and the outputs that each uses (A, outputs) bool.

    Raises:
      ConfigError: the agents' actions are of different kinds.
    """
    kinds = {type(space) for space in spaces}
    if len(kinds) > 1 or (MultiDiscrete in kinds and len(set(spaces)) > 1):
        raise ConfigError(f"{name} has agents with actions of different kinds: {spaces}")
    sizes = np.array([space.num_outputs for space in spaces])
    most = int(sizes.max())
    usable = np.arange(most) < sizes[:, None]
    masked = has_legal or not usable.all()
    if MultiDiscrete in kinds:
        return spaces[0], usable
    if Discrete in kinds:
        return Discrete(most, masked), usable
    # If bounds differ, `own_part` clips to each agent's own.
    boxes = [space for space in spaces if isinstance(space, Box)]
    low = tuple(min(s.low[i] for s in boxes if i < s.size) for i in range(most))
    high = tuple(max(s.high[i] for s in boxes if i < s.size) for i in range(most))
    return Box(low, high, masked), usable


def own_part(space: ActionSpace, action: jax.Array) -> jax.Array:
    """Cuts a padded action to an agent's own space."""
    return space.clip(action[: space.size]) if isinstance(space, Box) else action


def named_argument(name: str, key: str, value: Any) -> Any:
    """Resolves a constructor's argument: a scenario of SMAX or a layout of Overcooked by name.

    Raises:
      ConfigError: the name is unknown, or its maps would be unpickled, which can execute code.
    """
    if key == "map_id" and value == "Grid-Buffer":
        raise ConfigError(
            f"ENV_KWARGS: {name} unpickles the maps of Grid-Buffer, which can run any code; choose"
            " another map_id, such as Grid-Rand-Poly"
        )
    if key == "scenario" and isinstance(value, str):
        return choose(
            key, value, import_suite("jaxmarl.environments.smax.smax_env").MAP_NAME_TO_SCENARIO
        )
    if key == "layout" and name == "overcooked" and isinstance(value, str):
        return choose(
            key, value, import_suite("jaxmarl.environments.overcooked").overcooked_layouts
        )
    return value
