"""``robust-moe eval --fast``: attacks in bfloat16, verdicts in float32, and results that say so."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from suite_stages import EPS, chain
from torch import Tensor, nn
from typer.testing import CliRunner

from robust_moe import report
from robust_moe.attacks import PGD
from robust_moe.attacks.passes import Passes
from robust_moe.commands import app
from robust_moe.config import ConfigError
from robust_moe.engine import Reporter, Trainer
from robust_moe.evaluation import PresetEvaluation, run_suite
from robust_moe.evaluation.common import in_common
from robust_moe.evaluation.html_report.sections import headline
from robust_moe.evaluation.staged import StagedEvaluation
from robust_moe.evaluation.tables import attack_name, results_table
from robust_moe.precision import Bfloat16, bfloat16_of

HAS = Bfloat16(True, "the processor has avx512_bf16")
HAS_NOT = Bfloat16(False, "the processor has no instructions for bfloat16")


@pytest.fixture
def trained(tiny):
    """The run folder of a network trained for two steps."""
    config = tiny("run.max_steps=2")
    Trainer(config, Reporter(enabled=False)).fit()
    return config.run.out


def on(monkeypatch, half: Bfloat16) -> None:
    monkeypatch.setattr(report, "bfloat16_of", lambda device: half)


def evaluated(folder, *options: str):
    result = CliRunner().invoke(app, ["eval", folder, *options], env={"COLUMNS": "200"})
    return result, " ".join(result.output.split())


def results_of(output: str) -> dict:
    with open(output.split("results: ")[1].split(" report:")[0]) as stream:
        return json.load(stream)


def watched(monkeypatch) -> tuple[set[torch.dtype], list[tuple[Tensor, Tensor]]]:
    """(dtypes of the logits that attacks see, (images, labels) that attacks leave), filled while evaluations run."""
    seen: set[torch.dtype] = set()
    left: list[tuple[Tensor, Tensor]] = []
    examine, craft = Passes.examine, StagedEvaluation.craft

    def examined(self, x):
        found = examine(self, x)
        seen.add(found.logits.dtype)
        assert x.dtype == found.grad.dtype == found.loss.dtype == torch.float32
        return found

    def crafted(self, attack, batch, counts=None):
        images = craft(self, attack, batch, counts)
        assert images.dtype == torch.float32
        left.append((images.clone(), batch.labels))
        return images

    monkeypatch.setattr(Passes, "examine", examined)
    monkeypatch.setattr(StagedEvaluation, "craft", crafted)
    return seen, left


def test_verdicts_are_the_float32_model_s_on_the_images_that_attacks_leave(victim, monkeypatch):
    seen, left = watched(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        result = run_suite(victim.model, victim.x, victim.y, chain()[:1], eps=EPS, batch_size=40)
    assert seen == {torch.bfloat16}
    with torch.no_grad():
        clean = victim.model(victim.x).argmax(1)
        wrong = torch.cat([victim.model(images).argmax(1) != labels for images, labels in left])
    np.testing.assert_array_equal(result.prediction, clean)
    (stage,) = result.stages
    assert 0 < wrong.sum() < len(wrong)
    np.testing.assert_array_equal(stage.broken[stage.attacked], wrong)
    assert float(result.robust.mean()) == float((len(wrong) - wrong.sum()) / len(victim.y))


def test_success_in_bfloat16_alone_leaves_the_image_to_the_next_attack(victim):
    """Of a model that is wrong about everything, in bfloat16."""

    class WrongInHalf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = victim.model(x)
            return -logits if torch.is_autocast_enabled("cpu") else logits

    stages = chain()
    followers = [i for i in range(1, len(stages)) if stages[i].chain == stages[i - 1].chain]
    assert followers, "the case needs two attacks of one chain"
    with torch.autocast("cpu", torch.bfloat16):
        result = run_suite(WrongInHalf(), victim.x, victim.y, stages, eps=EPS, batch_size=40)
    assert result.robust.any()
    for i in followers:
        before, after = result.stages[i - 1], result.stages[i]
        np.testing.assert_array_equal(after.attacked, before.attacked & ~before.broken)
        assert after.attacked.any()


def test_results_say_what_the_attacks_computed_in(trained, monkeypatch):
    on(monkeypatch, HAS)
    seen, _ = watched(monkeypatch)
    done, output = evaluated(trained, "--fast")
    assert done.exit_code == 0, output
    fast = results_of(output)
    assert (fast["attack_dtype"], fast["dtype"], fast["identity"]["autocast"]) == (
        *("bfloat16", "float32"),
        "torch.bfloat16",
    )
    assert seen == {torch.bfloat16}
    assert "attacks in bfloat16, scored in float32" in output
    assert fast["samples"].endswith("-fast.npz")
    seen.clear()
    done, output = evaluated(trained)
    exact = results_of(output)
    assert (exact["attack_dtype"], exact["identity"]["autocast"]) == ("float32", None)
    assert seen == {torch.float32}
    assert "bfloat16" not in output
    assert exact["clean"] == fast["clean"] and exact["samples"] != fast["samples"]
    done, output = evaluated(trained, "--fast")
    assert "finished already" in output and results_of(output) == fast

    rows = [("exact", exact), ("fast", fast)]
    assert [name for name, _ in in_common(rows)] == ["exact", "fast (attacks in bfloat16)"]
    assert results_table(rows, "").row_count == 2
    assert attack_name(fast) == f"{attack_name(exact)}, attacks in bfloat16, scored in float32"
    notes = {card["name"]: card["notes"] for card in headline(fast)}
    assert "attacks in bfloat16, scored in float32" in notes["Robust accuracy"]
    assert not any("bfloat16" in note for card in headline(exact) for note in card["notes"])


def test_where_bfloat16_is_slower_the_evaluation_is_the_exact_one(trained, monkeypatch):
    on(monkeypatch, HAS_NOT)
    seen, _ = watched(monkeypatch)
    done, output = evaluated(trained, "--fast")
    assert done.exit_code == 0, output
    assert "--fast: the processor has no instructions for bfloat16; the attacks run in float32" in output
    results = results_of(output)
    assert (results["attack_dtype"], seen) == ("float32", {torch.float32})
    assert "finished already" in evaluated(trained)[1]


def test_no_entry_of_a_benchmark_from_a_fast_evaluation(trained):
    done, output = evaluated(trained, "--fast", "--preset", "standard", "--robustbench", "x")
    assert done.exit_code == 2
    assert "robustbench: expected an exact evaluation, got --fast" in output


def test_a_journal_of_the_exact_evaluation_is_not_gone_on_with(victim, tmp_path):
    how = {"attack": PGD.Config(eps="0.1", steps=2), "facts": {"model": {}, "data": {}, "settings": {}}}
    index = torch.arange(len(victim.x))
    exact, fast = (
        PresetEvaluation(victim.model, victim.x, victim.y, index, fast=fast, **how) for fast in (False, True)
    )
    assert {key for key in exact.identity if exact.identity[key] != fast.identity[key]} == {"autocast"}
    whole = [each.complete(tmp_path / "r.json", None) for each in (exact, fast)]
    assert [results["attack_dtype"] for results in whole] == ["float32", "bfloat16"]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_no_gradient_underflows_in_bfloat16(victim, monkeypatch, norm):
    """Its exponents are float32's: an attack needs no scaled loss. At most 0.1 % more of the gradients' elements are
    zero than in float32, also for images of a cross-entropy below 1e-4."""
    zeros = {False: 0, True: 0}
    smallest = {False: 1.0, True: 1.0}
    count, examine = 0, Passes.examine

    def examined(self, x):
        nonlocal count
        found, half = examine(self, x), torch.is_autocast_enabled("cpu")
        zeros[half] += int((found.grad == 0).sum())
        smallest[half] = min(smallest[half], float(found.loss.min()))
        count += found.grad.numel()
        return found

    monkeypatch.setattr(Passes, "examine", examined)
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            PGD(0.05 if norm == "Linf" else 0.5, 5, norm=norm)(victim.model, victim.x, victim.y)
    assert max(smallest.values()) < 1e-4, "the case needs images that the model is sure of"
    assert zeros[True] - zeros[False] <= 0.001 * count / 2


def test_nan_of_an_attack_in_bfloat16_says_so(victim):
    class Overflowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return victim.model(x) * (torch.inf if torch.is_autocast_enabled("cpu") else 1.0)

    words = r"non-finite gradient or loss on its input, computing in torch\.bfloat16"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(FloatingPointError, match=words):
        PGD(0.1, 2)(Overflowing(), victim.x[:4], victim.y[:4])
    PGD(0.1, 2)(Overflowing(), victim.x[:4], victim.y[:4])


@pytest.mark.parametrize(
    ("has", "library", "words"),
    [
        ({}, True, (False, "the processor has no instructions for bfloat16")),
        ({"avx512_bf16": True}, True, (True, "the processor has avx512_bf16")),
        ({"amx_bf16": True, "avx512_bf16": True}, True, (True, "the processor has amx_bf16")),
        ({"bf16": True}, True, (True, "the processor has bf16")),
        ({"avx512_bf16": True}, False, (False, "the processor has avx512_bf16, but PyTorch's oneDNN does not use it")),
    ],
)
def test_what_a_processor_has(monkeypatch, has, library, words):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: library)
    assert bfloat16_of(torch.device("cpu")) == words


def test_the_installation_says_what_auto_is(monkeypatch):
    monkeypatch.setattr("robust_moe.engine.fabric.bfloat16_of", lambda device: HAS)
    output = CliRunner().invoke(app, ["env"], env={"COLUMNS": "200"}).output
    assert "auto is bf16-mixed here, as the processor has avx512_bf16" in output


def test_assess_takes_the_flag_by_name(trained, monkeypatch):
    on(monkeypatch, HAS)
    results, path = report.assess(trained, fast=True, reporter=Reporter(enabled=False))
    assert results["attack_dtype"] == "bfloat16" and path.stem.endswith("-fast")
    with pytest.raises(ConfigError, match="robustbench"):
        report.assess(trained, fast=True, preset="standard", robustbench="x")
