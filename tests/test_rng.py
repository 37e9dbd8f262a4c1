import jax
import jax.numpy as jnp
import numpy as np

from cm3jax import rng


def bits(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def test_a_stream_is_a_function_of_seed_name_and_step():
    assert bits(rng.key(3, "mask", 7)) == bits(rng.key(3, "mask", 7))
    others = [rng.key(4, "mask", 7), rng.key(3, "init", 7), rng.key(3, "mask", 8), rng.key(3, "mask")]
    assert all(bits(other) != bits(rng.key(3, "mask", 7)) for other in others)


def test_the_step_may_be_traced():
    traced = jax.jit(lambda step: jax.random.key_data(rng.key(3, "mask", step)))(7)
    assert np.array_equal(traced, jax.random.key_data(rng.key(3, "mask", 7)))


def test_a_rows_key_does_not_depend_on_its_batch_mates():
    key = rng.key(0, "sample")
    together = jax.random.key_data(rng.rows(key, jnp.array([5, 2, 11])))
    alone = jax.random.key_data(rng.rows(key, jnp.array([2])))
    assert np.array_equal(together[1], alone[0])
