"""The paper's tables as data: the settings that each row changes, the columns, and the trends.

Only names and overrides; training/ and model/ implement what a configuration does. Values are
mAP at `sampler.budget`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tsq_ray.config import Config, TSQMode

VQM: tuple[str, TSQMode] = ("VQM", "visual")
TQM: tuple[str, TSQMode] = ("TQM", "textual")
OURS: tuple[str, TSQMode] = ("TSQNet", "both")
_VISUAL = {"modules": "visual"}
_APART = {"modules": "both", "alpha": 0.0, "beta": 0.0}
"""Without swap losses the two modules share nothing, so this equals training the TQM alone."""


@dataclass(frozen=True)
class Row:
    """One configuration: its first cells, and overrides of `train.*` and `encoders.text.*`."""

    cells: tuple[str, ...]
    train: Mapping[str, Any]
    text: Mapping[str, Any] = field(default_factory=dict)
    mode: TSQMode | None = None
    """`sampler.mode` of this row; None: the column's."""


@dataclass(frozen=True)
class Trend:
    """A trend in the paper: cell `better`, a (row, column), is above cell `worse`."""

    better: tuple[int, int]
    worse: tuple[int, int]


@dataclass(frozen=True)
class Ablation:
    """A table of the paper; every row's network is measured per column (title, sampler.mode)."""

    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    columns: tuple[tuple[str, TSQMode], ...]
    trends: tuple[Trend, ...] = ()
    notes: tuple[str, ...] = ()


TABLES = ("table7", "table8", "table9", "table10", "tableA2", "tableA3", "tableA4", "tableA5")


def ablation(name: str, config: Config, num_objects: int) -> Ablation:
    """Return the named table; `num_objects` is the number of objects per frame in the features."""
    if name == "table8":
        return _table8(config.train.alpha or 0.6, config.train.beta or 0.6)
    if name == "table9":
        return _table9(config, num_objects)
    fixed = {
        "table7": _table7,
        "table10": _table10,
        "tableA2": _table_a2,
        "tableA3": _table_a3,
        "tableA4": _table_a4,
        "tableA5": _table_a5,
    }
    return fixed[name]()


def _table7() -> Ablation:
    agnostic, specific = "class-agnostic", "class-specific"
    rows = (
        # one query gives one response; its classifier has one row per class, d' -> C: CA + CA
        Row(("CA", "CA"), _VISUAL | {"attention": agnostic, "classifier": specific}),
        Row(("CS", "CA"), _VISUAL | {"attention": specific, "classifier": "shared"}),
        Row(("CS", "CS"), _VISUAL | {"attention": specific, "classifier": specific}),
    )
    return Ablation(
        "Table 7: class-specific designs, VQM trained alone",
        ("Attention", "Classifier"),
        rows,
        (VQM,),
        (_above(2, 0), _above(0, 1)),
    )


def _table8(alpha: float, beta: float) -> Ablation:
    rows = tuple(
        Row((f"{a:g}", f"{b:g}"), {"modules": "both", "alpha": a, "beta": b})
        for a, b in ((0.0, 0.0), (alpha, 0.0), (0.0, beta), (alpha, beta))
    )
    trends = (
        *(Trend((3, 2), (3, 1)), Trend((3, 1), (3, 0))),  # fusion above VQM above TQM
        *(
            Trend((1, 0), (0, 0)),
            Trend((2, 0), (0, 0)),
            Trend((3, 2), (0, 2)),
        ),  # swap losses help the TQM and the fusion
    )
    return Ablation(
        "Table 8: fusion and swap losses",
        ("weight of L_t->v", "weight of L_v->t"),
        rows,
        (TQM, VQM, OURS),
        trends,
    )


def _table9(config: Config, num_objects: int) -> Ablation:
    rows, notes, trends = [], [], []
    ten = _APART | {"top_objects": min(10, num_objects)}
    for path in config.evaluate.word_vectors:
        rows.append(Row((PurePosixPath(path).stem, "top 10"), ten, {"weights": path}))
    if not rows:
        notes.append(
            "static word vectors (GloVe, word2vec): not measured, evaluate.word_vectors is empty"
        )
    model = config.encoders.text.model.rpartition("/")[2]
    if num_objects > 10:
        rows.append(Row((model, f"top {num_objects}"), _APART | {"top_objects": num_objects}))
        trends.append(_above(len(rows), len(rows) - 1))
    else:
        notes.append(
            f"all objects: not measured, the features hold {num_objects} per frame; "
            "extract with --set encoders.num_objects=1000 into another folder"
        )
    rows.append(Row((model, "top 10"), ten))
    trends += [_above(len(rows) - 1, number) for number in range(len(config.evaluate.word_vectors))]
    return Ablation(
        "Table 9: textual features, TQM alone (joint network without swap losses)",
        ("Text", "Usage"),
        tuple(rows),
        (TQM,),
        tuple(trends),
        tuple(notes),
    )


def _table10() -> Ablation:
    rows = (
        Row(("Vis", "Random"), _VISUAL | {"init_visual": "random"}),
        Row(("Vis", "Prototype"), _VISUAL | {"init_visual": "prototype"}),
        Row(("Text", "Random"), _APART | {"init_textual": "random"}, mode="textual"),
        Row(("Text", "Text emb."), _APART | {"init_textual": "text"}, mode="textual"),
    )
    title = (
        "Table 10: initialisation of the TSQ embeddings; VQM trained alone, "
        "TQM in the joint network without swap losses"
    )
    return Ablation(
        title, ("Branch", "Init"), rows, (("mAP", "visual"),), (_above(1, 0), _above(3, 2))
    )


def _table_a2() -> Ablation:
    betas = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    rows = tuple(
        Row((f"{beta:g}",), {"modules": "both", "alpha": 0.0, "beta": beta}) for beta in betas
    )
    trends = (Trend((3, 0), (0, 0)), Trend((3, 1), (0, 1)), Trend((3, 0), (5, 0)))
    return Ablation("Table A.2: beta, with alpha = 0", ("beta",), rows, (OURS, TQM, VQM), trends)


def _table_a3() -> Ablation:
    alphas = (0.0, 0.2, 0.4, 0.6, 0.8)
    rows = tuple(
        Row((f"{alpha:g}",), {"modules": "both", "alpha": alpha, "beta": 0.6}) for alpha in alphas
    )
    trends = (
        Trend((3, 0), (0, 0)),
        Trend((3, 1), (0, 1)),
        Trend((3, 2), (4, 2)),
        Trend((3, 0), (4, 0)),
    )
    return Ablation("Table A.3: alpha, with beta = 0.6", ("alpha",), rows, (OURS, TQM, VQM), trends)


def _table_a4() -> Ablation:
    rows = (
        Row(("with self-attention",), _VISUAL | {"self_attention": True}),
        Row(("without self-attention",), _VISUAL | {"self_attention": False}),
    )
    return Ablation(
        "Table A.4: self-attention among the queries, VQM trained alone",
        ("Method",),
        rows,
        (VQM,),
        (_above(1, 0),),
    )


def _table_a5() -> Ablation:
    rows = tuple(
        Row(
            (f"{layers} layer{'s' * (layers > 1)} {heads} head{'s' * (heads > 1)}",),
            _VISUAL | {"num_layers": layers, "num_heads": heads},
        )
        for layers, heads in ((1, 8), (2, 1), (1, 1))
    )
    title = "Table A.5: layers and heads, VQM trained alone"
    return Ablation(title, ("Method",), rows, (VQM,), (_above(2, 0), _above(2, 1)))


def _above(better: int, worse: int) -> Trend:
    """Return a trend between two rows of a single-column table."""
    return Trend((better, 0), (worse, 0))
