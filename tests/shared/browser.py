"""Headless Chromium: a page driven with real keys and clicks, screenshots, and the DOM after scripts and styles ran."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 60  # seconds for one answer
# Without faketime's library: with it Chromium keeps both cores busy and takes ten times as long.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36,
             "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}  # fmt: skip


def options(profile: Path) -> list[str]:
    """--no-sandbox: containers often run tests as root."""
    return ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]


def run(page: Path, *more: str, profile: Path, dark: bool = False) -> str:
    """Returns what Chromium prints for a page on the disk."""
    assert CHROMIUM is not None
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [CHROMIUM, *options(profile), *scheme, *more, page.as_uri()]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=120).stdout


def screenshot(page: Path, png: Path, width: int, height: int, *, profile: Path, dark: bool = False) -> None:
    run(page, f"--screenshot={png}", f"--window-size={width},{height}", profile=profile, dark=dark)


class Page:
    """A page in a running Chromium, driven through the DevTools protocol over a pipe.

    Attributes:
        problems: Texts of errors, of violations of the page's policy and of dialogs such as alert().
    """

    def __init__(self, to_browser: int, from_browser: int):
        self.to_browser, self.from_browser, self.unread = to_browser, from_browser, b""
        self.number, self.events, self.problems, self.session = 0, [], [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol; events that arrive until its answer are kept."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def read(self) -> dict[str, Any]:
        """Returns the next answer or event; problems among the events are kept."""
        while b"\0" not in self.unread:
            assert select.select([self.from_browser], [], [], TIMEOUT)[0], "Chromium does not answer"
            part = os.read(self.from_browser, 1 << 20)
            assert part, "Chromium has ended"
            self.unread += part
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        kind, parameters = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"]))
        elif kind == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])
        elif kind == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {parameters['message']}")
        self.events.append(kind)
        return message

    def open(self, page: Path | str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Opens a page from the disk, or at a URL, in a window of that size, in pixels."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while "Page.loadEventFired" not in self.events:
            self.read()

    def evaluate(self, expression: str) -> Any:
        """Returns the value of an expression in the page; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Waits until an expression in the page is true: some events come a moment later."""
        end = time.monotonic() + TIMEOUT
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.01)

    def press(self, *keys: str) -> None:
        """Presses keys by name, such as ArrowLeft, a or Shift+Tab."""
        for name in keys:
            shift, _, key = name.rpartition("+")
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = KEY_CODES.get(key, ord(key[0].upper()))
            common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
            self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """Clicks with the mouse into the middle of the first element that a selector finds."""
        box = self.evaluate(
            f"(async () => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'nearest'});"
            "for (const _ of [1, 2]) await new Promise(requestAnimationFrame);"  # a page that was scrolled settles
            "const box = node.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def screenshot(self, png: Path) -> None:
        png.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """Starts Chromium, which reads commands from its descriptor 3 and answers on 4."""
    assert CHROMIUM is not None
    (commands_out, commands_in), (answers_out, answers_in) = pipe(), pipe()

    def connect() -> None:
        os.dup2(commands_out, 3)
        os.dup2(answers_in, 4)

    command = [CHROMIUM, *options(profile), "--remote-debugging-pipe"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=ENVIRONMENT, preexec_fn=connect, close_fds=False, **silent)
    os.close(commands_out)
    os.close(answers_in)
    try:
        yield Page(commands_in, answers_out)
    finally:
        process.terminate()
        process.wait(TIMEOUT)
        os.close(commands_in)
        os.close(answers_out)


def pipe() -> list[int]:
    """A pipe whose descriptors are not 3 or 4."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high
