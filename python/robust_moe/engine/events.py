"""Numbers of a run as TensorBoard's events."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from robust_moe.files import WaitingLines, naming
from robust_moe.outputs import EVENTS_SUFFIX

__all__ = ["Events"]


class Events:
    """Appends scalars and pictures to a new file of events in ``folder``, which is made if missing.

    Each record is written before the method returns. TensorBoard's own writer leaves that to a thread, which prints a
    traceback where the disk is full, and whose error comes with a later number.

    Args:
        first: the first step that this file has; TensorBoard drops those of earlier files from there on. None: all
            are kept.
        say: as for :class:`~robust_moe.files.WaitingLines`, whose records wait where the disk is full.

    Raises:
        OSError: the file cannot be made, or :meth:`close` cannot write what waits; it names the file, which keeps whole
            records.
    """

    def __init__(self, folder: Path, first: int | None = None, say: Callable[[str], object] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, file = _new_file(folder)
        self._file = WaitingLines(file, self.path, say)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first is not None:
            started = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=first, session_log=started))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """The values, by their tags, as one record."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def add_picture(self, step: int, tag: str, picture: Image.Image) -> None:
        """The picture, as a PNG file in the record; ``picture``: of mode L or RGB."""
        file = io.BytesIO()
        picture.save(file, format="png", optimize=True)
        channels = len(picture.getbands())
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=channels, encoded_image_string=file.getvalue()
        )
        self._append(
            Event(wall_time=time.time(), step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))
        )

    def _append(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())

    def close(self) -> None:
        with naming(self.path):
            self._file.close()


def _new_file(folder: Path) -> tuple[Path, BinaryIO]:
    """The name is one that TensorBoard looks for: time, host, process, number. It reads files in the order of their
    names: one that is made in the same second, or after the clock was put back, still comes last."""
    names = (path.name.split(".") for path in folder.glob("events.out.tfevents.*"))
    before = [int(parts[3]) for parts in names if len(parts) > 3 and parts[3].isdecimal()]
    seconds = max([int(time.time()), *(each + 1 for each in before)])
    begins = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}"
    for number in count():
        path = folder / f"{begins}.{number}{EVENTS_SUFFIX}"
        try:
            with naming(path):
                return path, open(path, "xb", buffering=0)
        except FileExistsError:
            continue
    raise AssertionError  # count() does not end
