"""Label files: classes and splits of the listed videos.

`formats` reads the files; `match` finds the videos that they name.
"""

from tsq_ray.labels.formats import (
    READERS,
    SPLITS,
    Classes,
    Entry,
    LabelFile,
    read_classes,
    recognise,
)
from tsq_ray.labels.match import Labels, read_labels

__all__ = [
    "READERS",
    "SPLITS",
    "Classes",
    "Entry",
    "LabelFile",
    "Labels",
    "read_classes",
    "read_labels",
    "recognise",
]
