"""The embedded world: what a scene is, its three fixed levels, and how one is drawn from a seed.

Lengths are fractions of the picture's side; all levels lie on a lattice of 1/64 (`LATTICE`), so that at 64 pixels
objects sit on whole pixels. No level is ever changed to reach a score.

`easy`: 1-4 objects on a 2x2 grid, each moved by -1, 0 or 1 lattice steps per axis from the centre of its quarter; 6
shapes, 8 colours, 2 sizes (14/64 and 24/64), 3 backgrounds. The caption states everything but that jitter.

`full`: 1-4 objects at free positions at least 4/64 apart (sizes 12/64 and 20/64), solid or striped, 6 backgrounds, and
in a third of the scenes a word of capitals in a strip at the top or bottom. The caption states every object's size,
colour, stripes and shape, and its place: either coarsely ("at the bottom left": thirds of the picture) or by relation
to an object named before it ("above the small blue ring"); then the background and the word.

`rare`: what makes retrieval matter. 1-2 objects in the centres of quarters, solid or in two colours ("red over blue":
the upper half is red), 2 sizes (18/64 and 28/64), 2 backgrounds. Half of the training scenes hold one *named thing*:
an object of two colours of which the caption says a name and a place and nothing else ("a vuke top left"). A name is
two of 70 syllables, has one fixed look, which three or four names share, and does not tell it: one who never saw the
name guesses one of 588. `NAMES` has a long tail: 20,000 training scenes hold the first of 1,600 about 35 times and
the last twice; 400 more (`is_new`) never. A *catalogue* shows every name alone, in all four quarters, once on either
background: the split `bank` the 1,600 and some common things, the split `late` the 400 and the pairs of the
composition split. Half of the named things in validation and test are new, the others drawn evenly from the 1,600.
All other scenes hold common things, whose captions tell all that there is to see: what retrieval gives or costs.
`web` is for the retriever: it shows any named thing alone in any quarter, some names far more often than others, and
its captions may tell of another thing besides, that is not to be seen, as captions in the wild do.

What is trained on what. A decoder trains on `train`, and with retrieval sees documents of `bank` on the way; of
`late` it sees nothing until it draws, when both are its memory. The retriever stands for the paper's frozen CLIP,
which had seen far more than the decoder, and may be trained on all of these and `web`. Why this is fair: a model
without retrieval lacks the looks of names and nothing else, as shapes, colours, places and pairs of colours are as
common in training as any; one with retrieval gets no help but documents, and has to find the thing, to take its look
and to draw it in one quarter, often on another ground and beside another thing: a scene of four like objects is only
in the catalogue.

Splits. Every scene of the `composition` split has at least one of six (shape, colour) pairs, `HELD_OUT`, and no other
scene has any, but every eighth of `late`. A scene's content (easy: all but the jitter; full: all but positions and
places; rare: all) is hashed: one eighth of all contents can only be in `validation`, another eighth only in `test`, the
rest only in `train`. So a test scene is never a training scene seen again, nor one that can be retrieved.
"""

import dataclasses
import functools
import json
import zlib

import numpy as np

from cm3jax.types import UserError

LEVELS = ("easy", "full", "rare")
TASKS, CAPTIONS = "tasks", "captions"
"""Levels of their own kind, whose documents are those of `scenes_tasks`: what tuning and what pretraining sees."""
TEXTS = "texts"
"""captions: the split of texts without pictures, for the text tokenizer alone."""
GRID = ("easy", "rare", TASKS)
"""Levels whose objects lie in quarters and in no other place."""
SPLITS = ("train", "validation", "test", "composition")
"""Of every level; `rare` has `CATALOGUE` too: see `splits`."""
CATALOGUE = ("bank", "late")
"""rare: splits that are there to be retrieved."""
WEB = "web"
"""rare: the split from which a retriever learns names; its captions tell more than its pictures show."""
LATTICE = 64

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLOURS = {
    "red": (215, 25, 35),
    "orange": (250, 140, 10),
    "yellow": (245, 230, 40),
    "green": (25, 160, 45),
    "cyan": (20, 205, 225),
    "blue": (30, 60, 225),
    "purple": (135, 30, 165),
    "pink": (255, 120, 200),
}
BACKGROUNDS = {
    "easy": {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (12, 12, 12)},
    "full": {
        "white": (245, 245, 245),
        "grey": (128, 128, 128),
        "black": (12, 12, 12),
        "beige": (238, 212, 170),
        "navy": (18, 28, 82),
        "mint": (178, 232, 205),
    },
    "rare": {"white": (245, 245, 245), "black": (12, 12, 12)},
}
BACKGROUNDS[TASKS] = BACKGROUNDS["easy"]
SIZES = {
    "easy": {"small": 14, "large": 24},
    "full": {"small": 12, "large": 20},
    "rare": {"small": 18, "large": 28},
    TASKS: {"small": 16, "large": 24},
}
"""Sides of the objects' bounding boxes, in lattice steps."""
OVER = {f"over {colour}": colour for colour in COLOURS}
"""rare: textures of two colours, and the colour of the lower half; the upper one has the object's own."""
TEXTURES = {"easy": ("solid",), "full": ("solid", "striped"), "rare": ("solid", *OVER), TASKS: ("solid",)}
HELD_OUT = {"circle": "purple", "square": "yellow", "triangle": "cyan", "cross": "pink", "ring": "red", "star": "blue"}
"""The (shape, colour) pairs of the composition split."""
QUARTERS = {"top left": (16, 16), "top right": (48, 16), "bottom left": (16, 48), "bottom right": (48, 48)}
"""easy, rare: centre of each place, in lattice steps."""

GAP = 4
"""full: least distance of two bounding boxes, in lattice steps."""
WORDS = ("CAT", "DOG", "SUN", "SEA", "BUS", "HAT", "KEY", "MAP", "OWL", "FOX", "JAM", "ZOO")
WORDS += ("TREE", "BIRD", "FISH", "MOON", "LAMP", "WAVE", "VINE", "QUIZ", "ROCK", "GOLD", "YARN", "PEAR")
STRIP = 18
"""full: rows at the top or bottom that a word keeps free of objects, in lattice steps."""
LETTER_WIDTH, LETTER_HEIGHT, LETTER_STEP, LETTER_MARGIN = 10, 14, 12, 2
"""full: a letter's box, the distance of two letters, and the word's distance from the edge, in lattice steps."""


@dataclasses.dataclass(frozen=True)
class Object:
    """One object. `place`, `x`, `y` and `relation` are unset where a caption does not state them.

    Attributes:
      place: easy: a key of `QUARTERS`; full: which third of the picture ("top left", "centre", "right", ...), or "".
      x, y: Centre as fractions of the side; NaN if unknown (a scene that was read from a caption).
      relation: Only in scenes read from captions: (relation, shape, colour, size, texture) of the other object.
      name: rare: a key of `NAMES` for a named thing, if known: a picture does not show it.
    """

    shape: str
    colour: str
    size: str
    place: str = ""
    texture: str = "solid"
    x: float = float("nan")
    y: float = float("nan")
    relation: tuple[str, ...] = ()
    name: str = ""

    @property
    def looks(self) -> tuple[str, str, str, str]:
        """All but where it is."""
        return self.shape, self.colour, self.size, self.texture


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture's contents. An empty `background` means unknown.

    Attributes:
      word: Capitals drawn in the strip `word_place` ("top" or "bottom") from `word_x` on; "" for none.
      unread: Things that a recogniser or parser noticed and could not read; they count as extra objects.
    """

    level: str
    background: str = ""
    objects: tuple[Object, ...] = ()
    word: str = ""
    word_place: str = ""
    word_x: float = 0.0
    unread: int = 0


def to_json(scene: Scene) -> str:
    """Return the scene as one line of JSON; unknown positions become null."""
    data = dataclasses.asdict(scene)
    for thing in data["objects"]:
        for axis in ("x", "y"):
            thing[axis] = None if thing[axis] != thing[axis] else thing[axis]
        if not thing["name"]:
            del thing["name"]
    return json.dumps(data)


def from_json(text: str) -> Scene:
    """Return the scene that `to_json` wrote."""
    data = json.loads(text)
    for thing in data["objects"]:
        thing["relation"] = tuple(thing["relation"])
        for axis in ("x", "y"):
            thing[axis] = float("nan") if thing[axis] is None else thing[axis]
    return Scene(**(data | {"objects": tuple(Object(**thing) for thing in data["objects"])}))


def box(level: str, thing: Object) -> tuple[float, float, float, float]:
    """Return the bounding box (x0, y0, x1, y1) of an object whose position is known, as fractions of the side."""
    half = SIZES[level][thing.size] / LATTICE / 2
    return thing.x - half, thing.y - half, thing.x + half, thing.y + half


def splits(level: str) -> tuple[str, ...]:
    """Return the names of a level's splits."""
    return (*SPLITS, *{"rare": (*CATALOGUE, WEB), CAPTIONS: (TEXTS,)}.get(level, ()))


def check(level: str, split: str = "train") -> None:
    """Raise UserError unless `level` and `split` exist."""
    if level not in (*LEVELS, TASKS, CAPTIONS):
        known = ", ".join(f"scenes:{k}" for k in (*LEVELS, TASKS, CAPTIONS))
        raise UserError(f"scenes:{level}: no such level; choose one of {known}")
    if split not in splits(level):
        raise UserError(f"split {split!r}: scenes have the splits {', '.join(splits(level))}")


def stream(level: str, seed: int, index: int, split: str, name: str) -> np.random.Generator:
    """Return the random stream `name` of one scene."""
    return np.random.default_rng((seed, zlib.crc32(f"{level}/{split}/{name}".encode()), index))


def sample(level: str, seed: int, index: int, split: str) -> Scene:
    """Draw scene `index` of a split; the same arguments always give the same scene."""
    check(level, split)
    rng = stream(level, seed, index, split, "scene")
    if level == "rare":
        return _sample_rare(rng, index, split)
    draw = _draw_easy if level == "easy" else _draw_full
    while True:
        scene = draw(rng, split == "composition")
        if split not in ("composition", home(scene)):
            continue
        if level == "easy" or (scene := _lay_out(rng, scene)):
            return scene


def home(scene: Scene) -> str:
    """Return the one split that may hold this scene; positions do not matter, nor do the full level's places."""
    if any(HELD_OUT[thing.shape] == thing.colour for thing in scene.objects):
        return "composition"
    things = sorted((thing.place if scene.level in GRID else "", *thing.looks) for thing in scene.objects)
    bucket = zlib.crc32(repr((scene.background, scene.word, scene.word_place, things)).encode()) % 8
    return {0: "validation", 1: "test"}.get(bucket, "train")


_SHOWN = [(shape, colour) for shape in SHAPES for colour in COLOURS if HELD_OUT[shape] != colour]


def _looks(rng: np.random.Generator, level: str, count: int, composition: bool) -> list[tuple[str, str, str, str]]:
    """Draw (shape, colour, size, texture) per object; at least one held-out pair if `composition`, else none."""
    pairs = [_SHOWN[i] for i in rng.integers(len(_SHOWN), size=count)]
    if composition:
        pairs[rng.integers(count)] = tuple(HELD_OUT.items())[rng.integers(len(HELD_OUT))]
    sizes, textures = tuple(SIZES[level]), TEXTURES[level]
    bits = rng.integers(2, size=(count, 2)).tolist()
    return [(*pair, sizes[a], textures[b % len(textures)]) for pair, (a, b) in zip(pairs, bits, strict=True)]


def _draw_easy(rng: np.random.Generator, composition: bool) -> Scene:
    count = int(rng.integers(1, 5))
    places = [tuple(QUARTERS)[i] for i in sorted(rng.permutation(4)[:count])]
    jitter = rng.integers(-1, 2, size=(count, 2)).tolist()
    objects = []
    for look, place, (dx, dy) in zip(_looks(rng, "easy", count, composition), places, jitter, strict=True):
        x, y = QUARTERS[place]
        objects.append(_object(look, place, (x + dx) / LATTICE, (y + dy) / LATTICE))
    return Scene("easy", tuple(BACKGROUNDS["easy"])[rng.integers(3)], tuple(objects))


def _object(look: tuple[str, str, str, str], place: str, x: float, y: float) -> Object:
    shape, colour, size, texture = look
    return Object(shape, colour, size, place, texture, x, y)


def third(x: float, y: float) -> str:
    """Return the full level's place of a centre: "top left", "top", ..., "centre", ..., "bottom right"."""
    row = ("top", "", "bottom")[min(int(y * 3), 2)]
    column = ("left", "", "right")[min(int(x * 3), 2)]
    return f"{row} {column}".strip() or "centre"


def relation(a: Object, b: Object, margin: float = 0.0) -> str:
    """Return where `a` is seen from `b`: "left", "right", "above" or "below"; "" if within `margin` of a diagonal."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(abs(dx) - abs(dy)) < margin:
        return ""
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _draw_full(rng: np.random.Generator, composition: bool) -> Scene:
    """Draw all but the positions: `_lay_out` adds them once the content suits the split."""
    word, word_place, word_x = "", "", 0.0
    if rng.random() < 1 / 3:
        word, word_place = WORDS[rng.integers(len(WORDS))], ("top", "bottom")[rng.integers(2)]
        word_x = int(rng.integers(2, LATTICE - 1 - word_width(word))) / LATTICE
    background = tuple(BACKGROUNDS["full"])[rng.integers(len(BACKGROUNDS["full"]))]
    looks = _looks(rng, "full", int(rng.integers(1, 5)), composition)
    return Scene("full", background, tuple(_object(look, "", 0.0, 0.0) for look in looks), word, word_place, word_x)


def _lay_out(rng: np.random.Generator, scene: Scene) -> Scene | None:
    """Give the objects of a full scene free positions, the large ones first; None if ten trials found no room."""
    looks = sorted((thing.looks for thing in scene.objects), key=lambda look: look[2] == "small")
    for _ in range(10):
        if objects := _arrange(rng, looks, scene.word_place):
            return dataclasses.replace(scene, objects=objects)
    return None


def _arrange(rng: np.random.Generator, looks, word_place: str) -> tuple[Object, ...] | None:
    """Give each object a free position outside of the word's strip, or return None if one finds no room."""
    top, bottom = STRIP * (word_place == "top"), LATTICE - STRIP * (word_place == "bottom")
    objects: list[Object] = []
    for look in looks:
        thing = _settle(rng, look, objects, top, bottom)
        if thing is None:
            return None
        objects.append(thing)
    return tuple(objects)


def _settle(rng: np.random.Generator, look, others: list[Object], top: int, bottom: int) -> Object | None:
    """Find a free position between rows `top` and `bottom`, clear of the thirds' borders; None after 20 tries."""
    side = SIZES["full"][look[2]]
    low, high = side // 2 + 1, side // 2
    for _ in range(20):
        x = int(rng.integers(low, LATTICE - high))
        y = int(rng.integers(top + low, bottom - high))
        clear = all(abs(c - border * LATTICE / 3) >= 1.5 for c in (x, y) for border in (1, 2))
        if clear and all(_gap(x, y, side, other) >= GAP for other in others):
            return _object(look, third(x / LATTICE, y / LATTICE), x / LATTICE, y / LATTICE)
    return None


def _gap(x: int, y: int, side: int, other: Object) -> float:
    """Return the lattice steps between two bounding boxes (the larger of the gaps along x and y)."""
    reach = (side + SIZES["full"][other.size]) / 2
    return max(abs(x - other.x * LATTICE), abs(y - other.y * LATTICE)) - reach


def word_width(word: str) -> int:
    """Return the width of a drawn word in lattice steps."""
    return len(word) * LETTER_STEP - (LETTER_STEP - LETTER_WIDTH)


# --------------------------------------------------------------------------------------------------------------- rare

MET, NEW = 1600, 400
"""rare: names that training scenes use, and names that they never do."""
TAIL = 100
"""rare: training takes name i in proportion to 1 / (i + TAIL): the first 17 times as often as the last."""
WEB_TAIL = 20
"""rare: the same for the web, which has another order of all names: the first 101 times as often as the last."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
EIGHTH = 8
"""rare: of so many scenes of the catalogue, all but the last show a name, and the last one a pair without a name."""


@functools.cache
def _names() -> dict[str, tuple[str, str, str, str]]:
    """Return {name: its look}."""
    rng = np.random.default_rng(20230905)
    syllables = [a + b for a in CONSONANTS for b in VOWELS]
    names = rng.permutation([a + b for a in syllables for b in syllables])[: MET + NEW].tolist()
    return {name: _look(rng, _SHOWN[rng.integers(len(_SHOWN))], two=True) for name in names}


def _look(rng: np.random.Generator, pair: tuple[str, str], two: bool) -> tuple[str, str, str, str]:
    """Return (shape, colour, size, texture) of a rare object with this (shape, colour)."""
    size = tuple(SIZES["rare"])[rng.integers(2)]
    lower = [f"over {colour}" for colour in COLOURS if colour != pair[1]]
    return *pair, size, lower[rng.integers(len(lower))] if two else "solid"


NAMES = _names()
"""rare: {name: (shape, colour, size, texture)}, the names of training first."""
_ORDER = tuple(NAMES)


def _frequency(names: int, tail: int) -> np.ndarray:
    """Return how often each of so many names is drawn, the first most often."""
    found = 1 / (np.arange(names) + tail)
    return found / found.sum()


_FREQUENCY = _frequency(MET, TAIL)
_WEB_NAMES = tuple(np.random.default_rng(0).permutation(_ORDER).tolist())
_WEB_FREQUENCY = _frequency(MET + NEW, WEB_TAIL)


def is_new(name: str) -> bool:
    """Return whether no training scene has this name."""
    return name in _NEW


_NEW = frozenset(_ORDER[MET:])


def _name(rng: np.random.Generator, split: str) -> str:
    """Draw the name of a scene's named thing; "" if it has none."""
    if split == "composition" or rng.integers(2):
        return ""
    if split == "train":
        return _ORDER[rng.choice(MET, p=_FREQUENCY)]
    return _ORDER[MET + rng.integers(NEW) if rng.integers(2) else rng.integers(MET)]


def _sample_rare(rng: np.random.Generator, index: int, split: str) -> Scene:
    """Draw a rare scene that may be in this split."""
    if split in CATALOGUE:
        return _draw_catalogue(rng, index, split)
    if split == WEB:
        return _draw_web(rng)
    name = _name(rng, split)
    while True:
        scene = _draw_rare(rng, name, split == "composition")
        if home(scene) == split:
            return scene


def _draw_catalogue(rng: np.random.Generator, index: int, split: str) -> Scene:
    """Draw scene `index` of `bank` (names that training has, common pairs) or `late` (new names, held-out pairs)."""
    turn, rest = divmod(index, EIGHTH)
    entry, ground = divmod(turn * (EIGHTH - 1) + rest, 2)
    names, pairs = (_ORDER[:MET], _SHOWN) if split == "bank" else (_ORDER[MET:], list(HELD_OUT.items()))
    if rest == EIGHTH - 1:
        name, look = "", _look(rng, pairs[turn % len(pairs)], two=bool(rng.integers(2)))
    else:
        name = names[entry % len(names)]
        look = NAMES[name]
    return _placed([look] * 4, [name] * 4, list(range(4)), tuple(BACKGROUNDS["rare"])[ground])


def shown(scene: Scene, split: str) -> Scene:
    """Return what the picture shows of a scene: of `web` the named thing alone, else everything."""
    if split != WEB:
        return scene
    return dataclasses.replace(scene, objects=tuple(thing for thing in scene.objects if thing.name))


def _draw_web(rng: np.random.Generator) -> Scene:
    """Draw any named thing, and maybe another; in validation and test is neither the scene nor what is shown of it."""
    while True:
        scene = _draw_rare(rng, _WEB_NAMES[rng.choice(len(_WEB_NAMES), p=_WEB_FREQUENCY)], composition=False)
        if home(scene) == home(shown(scene, WEB)) == "train":
            return scene


def _draw_rare(rng: np.random.Generator, name: str, composition: bool) -> Scene:
    """Draw one or two objects, of which one is the named thing if there is a name."""
    count = int(rng.integers(1, 3))
    pairs = [_SHOWN[i] for i in rng.integers(len(_SHOWN), size=count)]
    if composition:
        pairs[rng.integers(count)] = tuple(HELD_OUT.items())[rng.integers(len(HELD_OUT))]
    looks = [_look(rng, pair, two=bool(rng.integers(2))) for pair in pairs]
    names = [""] * count
    if name:
        at = rng.integers(count)
        looks[at], names[at] = NAMES[name], name
    places = sorted(rng.permutation(4)[:count].tolist())
    return _placed(looks, names, places, tuple(BACKGROUNDS["rare"])[rng.integers(2)])


def _placed(looks: list[tuple[str, str, str, str]], names: list[str], places: list[int], background: str) -> Scene:
    """Return a rare scene of these objects in these quarters."""
    objects = []
    for look, name, at in zip(looks, names, places, strict=True):
        place = tuple(QUARTERS)[at]
        x, y = QUARTERS[place]
        objects.append(dataclasses.replace(_object(look, place, x / LATTICE, y / LATTICE), name=name))
    return Scene("rare", background, tuple(objects))
