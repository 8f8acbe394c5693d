"""Matplotlib figures for whatever loggers a training has."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

DPI = 100


def log_figure(logger: Any, name: str, figure: Figure, step: int) -> bool:
    """Hands a figure to a logger; call it on rank zero.

    The loggers of MLflow, Comet and Neptune are known by the names of their classes, so that none of their libraries
    is imported. Of any other, `log_image(key, images, step)` is called where there is one, as Weights & Biases'
    logger has it, or `experiment.add_figure(tag, figure, global_step, close)`, as TensorBoard's has it.

    Args:
        logger: of Lightning, or anything like it.
        name: with slashes for the sections of a dashboard.
        figure: stays as it is.
        step: the optimizer step that it is of.

    Returns:
        Whether the logger takes figures.

    Raises:
        Exception: what the logger raises.
    """
    kinds = {kind.__name__ for kind in type(logger).__mro__}
    if "MLFlowLogger" in kinds:
        logger.experiment.log_figure(logger.run_id, figure, f"{name}/step_{step:06d}.png")
    elif "CometLogger" in kinds:
        logger.experiment.log_figure(figure_name=name, figure=figure, step=step)
    elif "NeptuneLogger" in kinds:
        logger.experiment[name].append(figure, step=step)
    elif callable(getattr(logger, "log_image", None)):
        logger.log_image(key=name, images=[pixels(figure)], step=step)
    elif callable(getattr(getattr(logger, "experiment", None), "add_figure", None)):
        # Closing would go through pyplot, which does not know the figure.
        logger.experiment.add_figure(name, figure, global_step=step, close=False)
    else:
        return False
    return True


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure as RGB, (H, W, 3), at 100 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return np.asarray(Image.open(buffer).convert("RGB"))
