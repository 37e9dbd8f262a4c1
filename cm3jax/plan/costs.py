"""FLOPs and bytes of one training step in closed form: what a compiler's count of loops and kernels does not tell.

A product of [a, b] and [b, c] costs 2abc. Nothing else is counted as a FLOP.
"""

import dataclasses
from typing import NamedTuple

from cm3jax import config as configs
from cm3jax.nn import flops as closed

BLOCK = 512
"""Queries of a block of the attention kernels; for each, the keys and values before it come from HBM anew."""


Number = int | float


class Flops(NamedTuple):
    """FLOPs of one step over all chips."""

    model: Number
    """Matrices and output table, forward and backward: 6 a parameter and token. Looking a row up costs nothing."""
    attention: Number
    """Scores and their sum of values, forward and backward, of the keys that a query may see (half of all)."""
    recompute: Number
    """What the backward pass does again: layers by the remat policy, scores by the kernel, logits by the chunk."""

    @property
    def useful(self) -> Number:
        """What MFU counts."""
        return self.model + self.attention


class Work(NamedTuple):
    """What one chip does in one step."""

    matrices: Number
    """FLOPs of products with parameters."""
    attention: Number
    """FLOPs of attention, whole squares where the path at hand computes them."""
    hbm: Number
    """Bytes between the chip and its HBM, if XLA fuses only what stands beside a product into it."""
    host: Number
    """Bytes to and from the host's memory."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the costs depend on.

    Attributes:
      stage: With attention and remat resolved.
      vocab: Rows of the embedding table.
      params: Parameters in all.
      data: Chips that the rows are split over.
      tensor: Chips that each row is split over.
      shards: Chips that the state is split over.
      again: What the backward pass repeats; None: by the stage's remat.
      host_values: Values of a token and layer that wait in the host's memory for the backward pass; None: as again.
    """

    stage: configs.DecoderStage
    vocab: int
    params: int
    data: int
    tensor: int
    shards: int
    again: "Again | None" = None
    host_values: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all chips."""
        return self.stage.training.batch * self.stage.packing.length


def flops(shape: Shape) -> Flops:
    """Return the FLOPs of one step."""
    model, length = shape.stage.model, shape.stage.packing.length
    layers, head = model.layers * closed.matrices(model), shape.vocab * model.width
    visible = model.layers * closed.scores(model, length) / 2
    again = _again(shape)
    recompute = 2 * layers * again.matrices + visible * again.attention
    recompute += 2 * head if length > shape.stage.loss_chunk else 0
    recompute += visible * KERNEL_AGAIN if model.attention in ("splash", "cudnn") else 0
    return Flops(*(shape.tokens * x for x in (6 * (layers + head), 3 * visible, recompute)))


KERNEL_AGAIN = 1.5
"""A flash kernel's backward pass computes the scores and their gradient for dq and again for dk, dv: 7 products where
the forward pass has 2 and the mathematics needs 4 (arXiv 2205.14135 algorithm 4, split in two kernels)."""


class Again(NamedTuple):
    """How much of the forward pass the backward pass runs again."""

    matrices: Number
    attention: Number


def _again(shape: Shape) -> Again:
    """Return what `nn.decoder.kept` does not keep; of attention under "dots", only a kernel's results are kept."""
    model = shape.stage.model
    kept = 0 if model.attention == "splash" else 1
    policies = {"none": Again(0, 0), "dots": Again(0, kept), "full": Again(1, 1), "offload": Again(1, 1)}
    return policies[model.remat] if shape.again is None else shape.again


def _host_values(shape: Shape) -> int:
    kept = shape.stage.model.width if shape.stage.model.remat == "offload" else 0
    return kept if shape.host_values is None else shape.host_values


def work(shape: Shape) -> Work:
    """Return what one chip does."""
    model, length, chips = shape.stage.model, shape.stage.packing.length, shape.data * shape.tensor
    found, again = flops(shape), _again(shape)
    head_again = 2 * shape.vocab * model.width * shape.tokens if length > shape.stage.loss_chunk else 0
    matrix_again = 2 * model.layers * closed.matrices(model) * again.matrices * shape.tokens + head_again
    attention = found.attention + found.recompute - matrix_again
    attention *= 1 if model.attention in ("splash", "cudnn") else 2  # XLA computes what the mask then hides
    return Work(
        matrices=(found.model + matrix_again) / chips,
        attention=attention / chips,
        hbm=_hbm(shape),
        host=2.0 * 2 * _host_values(shape) * model.layers * shape.tokens / chips,
    )


def kept(model: configs.Decoder) -> Number:
    """Return the values of a token and layer that wait on the chip for the backward pass, roughly."""
    d, inner, mlp = model.width, model.heads * model.head_width, model.mlp_width or 4 * model.width
    products = 3 * d + 2 * inner + (2 if model.activation == "swiglu" else 1) * mlp
    policies = {"none": 2 * _layer_values(model, 1), "dots": products, "full": d, "offload": d / 8}
    return policies[model.remat]


def _hbm(shape: Shape) -> Number:
    """Return the bytes that one chip reads and writes.

    Values are two bytes; master weights, their gradients and moments, and scores of the vocabulary four.
    """
    stage, model, length = shape.stage, shape.stage.model, shape.stage.packing.length
    parts, tensor = stage.training.accumulate, shape.tensor
    tokens, again = shape.tokens / shape.data, _again(shape)
    forward = 1 + again.matrices
    # Gathered weights: written and read forward (again in recomputation), read backward; gradients written and read.
    weights = 2 * (2 * forward + 1 + 2) * model.layers * closed.matrices(model) / tensor
    # Forward: inputs and outputs of every product, norms (2 d), residuals (3 d). Backward: twice that.
    layer = 2 * (forward + 2) * _layer_values(model, tensor) * model.layers
    attention = 2 * model.layers * _attention_values(model, length, 1 + again.attention) / tensor
    chunks = -(-length // stage.loss_chunk)
    logits = 4 * 9 * shape.vocab / tensor  # three passes forward, again in recomputation, and backward
    tables = parts * shape.vocab * model.width / tensor * (4 * 3 * chunks + 2 * 4 + 4 * 4)
    optimizer = shape.params / shape.shards * (4 * 8 + (8 * parts if parts > 1 else 0))
    return tokens * (layer + attention + logits) + parts * weights + tables + optimizer


def _layer_values(model: configs.Decoder, tensor: int) -> Number:
    """Return the values that one token's forward pass of a layer reads and writes, attention aside."""
    d, mlp, groups = model.width, model.mlp_width or 4 * model.width, model.kv_heads or model.heads
    inner, products = model.heads * model.head_width, 3 if model.activation == "swiglu" else 2
    split = 2 * inner + 2 * groups * model.head_width + products * mlp  # what in-products write, out-products read
    whole = 3 * d + d + (products - 1) * d + d + 2 * (2 * d) + 2 * (3 * d)
    return split / tensor + whole


def _attention_values(model: configs.Decoder, length: int, forward: Number) -> Number:
    """Return the values that one token's attention reads and writes, all passes."""
    width, groups = model.heads * model.head_width, model.kv_heads or model.heads
    if model.attention not in ("splash", "cudnn"):
        return 2 * length * model.heads * 4 * (forward + 2)  # float32 scores in four passes: two values each
    keys = length / BLOCK / 2 * 2 * groups * model.head_width  # each block of queries reads half of them, on average
    return forward * (2 * width + keys) + 2 * (4 * width + keys)
