"""The recipe configs by name, and what makes a small replica of the data set of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.datamodules import replicas

RECIPES: dict[str, Callable[[Path], Path]] = {
    "cub": lambda root: replicas.make_cub(root, (1, 2, 3, 4, 101, 102)),
    "cars": lambda root: replicas.make_cars(root, (1, 2, 3, 98, 99, 196)),
    "sop": lambda root: replicas.make_sop(root, train=range(1, 6)),
    "in_shop": lambda root: replicas.make_in_shop(root, train=range(1, 6), test=(7_001, 7_982)),
    "vehicle_id": lambda root: replicas.make_vehicle_id(root, train=(1, 2, 3, 4)),
}
