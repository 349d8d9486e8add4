"""Action distributions: masks, several choices at once, unused outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trxl.distributions import make_policy, sample_per_row, sample_uniformly
from trxl.spaces import Box, Discrete, MultiDiscrete, encode_action, mask_size

ROWS = 4000


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def sampled(space, outputs, obs, log_std=None):
    """Returns many actions sampled from one row, and the policy over its copies."""
    rows = [jnp.broadcast_to(x, (ROWS, *np.shape(x))) for x in (outputs, obs)]
    policy = make_policy(space, *rows, log_std)
    return np.asarray(sample_per_row(policy, jax.random.split(jax.random.key(0), ROWS))), policy


def test_a_masked_discrete_policy_is_the_softmax_over_the_legal_actions():
    space = Discrete(4, masked=True)
    obs = np.array([1.0, 0.0, 1.0, 1.0, 7.0])
    outputs = np.array([0.3, 5.0, -1.0, 0.5])
    actions, policy = sampled(space, outputs, obs)
    expected = log_softmax(outputs[[0, 2, 3]])
    for action, log_prob in zip([0, 2, 3], expected, strict=True):
        np.testing.assert_allclose(policy.log_prob(jnp.full(ROWS, action))[0], log_prob, rtol=1e-5)
        share = np.mean(actions == action)
        np.testing.assert_allclose(share, np.exp(log_prob), atol=4 * 0.5 / ROWS**0.5)
    assert not (actions == 1).any()
    np.testing.assert_allclose(policy.entropy()[0], -np.sum(np.exp(expected) * expected), rtol=1e-5)


def test_the_gradient_of_an_illegal_action_is_zero_and_that_of_the_others_finite():
    space = Discrete(3, masked=True)

    def loss(outputs, obs):
        policy = make_policy(space, outputs, obs)
        return policy.log_prob(jnp.array(0)) + policy.entropy()

    gradient = jax.grad(loss)(jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 0.0, 1.0]))
    assert gradient[1] == 0
    assert np.all(np.asarray(gradient)[[0, 2]] != 0)
    # An observation after the end may allow no action.
    assert np.all(np.isfinite(jax.grad(loss)(jnp.ones(3), jnp.zeros(3))))


@pytest.mark.parametrize("masked", [False, True])
def test_several_choices_are_independent_categoricals(masked):
    space = MultiDiscrete((3, 2), masked)
    outputs = np.random.default_rng(0).standard_normal(6).astype(np.float32)
    mask = np.array([1, 0, 1, 1, 1, 1], np.float32)
    actions, policy = sampled(space, outputs, np.append(mask, 5.0) if masked else np.ones(1))
    table = np.where(mask.reshape(2, 3) > 0, outputs.reshape(2, 3), -np.inf)
    if not masked:
        table = outputs.reshape(2, 3).copy()
    table[1, 2] = -np.inf  # the second choice has two options
    log_probs = log_softmax(table)
    assert actions.shape == (ROWS, 2)
    assert actions[:, 1].max() == 1
    for first in range(3):
        for second in range(2):
            log_prob = log_probs[0, first] + log_probs[1, second]
            share = np.mean((actions[:, 0] == first) & (actions[:, 1] == second))
            np.testing.assert_allclose(share, np.exp(log_prob), atol=4 * 0.5 / ROWS**0.5)
            if np.isfinite(log_prob):
                action = jnp.broadcast_to(jnp.array([first, second]), (ROWS, 2))
                np.testing.assert_allclose(policy.log_prob(action)[0], log_prob, rtol=1e-4)
    finite = log_probs[np.isfinite(log_probs)]
    np.testing.assert_allclose(policy.entropy()[0], -np.sum(np.exp(finite) * finite), rtol=1e-4)
    assert policy.mode().shape == (ROWS, 2)


def test_numbers_of_a_box_that_are_not_used_change_neither_ratio_nor_entropy():
    space = Box((-1.0,) * 3, (1.0,) * 3, masked=True)
    log_std = jnp.array([0.1, -0.3, 0.7])
    used, obs = np.array([True, False, True]), jnp.array([1.0, 0.0, 1.0])
    outputs, others = jnp.array([0.2, 9.0, -0.4]), jnp.array([0.1, -9.0, -0.2])
    actions, policy = sampled(space, outputs, obs, log_std)
    other = make_policy(space, others, obs, log_std)
    small = Box((-1.0,) * 2, (1.0,) * 2)
    alone, other_alone = (
        make_policy(small, x[used], obs, log_std[used]) for x in (outputs, others)
    )
    action = jnp.asarray(actions[0])
    ratio = policy[0].log_prob(action) - other.log_prob(action)
    expected = alone.log_prob(action[used]) - other_alone.log_prob(action[used])
    np.testing.assert_allclose(ratio, expected, rtol=1e-4)
    np.testing.assert_allclose(policy.entropy()[0], alone.entropy(), rtol=1e-5)


def test_uniform_actions_are_legal_and_all_of_them_come():
    obs = jnp.tile(jnp.array([1.0, 0.0, 1.0]), (ROWS, 1))
    keys = jax.random.split(jax.random.key(1), ROWS)
    actions = sample_uniformly(Discrete(3, masked=True), obs, keys)
    assert abs(np.mean(actions == 0) - 0.5) < 2 / ROWS**0.5
    assert not np.any(actions == 1)
    box = sample_uniformly(Box((-2.0, -np.inf), (4.0, np.inf)), obs, keys)
    assert np.all((box[:, 0] >= -2) & (box[:, 0] < 4))
    np.testing.assert_allclose(box[:, 0].mean(), 1.0, atol=0.15)
    np.testing.assert_allclose(box[:, 1].std(), 1.0, atol=0.1)


@pytest.mark.parametrize(
    ("space", "action", "encoded"),
    [
        (Discrete(3), 2, [0, 0, 1]),
        (MultiDiscrete((3, 2)), [1, 1], [0, 1, 0, 0, 1, 0]),
        (Box((-1.0, 0.0), (1.0, 5.0)), [-3.0, 2.0], [-1, 2]),
    ],
)
def test_an_action_as_part_of_an_observation(space, action, encoded):
    np.testing.assert_array_equal(encode_action(space, jnp.array(action)), encoded)
    assert space.num_outputs == len(encoded)
    assert mask_size(space) == 0
    assert mask_size(space._replace(masked=True)) == len(encoded)
