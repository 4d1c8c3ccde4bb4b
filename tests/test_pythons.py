"""The Pythons that pyproject.toml promises."""

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT, TOOL = PYPROJECT["project"], PYPROJECT["tool"]
NAMED = [found[1] for text in PROJECT["classifiers"] if (found := re.search(r"Python :: (3\.\d+)", text))]
RELEASES = [f"3.{minor}" for minor in range(8, 20)]


def admitted(specifiers: str) -> set[str]:
    return {version for version in RELEASES if f"{version}.99" in SpecifierSet(specifiers)}


def test_every_python_that_is_promised_is_one_that_the_dependencies_admit():
    """3.10 was promised, and diffusers and transformers could not be installed there."""
    promised = admitted(PROJECT["requires-python"])
    narrower = {}
    for name in (Requirement(text).name for text in PROJECT["dependencies"]):
        if missing := promised - admitted(metadata(name)["Requires-Python"] or ""):
            narrower[name] = sorted(missing)
    assert narrower == {}


def test_classifiers_and_tools_begin_with_the_oldest_python():
    oldest = min(admitted(PROJECT["requires-python"]), key=RELEASES.index)
    assert RELEASES[RELEASES.index(oldest) :][: len(NAMED)] == NAMED
    assert TOOL["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert TOOL["pyright"]["pythonVersion"] == oldest
