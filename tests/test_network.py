"""The network's two forms against the NumPy oracle and each other; the attention mask."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from support import (
    OBS_SIZE,
    from_equations,
    init_random,
    make_step_form,
    make_window_form,
    random_case,
    reach_of,
    small_network,
)

import transformerXL

CASES = {
    "gated": {},
    "not gated": {"gating": False, "ACTIVATION": "tanh"},
    "E differs from qkv_features": {"EMBED_SIZE": 12, "qkv_features": 20},
    "memory shorter than the window": {"WINDOW_MEM": 3, "WINDOW_GRAD": 8},
    "memory longer than the rollout": {"WINDOW_MEM": 21, "WINDOW_GRAD": 4},
    "no memory": {"WINDOW_MEM": 0},
    "one environment, one head, one layer": {"NUM_ENVS": 1, "num_heads": 1, "num_layers": 1},
    "one window": {"WINDOW_GRAD": 16},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_both_forms_agree_with_the_papers_equations(changes):
    config, network, params, obs, memory, boundary = random_case(changes)
    reach = reach_of(boundary, config["WINDOW_MEM"])
    expected = from_equations(config, params, obs, memory, boundary)
    logits, values, hidden = (np.stack(parts) for parts in zip(*expected, strict=True))
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))  # distrax normalises its logits

    step = make_step_form(network)(params, obs, memory, reach)
    np.testing.assert_allclose(step[0], logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(step[1], values, atol=1e-4, rtol=0)
    np.testing.assert_allclose(step[2], hidden, atol=1e-4, rtol=0)

    window_grad = config["WINDOW_GRAD"]
    past = np.concatenate([memory, hidden[:, : config["NUM_STEPS"] - window_grad]], axis=1)
    window = make_window_form(network, window_grad)(params, obs, past, reach)
    np.testing.assert_allclose(window[0], logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(window[1], values, atol=1e-4, rtol=0)


def test_relative_shift_is_a_gather_of_the_distance():
    window, mem = 5, 7
    by_distance = np.random.default_rng(0).standard_normal((2, window, mem + 1))
    shifted = np.asarray(transformerXL.relative_shift(jnp.asarray(by_distance)))
    assert shifted.shape == (2, window, mem + window)
    for i in range(window):
        for j in range(mem + window):
            distance = mem + i - j
            inside = 0 <= distance <= mem
            expected = by_distance[:, i, mem - distance] if inside else -np.inf
            np.testing.assert_array_equal(shifted[:, i, j], np.float32(expected))


def test_position_term_is_the_gather_of_the_projected_sinusoid():
    """The position term is (q_i + w) p_(i-j), with content switched off: keys 0, u = 0."""
    config, network, params, obs, memory, boundary = random_case({"num_layers": 1})
    layer = params["params"]["transformer"]["layers_0"]
    layer["key_value"] = {
        "kernel": layer["key_value"]["kernel"].at[:, : config["qkv_features"]].set(0),
        "bias": layer["key_value"]["bias"].at[: config["qkv_features"]].set(0),
    }
    mem, steps, heads = config["WINDOW_MEM"], config["NUM_STEPS"], config["num_heads"]
    boundary[:] = False
    reach = reach_of(boundary, mem)
    x = obs @ layer_kernel(params, "encoder") + params["params"]["transformer"]["encoder"]["bias"]
    n = oracle.layer_norm(np.concatenate([memory[:, :, 0], x], axis=1), layer["attention_norm"])
    q = oracle.dense(n, layer["query"]).reshape(*n.shape[:2], heads, -1)
    v = oracle.dense(n, layer["key_value"])[..., config["qkv_features"] :].reshape(q.shape)
    table = np.stack([oracle.sinusoid(d, config["EMBED_SIZE"]) for d in range(mem + 1)])
    p = (table @ np.asarray(layer["position"]["kernel"])).reshape(mem + 1, heads, -1)
    i = np.arange(mem, mem + steps)[:, None]
    j = i - np.arange(mem + 1)  # (T, M+1), the key at each distance
    gathered = p[i - j]  # R_(i-j), projected
    logits = np.einsum("bihd,irhd->bhir", q[:, mem:] + layer["position_bias"], gathered)
    logits = logits * q.shape[-1] ** -0.5
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    attended = np.einsum("bhir,birhd->bihd", weights, v[:, j]).reshape(len(obs), steps, -1)
    y = oracle.gate(
        x, np.maximum(oracle.dense(attended, layer["attention_out"]), 0), layer["attention_gate"]
    )
    f = oracle.gelu(oracle.dense(oracle.layer_norm(y, layer["mlp_norm"]), layer["mlp_in"]))
    out = oracle.gate(y, np.maximum(oracle.dense(f, layer["mlp_out"]), 0), layer["mlp_gate"])
    expected = oracle.head(out, params["params"]["critic"], lambda z: np.maximum(z, 0))[..., 0]
    values = make_step_form(network)(params, obs, memory, reach)[1]
    np.testing.assert_allclose(values, expected, atol=1e-4, rtol=0)


def layer_kernel(params, name):
    return np.asarray(params["params"]["transformer"][name]["kernel"])


@pytest.fixture(scope="module", params=["rollout", "loss"])
def values_of(request):
    """Returns (obs (1, T, .), boundary (1, T)) -> values (T,) of one layer, which sees M steps."""
    config, network = small_network(num_layers=1)
    params = init_random(config, network)
    step = make_step_form(network)
    window = make_window_form(network, config["WINDOW_GRAD"])
    mem, hidden_steps = config["WINDOW_MEM"], config["NUM_STEPS"] - config["WINDOW_GRAD"]
    no_memory = jnp.zeros((1, mem, 1, config["EMBED_SIZE"]))

    def values(obs, boundary):
        reach = reach_of(np.pad(boundary, ((0, 0), (mem, 0))), mem)
        # The boundary before the first step hides the zeros before it.
        reach = np.minimum(reach, np.arange(obs.shape[1]))
        _, from_steps, hidden = step(params, obs, no_memory, reach)
        if request.param == "rollout":
            return np.asarray(from_steps[0])
        past = jnp.concatenate([no_memory, hidden[:, :hidden_steps]], axis=1)
        return np.asarray(window(params, obs, past, reach)[1][0])

    return values


@pytest.fixture
def obs():
    return np.random.default_rng(3).standard_normal((1, 16, OBS_SIZE)).astype(np.float32)


# Step 5 ends an episode inside the second window. Step 3 ends one between two windows, so the
# third window sees that end only in its cached memory.
@pytest.mark.parametrize("end", [5, 3])
def test_an_earlier_episode_does_not_reach_the_running_one(values_of, obs, end):
    boundary = np.zeros((1, 16), bool)
    boundary[0, end] = True
    changed = obs.copy()
    changed[0, : end + 1] += 1.0
    before, after = values_of(obs, boundary), values_of(changed, boundary)
    np.testing.assert_array_equal(before[end + 1 :], after[end + 1 :])
    assert np.all(before[: end + 1] != after[: end + 1])


def test_a_step_of_the_same_episode_within_reach_does(values_of, obs):
    changed = obs.copy()
    changed[0, 4] += 1.0
    no_end = np.zeros((1, 16), bool)
    before, after = values_of(obs, no_end), values_of(changed, no_end)
    assert np.all(before[4:13] != after[4:13])  # the step itself and the M = 8 after it


def test_a_later_step_or_one_more_than_m_steps_ago_does_not(values_of, obs):
    changed = obs.copy()
    changed[0, 4] += 1.0
    no_end = np.zeros((1, 16), bool)
    before, after = values_of(obs, no_end), values_of(changed, no_end)
    np.testing.assert_array_equal(before[:4], after[:4])
    np.testing.assert_array_equal(before[13:], after[13:])


def test_initialisation_is_flaxs_default_outside_the_heads():
    config, network = small_network(EMBED_SIZE=128, qkv_features=64, hidden_layers=64)
    memory = jnp.zeros((1, config["WINDOW_MEM"], 2, 128))
    params = network.init(
        jax.random.key(0),
        jnp.zeros((1, 1, OBS_SIZE)),
        memory,
        jnp.zeros((1, 1), jnp.int32),
        1,
        method="unroll_windows",
    )["params"]
    layer = params["transformer"]["layers_1"]
    # lecun_normal: standard deviation 1 / sqrt(fan-in), also for fused matrices.
    for kernel in (
        *(layer[name]["kernel"] for name in ("query", "key_value", "position", "mlp_in")),
        *(layer["mlp_gate"][name]["kernel"] for name in ("w", "u", "u_g")),
    ):
        assert kernel.shape[0] == 128
        np.testing.assert_allclose(np.std(kernel), 128**-0.5, rtol=0.05)
    np.testing.assert_array_equal(layer["mlp_gate"]["bias"], 2.0)
    np.testing.assert_array_equal(layer["content_bias"], 0.0)
    for name, gain in (("actor", 0.01), ("critic", 1.0)):
        hidden, last = params[name]["Dense_1"]["kernel"], params[name]["Dense_2"]["kernel"]
        np.testing.assert_allclose(hidden.T @ hidden, 2 * np.eye(64), atol=1e-5)
        np.testing.assert_allclose(
            last.T @ last, gain**2 * np.eye(last.shape[1]), atol=1e-5 * gain**2
        )
