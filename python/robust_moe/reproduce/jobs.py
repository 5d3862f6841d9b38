"""One run at one seed: its configuration, its folder, and whether it is finished."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_moe.config import ConfigError, TrainConfig, config_from_dict, flatten, load_config
from robust_moe.content import ContentError, anything, fields, flag, mapping, refuse, text, whole
from robust_moe.engine.checkpoint import CheckpointError, load_checkpoint
from robust_moe.engine.state import NEUTRAL, differing_settings, precision_of
from robust_moe.files import replace_file
from robust_moe.outputs import Kind, Output, json_with, run_outputs
from robust_moe.reproduce.compute import equal_compute, expect_no_dearer, shortened
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.scales import Scale
from robust_moe.settings import plain, read_yaml, replaced

__all__ = ["Job", "deciding", "expect_overrides", "job_outputs", "lasting", "make_jobs", "write_json"]

JOB, MEASURES, LOG = "job.json", "measures.json", "log.txt"
LOCK = ".lock"  # empty; held by who works in the folder
CHECKPOINT = "last.pt"  # of every run, so that all have trained to the end; claims are decided by it
BEST = "best.pt"  # of the validation images; its numbers stand beside those of the last
FORMAT = 3  # of what is measured; raised when finished runs have to be measured anew
ELSEWHERE = ("data.root", "eval.batch_size")  # besides the trainer's: where things are, how many at once
ADVICE = "Start anew with --fresh, or choose another folder with --runs"
KEPT = ("run.epochs",)  # a run that has its own keeps it under an override: those that are compared have the same one
MEASURED = ("eps", "steps", "alpha", "norm")  # settings of eval.attack that a study's PGD has


@dataclass(frozen=True)
class Job:
    """A run at a seed. ``parts``: by setting, the jobs whose checkpoints it starts from."""

    run: str
    seed: int
    config: TrainConfig
    data: str  # digest of the images and labels: the same configuration may meet others in data.root
    images: int
    sweep_images: int
    probe_images: int
    trained: bool
    parts: dict[str, Job]

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out)

    @property
    def name(self) -> str:
        return f"{self.run}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / LOG

    @property
    def checkpoint(self) -> Path:
        """What is measured, and what other runs start from."""
        return self.folder / CHECKPOINT

    @property
    def best(self) -> Path:
        """The checkpoint that validation chose; there is none where nothing was validated."""
        return self.folder / BEST

    def identity(self) -> str:
        """A digest of all that decides the numbers: another one, other numbers."""
        where = {*NEUTRAL, *ELSEWHERE, *self.parts}
        settings = {key: value for key, value in flatten(self.config).items() if key not in where}
        parts = {key: part.identity() for key, part in self.parts.items()}
        content = [FORMAT, self.run, settings, self.data, parts, self.images, self.sweep_images, self.trained]
        if RUNS[self.run].probes:
            content += [RUNS[self.run].basic, RUNS[self.run].probes, self.probe_images]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    def write(self) -> Path:
        """The file that a worker reads, ``job.json`` in the job's folder: one JSON object.

        ``run``: the name of the run, a key of :data:`RUNS`. ``seed``: of its training, >= 0. ``config``: all settings,
        as ``robust-moe config`` lists them. ``data``: the digest of images and labels, in hexadecimal digits; empty:
        not known. ``images``, ``sweep_images``, ``probe_images``: how many test images are attacked, attacked at every
        radius, and looked at by the run's probes, >= 0. ``trained``: true; false: its network is measured without
        training. ``parts``: by setting, such as ``model.init_from``, the job whose checkpoint the run starts from, with
        the same fields.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / JOB, self._to_dict())
        return self.folder / JOB

    def _to_dict(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts = {key: part._to_dict() for key, part in self.parts.items()}
        return {**own, "config": plain(self.config), "parts": parts}

    @classmethod
    def read(cls, file: Path) -> Job:
        """What :meth:`write` wrote.

        Raises:
            ConfigError: a field is not as :meth:`write` describes it, or the file is no JSON; the message names the
                file and the field.
        """
        try:
            tree = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: expected the description of a run, got something that is no JSON") from error
        try:
            _description(tree, "job")
            return cls._from_dict(tree)
        except (ContentError, ConfigError, RecursionError) as error:
            raise ConfigError(f"{file}: {error}") from error

    @classmethod
    def _from_dict(cls, tree: dict[str, Any]) -> Job:
        own = {field.name: tree[field.name] for field in dataclasses.fields(cls)}
        parts = {key: cls._from_dict(part) for key, part in tree["parts"].items()}
        return cls(**{**own, "config": config_from_dict(tree["config"]), "parts": parts})

    def expect_startable(self) -> None:
        """Refuse to go on with a checkpoint of other settings or other images.

        Raises:
            CheckpointError: there is one; the differences are shown. Or it is damaged.
        """
        if not self.trained or self.finished() is not None or not self.checkpoint.is_file():
            return
        if (self.folder / JOB).is_file():
            begun = Job.read(self.folder / JOB)
            if begun.data != self.data:
                raise CheckpointError(
                    f"{self.checkpoint}: expected training on the images of {self.data[:12]}, as the data are now "
                    f"(SHA-256), got some on {begun.data[:12]}. {ADVICE}"
                )
        try:
            begun_run = load_checkpoint(self.checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {ADVICE}") from error
        changed = differing_settings(begun_run["config"], self.config)
        changed.pop("data.root", None)  # the training compares the images themselves
        if self.config.run.precision in ("auto", precision_of(begun_run, self.checkpoint)):
            changed.pop("run.precision", None)  # auto was or will be the same
        if changed:
            raise CheckpointError(
                f"{self.checkpoint}: expected the configuration that the run was started with; "
                f"{'; '.join(changed.values())}. {ADVICE}"
            )

    def finished(self) -> dict[str, Any] | None:
        """What was measured, if it was, and of this very job."""
        try:
            found = json.loads((self.folder / MEASURES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("identity") == self.identity() else None

    def finish(self, measures: dict[str, Any]) -> None:
        """Keep what was measured, as the last thing that the job does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / MEASURES, {"identity": self.identity(), **measures})


def _description(value: Any, place: str) -> None:
    """The check of what :meth:`Job.write` describes."""
    counts = {name: whole() for name in ("seed", "images", "sweep_images", "probe_images")}
    settings = {"config": mapping(anything), "parts": mapping(_description)}
    fields({"run": text, **counts, "data": text, "trained": flag, **settings})(value, place)
    if value["run"] not in RUNS:
        raise refuse(f"{place}.run", "a run of robust-moe reproduce", value["run"])


def job_outputs(folder: Path) -> list[Output]:
    """All that a job writes in its folder."""
    return [
        (folder / JOB, json_with("the description of a study's run", "run", "seed", "config")),
        (folder / MEASURES, json_with("the measures of a study's run", "identity", "measures")),
        *((folder / name, Kind("the log of a study's run", lambda path, known: known)) for name in (LOG, LOCK)),
        *run_outputs(folder),
    ]


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all; NaN and infinity are refused (ValueError)."""
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def expect_overrides(names: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Refuse overrides that would remove what is compared, or that a study does not heed.

    Returns:
        A sentence for each override that some of the runs do not follow, see :data:`KEPT`.

    Raises:
        ConfigError: a setting by which the runs ``names`` differ, or which the study decides itself.
    """
    compared = {key: name for name in reversed(names) for key, _ in _chosen(RUNS[name].settings) if key not in KEPT}
    compared |= {key: name for name in names for key in RUNS[name].parts}
    for key, value in _chosen(overrides):
        why = None
        if key in ("run.seed", "run.out"):
            why = "which differs from run to run (--seeds, --first-seed, --runs)"
        elif key in ("model.moe.balance.weight", "model.dual.alpha"):
            why = "which the claims are about"
        elif f"{key}.".startswith("eval.attack.") and key.removeprefix("eval.attack.") not in MEASURED:
            why = f"as all is measured by PGD from one random start ({', '.join(MEASURED)} can be set)"
        elif key in compared and not key.startswith("eval.attack."):
            why = f"which makes the run {compared[key]} what it is"
        if why is not None:
            raise ConfigError(f"{key}: expected no such override, {why}, got {str(value)!r}")
    own = {name: _kept(name) for name in names}
    notes = []
    for key, _ in _chosen(overrides):
        if keep := [f"{name} ({kept[key]})" for name, kept in own.items() if key in kept]:
            notes.append(f"{key}: the override is for all other runs; of their own have it {', '.join(keep)}")
    return notes


def deciding(settings: Sequence[str]) -> dict[str, Any]:
    """key=value settings by dotted name, without those that decide no number (:meth:`Job.identity`)."""
    return {key: value for key, value in _chosen(settings) if key not in {*NEUTRAL, *ELSEWHERE}}


def lasting(overrides: Sequence[str]) -> list[str]:
    """The overrides without ``data.root``, which is a path of one machine."""
    kept: list[str] = []
    for item in overrides:
        said = dict(_chosen([item]))
        others = [f"{key}={value}" for key, value in said.items() if key != "data.root"]
        kept += others if "data.root" in said else [item]
    return kept


def _kept(name: str) -> dict[str, Any]:
    """The settings of a run that an override does not replace."""
    return {key: value for key, value in _chosen(RUNS[name].settings) if key in KEPT}


def _chosen(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, those of a section such as ``method={name: trades}`` or ``method=trades`` too."""
    sections = {key.removesuffix(".name") for key in flatten(TrainConfig()) if key.endswith(".name")}
    for item in overrides:
        key, _, value = item.partition("=")
        said = flatten({key: read_yaml(value, key)}) if value.startswith("{") else {key: value}
        for name, leaf in said.items():
            yield f"{name}.name" if name in sections else name, leaf


def _of_run(name: str, scale: Scale) -> TrainConfig:
    """A run's configuration before overrides: where its method is another than the scale's settings are for, those
    that both methods have stay."""
    run = RUNS[name]
    settings = [*scale.families[run.family], *run.settings]
    return config_from_dict(plain(load_config(None, list(scale.settings))), settings, where="scale")


def _has(config: TrainConfig, override: str) -> bool:
    """Whether the configuration has a setting or a section of that name."""
    key = override.partition("=")[0]
    return any(f"{name}.".startswith(f"{key}.") for name in flatten(config))


def make_jobs(
    names: Sequence[str],
    scale: Scale,
    seeds: Sequence[int],
    folder: Path,
    overrides: Sequence[str] = (),
    data: str = "",
) -> list[Job]:
    """The jobs of the runs ``names`` and of those whose checkpoints they need, each once.

    ``overrides``: key=value on top of the scale's settings, for all runs. ``data``: digest of the images. Raises
    ConfigError as in training.
    """
    jobs: dict[tuple[str, int], Job] = {}

    own = {name: _of_run(name, scale) for name, run in RUNS.items() if run.family in scale.families}
    for name in names:
        if name not in own:
            raise ConfigError(
                f"scale: expected one with settings of the family {RUNS[name].family!r}, which the run {name} is of, "
                f"got one for {', '.join(map(repr, scale.families))}"
            )
    heeded = {item for item in overrides if any(_has(config, item) for config in own.values())}

    @functools.cache
    def whole(name: str, *parts: str) -> TrainConfig:  # read once a run; parts: key=checkpoint
        # of a setting that only other runs' methods have, such as method.beta, this run takes no notice
        mine = [item for item in overrides if _has(own[name], item) or item not in heeded]
        kept = [f"{key}={value}" for key, value in _kept(name).items()]
        return config_from_dict(plain(own[name]), [*mine, *kept, *parts], where=name)

    @functools.cache
    def common(name: str, *parts: str) -> TrainConfig:
        config = shortened(name, whole(name, *parts), RUNS[name].share)
        return config if RUNS[name].equal is None else equal_compute(config, common(RUNS[name].equal))

    def add(name: str, seed: int) -> Job:
        if (name, seed) not in jobs:
            run = RUNS[name]
            parts = {key: add(part, seed) for key, part in run.parts.items()}
            if run.share != 1:
                expect_no_dearer(name, whole(name), [common(name), *(part.config for part in parts.values())])
            weights = [f"{key}={part.checkpoint}" for key, part in parts.items()]
            config = replaced(common(name, *weights), "run.seed", seed)
            config = replaced(config, "run.out", str(folder / name / f"seed-{seed}"))
            counts = (scale.images, scale.sweep_images, scale.probe_images)
            jobs[name, seed] = Job(name, seed, config, data, *counts, run.trained, parts)
        return jobs[name, seed]

    for seed in seeds:
        for name in names:
            add(name, seed)
    return list(jobs.values())
