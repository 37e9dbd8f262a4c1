"""Laws of the table of samples: what a record is known by, and the spread of figures over records."""

import numpy as np
import pytest

from cm3jax.evaluate import samples
from cm3jax.evaluate.scenes import Score
from cm3jax.types import Record, UserError


def test_attributes_are_what_can_make_groups():
    fields = {"lang": "fr", "age": 7, "adult": False, "score": 0.5, "tags": ["a"], "text": "x" * 65, "none": None}
    fields |= {"camera": {"make": "Leica"}, "scene": '{"background": "white", "objects": []}', "odd": "{"}
    found = samples.named(Record("k", (), fields, group="g", license="CC0", source="http://a.org/7.png"), "test")
    known = {"lang": "fr", "age": 7, "adult": False, "camera.make": "Leica", "scene.background": "white", "odd": "{"}
    assert found == samples.Named("test", "k", known | {"license": "CC0", "group": "g", "source": "a.org"})


def test_tasks_of_one_record_share_its_line(tmp_path):
    table, name = {}, samples.Named("test", "é", {"lang": "fr"})
    samples.put(table, "draw", [name], [Score(1, 2, False)])
    samples.put(table, "rebuild", [name], [{"psnr": 20.5, "ssim": None}])
    samples.write(tmp_path / "new", table)
    (line,) = samples.read(tmp_path / "new")
    scores = {"draw": {"right": 1, "of": 2, "whole": False}, "rebuild": {"psnr": 20.5, "ssim": None}}
    assert line == {"split": "test", "key": "é", "attributes": {"lang": "fr"}, "scores": scores}
    assert samples.read(tmp_path) == []
    (tmp_path / samples.FILE).write_text("{")
    with pytest.raises(UserError, match="samples.jsonl: not readable"):
        samples.read(tmp_path)


def lines(pairs):
    return [{"scores": {"draw": {"right": a, "of": b, "whole": a == b}}} for a, b in pairs]


def test_a_figure_is_the_ratio_of_sums_and_its_interval_holds_it():
    draw = np.random.default_rng(0)
    pairs = [(int(draw.integers(0, n + 1)), n) for n in draw.integers(1, 5, 200).tolist()]
    found = samples.estimates([*lines(pairs), {"scores": {}}], "draw")
    assert set(found) == {"accuracy", "whole"}
    one = found["accuracy"]
    assert one.value == sum(a for a, _ in pairs) / sum(b for _, b in pairs) and one.records == 200
    assert one.low < one.value < one.high and one == samples.estimates(lines(pairs), "draw")["accuracy"]


def test_the_interval_of_a_mean_is_that_of_the_normal_law_where_there_are_many_records():
    values = np.random.default_rng(1).standard_normal(4000) + 3
    found = samples.estimate(np.stack([values, np.ones(4000)], 1))
    error = values.std() / 4000**0.5
    np.testing.assert_allclose(
        [found.low, found.high], values.mean() + 1.96 * np.array([-error, error]), atol=0.2 * error
    )


@pytest.mark.parametrize("pairs", [[(1, 2)], [(1, 1)] * 5, [(0, 3), (0, 4)], [(2, 2), (3, 3)]])
def test_records_that_do_not_differ_have_no_interval(pairs):
    found = samples.estimates(lines(pairs), "draw")["accuracy"]
    assert found == samples.Estimate(pairs[0][0] / pairs[0][1], None, None, len(pairs))


def test_where_there_is_nothing_to_count_there_is_no_figure():
    assert set(samples.estimates(lines([(0, 0), (0, 0)]), "draw")) == {"whole"}
    assert samples.estimates([], "draw") == {}
