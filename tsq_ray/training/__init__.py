"""Training on Ray Train: TSQNet and the classifiers it needs."""

from tsq_ray.training.classifier.finetune import finetune
from tsq_ray.training.sampler.tsqnet import train, training_config

__all__ = ["finetune", "train", "training_config"]
