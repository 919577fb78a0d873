"""Every error this package raises on purpose.

    TsqError
    ├── UserError (ValueError)      the command line or its input is wrong: exit code 2
    │   ├── ConfigError             a setting, a TOML file or a --set option
    │   ├── ManifestError           a manifest, a labels file, a source that matches nothing
    │   ├── ModelError              weights, a bundle, a finetune output
    │   └── RunError                a run folder or features that do not fit the request
    ├── StorageError                storage reports a failure; `.error_type` says which
    │   │   (for a video: a failed row; for the run's own input or output: exit code 2)
    │   └── DiskFull                this machine's disk is full
    ├── VideoError                  one video cannot be used: a failed row with `.error_type`
    │   └── DecoderKilled           its decoder was killed from outside on every try
    └── RunFailed                   the run failed or its rows do not add up: exit code 1

A message is one line: what is wrong, the value given, what is allowed, what to do next.
"""

from __future__ import annotations

from typing import Literal, get_args

ErrorType = Literal[
    "not_found",
    "access_denied",
    "unavailable",
    "source_changed",
    "not_video",
    "truncated",
    "corrupt",
    "unsupported",
    "too_large",
    "timeout",
    "decoder_crash",
    "out_of_memory",
    "internal",
]
"""All reasons for a failed row; a closed list."""

ERROR_TYPES: tuple[ErrorType, ...] = get_args(ErrorType)

RETRIED_ERROR_TYPES: tuple[ErrorType, ...] = ("unavailable",)
"""Reasons that the next run of the same command retries automatically."""


class TsqError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(TsqError, ValueError):
    """The command line or its input is wrong; the message says what to do."""


class ConfigError(UserError):
    """A setting has an invalid value."""


class ManifestError(UserError):
    """A source, a labels file or a manifest cannot be used."""


class ModelError(UserError):
    """Weights, a bundle or a finetune output cannot be used."""


class RunError(UserError):
    """A run folder, features or predictions do not fit the request."""


class _TypedError(TsqError):
    def __init__(self, error_type: ErrorType, message: str) -> None:
        assert error_type in ERROR_TYPES, error_type
        super().__init__(message)
        self.error_type: ErrorType = error_type

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # child processes return it pickled
        return type(self), (self.error_type, str(self))


class StorageError(_TypedError):
    """Storage reported a failure.

    `error_type` is not_found, access_denied, unavailable, not_video or unsupported.
    """


class DiskFull(StorageError):
    """This machine's disk is full."""


class VideoError(_TypedError):
    """One video cannot be used; it becomes a failed row with this `error_type`."""


class DecoderKilled(VideoError):
    """The decoder was killed, or ended before it received this video, on every try."""


class RunFailed(TsqError):
    """The run failed, was interrupted, or its rows do not add up."""


Failure = VideoError | StorageError
"""Why a video has a failed row."""
