"""Random streams as functions of (seed, name, step), so that nothing depends on the order of calls."""

import zlib

import jax


def key(seed: int, name: str, step=0) -> jax.Array:
    """Return the jax key of stream `name` at `step`; `step` may be traced."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step)


def rows(key: jax.Array, rows: jax.Array) -> jax.Array:
    """Return one key per row id ([b] ints), so that a row's draws do not depend on its batch mates."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
