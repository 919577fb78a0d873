"""`python -m tsq_ray` is `tsq`."""

import sys

from tsq_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
