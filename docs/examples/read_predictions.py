"""Read predictions with DuckDB and with pandas: read_predictions.py PREDICTIONS.

The rows are plain Parquet: this needs only `pip install duckdb pandas pyarrow`.
"""

import sys

import duckdb
import pandas as pd


def main(predictions: str) -> None:
    """Print the number of videos by label, and the failures by reason."""
    by_label = duckdb.sql(f"""
        select top_labels[1] as label, count(*) as videos, avg(top_scores[1]) as score
        from '{predictions}/part-*.parquet'
        where status = 'ok' group by label order by videos desc, label
    """)
    print(by_label.df().to_string(index=False))

    rows = pd.read_parquet(predictions, columns=["uri", "status", "error_type", "selected_pts_s"])
    failed = rows[rows.status == "failed"]
    print(failed.groupby("error_type").uri.count().to_string())
    for row in rows[rows.status == "ok"].head(3).itertuples():
        seconds = ", ".join(f"{pts:.2f}" for pts in row.selected_pts_s)
        print(f"{row.uri}: chosen frames at {seconds} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
