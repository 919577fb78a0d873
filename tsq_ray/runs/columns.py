"""Read some columns of Parquet files, with two requests per remote file.

The tensors of a part are a thousand times larger than the columns read here, which take about 40
bytes a row: with the footer 80 kB of a part of 1,026 rows (T = 50), 400 kB of one of 10,000.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tsq_ray import storage
from tsq_ray.errors import RunError

_TAIL_BYTES = 32 * 1024
"""First read from the end of a file; most footers fit, at about 60 bytes per class name."""
_LENGTH_BYTES = 8
"""Parquet's trailer after the footer: the footer's length and a magic number, 4 bytes each."""
_COLUMN_READS = {"cache_type": "bytes", "block_size": 16 * 1024}
"""Small blocks, so that reading some columns does not fetch the tensors behind them."""


def read_part(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one file or some of its columns. Raises RunError if it is not readable as Parquet."""
    options = {} if columns is None else _COLUMN_READS
    with storage.open_read(uri, **options) as file:
        return _read(uri, file, None, columns)


def read_columns(files: Sequence[storage.StoredFile], columns: Sequence[str]) -> list[pa.Table]:
    """Read the same columns of several files. Raises RunError if one is not readable as Parquet."""
    if not files or storage.is_local(files[0].uri):
        return [read_part(file.uri, columns) for file in files]
    pieces = _fetch(files, columns)
    return [
        _read(file.uri, *pieces[file], columns) if file in pieces else read_part(file.uri, columns)
        for file in files
    ]


def _fetch(
    files: Sequence[storage.StoredFile], columns: Sequence[str]
) -> dict[storage.StoredFile, tuple[io.RawIOBase, pq.FileMetaData]]:
    """Fetch the bytes of these columns and the footer of each file.

    Leaves out files that are not Parquet with one row group, which all parts have.
    """
    footers = {}
    for file, tail in zip(files, _tails(files), strict=True):
        with contextlib.suppress(pa.ArrowInvalid, OSError):
            footers[file] = pq.read_metadata(pa.BufferReader(tail))
    ranges = {
        file: _range_of(footer, columns)
        for file, footer in footers.items()
        if footer.num_row_groups == 1 and footer.num_rows
    }
    found = storage.read_ranges([file.uri for file in ranges], list(ranges.values()))
    return {
        file: (_Piece(data, ranges[file][0]), footers[file])
        for file, data in zip(ranges, found, strict=True)
    }


def _read(
    uri: str,
    file: BinaryIO | io.RawIOBase,
    footer: pq.FileMetaData | None,
    columns: Sequence[str] | None,
) -> pa.Table:
    with _parquet_errors(uri), pq.ParquetFile(file, metadata=footer, pre_buffer=False) as parquet:
        # no pre-buffering, no threads: an Arrow thread that releases the Python file object while
        # the interpreter shuts down aborts the process
        return parquet.read(columns=columns, use_threads=False)


@contextlib.contextmanager
def _parquet_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        # Arrow reports a corrupt page as an OSError without errno; one with errno is the disk's
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise RunError(
            f"{storage.redact(uri)}: not readable as Parquet ({reason}); delete it and run again"
        ) from None


def _tails(files: Sequence[storage.StoredFile]) -> list[bytes]:
    """Read the end of each file, including its whole footer."""
    tails = _ends(files, [min(_TAIL_BYTES, file.size_bytes) for file in files])
    needed = [int.from_bytes(tail[-_LENGTH_BYTES:-4], "little") + _LENGTH_BYTES for tail in tails]
    short = [
        number
        for number, file in enumerate(files)
        if len(tails[number]) < needed[number] <= file.size_bytes
    ]
    for number, tail in zip(
        short,
        _ends([files[number] for number in short], [needed[number] for number in short]),
        strict=True,
    ):
        tails[number] = tail
    return tails


def _ends(files: Sequence[storage.StoredFile], lengths: Sequence[int]) -> list[bytes]:
    """Read the last `lengths` bytes of each file; a length of 0 reads nothing."""
    requests = [(file, length) for file, length in zip(files, lengths, strict=True) if length]
    ranges = [(file.size_bytes - length, file.size_bytes) for file, length in requests]
    found = iter(storage.read_ranges([file.uri for file, _ in requests], ranges))
    return [next(found) if length else b"" for length in lengths]


def _range_of(footer: pq.FileMetaData, columns: Sequence[str]) -> tuple[int, int]:
    """Return the byte range [start, end) that spans these columns.

    They are adjacent at the beginning of the row group, so the range holds little else.
    """
    group = footer.row_group(0)
    chunks = [group.column(place) for place in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    starts = [
        chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        for chunk in chunks
    ]
    ends = [
        start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True)
    ]
    return min(starts, default=0), max(ends, default=1)


class _Piece(io.RawIOBase):
    """A file of which only `content`, the bytes from `start` onwards, is available."""

    def __init__(self, content: bytes, start: int) -> None:
        super().__init__()
        self._content, self._start, self._place = content, start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._start + len(self._content)
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: end}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        first = self._place - self._start
        if first < 0 or size < 0 or first + size > len(self._content):
            raise OSError(f"{size} bytes at {self._place} were not fetched")
        self._place += size
        return self._content[first : first + size]
