"""What a run tells while it works: `metrics.jsonl`, the trackers that were asked for, and alerts."""

from hybrid_rl.tracking.alerts import NO_COUNTS, Alert, Alerts
from hybrid_rl.tracking.choice import check_trackers
from hybrid_rl.tracking.log import MetricsLog

__all__ = ["NO_COUNTS", "Alert", "Alerts", "MetricsLog", "check_trackers"]
