"""Figures and tables of what was found."""

from lightning_dml.report.curve_figure import DrawnCurve, curve_figure, save_curves
from lightning_dml.report.training_figure import save_training, training_figure

__all__ = ["DrawnCurve", "curve_figure", "save_curves", "save_training", "training_figure"]
