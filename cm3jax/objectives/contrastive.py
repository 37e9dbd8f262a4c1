"""The contrastive loss of a bi-encoder (arXiv 2103.00020 §2.3): which text of the batch belongs to which picture."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm3jax import sharding


def losses(
    texts: Float[Array, "b z"], pictures: Float[Array, "b z"], scale: Float[Array, ""]
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Return the symmetric InfoNCE loss of each pair in nats, and who found its own.

    Row i of both belongs together; all other rows of the global batch are the wrong answers, on whatever chip they lie.

    Args:
      texts, pictures: Normalised.
      scale: Inverse of the temperature.

    Returns:
      The loss, and {"text_accuracy", "image_accuracy"}: 1 where a text, or a picture, is nearest to its own.
    """
    whole = sharding.constrain(pictures, None, None)  # gathered once: b vectors, where the scores are b x b
    scores = sharding.constrain(scale * (texts @ whole.T), "batch", None)
    own = jnp.sum(texts * pictures, -1) * scale
    by_text, by_image = jax.nn.logsumexp(scores, 1) - own, jax.nn.logsumexp(scores, 0) - own
    here = jnp.arange(len(texts))
    found = {
        "text_accuracy": (jnp.argmax(scores, 1) == here).astype(jnp.float32),
        "image_accuracy": (jnp.argmax(scores, 0) == here).astype(jnp.float32),
    }
    return (by_text + by_image) / 2, found
