"""What the public functions return: frozen dataclasses, most of which `--json` prints unchanged.

Paths in them are redacted: no secret and no query of a presigned URL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

_Result = TypeVar("_Result")


def from_record(kind: type[_Result], record: Mapping[str, Any], **more: Any) -> _Result:
    """Build the dataclass `kind` from a stored record; keys that it does not have are ignored."""
    assert dataclasses.is_dataclass(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in record.items() if name in names} | more)


@dataclasses.dataclass(frozen=True)
class IndexSummary:
    """What `build_manifest` found and wrote."""

    out: str
    """URI of the manifest."""
    videos: int
    classes: int
    labels_from: str
    """Where the labels came from: label files, class folders or nowhere."""
    labelled: int
    unlabelled: int
    splits: Mapping[str, int]
    """Videos by split; `(none)` for those without."""
    left_out: Mapping[str, int]
    """Listed entries that are not videos: other files by suffix, the rest by reason."""
    left_out_examples: Mapping[str, tuple[str, ...]]
    """The first few entries for each reason."""
    missing: tuple[str, ...]
    """Names in the labels for which no video was found."""
    new: int
    """Videos that the earlier manifest did not have; all of them if there was none."""
    changed: int
    deleted: int
    unchanged: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """The rows of a run, one per video of the manifest: inputs = ok + failed + skipped."""

    inputs: int
    ok: int
    failed: int
    skipped: int
    skipped_by: Mapping[str, int]
    """Videos left out by `split` and by `limit`."""
    failed_by_type: Mapping[str, int]
    """Failures by error type, the most frequent first."""
    with_warnings: int
    """Videos that are ok with warnings."""

    @property
    def done(self) -> int:
        """Videos that have a row."""
        return self.ok + self.failed


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """A finished run folder, made by `extract` or `score`."""

    out: str
    """URI of the run folder."""
    kind: Literal["features", "predictions"]
    counts: Counts
    done_now: int
    """Videos done by this call; an earlier call did the others."""
    already_done: bool
    """Whether this call found nothing to do."""
    wall_seconds: float
    """Of the call that finished the run, as are the following two."""
    stage_seconds: Mapping[str, float]
    """Seconds by stage, summed over all workers."""
    slowest_stage: str | None
    """The stage that took the most time; None if that call processed no video."""
    metrics: Mapping[str, Any]
    """mAP and top-1 over the labelled videos that are ok; empty for features and without labels."""
    record: Mapping[str, Any]
    """The whole content of `_run.json` (docs/data-format.md)."""

    @classmethod
    def of(cls, out: str, record: Mapping[str, Any]) -> RunSummary:
        """Return the summary of a run from the content of its `_run.json`."""
        return cls(
            out=out,
            kind=record["kind"],
            counts=Counts(**record["counts"]),
            done_now=record["videos_done_now"],
            already_done=record.get("already_done", False),
            wall_seconds=record["wall_seconds"],
            stage_seconds=record["stage_seconds"],
            slowest_stage=record["slowest_stage"],
            metrics=record.get("metrics") or {},
            record=record,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Trained:
    """What the summaries of `finetune` and `train` share."""

    out: str
    """URI of the folder that was written."""
    videos: int
    """Videos trained on."""
    classes: int
    left_out: Mapping[str, int]
    """Videos excluded from training, by reason."""
    unlabelled: tuple[str, ...]
    """The first videos without a label."""
    warnings: tuple[str, ...]
    resumed_after_epoch: int = 0
    """Epoch from which a stopped training was resumed; 0 for none."""
    happened: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """`nodes_lost`, `videos_done_again` and seconds `waited_s` for room, if not 0."""
    used: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """`cpu_hours` and `gpu_hours` of all live nodes, in the call that finished this work."""
    seconds: float = 0.0
    already_done: bool = False
    """Whether an earlier call had finished this work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSummary(_Trained):
    """A finished classifier, made by `finetune`."""

    role: Literal["encoder", "recognizer"]
    backbone: Literal["trained", "frozen"]
    failed: Mapping[str, int]
    """Videos that could not be used, by error type."""
    failed_videos: tuple[str, ...]
    """The first of them."""
    train_accuracy: float
    """Share of the training videos, or of their last epoch's clips, that are labelled correctly."""
    epochs: int | None = None
    """None for a frozen backbone, as are `losses` and the `val_` fields."""
    losses: Mapping[str, float] | None = None
    """Of the last epoch, whose weights are kept."""
    val_loss: float | None = None
    """On `finetune.val_split`, as the other `val_` fields; None if no such video was measured."""
    val_top1: float | None = None
    val_mAP: float | None = None  # noqa: N815  the field's spelling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """A pretrained network as a classifier, made by `import_network`."""

    out: str
    """URI of the folder that was written."""
    role: Literal["encoder", "recognizer"]
    kind: str
    """Library of the network."""
    model: str
    classes: int
    first_classes: tuple[str, ...]
    size: int
    """Height and width of the network's input, in pixels."""
    parameters: int
    gflops_per_frame: float
    already_done: bool = False
    """Whether the folder already held it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSummary(_Trained):
    """A finished bundle, made by `train`."""

    epochs: int
    losses: Mapping[str, float]
    """Losses of the last epoch (paper, equation 4)."""
    workers: int
    train_seconds: float
    videos_per_s: float


@dataclasses.dataclass(frozen=True)
class EvaluatedTable:
    """One table or figure of the paper, measured by `evaluate`."""

    title: str
    files: tuple[str, ...]
    """Names, in the folder `out`, of its Markdown and CSV files and its PNG."""
    rows: tuple[Mapping[str, str], ...]
    """The cells by column title, as the Markdown file shows them."""
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class EvaluationSummary:
    """What `evaluate` measured."""

    out: str
    """URI of the folder with the tables."""
    measured: Mapping[str, Any]
    """`runs` compared; or `videos`, `left_out` by reason and `split`."""
    trained_now: int
    """Samplers trained by this call; an earlier call trained the others."""
    tables: Mapping[str, EvaluatedTable]
    """By name, for example `table2`."""
    seconds: float
    happened: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """`nodes_lost` and seconds `waited_s` for room, if not 0."""
    used: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """`cpu_hours` and `gpu_hours` of all live nodes during the trainings of this call."""


@dataclasses.dataclass(frozen=True)
class LabelSummary:
    """An archive that `label` has labelled."""

    out: str
    """URI of the folder with everything that was made."""
    sample: int
    """Videos that the recogniser saw densely."""
    held_out: int
    """Its videos on which the agreement was measured: those that are ok and not trained on."""
    asked: float
    """The requested minimum agreement with the dense recogniser."""
    curve: Sequence[Mapping[str, Any]]
    """Every choice that was measured: `mode` and `budget` of the sampler, `frames` recognised on
    average, `top1` agreement with its 95 % interval `low` to `high`, agreement as `map`, and `cost`
    relative to every frame."""
    chosen: Mapping[str, Any]
    """The choice that the archive was scored with."""
    verdict: str
    """The choice in one sentence."""
    features: RunSummary
    """The extraction of the sample, with the recogniser on every frame."""
    training: TrainingSummary | None
    """The sampler's; None if the sample could not teach one."""
    predictions: RunSummary
    used: Mapping[str, Any] | None
    """What the three took, each in the call that finished it: `cpu_hours`, `gpu_hours`,
    `tokens_in`, `tokens_out` and their cost, `tokens_cost`. None if unknown."""
    report: str
    """URI of the report."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found in a run folder."""

    uri: str
    kind: Literal["features", "predictions"]
    counts: Counts
    checks: tuple[str, ...]
    """What was compared, and what could not be."""
    problems: tuple[str, ...]
    """What does not add up, one line each; empty if everything does."""


@dataclasses.dataclass(frozen=True)
class ReportSummary:
    """What `build_report` put into the page."""

    out: str
    """URI of the page."""
    inputs: int
    ok: int
    failed: int
    skipped: int
    adds_up: bool
    """Whether the rows match the counts in the run's record."""
    failures: Mapping[str, int]
    """Failed videos by error type."""
    warned: int
    """Videos that are ok with warnings."""
    judged: int
    """Labelled videos that are ok, over which the following three are measured."""
    top1: float | None
    """None without labels, as are the following two, which also need all scores."""
    map: float | None
    map_interpolated: float | None
    unknown_labels: Mapping[str, int]
    """Videos by label that the bundle lacks."""
    shown: int
    """Videos shown with their frames."""
    without_pictures: int
    """Of these, videos whose frames cannot be decoded again."""


@dataclasses.dataclass(frozen=True)
class ExportSummary:
    """What `export_predictions` wrote."""

    out: str
    """URI of the folder."""
    videos: int
    failed: int
    """Videos without a prediction."""
    frames: int
    """Chosen frames written as JPEG."""
    frames_missing: Mapping[str, int]
    """Videos whose frames cannot be decoded again, by error type."""
    requests: int
    """Videos in the requests of openai-batch."""
    files: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What `--dry-run` expects of a run, from a probe of a few videos."""

    videos: int
    """Videos to process; if there are none, the other figures are 0."""
    inputs: int
    """Videos of the manifest."""
    bytes_in: int
    probed: tuple[str, ...] = ()
    """URIs of the probed videos."""
    probed_failed: int = 0
    nodes: int = 0
    """Nodes that the run would use, with their `cpus` and, if it uses any, `gpus`."""
    cpus: float = 0.0
    gpus: int = 0
    workers: int = 0
    seconds_a_video: float = 0.0
    wall_seconds: float = 0.0
    """Including start-up."""
    cpu_hours: float = 0.0
    """Hours of all CPUs of these nodes."""
    gpu_hours: float = 0.0
    video_hours: float = 0.0
    """Footage."""
    bytes_out: int = 0
    dense: float | None = None
    """How many times as long recognising all T frames would take; None for features."""
    tokens_in: int = 0
    """Tokens that would be sent to the recogniser's server; `tokens_out` would be received."""
    tokens_out: int = 0
    probed_tokens_in: int = 0
    """Tokens of the probe itself, like `probed_tokens_out`, because it asks the server."""
    probed_tokens_out: int = 0
    cost: Mapping[str, float] | None = None
    """`total`, the `tokens` in it, `per_video`, `per_video_hour`, `dense_total`; None without
    prices."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The labels and the chosen frames of one video, named as in docs/data-format.md.

    In a failed prediction everything after `warnings` is None, except the tokens.
    """

    video_id: str
    uri: str
    status: Literal["ok", "failed"]
    size_bytes: int
    etag: str | None = None
    modified: str | None = None
    error_type: str | None = None
    error_message: str | None = None
    warnings: Sequence[str] = ()
    duration_s: float | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    codec: str | None = None
    source_num_frames: int | None = None
    frame_pts_s: Sequence[float] | None = None
    """[T], seconds; the frames that the sampler saw."""
    top_labels: Sequence[str] | None = None
    """[min(5, C)], the best classes."""
    top_scores: Sequence[float] | None = None
    scores: Sequence[float] | None = None
    """[C], in the order of the bundle's classes."""
    selected_slot: Sequence[int] | None = None
    """[<= K], positions among the T frames, ascending."""
    selected_index: Sequence[int] | None = None
    """[<= K], numbers of the chosen frames in the video."""
    selected_pts_s: Sequence[float] | None = None
    """[<= K], seconds."""
    selected_by: Sequence[str] | None = None
    """[<= K]: visual, textual, dpp or the name of a baseline."""
    saliency_visual: Sequence[float] | None = None
    """[T] (paper, equation 5); None for baselines."""
    saliency_textual: Sequence[float] | None = None
    decode_ms: float | None = None
    sample_ms: float | None = None
    recognize_ms: float | None = None
    tokens_in: int | None = None
    """Tokens sent to the recogniser's server, also for a failed prediction; None for a network."""
    tokens_out: int | None = None
    caption: str | None = None
    """The server's description of the video, if `recognizer.caption` asks for one."""
