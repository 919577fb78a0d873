"""Label very large video archives cheaply (TSQNet on Ray).

Importing the package does no work and loads neither torch nor ray.
"""

import os

# Threads of a network that wait for each other would otherwise spin for some milliseconds in each
# layer, on cores that other processes want (jobs/benchmarks/busy.py has figures). The
# OpenMP library reads this once, when torch is loaded, so it is set where every process of this
# package comes by first: commands, Ray's workers, replicas. A user's own value stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
