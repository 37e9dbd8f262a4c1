"""Laws of the image tokenizer's training: when things start, what moves what, meshes, boxes, and that it learns."""

import dataclasses
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cm3jax import config as configs
from cm3jax import sharding, trees
from cm3jax.data import shards
from cm3jax.nn import perceptual, quantizer
from cm3jax.tokenizers import image as tokenizer
from cm3jax.train import loop, vqgan
from cm3jax.train import state as train_state
from cm3jax.types import Record, Region, UserError

SIDE, CODES, B = 32, 16, 8
PLAIN = configs.Image(
    model=configs.VQGAN(
        patch=8, width=8, multipliers=(1,), encoder_blocks=1, decoder_blocks=1, encoder_kernel=1, attention=(),
        middle=False, groups=0, z=3, l2_normalise=True, codebook_ema=0.9,
    ),
    loss=configs.VQGANLoss(l1=0.0, l2=1.0, perceptual=0.0, adversarial=0.0),
    training=configs.Training(
        steps=60, batch=B, ema=0.5, log_every=20, mesh=configs.Mesh(fsdp=1),
        optimizer=configs.Optimizer(peak_lr=0.02, warmup=3, weight_decay=0.1, schedule="constant"),
    ),
    seed_after=3,
    reset_dead_after=4,
)  # fmt: skip
"""What the quickstart trains, smaller."""


def changed(image, **changes):
    """Return the stage with fields replaced, each in the section (model, loss, training) that has it."""
    for name, value in changes.items():
        section = next((s for s in ("model", "loss", "training") if hasattr(getattr(image, s), name)), None)
        if section is None:
            image = dataclasses.replace(image, **{name: value})
        else:
            new = dataclasses.replace(getattr(image, section), **{name: value})
            image = dataclasses.replace(image, **{section: new})
    return image


# Everything at once: gradients move the codebook, discriminator from step 2 on, several resolutions with norms.
FULL = changed(
    PLAIN, patch=2, multipliers=(1, 2), encoder_kernel=3, groups=4, l2_normalise=False, codebook_ema=0.0, l1=1.0,
    perceptual=1.0, adversarial=0.8, adversarial_start=2, discriminator_width=4, seed_after=1, reset_dead_after=0,
)  # fmt: skip


def pictures(seed=0, b=B, side=SIDE):
    """Plain pictures of two colours each, split somewhere."""
    rng = np.random.default_rng(seed)
    out = np.empty((b, side, side, 3), np.uint8)
    for x in out:
        x[:], cut = rng.integers(0, 256, 3), int(rng.integers(1, side))
        x[:cut] = rng.integers(0, 256, 3)
    return out


@pytest.fixture(scope="module")
def compiled():
    """(stage, mesh) -> compiled functions, each made once."""
    made = {}

    def get(image, mesh=configs.Mesh(1, 1, 1)):
        key = (image, mesh)
        if key not in made:
            made[key] = loop.compile(vqgan.task(image, SIDE, CODES), image.training, sharding.mesh(mesh), "image")
        return made[key]

    return get


def run(functions, steps, batch=None, state=None):
    """Return the states (on the host) and metrics after each step on one batch; states[0] is the first."""
    state = functions.init() if state is None else state
    batch = {"pictures": pictures()} if batch is None else batch
    placed = sharding.place(functions.mesh, batch, B)
    states, metrics = [jax.device_get(state)], []
    for _ in range(steps):
        with jax.set_mesh(functions.mesh):
            state, found = functions.step(state, placed)
        states.append(jax.device_get(state))
        metrics.append({k: (float(s), float(w)) for k, (s, w) in jax.device_get(found).items()})
    return states, metrics


@pytest.fixture(scope="module")
def plain(compiled):
    return run(compiled(PLAIN), 60)


@pytest.fixture(scope="module")
def full(compiled):
    return run(compiled(FULL), 5)


def codebook(state):
    return state.params["generator"]["codebook"]


def same(a, b):
    a, b = trees.named_leaves(a), trees.named_leaves(b)
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------ it learns


def test_one_batch_can_be_overfitted(plain):
    _, metrics = plain
    psnr = [m["psnr"][0] / m["psnr"][1] for m in metrics]
    assert psnr[-1] > psnr[0] + 10


def test_all_terms_are_reported_with_the_pictures_as_weight(full):
    _, metrics = full
    names = {"loss", "l1", "l2", "perceptual", "commitment", "codebook", "psnr", "adversarial", "discriminator"}
    assert names | {"adaptive_weight", "usage", "perplexity", "items"} == set(metrics[-1])
    assert all(metrics[-1][name][1] == B for name in names) and metrics[-1]["items"][0] == B
    assert metrics[-1]["usage"][1] == CODES


def test_the_loss_is_what_the_config_weighs(full):
    value = {k: s / max(w, 1) for k, (s, w) in full[1][-1].items()}
    loss = value["l1"] + value["l2"] + value["perceptual"] + 0.25 * value["commitment"] + value["codebook"]
    assert value["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_averaged_weights_follow_the_weights(plain):
    states, _ = plain
    last, ema = trees.named_leaves(states[-1].params["generator"]), trees.named_leaves(vqgan.averaged(states[-1]))
    before = trees.named_leaves(vqgan.averaged(states[-2]))
    for name, x in last.items():
        expected = x if name == "codebook" else 0.5 * before[name] + 0.5 * x
        np.testing.assert_allclose(ema[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


# --------------------------------------------------------------------------------------------------------- the codebook


def test_the_codebook_is_seeded_from_data_at_its_step_and_not_before(plain):
    states, metrics = plain
    for state in states[1:4]:
        np.testing.assert_array_equal(codebook(state), codebook(states[0]))
    assert not np.array_equal(codebook(states[4]), codebook(states[0]))
    np.testing.assert_allclose(np.linalg.norm(codebook(states[4]), axis=-1), 1, rtol=1e-4)
    assert [m["usage"][1] for m in metrics[:5]] == [0, 0, 0, CODES, CODES]


def test_after_seeding_the_batch_uses_many_codes(plain):
    assert plain[1][3]["perplexity"][0] > 2 and plain[1][3]["usage"][0] == CODES


def test_dead_codes_are_revived_on_data(compiled, plain):
    states, _ = plain
    far = np.array(codebook(states[10]))
    far[5] = -far.mean(0) / np.linalg.norm(far.mean(0))  # opposite to all data
    upkeep = states[10].extra["codebook"]
    upkeep = upkeep.replace(unused=np.where(np.arange(CODES) == 5, 4, upkeep.unused).astype(np.int32))
    generator = states[10].params["generator"] | {"codebook": far}
    state = states[10].replace(params={"generator": generator}, extra=states[10].extra | {"codebook": upkeep})
    functions = compiled(PLAIN)
    state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, functions.abstract)
    after = run(functions, 1, state=state)[0][-1]
    assert after.extra["codebook"].unused[5] == 0
    assert np.linalg.norm(codebook(after)[5] - far[5]) > 0.1
    assert np.linalg.norm(codebook(after)[5]) == pytest.approx(1, rel=1e-3)


def test_weight_decay_leaves_a_codebook_of_moving_averages_alone(plain):
    """Codes that a step neither chose nor revived stay where they are."""
    states, _ = plain
    a, b = states[20], states[21]
    still = b.extra["codebook"].unused > 0
    np.testing.assert_allclose(codebook(b)[still], codebook(a)[still], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- the discriminator


def test_the_discriminator_starts_at_its_step(full):
    states, metrics = full
    judge = [state.params["discriminator"] for state in states]
    assert same(judge[0], judge[1]) and same(judge[1], judge[2]) and not same(judge[2], judge[3])
    assert [m["adversarial"][1] for m in metrics] == [0, 0, B, B, B]
    assert same(states[0].opt_state["discriminator"], states[2].opt_state["discriminator"])


def test_the_discriminator_learns_from_its_first_step_on(full):
    found = [m["discriminator"][0] / B for m in full[1][2:]]
    assert found[-1] < found[0]


def test_the_generators_gradient_holds_the_adversarial_loss_scaled_to_the_reconstructions(full):
    """At the last layer the two gradients have equal norms before the config's weight: so says eq. 7."""
    state = full[0][3]
    parts = vqgan.build(FULL, SIDE, CODES)
    rows = {"pictures": jnp.asarray(pictures())}

    kernel = jax.jit(lambda s, on: vqgan.gradients(parts, s, True, on, rows)[0][0]["generator"]["last"]["kernel"])
    without, both = (np.asarray(kernel(state, jnp.asarray(on))) for on in (False, True))
    added = both - without
    assert np.linalg.norm(added) == pytest.approx(0.8 * np.linalg.norm(without), rel=0.02)


def test_a_codebook_trained_by_gradient_moves(full):
    assert not np.array_equal(codebook(full[0][3]), codebook(full[0][2]))


# --------------------------------------------------------------------------------------------------------------- meshes


def test_a_sharded_step_is_the_single_device_step(compiled, full):
    functions = compiled(FULL, configs.Mesh(2, 4, 1))
    state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), full[0][3], functions.abstract)
    states, metrics = run(functions, 1, state=state)
    for name, value in metrics[0].items():
        np.testing.assert_allclose(value, full[1][3][name], rtol=1e-3, atol=1e-5, err_msg=name)
    one = trees.named_leaves(full[0][4].params)
    for name, value in trees.named_leaves(states[1].params).items():
        np.testing.assert_allclose(value, one[name], rtol=0, atol=1e-3, err_msg=name)


def test_accumulation_leaves_gradients_and_metrics_unchanged(plain):
    """Checked on the gradients, which an optimizer would only blur."""
    parts, state = vqgan.build(PLAIN, SIDE, CODES), plain[0][10]
    batch = {"pictures": jnp.asarray(pictures())}
    one = lambda rows, i=0: vqgan.gradients(parts, state, jnp.asarray(True), jnp.asarray(False), rows)  # noqa: E731
    (whole, metrics), _ = jax.jit(one)(batch)
    (halves, sums), (latents, indices) = jax.jit(lambda batch: train_state.over_parts(one, batch, 2))(batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / 2, b, rtol=1e-3, atol=1e-5), halves, whole)
    for name, (value, _) in metrics.items():
        np.testing.assert_allclose(sums[name][0], value, rtol=1e-4, err_msg=name)
    assert latents.shape[:2] == (2, B // 2) and indices.shape == (2, B // 2, 4, 4)


# -------------------------------------------------------------------------------------------------- perceptual, regions


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "WIDTHS", (2, 2, 2, 2, 2))
    monkeypatch.setattr(perceptual, "CROP", 16)
    rng = np.random.default_rng(0)
    found = {name: np.abs(rng.normal(size=s)).astype(np.float32) for name, s in perceptual.shapes(True).items()}
    safetensors.numpy.save_file(found, tmp_path / "vgg.safetensors")
    return str(tmp_path / "vgg.safetensors")


def test_with_weights_the_losses_use_them_and_the_state_carries_them(weights):
    image = changed(
        PLAIN, perceptual=1.0, perceptual_weights=weights, face=0.5, face_weights=weights, object=0.3, seed_after=0
    )
    parts = vqgan.build(image, SIDE, CODES)
    state = sharding.unbox(jax.eval_shape(lambda key: vqgan.init(parts, key), jax.random.key(0)))
    assert set(state.extra["networks"]) == {"perceptual", "face"}
    rows = {
        "pictures": jax.ShapeDtypeStruct((B, SIDE, SIDE, 3), jnp.uint8),
        "boxes": jax.ShapeDtypeStruct((B, 4, 4), jnp.float32),
        "kinds": jax.ShapeDtypeStruct((B, 4), jnp.int32),
    }
    _, metrics = jax.eval_shape(lambda s, r, k: vqgan.step(parts, s, r, k), state, rows, jax.random.key(0))
    assert {"perceptual", "face", "object"} <= set(metrics)


def test_without_weights_the_substitute_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        vqgan.task(changed(PLAIN, perceptual=1.0), SIDE, CODES)
    assert "perceptual loss is replaced" in caplog.text and "no LPIPS" in caplog.text
    caplog.clear()
    vqgan.task(PLAIN, SIDE, CODES)
    assert not caplog.text


@pytest.mark.parametrize(
    "changes, side, codes, message",
    [
        ({}, 36, CODES, "resolution 36: not a multiple of the 8 pixels per code"),
        ({"adversarial": 1.0}, 16, CODES, "the discriminator needs at least 32 pixels"),
        ({"face": 1.0}, SIDE, CODES, "image.loss.face_weights"),
        ({"object": 1.0}, SIDE, CODES, "image.loss.perceptual_weights"),
        ({"perceptual": 1.0, "perceptual_weights": "/nowhere"}, SIDE, CODES, "'/nowhere': no such file"),
        ({}, SIDE, 70_000, "vocab.image = 70000"),
        ({"decoder": False}, SIDE, CODES, "image.model.decoder = False: of imported weights only; to train, set it to"),
        ({"l2_normalise": False, "quantizer": "argmax"}, SIDE, CODES, "image.model.quantizer = 'argmax': of imported"),
    ],
)
def test_settings_that_do_not_fit_give_one_clear_line(changes, side, codes, message):
    with pytest.raises(UserError, match=message) as error:
        vqgan.task(changed(PLAIN, **changes), side, codes)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    regions = (
        Region(1, "object", (0.0, 0.0, 0.2, 0.2)),
        Region(1, "face", (0.25, 0.0, 1.0, 0.5)),
        Region(1, "logo", (0.0, 0.0, 1.0, 1.0)),
        Region(0, "face", (0.0, 0.0, 1.0, 1.0)),
    )
    for split, count in (("train", 2 * B), ("validation", B)):
        with shards.Writer(folder, split) as writer:
            for i, picture in enumerate(pictures(1, count)):
                writer.write(Record(str(i), ("a picture", picture), regions=regions))
    return folder


def test_batches_hold_boxes_where_a_loss_looks_at_them(prepared):
    (batch,) = itertools.islice(vqgan.batches(prepared, PLAIN), 1)
    assert set(batch) == {"pictures"} and batch["pictures"].shape == (B, SIDE, SIDE, 3)
    (batch,) = itertools.islice(vqgan.batches(prepared, changed(PLAIN, face=1.0, boxes=3)), 1)
    np.testing.assert_array_equal(batch["kinds"], np.tile([1, 2, 0], (B, 1)))  # the largest first
    np.testing.assert_allclose(batch["boxes"][0], [[0.25, 0, 1, 0.5], [0, 0, 0.2, 0.2], [0, 0, 0, 0]], rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the stage


def test_the_loop_trains_it_and_the_saved_tokenizer_reconstructs(prepared, tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(loop, "compile", lambda task, training, mesh, name: compiled(PLAIN))
    state = loop.train(
        vqgan.task(PLAIN, SIDE, CODES),
        lambda step: vqgan.batches(prepared, PLAIN, step),
        lambda: vqgan.eval_batches(prepared, PLAIN),
        PLAIN.training,
        tmp_path,
        name="image",
    )
    tokenizer.save(tmp_path, PLAIN.model, CODES, SIDE, vqgan.averaged(state))
    found = tokenizer.load(tmp_path, batch=B)
    x = pictures(1)
    codes = found.encode(x)
    assert quantizer.usage(quantizer.histogram(jnp.asarray(codes, jnp.int32), CODES)) > 0.3
    error = np.square(found.decode(codes).astype(float) - x).mean()
    assert error < 0.5 * np.square(x - x.mean((0, 1, 2))).mean()
