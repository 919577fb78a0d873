#!/usr/bin/env bash
# Run the whole pipeline on a laptop: bash jobs/quickstart.sh [VIDEOS]
#   VIDEOS   a folder or an s3:// prefix of videos. Labels come from VIDEOS/labels.csv
#            (path,label[,split]), or else the parent folder is the class. Without either, a
#            recogniser of the 1,000 classes of ImageNet teaches the sampler (tsq label).
#            LABELS=none bash jobs/quickstart.sh VIDEOS ignores labels.csv and the folders, for
#            folders that are dates or cameras instead of classes.
#            Without VIDEOS, a small archive is rendered (5 classes, 80 videos of about 20 s).
# Sets up .venv, then: index, extract, finetune, train, score, verify, report. The outputs are in
# runs/quickstart or runs/<name of VIDEOS>. If run again, it resumes where it stopped; delete that
# folder to start over.
set -euo pipefail

if [ "$#" -gt 1 ] || [[ "${1:-}" == -* ]]; then
    echo "usage: bash jobs/quickstart.sh [VIDEOS]" >&2
    exit 2
fi
if [ -n "${LABELS:-}" ] && { [ "$LABELS" != none ] || [ "$#" = 0 ]; }; then
    echo "LABELS is $LABELS; allowed is LABELS=none, with VIDEOS" >&2
    exit 2
fi
videos=${1:-}
videos=${videos%/}
if [[ -n "$videos" && "$videos" != *://* ]]; then
    if [ ! -d "$videos" ]; then
        echo "VIDEOS is $videos, which is not a folder;" \
            "name a folder or an s3:// prefix of videos" >&2
        exit 2
    fi
    videos=$(cd "$videos" && pwd)
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/setup_venv.sh
setup_venv weights,evaluate
tsq=$(dirname "$VENV_PYTHON")/tsq
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
SECONDS=0

step() {
    echo
    echo "== [${SECONDS}s] $*"
}

# once NAME COMMAND...: skip a command that already succeeded in this run folder
once() {
    local marker=$run/.done-$1
    shift
    if [ -e "$marker" ]; then
        echo "already done"
    else
        "$@"
        touch "$marker"
    fi
}

if [ -z "$videos" ]; then
    run=runs/quickstart
    videos=$run/videos
    step "render the sample archive into $videos"
    "$VENV_PYTHON" jobs/sample_archive.py "$videos" --videos-per-class 12
else
    run=runs/$(basename "$videos" | tr -c 'A-Za-z0-9._\n-' '_')${LABELS:+-unlabelled}
    mkdir -p "$run"
fi
if [ "$(cat "$run/.source" 2>/dev/null || echo "$videos")" != "$videos" ]; then
    echo "$run holds the run of $(cat "$run/.source"), not of $videos;" \
        "delete or rename that folder" >&2
    exit 2
fi
echo "$videos" >"$run/.source"

settings=(--config jobs/quickstart.toml)
labels=()
if [ -n "${LABELS:-}" ]; then
    labels=(--labels none)
elif "$VENV_PYTHON" -c 'import sys
from tsq_ray import storage
sys.exit(not storage.exists(storage.join(sys.argv[1], "labels.csv")))' "$videos" 2>/dev/null; then
    labels=(--labels "$videos/labels.csv")
fi
update=()
if [ -e "$run/manifest.parquet" ]; then
    update=(--update)
fi
step "index: list the videos and their labels"
"$tsq" index "$videos" --out "$run/manifest.parquet" \
    ${labels[@]+"${labels[@]}"} ${update[@]+"${update[@]}"}

if "$VENV_PYTHON" -c 'import sys, pyarrow.parquet as pq
labels = pq.read_table(sys.argv[1], columns=["labels"])["labels"]
sys.exit(labels.null_count < len(labels))' "$run/manifest.parquet"; then
    step "import: a recogniser of the 1,000 classes of ImageNet, at 320 x 320"
    "$tsq" import tf_efficientnet_lite0 --out "$run/recognizer" "${settings[@]}" \
        --set recognizer.size=320 --set recognizer.resize_to=0

    step "label: the recogniser teaches a sampler, then sees only K frames per video"
    # the sampler's network sees small frames: its cost must stay below the recogniser's
    "$tsq" label "$videos" --recognizer "$run/recognizer" --out "$run" --sample 200 \
        --agreement 0.9 "${settings[@]}" --set encoders.visual.size=112 \
        --set train.modules=visual --set train.teacher_min_videos=2
    echo
    echo "report: $PWD/$run/report.html (took ${SECONDS}s after the setup)"
    exit 0
fi

split=()
if "$VENV_PYTHON" -c 'import sys, pyarrow.parquet as pq
splits = pq.read_table(sys.argv[1], columns=["split"])["split"].to_pylist()
sys.exit("val" not in splits)' "$run/manifest.parquet"; then
    split=(--split val)
fi

step "extract: features of 16 frames per video (Ray Data)"
"$tsq" extract "$run/manifest.parquet" --out "$run/features" "${settings[@]}"

step "finetune: a linear recogniser on a frozen backbone"
once recognizer "$tsq" finetune "$run/manifest.parquet" --role recognizer \
    --out "$run/recognizer" "${settings[@]}"

step "train: TSQNet on the features (Ray Train)"
once bundle "$tsq" train "$run/features" --recognizer "$run/recognizer" \
    --out "$run/bundle" "${settings[@]}"

step "score: TSQNet chooses 4 of the 16 frames, the recogniser labels the video (Ray Serve)"
"$tsq" score "$run/manifest.parquet" --model "$run/bundle" --out "$run/predictions" \
    ${split[@]+"${split[@]}"}

step "score again with 4 uniform frames, for comparison"
"$tsq" score "$run/manifest.parquet" --model "$run/bundle" --out "$run/predictions-uniform" \
    --set sampler.mode=uniform ${split[@]+"${split[@]}"}

step "verify: account for every video"
"$tsq" verify "$run/features"
"$tsq" verify "$run/predictions"
"$tsq" verify "$run/predictions-uniform"

step "report"
"$tsq" report "$run/predictions" --out "$run/report.html"

evidence=()
if [ -e "$videos/annotations.json" ] && [ "$#" = 0 ]; then
    evidence=(--annotations "$videos/annotations.json")
fi
echo
"$VENV_PYTHON" jobs/quickstart_table.py TSQNet="$run/predictions" \
    uniform="$run/predictions-uniform" ${evidence[@]+"${evidence[@]}"}
echo
echo "report: $PWD/$run/report.html (took ${SECONDS}s after the setup)"
