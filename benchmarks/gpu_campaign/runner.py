"""Runs the parts one after another, each a process group of its own, and watches their time.

Imports neither PyTorch nor Triton: whatever happens to a part, this goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_campaign.pack import EXTRA, pack
from benchmarks.gpu_campaign.plan import MARGIN, PARTS, Part, allot, chosen
from benchmarks.gpu_campaign.record import read
from robust_moe.outputs import Kind, Output, expect_named, expect_outputs, json_with, run_outputs

__all__ = ["Campaign", "main"]

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 780.0  # seconds
POLL = 0.2  # seconds between looks at a part
REPACK = 20.0  # seconds between packings while a part runs
GRACE = 3.0  # seconds between asking a part to end and ending it
TOLD = 12  # sentences of a part that are shown; all are in its JSON


@dataclass
class Campaign:
    """One call of the command.

    ``work`` holds what parts write and what a later call goes on from; ``out`` the few packed files.
    """

    parts: Sequence[Part]
    work: Path
    out: Path
    budget: float = BUDGET
    dry: bool = False
    data: Path | None = None
    fresh: bool = False
    python: str = sys.executable
    clock: Callable[[], float] = time.monotonic
    _every: list[Part] = field(default_factory=lambda: list(PARTS))

    def run(self) -> int:
        """0: all that was asked for is there; 1: something is not."""
        self._end = self.clock() + self.budget - min(MARGIN, self.budget / 20)
        self._settings = {"source": source_digest(), "dry": self.dry, "data": str(self.data) if self.data else None}
        waiting, ended = list(self.parts), []
        while waiting:
            part = waiting.pop(0)
            left = self._end - self.clock()
            limit = left if self.dry and left > 0 else allot([part, *waiting], left).get(part.number)
            kept = self._earlier(part)
            if kept is not None:
                print(f"part {part.number}, {part.name}: done before ({kept['found']}); --fresh repeats it", flush=True)
                ended.append(kept)
                continue
            if limit is None:
                result = self._result(part, "left out", 0.0, 0.0, "too little of the budget is left")
            else:
                result = self._run(part, limit)
            ended.append(result)
            self._write(part, result)
            self._tell(part, result)
            if any(row.get("fatal") for row in result["rows"]):
                print("nothing else can run", flush=True)
                self._pack()
                return 1
        self._pack()
        print(f"packed: {self.out}", flush=True)
        return int(any(result["status"] != "done" for result in ended))

    def _run(self, part: Part, limit: float) -> dict[str, Any]:
        lines = self.work / f"{part.stem}.jsonl"
        lines.unlink(missing_ok=True)
        command = [self.python, "-m", "benchmarks.gpu_campaign.part", part.path, "--lines", str(lines)]
        command += ["--folder", str(self.work), "--seconds", str(limit)]
        command += ["--dry-run"] if self.dry else []
        command += ["--data", str(self.data)] if self.data else []
        began = packed = self.clock()
        with open(self.work / f"{part.stem}.log", "wb") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a group of its own, to be ended with all that it started
            )
            try:
                while process.poll() is None and self.clock() - began < limit:
                    if self.clock() - packed > REPACK:
                        self._write(part, self._result(part, "running", self.clock() - began, limit))
                        self._pack()
                        packed = self.clock()
                    try:
                        process.wait(POLL)
                    except subprocess.TimeoutExpired:
                        continue
            finally:  # also when this process is told to stop
                late = process.poll() is None
                _end_group(process)
        status = f"stopped at its limit of {limit:.0f} s" if late else "failed" if process.returncode else "done"
        result = self._result(part, status, self.clock() - began, limit)
        if late and result["found"] is not None:
            result["status"] = "done"  # it only took its time to end
        if result["found"] is None:
            how = "its numbers so far are kept" if late else f"ended with status {process.returncode}, see log.txt"
            result["found"] = f"{how} ({len(result['rows'])} rows)"
        return result

    def _environment(self) -> dict[str, str]:
        """The parts' own: this checkout first on the path; no GPU, and Triton's interpreter, in a dry run."""
        paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if self.dry:
            found |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        return found

    def _result(
        self, part: Part, status: str, seconds: float, limit: float, found: str | None = None
    ) -> dict[str, Any]:
        result = {"part": part.number, "name": part.name, "about": part.about, "status": status}
        result |= {"seconds": round(seconds, 1), "limit": round(limit, 1), "settings": self._settings}
        content = read(self.work / f"{part.stem}.jsonl") if limit else {"rows": [], "said": [], "found": None}
        return result | content | ({"found": found} if found else {})

    def _earlier(self, part: Part) -> dict[str, Any] | None:
        """The result of a finished part with the same sources and settings."""
        path = self.work / f"{part.stem}.json"
        if self.fresh or not path.is_file():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            return None
        return result if result["status"] == "done" and result["settings"] == self._settings else None

    def _write(self, part: Part, result: dict[str, Any]) -> None:
        (self.work / f"{part.stem}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        if result["status"] != "running":
            self._pack()

    def _tell(self, part: Part, result: dict[str, Any]) -> None:
        mark = "" if result["status"] == "done" else f" {result['status']}:"
        print(f"part {part.number}, {part.name} ({result['seconds']:.0f} s):{mark} {result['found']}", flush=True)
        for text in result["said"][:TOLD]:
            print(f"    {text}", flush=True)
        if len(result["said"]) > TOLD:
            print(f"    ... and {len(result['said']) - TOLD} more in results.json", flush=True)

    def _pack(self) -> None:
        about = {"benchmark": "gpu_campaign", "commit": commit(), "machine": platform.platform(), "budget": self.budget}
        pack(self._every, about, self.work, self.out)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and whatever it started: asked first, then killed."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        if process.poll() is None or number == signal.SIGKILL:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:  # nobody is left
                break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def source_digest() -> str:
    """What the numbers depend on, where there may be no git: all sources of the packages and the campaign."""
    whole = hashlib.sha256()
    for folder in ("robust_moe_kernels", "python", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".inl", ".yaml", ".sh"):
                whole.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def commit() -> str | None:
    """The commit of this checkout, or the one that ``bare_machine.sh gather`` noted before it was carried away."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None
    noted = ROOT / ".wheels" / "commit"
    return noted.read_text(encoding="utf-8").strip() if noted.is_file() else None


def _writable(option: str, name: str | Path) -> Path:
    """The folder of that name, made if missing. Raises ValueError, in one sentence, if nothing can be written there."""
    folder = expect_named(option, name)
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{option}: expected a folder to write to, got {folder} ({error.strerror})") from error
    return folder.resolve()


def _outputs(work: Path) -> list[Output]:
    """All that parts and this process write in ``work``."""
    own = Kind("what an earlier campaign left", lambda path, known: known)
    names = [f"{part.stem}.{ending}" for part in PARTS for ending in ("jsonl", "log")]
    names += ["tiles.json", "memcheck.log"]
    result = json_with("the result of an earlier campaign's part", "part", "name", "status")
    runs = [output for name in ("run", "steps") for output in run_outputs(work / name)]
    return [*((work / f"{part.stem}.json", result) for part in PARTS), *((work / name, own) for name in names), *runs]


def _packed(out: Path) -> list[Output]:
    """The files of :func:`pack`."""
    own = Kind("what an earlier campaign packed", lambda path, known: known)
    results = json_with("the results of an earlier campaign", benchmark="gpu_campaign")
    return [(out / "results.json", results), *((out / name, own) for name in ("log.txt", *EXTRA))]


def main(arguments: Sequence[str] | None = None) -> int:
    listed = "\n".join(f"  {part.number} {part.name:12} {part.about}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu_campaign",
        description="Everything worth measuring on a GPU within a budget of seconds, part by part.",
        epilog=f"parts:\n{listed}\n\nThe same command goes on after the parts that are done.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", help="numbers, ranges and names: 0-3,7 or layer,syncs (default: all)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all of it (default: %(default)g)")
    parser.add_argument("--work", default="runs/gpu_campaign", help="folder to go on from")
    parser.add_argument("--out", help="folder of the packed results (default: WORK/packed)")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as train.parquet and test.parquet: the real run")
    parser.add_argument("--fresh", action="store_true", help="repeat finished parts too")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: does every part run?")
    asked = parser.parse_args(arguments)
    try:
        parts = chosen(asked.parts, PARTS)
        if not asked.budget > 0:
            raise ValueError(f"--budget: expected seconds > 0, got {asked.budget:g}")
        if asked.data is not None and not (asked.data / "train.parquet").is_file():
            raise ValueError(f"--data: expected a folder with train.parquet and test.parquet, got {asked.data}")
        work = _writable("--work", asked.work)
        out = _writable("--out", work / "packed" if asked.out is None else asked.out)
        expect_outputs("--work", _outputs(work))
        expect_outputs("--out", _packed(out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data = None if asked.data is None else asked.data.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the part in progress is ended too
    return Campaign(parts, work, out, asked.budget, asked.dry_run, data, asked.fresh).run()


if __name__ == "__main__":
    sys.exit(main())
