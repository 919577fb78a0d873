"""Open, list and publish files atomically, with the same calls for local paths and s3://.

The S3 endpoint and keys come from the usual environment variables (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, ...; AWS_NO_SIGN_REQUEST=true reads public buckets without keys,
AWS_REQUEST_PAYER=requester pays for requests). Failures raise StorageError with an error type from
the closed list; messages never contain a query string or a secret.
"""

from __future__ import annotations

from tsq_ray.storage.advice import classify, is_local, redact, storage_errors
from tsq_ray.storage.files import (
    check_writable,
    create_bytes,
    download,
    fetch,
    look_up,
    open_read,
    open_write,
    read_bytes,
    read_ranges,
    read_text,
    remove,
    remove_empty_folder,
    remove_folder,
    replace_bytes,
    sha256_of,
    write_bytes,
)
from tsq_ray.storage.listing import (
    entries,
    exists,
    is_file,
    is_folder,
    list_folder,
    stat,
    walk,
)
from tsq_ray.storage.local_files import LeftOut, StoredFile, is_utf8
from tsq_ray.storage.paths import filesystem, join, name_of, normalize, parent_of, real_path

__all__ = [
    "LeftOut",
    "StoredFile",
    "check_writable",
    "classify",
    "create_bytes",
    "download",
    "entries",
    "exists",
    "fetch",
    "filesystem",
    "is_file",
    "is_folder",
    "is_local",
    "is_utf8",
    "join",
    "list_folder",
    "look_up",
    "name_of",
    "normalize",
    "open_read",
    "open_write",
    "parent_of",
    "read_bytes",
    "read_ranges",
    "read_text",
    "real_path",
    "redact",
    "remove",
    "remove_empty_folder",
    "remove_folder",
    "replace_bytes",
    "sha256_of",
    "stat",
    "storage_errors",
    "walk",
    "write_bytes",
]
