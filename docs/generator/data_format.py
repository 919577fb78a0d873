"""docs/data-format.md, from tsq_ray/schema.py."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from generator.markdown import NOTE, table, wrapped
from tsq_ray import schema
from tsq_ray.containers import VIDEO_SUFFIXES
from tsq_ray.errors import ERROR_TYPES, RETRIED_ERROR_TYPES

DATA_INTRO = """\
Everything between two stages is Parquet and JSON, readable with plain pyarrow, pandas and DuckDB,
without Ray and without this package:

```python
import pandas as pd

pd.read_parquet("runs/predictions")[["uri", "status", "top_labels", "selected_pts_s"]]
```
```sql
select uri, top_labels[1] as label, top_scores[1] as score from 'runs/predictions/*.parquet' where status = 'ok';
```

T is the number of frames per video (`decode.num_frames`), K that of chosen frames
(`sampler.budget`), C that of classes, d that of dimensions of a frame's feature, n that of objects
stored per frame (`encoders.num_objects`). A type followed by a shape, `float16 [T, d]`, is an
`arrow.fixed_shape_tensor`, row-major; a reader that does not know the type sees a fixed-size list
of its T x d values. In a failed row it is null. The file's metadata also has the shapes, as JSON,
under `tsq.shapes`, and the class names, as a JSON list in the order of the labels, under
`tsq.classes`:

```python
import json
import pyarrow.parquet as pq

classes = json.loads(pq.read_schema("runs/manifest.parquet").metadata[b"tsq.classes"])
```
"""

MANIFEST_TEXT = """\
One Parquet file, or a folder of Parquet shards; every command accepts either. `tsq index --out`
writes a folder if the name ends in `/` or if there are more than a million videos, otherwise one
file. `--update` keeps the existing kind. The metadata key `tsq.manifest` names the sources
and, in a manifest of one file, its `format` (1).

| file of a manifest folder | what it is |
| --- | --- |
| `part-00000-0123456789ab.parquet`, ... | 500,000 rows each, in the order of the listing; the name has the first digits of the content's sha256 |
| `_manifest.json` | the shards with their sizes and sha256, the sources and the number of rows; published last. Shards that it does not list are not part of the manifest |

A folder without `_manifest.json` is treated as one made by another program (DuckDB, Spark): every
`*.parquet` directly in it, in the order of the names, except names that begin with `.` or `_`. The
columns `video_id`, `uri` and `size_bytes` are required; the others may be missing. If there are
labels, each file has the same class names in its metadata, `tsq.classes`. Such a folder is its own
source.

The `sha256` of a manifest file is that of the file. For a folder it is that of its shards' sha256s
in their order, one per line without a line break at the end. `video_id` depends only on the URI,
spelled as in the listing, so it stays the same when the file is listed again or changes; no two
rows share one. A video counts as unchanged while its size and its etag are the same, or its
modification time if storage has no etag. A time outside the years 1 to 9999 is null.

A listing includes the files below a folder or prefix whose names end in one of these:
{suffixes}.
A file that is named explicitly is included whatever its suffix. Everything else is left out and
counted by reason, and the first three of each reason are named. A folder that is left out counts
once, whatever is in it:

| reason | what it is |
| --- | --- |
| a suffix, or `(no suffix)` | other files |
| `hidden (name begins with .)` | hidden files and folders. Names that begin with `_` are not hidden |
| `name is not UTF-8` | a file or folder that Parquet cannot name: rename it |
| `not a regular file (...)` | a FIFO, a socket, a device |
| `broken link`, `link loop` | links that lead nowhere, or to a folder that contains the link |
| `linked folder, listed under its own name` or `... under another link` | a link to a folder that is listed anyway. Other links to folders are entered, under the link's name |
| `name ends in /` | an S3 object with content whose key marks a folder |
| `vanished while it was listed`, `path is too long`, `cannot be looked up (...)`, `lost+found (...)` | entries of a disk that cannot be read, or that belong to the file system |

A folder that cannot be listed is an error. A video and a link to it are two rows, each with its own
id. Names are taken literally, on disks and on S3: `::`, `?`, `#`, `%`, `*` and blanks have no
special meaning; only http(s) URLs have a query.

Labels come from class folders, `SOURCE/class/video` or `SOURCE/split/class/video`, if every video
is in one, or from label files: `--labels FILE`, repeatable for one list per split. In a folder's
name, `_` between words becomes a space; one at the start or the end stays. The first line of a
label file identifies its format; if it does not, use `--labels-format NAME`.

| format | first line | videos and labels |
| --- | --- | --- |
| `csv` | `path,label[,split]` | the path is absolute, a URI, or relative to the CSV's folder; several labels are joined by `\\|` |
| `activitynet` | `{` (JSON of v1.3) | the key ID of `database` is the video `ID.*` or `v_ID.*`, with the labels of all its `annotations`; the subsets become `train`, `val`, `test`; segments and taxonomy are ignored |
| `label-studio` | `[`, then `{` (JSON or JSON-MIN) | a Label Studio export: people's choices are the labels; see below |
| `kinetics` | `[label,]youtube_id,time_start,time_end[,split]`, in any order | `ID_000010_000020.*`, else `ID.*`, in class folders or flat |
| `video-list` | `path class_id [class_id ...]` | mmaction2's lists of videos; ids may also be joined by commas (`path 3,17`) |
| `frame-list` | `name num_frames class_id [class_id ...]` | mmaction2's lists of frame folders (without offsets): `name` is the video's name without its suffix; the number of frames is ignored. With commas between all values: the ActivityNet and FCVID lists of AR-Net and AdaFocus (`fcvid_train_split.txt`) |
| `fcvid` | `path train` or `path test` | FCVID's own `FCVID_VideoName_TrainTestSplit.txt`; `FCVID_Label.txt` next to it has one line of 0s and 1s per video and one column per class |

- **Class ids need names.** The last three formats have ids: `--classes FILE` names them, one per
  line, the first being 0 (or the number it begins with, if all lines are numbered from 0 or 1).
  ActivityNet has two orders in use, alphabetical and mmaction2's: use the file that came with the
  list. From then on the names stay with the ids.
- **Paths of the last three formats** are relative to the list, to a source, or the end of a video's
  path (`ID.mp4` for `SOURCE/any/folder/ID.mp4`); the suffix may differ, and `v_` may be missing. A
  path that matches several videos is an error.
- **Words for a split** mean the same in every format and as folder names, in any case: `training`
  is `train`; `valid`, `validate` and `validation` are `val`; `testing` is `test`. Other words are
  kept.
- **Label Studio.** Of several annotations of a task the latest by `updated_at` counts, whoever made
  it. Skipped (cancelled) annotations, drafts and predictions are no labels: a video without another
  annotation is unlabelled. Several choices are several labels. Where an interface has several
  `Choices`, those named `label`, else `choice`, else `choices` are the classes; in JSON-MIN the
  control must have one of these names. The video is the task's `uri`, else its `video`, else any
  value with a video suffix: a path, a URI, a link to a local or uploaded file of Label Studio, or a
  URL, matched by the end of its path, which must include at least one folder. `split` in the task's data is
  the split.
- **Unicode.** Label files are UTF-8. Names match in composed (NFC) and decomposed form (NFD, as
  macOS writes it), the exact spelling first; class names are stored as NFC. A line ends with LF,
  CRLF or CR.
- **Links.** A path may lead through a link to a folder or through the folder itself.
- **A list's split** is the word train, val or test in its file name (`anet_val_video.txt`), if it
  has exactly one such word; `--split-name` overrides everything.
- **Nothing is dropped silently.** Every entry of the listing is a row or counted, as above.
  Labelled videos that were not found are counted and the first ones named (all of them with
  `--json`); videos without a label are counted. A line that cannot be read, a class id out of range
  and a video with two contradictory entries are errors, with file and line.

Classes are ordered by name unless `--classes FILE` gives an order. Features, bundle and predictions
keep that order.
"""

RUN_TEXT = """\
`tsq extract` and `tsq score` write a folder (or a prefix on S3):

| file | when | what |
| --- | --- | --- |
| `_config.json` | before the first part | what the rows depend on: the manifest's sources, the settings and the hashes of the weights. The same folder with a different configuration is refused |
| `_lease.json` | while a run writes | which run is writing: `id`, `host`, `boot_id`, `pid_namespace`, `pid`, `process_started`, `started`, `renewals`. Removed when the run ends, unless it is killed ([operations](operations.md#stopping-and-resuming)) |
| `part-*.parquet` | during the run | the rows; a part appears only once it is complete. Its name is a hash of the ids in it |
| `_run.json` | last | status, counts, parts, manifest and its hash, resolved settings, versions, hashes of the weights, start, end, seconds by stage |

Each video of the manifest has one row, `ok` or `failed`, or was skipped by `--split` or `--limit`:
inputs = ok + failed + skipped. A folder without `_run.json` is not finished: `tsq verify`,
`tsq train` and `tsq report` refuse it, and the command that made it resumes it. Readers of Parquet
folders ignore names that begin with `_` or `.`.

The keys of `_run.json`: `format` ({format}), `kind` (`features` or `predictions`), `status`
(`complete` or `failed`), `counts` (`inputs`, `ok`, `failed`, `skipped`, `skipped_by`,
`failed_by_type`, `with_warnings`), `manifest` (`uri`, `id`, `sha256`), `classes` (the manifest's),
`identity` (as in `_config.json`), `config` (all settings), `split`, `versions`, `git_revision`,
`started`, `ended`, `wall_seconds`, `stage_seconds` (summed over the workers), `slowest_stage`,
`videos_done_now` (by the last call), `run_id` (of the last call, as in its log lines and metrics),
`happened` (incidents of the last call: `nodes_lost`, `videos_done_again`, `waited_s`, and `rows_removed`, those of
changed, deleted or repeated videos), `used` (what the
last call took: `cpu_hours` and `gpu_hours` of all live nodes, `video_hours` of footage, for predictions
`sampled_frames` and `recognized_frames`, with a server `tokens_in` and `tokens_out`), `parts` (`name`, `bytes`). Features add `weights`;
predictions add `model` (`uri`, `sha256` of `bundle.json`), `bundle_classes` (the order of `scores`), `task`,
`with_scores`, `metrics`, `training_curve` (the bundle's losses, epoch by epoch) and `agreement` (the
bundle's, if `tsq label` made it).
"""

FAILED_TEXT = """\
`error_type` is one of
{types}.
The next run of the same command retries the videos that failed as {retried}.
What to do about each: [operations](operations.md#error-types).
"""

ARTIFACTS_TEXT = """\
## What `tsq finetune` and `tsq import` write
A folder: `model.safetensors` (`backbone.*` and `head.*`), `curves.csv` (one row per epoch; only for
a trained backbone) and, written last, `finetune.json` with `format`, `role` (`encoder` or
`recognizer`), `classes`, `task`, `model` (the network and its preprocessing), `backbone_sha256`,
`provenance` and `files` (sha256 of each file). A network of transformers is described by
`model.model_args`, so that this folder alone is enough to rebuild it. The folder of a model
behind a server holds `finetune.json` alone.

## The bundle
What `tsq train` writes, and all that scoring needs: no hub, no language model. A folder:

| file | what |
| --- | --- |
| `bundle.json` | written last: `format`, `classes`, `sampler_classes` (those with a query, if not all have one; empty: the sampler was not taught), `task`, `config` (`decode`, `encoders`, `recognizer`, `sampler`), `sampler_shape`, `provenance`, `files` (sha256 of each) |
| `sampler.safetensors` | TSQNet |
| `encoder.safetensors` | the frame encoder with its frame head |
| `objects.safetensors` | the object recogniser; absent with `train.modules = "visual"` |
| `text.safetensors` | `vocabulary` [1000, text dimensions], the embeddings of the object names; absent with `train.modules = "visual"` |
| `recognizer.safetensors` | the recogniser; absent if it is behind a server, and without `--recognizer`, in which case `tsq score` refuses the bundle |
| `curves.csv` | the losses of each epoch |
| `agreement.json` | only from `tsq label`: `videos` held out, `curve` (for each sampler mode and budget: agreement with the dense recogniser, its interval, cost), `asked`, `chosen` and, if no sampler could be taught, why (`untaught`) |

Nothing is unpickled. A file whose sha256 differs from the one in `bundle.json` is refused, as is a
`format` other than {format}. The sha256 of `bundle.json` identifies the whole bundle.
"""

EXPORT_TEXT = """\
## Exports
What `tsq export PREDICTIONS --out URI` writes; `--format NAME` chooses, by default `labels` and
`frames`:

| format | files | content |
| --- | --- | --- |
| `labels` | `labels.csv`, `labels.jsonl` | a row per video, failed ones with their reason; with a recogniser behind a server also its tokens and caption |
| `frames` | `frames/<video_id>/<slot>_<seconds>.jpg`, `frames_missing.csv` | the chosen frames; videos that cannot be decoded again |
| `openai-batch` | `openai_batch_0001.jsonl`, ..., `openai_batch_videos.csv` | a request per video with its chosen frames; which file holds which video |
| `label-studio` | `label_studio_tasks.json`, `label_studio_interface.xml` | a task per video with the prediction; the labelling interface |
| `activitynet` | `activitynet_results.json`, `activitynet_database.json` | predictions with scores; known labels as ground truth |

- **`openai-batch`** is the input of OpenAI's Batch API and of services that take the same file.
  `custom_id` is the `video_id`; the body asks `--batch-model` which class the video shows, with the
  time of each frame, and a JSON schema binds the answer to the bundle's classes (`label`, or the list
  `labels` of a multi-label bundle). OpenAI takes at most 1,000 classes in a strict schema (15,000
  characters if more than 250); a longer list is sent with `strict: false`. `--prompt` replaces the
  question, `--size` sets the frames' shorter side. The frames are in the requests as base64; with
  `--frame-urls URL` they are written as files, and the requests name `URL/frames/...`. A file
  has at most 50,000 requests and 200 MB; then the next one begins. The table of videos holds the
  slots and seconds of the frames: OpenAI takes `metadata` in a request only if it stores the answer
  (`store`).
- **`label-studio`**: create a project with the interface and import the tasks. The prediction is the
  best class (for a multi-label bundle all classes with at least 0.5, or the best), with its score and the
  bundle as `model_version`; the chosen frames are single-frame moments of the timeline, counted
  from 1 at the video's mean frame rate, so in videos of variable frame rate they may be off.
  Failed videos have no task. `s3://` videos need a storage connected to the project; local ones
  become `/data/local-files/?d=PATH`, relative to `--document-root`.
  [Operations](operations.md#correcting-labels) shows the whole round trip.
- **`activitynet`** has the keys of version 1.3. A video's key is its file's name without suffix and
  `v_`, or its `video_id` where several videos have that name; each segment is the whole video. The
  results hold `top_labels`, so with more than five classes the mAP that ActivityNet's tools
  compute is lower than `tsq evaluate`'s. The database holds known labels only, never predictions, in
  the subsets `training`, `validation` and `testing`; without any it is not written. Those tools reject
  a predicted class that is missing from the subset's known labels. `tsq index --labels` and
  `tsq evaluate --annotations` read the database.
"""


def data_format() -> str:
    """Return docs/data-format.md."""
    from tsq_ray.bundle import settings as bundle
    from tsq_ray.runs.folder import FORMAT

    types = wrapped(f"`{name}`" for name in ERROR_TYPES)
    retried = ", ".join(f"`{name}`" for name in RETRIED_ERROR_TYPES)
    return "\n".join(
        [
            NOTE.format("tsq_ray/schema.py"),
            "# Data format",
            DATA_INTRO,
            "## Manifest",
            MANIFEST_TEXT.replace("{suffixes}", wrapped(sorted(VIDEO_SUFFIXES))),
            columns_table(schema.MANIFEST),
            "",
            "## The run folder",
            RUN_TEXT.replace("{format}", str(FORMAT)),
            FAILED_TEXT.format(types=types, retried=retried),
            "## Features",
            "What `tsq extract` writes, one row per video. Only runs with `--recognizer` have\n"
            "`recognizer_logits`.\n",
            columns_table((*schema.FEATURES, schema.RECOGNIZER_LOGITS)),
            "",
            "## Predictions",
            "What `tsq score` writes, one row per video. `scores` is absent with `--scores top`.\n",
            columns_table(schema.PREDICTIONS),
            "",
            "With a [recogniser behind a server](training.md#a-model-behind-a-server) also the\n"
            "following; features have the first two. They are set in failed rows too, if the server\n"
            "was asked.\n",
            columns_table(schema.SERVER),
            "",
            EXPORT_TEXT,
            ARTIFACTS_TEXT.replace(
                "{format}",
                f"{bundle.FORMAT}, {bundle.FEWER_CLASSES_FORMAT} or {bundle.SERVER_FORMAT}",
            ),
        ]
    )


def columns_table(columns: Sequence[schema.Column]) -> str:
    """Return a table of name, type, unit, nullability and meaning of each column."""
    rows = []
    for column in columns:
        nullable = "yes" if column.nullable or column.dims else ""
        rows.append(
            [f"`{column.name}`", f"`{type_text(column)}`", column.unit, nullable, column.doc]
        )
    return table(["column", "type", "unit", "may be null", "what"], rows)


def type_text(column: schema.Column) -> str:
    """Return the Arrow type as the page shows it: `list<int32>`, `float16 [T, d]`."""
    if column.dims:
        return f"{_short(column.type)} [{', '.join(map(str, column.dims))}]"
    return _short(column.type)


def _short(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list<{_short(kind.value_type)}>"
    if pa.types.is_timestamp(kind):
        return f"timestamp[{kind.unit}, {kind.tz}]"
    names = {"float": "float32", "double": "float64", "halffloat": "float16"}
    return names.get(str(kind), str(kind))
