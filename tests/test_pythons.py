"""The Pythons that pyproject.toml promises."""

import re
import tomllib
from importlib.metadata import metadata, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
PROJECT, TOOL = PYPROJECT["project"], PYPROJECT["tool"]
OLDEST = PROJECT["requires-python"].removeprefix(">=")


def is_oldest(dependency: Requirement) -> bool:
    """Whether no release before the installed one will do, but for its patches; others may be for an older Python."""
    bound = next(bound for bound in dependency.specifier if bound.operator == ">=")
    return Version(version(dependency.name)).release[:2] == Version(bound.version).release[:2]


def test_the_oldest_python_is_one_that_the_dependencies_admit():
    """3.10 was promised, and diffusers and transformers could not be installed there."""
    needs = {
        dependency.name: metadata(dependency.name)["Requires-Python"] or ""
        for dependency in map(Requirement, PROJECT["dependencies"])
        if is_oldest(dependency)
    }
    assert {name: text for name, text in needs.items() if f"{OLDEST}.99" not in SpecifierSet(text)} == {}


def test_classifiers_and_tools_begin_with_the_oldest_python():
    named = re.findall(r"Python :: 3\.(\d+)", "\n".join(PROJECT["classifiers"]))
    assert list(map(int, named)) == list(range(int(OLDEST.removeprefix("3.")), int(named[-1]) + 1))
    assert TOOL["ruff"]["target-version"] == f"py{OLDEST.replace('.', '')}"
    assert TOOL["pyright"]["pythonVersion"] == OLDEST
