"""launch/coco.py on a small stand-in in COCO's own file format: a run, a CLIP and an Inception with random weights."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest
import random_run
import test_inception
import test_memory
import test_recall
import test_rerank
import test_score
import torch_references
from PIL import Image

from cm3jax import config as configs
from cm3jax.data import pictures as crops
from cm3jax.evaluate import frechet, results, score
from cm3jax.retrieval import encoder as encoders
from cm3jax.sample import generate, rerank
from cm3jax.tokenizers import document
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "launch"))

import coco

SIDE, PICTURES = 8, 7
NET = configs.VQGAN(patch=4, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, attention=(), z=3)
RECIPE = configs.Recipe(
    vocab=Vocab(text=300, image=11, sentinels=4, multiple=8),
    prepare=configs.Prepare(resolution=SIDE),
    image=configs.Image(model=NET),
    decoder=configs.DecoderStage(
        model=configs.Decoder(layers=1, width=16, heads=2, dtype="float32"), packing=configs.Packing("whole", 96)
    ),
    retriever=configs.Retriever(model=test_memory.TINY),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder as COCO 2014 is published, and the annotations of 2017 beside, which are not to be read."""
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (root / "annotations").mkdir()
    (root / "val2014").mkdir()
    images, captions = [], []
    for i in range(PICTURES):
        key, name = 100 + 7 * i, f"COCO_val2014_{100 + 7 * i:012d}.jpg"
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(root / "val2014" / name)
        images.append({"id": key, "file_name": name, "width": 30, "height": 20 + i, "license": 1})
        captions += [{"image_id": key, "id": 10 * i + j, "caption": f"a red dog {i} {j} "} for j in range(5)]
    about = {"info": {"year": 2014}, "licenses": [{"id": 1, "name": "CC BY", "url": "http://x"}]}
    told = about | {"images": images, "annotations": captions}
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps(told))
    (root / "annotations" / "captions_val2017.json").write_text("{}")
    return root


def test_prompts_are_one_caption_of_each_of_different_pictures(files):
    found = coco.prompts(files, PICTURES, 3)
    assert len({one.key for one in found}) == PICTURES
    for one in found:
        i = (int(one.key) - 100) // 7
        assert one.caption in [f"a red dog {i} {j}" for j in range(5)] and one.picture.is_file()
    assert coco.prompts(files, 4, 3) == found[:4]  # a trial is the beginning of the whole
    assert coco.prompts(files, PICTURES, 4) != found
    with pytest.raises(UserError, match=r"--prompts 8: .* has 7 pictures; ask for at most as many"):
        coco.prompts(files, 8, 0)
    with pytest.raises(UserError, match=r"holds no annotations/captions_val2014.json"):
        coco.prompts(files / "val2014", 1, 0)


def test_the_reference_is_the_centre_square_and_made_once(files, tmp_path):
    found = coco.prompts(files, 3, 0)
    coco.reference(found, tmp_path, SIDE)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(times) == 3
    for one in found:
        wanted = crops.crop(np.asarray(Image.open(one.picture)), SIDE)
        assert np.array_equal(np.asarray(Image.open(tmp_path / one.file)), wanted)
    coco.reference(found, tmp_path, SIDE)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_pictures_drawn_otherwise_are_not_mixed(tmp_path):
    coco.agree(tmp_path, {"seed": 1, "sampling": {"top_p": 0.9}})
    coco.agree(tmp_path, {"seed": 1, "sampling": {"top_p": 0.9}})
    with pytest.raises(UserError, match=r"sampling.top_p was 0.9 and is now 0.8; set it back, or draw into another"):
        coco.agree(tmp_path, {"seed": 1, "sampling": {"top_p": 0.8}})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parts", "2", "--part", "2"], "coco.part = 2: must be from 0 to 1"),
        (["--documents", "-1"], "coco.documents"),
        (["--candidates", "0"], "coco.candidates = 0: must be at least 1"),
        (["--top_p", "2"], "sampling.top_p = 2.0: must be above 0 and at most 1"),
        (["--tokens", "2"], "--tokens: no such flag"),
    ],
)
def test_wrong_arguments_are_one_clear_line(argv, message):
    with pytest.raises(UserError, match=message):
        coco.main(["c", "r", "--clip", "x", "--inception", "y", *argv])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = random_run.make(tmp_path_factory.mktemp("run"), RECIPE, ["a red dog 0 1 2 3 4 5 6"] * 9)
    test_memory.untrained(RECIPE, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(run):
    made = generate.load(run)
    return [document.encode(["a red", np.arange(4, dtype=np.uint16)], made.text, made.vocab)] * 2


def settings(files, run, out, **changes):
    given = {"prompts": 6, "candidates": 2, "documents": (0, 1), "batch": 4, "shard": 3, "seed": 5}
    return coco.Coco(str(files), str(run), str(run / "retriever"), "inception.pth", str(out), **(given | changes))


def tools(run):
    """The run's CLIP, and a matrix in place of Inception."""
    found = score.Tools(configs.Score(weights=configs.Weights(clip=str(run / "retriever"))))
    found.inception = test_score.network(weights="random")
    return found


@pytest.mark.slow
def test_the_recipe_with_nothing_in_the_place_of_its_parts(files, tmp_path, capsys):
    """A bank of real documents, CLIP and Inception from files; only their weights are random."""
    run, weights = test_recall.make(tmp_path / "run"), tmp_path / "inception.safetensors"
    shapes = {source.name: source.shape for source in test_inception.files.sources().values()}
    test_inception.write(weights, torch_references.drawn(shapes, 3))
    told = ["--clip", str(run / "retriever"), "--inception", str(weights), "--out", str(tmp_path / "out")]
    coco.main([str(files), str(run), *told, "--prompts", "4", "--candidates", "2", "--documents", "0", "2"])
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert rows[0] == "| result | fid | clip_score |" and len(rows) == 4
    for count in (0, 2):
        result = json.loads((tmp_path / "out" / f"drawn-{count}.json").read_text())
        fid = result["metrics"]["fid"]
        assert fid["value"] > 0 and len(fid["protocol"]["features"]["weights"]) == 64
        assert fid["protocol"]["decoding"]["candidates"] == 2
        for path in (tmp_path / "out" / f"drawn-{count}").glob("*.png"):
            documents = json.loads(Image.open(path).text.get("documents", "[]"))
            assert len({one["key"] for one in documents}) == count

    again = tmp_path / "one.json"
    result["metrics"]["fid"]["protocol"]["decoding"]["candidates"] = 1
    again.write_text(json.dumps(result))
    with pytest.raises(UserError, match="decoding"):
        results.table([tmp_path / "out" / "drawn-0.json", again])


@pytest.mark.slow
def test_the_recipe_from_cocos_files_to_a_table(files, run, pairs, tmp_path):
    told, memory = [], test_rerank.Memory(pairs)
    asked = settings(files, run, tmp_path)
    coco.make(asked, memory, tools(run), told.append)
    table = told[-1].splitlines()
    assert table[0] == "| result | fid | clip_score |" and [row.split()[1] for row in table[2:]] == [
        "drawn-0",
        "drawn-1",
    ]

    found = coco.prompts(files, 6, 5)
    made, clip = generate.load(run, 4), encoders.load(run / "retriever", 4)
    for count in (0, 1):
        drawn = [np.asarray(Image.open(tmp_path / f"drawn-{count}" / one.file)) for one in found]
        shown = [pairs[:count]] * 6
        wanted = rerank.draw(made, clip, [one.caption for one in found], 2, 5, asked.sampling, shown).best()
        assert np.array_equal(drawn, wanted)  # shards of 3 are those of one call
        result = json.loads((tmp_path / f"drawn-{count}.json").read_text())
        real = [np.asarray(Image.open(tmp_path / "reference" / one.file)) for one in found]
        fid = frechet.distance(*(frechet.moments(test_score.vectors(x)) for x in (drawn, real)))
        assert result["metrics"]["fid"]["value"] == pytest.approx(fid, rel=1e-4)
        assert result["metrics"]["fid"]["protocol"]["samples"] == 6
        assert result["drawn"]["documents"] == count and result["drawn"]["candidates"] == 2
        assert result["drawn"]["sampling"]["method"] == "mixture" and result["drawn"]["clip"] == clip.identity
    with Image.open(tmp_path / "drawn-1" / found[4].file) as picture:
        assert picture.text["prompt"] == found[4].caption and picture.text["index"] == "4"
        assert json.loads(picture.text["documents"]) == [{"key": "train/key0", "source": "made up", "license": "CC0"}]

    lost = tmp_path / "drawn-1" / found[4].file
    before, times = lost.read_bytes(), {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn-0").glob("*.png")}
    lost.unlink()
    coco.make(asked, memory, tools(run), told.append)
    assert lost.read_bytes() == before and told[-1] == "\n".join(table)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn-0").glob("*.png")}
    with pytest.raises(UserError, match="candidates"):
        coco.make(dataclasses.replace(asked, candidates=1), memory, tools(run))

    shared = tmp_path / "shared"
    parts = [settings(files, run, shared, parts=2, part=i, documents=(0,), shard=2) for i in (1, 0)]
    coco.make(parts[0], None, tools(run), told.append)
    assert told[-1] == "10 pictures are other hosts'; the one that ends last scores them"
    coco.make(parts[1], None, tools(run), told.append)
    assert told[-1].startswith("| result") and all(
        (shared / "drawn-0" / one.file).read_bytes() == (tmp_path / "drawn-0" / one.file).read_bytes() for one in found
    )
