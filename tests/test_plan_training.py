"""Real programs for slices that are not there; their figures, and what is said if they do not fit."""

import dataclasses
import json
import math
import os

import chameleons
import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import pytest

from cm3jax import checkpoint, cli, foreign, sharding
from cm3jax import config as configs
from cm3jax.config import Decoder, DecoderStage, Mesh, Packing, Recipe, Training
from cm3jax.plan import compiler, costs, environment, estimate, programs, sampling, slices, table, training
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

SMALL = Recipe(
    name="small",
    vocab=Vocab(text=1200, image=64, sentinels=8),
    prepare=configs.Prepare(resolution=64),
    decoder=DecoderStage(
        model=Decoder(layers=2, width=256, heads=2),
        packing=Packing(kind="chop", length=256),
        training=Training(steps=100, batch=16, accumulate=2),
        loss_chunk=128,
    ),
)
TARGET = slices.parse("v5e-4")


# libtpu reads these once, when it is loaded: a fixture would come too late behind another test of this process.
os.environ.update(environment.NEEDED)


def changed(recipe=SMALL, model=None, **settings):
    stage = recipe.decoder
    stage = dataclasses.replace(
        stage,
        model=dataclasses.replace(stage.model, **(model or {})),
        training=dataclasses.replace(stage.training, **settings),
    )
    return dataclasses.replace(recipe, decoder=stage)


def made_up(fits=True):
    """Return a plan as `training.plan` gives it, of no program."""
    flops = costs.Flops(6e15, 1e15, 2e15)
    terms = estimate.Terms(2.0, 1.0, 0.5, 0.25, 0.0, 0.0) if fits else None
    return training.Plan(
        target=TARGET,
        stage=SMALL.decoder,
        mesh={"replica": 1, "fsdp": 4, "tensor": 1},
        params=1000,
        state=2**30,
        total=(4 if fits else 20) * 2**30,
        limit=15.75 * 2**30,
        fits=fits,
        refusal="" if fits else "Used 20.00G of 15.75G hbm.",
        flops=flops,
        tokens=4096,
        terms=terms,
    )


KEYS = ["fits", "chips", "params", "hbm", "collectives", "flops", "seconds", "mfu", "tokens_per_second"]


@pytest.mark.parametrize("fits", [True, False])
def test_json_has_exactly_the_promised_keys(fits):
    found = json.loads(json.dumps(made_up(fits).to_json()))
    assert list(found) == KEYS
    assert list(found["hbm"]) == ["state_gib", "activations_gib", "total_gib", "limit_gib"]
    assert found["hbm"]["state_gib"] + found["hbm"]["activations_gib"] == found["hbm"]["total_gib"]
    for name in ("seconds", "mfu", "tokens_per_second"):
        assert (
            list(found[name]) == ["low", "high"] and found[name]["low"] < found[name]["high"]
            if fits
            else not found[name]
        )


def test_mfu_counts_model_and_visible_attention_and_no_recomputation():
    plan = made_up()
    peak = 4 * TARGET.chip.flops
    assert plan.seconds == (3.0, 3.75)
    assert plan.mfu == pytest.approx((7e15 / peak / 3.75, 7e15 / peak / 3.0))
    assert plan.rate == (4096 / 3.75, 4096 / 3.0)


def test_what_does_not_fit_says_by_how_much_in_the_compiler_s_words_and_what_to_try():
    plan = made_up(fits=False)
    change = training.likely(plan, SMALL, 4)
    text = table.text(plan, SMALL.decoder.training, change)
    assert "20.00 GiB of 15.75: does not fit, by 4.25 GiB" in text
    assert "Used 20.00G of 15.75G hbm." in text
    assert "--decoder.accumulate 4, by estimate; --search" in text


def test_the_whole_run_s_days_and_chip_hours_are_printed():
    text = table.text(made_up(), SMALL.decoder.training)
    assert "4.096e+05 tokens: 0.0 to 0.0 days, 0 to 0 chip-hours" in text
    assert "slice v5e-4 = v5e:2x2: 4 chips, 4 devices" in " ".join(text.split())


@pytest.mark.parametrize(
    "message, needed, limit",
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.51G of"
         " 15.75G hbm. Exceeded hbm capacity by 1.76G.\n\nTotal hbm usage >= 18.01G:", 17.51, 15.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.00G) exceeds"
         " available HBM (30.75G).", 512, 30.75),
    ],
)  # fmt: skip
def test_the_compiler_s_figures_are_read(message, needed, limit):
    found = compiler.out_of_memory(message)
    assert (found.needed, found.limit) == (needed * 2**30, limit * 2**30)
    assert "\n" not in found.message and f"{limit}" in found.message
    assert compiler.out_of_memory("INTERNAL: Mosaic failed to compile TPU kernel") is None


def test_changes_come_cheapest_first_and_each_is_a_recipe():
    found = list(training.changes(changed(model={"remat": "dots"}), 4))
    assert [c.flags for c in found] == [
        "--decoder.accumulate 4",
        "--decoder.accumulate 4 --decoder.remat full",
        "--decoder.accumulate 4 --decoder.remat offload",
        "--decoder.accumulate 4 --decoder.remat offload --decoder.tensor 2",
    ]
    assert found[-1].recipe.decoder.training.mesh == Mesh(0, -1, 2)  # as the flags say: one copy a slice


def test_a_plan_without_the_compiler_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cm3jax\[tpu\]'") as e:
        compiler.devices(TARGET)
    assert "\n" not in str(e.value)


def test_a_batch_that_does_not_divide_over_the_slice_is_refused():
    with pytest.raises(UserError, match=r"training.batch = 9: not a multiple of 8"):
        training.plan(changed(batch=9), TARGET)


def test_the_state_of_a_chip_is_its_share():
    step = programs.step(SMALL.decoder, SMALL.vocab, jax.devices()[:4])
    params = programs.local_bytes(step.compiled.abstract.params)
    assert params * 4 == sum(x.size * 4 for x in jax.tree.leaves(step.compiled.abstract.params))
    assert step.stage.model.attention == "xla"


def test_every_slice_has_its_own_copy_of_the_model():
    devices = compiler.devices(slices.parse("v5e-4", 2))
    for config in (Mesh(), Mesh(2, -1, 1)):
        mesh = sharding.mesh(config, devices)
        assert [{d.slice_index for d in copy.flat} for copy in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize("family", slices.CHIPS)
def test_the_limits_in_the_table_are_the_compiler_s_own(family):
    target = slices.Slice(slices.CHIPS[family], slices.CHIPS[family].shapes[1 if family in ("v5e", "v6e") else 0])
    one = jax.sharding.SingleDeviceSharding(compiler.devices(target)[0])
    huge = jax.ShapeDtypeStruct((2**36,), jnp.float32, sharding=one)
    with pytest.raises(compiler.TooLarge) as e:
        compiler.program(lambda: jax.jit(lambda x: (x * 2 + 1)[::-1] @ x).lower(huge))
    assert e.value.limit / 2**30 == target.chip.hbm_gib and e.value.needed > e.value.limit


@pytest.mark.slow
def test_a_real_train_step_is_compiled_for_a_slice_that_is_not_there():
    plan = training.plan(SMALL, TARGET)
    assert plan.fits and plan.stage.model.attention == "splash" and not plan.rematerialized
    assert plan.state < plan.total < plan.limit
    kinds = {c.kind for c in plan.collectives}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    assert max(c.times for c in plan.collectives) >= SMALL.decoder.model.layers * SMALL.decoder.training.accumulate
    assert 0 < plan.mfu[0] < plan.mfu[1] < 1


@pytest.mark.slow
def test_a_batch_that_cannot_fit_is_refused_with_the_compiler_s_figures_and_a_change_is_found():
    large = changed(model={"layers": 8, "width": 2048, "heads": 16, "remat": "none"}, batch=512, accumulate=1)
    plan = training.plan(large, TARGET)
    assert not plan.fits and plan.total > plan.limit == TARGET.chip.hbm_gib * 2**30
    assert "hbm" in plan.refusal.lower()


@pytest.mark.slow
def test_a_layout_that_makes_an_array_whole_is_seen_in_the_log():
    """The gradient of a lookup in a table that is split both ways: trap 6 of the design notes."""
    mesh = sharding.mesh(Mesh(2, 2, 2), compiler.devices(slices.parse("v5e-8")))
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # noqa: E731
    rows = ("replica", "fsdp")

    def loss(table, ids):
        return jnp.sum(jax.lax.with_sharding_constraint(table[ids] * 2, place(rows, None, None)) ** 2)

    def lower(*axes):
        table = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=place(*axes))
        ids = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=place(rows))
        return jax.jit(jax.grad(loss), out_shardings=place(*axes)).lower(table, ids)

    assert compiler.program(lambda: lower("tensor", "fsdp")).rematerialized
    assert not compiler.program(lambda: lower(None, rows)).rematerialized


@pytest.mark.slow
def test_prefill_and_decode_are_compiled_for_a_slice():
    plan = sampling.plan(SMALL, TARGET, 8)
    assert plan.fits and plan.tokens == 8 * 64
    assert list(plan.to_json()) == KEYS
    assert "512 ids drawn" in table.text(plan)
    half = sampling.plan(SMALL, TARGET, 8, "bfloat16")
    assert half.fits and plan.state == 2 * half.state and half.total < plan.total


@pytest.mark.slow
@pytest.mark.parametrize("lumina", [False, True], ids=["chameleon", "lumina"])
def test_drawing_with_an_imported_model_is_compiled_for_a_slice(lumina, tmp_path, capsys):
    about = checkpoints.settings(dtype="bfloat16", num_key_value_heads=2, swin_norm=True)
    checkpoints.hugging_face(tmp_path / "hf", about, chameleons.random_tensors(about, ml_dtypes.bfloat16))
    run = foreign.bring(str(tmp_path / "hf"), str(tmp_path / "run"), say=lambda line: None)
    recipe = configs.load(run / "recipe.json")
    if lumina:  # a row of four codes has an end
        form = dataclasses.replace(recipe.form, grid=4, side=recipe.form.turn - 1, line=recipe.form.turn - 2)
        recipe = dataclasses.replace(recipe, form=form)
    plan = sampling.plan(recipe, TARGET, 8, "bfloat16")
    assert plan.fits and plan.tokens == 8 * (20 if lumina else 16)
    stored = checkpoint.open_params(run / "decoder")
    assert plan.params == sum(math.prod(x.shape) for x in stored.values())
    assert {x.dtype.name for x in stored.values()} == {"bfloat16"}
    if not lumina:  # and the verb finds the recipe in the run's folder
        words = f"--topology v5e-4 --for sample --rows 8 --dtype {recipe.decoder.model.dtype} --json"
        capsys.readouterr()
        assert cli.main(["plan", str(run), *words.split()]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["params"] == plan.params and found["hbm"] == plan.to_json()["hbm"]
