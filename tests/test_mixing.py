"""Token sets mixed by weight: the shares, the epochs, and that nothing depends on hosts or on where a run resumes."""

import collections
import dataclasses
import itertools
import json
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cm3jax import config, run, stages
from cm3jax.config import DecoderStage, Mixture, Packing, Training
from cm3jax.data import mixing, packing, pipeline, tokens
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

VOCAB = Vocab(text=300, image=101, sentinels=23, multiple=7)
T = VOCAB.text_start
SIZES = {"a": (61, 7), "b": (29, 13), "c": (97, 5)}  # documents, mean tokens
WHOLE, CHOP, ONE = Packing("whole", 83), Packing("chop", 83), Packing("whole", 83, documents=1)
PACKINGS = pytest.mark.parametrize("kind", [WHOLE, CHOP, ONE], ids=["whole", "chop", "one"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sets; a document begins with the number of its set, and its own."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for k, (name, (count, mean)) in enumerate(SIZES.items()):
        pairs = [
            (f"{i}", np.r_[T + k, T + i, np.full(rng.integers(mean - 3, mean + 4), T + 200)]) for i in range(count)
        ]
        tokens.write(folder / name, "train", pairs[: count // 2], 0, 2)
        tokens.write(folder / name, "train", pairs[count // 2 :], 1, 2)
    return folder


def stage(folder, weights=(5.0, 3.0, 2.0), kind=WHOLE, batch=6, seed=0):
    sets = tuple(str(folder / name) for name in ("b", "c"))
    return DecoderStage(packing=kind, training=Training(batch=batch, seed=seed), mixture=Mixture(sets, weights))


def mixed(folder, *arguments, **values):
    return mixing.open(folder / "a", "train", stage(folder, *arguments, **values))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_documents_of_all_sets_are_read_as_from_their_own(folder):
    found = mixed(folder)
    own = [document for name in SIZES for document in tokens.Tokens(folder / name, "train")]
    assert len(found) == sum(count for count, _ in SIZES.values()) == len(own)
    assert all(np.array_equal(a, b) for a, b in zip(found, own, strict=True))
    assert found.read(61, 1, 4).tolist() == own[61][1:4].tolist() and len(found.keys()) == len(found)
    with pytest.raises(IndexError, match="the 3 sets have 187"):
        found.read(187, 0, 1)


@pytest.mark.parametrize("weights", [(5.0, 3.0, 2.0), (1.0, 1.0, 1.0), (0.02, 0.9, 0.08)])
def test_the_shares_of_the_tokens_are_the_weights(folder, weights):
    found, counts = mixed(folder, weights), collections.Counter()
    for epoch in range(20):
        for i in found.mix.order(0, epoch).tolist():
            counts[int(found[i][0]) - T] += len(found[i])
    shares = np.array([counts[k] for k in range(3)]) / sum(counts.values())
    # A set's share is rounded to whole documents an epoch, and its documents differ in length.
    assert shares == pytest.approx(np.array(weights) / sum(weights), abs=0.01)
    assert sum(counts.values()) / 20 == pytest.approx(found.lengths.sum(), rel=0.01)


def test_the_shares_reach_the_rows_that_are_trained_on(folder):
    make, counts = pipeline.Batches(mixed(folder), stage(folder), VOCAB), collections.Counter()
    for g in range(400):
        ids, *_ = make.unmasked(g)
        starts = np.flatnonzero(ids[:-1] < T)[:-1] + 1
        opens = [int(ids[i]) - T for i in starts if T <= ids[i] < T + 3 and ids[i + 1] >= T]
        lengths = dict(enumerate(mean + 2 for _, mean in SIZES.values()))
        counts.update({k: opens.count(k) * lengths[k] for k in lengths})
    shares = np.array([counts[k] for k in range(3)]) / sum(counts.values())
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_no_document_comes_again_before_all_others_of_its_set(folder):
    found = mixed(folder, (0.02, 0.9, 0.08))
    uses = collections.Counter()
    for epoch in range(13):
        uses.update(found.mix.order(0, epoch).tolist())
        for first, (count, _) in zip((0, 61, 90), SIZES.values(), strict=True):
            own = [uses[i] for i in range(first, first + count)]
            assert max(own) - min(own) <= 1
    drawn = sum(found.mix.drawn)
    assert sum(uses.values()) == 13 * drawn


def test_epochs_and_seeds_shuffle_anew_and_the_order_is_a_function_of_them(folder):
    orders = {(seed, epoch): tuple(mixed(folder).mix.order(seed, epoch)) for seed in range(2) for epoch in range(3)}
    assert len(set(orders.values())) == 6
    assert all(tuple(mixed(folder).mix.order(*key)) == order for key, order in reversed(orders.items()))


@PACKINGS
@pytest.mark.parametrize("hosts", [2, 3])
def test_the_hosts_shares_of_a_mixture_make_up_the_batch_of_one_host(folder, kind, hosts):
    data, settings = mixed(folder), stage(folder, kind=kind)
    for step in (0, 5, 41):
        alone = pipeline.Batches(data, settings, VOCAB)(step)
        shares = [pipeline.Batches(data, settings, VOCAB, host, hosts)(step) for host in range(hosts)]
        assert same(alone, {k: np.concatenate([share[k] for share in shares]) for k in alone})


@PACKINGS
def test_a_mixture_resumes_at_any_step(folder, kind):
    def first(count, start=0):
        found = pipeline.batches(folder / "a", "train", stage(folder, kind=kind), VOCAB, start)
        batches = list(itertools.islice(found, count))
        found.close()
        return batches

    whole = first(30)  # several epochs
    for start in (1, 13, 29):
        assert all(map(same, whole[start:], first(30 - start, start)))


def test_a_copy_for_a_worker_is_small_and_gives_the_same_batch(folder):
    make = pipeline.Batches(mixed(folder), stage(folder), VOCAB)
    copied = pickle.dumps(make)
    assert len(copied) < 5000 and same(pickle.loads(copied)(7), make(7))


def test_the_fingerprint_names_the_weights(folder):
    found = {
        pipeline.fingerprint(mixed(folder, w), stage(folder, w), VOCAB) for w in ((5.0, 3.0, 2.0), (5.0, 2.0, 3.0))
    }
    assert len(found) == 2
    twice = pipeline.fingerprint(mixed(folder, (10.0, 6.0, 4.0)), stage(folder, (10.0, 6.0, 4.0)), VOCAB)
    assert twice in found  # the same mixture


def test_an_epoch_of_one_set_is_what_it_was_without_a_mixture(folder):
    own = tokens.Tokens(folder / "a", "train")
    assert mixing.open(folder / "a", "train", DecoderStage()).mix is None
    plan = packing.plan(own.lengths, 0, 3, WHOLE)
    assert sorted(plan.documents) == list(range(61))


def test_weights_must_fit_the_sets():
    with pytest.raises(ValueError, match=r"mixture.weights = \(1.0,\): must be 2 numbers"):
        Mixture(("x",), (1.0,))
    with pytest.raises(ValueError, match="must be above 0"):
        Mixture(("x",), (1.0, 0.0))
    with pytest.raises(ValueError, match="must be 0 numbers"):
        Mixture((), (1.0,))


def test_a_set_without_tokens_is_refused(folder, tmp_path):
    tokens.write(tmp_path / "empty", "train", [])
    with pytest.raises(UserError, match="holds no token"):
        mixing.open(folder / "a", "train", DecoderStage(mixture=Mixture((str(tmp_path / "empty"),), (1.0, 1.0))))


TOTALS = st.lists(st.integers(1, 10**9), min_size=2, max_size=9)


@hypothesis.given(TOTALS, st.data(), st.floats(0, 1), st.one_of(st.just(0.0), st.floats(1, 20)))
def test_no_set_is_passed_over_more_or_less_often_than_the_limits_and_the_others_keep_their_shares(
    totals, data, least, most
):
    weights = tuple(data.draw(st.floats(0.01, 100)) for _ in totals)
    mixture = Mixture(("x",) * (len(totals) - 1), weights, least, most)
    found = mixing.passes(totals, mixture)
    assert (found >= least).all() and (found <= (most or np.inf)).all()
    assert found @ np.array(totals, float) == pytest.approx(sum(totals))  # an epoch has all tokens' number
    wanted = np.array(weights) / np.array(totals)
    factor, free = found / wanted, (found > least) & (found < (most or np.inf))
    if free.any():  # one factor for all that no limit holds
        assert factor[free] == pytest.approx(np.full(free.sum(), factor[free][0]))
        assert (factor[found == least] >= factor[free][0] * (1 - 1e-9)).all()
        assert (factor[found == most] <= factor[free][0] * (1 + 1e-9)).all()


def test_the_limits_of_the_paper_by_hand():
    """Equal shares of 100, 1000 and 9000 tokens would be 33.7, 3.37 and 0.374 passes."""
    small = mixing.passes([100, 1000, 9000], Mixture(("b", "c"), (), 0.3, 3.0))
    assert small == pytest.approx([3.0, 3.0, (10_100 - 3300) / 9000])
    large = mixing.passes([4000, 4000, 90_000], Mixture(("b", "c"), (), 0.9, 3.0))  # equal ones would be 8.2, 8.2, 0.36
    assert large == pytest.approx([(98_000 - 81_000) / 8000] * 2 + [0.9])
    weights = (1.0, 2.0, 1.0)
    assert mixing.passes([100, 1000, 9000], Mixture(("b", "c"), weights)) == pytest.approx([25.25, 5.05, 2525 / 9000])


def test_an_epoch_within_limits_draws_so_many_documents(folder):
    mixture = Mixture(stage(folder).mixture.sets, (1.0, 1.0, 90.0), 0.5, 1.25)
    limited = dataclasses.replace(stage(folder), mixture=mixture)
    found = mixing.open(folder / "a", "train", limited)
    uses = np.bincount(found.mix.order(0, 0), minlength=187)
    assert uses[90:].sum() == round(1.25 * 97) and set(uses[90:]) == {1, 2}
    # a: 61 documents of about 9 tokens, b: 29 of 15, c: 97 of 7; a and b share what c leaves
    left = (found.total - 1.25 * found.sets[2].total) / (found.sets[0].total + found.sets[1].total)
    assert uses[:90].sum() == pytest.approx(90 * left, rel=0.05)


def test_without_limits_a_mixture_is_what_it_was():
    """Of older runs: the fields are in no JSON, and the passes are those of the weights, bit for bit."""
    plain = Mixture(("b", "c"), (5.0, 3.0, 2.0))
    assert config.to_json(plain) == {"sets": ["b", "c"], "weights": [5.0, 3.0, 2.0]}
    totals = [577, 423, 661]
    assert (mixing.passes(totals, plain) == sum(totals) * (np.array((5.0, 3.0, 2.0)) / 10.0) / np.array(totals)).all()


@pytest.mark.parametrize(("values", "message"), [((1.5, 0.0), "least = 1.5"), ((0.0, 0.5), "most = 0.5")])
def test_limits_that_no_epoch_can_keep_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Mixture((), (), *values)


def test_the_log_tells_of_every_set(folder):
    lines = mixed(folder).describe(4.0)
    assert len(lines) == 4 and lines[0].split()[:5] == ["set", "documents", "tokens", "asked", "share"]
    name, documents, count, asked, share, passes, in_all = lines[2].split()
    found = mixed(folder)
    assert (name, documents, asked) == (str(folder / "b"), "29", "30.0%") and int(count) == found.sets[1].total
    assert float(share.rstrip("%")) == pytest.approx(30, abs=1)
    assert float(passes) == pytest.approx(found.mix.drawn[1] / 29, rel=0.01)
    assert float(in_all) == pytest.approx(4 * found.mix.drawn[1] / 29, rel=0.01)
    limited = dataclasses.replace(stage(folder), mixture=Mixture(stage(folder).mixture.sets, (), 0.3, 1.1))
    lines = mixing.open(folder / "a", "train", limited).describe(1.0)
    assert [line.endswith("the most") for line in lines] == [False, False, True, False]


@pytest.mark.parametrize("field", ["text", "image"])
def test_a_set_of_another_tokenizer_is_refused(tmp_path, field):
    inputs = {"prepare": "p", "text": "t", "image": "i"}
    stages.write(tmp_path / "a", stages.Record(complete=True, inputs=inputs))
    stages.write(tmp_path / "b", stages.Record(complete=True, inputs={**inputs, "prepare": "q"}))
    run.check_set(tmp_path / "b", tmp_path / "a")
    stages.write(tmp_path / "b", stages.Record(complete=True, inputs={**inputs, field: "other"}))
    with pytest.raises(UserError, match=f"made with another {field} tokenizer .* --redo --tokenizers"):
        run.check_set(tmp_path / "b", tmp_path / "a")
    with pytest.raises(UserError, match="no finished tokens/ folder"):
        run.check_set(tmp_path / "c", tmp_path / "a")


def test_a_mixture_is_set_by_flags():
    from cm3jax import cli, flags

    argv = ["configs/cm3leon/tiny.py", "--inputs", "x", "--decoder.mixture.sets", "r/b", "r/c"]
    argv += ["--decoder.mixture.weights", "5", "3", "2"]
    found = flags.parse(cli.Train, argv, "cm3jax train", cli.defaults("train", argv)).recipe.decoder.mixture
    assert found == Mixture(("r/b", "r/c"), (5.0, 3.0, 2.0))
    assert (
        config.from_json(DecoderStage, config.to_json(dataclasses.replace(DecoderStage(), mixture=found))).mixture
        == found
    )


@pytest.mark.parametrize("field", ["text", "image"])
def test_a_start_of_another_tokenizer_is_refused(tmp_path, field):
    stages.write(tmp_path / "set" / "tokens", stages.Record(complete=True, inputs={"text": "t", "image": "i"}))
    for name in ("text", "image"):
        stages.write(tmp_path / "start" / name, stages.Record(complete=True, result=name[0]))
    run.check_start(tmp_path / "start", tmp_path / "set" / "tokens")
    stages.write(tmp_path / "start" / field, stages.Record(complete=True, result="other"))
    with pytest.raises(UserError, match=f"has another {field} tokenizer than .* --tokenizers .*start"):
        run.check_start(tmp_path / "start", tmp_path / "set" / "tokens")
    (tmp_path / "start" / field / "stage.json").unlink()
    with pytest.raises(UserError, match=f"has no {field} tokenizer"):
        run.check_start(tmp_path / "start", tmp_path / "set" / "tokens")


def test_a_set_borrows_the_tokenizers_of_a_run(tmp_path):
    known = config.Recipe(name="pretrained", vocab=VOCAB)
    for name in ("text", "image"):
        (tmp_path / "start" / name).mkdir(parents=True)
        (tmp_path / "start" / name / "weights").write_text(name)
        run.taken(tmp_path / "start", name, {}, "elsewhere")
    (tmp_path / "start" / "recipe.json").write_text(json.dumps(config.to_json(known)))
    for _ in range(2):  # the second time they are there
        found = run.borrow(config.Recipe(name="set"), tmp_path / "set", tmp_path / "start")
        assert (found.name, found.vocab) == ("set", VOCAB)
    assert all((tmp_path / "set" / name / "weights").read_text() == name for name in ("text", "image"))
    (tmp_path / "set" / "image" / "weights").write_text("other")
    run.taken(tmp_path / "set", "image", {}, "elsewhere")
    with pytest.raises(UserError, match="set/image: not that of"):
        run.borrow(known, tmp_path / "set", tmp_path / "start")
    (tmp_path / "start" / "image" / "stage.json").unlink()
    with pytest.raises(UserError, match="image: not there, and needed here"):
        run.borrow(known, tmp_path / "other", tmp_path / "start")
