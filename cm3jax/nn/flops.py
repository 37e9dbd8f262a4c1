"""Floating-point operations of decoder and retriever in closed form: XLA's own count sees a scanned layer once."""

from cm3jax import config as configs


def step(config: configs.Decoder, vocab: int, rows: int, length: int) -> float:
    """Return the model FLOPs of one training step: what the mathematics needs, recomputation not counted.

    A multiplication and an addition are two. The backward pass is twice the forward one (arXiv 2204.02311 appendix B);
    attention counts the half of its square that a causal mask leaves. Norms, softmax and the optimizer are left out.

    Args:
      vocab: Rows of the output table.
      rows: Of the global batch.
      length: Positions of a row, padding included: the devices compute it too.
    """
    return 3.0 * rows * length * forward(config, vocab, (length + 1) / 2)


def forward(config: configs.Decoder, vocab: int, seen: float | int) -> float:
    """Return the FLOPs of the forward pass per token, which sees `seen` tokens on average, itself among them."""
    return 2.0 * (config.layers * matrices(config) + vocab * config.width) + config.layers * scores(config, seen)


def matrices(config: configs.Decoder) -> int:
    """Return the parameters of the matrices of one layer."""
    mlp, groups = config.mlp_width or 4 * config.width, config.kv_heads or config.heads
    heads = 2 * config.heads + 2 * groups
    return config.width * (heads * config.head_width + (3 if config.activation == "swiglu" else 2) * mlp)


def scores(config: configs.Decoder, seen: float | int) -> float | int:
    """Return the FLOPs of one token's attention to `seen` tokens in one layer, forward: q·k and p·v."""
    return 4 * seen * config.heads * config.head_width


def cached(config: configs.Decoder) -> int:
    """Return the numbers that a token leaves in the cache of a decoding: k and v of all layers."""
    return 2 * config.layers * (config.kv_heads or config.heads) * config.head_width


def contrastive(config: configs.CLIP, rows: int) -> float:
    """Return the model FLOPs of one training step of the retriever over `rows` pairs, counted as in `step`."""
    places = (config.resolution // config.patch) ** 2
    first = 2 * places * 3 * config.patch**2 * config.vision_width
    vision = tower(places + 1, config.vision_width, config.vision_layers, config.size, places + 1)
    text = tower(config.context, config.text_width, config.text_layers, config.size, (config.context + 1) / 2)
    return 3.0 * rows * (first + vision + text + 2 * rows * config.size)


def tower(length: int, width: int, depth: int, size: int, seen: float | int) -> float | int:
    """Return the forward FLOPs of a row's way through one of CLIP's towers, each token of which sees `seen`."""
    return depth * length * (2 * 12 * width**2 + 4 * seen * width) + 2 * width * size
