"""Whether a tag, the version, CHANGELOG.md, CITATION.cff and pages agree: `make tag`, or python -m tests.release TAG.

It needs nothing but Python, so that the workflow of a tag asks it first.
"""

import re
import sys
from pathlib import Path

import dora_mm

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## (\d+\.\d+\.\d+) - (?:(\d{4}-\d{2}-\d{2})|unreleased)$", re.MULTILINE)
PLACEHOLDER = "<this repository>"  # in pages, until there is an address
VERSIONED = ("README.md", "docs/install.md", "docs/developing.md")  # pages that may name a wheel


def disagreements(root: Path = ROOT, version: str = dora_mm.__version__) -> list[str]:
    """The places that name another version than the package, one sentence each."""
    found = []
    newest = HEADING.search(read(root, "CHANGELOG.md"))
    if newest is None or newest[1] != version:
        begins = newest[1] if newest else "no heading such as ## 0.1.0 - unreleased"
        found.append(f"CHANGELOG.md begins with {begins}, and the version is {version}")
    if (cited := cited_value(root, "version")) != version:
        found.append(f"CITATION.cff has version {cited}, and the version is {version}")
    for name in VERSIONED:
        for named in set(re.findall(r"dora_mm-(\d[\w.]*?)(?:-py3|\.tar)", read(root, name))) - {version}:
            found.append(f"{name} names an archive of {named}, and the version is {version}")
    return found


def hindrances(tag: str, root: Path = ROOT, version: str = dora_mm.__version__) -> list[str]:
    """Why a commit with this tag is no release, one sentence each."""
    found = disagreements(root, version)
    if tag != f"v{version}":
        found.append(f"the tag is {tag or 'missing'}, and v{version} is that of the version")
    newest = HEADING.search(read(root, "CHANGELOG.md"))
    date = newest[2] if newest else None
    if date is None:
        found.append(f"CHANGELOG.md has no date: ## {version} - YYYY-MM-DD")
    if (cited := cited_value(root, "date-released")) != date:
        found.append(f"CITATION.cff has date-released {cited}, and CHANGELOG.md {date}")
    if "\n[project.urls]\n" not in read(root, "pyproject.toml"):
        found.append("pyproject.toml has no [project.urls]: PyPI would show no address of the repository")
    return found + [f"{name} says {PLACEHOLDER}" for name in VERSIONED if PLACEHOLDER in read(root, name)]


def cited_value(root: Path, key: str) -> str | None:
    """A value of CITATION.cff itself, not of what it refers to; None where it is missing."""
    found = re.search(rf"^{key}: [\"']?([^\"'\n]+)", read(root, "CITATION.cff"), re.MULTILINE)
    return found[1] if found else None


def read(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


def main(tag: str = "") -> int:
    found = hindrances(tag)
    print("\n".join(found) or f"{tag} is a release")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
