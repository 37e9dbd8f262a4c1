"""A small run of Chameleon's form with random weights: what an import leaves, for the tests of its use."""

import random_run

from cm3jax import config as configs
from cm3jax.interop import chameleon
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


def make(run):
    """Write recipe.json, text/, image/ and decoder/ into a folder; return it."""
    return random_run.make(run, RECIPE, ["a red circle", "a blue square", "two green dots"] * 3, scale=0.4, step=0)
