"""How devices are laid out to draw, where nobody says it: not as for training, which gathers weights for every step."""

import math
import sys

import jax

from cm3jax import config as configs
from cm3jax import sharding, trees
from cm3jax.nn import decoder


def model(recipe: configs.Recipe) -> decoder.Decoder:
    """Return the network of a recipe's decoder, as `train.lm.model`, which sampling must not know."""
    return decoder.Decoder(recipe.decoder.model, recipe.vocab.size, recipe.decoder.packing.length)


def mesh(recipe: configs.Recipe, count: int, memory: int | None) -> configs.Mesh:
    """Return the sizes of the mesh that a recipe's decoder draws on.

    Weights that take at most a quarter of a device, as float32, are copied to each, and the rows of a batch split:
    what is drawn is then the same on any number of devices, and they exchange nothing. Larger ones are split along
    tensor as far as heads, feed-forward and vocabulary divide, and only over what is left along fsdp, which gathers
    them for every token; devices that fit neither are left out. A recipe that names a mesh of its own keeps it where it
    fits.

    Args:
      count: Devices, of one slice.
      memory: Bytes of one; None: not known, as on a CPU, whose devices share the host's: copies.
    """
    trained, network = recipe.decoder.training.mesh, recipe.decoder.model
    sizes = (trained.replica, trained.fsdp, trained.tensor)
    needed = math.prod(max(1, size) for size in sizes)
    if trained != configs.Mesh() and (count % needed == 0 if -1 in sizes else needed <= count):
        return trained
    if memory is None or 16 * trees.size(_boxed(model(recipe))) <= memory:
        return configs.Mesh(replica=-1, fsdp=1)
    sides = (network.heads, network.kv_heads or network.heads, network.mlp_width or 4 * network.width)
    tensor = math.gcd(count, *sides, recipe.vocab.size)
    return configs.Mesh(fsdp=math.gcd(count // tensor, network.width, recipe.vocab.size // tensor), tensor=tensor)


def abstract(network: decoder.Decoder, mesh: jax.sharding.Mesh):
    """Return the shapes of a network's parameters, unboxed, with their shardings on a mesh.

    Raises:
      UserError: if a dimension does not divide over the mesh.
    """
    boxed = _boxed(network)
    # Only fsdp splits a table of positions, so that it may be whole here.
    placed = sharding.shardings(mesh, boxed, strict="", limit=sys.maxsize)
    return jax.tree.map(lambda x, s: x.update(sharding=s), sharding.unbox(boxed), placed)


def _boxed(network: decoder.Decoder):
    return jax.eval_shape(lambda key: decoder.init(network, key), jax.random.key(0))
