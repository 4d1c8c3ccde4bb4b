"""The table of docs/targets.md: which share of a mixture's weights each part reaches."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from dora_mm.core.targets import match_modules
from dora_mm.core.wrappers.separation import with_projections
from dora_mm.targets.derived import derive
from tests.documented.vlm_classes import CLASSES

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"
COLUMNS = ("text.attn", "text.mlp", "text.experts")
KINDS = ("aria", "ernie4_5_vl_moe", "glm4v_moe", "kimi_k25", "llama4", "qwen3_5_moe", "qwen3_vl_moe", "step3p7")


def row_of(kind: str) -> str:
    """The row of a type, at the default sizes of its config."""
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[kind])(CONFIG_MAPPING[kind]())
    modules, total, counts = with_projections(dict(model.named_modules())), 0, Counter()
    total = sum(parameter.numel() for parameter in model.parameters())
    for path, part in match_modules(model, derive(model)).items():
        counts[part if part in COLUMNS else "others"] += modules[path].weight.numel()
    shares = " | ".join(f"{counts[part] / total:.1%}".rstrip("%") for part in (*COLUMNS, "others"))
    return f"| `{kind}` | {total:,} | {shares} |"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_shares_that_parts_reach(kind):
    assert row_of(kind) in PAGE.read_text(encoding="utf-8").splitlines()
