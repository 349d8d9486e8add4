"""POPGym's card games.

Morad et al. 2023, "POPGym" (arXiv 2303.01859), appendix A. A card is the number of its colour, suit
or rank. N is the number of cards.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trxl.environments.base import SingleEnvironment
from trxl.spaces import Discrete

KINDS = {"colors": 2, "suits": 4, "ranks": 13}


def cards_of(decks: int, kind: str) -> np.ndarray:
    """Returns the cards of unshuffled decks, (N,)."""
    return np.arange(52 * decks) % KINDS[kind]


def one_hots(*pairs: tuple[jax.Array | int, int]) -> jax.Array:
    """Concatenates one-hot vectors of pairs (numbers (...), number of classes)."""
    vectors = (jax.nn.one_hot(jnp.asarray(x, jnp.int32), n) for x, n in pairs)
    return jnp.concatenate([vector.reshape(-1) for vector in vectors])


def signed(right: jax.Array, scale: float) -> jax.Array:
    """Returns the reward of an answer: `scale` if right, else -`scale`."""
    return jnp.where(right, scale, -scale)


class Deal(SingleEnvironment):
    """Game that deals cards one by one, with an answer per step.

    A state is the shuffled `cards` and `dealt`, the number of cards shown.

    Args:
      decks: number of decks of 52 cards.
      kind: key of `KINDS` that the cards show.
    """

    def __init__(self, decks: int, kind: str = "suits"):
        self.cards, self.kinds = cards_of(decks, kind), KINDS[kind]
        self.action_space = Discrete(self.kinds)
        self.obs_size = self.num_binary = self.kinds

    def reset(self, key: jax.Array):
        state = {"cards": jax.random.permutation(key, self.cards), "dealt": jnp.int32(1)}
        return self.show(state), state

    def step(self, key: jax.Array, state: Any, action: jax.Array):
        reward = self.judge(state, action)
        state = {**state, "dealt": state["dealt"] + 1}
        over = state["dealt"] == len(self.cards)
        return self.show(state), state, reward, over, jnp.bool_(False), {}

    def judge(self, state: Any, action: jax.Array) -> jax.Array:
        """Returns the reward of an answer, before the next card is dealt."""
        raise NotImplementedError

    def show(self, state: Any) -> jax.Array:
        """Returns the observation, by default the newest card."""
        return one_hots((state["cards"][state["dealt"] - 1], self.kinds))


class RepeatFirst(Deal):
    """RepeatFirst: the answer is the first card."""

    def judge(self, state, action):
        return signed(action == state["cards"][0], 1 / (len(self.cards) - 1))


class RepeatPrevious(Deal):
    """RepeatPrevious: the answer is the k-th newest card; k = 1 is the newest."""

    def __init__(self, decks: int, k: int):
        super().__init__(decks)
        self.k = k

    def judge(self, state, action):
        asked = state["cards"][jnp.maximum(state["dealt"] - self.k, 0)]
        reward = signed(action == asked, 1 / (len(self.cards) - self.k))
        return jnp.where(state["dealt"] >= self.k, reward, 0.0)


class HigherLower(Deal):
    """HigherLower: the answer is whether the next card is higher (0) or lower (1)."""

    def __init__(self, decks: int):
        super().__init__(decks, "ranks")
        self.action_space = Discrete(2)

    def judge(self, state, action):
        now, following = state["cards"][state["dealt"] - 1], state["cards"][state["dealt"]]
        reward = signed((following > now) == (action == 0), 1 / len(self.cards))
        return jnp.where(following == now, 0.0, reward)


class CountRecall(Deal):
    """CountRecall: the answer is how often the queried card was dealt, from separate decks."""

    def __init__(self, decks: int, kind: str):
        super().__init__(decks, kind)
        self.action_space = Discrete(len(self.cards) // self.kinds + 1)
        self.obs_size = self.num_binary = 2 * self.kinds

    def reset(self, key):
        key, query_key = jax.random.split(key)
        state = {
            "cards": jax.random.permutation(key, self.cards),
            "queries": jax.random.permutation(query_key, self.cards),
            "dealt": jnp.int32(1),
        }
        return self.show(state), state

    def judge(self, state, action):
        asked = state["queries"][state["dealt"] - 1]
        seen = jnp.arange(len(self.cards)) < state["dealt"]
        count = jnp.sum((state["cards"] == asked) & seen)
        return signed(action == count, 1 / (len(self.cards) - 1))

    def show(self, state):
        newest = state["dealt"] - 1
        card, query = state["cards"][newest], state["queries"][newest]
        return one_hots((card, self.kinds), (query, self.kinds))


class Autoencode(Deal):
    """Autoencode: all cards are shown, then the answers repeat them in reverse order."""

    def __init__(self, decks: int):
        super().__init__(decks)
        self.obs_size = self.num_binary = 2 + self.kinds

    def step(self, key, state, action):
        number = len(self.cards)
        recited = state["dealt"] - number  # negative while cards are shown
        right = action == state["cards"][jnp.clip(number - 1 - recited, 0, number - 1)]
        reward = jnp.where(recited >= 0, signed(right, 1 / number), 0.0)
        state = {**state, "dealt": state["dealt"] + 1}
        return self.show(state), state, reward, recited == number - 1, jnp.bool_(False), {}

    def show(self, state):
        number, dealt = len(self.cards), state["dealt"]
        shown = state["cards"][jnp.minimum(dealt, number) - 1]
        card = jnp.where(dealt <= number, shown, 0)  # 0 after all cards were shown
        return one_hots((dealt < number, 2), (card, self.kinds))


class Concentration(SingleEnvironment):
    """Concentration: cards lie face down; two are turned at a time, and stay up if equal.

    A state has `cards`, `up` (N,) bool (face up for good), `turned` (the index of a pair's first
    card, N if none) and `steps`.

    Args:
      decks: number of decks of 52 cards.
      kind: key of `KINDS` that must be equal.
    """

    def __init__(self, decks: int, kind: str):
        self.cards, self.kinds = cards_of(decks, kind), KINDS[kind]
        number = len(self.cards)
        self.action_space = Discrete(number)
        self.obs_size = self.num_binary = number * (self.kinds + 1)
        self.limit = math.ceil(2 * number - number / (2 * number - 1))

    def reset(self, key):
        number = len(self.cards)
        state = {
            "cards": jax.random.permutation(key, self.cards),
            "up": jnp.zeros(number, bool),
            "turned": jnp.int32(number),
            "steps": jnp.int32(0),
        }
        return self.show(state, state["up"]), state

    def step(self, key, state, action):
        number, cards, up, first = len(self.cards), state["cards"], state["up"], state["turned"]
        waits = first < number
        places = jnp.arange(number)
        open_now = (places == action) | (places == first)  # none is `number`
        obs = self.show(state, up | open_now)
        wasted = jnp.any(up & open_now)
        pair = ~wasted & waits
        equal = pair & (cards[action] == cards[first % number]) & (action != first)
        failure = -1 / self.limit
        reward = jnp.where(wasted, failure * (1 + waits), jnp.where(pair, 2 * failure, 0.0))
        reward = jnp.where(equal, 1 / (number // 2), reward)
        state = {
            **state,
            "up": up | (open_now & equal),
            "turned": jnp.where(wasted | pair, number, action).astype(jnp.int32),
            "steps": state["steps"] + 1,
        }
        truncated = state["steps"] >= self.limit
        return obs, state, reward, equal & jnp.all(state["up"]), truncated, {}

    def show(self, state, visible):
        """Returns every card, one-hot; face-down cards have a class of their own."""
        return one_hots((jnp.where(visible, state["cards"], self.kinds), self.kinds + 1))
