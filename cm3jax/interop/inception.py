"""FID's Inception weights, pt_inception-2015-12-05 of pytorch-fid -> parameters of `nn.inception`.

params, digest = inception.load("pt_inception-2015-12-05-6726825d.pth")    # or the same tensors as safetensors

torch's kernels are [out, in, h, w], ours [h, w, in, out]; a layer `X` has X.conv.weight and, of its normalisation,
X.bn.weight, .bias, .running_mean and .running_var.
"""

import functools
import re
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cm3jax import sharding
from cm3jax.interop import mapped, tensors
from cm3jax.nn import inception
from cm3jax.types import UserError

NAMES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}
HEAD = {"kernel": "weight", "bias": "bias"}
"""Ends of our parameters' paths -> ends of the tensors' names, in the layers and in `fc`."""
NOT_WEIGHTS = re.compile(r".*\.bn\.num_batches_tracked")
"""Counters of the training that newer torch writes beside the weights."""
WANTED = "take pt_inception-2015-12-05 of pytorch-fid; torchvision's own Inception is another network"


class Source(NamedTuple):
    """Where one of our arrays comes from: a tensor's name and shape."""

    name: str
    shape: tuple[int, ...]


@functools.cache
def sources() -> dict[str, Source]:
    """Return the tensor of each of our parameters, by its path."""
    net, picture = inception.Inception(), jax.ShapeDtypeStruct((1, inception.SIDE, inception.SIDE, 3), jnp.float32)
    shapes = sharding.unbox(jax.eval_shape(net.init, jax.random.key(0), picture)["params"])
    found = {}
    for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
        layer, _, end = path.rpartition("/")
        name = f"{layer.replace('/', '.')}.{(HEAD if layer == 'fc' else NAMES)[end]}"
        found[path] = Source(name, tuple(leaf.shape[i] for i in _turned(len(leaf.shape))))
    return found


def _turned(dimensions: int) -> tuple[int, ...]:
    """Return the order in which torch has the dimensions of one of our arrays."""
    return {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[dimensions]


def load(path) -> tuple[dict[str, Any], str]:
    """Return the parameters in a file, float32, and the file's SHA-256.

    Raises:
      UserError: naming the tensor that is missing, has another shape, or is left over.
    """
    found = tensors.open(path)
    wanted = sources()
    compare(found, {source.name: source.shape for source in wanted.values()})
    params = {}
    for place, source in wanted.items():
        x = np.asarray(found.read(source.name), np.float32)
        if not np.isfinite(x).all():
            raise UserError(f"Inception weights {str(path)!r}: {source.name} has numbers that are not finite; {WANTED}")
        params[place] = np.ascontiguousarray(x.transpose(np.argsort(_turned(x.ndim))))
    return flax.traverse_util.unflatten_dict(params, sep="/"), tensors.digest(found)


def compare(found: mapped.Tensors, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise a UserError that names the first tensor which is not as the network has it."""
    where = f"Inception weights {str(found.path)!r}"
    mapped.fit(found.found, shapes, where, fix=f"; {WANTED}")
    if extra := sorted(name for name in set(found.found) - set(shapes) if not NOT_WEIGHTS.fullmatch(name)):
        raise UserError(
            f"{mapped.called(found.found, extra[0], where)} is no tensor of it ({len(extra)} such); {WANTED}"
        )
