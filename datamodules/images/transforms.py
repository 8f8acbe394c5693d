"""Transforms of an image before the model sees it: recipes by name, and pipelines of other libraries."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_dml.checks import check_choice, check_count
from lightning_dml.datamodules.images.timm_config import data_config
from lightning_dml.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # those that PIL and timm both name

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """Numbers of a transform that somebody published, or that we chose.

    Args:
        image_size: side of the square that the model sees, in pixels.
        resize: shorter side before the crop, in pixels.
        crop_scale: smallest and largest share of the area in a random crop; None crops the centre in training too.
        flip: chance of a horizontal flip in training.
        source: where the numbers come from.
    """

    image_size: int
    resize: int
    crop_scale: tuple[float, float] | None
    flip: float
    source: str


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "standard": Recipe(224, 256, (0.2, 1.0), 0.5, "XBM, arXiv 1912.06798, official code research-xbm at 223ecdc"),
        "multi_similarity": Recipe(
            227, 256, (0.16, 1.0), 0.5, "multi-similarity, arXiv 1904.06627, official code research-ms-loss at b68507d"
        ),
        "plain": Recipe(224, 256, None, 0.0, "ours: what evaluation sees, in training as well"),
    }
)
"""Recipes by name. The normalisation is not theirs: it is the model's, see `image_settings`."""


@dataclass(frozen=True)
class ImageSettings:
    """Numbers of `train_transform` and `eval_transform`, as `image_settings` decides on them.

    Args:
        image_size: side of the square that the model sees, in pixels.
        resize: shorter side before the crop, in pixels.
        mean: per channel, of images in [0, 1].
        std: per channel, of images in [0, 1].
        interpolation: one of `INTERPOLATIONS`.
        crop_scale: smallest and largest share of the area in a random crop; None crops the centre in training too.
        flip: chance of a horizontal flip in training.
    """

    image_size: int
    resize: int
    mean: Colour
    std: Colour
    interpolation: str
    crop_scale: tuple[float, float] | None
    flip: float


def image_settings(
    recipe: str = "standard",
    model_name: str | None = None,
    *,
    image_size: int | None = None,
    resize: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_scale: Sequence[float] | None = None,
    config: Mapping[str, Any] | None = None,
) -> ImageSettings:
    """Decides on the numbers of the transforms: those given, then the model's, then the recipe's.

    The model's data config gives mean, standard deviation and interpolation. It gives the size as well where the model
    takes only one (timm says `fixed_input_size`, as most ViTs do); a model that takes any size gets the recipe's.
    The config is looked up by name, no network is built; only an `hf-hub:` name may ask the hub.

    Args:
        recipe: a name in `RECIPES`.
        model_name: timm model, `architecture` or `architecture.tag`, or an `hf-hub:` or `local-dir:` name; None takes
            ImageNet's mean and standard deviation, and bilinear interpolation.
        image_size: side of the square that the model sees, in pixels.
        resize: shorter side before the crop, in pixels; None keeps the recipe's ratio to `image_size`.
        mean: per channel, of images in [0, 1]; one number counts for all three.
        std: per channel, of images in [0, 1]; one number counts for all three.
        interpolation: one of `INTERPOLATIONS`.
        crop_scale: smallest and largest share of the image's area in a random crop, within (0, 1].
        config: a model's data config, as `timm_config.module_config` gives it, where there is no `model_name`.

    Raises:
        InputError: for an unknown recipe, model or interpolation (the nearest names are given), a number out of
            range, or a model whose fixed input is not square.

    Examples:
        >>> image_settings(image_size=448).resize
        512
        >>> image_settings("multi_similarity", "resnet50.a1_in1k").interpolation
        'bicubic'
    """
    check_choice("recipe", recipe, RECIPES)
    numbers = RECIPES[recipe]
    config = data_config(model_name) if model_name is not None else config or {}
    if image_size is None:
        image_size = _fixed_size(config, model_name) or numbers.image_size
    check_count("image_size", image_size)
    if resize is None:
        resize = round(numbers.resize * image_size / numbers.image_size)
    check_count("resize", resize, image_size, hint=f"the crop of image_size={image_size} must fit in")
    scale = numbers.crop_scale if crop_scale is None else _crop_scale(crop_scale)
    interpolation = interpolation or config.get("interpolation", "bilinear")
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    deviation = _colour("std", config.get("std", IMAGENET_STD) if std is None else std)
    if min(deviation) <= 0:
        raise InputError(f"std must be positive, got {deviation}")
    return ImageSettings(
        image_size=image_size,
        resize=resize,
        mean=_colour("mean", config.get("mean", IMAGENET_MEAN) if mean is None else mean),
        std=deviation,
        interpolation=interpolation,
        crop_scale=scale,
        flip=numbers.flip,
    )


def train_transform(settings: ImageSettings) -> v2.Compose:
    """Resize, random crop, flip and normalisation: PIL image in RGB -> float32 (3, image_size, image_size)."""
    mode = v2.InterpolationMode(settings.interpolation)
    crop: Any = v2.CenterCrop(settings.image_size)
    if settings.crop_scale is not None:
        crop = v2.RandomResizedCrop(settings.image_size, scale=settings.crop_scale, interpolation=mode)
    flip = [v2.RandomHorizontalFlip(settings.flip)] if settings.flip else []
    return v2.Compose([v2.Resize(settings.resize, interpolation=mode), crop, *flip, *_to_float(settings)])


def eval_transform(settings: ImageSettings) -> v2.Compose:
    """Resize, centre crop and normalisation: PIL image in RGB -> float32 (3, image_size, image_size)."""
    mode = v2.InterpolationMode(settings.interpolation)
    crop = v2.CenterCrop(settings.image_size)
    return v2.Compose([v2.Resize(settings.resize, interpolation=mode), crop, *_to_float(settings)])


def resize_image(image: Image.Image, resize: int, interpolation: str = "bilinear") -> Image.Image:
    """Scales the shorter side to `resize` pixels, which is the first step of both transforms.

    Both transforms make the same of an image that has been through it and of one that has not.

    Args:
        image: in any size.
        resize: pixels, as in `ImageSettings`.
        interpolation: one of `INTERPOLATIONS`.
    """
    scaled: Image.Image = v2.Resize(resize, interpolation=v2.InterpolationMode(interpolation))(image)
    return scaled


def as_transform(pipeline: Callable[..., Any]) -> Callable[[Image.Image], Tensor]:
    """Makes any pipeline a function of a PIL image that returns a tensor and draws from torch's random numbers.

    A pipeline of torchvision (v1 or v2), or any other callable, gets the PIL image. One of albumentations gets
    `image=`, uint8 (H, W, 3), and its result becomes (C, H, W) float32; what is uint8 then is divided by 255. It is
    copied, and its random numbers are seeded anew for each image from torch's, so the seed that it was made with does
    not count; images then come out the same for any number of workers.

    Args:
        pipeline: PIL image -> tensor, or a pipeline of albumentations.

    Returns:
        A callable that can be pickled where the pipeline can. It raises an `InputError` on the first image if the
        result is not a tensor.

    Raises:
        InputError: if `pipeline` cannot be called.
    """
    if isinstance(pipeline, _CheckedPipeline):
        return pipeline
    if not callable(pipeline):
        raise InputError(f"a transform must be a function of a PIL image, got {pipeline!r}")
    return _CheckedPipeline(_Albumentations(pipeline) if _is_albumentations(pipeline) else pipeline)


class _CheckedPipeline:
    """A pipeline that must return tensors."""

    def __init__(self, pipeline: Callable[[Image.Image], Any]) -> None:
        self.pipeline = pipeline

    def __call__(self, image: Image.Image) -> Tensor:
        outcome = self.pipeline(image)
        if not isinstance(outcome, Tensor):
            raise InputError(
                f"the transform {self.pipeline!r} must return a tensor (C, H, W), got {type(outcome).__name__}: end it "
                "with v2.PILToTensor() and v2.ToDtype(torch.float32, scale=True), or what does the same"
            )
        return outcome

    def __repr__(self) -> str:
        return repr(self.pipeline)


class _Albumentations:
    """A pipeline of albumentations as a function of a PIL image."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = copy.deepcopy(pipeline)
        _forget_seeds(self.pipeline)

    def __call__(self, image: Image.Image) -> Any:
        seed = int(torch.randint(2**32, ()))
        with _seeded_globals(seed):
            # Not set_random_seed: in a worker, newer releases add torch's seed to it.
            if hasattr(self.pipeline, "set_random_state"):
                self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
            outcome = self.pipeline(image=np.array(image))["image"]
        if isinstance(outcome, np.ndarray):
            outcome = torch.from_numpy(
                np.ascontiguousarray(outcome if outcome.ndim == 2 else outcome.transpose(2, 0, 1))
            )
            outcome = outcome[None] if outcome.ndim == 2 else outcome
        if not isinstance(outcome, Tensor):
            return outcome
        return outcome.float() / 255 if outcome.dtype == torch.uint8 else outcome.float()

    def __repr__(self) -> str:
        return repr(self.pipeline)


def _is_albumentations(pipeline: Any) -> bool:
    return any(base.__module__.split(".")[0] == "albumentations" for base in type(pipeline).__mro__)


def _forget_seeds(pipeline: Any) -> None:
    """Takes a pipeline's own seed away, to which newer releases go back in each worker."""
    if getattr(pipeline, "seed", None) is not None and hasattr(pipeline, "set_random_seed"):
        pipeline.set_random_seed(None)
    for inner in getattr(pipeline, "transforms", ()):
        _forget_seeds(inner)


@contextlib.contextmanager
def _seeded_globals(seed: int) -> Iterator[None]:
    """Seeds the global generators, from which releases before 1.4.21 draw, as do functions in a pipeline."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setRNGSeed(seed % 2**31)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _to_float(settings: ImageSettings) -> list[Any]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(settings.mean, settings.std)]


def _fixed_size(config: Mapping[str, Any], model_name: str | None) -> int | None:
    if not config.get("fixed_input_size"):
        return None
    _, height, width = config["input_size"]
    if height != width:
        name = "" if model_name is None else f" {model_name!r}"
        raise InputError(
            f"the model{name} takes images of {height} x {width} only, and the recipes make squares: give image_size "
            "or transforms of your own"
        )
    return int(height)


def _crop_scale(value: Sequence[float]) -> tuple[float, float]:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= 1:
        raise InputError(f"crop_scale must be two ascending numbers in (0, 1], got {tuple(value)}")
    return float(value[0]), float(value[1])


def _colour(name: str, value: Sequence[float]) -> Colour:
    if len(value) not in (1, 3):
        raise InputError(f"{name} must be 3 numbers, one for each channel, or 1 for all of them, got {tuple(value)}")
    red, green, blue = (float(part) for part in (value if len(value) == 3 else (value[0],) * 3))
    return red, green, blue
