"""A run's page."""

from pathlib import Path

from megatron_distill.run_folder import RunFolder


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` from the run folder."""
    return folder.report
