"""Laying one training config over another: dotted keys, classes, and the items of a list by their class."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning_dml.errors import InputError


def overlay(config: Any, overrides: Any, where: str = "") -> Any:
    """A copy of `config` with `overrides` laid over it; neither is changed.

    * A key may be dotted: `{"trainer.max_epochs": 3}` is `{"trainer": {"max_epochs": 3}}`.
    * Mappings are merged, everything else is replaced, lists as a whole too.
    * A mapping with another `class_path` replaces the former one: the init_args of another class do not carry over.
    * An item of a list of classes goes by the name of its class, as in
      `trainer.callbacks.MemoryBankCallback.init_args.momentum: 0.9`; `null` for the item takes it out of the list. A
      number is the item's place.
    * A `+` at the end of a key appends to a list: `trainer.callbacks+: {class_path: ...}`.

    Args:
        config: the config below, of mappings, lists and scalars.
        overrides: what lies on top.
        where: dotted path of both, for messages.

    Raises:
        InputError: for an item of a list that is not there, or that is there twice.

    Examples:
        >>> base = {"loss": {"class_path": "A", "init_args": {"margin": 0.5}}, "callbacks": [{"class_path": "m.Bank"}]}
        >>> overlay(base, {"loss.init_args.margin": 0.1})["loss"]
        {'class_path': 'A', 'init_args': {'margin': 0.1}}
        >>> overlay(base, {"loss": {"class_path": "B"}, "callbacks.Bank": None})
        {'loss': {'class_path': 'B'}, 'callbacks': []}
    """
    if not isinstance(overrides, Mapping):
        return copy.deepcopy(overrides)
    if isinstance(config, list):
        return _overlay_items(config, overrides, where)
    if not isinstance(config, Mapping) or _other_class(config, overrides):
        config = {}
    result = dict(copy.deepcopy(config))
    for head, inner in _split_all(overrides):
        path = f"{where}.{head}" if where else head
        if head.endswith("+"):
            result[head[:-1]] = _appended(result.get(head[:-1]), inner, path)
        else:
            result[head] = overlay(result.get(head), inner, path)
    return result


def _overlay_items(items: list[Any], overrides: Mapping[Any, Any], where: str) -> list[Any]:
    result: list[Any] = copy.deepcopy(items)
    for head, inner in _split_all(overrides):
        place = _place(result, head, where)
        if inner is None:
            del result[place]
        else:
            result[place] = overlay(result[place], inner, f"{where}.{head}")
    return result


def _place(items: list[Any], name: str, where: str) -> int:
    if name.isdigit() and int(name) < len(items):
        return int(name)
    classes = [str(item.get("class_path", "")) if isinstance(item, Mapping) else "" for item in items]
    places = [place for place, path in enumerate(classes) if name in (path, path.rpartition(".")[2])]
    if len(places) != 1:
        contents = ", ".join(path.rpartition(".")[2] or "an item without class_path" for path in classes) or "nothing"
        raise InputError(
            f"{where}.{name} names {'no item' if not places else f'{len(places)} items'} of the list {where}, which "
            f"has {contents}: use the name of one of the classes, its place (0, 1, ...), or {where}+ to add one"
        )
    return places[0]


def _appended(items: Any, added: Any, where: str) -> list[Any]:
    if items is not None and not isinstance(items, list):
        raise InputError(f"{where} appends to a list, and what is there is {items!r}: leave the + out to replace it")
    return copy.deepcopy([*(items or []), *(added if isinstance(added, list) else [added])])


def _split_all(overrides: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """First parts of the keys with what lies below them, one after the other.

    Mappings below one first part are one mapping, so that it is no matter whether `a.class_path` or `a.init_args.x`
    comes first.
    """
    parts: list[tuple[str, Any]] = []
    for key, value in overrides.items():
        head, _, rest = str(key).partition(".")
        inner = {rest: value} if rest else value
        place = next((number for number, (other, _) in reversed(list(enumerate(parts))) if other == head), None)
        if place is not None and isinstance(parts[place][1], Mapping) and isinstance(inner, Mapping):
            parts[place] = head, _joined(parts[place][1], inner)
        else:
            parts.append((head, inner))
    return parts


def _joined(lower: Mapping[Any, Any], upper: Mapping[Any, Any]) -> dict[Any, Any]:
    joined = dict(lower)
    for key, value in upper.items():
        both = isinstance(joined.get(key), Mapping) and isinstance(value, Mapping)
        joined[key] = _joined(joined[key], value) if both else value
    return joined


def _other_class(config: Mapping[str, Any], overrides: Mapping[Any, Any]) -> bool:
    old, new = config.get("class_path"), overrides.get("class_path")
    if old is None or new is None or old == new:
        return False
    # jsonargparse takes a class by its bare name too.
    return not (str(old).rpartition(".")[2] == str(new).rpartition(".")[2] and "." not in min(old, new, key=len))
