"""What commands write: named before the work starts, and refused where something else would be lost.

A command lists its outputs, each a name and the :class:`Kind` of file that it will be. A file that is there is written
over only if it is of that kind: an earlier one of the same command. A checkpoint, a data file, another command's
result, a folder, a device or a FIFO never is. No PyTorch is imported here: the GPU campaign starts without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_moe.files import remove_leftovers, temporary_file
from robust_moe.settings.errors import ConfigError

__all__ = [
    "CONFIG",
    "EVENTS_SUFFIX",
    "Kind",
    "Output",
    "certificate_outputs",
    "clear_outputs",
    "evaluation_outputs",
    "expect_folder",
    "expect_json_name",
    "expect_named",
    "expect_outputs",
    "figure",
    "figure_marks",
    "is_free",
    "json_with",
    "remove_folder",
    "robustbench_file",
    "run_outputs",
    "samples_file",
    "text",
]

JSON_LIMIT = 2**28  # bytes: none of ours is larger
EVENTS_SUFFIX = ".robust-moe"  # of the names of TensorBoard's files
HEAD = 2**16  # bytes of a file that are looked at where its beginning tells what it is


@dataclass(frozen=True)
class Kind:
    """A kind of output file.

    Args:
        what: how messages call it, with its article.
        ours: whether a regular file that is there is one; its second argument says that another output of the same list
            is there and of its kind, for files whose content alone cannot tell.
        owner: which other file a file that is there belongs to; None: none.
    """

    what: str
    ours: Callable[[Path, bool], bool]
    owner: Callable[[Path], Path | None] = lambda _: None


Output = tuple[Path, Kind]


# --- checks -----------------------------------------------------------------------------------------------------------


def expect_named(argument: str, path: str | Path) -> Path:
    """``path`` with the home folder in place of ``~``; raises :class:`ConfigError` for an empty one, which would be the
    working directory."""
    if os.fspath(path) == "":
        raise ConfigError(f"{argument}: expected a name, got ''")
    return Path(os.path.expanduser(path))


def expect_json_name(argument: str, path: str | Path) -> Path:
    """``path``, whose name ends in .json, as the names of the files beside it are made of it; or ConfigError."""
    path = expect_named(argument, path)
    _expect_file(argument, path)  # a device or a folder is refused as such
    if path.suffix != ".json":
        raise ConfigError(f"{argument}: expected a file whose name ends in .json, got {path}")
    return path


def expect_folder(argument: str, path: str | Path) -> Path:
    """``path``, a folder or one that can be made; raises :class:`ConfigError` otherwise."""
    path = expect_named(argument, path)
    try:
        mode = _mode(path)
        if mode is None:
            _expect_room(path)
    except (OSError, ValueError) as error:
        raise _refused(argument, "a folder to write to", path, error) from error
    if mode is not None and not stat.S_ISDIR(mode):
        raise ConfigError(f"{argument}: expected a folder to write to, got {path} (a {_called(mode)})")
    return path


def expect_outputs(
    argument: str, outputs: Iterable[Output], inputs: Iterable[tuple[str, str | Path | None]] = ()
) -> None:
    """Refuse outputs that cannot be written, are one another, or would take the place of something else.

    Args:
        argument: that the names come from, for messages, e.g. ``"out"``.
        outputs: all files that will be written.
        inputs: (argument, file that will be read); None: none.

    Raises:
        ConfigError: the first output that is refused; nothing has been written.
    """
    outputs = list(outputs)
    places: dict[tuple[Any, ...], Kind] = {}
    for path, kind in outputs:
        _expect_file(argument, path)
        first = places.setdefault(_place(path), kind)
        if first is not kind:
            raise ConfigError(f"{argument}: expected names that differ, got {path} for {first.what} and {kind.what}")
    for name, source in inputs:
        if source is not None and _place(Path(source)) in places:
            raise ConfigError(f"{argument}: expected another file than {name}, which is read, got {source}")
    there = [(path, kind) for path, kind in outputs if path.is_file()]
    known = any(kind.ours(path, False) for path, kind in there)
    for path, kind in there:
        if not is_free(path, kind, known):
            raise ConfigError(f"{argument}: expected a new name or {kind.what}, got another file at {path}")
        if other := kind.owner(path):
            raise ConfigError(f"{argument}: expected other names for {kind.what}, got {path}, which belongs to {other}")


def is_free(path: Path, kind: Kind, known: bool = False) -> bool:
    """Whether a file of ``kind`` may be written to ``path``: nothing is there, an empty file or one of the kind.
    ``known``: as for :attr:`Kind.ours`."""
    return not path.is_file() or not path.stat().st_size or kind.ours(path, known)


def clear_outputs(outputs: Iterable[Output], *, anew: bool, keep: Kind | None = None) -> None:
    """Delete what killed writes of ``outputs`` left; ``anew``: and the files themselves, but for those of the kind
    ``keep``. No other process may be writing them."""
    outputs = list(outputs)
    remove_leftovers(path for path, _ in outputs)
    for path, kind in outputs if anew else ():
        if kind is not keep:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path, outputs: Iterable[Output]) -> None:
    """Delete ``outputs``, and their folders up to ``folder`` where nothing else is in them."""
    outputs = list(outputs)
    clear_outputs(outputs, anew=True)
    for each in sorted({path.parent for path, _ in outputs} | {folder}, reverse=True):  # the deepest first
        with contextlib.suppress(OSError):
            each.rmdir()


def _expect_file(argument: str, path: Path) -> None:
    try:
        mode = _mode(path)
        if mode is None or stat.S_ISREG(mode):
            _mode(temporary_file(path))  # its name is longer
            _expect_room(path)
    except (OSError, ValueError) as error:
        raise _refused(argument, "a file to write", path, error) from error
    if mode is not None and not stat.S_ISREG(mode):
        raise ConfigError(f"{argument}: expected a file to write, got the {_called(mode)} {path}")


def _refused(argument: str, expected: str, path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{argument}: expected {expected}, got {path} ({getattr(error, 'strerror', None) or error})")


def _mode(path: Path) -> int | None:
    """Of what a name leads to; None: nothing is there."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _expect_room(path: Path) -> None:
    """Raise OSError where no file or folder of that name can be made."""
    folder = path.parent
    while _mode(folder) is None and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(0, f"{folder} is not writable")


def _called(mode: int) -> str:
    names = {
        stat.S_IFDIR: "folder",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFREG: "file",
    }
    return names.get(stat.S_IFMT(mode), "device")


def _place(path: Path) -> tuple[Any, ...]:
    """Equal for names of one file, through links too."""
    try:
        found = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return found.st_dev, found.st_ino


# --- kinds of files ---------------------------------------------------------------------------------------------------


def json_with(what: str, *keys: str, **values: Any) -> Kind:
    """A JSON object that has ``keys``, and ``values`` under theirs."""

    def ours(path: Path, _: bool) -> bool:
        if path.stat().st_size > JSON_LIMIT or _head(path, 1) != b"{":
            return False
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return False
        return all(key in content for key in keys) and all(content.get(key) == value for key, value in values.items())

    return Kind(what, ours)


def text(what: str, beginning: str) -> Kind:
    """A text that begins with ``beginning``."""
    return Kind(what, lambda path, _: _head(path).startswith(beginning.encode()))


def figure(command: str, lines: str | None = None) -> Kind:
    """A PNG figure of ``command``, as :func:`figure_marks` marks it. One of an earlier version has no mark: it is
    Matplotlib's, and beside other files of the command, metrics.jsonl with ``lines`` of that kind among them."""

    def ours(path: Path, known: bool) -> bool:
        head = _head(path)
        drawn = known and head.startswith(b"\x89PNG") and b"Matplotlib" in head
        if b"robust-moe " in head:
            return drawn and f"robust-moe {command}".encode() in head
        return drawn and (lines is None or _has_lines(path.with_name("metrics.jsonl"), lines))

    return Kind(f"a figure of robust-moe {command}", ours)


def _has_lines(metrics: Path, kind: str) -> bool:
    return metrics.is_file() and f'{{"kind": "{kind}"'.encode() in _head(metrics, JSON_LIMIT)


def figure_marks(command: str) -> dict[str, str]:
    """``metadata`` of ``savefig`` by which :func:`figure` knows the file again."""
    return {"Source": f"robust-moe {command}"}


def journal(what: str, foreign: str) -> Kind:
    """A journal (:class:`~robust_moe.evaluation.Journal`) whose identity does not have the entry ``foreign``. A first
    line that a kill cut short may be any command's."""

    def ours(path: Path, _: bool) -> bool:
        with open(path, "rb") as file:
            line = file.readline(JSON_LIMIT)
        start = re.match(rb"([0-9a-f]{1,8}$|[0-9a-f]{8} )(.*)", line, re.DOTALL)
        if start is None:
            return False
        beginning = b'{"format": '
        if not line.endswith(b"\n"):
            return start[2].startswith(beginning) or beginning.startswith(start[2])
        try:
            return foreign not in json.loads(start[2])["identity"]
        except (ValueError, LookupError, TypeError):
            return start[2].startswith(beginning)  # damaged, or of an earlier version

    return Kind(what, ours)


def _head(path: Path, count: int = HEAD) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _members(path: Path) -> dict[str, str]:
    """The whole names in an archive by their last parts; empty where the file is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.rpartition("/")[2]: name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError):
        return {}


def _checkpoint(path: Path, known: bool) -> bool:
    if known:  # a damaged one too
        return True
    members = _members(path)
    if "data.pkl" not in members:
        return False
    try:
        with zipfile.ZipFile(path) as archive, archive.open(members["data.pkl"]) as file:
            pickled = file.read(JSON_LIMIT)  # never unpickled: it has the names of its entries as plain text
    except (zipfile.BadZipFile, OSError, ValueError):
        return False
    return all(name in pickled for name in (b"config", b"position", b"format"))


def _metrics(path: Path, known: bool) -> bool:
    """Any whole line is of a run, or there is none yet."""
    lines = _head(path).splitlines()
    return known or not lines or any(line.startswith(b'{"kind": ') and b'"step": ' in line for line in lines)


def _config(path: Path, known: bool) -> bool:
    """Every section is there, and no comment: a configuration that was written by hand is not to be lost. With a
    checkpoint beside it the run goes on, and a file with comments stays as it is."""
    if known and any(path.with_name(name).is_file() for name in ("last.pt", "best.pt")):
        return True
    content = _head(path, JSON_LIMIT).decode("utf-8", "replace")
    sections = {line.partition(":")[0] for line in content.splitlines() if ":" in line}
    return {"data", "model", "method", "optim", "eval", "run"} <= sections and not _has_comment(content)


def _has_comment(content: str) -> bool:
    """Whether YAML has a comment, or cannot be read: a # that is part of no token."""
    if "#" not in content:
        return False
    import yaml

    end = 0
    try:
        for token in yaml.scan(content, Loader=yaml.SafeLoader):
            if "#" in content[end : token.start_mark.index]:
                return True
            end = max(end, token.end_mark.index)
    except yaml.YAMLError:
        return True
    return "#" in content[end:]


def _events(path: Path) -> bool:
    """A file of events whose name has a run's suffix; or an earlier version's: without a suffix, and with the epoch of
    training that every run logs. Other programs may write to the same folder."""
    name = path.name.removesuffix(EVENTS_SUFFIX)
    if not path.is_file() or not re.fullmatch(r"events\.out\.tfevents\.\d{10,}\..+\.\d+\.\d+", name):
        return False
    return name != path.name or b"train/epoch" in _head(path)


CONFIG = Kind("the configuration of an earlier run, which has no comments", _config)
CHECKPOINT = Kind("a checkpoint of an earlier run", _checkpoint)
METRICS = Kind("the metrics of an earlier run", _metrics)
EVENTS = Kind("TensorBoard's events of an earlier run", lambda path, known: known)
RESULTS = json_with("a result file of robust-moe eval", "format", "attacks", "clean")
REPORT = Kind("a report of robust-moe eval", lambda path, _: b"robustness report</title>" in _head(path))
JOURNAL = journal("the journal of an evaluation", foreign="by")
ROBUSTBENCH = json_with("an entry of RobustBench", "autoattack_acc", "clean_acc")
CERTIFIED = json_with("a result file of robust-moe certify", "format", "by", "guarantee")
CERTIFIED_JOURNAL = journal("the journal of robust-moe certify", foreign="preset")
CERTIFIED_FIGURE = figure("certify")
RUN_FIGURES = {"training.png": figure("train", "epoch"), "routing.png": figure("train", "routing")}


# --- what commands write ----------------------------------------------------------------------------------------------


def samples_file(path: Path) -> Path:
    """The arrays beside the result file ``path``: ``samples.npz`` beside ``results.json``."""
    stem = path.stem.replace("results", "samples", 1) if "results" in path.stem else f"{path.stem}-samples"
    return path.with_name(f"{stem}.npz")


def samples_of(results: Path) -> Kind:
    """The arrays of ``results``; those of another result file that gives them the same name belong to that one."""

    def owner(path: Path) -> Path | None:
        claims = json_with("", "format", "attacks", "clean", samples=path.name).ours
        others = (each for each in path.parent.glob("*.json") if samples_file(each).name == path.name)
        return next((each for each in sorted(others) if _place(each) != _place(results) and claims(each, False)), None)

    def ours(path: Path, _: bool) -> bool:
        return {"index.npy", "label.npy", "clean.npy"} <= {*_members(path)}

    return Kind("the arrays of robust-moe eval", ours, owner)


def robustbench_file(path: Path) -> Path:
    """The RobustBench entry beside the result file ``path``."""
    return path.with_name(f"{path.stem}-robustbench.json")


def evaluation_outputs(results: Path | None, report: Path | None, entry: bool = False) -> list[Output]:
    """Of an evaluation: the result file ``results`` with its arrays and, if ``entry``, RobustBench's; the HTML file
    ``report``; the journal, beside the first of the two."""
    first = results or report
    outputs = [] if first is None else [(first.with_suffix(".journal"), JOURNAL)]
    if results is not None:
        outputs += [(results, RESULTS), (samples_file(results), samples_of(results))]
        outputs += [(robustbench_file(results), ROBUSTBENCH)] if entry else []
    return outputs if report is None else [*outputs, (report, REPORT)]


def certificate_outputs(path: Path) -> list[Output]:
    """Of ``robust-moe certify``: the result file ``path``, its plot, its journal."""
    plot, kept = path.with_suffix(".png"), path.with_suffix(".journal")
    return [(path, CERTIFIED), (plot, CERTIFIED_FIGURE), (kept, CERTIFIED_JOURNAL)]


def run_outputs(folder: Path) -> list[Output]:
    """Of a training and what follows it, in its run folder."""
    return [
        (folder / "config.yaml", CONFIG),
        (folder / "metrics.jsonl", METRICS),
        *((folder / name, CHECKPOINT) for name in ("last.pt", "best.pt", "crash.pt")),
        *((path, EVENTS) for path in sorted(folder.glob("tensorboard/events.out.tfevents.*")) if _events(path)),
        *((folder / name, kind) for name, kind in RUN_FIGURES.items()),
        *evaluation_outputs(folder / "results.json", folder / "results.html"),
    ]
