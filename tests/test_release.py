"""The version, the tag, CHANGELOG.md, CITATION.cff and the pages name one release."""

import shutil

import pytest

from dora_mm import __version__
from tests.release import PLACEHOLDER, ROOT, VERSIONED, disagreements, hindrances

FILES = ("CHANGELOG.md", "CITATION.cff", "pyproject.toml", *VERSIONED)


@pytest.fixture
def copy(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_this_checkout_agrees():
    assert disagreements() == []


@pytest.mark.parametrize(
    ("name", "old"),
    [("CHANGELOG.md", f"## {__version__} - "), ("CITATION.cff", f"version: {__version__}\n")],
)
def test_another_version_is_found(copy, name, old):
    change(copy / name, old, old.replace(__version__, "9.8.7"))
    (found,) = disagreements(copy)
    assert found.startswith(name)
    assert "9.8.7" in found


def test_an_archive_of_another_version_is_found(copy):
    (copy / "docs/install.md").write_text("pip install dist/dora_mm-9.8.7-py3-none-any.whl", encoding="utf-8")
    assert disagreements(copy) == [f"docs/install.md names an archive of 9.8.7, and the version is {__version__}"]


def test_a_tag_is_a_release_once_the_day_and_the_address_are_there(copy):
    released = f"# Changelog\n\n## {__version__} - "
    cited = f"version: {__version__}\n"
    for name, text in {
        "CHANGELOG.md": f"{released}unreleased\n",
        "CITATION.cff": cited,
        "pyproject.toml": "\n[project]\n",
        **dict.fromkeys(VERSIONED, f"git clone {PLACEHOLDER}"),
    }.items():
        (copy / name).write_text(text, encoding="utf-8")
    tag = f"v{__version__}"
    assert len(hindrances(tag, copy)) == 2 + len(VERSIONED)
    change(copy / "CHANGELOG.md", "unreleased", "2026-12-24")
    (copy / "CITATION.cff").write_text(f"{cited}date-released: 2026-12-23\n", encoding="utf-8")
    assert hindrances(tag, copy)[0] == "CITATION.cff has date-released 2026-12-23, and CHANGELOG.md 2026-12-24"
    change(copy / "CITATION.cff", "2026-12-23", "2026-12-24")
    assert "[project.urls]" in hindrances(tag, copy)[0]
    change(copy / "pyproject.toml", "[project]\n", "[project.urls]\n")
    assert hindrances(tag, copy) == [f"{name} says {PLACEHOLDER}" for name in VERSIONED]
    for name in VERSIONED:
        change(copy / name, PLACEHOLDER, "an address")
    assert hindrances(tag, copy) == []
    for wrong in ("", __version__, "v9.8.7"):
        assert len(hindrances(wrong, copy)) == 1
