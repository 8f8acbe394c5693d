"""The embedder over timm's families, its pooling, precision and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dml import Embedder
from lightning_dml.errors import InputError


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_mambaout", "mobilenetv3_small_050"]
)
def test_any_family_gives_unit_rows(name: str) -> None:
    """Families of timm name their heads differently; each must work without special settings."""
    embedder = Embedder(name, dim=24, in_chans=1).eval()
    backbone: Any = embedder.backbone
    side = backbone.pretrained_cfg["input_size"][1]
    embeddings = embedder(torch.randn(2, 1, side, side))
    assert embeddings.shape == (2, 24)
    assert embedder.dim == 24
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(("pooling", "features"), [(None, 96), ("max", 96), ("catavgmax", 192)])
def test_pooling_and_no_projection(pooling: str | None, features: int) -> None:
    """The bank is sized by `dim`; a wrong one fails only at the first step."""
    embedder = Embedder("test_resnet", dim=None, pooling=pooling).eval()
    assert embedder.dim == features
    assert embedder(torch.randn(2, 3, 64, 64)).shape == (2, features)


def test_pooling_changes_what_comes_out() -> None:
    """A pooling option that timm ignores would be a setting without effect."""
    outputs = []
    for pooling in ("avg", "max"):
        torch.manual_seed(0)
        outputs.append(Embedder("test_resnet", pooling=pooling).eval()(torch.ones(1, 3, 64, 64)))
    assert not torch.allclose(*outputs)


def test_model_args_reach_timm() -> None:
    """Image and patch size can only be set through timm's own arguments."""
    embedder = Embedder("test_vit", model_args={"img_size": 32, "patch_size": 4})
    backbone: Any = embedder.backbone
    assert backbone.patch_embed.num_patches == 64


def test_building_keeps_the_random_stream_and_the_mode() -> None:
    """A trial forward to find the size must not shift seeds or leave the model in eval mode."""
    torch.manual_seed(0)
    Embedder("test_resnet", dim=8)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Embedder("test_resnet", dim=8)
    assert torch.equal(torch.rand(1), expected)
    assert Embedder("test_resnet").backbone.training


def test_frozen_batch_norm_neither_moves_nor_trains() -> None:
    """Lightning calls train() at each epoch, which would unfreeze it unnoticed."""
    embedder = Embedder("test_resnet", dim=8, freeze_batch_norm=True).train()
    norms = [layer for layer in embedder.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [layer.get_buffer("running_mean").clone() for layer in norms]
    embedder(torch.randn(4, 3, 64, 64)).sum().backward()
    assert norms and not any(layer.training for layer in norms)
    assert all(torch.equal(layer.get_buffer("running_mean"), mean) for layer, mean in zip(norms, before, strict=True))
    assert all(parameter.grad is None for layer in norms for parameter in layer.parameters())
    assert embedder.projection.training and embedder.projection.weight.grad is not None


def test_autocast_still_gives_float32_unit_rows() -> None:
    """Rows normalised in bfloat16 are not of unit length, and the losses assume that they are."""
    embedder = Embedder("test_resnet", dim=8).eval()
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = embedder(torch.randn(2, 3, 64, 64))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Embedder("resnet5O"), "'resnet5O'.*did you mean resnet50"),
        (lambda: Embedder("zzzzzzzz"), "'zzzzzzzz' is not a timm model"),
        (lambda: Embedder("test_resnet", dim=0), "dim.*0"),
        (lambda: Embedder("test_resnet", pooling=""), "pooling"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], words: str) -> None:
    """A mistyped model name is answered with the one that was meant."""
    with pytest.raises(InputError, match=words):
        call()
