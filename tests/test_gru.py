"""The GRU and the memoryless network in place of the transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import QUICK, SMALL, resumed_config, run
from two_forms import CHAIN, GRIDDED, largest_ratio_error, two_rollouts

from trxl.layers import GRULayer, orthogonal_blocks
from trxl.results import load_results

from evaluate_PPO_trXL import load_agent, play
from trainer_PPO_trXL import PPO

WIDTH = 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def in_numpy(params, xs, carry, reach):
    """Computes the GRU's equations for each environment and step: (B, T, E)."""
    params = params["cell"]
    w, b = (np.asarray(params["of_input"][name], np.float64) for name in ("kernel", "bias"))
    u, c = (np.asarray(params[name], np.float64) for name in ("carry_kernel", "carry_bias"))
    outputs = np.zeros(xs.shape)
    for i in range(len(xs)):
        h = np.asarray(carry[i], np.float64)
        for t in range(xs.shape[1]):
            if reach[i, t] == 0:
                h = np.zeros(WIDTH)
            x_r, x_z, x_n = np.split(xs[i, t] @ w + b, 3)
            h_r, h_z, h_n = np.split(h @ u, 3)
            r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
            h = (1 - z) * np.tanh(x_n + r * (h_n + c)) + z * h
            outputs[i, t] = h
    return outputs


@pytest.mark.parametrize("window_grad", [2, 4, 8])
def test_both_forms_are_the_equations(window_grad):
    rng = np.random.default_rng(0)
    batch, steps = 3, 8
    xs = rng.normal(size=(batch, steps, WIDTH)).astype(np.float32)
    start = rng.normal(size=(batch, WIDTH)).astype(np.float32)
    reach = rng.integers(0, 2, (batch, steps))
    layer = GRULayer(WIDTH)
    memory = jnp.zeros((batch, 1 + steps - window_grad, WIDTH))
    params = layer.init(jax.random.key(0), xs, memory, reach, window_grad, method="unroll_windows")
    params = jax.tree.map(lambda x: rng.normal(0, 0.7, x.shape).astype(np.float32), params)
    expected = in_numpy(params["params"], xs, start, reach)
    carry, stepped = start, []
    for t in range(steps):
        output, carry = layer.apply(params, xs[:, t], carry, t, reach[:, t], method="step")
        stepped.append(output)
    np.testing.assert_allclose(np.stack(stepped, axis=1), expected, atol=1e-5)
    kept = np.concatenate([start[:, None], expected[:, : steps - window_grad]], axis=1)
    windows = layer.apply(
        params, xs, kept.astype(np.float32), reach, window_grad, method="unroll_windows"
    )
    np.testing.assert_allclose(windows, expected, atol=1e-5)


def test_the_carrys_matrices_start_orthogonal():
    matrix = orthogonal_blocks(jax.random.key(0), (WIDTH, 3 * WIDTH))
    for block in np.split(np.asarray(matrix), 3, axis=1):
        np.testing.assert_allclose(block @ block.T, np.eye(WIDTH), atol=1e-5)
    assert not np.allclose(matrix[:, :WIDTH], matrix[:, WIDTH : 2 * WIDTH])


@pytest.fixture(scope="module", params=["gru", "none"])
def memory(request):
    return request.param


@pytest.mark.parametrize("config", [CHAIN, GRIDDED], ids=["published", "wide"])
def test_rollout_and_window_agree_across_episode_ends(config, memory):
    assert largest_ratio_error(two_rollouts({**config, "MEMORY": memory})) <= 1e-5


def test_a_carry_that_is_not_forgotten_would_be_seen(monkeypatch):
    played = two_rollouts({**CHAIN, "MEMORY": "gru"})
    original = GRULayer.unroll_windows

    def never_forgets(self, x, memory, reach, window_grad):
        return original(self, x, memory, jnp.ones_like(reach), window_grad)

    monkeypatch.setattr(GRULayer, "unroll_windows", never_forgets)
    assert largest_ratio_error(played) > 1e-3


def test_what_is_kept_is_what_the_memory_is(memory):
    config = PPO.check({**SMALL, "MEMORY": memory, "WINDOW_MEM": 7, "num_layers": 2})
    assert (config["WINDOW_MEM"], config["num_layers"]) == {"gru": (1, 2), "none": (0, 0)}[memory]
    assert PPO.check(config) == config


@pytest.mark.slow
def test_a_run_is_trained_resumed_and_played(memory, tmp_path, capsys):
    config = {**QUICK, "MEMORY": memory, "RESULTS_DIR": str(tmp_path)}
    run(config)
    folder = tmp_path / "MemoryChain-bsuite"

    def updates():
        return len(load_results(folder / "0_metrics.npy")["total_loss"])

    params = load_results(folder / "0_params.npy")["params"]
    number = sum(x.size for x in jax.tree.leaves(params))
    assert f"{number:,} parameters" in capsys.readouterr().out
    assert len(play(load_agent(folder), 8, jax.random.key(0))["returned_episode_returns"]) == 8
    before = updates()
    steps = (before + 1) * QUICK["NUM_ENVS"] * QUICK["NUM_STEPS"]
    run(resumed_config(folder, {"TOTAL_TIMESTEPS": steps, "RESUME": str(folder)}))
    assert updates() == before + 1
