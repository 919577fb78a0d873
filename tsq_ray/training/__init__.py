"""Ray Train: TSQNet and the classifiers it needs."""

from tsq_ray.training.classifier.finetune import finetune
from tsq_ray.training.sampler.tsqnet import settings_for, train

__all__ = ["finetune", "settings_for", "train"]
