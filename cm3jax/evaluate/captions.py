"""How close captions are to what people wrote: CIDEr-D, BLEU and ROUGE-L, as published figures for COCO compute them.

The scores count words, so their figures hold only with the words of `ptb`: `evaluate` makes those first; `cider`,
`bleu` and `rouge` take what is already cut into words. All follow the papers with the choices of COCO's caption
evaluation; tests/test_captions.py holds them to the PyPI package pycocoevalcap within 1e-9.

`references` are {id: [captions]}, `candidates` {id: caption}, with the same ids.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

import cm3jax.evaluate.ptb as ptb
from cm3jax.types import UserError

ORDERS = 4
"""n-grams of 1 to 4 words."""
SIGMA = 6.0
"""CIDEr-D: words of difference in length that divide a score by e^(1/2) (arXiv 1411.5726 section 5)."""
BETA = 1.2
"""ROUGE-L: recall counts 1.44 times as much as precision."""
SMALL, TINY = 1e-9, 1e-15
"""BLEU: keep the quotients defined where nothing was said, as COCO's figures have it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """A corpus's figure, and that of each id in the order of `candidates`."""

    corpus: float
    each: np.ndarray


def evaluate(references: Mapping, candidates: Mapping) -> dict[str, float]:
    """Return {"CIDEr": ..., "BLEU-1": ..., ..., "ROUGE-L": ...} of raw captions; CIDEr as a fraction, 0.616 for "61.6".

    Raises:
      UserError: as `check`.
    """
    check(references, candidates)
    ids = list(candidates)
    said = dict(zip(ids, ptb.all_words([candidates[name] for name in ids]), strict=True))
    flat = iter(ptb.all_words([caption for name in ids for caption in references[name]]))
    wrote = {name: [next(flat) for _ in references[name]] for name in ids}
    scores = {"CIDEr": cider(wrote, said).corpus}
    scores |= {f"BLEU-{n}": score.corpus for n, score in enumerate(bleu(wrote, said), 1)}
    return scores | {"ROUGE-L": rouge(wrote, said).corpus}


def check(references: Mapping, candidates: Mapping) -> None:
    """Look at the input.

    Raises:
      UserError: if there is nothing to score, an id is on one side only, or one has no reference.
    """
    if not candidates:
        raise UserError("captions: no candidates; nothing can be scored")
    for names, side, other in ((references, "references", candidates), (candidates, "candidates", references)):
        if missing := [name for name in other if name not in names]:
            raise UserError(
                f"captions: id {missing[0]!r} has no {side} ({len(missing)} of {len(other)} ids); score the same ids"
            )
    if empty := [name for name in candidates if not len(references[name])]:
        raise UserError(f"captions: id {empty[0]!r} has an empty list of references; give at least one")


# ---------------------------------------------------------------------------------------------------------------- CIDEr


def cider(references: Mapping[object, Sequence[str]], candidates: Mapping[object, str]) -> Score:
    """Return CIDEr-D (arXiv 1411.5726 sections 3 and 5), times 10 as published; words are separated by white space.

    An n-gram weighs as much as the logarithm of how many times fewer ids than there are have it in a reference. So the
    figure of one caption depends on the whole set of references, and that of one id alone is 0.
    """
    check(references, candidates)
    ids = list(candidates)
    counted = {name: [_ngrams(caption.split()) for caption in references[name]] for name in ids}
    seen = collections.Counter(gram for name in ids for gram in set().union(*counted[name]))
    weigh = _Weights(seen, math.log(len(ids)))
    each = []
    for name in ids:
        said = weigh(_ngrams(candidates[name].split()))
        each.append(10 * float(np.mean([_similarity(said, weigh(wrote)) for wrote in counted[name]])))
    return Score(float(np.mean(each)), np.array(each))


def _ngrams(words: list[str]) -> collections.Counter:
    """Return how often each n-gram of 1 to ORDERS words occurs."""
    spans = ((i, i + n) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))
    return collections.Counter(tuple(words[i:j]) for i, j in spans)


@dataclasses.dataclass(frozen=True, eq=False)
class _Vector:
    """The weights of a caption's n-grams by order, their norms, and the length that the penalty compares."""

    parts: tuple[dict, ...]
    norms: np.ndarray
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Weights:
    """Turns counts into weights: term frequency times inverse document frequency."""

    seen: collections.Counter
    log_ids: float

    def __call__(self, counts: collections.Counter) -> _Vector:
        parts = tuple({} for _ in range(ORDERS))
        for gram, count in counts.items():
            parts[len(gram) - 1][gram] = count * (self.log_ids - math.log(max(1, self.seen[gram])))
        norms = np.array([math.sqrt(sum(weight**2 for weight in part.values())) for part in parts])
        # COCO's figures measure length in pairs of words: one less than words, and 0 for a single one.
        return _Vector(parts, norms, sum(count for gram, count in counts.items() if len(gram) == 2))


def _similarity(said: _Vector, wrote: _Vector) -> float:
    """Return the mean over the orders of the cosines, where nothing said counts beyond what was written."""
    cosines = []
    for n in range(ORDERS):
        here, there = said.parts[n], wrote.parts[n]
        product = sum(min(weight, there[gram]) * there[gram] for gram, weight in here.items() if gram in there)
        norm = said.norms[n] * wrote.norms[n]
        cosines.append(product / norm if norm else product)
    return float(np.mean(cosines)) * math.exp(-((said.length - wrote.length) ** 2) / (2 * SIGMA**2))


# ----------------------------------------------------------------------------------------------------------------- BLEU


def bleu(references: Mapping[object, Sequence[str]], candidates: Mapping[object, str]) -> list[Score]:
    """Return BLEU-1 to BLEU-4 (Papineni et al. 2002): of the corpus, not the mean of its sentences.

    The brevity penalty compares with the reference nearest in length, the shorter one if two are as near; where there
    is a single id, COCO's figures compare with the mean length of its references.
    """
    check(references, candidates)
    rows = []
    for name, caption in candidates.items():
        words = caption.split()
        wrote = [reference.split() for reference in references[name]]
        most = collections.Counter()
        for reference in wrote:
            most |= _ngrams(reference)
        lengths = [len(reference) for reference in wrote]
        nearest = min(lengths, key=lambda length: (abs(length - len(words)), length))
        target = sum(lengths) / len(lengths) if len(candidates) == 1 else nearest
        right = [0] * ORDERS
        for gram, count in _ngrams(words).items():
            right[len(gram) - 1] += min(count, most[gram])
        rows.append([len(words), target, *right, *(max(0, len(words) - n) for n in range(ORDERS))])
    table = np.array(rows, np.float64)
    each, corpus = _bleu(table), _bleu(table.sum(0, keepdims=True))
    return [Score(float(corpus[0, n]), each[:, n]) for n in range(ORDERS)]


def _bleu(table: np.ndarray) -> np.ndarray:
    """Return BLEU of rows (length, target length, right n-grams by order, n-grams by order), float64 [rows, ORDERS]."""
    said, target, right, tried = np.split(table, [1, 2, 2 + ORDERS], axis=1)
    precision = np.cumprod((right + TINY) / (tried + SMALL), axis=1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (said + TINY) / (target + SMALL)
    with np.errstate(over="ignore"):  # nothing said: exp(1 - 1e15) is 0
        return precision * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


# ---------------------------------------------------------------------------------------------------------------- ROUGE


def rouge(references: Mapping[object, Sequence[str]], candidates: Mapping[object, str]) -> Score:
    """Return ROUGE-L (Lin 2004): the F measure of the best precision and the best recall over an id's references."""
    check(references, candidates)
    each = []
    for name, caption in candidates.items():
        words = caption.split(" ")  # of an empty caption one empty word, as COCO's figures have it
        wrote = [reference.split(" ") for reference in references[name]]
        common = [_common(words, reference) for reference in wrote]
        precision = max(common) / len(words)
        recall = max(length / len(reference) for length, reference in zip(common, wrote, strict=True))
        each.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0)
    return Score(float(np.mean(each)), np.array(each))


def _common(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]
