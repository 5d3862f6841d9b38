import io
import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest
from torch import nn

from robust_moe.attacks import PGD
from robust_moe.data import ImageSet
from robust_moe.engine.experiment import make_model
from robust_moe.evaluation import (
    LayerRouting,
    accuracy,
    attack_table,
    make_results,
    make_samples,
    plan,
    predict,
    results_table,
    routing_shares,
    run_suite,
    wilson_interval,
    write_results,
)
from robust_moe.evaluation.results import samples_file
from robust_moe.evaluation.scorer import scoring_mode
from robust_moe.evaluation.tables import attack_name, flag_lines

DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}


def image_set(count: int = 30) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 10, tuple("0123456789"), "noise")


class Brightness(nn.Module):
    """Class 1 if the mean pixel is above one half, else class 0; logits are its distance from there."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        distance = self.scale * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-distance, distance], 1)


def grey(levels: list[int], labels: list[int]) -> ImageSet:
    images = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return ImageSet(images, torch.tensor(labels), ("dark", "bright"), "grey")


def test_accuracies_by_hand():
    # half is 127.5; eps = 0.1 moves a grey image by 25.5 levels towards the other class
    images = grey([10, 110, 145, 240, 240, 120], [0, 0, 1, 1, 0, 1])
    result = accuracy(Brightness(), images, PGD(0.1, 3, 0.1), batch_size=4)
    assert result.clean_mask.tolist() == [True, True, True, True, False, False]
    assert result.robust_mask.tolist() == [True, False, False, True, False, False]
    assert (result.count, result.clean, result.robust) == (6, 4 / 6, 2 / 6)  # over all six, not over the four


def test_a_misclassified_image_is_never_robust():
    class Contrary(Brightness):
        def forward(self, x):
            # wrong on the image itself, right wherever an attack goes
            moved = (x * 255 - (x * 255).round()).abs().amax((1, 2, 3)) > 1e-3
            return torch.where(moved[:, None], 1.0, -1.0) * super().forward(x)

    result = accuracy(Contrary(), grey([240, 250], [1, 1]), PGD(0.05, 1))
    assert (result.clean, result.robust) == (0.0, 0.0)


def test_scoring_is_in_eval_mode_full_precision_and_leaves_the_model_alone(tiny):
    torch.manual_seed(0)
    model = make_model(tiny(), DATA).train()
    model.bn1.eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = accuracy(model, image_set(), PGD(0.1, 2), batch_size=7)
        labels, nonfinite = predict(model, torch.rand(5, 1, 8, 8))
    assert [module.training for module in model.modules()] == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not nonfinite.any()
    with torch.no_grad():
        x = image_set().images.float() / 255
        expected = model.eval()(x).argmax(1) == image_set().labels
    assert torch.equal(result.clean_mask, expected)
    assert labels.dtype == torch.int64


PRECISIONS = {  # what a caller may have switched, in PyTorch's older and newer ways
    "as imported": "",
    "older": "torch.set_float32_matmul_precision('medium')",
    "older, cuBLAS": "backends.cuda.matmul.allow_tf32 = True",
    "newer": "backends.fp32_precision = 'tf32'",
    "newer, one operation": "backends.cudnn.conv.fp32_precision = 'ieee'",
    "without TF32": "backends.cudnn.allow_tf32 = False",
}


@pytest.mark.parametrize("switch", PRECISIONS.values(), ids=PRECISIONS)
def test_scoring_is_without_tf32_also_nested_and_puts_every_switch_back(switch):
    # in a fresh process: the switches are the whole process's
    script = f"""
        import torch
        from torch import backends
        from robust_moe.evaluation.scorer import scoring_mode

        def older(read):
            try:
                return read()
            except RuntimeError:
                return "mixed"

        def switches():
            ops = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
            new = [op.fp32_precision for op in ops]
            return new, older(lambda: backends.cudnn.allow_tf32), older(torch.get_float32_matmul_precision)

        {switch}
        model, before = torch.nn.Linear(1, 1), switches()
        try:
            with scoring_mode(model):
                inside = switches()
                with scoring_mode(model):
                    assert switches() == inside
                assert switches() == inside, switches()
                raise KeyError
        except KeyError:
            pass
        assert inside[0] == ["ieee"] * 4, inside
        assert "mixed" in before or inside[1:] == (False, "highest"), inside
        assert switches() == before, (before, switches())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a GPU's")
def test_scores_on_a_gpu_are_fp32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 64)).cuda()
    x = torch.rand(16, 64, 8, 8, device="cuda")
    truth = model.double()(x.double())
    model.float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with scoring_mode(model):
            error = (model(x) - truth).abs().max() / truth.abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    assert error < 1e-5  # TF32 keeps 10 bits: 1e-4 and more


def test_independent_of_batch_size(tiny):
    torch.manual_seed(0)
    model = make_model(tiny(), DATA).eval()
    whole = accuracy(model, image_set(), PGD(0.02, 2), batch_size=30)
    parts = accuracy(model, image_set(), PGD(0.02, 2), batch_size=4)
    assert torch.equal(whole.clean_mask, parts.clean_mask)
    assert torch.equal(whole.robust_mask, parts.robust_mask)
    assert whole.routing == parts.routing


def test_routing_counts_are_those_of_the_layer(tiny):
    torch.manual_seed(0)
    model = make_model(tiny("model.moe.num_experts=3"), DATA).eval()
    images = image_set()
    result = accuracy(model, images, PGD(0.1, 1), batch_size=8)
    with torch.no_grad():
        model(images.images.float() / 255)
    indices = model.get_submodule("layer2.1").routing.indices
    shares = result.routing["layer2.1"]
    for expert in range(3):
        assert shares.selected[expert] == pytest.approx((indices == expert).sum().item() / 30)
        assert shares.first[expert] == pytest.approx((indices[:, 0] == expert).sum().item() / 30)
    assert routing_shares(model, images, batch_size=8) == result.routing
    assert routing_shares(Brightness(), images) == {}


@pytest.mark.parametrize(
    ("first", "collapsed"),
    [([0.81, 0.19], True), ([0.8, 0.2], False), ([0.25] * 4, False), ([1.0], False)],  # one expert cannot collapse
)
def test_collapse_is_more_than_four_fifths_of_first_choices(first, collapsed):
    assert LayerRouting(selected=first, first=first).collapsed is collapsed


def test_nan_never_counts_as_robust_or_even_as_wrong():
    model = Brightness()
    with torch.no_grad():
        model.scale.fill_(torch.nan)
    for attack in (None, PGD(0.1, 1)):
        with pytest.raises(FloatingPointError, match=r"NaN or infinity for \d+ image.*never counts as robust"):
            accuracy(model, grey([10, 240], [0, 1]), attack)


def test_empty_set_is_refused():
    with pytest.raises(ValueError, match="images: expected at least one image"):
        accuracy(Brightness(), grey([1], [0]).subset(torch.tensor([], dtype=torch.int64)))


def test_wilson_interval_solves_its_equation():
    z = 1.959963984540054
    for share, count in ((0.847, 360), (0.85, 360), (0.5, 10), (0.0, 50), (1.0, 50)):
        low, high = wilson_interval(share, count)
        for end in (low, high):
            if 0 < end < 1:
                assert abs(end - share) == pytest.approx(z * math.sqrt(end * (1 - end) / count))
        assert 0 <= low <= share <= high <= 1
        if (hits := share * count).is_integer():
            assert (low, high) == pytest.approx(binomtest(int(hits), count).proportion_ci(0.95, "wilson"), abs=1e-12)


def test_result_file_has_the_numbers_settings_and_masks(tmp_path):
    images = grey([10, 120, 135, 240], [0, 0, 1, 1])
    stages = plan("pgd", PGD(8 / 255, 20, seed=5))
    suite = run_suite(Brightness(), images.images, images.labels, stages, eps=8 / 255, index=torch.arange(4) + 6)
    results = make_results(
        suite,
        model={"name": "brightness", "parameters": 1},
        data={"name": "grey", "split": "test"},
        settings={"checkpoint": "x.pt", "eps": "8/255", "norm": "Linf", "preset": "quick", "seed": 5},
        device="cpu",
    )
    written = write_results(results, make_samples(suite), tmp_path / "results.json")
    read = json.loads((tmp_path / "results.json").read_text())
    assert read == written
    (attack,) = read["attacks"]
    assert attack["settings"]["eps"] == "8/255"
    assert attack["settings"]["alpha"] == "1/255"  # 2.5 * 8/255 / 20, exactly
    assert (attack["settings"]["seed"], attack["settings"]["steps"]) == (5, 20)
    assert attack["passes_per_image"] == {"forward": 20, "backward": 20}
    assert (attack["attacked"], attack["broken"], attack["robust_after"], attack["alone"]) == (4, 2, 0.5, 0.5)
    assert (read["clean"], read["robust"], read["count"]) == (1.0, 0.5, 4)
    assert read["autoattack"] is None
    assert read["robust_interval"] == list(wilson_interval(0.5, 4))
    assert read["versions"]["torch"] == torch.__version__
    assert (read["format"], read["moe"], read["curve"], read["tf32"]) == (3, None, None, False)
    assert {"git", "hardware", "dtype", "seconds", "routing", "flags"} <= read.keys()
    assert read["samples"] == "samples.npz"
    with np.load(tmp_path / read["samples"], allow_pickle=False) as samples:
        assert samples["index"].tolist() == [6, 7, 8, 9]
        assert samples["label"].tolist() == samples["prediction/clean"].tolist() == [0, 0, 1, 1]
        assert samples["clean"].tolist() == samples["attacked/pgd"].tolist() == [True] * 4
        assert samples["robust"].tolist() == [True, False, False, True]
        assert samples["broken/pgd"].tolist() == [False, True, True, False]
        assert samples["adversarial_prediction/pgd"].tolist() == [0, 1, 0, 1]
        assert samples["examples/index"].tolist() == [7, 8]
        assert samples["examples/clean"].shape == samples["examples/adversarial"].shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("results.json", "samples.npz"),
        ("results-best-test.json", "samples-best-test.npz"),
        ("mine.json", "mine-samples.npz"),
    ],
)
def test_every_result_file_has_samples_of_its_own(tmp_path, name, beside):
    assert samples_file(tmp_path / name) == tmp_path / beside


def row(**attack) -> dict:
    settings = {"steps": 20, "restarts": 1} | attack.pop("settings", {})
    made = {"name": "pgd", "chain": "pgd", "settings": settings} | attack
    return {
        "model": {"parameters": 1_490_000},
        "count": 360,
        "clean": 0.989,
        "robust": None,
        "clean_interval": [0.972, 0.996],
        "seconds": 1.25,
        "norm": "Linf",
        "eps": "8/255",
        "attacks": [made],
    }


def shown(table) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_table_shows_percentages_with_intervals():
    text = shown(results_table([("dense", row())], "Title"))
    assert "98.9 [97.2, 99.6]" in text
    assert "1.49 M" in text
    assert "PGD-20, Linf eps = 8/255" in text
    assert attack_name({**row(), "attacks": []}) == "no attack"
    assert attack_name(row(settings={"restarts": 2})) == "PGD-20 x2, Linf eps = 8/255"
    whole = row()
    members = [{"name": name, "chain": "autoattack", "settings": {"steps": 100, "restarts": 1}} for name in "abcd"]
    whole["attacks"] += members
    assert attack_name(whole) == "PGD-20 + AutoAttack, Linf eps = 8/255"


def test_table_of_attacks_and_flags():
    results = row(attacked=350, broken=40, robust_after=0.861, alone=None, seconds=2.0)
    results["attacks"][0]["passes_per_image"] = {"forward": 20.0, "backward": 19.5}
    results |= {"autoattack": 0.85, "autoattack_interval": [0.81, 0.88]}
    text = shown(attack_table(results))
    for cell in ("350", "40", "86.1", "20.0", "19.5", "85.0 [81.0, 88.0]"):
        assert cell in text
    flag = {"name": "probabilities", "raised": False, "message": "the outputs", "value": 0.5}
    (line,) = flag_lines({"flags": [flag]})
    assert line.plain == "sanity checks: none of 1 raised"
    skipped = {**flag, "name": "square_stronger", "message": "not measured: no Square", "value": None}
    (line,) = flag_lines({"flags": [flag, skipped]})
    assert line.plain == "sanity checks: none of 1 raised; not measured: square_stronger"
    (line,) = flag_lines({"flags": [flag, {**flag, "raised": True}]})
    assert line.plain == "WARNING probabilities: the outputs"
