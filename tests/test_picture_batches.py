import itertools
import pickle

import numpy as np
import pytest

from cm3jax import config
from cm3jax.data import picture_batches, shards
from cm3jax.types import Record, UserError

N, B = 23, 5  # primes: nothing divides


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for split, count in (("train", N), ("validation", 7), ("words", 3)):
        with shards.Writer(folder, split, 2) as writer:
            for i in range(count):
                parts = ("a", np.full((2, 2, 3), i, np.uint8)) if split != "words" else ("a",)
                writer.write(Record(str(i), parts))
    return folder


def training(**fields):
    return config.Training(**{"batch": B, "seed": 3, **fields})


def numbers(batch):
    return batch["pictures"][:, 0, 0, 0].tolist()


def take(iterator, count):
    return [numbers(batch) for batch in itertools.islice(iterator, count)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_an_epoch_shows_every_picture_once(prepared):
    rows = flat(take(picture_batches.batches(prepared, training()), 2 * N))[: 2 * N]
    assert sorted(rows[:N]) == list(range(N)) and sorted(rows[N:]) == list(range(N))
    assert rows[:N] != rows[N:]


def test_a_run_resumes_at_any_step(prepared):
    whole = take(picture_batches.batches(prepared, training()), 12)
    assert take(picture_batches.batches(prepared, training(), 7), 5) == whole[7:]


def test_another_seed_is_another_order(prepared):
    first, second = (take(picture_batches.batches(prepared, training(seed=s)), 1) for s in (1, 2))
    assert first != second


def test_hosts_share_the_rows_of_one_batch(prepared):
    one = training(batch=6)
    whole = take(picture_batches.batches(prepared, one), 4)
    shares = [take(picture_batches.batches(prepared, one, 0, host, 3), 4) for host in range(3)]
    assert [a + b + c for a, b, c in zip(*shares, strict=True)] == whole


def test_a_batch_that_hosts_cannot_share_is_refused(prepared):
    with pytest.raises(UserError, match=r"image.training.batch = 5: must be a multiple of the 2 processes"):
        picture_batches.batches(prepared, training(), 0, 0, 2)


def test_worker_processes_change_nothing(prepared):
    make = picture_batches.Pictures(prepared, "train", training())
    assert numbers(pickle.loads(pickle.dumps(make))(4)) == numbers(make(4))


def test_validation_batches_are_whole_and_the_same_at_every_call(prepared):
    first, second = (take(picture_batches.eval_batches(prepared, training(batch=3)), 99) for _ in range(2))
    assert first == second and [len(rows) for rows in first] == [3, 3]
    assert len(set(flat(first))) == 6


def test_a_small_validation_split_gives_one_batch(prepared):
    assert [len(rows) for rows in take(picture_batches.eval_batches(prepared, training(batch=11)), 9)] == [11]


def test_data_without_pictures_is_refused(prepared):
    with pytest.raises(UserError, match="no picture in 100 records"):
        picture_batches.Pictures(prepared, "words", training())(0)
