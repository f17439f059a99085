"""The learner: DeepSpeed ranks that train what the plan says. Import `worker` from its module: it is heavy."""

from hybrid_rl.learner.group import LearnerGroup

__all__ = ["LearnerGroup"]
