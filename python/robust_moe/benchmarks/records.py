"""Where benchmarks leave their records: folders and names are looked at before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from robust_moe.files import replace_file
from robust_moe.outputs import expect_folder, expect_outputs, json_with
from robust_moe.settings.errors import ConfigError

__all__ = ["expect_records", "folder_option", "write_record"]


def folder_option(text: str) -> Path:
    """The ``type`` of an option that names a folder to write to."""
    try:
        return expect_folder("", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error


def expect_records(parser: argparse.ArgumentParser, folder: Path | None, names: Sequence[str], **called: str) -> None:
    """End the program with one sentence where a file in ``folder`` is in the place of a record ``NAME.json``.

    Args:
        called: what a record says under ``"benchmark"``, where that is another than its name.
    """
    if folder is None:
        return
    try:
        for name in names:
            kind = json_with(f"an earlier record of {name}", benchmark=called.get(name, name))
            expect_outputs("--out", [(folder / f"{name}.json", kind)])
    except ConfigError as error:
        parser.error(str(error))


def write_record(folder: Path, name: str, text: str) -> Path:
    """Write ``text`` to ``folder/NAME.json``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    replace_file(path, text.encode())
    return path
