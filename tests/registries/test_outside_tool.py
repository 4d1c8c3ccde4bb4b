"""A tool of another package: its files are recognised, judged and written by command."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from dora_mm.formats.algebra.exact import new_weight
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.formats.reader import LayerReader
from dora_mm.registries.tools import EXPORT_FORMATS, TOOLS, no_entry
from tests.documented.texts import ROOT
from tests.shared import toy
from tests.shared.packages import outside_package

MODEL = ROOT / "samples/tiny-sdxl"
FILES = {
    "acme/__init__.py": "",
    "acme/records.py": """
        from dora_mm.registries.tools import ExportFormat, ToolRecord

        TOOL = ToolRecord("Acme Trainer", "acme.tool:TOOL", "1.0", "acme", ("acme-trainer",))
        TARGET = ExportFormat("to go on with training in Acme Trainer", "acme.tool:EXPORT")
    """,
    "acme/tool.py": '''
        """kohya's names and keys, but for the magnitude."""

        import re
        from dora_mm.formats.naming.spellings import KOHYA
        from dora_mm.formats.tools.formulas import Computation, over_updated_rows
        from dora_mm.formats.tools.parts import KOHYA_NAMES, kohya_tensors, neutral, with_rows
        from dora_mm.formats.tools.tool import Export, Holds, Tool

        def write(layer, W0):
            tensors = kohya_tensors(layer)
            if "dora_scale" in tensors:
                tensors["row_lengths"] = tensors.pop("dora_scale").flatten()
            return tensors

        TOOL = Tool(
            names=KOHYA_NAMES,
            parts={"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "row_lengths": "m"},
            computes=Computation(over_updated_rows, "computes what the paper does", axis="out"),
            wrote_key=re.compile(r".*\\.row_lengths$"),
            read=lambda parts, axis: neutral(with_rows(parts), "out"),
        )
        EXPORT = Export(write, KOHYA, read_by=("acme",), holds=Holds(columns=False, diffs=False))
    ''',
}
COMMANDS = """
    import sys
    from contextlib import suppress
    from dora_mm.cli import main
    for line in sys.argv[1:]:
        with suppress(SystemExit):  # of --help
            main(line.split())
        print("-- end", flush=True)
"""


@pytest.mark.slow
def test_a_tool_of_another_package(tmp_path):
    files = {name: textwrap.dedent(text) for name, text in FILES.items()}
    points = {"tools.acme": "acme.records:TOOL", "export_formats.acme": "acme.records:TARGET"}
    outside = outside_package(tmp_path / "outside", files, points)
    weights = BaseWeights.open(MODEL)
    names = [name for name in weights if name.path.endswith("attentions.0.transformer_blocks.0.attn2.to_k")]
    base = {name: weights[name].float() for name in names}
    states = {name: toy.layer(name, weights=base) for name in names}
    source = toy.write_source(tmp_path / "source.safetensors", states)
    lines = (
        f"convert {source} new.safetensors --to acme --base {MODEL}",
        "inspect new.safetensors",
        f"verify new.safetensors --tool acme --base {MODEL}",
        f"verify {source} --tool acme --base {MODEL}",
        f"convert new.safetensors back.safetensors --to kohya --base {MODEL}",
        f"convert {source} no.safetensors --to Acme-Trainer",
        "convert --help",
        "verify --help",
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMANDS), *lines],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(outside), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    converted, inspected, right, lost, _, _, targets, tools = done.stdout.split("-- end\n")[:-1]
    assert f"written  new.safetensors, {len(names)} modules" in converted
    assert re.search(r"in the form of Acme Trainer\n(.*\n)*works in +Acme Trainer as it is", inspected)
    assert f"right    Acme Trainer: loads all {len(names)} modules" in right
    assert "without 5 magnitudes" in lost
    assert "OUT --to acme --base" in lost
    assert re.search(r"\n  acme +to go on with training in Acme Trainer\n", targets)
    assert re.search(r"\n  acme +Acme Trainer\n", tools)
    assert "there is no export format 'Acme-Trainer': what it reads is written with --to acme\n" in done.stderr
    files = [LayerReader(path, None, None) for path in (source, tmp_path / "back.safetensors")]
    for name in names:
        wanted, found = (new_weight(file.layer(name), base[name]) for file in files)
        torch.testing.assert_close(found, wanted)


def test_without_the_package_its_names_are_unknown():
    assert "acme" not in {*TOOLS, *EXPORT_FORMATS}
    assert no_entry("export format", "acme", "peft") == "there is no export format 'acme': use peft"
