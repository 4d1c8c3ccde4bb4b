"""The recipes of this folder: the code reads every config key, and every config in configs/ is valid."""

import ast

import pytest

from dora_mm.config import load_config
from dora_mm.config.report import all_keys
from dora_mm.registries.image_families import IMAGE_FAMILIES
from samples.build.__main__ import RECIPES
from samples.build.packages import ROOT

CONFIGS = ROOT / "samples" / "build" / "configs"


@pytest.fixture(scope="module")
def attributes():
    """All attribute names in the code, without the schemas."""
    folders = [ROOT / "dora_mm", ROOT / "samples" / "build"]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    kept = [file for file in files if "config" not in file.parts and "tests" not in file.parts]
    trees = [ast.parse(file.read_text()) for file in kept if file.name != "schema.py"]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", RECIPES.schemas)
def test_every_key_is_read(name, attributes):
    read = attributes | ({"tasks"} if "all_tasks" in attributes else set())  # the property that has either form
    read |= set(IMAGE_FAMILIES)
    assert [key for key in all_keys(RECIPES.schemas[name]) if key.split(".")[-1] not in read] == []


@pytest.mark.parametrize("name", RECIPES.schemas)
def test_every_recipe_loads_and_has_a_config(name):
    assert callable(RECIPES.load(name).main)
    configs = [load_config(file, schemas=RECIPES.schemas) for file in CONFIGS.glob("*.yaml")]
    assert name in {config.pipeline for config in configs}


@pytest.mark.parametrize("name", sorted(file.name for file in CONFIGS.glob("*.yaml")))
def test_the_first_line_of_a_config_is_its_command(name):
    config = load_config(CONFIGS / name, schemas=RECIPES.schemas)
    first = (CONFIGS / name).read_text().splitlines()[0]
    assert first == f"# python -m samples.build {config.command} samples/build/configs/{name}"
