"""A folder of images as users have them, and the config that they would write for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = dict.fromkeys("abcdefgh", 4)
FOLDER_CONFIG = """
model:
  class_path: lightning_dml.MetricLearningModule
  init_args:
    embedder:
      class_path: lightning_dml.Embedder
      init_args: {model_name: test_resnet, dim: 16}
    loss: {class_path: lightning_dml.losses.MultiSimilarityLoss}
data:
  class_path: lightning_dml.datamodules.FolderDataModule
  init_args: {root: images, image_size: 32, resize: 36, classes_per_batch: 3, samples_per_class: 2}
trainer:
  max_epochs: 1
  logger: false
  accelerator: cpu
  enable_checkpointing: false
  enable_progress_bar: false
"""


def pictures(root: Path, classes: dict[str, int], side: int = 40) -> None:
    """`root/<class>/<n>.png` of random noise."""
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
