"""Identifiers, config keys, options and registry kinds are named in the field's words."""

import argparse
import ast
import re
from pathlib import Path

import pytest

from dora_mm import registries
from dora_mm.cli.parser import build_parser
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import all_keys
from dora_mm.registries.registry import Registry
from dora_mm.registries.renamed import KEYS, KINDS, OPTIONS

ROOT = Path(__file__).parents[1]
WORDS = {  # each with the field's word for it
    "alone": "single, unbatched, only",
    "asked": "requested, prompt",
    "beside": "extra, next to",
    "card": "GPU; a model card is a `model_card`",
    "claim": "lock, reserve",
    "described": "metadata, or the text it is",
    "drawn": "generated (images), sampled (numbers)",
    "intervals": "confidence_intervals",
    "job": "generation, prompts file",
    "judge": "classifier, selection_metric",
    "judged": "classified, scored",
    "picture": "image",
    "pictures": "images",
    "place": "import_path, path, offset, span, position",
    "places": "import_paths, paths, offsets, spans, positions",
    "plain": "fallback, unweighted, or what it is",
    "said": "reported, or what it is",
    "seam": "interface, base class",
    "sheet": "contact_sheet, spreadsheet",
    "told": "reported, known",
    "unsaid": "default_settings, omitted",
    "whole": "full, complete",
}
COMPOUNDS = ("model_card", "ModelCard", "contact_sheet", "ContactSheet", "CONTACT_SHEET", "confidence_intervals")
EXCEPTIONS = {  # each with its reason
    "held_out": "of held-out data",
    "plain_text": "the MIME type's name",
    "sheet": "openpyxl's worksheets",
    "tell": "of files",
}


def parts(name: str) -> set[str]:
    """The words of an identifier, split at `_` and capitals, without those of compounds that are the field's."""
    for compound in COMPOUNDS:
        name = name.replace(compound, "")
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def defined(tree: ast.AST) -> set[str]:
    """The names that a module gives to something; those of other libraries' attributes are not its own."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def wrong(names: set[str]) -> list[str]:
    return sorted(name for name in names if parts(name) & WORDS.keys() and name not in EXCEPTIONS)


@pytest.mark.parametrize("folder", ["dora_mm", "pipelines"])
def test_identifiers_and_modules(folder):
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = defined(ast.parse(path.read_text(encoding="utf-8"))) | {path.stem, path.parent.name}
        if bad := wrong(names):
            found[path.relative_to(ROOT).as_posix()] = bad
    assert found == {}


def test_config_keys():
    keys = {part for schema in SCHEMAS.values() for key in all_keys(schema) for part in key.split(".")}
    assert wrong(keys) == []


def test_options_of_commands():
    found, parsers = set(), [build_parser()]
    while parsers:
        for action in parsers.pop()._actions:
            found |= {option.lstrip("-").replace("-", "_") for option in action.option_strings}
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    assert "set" in found
    assert wrong(found) == []


def test_registry_kinds():
    kinds = set()
    for path in Path(registries.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == Registry.__name__:
                kinds.add(ast.literal_eval(node.args[0]))
    assert {"target_maps", "export_formats", "tools"} <= kinds
    assert wrong(kinds) == []
    assert not KINDS.keys() & kinds


def test_what_was_renamed_is_there_under_its_present_name_alone():
    for pipeline, keys in KEYS.items():
        known = all_keys(SCHEMAS[pipeline])
        assert set(keys.values()) <= set(known)
        assert not keys.keys() & set(known)
    options = {option for action in _tune()._actions for option in action.option_strings}
    assert set(OPTIONS.values()) <= options
    assert not OPTIONS.keys() & options


def _tune() -> argparse.ArgumentParser:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices["tune"]
