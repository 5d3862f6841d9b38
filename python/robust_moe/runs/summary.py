"""What a run folder says of its run, whatever has become of it.

Nothing is unpickled or imported, and nothing is written: a folder may be anyone's, and a training may be at work in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robust_moe.config import ConfigError, flatten
from robust_moe.content import ContentError, fields, number, optional, share, whole
from robust_moe.engine.log import read_metrics
from robust_moe.engine.run_folder import LOCK, TRAINED, is_running
from robust_moe.evaluation.results import read_results
from robust_moe.settings import read_yaml

__all__ = ["FINISHED", "RUNNING", "STOPPED", "UNKNOWN", "RunSummary", "find_runs", "read_run", "settings_in"]

FINISHED, RUNNING, STOPPED, UNKNOWN = "finished", "running", "stopped", "unknown"
_LARGEST_CONFIG = 2**20  # bytes
_LAST_DAY = 253_000_000_000  # seconds since 1970, in the year 9987
_POSITION = fields({"epoch": whole(1), "step": whole()})
_MEASURED = fields(
    {
        "val_clean": share,
        "val_robust": optional(share),
        "train_task_loss": number(),
        "train_loss": number(),
        "images_per_second": number(0),
    },
    required=False,
)


@dataclass(frozen=True)
class RunSummary:
    """One run, as the files in its folder have it."""

    name: str  # the folder, from the one that was searched
    folder: Path
    state: str  # FINISHED: trained to its end; RUNNING: a training is in the folder; STOPPED; UNKNOWN: see problems
    settings: Mapping[str, str] = field(default_factory=dict)  # by dotted name, as config.yaml has them
    lines: tuple[Mapping[str, Any], ...] = ()  # of metrics.jsonl, one per epoch, without damaged ones
    written: float | None = None  # when the folder was last logged to, in seconds since 1970; None: never
    test_clean: float | None = None  # accuracies on test images (results.json), as shares; None: not measured
    test_robust: float | None = None
    problems: tuple[str, ...] = ()  # sentences that name what is damaged or missing

    @property
    def method(self) -> str:
        """Of training; empty where it is not known."""
        return self.settings.get("method.name", "")

    @property
    def model(self) -> str:
        """The network and, where it has them, its experts: ``resnet18 E4``; empty where it is not known."""
        name = self.settings.get("model.name", "")
        mixture = self.settings.get("model.mixture.num_experts", "0")
        routed = self.settings.get("model.moe.layers", "[]") != "[]"
        experts = mixture if mixture != "0" else self.settings.get("model.moe.num_experts", "") if routed else ""
        return f"{name} E{experts}" if experts else name

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.lines[-1]["epoch"] if self.lines else 0

    @property
    def epochs(self) -> int | None:
        """Epochs asked for; None where that is not known."""
        return _count(self.settings.get("run.epochs"))

    @property
    def clean(self) -> float | None:
        """Clean accuracy of the last validation."""
        return self._last("val_clean")

    @property
    def robust(self) -> float | None:
        """Robust accuracy of the last validation."""
        return self._last("val_robust")

    @property
    def best(self) -> float | None:
        """The highest robust accuracy of all validations."""
        return max((line["val_robust"] for line in self.lines if line.get("val_robust") is not None), default=None)

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with that accuracy."""
        best = self.best
        return None if best is None else next(line["epoch"] for line in self.lines if line.get("val_robust") == best)

    @property
    def speed(self) -> float | None:
        """Images a second that the last epoch trained on; None: of an earlier version, which did not tell."""
        return self._last("images_per_second")

    def _last(self, name: str) -> float | None:
        return next((line[name] for line in reversed(self.lines) if line.get(name) is not None), None)


def find_runs(folder: str | Path) -> list[RunSummary]:
    """The runs in ``folder`` and all folders below it, by name; of links to folders none is followed.

    A folder is a run's where a training has left a file by which a run is known, whether or not it can be read.

    Raises:
        ConfigError: no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"folder: expected a folder of run folders, got {folder}, which is none")
    return sorted(_below(folder), key=lambda run: run.name)


def _below(folder: Path) -> Iterator[RunSummary]:
    closed: list[OSError] = []
    for place, below, files in os.walk(folder, onerror=closed.append):
        below.sort()
        if not {*TRAINED, LOCK}.isdisjoint(files):
            yield read_run(Path(place), _name(Path(place), folder))
    for error in closed:
        path = Path(error.filename)
        yield RunSummary(_name(path, folder), path, UNKNOWN, problems=(f"{path}: {error.strerror}",))


def _name(path: Path, folder: Path) -> str:
    return path.resolve().name if path == folder else path.relative_to(folder).as_posix()


def read_run(folder: str | Path, name: str | None = None) -> RunSummary:
    """The run in ``folder``, which is not changed; of what cannot be read, ``problems`` says so. ``name``: None: the
    folder's."""
    folder = Path(folder)
    name = folder.resolve().name if name is None else name
    problems: list[str] = []
    try:
        settings = _settings(folder / "config.yaml")
        lines = tuple(_epochs(folder, problems))
        written = _written(folder / "metrics.jsonl")
        test_clean, test_robust = _tested(folder / "results.json", problems)
        state = RUNNING if is_running(folder) else FINISHED if _is_over(settings, lines) else STOPPED
    except (ConfigError, OSError) as error:
        text = f"{error.filename or folder}: {error.strerror}" if isinstance(error, OSError) else str(error)
        return RunSummary(name, folder, UNKNOWN, problems=(*problems, text))
    return RunSummary(name, folder, state, settings, lines, written, test_clean, test_robust, tuple(problems))


def _settings(path: Path) -> dict[str, str]:
    """Raises ConfigError where ``path`` is not what a run writes. Names of components are not looked up: those of
    another package would have to be imported."""
    expected = f"{path}: expected the configuration of a run"
    if not path.is_file():
        raise ConfigError(f"{expected}, found nothing")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ConfigError(f"{expected}, got a file of more than {_LARGEST_CONFIG:,} bytes")
    try:
        settings = settings_in(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{expected}, got no readable YAML") from error
    if missing := [key for key in ("method.name", "model.name", "run.epochs") if key not in settings]:
        raise ConfigError(f"{expected}, got one without {', '.join(missing)}")
    if _count(settings["run.epochs"]) is None:
        raise ConfigError(f"{path}: run.epochs: expected a whole number >= 1, got {settings['run.epochs']!r}")
    return settings


def _written(path: Path) -> float | None:
    """When a file was written last, where that is a day of the calendar."""
    seconds = path.stat().st_mtime if path.is_file() else -1.0
    return seconds if 0 <= seconds < _LAST_DAY else None


def settings_in(text: str) -> dict[str, str]:
    """The settings of a configuration in YAML by dotted name, as text; none where it is not made of sections."""
    tree = read_yaml(text, "config")
    _expect_bounded(tree)
    return {key: str(value) for key, value in flatten(tree).items()} if isinstance(tree, Mapping) else {}


def _expect_bounded(tree: Any) -> None:
    """Refuse content that takes more than _LARGEST_CONFIG characters to write without aliases, which a few lines of
    YAML multiply without end."""
    left, size = [tree], 0
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value
        size += len(value) if isinstance(value, str) else 1
        if size > _LARGEST_CONFIG:
            raise ConfigError(f"config: expected at most {_LARGEST_CONFIG:,} characters, got more by aliases")


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and 0 < len(text) < 16 else None


def _epochs(folder: Path, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    """The metrics of every epoch; lines whose numbers are not as a run writes them are passed over, the first named."""
    foreign: list[ContentError] = []
    for line in read_metrics(folder, "epoch", problems.append):
        try:
            _POSITION(line, "")
            _MEASURED(line, "")
        except ContentError as error:
            foreign.append(error)
        else:
            yield line
    if foreign:
        more = f" (and {len(foreign) - 1} more lines)" if len(foreign) > 1 else ""
        problems.append(f"{folder / 'metrics.jsonl'}: passed over the line of an epoch: {foreign[0]}{more}")


def _tested(path: Path, problems: list[str]) -> tuple[float | None, float | None]:
    """(clean, robust) of the evaluation that follows a training."""
    if not path.is_file():
        return None, None
    try:
        results = read_results(path)
    except ValueError as error:
        problems.append(str(error))
        return None, None
    return results["clean"], results["robust"]


def _is_over(settings: Mapping[str, str], lines: tuple[Mapping[str, Any], ...]) -> bool:
    """Whether the last epoch that was measured is the last of the run."""
    if not lines:
        return False
    epochs, steps = (_count(settings.get(f"run.{name}")) for name in ("epochs", "max_steps"))
    return lines[-1]["epoch"] == epochs or (steps is not None and lines[-1]["step"] >= steps)
