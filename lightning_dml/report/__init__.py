"""Figures and tables of what was found."""

from lightning_dml.report.curve_figure import DrawnCurve, curve_figure, save_curves

__all__ = ["DrawnCurve", "curve_figure", "save_curves"]
