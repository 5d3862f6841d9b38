import copy
import json

import pytest

from robust_moe.attacks import PGD
from robust_moe.attacks.autoattack import members
from robust_moe.evaluation.results import FORMAT
from robust_moe.evaluation.robustbench import robustbench_json
from robust_moe.evaluation.stages import describe_attack

KEYS = (
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps"),
    *("clean_acc", "reported", "autoattack_acc", "unreliable", "footnote"),
)


def results_of(eps: str = "8/255", radius: float = 8 / 255, norm: str = "Linf") -> dict:
    attacks = [{"name": "pgd", "chain": "pgd", "settings": describe_attack(PGD(radius, 20, norm=norm))}]
    attacks += [
        {"name": name, "chain": "autoattack", "settings": describe_attack(attack)}
        for name, attack in members(radius, norm, "standard", seed=7).items()
    ]
    results = {
        "format": FORMAT,
        "model": {"name": "resnet18"},
        "data": {"name": "cifar10", "split": "test"},
        "count": 1000,
        "eps": eps,
        "norm": norm,
        "clean": 0.84567,
        "robust": 0.4,
        "autoattack": 0.5,
        "attacks": attacks,
        "flags": [{"name": "randomised", "raised": False}],
    }
    return json.loads(json.dumps(results))


def test_entry_is_filled_from_the_results():
    entry = robustbench_json(results_of(), "A title")
    assert tuple(entry) == KEYS
    assert entry == {
        **dict.fromkeys(KEYS),
        "name": "A title",
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "architecture": "resnet18",
        "eps": "8/255",
        "clean_acc": "84.57",
        "autoattack_acc": "50.00",  # not 40, the worst case with PGD
        "unreliable": False,
        "footnote": "Measured on 1000 test images.",
    }
    json.dumps(entry, allow_nan=False)


def test_what_is_known_besides_is_taken_over():
    known = {
        "link": "a",
        "authors": "b",
        "venue": "c",
        "architecture": "d",
        "additional_data": True,
        "number_forward_passes": 2,
        "reported": "51.00",
        "footnote": "e",
    }
    entry = robustbench_json(results_of(), "name", **known)
    assert {key: entry[key] for key in known} == known


def test_radius_is_written_as_the_norm_has_it():
    assert robustbench_json(results_of("1/2", 0.5, "L2"), "name")["eps"] == "0.5"
    assert robustbench_json(results_of("4/255", 4 / 255), "name")["eps"] == "4/255"


def test_raised_flags_make_an_entry_unreliable():
    results = results_of()
    results["flags"] += [{"name": name, "raised": True} for name in ("probabilities", "outside_ball")]
    entry = robustbench_json(results, "name")
    assert entry["unreliable"] is True
    assert entry["footnote"].endswith("Sanity flags raised: probabilities, outside_ball.")
    assert robustbench_json({**results, "flags": []}, "name")["unreliable"] is None


def changed(attack: int, **settings) -> dict:
    results = results_of()
    results["attacks"][attack]["settings"].update(settings)
    return results


def without(*names: str) -> dict:
    results = copy.deepcopy(results_of())
    results["attacks"] = [attack for attack in results["attacks"] if attack["name"] not in names]
    return results


@pytest.mark.parametrize(
    ("results", "words"),
    [
        (without("apgd-ce", "apgd-t", "fab-t", "square"), r"--preset standard\), got no attack of AutoAttack"),
        (without("square"), "got apgd-ce, apgd-t, fab-t$"),
        (changed(4, steps=500), r"expected square with steps = 5000 \(standard\), got 500"),
        (changed(2, n_targets=3), "expected apgd-t with n_targets = 9"),
        (changed(1, eps="4/255"), "expected apgd-ce with eps = '8/255'"),
        (results_of() | {"attack_dtype": "bfloat16"}, "expected attacks in float32, got attacks in bfloat16"),
        ({"format": 1}, f"expected format {FORMAT}, got 1"),
    ],
)
def test_anything_but_the_standard_is_refused(results, words):
    with pytest.raises(ValueError, match=words):
        robustbench_json(results, "name")
