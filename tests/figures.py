"""Questions that several tests ask of a figure: what lies on what, and what is cut."""

from __future__ import annotations

import itertools

from matplotlib.figure import Figure
from matplotlib.text import Text


def overlaps(figure: Figure) -> bool:
    """True where the figure's legend covers any part of a panel or of the title, or leaves the figure."""
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    within = legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y0 >= 0 and legend.y1 <= figure.bbox.y1
    others = [*figure.axes, *(text for text in figure.texts if text.get_text())]
    return not within or any(legend.overlaps(other.get_window_extent()) for other in others)


def texts_of(figure: Figure) -> list[Text]:
    """All texts that are drawn: names, titles, labels, numbers of the scales, and those of the legend."""
    texts = [*figure.legends[0].get_texts(), figure.legends[0].get_title(), *figure.texts]
    for panel in figure.axes:
        texts += [panel.title, panel.xaxis.label, panel.yaxis.label, *panel.texts]
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            # matplotlib keeps numbers beyond the ends, which it does not draw.
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in texts if text.get_visible() and text.get_text()]


def texts_in_the_way(figure: Figure) -> list[str]:
    """Texts that leave the figure or lie on another text."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    whole = figure.bbox.padded(1)  # matplotlib's layout rounds to pixels
    cut = [text for text, box in boxes if not (whole.contains(box.x0, box.y0) and whole.contains(box.x1, box.y1))]
    pairs = itertools.combinations(boxes, 2)
    return cut + [f"{one[0]} on {other[0]}" for one, other in pairs if one[1].overlaps(other[1])]
