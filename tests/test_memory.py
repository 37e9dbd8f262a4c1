"""A run's memory: its stages, the questions that it answers, and the command line, with a small encoder."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import fake_encoder
import jax
import numpy as np
import pytest
from PIL import Image

from cm3jax import cli, config, run, sharding
from cm3jax.data import neighbours as files
from cm3jax.data import sources_scenes, tokens
from cm3jax.retrieval import bank, encoder, memory, search, sheet
from cm3jax.tokenizers import clip as tokenizers
from cm3jax.train import clip
from cm3jax.types import UserError

TINY = config.CLIP(
    resolution=16,
    patch=8,
    vision_width=16,
    vision_layers=1,
    vision_heads=1,
    context=24,
    text_width=16,
    text_layers=1,
    text_heads=1,
    size=16,
)
RECIPE = config.Recipe(
    prepare=config.Prepare(source="scenes:easy", resolution=16, count=60, workers=1),
    retrieve=True,
    retriever=config.Retriever(model=TINY, training=config.Training(steps=2, batch=8)),
    bank=config.Bank(shard=40, batch=32),
    neighbours=config.Neighbours(most_score=1.0),
)
NO_LIMITS = config.Neighbours(most_score=1.0, most_alike=1.0)


def untrained(recipe, folder):
    """Leave a retriever that nobody trained, which its own tests do: that takes a compiler's minute."""
    tokenizer = tokenizers.load(folder / "text")
    state = jax.jit(lambda key: sharding.unbox(clip.task(recipe.retriever, tokenizer.rows).init(key)))(
        jax.random.key(0)
    )
    encoder.save(folder / "retriever", recipe.retriever.model, state.params, tokenizer)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a run with a memory, made by the stages, and made-up tokens."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sources_scenes, "HELD_OUT", 12)
    patch.setitem(run.STAGES, "retriever", dataclasses.replace(run.STAGES["retriever"], call=untrained))
    folder = tmp_path_factory.mktemp("run")
    for name in ("prepare", "text"):
        run.run(RECIPE, folder, only=name)
    run.build_memory(RECIPE, folder)
    tokens.write(folder / "tokens", "train", [(str(i), np.arange(i + 1)) for i in range(60)])
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def opened(made):
    return memory.load(made)


@pytest.fixture(scope="module")
def limitless(opened):
    """Return a memory that passes nothing over for being too much alike."""
    return dataclasses.replace(opened, settings=NO_LIMITS)


def test_the_stages_leave_a_bank_and_neighbours_of_every_split(made, opened):
    assert len(opened.bank) == 60
    assert len(opened.bank.shards) == 2
    sizes = {"train": 60, "validation": 12, "test": 12, "composition": 12}
    for split, size in sizes.items():
        assert len(files.Neighbours(made / "neighbours", split)) == size
    rows = np.stack([files.Neighbours(made / "neighbours", "train")[i] for i in range(60)])
    assert (rows >= 0).all() and rows.max() < 60
    assert not (rows == np.arange(60)[:, None]).any()


def test_a_finished_memory_is_left_alone(made, capsys):
    before = {p: p.stat().st_mtime_ns for name in run.MEMORY for p in (made / name).rglob("*")}
    run.build_memory(RECIPE, made)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert capsys.readouterr().out.count("up to date") == 3


def test_a_document_is_found_by_its_own_text_with_its_tokens_and_record(limitless):
    for i in (0, 39, 40, 59):
        place, record = limitless.bank.place(i), limitless._records("train")[i]
        (found,) = limitless.find(texts=[record.parts[0]], count=60)
        assert [x.id for x in found[:20]].count(i) == 1 and len(found) == 60
        scores = [x.score for x in found]
        assert scores == sorted(scores, reverse=True)
        (own,) = (x for x in found if x.id == i)
        assert (own.split, own.index, own.key) == tuple(place)[:3] == ("train", i, record.key)
        assert own.license == "Apache-2.0" and own.source == "scenes:easy"
        assert limitless.record(own).parts[0] == record.parts[0]
        assert np.array_equal(limitless.ids(own), np.arange(i + 1))
        assert limitless.ids(own).dtype == np.uint16


def test_the_scores_are_the_inner_products(opened):
    text = "a large red circle top left, on white"
    (found,) = opened.find(texts=[text], count=5)
    vectors = opened.bank.vectors(np.array([x.id for x in found]))
    assert np.allclose([x.score for x in found], vectors @ opened.encoder.texts([text])[0], atol=1e-6)


def test_a_picture_finds_all_but_its_copy_and_the_copy_is_among_the_first_that_its_text_finds(limitless):
    for i in (7, 22, 59):
        text, picture = limitless._records("train")[i].parts
        (by_picture,) = limitless.find(pictures=[picture], count=60)
        assert {x.id for x in by_picture} == set(range(60)) - {i}
        (by_text,) = limitless.find(texts=[text], count=10)
        assert i in [x.id for x in by_text]
        (by_both,) = limitless.find(texts=[text], pictures=[picture], count=60)
        assert {x.id for x in by_both} == set(range(60)) - {i}


def test_a_query_of_text_and_picture_is_the_mean_of_both(opened):
    record = opened._records("test")[0]
    text, picture = [record.parts[0]], [record.parts[1]]
    found = opened.find(texts=text, pictures=picture, count=3)[0]
    vector = (opened.encoder.texts(text) + opened.encoder.pictures(picture))[0] / 2
    assert np.allclose(
        [x.score for x in found], opened.bank.vectors(np.array([x.id for x in found])) @ vector, atol=1e-6
    )


def test_a_query_with_no_text_left_finds_nothing_and_the_others_do(opened):
    assert opened.find(texts=["a red circle"], dropout=1.0) == [[]]
    none, some = opened.find(texts=["", "a red circle"], count=2)
    assert none == [] and len(some) == 2


def test_a_query_alone_is_the_query_among_others(opened):
    texts = ["a red circle", "a small blue star", "on white: top left a large red circle"]
    together = opened.find(texts=texts, count=3)
    for text, found in zip(texts, together, strict=True):
        (alone,) = opened.find(texts=[text], count=3)
        assert [x.id for x in alone] == [x.id for x in found]


@pytest.mark.parametrize("given", [{}, {"texts": ["a"], "pictures": []}])
def test_wrong_questions_are_refused(opened, given):
    with pytest.raises(UserError, match="as many of one as of the other"):
        opened.find(**given)


def test_a_run_without_a_bank_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no memory bank.*retrieve build"):
        memory.load(tmp_path)


def test_a_retriever_that_was_exchanged_is_refused(made, tmp_path):
    for name in ("recipe.json", "bank"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "retriever").mkdir()
    found = encoder.load(made / "retriever")
    params = {**found.params, "logit_scale": found.params["logit_scale"] + 1}
    encoder.save(tmp_path / "retriever", found.config, params, found.tokenizer)
    with pytest.raises(UserError, match="vectors cannot be compared"):
        memory.load(tmp_path)


def test_the_bank_grows_and_changes_its_index_without_a_vector_made_again(made, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    with pytest.raises(UserError, match=r"bank.search was \"flat\" and is now \"hnsw\""):
        run.build_memory(dataclasses.replace(RECIPE, bank=dataclasses.replace(RECIPE.bank, search="hnsw")), folder)
    wider = dataclasses.replace(RECIPE.bank, search="hnsw", splits=("train", "composition"))
    larger = dataclasses.replace(RECIPE, bank=wider)
    before = {p: p.stat().st_mtime_ns for p in (folder / "bank").glob("train*")}
    for name, wrong in (("splits", ("train", "more")), ("held_out", ("tests",))):
        odd = dataclasses.replace(RECIPE, bank=dataclasses.replace(RECIPE.bank, **{name: wrong}))
        with pytest.raises(UserError, match=f"no split '{wrong[-1]}'"):
            run.build_memory(odd, folder, extend=True)
    capsys.readouterr()
    run.build_memory(RECIPE, folder)
    assert capsys.readouterr().out.count("up to date") == 3, "what was refused has changed nothing"
    run.extend_bank(larger, folder)  # and an interruption
    run.build_memory(larger, folder, extend=True)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    grown = memory.load(folder)
    assert grown.bank.documents == {"train": 60, "composition": 12}
    assert isinstance(grown.searcher, search.Approximate)
    assert "bank: hnsw finds 100.0% of the 10 nearest" in capsys.readouterr().out
    assert len(files.Neighbours(folder / "neighbours", "composition")) == 12
    with pytest.raises(UserError, match="can only grow at their end"):
        run.build_memory(RECIPE, folder, extend=True)


def test_an_interrupted_bank_embeds_only_the_shards_that_are_missing(made, tmp_path, monkeypatch):
    recipe, embed = dataclasses.replace(RECIPE, bank=dataclasses.replace(RECIPE.bank, shard=16)), encoder.embed

    def build(name, most):
        """Build a bank, interrupted after `most` shards; return its files, and the keys embedded for each shard."""
        embedded, folder = [], tmp_path / name
        if not folder.exists():
            shutil.copytree(made, folder, ignore=shutil.ignore_patterns("bank", "neighbours"))

        def counted(found, records, say):
            if len(embedded) == most:
                raise KeyboardInterrupt
            records = list(records)
            embedded.append([record.key for record in records])
            return embed(found, iter(records), say)

        monkeypatch.setattr(encoder, "embed", counted)
        with contextlib.suppress(KeyboardInterrupt):
            run.run(recipe, folder, only="bank")
        return {p.name: p.read_bytes() for p in (folder / "bank").iterdir() if p.name != "stage.json"}, embedded

    (whole, every), (_, first), (found, second) = build("whole", 9), build("cut", 2), build("cut", 9)
    assert [len(keys) for keys in every] == [16, 16, 16, 12] and (first, second) == (every[:2], every[2:])
    assert found == whole and len(found) == 4 * 4 + 2


def test_a_finished_bank_is_good_under_another_size_of_shards(made, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    smaller = dataclasses.replace(RECIPE, bank=dataclasses.replace(RECIPE.bank, shard=7))
    run.build_memory(smaller, folder)
    assert capsys.readouterr().out.count("up to date") == 3
    before = {p: p.stat().st_mtime_ns for p in (folder / "bank").glob("train*")}
    wider = dataclasses.replace(smaller.bank, splits=("train", "composition"))
    run.build_memory(dataclasses.replace(smaller, bank=wider), folder, extend=True)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [len(x) for x in memory.load(folder).bank.arrays["vectors"]] == [40, 20, 7, 5]


def test_a_recipe_that_does_not_retrieve_has_no_memory(tmp_path):
    with pytest.raises(UserError, match="add --retrieve"):
        run.build_memory(config.Recipe(), tmp_path)


def test_the_command_line_builds_asks_and_draws_the_sheet(made, tmp_path, capsys):
    assert cli.main(["retrieve", "build", str(made)]) == 0
    assert capsys.readouterr().out.count("up to date") == 3
    file = tmp_path / "sheets" / "found.png"
    assert cli.main(["retrieve", "query", str(made), "a red circle", "--count", "3", "--out", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (found,) = memory.load(made).find(texts=["a red circle"], count=3)
    assert [line.split()[1] for line in lines[:-1]] == [x.key for x in found]
    assert all(line.startswith(f"{x.score:.3f}  ") for line, x in zip(lines[:-1], found, strict=True))
    assert "(scenes:easy, Apache-2.0)" in lines[0]
    assert lines[-1] == str(file) and Image.open(file).size[0] == 4 * (sheet.SIDE + 2 * sheet.MARGIN)
    picture = tmp_path / "asked.png"
    Image.fromarray(fake_encoder.picture(["red"] * 4)).save(picture)
    assert cli.main(["retrieve", "query", str(made), str(picture)]) == 0
    assert (made / "retrieved").is_dir()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["build", "{}", "--decoder.steps", "3"], "--decoder.training.steps: does nothing here"),
        (["build", "{}", "--bank.splits", "test"], "without validation and test"),
        (["query", "{}"], "required"),
        (["query", "{}", "none.png"], "No such file"),
        (["query", "{}", " "], "is empty"),
        (["query", "{}", "a", "--count", "0"], "--count = 0"),
        (["query", "{}/none", "a"], "no such folder"),
        (["find"], "no such verb"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(made, capsys, argv, words):
    assert cli.main(["retrieve", *(a.format(made) for a in argv)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("cm3jax: ") and err.count("\n") == 1 and words in err


def test_a_sheet_shows_the_query_and_each_document_in_order():
    records = [fake_encoder.pair(str(i), fake_encoder.WORDS[i : i + 4]) for i in range(3)]
    drawn = sheet.draw("red circle", records, [0.5, 0.4, 0.3])
    width = sheet.SIDE + 2 * sheet.MARGIN
    assert drawn.shape[1] == 4 * width
    for i, record in enumerate(records):
        alone = sheet.cell(f"{i + 1}: {0.5 - 0.1 * i:.3f}", record)
        assert np.array_equal(drawn[:, (i + 1) * width : (i + 2) * width], alone)


def test_the_index_says_what_the_bank_holds(made):
    about = json.loads((made / "bank" / "index.json").read_text())
    assert about["documents"] == {"train": 60} and about["size"] == 16
    assert about["encoder"] == encoder.load(made / "retriever").identity
    assert set(about["files"]) == {p.name for p in (made / "bank").glob("*.npy")}
    assert bank.open(made / "bank").identity == about["encoder"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["flat", "mesh"])
def test_two_processes_make_the_memory_that_one_makes(made, tmp_path, way):
    folder = tmp_path / "run"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("bank", "neighbours"))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        place = f"localhost:{s.getsockname()[1]}"
    code = "import sys; from cm3jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    words = ["retrieve", "build", str(folder), "--bank.search", way, "--coordinator", place, "--processes", "2"]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    root = str(pathlib.Path(__file__).parent.parent)
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": root}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    both = [subprocess.Popen([sys.executable, "-c", code, *words, "--process", str(i)], **pipes) for i in range(2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    assert "60 documents of 16 numbers" in said[0] and "60 documents" not in said[1]  # only the lead tells
    for stage in ("bank", "neighbours"):
        files = {path.name for path in (made / stage).iterdir()}
        assert {path.name for path in (folder / stage).iterdir()} == files
        for name in (n for n in files if n.endswith(".npy")):
            found, alone = np.load(folder / stage / name), np.load(made / stage / name)
            if found.dtype.kind == "f":  # other devices sum in another order
                np.testing.assert_allclose(found, alone, rtol=0, atol=1e-3)
            else:
                np.testing.assert_array_equal(found, alone, name)
