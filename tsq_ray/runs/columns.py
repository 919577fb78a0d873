"""Some columns of Parquet files, by two requests a remote file: the tensors of a part are a thousand times what is read here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tsq_ray import storage
from tsq_ray.errors import RunError

_TAIL_BYTES = 16 * 1024
"""Fetched of the end of a file at first: most footers are shorter."""
_LENGTH_BYTES = 8
"""Of what Parquet writes behind the footer: its length and a magic number."""


def read_part(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One file, or some of its columns. RunError where it is not readable as Parquet."""
    with storage.open_read(uri) as file:
        return _read(uri, file, None, columns)


def read_columns(files: Sequence[storage.StoredFile], columns: Sequence[str]) -> list[pa.Table]:
    """The same columns of each of these files. RunError where one is not readable as Parquet."""
    if not files or storage.is_local(files[0].uri):
        return [read_part(file.uri, columns) for file in files]
    footers = [pq.read_metadata(pa.BufferReader(tail)) if _is_parquet(tail) else None for tail in _tails(files)]
    ranges = [_range_of(footer, columns) if footer is not None else (0, 0) for footer in footers]
    data = storage.read_ranges([file.uri for file in files], ranges)
    tables = []
    for file, footer, (start, _), content in zip(files, footers, ranges, data, strict=True):
        if footer is None:  # to have it told what is wrong
            tables.append(read_part(file.uri, columns))
        else:
            tables.append(_read(file.uri, _Piece(content, start), footer, columns))
    return tables


def _read(uri: str, file: BinaryIO | io.RawIOBase, footer: pq.FileMetaData | None, columns: Sequence[str] | None) -> pa.Table:
    try:
        # both off: one of Arrow's threads may drop the file as the interpreter ends, which aborts the process
        with pq.ParquetFile(file, metadata=footer, pre_buffer=False) as parquet:
            return parquet.read(columns=columns, use_threads=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RunError(f"{storage.redact(uri)}: not readable as Parquet ({error}); delete it and run again") from None


def _tails(files: Sequence[storage.StoredFile]) -> list[bytes]:
    """The end of each file, with its whole footer."""
    uris = [file.uri for file in files]
    tails = storage.read_ranges(uris, [(max(0, file.size_bytes - _TAIL_BYTES), file.size_bytes) for file in files])
    for number, (file, tail) in enumerate(zip(files, tails, strict=True)):
        needed = int.from_bytes(tail[-_LENGTH_BYTES:-4], "little") + _LENGTH_BYTES
        if _is_parquet(tail) and len(tail) < needed <= file.size_bytes:
            (tails[number],) = storage.read_ranges([file.uri], [(file.size_bytes - needed, file.size_bytes)])
    return tails


def _is_parquet(tail: bytes) -> bool:
    return tail[-4:] == b"PAR1"


def _range_of(footer: pq.FileMetaData, columns: Sequence[str]) -> tuple[int, int]:
    """From the first byte of these columns to the last, of all row groups; they lie side by side at the beginning of a row group."""
    starts, ends = [], []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for place in range(group.num_columns):
            chunk = group.column(place)
            if chunk.path_in_schema.split(".")[0] in columns:
                start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
                starts.append(start)
                ends.append(start + chunk.total_compressed_size)
    return min(starts, default=0), max(ends, default=0)


class _Piece(io.RawIOBase):
    """A file of which only the bytes from `start` on are here, as many as `content` has."""

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
