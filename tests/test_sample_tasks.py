"""Laws of answers to tasks; a tiny model with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run
from PIL import Image

from cm3jax import cli
from cm3jax import config as configs
from cm3jax.data import packing
from cm3jax.nn import decoder
from cm3jax.sample import decode, generate, tasks
from cm3jax.tasks import show, table, templates
from cm3jax.tokenizers import document
from cm3jax.types import UserError
from cm3jax.vocab import EOD, EOSS, Vocab

VOCAB = Vocab(text=320, image=11, sentinels=4, multiple=8)
SIDE, CODES, LENGTH = 8, 4, 160
NET = configs.VQGAN(patch=4, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, attention=(), z=3)
MODEL = configs.Decoder(layers=1, width=16, heads=2, position="both", dtype="float32")
RECIPE = configs.Recipe(
    vocab=VOCAB,
    prepare=configs.Prepare(resolution=SIDE),
    image=configs.Image(model=NET),
    decoder=configs.DecoderStage(model=MODEL, packing=configs.Packing("whole", LENGTH, picture=CODES)),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, with what `load` needs and nothing else."""
    return random_run.make(tmp_path_factory.mktemp("run"), RECIPE, [show.one(name) for name in table.TASKS])


@pytest.fixture(scope="module")
def generator(run):
    return generate.load(run, batch=2)


def values(task, seed=0):
    """Return short texts and noise for the fields of a task, without its answer."""
    one, rng = table.find(task), np.random.default_rng(seed)
    picture = lambda: rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)  # noqa: E731
    return {name: picture() if table.is_picture(name) else "a b" for name in one.fields if name not in one.answer}


def test_the_likelihood_of_a_text_is_that_of_its_tokens_one_by_one_with_a_cache(generator):
    """The greedy text is drawn through a cache, token by token, whose log-probabilities `decode` gives."""
    texts, seen = [" a b", " Question", "", " a b c d e f"], []
    (row,) = tasks.encoded(generator, table.find("question"), [values("question")])
    prompt = templates.prompt("question", row, generator.text, VOCAB)
    found = generator.likelihood([prompt] * 4, texts)
    assert found[2] == -np.inf and found.dtype == np.float32
    for text, value in zip(texts, found, strict=True):
        if not text:
            continue
        ids = [*document.text_ids(text, generator.text, VOCAB), EOSS]
        logits = stepwise(generator, prompt, ids)
        logprobs = np.array(jax.nn.log_softmax(logits))[np.arange(len(ids)), ids]
        assert float(value) == pytest.approx(float(logprobs.sum()), abs=1e-3)
        seen.append(float(value))
    np.testing.assert_allclose(generator.likelihood([prompt], texts[:1]), found[:1], rtol=1e-5)
    assert len(set(seen)) == 3


def test_a_text_may_be_longer_than_what_it_goes_on_from(generator):
    text, few = " a b c d e f" * 2, np.array([EOD, VOCAB.text_start], np.uint16)
    short = document.Prompt("question", few, few, "text", EOSS)
    ids = [*document.text_ids(text, generator.text, VOCAB), EOSS]
    logprobs = np.array(jax.nn.log_softmax(stepwise(generator, short, ids)))[np.arange(len(ids)), ids]
    assert len(ids) > 16
    assert float(generator.likelihood([short], [text])[0]) == pytest.approx(float(logprobs.sum()), abs=1e-3)


def stepwise(generator, prompt, ids):
    """Return logits [n, v] for each id, each from one more step with a cache."""
    padded = decode.pad([[prompt.ids]], LENGTH, [[prompt.hidden]], VOCAB, LENGTH - CODES, [prompt.retrieved], CODES)
    placed, lengths = padded.positions[0], padded.lengths[0]
    segments = jnp.asarray(np.arange(LENGTH) >= LENGTH - lengths[:, None], jnp.int32)
    cache = decoder.init_cache(MODEL, 1, LENGTH + len(ids))
    apply = lambda *a, **k: generator.model.apply({"params": generator.params}, *a, **k)  # noqa: E731
    hidden, cache = apply(*map(jnp.asarray, (padded.ids[0], placed)), segments, cache=cache, index=0)
    rows, place = [hidden[0, -1]], int(padded.following[0, 0, 0])
    for i, token in enumerate(ids[:-1]):
        one = jnp.asarray([[token]], jnp.int32), jnp.asarray([[place + i]], jnp.int32), jnp.ones((1, 1), jnp.int32)
        hidden, cache = apply(*one, cache=cache, index=LENGTH + i)
        rows.append(hidden[0, -1])
    return np.array(decoder.logits(generator.params, MODEL, jnp.stack(rows)[None])[0])


@pytest.mark.parametrize("task", ["edit", "reasoning"])
def test_every_field_of_an_answer_comes_back_and_depends_on_seed_and_place_alone(generator, task):
    one, rows = table.find(task), [values(task, i) for i in range(3)]
    sampling = configs.Sampling(temperature=1.0, top_p=0.95)
    found = tasks.answer(generator, task, rows, 1, sampling, max_text=6)
    for row in found:
        assert list(row) == list(one.answer)
        for value in row.values():
            assert value.shape == (SIDE, SIDE, 3) if one.draws else value == value.strip()
    again = tasks.answer(generator, task, rows[:1], 1, sampling, max_text=6)[0]
    assert all(np.array_equal(again[name], found[0][name]) for name in again)
    assert tasks.answer(generator, task, []) == []


def forced(generator, ids, hidden, before=0):
    """Return the scores of a row that is trained on, float32 [t, v], of which so many ids were retrieved."""
    row = ids.astype(np.uint16), np.ones(len(ids), np.int32), np.zeros(len(ids), bool), np.array(hidden, np.int64)
    retrieved = (np.arange(len(ids)) > 0) & (np.arange(len(ids)) <= before)
    batch = packing.arrays([(*row, retrieved)], VOCAB, RECIPE.decoder.packing)
    inputs = (jnp.asarray(batch[name]) for name in ("inputs", "positions", "segments"))
    state, _ = generator.model.apply({"params": generator.params}, *inputs)
    return np.asarray(decoder.scores(decoder.output(generator.params, MODEL), state))[0]


def test_an_edit_is_drawn_code_by_code_as_training_has_it(generator):
    """The second picture of a row stands at the places of the first one."""
    row = values("edit")
    (known,) = tasks.encoded(generator, table.find("edit"), [row])
    prompt = templates.prompt("edit", known, generator.text, VOCAB)
    (codes,) = generator._codes([prompt], [CODES], 0, generate.GREEDY)
    scores = forced(generator, np.concatenate([prompt.ids, codes + VOCAB.image_start]), ())
    likeliest = scores[len(prompt.ids) - 1 :][:CODES, VOCAB.image_start : VOCAB.sentinel_start].argmax(-1)
    assert likeliest.tolist() == codes.tolist()
    (found,) = tasks.answer(generator, "edit", [row], 0, generate.GREEDY)
    assert np.array_equal(found["edited_image"], generator.image.decode(codes[None])[0])


def test_a_guided_edit_weighs_three_streams_as_instruct_pix2pix_does(generator):
    """uncond + b (picture - uncond) + a (full - picture) of teacher-forced logits (arXiv 2211.09800 §3.2.1)."""
    row = values("edit")
    (known,) = tasks.encoded(generator, table.find("edit"), [row])
    prompt = templates.prompt("edit", known, generator.text, VOCAB)
    sampling = dataclasses.replace(generate.GREEDY, guidance=7.5, image_guidance=1.5)
    (found,) = tasks.answer(generator, "edit", [row], 0, sampling)
    (codes,) = generator._codes([prompt], [CODES], 0, sampling)
    drawn, scores = codes + VOCAB.image_start, []
    for ids, hidden in prompt.streams(3):
        # the logits of the ids that follow a stream do not depend on what made them
        rows = forced(generator, np.concatenate([ids, drawn]), hidden)
        scores.append(rows[len(ids) - 1 :][:CODES, VOCAB.image_start : VOCAB.sentinel_start])
    full, picture, none = scores
    mixed = none + 1.5 * (picture - none) + 7.5 * (full - picture)
    assert mixed.argmax(-1).tolist() == codes.tolist()
    assert np.array_equal(found["edited_image"], generator.image.decode(codes[None])[0])
    assert not np.array_equal(full, picture) and not np.array_equal(picture, none)


def test_the_second_field_is_written_behind_the_first(generator):
    """What is drawn is likeliest as teacher forcing on the whole row has it, positions included."""
    row = values("reasoning")
    (found,) = tasks.answer(generator, "reasoning", [row], max_text=5)
    (known,) = tasks.encoded(generator, table.find("reasoning"), [row])
    first = templates.prompt("reasoning", known, generator.text, VOCAB)
    ids = [generator._span_ids([first], 0, generate.GREEDY, 5)[0]]
    second = templates.following(first, ids[0], VOCAB)
    ids.append(generator._span_ids([second], 1, generate.GREEDY, 5)[0])
    scores = forced(generator, np.concatenate([second.ids, ids[1]]), second.hidden)
    text = np.arange(VOCAB.text_start + 1, VOCAB.text_start + generator.text.size)
    at, drawn = len(second.ids) - 1, int(ids[1][0])
    assert drawn == text[scores[at, text].argmax()]
    assert list(found) == ["explanation", "answer"]


def test_words_behind_examples_are_drawn_as_training_has_them_behind_retrieved_documents(generator):
    seen = [values("caption", i) | {"caption": f"a {i}"} for i in (1, 2)]
    (found,) = tasks.answer(generator, "caption", [values("caption")], max_text=5, examples=seen)
    one = table.find("caption")
    shown = tasks.documents(generator, one, seen)
    (known,) = tasks.encoded(generator, one, [values("caption")])
    prompt = templates.prompt("caption", known, generator.text, VOCAB, examples=shown)
    (ids,) = generator._span_ids([prompt], 0, generate.GREEDY, 5)
    assert found["caption"] == document.decode_text(ids[:-1], generator.text, VOCAB).strip()
    scores = forced(generator, np.concatenate([prompt.ids, ids]), prompt.hidden, prompt.retrieved)
    text = np.arange(VOCAB.text_start + 1, VOCAB.text_start + generator.text.size)
    assert ids[0] == text[scores[len(prompt.ids) - 1, text].argmax()]
    parts = document.decode(shown[0], generator.text, VOCAB)
    assert parts[0] == "a 1" and np.array_equal(parts[1], generator.encode([seen[0]["image"]])[0])


def test_examples_that_do_not_fit_are_one_clear_line(generator):
    seen = [values("edit") | {"edited_image": values("edit")["image"]}] * 9
    with pytest.raises(
        UserError, match=r"prompt 0: \d+ tokens, of which \d+ of documents before it, but the model's row"
    ):
        tasks.answer(generator, "edit", [values("edit")], examples=seen)
    with pytest.raises(UserError, match="task edit: no value for the field 'edited_image'"):
        tasks.answer(generator, "edit", [values("edit")], examples=[values("edit")])


def test_a_prompt_without_a_field_or_too_long_is_one_clear_line(generator):
    with pytest.raises(UserError, match="task question: no value for the field 'question'"):
        tasks.answer(generator, "question", [{"image": values("question")["image"]}])
    with pytest.raises(UserError, match="shorten"):
        tasks.answer(generator, "question", [values("question") | {"question": "w" * 300}])


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(values("edit")["image"]).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.mark.slow
def test_the_verbs_draw_and_write(run, picture, capsys, tmp_path):
    out = str(tmp_path / "out")
    assert cli.main(["edit", str(run), picture, "make it red", "--count", "2", "--out", out]) == 0
    assert cli.main(["draw-from", str(run), picture, "a circle", "--kind", "depth", "--out", out]) == 0
    assert cli.main(["draw-from", str(run), picture, "a circle", "--of-picture", "--out", out]) == 0
    paths = capsys.readouterr().out.split()
    assert len(paths) == len(set(paths)) == 4 and all(Image.open(p).size == (SIDE, SIDE) for p in paths)
    example = ["--example", picture, "make it red", picture]
    assert cli.main(["edit", str(run), picture, "make it red", "--out", out, *example]) == 0
    assert Image.open(capsys.readouterr().out.strip()).size == (SIDE, SIDE)
    short = ["--max-text", "4"]
    assert cli.main(["ask", str(run), picture, "What?", "--example", picture, "What?", "a", *short]) == 0
    assert cli.main(["ask", str(run), picture, "What?", *short]) == 0
    assert cli.main(["ask", str(run), picture, "What?", "--options", "(A) a (B) b", "--reason", *short]) == 0
    assert cli.main(["describe", str(run), picture, *short]) == cli.main(["describe", str(run), picture, "--long"]) == 0
    assert capsys.readouterr().out.count("\n") >= 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["edit", "RUN", "PICTURE", " "], "instruction ' ': is empty; say what to change"),
        (["ask", "RUN", "PICTURE", ""], "question '': is empty; say what to answer"),
        (["ask", "RUN", "PICTURE", "What?", "--reason"], "--reason and --context go with --options"),
        (["draw-from", "RUN", "PICTURE", "a", "--kind", "depth", "--of-picture"], "feature 'depth': is not made here"),
        (
            ["ask", "RUN", "PICTURE", "What?", "--options", "A B", "--example", "a.png", "What?", "A"],
            "--example 'a.png' 'What?' 'A': 3 words; needs 4: IMAGE QUESTION OPTIONS ANSWER",
        ),
        (["edit", "RUN", "PICTURE", "a", "--example", "no.png", "a", "no.png"], "picture 'no.png': No such file"),
        (["describe", "RUN", "nowhere.png"], "picture 'nowhere.png': No such file or directory"),
    ],
)
def test_wrong_arguments_are_one_clear_line(run, picture, capsys, argv, message):
    known = {"RUN": str(run), "PICTURE": picture}
    assert cli.main([known.get(a, a) for a in argv]) == 2
    assert message in capsys.readouterr().err


def test_feature_names_of_the_command_line_are_the_table_s():
    assert set(cli.FeatureName.__args__) == set(table.FEATURES)
