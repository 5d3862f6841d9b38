"""Studies that put published claims to the test: runs over several seeds, and a rule that decides each claim.

A model is one line in :data:`~robust_moe.reproduce.runs.RUNS`, a claim one entry of
:data:`~robust_moe.reproduce.studies.PARTS`, a size one of :data:`~robust_moe.reproduce.scales.SCALES`.
"""

from robust_moe.reproduce.again import judge_again, merge_studies
from robust_moe.reproduce.preparation import StudyError
from robust_moe.reproduce.results import StudyResult
from robust_moe.reproduce.scales import SCALES
from robust_moe.reproduce.studies import STUDIES
from robust_moe.reproduce.study import reproduce
from robust_moe.reproduce.summary import claim_line

__all__ = [
    "SCALES",
    "STUDIES",
    "StudyError",
    "StudyResult",
    "claim_line",
    "judge_again",
    "merge_studies",
    "reproduce",
]
