"""A small run with random weights: recipe.json, text/, image/ and decoder/, for the tests of drawing and writing."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cm3jax import checkpoint
from cm3jax import config as configs
from cm3jax.nn import decoder, vqgan
from cm3jax.tokenizers import image as images
from cm3jax.tokenizers import text as texts


def random(shapes, seed, scale):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * draw.standard_normal(x.shape, np.float32)), nn.unbox(shapes))


def make(run, recipe, lines, scale=0.5, step=3):
    """Write what `generate.load` needs, and nothing else, into a folder; return it. One device draws with it.

    Args:
      lines: The text tokenizer is trained on.
      step: Number of the decoder's checkpoint.
    """
    side, vocab, net = recipe.prepare.resolution, recipe.vocab, recipe.image.model
    training = dataclasses.replace(recipe.decoder.training, mesh=configs.Mesh(1, 1, 1))
    alone = dataclasses.replace(recipe, decoder=dataclasses.replace(recipe.decoder, training=training))
    (run / "recipe.json").write_text(json.dumps(configs.to_json(alone)))
    texts.train(lines, vocab.text, run / "text" / "tokenizer.model")
    shapes = jax.eval_shape(vqgan.VQGAN(net, vocab.image).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    images.save(run / "image", net, vocab.image, side, random(shapes["params"], 1, scale))
    model = decoder.Decoder(recipe.decoder.model, vocab.size, recipe.decoder.packing.length)
    params = random(jax.eval_shape(lambda key: decoder.init(model, key), jax.random.key(0)), 2, scale)
    manager = checkpoint.open(run / "decoder")
    checkpoint.save(manager, step, {"step": jnp.int32(step), "params": params, "opt_state": {}, "extra": {}}, {})
    manager.close()
    return run
