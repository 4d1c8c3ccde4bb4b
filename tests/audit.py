"""Asks pip-audit for published holes in the oldest releases that are admitted: `make audit`, where an index answers.

Only what is named in SECURITY.md is accepted: holes in what is not used. Where the index of holes cannot be reached,
nothing is known, and this says so.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from dora_mm.utils.requirements import REQUIREMENTS

SECURITY = Path(__file__).parents[1] / "SECURITY.md"
SETTINGS = (
    "--no-deps",
    "--disable-pip",
    "--format",
    "json",
    "--progress-spinner",
    "off",
    "--vulnerability-service",
    "osv",
)
UNREACHABLE = "the index of published holes cannot be reached"


def oldest_releases(requirements: Mapping[str, Sequence[str]] = REQUIREMENTS) -> dict[str, str]:
    """The oldest admitted release of each package; of a package that several extras need, the newest of these."""
    found: dict[str, str] = {}
    for needed in map(Requirement, (text for texts in requirements.values() for text in texts)):
        (bound,) = needed.specifier
        parts = [int(part) for part in bound.version.split(".")]
        if parts >= [int(part) for part in found.get(needed.name, "0").split(".")]:
            found[needed.name] = bound.version
    return found


def problems(report: Mapping[str, Any], accepted: str) -> list[str]:
    """The published holes of a report of pip-audit that are not accepted, one sentence each.

    Args:
        report: What pip-audit prints.
        accepted: A text with the identifiers of those that are.

    Raises:
        ConnectionError: A package was not looked up.
    """
    found = []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            raise ConnectionError(package["skip_reason"])
        for hole in package["vulns"]:
            if not _is_accepted([hole["id"], *hole.get("aliases", ())], accepted):
                fixed = ", ".join(hole["fix_versions"]) or "none yet"
                found.append(f"{package['name']} {package['version']}: {hole['id']} (fixed in: {fixed})")
    return found


def _is_accepted(names: Iterable[str], accepted: str) -> bool:
    return any(name in accepted for name in names)


def main(program: str) -> int:
    """Prints what was found; 1 where there is a hole.

    Args:
        program: The path of pip-audit.
    """
    listed = "".join(f"{name}=={version}\n" for name, version in oldest_releases().items())
    command = [program, *SETTINGS, "--requirement", "/dev/stdin"]
    try:
        done = subprocess.run(command, input=listed, capture_output=True, text=True)
        found = problems(json.loads(done.stdout), SECURITY.read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError) as error:  # without a connection pip-audit prints a traceback, and no report
        print(f"not audited: {UNREACHABLE}, or pip-audit is not there ({error})")
        return 0
    print("\n".join(found) or f"no published hole in what is used of {len(oldest_releases())} packages")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
