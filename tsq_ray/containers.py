"""The demuxers that may open a video, and the file suffixes that each of them covers."""

from __future__ import annotations

# Only demuxers that read a single file: playlists and concat scripts would open other files and
# URLs. Suffixes that mostly mean audio (m4a, mka, ogg) or pictures (avif, heic) are left out.
_CONTAINERS = {
    "mov,mp4,m4a,3gp,3g2,mj2": "3g2 3gp f4v ismv m4v mj2 mov mp4 qt",
    "matroska,webm": "mk3d mkv webm",
    "avi": "avi divx",
    "gif": "gif",
    "apng": "apng",
    "mpeg": "mod mpe mpeg mpg vob",
    "mpegts": "m2t m2ts mts tod trp ts",
    "mpegvideo": "m1v m2v mpv",
    "m4v": "m4v",
    "h264": "264 h264",
    "hevc": "265 h265 hevc",
    "obu": "obu",
    "ivf": "ivf",
    "flv": "flv",
    "asf": "asf wmv",
    "ogg": "ogm ogv",
    "mxf": "mxf",
    "nut": "nut",
    "rm": "rm rmvb",
    "dv": "dv",
    "yuv4mpegpipe": "y4m",
    "mjpeg": "mjpeg mjpg",
    "swf": "swf",
    "wtv": "wtv",
}

FORMATS = ",".join(_CONTAINERS)
"""FFmpeg's names of the demuxers, for its `format_whitelist` option."""
VIDEO_SUFFIXES = frozenset(
    f".{suffix}" for names in _CONTAINERS.values() for suffix in names.split()
)
"""Suffixes that a listing accepts; a file named explicitly is accepted whatever its suffix."""
