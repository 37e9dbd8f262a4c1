"""The tokens of captions are those of the Java program that published scores were computed with."""

import pathlib
import subprocess

import pytest
from made_captions import captions

import cm3jax.evaluate.ptb as ptb

PRINTED = {
    "A man's dog isn't there.": "a man 's dog is n't there",
    "They can't, won't and cannot.": "they ca n't wo n't and can not",
    "I'm gonna say she'll've gone": "i 'm gon na say she 'll 've gone",
    "the dogs' bowls, James' hat": "the dogs bowls james hat",
    "it’s the boss’s, o’clock": "it 's the boss 's o’clock",
    "'Tis the '90s; rock 'n' roll, rock'n'roll": "'t is the '90s rock 'n' roll rock 'n' roll",
    "O'Brien, y'all, ma'am and goin' home": "o'brien y' all ma'am and goin home",
    '"Hello," he said (twice)': "hello he said -lrb- twice -rrb-",
    "[a] {b} <c> d/e": "-lsb- a -rsb- -lcb- b -rcb- <c> d/e",
    "“‘hi’” he said": "``` hi ''' he said",
    "Mr. Smith vs. Dr. No, etc.": "mr. smith vs. dr. no etc.",
    "at 5 p.m. in the U.S.": "at 5 p.m. in the u.s.",
    "No. 5 and no. but": "no. 5 and no but",
    "In Wash. or Tex. a miss. and a Miss. St.": "in wash. or tex. a miss and a miss. st.",
    "vitamin C. The dog": "vitamin c the dog",
    "vitamin C. Dogs": "vitamin c. dogs",
    "a dog., a cat.; a bird.: x": "a dog. a cat. a bird. x",
    "black-and-white t-shirt - 4x4-inch": "black-and-white t-shirt 4x4-inch",
    "red/white/blue/green w/ a cat": "red/white/blue / green w / a cat",
    "$5.50, US$5, 50%, #1, 5¢, €5, £5": "$ 5.50 us$ 5 50 % # 1 5 cents $ 5 # 5",
    "1,000.5 1:30 12:30pm 12.5mm -5 1/2 11/12/2010": "1,000.5 1:30 12:30 pm 12.5 mm -5 1/2 11/12/2010",
    "1 1/2 cups, 1½ cups": "1\u00a01/2 cups 1 1/2 cups",
    "AT&T and R&B, salt&pepper, R & D": "at&t and r&b salt & pepper r & d",
    "wow!! really?! what... ok -- so ----- x": "wow !! really ?! what ok so ----- x",
    ":) :D ;-) <3 ^_^": ":-rrb- :d ;--rrb- < 3 ^_^",
    "#tag @user me@a.com www.a.org http://a.com/b.": "#tag @user me@a.com www.a.org http://a.com/b",
    "café naïve – ½ ™ 東京 🐶 70°F": "café naïve 1/2 ™ 東京 70 ° f",
    "a.b.c hello.there hello,there 3.a": "a.b.c hello.there hello there 3 a",
    "": "",
    "  ...  ": "",
}
"""What the program printed, without COCO's marks."""


@pytest.mark.parametrize("caption", PRINTED)
def test_a_caption_gives_what_the_program_printed(caption):
    assert ptb.words(caption) == PRINTED[caption]


def test_punctuation_is_dropped_from_words_alone():
    found = " ".join(ptb.tokens("A dog, (left) 'is' here."))
    assert found == "a dog , -lrb- left -rrb- ' is ' here ."


def test_the_next_line_of_the_file_decides_on_a_full_stop():
    assert ptb.all_words(["plan B.", "The dog", "plan B.", "the dog"]) == ["plan b", "the dog", "plan b.", "the dog"]
    assert ptb.all_words(["no.", "5 dogs", "no.", "dogs"]) == ["no.", "5 dogs", "no", "dogs"]


def test_a_line_break_in_a_caption_is_a_space():
    assert ptb.words("a\ndog\r\nruns\u2028off") == "a dog runs off"


def test_made_captions_are_varied_and_repeatable():
    made = captions(500)
    assert made == captions(500) and len(set(made)) > 490


@pytest.mark.java
def test_12000_captions_give_the_tokens_of_the_java_program(tmp_path, capsys):
    """The marks in half of these are wilder than people's; at most 0.03 % may differ, and are shown."""
    made = captions(12_000)
    printed = java(made, tmp_path)
    differ = [caption for caption, a, b in zip(made, printed, ptb.all_words(made), strict=True) if a != b]
    with capsys.disabled():
        print(f"\n{len(differ)} of {len(made)} captions differ", *differ, sep="\n  ")
    assert len(differ) <= 4


@pytest.mark.java
def test_plain_captions_give_exactly_the_tokens_of_the_java_program(tmp_path):
    made = captions(24_000, seed=7)[::2]
    assert ptb.all_words(made) == java(made, tmp_path)


@pytest.mark.java
def test_lines_that_depend_on_the_next_are_what_the_java_program_prints(tmp_path):
    lines = ["plan B.", "The dog", "plan B.", "the dog", "no.", "5 dogs", "no.", "dogs"]
    assert java(lines, tmp_path) == ptb.all_words(lines)


@pytest.mark.java
def test_the_recorded_lines_are_what_the_java_program_prints(tmp_path):
    assert java(list(PRINTED), tmp_path) == list(PRINTED.values())


def java(lines, folder):
    """Return what the program of the PyPI package pycocoevalcap prints for lines, COCO's marks dropped."""
    import pycocoevalcap.tokenizer.ptbtokenizer as original

    jar = pathlib.Path(original.__file__).parent / original.STANFORD_CORENLP_3_4_1_JAR
    assert set(original.PUNCTUATIONS) == ptb.DROPPED
    (folder / "captions").write_text("\n".join(lines))
    command = ["java", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    out = subprocess.run([*command, folder / "captions"], capture_output=True, check=True).stdout.decode()
    rows = out.split("\n")[: len(lines)]
    return [" ".join(word for word in row.rstrip().split(" ") if word not in ptb.DROPPED) for row in rows]
