"""What a storage failure means, what to do about it, and which parts of a URI may be shown."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Iterator

from tsq_ray.errors import DiskFull, ErrorType, StorageError, UserError
from tsq_ray.storage.local_files import SpecialFile, is_utf8

SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_QUERY = re.compile(r"(https?://[^?\n]*?)\?[^\s'\"]+(?:['\"][^\s'\"=]*=[^\s'\"]*)*", re.IGNORECASE)
_SECRET = re.compile(
    r"([a-z][a-z0-9+.-]*://[^?\n]*?)\?(?=[^\s'\"]*(?:sig|token|key|secret|passw|credential|auth)"
    r"[\w.-]*=)[^\s'\"]+",
    re.IGNORECASE,
)
_USER = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_DENIED_CODES = {
    "401",
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "AllAccessDisabled",
}
_ARCHIVED_CODE = "InvalidObjectState"
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_MISSING_CODES = {"404", "NoSuchKey", "NoSuchBucket", "NotFound", "NoSuchUpload"}
_REFUSED_CODES = {"412", "PreconditionFailed", "ConditionalRequestConflict"}
_BAD_NAME_ERROR = "ParamValidationError"  # no bucket or key can have such a name
_KEY_ERRORS = ("NoCredentialsError", "PartialCredentialsError")
_TIMEOUTS = ("ConnectTimeoutError", "ReadTimeoutError")
_CONNECTION_ERRORS = ("ClientConnectorError", "EndpointConnectionError")
_REMOTE_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "asyncio")
_PATH_ERRORS = {
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.ELOOP: "its links form a loop",
    errno.ENAMETOOLONG: "the name is too long",
}


def is_local(uri: str) -> bool:
    """Whether `uri` is a path in this machine's file system."""
    return SCHEME.match(uri) is None


def redact(text: str) -> str:
    """Return `text` in a form that is safe to show.

    Drops the query of http(s) URLs (presigned URLs carry their secret there), that of any other URI
    if it seems to hold a secret, and the user of any, and escapes bytes that are not UTF-8.
    """
    shown = text if is_utf8(text) else text.encode("utf-8", "backslashreplace").decode()
    for pattern, replacement in ((_QUERY, r"\1?..."), (_SECRET, r"\1?..."), (_USER, r"\1...@")):
        shown = pattern.sub(replacement, shown)
    return shown


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def classify(error: BaseException) -> ErrorType:
    """Map a storage exception to not_found, access_denied, not_video or unavailable.

    Expired keys are `unavailable`: once they are renewed, the next run retries by itself.
    """
    chain = _chain(error)
    if _EXPIRED_CODES & {_code(cause) for cause in chain}:
        return "unavailable"  # checked first: s3fs wraps it in a PermissionError
    connected = _connection_failure(chain) is None
    for cause in chain:
        code, status = _code(cause), getattr(cause, "status", None)
        if type(cause).__name__ == _BAD_NAME_ERROR:
            return "not_found"
        # fsspec reports an unreachable http server as a missing file
        if isinstance(cause, FileNotFoundError) and connected:
            return "not_found"
        if code in _MISSING_CODES or status == 404 or _errno(cause) in _PATH_ERRORS:
            return "not_found"
        if isinstance(cause, PermissionError) or code in _DENIED_CODES or status in (401, 403):
            return "access_denied"
        if type(cause).__name__ in _KEY_ERRORS:
            return "access_denied"
        if isinstance(cause, (SpecialFile, IsADirectoryError)):
            return "not_video"
    return "unavailable"


def is_refused_condition(error: BaseException) -> bool:
    """Whether a store refused a conditional write because its condition does not hold."""
    codes = {_code(cause) for cause in _chain(error)}
    return isinstance(error, FileExistsError) or bool(_REFUSED_CODES & codes)


def _errno(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _code(error: BaseException) -> str:
    """The error code in a botocore error's response; empty for any other error."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _connection_failure(chain: list[BaseException]) -> str | None:
    """Why no connection was made; None if `chain` has another cause."""
    names = {type(cause).__name__ for cause in chain}
    if any(_errno(cause) == errno.ECONNREFUSED for cause in chain):
        return "refused"
    if "ClientConnectorDNSError" in names or any(isinstance(e, socket.gaierror) for e in chain):
        return "unknown host"
    if names & set(_TIMEOUTS) or any(isinstance(cause, TimeoutError) for cause in chain):
        return "timed out"
    return "failed" if names & set(_CONNECTION_ERRORS) else None


@contextlib.contextmanager
def storage_errors(uri: str, doing: str = "open") -> Iterator[None]:
    """Turn a file system's exceptions into StorageError, typed and with `uri` in the message."""
    try:
        yield
    except (StorageError, UserError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                "unavailable", f"{redact(uri)}: the disk is full; free some space and run again"
            ) from error
        raise StorageError(classify(error), _message(uri, doing, error)) from error
    except Exception as error:  # botocore's and aiohttp's errors have no common base class
        if type(error).__module__.partition(".")[0] not in _REMOTE_LIBRARIES:
            raise
        raise StorageError(classify(error), _message(uri, doing, error)) from error


def _message(uri: str, doing: str, error: BaseException) -> str:
    kind = classify(error)
    detail = redact(" ".join(str(error).split()))[:200]
    advice = _local_advice(kind, error) if is_local(uri) else _remote_advice(uri, kind, error)
    shown = f" ({detail})" if kind == "unavailable" and detail else ""
    return f"cannot {doing} {redact(uri)}: {advice}{shown}"


def _local_advice(kind: ErrorType, error: BaseException) -> str:
    if isinstance(error, SpecialFile):
        return f"{error.strerror}; name a file"
    if isinstance(error, IsADirectoryError):
        return "a folder; name a file"
    if kind == "not_found":
        known = _PATH_ERRORS.get(_errno(error) or 0)
        return known or "no such file, folder or bucket; check the name"
    if kind == "access_denied":
        return "access denied; check the permissions of the path and of its parent folders"
    return "the file system reports an error; check the disk or its server, then run again"


def _remote_advice(uri: str, kind: ErrorType, error: BaseException) -> str:
    chain, s3 = _chain(error), uri.startswith("s3://")
    codes = {_code(cause) for cause in chain}
    if codes & _EXPIRED_CODES:
        return "the keys have expired; renew them, then run again"
    if s3 and "400" in codes:  # the response to HEAD has no body, so no better code
        return (
            "storage refuses the request (400), as it does when the keys have expired; renew them "
            "or check AWS_ENDPOINT_URL, then run again"
        )
    if _ARCHIVED_CODE in codes:
        return f"the object is archived ({_ARCHIVED_CODE}); restore it first, then run again"
    if kind == "not_found":
        return "no such file, folder or bucket; check the name"
    if kind == "access_denied" and s3:
        return (
            "access denied; check the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and the "
            "permissions; to read a public bucket without keys, set AWS_NO_SIGN_REQUEST=true; "
            "for a requester-pays bucket, set AWS_REQUEST_PAYER=requester"
        )
    if kind == "access_denied":
        return "access denied; check the URL (a presigned one expires) and the permissions"
    place = "AWS_ENDPOINT_URL" if s3 else "the host"
    why = _connection_failure(chain)
    if why is not None:
        return f"no connection ({why}): check {place} and the network, then run again"
    return f"storage did not respond as expected; check {place} and the network, then run again"
