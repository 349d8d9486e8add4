"""The network around the transformer against NumPy: packed grids, encoder, heads."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from support import QUICK, random_params, run

from trxl import encoders
from trxl import encoders as cells_module
from trxl.encoders import FeatureEncoder, cells_product, find_entries
from trxl.errors import ConfigError
from trxl.layers import ResidualHead
from trxl.results import load_results
from trxl.spaces import (
    Discrete,
    Grid,
    ObsSpace,
    cell_words,
    grid_and_vector,
    pack_obs,
    unpack_obs,
)
from trxl.training import init_params

from evaluate_PPO_trXL import load_agent
from trainer_PPO_trXL import PPO
from transformerXL import make_network

GRIDS = {
    "one part": Grid(0, 2, 3, ((5, 1, 1, 2),)),
    "two parts, the previous action before them": Grid(4, 3, 2, ((13,), (12,))),
    "bits alone, more than a word": Grid(0, 2, 2, ((1,) * 20,)),
    "as Craftax": Grid(1, 2, 2, ((37, 5, 8, 8, 8, *(1,) * 17),)),
}


def random_obs(grid, batch=7, behind=2, real=3, seed=0):
    """Returns obs (batch, .), their cells (batch, rows, columns, channels), the rest, the space."""
    rng = np.random.default_rng(seed)
    cells = np.zeros((batch, grid.rows, grid.columns, sum(grid.groups)), np.float32)
    for index in np.ndindex(cells.shape[:-1]):
        channel = 0
        for size in grid.groups:
            value = rng.integers(size + 1)
            cells[index][channel + value - 1] = value > 0 or cells[index][channel + value - 1]
            channel += size
    ends = np.cumsum([sum(groups) for groups in grid.parts])[:-1]
    parts = [part.reshape(batch, -1) for part in np.split(cells, ends, axis=-1)]
    before, after = (rng.integers(0, 2, (batch, n)) for n in (grid.start, behind))
    obs = np.concatenate([before, *parts, after, rng.standard_normal((batch, real))], axis=-1)
    space = ObsSpace(obs.shape[1], grid.start + grid.size + behind, grid)
    vector = np.concatenate([obs[:, : grid.start], obs[:, grid.start + grid.size :]], axis=-1)
    return obs.astype(np.float32), cells, vector.astype(np.float32), space


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_what_is_stored_is_what_was_seen(grid):
    obs, cells, vector, space = random_obs(grid)
    stored = pack_obs(obs, space)
    assert stored.cells.dtype == jnp.uint16
    np.testing.assert_array_equal(unpack_obs(stored, space), obs)
    for seen in (obs, stored):
        np.testing.assert_array_equal(grid_and_vector(seen, space)[0], cells)
        np.testing.assert_array_equal(grid_and_vector(seen, space)[1], vector)


def test_a_cell_takes_as_few_words_as_its_groups_fill():
    assert len(cell_words((1,) * 16)) == 1
    assert len(cell_words((37, 5, 8, 8, 8, *(1,) * 17))) == 3
    with pytest.raises(ValueError, match="16 bits"):
        cell_words((65_536,))


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("few", [1, 3, 1000], ids=["all", "some", "too many"])
def test_the_product_over_entries_that_appear_is_the_whole_one(grid, few, monkeypatch):
    """The sparse product and its gradient equal the dense ones, also beyond its capacity."""
    monkeypatch.setattr(cells_module, "FEW", few)
    obs, _, _, space = random_obs(grid, batch=2)
    entries = obs[:, grid.start : grid.start + grid.size]
    stored = pack_obs(obs, space).cells
    assert find_entries(stored, grid).many == (entries.any(axis=0).sum() > grid.size // few)
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((grid.size, 4)).astype(np.float32)
    product, pull = jax.vjp(lambda kernel: cells_product(stored, kernel, grid), kernel)
    np.testing.assert_allclose(product, entries @ kernel, rtol=1e-4, atol=1e-4)
    gradient = rng.standard_normal(product.shape).astype(np.float32)
    np.testing.assert_allclose(pull(gradient)[0], entries.T @ gradient, rtol=1e-4, atol=1e-4)


def test_runs_side_by_side_take_the_whole_product_together():
    """Products are right under vmap where one batch has few entries and another has all."""
    grid = GRIDS["as Craftax"]
    obs, _, _, space = random_obs(grid, batch=400)
    batches = np.stack([np.broadcast_to(obs[:1], obs.shape), obs])
    stored = jax.vmap(lambda obs: pack_obs(obs, space).cells)(batches)
    kernel = np.random.default_rng(0).standard_normal((grid.size, 4)).astype(np.float32)
    many = [bool(find_entries(cells, grid).many) for cells in stored]
    assert many == [False, True]
    products = jax.vmap(lambda cells: cells_product(cells, kernel, grid))(stored)
    entries = batches[..., grid.start : grid.start + grid.size]
    np.testing.assert_allclose(products, entries @ kernel, rtol=1e-4, atol=1e-4)


def test_the_linear_encoder_of_a_large_grid_is_a_dense_layer(monkeypatch):
    monkeypatch.setattr(encoders, "LARGE_GRID", 1)
    obs, _, _, space = random_obs(GRIDS["two parts, the previous action before them"])
    encoder = encoders.LinearEncoder(space, width=6)
    params = random_params(jax.eval_shape(encoder.init, jax.random.key(0), obs))
    features = encoder.apply(params, pack_obs(obs, space))
    expected = oracle.dense(obs, params["params"])
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_the_encoder_is_a_convolution_beside_a_dense_layer():
    grid = GRIDS["one part"]
    obs, cells, vector, space = random_obs(grid)
    encoder = FeatureEncoder(space, width=12)
    params = random_params(jax.eval_shape(encoder.init, jax.random.key(0), obs))["params"]
    features = encoder.apply({"params": params}, pack_obs(obs, space))

    embedded = np.asarray(oracle.dense(cells, params["cells"]["Dense_0"]))
    kernel = np.asarray(params["cells"]["convolution"]["kernel"]).reshape(3, 3, 32, 32)
    convolved = np.zeros_like(embedded) + np.asarray(params["cells"]["convolution"]["bias"])
    for row, column, i, j in np.ndindex(grid.rows, grid.columns, 3, 3):
        r, c = row + i - 1, column + j - 1
        if 0 <= r < grid.rows and 0 <= c < grid.columns:
            convolved[:, row, column] += np.maximum(embedded[:, r, c], 0) @ kernel[i, j]
    flat = np.maximum(embedded + convolved, 0).reshape(len(obs), -1)

    def part(x, name):
        return np.maximum(
            oracle.layer_norm(oracle.dense(x, params[name]), params[f"{name}_norm"]["Norm_0"]), 0
        )

    expected = np.concatenate([part(flat, "grid"), part(vector, "vector")], axis=-1)
    assert features.shape == (len(obs), 12 + 3)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_the_residual_head_is_its_equations():
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    head = ResidualHead(width=8, outputs=3, gain=1.0)
    params = random_params(jax.eval_shape(head.init, jax.random.key(0), x))["params"]
    h = oracle.dense(oracle.layer_norm(x, params["Norm_0"]), params["Dense_0"])
    for_residual, for_output = (
        lambda h, name=name: np.maximum(oracle.layer_norm(h, params[name]["Norm_0"]), 0)
        for name in ("NormRelu_0", "NormRelu_1")
    )
    h = h + oracle.dense(for_residual(h), params["Dense_1"])
    expected = oracle.dense(for_output(h), params["output"])
    np.testing.assert_allclose(head.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("pieces", "encoder", "reads"),
    [
        ({"NETWORK": "wide"}, True, 20 + 16),
        ({"NETWORK": "wide", "SKIP": False}, True, 16),
        ({"NETWORK": "wide", "ENCODER": "linear"}, False, 16 + 16),
        ({"SKIP": True}, False, 16 + 16),
        ({"ENCODER": "features"}, True, 16),
        ({}, False, 16),
    ],
)
def test_each_piece_is_a_key(pieces, encoder, reads):
    config = PPO.check({**QUICK, "encoder_features": 16, **pieces})
    *_, space = random_obs(GRIDS["one part"])
    network = make_network(config, Discrete(3), space)
    params = jax.eval_shape(
        lambda: init_params(config, network, space.size, jax.random.key(0))["params"]
    )
    assert ("cells" in params["transformer"]["encoder"]) == encoder
    assert params["critic"]["Dense_0"]["kernel"].shape[0] == reads
    assert ("output" in params["critic"]) == (pieces.get("NETWORK") == "wide" or "HEADS" in pieces)


@pytest.mark.slow
def test_a_wide_agent_with_values_of_their_own_scale_is_saved_and_loaded(tmp_path):
    config = {**QUICK, "NETWORK": "wide", "encoder_features": 16, "NORMALIZE_VALUE": True}
    run({**config, "ENV_KWARGS": {"memory_length": 3}, "RESULTS_DIR": str(tmp_path)})
    folder = tmp_path / "MemoryChain-bsuite"
    agent = load_agent(folder)
    obs = jnp.zeros((1, 3))
    action, _ = agent.act(agent.initial_memory(1), obs, jnp.array([True]), jax.random.key(0))
    assert action.shape == (1,)
    # A config without these keys stands for the published network, whose parameters differ.
    saved = load_results(folder / "0_config.npy")
    for name in ("NETWORK", "ENCODER", "SKIP", "HEADS"):
        del saved[name]
    np.save(folder / "0_config.npy", saved)
    with pytest.raises(ConfigError, match="does not fit"):
        load_agent(folder)


@pytest.mark.slow
def test_the_stream_of_a_wide_network_starts_from_a_dense_layer_over_the_features():
    config = PPO.check({**QUICK, "NETWORK": "wide", "encoder_features": 16})
    obs, _, _, space = random_obs(GRIDS["one part"])
    network = make_network(config, Discrete(3), space)
    params = random_params(init_params(config, network, space.size, jax.random.key(0)))
    caches = network.apply(params, jnp.zeros((7, 8, 1, 16)), method="init_cache")
    reach = jnp.zeros(7, jnp.int32)
    *_, hidden = network.apply(params, obs, caches, 0, reach, method="step")
    body = params["params"]["transformer"]
    features = FeatureEncoder(space, 16).apply({"params": body["encoder"]}, obs)
    expected = oracle.dense(features, body["embedding"])
    assert (expected < 0).any()
    np.testing.assert_allclose(hidden[:, 0], expected, rtol=1e-4, atol=1e-4)
