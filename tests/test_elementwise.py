"""Functions rewritten without loops and lookups return the same numbers."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trxl.environments import craftax
from trxl.environments.craftax_gpu import LARGEST_READ, LARGEST_WRITTEN, LONGEST_LOOP, elementwise

from wrappers import select


def primitives(function, *args):
    """Returns the names of all primitives of a traced function, nested ones included."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else [value]:
                    if hasattr(inner, "jaxpr"):
                        yield from walk(inner.jaxpr)

    return set(walk(jax.make_jaxpr(function)(*args).jaxpr))


def assert_same(function, x, *indices, without=()):
    """Asserts equal results, for one index and for many, and that some primitives are gone."""
    rewritten = elementwise(function)
    one, axes = [i.ravel()[0] for i in indices], (None, *(0 for _ in indices))

    def results(f):
        many = jax.vmap(f, axes)(x, *map(jnp.atleast_1d, indices)) if indices else ()
        return f(x, *one), many

    ours, theirs = jax.jit(lambda: (results(rewritten), results(function)))()
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    before, after = primitives(function, x, *one), primitives(rewritten, x, *one)
    assert set(without) <= before, before
    assert not set(without) & after, after


def array(dtype, *shape):
    x = jax.random.normal(jax.random.key(len(shape)), shape) * 5
    return x > 0 if dtype == "bool" else x.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8", "bool"])
@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds", None])
def test_reading_and_writing_at_an_index(dtype, mode):
    x, inside, beyond = (
        array(dtype, 3, 4, 2),
        [(0, 0), (2, 3), (-1, -4)],
        [(3, 1), (1, 99), (-9, 2)],
    )
    at = jnp.array(inside if mode == "promise_in_bounds" else inside + beyond)

    def read(x, i, j):
        return x.at[i, j].get(mode=mode), x.at[i].get(mode=mode), x.at[:, j].get(mode=mode)

    def write(x, i, j):
        row, cell = x[0], x[1, 0]
        x = x.at[i, j].set(cell, mode=mode).at[i].set(row, mode=mode)
        return x.at[:, j, 1].set(row[0, 0], mode=mode)

    def add(x, i, j):
        return () if dtype == "bool" else x.at[i, j].add(x[1, 1], mode=mode)

    gone = ["scatter"] if dtype == "bool" else ["scatter", "scatter-add"]
    assert_same(lambda *x: (read(*x), write(*x), add(*x)), x, *at.T, without=gone)


def test_brackets_are_no_lookups_any_more():
    x, i, j = array("int32", 9, 3, 2), jnp.int32(4), jnp.int32(-2)
    assert_same(lambda x, i, j: (x[i, j], x[i], x[i, 0, j]), x, i, j, without=["dynamic_slice"])
    assert_same(lambda x, i, j: x.at[i, j].add(2), x, i, j, without=["scatter-add"])
    assert_same(lambda x, i: x.at[i].get(mode="fill"), x, i, without=["gather"])
    assert_same(lambda x, i, j: x.at[i, j].multiply(2), x, i, j)  # not rewritten


def test_large_arrays_are_left():
    i = jnp.int32(7)
    large, larger = array("int32", 2, LARGEST_READ), array("int32", LARGEST_WRITTEN + 1)
    assert "dynamic_slice" in primitives(elementwise(lambda x, i: x[0, i]), large, i)
    assert "scatter" in primitives(elementwise(lambda x, i: x.at[i].set(0)), larger, i)
    assert_same(lambda x, i: x.at[0, i].set(0), large, i, without=["scatter"])


def test_slices_and_many_indices_are_left():
    x, i = array("float32", 8, 4), jnp.arange(3)
    assert_same(lambda x: (x[i], x[i, 1], x.at[i, 0].set(1), x.at[i].add(1)), x)
    assert_same(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 3), x, i)
    assert_same(lambda x, i: jax.lax.dynamic_update_slice_in_dim(x, x[:2], i, 0), x, i)


@pytest.mark.parametrize("reverse", [False, True])
def test_short_loops_are_written_out(reverse):
    def cumulative(x, start):
        def body(carry, row):
            carry = carry * 2 + row[0]
            return carry, (carry, row[1] > start)

        return jax.lax.scan(body, start, x, reverse=reverse)

    short, long = array("int32", LONGEST_LOOP, 2), array("int32", LONGEST_LOOP + 1, 2)
    assert_same(cumulative, short, jnp.int32(3), without=["scan"])
    assert "scan" in primitives(elementwise(cumulative), long, jnp.int32(3))
    assert_same(cumulative, long, jnp.int32(3))


def test_what_is_inside_of_a_loop_and_a_branch():
    def play(x, i):
        def body(x, k):
            return x.at[k, i].add(x[i, k]), x.max()

        x = jax.lax.cond(i > 1, lambda x: x.at[i].set(-x[i]), lambda x: x * 2, x)
        return jax.lax.scan(body, x, jnp.arange(3))

    gone = ["scan", "scatter", "scatter-add", "dynamic_slice", "reduce_max"]
    for i in range(3):
        assert_same(play, array("int32", 3, 3), jnp.int32(i), without=gone)
    assert "while" in primitives(
        elementwise(lambda x: jax.lax.fori_loop(0, x, lambda i, y: y, x)), 3
    )


@pytest.mark.parametrize("dtype", ["float32", "int32", "bool"])
def test_reductions_of_a_few(dtype):
    x = array(dtype, 5, 4)
    assert_same(lambda x: (x.max(axis=0), x.min(), jnp.any(x > 1), jnp.all(x != 2, axis=1)), x)
    assert_same(lambda x: (jnp.sum(x), jnp.argmax(x, axis=1), jnp.argmax(x > 1, axis=0)), x)
    left = primitives(elementwise(jnp.sum), x) & {"reduce_sum"}
    assert bool(left) == (dtype == "float32")  # their order matters


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_or_and_and_are_of_bits(dtype):
    x = array(dtype, 5, 4)
    gone = ["reduce_or", "reduce_and"]
    assert_same(lambda x: (jnp.bitwise_or.reduce(x), jnp.bitwise_and.reduce(x, 1)), x, without=gone)


def test_keys_and_random_numbers():
    def draw(key, i):
        keys = jax.random.split(key, 4)
        return jax.random.uniform(keys[i], (3,)), jax.random.permutation(keys[1], 5)

    assert_same(draw, jax.random.key(3), jnp.arange(4), without=["dynamic_slice"])


def test_it_is_traced_once_for_each_shape():
    traced = []

    def count(x):
        traced.append(x.shape)
        return x + 1

    rewritten = elementwise(count)
    for size in (2, 3, 2):
        jax.jit(lambda x: rewritten(rewritten(x)))(jnp.ones(size))
    assert traced == [(2,), (3,)]


def test_craftax_is_rewritten_except_on_a_cpu():
    assert craftax.make("Craftax-Classic-Symbolic-v1", {})._step.__name__ == "_step_as_written"
    with mock.patch.object(jax, "default_backend", return_value="gpu"):
        env = craftax.make("Craftax-Classic-Symbolic-v1", {})
    key = jax.random.key(0)
    _, state = jax.eval_shape(env.reset, key)
    assert {"scatter", "scan"} <= primitives(env._step_as_written, key, state, 0)
    gone = {"scan", "reduce_or", "reduce_and", "argmax"}
    assert not gone & primitives(env.step, key, state, 0)


@pytest.mark.parametrize(
    ("name", "num_envs", "chunks"),
    [
        pytest.param("Craftax-Classic-Symbolic-v1", 32, 4, marks=pytest.mark.weekly),
        pytest.param("Craftax-Symbolic-v1", 32, 4, marks=pytest.mark.weekly),
    ],
)
def test_craftax_rewritten_plays_the_same_game(name, num_envs, chunks):
    """Chunks of 100 random steps are equal, on all floors; ended games begin anew between them."""
    with mock.patch.object(jax, "default_backend", return_value="gpu"):
        env = craftax.make(name, {})

    @jax.jit
    @jax.vmap
    def reset(key, floor):
        _, state = env.reset(key)
        if hasattr(state, "player_level"):
            state = state.replace(player_level=floor % state.map.shape[0])
        return state.replace(state_rng=jax.random.key_data(state.state_rng))

    def chunk_of(step):
        def body(state, key):
            action = jax.random.randint(key, (), 0, env.action_space.n)
            obs, state, reward, done, _ = step(key, state, action)
            return state, (obs[::13], reward, done, state.achievements)

        def chunk(state, key):
            state = state.replace(state_rng=jax.random.wrap_key_data(state.state_rng))
            state, seen = jax.lax.scan(body, state, jax.random.split(key, 100))
            return state.replace(state_rng=jax.random.key_data(state.state_rng)), seen

        lowered = jax.jit(jax.vmap(chunk)).lower(state, keys)
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})

    floors = jnp.arange(num_envs, dtype=jnp.int32)
    keys = jax.random.split(jax.random.key(0), num_envs)
    state = reset(keys, floors)
    rewritten, written = chunk_of(env._step), chunk_of(env._step_as_written)
    for number in range(1, chunks + 1):
        ours, theirs = rewritten(state, keys), written(state, keys)
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(x, y)
        state, (_, _, done, _) = ours
        keys = jax.random.split(jax.random.key(number), num_envs)
        state = jax.vmap(select)(done.any(axis=1), reset(keys, floors), state)
