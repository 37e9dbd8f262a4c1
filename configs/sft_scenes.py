"""Every task of the paper's table 5 on the embedded world, small: edits, boxes, feature images, questions; 48 px.

    cm3jax run configs/pretrain_scenes.py        once: the model that is tuned, and both tokenizers
    cm3jax run configs/sft_scenes.py

Of ten documents six mask exactly what their task asks for (arXiv 2309.02591 §4; the share is ours), the others by the
CM3 law, without its whole stretches (mask.rotate 0): a question that is masked with all its words leaves what a masked
caption does, a picture alone, and a model that has seen both answers "Question: ..." where a caption is asked for. So
tasks are drawn without guidance, whose streams are such masked documents. An answer in words weighs as much as a
picture of 36 codes: of a question's tokens two in sixty are its answer. What stands around an answer that is asked for,
instructions and pictures, has a tenth of the weight; the end of an answer in words, where counts and questions of yes
or no have what follows from what is seen, more than all the rest. Half of the tasks' words are of pieces which
pretraining never saw: their rows of the table start anew. A fifth of the tokens are those of pretraining, so that
less of it is forgotten. The report has the figures of the model before beside those after.
"""

import dataclasses
import pathlib

from cm3jax import config as configs

pretrain = configs.load(pathlib.Path(__file__).with_name("pretrain_scenes.py"))
change = dataclasses.replace

config = change(
    pretrain,
    name="sft-scenes",
    prepare=change(pretrain.prepare, source="scenes:tasks", count=60_000),
    decoder=change(
        pretrain.decoder,
        start="runs/pretrain-scenes",
        packing=change(pretrain.decoder.packing, most_spans=5),  # rows are fuller by a twentieth than with room for 8
        unseen="drawn",
        mask=configs.Mask(spans=2.0, rotate=0.0, answers=0.6, span_weight=36.0, end_weight=50.0, context_weight=0.1),
        mixture=configs.Mixture(sets=("runs/pretrain-scenes/tokens",), weights=(0.78, 0.22)),
        training=change(pretrain.decoder.training, steps=4400),
    ),
    evaluate=change(pretrain.evaluate, draw=tuple(configs.Sampling(temperature=t) for t in (0.5, 1.0, 0.25))),
)
