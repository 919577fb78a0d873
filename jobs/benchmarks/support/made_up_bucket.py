"""An S3 endpoint that lists objects that do not exist."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

PAGE = 1000
"""Keys per page, as on S3."""


def serve_bucket(total: int) -> None:
    """Serve a listing of `total` objects. Prints the endpoint and serves until killed."""

    class Pages(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlparse(self.path).query)
            start = int(query.get("continuation-token", ["0"])[0])
            body = _page(start, min(start + PAGE, total), total).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_response(404)  # the prefix is not an object
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


def _page(start: int, end: int, total: int) -> str:
    entries = "".join(
        f"<Contents><Key>videos/{number // 1000:04d}/{number:010d}.mp4</Key>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{number:032x}&quot;</ETag><Size>{1_000_000 + number}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
        for number in range(start, end)
    )
    more = (
        f"<IsTruncated>true</IsTruncated><NextContinuationToken>{end}</NextContinuationToken>"
        if end < total
        else ""
    )
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="{space}">'
        f"{entries}{more}</ListBucketResult>"
    )
