"""What a part writes: a line of JSON for every number, the moment it is known, so that a kill loses one at most."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Record", "read"]


class Record:
    """One part's results and its clock.

    Args:
        path: the file of lines; written anew.
        folder: where parts find what earlier ones left, and leave files of their own.
        seconds: the part's limit. At it the process is killed; ``left`` says how long that is away.
        dry: tiny sizes on the CPU.
        data: folder of CIFAR-10 as train.parquet and test.parquet; None: not there.
    """

    def __init__(self, path: Path, folder: Path, seconds: float, dry: bool = False, data: Path | None = None) -> None:
        self.folder, self.dry, self.data = folder, dry, data
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()  # a part may write from several threads
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  (closed by finish, or by the process's end)

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    def left(self) -> float:
        """Seconds until the limit."""
        return self._end - time.monotonic()

    def out_of_time(self, needed: float, what: str) -> bool:
        """Whether fewer than ``needed`` seconds are left for ``what``; if so, that is said."""
        short = self.left() < needed
        if short:
            self.say(f"{what}: left out, {self.left():.0f} s are left and it wants {needed:.0f}")
        return short

    def row(self, **values: Any) -> None:
        """One measurement."""
        self._write({"row": values})

    def say(self, text: str) -> None:
        """One sentence for whoever reads the results."""
        print(text, flush=True)
        self._write({"said": text})

    def finish(self, found: str) -> None:
        self._write({"found": found})
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(line, default=str) + "\n")
            self._file.flush()

    def free(self) -> None:
        """Give back the GPU memory of what nobody holds any more, cycles included."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def with_smaller_batches(self, batch: int, run: Callable[[int], None], what: str) -> int:
        """``run(batch)``; when the GPU has too little memory, half the batch, and so on: the batch that fitted."""
        import torch

        while True:
            try:
                run(batch)
                return batch
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
            self.free()  # outside of the handler, which still holds the tensors of the frames that failed
            self.say(f"{what}: out of memory with a batch of {batch}, going on with {batch // 2}")
            batch //= 2


def read(path: Path) -> dict[str, Any]:
    """{"rows", "said", "found"} of a file of lines; a last line that a kill cut short is left out."""
    found: dict[str, Any] = {"rows": [], "said": [], "found": None}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if "row" in line:
            found["rows"].append(line["row"])
        elif "said" in line:
            found["said"].append(line["said"])
        else:
            found["found"] = line["found"]
    return found
