"""One meaning for a name, a first line that says what a folder holds, and no circles of imports between files."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

from tests.test_imports import ROOT, SOURCES, imported

OPEN_TO_ALL = {"shared", "documented", "benchmarks"}  # rooms whose helpers every test may use


def titles(path: Path) -> set[str]:
    """The public classes and types that a file defines; what `TypeVar` makes has a meaning in its file alone."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and not (
            isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar"
        ):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if name[0].isupper() and not name.isupper() and not name.startswith("_")}


def test_no_title_has_two_meanings():
    places = defaultdict(list)
    for path in SOURCES:
        for name in titles(path):
            places[name].append(str(path.relative_to(ROOT)))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert twice == {}


def test_every_folder_says_what_belongs_in_it():
    packages = sorted((ROOT / "dora_mm").rglob("__init__.py"))
    said = {
        str(path.parent.relative_to(ROOT)): ast.get_docstring(ast.parse(path.read_text("utf-8"))) for path in packages
    }
    assert len(said) > 20
    assert [folder for folder, text in said.items() if not text or len(text.split("\n\n")[0].split()) < 4] == []


def test_no_files_import_each_other():
    """Imports for types count, and those inside functions; the `__init__` of a package is a file like any other."""
    files = {}
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        files[module.removesuffix(".__init__")] = path
    needs = {module: {file_of(name, files) for name in imported(path)} for module, path in files.items()}
    graph = {module: found - {None, module} for module, found in needs.items()}
    TopologicalSorter(graph).prepare()  # raises a CycleError that names them


def test_no_file_is_written_by_the_safetensors_library():
    """It writes to a temporary file whose name is not ours, so that nobody removes it after a kill."""
    theirs = {"save_file", "save_model", "serialize_file"}
    used = [str(path.relative_to(ROOT)) for path in SOURCES if theirs & {
        getattr(node, "attr", getattr(node, "name", "")) for node in ast.walk(ast.parse(path.read_text("utf-8")))
    }]  # fmt: skip
    assert used == []


def test_texts_have_an_encoding():
    """As ruff's PLW1514 wants it, which does not see paths whose type it cannot tell."""
    without = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("read_text", "write_text") and "encoding" not in {k.arg for k in node.keywords}
    ]
    assert without == []


def file_of(name: str, files: dict[str, Path]) -> str | None:
    """The file that an imported name is in: the longest beginning of it that is a module of ours."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def test_rooms_of_tests_have_what_they_share_in_one_place():
    """So that what moves in dora_mm moves its tests and no imports: helpers of several rooms lie in tests/shared."""
    found = set()
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "samples/build/tests").glob("*.py")]:
        room = path.relative_to(ROOT).parts[1]
        asked = {name for name in imported(path) if name.startswith("tests.") and ".conftest" not in name}
        above = room.startswith("test_")  # those of the whole project, some of which are about a room
        rooms = {room} | OPEN_TO_ALL | {file.stem for file in (ROOT / "tests").iterdir() if above}
        found |= {f"{path.relative_to(ROOT)}: {name}" for name in asked if name.split(".")[1] not in rooms}
    assert found == set()
