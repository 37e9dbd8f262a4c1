"""Laws of the tasks: their documents, where answers stand, and prompts that are prefixes of what masking yields."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cm3jax.objectives import causal_mask, places
from cm3jax.tasks import show, table, templates
from cm3jax.tokenizers import document, text
from cm3jax.types import ANSWER, Region, UserError
from cm3jax.vocab import BREAK, EOD, EOSS, Vocab

VOCAB = Vocab(text=320, image=19, sentinels=11, multiple=7)
CODES = 5
FEATURED = "Make high quality image from {} <break> {{feature_image}} <break> {{caption}} <break> {{image}}"
SEQUENCES = {
    "edit": "Edit first image following the instruction <break> {image} <break> {instruction} <break> {edited_image}",
    "words": 'draw "{text}" <break> {image}',
    "located": "Generate high quality image of {caption} with segmentations {objects} <break> {image}",
    "edges": FEATURED.format("canny edge features"),
    "segmentation": FEATURED.format("a segmentation map"),
    "hed": FEATURED.format("hed features"),
    "pose": FEATURED.format("openpose features"),
    "depth": FEATURED.format("depth features"),
    "normals": FEATURED.format("3D norm features"),
    "scribble": FEATURED.format("children's scribbles"),
    "caption": "{caption} <break> {image}",
    "long_caption": "Describe the given picture in very detail. {caption} <break> {image}",
    "question": "Question: {question} Answer: {answer}. <break> {image}",
    "choice": "Question: {question} \n Context: {context} \n Options: {options} \n Answer: {answer}. <break> {image}",
    "reasoning": "Question: {question} \n Context: {context} \n Options: {options} \n Answer: Let's think step-by-step:"
    " {explanation} So the answer is {answer}. <break> {image}",
}
"""The rows of arXiv 2309.02591 table 5, in their first wording."""
task = pytest.mark.parametrize("task", list(table.TASKS))
WORDS = st.text(st.sampled_from('ab .,"\u2581\u00e9\n('), min_size=1, max_size=9).filter(str.strip)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = [show.example(one) for one in table.TASKS.values()] + ["a red circle"] * 5
    return text.train(lines, 300, tmp_path_factory.mktemp("text") / "tokenizer.model")


@st.composite
def values(draw, name):
    """Return words or codes for each field of a task."""
    return {
        field: np.array(draw(st.lists(st.integers(0, VOCAB.image - 1), min_size=CODES, max_size=CODES)), np.uint16)
        if table.is_picture(field)
        else draw(WORDS)
        for field in table.find(name).fields
    }


def asked(name, found):
    """Return the values without the answer's."""
    return {field: value for field, value in found.items() if field not in table.find(name).answer}


def framed(name, found, n, tokenizer, examples=()):
    """Return a task's document with its [eod]s, behind examples, and where its answers stand in it."""
    parts, regions = templates.make(name, found, n)
    ids, spans = document.marked(parts, regions, tokenizer, VOCAB)
    before = document.shown(examples)
    return np.array([EOD, *before, *ids, EOD], np.uint16), spans.astype(np.int64) + 1 + len(before)


def begins(ids, prompt, answer=()):
    whole = [*prompt, *answer]
    return ids[: len(whole)].tolist() == [int(i) for i in whole]


def test_the_table_is_the_paper_s():
    assert {name: one.templates[0] for name, one in table.TASKS.items()} == SEQUENCES
    assert [len(one.templates) for one in table.TASKS.values()] == [1] * 10 + [2, 4, 3, 1, 1]


@task
@settings(max_examples=12)
@given(st.data(), st.integers(0, 9))
def test_a_document_holds_its_fields_and_says_where_the_answer_stands(task, data, n):
    found = data.draw(values(task))
    parts, regions = templates.make(task, found, n)
    template = table.split(table.find(task).templates[n % len(table.find(task).templates)])
    assert [isinstance(part, str) for part in parts] == [not table.is_picture(t.strip("{}")) for t in template]
    assert [region.label for region in regions] == list(table.find(task).answer)
    for region in regions:
        part, value = parts[region.part], found[region.label]
        if isinstance(part, str):
            start, end = (round(x * len(part)) for x in (region.box[0], region.box[2]))
            assert part[start:end] == value
        else:
            assert part is value


@task
def test_a_document_is_read_back(task):
    one = table.find(task)
    pictures = {field: np.full(CODES, i, np.uint16) for i, field in enumerate(one.fields) if table.is_picture(field)}
    for n in range(len(one.templates)):
        read = templates.read(task, templates.make(task, one.example | pictures, n)[0])
        assert read.keys() == set(one.fields) and all(read[k] is v for k, v in pictures.items())
        assert {k: v for k, v in read.items() if k not in pictures} == one.example
    assert templates.read(task, ("a", "b")) is None


@task
@settings(max_examples=12)
@given(st.data(), st.integers(0, 9))
def test_tokenizing_between_answers_changes_no_text(tokenizer, task, data, n):
    found = data.draw(values(task))
    parts, regions = templates.make(task, found, n)
    ids, spans = document.marked(parts, regions, tokenizer, VOCAB)
    read = document.decode(ids, tokenizer, VOCAB)
    assert all(np.array_equal(a, b) for a, b in zip(read, parts, strict=True))
    for (start, end), region in zip(spans, regions, strict=True):
        part = document.decode_part(ids[start:end].astype(np.int64), tokenizer, VOCAB)
        value = found[region.label]
        assert part in (value, " " + value) if isinstance(value, str) else np.array_equal(part, value)
    plain, none = document.marked(parts, (), tokenizer, VOCAB)
    assert np.array_equal(plain, document.encode(parts, tokenizer, VOCAB)) and none.shape == (0, 2)


@task
@settings(max_examples=12)
@given(st.data(), st.integers(0, 9), st.integers(0, 2))
def test_a_prompt_and_its_answer_begin_what_masking_yields(tokenizer, task, data, n, shots):
    """Of the document with exactly its answer masked; a picture that stands last stays where it is.

    Examples before it are documents of the task, as those that were retrieved are.
    """
    found, one = data.draw(values(task)), table.find(task)
    examples = [framed(task, data.draw(values(task)), n, tokenizer)[0][1:-1] for _ in range(shots)]
    ids, spans = framed(task, found, n, tokenizer, examples)
    prompt = templates.prompt(task, asked(task, found), tokenizer, VOCAB, n, examples)
    assert prompt.retrieved == sum(len(example) + 1 for example in examples)
    if one.draws:
        assert begins(ids, prompt.ids, [*document.image_ids(found[one.answer[0]], VOCAB), EOD])
        assert (prompt.produces, prompt.stop, prompt.hidden) == ("image", EOD, ())
        return
    row, drawn = causal_mask.mask(ids, spans, VOCAB), []
    for i, (start, end) in enumerate(spans):
        assert begins(row, prompt.ids, [*ids[start:end], EOSS]) and (prompt.produces, prompt.stop) == ("text", EOSS)
        assert prompt.hidden == tuple(places.hidden(ids, spans, VOCAB))
        drawn.append(document.decode_text(ids[start:end], tokenizer, VOCAB))
        if i + 1 < len(spans):
            prompt = templates.following(prompt, np.array([*ids[start:end], EOSS], np.uint16), VOCAB)
    assert templates.answers(task, drawn) == {field: found[field].strip() for field in one.answer}
    assert prompt.retrieved == sum(len(example) + 1 for example in examples)
    with pytest.raises(UserError, match="all are drawn"):
        templates.following(prompt, np.zeros(0, np.uint16), VOCAB)


@task
@settings(max_examples=4)
@given(data=st.data())
def test_examples_stand_in_every_stream_of_guidance(tokenizer, task, data):
    found = asked(task, data.draw(values(task)))
    example = framed(task, data.draw(values(task)), 0, tokenizer)[0][1:-1]
    plain = templates.prompt(task, found, tokenizer, VOCAB)
    shown = templates.prompt(task, found, tokenizer, VOCAB, examples=[example])
    for (a, hidden), (b, others) in zip(plain.streams(3), shown.streams(3), strict=True):
        assert b.tolist() == [EOD, *example, BREAK, *a[1:]] and hidden == others


@task
@settings(max_examples=12)
@given(st.data(), st.integers(0, 9))
def test_a_task_s_unconditional_prompt_is_a_prefix_of_what_masking_yields(tokenizer, task, data, n):
    found, one = data.draw(values(task)), table.find(task)
    ids, spans = framed(task, found, n, tokenizer)
    prompt = templates.prompt(task, asked(task, found), tokenizer, VOCAB, n)
    stretches = causal_mask.stretches(ids)
    if one.draws:
        template = table.split(one.templates[0])[:-1]
        gone = np.array([s for s, part in zip(stretches, template, strict=False) if table.FIELD.search(part)])
        assert begins(causal_mask.mask(ids, gone, VOCAB), prompt.unconditional, ids[stretches[-1][0] :])
    else:
        gone = stretches  # the words' part is the first in every task of the table
        row = causal_mask.mask(ids, gone, VOCAB)
        assert begins(row, prompt.unconditional, ids[1 : spans[0][0]])
    assert prompt.unconditional_hidden == tuple(places.hidden(ids, gone, VOCAB))


@given(st.data())
def test_the_middle_stream_of_an_edit_keeps_the_picture_and_drops_the_instruction(tokenizer, data):
    found = data.draw(values("edit"))
    ids, _ = framed("edit", found, 0, tokenizer)
    middle, hidden = templates.stream("edit", found, tokenizer, VOCAB, ("image",))
    stretches = causal_mask.stretches(ids)
    assert begins(causal_mask.mask(ids, stretches[2:3], VOCAB), middle, ids[stretches[3][0] :]) and hidden == (0,)


@task
@given(data=st.data())
def test_drawing_has_a_middle_stream_where_a_picture_is_given(tokenizer, task, data):
    one, found = table.TASKS[task], data.draw(values(task))
    prompt = templates.prompt(task, asked(task, found), tokenizer, VOCAB)
    pictures = [name for name in asked(task, found) if table.is_picture(name)]
    if one.draws and pictures:
        ids, hidden = templates.stream(task, found, tokenizer, VOCAB, pictures)
        assert np.array_equal(prompt.pictured, ids) and prompt.pictured_hidden == hidden
        assert len(prompt.unconditional) < len(ids) and not np.array_equal(ids, prompt.ids)
    else:
        assert prompt.pictured is None


def test_locations_are_read_back_from_their_words():
    objects = [("red circle", (0.25, 0.5, 0.75, 1.0)), ("a, b", (0.0, 0.0, 1.0, 0.125))]
    words = templates.located(objects)
    assert words == "red circle at (64, 128) -> (192, 256), a, b at (0, 0) -> (256, 32)"
    assert templates.read_located(words) == objects
    assert templates.read_located("a circle at (1, 2)") == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("chat", {}, "task 'chat': no such task; tasks: edit, words, "),
        ("question", {"answer": " "}, "task question: field 'answer' is empty; leave out examples without an answer"),
        ("question", {"image": "a.png"}, "task question: field 'image' is a str; must be a picture"),
        ("question", {"question": None}, "task question: field 'question' is a NoneType; must be a text"),
    ],
)
def test_values_that_make_no_document_are_one_clear_line(name, change, message):
    found = table.TASKS["question"].example | {"image": np.zeros(CODES, np.uint16)} | change
    with pytest.raises(UserError) as error:
        templates.make(name, found)
    assert str(error.value).startswith(message)


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match="task words: no value for the field 'image'; it needs text, image"):
        templates.make("words", {"text": "A"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": ("{a} <break> {image}", "{b} <break> {image}")}, "has the fields"),
        ({"templates": ("see {image} {a}",)}, "a part of its own"),
        ({"answer": ("a", "image")}, "fields of one part"),
        ({"answer": ("image",), "templates": ("{image} <break> {a}",)}, "must stand last"),
        ({"example": {}}, "example"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(change, message):
    good = table.Task("t", "does", ("{a} <break> {image}",), ("a",), {"a": "x"})
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **change)


@pytest.mark.parametrize(
    "regions",
    [
        (Region(0, ANSWER, (0.0, 0.0, 0.6, 1.0)), Region(0, ANSWER, (0.5, 0.0, 1.0, 1.0))),
        (Region(2, ANSWER, (0.0, 0.0, 1.0, 1.0)),),
        (Region(0, ANSWER, (0.5, 0.0, 0.5, 1.0)),),
    ],
)
def test_answers_that_overlap_or_lie_nowhere_are_refused(tokenizer, regions):
    with pytest.raises(UserError, match="answer"):
        document.marked(("abcdefghij", np.zeros(CODES, np.uint16)), regions, tokenizer, VOCAB)


def test_the_tasks_are_listed_with_their_answers_in_brackets():
    lines = show.all()
    assert all(f"{name}: " in lines for name in table.TASKS)
    assert "Question: What lies on the table? Answer: [an apple]. <break> <image>" in lines
    assert "<image> <break> make the apple green <break> [<edited image>]" in lines
    assert show.one("caption").splitlines()[1:3] == ["fields: caption, image", "answer: caption"]
    assert len(show.one("question").splitlines()) == 6


def test_breaks_are_nowhere_but_between_parts(tokenizer):
    found = table.TASKS["edit"].example | {"image": np.zeros(CODES, np.uint16), "edited_image": np.ones(CODES, int)}
    ids, spans = document.marked(*templates.make("edit", found), tokenizer, VOCAB)
    assert (ids == BREAK).sum() == 3 and spans.tolist() == [[len(ids) - CODES, len(ids)]]
