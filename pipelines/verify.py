"""dora-mm verify: what other tools will compute from an adapter file, and how far off that is."""

import json
import math
from collections import Counter, defaultdict

from dora_mm.config.loader import resolve_model, resolve_path
from dora_mm.formats.commands.verify import RIGHT, Verdict, verify
from dora_mm.utils.tables import aligned_columns

SHOWN = 5  # modules that are named for each finding


def main(file: str, tool: str, base: str, *, axis: str | None = None, as_json: bool = False) -> None:
    """Prints a verdict for a tool, or for all.

    Args:
        file: An adapter file of any tool, its folder or run directory.
        tool: A key of `dora_mm.formats.tools.TOOLS`, or "all".
        base: The model: a folder, a single-file checkpoint or a hub name.
        axis: The axis of the magnitudes, where their shape does not say it.
        as_json: Whether to print JSON, with every module.

    Raises:
        ValueError: The adapter or the model cannot be read, they do not belong together, or there is no such tool.
    """
    path = resolve_path(file, "FILE")
    verdicts = verify(path, tool, resolve_model(base, "--base"), axis=axis)
    if as_json:
        print(json.dumps([verdict.as_dict() for verdict in verdicts], indent=2))
        return
    print(f"{path} on {base}: ||W_tool - W'|| / ||W' - W0||, at strength 1\n")
    print(table(verdicts))
    if verdicts[0].note:
        print(f"\n{path}: {verdicts[0].note}")
    if len(verdicts) == 1:
        print(f"\n{details(verdicts[0])}")


def table(verdicts: list[Verdict]) -> str:
    """A row for each tool."""
    rows = [("tool", "finding", "error")]
    rows += [(verdict.tool, summary(verdict), number(verdict.error)) for verdict in verdicts]
    return aligned_columns(rows, num_text=2)


def summary(verdict: Verdict) -> str:
    """The findings of a tool in a line: `right` for all modules, or how many there are of each."""
    if set(verdict.findings) == {RIGHT}:
        return RIGHT
    total = len(verdict.layers)
    parts = [f"{name} ({count} of {total})" for name, count in verdict.findings.most_common()]
    reasons = Counter(layer.reason for layer in verdict.layers if layer.reason)
    return ", ".join(parts) + "".join(f": {reason}" for reason, _ in reasons.most_common(1))


def details(verdict: Verdict) -> str:
    """For each finding, the modules with the largest errors."""
    found = defaultdict(list)
    for layer in verdict.layers:
        found[layer.finding].append(layer)
    rows = [("module", "finding", "error")]
    for finding, layers in found.items():
        worst = sorted(layers, key=lambda layer: -layer.error)
        rows += [(layer.module, finding, number(layer.error)) for layer in worst[:SHOWN]]
        if len(worst) > SHOWN:
            rows.append((f"and {len(worst) - SHOWN} more", finding, f"<= {number(worst[SHOWN].error)}"))
    return aligned_columns(rows, num_text=2)


def number(error: float) -> str:
    """An error with two digits; `-` where there is none."""
    return "-" if math.isnan(error) else f"{error:.1e}"
