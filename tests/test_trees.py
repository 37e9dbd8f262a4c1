import jax
import jax.numpy as jnp

from cm3jax import trees

TREE = {"a": {"kernel": jnp.zeros((3, 5)), "scale": jnp.zeros(7, jnp.bfloat16)}, "b": [jnp.zeros(2, jnp.int8)]}


def test_leaves_are_named_by_their_path():
    assert list(trees.named_leaves(TREE)) == ["a/kernel", "a/scale", "b/0"]


def test_size_counts_scalars_and_nbytes_their_bytes():
    assert trees.size(TREE) == 15 + 7 + 2
    assert trees.nbytes(TREE) == 15 * 4 + 7 * 2 + 2


def test_shapes_count_like_arrays():
    shapes = jax.eval_shape(lambda: TREE)
    assert trees.size(shapes) == trees.size(TREE)
    assert trees.nbytes(shapes) == trees.nbytes(TREE)
