"""The app in a browser: its pages draw, log no error, and fit a wide and a narrow window."""

import asyncio
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine"),
]
WIDTHS, HEIGHT, PATIENCE = (1280, 400), 1000, 90  # pixels, pixels, seconds
PAGES = {
    "learn": "How an image becomes noise",
    "?view=Schedules": "Noise schedules side by side",
    "?view=Reverse": "How noise becomes an image",
    "?view=Guidance": "What guidance does",
    "data": "Data",
    "train": "Train",
    "generate": "Generate",
    "judge": "Judge",
    "export": "Export",
}
PATHS = {"learn": ""}  # the first page
DRAWN = """document.querySelector('h1')?.innerText === TITLE
    && document.querySelector('[data-test-script-state]')?.dataset.testScriptState === 'notRunning'
    && !document.querySelector('[data-stale="true"], [data-testid="stSkeleton"], [data-testid="stSpinner"]')
    && [...document.images].every(image => image.complete && image.naturalWidth)"""


LAYOUT = """(() => {
    const main = document.querySelector('[data-testid="stMain"]');
    const wide = [document.documentElement, main].map((part) => part.scrollWidth - part.clientWidth);
    return {overflow: Math.max(...wide), height: main.scrollHeight, shift: window.shift};
})()"""
"""By how many pixels the page is too wide, its height, and how far its parts moved once they were drawn."""
SHIFTS = """window.shift = 0; new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) window.shift += entry.value;
}).observe({type: "layout-shift", buffered: true});"""
MAX_SHIFT = 0.1  # of the window, as web.dev counts it: https://web.dev/articles/cls


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def started(command: list[str], url: str, log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """A server's process, once it answers."""
    import requests

    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            requests.get(url, timeout=5)
            return process
        except requests.ConnectionError:
            time.sleep(0.2)
    process.kill()
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def app(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the app; `LDM_APP_ROOTS` may name runs to show."""
    folder, port = tmp_path_factory.mktemp("app"), free_port()
    runs = os.environ.get("LDM_APP_ROOTS", str(folder))
    url = f"http://localhost:{port}"
    command = [sys.executable, "-m", "ldm.app.launch", "--root", runs, "--port", str(port)]
    process = started(command, f"{url}/_stcore/health", folder / "log", cwd=root)
    yield url
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a headless browser's debugger."""
    folder, port = tmp_path_factory.mktemp("chromium"), free_port()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "about:blank"]
    url = f"http://localhost:{port}"
    process = started([str(CHROMIUM), f"--remote-debugging-port={port}", *flags], f"{url}/json/version", folder / "log")
    yield url
    process.terminate()
    process.wait(30)


async def visit(chromium: str, url: str, title: str, width: int) -> tuple[bytes, dict[str, float], list[str]]:
    """A picture of the whole page once it is drawn, its layout, and the errors that it logged."""
    errors: list[str] = []
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{chromium}/json/new?about:blank") as answer:
            target = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
        async with session.ws_connect(target, max_msg_size=0) as tab:
            number = 0

            async def call(method: str, **parameters: Any) -> dict[str, Any]:
                nonlocal number
                number += 1
                await tab.send_json({"id": number, "method": method, "params": parameters})
                async for message in tab:
                    event = json.loads(message.data)
                    if event.get("id") == number:
                        return dict(event["result"])
                    if event.get("method") == "Runtime.exceptionThrown" or (
                        event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"
                    ):
                        errors.append(json.dumps(event["params"]))
                raise AssertionError("the browser has gone")

            for method in ("Page.enable", "Runtime.enable", "Log.enable"):
                await call(method)
            size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
            await call("Emulation.setDeviceMetricsOverride", **size)
            await call("Page.addScriptToEvaluateOnNewDocument", source=SHIFTS)
            await call("Page.navigate", url=url)
            end, drawn = time.monotonic() + PATIENCE, 0
            while drawn < 3 and time.monotonic() < end:  # three times in a row: it draws in parts
                await asyncio.sleep(0.5)
                found = await call("Runtime.evaluate", expression=DRAWN.replace("TITLE", json.dumps(title)))
                drawn = drawn + 1 if found["result"].get("value") is True else 0
                if drawn == 1:  # until then the page comes in parts, which make room for each other
                    await call("Runtime.evaluate", expression="window.shift = 0")
            layout = await call("Runtime.evaluate", expression=LAYOUT, returnByValue=True)
            measured: dict[str, float] = layout["result"]["value"]
            await call("Emulation.setDeviceMetricsOverride", **size | {"height": int(measured["height"]) + 100})
            await asyncio.sleep(0.5)
            picture = base64.b64decode((await call("Page.captureScreenshot", format="png"))["data"])
            assert drawn == 3, f"{url} is not drawn after {PATIENCE} s; it logged {errors}"
    return picture, measured, errors


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_draws_fits_and_logs_no_error(app: str, chromium: str, tmp_path: Path, name: str, width: int) -> None:
    picture, layout, errors = asyncio.run(visit(chromium, f"{app}/{PATHS.get(name, name)}", PAGES[name], width))
    folder = Path(os.environ.get("LDM_SCREENSHOTS", tmp_path))
    (folder / f"{name.rpartition('=')[2]}-{width}.png").write_bytes(picture)
    assert layout["overflow"] <= 0 and layout["shift"] < MAX_SHIFT, layout
    # Streamlit looks for its server below the page's own path first; that it is not there is no error.
    assert [error for error in errors if f"{app}/{name}/_stcore/" not in error] == []
