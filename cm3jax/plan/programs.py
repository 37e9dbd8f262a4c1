"""The train step that a plan compiles: the real one; only its arrays are abstract."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cm3jax import config as configs
from cm3jax import sharding
from cm3jax.train import lm, loop
from cm3jax.vocab import Vocab


def batch(stage: configs.DecoderStage, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a training batch, as `data.packing.arrays` makes it and `sharding.place` lays it out."""
    shape = (stage.training.batch, stage.packing.length)
    kinds = dict.fromkeys(("inputs", "targets", "positions", "segments"), jnp.int32)
    kinds |= {"weights": jnp.float32, "modality": jnp.int8}
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding.rows(mesh)) for name, kind in kinds.items()}


@dataclasses.dataclass(frozen=True)
class Step:
    """A train step, ready to be lowered.

    Attributes:
      stage: With its attention resolved for the devices.
      mesh: The devices.
      compiled: From `loop.compile`, what training runs.
    """

    stage: configs.DecoderStage
    mesh: jax.sharding.Mesh
    compiled: loop.Compiled

    def lower(self) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.compiled.step.lower(self.compiled.abstract, batch(self.stage, self.mesh))


def step(stage: configs.DecoderStage, vocab: Vocab, devices: list[jax.Device]) -> Step:
    """Return the train step of a stage on these devices.

    Raises:
      UserError: if the batch does not divide over them, or an array does not.
    """
    stage = lm.resolve(stage, devices[0])
    mesh = sharding.mesh(stage.training.mesh, devices)
    loop.check_batch(stage.training, mesh, "decoder")
    return Step(stage, mesh, loop.compile(lm.task(stage, vocab), stage.training, mesh, "decoder"))


def local_bytes(tree: Any) -> int:
    """Return the bytes of a sharded abstract tree on one chip."""

    def one(x) -> int:
        count = 1
        for side in x.sharding.shard_shape(x.shape):
            count *= side
        return count * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))
