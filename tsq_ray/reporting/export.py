"""Export predictions for other tools: labels, chosen frames, and the formats of those tools."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsq_ray import chat, storage
from tsq_ray.errors import RunError, UserError
from tsq_ray.reporting.batch import BatchQuestion, BatchWriter, batch_writer
from tsq_ray.reporting.interchange import write_activitynet, write_label_studio
from tsq_ray.reporting.pictures import Progress, VideoFrames, decode_again, jpeg
from tsq_ray.reporting.predictions import Predictions, read_predictions
from tsq_ray.reporting.tables import COLUMNS, csv_writer, label_rows, write_labels
from tsq_ray.results import ExportSummary

WHAT = ("labels", "frames")
"""What is exported by default."""
FORMATS = (*WHAT, "openai-batch", "label-studio", "activitynet")
JPEG_QUALITY = 90
MISSING_FILE = "frames_missing.csv"
MISSING_FIELDS = ("video_id", "uri", "error_type", "error_message")
_VIDEO_ID = "^[0-9a-f]{16}$"
_TOOL_COLUMNS = (*COLUMNS, "split", "duration_s", "fps", "width", "height")


def export_predictions(
    predictions_uri: str,
    out: str,
    what: Sequence[str] = WHAT,
    size: int = 480,
    num_processes: int = 2,
    progress: Progress | None = None,
    *,
    batch_model: str = "",
    prompt: str = chat.PROMPT,
    frame_urls: str = "",
    document_root: str = "/",
) -> ExportSummary:
    """Write predictions in the formats `what` below `out` (a folder or prefix).

    - `labels`: `labels.csv` and `labels.jsonl`, one row per video, failed ones with their reason.
      In the CSV, `|` joins the values of a cell, and a cell that a spreadsheet would run as a
      formula (starting with = + - @ or white space that hides one) gets a leading apostrophe.
    - `frames`: `frames/<video_id>/<slot>_<seconds>.jpg`, the chosen frames in the video's aspect
      ratio, with a shorter side of at most `size` pixels; none is enlarged. A video that is missing
      or fails to decode is listed in `frames_missing.csv` with the reason.
    - `openai-batch`: the chosen frames as requests to `batch_model`, for OpenAI's Batch API.
      `prompt`: a template with {classes}, {num_frames}, {seconds}. `frame_urls`: the URL of `out`,
      if the service is to fetch the frames, which are then written too; by default the requests
      contain them.
    - `label-studio`: tasks for Label Studio and their labelling interface; `document_root`: its
      LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT, for local videos.
    - `activitynet`: results, and known labels as ground truth, in ActivityNet 1.3's JSON format.

    Raises UserError for an unknown `what`, a wrong prompt or no `batch_model`, RunError or
    StorageError if the predictions cannot be read or `out` cannot be written.
    """
    _check_request(what, size, batch_model, prompt)
    predictions = read_predictions(predictions_uri)
    out = storage.normalize(out)
    sides = [
        _sides(predictions, table, size)
        for table in predictions.tables(["video_id", "status", "width", "height"])
    ]
    files = _export_labels(predictions, out, what, document_root)
    frames, requests, missing = 0, 0, Counter[str]()
    if {"frames", "openai-batch"} & set(what):
        pictures = _decode_again(predictions, sides, num_processes, progress)
        save = "frames" in what or bool(frame_urls)
        with contextlib.ExitStack() as stack:
            batch = None
            if "openai-batch" in what:
                question = _question(predictions, batch_model, prompt)
                batch = stack.enter_context(batch_writer(out, question))
            frames, missing = _export_frames(pictures, out, save, batch, frame_urls)
        if batch is not None:
            requests, files = batch.requests, files + batch.files + 1
    return ExportSummary(
        out=storage.redact(out),
        videos=sum(map(len, sides)),
        failed=sum(int((of_part == 0).sum()) for of_part in sides),
        frames=frames,
        frames_missing=dict(missing.most_common()),
        requests=requests,
        files=files + frames + bool(missing),
    )


def _check_request(what: Sequence[str], size: int, batch_model: str, prompt: str) -> None:
    unknown = [item for item in what if item not in FORMATS]
    if unknown or not what:
        raise UserError(
            f"export: {', '.join(unknown) or 'nothing'} cannot be exported; "
            f"allowed: {', '.join(FORMATS)}"
        )
    if size < 16:
        raise UserError(
            f"export: size {size} is too small; the shorter side must have at least 16 pixels"
        )
    if "openai-batch" in what and not batch_model:
        raise UserError(
            "export: openai-batch needs a model; give its name at the batch service with "
            "--batch-model NAME"
        )
    chat.check_prompt(prompt)


def _classes(predictions: Predictions, what: str) -> list[str]:
    if not predictions.bundle_classes:
        raise RunError(
            f"{storage.redact(predictions.uri)}: its _run.json names no classes, which {what} "
            "needs; score again"
        )
    return predictions.bundle_classes


def _is_multi(predictions: Predictions) -> bool:
    return predictions.run.get("task") == "multi"


def _question(predictions: Predictions, model: str, prompt: str) -> BatchQuestion:
    classes = _classes(predictions, "openai-batch")
    return BatchQuestion(model, prompt, classes, _is_multi(predictions))


def _model_version(predictions: Predictions) -> str:
    """Return the name of the bundle that made the predictions, and the start of its hash."""
    model = predictions.run.get("model")
    known = model if isinstance(model, dict) else {"uri": model}
    name, digest = str(known.get("uri") or "tsq_ray"), str(known.get("sha256") or "")
    return f"{storage.name_of(storage.redact(name))} {digest[:12]}".strip()


def _export_labels(
    predictions: Predictions, out: str, what: Sequence[str], document_root: str
) -> int:
    """Write the formats without pictures; return the number of files."""
    files = 0
    rows = partial(label_rows, predictions, _TOOL_COLUMNS)
    if "labels" in what:
        write_labels(predictions, out)
        files += 2
    if "label-studio" in what:
        classes, multi = _classes(predictions, "label-studio"), _is_multi(predictions)
        write_label_studio(rows(), out, classes, multi, _model_version(predictions), document_root)
        files += 2
    if "activitynet" in what:
        files += 1 + write_activitynet(rows, out, _model_version(predictions))
    return files


def _sides(predictions: Predictions, table: pa.Table, size: int) -> np.ndarray:
    """Return the shorter side of each video's frames, at most `size`, 0 if it failed: int32 [N]."""
    for video_id in table["video_id"].filter(
        pc.invert(pc.match_substring_regex(table["video_id"], _VIDEO_ID))
    ):
        # the id becomes a folder name
        raise RunError(
            f"{storage.redact(predictions.uri)}: video_id {video_id.as_py()!r}; "
            "allowed: 16 hex digits; score again"
        )
    shorter = np.full(len(table), size, np.int32)
    for name in ("width", "height"):
        side = pc.fill_null(table[name], 0).to_numpy()
        shorter = np.where(side > 0, np.minimum(shorter, side), shorter)
    return np.where(pc.equal(table["status"], "ok").to_numpy(), shorter, 0)


def _export_frames(
    pictures: Iterable[VideoFrames],
    out: str,
    save: bool,
    batch: BatchWriter | None,
    frame_urls: str,
) -> tuple[int, Counter[str]]:
    """Write the frames as files if `save`, and as requests.

    Returns the number of files and, by reason, the number of videos without frames.
    """
    frames, missing = 0, Counter[str]()
    with contextlib.ExitStack() as stack:
        for video in pictures:
            row = video.row
            if video.error_type is not None:
                if not missing:
                    file = stack.enter_context(storage.open_write(storage.join(out, MISSING_FILE)))
                    add = csv_writer(file, MISSING_FIELDS)
                place = {"video_id": row["video_id"], "uri": storage.redact(row["uri"])}
                add(place | {"error_type": video.error_type, "error_message": video.note})
                missing[video.error_type] += 1
                continue
            encoded = {slot: jpeg(frame, JPEG_QUALITY) for slot, frame in video.slots.items()}
            if save:
                for slot, content in encoded.items():
                    storage.write_bytes(storage.join(out, _frame_name(row, slot)), content)
                frames += len(encoded)
            if batch is not None and encoded:
                urls = [f"{frame_urls.rstrip('/')}/{_frame_name(row, slot)}" for slot in encoded]
                batch.add(row, list(encoded), urls if frame_urls else list(encoded.values()))
    return frames, missing


def _frame_name(row: Mapping[str, Any], slot: int) -> str:
    """Return the path of a frame below the export."""
    return f"frames/{row['video_id']}/{slot:04d}_{row['frame_pts_s'][slot]:.3f}.jpg"


def _decode_again(
    predictions: Predictions,
    sides: Sequence[np.ndarray],
    num_processes: int,
    progress: Progress | None,
) -> Iterator[VideoFrames]:
    """Yield the frames of every video, grouped by their shorter side so that none is enlarged."""
    firsts = (
        of_part[np.sort(np.unique(of_part, return_index=True)[1])].tolist() for of_part in sides
    )
    groups = [side for side in dict.fromkeys(chain.from_iterable(firsts)) if side]
    total = sum(int((of_part > 0).sum()) for of_part in sides)
    done = 0
    for side in groups:
        numbers_by_part = (np.flatnonzero(of_part == side) for of_part in sides)
        rows = chain.from_iterable(
            predictions.part_rows(part, numbers)
            for part, numbers in enumerate(numbers_by_part)
            if len(numbers)
        )
        for video in decode_again(
            predictions, rows, lambda row: row["selected_slot"] or (), side, num_processes
        ):
            done += 1
            if progress is not None:
                progress(done, total)
            yield video
