"""What commands write: named before the work starts, and refused where something else would be lost.

A command lists its outputs, each a name and the :class:`Kind` of file that it will be. A file that is there is written
over only if it is of that kind: an earlier one of the same command. A checkpoint, a data file, another command's
result, a folder, a device or a FIFO never is. No PyTorch is imported here: the GPU campaign starts without it.
"""

from __future__ import annotations

from robust_moe.outputs.checks import (
    clear_outputs,
    expect_folder,
    expect_json_name,
    expect_named,
    expect_outputs,
    is_free,
    remove_folder,
)
from robust_moe.outputs.files import (
    CERTIFIED_JOURNAL,
    COMPARED,
    CONFIG,
    EVENTS_SUFFIX,
    EXPORT_MARK,
    JOURNAL,
    certificate_outputs,
    comparison_outputs,
    evaluation_outputs,
    export_outputs,
    pretrained_outputs,
    robustbench_file,
    run_outputs,
    samples_file,
)
from robust_moe.outputs.kinds import Kind, Output, figure, figure_marks, json_with, text

__all__ = [
    "CERTIFIED_JOURNAL",
    "COMPARED",
    "CONFIG",
    "EVENTS_SUFFIX",
    "EXPORT_MARK",
    "JOURNAL",
    "Kind",
    "Output",
    "certificate_outputs",
    "clear_outputs",
    "comparison_outputs",
    "evaluation_outputs",
    "expect_folder",
    "expect_json_name",
    "expect_named",
    "expect_outputs",
    "export_outputs",
    "figure",
    "figure_marks",
    "is_free",
    "json_with",
    "pretrained_outputs",
    "remove_folder",
    "robustbench_file",
    "run_outputs",
    "samples_file",
    "text",
]
