"""A result file as an entry of RobustBench (Croce et al., 2021, arXiv:2010.09670): the JSON of its ``model_info``."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from robust_moe.attacks.autoattack import members
from robust_moe.content import ContentError, anything, fields, share
from robust_moe.evaluation.common import half_precision
from robust_moe.evaluation.file_fields import RESULTS
from robust_moe.evaluation.outcome import AUTOATTACK
from robust_moe.evaluation.results import FORMAT
from robust_moe.evaluation.stages import describe_attack

__all__ = ["robustbench_json"]

NEEDED = fields(
    {
        "model": fields({"name": anything}),
        "data": fields({"name": anything, "split": anything}),
        **dict.fromkeys(("count", "eps", "norm", "clean", AUTOATTACK, "attacks", "flags"), anything),
    }
)


def robustbench_json(
    results: Mapping[str, Any],
    name: str,
    *,
    link: str | None = None,
    authors: str | None = None,
    venue: str | None = None,
    architecture: str | None = None,
    additional_data: bool | None = None,
    number_forward_passes: int = 1,
    reported: str | None = None,
    footnote: str | None = None,
) -> dict[str, Any]:
    """The entry of an evaluation with AutoAttack ``standard``; what is not known is ``None``.

    Accuracies are percent of all images, as text with two decimals; ``autoattack_acc`` is AutoAttack's alone, not the
    worst case with other attacks. ``unreliable`` says whether a sanity flag was raised (None: none was checked).

    Args:
        results: a result file's content.
        name: of the entry, by custom the paper's title.
        link, authors, venue: of the paper.
        architecture: None: the model's name in the results.
        additional_data: whether other images were trained on.
        number_forward_passes: of a prediction.
        reported: robust accuracy that the paper claims, in percent.
        footnote: None: how many images it was measured on, and which flags were raised.

    Raises:
        ValueError: results of another format, without a number of AutoAttack ``standard``, or of attacks in half
            precision, which may be weaker than AutoAttack.
    """
    if results.get("format") != FORMAT:
        raise ValueError(f"results: expected format {FORMAT}, got {results.get('format')!r}; evaluate again")
    try:
        NEEDED(results, "results")
        RESULTS(results, "results")
        _expect_standard(results)
        if half := half_precision(results):
            raise ContentError(f"results.attack_dtype: expected attacks in float32, got {half}; evaluate exactly")
        share(results[AUTOATTACK], f"results.{AUTOATTACK}")
    except ContentError as error:
        raise ValueError(str(error)) from error
    raised = [flag["name"] for flag in results["flags"] if flag["raised"]]
    if footnote is None:
        footnote = f"Measured on {results['count']} {results['data']['split']} images."
        footnote += f" Sanity flags raised: {', '.join(raised)}." if raised else ""
    eps = Fraction(results["eps"])
    return {
        "link": link,
        "name": name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": results["data"]["name"],
        "venue": venue,
        "architecture": results["model"]["name"] if architecture is None else architecture,
        "eps": str(eps) if results["norm"] == "Linf" else f"{float(eps):g}",  # as its entries have them
        "clean_acc": _percent(results["clean"]),
        "reported": reported,
        "autoattack_acc": _percent(results[AUTOATTACK]),
        "unreliable": bool(raised) if results["flags"] else None,
        "footnote": footnote,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _expect_standard(results: Mapping[str, Any]) -> None:
    """Refuse results whose AutoAttack is missing or is not the standard one, saying what differs."""
    expected = members(float(Fraction(results["eps"])), results["norm"], "standard")
    ran = {attack["name"]: attack["settings"] for attack in results["attacks"] if attack["chain"] == AUTOATTACK}
    if list(ran) != list(expected):
        raise ValueError(
            f"results: expected AutoAttack standard ({', '.join(expected)}; --preset standard), "
            f"got {', '.join(ran) or 'no attack of AutoAttack'}"
        )
    for name, attack in expected.items():
        for setting, value in describe_attack(attack).items():
            got = ran[name].get(setting)
            if setting != "seed" and got != value:
                raise ValueError(f"results: expected {name} with {setting} = {value!r} (standard), got {got!r}")
