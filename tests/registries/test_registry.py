import subprocess
import sys
import textwrap
from typing import Annotated

import pytest
from pydantic import ValidationError

from dora_mm.config.report import describe
from dora_mm.config.schema import Section, name_in
from dora_mm.registries.registry import Registry, load
from tests.shared.packages import outside_package


def shapes() -> Registry:
    """Of this project a record and a place; a package may add others."""
    return Registry("shapes", "shape", {"round": 0}, import_paths={"square": "string:ascii_uppercase"})


@pytest.fixture
def added(tmp_path, monkeypatch):
    points = {"shapes.oval": "of_others:OVAL", "shapes.gone": "of_others:NOTHING", "others.flat": "of_others:OVAL"}
    monkeypatch.syspath_prepend(outside_package(tmp_path, {"of_others.py": "OVAL = [2]\n"}, points))
    yield
    sys.modules.pop("of_others", None)


def test_records_are_built_in_or_loaded_from_places_or_from_another_package(added):
    found = shapes()
    assert (found["round"], found["square"], found["oval"]) == (0, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", [2])
    assert found["oval"] is found["oval"]
    assert list(found) == ["round", "square", "oval", "gone"]
    assert len(found) == 4
    assert "flat" not in found
    with pytest.raises(KeyError):
        found["flat"]


def test_a_package_that_cannot_be_loaded_is_named(added):
    with pytest.raises(ValueError, match=r"shape gone: of_others:NOTHING cannot be imported: .*NOTHING"):
        shapes()["gone"]


def test_a_record_of_this_project_comes_first(tmp_path, monkeypatch):
    points = {"shapes.round": "of_others:OVAL", "shapes.square": "of_others:OVAL"}
    monkeypatch.syspath_prepend(outside_package(tmp_path, {"of_others.py": "OVAL = [2]\n"}, points))
    found = shapes()
    assert (list(found), found["round"], found["square"][:2]) == (["round", "square"], 0, "AB")


class OneShape(Section):
    shape: Annotated[str, name_in(shapes())]
    by_shape: dict[Annotated[str, name_in(shapes())], int]


def test_a_config_with_a_name_that_there_is_not_names_its_line_and_the_nearest():
    with pytest.raises(ValidationError) as caught:
        OneShape.model_validate({"shape": "rond", "by_shape": {"x": 1}})
    lines = {("shape",): "line 3", ("by_shape", "x"): "line 5"}
    assert [str(problem) for problem in describe(caught.value, OneShape, lines)] == [
        "line 3: shape: must be 'round' or 'square', got 'rond', did you mean 'round'?",
        "line 5: by_shape.x: must be 'round' or 'square', got 'x'",
    ]


def test_a_config_may_name_what_another_package_adds(added):
    class Added(Section):
        shape: Annotated[str, name_in(shapes())]

    assert Added(shape="oval").shape == "oval"


def test_entry_points_are_read_only_where_a_name_is_unknown():
    code = """
        import sys
        from dora_mm.registries.registry import Registry
        shapes = Registry("shapes", "shape", {"round": 0})
        shapes["round"], shapes.check("round")
        print("importlib.metadata" in sys.modules)
        "oval" in shapes
        print("importlib.metadata" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_place_is_a_module_and_its_object():
    assert load("string:digits") == "0123456789"
