"""Data configs of timm models: size, mean, deviation and interpolation, by the name or from the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from timm.data import config as timm_config
from torch import nn

from lightning_dml.errors import InputError, near_names, one_line


def data_config(name: str) -> dict[str, Any]:
    """Timm's data config of a model by its name, with a flag for an input of fixed size.

    Args:
        name: `architecture` or `architecture.tag`, or a `local-dir:` or `hf-hub:` name; only the last may ask the hub.

    Returns:
        `input_size` (channels, height, width), `interpolation`, `mean`, `std` and others as in
        `timm.data.resolve_data_config`, and `fixed_input_size`, a bool.

    Raises:
        InputError: for a model or a tag that timm does not know (the nearest names are given), or a folder or hub
            without a config that can be read.

    Examples:
        >>> data_config("vit_tiny_patch16_384")["input_size"]
        (3, 384, 384)
    """
    source, _, where = name.partition(":")
    return _resolved(_elsewhere(source, where) if where else _registered(name))


def module_config(module: nn.Module) -> dict[str, Any] | None:
    """The data config of the first timm model in a module, as `data_config` gives it; None where there is none.

    Its own config counts, whatever timm has under its name, and the size of input that it was built for.

    Args:
        module: a timm model, or a module that holds one; its `embedder` is looked at first.

    Examples:
        >>> module_config(timm.create_model("test_vit", img_size=32, patch_size=8))["input_size"]
        (3, 32, 32)
    """
    first = getattr(module, "embedder", None)
    places = [first, module] if isinstance(first, nn.Module) else [module]
    models = (part for place in places for part in place.modules() if getattr(part, "pretrained_cfg", None))
    model: Any = next(models, None)
    if model is None:
        return None
    config = _resolved(dict(model.pretrained_cfg))
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size and (config["fixed_input_size"] or getattr(patches, "strict_img_size", True)):
        return {**config, "input_size": (config["input_size"][0], *size), "fixed_input_size": True}
    return config


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    resolve: Any = timm_config.resolve_data_config
    return {**resolve(pretrained_cfg=config), "fixed_input_size": bool(config.get("fixed_input_size"))}


def _registered(name: str) -> dict[str, Any]:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = near_names(architecture, timm.list_models())
        raise InputError(f"model_name {name!r} is not a timm model{near}; timm.list_models() lists them all")
    try:
        config: Any = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tagged = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise InputError(f"model_name {name!r} has a tag that timm does not know; it knows {tagged}") from error
    return {} if config is None else dict(config.to_dict())


def _elsewhere(source: str, where: str) -> dict[str, Any]:
    try:
        if source == "local-dir":
            config: dict[str, Any] = json.loads((Path(where) / "config.json").read_text(encoding="utf-8"))
            return dict(config.get("pretrained_cfg", config))  # an older file is what a newer one has under that name
        if source == "hf-hub":
            return dict(timm.models.load_model_config_from_hf(where)[0])
    # The hub's client has a family of errors of its own, which are OSErrors or ValueErrors.
    except (OSError, ValueError, AssertionError) as error:
        raise InputError(
            f"the data config of model_name '{source}:{where}' cannot be read: {one_line(error)}; "
            "give mean, std, interpolation and image_size, and no model_name"
        ) from error
    raise InputError(f"model_name '{source}:{where}' must begin with local-dir: or hf-hub:, or be a name in timm")
