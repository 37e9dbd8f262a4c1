"""`cm3jax import`: what is recognised, where every tensor goes, and what is refused with nothing written."""

import json
import pathlib
import re
import subprocess
import sys
import zipfile

import chameleons
import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from cm3jax import checkpoint, cli, config, foreign, stages
from cm3jax.interop import chameleon, meta, vqgan
from cm3jax.tokenizers import image, text
from cm3jax.types import UserError


def brought(source, out, **options):
    """Return the parameters of an imported decoder, and what was said."""
    said = []
    foreign.bring(str(source), str(out), say=said.append, **options)
    return checkpoint.load_params(out / "decoder"), "\n".join(said)


def expected(tensors, about, dtype=None):
    network, order = chameleons.opened(about)
    return chameleon.read(language(tensors), network.model, order, dtype)


def language(tensors):
    return {name: x for name, x in tensors.items() if not name.startswith(chameleon.IMAGE)}


def equal(a, b):
    """Return whether two trees hold the same bits."""
    same = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()  # noqa: E731
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(same, a, b))


# ------------------------------------------------------------------------------------------------------- Hugging Face's


@pytest.mark.parametrize("most", [10**9, 60_000], ids=["one file", "shards"])
def test_hugging_faces_layout_becomes_a_run(tmp_path, most):
    about = checkpoints.settings(num_key_value_heads=2)
    tensors = checkpoints.hugging_face(tmp_path / "hf", about, most=most)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 1 or most < 10**9
    params, said = brought(tmp_path / "hf", run := tmp_path / "run")
    assert equal(params, expected(tensors, about))
    assert "Hugging Face" in said and "SHA-256 " in said
    recipe = config.load(run / "recipe.json")
    network, order = chameleons.opened(about)
    assert (recipe.decoder.model, recipe.vocab) == (network.model, order.vocab)
    tokenizer = text.load(run / "text")
    assert recipe.form.kind == "chameleon"
    assert (recipe.form.begin, recipe.form.turn) == (tokenizer.id("<s>"), tokenizer.id("<reserved08706>"))
    assert recipe.decoder.packing.length == about["max_position_embeddings"]
    assert (recipe.evaluate.draw, recipe.evaluate.write) == (
        (config.PLAIN["chameleon"],),
        config.PLAIN_TEXT["chameleon"],
    )
    pictures = image.load(run / "image")
    assert (pictures.codes, pictures.resolution) == (chameleons.CODES, 8)
    flat = vqgan.read(
        {k: v for k, v in tensors.items() if k.startswith(chameleon.IMAGE)},
        checkpoints.PICTURES._replace(prefix=chameleon.IMAGE),
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, pictures.params, flat))
    for name in ("text", "image", "decoder"):
        record = stages.read(run / name)
        assert record.complete and record.imported and not stages.missing(run, record)


def test_an_image_tokenizer_without_a_decoder_is_told_and_one_can_be_named(tmp_path):
    checkpoints.hugging_face(tmp_path / "hf", decoder=False)
    _, said = brought(tmp_path / "hf", tmp_path / "run")
    assert "no decoder" in said
    assert not image.load(tmp_path / "run" / "image").config.decoder
    other = checkpoints.pictures("", seed=1)
    torch.save({"state_dict": {n: torch.tensor(x) for n, x in other.items()}}, tmp_path / "vqgan.ckpt")
    _, said = brought(tmp_path / "hf", tmp_path / "drawing", image=str(tmp_path / "vqgan.ckpt"), resolution=8)
    assert "no decoder" not in said
    pictures = image.load(tmp_path / "drawing" / "image")
    assert np.array_equal(pictures.params["codebook"], other["quantize.embedding.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_stays_half(tmp_path, half):
    about = checkpoints.settings(dtype=np.dtype(half).name)
    tensors = checkpoints.hugging_face(tmp_path / "hf", about, chameleons.random_tensors(about, half))
    params, _ = brought(tmp_path / "hf", tmp_path / "run")
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(half)}
    assert equal(params, expected(tensors, about))


def test_layers_of_different_types_meet_in_float32(tmp_path):
    about = checkpoints.settings()
    tensors = chameleons.random_tensors(about)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    checkpoints.hugging_face(tmp_path / "hf", about, tensors)
    params, _ = brought(tmp_path / "hf", tmp_path / "run")
    assert params["layers"]["mlp"]["up"]["w"].dtype == np.float32
    assert equal(params, expected(tensors, about, np.float32))


# --------------------------------------------------------------------------------------------------------------- Meta's

SHAPES = {
    "heads of their own": {},
    "grouped queries": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "post-norm of the 30B": {"swin_norm": True, "num_attention_heads": 8, "num_key_value_heads": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_metas_parts_1_2_and_4_are_hugging_faces_model(tmp_path, changes, fused):
    about = checkpoints.settings(**changes)
    tensors = checkpoints.per_process(chameleons.random_tensors(about), about, 1)
    wanted = expected(tensors, about)
    for shards in (1, 2, 4):
        folder = checkpoints.meta_folder(tmp_path / f"meta{shards}", tensors, about, shards, fused=fused)
        params, said = brought(folder, run := tmp_path / f"run{shards}", resolution=8)
        assert "Meta" in said
        assert equal(params, wanted), shards
        assert config.load(run / "recipe.json").decoder.model == chameleon.network(about).model
        assert config.load(run / "recipe.json").vocab == chameleons.opened(about)[1].vocab


@pytest.mark.parametrize("shards", [2, 4])
def test_norms_of_q_and_k_are_those_of_each_heads_process(tmp_path, shards):
    about = checkpoints.settings(num_attention_heads=8, num_key_value_heads=4)
    tensors = checkpoints.per_process(chameleons.random_tensors(about), about, shards)
    scales = tensors["model.layers.0.self_attn.q_norm.weight"]
    assert len(np.unique(scales, axis=0)) == shards, "all processes alike would tell nothing"
    folder = checkpoints.meta_folder(tmp_path / "meta", tensors, about, shards)
    assert equal(brought(folder, tmp_path / "run", resolution=8)[0], expected(tensors, about))


@pytest.mark.slow
@pytest.mark.parametrize("kind", checkpoints.HALF, ids=str)
def test_metas_half_precision_stays_half(tmp_path, kind):
    about = checkpoints.settings()
    tensors = {n: x.astype(checkpoints.HALF[kind]) for n, x in chameleons.random_tensors(about).items()}
    tensors = checkpoints.per_process(tensors, about, 2)
    wide = {n: x.astype(np.float32) for n, x in tensors.items()}
    folder = checkpoints.meta_folder(tmp_path / "meta", wide, about, 2, dtype=kind)
    assert equal(brought(folder, tmp_path / "run", resolution=8)[0], expected(tensors, about))


def test_copies_of_a_norm_that_differ_become_their_mean():
    a, b = np.float32([1, 2, 3]), np.float32([1, 2, 5])
    assert meta._mean([a, b]).tolist() == [1, 2, 4]
    assert meta._mean([a, a.copy()]) is a


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 6), (4, 8)])
def test_pairs_of_rows_come_back(heads, width):
    x = np.arange(heads * width * 3).reshape(heads * width, 3)
    assert np.array_equal(checkpoints.neighbours(meta.halved(x, heads), heads), x)
    one = np.arange(width)
    assert meta.halved(one, 1).tolist() == [*range(0, width, 2), *range(1, width, 2)]


def test_metas_model_and_tokenizer_may_lie_apart(tmp_path):
    about = checkpoints.settings()
    tensors = checkpoints.per_process(chameleons.random_tensors(about), about, 1)
    folder = checkpoints.meta_folder(tmp_path / "meta", tensors, about)
    with pytest.raises(UserError, match="a text tokenizer with Chameleon's image codes is needed"):
        brought(folder / "models" / "7b", tmp_path / "run")
    words = str(folder / "tokenizer")
    params, _ = brought(folder / "models" / "7b", tmp_path / "run", tokenizer=words, image=words, resolution=8)
    assert equal(params, expected(tensors, about))


# ----------------------------------------------------------------------------------------------------- parts of a model


def test_an_image_tokenizer_alone_makes_image(tmp_path):
    state = {n: torch.tensor(x) for n, x in checkpoints.pictures("").items()}
    state |= {"loss.discriminator.main.0.weight": torch.ones(2), "loss.perceptual_loss.lin0.w": torch.ones(2)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="resolution is unknown"):
        foreign.bring(str(tmp_path / "last.ckpt"), str(tmp_path / "run"))
    said = []
    foreign.bring(str(tmp_path / "last.ckpt"), str(run := tmp_path / "run"), resolution=16, say=said.append)
    assert "2 tensors of its training left out" in "".join(said)
    pictures, recipe = image.load(run / "image"), config.load(run / "recipe.json")
    assert (pictures.resolution, recipe.prepare.resolution, recipe.vocab.image) == (16, 16, chameleons.CODES)
    assert sorted(p.name for p in run.iterdir()) == ["image", "imported.json", "recipe.json"]


# ------------------------------------------------------------------------------------------------------------- the verb


def test_a_digest_pins_what_is_read(tmp_path, capsys):
    checkpoints.hugging_face(source := tmp_path / "hf")
    assert cli.main(["import", str(source), str(tmp_path / "run")]) == 0
    planned = cli.defaults("plan", [str(tmp_path / "run")]).recipe
    assert planned == config.load(tmp_path / "run" / "recipe.json"), "plan takes a run folder as it takes a recipe"
    digest = capsys.readouterr().out.split("SHA-256 ")[1].split()[0]
    assert cli.main(["import", str(source), str(tmp_path / "again"), "--hash", digest]) == 0
    assert cli.main(["import", str(source), str(tmp_path / "dry"), "--hash", digest, "--dry-run"]) == 0
    config_file = source / "config.json"
    config_file.write_text(config_file.read_text() + "\n")
    assert cli.main(["import", str(source), str(tmp_path / "other"), "--hash", digest]) == 2
    assert f"not {digest}" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "hf", "run"]


def test_what_is_there_stays(tmp_path):
    checkpoints.hugging_face(tmp_path / "hf")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="is there already"):
        brought(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(UserError, match="does not exist"):
        brought(tmp_path / "hf", tmp_path / "no" / "run")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UserError, match="left from another import"):
        brought(tmp_path / "hf", tmp_path / "new")
    assert (tmp_path / "new.partial").is_dir()


def test_an_import_that_fails_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    checkpoints.hugging_face(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(stages, "write_text", lambda *a: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        brought(tmp_path / "hf", tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------------------------------------------- safety


class Evil:
    """Would touch a file when a pickle of it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def rewrite(path, change):
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


NORM = "model.norm.weight"


def absurd_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def absurd_offset(folder):
    rewrite(folder / "model.safetensors", lambda h: h[NORM].update(data_offsets=[2**50, 2**50 + 128]))


def wrong_shape(folder):
    rewrite(folder / "model.safetensors", lambda h: h[NORM].update(shape=[16, 2]))


def duplicate(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].rstrip()
    entry = json.dumps(json.loads(text)[NORM])
    text = text[:-1] + f',"{NORM}":{entry}}}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def integers(folder):
    rewrite(folder / "model.safetensors", lambda h: h[NORM].update(dtype="I32"))


def lost_tensor(folder):
    rewrite(folder / "model.safetensors", lambda h: h.update({"model.norm.wait": h.pop(NORM)}))


def tokenizer(change):
    def spoil(folder):
        words = chameleons.words()
        change(words)
        (folder / "tokenizer.json").write_text(json.dumps(words))

    return spoil


def swap(words):
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def about(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


HUGGING = {
    "absurd header": (absurd_header, ("model.safetensors", "claims a header of")),
    "absurd offset": (absurd_offset, ("model.safetensors", NORM, "data_offsets")),
    "wrong shape": (wrong_shape, (f"model.safetensors: '{NORM}' has shape (16, 2)", "must be (32,)")),
    "duplicate": (duplicate, ("model.safetensors", NORM, "stands twice")),
    "integers": (integers, (f"model.safetensors: '{NORM}' is of int32",)),
    "lost": (lost_tensor, (f"no tensor '{NORM}'",)),
    "another tokenizer": (tokenizer(swap), ("tokenizer.json", "config.json gives entry 'a'")),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ("a text tokenizer", "--tokenizer")),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("a language model without a config.json",)),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), ("config.json", "not readable")),
    "another model": (about(model_type="llama"), ("model_type 'llama'", "not known here")),
    "layers": (about(num_hidden_layers=4), ("no tensor 'model.layers.3.",)),
    "fewer layers": (about(num_hidden_layers=2), ("model.safetensors: 'model.layers.2.", "is no tensor of the model")),
    "other pictures": (about(vq_config={"num_embeddings": 36}), ("vq_config.",)),
}


def refused(source, out, words, **options):
    """Expect an error of one line with these words, and that nothing is left."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError) as e:
        foreign.bring(str(source), str(out), say=lambda line: None, **options)
    assert all(word in str(e.value) for word in words), e.value
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize(("spoil", "words"), HUGGING.values(), ids=HUGGING)
def test_a_spoilt_folder_of_hugging_faces_is_refused_by_name(tmp_path, spoil, words):
    checkpoints.hugging_face(tmp_path / "hf")
    spoil(tmp_path / "hf")
    refused(tmp_path / "hf", tmp_path / "run", words)


def test_a_missing_shard_is_named(tmp_path):
    checkpoints.hugging_face(tmp_path / "hf", most=60_000)
    lost = sorted((tmp_path / "hf").glob("model-0*"))[1]
    lost.unlink()
    refused(tmp_path / "hf", tmp_path / "run", (lost.name, "missing"))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"shape": [16, 2]}, "has shape (16, 2), must be (32,)"), ({"dtype": "I32"}, "is of int32")],
    ids=["wrong shape", "integers"],
)
def test_a_wrong_tensor_of_a_shard_is_named_with_the_shard(tmp_path, change, words):
    checkpoints.hugging_face(tmp_path / "hf", most=60_000)
    where = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    rewrite(shard := tmp_path / "hf" / where[NORM], lambda h: h[NORM].update(change))
    refused(tmp_path / "hf", tmp_path / "run", (f"{shard}: '{NORM}' {words}",))


@pytest.mark.parametrize(
    ("change", "words"),
    [(torch.ones(3, 3), "has shape (3, 3), must be (32, 32)"), (torch.ones(32, 32).int(), "is of int32")],
    ids=["wrong shape", "integers"],
)
@pytest.mark.parametrize("name", ["layers.1.attention.wo.weight", "layers.1.attention.wq.weight"])
def test_a_wrong_tensor_of_metas_one_part_is_named_as_meta_names_it(tmp_path, name, change, words):
    """Anole has one part."""
    about = checkpoints.settings()
    tensors = checkpoints.per_process(chameleons.random_tensors(about), about, 1)
    folder = checkpoints.meta_folder(tmp_path / "meta", tensors, about)
    path = folder / "models" / "7b" / "consolidated.pth"
    torch.save(torch.load(path) | {name: change}, path)
    words = words if "wo" in name or "int32" in words else "has shape (3, 3), must have 32 rows"
    refused(folder, tmp_path / "run", (f"{path}: ", name, words), resolution=8)


def test_a_wrong_tensor_within_metas_fused_ones_is_named_by_what_holds_it(tmp_path):
    about = checkpoints.settings()
    tensors = checkpoints.per_process(chameleons.random_tensors(about), about, 1)
    folder = checkpoints.meta_folder(tmp_path / "meta", tensors, about, fused=True)
    path = folder / "models" / "7b" / "consolidated.pth"
    name = "layers.1.attention.wqkv.weight"
    torch.save(torch.load(path) | {name: torch.ones(96, 3)}, path)
    refused(folder, tmp_path / "run", (f"{path}: '{name}' (its rows 32 to 64) has shape (32, 3)",), resolution=8)


def code(folder):
    path = folder / "models" / "7b" / "consolidated.00.pth"
    torch.save({"tok_embeddings.weight": torch.ones(2), "x": Evil(folder / "ran")}, path)


def bomb(folder):
    path = folder / "models" / "7b" / "consolidated.01.pth"
    data = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in data.items():
            archive.writestr(name, content + b"\0" * 2**22)


def same_name_twice(folder):
    path = folder / "models" / "7b" / "consolidated.01.pth"
    data = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in data.items():
            archive.writestr(name, content.replace(b"layers.0.attention.wo", b"layers.1.attention.wo"))


def changed_part(change):
    def spoil(folder):
        path = folder / "models" / "7b" / "consolidated.01.pth"
        state = torch.load(path)
        change(state)
        torch.save(state, path)

    return spoil


def told(**changes):
    def spoil(folder):
        path = folder / "models" / "7b" / "params.json"
        found = json.loads(path.read_text())
        path.write_text(json.dumps({"model": found["model"] | changes}))

    return spoil


def narrow_pictures(folder):
    path = folder / "tokenizer" / "vqgan.ckpt"
    state = torch.load(path)["state_dict"]
    torch.save({"state_dict": state | {"decoder.conv_out.weight": torch.ones(4, 32, 3, 3)}}, path)


def wide_parts(folder):
    for path in sorted((folder / "models" / "7b").glob("*.pth")):
        torch.save(torch.load(path) | {"layers.1.feed_forward.w1.weight": torch.ones(20, 33)}, path)


WO = "layers.1.attention.wo.weight"
METAS = {
    "code": (code, ("consolidated.00.pth", "would call", "nothing was executed")),
    "zip bomb": (bomb, ("consolidated.01.pth", "compressed")),
    "missing part": (lambda f: (f / "models/7b/consolidated.01.pth").unlink(), ("consolidated.01.pth", "missing")),
    "missing tensor": (changed_part(lambda s: s.pop(WO)), ("consolidated.01.pth", WO)),
    "a tensor twice": (same_name_twice, ("consolidated.01.pth", f"has '{WO}' twice")),
    "more": (changed_part(lambda s: s.update(extra=torch.ones(1))), ("consolidated.00.pth", "extra")),
    "wrong shape": (changed_part(lambda s: s.update({WO: torch.ones(3, 3)})), ("consolidated.01.pth", WO, "(3, 3)")),
    "another type": (changed_part(lambda s: s.update({WO: s[WO].half()})), ("consolidated.01.pth", WO, "float16")),
    "heads": (told(n_heads=3), ("n_heads = 3",)),
    "no width": (told(dim=None), ("dim = None",)),
    "layers": (told(n_layers=9), ("no tensor 'model.layers.3.",)),
    "fewer layers": (told(n_layers=2), ("consolidated.00.pth: 'layers.2.", "is no tensor of the model")),
    "no pictures' width": (narrow_pictures, ("vqgan.ckpt: 'state_dict.decoder.conv_out.weight' has shape (4, 3",)),
    "all parts too wide": (wide_parts, ("consolidated.00.pth: 'layers.1.feed_forward.w1.weight' (with its 2 parts",)),
    "no norms": (told(qk_normalization=False), ("qk_normalization = False",)),
    "no settings": (lambda f: (f / "models/7b/params.json").unlink(), ("params.json",)),
    "no pictures": (lambda f: (f / "tokenizer/vqgan.ckpt").unlink(), ("an image tokenizer is needed", "--image")),
}


@pytest.mark.parametrize(("spoil", "words"), METAS.values(), ids=METAS)
def test_a_spoilt_folder_of_metas_is_refused_by_name(tmp_path, spoil, words):
    about = checkpoints.settings()
    tensors = checkpoints.per_process(chameleons.random_tensors(about), about, 2)
    folder = checkpoints.meta_folder(tmp_path / "meta", tensors, about, 2)
    spoil(folder)
    refused(folder, tmp_path / "run", words, resolution=8)
    assert not (folder / "ran").exists()


def test_an_image_tokenizer_of_another_size_does_not_belong(tmp_path):
    checkpoints.hugging_face(tmp_path / "hf")
    other = checkpoints.PICTURES._replace(codes=36)
    state = {leaf.name: torch.zeros(leaf.theirs) for leaf in vqgan.leaves(other).values()}
    torch.save(state, tmp_path / "vqgan.ckpt")
    words = ("its image tokenizer has 36 codes", "entries for 37")
    refused(tmp_path / "hf", tmp_path / "run", words, image=str(tmp_path / "vqgan.ckpt"), resolution=8)


def test_what_is_no_model_is_refused(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "run", ("no such file or folder",))
    (tmp_path / "x.bin").write_bytes(b"hello, world, here I am")
    refused(tmp_path / "x.bin", tmp_path / "run", ("x.bin", "neither safetensors nor torch.save"))


# ------------------------------------------------------------------------------------------------------ the real 7B


@pytest.mark.slow
def test_every_tensor_of_the_7b_has_its_place_once(tmp_path):
    """Its shape without its numbers, in a process of its own, whose memory is measured."""
    count = checkpoints.sparse_7b(tmp_path / "7b")
    size = sum(path.stat().st_size for path in (tmp_path / "7b").glob("*.safetensors"))
    assert size > 14e9 and sum(path.stat().st_blocks for path in (tmp_path / "7b").glob("*.safetensors")) * 512 < 1e6
    program = (
        "import sys; from cm3jax import cli, metrics; code = cli.main(sys.argv[1:]);"
        "print(code, metrics.peak_memory_gib())"
    )
    arguments = ["import", str(tmp_path / "7b"), str(tmp_path / "run"), "--dry-run"]
    out = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True).stdout
    pictures, language = (int(re.search(rf"(\d+) tensors{of}", out)[1]) for of in (";", " of bfloat16"))
    assert (pictures, language, pictures + language) == (129, 419, count)
    assert "decoder: 7,013,666,816 parameters" in out
    code, gib = out.split()[-2:]
    assert code == "0" and float(gib) < 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7b"]


PEAKS = """
import sys
from cm3jax import foreign, metrics

small, large, out = sys.argv[1:]
foreign.bring(small, out + "-small", resolution=8, say=lambda line: None)
before = metrics.peak_memory_gib()
foreign.bring(large, out, resolution=8, say=lambda line: None)
print(metrics.peak_memory_gib() - before)
"""


@pytest.mark.slow
def test_metas_parts_are_put_together_without_being_whole_in_memory(tmp_path):
    """A decoder of 470 MB in two parts: what is written waits in buffers of some 100 MB, whatever its size."""
    for name, width, layers in (("small", 32, 2), ("large", 512, 28)):
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        about = checkpoints.settings(**sizes, num_attention_heads=8, num_key_value_heads=8)
        tensors = checkpoints.per_process(chameleons.random_tensors(about), about, 2)
        checkpoints.meta_folder(tmp_path / name, tensors, about, 2)
    size = sum(x.nbytes for x in tensors.values())
    arguments = [str(tmp_path / name) for name in ("small", "large", "run")]
    done = subprocess.run([sys.executable, "-c", PEAKS, *arguments], capture_output=True, text=True, check=True)
    grown = float(done.stdout) * 2**30
    assert size > 4.5e8 and grown < 0.6 * size, grown / size
