"""Reading a sweep back from MLflow: frames, tables, figures and one HTML page.

MLflow is the only source, so a report can be made on any machine that reaches the tracking
store; neither torch nor Ray is imported.
"""

from __future__ import annotations

from analysis.confirmation import load_confirmations, summarise_confirmation
from analysis.load import SweepFrames, SweepInfo, load_sweep, load_sweeps, with_metrics
from analysis.report import write_report
from analysis.tables import leaderboard, leaderboard_rows, summarise

__all__ = [
    "SweepFrames",
    "SweepInfo",
    "leaderboard",
    "leaderboard_rows",
    "load_confirmations",
    "load_sweep",
    "load_sweeps",
    "summarise",
    "summarise_confirmation",
    "with_metrics",
    "write_report",
]
