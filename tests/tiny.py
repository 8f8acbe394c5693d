"""A small data module and a small embedder without batch norm, so that ranks and processes can be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from lightning_dml import MemoryBank, MetricLearningModule
from lightning_dml.datamodules import RetrievalDataModule
from lightning_dml.datamodules.images.datasets import ArrayDataset
from lightning_dml.losses import ContrastiveLoss

CLASSES, PER_CLASS, SIDE = 12, 5, 8


class TinyData(RetrievalDataModule):
    """12 classes of 5 noisy 8 x 8 images for training, 12 others for validation; noise is added by augmentation."""

    def __init__(self, augment: bool = False, **options: Any) -> None:
        super().__init__(**{"classes_per_batch": 4, "samples_per_class": 2, "eval_batch_size": 7, **options})
        self.augment = augment

    def setup(self, stage: str | None = None) -> None:
        """Draws the same images in every process, so that runs can be compared."""
        generator = np.random.default_rng(0)
        centres = generator.integers(0, 256, (2 * CLASSES, 1, SIDE, SIDE))
        noise = generator.integers(-60, 60, (2 * CLASSES, PER_CLASS, SIDE, SIDE))
        images = np.clip(centres + noise, 0, 255).astype(np.uint8).reshape(2, -1, SIDE, SIDE)
        labels = np.repeat(np.arange(2 * CLASSES), PER_CLASS).reshape(2, -1)
        to_float = v2.ToDtype(torch.float32, scale=True)
        train = v2.Compose([v2.RandomAffine(10), to_float]) if self.augment else to_float
        self.train_set = ArrayDataset(images[0], labels[0], train)
        self.val_set = self.test_set = ArrayDataset(images[1], labels[1], to_float)
        super().setup(stage)


class TinyEmbedder(nn.Module):
    """8 x 8 pixels -> 6 columns of unit length."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.Tanh(), nn.Linear(16, 6))

    def forward(self, images: Tensor) -> Tensor:
        """Normalises in float32 at least, as autocast would round the unit length away."""
        projected = self.net(images)
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=1)


def tiny_module(**options: Any) -> MetricLearningModule:
    """A module whose learning rate makes a difference within a few steps."""
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9), **options}
    return MetricLearningModule(TinyEmbedder(), options.pop("loss", ContrastiveLoss(0.3)), **options)


def bank_of(module: Any) -> MemoryBank:
    """The bank that a training must have left in the module, ours or a foreign one."""
    assert isinstance(module.memory_bank, MemoryBank)
    return module.memory_bank


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
