"""Headless Chromium: screenshots of a page, and its DOM after scripts and styles have run."""

import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run(page: Path, *options: str, profile: Path, dark: bool = False) -> str:
    """Returns what Chromium prints for a page on the disk. --no-sandbox: containers often run tests as root."""
    assert CHROMIUM is not None
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run(
        [*command, *scheme, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def screenshot(page: Path, png: Path, width: int, height: int, *, profile: Path, dark: bool = False) -> None:
    run(page, f"--screenshot={png}", f"--window-size={width},{height}", profile=profile, dark=dark)
