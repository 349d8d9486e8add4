"""Vmapped runs share conditionals and loops, and each equals the run alone."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from support import QUICK

from trxl.collectives import any_across_vmap
from trxl.training import make_init_and_update

from trainer_PPO_trXL import PPO

ERRAND = {
    **QUICK,
    "ENV_NAME": f"{Path(__file__).with_name('toys.py')}:Errand",
    "RESET_STRATEGY": "pool",
    "RESET_RATIO": 2,
}


def test_anywhere_is_one_answer_for_all_that_are_vmapped_over():
    for one in (None, 17):
        mask = np.arange(24).reshape(2, 3, 4) == one
        expected = bool(mask.any())
        assert jax.jit(any_across_vmap)(mask) == expected
        for vmapped in (jax.vmap, lambda f: jax.vmap(jax.vmap(f))):
            answers = jax.jit(vmapped(any_across_vmap))(mask)
            assert (answers == expected).all()
        unbatched = jax.vmap(jax.vmap(any_across_vmap, out_axes=None), out_axes=None)
        assert unbatched(mask).shape == ()


def equations(jaxpr):
    """Yields all equations of a program, nested ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def has_products(closed_jaxpr):
    """Returns whether a program multiplies matrices, as the network does."""
    return "dot_general" in {equation.primitive.name for equation in equations(closed_jaxpr.jaxpr)}


@pytest.mark.parametrize("nested", [False, True])
def test_truncations_of_vmapped_seeds_are_skipped_where_none_has_one(nested):
    """The update has one `cond` on a scalar for the values of final observations."""
    init, update = make_init_and_update(PPO.check(ERRAND), PPO)
    keys = jax.random.split(jax.random.key(0), (2, 2) if nested else 2)
    for _ in range(1 + nested):
        init, update = jax.vmap(init), jax.vmap(update)
    program = jax.make_jaxpr(update)(jax.eval_shape(init, keys))
    conditions = [e for e in equations(program.jaxpr) if e.primitive.name == "cond"]
    with_network = [e for e in conditions if any(map(has_products, e.params["branches"]))]
    assert len(with_network) == 1
    assert with_network[0].invars[0].aval.shape == ()


@pytest.mark.weekly
def test_seeds_under_vmap_train_as_each_of_them_alone():
    """Seeds equal their runs alone, though truncations and empty pools come at different steps."""
    init, update = make_init_and_update(PPO.check(ERRAND), PPO)

    def run(key):
        return jax.lax.scan(lambda state, _: update(state), init(key), None, 3)

    keys = jax.random.split(jax.random.key(0), 3)
    state, metrics = jax.jit(jax.vmap(run))(keys)
    alone = jax.jit(run)
    assert metrics["num_episodes"].min() > 0
    for i, key in enumerate(keys):
        expected_state, expected = alone(key)
        np.testing.assert_array_equal(state.rollout_state.obs[i], expected_state.rollout_state.obs)
        np.testing.assert_array_equal(
            *(
                jax.random.key_data(x)
                for x in (state.rollout_state.env_keys[i], expected_state.rollout_state.env_keys)
            )
        )
        for name, values in expected.items():
            np.testing.assert_allclose(metrics[name][i], values, rtol=1e-4, atol=1e-5, err_msg=name)
