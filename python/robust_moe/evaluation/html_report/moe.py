"""The sections of a mixture of experts: attacks on router and experts, routing, single experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robust_moe.evaluation import figures
from robust_moe.evaluation.html_report.blocks import (
    Block,
    Cell,
    Figure,
    Folded,
    Missing,
    Section,
    Table,
    Text,
    command,
    percent,
    plain,
    settings_table,
    span,
)
from robust_moe.evaluation.html_report.terms import EXPERT_MEASURES
from robust_moe.evaluation.routing_measures import QUANTILES

__all__ = ["moe_sections"]

SHARES = {
    "sa": ("SA", "right on the clean images"),
    "ra": ("RA", "right under an attack on the whole model"),
    "ra_e": ("RA-E", "right under an attack through the experts chosen for the clean image, its route held fixed"),
    "ra_r": ("RA-R", "right under an attack that pushes the chosen experts out of the router's selection"),
    "ra_r_targeted": ("RA-R, targeted", "right under attacks that drive the router to every other expert in turn"),
    "joint": ("joint", "right under an attack on classification and router together"),
    "transfer": ("transfer", "right when attacked by way of the soft mixture of all experts"),
    "union": ("worst case", "right under these and all other attacks of the evaluation"),
}
MEASURES = {
    "experts": "experts",
    "top_k": "experts that an image, or a token, is sent to",
    "tokens": "tokens of an image",
    "collapsed": "routing collapsed (one expert first for more than 80 %)",
    "routing_change": "routing change under RA (mean 1 − IoU of the experts selected)",
    "route_flips": "images whose route flips under RA, of tokens any route",
    "token_flips": "tokens whose route flips under RA",
    "margin": "top-k margin of the gate's logits",
    "disagreement": "disagreement of the experts",
    "gradient_share": "share of the routing in the loss's gradient",
    "lipschitz": "local Lipschitz estimate (from below)",
}
IN_PERCENT = (MEASURES["route_flips"], MEASURES["token_flips"], MEASURES["gradient_share"])
PROTOCOLS = {
    "drop_top": "without the first choice",
    "swap": "first and next choice swapped",
    "random": "experts drawn at random",
    "clean_route_on_adversarial": "attacked image on the clean image's route",
    "adversarial_route_on_clean": "clean image on the attacked image's route",
}
# The rest of a layer's entry goes into the table of measures.
SHOWN_ELSEWHERE = ("selected", "first", "expert_by_class", "by_attack", "single_experts", "protocols")


def moe_sections(results: Mapping[str, Any]) -> Iterator[Section | Missing]:
    """Robustness of the mixture, and its routing."""
    moe = results["moe"]
    if moe is None:
        if not results["routing"]:
            yield Missing("Router and experts: the model is dense, it has none.", None)
            return
        yield Section("routing", "Routing", list(_natural_routing(results["routing"])))
        what = "Router and experts under attack (RA-E, RA-R), routing of attacked images, single experts."
        yield Missing(what, command(results, "moe"))
        return
    yield Section("moe", "Router and experts under attack", [*_attacked(moe), *_protocols(moe["layers"])])
    yield Section("routing", "Routing", [*_routing(moe["layers"], results["data"].get("classes")), *_measures(moe)])
    if experts := list(_single_experts(moe)):
        yield Section("experts", "Single experts against the gated model", experts)


def _attacked(moe: Mapping[str, Any]) -> Iterator[Block]:
    rows = [
        [Cell(name), percent(moe[key]), Cell(span(moe[f"{key}_interval"])), Cell(meaning)]
        for key, (name, meaning) in SHARES.items()
        if key in moe  # results of an earlier version lack some
    ]
    yield Table("Share of all images, scored on the whole model", ("measure", "share", "95 % interval", "images"), rows)
    yield Folded("Settings of these attacks", [settings_table("Settings of the attacks on the MoE", moe["settings"])])


def _protocols(layers: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    rows = [
        [Cell(layer), Cell(PROTOCOLS.get(name, name)), percent(shares["clean"]), percent(shares["robust"])]
        for layer, measures in layers.items()
        for name, shares in measures["protocols"].items()
        if shares is not None  # of a single expert there is no other choice
    ]
    yield Text("heading", "When a layer's experts are chosen otherwise")
    yield Table("Accuracy under other choices of experts", ("layer", "choice", "clean", "robust"), rows)


def _natural_routing(layers: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    label = "Heat map: share of the clean images sent to each expert"
    shares = {layer: measures["selected"] for layer, measures in layers.items()}
    yield Figure(figures.inline_svg(figures.routing_map(shares), "routing", label), f"{label[10:].capitalize()}.")
    rows = [
        [Cell(layer), Cell(str(expert)), percent(selected), percent(first)]
        for layer, measures in layers.items()
        for expert, (selected, first) in enumerate(zip(measures["selected"], measures["first"], strict=True))
    ]
    columns = ("layer", "expert", "sent to it", "first choice")
    yield Folded("The numbers", [Table("Share of the images sent to each expert", columns, rows)])


def _routing(layers: Mapping[str, Mapping[str, Any]], classes: Sequence[Any] | None) -> Iterator[Block]:
    uses = "; ".join(f"{name}: {m['top_k'] / m['experts']:.1%} each" for name, m in layers.items())
    label = "Heat map: share of the images sent to each expert"
    kinds = (("natural", "clean"), ("attacked", "adversarial"))
    shares = {f"{layer}: {word}": m["selected"][kind] for layer, m in layers.items() for word, kind in kinds}
    svg = figures.inline_svg(figures.routing_map(shares), "routing", label)
    yield Figure(svg, f"Share of the images sent to each expert, in percent. Even use: {uses}.")
    columns = ("layer", "expert", "natural", "attacked", "first choice, natural", "first choice, attacked")
    rows = [
        [Cell(layer), Cell(str(expert)), *map(percent, shares)]
        for layer, measures in layers.items()
        for expert, shares in enumerate(zip(*_both(measures["selected"]), *_both(measures["first"]), strict=True))
    ]
    yield Folded("The numbers", [Table("Share of the images sent to each expert", columns, rows)])
    for number, (layer, measures) in enumerate(layers.items()):
        by_class = measures["expert_by_class"]
        count = len(by_class["clean"])
        names = range(count) if classes is None or len(classes) != count else classes
        label = f"Heat map: share of each class's images sent to each expert of {layer}, natural and attacked"
        yield Text("heading", f"Experts and classes: {layer}")
        yield Figure(
            figures.inline_svg(figures.class_map(by_class, list(map(str, names))), f"classes{number}", label),
            f"Share of each class's images that {layer} sends to each expert, natural and attacked.",
        )


def _both(pair: Mapping[str, Any]) -> tuple[Any, Any]:
    return pair["clean"], pair["adversarial"]


def _measures(moe: Mapping[str, Any]) -> Iterator[Block]:
    layers = moe["layers"]
    scalars: dict[str, dict[str, Any]] = {}  # by measure and layer
    spreads = []  # rows of measures that every image has
    for layer, measures in [*layers.items(), ("whole model", {"lipschitz": moe["lipschitz"]})]:
        for name, value in measures.items():
            if name in SHOWN_ELSEWHERE:
                continue
            if not isinstance(value, Mapping):
                scalars.setdefault(MEASURES.get(name, name), {})[layer] = value
                continue
            numbers = (value["mean"], *(value["quantiles"][f"{level:g}"] for level in QUANTILES), value["max"])
            spreads.append([Cell(MEASURES[name]), Cell(layer), *map(plain, numbers)])
            if name == "disagreement":
                scalars.setdefault(MEASURES["gradient_share"], {})[layer] = value["gradient_share"]
    rows = [
        [Cell(name), *((percent if name in IN_PERCENT else plain)(values.get(layer)) for layer in layers)]
        for name, values in scalars.items()
    ]
    yield Text("heading", "Measures of every layer")
    yield Text("text", EXPERT_MEASURES)
    yield Table("Measures of every MoE layer", ("measure", *layers), rows)
    columns = ("measure", "of", "mean", *(f"{100 * level:g} %" for level in QUANTILES), "largest")
    spreads.sort(key=lambda row: row[0].text)
    yield Table("Mean and quantiles over the images", columns, spreads)
    flips = {"route_flips": "route flips"}
    if any("tokens" in measures for measures in layers.values()):
        flips["token_flips"] = "token flips"
    rows = [
        [Cell(layer), Cell(SHARES[attack][0]), plain(change["routing_change"]), *map(percent, map(change.get, flips))]
        for layer, measures in layers.items()
        for attack, change in measures["by_attack"].items()
    ]
    columns = ("layer", "attack", "routing change", *flips.values())
    yield Folded("Routes under every attack", [Table("How far each attack changes the routes", columns, rows)])


def _single_experts(moe: Mapping[str, Any]) -> Iterator[Block]:
    gated = {"clean": moe["sa"], "robust": moe["ra"]}
    for number, (layer, measures) in enumerate(moe["layers"].items()):
        experts = measures["single_experts"]
        if not experts:
            continue
        yield Text("heading", layer)
        label = f"Accuracy of every expert of {layer} alone, as dots, against the gated model's, as lines"
        yield Figure(
            figures.inline_svg(figures.single_experts(experts, gated), f"experts{number}", label),
            f"Every expert of {layer} alone (dots; attacked through that expert) against the gated model (lines).",
        )
        rows = [[Cell("gated model"), percent(gated["clean"]), percent(gated["robust"])]]
        rows += [[Cell(str(row["expert"])), percent(row["clean"]), percent(row["robust"])] for row in experts]
        yield Folded("The numbers", [Table(f"Experts of {layer} alone", ("expert", "clean", "robust"), rows)])
