import numpy as np
import pytest
from legible import assert_legible
from matplotlib.figure import Figure
from PIL import Image

from robust_moe.evaluation import plot_comparison, plot_routing, plot_training

EPOCHS = [
    {"epoch": e, "train_task_loss": 2 / e, "train_balance_loss": -1.3, "val_clean": 0.1 * e, "val_robust": 0.06 * e}
    for e in range(1, 6)
]
DENSE = [{k: v for k, v in line.items() if "balance" not in k} for line in EPOCHS]
ROUTING = [
    {
        "epoch": e,
        "split": split,
        "layer": layer,
        "selected": [0.2 * e, 1.0 - 0.2 * e, 0.5, 0.5],
        "first": [1.0, 0, 0, 0],
    }
    for e in range(1, 5)
    for split in ("val", "test")
    for layer in ("layer3.1", "layer4.1")
]
RESULTS = [
    (
        name,
        {
            "clean": clean,
            "robust": robust,
            "attacks": [{"name": "pgd", "chain": "pgd", "settings": {"steps": 20}}],
            "clean_interval": [clean - 0.02, clean + 0.01],
            "robust_interval": [robust - 0.03, robust + 0.03],
        },
    )
    for name, clean, robust in (("routed", 0.98, 0.84), ("dense", 0.97, 0.80), ("third", 0.9, 0.5))
]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that were saved, to look at what they show."""
    saved = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kw: (saved.append(self), real(self, path, **kw))[1])
    return saved


def assert_drawn(path) -> None:
    """A legible PNG with ink on it, and none cut off at the edges."""
    pixels = np.asarray(Image.open(path).convert("L"))
    assert min(pixels.shape) >= 300
    assert (pixels < 128).mean() > 0.005
    assert (pixels[:2] == 255).all()
    assert (pixels[-2:] == 255).all()


def test_training_curves_show_the_numbers(tmp_path, figures):
    plot_training(EPOCHS, tmp_path / "a.png", title="run")
    assert_drawn(tmp_path / "a.png")
    loss, accuracy, balance = figures[0].axes
    assert loss.lines[0].get_ydata().tolist() == [line["train_task_loss"] for line in EPOCHS]
    assert accuracy.lines[0].get_ydata().tolist() == [line["val_clean"] for line in EPOCHS]
    assert accuracy.lines[1].get_ydata().tolist() == [line["val_robust"] for line in EPOCHS]
    assert balance.lines[0].get_ydata().tolist() == [-1.3] * 5
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["clean", "robust", "best: 30.0%"]


def test_training_curves_of_a_dense_run_without_validation(tmp_path, figures):
    lines = [{"epoch": line["epoch"], "train_task_loss": line["train_task_loss"]} for line in DENSE]
    plot_training(lines, tmp_path / "a.png")
    assert_drawn(tmp_path / "a.png")
    assert len(figures[0].axes) == 2


def test_heat_map_shows_the_share_of_each_expert_and_epoch(tmp_path, figures):
    plot_routing(ROUTING, tmp_path / "a.png")
    assert_drawn(tmp_path / "a.png")
    maps = [axes for axes in figures[0].axes if axes.images]
    assert [axes.get_title().split()[0] for axes in maps] == ["layer3.1", "layer4.1"]
    shares = maps[0].images[0].get_array()
    assert shares.shape == (4, 4)  # experts x epochs
    np.testing.assert_allclose(shares[0], [0.2, 0.4, 0.6, 0.8])
    assert "even use: 50% each" in maps[0].get_title()


def test_heat_map_of_many_experts_and_epochs_leaves_out_the_numbers(tmp_path, figures):
    lines = [
        {"epoch": e, "split": "test", "layer": "l", "selected": [2 / 32] * 32, "first": [1 / 32] * 32}
        for e in range(1, 101)
    ]
    plot_routing(lines, tmp_path / "a.png")
    assert_drawn(tmp_path / "a.png")
    assert not figures[0].axes[0].texts


def test_comparison_shows_bars_points_and_intervals(tmp_path, figures):
    plot_comparison(RESULTS, tmp_path / "a.png")
    assert_drawn(tmp_path / "a.png")
    bars, points = figures[0].axes
    heights = [patch.get_height() for patch in bars.patches]
    assert heights == [0.98, 0.97, 0.9, 0.84, 0.80, 0.5]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["routed", "dense", "third"]
    assert [text.get_text() for text in points.get_legend().get_texts()] == ["routed", "dense", "third"]


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda path: plot_training([], path), "lines: expected at least one epoch"),
        (lambda path: plot_routing([], path), "lines: expected routing of 'test' images"),
        (lambda path: plot_comparison([], path), "rows: expected results of attacked models"),
        (lambda path: plot_comparison([("a", {"robust": None})], path), "rows: expected results of attacked models"),
    ],
)
def test_nothing_to_draw_is_said(tmp_path, draw, words):
    with pytest.raises(ValueError, match=words):
        draw(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_figures_are_legible_at_400_pixels(tmp_path, figures):
    plot_training([{**line, "train_loss": line["train_task_loss"] - 0.65} for line in EPOCHS], tmp_path / "a.png", "r")
    plot_routing(ROUTING, tmp_path / "b.png", title="digits-blockmoe: % of test inputs per expert")
    plot_comparison([(f"{name}-{'x' * 40}", results) for name, results in RESULTS], tmp_path / "c.png", "A title " * 12)
    for figure in figures:
        assert_legible(figure)
        title = figure._suptitle.get_window_extent()
        assert figure.bbox.x0 <= title.x0
        assert title.x1 <= figure.bbox.x1


def test_the_loss_of_a_training_is_drawn_beside_the_tasks_where_they_differ(tmp_path, figures):
    lines = [{**line, "train_loss": line["train_task_loss"] - 0.65} for line in EPOCHS]
    plot_training(lines, tmp_path / "a.png")
    loss, _, balance = figures[0].axes
    assert loss.lines[1].get_ydata().tolist() == [line["train_loss"] for line in lines]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        *("task loss", "loss: task and all weighted terms")
    ]
    assert "below 0 it is minus the\nentropy" in balance.get_title(loc="left")
    plot_training([{**line, "train_loss": line["train_task_loss"]} for line in DENSE], tmp_path / "b.png")
    assert len(figures[1].axes[0].lines) == 1


def test_no_interval_strikes_out_a_number(tmp_path, figures):
    rows = [(name, {**results, "robust": 0.03, "robust_interval": [0.0, 0.1]}) for name, results in RESULTS]
    plot_comparison(rows, tmp_path / "a.png")
    bars = figures[0].axes[0]
    tops = {round(results["clean_interval"][1], 9) for _, results in rows} | {0.1}
    heights = [text.get_position()[1] for text in bars.texts]
    assert len(heights) == 2 * len(rows)
    assert all(any(0 < height - top < 0.03 for top in tops) for height in heights)
    assert [text.get_text() for text in bars.texts] == ["98.0%", "97.0%", "90.0%", *["3.0%"] * 3]
