"""VQGAN at 16 pixels per code: 256 px -> 16 x 16 = 256 codes of 16384 (arXiv 2012.09841, the public f16 model's shape).

    cm3jax prepare SOURCE runs/f16/prepared --resolution 256
    cm3jax train configs/image/f16_16384.py --inputs runs/f16 --stage image \\
        --image.loss.perceptual-weights vgg16_lpips.safetensors

76,073,859 parameters and a discriminator of 2,766,529; channels 128, 128, 256, 256, 512. A quarter of f8_8192's tokens
per picture, for a coarser picture. The text vocabulary is smaller here, so that all ids stay below 65,536. Learning
rate and betas as in f8_8192 [choice].

Not run here: neither its time nor its PSNR nor its codebook usage is measured. Tests hold its shapes and parameter
counts.
"""

from cm3jax.config import VQGAN, Image, Optimizer, Prepare, Recipe, Training, Vocab, VQGANLoss

config = Recipe(
    name="image-f16-16384",
    vocab=Vocab(text=32_768, image=16_384),
    prepare=Prepare(resolution=256),
    image=Image(
        model=VQGAN(width=128, multipliers=(1, 1, 2, 2, 4), attention=(4,), z=256, dtype="bfloat16"),
        loss=VQGANLoss(adversarial_start=30_000),
        training=Training(
            steps=800_000,
            batch=192,
            ema=0.999,
            optimizer=Optimizer(peak_lr=8.6e-4, warmup=5000, schedule="constant", b1=0.5, b2=0.9, weight_decay=0.0),
            save_every=5000,
            evaluate_every=5000,
            sample_every=5000,
        ),
        reset_dead_after=500,
    ),
)
