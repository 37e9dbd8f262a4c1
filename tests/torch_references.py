"""What the tests of pictures' scores need of torch's world: torchvision's modules, and weights that keep maps alive.

PyPI's torchvision carries kernels for CUDA, which do not load beside a CPU build of torch, and then its import fails at
two operators that it describes without asking. Its networks are plain Python: the operators are declared, not defined.
All of it lies apart (references.txt), so that only who imports this module finds it.
"""

import importlib
import importlib.util
import pathlib
import sys

import numpy as np
import torch

sys.path.append(str(pathlib.Path(sys.prefix) / "references"))

OPERATORS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
OPERATORS += ("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)


def _declare():
    """Return the library that declares torchvision's operators; None where its own is at hand."""
    (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
    try:
        for file in pathlib.Path(folder).glob("_C*.so"):
            torch.ops.load_library(file)
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(operator)
        return library


LIBRARY = _declare()


def module(name):
    """Return a module that imports torchvision."""
    return importlib.import_module(name)


torchvision = module("torchvision")


def drawn(shapes, seed=0):
    """Return random tensors {name: array} for {name: shape} of a network of convolutions with normalisations.

    Their sizes keep maps of about one number's size from layer to layer, so that an error is not lost in zeros.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        x = rng.normal(size=shape)
        if len(shape) > 1:
            x *= (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            x = rng.uniform(0.8, 1.2, shape)
        else:
            x *= 0.1
        found[name] = x.astype(np.float32)
    return found
