"""Whole evaluations by name: from a model, images and an attack's settings to numbers, files and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_moe.attacks import PGD, Attack, AutoAttack
from robust_moe.attacks.autoattack import VERSIONS
from robust_moe.attacks.losses import LOSSES
from robust_moe.evaluation.curve import curve_radii, error_curve
from robust_moe.evaluation.full import full_notes, full_stages
from robust_moe.evaluation.moe import run_moe
from robust_moe.evaluation.moe_numbers import mixture_attacks
from robust_moe.evaluation.outcome import MOE, Stage, SuiteResult
from robust_moe.evaluation.results import (
    make_results,
    make_samples,
    read_results,
    read_samples,
    wilson_interval,
    write_results,
)
from robust_moe.evaluation.sanity import curve_flag
from robust_moe.evaluation.scorer import device_of
from robust_moe.evaluation.shards import ONE, Shards
from robust_moe.evaluation.staged import Task
from robust_moe.evaluation.stages import describe_attack, identity, plan
from robust_moe.evaluation.store import Journal
from robust_moe.evaluation.suite import run_suite, with_stages
from robust_moe.evaluation.vmoe import vmoe_curve
from robust_moe.outputs import JOURNAL, clear_outputs, evaluation_outputs, samples_file
from robust_moe.settings import ConfigError
from robust_moe_kernels.modules import moe_layers

__all__ = ["PRESETS", "PresetEvaluation", "preset_stages"]

PRESETS = {
    "quick": "clean, and eval.attack (PGD-20 unless set otherwise)",
    "standard": "quick, and AutoAttack standard",
    "rand": "quick, and AutoAttack rand, for models that draw random numbers",
    "full": "standard, PGD on the margin loss, and of a mixture of experts: attacks on its routes; one worst case",
    "moe": "quick, an error curve over 20 radii, and of a mixture of experts: experts, router and routing under attack",
    "vmoe": "quick, and error, loss and routes over 20 radii as V-MoE's authors measure them: 40 steps of eps / 40",
}


def preset_stages(model: nn.Module, attack: Attack.Config, preset: str, seed: int, key: str = "attack") -> list[Stage]:
    """The attacks of an evaluation of ``model``, but for those of experts and router, in order.

    Args:
        key: of the attack's section, for errors.

    Raises:
        ConfigError: a preset that there is not, or that ``attack`` does not go with.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    version = "standard" if preset == "full" else preset if preset in VERSIONS else None
    if version is not None and isinstance(attack, AutoAttack.Config):
        raise ConfigError(f"{key}.name: expected another beside preset {preset!r}, which runs 'autoattack' itself")
    if preset in ("moe", "full"):
        with_preset = f"with preset {preset!r}"
        if not isinstance(attack, PGD.Config):
            raise ConfigError(f"{key}.name: expected 'pgd' {with_preset}, whose attacks are, got {attack.name!r}")
        if attack.loss not in LOSSES and moe_layers(model):
            raise ConfigError(f"{key}.loss: expected one of {', '.join(LOSSES)} {with_preset}, got {attack.loss!r}")
        if preset == "full":
            return full_stages(model, attack, seed)
    return plan(attack.name, attack.build(seed=seed), version, seed)


class PresetEvaluation:
    """One model on some images under one preset.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left exactly as found.
        images: uint8 [n, C, H, W] in 0..255, or float32 in [0, 1].
        labels, index: int64 [n]; positions in the data set.
        attack: settings of the first attack; its ball is that of all.
        preset: a key of :data:`PRESETS`.
        seed: of all attacks.
        batch_size: images a forward.
        facts: what results say of ``"model"`` and ``"data"`` beside what is measured, and further entries under
            ``"settings"``.
        task: shows progress; see :meth:`robust_moe.engine.Reporter.task`.
        say: takes lines for the user; None: says nothing.
        key: of the attack's section, for errors.
        fast: attacks compute in bfloat16. Every verdict is the float32 model's on the float32 images that an attack
            leaves: where one that fooled the model in bfloat16 does not fool it in float32, the image goes on to the
            next attack of the chain. False: as the caller computes, in float32 unless autocast is on.
        shards: processes that evaluate together; the first one writes.

    Raises:
        ConfigError: as :func:`preset_stages`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        *,
        attack: Attack.Config,
        preset: str = "quick",
        seed: int = 0,
        batch_size: int = 256,
        facts: Mapping[str, Mapping[str, Any]],
        task: Task | None = None,
        say: Callable[[str], None] | None = None,
        key: str = "attack",
        fast: bool = False,
        shards: Shards = ONE,
    ) -> None:
        self.shards = shards
        self.fast = fast
        self.model, self.images, self.labels, self.index = model, images, labels, index
        self.attack, self.preset, self.facts = attack, preset, facts
        self.say = say or (lambda text: None)
        self.how: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task}
        self.stages = preset_stages(model, attack, preset, seed, key)
        ball = {"eps": str(attack.eps), "norm": attack.norm}
        self.settings = {**ball, "preset": preset, "seed": seed, "batch_size": batch_size}
        with self._attacks():
            self.identity = identity(model, images, labels, self.stages, self.settings, index)

    def _attacks(self) -> AbstractContextManager[Any]:
        """How attacks compute inside; scores are made in float32 all the same."""
        return torch.autocast(device_of(self.model).type, torch.bfloat16) if self.fast else nullcontext()

    def planned(self) -> dict[str, Any]:
        """Of the results those entries that say on what and under which attacks they will be: what
        :func:`~robust_moe.evaluation.common.expect_comparable` compares."""
        stages = list(self.stages)
        if self.preset == "moe" and moe_layers(self.model):
            assert isinstance(self.attack, PGD.Config)  # preset_stages refuses any other
            stages += [
                Stage(name, attack, f"{MOE}/{name}")
                for name, attack in mixture_attacks(self.attack, self.how["seed"]).items()
            ]
        attacks = [
            {"name": stage.name, "chain": stage.chain, "settings": describe_attack(stage.attack)} for stage in stages
        ]
        return {"count": len(self.index), "data": {"sha256": self.identity["data"]}, "attacks": attacks}

    def complete(
        self,
        results: Path | None,
        report: Path | None,
        *,
        resume: bool = True,
        beside: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> dict[str, Any]:
        """The results (:func:`~robust_moe.evaluation.make_results`), which are also written.

        Args:
            results: the JSON file, written over if it is there, with the arrays of every image beside it; None: none.
                What may be written over is the caller's to know: :func:`~robust_moe.outputs.expect_outputs`.
            report: the HTML file; None: none.
            resume: go on with the journal that is beside the first of these files, and evaluate nothing where
                ``results`` has this evaluation already. False: what is there of these files is deleted at once.
            beside: (name, results) of other models, which the report shows too.

        Raises:
            ResumeError: a journal of another model, other data or other settings.
            FloatingPointError: NaN in a logit or an attack's gradient.
            ValueError: images, labels or a model that cannot be evaluated; see
                :func:`~robust_moe.evaluation.run_suite`.
        """
        writes = self.shards.rank == 0
        done = None if results is None or not resume else self.shards.first(partial(self._finished, results))
        if done is not None:
            self.say(f"{results}: finished already; --fresh (resume=False) evaluates again")
            if results is not None and report is not None and writes:  # it may be another evaluation's
                _write_report(done, read_samples(samples_file(results)), report, beside)
            return done
        first = results or report
        with Journal(first and first.with_suffix(".journal"), self.identity, resume, self.shards) as journal:
            if writes:
                clear_outputs(evaluation_outputs(results, report), anew=not resume, keep=JOURNAL)
            try:
                with self._attacks():
                    content, samples = self._run(journal)
            except (
                BaseException
            ):  # where nothing was computed, nothing is left that a corrected call would stumble over
                if journal.get("sanity") is None:
                    journal.remove()
                raise
            if results is not None and writes:
                content = write_results(content, samples, results)
            if report is not None and writes:
                _write_report(content, samples, report, beside)
            journal.remove()
        return content

    def _finished(self, path: Path) -> dict[str, Any] | None:
        """The content of ``path`` if it is this evaluation's and whole."""
        if not samples_file(path).is_file() or path.with_suffix(".journal").is_file():
            return None
        try:
            results = read_results(path)
        except ValueError:
            return None
        return results if results.get("identity") == self.identity else None

    def _run(self, journal: Journal) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(results, samples), of which the journal keeps every batch."""
        how: dict[str, Any] = {"index": self.index, **self.how, "journal": journal}
        ball: dict[str, Any] = {"eps": float(self.attack.eps), "norm": self.attack.norm}
        full = self.preset == "full"
        for note in full_notes(self.model, self.stages) if full else ():
            self.say(note)
        suite = run_suite(
            self.model, self.images, self.labels, self.stages, **ball, **how, say=self.say, random=not full
        )
        moe = curve = None
        if self.preset == "moe":
            common: dict[str, Any] = {"images": self.images, "labels": self.labels, "attack": self.attack, **how}
            suite, moe = self._moe(suite, common)
            curve = error_curve(self.model, eps_values=curve_radii(self.attack.eps), **common)
            flags = [*suite.flags, curve_flag(curve, len(self.labels))]
            suite = dataclasses.replace(suite, flags=flags, seconds=journal.seconds)
        elif self.preset == "vmoe":
            curve = vmoe_curve(self.model, self.images, self.labels, **how)
            flags = [*suite.flags, curve_flag(curve, len(self.labels))]
            suite = dataclasses.replace(suite, flags=flags, seconds=journal.seconds)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        results = make_results(
            suite,
            model={**self.facts["model"], "parameters": parameters, "sha256": self.identity["model"]},
            data={**self.facts["data"], "sha256": self.identity["data"]},
            settings={**self.facts["settings"], **self.settings, "identity": self.identity},
            device=device_of(self.model),
            moe=moe,
            curve=curve,
        )
        return results, make_samples(suite)

    def _moe(self, suite: SuiteResult, common: Mapping[str, Any]) -> tuple[SuiteResult, dict[str, Any] | None]:
        """The suite with the attacks on experts and router, and their numbers; None, and a line that says so, for a
        dense model. The worst case of both is one and the same."""
        if not moe_layers(self.model):
            self.say("the model is dense: no experts, router or routing to measure")
            return suite, None
        moe, stages = run_moe(self.model, **common)
        suite = with_stages(suite, stages, float(self.attack.eps), self.attack.norm)
        assert suite.robust is not None  # there are attacks
        robust = float(suite.robust.mean())
        return suite, {**moe, "union": robust, "union_interval": list(wilson_interval(robust, len(self.labels)))}


def _write_report(*what: Any) -> None:
    from robust_moe.evaluation.html_report import write_report  # with matplotlib, only now

    write_report(*what)
