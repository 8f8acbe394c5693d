"""The study file and its grid: what it says, how it is refused, and what makes a training the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_dml.errors import InputError
from lightning_dml.study.plan.grid import baseline_of, check_configs, covering, points_of, runs_of
from lightning_dml.study.plan.study_file import StudyFile

STUDY: dict[str, Any] = {
    "base": "base.yaml",
    "axes": {"model.value": [0.1, 0.2], "speed": {"slow": {}, "fast": {"model": {"seconds": 0.0}}}},
    "seeds": [0, 1],
    "metric": "val/recall@1",
}


def study(folder: Path, config: dict[str, Any] | None = None, **changes: Any) -> StudyFile:
    """Writes a base config and a study file with these changes, and reads it."""
    (folder / "base.yaml").write_text(json.dumps(config or {"model": {"value": 0.5}, "seed_everything": 7}))
    (folder / "fast.yaml").write_text(json.dumps({**STUDY, **changes}))
    return StudyFile.read(folder / "fast.yaml")


def test_the_grid_is_every_combination_less_what_is_excluded(tmp_path: Path) -> None:
    """Each combination is trained with each seed, the first seed of all before the second of any."""
    found = study(tmp_path, exclude=[{"speed": "fast", "model.value": 0.1}])
    points = points_of(found)
    assert [point.label for point in points] == [
        "model.value=0.1, speed=slow",
        "model.value=0.2, speed=slow",
        "model.value=0.2, speed=fast",
    ]
    assert [point.config["model"] for point in points] == [
        {"value": 0.1},
        {"value": 0.2},
        {"value": 0.2, "seconds": 0.0},
    ]
    assert [run.seed for run in runs_of(found, points)] == [0, 0, 0, 1, 1, 1]
    assert len({run.key for run in runs_of(found, points)}) == 6
    assert (found.name, str(found.output), found.storage) == (
        "fast",
        "runs/study/fast",
        "sqlite:///runs/study/fast/study.db",
    )


def test_a_training_is_known_by_its_config(tmp_path: Path) -> None:
    """Another axis, another order or another logger must not cost a training that is done; another option must."""
    keys = {point.key for point in points_of(study(tmp_path))}
    more_axes = {**STUDY["axes"], "other": {"no": {}, "yes": {"model.other": 1}}}
    grown = {point.key for point in points_of(study(tmp_path, axes=more_axes))}
    assert keys < grown and len(grown) == 2 * len(keys)
    logged = {"model": {"value": 0.5}, "trainer": {"logger": False}, "seed_everything": 3}
    assert {point.key for point in points_of(study(tmp_path, logged))} == keys
    changed = {"model": {"value": 0.5}, "trainer": {"max_epochs": 2}}
    assert not {point.key for point in points_of(study(tmp_path, changed))} & keys


def test_options_that_take_the_seed_are_read(tmp_path: Path) -> None:
    """Seeds that all see the same batches tell less than they seem to; and a misspelt option tells nothing."""
    found = study(tmp_path, seed_options=["data.seed"])
    assert [point.config["data"] for point in points_of(found)] == 4 * [{"seed": 0}]
    assert {point.seed_options for point in points_of(found)} == {("data.seed",)}
    for wrong in ("data.seed", [3], [""]):
        with pytest.raises(InputError, match="seed_options must be a list"):
            study(tmp_path, seed_options=wrong)


def test_values_without_an_end_are_names(tmp_path: Path) -> None:
    """An axis has no place for infinity, such as that of a threshold that is never reached."""
    found = study(tmp_path, axes={"model.value": [0.5, float("inf")]})
    assert found.axes[0].numbers == () and list(found.axes[0].variants) == ["0.5", "Infinity"]


def test_the_baseline_keeps_the_other_axes(tmp_path: Path) -> None:
    """Slow is compared with slow when the baseline speaks of the value only."""
    found = study(tmp_path, baseline={"model.value": 0.1})
    points = points_of(found)
    pairs = {point.label: baseline_of(point, points, found.baseline) for point in points}
    partner = pairs["model.value=0.2, speed=fast"]
    assert partner is not None and partner.label == "model.value=0.1, speed=fast"


def test_base_configs_and_overrides_lie_over_each_other(tmp_path: Path) -> None:
    """As --config twice; numbers such as 1e-3, which YAML 1.1 reads as texts, are numbers."""
    (tmp_path / "top.yaml").write_text("model: {rate: 1e-3, other: 2}\n")
    (tmp_path / "base.yaml").write_text("model: {value: 0.5, other: 1}\n")
    layers = ["base.yaml", "top.yaml", {"model.seconds": 4}]
    (tmp_path / "three.yaml").write_text(json.dumps({**STUDY, "base": layers}))
    assert StudyFile.read(tmp_path / "three.yaml").base == {
        "model": {"value": 0.5, "other": 2, "rate": 0.001, "seconds": 4}
    }


def test_a_second_study_file_lies_over_the_first(tmp_path: Path) -> None:
    """A grid on other data, or with more seeds, is one short file and a study of its own, not a copy of the first."""
    study(tmp_path, base=["base.yaml", {"model.value": 1}], baseline={"speed": "slow"}, labels={"speed": "pace"})
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "data.yaml").write_text('{"model": {"data": "other"}}')
    upper = {
        "base+": ["data.yaml", {"model.more": 1}],
        "base.1": {"model.value": 2},
        "axes": {"model.seed": [5]},
        "seeds": [3],
        "labels": {"model.seed": "s"},
    }
    (folder / "over.yaml").write_text(json.dumps(upper))
    both = StudyFile.read(tmp_path / "fast.yaml", folder / "over.yaml")
    assert both.base == {"model": {"value": 2, "data": "other", "more": 1}, "seed_everything": 7}
    assert [axis.name for axis in both.axes] == ["model.value", "speed", "model.seed"]
    assert (both.name, both.seeds, both.baseline) == ("fast-over", (3,), {"speed": "slow"})
    assert both.labels == {"speed": "pace", "model.seed": "s"} and "fast-over" in both.storage
    with pytest.raises(InputError, match=r"over\.yaml changes the base of another"):
        StudyFile.read(folder / "over.yaml")
    (folder / "wrong.yaml").write_text('{"bases": []}')
    with pytest.raises(InputError, match=r"wrong\.yaml has the key 'bases'"):
        StudyFile.read(tmp_path / "fast.yaml", folder / "wrong.yaml")


def test_yes_and_no_are_names_too(tmp_path: Path) -> None:
    """YAML reads a bare yes as true; the variant and whoever names it must mean the same."""
    (tmp_path / "base.yaml").write_text("model: {value: 1}\n")
    (tmp_path / "words.yaml").write_text(
        "base: base.yaml\nmetric: m\naxes: {memory: {yes: {}, no: {model.value: 2}}}\nbaseline: {memory: no}\n"
    )
    found = StudyFile.read(tmp_path / "words.yaml")
    assert list(found.axes[0].variants) == ["true", "false"] and found.baseline == {"memory": "false"}


def test_few_configs_show_every_variant(tmp_path: Path) -> None:
    """A typo in any variant is found by parsing as many configs as the longest axis has variants."""
    points = points_of(study(tmp_path))
    few = covering(points)
    assert len(few) == 2
    assert {variant for point in few for variant in point.choice.items()} == {
        variant for point in points for variant in point.choice.items()
    }

    def parse(config: dict[str, Any]) -> None:
        if "seconds" in config["model"]:
            raise InputError("no such option")

    with pytest.raises(InputError, match=r"speed=fast\) is refused: no such option"):
        check_configs(points, parse)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrik": "x"}, "key 'metrik', which no study has"),
        ({"metric": None}, "needs metric"),
        ({"metric": ["a"]}, "metric must be the name"),
        ({"axes": {}}, "needs axes"),
        ({"axes": ["model.value"]}, "axes must map"),
        ({"axes": {"a": []}}, r"axes\.a is empty"),
        ({"axes": {"a": {"variants": {}}}}, r"axes\.a is empty"),
        ({"axes": {"a": {"option": "model.value", "values": []}}}, r"axes\.a is empty"),
        ({"axes": {"a": {"values": [1]}}}, "must have option and values"),
        ({"axes": {"a": {"option": "x", "variants": {"b": {}}}}}, "must have option and values"),
        ({"axes": {"a": 3}}, "list of values or a mapping"),
        ({"axes": {"a": {"b": 3}}}, r"axes\.a\.b must be overrides"),
        ({"axes": {"model.value": [1, 1]}}, "has a value twice"),
        ({"axes": {"a": {"b": {}, "c": {"model.value": 0.5}}}}, r"\(a=b\) and \(a=c\) are the same training"),
        ({"axes": {"a": {"b": {"model.value.0.x": 1, "model+": 1}}}}, "variant b: model. appends to a list"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": [0, True]}, "seeds must be a list"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [2**40]}, "seeds must be a list of whole numbers from 0 to 4294967295"),
        ({"output": 3}, "output must be a path, got 3"),
        ({"output": __file__}, "output must be a folder, and .* is a file"),
        ({"metrics": ["a", 3]}, "metrics must be a list of names"),
        ({"exclude": {"speed": "slow"}}, "exclude must be a list"),
        ({"exclude": [{"sped": "slow"}]}, "exclude has the axis 'sped', which is none of model.value, speed"),
        ({"exclude": [{"speed": "slwo"}]}, "exclude.speed must be among slow, fast, got slwo"),
        ({"exclude": [{}]}, "empty item"),
        ({"exclude": [{"speed": ["slow", "fast"]}]}, "no point left"),
        ({"baseline": {"speed": "none"}}, "baseline.speed must be among slow, fast"),
        ({"baseline": {"speed": ["slow", "fast"]}}, "baseline.speed must be one variant"),
        ({"baseline": {"speed": "slow"}, "exclude": [{"speed": "slow"}]}, "is no point of the grid"),
        ({"mode": "maximum"}, "mode must be one of max, min, got .maximum."),
        ({"value": "mean"}, "value must be one of last, best, got .mean."),
        ({"metrics": "val/map@r"}, "metrics must be a list"),
        ({"course": ["drift/bank"]}, "course must have metrics"),
        ({"course": {"metrics": ["drift/bank"], "steps": 3}}, "course must have metrics"),
        ({"course": {"metrics": "drift/bank"}}, "course.metrics must be a list of names"),
        ({"course": {"metrics": ["drift/bank"], "every": 0}}, "course.every must be an integer .*steps"),
        ({"labels": ["a"]}, "labels must map"),
        ({"lease": 0}, "lease must be a number of seconds, finite, greater than 0, got 0"),
        ({"keep_checkpoints": "no"}, "keep_checkpoints must be true or false"),
        ({"name": "a/b"}, "name must consist"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"base": [3]}, "base must be paths"),
    ],
)
def test_a_wrong_study_file_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """A week of computing must not begin on a typo."""
    with pytest.raises(InputError, match=said):
        points_of(study(tmp_path, **changes))


def test_a_variant_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    """YAML would silently keep the second."""
    (tmp_path / "twice.yaml").write_text("axes:\n  a:\n    b: {}\n    b: {}\n")
    with pytest.raises(InputError, match="'b' stands there twice"):
        StudyFile.read(tmp_path / "twice.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="must hold a mapping, got list"):
        StudyFile.read(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("axes: [\n")
    with pytest.raises(InputError, match="not the YAML"):
        StudyFile.read(tmp_path / "broken.yaml")
