"""A few videos in one call, without Ray: what one of them suffers, the others do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.archive import CLASSES, write_clip
from support.bundle import make_bundle

from tsq_ray.prediction import predict


def test_a_name_without_an_absolute_form_costs_its_own_answer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder has been removed."""
    model = make_bundle(tmp_path / "bundle")
    clip = str(write_clip(tmp_path / "v.mp4", CLASSES[0], 1))
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    names = ["v.mp4", clip, "./v.mp4", "~\ud800/v.mp4", "caf\udce9.mp4", "/v.mp4"]
    bad, clip_row, *others = predict(names, model)
    assert (clip_row.status, clip_row.uri) == ("ok", clip)
    assert {(row.status, row.error_type) for row in (bad, *others)} == {("failed", "not_found")}
    assert bad.uri == "v.mp4"
    assert str(bad.error_message).startswith("v.mp4: is relative to the current folder, which has")
    assert len({row.video_id for row in (bad, clip_row, *others)}) == len(names)
