"""The report of an evaluation: one HTML file that needs nothing else."""

from robust_moe.evaluation.html_report.report import write_report

__all__ = ["write_report"]
