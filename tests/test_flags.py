import dataclasses
from typing import Annotated

import pytest

from cm3jax import config, flags
from cm3jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Verb:
    """Do it."""

    label: str = ""
    redo: bool = False
    recipe: Annotated[config.Recipe, flags.FLAT] = config.Recipe()


KNOWN = flags.names(Verb())


def parse(*argv):
    return flags.parse(Verb, list(argv), "cm3jax verb", Verb())


def test_every_setting_of_a_recipe_is_a_flag():
    leaves = {"vocab.text", "decoder.training.optimizer.peak_lr", "evaluate.draw.2.guidance", "image.model.attention"}
    assert leaves <= set(KNOWN)
    assert not [name for name in KNOWN if name.startswith("recipe")]


@pytest.mark.parametrize("name", ["decoder.training.steps", "decoder.steps"])
def test_a_flag_sets_its_field_in_full_and_short(name):
    assert parse(f"--{name}", "7").recipe.decoder.training.steps == 7
    assert parse(f"--{name}=7").recipe.decoder.training.steps == 7


def test_flags_that_are_not_given_keep_the_defaults():
    verb = parse("--decoder.steps", "7")
    training = dataclasses.replace(config.Recipe().decoder.training, steps=7)
    expected = dataclasses.replace(config.Recipe().decoder, training=training)
    assert verb.recipe == dataclasses.replace(config.Recipe(), decoder=expected)


def test_hyphens_and_underscores_are_alike():
    assert parse("--decoder.peak-lr", "1").recipe.decoder.training.optimizer.peak_lr == 1.0
    assert parse("--decoder.peak_lr", "1").recipe.decoder.training.optimizer.peak_lr == 1.0


def test_a_switch_turns_on_and_off():
    assert parse("--decoder.isolate", "--redo").recipe.decoder.packing.isolate
    assert parse("--decoder.isolate", "--redo").redo
    assert not parse("--decoder.no-isolate").recipe.decoder.packing.isolate


def test_lists_are_words():
    model = parse("--image.multipliers", "1", "2", "--image.model.attention", "1").recipe.image.model
    assert (model.multipliers, model.attention) == ((1, 2), (1,))


def test_one_of_several_samplings_is_set_by_its_number():
    draw = parse("--evaluate.draw.1.top-k", "9").recipe.evaluate.draw
    assert [sampling.top_k for sampling in draw] == [0, 9, 0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--decoder.stps", "3"], "--decoder.stps: no such flag; did you mean --decoder.training.steps?"),
        (["--steps", "3"], "--steps: no such flag; did you mean"),
        (["--zzzzzz", "3"], "--zzzzzz: no such flag; see cm3jax verb --help"),
        (
            ["--evaluate.temperature", "1"],
            "may mean --evaluate.draw.0.temperature, --evalu",
        ),
        (["--decoder.steps", "many"], "--decoder.training.steps"),
        (["--decoder.norm", "batch"], "'batch'"),
        (["--image.multipliers", "1", "x"], "--image.model.multipliers"),
        (["--vocab.text", "500000"], "vocab: 508928 ids after padding, more than the 65536"),
        (["--decoder.width", "13"], "decoder.model.width = 13 is not a multiple of heads = 16"),
        (["stray"], "stray"),
        (["--decoder.steps"], "--decoder.training.steps"),
    ],
)
def test_a_wrong_flag_gives_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_has_every_setting_and_its_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert not caught.value.code
    assert "--decoder.training.steps INT" in text and "Poisson law" in text


def test_nothing_after_two_dashes_is_a_flag():
    assert flags.expand(["--decoder.steps", "1", "--", "--x"], KNOWN, "p")[2:] == ["--", "--x"]
