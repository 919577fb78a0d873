"""Label files: classes and splits of the listed videos.

`formats` and `json_files` read the files into `entries`, `classes` reads the names of class ids,
and `match` finds the videos that the entries name.
"""

from tsq_ray.labels.classes import Classes, read_classes
from tsq_ray.labels.entries import SPLITS, Entry, LabelFile
from tsq_ray.labels.formats import READERS, recognise
from tsq_ray.labels.match import Labels, id_of, read_labels

__all__ = [
    "READERS",
    "SPLITS",
    "Classes",
    "Entry",
    "LabelFile",
    "Labels",
    "id_of",
    "read_classes",
    "read_labels",
    "recognise",
]
