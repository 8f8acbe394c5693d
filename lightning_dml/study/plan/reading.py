"""YAML files as the command line reads them."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lightning_dml.errors import InputError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; `1e-3` is a number, as it is for LightningCLI, and no key may stand there twice.

    Raises:
        InputError: for a file that cannot be read, is no YAML, has a key twice or holds anything but a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not the YAML that it should be: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


def _mapping(loader: Any, node: Any) -> dict[Hashable, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    twice = [key for place, key in enumerate(keys) if key in keys[:place]]
    if twice:
        message = f"the key {twice[0]!r} stands there twice"
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
    mapping: dict[Hashable, Any] = loader.construct_mapping(node, deep=True)
    return mapping


_Loader: Any = type("_Loader", (yaml.SafeLoader,), {})
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
