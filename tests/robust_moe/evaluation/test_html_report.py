import re
import warnings
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from robust_moe.attacks.autoattack import MEMBERS
from robust_moe.evaluation import figures
from robust_moe.evaluation.html_report import write_report
from robust_moe.evaluation.html_report.terms import attack_terms
from robust_moe.evaluation.results import FORMAT

HOSTILE = '</title><script>alert("1")</script> $x_{$ _a & \' \x00\ud800 https://a.example/'
ATTACKS = ("ra", "ra_e", "ra_r", "ra_r_targeted", "joint", "transfer")
SHARES = ("sa", *ATTACKS, "union")
VOID = {"meta", "img", "br", "link", "input", "hr"}


def mixture(experts: int, classes: int, layers: int, rng: np.random.Generator) -> dict:
    def shares(*shape: int) -> list:
        drawn = rng.random(shape)
        return (2 * drawn / drawn.sum(-1, keepdims=True)).clip(0, 1).tolist()

    def spread() -> dict:
        levels = ("0.05", "0.25", "0.5", "0.75", "0.95")
        return {"mean": rng.random(), "max": rng.random(), "quantiles": {level: rng.random() for level in levels}}

    return {
        "layers": {
            f"layer{number}.1": {
                "experts": experts,
                "top_k": min(2, experts),
                "selected": {"clean": shares(experts), "adversarial": shares(experts)},
                "first": {"clean": shares(experts), "adversarial": shares(experts)},
                "expert_by_class": {"clean": shares(classes, experts), "adversarial": shares(classes, experts)},
                "collapsed": number == 1,
                "routing_change": rng.random(),
                "route_flips": rng.random(),
                "margin": spread(),
                "disagreement": {**spread(), "gradient_share": rng.random()},
                "lipschitz": {"points": 9, **spread()},
                "by_attack": {name: {"routing_change": rng.random(), "route_flips": rng.random()} for name in ATTACKS},
                "single_experts": [
                    {"expert": e, "clean": rng.random(), "robust": rng.random()} for e in range(experts)
                ],
                "protocols": {name: {"clean": rng.random(), "robust": rng.random()} for name in ("drop_top", "swap")}
                | {"random": None, "adversarial_route_on_clean": {"clean": rng.random(), "robust": None}},
            }
            for number in range(1, layers + 1)
        },
        **{name: rng.random() for name in SHARES},
        **{f"{name}_interval": [number / 8, 0.75] for number, name in enumerate(SHARES)},
        "lipschitz": {"points": 9, **spread()},
        "settings": {"eps": "8/255", "alpha": None},
    }


def results_of(n: int = 200, experts: int = 4, classes: int = 10, layers: int = 2, **changes) -> dict:
    rng = np.random.default_rng(experts + classes)
    attacks = [
        {
            "name": name,
            "chain": name,
            "settings": {"eps": "8/255", "steps": 100, "loss": None},
            "attacked": n - number,
            "broken": number,
            "robust_after": float(rng.random()),
            "alone": float(rng.random()) if number == 0 else None,
            "passes_per_image": {"forward": 20 + number, "backward": 20.5},
            "seconds": float(rng.random()),
        }
        for number, name in enumerate(("pgd", "apgd-ce"))
    ]
    return {
        "format": FORMAT,
        "checkpoint": "runs/a b/best.pt",
        "checkpoint_sha256": "0" * 64,
        "model": {"name": "resnet_small", "parameters": 1490750},
        "data": {"name": "digits", "split": "test", "classes": [f"class{c}" for c in range(classes)]},
        "count": n,
        "eps": "8/255",
        "norm": "Linf",
        "preset": "moe",
        "seed": 0,
        "clean": 0.9944444444444445,
        "clean_interval": [0.98, 0.9984751418340758],
        "robust": 0.5125,
        "robust_interval": [0.44, 0.58],
        "autoattack": None,
        "autoattack_interval": None,
        "attacks": attacks,
        "routing": {"layer1.1": {"selected": [0.25, 0.75], "first": [0.5, 0.5]}},
        "identity": {"model": "hash"},
        "flags": [
            {"name": "randomised", "raised": False, "message": "the same logits twice", "value": 0.0},
            {"name": "zero gradients", "raised": True, "message": "31 of 200 images", "value": 0.155},
            {"name": "square", "raised": False, "message": "no Square attack", "value": None},
        ],
        "curve": {
            "eps": [radius / 255 for radius in range(1, 21)],
            "robust": np.linspace(0.95, 0.1, 20).tolist(),
            "attack": {"name": "pgd", "steps": 20},
        },
        "moe": mixture(experts, classes, layers, rng),
        "samples": "samples.npz",
        "seconds": 12.5,
        "git": None,
        "hardware": "x86_64 CPU, 2 threads",
        "versions": {"torch": "2.11"},
        **changes,
    }


class Page(HTMLParser):
    """A page taken apart; fails on an element that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw, self.open, self.elements, self.tables, self.text = text, [], [], {}, ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows, self.caption = [], ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(["", None])
        elif tag == "data" and "td" in self.open:
            self.rows[-1][-1][1] = float(dict(attrs)["value"])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption.strip()] = self.rows

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] == "caption":
            self.caption += data
        elif "td" in self.open or "th" in self.open:
            self.rows[-1][-1][0] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def numbers(self, caption: str) -> list[list[float | None]]:
        """The exact numbers of a table's body, without the column that names the rows; None for words."""
        return [[value for _, value in row[1:]] for row in self.tables[caption][1:]]

    def svgs(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", self.raw, re.DOTALL)]


PLAIN = {"moe": None, "curve": None}  # fewer figures, for the tests that look at none


@pytest.fixture
def page(tmp_path, samples_of):
    """``page(results, samples, others)``: the page written, and taken apart."""

    def make(results=None, samples=None, others=()) -> Page:
        path = tmp_path / "new" / "report.html"
        results, samples = results or results_of(), samples_of() if samples is None else samples
        write_report(results, samples, path, others)
        assert [file.name for file in path.parent.iterdir()] == ["report.html"]
        return Page(path.read_text(encoding="utf-8"))

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, samples_of) -> Page:
    """The page of ``results_of()``, where nothing is missing."""
    path = tmp_path_factory.mktemp("whole") / "report.html"
    write_report(results_of(), samples_of(), path)
    return Page(path.read_text(encoding="utf-8"))


def assert_stands_alone(page: Page) -> None:
    """Nothing to fetch or to run, every id once, every reference to one that is there, a text for every picture."""
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = []
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("href", "src"):
                assert value.startswith(("#", "data:image/png;base64,")), value
                references += [value[1:]] if value[0] == "#" else []
            elif key == "aria-labelledby":
                references.append(value)
            references += re.findall(r"url\((?!#)(.*?)\)", value or "") + re.findall(r"url\(#(.*?)\)", value or "")
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert (attributes["role"], bool(attributes["aria-label"])) == ("img", True)
    assert set(references) <= set(ids)
    assert page.elements[0] == ("html", {"lang": "en"})
    assert "@import" not in page.raw
    assert "url(" not in re.search(r"<style>(.*?)</style>", page.raw, re.DOTALL)[1]


def test_page_stands_alone(whole):
    assert_stands_alone(whole)
    assert "://" not in whole.raw
    headings = [tag for tag, _ in whole.elements if tag in ("h1", "h2")]
    assert headings.count("h1") == 1
    assert len(whole.all("section")) == headings.count("h2") == 9
    assert all(attributes.get("scope") in ("col", "row") for attributes in whole.all("th"))


def test_headline_and_tables_hold_the_numbers_of_the_results(whole):
    results, got = results_of(), whole
    cards = re.findall(r'<dd><data value="(.*?)">(.*?)</data>', got.raw)
    assert cards == [
        ("0.9944444444444445", "99.4%"),
        ("0.5125", "51.2%"),
        ("200", "200"),
    ]
    assert "95 %: 98.0 to 99.8%" in got.text
    assert got.numbers("Every attack and its cost") == [
        [
            None,
            *(attack[key] for key in ("attacked", "broken", "robust_after", "alone")),
            *(attack["passes_per_image"][key] for key in ("forward", "backward")),
            attack["seconds"],
        ]
        for attack in results["attacks"]
    ]
    assert got.numbers("Robust accuracy for every radius") == [[share] for share in results["curve"]["robust"]]
    moe, layers = results["moe"], results["moe"]["layers"]
    shares = got.numbers("Share of all images, scored on the whole model")
    assert [row[0] for row in shares] == [moe[key] for key in SHARES]
    assert got.tables["Share of all images, scored on the whole model"][3][2][0] == "25.0 to 75.0%"
    assert [row[1:] for row in got.numbers("Share of the images sent to each expert")] == [
        [layer[choice][kind][expert] for choice in ("selected", "first") for kind in ("clean", "adversarial")]
        for layer in layers.values()
        for expert in range(4)
    ]
    assert [row[1:] for row in got.numbers("How far each attack changes the routes")] == [
        [change["routing_change"], change["route_flips"]]
        for layer in layers.values()
        for change in layer["by_attack"].values()
    ]
    assert [row[1:] for row in got.numbers("Accuracy under other choices of experts")] == [
        [shares["clean"], shares["robust"]]
        for layer in layers.values()
        for shares in layer["protocols"].values()
        if shares
    ]
    for name, layer in layers.items():
        assert got.numbers(f"Experts of {name} alone") == [
            [moe["sa"], moe["ra"]],
            *([row["clean"], row["robust"]] for row in layer["single_experts"]),
        ]
    measures = {row[0][0]: [value for _, value in row[1:]] for row in got.tables["Measures of every MoE layer"][1:]}
    of_layers = {
        "images whose route flips under RA, of tokens any route": lambda layer: layer["route_flips"],
        "routing change under RA (mean 1 − IoU of the experts selected)": lambda layer: layer["routing_change"],
        "share of the routing in the loss's gradient": lambda layer: layer["disagreement"]["gradient_share"],
    }
    for name, value in of_layers.items():
        assert measures[name] == [*map(value, layers.values())]
    spreads = {
        (row[0][0], row[1][0]): [value for _, value in row[2:]]
        for row in got.tables["Mean and quantiles over the images"][1:]
    }
    assert len(spreads) == 3 * len(layers) + 1
    for layer, name, spread in (
        ("layer2.1", "top-k margin of the gate's logits", layers["layer2.1"]["margin"]),
        ("layer1.1", "disagreement of the experts", layers["layer1.1"]["disagreement"]),
        ("whole model", "local Lipschitz estimate (from below)", moe["lipschitz"]),
    ):
        assert spreads[name, layer] == [spread["mean"], *spread["quantiles"].values(), spread["max"]]


def test_text_of_a_number_is_the_number_rounded(whole):
    for text, value in re.findall(r'<data value="(.*?)">(.*?)</data>', whole.raw):
        exact, shown = float(text), float(value.rstrip("%").replace(",", "")) / (100 if value.endswith("%") else 1)
        assert abs(exact - shown) <= max(0.0005000001 if value.endswith("%") else 0.0500001, 0.0005 * abs(exact))


def test_settings_and_provenance_are_all_there(whole):
    results = results_of()
    rows = {row[0][0]: row[1] for row in whole.tables["Evaluation"][1:]}
    assert rows["checkpoint_sha256"] == ["0" * 64, None]
    assert rows["versions.torch"][0] == "2.11"
    assert rows["model.parameters"][1] == 1490750
    assert rows["git"][0] == "–"
    shown_elsewhere = {"attacks", "curve", "flags", "identity", "moe", "routing"}
    assert {name.split(".")[0] for name in rows} == {
        name for name in results if name not in shown_elsewhere and not name.endswith("_interval")
    }
    assert [row[0][0] for row in whole.tables["Settings of apgd-ce"][1:]] == ["eps", "steps", "loss"]


def test_raised_flags_are_loud_and_come_first(page, whole):
    got = whole
    assert "1 sanity\nflag raised: do not trust these numbers" in got.text
    assert [[cell[0] for cell in row] for row in got.tables["1 raised, 1 passed, 1 not measured"][1:]] == [
        ["zero gradients", "⚠ raised", "31 of 200 images", "0.155"],
        ["randomised", "✓ passed", "the same logits twice", "0"],
        ["square", "not measured", "no Square attack", "–"],
    ]
    quiet = page(results_of(**PLAIN, flags=[{"name": "a", "raised": False, "message": "b", "value": 1}]))
    assert "do not trust" not in quiet.text
    assert "0 raised, 1 passed, 0 not measured" in quiet.tables


def test_hostile_words_are_only_words(page):
    results = results_of(checkpoint=HOSTILE, hardware=HOSTILE)
    results["model"]["name"] = HOSTILE
    results["data"]["classes"] = [HOSTILE] * 10
    results["attacks"][0]["name"] = HOSTILE
    results["flags"][1]["message"] = HOSTILE
    results["moe"]["layers"] = {HOSTILE: results["moe"]["layers"]["layer1.1"]}
    got = page(results, others=[(HOSTILE, results)])
    assert_stands_alone(got)
    assert got.text.count('</title><script>alert("1")</script>') >= 8
    assert got.all("a") == [{"href": attributes["href"]} for attributes in got.all("a")]


def test_figures_take_their_colors_and_font_from_the_page(whole):
    styles = [
        attributes["style"]
        for root in whole.svgs()
        for attributes in (e.attrib for e in root.iter())
        if "style" in attributes
    ]
    for name, (light, dark) in figures.PALETTE.items():
        assert f"--{name}: {light};" in whole.raw
        assert f"--{name}: {dark};" in whole.raw
    used = {found for style in styles for found in re.findall(r"(?<!, )#[0-9a-f]{6}", style)}
    assert used <= {"#ffffff", "#111111"}  # on heat maps, which look the same on every page
    assert not any("font-family" in style for style in styles)
    assert sum("var(--run0" in style for style in styles) >= 3


@pytest.mark.parametrize(
    ("changes", "sentence", "gone"),
    [
        ({"curve": None}, "against the radius ε. robust-moe eval 'runs/a b/best.pt' --preset moe", "curve"),
        ({"curve": None, "routing": {}}, "radius ε. robust-moe eval 'runs/a b/best.pt' --preset moe", "curve"),
        ({"moe": None, "routing": {}}, "the model is dense, it has none.", "routing"),
        ({"moe": None}, "single experts. robust-moe eval 'runs/a b/best.pt' --preset moe", "experts"),
        ({"flags": []}, "Sanity flags: no check ran. robust-moe eval 'runs/a b/best.pt' --preset moe", "flags"),
        (
            {"attacks": [], "robust": None, "robust_interval": None},
            "no attack ran. robust-moe eval 'runs/a b/best.pt' --preset quick",
            "tradeoff",
        ),
    ],
)
def test_what_was_not_measured_is_said_with_the_command_that_does(page, whole, changes, sentence, gone):
    got = page(results_of(**{**PLAIN, **changes}))
    assert gone in {attributes["id"] for attributes in whole.all("section")}
    assert gone not in {attributes["id"] for attributes in got.all("section")}
    assert sentence in got.text
    assert "Not in this report" not in whole.text
    assert_stands_alone(got)


def test_clean_evaluation_of_a_dense_model_without_samples(page):
    nothing = {"attacks": [], "robust": None, "flags": [], "curve": None, "moe": None, "routing": {}, "preset": "quick"}
    got = page(results_of(**nothing), {})
    assert_stands_alone(got)
    assert [attributes["id"] for attributes in got.all("section")] == ["settings", "missing"]
    assert len(got.all("li")) == 2 + 5  # the contents, and what is missing
    assert "Adversarial examples. robust-moe eval" in got.text


def test_nothing_broken_is_no_lack(page, samples_of):
    got = page(results_of(**PLAIN), samples_of(0))
    assert "no attack broke an image." in got.text
    assert not got.all("img")


def test_sizes(page):
    sizes = ({"n": 1, "experts": 1, "classes": 2, "layers": 1}, {"experts": 32, "classes": 100}, {"layers": 5})
    for size in sizes:
        results = results_of(**size)
        got = page(results)
        assert_stands_alone(got)
        expected = 1 + 1 + 1 + 2 * len(results["moe"]["layers"])  # trade-off, curve, routing; classes, experts
        assert len(got.svgs()) == expected
        assert len(got.raw) < 2_000_000


def test_routing_of_the_images_as_they_are_is_shown_without_attacks(page):
    got = page(results_of(**PLAIN))
    assert got.numbers("Share of the images sent to each expert") == [[None, 0.25, 0.5], [None, 0.75, 0.5]]
    assert [root.get("aria-label")[:9] for root in got.svgs()] == ["Clean aga", "Heat map:"]


def test_autoattack_by_itself_is_a_headline(page):
    got = page(results_of(**PLAIN, autoattack=0.625, autoattack_interval=[0.5, 0.75]))
    assert '<dd><data value="0.625">62.5%</data>' in got.raw
    assert "95 %: 50.0 to 75.0%worst case over its own attacks alone" in got.text


def test_other_models_are_shown_and_what_cannot_be_compared_is_said(page):
    same, other = results_of(robust=0.25), results_of(eps="4/255", robust=0.75)
    clean = results_of(attacks=[], robust=None, robust_interval=None)
    got = page(results_of(**PLAIN), others=[("twin", same), ("easy", other), ("clean only", clean)])
    assert [row[1] for row in got.tables["The points"][1:]] == [["99.4%", 0.9944444444444445]] * 4
    assert [row[2] for row in got.numbers("The points")] == [0.5125, 0.25, 0.75, None]
    assert [row[-1][0] for row in got.tables["The points"][1:]] == [
        *("this model", "the same", "not comparable (ε: 4/255)", "not comparable (attacks: none)")
    ]
    label = next(root.get("aria-label") for root in got.svgs() if "twin" in root.get("aria-label"))
    assert "easy: clean 99.4%, robust 75.0%" in label
    assert "clean only" not in label


def test_models_are_compared_by_the_attacks_that_both_have(page):
    """The other had PGD alone: the worst case over two attacks is shown apart, in a table of its own."""
    other = results_of(attacks=results_of()["attacks"][:1], robust=0.75)
    mine = results_of(**PLAIN)
    got = page(mine, others=[("twin", other)])
    assert [row[2] for row in got.numbers("The points")] == [mine["attacks"][0]["alone"], 0.75]
    apart = got.tables["No comparison: each model's worst case over all of its attacks, which are not the same"][1:]
    assert [row[1][1] for row in apart] == [0.5125, 0.75]
    assert [row[2][0] for row in apart] == ["apgd-ce", "none"]
    assert "the worst case over the attacks that all of them have (pgd)" in got.text
    assert '<dd><data value="0.5125">' in got.raw  # the model's own headline is of all its attacks
    foreign = results_of(attacks=[{**other["attacks"][0], "chain": "square", "name": "square"}])
    with pytest.raises(ValueError, match=r"twin: expected an attack in common .* got square"):
        page(mine, others=[("twin", foreign)])
    clean = results_of(attacks=[], robust=None, robust_interval=None)
    assert "The points" not in page(clean, others=[("twin", other), ("foreign", foreign)]).tables  # nothing is compared


def test_names_in_any_script_draw_no_warning(page):
    results = results_of()
    results["data"]["classes"] = ["\u98de\u673a", "\u6c7d\u8f66", *"abcdefgh"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = page(results)
    assert got.text.count("\u98de\u673a") >= 1


def test_same_input_same_page(tmp_path, samples_of):
    with matplotlib.rc_context({"svg.hashsalt": None}):
        for name in ("a", "b"):
            write_report(results_of(), samples_of(), tmp_path / name, [("twin", results_of())])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_format_is_refused_and_the_old_page_kept(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match=f"results: expected results of format {FORMAT}, got 0"):
        write_report(results_of(format=0), {}, path)
    with pytest.raises(ValueError, match=f"twin: expected results of format {FORMAT}, got None"):
        write_report(results_of(), {}, path, [("twin", {})])
    assert path.read_text() == "old"


def test_a_curve_has_no_point_of_more_attacks(page):
    got = page(results_of())
    curve = next(root for root in got.svgs() if "against the radius" in root.get("aria-label"))
    texts = {"".join(text.itertext()) for text in curve.iter("text")}
    assert {"under the curve's attack", "clean", "the report's ε"} <= texts
    assert not any("worst case" in text for text in texts)
    assert "All 2 attacks together leave 51.2% there: the worst case, no point of this curve." in got.text


def test_the_page_is_called_by_its_run(whole):
    assert "<h1>a b: robustness report</h1>" in whole.raw
    assert [row[0][0] for row in whole.tables["The points"][1:]] == ["a b"]


def test_every_attack_of_the_package_is_explained_where_it_is_listed(page):
    attacks = results_of()["attacks"]
    own = {**attacks[1], "name": "my_attack", "chain": "my_attack"}
    got = page(results_of(**{**PLAIN, "attacks": [*attacks, own]}))
    assert [row[0][0] for row in got.tables["What the attacks do"][1:]] == ["pgd", "apgd-ce"]
    names = {*MEMBERS, "pgd", "pgd-margin", "joint", "transfer", "steering", "ra", "ra_e", "ra_r", "ra_r_targeted"}
    assert {name for name, _ in attack_terms(names)} == names
    assert "A route is the set of experts that the gate selects" in page(results_of()).text


def test_on_a_narrow_page_every_cell_has_its_column(whole):
    """There the rows of wide tables are blocks, whose cells the style sheet names by ``data-column``."""
    table = whole.raw.partition("<caption>Every attack and its cost</caption>")[2].partition("</table>")[0]
    assert re.findall('data-column="(.*?)"', table)[:3] == ["chain", "images attacked", "images broken"]
    assert whole.raw.count('<table class="wide">') >= 5
