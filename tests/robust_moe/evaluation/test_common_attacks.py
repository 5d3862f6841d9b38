"""Models are compared by the worst case over the attacks that all of them have."""

import numpy as np
import pytest

from robust_moe.evaluation.common import in_common, run_name
from robust_moe.evaluation.results import wilson_interval
from robust_moe.evaluation.tables import results_table

IMAGES = 40
CLEAN = np.arange(IMAGES) < 36


def broken(*images):
    return np.isin(np.arange(IMAGES), images)


def result(masks, steps=20, seed=0, chains=None, **changes):
    """A result file's content and its arrays, from what each attack (chain) broke of 36 images that are right."""
    robust, attacks = CLEAN.copy(), []
    for name, mask in masks.items():
        chain = (chains or {}).get(name, name)
        alone = float((CLEAN & ~mask).mean()) if chain == name else None
        robust = robust & ~mask
        settings = {"steps": steps, "seed": seed, "eps": "8/255"}
        attacks.append({"name": name, "chain": chain, "settings": settings, "alone": alone})
        attacks[-1]["robust_after"] = float(robust.mean())
    share = float(robust.mean()) if masks else None
    content = {"robust": share, "count": IMAGES, "attacks": attacks, "autoattack": None}
    content["robust_interval"] = None if share is None else list(wilson_interval(share, IMAGES))
    return {**content, **changes}, {"clean": CLEAN, **{f"broken/{name}": mask for name, mask in masks.items()}}


def test_more_attacks_do_not_make_a_model_look_worse():
    """Both lose the same ten images to PGD; one was attacked in two more ways."""
    dense, _ = result({"pgd": broken(*range(10))})
    routed, arrays = result({"pgd": broken(*range(10)), "moe/ra_e": broken(*range(20)), "moe/ra_r": broken(30)})
    (_, one), (_, two) = in_common([("routed", routed), ("dense", dense)], arrays)
    assert one["robust"] == two["robust"] == 26 / 40
    assert one["robust_interval"] == two["robust_interval"] == list(wilson_interval(26 / 40, IMAGES))
    assert (one["common"], one["own"], one["robust_own"]) == (["pgd"], ["moe/ra_e", "moe/ra_r"], 15 / 40)
    assert (two["common"], two["own"], two["robust_own"]) == (["pgd"], [], 26 / 40)
    assert routed["robust"] == 15 / 40  # the input stays


def test_the_worst_case_over_some_attacks_comes_from_the_arrays(tmp_path):
    """Two of three attacks are common, and they are not the first that ran."""
    other, _ = result({"b": broken(1, 2), "c": broken(3)})
    mine, arrays = result({"a": broken(0), "b": broken(4, 5), "c": broken(5, 6)})
    assert in_common([("mine", mine), ("other", other)], arrays)[0][1]["robust"] == 33 / 40  # 36 less 4, 5, 6
    np.savez(tmp_path / "samples.npz", **arrays)
    stored = {**mine, "samples": str(tmp_path / "samples.npz")}
    assert in_common([("other", other), ("mine", stored)])[1][1]["robust"] == 33 / 40
    with pytest.raises(
        ValueError, match=r"mine: expected the arrays clean, broken/b, .* run robust-moe eval on it again"
    ):
        in_common([("other", other), ("mine", {**mine, "samples": str(tmp_path / "gone.npz")})])


def test_autoattack_is_one_attack():
    """Its members go on with what the earlier ones left: it is common as a whole, or not."""
    members = {name: broken(number) for number, name in enumerate(("apgd-ce", "apgd-t", "fab-t", "square"))}
    chains = dict.fromkeys(members, "autoattack")
    mine, _ = result({"pgd": broken(9), **members}, chains=chains, autoattack=32 / 40)
    whole, _ = result(members, chains=chains, autoattack=32 / 40)
    assert in_common([("mine", mine), ("other", whole)])[0][1]["robust"] == 32 / 40
    part, _ = result(dict(list(members.items())[:2]), chains=chains)
    with pytest.raises(ValueError, match="other: expected an attack in common with mine"):
        in_common([("mine", whole), ("other", part)])


def test_other_settings_are_another_attack_and_another_seed_is_not():
    mine, _ = result({"pgd": broken(1)})
    longer, _ = result({"pgd": broken(1, 2)}, steps=50)
    words = (
        r"other: expected an attack in common with mine \(pgd\), got pgd, or the same with other settings; run "
        "robust-moe eval on both with the same --preset and eval.attack settings"
    )
    with pytest.raises(ValueError, match=words):
        in_common([("mine", mine), ("other", longer)])
    again, _ = result({"pgd": broken(1, 2)}, seed=7)
    assert [entry["robust"] for _, entry in in_common([("mine", mine), ("other", again)])] == [35 / 40, 34 / 40]


def test_three_results_need_one_attack_that_all_have():
    a, _ = result({"x": broken(1), "y": broken(2)})
    b, _ = result({"y": broken(1), "z": broken(2)})
    c, _ = result({"x": broken(1), "z": broken(2)})
    with pytest.raises(ValueError, match="a, b, c: expected an attack that all have in common, got none"):
        in_common([("a", a), ("b", b), ("c", c)])


def test_a_clean_evaluation_restricts_nothing():
    mine, _ = result({"pgd": broken(1)})
    clean, _ = result({})
    (_, one), (_, two) = in_common([("mine", mine), ("clean", clean)])
    assert (one["robust"], two["robust"]) == (35 / 40, None)


def test_results_on_other_images_are_no_comparison():
    mine, _ = result({"pgd": broken(1)}, data={"name": "digits", "sha256": "a" * 64})
    same, _ = result({"pgd": broken(2)}, data={"name": "digits", "sha256": "a" * 64})
    other, _ = result({"pgd": broken(3)}, data={"name": "digits", "sha256": "b" * 64})  # another label, say
    clean, _ = result({}, data={"name": "digits", "sha256": "b" * 64})
    fewer, _ = result({"pgd": broken(3)}, count=39)
    unsaid, _ = result({"pgd": broken(3)})
    assert len(in_common([("mine", mine), ("same", same), ("unsaid", unsaid)])) == 3
    words = (
        r"other: expected results on the images and labels of mine \(40 images of SHA-256 aaaaaaaaaaaa\), got 40 "
        "images of SHA-256 bbbbbbbbbbbb; run robust-moe eval on both with the same data settings, --split and --n"
    )
    for compare in (in_common, lambda rows: results_table(rows, "")):
        with pytest.raises(ValueError, match=words):
            compare([("unsaid", unsaid), ("mine", mine), ("other", other)])
    with pytest.raises(ValueError, match="clean: expected results on the images and labels of mine"):
        in_common([("mine", mine), ("clean", clean)])
    with pytest.raises(
        ValueError, match=r"fewer: expected results on the images and labels of mine .*, got 39 images;"
    ):
        in_common([("mine", mine), ("fewer", fewer)])


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("runs/mine/best.pt", "mine"),
        ("runs/mine/last.pt", "mine/last"),  # beside the best one of the same run
        ("best.pt", "best"),  # a folder that the file does not tell
        ("weights/published.pt", "published"),
        (None, "resnet_small"),  # a model that was given in Python
    ],
)
def test_a_model_is_called_by_its_run(checkpoint, name):
    assert run_name({"checkpoint": checkpoint, "model": {"name": "resnet_small"}}) == name
