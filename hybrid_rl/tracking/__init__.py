"""What a run tells while it works: `metrics.jsonl`, and the trackers that were asked for."""

from hybrid_rl.tracking.log import MetricsLog

__all__ = ["MetricsLog"]
