"""CIDEr-D, BLEU and ROUGE-L agree with the published evaluation, and with sums done by hand."""

import math

import numpy as np
import pytest
from made_captions import captions
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

import cm3jax.evaluate.captions as scores
from cm3jax.evaluate import ptb
from cm3jax.types import UserError


def corpus(ids, seed=0):
    """Return references, of 1 to 5 captions an id, and candidates that share words with them."""
    made = iter(captions(7 * ids, seed))
    references = {i: [ptb.words(next(made)) for _ in range(1 + i % 5)] for i in range(ids)}
    candidates = {}
    for i, wrote in references.items():
        words, others = wrote[0].split(), ptb.words(next(made)).split()
        candidates[i] = " ".join([*words[: len(words) // (1 + i % 3)], *others[: i % 4], *words[-2:]])
    return references, candidates


def published(scorer, references, candidates):
    return scorer.compute_score(references, {i: [caption] for i, caption in candidates.items()})


CORPORA = {
    "made": corpus(97),
    "other": corpus(31, seed=3),
    "one id": ({7: ["a dog runs", "the dog is running fast"]}, {7: "a dog is fast"}),
    "empty candidate": ({1: ["a dog"], 2: ["a cat sits"]}, {1: "", 2: "a cat"}),
    "empty reference": ({1: ["", "a dog"], 2: ["a cat sits"]}, {1: "a dog", 2: "a cat"}),
    "nothing in common": ({1: ["a dog"], 2: ["the cat"]}, {1: "x y z w v", 2: "u"}),
    "repeated words": ({1: ["a a a dog"], 2: ["the cat the cat"]}, {1: "a a a a a a", 2: "the the the cat"}),
    "no-break spaces": ({1: ["call 212\u00a0555\u00a01234 now"], 2: ["a"]}, {1: "212\u00a0555\u00a01234", 2: "a"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CORPORA)
def test_cider_is_that_of_the_published_evaluation(name):
    references, candidates = CORPORA[name]
    found, (corpus_score, each) = scores.cider(references, candidates), published(Cider(), references, candidates)
    np.testing.assert_allclose(found.each, each, rtol=0, atol=1e-9)
    assert found.corpus == pytest.approx(corpus_score, abs=1e-9)


@pytest.mark.parametrize("name", CORPORA)
def test_bleu_is_that_of_the_published_evaluation(name, capsys):
    references, candidates = CORPORA[name]
    found, (corpus_scores, each) = scores.bleu(references, candidates), published(Bleu(4), references, candidates)
    np.testing.assert_allclose([score.corpus for score in found], corpus_scores, rtol=0, atol=1e-9)
    np.testing.assert_allclose([score.each for score in found], each, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CORPORA)
def test_rouge_is_that_of_the_published_evaluation(name):
    references, candidates = CORPORA[name]
    found, (corpus_score, each) = scores.rouge(references, candidates), published(Rouge(), references, candidates)
    np.testing.assert_allclose(found.each, each, rtol=0, atol=1e-9)
    assert found.corpus == pytest.approx(corpus_score, abs=1e-9)


def test_a_caption_equal_to_its_only_reference_has_cider_10_bleu_1_and_rouge_1():
    texts = {1: "a dog runs over the field", 2: "two cats sleep on one chair"}
    references = {i: [text] for i, text in texts.items()}
    assert scores.cider(references, texts).corpus == pytest.approx(10)
    assert [score.corpus for score in scores.bleu(references, texts)] == pytest.approx([1] * 4, abs=1e-6)
    assert scores.rouge(references, texts).corpus == pytest.approx(1)


def test_rouge_by_hand():
    """Longest common subsequence of 3 words, of 4 said and 5 written: P = 3/4, R = 3/5."""
    found = scores.rouge({1: ["the dog runs very fast"]}, {1: "the dog is fast"}).corpus
    assert found == pytest.approx(2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75))


def test_bleu_by_hand():
    """3 of 4 words and 1 of 3 pairs are right; the reference is one word longer."""
    one, two, *_ = scores.bleu({1: ["the dog runs very fast"]}, {1: "the dog is fast"})
    assert one.corpus == pytest.approx(0.75 * math.exp(1 - 5 / 4))
    assert two.corpus == pytest.approx(math.sqrt(0.75 / 3) * math.exp(1 - 5 / 4))


def test_raw_captions_are_cut_into_words_first():
    raw = {1: ["A dog's bowl."], 2: ["Two cats (asleep)!"]}
    found = scores.evaluate(raw, {1: "a dog's bowl", 2: "TWO CATS (asleep)"})
    assert list(found) == ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    assert found["ROUGE-L"] == pytest.approx(1) and found["BLEU-4"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("references", "candidates", "message"),
    [
        ({}, {}, "captions: no candidates; nothing can be scored"),
        ({1: ["a"]}, {1: "a", 2: "b"}, r"captions: id 2 has no references \(1 of 2 ids\); score the same ids"),
        ({1: ["a"], 3: ["b"]}, {1: "a"}, r"captions: id 3 has no candidates \(1 of 2 ids\)"),
        ({1: []}, {1: "a"}, "captions: id 1 has an empty list of references"),
    ],
)
def test_ids_that_do_not_match_are_refused(references, candidates, message):
    for score in (scores.evaluate, scores.cider, scores.bleu, scores.rouge):
        with pytest.raises(UserError, match=message):
            score(references, candidates)
