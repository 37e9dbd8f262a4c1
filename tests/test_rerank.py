"""Laws of drawing with a memory and of picking among candidates; a tiny model with random weights."""

import dataclasses
import json

import fake_encoder
import numpy as np
import pytest
import test_generate

from cm3jax import config as configs
from cm3jax import provenance
from cm3jax.data import scenes, scenes_world
from cm3jax.evaluate import protocol
from cm3jax.retrieval import memory
from cm3jax.sample import decode, recall, rerank
from cm3jax.tokenizers import document
from cm3jax.types import Record, UserError

run, generator = test_generate.run, test_generate.generator  # fixtures
PROMPTS = ["a red circle", "two", "a blue square"]
GUIDED = configs.Sampling(temperature=0.9, guidance=2.0)


class Encoder(fake_encoder.Fake):
    """Likes bright pictures for the caption "bright", dark ones for any other."""

    def texts(self, texts):
        return np.array([[1.0 if text == "bright" else -1.0] for text in texts], np.float32)

    def pictures(self, pictures):
        return np.array([[picture.mean() / 255] for picture in pictures], np.float32)


@dataclasses.dataclass
class Memory:
    """Finds the same pairs for everybody, and remembers what it was asked."""

    pairs: list
    asked: list = dataclasses.field(default_factory=list)
    encoder: Encoder = dataclasses.field(default_factory=Encoder)

    def find(self, texts=None, pictures=None, count=2, seed=0):
        rows = len(pictures if texts is None else texts)
        self.asked.append(("texts" if pictures is None else "pictures", rows, count))
        found = [memory.Found(i, 0.9 - i / 10, "train", i, f"key{i}", "made up", "CC0") for i in range(count)]
        return [found for _ in range(rows)]

    def ids(self, found):
        return self.pairs[found.index]

    def record(self, found):
        return Record(found.key, (f"text {found.index}", np.full((12, 12, 3), found.index, np.uint8)))


@pytest.fixture(scope="module")
def pairs(generator):
    codes = np.arange(9, dtype=np.uint16)
    return [
        document.encode([text, codes % (i + 2)], generator.text, generator.vocab) for i, text in enumerate("ab" * 4)
    ]


def test_the_best_candidate_is_the_one_that_the_encoder_scores_highest(generator):
    prompts = ["bright", "two", "a red circle"]
    found = rerank.draw(generator, Encoder(), prompts, 5, 3, GUIDED)
    assert found.pictures.shape == (3, 5, 12, 12, 3) and found.scores.shape == (3, 5)
    brightness = found.pictures.mean((2, 3, 4))
    assert len(np.unique(brightness)) > 8
    for of in (None, 1, 3):
        best = found.best(of).mean((1, 2, 3))
        assert best[0] == brightness[0, :of].max() and best[1:].tolist() == brightness[1:, :of].min(1).tolist()
    np.testing.assert_allclose(found.scores[0], brightness[0] / 255, rtol=1e-5)


def test_candidates_are_the_rows_of_one_call(generator):
    found = rerank.draw(generator, Encoder(), PROMPTS, 3, 7, GUIDED)
    rows = generator.text_to_image([p for p in PROMPTS for _ in range(3)], 7, GUIDED)
    np.testing.assert_array_equal(found.pictures.reshape(9, 12, 12, 3), rows)
    last = rerank.draw(generator, Encoder(), PROMPTS[2:], 3, 7, GUIDED, numbers=[2])
    np.testing.assert_array_equal(last.pictures, found.pictures[2:])
    one = rerank.draw(generator, Encoder(), PROMPTS, 1, 7, GUIDED)
    np.testing.assert_array_equal(one.best(), generator.text_to_image(PROMPTS, 7, GUIDED))


def test_half_of_a_mixture_s_candidates_are_drawn_by_each_method(generator):
    mixture = dataclasses.replace(GUIDED, method="mixture", top_p=0.9)
    found = rerank.draw(generator, Encoder(), PROMPTS, 4, 7, mixture).pictures
    halves = [
        rerank.draw(generator, Encoder(), PROMPTS, 4, 7, dataclasses.replace(mixture, method=method)).pictures
        for method in ("top_p", "cd_k")
    ]
    np.testing.assert_array_equal(found[:, 0::2], halves[0][:, 0::2])
    np.testing.assert_array_equal(found[:, 1::2], halves[1][:, 1::2])
    assert (halves[0] != halves[1]).any()
    assert decode.settings(mixture, np.arange(8)).contrast.tolist() == [False, True] * 4


def test_no_captions_give_no_pictures_and_no_candidate_is_an_error(generator):
    assert rerank.draw(generator, Encoder(), [], 3).best().shape == (0, 12, 12, 3)
    with pytest.raises(UserError, match="candidates = 0: must be at least 1"):
        rerank.draw(generator, Encoder(), PROMPTS, 0)


def test_pictures_are_drawn_with_the_documents_that_the_memory_finds(generator, pairs):
    memory = Memory(pairs)
    drawn, found = recall.draw(generator, PROMPTS, 2, GUIDED, memory, 2)
    expected = generator.text_to_image(PROMPTS, 2, GUIDED, [pairs[:2]] * 3)
    np.testing.assert_array_equal(drawn, expected)
    assert memory.asked == [("texts", 3, 2)] and [[one.key for one in row] for row in found] == [["key0", "key1"]] * 3
    plain, none = recall.draw(generator, PROMPTS, 2, GUIDED)
    np.testing.assert_array_equal(plain, generator.text_to_image(PROMPTS, 2, GUIDED))
    assert none == [[], [], []] and (plain != drawn).any()
    best, _ = recall.draw(generator, PROMPTS, 2, GUIDED, memory, 2, Encoder(), 3)
    several = rerank.draw(generator, Encoder(), PROMPTS, 3, 2, GUIDED, [pairs[:2]] * 3)
    np.testing.assert_array_equal(best, several.best())


def test_captions_are_written_with_the_documents_that_the_memory_finds(generator, pairs):
    pictures, memory = list(np.random.default_rng(5).integers(0, 256, (2, 12, 12, 3), np.uint8)), Memory(pairs)
    written, found = recall.write(generator, pictures, max_text=5, memory=memory, documents=2)
    assert written == generator.image_to_text(pictures, max_text=5, retrieved=[pairs[:2]] * 2)
    assert memory.asked == [("pictures", 2, 2)] and [len(row) for row in found] == [2, 2]
    again, _ = recall.write(
        generator, pictures, 0, max_text=5, memory=memory, documents=2, codes=generator.encode(pictures)
    )
    assert again == written
    assert recall.write(generator, pictures, max_text=5)[0] == generator.image_to_text(pictures, max_text=5)


def test_documents_that_do_not_fit_are_left_out_of_what_is_told(generator, pairs):
    _, found = recall.draw(generator, ["a", "x" * 40], 0, GUIDED, Memory(pairs), 8)
    assert 0 < len(found[1]) < len(found[0]) < 8


# ----------------------------------------------------------------------------------------------------------- evaluation


def attempts(validation):
    return [protocol.Try({"documents": n, "validation": v}, None, [], {}) for n, v in validation.items()]


def test_the_number_of_documents_is_chosen_on_validation_and_the_first_of_equals():
    assert protocol.best(attempts({0: 0.1, 1: 0.4, 2: 0.3})) == 1
    assert protocol.best(attempts({0: 0.4, 1: 0.4})) == 0
    assert protocol.best([protocol.Try({}, None, [], {})] * 3) == 0


def scene_pairs(split, count=6):
    records = [scenes.record("easy", 0, i, split, 32) for i in range(count)]
    truths = [scenes_world.from_json(record.fields["scene"]) for record in records]
    return protocol.Pairs([r.parts[0] for r in records], np.stack([r.parts[1] for r in records]), truths, "easy")


class Painter:
    """Draws, and describes, as many examples right as documents are shown; of the others an empty scene."""

    grid = (4, 4)

    def __init__(self, splits):
        self.known = {c: p for split in splits.values() for c, p in zip(split.captions, split.pictures, strict=True)}

    def fitting(self, retrieved, prompts=None, max_text=96):
        return retrieved

    def text_to_image(self, captions, seed, sampling, retrieved=None, numbers=None):
        right = 3 * len(retrieved[0]) if retrieved else 1
        right -= sampling.temperature == 1
        return np.stack(
            [self.known[c] if i < right else np.full((32, 32, 3), 255, np.uint8) for i, c in enumerate(captions)]
        )

    def image_to_text(self, codes, seed, sampling, max_text, retrieved=None):
        right = {0: 1, 1: 5, 2: 3}[len(retrieved[0]) if retrieved else 0]
        return [str(c) if i < right else "" for i, c in enumerate(codes)]


@pytest.fixture(scope="module")
def splits():
    return {name: scene_pairs(name) for name in ("test", "validation", "composition")}


def test_an_evaluation_draws_with_every_number_of_documents_and_chooses_on_validation(splits, pairs):
    draw = (configs.Sampling(), configs.Sampling(temperature=0.5))
    settings = configs.Evaluate(draw=draw, samples=6, validation_samples=6)
    artist = protocol.Artist(Painter(splits), settings, Memory(pairs))
    scores, pictures, found, judged, sampling = protocol.text_to_image(artist, splits)
    assert (
        sampling == draw[1]
        and scores["documents"] == 2
        and [r["documents"] for r in scores["by_documents"]] == [0, 1, 2]
    )
    assert [row["shown"] for row in scores["by_documents"]] == [0, 1, 2]
    accuracies = [row["object_accuracy"] for row in scores["by_documents"]]
    assert (
        accuracies == sorted(accuracies) and accuracies[0] < accuracies[1] < accuracies[2] == scores["object_accuracy"]
    )
    assert scores["composition"] == scores["by_documents"][2]["composition"]
    assert all(one.whole for one in judged["test"]) and set(judged) == {"test", "composition"}
    assert len(scores["settings"]) == 2 and np.array_equal(pictures, splits["test"].pictures)
    told = artist.described(found)
    assert [[d["key"] for d in row] for row in told] == [["train/key0", "train/key1"]] * 6
    assert [told[0][1][name] for name in ("source", "license", "caption")] == ["made up", "CC0", "text 1"]
    assert told[0][1]["picture"].shape == (12, 12, 3)
    codes = {name: np.array(split.captions) for name, split in splits.items()}  # the painter reads them as captions
    scores, written, found, _ = protocol.image_to_text(artist, splits, codes)
    assert scores["documents"] == 1 and written[:5] == splits["test"].captions[:5] and len(found[0]) == 1


def test_documents_without_room_count_as_not_shown(splits, pairs):
    artist = protocol.Artist(painter := Painter(splits), configs.Evaluate(samples=6), Memory(pairs))
    painter.fitting = lambda retrieved, *_: [row[:1] for row in retrieved]
    scores, *_ = protocol.text_to_image(artist, splits)
    rows = [(row["documents"], row["shown"]) for row in scores["by_documents"]]
    assert rows == [(0, 0), (1, 1), (2, 1)]


def test_without_a_memory_nothing_is_drawn_twice_and_the_figures_are_the_usual_ones(splits):
    draw = (configs.Sampling(), configs.Sampling(temperature=0.5))
    artist = protocol.Artist(painter := Painter(splits), configs.Evaluate(draw=draw, samples=6, validation_samples=4))
    calls, plain = [], painter.text_to_image
    painter.text_to_image = lambda captions, *rest: calls.append((captions[0], rest[1])) or plain(captions, *rest)
    scores, *_ = protocol.text_to_image(artist, splits)
    assert len(calls) == len(set(calls)) == 5 and not {"documents", "by_documents", "candidates"} & set(scores)
    assert set(scores) == {"object_accuracy", "scene_accuracy", "composition", "samples", "sampling", "settings"}
    codes = {name: np.array(split.captions) for name, split in splits.items()}  # the painter reads them as captions
    scores, *_ = protocol.image_to_text(artist, splits, codes)
    assert set(scores) == {"object_accuracy", "scene_accuracy", "composition", "samples", "sampling"}


def test_documents_of_examples_are_filed_with_their_pictures(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    examples = {
        "text_to_image": [{"caption": "a", "picture": picture, "documents": [{"key": "k", "picture": picture}]}]
    }
    protocol.save(tmp_path, {}, examples)
    row = json.loads((tmp_path / "examples.json").read_text())["text_to_image"][0]
    assert row["picture"] == "text_to_image-000-picture.png" and row["documents"][0]["key"] == "k"
    assert all((tmp_path / name).is_file() for name in (row["picture"], row["documents"][0]["picture"]))
    found = provenance.read(tmp_path / row["picture"])
    assert found["documents"] == '[{"key": "k"}]' and found["weights"] == "not recorded"
    with pytest.raises(UserError, match="does not say where it came from"):
        provenance.read(tmp_path / row["documents"][0]["picture"])


def test_candidates_need_a_recipe_that_retrieves():
    with pytest.raises(ValueError, match=r"evaluate.candidates = 2: the retriever picks"):
        configs.Recipe(evaluate=configs.Evaluate(candidates=2))
    with pytest.raises(ValueError, match=r"evaluate.documents = \(-1,\): must be one or more numbers from 0 on"):
        configs.Evaluate(documents=(-1,))
    configs.Recipe(retrieve=True, evaluate=configs.Evaluate(candidates=2))
