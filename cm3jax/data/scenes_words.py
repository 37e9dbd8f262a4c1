"""Scenes to captions and back. Both ways are closed grammars: what `parse` cannot read, it says it cannot."""

import re

import numpy as np

from cm3jax.data import scenes_world as world

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "star": ("star",),
}
PLACE_WORDS = {
    "top left": ("at the top left", "in the upper left corner"),
    "top": ("at the top", "in the upper middle"),
    "top right": ("at the top right", "in the upper right corner"),
    "left": ("on the left", "at the left edge"),
    "centre": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right edge"),
    "bottom left": ("at the bottom left", "in the lower left corner"),
    "bottom": ("at the bottom", "in the lower middle"),
    "bottom right": ("at the bottom right", "in the lower right corner"),
}
RELATION_WORDS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under"),
}
CLEAR = 3 / world.LATTICE
"""A relation is only stated if it is this far from the diagonal."""


def _pick(rng: np.random.Generator, choices):
    return choices[rng.integers(len(choices))]


def caption(scene: world.Scene, rng: np.random.Generator) -> str:
    """Return one of the wordings of a scene."""
    return _full(scene, rng) if scene.level == "full" else _easy(scene, rng)


def parse(text: str, level: str) -> world.Scene:
    """Return the scene that a caption states; what is stated incompletely or not understood counts as `unread`."""
    world.check(level)
    return _parse_full(text) if level == "full" else _parse_easy(text, level)


# --------------------------------------------------------------------------------------------------------- easy, rare

EVERYWHERE = "everywhere"


def _easy(scene: world.Scene, rng: np.random.Generator) -> str:
    """Three wordings; each states size, colour, shape and place of each object in reading order, and the background.

    Of a named thing they state name and place only; of a thing that is in all four quarters, that it is everywhere.
    """
    things = [(thing.name or _described(thing), thing.place) for thing in scene.objects]
    if len(things) == len(world.QUARTERS) and len({name for name, _ in things}) == 1:
        things = [(things[0][0], EVERYWHERE)]
    wording = rng.integers(3)
    if wording == 0:
        return ", ".join(f"a {name} {place}" for name, place in things) + f", on {scene.background}"
    if wording == 1:
        return f"on {scene.background}: " + ", ".join(f"{place} a {name}" for name, place in things)
    return f"{scene.background} background, " + ", ".join(f"{name} {place}" for name, place in things)


def _described(thing: world.Object) -> str:
    """Return "small red circle" or "small red over blue circle"."""
    colours = f"{thing.colour} {thing.texture}" if thing.texture in world.OVER else thing.colour
    return f"{thing.size} {colours} {thing.shape}"


def _any(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


def _patterns(level: str) -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """Return what reads "a small red circle top left", "top left a small red circle", and the background."""
    over = f"(?: ({_any(world.OVER)}))?" if level == "rare" else "()"
    name = f"(?P<name>{_any(world.NAMES)})" if level == "rare" else "(?P<name>(?!))"
    looks = f"(?P<size>{_any(world.SIZES[level])}) (?P<colour>{_any(world.COLOURS)})(?P<over>{over})"
    thing = f"(?:a )?(?:{looks} (?P<shape>{_any(world.SHAPES)})|{name})"
    place, grounds = f"(?P<place>{_any([*world.QUARTERS, EVERYWHERE])})", _any(world.BACKGROUNDS[level])
    on = f"on ({grounds})|({grounds}) background"
    return re.compile(f"{thing} {place}"), re.compile(f"{place} {thing}"), re.compile(on)


_EASY = {level: _patterns(level) for level in world.GRID}


def _parse_easy(text: str, level: str) -> world.Scene:
    name_first, place_first, on = _EASY[level]
    backgrounds, objects, unread = [], [], 0
    for clause in filter(None, (c.strip() for c in re.split("[,:]", text))):
        if found := on.fullmatch(clause):
            backgrounds.append(found[1] or found[2])
        elif found := name_first.fullmatch(clause) or place_first.fullmatch(clause):
            stated = found.groupdict()
            places = world.QUARTERS if stated["place"] == EVERYWHERE else [stated["place"]]
            objects += [_thing(**stated | {"place": place}) for place in places]
        else:
            unread += 1
    return world.Scene(level, backgrounds[0] if len(backgrounds) == 1 else "", tuple(objects), unread=unread)


def _thing(size, colour, over, shape, name, place) -> world.Object:
    """Return what a clause states."""
    if name:
        shape, colour, size, texture = world.NAMES[name]
        return world.Object(shape, colour, size, place, texture, name=name)
    return world.Object(shape, colour, size, place, over.strip() or "solid")


# --------------------------------------------------------------------------------------------------------------- full


def _name(thing: world.Object, rng: np.random.Generator) -> str:
    """Return "small striped red circle" or a like wording."""
    size, shape = _pick(rng, SIZE_WORDS[thing.size]), _pick(rng, SHAPE_WORDS[thing.shape])
    if thing.texture == "solid":
        return f"{size} {thing.colour} {shape}"
    if rng.integers(2):
        return f"{size} striped {thing.colour} {shape}"
    return f"{size} {thing.colour} {shape} with stripes"


def _where(thing: world.Object, before: list[world.Object], rng: np.random.Generator) -> str:
    """Return a thing's place, or its relation to one named before it that nothing else looks like."""
    known = [b for b in before if world.relation(thing, b, CLEAR) and sum(b.looks == o.looks for o in before) == 1]
    if known and rng.integers(2):
        other = _pick(rng, known)
        return f"{_pick(rng, RELATION_WORDS[world.relation(thing, other)])} the {_name(other, rng)}"
    return _pick(rng, PLACE_WORDS[thing.place])


def _full(scene: world.Scene, rng: np.random.Generator) -> str:
    """Sentences or lists, in random order; each states all looks, a place or relation, the background, the word."""
    order = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    things = [(_name(t, rng), _where(t, order[:i], rng)) for i, t in enumerate(order)]
    quoted = f'"{scene.word}" at the {scene.word_place}'
    said = f"the word {quoted}"
    wording = rng.integers(4)
    if wording == 3:
        text = " ".join(_sentence(name, where, rng) for name, where in things)
        text += f" The background is {scene.background}."
        return text + (f" It says {quoted}." if scene.word else "")
    listed = [f"a {name} {where}" for name, where in things]
    text = ", ".join(listed[:-1]) + (" and " if len(listed) > 1 else "") + listed[-1]
    if wording == 0:
        return f"{text} on a {scene.background} background" + (f", with {said}" if scene.word else "")
    if wording == 1:
        return f"On a {scene.background} background: {text}" + (f"; {said}" if scene.word else "")
    return f"{text}; {scene.background} background" + (f" and {said}" if scene.word else "")


def _sentence(name: str, where: str, rng: np.random.Generator) -> str:
    if rng.integers(2):
        return f"There is a {name} {where}."
    return f"{where[0].upper()}{where[1:]} there is a {name}."


def _inverse(table) -> dict[str, str]:
    return {word: key for key, words in table.items() for word in words}


_SIZES, _SHAPES, _PLACES, _RELATIONS = map(_inverse, (SIZE_WORDS, SHAPE_WORDS, PLACE_WORDS, RELATION_WORDS))
_THING = f"({_any(_SIZES)}) (striped )?({_any(world.COLOURS)}) ({_any(_SHAPES)})( with stripes)?"
_WHERE = f"(?:({_any(_PLACES)})|({_any(_RELATIONS)}) the {_THING})"
_FULL_NAME_FIRST = re.compile(f"(?:there is )?a {_THING} {_WHERE}")
_FULL_PLACE_FIRST = re.compile(f"{_WHERE} there is a {_THING}")
_FULL_ON = re.compile(r"on a (\w+) background|the background is (\w+)|\b(\w+) background")
_SAYS = re.compile(r'(?:with |and )?(?:the word|it says) "(\w+)" at the (top|bottom)')


def _looks(found: tuple[str | None, ...]) -> tuple[str, str, str, str]:
    """Return (shape, colour, size, texture) from the groups of `_THING`."""
    size, before, colour, shape, after = found
    return _SHAPES[shape], colour, _SIZES[size], "striped" if before or after else "solid"


def _clause(text: str) -> world.Object | None:
    """Return the object that one clause states, or None."""
    if found := _FULL_NAME_FIRST.fullmatch(text):
        thing, (place, relation, *other) = found.groups()[:5], found.groups()[5:]
    elif found := _FULL_PLACE_FIRST.fullmatch(text):
        (place, relation, *other), thing = found.groups()[:7], found.groups()[7:]
    else:
        return None
    shape, colour, size, texture = _looks(thing)
    related = (_RELATIONS[relation], *_looks(tuple(other))) if relation else ()
    return world.Object(shape, colour, size, _PLACES[place] if place else "", texture, relation=related)


def _parse_full(text: str) -> world.Scene:
    text = text.lower()
    words, grounds = _SAYS.findall(text), [next(filter(None, g)) for g in _FULL_ON.findall(text)]
    clauses = re.split(r"[,:;.]| and ", _FULL_ON.sub("", _SAYS.sub("", text)))
    read = [_clause(c.strip()) for c in clauses if c.strip()]
    ground = grounds[0] if len(grounds) == 1 and grounds[0] in world.BACKGROUNDS["full"] else ""
    word, place = words[0] if len(words) == 1 else ("", "")
    things = tuple(t for t in read if t)
    return world.Scene("full", ground, things, word.upper(), place, unread=len(read) - len(things))
