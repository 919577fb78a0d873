"""Figures 3 and 4 of the paper on your own data, as PNG and SVG (matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsq_ray import storage
from tsq_ray.evaluation.measures import MeanOverSeeds

FORMATS = ("png", "svg")
_TSNE_SEED = 0
_MAX_NAMES = 60
"""Up to this many points are labelled with their class names; more would be unreadable."""


@dataclass(frozen=True)
class Line:
    """One sampler's points in the accuracy-cost plot."""

    name: str
    gflops: list[float]
    map: list[MeanOverSeeds]


def accuracy_cost(
    lines: Sequence[Line], levels: Mapping[str, MeanOverSeeds], out: str, name: str, title: str
) -> list[str]:
    """Plot mAP against GFLOPs per video, one line per sampler; return the names of the files.

    Error bars show the 95 % interval; `levels` holds values without a cost, drawn as dashed lines.
    """
    from matplotlib import colormaps

    figure, axes = _canvas(9, 6)
    palette = [colormaps["tab20"](shade) for shade in (*range(0, 20, 2), *range(1, 20, 2))]
    for number, line in enumerate(lines):
        colour, marker = palette[number % len(palette)], "os^vDPX*"[number % 8]
        means = [value.mean * 100 for value in line.map]
        halves = [(value.half or 0.0) * 100 for value in line.map]
        style = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1.2}
        axes.errorbar(line.gflops, means, yerr=halves, label=line.name, **style)
    for value_name, value in levels.items():
        axes.axhline(value.mean * 100, linestyle="--", linewidth=1, color="0.5", label=value_name)
    axes.set_xlabel("GFLOPs per video (the field's convention)")
    axes.set_ylabel("mAP (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    return _save(figure, out, name)


def project(embeddings: np.ndarray) -> np.ndarray:
    """Project embeddings to two dimensions by t-SNE, [C, D] -> float [C, 2]; deterministic."""
    from sklearn.manifold import TSNE

    count = len(embeddings)
    perplexity = max(1.0, min(30.0, (count - 1) / 3))
    points = np.asarray(embeddings, np.float64)
    return TSNE(
        2,
        perplexity=perplexity,
        init="pca" if min(points.shape) >= 2 else "random",
        random_state=_TSNE_SEED,
    ).fit_transform(points)


def embedding_maps(
    maps: Mapping[tuple[str, str], np.ndarray], classes: Sequence[str], out: str, name: str
) -> list[str]:
    """Plot points [C, 2] with class names, a panel per (module, moment); return the file names."""
    modules = list(dict.fromkeys(module for module, _ in maps))
    figure, _ = _canvas(14, 6.5 * len(modules), rows=len(modules), columns=2)
    for axes, ((module, moment), points) in zip(figure.axes, maps.items(), strict=True):
        colours = np.arange(len(points))
        axes.scatter(points[:, 0], points[:, 1], c=colours, cmap="hsv", s=18)
        if len(points) <= _MAX_NAMES:
            for (x, y), label in zip(points, classes, strict=True):
                axes.annotate(
                    label,
                    (x, y),
                    fontsize=7,
                    xytext=(3, 3),
                    textcoords="offset points",
                    parse_math=False,
                )
        axes.margins(x=0.2, y=0.08)
        axes.set_title(f"{module} TSQ embeddings {moment} training")
        axes.set_xticks([])
        axes.set_yticks([])
    return _save(figure, out, name)


def _canvas(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _save(figure: Any, out: str, name: str) -> list[str]:
    names = []
    for kind in FORMATS:
        data = io.BytesIO()
        # without a date, the same data gives the same bytes
        figure.savefig(
            data, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None
        )
        storage.write_bytes(storage.join(out, f"{name}.{kind}"), data.getvalue())
        names.append(f"{name}.{kind}")
    return names
