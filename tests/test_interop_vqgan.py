"""Laws of released image tokenizers <-> our VQGAN."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import vqgans

from cm3jax import config as configs
from cm3jax.interop import mapped, tensors, vqgan
from cm3jax.nn import vqgan as nets
from cm3jax.tokenizers import image
from cm3jax.types import UserError

SIDE = 16
NEAR = 2e-4
"""Of float32's rounding in a whole network, at most, in standard deviations of the result."""
PREFIXED = [
    ("", "taming"),
    ("state_dict.", "Gumbel"),
    ("model.", "LlamaGen"),
    ("ema.", "LlamaGen"),
    ("model.vqmodel.", "encoder alone"),
    ("model.vqmodel.", "taming"),
]


@functools.cache
def net(name):
    return vqgans.random(vqgans.SMALL[name])


@functools.cache
def found(name):
    """Return a small network's tensors, what they are recognised as, and our parameters."""
    state = vqgans.state(net(name))
    network = vqgan.network(state, resolution=SIDE)
    return state, network, vqgan.read(state, network)


def ours(network, params, method, x):
    model = nets.VQGAN(network.model, network.codes)
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, jnp.asarray(x)))


def tokenized(network, params, x):
    """Return latents and codes of pictures [b, 3, h, w], compiled as one."""
    model = nets.VQGAN(network.model, network.codes)
    both = lambda self, x: (z := self.encode(x), self.choose(z))  # noqa: E731
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, method=both))
    return tuple(map(np.asarray, run(params, jnp.asarray(x.transpose(0, 2, 3, 1)))))


def latents(network, params, x):
    return ours(network, params, "encode", x.transpose(0, 2, 3, 1))


def painted(network, params, codes):
    return ours(network, params, "paint", codes).transpose(0, 3, 1, 2)


def some_codes(sizes, b=3, seed=2):
    side = SIDE // 2 ** (len(sizes.multipliers) - 1)
    return np.random.default_rng(seed).integers(0, sizes.codes, (b, side, side))


# ------------------------------------------------------------------------------------------------------ the same result


@pytest.mark.slow
@pytest.mark.parametrize("name", vqgans.SMALL)
def test_codes_and_latents_are_those_of_the_rebuild(name):
    sizes, x = vqgans.SMALL[name], vqgans.pictures(6, SIDE)
    _, network, params = found(name)
    wanted = vqgans.latents(sizes, net(name), torch.from_numpy(x))
    best = vqgans.badness(sizes, net(name), wanted).argmin(-1)
    seen, codes = tokenized(network, params, x)
    assert len(np.unique(codes)) > sizes.codes / 3, "too dull to tell a mistake"
    assert codes.ravel().tolist() == best.tolist()
    wanted = wanted.permute(0, 2, 3, 1).numpy()
    wanted = wanted / np.linalg.norm(wanted, axis=-1, keepdims=True) if sizes.form == "llamagen" else wanted
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=NEAR * wanted.std())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, sizes in vqgans.SMALL.items() if sizes.decoder])
def test_pictures_are_those_of_the_rebuild(name):
    sizes = vqgans.SMALL[name]
    _, network, params = found(name)
    codes = some_codes(sizes)
    wanted = vqgans.paint(sizes, net(name), torch.from_numpy(codes)).numpy()
    np.testing.assert_allclose(painted(network, params, codes), wanted, rtol=0, atol=NEAR * wanted.std())


def test_gumbels_code_is_the_highest_score_and_its_vector_the_tables_row():
    """By hand: no distance is asked, no noise drawn, and the first of two equal scores wins."""
    _, network, params = found("Gumbel")
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    scores = params["scores"] | {"kernel": params["scores"]["kernel"].copy()}
    scores["kernel"][..., 9] = scores["kernel"][..., 4]
    scores["bias"] = np.where(np.arange(23) % 5 == 4, 50, 0).astype(np.float32)
    changed = params | {"scores": scores}
    codes = ours(network, changed, "choose", x)
    expected = (x @ scores["kernel"][0, 0] + scores["bias"]).argmax(-1)
    assert set(np.unique(expected)) <= {4, 14, 19} and len(np.unique(expected)) > 1
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(ours(network, changed, "vectors", codes), changed["codebook"][codes])


def test_llamagens_codes_have_length_1_in_use_and_their_own_in_the_file():
    state, network, params = found("LlamaGen")
    lengths = np.linalg.norm(state["quantize.embedding.weight"], axis=-1)
    assert lengths.std() > 0.1 * lengths.mean()
    np.testing.assert_array_equal(params["codebook"], state["quantize.embedding.weight"])
    vectors = ours(network, params, "vectors", np.arange(23)[None, None])
    np.testing.assert_allclose(np.linalg.norm(vectors[0, 0], axis=-1), 1, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- mistakes are seen

MISTAKES = {
    "symmetric padding": dataclasses.replace(vqgans.SMALL["taming"], padding=(1, 1, 1, 1)),
    "padding before the picture": dataclasses.replace(vqgans.SMALL["taming"], padding=(1, 0, 1, 0)),
    "eps of torch's default": dataclasses.replace(vqgans.SMALL["taming"], eps=1e-5),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_padding_or_eps_would_be_seen(mistake):
    """What the rebuild gives with a mistake in it is far from ours: the comparisons above can fail."""
    right, wrong = vqgans.SMALL["taming"], MISTAKES[mistake]
    other = vqgans.build(wrong)
    other.load_state_dict(net("taming").state_dict())
    x = vqgans.pictures(6, SIDE)
    good, bad = (vqgans.latents(s, n, torch.from_numpy(x)) for s, n in ((right, net("taming")), (wrong, other)))
    _, network, params = found("taming")
    seen = torch.tensor(latents(network, params, x)).permute(0, 3, 1, 2)
    assert (seen - good).abs().max() < NEAR * good.std() < 0.01 * (seen - bad).abs().max()


@pytest.mark.slow
def test_our_own_eps_or_padding_changed_would_be_seen(monkeypatch):
    x = vqgans.pictures(6, SIDE)
    wanted = vqgans.latents(vqgans.SMALL["taming"], net("taming"), torch.from_numpy(x)).permute(0, 2, 3, 1).numpy()
    _, network, params = found("taming")
    conv = nets.conv

    def symmetric(*args, padding="SAME", **kwargs):
        return conv(*args, padding=((1, 1), (1, 1)) if padding == ((0, 1), (0, 1)) else padding, **kwargs)

    for name, value in (("EPS", 1e-5), ("conv", symmetric)):
        with monkeypatch.context() as patch:
            patch.setattr(nets, name, value)
            assert np.abs(latents(network, params, x) - wanted).max() > 0.02 * wanted.std()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["taming", "LlamaGen"])
def test_levels_of_the_decoder_in_the_other_order_would_be_seen(name):
    """With levels of one width, no shape tells their order."""
    sizes = dataclasses.replace(vqgans.SMALL[name], multipliers=(1, 1, 1), attention=(0, 1, 2))
    whole = vqgans.random(sizes)
    state, codes = vqgans.state(whole), some_codes(sizes)
    network = vqgan.network(state, resolution=SIDE)
    wanted = vqgans.paint(sizes, whole, torch.from_numpy(codes)).numpy()
    level, swap = ("up", {0: 1, 1: 0}) if name == "taming" else ("conv_blocks", {1: 2, 2: 1})
    swapped = dict(state)
    for a, b in swap.items():  # the resampling stays, so that names fit
        for key in [k for k in state if k.startswith(f"decoder.{level}.{a}.") and "sample" not in k]:
            swapped[key.replace(f".{a}.", f".{b}.", 1)] = state[key]
    right, wrong = (painted(network, vqgan.read(s, network), codes) for s in (state, swapped))
    assert np.abs(right - wanted).max() < NEAR * wanted.std() < 0.01 * np.abs(wrong - wanted).max()


def test_a_decoder_that_numbers_its_levels_as_they_work_is_refused_under_tamings_names():
    state = dict(found("taming")[0])
    turn = {f"decoder.up.{i}.": f"decoder.up.{2 - i}." for i in range(3)}
    turned = {name.replace(name[:13], turn.get(name[:13], name[:13])): x for name, x in state.items()}
    with pytest.raises(UserError, match=r"decoder\.up\.[0-9]\."):
        vqgan.network(turned, resolution=SIDE)


# ----------------------------------------------------------------------------------------------------------- recognised


@pytest.mark.parametrize("prefix, name", PREFIXED)
def test_a_form_is_known_by_its_names_and_the_network_by_their_shapes(prefix, name):
    s = vqgans.SMALL[name]
    state = vqgans.state(vqgans.build(s), prefix=prefix)
    network = vqgan.network(state, resolution=SIDE)
    assert (network.form, network.prefix, network.codes, network.resolution) == (s.form, prefix, s.codes, SIDE)
    quantizer = "argmax" if s.gumbel else "cosine" if s.form == "llamagen" else "nearest"
    assert network.model == configs.VQGAN(
        width=s.width, multipliers=s.multipliers, encoder_blocks=s.blocks, decoder_blocks=s.blocks + 1, z=s.z,
        attention=s.attention, latents=0 if s.z == s.latents else s.latents, quantizer=quantizer, decoder=s.decoder,
    )  # fmt: skip
    assert {leaf.name: leaf.theirs for leaf in vqgan.leaves(network).values()} == {n: x.shape for n, x in state.items()}


@pytest.mark.parametrize("name", vqgans.FULL)
def test_every_tensor_of_the_published_sizes_has_its_place(name):
    """By shapes only: no number is made."""
    sizes, count = vqgans.FULL[name]
    with torch.device("meta"):
        state = vqgans.build(sizes).state_dict()
    network = vqgan.network(state)
    assert network[:3] == vqgan.PUBLISHED[name] and network.form == sizes.form and not network.left
    leaves = vqgan.leaves(network).values()
    assert {leaf.name: leaf.theirs for leaf in leaves} == {n: tuple(x.shape) for n, x in state.items()}
    assert sum(math.prod(leaf.shape) for leaf in leaves) == sum(x.numel() for x in state.values()) == count


def test_discriminator_losses_and_optimizers_are_left_out_by_name_and_listed():
    state = vqgans.state(net("taming"), prefix="state_dict.")
    extra = ["state_dict.loss.discriminator.main.0.weight", "state_dict.loss.perceptual_loss.lin0.model.1.weight"]
    extra += ["optimizer_states.0.state.0.exp_avg"]
    state |= {name: np.zeros(2, np.float32) for name in extra}
    network = vqgan.network(state, resolution=SIDE)
    assert network.left == tuple(sorted(extra))
    assert dict(vqgan.tensors(vqgan.read(state, network), network)).keys() == state.keys() - set(extra)


def test_llamagens_averaged_weights_are_taken_and_the_last_ones_listed():
    state = vqgans.state(net("LlamaGen"), prefix="ema.")
    more = {name.replace("ema.", "model."): x + 1 for name, x in state.items()}
    more |= {name: np.zeros(3, np.float32) for name in ("discriminator.main.0.bias", "ema.quantize.codebook_used")}
    network = vqgan.network(state | more, resolution=SIDE)
    assert network.left == tuple(sorted(more))
    np.testing.assert_array_equal(vqgan.read(state | more, network)["codebook"], state["ema.quantize.embedding.weight"])


def test_beside_a_language_model_only_its_own_tensors_are_looked_at():
    state = vqgans.state(net("encoder alone"), prefix="model.vqmodel.")
    language = {"model.embed_tokens.weight": np.zeros((3, 2)), "lm_head.weight": np.zeros((3, 2))}
    assert vqgan.network(state | language, resolution=SIDE).left == ()
    with pytest.raises(UserError, match=r"'model\.vqmodel\.more' is no tensor of this image tokenizer \(1 such\)"):
        vqgan.network(state | language | {"model.vqmodel.more": np.zeros(1)}, resolution=SIDE)


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


def shaped(name, *shape):
    return lambda state: state | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: {"lm_head.weight": np.zeros(2)}, "holds no image tokenizer that is known here"),
        (without("quant_conv.bias"), "no tensor 'quant_conv.bias'"),
        (without("quantize.embedding.weight"), "no tensor 'quantize.embedding.weight'"),
        (without("encoder.conv_in.weight"), "no tensor 'encoder.conv_in.weight'"),
        (without("decoder.up.2.attn.0.q.weight"), "no tensor 'decoder.up.2.attn.0.q.weight'"),
        (shaped("decoder.conv_out.weight", 4, 32, 3, 3), r"has shape \(4, 32, 3, 3\), must be \(3, 32, 3, 3\)"),
        (shaped("encoder.conv_in.weight", 48, 3, 3, 3), "has 32 channels, must be a multiple of the first layer's 48"),
        (shaped("quantize.embedding.weight", 23), r"has shape \(23,\), must have 2 dimensions"),
        (shaped("post_quant_conv.more", 1), "'post_quant_conv.more' is no tensor of this image tokenizer"),
        (shaped("encoder.down.0.attn.0.k.bias", 32), "'encoder.down.0.attn.0.k.bias' is no tensor"),
        (shaped("encoder.down.5.block.0.conv1.weight", 32, 32, 3, 3), "no tensor 'encoder.down.3.block.0.conv1"),
        (shaped("colorize", 3, 7), "'colorize' is no tensor"),
    ],
)
def test_what_is_not_as_the_network_has_it_is_refused_by_name(change, message):
    state = change(dict(found("taming")[0]))
    with pytest.raises(UserError, match=message):
        vqgan.network(state, resolution=SIDE)


def test_whole_numbers_in_place_of_weights_are_refused_by_name():
    state, network, _ = found("taming")
    with pytest.raises(UserError, match="'quant_conv.bias' is of int32"):
        vqgan.read(state | {"quant_conv.bias": np.zeros(5, np.int32)}, network)


# ------------------------------------------------------------------------------------------------------------- settings


def test_an_unknown_resolution_must_be_given():
    state = found("taming")[0]
    with pytest.raises(UserError, match="resolution is unknown, as it is no published one; give it"):
        vqgan.network(state)
    with pytest.raises(UserError, match="resolution 18: not a multiple of the 4 pixels per code"):
        vqgan.network(state, resolution=18)
    assert vqgan.network(state, resolution=20).resolution == 20


def told(**changes):
    about = {"embed_dim": 5, "num_embeddings": 23, "latent_channels": 7, "resolution": 32, "base_channels": 32}
    about |= {"channel_multiplier": [1, 2], "attn_resolutions": []}
    return {"model_type": "chameleon", "vq_config": about | changes}


def test_hugging_faces_config_must_agree_with_the_tensors():
    state = found("encoder alone")[0]
    network = vqgan.network(state, told())
    assert network.resolution == 32 and vqgan.network(state, told(), resolution=48).resolution == 48
    assert vqgan.vq_config(network) == vqgan.HUGGING_FACE | told()["vq_config"] | {"attn_resolutions": None}
    for field, value in (
        ("num_res_blocks", 3),
        ("double_latent", True),
        ("attn_resolutions", [16]),
        ("attn_type", None),
    ):
        with pytest.raises(UserError, match=rf"vq_config\.{field} = "):
            vqgan.network(state, told(**{field: value}))
    with pytest.raises(UserError, match=r"vq_config\.resolution = 'x'"):
        vqgan.network(state, told(resolution="x"))


def test_attention_by_resolution_is_attention_by_level():
    state = vqgans.state(vqgans.build(vqgans.Sizes(attention=(1, 2), decoder=False)))
    about = told(channel_multiplier=[1, 2, 2], attn_resolutions=[8, 16], num_res_blocks=1)
    network = vqgan.network(state, about)
    assert network.model.attention == (1, 2) and vqgan.vq_config(network)["attn_resolutions"] == [16, 8]


def test_the_settings_are_a_recipes():
    _, network, _ = found("Gumbel")
    recipe = vqgan.with_settings(configs.Recipe(), network)
    assert (recipe.image.model, recipe.vocab.image, recipe.prepare.resolution) == network[:3]


@pytest.mark.parametrize("field, value", [("patch", 2), ("groups", 16), ("middle", False), ("l2_normalise", True)])
def test_a_network_that_a_form_cannot_hold_is_refused_by_the_settings_name(field, value):
    model = dataclasses.replace(found("taming")[1].model, **{field: value})
    with pytest.raises(UserError, match=f"image.model.{field} = {value}: taming's networks have"):
        next(vqgan.tensors({}, vqgan.Network(model, 23, SIDE)))


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", vqgans.SMALL)
def test_in_and_out_and_in_again_is_bit_identical(name):
    state, network, params = found(name)
    again = dict(vqgan.tensors(params, network))
    assert again.keys() == state.keys()
    for key, x in state.items():
        assert again[key].dtype == x.dtype and again[key].tobytes() == x.tobytes(), key
    once_more = vqgan.read(again, network)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), params, once_more))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_become_float32_without_loss_and_halves_again(dtype):
    state = {name: x.astype(dtype) for name, x in found("encoder alone")[0].items()}
    network = found("encoder alone")[1]
    params = vqgan.read(state, network)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    again = dict(vqgan.tensors(params, network, dtype))
    assert all(again[name].tobytes() == x.tobytes() for name, x in state.items())
    kept = vqgan.read(state, network, dtype=None)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {np.dtype(dtype)}


def test_a_kernel_is_out_in_h_w_there_and_h_w_in_out_here():
    state, _, params = found("taming")
    theirs, here = state["encoder.down.0.downsample.conv.weight"], params["encoder"]["down0"]["kernel"]
    assert theirs[3, 5, 2, 1] == here[2, 1, 5, 3] != here[1, 2, 5, 3]


# ---------------------------------------------------------------------------------------------------- files and folders


def test_a_checkpoint_of_torchs_becomes_the_image_folder_of_a_run(tmp_path):
    """The whole way: .ckpt, tensors by name, image/, codes, pictures."""
    state = {**net("taming").state_dict(), "loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "x.ckpt")
    opened = tensors.open(tmp_path / "x.ckpt")
    network = vqgan.network(opened.found, resolution=SIDE, where="x.ckpt")
    assert all(isinstance(x, mapped.Tensor) for x in opened.found.values())
    assert network.left == ("state_dict.loss.discriminator.main.0.weight",)
    vqgan.save(tmp_path / "image", network, vqgan.read(opened.found, network))
    loaded = image.load(tmp_path / "image", batch=4)
    assert (loaded.config, loaded.codes, loaded.resolution) == network[:3]
    x = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    seen = torch.from_numpy(x / np.float32(127.5) - 1).permute(0, 3, 1, 2)
    sizes, codes = vqgans.SMALL["taming"], loaded.encode(x)
    bad = vqgans.badness(sizes, net("taming"), vqgans.latents(sizes, net("taming"), seen))
    assert codes.ravel().tolist() == bad.argmin(-1).tolist() and len(np.unique(codes)) > 5
    wanted = vqgans.paint(sizes, net("taming"), torch.from_numpy(codes.astype(int).reshape(3, 4, 4)))
    wanted = np.clip(np.round((wanted.permute(0, 2, 3, 1).numpy() + 1) * 127.5), 0, 255)
    assert np.abs(loaded.decode(codes).astype(int) - wanted).max() <= 1


def test_a_tokenizer_without_a_decoder_reads_pictures_and_says_that_it_draws_none(tmp_path):
    _, network, params = found("encoder alone")
    vqgan.save(tmp_path, network, params)
    loaded = image.load(tmp_path, batch=2)
    assert not json.loads((tmp_path / image.CONFIG).read_text())["model"]["decoder"]
    codes = loaded.encode(np.full((1, SIDE, SIDE, 3), 9, np.uint8))
    assert codes.shape == (1, 64)
    with pytest.raises(UserError, match="has no decoder, as its source had none"):
        loaded.decode(codes)
