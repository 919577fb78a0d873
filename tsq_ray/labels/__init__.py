"""Label files: classes and splits of the listed videos.

`formats` reads the files, `classes` the names of ids; `match` finds the videos that they name.
"""

from tsq_ray.labels.classes import Classes, read_classes
from tsq_ray.labels.formats import READERS, SPLITS, Entry, LabelFile, recognise
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
