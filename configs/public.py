"""From public pictures to a 350M decoder (ours): CC12M as img2dataset downloads it, the f8/8192 tokenizer, then `350m`.

Disk and hours are for 10 million pictures, an assumption: of the 12.4 million links fewer answer every year. RUN lies
on a disk that all hosts see. I of N is each host's own number; a host that was cut off repeats its command.

0. Download, 331 GB and about 5 hours on 16 cores by img2dataset's own page on CC12M (630 pictures/s):

    wget https://storage.googleapis.com/conceptual_12m/cc12m.tsv && sed -i '1s/^/url\\tcaption\\n/' cc12m.tsv
    img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption \\
        --output_format webdataset --output_folder cc12m --processes_count 16 --thread_count 64 \\
        --image_size 256 --resize_mode keep_ratio --disallowed_header_directives '["noai", "noindex"]'

1. Records: 1.2 TB (lossless WebP, about 120 KB a picture); hours = 10e6 / (pictures/s of a host x N) / 3600, where
   `cm3jax bench prepare` measures a host:

    cm3jax prepare cc12m RUN --resolution 256 --validation 0.001 --test 0.003 --host I --hosts N

2. Text tokenizer, one host, a million captions; 1 MB:

    cm3jax train configs/public.py --inputs RUN --stage text

3. Image tokenizer, 800k steps of 192 pictures; 2 checkpoints of about 1.1 GB (weights, their average, two moments):

    cm3jax train configs/public.py --inputs RUN --stage image

4. Tokens: 21 GB, uint16, 1024 codes and a caption a picture; hours = 10e6 / (pictures/s of a chip x chips) / 3600,
   where every host prints its pictures/s per chip:

    cm3jax encode RUN --tokens.batch 512 --tokens.workers 16 --host I --hosts N

5. Decoder: 100k steps of 512 x 4096 tokens, 210 billion, about 20 epochs; 2 checkpoints of 4.5 GB. On v5e-64 25 to 43
   hours, 1,527 to 2,705 chip-hours, by the first line's estimate; the third line is for a machine that sees the run in
   a bucket only:

    cm3jax plan configs/public.py --topology v5e-64
    cm3jax train configs/public.py --inputs RUN
    cm3jax train configs/public.py --inputs gs://BUCKET/RUN --out runs/public

6. Scores, and samples:

    cm3jax evaluate RUN
    cm3jax generate RUN "a lighthouse at dusk"

Not run here at this size: tests/test_public.py runs every stage on a stand-in of the same format, made small by flags.
"""

import dataclasses
import pathlib

from cm3jax import config as configs

here, change = pathlib.Path(__file__).parent, dataclasses.replace
image = configs.load(here / "image" / "f8_8192.py").image
decoder = configs.load(here / "cm3leon" / "350m.py").decoder

config = configs.Recipe(
    name="public",
    prepare=configs.Prepare(source="cc12m", resolution=256, validation=0.001, test=0.003),
    image=image,
    tokens=configs.Tokens(batch=512, workers=16),
    decoder=change(
        decoder,
        training=change(
            decoder.training,
            steps=100_000,
            batch=512,  # a quarter of the paper's, so half its learning rate
            optimizer=change(decoder.training.optimizer, peak_lr=3e-4),
            workers=4,
            evaluate_every=5000,
            sample_every=5000,
        ),
    ),
)
