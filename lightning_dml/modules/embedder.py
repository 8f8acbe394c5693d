"""The embedder: timm backbone, pooling, projection, L2 norm."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dml.checks import check_count
from lightning_dml.errors import InputError, one_line

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Embedder(nn.Module):
    """Maps images to unit embeddings: timm backbone -> pooling -> linear projection -> L2 norm.

    Args:
        model_name: any timm model, `architecture` or `architecture.tag`; also timm's `hf-hub:` and `local-dir:` names.
        dim: columns of the embeddings; None leaves the pooled features as they are, without a projection.
        pretrained: load timm's weights for the name; needs the network or timm's cache.
        pooling: timm's global pooling, such as `avg`, `max`, `catavgmax` or, for ViTs, `token`; None is the model's
            own.
        in_chans: image channels.
        freeze_batch_norm: keep batch norm in evaluation mode, at its loaded statistics, as the multi-similarity release
            does (`set_bn_eval`); and keep its scale and shift untrained, which the release goes on learning.
        model_args: further arguments of `timm.create_model`, such as `drop_path_rate` or `img_size`.

    Raises:
        InputError: for a name that timm does not know (the nearest ones are named), a `dim` that is no positive
            integer, or settings that timm cannot build.

    Examples:
        >>> embedder = Embedder("test_resnet", dim=16).eval()
        >>> embedder(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        model_name: str = "resnet50",
        *,
        dim: int | None = 128,
        pretrained: bool = False,
        pooling: str | None = None,
        in_chans: int = 3,
        freeze_batch_norm: bool = False,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_model_name(model_name)
        if dim is not None:
            check_count("dim", dim, hint="None leaves the projection out")
        settings = dict(model_args or {}, num_classes=0, in_chans=in_chans)
        if pooling is not None:
            settings["global_pool"] = pooling
        try:
            self.backbone: nn.Module = timm.create_model(model_name, pretrained=pretrained, **settings)
            features = _feature_count(self.backbone, in_chans)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            raise InputError(
                f"timm could not build model_name {model_name!r} with pooling={pooling!r}, pretrained={pretrained} and "
                f"model_args={model_args}: {one_line(error)}"
            ) from error
        self.projection = nn.Identity() if dim is None else nn.Linear(features, dim)
        self.dim = features if dim is None else dim
        self.freeze_batch_norm = freeze_batch_norm
        if freeze_batch_norm:
            for layer in self._batch_norms():
                layer.requires_grad_(False)
            self.train(self.training)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of a batch.

        Args:
            images: (B, C, H, W) float.

        Returns:
            (B, dim) float32 with rows of length 1, also under autocast.
        """
        projected: Tensor = self.projection(self.backbone(images))
        return F.normalize(projected.float(), dim=1)

    def train(self, mode: bool = True) -> Embedder:
        """Sets the mode; frozen batch norm stays in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for layer in self._batch_norms():
                layer.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [layer for layer in self.modules() if isinstance(layer, _BATCH_NORMS)]


def _check_model_name(name: str) -> None:
    if ":" in name:  # a hub or a folder: timm itself says what is wrong there
        return
    architecture = name.split(".")[0]
    if timm.is_model(architecture):
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"model_name {name!r} is not a timm model{hint} timm.list_models() lists them all")


def _feature_count(backbone: nn.Module, in_chans: int) -> int:
    """Columns of the pooled backbone's output, from the model itself, since timm's attributes differ by family."""
    config: dict[str, Any] = getattr(backbone, "pretrained_cfg", {})
    _, height, width = config.get("input_size", (in_chans, 224, 224))
    if size := getattr(getattr(backbone, "patch_embed", None), "img_size", None):
        height, width = size
    training = backbone.training
    backbone.eval()
    try:
        # On the meta device a forward pass costs nothing and touches no weight.
        tensors = {name: torch.empty_like(t, device="meta") for name, t in _state(backbone).items()}
        image = torch.empty(1, in_chans, height, width, device="meta")
        with torch.no_grad():
            pooled: Tensor = torch.func.functional_call(backbone, tensors, (image,))
    finally:
        backbone.train(training)
    if pooled.ndim != 2:
        raise InputError(
            f"the backbone returns features of shape {tuple(pooled.shape)} for one image, not pooled to (1, features): "
            "choose a pooling such as 'avg'"
        )
    return pooled.shape[1]


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
