"""tsq_ray: label very large video archives cheaply (TSQNet on Ray). Importing it does no work and loads neither torch nor ray."""

__version__ = "0.1.0"
