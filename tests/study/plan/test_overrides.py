"""Overrides of a training config: what is merged, what is replaced, how an item of a list is reached."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

from lightning_dml.errors import InputError
from lightning_dml.study.plan.overrides import overlay

BASE: dict[str, Any] = {
    "model": {"class_path": "lightning_dml.M", "init_args": {"loss": {"class_path": "a.Old", "init_args": {"m": 1}}}},
    "trainer": {
        "max_epochs": 3,
        "callbacks": [
            {"class_path": "a.Bank", "init_args": {"size": 5, "momentum": 0.9}},
            {"class_path": "b.Saver"},
        ],
    },
}


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.init_args.loss.init_args.m": 2, "trainer.max_epochs": 4},
        {"model": {"init_args": {"loss": {"init_args": {"m": 2}}}}, "trainer": {"max_epochs": 4}},
        {"model.init_args": {"loss.init_args.m": 2}, "trainer": {"max_epochs": 4}},
    ],
)
def test_dotted_and_nested_keys_say_the_same(overrides: dict[str, Any]) -> None:
    """People write whichever is shorter, and all else must stay as it was."""
    before = copy.deepcopy(BASE)
    found = overlay(BASE, overrides)
    wanted = copy.deepcopy(BASE)
    wanted["model"]["init_args"]["loss"]["init_args"]["m"], wanted["trainer"]["max_epochs"] = 2, 4
    assert found == wanted
    assert before == BASE  # the next variant starts from it


def test_the_options_of_another_class_do_not_carry_over() -> None:
    """A margin of one loss that slips into the next is an experiment that nobody asked for."""
    found = overlay(BASE, {"model.init_args.loss": {"class_path": "a.New", "init_args": {"k": 1}}})
    assert found["model"]["init_args"]["loss"] == {"class_path": "a.New", "init_args": {"k": 1}}
    for name in ("a.Old", "Old"):
        same = overlay(BASE, {"model.init_args.loss": {"class_path": name, "init_args": {"k": 1}}})
        assert same["model"]["init_args"]["loss"]["init_args"] == {"m": 1, "k": 1}


def test_the_order_of_keys_is_no_matter() -> None:
    """An option that is lost because the class is named after it trains a default that nobody chose."""
    loss = {"class_path": "a.New", "init_args": {"k": {"x": 1, "y": 2}}}
    parts = {
        "model.init_args.loss.init_args.k.x": 1,
        "model.init_args.loss.class_path": "a.New",
        "model.init_args.loss": {"init_args": {"k": {"y": 2}}},
    }
    for keys in itertools.permutations(parts):
        found = overlay(BASE, {key: parts[key] for key in keys})
        assert found["model"]["init_args"]["loss"] == loss
    assert overlay(BASE, {"model": None, "model.x": 1})["model"] == {"x": 1}  # first away, then anew


def test_items_of_a_list_go_by_class_by_place_and_away() -> None:
    """The memory's momentum is an option of one callback among several."""
    found = overlay(BASE, {"trainer.callbacks.Bank.init_args.momentum": 0.5, "trainer.callbacks.1.init_args.k": 2})
    assert found["trainer"]["callbacks"] == [
        {"class_path": "a.Bank", "init_args": {"size": 5, "momentum": 0.5}},
        {"class_path": "b.Saver", "init_args": {"k": 2}},
    ]
    gone = overlay(BASE, {"trainer.callbacks": {"Bank": None}})
    assert gone["trainer"]["callbacks"] == [{"class_path": "b.Saver"}]
    added = overlay(BASE, {"trainer.callbacks+": {"class_path": "c.New"}, "data.tags+": ["x", "y"]})
    assert added["trainer"]["callbacks"] == [*BASE["trainer"]["callbacks"], {"class_path": "c.New"}]
    assert added["data"]["tags"] == ["x", "y"]
    assert overlay(BASE, {"trainer.callbacks": []})["trainer"]["callbacks"] == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"trainer.callbacks.Bnak.init_args.size": 1}, "Bnak names no item .* Bank, Saver"),
        ({"trainer.callbacks.7": None}, "7 names no item"),
        ({"trainer.max_epochs+": 1}, "appends to a list"),
    ],
)
def test_an_override_without_a_place_is_refused(overrides: dict[str, Any], said: str) -> None:
    """A variant that changes nothing would be taken for a result."""
    with pytest.raises(InputError, match=said):
        overlay(BASE, overrides)


def test_two_items_of_one_class_need_their_place() -> None:
    """Either could have been meant."""
    twice = {"callbacks": [{"class_path": "a.Saver"}, {"class_path": "b.Saver"}]}
    with pytest.raises(InputError, match="Saver names 2 items"):
        overlay(twice, {"callbacks.Saver.init_args.k": 1})
    assert overlay(twice, {"callbacks.1.init_args.k": 1})["callbacks"][1]["init_args"] == {"k": 1}
