"""The file in a multipart form, extracted as the form arrives."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tsq_ray.serving.requests.problems import RequestError


class Form:
    """A form with one file, in the field `file`; other fields are read and discarded."""

    def __init__(self, content_type: str) -> None:
        """Raise RequestError 400 if the media type has no boundary."""
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise RequestError(400, "the form cannot be read: its Content-Type has no boundary")
        self.file_name = ""
        """As the client sent it, without folders; known once the file has been read."""
        self._header, self._value, self._disposition = b"", b"", b""
        self._in_file = self._is_whole = False
        self._data = bytearray()
        callbacks: Any = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._take_field,
            "on_header_value": self._take_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take_data,
            "on_part_end": self._end_part,
        }
        self._parser = MultipartParser(boundary, callbacks)

    async def file(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the file's bytes as they arrive.

        Raises RequestError 400 if the form is malformed or has not exactly one whole file.
        """
        try:
            async for chunk in body:
                self._parser.write(chunk)
                yield bytes(self._data)
                self._data.clear()
            self._parser.finalize()
        except FormParserError as error:
            raise RequestError(400, f"the form cannot be read: {error}") from None
        if not self._is_whole:
            raise RequestError(400, "the form has no `file`; send it as: curl -F file=@video.mp4")

    def _begin_part(self) -> None:
        self._disposition = b""

    def _take_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _end_headers(self) -> None:
        options = parse_options_header(self._disposition)[1]
        self._in_file = options.get(b"name") == b"file" and b"filename" in options
        if not self._in_file:
            return
        if self._is_whole:
            raise RequestError(400, "the form has two files; send one form per video")
        self.file_name = os.path.basename(options[b"filename"].decode(errors="replace"))

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._data += data[start:end]

    def _end_part(self) -> None:
        self._is_whole = self._is_whole or self._in_file
        self._in_file = False
