"""Laws of the embedded world: its scenes, pictures and captions, and the readers of both."""

import hashlib
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from scipy import ndimage

from cm3jax.data import scenes, sources_scenes
from cm3jax.data import scenes_recognise as recogniser
from cm3jax.data import scenes_render as render
from cm3jax.data import scenes_world as world
from cm3jax.types import UserError

level = pytest.mark.parametrize("level", world.LEVELS)
OLD = ("easy", "full")
FEW = 120
MANY = 5000


def drawn(level, count, resolution=64):
    """Return `count` scenes over all splits, and their pictures."""
    splits = world.splits(level)
    things = [scenes.sample(level, 5, i, splits[i % len(splits)]) for i in range(count)]
    return things, np.stack([scenes.render(thing, resolution) for thing in things])


def content(scene):
    """Everything that counts as reading a scene right, positions by their places only."""
    objects = sorted((thing.place, *thing.looks) for thing in scene.objects)
    return objects, scene.background, scene.word, scene.word_place, scene.unread


def share_right(truth, read):
    return np.mean([content(a) == content(b) for a, b in zip(truth, read, strict=True)])


def stated_right(scene, text):
    """Whether a caption parses to all of its scene; relations must hold and name things that exist."""
    stated = scenes.parse(text, scene.level)
    looks = sorted((t.name, *t.looks) for t in stated.objects) == sorted((t.name, *t.looks) for t in scene.objects)
    rest = (stated.background, stated.word, stated.word_place, stated.unread)
    return looks and rest == (scene.background, scene.word, scene.word_place, 0)


# ------------------------------------------------------------------------------------------------------------- scenes


@level
def test_the_same_arguments_give_the_same_record(level):
    a, b = (scenes.record(level, 3, 17, "train", 64) for _ in range(2))
    assert a.parts[0] == b.parts[0] and a.fields == b.fields and (a.parts[1] == b.parts[1]).all()


@level
def test_seed_index_and_split_all_change_the_scene(level):
    calls = [(0, 0, "train"), (1, 0, "train"), (0, 1, "train"), (0, 0, "test"), (0, 0, "composition")]
    assert len({world.to_json(scenes.sample(level, *call)) for call in calls}) == len(calls)


@level
def test_held_out_pairs_are_in_every_composition_scene_and_nowhere_else(level):
    for split in world.SPLITS:
        for i in range(FEW):
            pairs = [(t.shape, t.colour) in world.HELD_OUT.items() for t in scenes.sample(level, 0, i, split).objects]
            assert any(pairs) == (split == "composition")


@level
def test_no_scene_belongs_to_two_splits(level):
    for split in world.SPLITS:  # the catalogue has scenes of its own
        assert all(world.home(scenes.sample(level, 0, i, split)) == split for i in range(FEW))


@pytest.mark.parametrize("level", OLD)
def test_one_to_four_objects_and_all_attributes_are_about_equally_frequent(level):
    things = [scenes.sample(level, 0, i, "train") for i in range(800)]
    counts = np.bincount([len(s.objects) for s in things], minlength=5)[1:]
    assert counts.sum() == 800 and counts.min() > 150
    for name, values in (("shape", world.SHAPES), ("colour", world.COLOURS), ("size", world.SIZES[level])):
        found = [getattr(t, name) for s in things for t in s.objects]
        shares = np.array([found.count(v) / len(found) for v in values]) * len(values)
        assert (np.abs(shares - 1) < 0.3).all()


def test_easy_objects_stay_within_one_step_of_their_quarters_centre():
    for i in range(FEW):
        objects = scenes.sample("easy", 0, i, "train").objects
        assert len({t.place for t in objects}) == len(objects)
        for t in objects:
            x, y = world.QUARTERS[t.place]
            assert abs(t.x * 64 - x) <= 1 and abs(t.y * 64 - y) <= 1


def test_full_objects_keep_their_distance_and_lie_inside():
    for i in range(FEW):
        scene = scenes.sample("full", 0, i, "train")
        boxes = [np.array(world.box("full", t)) * 64 for t in scene.objects]
        for n, a in enumerate(boxes):
            assert a.min() >= 0 and a.max() <= 64
            for b in boxes[:n]:
                assert max(*(a[:2] - b[2:]), *(b[:2] - a[2:])) >= world.GAP


@level
def test_scenes_survive_json(level):
    for i in range(50):
        scene = scenes.sample(level, 0, i, "test")
        assert world.from_json(world.to_json(scene)) == scene
    stated = scenes.parse("a small red circle top left, on white", "easy")
    assert world.to_json(world.from_json(world.to_json(stated))) == world.to_json(stated)


def test_an_unknown_level_or_split_is_one_clear_line():
    with pytest.raises(
        UserError, match="scenes:hard: no such level; choose one of scenes:easy, scenes:full, scenes:rare"
    ):
        scenes.sample("hard", 0, 0, "train")
    with pytest.raises(UserError, match="split 'dev': scenes have the splits train, validation, test, composition"):
        scenes.sample("easy", 0, 0, "dev")


# ----------------------------------------------------------------------------------------------------------- pictures


@level
@pytest.mark.parametrize("resolution", [37, 64, 96, 128])
def test_pictures_of_any_resolution_show_the_same_scene(level, resolution):
    for i in range(20):
        scene = scenes.sample(level, 0, i, "train")
        picture = scenes.render(scene, resolution)
        assert picture.shape == (resolution, resolution, 3) and picture.dtype == np.uint8
        shown = ~(picture == picture[0, 0]).all(-1)
        for t in scene.objects:  # each object's box holds pixels that are not background
            x0, y0, x1, y1 = (np.array(world.box(level, t)) * resolution).round().astype(int)
            assert shown[y0:y1, x0:x1].mean() > 0.2


def test_every_letter_of_the_font_has_its_own_picture():
    assert len({render.glyph(letter).tobytes() for letter in render.FONT}) == 26
    assert set("".join(world.WORDS)) <= set(render.FONT)


@level
def test_record_regions_are_the_objects_boxes(level):
    record = scenes.record(level, 0, 3, "train", 64)
    scene = world.from_json(record.fields["scene"])
    assert [r.box for r in record.regions] == [world.box(level, t) for t in scene.objects]


# ----------------------------------------------------------------------------------------------------------- captions


@level
def test_captions_are_read_back(level):
    for i in range(300):
        scene = scenes.sample(level, 1, i, world.splits(level)[i % len(world.splits(level))])
        text = scenes.caption(scene, np.random.default_rng(i))
        assert stated_right(scene, text), text


def test_easy_captions_state_places_and_have_several_wordings():
    scene = scenes.sample("easy", 0, 9, "train")
    texts = {scenes.caption(scene, np.random.default_rng(i)) for i in range(50)}
    assert len(texts) == 3
    places = sorted((t.place, *t.looks) for t in scene.objects)
    assert all(sorted((t.place, *t.looks) for t in scenes.parse(text, "easy").objects) == places for text in texts)


def test_full_captions_vary_and_use_relations():
    texts = [scenes.record("full", 0, i, "train", 64).parts[0] for i in range(FEW)]
    assert sum(bool(re.search("left of|right of|above|below|under|higher than", t)) for t in texts) > FEW / 5
    assert len(set(texts)) == FEW
    assert any(t.relation for text in texts for t in scenes.parse(text, "full").objects)


def test_stated_relations_and_places_are_true():
    for i in range(FEW):
        scene = scenes.sample("full", 0, i, "train")
        for t in scenes.parse(scenes.caption(scene, np.random.default_rng(i)), "full").objects:
            same = [s for s in scene.objects if s.looks == t.looks]
            if t.place:
                assert t.place in [s.place for s in same]
            else:
                others = [o for o in scene.objects if o.looks == t.relation[1:]]
                assert any(world.relation(s, o) == t.relation[0] for s in same for o in others if o is not s)


@level
@hypothesis.given(strategies.text())
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_text_is_parsed_without_error(level, text):
    assert scenes.parse(text, level).level == level


@level
@pytest.mark.parametrize(
    "text", ["", "a dog", "a red circle", "small red circle", "circle top left", "a small mauve disc"]
)
def test_incomplete_statements_state_no_object(level, text):
    stated = scenes.parse(text, level)
    assert not stated.objects and stated.unread == bool(text)


# -------------------------------------------------------------------------------------------------------- recognition


@level
@pytest.mark.parametrize("resolution", [64, 96])
def test_rendered_pictures_are_read_back(level, resolution):
    truth, pictures = drawn(level, FEW, resolution)
    assert share_right(truth, scenes.recognise_all(pictures, level)) >= 0.995


@level
def test_positions_are_read_to_the_pixel(level):
    truth, pictures = drawn(level, 50)
    for scene, read in zip(truth, scenes.recognise_all(pictures, level), strict=True):
        places = [sorted((*t.looks, t.x, t.y) for t in s.objects) for s in (scene, read)]
        assert len(places[0]) == len(places[1])
        for a, b in zip(*places, strict=True):
            assert a[:4] == b[:4] and abs(a[4] - b[4]) <= 1 / 64 and abs(a[5] - b[5]) <= 1 / 64


@level
def test_blurred_and_noisy_pictures_are_read_back(level):
    truth, pictures = drawn(level, FEW)
    noise = np.random.default_rng(0).normal(0, 8, pictures.shape)
    rough = ndimage.gaussian_filter(pictures.astype(np.float32), (0, 0.7, 0.7, 0)) + noise
    assert share_right(truth, scenes.recognise_all(rough.clip(0, 255).astype(np.uint8), level)) >= 0.98


@level
def test_a_picture_alone_is_read_as_in_a_batch(level):
    _, pictures = drawn(level, 5)
    assert [scenes.recognise(p, level) for p in pictures] == scenes.recognise_all(pictures, level)


def shuffled(picture, side, rng):
    """Return a picture with its patches of `side` pixels in random order."""
    n = len(picture) // side
    patches = picture.reshape(n, side, n, side, 3).swapaxes(1, 2).reshape(n * n, side, side, 3)
    patches = patches[rng.permutation(n * n)].reshape(n, n, side, side, 3)
    return patches.swapaxes(1, 2).reshape(picture.shape)


def nothings(level, count):
    """Yield (name, pictures) of kinds that show no scene. A 16-pixel patch can carry a whole small object of `full`."""
    rng = np.random.default_rng(1)
    shape = (count, 64, 64, 3)
    yield "noise", rng.integers(0, 256, shape, np.uint8)
    yield "grey noise", rng.normal(128, 40, shape).clip(0, 255).astype(np.uint8)
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, shape), (0, 4, 4, 0))
    yield "clouds", (128 + 60 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)
    yield "blank", np.broadcast_to(rng.integers(0, 256, (count, 1, 1, 3), np.uint8), shape)
    palette = np.uint8(list(world.BACKGROUNDS[level].values()))
    yield "background", np.broadcast_to(palette[rng.integers(len(palette), size=count)][:, None, None], shape)
    for side in (4, 8, 16) if level in world.GRID else (4, 8):
        yield f"patches of {side}", np.stack([shuffled(p, side, rng) for p in drawn(level, count)[1]])


def found_something(level, count):
    """Return {kind: share of pictures in which something was found}."""
    read = {name: scenes.recognise_all(pictures, level) for name, pictures in nothings(level, count)}
    return {name: np.mean([bool(s.objects or s.word) for s in found]) for name, found in read.items()}


@level
def test_nothing_is_found_where_nothing_is(level):
    found = found_something(level, FEW)
    assert max(found.values()) <= 0.01, found


def test_an_unreadable_blob_counts_as_unread():
    scene = next(s for s in (scenes.sample("easy", 0, i, "train") for i in range(99)) if len(s.objects) == 3)
    picture = scenes.render(scene, 64)
    (empty,) = set(world.QUARTERS) - {t.place for t in scene.objects}
    x, y = world.QUARTERS[empty]
    picture[y - 12 : y - 4, x - 12 : x + 4] = (200, 60, 90)
    read = scenes.recognise(picture, "easy")
    assert len(read.objects) == 3 and read.unread == 1


@pytest.mark.slow
@level
def test_5000_scenes_are_read_back_from_pictures_and_captions(level):
    truth, pictures = drawn(level, MANY)
    assert share_right(truth, scenes.recognise_all(pictures, level)) >= 0.999
    texts = [scenes.caption(scene, np.random.default_rng(i)) for i, scene in enumerate(truth)]
    assert np.mean([stated_right(scene, text) for scene, text in zip(truth, texts, strict=True)]) >= 0.999


@pytest.mark.slow
@level
def test_nothing_is_found_in_2000_of_each_kind_of_nothing(level):
    found = found_something(level, 2000)
    assert max(found.values()) <= 0.01, found


def test_templates_cover_every_look_and_shift():
    for level in OLD:
        what, cover, share, _ = recogniser._templates(level)
        looks = len(world.SHAPES) * len(world.SIZES[level]) * len(world.TEXTURES[level])
        assert len(what) == looks * (2 * recogniser.REACH + 1) ** 2 == cover.shape[1] == share.shape[1]


# --------------------------------------------------------------------------------------------------------------- rare


def named(split, count=400):
    """Return the names in the first scenes of a split."""
    return [t.name for i in range(count) for t in scenes.sample("rare", 0, i, split).objects if t.name]


def test_a_name_always_means_the_same_look_and_its_caption_says_nothing_of_it():
    for i in range(FEW):
        scene = scenes.sample("rare", 0, i, world.splits("rare")[i % 7])
        for t in scene.objects:
            if t.name:
                assert t.looks == world.NAMES[t.name]
                described = re.findall("small|large", scenes.caption(scene, np.random.default_rng(i)))
                assert len(described) == sum(not other.name for other in scene.objects)


def test_names_are_two_syllables_and_new_ones_have_none_of_their_own():
    parts = [re.findall("..", name) for name in world.NAMES]
    assert len(parts) == world.MET + world.NEW and all(len(p) == 2 for p in parts)
    assert {s for p in parts[world.MET :] for s in p} <= {s for p in parts[: world.MET] for s in p}
    assert len(set(world.NAMES.values())) > 550  # of 588


def test_new_names_are_never_trained_on_and_half_of_the_held_out_names():
    assert not any(map(world.is_new, named("train")))
    for split in ("validation", "test"):
        assert 0.4 < np.mean([world.is_new(name) for name in named(split)]) < 0.6
    assert not named("composition")


def test_names_have_a_long_tail_in_training():
    ranks = np.array([tuple(world.NAMES).index(name) for name in named("train", 2000)])
    first, last = (ranks < 100).mean(), (ranks >= world.MET - 100).mean()
    assert 0.4 < len(ranks) / 2000 < 0.6
    assert 5 < first / last < 30  # (100 .. 199 against 1,600 .. 1,699): 12


def test_the_catalogue_shows_every_name_on_both_grounds_and_all_held_out_pairs():
    for split, known in (("bank", set(names()[: world.MET])), ("late", set(names()[world.MET :]))):
        shown = [scenes.sample("rare", 0, i, split) for i in range(sources_scenes.CATALOGUE[split])]
        found = {(t.name, scene.background) for scene in shown for t in scene.objects if t.name}
        assert found == {(name, ground) for name in known for ground in world.BACKGROUNDS["rare"]}
        pairs = {(t.shape, t.colour) for scene in shown for t in scene.objects}
        held_out = set(world.HELD_OUT.items())
        assert held_out <= pairs if split == "late" else not held_out & pairs


def test_no_scene_of_the_catalogue_is_one_of_another_split():
    def alone(scene):
        return len(scene.objects) == 4 and len({(t.name, *t.looks) for t in scene.objects}) == 1

    assert all(alone(scenes.sample("rare", 0, i, split)) for split in world.CATALOGUE for i in range(FEW))
    assert not any(alone(scenes.sample("rare", 0, i, split)) for split in world.SPLITS for i in range(FEW))


def test_the_web_shows_named_things_alone_tells_more_and_holds_nothing_of_the_tests():
    told, shown = [], []
    for i in range(FEW):
        record = scenes.record("rare", 0, i, "web", 48)
        told.append(scenes.parse(record.parts[0], "rare"))
        shown.append(world.from_json(record.fields["scene"]))
        assert scenes.recognise(record.parts[1], "rare").objects[0].looks == shown[-1].objects[0].looks
        (thing,) = shown[-1].objects
        assert len(record.regions) == 1 and thing.name in [t.name for t in told[-1].objects]
    assert {len(scene.objects) for scene in told} == {1, 2}
    assert {world.home(scene) for scene in told + shown} == {"train"}
    assert {world.is_new(scene.objects[0].name) for scene in shown} == {True, False}


def names():
    return list(world.NAMES)


def test_an_unknown_name_is_unread():
    stated = scenes.parse("a vukelox top left, on white", "rare")
    assert not stated.objects and stated.unread == 1 and stated.background == "white"


def test_only_the_rare_level_has_a_catalogue():
    with pytest.raises(UserError, match="split 'bank': scenes have the splits train, validation, test, composition$"):
        scenes.sample("easy", 0, 0, "bank")


@pytest.mark.parametrize(("level", "digest"), [("easy", "4ff6c9df45b012e2"), ("full", "a8faf4342d49826d")])
def test_records_of_the_older_levels_stay_as_they_are(level, digest):
    found = hashlib.sha256()
    for i in range(100):
        record = scenes.record(level, 3, i, world.SPLITS[i % 4], 64)
        found.update(record.parts[0].encode() + record.parts[1].tobytes() + record.fields["scene"].encode())
    assert found.hexdigest()[:16] == digest
