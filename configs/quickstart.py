"""The whole CM3Leon job on two CPU cores: tokenizers, decoder, pictures and captions of embedded scenes at 64 px.

bash launch/quickstart.sh            (or: cm3jax run configs/quickstart.py)
"""

from cm3jax.config import (
    VQGAN,
    Decoder,
    DecoderStage,
    Evaluate,
    Image,
    Mask,
    Optimizer,
    Packing,
    Prepare,
    Recipe,
    Sampling,
    Text,
    Training,
    Vocab,
    VQGANLoss,
)

config = Recipe(
    name="quickstart",
    vocab=Vocab(text=512, image=512, sentinels=16, multiple=64),
    prepare=Prepare(source="scenes:easy", resolution=64, count=20_000),
    text=Text(sample=10_000),
    image=Image(
        # Codes that see their own 8x8 pixels only are easy for the decoder to learn.
        model=VQGAN(
            patch=8,
            width=64,
            multipliers=(1,),
            encoder_blocks=1,
            decoder_blocks=2,
            encoder_kernel=1,
            attention=(),
            middle=False,
            groups=0,
            z=8,
            l2_normalise=True,
            codebook_ema=0.95,
        ),
        loss=VQGANLoss(l1=0.0, l2=1.0, perceptual=0.0, adversarial=0.0),
        training=Training(
            steps=1000,
            batch=32,
            evaluate_every=200,
            ema=0.99,
            optimizer=Optimizer(
                name="muon",
                muon_lr=0.04,
                peak_lr=3e-3,
                warmup=20,
                schedule="cosine",
                final_fraction=0.02,
                weight_decay=0.0,
            ),
        ),
        seed_after=200,
        reset_dead_after=20,
    ),
    decoder=DecoderStage(
        model=Decoder(
            layers=4,
            width=128,
            heads=4,
            position="both",
            qk_norm=True,
            init_std=0.02,
            position_std=0.02,
            dtype="float32",
            remat="none",
        ),
        packing=Packing(kind="whole", length=112, documents=1, most_spans=4, picture=64),
        mask=Mask(spans=1.0, rotate=0.5, captions=0.75),
        training=Training(
            steps=2800,
            batch=16,
            evaluate_every=400,
            optimizer=Optimizer(
                name="muon",
                muon_lr=0.04,
                peak_lr=3e-3,
                warmup=100,
                schedule="cosine",
                final_fraction=0.02,
                weight_decay=0.0,
            ),
            save_every=1000,
        ),
    ),
    evaluate=Evaluate(
        samples=512,
        draw=(
            Sampling(temperature=0.5, guidance=1.5),  # the first draws what nothing here can judge: your own pictures
            Sampling(temperature=1.0),
            Sampling(temperature=0.5),
            Sampling(temperature=0.25),
            Sampling(temperature=0.25, guidance=1.5),
        ),
    ),
)
