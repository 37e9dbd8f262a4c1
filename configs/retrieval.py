"""Retrieval in small: named things of `scenes:rare`, whose looks a memory bank tells, on two CPU cores.

cm3jax run configs/retrieval.py
python launch/retrieval_ablation.py WORK    what the memory brings: trains six decoders, see there
"""

import dataclasses
import pathlib

from cm3jax import config as configs

quickstart = configs.load(pathlib.Path(__file__).with_name("quickstart.py"))
change = dataclasses.replace
muon = change(quickstart.decoder.training.optimizer, warmup=100)

config = change(
    quickstart,
    name="retrieval",
    # 48 pixels are 36 codes, with a caption 51 tokens on average and 59 at most: four documents fill a row.
    prepare=change(quickstart.prepare, source="scenes:rare", resolution=48, count=20_000),
    retrieve=True,
    # The paper's retriever is a frozen CLIP, which has seen far more of the world than the decoder; so it is here.
    retriever=configs.Retriever(
        splits=("train", "web", "web", "bank", "late"),
        model=configs.CLIP(
            resolution=48,
            patch=16,
            vision_width=128,
            vision_layers=2,
            vision_heads=4,
            context=24,
            text_width=128,
            text_layers=2,
            text_heads=4,
            size=128,
        ),
        training=configs.Training(
            # Muon and many wrong answers a batch: with AdamW and 128 pairs it hardly learns what names mean.
            steps=2400,
            batch=256,
            evaluate_every=600,
            optimizer=muon,
        ),
    ),
    # What the decoder trains with; `retrieve build RUN --extend --bank.splits bank late` adds what came afterwards.
    # Copies of what is drawn and scored are never shown; of what was trained on they may be.
    bank=configs.Bank(splits=("bank",), held_out=("validation", "test", "composition")),
    # A small CLIP gives everything that fits a score above the paper's 0.9; copies are refused by their hash anyway.
    # One by picture and one by text, and no word of the query dropped: with the paper's two of each and 20 % dropout,
    # by which a name of two syllables is lost in nearly half the queries, the one document that helps was shown a
    # quarter of the time, and nothing was copied from it.
    neighbours=configs.Neighbours(by_image=1, by_text=1, most_score=1.0, most_alike=0.98, dropout=0.0),
    decoder=change(
        quickstart.decoder,
        packing=change(quickstart.decoder.packing, length=232, documents=0, picture=36),
        mask=change(quickstart.decoder.mask, spans=1.0),
        # As in RA-CM3 (arXiv 2211.12561), not 1 as in CM3Leon: on an earlier form of the level, with a catalogue that
        # counts as much as all else, names were learned by heart, and nothing was taken from what is shown.
        retrieved=configs.Retrieved(least=0, most=2, weight=0.1),
        training=change(quickstart.decoder.training, steps=6000, batch=8, optimizer=muon),
    ),
    evaluate=change(
        quickstart.evaluate,
        draw=(configs.Sampling(temperature=0.5), configs.Sampling(temperature=0.25)),
        documents=(0, 1, 2),
    ),
)
