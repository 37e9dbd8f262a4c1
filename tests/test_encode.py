import numpy as np
import pytest

from cm3jax.data import encode, shards, tokens
from cm3jax.tokenizers import document, text
from cm3jax.types import Record
from cm3jax.vocab import Vocab

VOCAB = Vocab(text=300, image=256, sentinels=4, multiple=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return text.train(["a red circle", "two blue squares"] * 20, 300, tmp_path_factory.mktemp("t") / "tokenizer.model")


def picture(value):
    return np.full((4, 4, 3), value, np.uint8)


def codes(pictures):
    """Four codes that name the picture: its first pixel."""
    codes.sizes.append(len(pictures))
    return np.repeat(pictures[:, 0, 0, :1].astype(np.uint16), 4, axis=1)


@pytest.fixture(autouse=True)
def no_sizes():
    codes.sizes = []


RECORDS = [
    Record("pair", ("a red circle", picture(1))),
    Record("text", ("two blue squares",)),
    Record("page", (picture(2), "a", picture(3), "b", picture(4))),
    Record("codes", ("a", np.array([7, 8, 9, 10], np.uint16))),
    Record("picture", (picture(5),)),
]


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_every_record_keeps_its_own_pictures(tokenizer, batch):
    found = list(encode.documents(RECORDS, codes, tokenizer, VOCAB, batch))
    assert [key for key, _, _ in found] == [record.key for record in RECORDS]
    for record, (_, ids, answers) in zip(RECORDS, found, strict=True):
        assert not len(answers)  # no task made them
        parts = [codes(p[None])[0] if encode.is_picture(p) else p for p in record.parts]
        assert np.array_equal(ids, document.encode(parts, tokenizer, VOCAB))


def test_pictures_go_through_the_tokenizer_in_batches(tokenizer):
    pairs = [Record(str(i), ("a", picture(i))) for i in range(7)]
    list(encode.documents(pairs, codes, tokenizer, VOCAB, 3))
    assert codes.sizes == [3, 3, 1]


def write(folder, split, count, shards_=3):
    with shards.Writer(folder, split, shards_) as writer:
        for i in range(count):
            writer.write(Record(f"{split}{i}", ("a red circle", picture(i))))


def test_every_split_gets_token_shards_in_the_order_of_its_records(tokenizer, tmp_path):
    write(tmp_path / "prepared", "train", 7)
    write(tmp_path / "prepared", "composition", 2, 1)
    encode.encode(tmp_path / "prepared", tmp_path / "tokens", codes, tokenizer, VOCAB, 4)
    assert tokens.splits(tmp_path / "tokens") == ["composition", "train"]
    found = tokens.Tokens(tmp_path / "tokens", "train")
    reader = shards.Reader(tmp_path / "prepared", "train")
    assert found.keys() == [record.key for record in reader]
    assert all(found[i][-1] == VOCAB.image_start + int(reader[i].parts[1][0, 0, 0]) for i in range(7))


def test_encoding_continues_by_shard(tokenizer, tmp_path):
    write(tmp_path / "prepared", "train", 9)
    arguments = tmp_path / "prepared", tmp_path / "tokens", codes, tokenizer, VOCAB, 100
    encode.encode(*arguments)
    before = {p.name: p.read_bytes() for p in (tmp_path / "tokens").iterdir()}
    for path in (tmp_path / "tokens").glob("train-00001*"):
        path.unlink()
    codes.sizes.clear()
    encode.encode(*arguments)
    assert codes.sizes == [3]  # only the missing shard's pictures
    assert {p.name: p.read_bytes() for p in (tmp_path / "tokens").iterdir()} == before
