"""Figures and pictures of the HTML report: what they show is what they were given."""

import base64
import io
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from legible import assert_legible
from PIL import Image

from robust_moe.evaluation import figures
from robust_moe.evaluation.html_report.blocks import Picture
from robust_moe.evaluation.html_report.pictures import example_section

RESULTS = {
    "data": {"classes": ["cat", "dog", "eel"]},
    "eps": "8/255",
    "norm": "Linf",
    "clean": 0.9944,
    "robust": 0.5,
    "robust_interval": [0.4, 0.6],
    "curve": {"eps": [radius / 255 for radius in range(1, 21)], "robust": np.linspace(0.95, 0.1, 20).tolist()},
}


def test_figures_keep_words_that_look_like_markup_or_mathematics():
    word = 'id="a" #2b6cb0 url(#a) $b'
    shown = {"clean": 0.9, "robust": 0.5, "clean_interval": [0.8, 1.0], "robust_interval": [0.4, 0.6]}
    rows = [(word, shown), ("_hidden", shown), ("$x^2$", shown), ("l" * 100, shown)]
    root = ElementTree.fromstring(figures.inline_svg(figures.tradeoff(rows), "name", "label"))
    texts = ["".join(text.itertext()) for text in root.iter("text")]
    assert {word, "_hidden", "$x^2$", "l" * 39 + "…"} <= set(texts)


def heat_maps(root: ElementTree.Element) -> list[np.ndarray]:
    files = [base64.b64decode(image.get("href").partition(",")[2]) for image in root.iter("image")]
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]


def colors(shares: np.ndarray, top: float) -> np.ndarray:
    return matplotlib.colormaps[figures.HEAT](shares / top, bytes=True)[..., :3]


def test_heat_maps_show_the_shares():
    shares = np.array([[0.25, 0.75, 0.5], [0.1, 0.9, 0.5]])
    figure = figures.routing_map({"natural": shares[0], "attacked": shares[1]})
    drawn, *_ = heat_maps(ElementTree.fromstring(figures.inline_svg(figure, "name", "label")))
    np.testing.assert_array_equal(drawn, colors(shares, 1.0))  # even use, a half, is in the middle
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["natural", "attacked"]
    figure = figures.class_map({"clean": shares.T.tolist(), "adversarial": shares[::-1].T.tolist()}, list("abc"))
    natural, attacked, *_ = heat_maps(ElementTree.fromstring(figures.inline_svg(figure, "name", "label")))
    np.testing.assert_array_equal(natural, colors(shares, 0.9))  # a row an expert, a column a class
    np.testing.assert_array_equal(attacked, colors(shares[::-1], 0.9))


def test_layers_with_fewer_experts_and_classes_without_images_leave_cells_blank():
    shares = figures.routing_map({"a": [1.0], "b": [0.5, 0.5], "c": [0.0, 1.0]}).axes[0].images[0].get_array()
    assert shares.mask.tolist() == [[False, True], [False, False], [False, False]]
    by_class = {"clean": [[0.25, 0.75], None], "adversarial": [[1.0, 0.0], [None, None]]}
    natural, attacked, *_ = figures.class_map(by_class, ["cat", "dog"]).axes
    assert natural.images[0].get_array()[:, 0].tolist() == [0.25, 0.75]
    for axes in (natural, attacked):
        assert axes.images[0].get_array().mask[:, 1].all()


def test_curve_figure_shows_the_numbers():
    axes = figures.curve(RESULTS).axes[0]
    line, clean = axes.lines[:2]
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, 21), rtol=1e-12)
    np.testing.assert_array_equal(line.get_ydata(), np.linspace(0.95, 0.1, 20))
    assert (clean.get_xdata(), clean.get_ydata()) == ([0], [0.9944])
    assert axes.get_xlabel() == "radius ε (Linf, in 255ths)"
    plain = figures.curve(dict(RESULTS, norm="L2", eps="1/2", curve={"eps": [0.5, 0.25], "robust": [0.1, 0.6]})).axes[0]
    assert plain.lines[0].get_xdata().tolist() == [0.25, 0.5]
    assert plain.lines[0].get_ydata().tolist() == [0.6, 0.1]
    assert plain.get_xlabel() == "radius ε (L2)"


def test_single_experts_figure_shows_dots_and_the_gated_lines():
    experts = [{"expert": 0, "clean": 0.9, "robust": 0.4}, {"expert": 1, "clean": 0.8, "robust": None}]
    lines = figures.single_experts(experts, {"clean": 0.95, "robust": 0.5}).axes[0].lines
    assert lines[0].get_ydata() == [0.95, 0.95]
    assert lines[2].get_ydata() == [0.5, 0.5]
    assert lines[1].get_xydata().tolist() == [[0, 0.9], [1, 0.8]]
    assert lines[3].get_xydata().tolist() == [[0, 0.4]]


def pictures(samples: dict[str, np.ndarray]) -> list[list[Picture]]:
    return [example.images for example in example_section(RESULTS, samples).blocks[1].pictures]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_are_the_image_its_perturbation_and_the_attacked_one(channels, samples_of):
    samples = samples_of(channels=channels)
    drawn = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.source.partition(",")[2])))).astype(int)
        for picture in pictures(samples)[0]
    ]
    assert {image.shape[:2] for image in drawn} == {(8, 8)}
    before, after = samples["examples/clean"][0], samples["examples/adversarial"][0]
    magnified = 0.5 + 10 * (after - before)  # 10: 0.5 / 0.03, rounded down to a round number
    for shown, image in zip(drawn, (before, magnified, after), strict=True):
        pixels = 255 * image.transpose(1, 2, 0)
        np.testing.assert_allclose(shown, pixels if channels == 3 else pixels.mean(-1), atol=1.01)


def test_pictures_say_what_they_are(samples_of):
    text, examples = example_section(RESULTS, samples_of()).blocks
    assert "the perturbation × 10 around grey" in text.text
    assert [example.caption for example in examples.pictures] == [
        *("Image 0: cat → dog", "Image 10: dog, seen as cat → eel", "Image 20: eel → 3")
    ]
    assert [picture.alt for picture in examples.pictures[1].images] == [
        *("image 10, a dog, clean", "its perturbation, 10 times magnified", "image 10 attacked, taken for eel")
    ]


@pytest.mark.parametrize(("change", "factor"), [(8 / 255, "10"), (0.1, "5"), (1.0, "0.5"), (1e-4, "5000"), (0.0, "1")])
def test_magnification_fills_the_grey_scale_and_not_more(change, factor, samples_of):
    samples = samples_of()
    samples["examples/clean"][:] = 0
    samples["examples/adversarial"] = samples["examples/clean"] + np.float32(change)
    assert f"the perturbation × {factor} around grey" in example_section(RESULTS, samples).blocks[0].text


def test_bytes_and_floats_give_the_same_pictures(samples_of):
    octets = {
        name: np.rint(255 * array).astype(np.uint8) if array.ndim == 4 else array
        for name, array in samples_of().items()
    }
    floats = {name: array / 255 if array.ndim == 4 else array for name, array in octets.items()}
    assert pictures(octets) == pictures(floats)


def test_figures_are_legible_at_400_pixels():
    shown = {"clean": 0.9, "robust": 0.5, "clean_interval": [0.8, 1.0], "robust_interval": [0.4, 0.6]}
    experts = [{"expert": number, "clean": 0.9, "robust": 0.4} for number in range(8)]
    use = [[0.25] * 4] * 10
    for figure in (
        figures.tradeoff([(f"run {number} {'x' * 40}", shown) for number in range(5)]),
        figures.curve(RESULTS),
        figures.single_experts(experts, {"clean": 0.95, "robust": 0.5}),
        figures.routing_map({"layer4.1: natural": [0.25] * 4, "layer4.1: attacked": [0.25] * 4}),
        figures.class_map({"clean": use, "adversarial": use}, list(map(str, range(10)))),
    ):
        assert_legible(figure)
        assert "min-width:0px" in figures.inline_svg(figure, "name", "label")  # nor does the page scroll


def test_a_figure_too_wide_to_shrink_scrolls():
    use = [[0.25] * 4] * 100
    figure = figures.class_map({"clean": use, "adversarial": use}, list(map(str, range(100))))
    (least,) = re.findall(r"min-width:(\d+)px", figures.inline_svg(figure, "name", "label"))
    assert int(least) > 600
