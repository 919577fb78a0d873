"""Ray Train: TSQNet and the classifiers it needs."""

from tsq_ray.train.finetune import finetune
from tsq_ray.train.tsqnet import settings_for, train

__all__ = ["finetune", "settings_for", "train"]
