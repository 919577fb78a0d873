"""A distant object store: forwards connections to a local server and delays every response.

python jobs/benchmarks/support/slow_store.py http://127.0.0.1:8333 [--wait-ms 30] [--mb-s 40]

Prints its endpoint and serves until killed. It does not parse what it forwards, so it adds little
load to what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

_PIECE = 256 * 1024


@contextlib.contextmanager
def slow_store(endpoint: str, wait_ms: float, mb_s: float = 0.0) -> Iterator[str]:
    """Run such a store in its own process for the duration of the `with`; yields its endpoint."""
    command = [sys.executable, __file__, endpoint, "--wait-ms", str(wait_ms), "--mb-s", str(mb_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("endpoint", help="endpoint of the server behind it")
    parser.add_argument("--wait-ms", type=float, default=30.0, help="delay of each response")
    parser.add_argument(
        "--mb-s",
        type=float,
        default=0.0,
        help="megabytes per second per connection and direction; 0: unlimited",
    )
    options = parser.parse_args(argv)
    asyncio.run(_serve(options))
    return 0


async def _serve(options: argparse.Namespace) -> None:
    behind = urlsplit(options.endpoint)
    seconds_a_byte = 1e-6 / options.mb_s if options.mb_s else 0.0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requested = asyncio.Event()
        upstream_reader, upstream_writer = await asyncio.open_connection(
            behind.hostname, behind.port, limit=_PIECE
        )

        async def requests() -> None:
            while data := await reader.read(_PIECE):
                requested.set()
                await asyncio.sleep(len(data) * seconds_a_byte)
                upstream_writer.write(data)
                await upstream_writer.drain()

        async def answers() -> None:
            while data := await upstream_reader.read(_PIECE):
                wait_s = options.wait_ms / 1000 if requested.is_set() else 0.0
                requested.clear()
                await asyncio.sleep(wait_s + len(data) * seconds_a_byte)
                writer.write(data)
                await writer.drain()

        both = [asyncio.ensure_future(requests()), asyncio.ensure_future(answers())]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(*both)
        for end in (writer, upstream_writer):
            end.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=_PIECE, backlog=1000)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
