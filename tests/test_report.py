import html.parser
import json

import fake_run
import numpy as np
import pytest
from PIL import Image, ImageFont

from cm3jax import curves, provenance, report
from cm3jax.types import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = fake_run.make(tmp_path_factory.mktemp("run"))
    report.write(run)
    return run


class Page(html.parser.HTMLParser):
    """Collects what a page holds: text, addresses, tag names; fails on tags that do not match."""

    EMPTY = frozenset(("meta", "img", "br", "circle"))

    def __init__(self, text: str):
        super().__init__()
        self.text, self.addresses, self.tags, self.open = "", [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "poster")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def page(run) -> Page:
    return Page((run / "report.html").read_text())


def test_the_page_needs_nothing_but_itself(run):
    found = page(run)
    assert found.addresses and all(a.startswith("data:image/png;base64,") for a in found.addresses)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert "url(" not in (run / "report.html").read_text() and "@import" not in (run / "report.html").read_text()


@pytest.mark.parametrize("truth", [True, False])
def test_the_page_shows_which_documents_were_retrieved_and_what_they_bring(tmp_path, run, truth):
    report.write(fake_run.make(tmp_path, truth=truth, retrieved=True))
    found = page(tmp_path)
    assert found.tags.count("img") == 16 * (1 + 1 + 3 + 2) + 2 * 3
    assert "0.62 · one & more · train/a<7>, web & co, CC0" in found.text
    assert "Pictures from captions: 2 ← chosen" in found.text
    assert "0.62 ·  · train/a<7>" in found.text and "Of 4 candidates a caption" in found.text
    assert ("0.301" in found.text) == truth and "0.710" in found.text
    assert "Retrieved documents" not in page(run).text


def test_the_page_shows_every_task_with_what_was_given_what_came_and_what_is_true(tmp_path):
    fake_run.make(tmp_path)
    known, path = json.loads((tmp_path / "report.json").read_text()), tmp_path / "evaluate" / "examples.json"
    Image.new("RGB", (4, 4)).save(tmp_path / "evaluate" / "task.png")
    edit = {"task": "edit", "given": ["task.png"], "said": "instruction: make it red", "correct": False}
    ask = {"task": "question", "given": ["task.png"], "said": "Which shape?", "correct": True}
    rows = [edit | dict.fromkeys(("drawn", "wanted"), "task.png"), ask | {"drawn": "a ring", "wanted": "a star"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": rows}))
    before = page_after(tmp_path, known)
    scores = {"edit": {"accuracy": 0.875, "whole": 0.5, "examples": 256}}
    scores["segmentation"] = scores["edit"] | {"miou": 0.625}
    found = page_after(tmp_path, known | {"tasks": scores})
    assert found.tags.count("img") == before.tags.count("img") + 3 + 1
    text = " ".join(found.text.split())
    assert "edit0.8750.500256" in text.replace(" ", "") and "mIoU 0.625" in text and "instruction: make it red" in text
    drawn = Image.open(tmp_path / "tasks.png")
    assert "question: Which shape? Answer: a ring" in drawn.text["prompt"] and "edit: " in drawn.text["prompt"]
    assert "parts, before" not in text and "trained from nothing" in text
    earlier = {name: {"accuracy": 0.125, "whole": 0.25, "examples": 256} for name in scores}
    (tmp_path / "recipe.json").write_text(json.dumps({"decoder": {"start": "runs/first"}}))
    both = page_after(tmp_path, known | {"tasks": scores, "start": {**known, "tasks": earlier}})
    told = "".join(both.text.split())
    assert "edit0.8750.5000.1250.250256" in told and "tunedfromruns/first" in told
    assert "Which shape?→ a ring" in text.replace("? →", "?→") and "true: a star" in text and "Tasks" not in before.text


def page_after(run, known):
    """Return the page of a run whose report.json holds this."""
    (run / "report.json").write_text(json.dumps(known))
    report.write(run)
    return page(run)


def test_every_example_is_shown_once_in_each_sheet(run):
    assert page(run).tags.count("img") == 16 * (1 + 1 + 3 + 2)


def test_the_wrong_ones_are_marked_as_wrong(run):
    examples = json.loads((run / "evaluate" / "examples.json").read_text())
    wrong = sum(e.get("correct") is False for sheet in examples.values() for e in sheet)
    text = (run / "report.html").read_text()
    assert wrong == 9 and text.count('<figure class="wrong">') == text.count(">wrong</span>") == wrong


def test_the_figures_are_on_the_page(run):
    text = page(run).text
    for shown in ("0.913", "0.801", "0.210", "0.971", "28.20", "0.998", "302", "12.50", "scenes:easy", "9 min 9 s"):
        assert shown in text, shown


def test_the_chosen_setting_is_marked(run):
    text = " ".join(page(run).text.split())
    assert "temperature 0.5, guidance 1.5 ← chosen" in text and text.count("← chosen") == 1


def test_captions_are_shown_as_they_are_and_never_as_markup(run):
    assert "<0> & nothing else" in page(run).text
    assert "<0> & nothing" not in (run / "report.html").read_text()


def test_each_curve_has_a_training_and_a_validation_line(run):
    text = (run / "report.html").read_text()
    assert text.count("<svg") == text.count('<g class="train">') == text.count('<g class="validation">') == 5


def test_recipe_and_versions_are_in_the_fold_out(run):
    text = page(run).text
    assert '"source": "scenes:easy"' in text and "jax 0." in text


def test_a_run_without_ground_truth_has_a_page_without_accuracies(tmp_path):
    run = fake_run.make(tmp_path, truth=False)
    report.write(run)
    text = page(run).text
    assert "Perplexity: captions" in text and "objects" not in text and "wrong" not in text
    assert text.count("true: ") == 16  # a reader compares where no recogniser does
    assert (run / "samples.png").stat().st_size


def test_a_run_without_examples_or_curves_still_has_a_page(tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "examples.json").write_text("{}")
    (tmp_path / "report.json").write_text('{"name": "bare"}')
    report.write(tmp_path)
    assert "bare" in page(tmp_path).text


@pytest.mark.parametrize("told", [{}, {"checkpoint": {"step": 7, "weights": "0123abcd"}}])
def test_the_model_that_training_began_with_is_named_by_its_weights_if_they_are_known(tmp_path, told):
    run = fake_run.make(tmp_path, n=1)
    scores = json.loads((run / "report.json").read_text())
    begun = {task: {"object_accuracy": 0.125} for task in ("text_to_image", "image_to_text", "infill")}
    (run / "report.json").write_text(json.dumps(scores | {"start": begun | told}))
    (run / "recipe.json").write_text(json.dumps({"decoder": {"start": "runs/first"}}))
    report.write(run)
    text = page(run).text
    assert "0.125" in text and "runs/first" in text and ("(step 7, weights 0123abcd)" in text) == bool(told)


def test_the_sheet_holds_every_picture_enlarged_by_a_whole_number(run):
    sheet = np.asarray(Image.open(run / "samples.png"))
    look = report.Look()
    top = 2 * look.gap + look.head
    first = sheet[top : top + 256 : 4, look.gap : look.gap + 256 : 4]
    np.testing.assert_array_equal(first, np.asarray(fake_run.picture(0)))
    assert sheet.shape[1] == look.gap + look.columns * (look.side + look.gap)


def test_the_sheet_says_that_a_machine_drew_it_from_which_captions(run):
    found = provenance.read(run / "samples.png")
    captions = [e["caption"] for e in json.loads((run / "evaluate" / "examples.json").read_text())["text_to_image"]]
    assert found["prompt"].split("\n") == captions and found["source"] == "trainedAlgorithmicMedia"
    assert found["model"] == "quickstart" and found["weights"] == "not recorded" and found["step"] == "null"
    assert json.loads(found["settings"])["guidance"] == 1.5


def test_the_sheet_frames_wrong_pictures_only(run):
    sheet = np.asarray(Image.open(run / "samples.png"))
    look = report.Look()
    red = tuple(bytes.fromhex(look.wrong[1:]))
    y = 2 * look.gap + look.head + 40
    framed = [tuple(sheet[y, look.gap + i * (look.side + look.gap) - 2]) == red for i in range(4)]
    assert framed == [False, False, False, True]


def test_wrapped_text_loses_no_word_and_stays_in_its_width():
    font, text = ImageFont.load_default(15), "one two three four five six seven eight nine ten"
    lines = report.wrap(text, font, 90)
    assert " ".join(lines) == text and len(lines) > 1 and all(font.getlength(line) <= 90 for line in lines)


def test_text_that_is_too_long_ends_with_an_ellipsis():
    font = ImageFont.load_default(15)
    lines = report.wrap("word " * 200, font, 90, most=3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    (line,) = report.wrap("x" * 200, font, 90)
    assert line.endswith("…") and font.getlength(line) <= 90


def test_a_font_is_looked_for_that_has_the_signs_of_the_captions():
    own = ImageFont.load_default(15)
    assert report.font_for(["a red circle", "…"], 15).getname() == own.getname()
    assert report.lacking(own, set("aé→マ")) == set("é→マ")
    found = report.font_for(["un carré → à côté"], 15)  # the machine's, if it has one of those
    assert found.getname() == own.getname() or not report.lacking(found, set("uncarré→àôt"))


def test_accents_that_a_font_lacks_are_left_out():
    own = ImageFont.load_default(15)
    assert report.plain("un carré gris: マ", own) == "un carre gris: マ"


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (7, 5), (256, 256), (1000, 3)])
def test_pictures_fit_the_sheet(size):
    assert max(report.enlarge(Image.new("RGB", size), 256).size) <= 256


def test_a_run_that_was_not_evaluated_is_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match="report.json: no such file; make it with: cm3jax evaluate"):
        report.write(tmp_path)


def test_a_broken_report_is_named_in_one_line(tmp_path):
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="report.json: not readable"):
        report.write(tmp_path)


def test_a_missing_picture_is_named_in_one_line(tmp_path):
    run = fake_run.make(tmp_path, n=2)
    (run / "evaluate" / "infilled-001.png").unlink()
    with pytest.raises(UserError, match=r"infilled-001\.png: No such file"):
        report.write(run)


@pytest.mark.parametrize("low,high", [(0, 1), (-3, 7), (0, 167_000), (1.1, 6.9), (0.931, 0.934), (0, 7)])
def test_ticks_are_round_few_and_inside(low, high):
    found = curves.ticks(low, high)
    assert 2 <= len(found) <= 6 and min(found) >= low - 1e-9 and max(found) <= high + 1e-9


def test_a_chart_stands_even_a_single_or_constant_value():
    for points in ([(100, 2.5)], [(1, 3.0), (2, 3.0)], [(0, 0.0)]):
        assert "nan" not in curves.svg("chart", [curves.Line("train", points), curves.Line("validation", [])])


def test_a_line_is_thinned_to_means_of_neighbours():
    points = curves.thin([(float(i), float(i % 2)) for i in range(1000)], most=100)
    assert len(points) == 100 and all(y == 0.5 for _, y in points)


def test_values_that_are_not_finite_are_left_out_of_curves():
    lines = [{"step": 1, "train/loss": float("nan")}, {"step": 2, "train/loss": 1.0}, {"step": 3}]
    assert curves.series(lines, "train/loss") == [(2, 1.0)]


@pytest.mark.parametrize(
    "value,shown", [(99.99, "100.0 s"), (4.21, "4.2 s"), (538, "8 min 58 s"), (8000, "2 h 13 min")]
)
def test_durations_read_well(value, shown):
    assert report.duration(value) == shown
