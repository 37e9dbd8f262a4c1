"""The paper's image tokenizer: 256 px -> 32 x 32 = 1024 codes of 8192 (arXiv 2309.02591 §2.1, arXiv 2203.13131 §3).

    cm3jax prepare SOURCE runs/f8/prepared --resolution 256
    cm3jax train configs/image/f8_8192.py --inputs runs/f8 --stage image \\
        --image.loss.perceptual-weights vgg16_lpips.safetensors

66,890,627 parameters and a discriminator of 2,766,529; channels 128, 128, 256, 512. Make-A-Scene trained 800k steps of
192 pictures, with a face loss (`--image.loss.face 1 --image.loss.face-weights FILE`, for data whose regions name
faces). How to make the files of weights: cm3jax/nn/perceptual.py; without the first, a stated substitute trains.
Learning rate and betas are those of VQGAN's public code (4.5e-6 per picture of the batch, 0.5 and 0.9) [choice].

Not run here: neither its time nor its PSNR nor its codebook usage is measured. Tests hold its shapes and parameter
counts, and train the same code at small sizes.
"""

from cm3jax.config import VQGAN, Image, Optimizer, Prepare, Recipe, Training, Vocab, VQGANLoss

config = Recipe(
    name="image-f8-8192",
    vocab=Vocab(image=8192),
    prepare=Prepare(resolution=256),
    image=Image(
        model=VQGAN(width=128, multipliers=(1, 1, 2, 4), attention=(3,), z=256, dtype="bfloat16"),
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
