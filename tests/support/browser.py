"""A headless Chromium that is driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

START_S, ANSWER_S = 60.0, 120.0
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-port=0"),
)


def chromium_path() -> str:
    """The browser; skips the test without one, unless this is CI."""
    path = shutil.which("chromium")
    if path is None and os.environ.get("CI"):
        pytest.fail("no chromium: CI is to have one")
    if path is None:
        pytest.skip("no chromium")
    return path


class Page:
    """A page of the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.requested: list[str] = []
        """Every URL that the page has asked for."""
        self.complaints: list[str] = []
        """What its console shows as errors."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=ANSWER_S)
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(message["params"]["exceptionDetails"]))
            if message.get("id") == number:
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found

    async def value(self, code: str) -> Any:
        """Run JavaScript and return its value."""
        found = await self.call(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, code: str) -> Any:
        """Wait until JavaScript gives something true, and return it."""
        deadline = time.monotonic() + ANSWER_S
        while not (found := await self.value(code)):
            assert time.monotonic() < deadline, f"never true: {code}"
            await asyncio.sleep(0.1)
        return found

    async def open(self, url: str) -> None:
        for domain in ("Page", "Network", "Runtime", "DOM"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def click(self, selector: str, across: float = 0.5) -> None:
        """Click with the mouse on an element, at a part of its width."""
        box = await self.value(
            "((node) => { node.scrollIntoView({block: 'center'});"
            " const {x, y, width, height} = node.getBoundingClientRect();"
            f" return {{x, y, width, height}}; }})(document.querySelector({json.dumps(selector)}))"
        )
        x, y = box["x"] + across * box["width"], box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    async def drop_file(self, selector: str, path: str | Path) -> None:
        """Drop a file on an element."""
        data = base64.b64encode(Path(path).read_bytes()).decode()
        await self.value(
            f"((bytes) => {{ const dataTransfer = new DataTransfer();"
            f" dataTransfer.items.add(new File([bytes], {json.dumps(Path(path).name)}));"
            f" document.querySelector({json.dumps(selector)}).dispatchEvent("
            f"new DragEvent('drop', {{dataTransfer, bubbles: true, cancelable: true}})); }})"
            f"(Uint8Array.from(atob('{data}'), (one) => one.charCodeAt(0)))"
        )

    async def choose_file(self, selector: str, path: str | Path) -> None:
        """Choose a file in an <input type="file">."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    async def set_size(self, width: int, height: int, dark: bool = False) -> None:
        """Make the window so large; `dark`: as on a system with dark colours."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: str | Path) -> None:
        """Write the whole page as PNG."""
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(found["data"]))


@contextlib.asynccontextmanager
async def page(profile: Path) -> AsyncIterator[Page]:
    """An empty page; `profile` is an empty folder of its own."""
    command = [chromium_path(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = await _port(profile / "DevToolsActivePort")
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                targets = await response.json()
            url = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
            async with session.ws_connect(url, max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        browser.terminate()
        browser.wait()


async def _port(file: Path) -> int:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(file.read_text().splitlines()[0])
        assert time.monotonic() < deadline, "the browser did not start"
        await asyncio.sleep(0.1)
