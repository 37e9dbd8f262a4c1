"""Pictures back into scenes, from pixels alone.

Analysis by synthesis: for a crop around each candidate, every template (shape, size, texture, small shift) is fitted
with its colour free (in `rare` both), in closed form; the best fit must explain nearly all of the crop, and its colour
must be near one of the palette's, else the thing counts as `unread`. Candidates are the quarters (easy, rare) or
connected regions (full).
Pictures of another size than 64 pixels are first resampled to it.
"""

import functools

import numpy as np
from PIL import Image
from scipy import ndimage

from cm3jax.data import scenes_render as render
from cm3jax.data import scenes_world as world

SIDE = world.LATTICE
CROP = 32
REACH = 2
"""Templates are tried at shifts up to this many pixels."""
SMOOTH = 0.7
"""Blur of the pictures before anything is compared, in pixels: takes most of the energy of noise away."""
SOFT = 0.9
"""Blur of the templates in pixels: `SMOOTH`, and half of what a tokenizer softens an edge by."""
FIT = {"easy": 0.8, "full": 0.9, "rare": 0.8, world.TASKS: 0.8}
"""Least share of a crop's energy that a template must explain; free positions need more against fragments."""
NEAR = 90.0
"""Largest distance of a fitted colour from the palette's, in 8-bit RGB."""
GROUND = 60.0
"""Pixels at most this far from the nearest background's colour count as that background, in 8-bit RGB."""
VISIBLE = 45.0
"""Pixels this far from the background belong to something."""
FEWEST = 12
"""Pixels of the smallest thing that is noticed."""
LETTER_FIT = 0.6
"""Least fit of every letter of a word; 1 is perfect."""
SHORTEST = 3
"""Letters of the shortest word that is read."""


def recognise(picture: np.ndarray, level: str) -> world.Scene:
    """Return what a picture, uint8 [h, w, 3], shows; no objects where nothing can be read."""
    return recognise_all(picture[None], level)[0]


def recognise_all(pictures: np.ndarray, level: str) -> list[world.Scene]:
    """Return what each of the pictures, uint8 [b, h, w, 3], shows."""
    world.check(level)
    pictures = np.asarray(pictures)
    return [s for i in range(0, len(pictures), 64) for s in _chunk(pictures[i : i + 64], level)]


def _chunk(pictures: np.ndarray, level: str) -> list[world.Scene]:
    pixels = _to_lattice(pictures)
    names, bases = _backgrounds(pixels, level)
    signal = ndimage.gaussian_filter(pixels - bases[:, None, None], (0, SMOOTH, SMOOTH, 0), truncate=3)
    words, things = [("", "", 0.0)] * len(pixels), []
    for i, name in enumerate(names):
        if name and level in world.GRID:
            things += [(i, *candidate) for candidate in _quarters(signal[i])]
        elif name:
            words[i] = _word(signal[i], name, bases[i])
            things += [(i, *candidate) for candidate in _regions(signal[i], words[i])]
    read = _classify(things, level, names, bases)
    scenes = []
    for i, name in enumerate(names):
        mine = [n for n, thing in enumerate(things) if thing[0] == i]
        objects = tuple(read[n] for n in mine if read[n])
        unread = sum(read[n] is None and not _is_ink(things[n][2], level, name, bases[i]) for n in mine)
        if unread > len(objects):  # mostly unreadable: a fragment that looks like an object is none
            objects, unread = (), unread + len(objects)
        scenes.append(world.Scene(level, name, objects, *words[i], unread=unread))
    return scenes


def _to_lattice(pictures: np.ndarray) -> np.ndarray:
    """Return the pictures at one pixel per lattice step, float32 [b, 64, 64, 3]."""
    if pictures.shape[1:3] != (SIDE, SIDE):
        method = Image.Resampling.BOX if pictures.shape[1] > SIDE else Image.Resampling.BICUBIC
        pictures = np.stack([np.asarray(Image.fromarray(p).resize((SIDE, SIDE), method)) for p in pictures])
    return pictures.astype(np.float32)


def _backgrounds(pixels: np.ndarray, level: str) -> tuple[list[str], np.ndarray]:
    """Return each picture's background, "" if fewer than a fifth of its pixels show one, and its colour [b, 3]."""
    palette = np.float32(list(world.BACKGROUNDS[level].values()))
    flat = pixels[:, ::2, ::2].reshape(len(pixels), -1, 3)  # every fourth pixel is plenty
    distance = _power(flat)[..., None] - 2 * flat @ palette.T + _power(palette)  # squared, [b, pixels, backgrounds]
    near = np.eye(len(palette), dtype=bool)[distance.argmin(-1)] & (distance < GROUND**2)
    votes = near.sum(1)
    best = votes.argmax(1)
    names = [
        tuple(world.BACKGROUNDS[level])[k] if v[k] > flat.shape[1] / 5 else "" for k, v in zip(best, votes, strict=True)
    ]
    weight = near[np.arange(len(best)), :, best].astype(np.float32)
    mean = np.einsum("bp,bpc->bc", weight, flat) / np.maximum(weight.sum(1), 1)[:, None]
    return names, mean


def _power(image: np.ndarray) -> np.ndarray:
    """Return the squared length of each pixel."""
    return np.einsum("...c,...c->...", image, image)


def _quarters(signal: np.ndarray):
    """Yield ((x, y), crop) for each quarter that shows something."""
    half = CROP // 2
    seen = _power(signal) > VISIBLE**2
    for x, y in world.QUARTERS.values():
        quarter = np.s_[y - half : y + half, x - half : x + half]
        if seen[quarter].sum() >= FEWEST:
            yield (x, y), signal[quarter]


def _regions(signal: np.ndarray, word: tuple[str, str, float]):
    """Yield ((x, y), crop) for each connected region outside of the word; 0 where the region is not."""
    half = CROP // 2
    signal = np.pad(signal, ((half, half), (half, half), (0, 0)))
    seen = _power(signal) > VISIBLE**2
    if word[0]:
        seen[half:-half, half:-half][_word_area(*word)] = False
    labels, _ = ndimage.label(seen)
    for k, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        if (labels[rows, columns] == k).sum() >= FEWEST:
            x, y = (columns.start + columns.stop) // 2, (rows.start + rows.stop) // 2
            crop = np.s_[y - half : y + half, x - half : x + half]
            near = ndimage.binary_dilation(labels[crop] == k, iterations=3)
            yield (x - half, y - half), signal[crop] * near[..., None]


def _is_ink(signal: np.ndarray, level: str, name: str, base: np.ndarray) -> bool:
    """Return whether a crop varies between background and ink only, as letters do: unread writing is no object."""
    axis = np.float32(render.ink(level, name)) - base
    along = signal @ axis / (axis @ axis)
    return bool(_power(signal - along[..., None] * axis).sum() < 0.1 * _power(signal).sum())


# ---------------------------------------------------------------------------------------------------------- templates


@functools.cache
def _templates(level: str):
    """Return what is tried.

    Returns:
      [(shape, size, texture, dx, dy)]; cover, float32 [p, k]; cover x own colour's share, float32 [p, k]; and the dot
      products [k] of cover with itself, of the two, of the share with itself.
    """
    what, covers, shares = [], [], []
    shifts = [(dx, dy) for dy in range(-REACH, REACH + 1) for dx in range(-REACH, REACH + 1)]
    for shape in world.SHAPES:
        for size, side in world.SIZES[level].items():
            for texture in world.TEXTURES[level]:
                cover = render.mask(shape, float(side))
                share = cover * render.stripes(float(side), 0.0, SIDE)[:, None] if texture == "striped" else cover
                for dx, dy in shifts:
                    what.append((shape, size, texture, dx, dy))
                    covers.append(_place(cover, dx, dy))
                    shares.append(_place(share, dx, dy))
    cover, share = np.stack(covers), np.stack(shares)
    products = tuple(np.einsum("kp,kp->k", a, b) for a, b in ((cover, cover), (cover, share), (share, share)))
    return what, cover.T.copy(), share.T.copy(), products


def _place(image: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Return a square image, softened, in the middle of a crop plus a shift, flattened."""
    canvas = np.zeros((CROP, CROP), np.float32)
    start = (CROP - len(image)) // 2
    canvas[start + dy : start + dy + len(image), start + dx : start + dx + len(image)] = image
    return ndimage.gaussian_filter(canvas, SOFT, truncate=4).ravel()


def _classify(things, level: str, names, bases) -> list[world.Object | None]:
    """Return each candidate's object, or None."""
    if not things:
        return []
    fit = _fit_two if level == "rare" else _fit_one
    bases, names = np.stack([bases[i] for i, _, _ in things]), [names[i] for i, _, _ in things]
    crops = np.stack([crop for _, _, crop in things]).reshape(len(things), -1, 3)
    templates, colours, error = fit(crops, level, names, bases)
    good = error < (1 - FIT[level]) * _power(crops).sum(1)
    found = zip(templates, colours, good, things, strict=True)
    return [_object(level, what, paint, thing[1]) if ok else None for what, paint, ok, thing in found]


def _fit_one(crops, level: str, names, base):
    """Return each crop's best template, its colour, and what it leaves unexplained.

    With crop d = picture - base, cover A and own share B, a template paints A (B/A c + (1 - B/A) ink - base), so that
    d = F + B c with F = (A - B) ink - A base and F x, B known: c = B.(d - F) / B.B is the best colour.
    """
    what, cover, share, (cc, cs, ss) = _templates(level)
    ink = np.float32([render.ink(level, name) for name in names])
    flat = crops.transpose(0, 2, 1).reshape(-1, CROP * CROP)
    on_cover, on_share = ((flat @ m).reshape(len(crops), 3, -1) for m in (cover, share))  # [n, 3, k]
    i, o = ink[:, :, None], (ink - base)[:, :, None]
    # F = A (ink - base) - B ink
    energy = _power(crops).sum(1)
    rest = energy[:, None] + (o**2 * cc - 2 * o * i * cs + i**2 * ss - 2 * (o * on_cover - i * on_share)).sum(1)
    along = on_share - o * cs + i * ss
    error = rest - (along**2 / ss).sum(1)
    best = error.argmin(1)
    rows = np.arange(len(crops))
    colours = along[rows, :, best] / ss[best][:, None]
    return [what[k] for k in best], colours, error[rows, best]


@functools.cache
def _halves():
    """Return `_templates` of objects of two colours: what is tried, upper and lower half, and dot products."""
    what, uppers, lowers = [], [], []
    shifts = [(dx, dy) for dy in range(-REACH, REACH + 1) for dx in range(-REACH, REACH + 1)]
    for shape in world.SHAPES:
        for size, side in world.SIZES["rare"].items():
            cover, own = render.mask(shape, float(side)), render.upper(float(side), 0.0)[:, None]
            for dx, dy in shifts:
                what.append((shape, size, "solid", dx, dy))
                uppers.append(_place(cover * own, dx, dy))
                lowers.append(_place(cover * (1 - own), dx, dy))
    upper, lower = np.stack(uppers), np.stack(lowers)
    products = tuple(np.einsum("kp,kp->k", a, b) for a, b in ((upper, upper), (upper, lower), (lower, lower)))
    return what, upper.T.copy(), lower.T.copy(), products


def _fit_two(crops, level: str, names, base):
    """Return each crop's best template, its two colours [n, 2, 3], and what they leave unexplained.

    With crop d = picture - base and the two halves U and L, d = U (c1 - base) + L (c2 - base): least squares.
    """
    what, upper, lower, (uu, ul, ll) = _halves()
    flat = crops.transpose(0, 2, 1).reshape(-1, CROP * CROP)
    on_upper, on_lower = ((flat @ m).reshape(len(crops), 3, -1) for m in (upper, lower))  # [n, 3, k]
    first = (ll * on_upper - ul * on_lower) / (uu * ll - ul**2)
    second = (uu * on_lower - ul * on_upper) / (uu * ll - ul**2)
    error = _power(crops).sum(1)[:, None] - (first * on_upper + second * on_lower).sum(1)
    best = error.argmin(1)
    rows = np.arange(len(crops))
    colours = np.stack([first[rows, :, best], second[rows, :, best]], 1) + base[:, None]
    return [what[k] for k in best], colours, error[rows, best]


def _colour(paint: np.ndarray) -> str:
    """Return the colour of the palette that is nearest to a fitted one; "" if none is near."""
    distance = np.linalg.norm(np.float32(list(world.COLOURS.values())) - paint, axis=1)
    return "" if distance.min() > NEAR else tuple(world.COLOURS)[distance.argmin()]


def _object(level: str, template, paint: np.ndarray, centre: tuple[int, int]) -> world.Object | None:
    """Return the object that a fitted template means; None if a colour of it is none of the palette's."""
    shape, size, texture, dx, dy = template
    colour, *lower = [_colour(one) for one in np.atleast_2d(paint)]
    if not colour or "" in lower:
        return None
    if lower and lower[0] != colour:
        texture = f"over {lower[0]}"
    x, y = (centre[0] + dx) / SIDE, (centre[1] + dy) / SIDE
    if level == "full":
        half = world.SIZES["full"][size] / SIDE / 2
        if not (half <= x <= 1 - half and half <= y <= 1 - half):
            return None
        place = world.third(x, y)
    else:
        place = next(name for name, quarter in world.QUARTERS.items() if quarter == centre)
    return world.Object(shape, colour, size, place, texture, x, y)


# -------------------------------------------------------------------------------------------------------------- words


@functools.cache
def _glyphs() -> tuple[str, np.ndarray]:
    """Return the letters and their pictures with a margin of one step, float32 [26, 16 * 12]."""
    letters = tuple(render.FONT)
    blurred = [ndimage.gaussian_filter(np.pad(render.glyph(g), 1), SOFT, truncate=4) for g in letters]
    return "".join(letters), np.stack(blurred).reshape(len(letters), -1)


def _word(signal: np.ndarray, name: str, base: np.ndarray) -> tuple[str, str, float]:
    """Return the word in a picture, its place and where it starts (a fraction); ("", "", 0) if there is none."""
    axis = np.float32(render.ink("full", name)) - base
    along = signal @ axis / (axis @ axis)
    stray = _power(signal - along[..., None] * axis) / (axis @ axis)
    found = [(*_read_strip(along, stray, render.word_top(place)), place) for place in ("top", "bottom")]
    _, word, x, place = max(found)
    return (word, place, x / SIDE) if word else ("", "", 0.0)


def _read_strip(along: np.ndarray, stray: np.ndarray, top: int) -> tuple[float, str, int]:
    """Return (summed fit, word, first column) of the best word whose letters start within a row of `top`."""
    letters, glyphs = _glyphs()
    height, width = world.LETTER_HEIGHT + 2, world.LETTER_WIDTH + 2
    rows = slice(top - 2, top + height)
    if (along[rows] > 0.5).sum() < 2 * FEWEST:
        return 0.0, "", 0
    windows = np.lib.stride_tricks.sliding_window_view(along[rows], (height, width))  # [3, 53, h, w]
    strays = np.lib.stride_tricks.sliding_window_view(stray[rows], (height, width)).sum((2, 3))
    flat = windows.reshape(*windows.shape[:2], -1)
    weight = (glyphs**2).sum(1)
    fit = (2 * flat @ glyphs.T - (flat**2).sum(-1, keepdims=True) - strays[..., None]) / weight  # 1 is perfect
    best, which = fit.max(-1), fit.argmax(-1)
    choice = (0.0, "", 0)
    for y in range(best.shape[0]):
        for x in np.flatnonzero(best[y] > LETTER_FIT):
            columns = []
            while x < best.shape[1] and best[y, x] > LETTER_FIT:
                columns.append(x)
                x += world.LETTER_STEP
            if len(columns) >= SHORTEST:
                word = "".join(letters[which[y, c]] for c in columns)
                choice = max(choice, (float(best[y, columns].sum()), word, int(columns[0]) + 1))
    return choice


def _word_area(word: str, place: str, start: float):
    """Return the slices of a word's strip."""
    y, x = render.word_top(place), round(start * SIDE)
    return slice(max(y - 2, 0), y + world.LETTER_HEIGHT + 2), slice(max(x - 2, 0), x + world.word_width(word) + 2)
