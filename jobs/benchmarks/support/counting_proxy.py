"""A TCP proxy that counts bytes."""

from __future__ import annotations

import select
import socket
import socketserver
import threading


class CountingProxy:
    """Forwards connections to a server and counts the bytes that come back."""

    def __init__(self, port: int) -> None:
        self.sent = 0
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", port)) as upstream:
                    ends = {self.request: upstream, upstream: self.request}
                    while True:
                        for end in select.select(list(ends), [], [])[0]:
                            data = end.recv(65536)
                            if not data:
                                return
                            proxy.sent += len(data) if end is upstream else 0
                            ends[end].sendall(data)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> CountingProxy:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
