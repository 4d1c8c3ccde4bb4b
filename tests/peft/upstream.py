"""Runs PEFT's own tests of its layers, from a checkout of its repository, without and with the line.

    python -m tests.peft.upstream CHECKOUT [-n WORKERS]

The checkout has to be of the installed release, beside what its tests import (diffusers, parameterized, pytest-xdist,
scipy). With the line, every adapter runs fused as soon as PEFT has added it, however small its layer is. What passes
without the line has to pass with it, and something has to pass; the exit code is 1 otherwise.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

TESTS = ("tests/test_custom_models.py", "tests/test_lora_variants.py")
ROOT = Path(__file__).parents[2]


def pytest_configure(config):
    """As a plugin of pytest: every adapter of PEFT runs fused."""
    from peft.tuners.lora import LoraModel

    from dora_mm import fuse_peft
    from dora_mm.peft import fuse, layers

    layers.crossing = lambda *_: 0
    inject = LoraModel.inject_adapter

    def inject_fused(self, model, *args, **kwargs):
        inject(self, model, *args, **kwargs)
        if any(True for _ in fuse.adapters_of(model)):
            fuse_peft(model)

    LoraModel.inject_adapter = inject_fused


def outcomes(checkout: Path, workers: str, *plugin: str) -> dict[str, str]:
    """The outcome of each test: passed, failed or skipped; `needs a hub` where it asked for a file of one."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            *TESTS,
            "-k",
            "lora or dora",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
        ]
        command += ["-n", workers, "--junitxml", str(report), *plugin]
        paths = os.pathsep.join([str(ROOT / "tests/peft"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
        return {
            f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in ET.parse(report).iter("testcase")
        }


def outcome(case: ET.Element) -> str:
    for child in case:
        if child.tag in ("failure", "error"):
            text = (child.get("message") or "") + (child.text or "")
            return "needs a hub" if "LocalEntryNotFound" in text or "couldn't connect" in text else "failed"
        if child.tag == "skipped":
            return "skipped"
    return "passed"


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.peft.upstream", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("-n", default="2", help="processes")
    given = parser.parse_args()
    without = outcomes(given.checkout, given.n)
    line = outcomes(given.checkout, given.n, "-p", "upstream")
    worse = [name for name, found in without.items() if found == "passed" and line.get(name) != "passed"]
    print("without the line:", dict(Counter(without.values())))
    print("with the line:   ", dict(Counter(line.values())))
    print(f"passed without it alone: {len(worse)}", *worse, sep="\n  ")
    return int(bool(worse) or "passed" not in without.values())


if __name__ == "__main__":
    sys.exit(main())
