"""Every config key is read somewhere: a key without effect would mislead users."""

import ast
from pathlib import Path

import pytest

from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import all_keys
from dora_mm.registries.image_families import IMAGE_FAMILIES

CHOOSE_A_CLASS = {"model.family"}  # read where pydantic chooses the class of the section
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def attributes():
    """The names of all attributes that the code reads, except in schemas."""
    files = [*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "dora_mm").rglob("*.py")]
    schemas = {"config", "config.py"}
    trees = [ast.parse(file.read_text()) for file in files if not schemas & set(file.relative_to(ROOT).parts)]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("pipeline", SCHEMAS)
def test_every_key_is_read(pipeline, attributes):
    read = attributes | set(IMAGE_FAMILIES)  # the sections are read by the name that a family has
    unread = {key for key in all_keys(SCHEMAS[pipeline]) if key.split(".")[-1] not in read}
    assert unread <= CHOOSE_A_CLASS


@pytest.mark.parametrize("pipeline", SCHEMAS)
def test_every_pipeline_has_its_script_and_command(pipeline):
    assert (ROOT / "pipelines" / f"{pipeline}.py").is_file()
    assert SCHEMAS[pipeline].command in ("train", "sample", "grid", "eval", "compare", "features", "tune")
