"""Studies: which method wins on a task, with what certainty, and at what cost."""
