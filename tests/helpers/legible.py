"""What a figure has to be to be read where a page shows it 400 pixels wide."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PAGE, SMALLEST = 400, 7.0  # pixels, and the least height of a letter's body in them


def assert_legible(figure: Figure) -> None:
    """No legend covers a graph or is cut off, and no text is too small."""
    FigureCanvasAgg(figure).draw()
    whole = figure.bbox
    for axes in figure.axes:
        legend = axes.get_legend()
        if legend is None:
            continue
        box = legend.get_window_extent()
        assert not box.overlaps(axes.get_window_extent()), "a legend over the data"
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 + 1, "a legend that is cut off"
        assert whole.y0 <= box.y0 and box.y1 <= whole.y1 + 1, "a legend that is cut off"
    shrunk = PAGE / (72 * figure.get_figwidth())  # pixels of the page for a point of the figure
    for axes in figure.axes:
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label):
            if text.get_text():
                assert text.get_fontsize() * shrunk >= SMALLEST, text.get_text()
