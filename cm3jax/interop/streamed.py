"""Checkpoints written block by block, for weights that need not fit into memory.

    streamed.save(folder, 0, {"table": streamed.Array(shape, dtype, step, read), ...}, meta={"name": "decoder"})

What is written is a checkpoint of `cm3jax.checkpoint` like any other, with parameters alone: orbax writes all of it but
the numbers, which go to its store one block after another. A block is a chunk of the stored array, so none is written
twice.
"""

import asyncio
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from cm3jax import checkpoint

BLOCK_BYTES = 2**26
"""Of a block, at most, where the array can be cut so: with a 7B's rows of 8 KiB, some thousand of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Array:
    """An array that is read in blocks.

    Attributes:
      block: Entries of a block along each axis.
      read: Slices, one for each axis -> numbers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    block: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def blocks(self) -> Iterator[tuple[slice, ...]]:
        """Yield where each block lies."""
        for start in np.ndindex(*(-(-n // k) for n, k in zip(self.shape, self.block, strict=True))):
            yield tuple(
                slice(i * k, min((i + 1) * k, n)) for i, k, n in zip(start, self.block, self.shape, strict=True)
            )


def blocked(shape: tuple[int, ...], itemsize: int, most: int = BLOCK_BYTES) -> tuple[int, ...]:
    """Return a block's shape: whole along the last axes, as many along the first ones as `most` bytes hold."""
    block, room = [], most // itemsize
    for n in reversed(shape):
        block.append(max(1, min(n, room)))
        room //= max(1, n)
    return tuple(reversed(block))


def save(folder, step: int, params: Any, meta: dict[str, Any]) -> int:
    """Write FOLDER/checkpoints/STEP and return its bytes.

    Args:
      params: Tree of `Array`.
      meta: JSON.
    """
    path = pathlib.Path(folder).absolute() / "checkpoints" / str(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.quiet()
    registry = ocp.type_handlers.create_type_handler_registry((Array, _Handler()))
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    handler = ocp.CompositeCheckpointHandler(**{checkpoint.STATE: state, checkpoint.META: ocp.JsonCheckpointHandler()})
    items = {checkpoint.STATE: ocp.args.PyTreeSave({"params": params}), checkpoint.META: ocp.args.JsonSave(meta)}
    with ocp.Checkpointer(handler) as writer:
        writer.save(path, args=ocp.args.Composite(**items))
    return checkpoint.commit(path)


class _Handler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, with the numbers of an `Array`."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: Array, tspec: dict[str, Any], ts_context: ts.Context):
        async with self._one:  # one block in memory, not one of each array
            spec = tspec | {"metadata": tspec["metadata"] | {"chunks": list(value.block)}}
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=ts_context)
            waiting, size = [], 0
            for at in value.blocks():
                block = np.ascontiguousarray(value.read(at), value.dtype)
                waiting.append(store[at].write(block))
                size += block.nbytes
                if size >= BLOCK_BYTES:  # small ones go together, as each commit is a wait for the disk
                    await asyncio.gather(*waiting)
                    waiting, size = [], 0
            await asyncio.gather(*waiting)

    async def _background_serialize(self, values, infos, args=None):
        self._one = asyncio.Lock()  # belongs to the loop that runs this
        await super()._background_serialize(values, infos, args)
