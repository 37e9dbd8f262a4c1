"""Scores of folders: figures and their protocols, what is reused, and what is refused.

The networks are a matrix each, so that all else is as it is with real ones.
"""

import dataclasses
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cm3jax import cli
from cm3jax.config import Score, Weights
from cm3jax.data import pictures as crops
from cm3jax.evaluate import clip_score, features, frechet, kernel, manifold, results, score
from cm3jax.evaluate import pictures as closeness
from cm3jax.types import UserError

SIDE, WIDTH = 4, 5
MATRIX = np.random.default_rng(0).normal(size=(SIDE * SIDE * 3, WIDTH)).astype(np.float32)
SMALL = Score(subset_size=7, subsets=3, candidates=5, batch=8, threads=2)


def vectors(pictures):
    """Return what the networks below make of pictures."""
    return np.stack([crops.square(x, SIDE) for x in pictures]).reshape(len(pictures), -1) / np.float32(255) @ MATRIX


def network(**about):
    apply = lambda matrix, x: x.reshape(len(x), -1).astype(jnp.float32) / 255 @ matrix  # noqa: E731
    prepare = lambda picture: crops.square(picture, SIDE)  # noqa: E731
    about = {"network": "a matrix", "weights": "m", "resize": "square", "dtype": "float32"} | about
    return features.Network(about, WIDTH, prepare, apply, MATRIX, 8, tuple(jax.devices()))


class Tools:
    """What `score.Tools` has; a caption's vector is that of the picture which it names, and something more."""

    def __init__(self, **about):
        self.inception, self.clip = network(**about), network(**about)
        self.encoder = types.SimpleNamespace(texts=self.texts)
        self.vgg_weights, self.vgg = "v", lambda a, b: np.abs(a.astype(float) - b).mean((1, 2, 3))

    def texts(self, texts):
        found = [np.zeros(WIDTH) if not t.strip() else np.random.default_rng(len(t)).normal(size=WIDTH) for t in texts]
        return (np.array(found) / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def pictures(count, seed, side=23):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(count)]


def write(folder, found):
    folder.mkdir(parents=True)
    for i, picture in enumerate(found):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def sides(tmp_path):
    drawn = pictures(13, 0)
    near = [np.clip(x.astype(int) + 9, 0, 255).astype(np.uint8) for x in drawn]
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": "x" * (i + 1)}) for i in range(13)]
    folders = write(tmp_path / "drawn", drawn), write(tmp_path / "real", near)
    (folders[0] / "metadata.jsonl").write_text("\n".join(lines))
    return folders


def run(folder, drawn, real, *metrics, tools=None, settings=SMALL, **more):
    settings = dataclasses.replace(settings, metrics=metrics)
    return score.score(
        drawn,
        real,
        settings,
        folder / "r.json",
        folder / "cache",
        say=lambda line: None,
        tools=tools or Tools(),
        **more,
    )


def loaded(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_every_metric_is_what_its_function_says_of_the_pictures(sides, tmp_path):
    found = run(tmp_path, *sides, *score.METRICS)["metrics"]
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == found
    a, b = (loaded(side) for side in sides)
    x, y = vectors(a), vectors(b)
    texts, shown = Tools().texts(["x" * (i + 1) for i in range(13)]), x / np.linalg.norm(x, axis=1, keepdims=True)
    precision, recall = manifold.precision_recall(x, y)
    wanted = {
        "fid": frechet.distance(frechet.moments(x), frechet.moments(y)),
        "kid": kernel.distance(x, y, 3, 7)[0],
        "precision": precision,
        "recall": recall,
        "clip_score": clip_score.score(texts, shown),
        "r_precision": clip_score.r_precision(["x" * (i + 1) for i in range(13)], texts, shown, 5),
        "psnr": closeness.psnr(np.stack(a), np.stack(b)).mean(),
        "ssim": closeness.ssim(np.stack(a), np.stack(b)).mean(),
        "lpips": np.abs(np.stack(a).astype(float) - b).mean(),
    }
    wanted |= dict.fromkeys(("rfid", "clip_fid"), wanted["fid"])
    assert set(wanted) == set(score.METRICS) == set(found)
    for name, value in wanted.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_the_protocol_tells_all_that_a_figure_depends_on(sides, tmp_path):
    found = run(tmp_path, *sides, "fid", "kid", "r_precision", "lpips")["metrics"]
    fid = found["fid"]["protocol"]
    assert fid["features"] == Tools().inception.about and fid["samples"] == 13
    assert fid["reference"]["count"] == 13 and len(fid["reference"]["data"]) == 16
    assert fid["reference"]["data"] != found["fid"]["data"]
    assert set(fid["code"]) == {"cm3jax", "modules"}
    assert found["kid"]["protocol"]["seed"] == 0 and found["kid"]["protocol"]["subset_size"] == 7
    assert (
        found["r_precision"]["protocol"]["candidates"] == 5 and len(found["r_precision"]["protocol"]["captions"]) == 16
    )
    lpips = found["lpips"]["protocol"]
    assert lpips["weights"] == "v" and lpips["reference"] == fid["reference"] and lpips["samples"] == 13


def test_saved_statistics_give_the_figure_and_the_protocol_of_the_folder(sides, tmp_path):
    drawn, real = sides
    whole = run(tmp_path, drawn, real, "fid")
    run(tmp_path / "other", real, "", "fid", statistics=str(tmp_path / "real.npz"))
    assert frechet.load(tmp_path / "real.npz")[0].count == 13
    again = run(tmp_path / "third", drawn, tmp_path / "real.npz", "fid")
    assert again["metrics"] == whole["metrics"]


def test_statistics_of_another_protocol_are_refused_by_the_field(sides, tmp_path):
    drawn, real = sides
    run(tmp_path, real, "", "fid", statistics=str(tmp_path / "real.npz"))
    with pytest.raises(UserError, match="made with resize = 'square', now 'clean-fid'; make them again"):
        run(tmp_path, drawn, tmp_path / "real.npz", "fid", tools=Tools(resize="clean-fid"))


def test_statistics_of_pytorch_fid_are_taken_and_said_to_be_of_unknown_protocol(sides, tmp_path):
    x = vectors(loaded(sides[1])).astype(np.float64)
    np.savez(tmp_path / "theirs.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    found = run(tmp_path, sides[0], tmp_path / "theirs.npz", "fid")["metrics"]["fid"]
    assert found["value"] == pytest.approx(run(tmp_path, *sides, "fid")["metrics"]["fid"]["value"], rel=1e-4)
    assert found["protocol"]["reference"]["data"].startswith("statistics of unknown protocol")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="of 3 numbers, the network has 5"):
        run(tmp_path, sides[0], tmp_path / "wide.npz", "fid")


def test_a_picture_is_seen_by_a_network_once(sides, tmp_path):
    first, second = Tools(), Tools()
    whole = run(tmp_path, *sides, "fid", tools=first)
    object.__setattr__(second.inception, "apply", lambda *x: pytest.fail("seen again"))
    assert run(tmp_path, *sides, "fid", "kid", tools=second)["metrics"]["fid"] == whole["metrics"]["fid"]
    with pytest.raises(BaseException, match="seen again"):  # other weights are another network
        other = Tools(weights="n")
        object.__setattr__(other.inception, "apply", lambda *x: pytest.fail("seen again"))
        run(tmp_path, *sides, "fid", tools=other)


def test_eight_devices_give_what_one_gives(tmp_path):
    found = pictures(13, 5)
    eight, one = network(), dataclasses.replace(network(), devices=tuple(jax.devices()[:1]), batch=3)
    prepared = [crops.square(x, SIDE) for x in found]
    assert len(eight._copies.sharding.device_set) == 8
    np.testing.assert_allclose(eight(iter(prepared)), one(iter(prepared)), atol=1e-5)
    np.testing.assert_allclose(eight(iter(prepared)), vectors(found), atol=1e-5)
    with pytest.raises(UserError, match="batch = 9: must be a multiple of the 8 devices"):
        dataclasses.replace(network(), batch=9)


def test_too_few_samples_are_warned_of_in_the_result(sides, tmp_path):
    few = write(tmp_path / "few", pictures(4, 1))
    lines = []
    found = score.score(few, sides[1], SMALL, tmp_path / "r.json", tmp_path / "c", say=lines.append, tools=Tools())[
        "metrics"
    ]["fid"]
    assert "from 4 samples, too few for the 5 numbers of a feature, which need 6" in found["warning"]
    assert "warning: Frechet distance from 4 samples" in lines[0]
    assert "warning" not in run(tmp_path, *sides, "fid")["metrics"]["fid"]


@pytest.mark.parametrize(
    ("metric", "given", "message"),
    [
        ("fid", ("drawn", "empty"), "no picture in it"),
        ("fid", ("nowhere", "real"), "no such folder"),
        ("fid", ("drawn", ""), "fid: needs a reference behind the pictures"),
        ("kid", ("drawn", "s.npz"), "kid: .*s.npz holds mean and covariance only; give the folder of pictures"),
        ("psnr", ("drawn", "s.npz"), "psnr: .* holds mean and covariance only"),
        ("clip_score", ("s.npz", ""), "clip_score: .* holds mean and covariance only"),
        ("psnr", ("drawn", "large"), r"000.png: 23 x 23 and 29 x 29 pixels; pairs must be of one size"),
        ("rfid", ("drawn", "few"), r"drawn/004.png: has no counterpart among the reference \(9 such of 13\)"),
        ("ssim", ("tiny", "tiny"), "7 x 7 pixels; sides must be at least 11"),
        ("psnr", ("drawn", "drawn"), "all 13 pictures equal their reference; is it the same folder?"),
        ("clip_score", ("real", ""), "no metadata.jsonl in it to take captions from; set --captions"),
        ("precision", ("tiny", "real"), "neighbour 3 of 3 and 13 samples"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_line(sides, tmp_path, metric, given, message):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "s.npz", mu=np.zeros(WIDTH), sigma=np.eye(WIDTH))
    for name, count, side in (("large", 13, 29), ("few", 4, 23), ("tiny", 3, 7)):
        write(tmp_path / name, pictures(count, 1, side))
    with pytest.raises(UserError, match=message):
        run(tmp_path, *(tmp_path / name if name else "" for name in given), metric)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], r"'000.png' is a picture without caption \(1 names do not match\)"),
        (lambda lines: [*lines, '{"file_name": "z.png", "text": "a"}'], "'z.png' is a caption without picture"),
        (lambda lines: [*lines, lines[0]], ":14: file_name.*'000.png' is there twice"),
        (lambda lines: ["{", *lines[1:]], ":1: broken metadata"),
        (lambda lines: ['{"file_name": "000.png"}', *lines[1:]], ":1: missing caption"),
        (lambda lines: ['{"file_name": "000.png", "text": " "}', *lines[1:]], "caption ' ': has no token to score"),
    ],
)
def test_captions_that_do_not_belong_to_the_pictures_are_refused(sides, tmp_path, change, message):
    lines = (sides[0] / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "c.jsonl").write_text("\n".join(change(lines)))
    with pytest.raises(UserError, match=message):
        run(tmp_path, sides[0], "", "clip_score", captions=str(tmp_path / "c.jsonl"))


# ------------------------------------------------------------------------------------------------------------ the table


def test_results_of_one_protocol_make_a_table(sides, tmp_path):
    other = write(tmp_path / "other", pictures(13, 7))
    for name, folder in (("one", sides[0]), ("two", other)):
        run(tmp_path / name, folder, sides[1], "fid", "psnr")
        (tmp_path / name / "r.json").rename(tmp_path / f"{name}.json")
    lines = results.table([tmp_path / "one.json", tmp_path / "two.json"]).splitlines()
    assert lines[0] == "| result | fid | psnr |" and len(lines) == 4
    assert lines[2].startswith("| one | ") and "[" not in "".join(lines)


def test_results_of_different_protocols_are_refused_or_marked(sides, tmp_path):
    run(tmp_path / "a", *sides, "fid", "psnr")
    run(tmp_path / "b", *sides, "fid", "psnr", tools=Tools(resize="clean-fid"))
    paths = [tmp_path / name / "r.json" for name in "ab"]
    with pytest.raises(UserError, match="fid: .*a/r.json and .*b/r.json have different protocols, features.resize"):
        results.table(paths)
    text = results.table(paths, mixed=True)
    assert "[a] |" in text.splitlines()[2] and "[b] |" in text.splitlines()[3]
    assert "- fid [b]: features.resize = 'clean-fid'" in text and "- psnr" not in text


def test_fewer_samples_are_another_protocol(sides, tmp_path):
    few = write(tmp_path / "few", pictures(7, 1))
    run(tmp_path / "a", sides[0], sides[1], "fid")
    run(tmp_path / "b", few, sides[1], "fid")
    with pytest.raises(UserError, match="samples = 13 and 7"):
        results.table([tmp_path / name / "r.json" for name in "ab"])


# ----------------------------------------------------------------------------------------------------- the command line


def test_the_verb_scores_and_tabulates(sides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["score", "drawn", "real", "--metrics", "psnr", "ssim", "--out", "x.json"]) == 0
    assert "psnr: " in capsys.readouterr().out
    assert cli.main(["tabulate", "x.json"]) == 0
    assert capsys.readouterr().out.startswith("| result | psnr | ssim |")
    assert cli.main(["score", "drawn", "real", "--metrics", "psnr"]) == 0
    assert len(list((tmp_path / "runs" / "scores").glob("drawn-*.json"))) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["score"], "PICTURES"),
        (["score", "drawn", "real"], "fid: needs --weights.inception PATH"),
        (["score", "drawn", "--metrics", "clip_score"], "clip_score: needs --weights.clip PATH"),
        (["score", "drawn", "real", "--metrics", "lpips"], "lpips: needs --weights.vgg PATH"),
        (["score", "drawn", "real", "--metrics", "fjd"], "fjd"),
        (["score", "drawn", "--metrics", "psnr", "--statistics", "x.npz"], "psnr: needs --weights.inception PATH"),
        (["score", "drawn", "real", "--weights.inception", "nothing.pth"], "nothing.pth: no such file"),
        (["score", "drawn", "real", "--weights.inception", "w.npz"], "w.npz: a zip file with 0 entries NAME/data.pkl"),
        (["score", "drawn", "real", "--metrics", "psnr", "--batch", "-1"], "score.batch = -1: must be at least 0"),
        (["tabulate"], "tabulate: needs result files"),
        (["tabulate", "nothing.json"], "nothing.json': No such file"),
        (["tabulate", "bad.json"], "bad.json': not a file that cm3jax score writes"),
    ],
)
def test_a_mistake_is_one_line(sides, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("[]")
    np.savez(tmp_path / "w.npz", x=np.zeros(3))
    assert cli.main(argv) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


def test_weights_are_named_where_they_are_needed():
    assert {metric.network for metric in score.METRICS.values()} - {""} == {
        field.name for field in dataclasses.fields(Weights)
    }


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, monkeypatch):
    """But by names and hashes: the peak of numpy's arrays and Python's objects while vectors are made and gathered."""
    import tracemalloc

    from cm3jax.evaluate import picture_files, tables

    monkeypatch.setattr(tables, "PART", 16)
    write(tmp_path / "some", pictures(1, 0, 61))
    few, many = ([picture_files.found(tmp_path / "some")[0]] * n for n in (32, 256))
    net, peaks = dataclasses.replace(network(), width=512, params=np.ones((SIDE * SIDE * 3, 512), np.float32)), []
    for i, files in enumerate((few, few, many)):  # the first compiles
        tracemalloc.start()
        table = features.table(net, files, tmp_path / f"cache{i}", "t", 2, quiet=True)
        assert frechet.total(table, table.width).count == len(files)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1]) / (256 - 32) < 1024, "a vector has 2,048 bytes, a picture 11,163"


@pytest.mark.slow
def test_the_peak_of_a_real_process_stays_where_it_is():
    import subprocess
    import sys

    script = pathlib.Path(__file__).parent.parent / "launch" / "stream_pictures.py"
    found = []
    for count in (300, 2100):
        out = subprocess.run([sys.executable, script, str(count)], capture_output=True, text=True, check=True)
        found.append(json.loads(out.stdout)["peak_gib"])
    held = 1800 * 299**2 * 3 / 2**30  # what the others would take if they stayed: 0.45 GiB, as bytes
    assert found[1] < found[0] + held / 2 and found[1] < 2, found
