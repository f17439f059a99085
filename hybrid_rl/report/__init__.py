"""`hybrid-rl report`: a run in one HTML file that loads nothing and runs nothing."""

from hybrid_rl.report.page import write_report

__all__ = ["write_report"]
