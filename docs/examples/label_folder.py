"""Label every video of a folder with a trained bundle: label_folder.py VIDEOS BUNDLE OUT."""

import sys

import tsq_ray


def main(videos: str, bundle: str, out: str) -> None:
    """Write OUT/manifest.parquet and OUT/predictions and print each video's best label."""
    manifest = f"{out}/manifest.parquet"
    print(tsq_ray.build_manifest([videos], manifest, update=True))
    done = tsq_ray.score(manifest, bundle, f"{out}/predictions")  # resumes a run that was stopped
    print(
        f"{done.counts.ok} labelled, {done.counts.failed} failed {dict(done.counts.failed_by_type)}"
    )
    rows = tsq_ray.read_predictions(done.out, ["uri", "status", "top_labels", "top_scores"])
    for row in rows.to_pylist():
        if row["status"] == "ok":
            print(f"{row['uri']}: {row['top_labels'][0]} {row['top_scores'][0]:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
