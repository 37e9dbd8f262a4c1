"""A small run of Chameleon's form with random weights: what an import leaves, for the tests of its use."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cm3jax import checkpoint
from cm3jax import config as configs
from cm3jax.interop import chameleon
from cm3jax.nn import decoder, vqgan
from cm3jax.tokenizers import image as images
from cm3jax.tokenizers import text as texts
from cm3jax.vocab import Vocab

VOCAB = Vocab(text=300, image=16, sentinels=4, multiple=8)
SIDE, CODES, LENGTH = 16, 16, 80
FORM = configs.Form("chameleon", begin=VOCAB.text_start + 298, turn=VOCAB.text_start + 299, request="say")
NET = configs.VQGAN(patch=4, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, attention=(), z=3)
MODEL = configs.Decoder(layers=2, width=32, heads=4, kv_heads=2, tied=False, dtype="float32", **chameleon.FORM)
RECIPE = configs.Recipe(
    vocab=VOCAB,
    form=FORM,
    prepare=configs.Prepare(resolution=SIDE),
    image=configs.Image(model=NET),
    decoder=configs.DecoderStage(
        model=MODEL,
        packing=configs.Packing("whole", LENGTH, most_spans=0, opening=FORM.begin),
        mask=configs.Mask(spans=0.0),
    ),
)


def random(shapes, seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * draw.standard_normal(x.shape, np.float32)), nn.unbox(shapes))


def make(run):
    """Write recipe.json, text/, image/ and decoder/ into a folder; return it."""
    (run / "recipe.json").write_text(json.dumps(configs.to_json(RECIPE)))
    texts.train(["a red circle", "a blue square", "two green dots"] * 3, VOCAB.text, run / "text" / "tokenizer.model")
    net = vqgan.VQGAN(NET, VOCAB.image)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    images.save(run / "image", NET, VOCAB.image, SIDE, random(shapes, 1))
    model = decoder.Decoder(MODEL, VOCAB.size, LENGTH)
    params = random(jax.eval_shape(lambda key: decoder.init(model, key), jax.random.key(0)), 2)
    manager = checkpoint.open(run / "decoder")
    checkpoint.save(manager, 0, {"step": jnp.int32(0), "params": params, "opt_state": {}, "extra": {}}, {})
    manager.close()
    return run
