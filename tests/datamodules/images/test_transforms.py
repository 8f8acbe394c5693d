"""Transforms: the numbers must be those of the paper and of the model, and the randomness must be torch's."""

from __future__ import annotations

import json
import pickle
import random
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.transforms import v2

from lightning_dml.datamodules.images.datasets import LabelledImages
from lightning_dml.datamodules.images.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    RECIPES,
    as_transform,
    eval_transform,
    image_settings,
    resize_image,
    train_transform,
)
from lightning_dml.datamodules.seeded_index import SeededIndex
from lightning_dml.errors import InputError


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    """Noise, in which every pixel tells where it came from."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seeded(transform: Callable[[Any], Tensor], image: Image.Image, seed: int = 0) -> Tensor:
    """The image under a seed of torch."""
    torch.manual_seed(seed)
    return transform(image)


def test_recipes_are_those_of_the_papers() -> None:
    """Results are compared with the papers', so a recipe must not drift; the numbers are of datasets.md."""
    standard, multi_similarity, plain = (image_settings(name) for name in RECIPES)
    assert (standard.resize, standard.image_size, standard.crop_scale, standard.flip) == (256, 224, (0.2, 1), 0.5)
    assert (multi_similarity.resize, multi_similarity.image_size) == (256, 227)
    assert (multi_similarity.crop_scale, multi_similarity.flip) == ((0.16, 1), 0.5)
    assert (plain.resize, plain.image_size, plain.crop_scale, plain.flip) == (256, 224, None, 0)
    for recipe in (standard, multi_similarity, plain):
        assert (recipe.mean, recipe.std, recipe.interpolation) == (IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    assert all(recipe.source for recipe in RECIPES.values())


@pytest.mark.parametrize(
    "name", ["resnet50.a1_in1k", "resnet50", "test_resnet", "test_resnet.r160_in1k", "mobilenetv3_small_050"]
)
def test_normalisation_is_the_models(name: str) -> None:
    """Pretrained weights expect the numbers that they were trained with; the oracle is timm with the model built."""
    resolve: Any = timm.data.config.resolve_model_data_config
    oracle = resolve(timm.create_model(name, pretrained=False))
    settings = image_settings(model_name=name)
    assert (settings.mean, settings.std) == (oracle["mean"], oracle["std"])
    assert settings.interpolation == oracle["interpolation"]
    assert (settings.image_size, settings.resize) == (224, 256)  # the recipe's: the model takes any size


def test_the_size_of_a_model_with_one_size_only() -> None:
    """A ViT built for 384 pixels fails on 224; one that takes any size is trained as the recipe says."""
    settings = image_settings(model_name="vit_tiny_patch16_384")
    assert (settings.image_size, settings.resize) == (384, round(384 * 256 / 224))
    assert image_settings("multi_similarity", "vit_tiny_patch16_384").resize == round(384 * 256 / 227)
    assert image_settings(model_name="vit_tiny_patch16_384", image_size=96).image_size == 96  # what is given wins


def test_a_model_in_a_folder(tmp_path: Path) -> None:
    """A fine-tuned model is kept with its config, in the form of older timm or of newer."""
    config = {"architecture": "test_vit", "mean": [0.1, 0.2, 0.3], "input_size": [3, 64, 64], "fixed_input_size": True}
    for form in (config, {"architecture": "test_vit", "pretrained_cfg": config}):
        (tmp_path / "config.json").write_text(json.dumps(form))
        settings = image_settings(model_name=f"local-dir:{tmp_path}")
        assert settings.mean == (0.1, 0.2, 0.3) and settings.image_size == 64
    config["input_size"] = [3, 64, 32]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"64 x 32 only.*give image_size"):
        image_settings(model_name=f"local-dir:{tmp_path}")
    with pytest.raises(
        InputError, match=r"data config of model_name 'local-dir:.*none' cannot be read.*give mean, std"
    ):
        image_settings(model_name=f"local-dir:{tmp_path / 'none'}")


def test_a_model_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the user must learn how to do without it; the hub is asked for the config alone."""
    asked: list[str] = []

    def answer(name: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
        asked.append(name)
        if name == "nobody/nothing":
            raise OSError("no network")
        return {"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}, "test_vit", {}

    monkeypatch.setattr(timm.models, "load_model_config_from_hf", answer)
    settings = image_settings(model_name="hf-hub:somebody/model")
    assert settings.mean == (0.1, 0.2, 0.3) and settings.image_size == 224
    with pytest.raises(InputError, match=r"'hf-hub:nobody/nothing' cannot be read: no network; give mean, std"):
        image_settings(model_name="hf-hub:nobody/nothing")
    assert asked == ["somebody/model", "nobody/nothing"]


def test_numbers_that_are_given_win() -> None:
    """A number in the config must be the one that runs."""
    settings = image_settings(
        "plain",
        "test_resnet",
        image_size=20,
        resize=30,
        mean=[0.5],
        std=(1, 2, 3),
        interpolation="lanczos",
        crop_scale=[0.3, 0.6],
    )
    assert (settings.image_size, settings.resize, settings.crop_scale) == (20, 30, (0.3, 0.6))
    assert (settings.mean, settings.std, settings.interpolation) == ((0.5, 0.5, 0.5), (1, 2, 3), "lanczos")
    assert image_settings(image_size=112).resize == 128 and image_settings(resize=300).image_size == 224


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"recipe": "standrad"},
            r"recipe must be one of standard, multi_similarity, plain, got 'standrad'; did you mean standard\?",
        ),
        ({"model_name": "resnet5"}, r"model_name 'resnet5' is not a timm model; did you mean .*resnet5.*list_models"),
        ({"model_name": "resnet50.nope"}, r"'resnet50.nope' has a tag that timm does not know; .*resnet50.a1_in1k"),
        ({"model_name": "ftp:x"}, "'ftp:x' must begin with local-dir: or hf-hub:"),
        (
            {"interpolation": "bicubical"},
            r"interpolation must be one of nearest, .*, got 'bicubical'; did you mean bicubic\?",
        ),
        (
            {"image_size": 0},
            "image_size must be an integer of at least 1, got 0",
        ),
        ({"resize": 100}, "resize must be an integer of at least 224, got 100; the crop of image_size=224"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale must be two ascending numbers in \(0, 1\], got \(0.0, 1.0\)"),
        ({"crop_scale": [0.8, 0.4]}, r"got \(0.8, 0.4\)"),
        ({"crop_scale": (0.5,)}, r"crop_scale must be two .* got \(0.5,\)"),
        ({"mean": (0.5, 0.5)}, r"mean must be 3 numbers, one for each channel, or 1 for all of them, got \(0.5, 0.5\)"),
        ({"std": (0.5, 0.5, 0)}, "std must be positive"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    """A wrong name or number is refused before any image is read, and the right one is near."""
    with pytest.raises(InputError, match=message):
        image_settings(**options)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_standard_transforms(interpolation: str) -> None:
    """Runs from before the recipes must stay the same; the steps stand here once more, as they were."""
    settings = image_settings(image_size=28, resize=32, interpolation=interpolation)
    mode = v2.InterpolationMode(interpolation)
    last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    crop = v2.RandomResizedCrop(28, scale=(0.2, 1.0), interpolation=mode)
    train = v2.Compose([v2.Resize(32, interpolation=mode), crop, v2.RandomHorizontalFlip(0.5), *last])
    evaluate = v2.Compose([v2.Resize(32, interpolation=mode), v2.CenterCrop(28), *last])
    for seed in range(4):
        ours, theirs = (seeded(transform, picture(), seed) for transform in (train_transform(settings), train))
        assert torch.equal(ours, theirs) and ours.shape == (3, 28, 28) and ours.dtype == torch.float32
    assert torch.equal(eval_transform(settings)(picture()), evaluate(picture()))


def test_the_plain_recipe_trains_on_what_it_evaluates() -> None:
    """It is for those who augment elsewhere, or not at all; any chance in it would be one too many."""
    settings = image_settings("plain", image_size=28)
    expected = eval_transform(settings)(picture())
    assert all(torch.equal(seeded(train_transform(settings), picture(), seed), expected) for seed in range(6))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    train_transform(settings)(picture())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(90, 70), (70, 91), (32, 50), (20, 31)])
def test_an_image_that_is_scaled_already(interpolation: str, size: tuple[int, int]) -> None:
    """The cache keeps scaled images: training from it must be the same bit for bit."""
    settings = image_settings(image_size=28, resize=32, interpolation=interpolation)
    image = picture(*size)
    scaled = resize_image(image, settings.resize, settings.interpolation)
    assert min(scaled.size) == 32 and resize_image(scaled, 32, interpolation).tobytes() == scaled.tobytes()
    assert torch.equal(eval_transform(settings)(scaled), eval_transform(settings)(image))
    for seed in range(3):
        assert torch.equal(*(seeded(train_transform(settings), source, seed) for source in (scaled, image)))


def test_scaling_uses_the_interpolation() -> None:
    """Each model was trained with its own; PIL, asked directly, is the oracle."""
    image = picture()
    for name in INTERPOLATIONS:
        expected = image.resize((int(32 * 90 / 70), 32), Image.Resampling[name.upper()])
        assert resize_image(image, 32, name).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(
    "pipeline",
    [
        v2.Compose([v2.RandomCrop(8), v2.PILToTensor()]),
        v2.Compose([v2.RandomCrop(8), v2.ToImage()]),
        v1.Compose([v1.RandomCrop(8), v1.ToTensor()]),
    ],
)
def test_torchvision_pipelines_stay_as_they_are(pipeline: Any) -> None:
    """A user's pipeline is the user's business, in torchvision's new form and the old."""
    transform = as_transform(pipeline)
    assert torch.equal(seeded(transform, picture(), 3), seeded(pipeline, picture(), 3))
    assert repr(transform) == repr(pipeline) and as_transform(transform) is transform
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(seeded(again, picture(), 3), seeded(pipeline, picture(), 3))


def test_what_is_no_transform() -> None:
    """A forgotten ToTensor shows in the collation otherwise, in words that name neither image nor transform."""
    with pytest.raises(InputError, match=r"transform RandomCrop.* must return a tensor .*got Image: end it with"):
        as_transform(v2.RandomCrop(8))(picture())
    with pytest.raises(InputError, match="a transform must be a function of a PIL image, got 3"):
        as_transform(3)  # type: ignore[arg-type]


class Compose:
    """Stands for the class of albumentations: keyword arguments, a dict back, random numbers of its own."""

    def __init__(self, dtype: str = "uint8", source: str = "own") -> None:
        self.dtype = dtype
        self.source = source
        self.generator = np.random.default_rng()
        if source == "own":
            self.set_random_state = self._set_random_state

    def _set_random_state(self, generator: np.random.Generator, python: random.Random) -> None:
        self.generator = generator

    def __call__(self, *, image: Any) -> dict[str, Any]:
        """Adds noise, from its own generator or, as older releases do, from everybody's."""
        assert image.dtype == np.uint8 and image.ndim == 3 and image.flags.writeable
        draw: dict[str, Any] = {"own": self.generator.integers, "python": random.randrange, "numpy": np.random.randint}
        noise = draw[self.source](9)
        image = image // 2 + np.uint8(noise)
        if self.dtype == "grey":
            return {"image": image[..., 0]}
        if self.dtype == "none":
            return {"image": None}
        if self.dtype.startswith("tensor"):
            made = torch.from_numpy(image.transpose(2, 0, 1).copy())
            return {"image": made.double() if self.dtype.endswith("float") else made}
        return {"image": image.astype(self.dtype)}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[Compose]:
    """The class above, as if it came from a package of that name."""
    module = types.ModuleType("albumentations.core.stand_in")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made = type("StandIn", (Compose,), {"__module__": module.__name__, "__qualname__": "StandIn"})
    module.StandIn = made  # type: ignore[attr-defined]
    return type("Derived", (made,), {"__module__": __name__})


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("uint8", 255), ("float64", 1), ("float32", 1), ("grey", 255), ("tensor", 255), ("tensor float", 1)],
)
def test_results_of_albumentations_are_float_images(stand_in: type[Compose], dtype: str, scale: int) -> None:
    """With or without Normalize and ToTensorV2 at the end, the model gets (C, H, W) float32."""
    made = seeded(as_transform(stand_in(dtype)), picture())
    plain = torch.from_numpy(np.array(picture()).transpose(2, 0, 1)) // 2
    noise = made * scale - (plain[:1] if dtype == "grey" else plain)
    assert made.dtype == torch.float32 and made.shape == (1 if dtype == "grey" else 3, 70, 90)
    assert torch.allclose(noise, noise[0, 0, 0].round().expand_as(noise), atol=1e-3) and 0 <= noise.min() <= 8.01


@pytest.mark.parametrize("source", ["own", "python", "numpy"])
def test_randomness_of_albumentations_is_torchs(stand_in: type[Compose], source: str) -> None:
    """Its generators know nothing of our seeds: a run could not be repeated, and the workers would draw alike."""
    pipeline = stand_in(source=source)
    transform = as_transform(pipeline)
    random.seed(5)
    np.random.seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    images = [seeded(transform, picture(), seed) for seed in range(20)]
    assert all(torch.equal(seeded(transform, picture(), seed), image) for seed, image in enumerate(images))
    assert len({float(image.sum()) for image in images}) > 4
    assert len({float(transform(picture()).sum()) for _ in range(20)}) > 4  # without a new seed, one after the other
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[index]


def test_seeds_of_the_pipeline_are_forgotten(stand_in: type[Compose]) -> None:
    """Newer releases draw from such a seed again in every worker, and there alone; the user's object keeps it."""

    def build(*inner: Any) -> Any:
        made: Any = stand_in()
        made.seed, made.transforms = 7, list(inner)
        made.set_random_seed = types.MethodType(lambda self, seed: setattr(self, "seed", seed), made)
        return made

    pipeline = build(build())
    copied = as_transform(pipeline).pipeline.pipeline  # type: ignore[attr-defined]
    assert (copied.seed, copied.transforms[0].seed) == (None, None)
    assert (pipeline.seed, pipeline.transforms[0].seed) == (7, 7)


def test_a_result_without_an_image(stand_in: type[Compose]) -> None:
    """A result that is no tensor is named here too."""
    with pytest.raises(InputError, match=r"must return a tensor .* got NoneType"):
        as_transform(stand_in("none"))(picture())


class Pictures(LabelledImages):
    """A few images in memory."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        super().__init__([0] * 6, transform)

    def load(self, index: int) -> Image.Image:
        """Noise that follows from the index."""
        return picture(seed=int(index))


@pytest.mark.skipif(find_spec("albumentations") is None, reason="albumentations is not installed; it is no dependency")
@pytest.mark.parametrize("own_seed", [None, 137])
@pytest.mark.parametrize("to_tensor", [True, False])
def test_albumentations_over_workers(own_seed: int | None, to_tensor: bool) -> None:
    """Images are the same for any number of workers, others for another seed, and the user's object untouched."""
    albumentations: Any = __import__("albumentations.pytorch")
    last = [albumentations.pytorch.ToTensorV2()] if to_tensor else []
    nested = albumentations.Compose([albumentations.HorizontalFlip(p=0.5)], seed=own_seed)
    pipeline = albumentations.Compose(
        [
            nested,
            albumentations.RandomCrop(24, 24),
            albumentations.OneOf([albumentations.GaussNoise(p=1), albumentations.RandomBrightnessContrast(p=1)], p=0.8),
            albumentations.Normalize(),
            *last,
        ],
        seed=own_seed,
    )
    transform = as_transform(pipeline)
    assert repr(transform) == repr(pipeline)
    data = Pictures(pickle.loads(pickle.dumps(transform)))

    def epoch(workers: int, seed: int) -> list[Tensor]:
        indices = [SeededIndex(index, seed * 100 + index) for index in [*range(6), 0]]
        loader = DataLoader(data, batch_size=2, sampler=indices, num_workers=workers)
        return [image for batch in loader for image in batch["image"]]

    alone = epoch(0, 1)
    assert alone[0].shape == (3, 24, 24) and alone[0].dtype == torch.float32
    for workers in (0, 1, 2):
        assert all(torch.equal(*pair) for pair in zip(epoch(workers, 1), alone, strict=True)), workers
    assert not any(torch.equal(*pair) for pair in zip(epoch(0, 2), alone, strict=True))
    assert pipeline.seed == own_seed
