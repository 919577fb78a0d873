"""S3 as an fsspec file system, configured by the usual environment variables."""

from __future__ import annotations

import functools
import os
from typing import Any

import fsspec


def open_file_system() -> fsspec.AbstractFileSystem:
    """Open S3 with the endpoint, keys and options given in the environment."""
    return _open(_options())


def _options() -> dict[str, Any]:
    options: dict[str, Any] = {
        # a cached listing would hide what other processes have written since
        "use_listings_cache": False,
        "config_kwargs": {
            "retries": {"max_attempts": 4, "mode": "standard"},
            "max_pool_connections": 64,
            "connect_timeout": 10,
            "read_timeout": 30,
        },
    }
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("true", "yes", "1"):
        options["anon"] = True
    if os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester":
        options["requester_pays"] = True
    return options


def _open(options: dict[str, Any]) -> fsspec.AbstractFileSystem:
    return _class()(**options)


@functools.cache
def _class() -> Any:
    from s3fs import S3FileSystem

    class WholeKeys(S3FileSystem):
        """S3 whose keys may contain `?versionId=`."""

        def split_path(self, path: str) -> tuple[str, str, None]:
            before, mark, after = path.partition("?versionId=")
            bucket, key, _ = super().split_path(before)
            return bucket, key + mark + after, None

        def __reduce__(self) -> tuple[Any, ...]:  # pickle cannot import a local class
            return _open, (self.storage_options,)

    # so that clearing fsspec's cached S3 instances clears these too
    WholeKeys._cache = S3FileSystem._cache
    return WholeKeys
