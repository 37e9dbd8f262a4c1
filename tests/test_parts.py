"""prepare and encode over several hosts: in any order, cut off, again, and to the same bytes as one host's."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

from cm3jax import config, parts, run, stages
from cm3jax.data import encode, index, prepare, prepare_shard, shards, sources, tokens
from cm3jax.tokenizers import image, text
from cm3jax.types import Record, UserError
from cm3jax.vocab import Vocab

RECIPE = config.Recipe(
    name="parts",
    vocab=Vocab(text=300, image=32, sentinels=4, multiple=1),
    prepare=config.Prepare(source="scenes:easy", resolution=16, count=40, shards=5, workers=1),
    image=config.Image(model=config.VQGAN(patch=8, width=8, multipliers=(1,), attention=(), middle=False, z=4)),
    tokens=config.Tokens(batch=3),
)


@pytest.fixture(autouse=True)
def few_held_out_scenes(monkeypatch):
    monkeypatch.setattr(sources.sources_scenes, "HELD_OUT", 7)


def contents(folder) -> dict[str, bytes]:
    files = sorted(path for path in pathlib.Path(folder).iterdir() if path.name != stages.FILE)
    return {path.name: path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------------- prepare


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one host makes."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.sources_scenes, "HELD_OUT", 7)
        run.run(RECIPE, folder, only="prepare")
    return folder


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (6, 5, 4, 3, 2, 1, 0)])
def test_hosts_in_any_order_prepare_what_one_host_prepares(alone, tmp_path, order):
    for host in order:
        assert not (tmp_path / "prepared" / prepare.SUMMARY).exists()
        parts.part(RECIPE, tmp_path, "prepare", host, len(order))
    assert contents(tmp_path / "prepared") == contents(alone / "prepared")
    assert stages.read(tmp_path / "prepared").result == stages.read(alone / "prepared").result


def test_a_host_that_comes_again_does_nothing_twice(alone, tmp_path, monkeypatch):
    parts.part(RECIPE, tmp_path, "prepare", 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_shard, "run", lambda *_: pytest.fail("worked again"))
        parts.part(RECIPE, tmp_path, "prepare", 0, 2)
    parts.part(RECIPE, tmp_path, "prepare", 1, 2)
    monkeypatch.setattr(prepare_shard, "run", lambda *_: pytest.fail("worked again"))
    for host in (0, 1):
        parts.part(RECIPE, tmp_path, "prepare", host, 2)
    assert contents(tmp_path / "prepared") == contents(alone / "prepared")


def test_a_host_that_is_cut_off_goes_on_with_its_pieces(alone, tmp_path, monkeypatch):
    parts.part(RECIPE, tmp_path, "prepare", 1, 2)
    made, work = [], prepare_shard.run

    def cut(source, job, number, *arguments):
        made.append(number)
        if len(made) == 2:
            raise KeyboardInterrupt
        work(source, job, number, *arguments)

    monkeypatch.setattr(prepare_shard, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        parts.part(RECIPE, tmp_path, "prepare", 0, 2)
    parts.part(RECIPE, tmp_path, "prepare", 0, 2)
    assert made == [0, 2, 2, 4]
    assert contents(tmp_path / "prepared") == contents(alone / "prepared")


def test_a_host_that_comes_late_finds_the_work_finished(alone, tmp_path, capsys):
    """Another host may finish between this one's look for pieces and its look for the summary."""
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    (tmp_path / "prepared" / stages.FILE).unlink()  # as long as the other host writes its record
    parts.part(RECIPE, tmp_path, "prepare", 1, 2)
    assert contents(tmp_path / "prepared") == contents(alone / "prepared")


def test_while_another_host_finishes_the_stage_is_left_to_it(tmp_path, capsys):
    parts.part(RECIPE, tmp_path, "prepare", 0, 2)
    with stages.locked(tmp_path):
        parts.part(RECIPE, tmp_path, "prepare", 1, 2)
    assert "another host is finishing it" in capsys.readouterr().out


@pytest.mark.parametrize("host, hosts", [(2, 2), (-1, 3), (0, 0)])
def test_a_wrong_number_of_a_host_is_refused(tmp_path, host, hosts):
    with pytest.raises(UserError, match=f"--host = {host}: must be 0 to --hosts - 1 = {hosts - 1}"):
        parts.part(RECIPE, tmp_path, "prepare", host, hosts)


def test_other_settings_are_refused_by_every_host(alone, tmp_path):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    other = dataclasses.replace(RECIPE, prepare=dataclasses.replace(RECIPE.prepare, resolution=8))
    with pytest.raises(UserError, match=r"prepare\.resolution was 16 and is now 8"):
        parts.part(other, tmp_path, "prepare", 1, 2)


# -------------------------------------------------------------------------------------------------------------- encode


@pytest.fixture(scope="module")
def tokenized(alone):
    """The run of one host, with tokenizers and tokens."""
    import jax
    from flax.core import meta

    from cm3jax.nn import vqgan

    run.run(RECIPE, alone, only="text")
    net = vqgan.VQGAN(RECIPE.image.model, 32)
    weights = meta.unbox(net.init(jax.random.key(0), jax.numpy.zeros((1, 16, 16, 3))))["params"]
    image.save(alone / "image", RECIPE.image.model, 32, 16, weights)
    files = stages.files(alone, "image")
    inputs = {"prepare": stages.read(alone / "prepared").result}
    record = stages.Record(run.STAGES["image"].settings(RECIPE), "", inputs, True, "made", files)
    stages.write(alone / "image", record)
    run.run(RECIPE, alone, only="tokens")
    return alone


def start(tokenized, folder):
    for name in ("prepared", "text", "image"):
        shutil.copytree(tokenized / name, folder / name)


@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1)])
def test_hosts_in_any_order_encode_what_one_host_encodes(tokenized, tmp_path, order, capsys):
    start(tokenized, tmp_path)
    for host in order:
        assert not (tmp_path / "tokens" / index.FILE).exists()
        parts.part(RECIPE, tmp_path, "tokens", host, len(order))
    assert contents(tmp_path / "tokens") == contents(tokenized / "tokens")
    assert stages.read(tmp_path / "tokens").result == stages.read(tokenized / "tokens").result
    said = capsys.readouterr().out
    assert f"host {order[0]} of {len(order)} is done" in said and "per chip (8 x cpu)" in said


def test_encode_makes_only_the_shards_that_are_lost_or_short(tokenized, tmp_path, monkeypatch):
    start(tokenized, tmp_path)
    shutil.copytree(tokenized / "tokens", tmp_path / "tokens")
    (tmp_path / "tokens" / "train-00001-of-00005.keys.npy").unlink()
    (tmp_path / "tokens" / "train-00003-of-00005.lengths.npy").write_bytes(b"cut")
    assert encode.missing(tmp_path / "prepared", tmp_path / "tokens") == [("train", 1, 5), ("train", 3, 5)]
    written, write = [], tokens.write
    monkeypatch.setattr(tokens, "write", lambda *a: (written.append(a[3]), write(*a)))
    run.run(RECIPE, tmp_path, only="tokens")
    assert written == [1, 3]
    assert contents(tmp_path / "tokens") == contents(tokenized / "tokens")


def test_a_lost_record_shard_stops_encoding_before_any_work(tokenized, tmp_path):
    start(tokenized, tmp_path)
    (tmp_path / "prepared" / "train-00003-of-00005.array_record").unlink()
    with pytest.raises(UserError, match=r"train-00003-of-00005.array_record.* missing"):
        parts.part(RECIPE, tmp_path, "tokens", 0, 2)
    assert not (tmp_path / "tokens").exists()


def test_eight_chips_give_the_codes_of_one(tokenized):
    import jax

    pictures = np.random.default_rng(0).integers(0, 256, (21, 16, 16, 3), np.uint8)
    one = image.load(tokenized / "image", 8)
    eight = image.load(tokenized / "image", 8, tuple(jax.local_devices()))
    found = eight.encode(pictures)
    assert np.array_equal(found, one.encode(pictures)) and len(np.unique(found)) > 3
    assert np.array_equal(eight.decode(found), one.decode(found))
    _, placed = eight._placed(pictures[:8])
    assert len(placed.sharding.device_set) == 8 and placed.addressable_shards[0].data.shape[0] == 1
    with pytest.raises(UserError, match="multiple of the 8 devices"):
        image.load(tokenized / "image", 9, tuple(jax.local_devices()))


@pytest.mark.slow
def test_processes_read_ahead_the_same_records(tokenized):
    paths = shards.files(tokenized / "prepared")["train"]
    plain = [record for path in paths for record in shards.Reader.of([path])]
    read = list(encode.records(paths, 2))
    assert [r.key for r in read] == [r.key for r in plain] and isinstance(read[0], Record)
    assert all(np.array_equal(a.parts[1], b.parts[1]) for a, b in zip(read, plain, strict=True))
    assert text.Tokenizer(tokenized / "text" / "tokenizer.model").size <= 300
