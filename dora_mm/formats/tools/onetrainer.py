"""OneTrainer: `.dora_scale` and `.alpha`, on the input axis by default, on the output axis with an option.

Its reader takes the axis from its option and not from the file, so that what it computes holds with the option that
fits the file's shape. It has no strength.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from dora_mm.formats.naming.spellings import ONETRAINER
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools.formulas import Computation, over_updated_rows
from dora_mm.formats.tools.parts import (
    LYCORIS_PARTS,
    Parts,
    kohya_tensors,
    neutral,
    with_rows,
)
from dora_mm.formats.tools.tool import Export, Header, Holds, Modules, Tool

USAGE = {
    "out": "the magnitudes are those of output rows: set OneTrainer's option for them (its default is columns)",
    "in": "the magnitudes are those of input columns, as OneTrainer's default is",
}


def read(parts: Parts, axis: str | None) -> LayerState:
    return neutral(with_rows(parts), axis)


def refuses(modules: Modules, others: Collection[str], header: Header) -> str:
    """It raises an error at what none of its trainings has, and where only some of the modules have a magnitude."""
    others = [key for key in others if not key.startswith("bundle_emb")]
    if unknown := next(iter(TOOL.unread(modules, others)), None):
        return f"raises an error at {unknown:.100}, and loads nothing"
    if 0 < sum("m" in TOOL.roles(module, endings) for module, endings in modules.items()) < len(modules):
        return "raises an error, since some modules have a magnitude and some have none, and loads nothing"
    return ""


def usage(axes: Collection[str]) -> str:
    if len(axes) > 1:
        return "some magnitudes are those of output rows and some of input columns, and OneTrainer has one option"
    return "".join(USAGE[axis] for axis in axes)


TOOL = Tool(
    table="onetrainer",
    parts={
        **{ending: role for ending, role in LYCORIS_PARTS.items() if role not in ("diff", "mid")},
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_A.default.weight": "A",
        "lora_B.default.weight": "B",
        "lora.down.weight": "A",
        "lora.up.weight": "B",
        "lora_magnitude_vector.weight": "m",
        "magnitude": "m",
    },
    computes=Computation(over_updated_rows, "takes the norm on the axis that its option says", strengths=()),
    wrote_header=re.compile("ot_"),
    read=read,
    refuses=refuses,
    usage=usage,
)
EXPORT = Export(
    kohya_tensors,
    ONETRAINER,
    read_by=("onetrainer",),
    holds=Holds(diffs=False, both_methods=False),
)
