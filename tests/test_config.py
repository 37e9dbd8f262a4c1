import ast
import dataclasses
import itertools
import json
import math
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest

from cm3jax import config
from cm3jax.types import UserError

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").rglob("*.py"))


def test_a_recipe_survives_json():
    recipe = config.Recipe(name="x", evaluate=config.Evaluate(draw=(config.Sampling(top_k=3),)))
    assert config.from_json(config.Recipe, json.loads(json.dumps(config.to_json(recipe)))) == recipe


@hypothesis.given(st.floats(0.0, 1.0), st.integers(1, 10**6), st.sampled_from(["adamw", "muon"]))
def test_any_training_survives_json(rate, steps, name):
    training = config.Training(steps=steps, optimizer=config.Optimizer(name=name, peak_lr=rate))
    assert config.from_json(config.Training, json.loads(json.dumps(config.to_json(training)))) == training


def test_missing_fields_take_their_defaults():
    assert config.from_json(config.Recipe, {"name": "x"}) == config.Recipe(name="x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"decoder": {"training": {"stps": 3}}}, "decoder.training: unknown field 'stps'; known: steps"),
        ({"decoder": {"training": {"steps": "3"}}}, 'decoder.training.steps = "3": expected int'),
        ({"decoder": {"training": {"steps": True}}}, "decoder.training.steps = true: expected int"),
        ({"decoder": {"training": {"steps": 1.5}}}, "decoder.training.steps = 1.5: expected int"),
        ({"decoder": {"packing": {"isolate": 1}}}, "decoder.packing.isolate = 1: expected bool"),
        ({"decoder": {"model": {"norm": "batch"}}}, "decoder.model.norm = 'batch': must be one of 'layernorm'"),
        ({"decoder": []}, "decoder: expected an object"),
        ({"decoder": {"training": {"profile": [3]}}}, "training.profile = (3,): must be the first and the last step"),
        ({"decoder": {"training": {"profile": [4, 3]}}}, "training.profile = (4, 3): must be the first and the last"),
        ({"image": {"model": {"attention": 3}}}, "image.model.attention: expected a list"),
        ({"image": {"model": {"attention": ["x"]}}}, 'image.model.attention[0] = "x": expected int'),
        ({"decoder": {"model": {"width": 30, "heads": 4}}}, "decoder.model.width = 30 is not a multiple of heads = 4"),
        ({"decoder": {"model": {"heads": 0}}}, "decoder.model.heads = 0: must be at least 1"),
        ({"decoder": {"packing": {"length": 0}}}, "packing.length = 0: must be at least 2"),
        ({"decoder": {"mask": {"rotate": 1.5}}}, "mask.rotate = 1.5: must be from 0 to 1"),
        ({"decoder": {"training": {"seed": -1}}}, "training.seed = -1: must be from 0 to 4294967295"),
        (
            {"decoder": {"training": {"optimizer": {"peak_lr": math.nan}}}},
            "optimizer.peak_lr = nan: must be at least",
        ),
        ({"image": {"model": {"groups": -1}}}, "image.model.groups = -1: must be at least 0"),
        ({"image": {"loss": {"l1": -1}}}, "image.loss.l1 = -1.0: must be at least 0"),
        ({"tokens": {"batch": 0}}, "tokens.batch = 0: must be at least 1"),
        ({"text": {"sample": 0}}, "text.sample = 0: must be at least 1"),
        ({"evaluate": {"samples": 0}}, "evaluate.samples = 0: must be at least 1"),
        ({"evaluate": {"draw": []}}, "evaluate.draw: empty; needs at least one setting"),
        ({"evaluate": {"write": {"guidance": math.inf}}}, "sampling.guidance = inf"),
        ({"vocab": {"image": 0}}, "vocab.image = 0: must be at least 1"),
        ({"vocab": {"image": 60000}}, "more than the 65536"),
        ([], "Recipe: expected an object, found []"),
    ],
)
def test_wrong_json_names_the_field(data, message):
    with pytest.raises(UserError) as caught:
        config.from_json(config.Recipe, data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_number_is_a_float_too():
    assert config.from_json(config.Optimizer, {"peak_lr": 1}).peak_lr == 1.0


def test_a_digest_sees_every_field():
    base = config.digest(config.Recipe())
    assert base == config.digest(config.Recipe())
    assert base != config.digest(dataclasses.replace(config.Recipe(), text=config.Text(seed=1)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", None, "no such file"),
        ("a.py", "x = 1\n", "must bind `config` to a cm3jax.config.Recipe, found NoneType"),
        ("a.py", "config = 3\n", "found int"),
        ("a.py", "config = (\n", "SyntaxError"),
        ("a.py", "import nothing_of_this_name\n", "ModuleNotFoundError"),
        ("a.py", "from cm3jax.config import Recipe\nconfig = Recipe(nme='x')\n", "nme"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"nme": 1}', "unknown field 'nme'"),
        ("a.json", "[]", "expected an object"),
    ],
)
def test_a_wrong_config_file_gives_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_says_what_it_is(path):
    assert config.load(path).name != "unnamed"
    assert path.read_text().startswith('"""')


def test_there_are_configs():
    assert {"quickstart", "tiny", "7b"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("size", ["350m", "760m", "7b"])
def test_instruction_tuning_has_the_paper_s_settings_and_the_pretrained_network(size):
    """arXiv 2309.02591 table 4; half of the documents mask their answers (ours)."""
    folder = pathlib.Path(__file__).parent.parent / "configs"
    tuned, before = (config.load(folder / name / f"{size}.py").decoder for name in ("sft", "cm3leon"))
    training, rows = tuned.training, tuned.packing.length
    assert (training.optimizer.peak_lr, training.optimizer.warmup, rows) == (5e-5, 150, 4096)
    assert training.batch * rows == 2**21 and training.batch % training.accumulate == 0
    assert abs(training.steps * training.batch * rows - 30e9) < training.batch * rows
    assert (tuned.mixture.least, tuned.mixture.most, tuned.mask.answers) == (0.3, 3.0, 0.5)
    assert (tuned.model, tuned.packing) == (before.model, before.packing)
    assert dataclasses.replace(tuned.mask, answers=0.0) == before.mask


def test_the_config_that_json_holds_is_the_one_that_python_holds(tmp_path):
    recipe = config.load(CONFIGS[0])
    (tmp_path / "recipe.json").write_text(json.dumps(config.to_json(recipe)))
    assert config.load(tmp_path / "recipe.json") == recipe


def fields(cls, where=""):
    for field in dataclasses.fields(cls):
        yield f"{where}{field.name}", field
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{where}{field.name}.")


def test_every_setting_has_a_default():
    missing = dataclasses.MISSING
    for name, field in fields(config.Recipe):
        assert field.default is not missing or field.default_factory is not missing, name


def test_every_setting_says_what_it_is():
    """The flags' help is the docstring behind a field; a nested section's is that of its class."""
    sections = {cls.__name__ for cls in vars(config).values() if dataclasses.is_dataclass(cls)}
    for cls in ast.parse(pathlib.Path(config.__file__).read_text()).body:
        body = cls.body if isinstance(cls, ast.ClassDef) else []
        for field, behind in itertools.pairwise([*body, None]):
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) not in sections:
                documented = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
                assert documented, f"{cls.name}.{field.target.id}"


def test_fixed_places_for_pictures_of_another_size_are_refused():
    base = config.load(pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py")
    with pytest.raises(ValueError, match=r"decoder.packing.picture = 64: a picture of 128 px has 256 codes"):
        dataclasses.replace(base, prepare=dataclasses.replace(base.prepare, resolution=128))


def test_a_later_setting_at_its_default_is_in_no_json_and_no_digest():
    assert "image_guidance" not in config.to_json(config.Sampling()) and "form" not in config.to_json(config.Recipe())
    before = {"kind": "chop", "length": 4096, "isolate": False, "documents": 0, "most_spans": 8, "picture": 0}
    assert config.digest(config.Packing()) == config.digest(before)
    sampling = config.Sampling(guidance=3.0, image_guidance=1.2)
    assert config.from_json(config.Sampling, config.to_json(sampling)) == sampling
    assert config.digest(sampling) != config.digest(config.Sampling(guidance=3.0))


def test_guidance_of_pictures_apart_needs_top_p():
    with pytest.raises(ValueError, match="sampling.image_guidance = 1.2: needs method top_p, and it is cd_k"):
        config.Sampling(method="cd_k", image_guidance=1.2)


def test_a_penalty_on_repetition_needs_top_p_and_is_above_0():
    with pytest.raises(ValueError, match="sampling.repetition_penalty = 1.2: needs method top_p, and it is mixture"):
        config.Sampling(method="mixture", repetition_penalty=1.2)
    with pytest.raises(ValueError, match="sampling.repetition_penalty = 0.0: must be above 0"):
        config.Sampling(repetition_penalty=0.0)
    assert "repetition_penalty" not in config.to_json(config.Sampling())
