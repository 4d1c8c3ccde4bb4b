"""dora-mm verify: what other tools will compute from an adapter file, and how far off that is."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from dora_mm.config.paths import resolve_adapter, resolve_model
from dora_mm.formats.commands.verify import FAILS, IGNORED, NO_MAGNITUDE, NOT_FOUND, REFUSED, RIGHT, Verdict, verify
from dora_mm.models.opening import base_of
from dora_mm.utils.shell import quoted
from dora_mm.utils.tables import aligned_columns

MEASURE = (
    "error: how far the change of the weights is from the one that the file means, at strength 1: "
    "||W_tool - W'|| / ||W' - W0||; 0 is right, 1 (100 %) is as far off as no adapter at all"
)
WRONG, UNREAD = "wrong", "not read"
KINDS = (RIGHT, WRONG, UNREAD)
SHOWN = 5  # modules that are named for each finding


def main(file: str, tool: str, base: str | None = None, *, axis: str | None = None, as_json: bool = False) -> None:
    """Prints a verdict for a tool, or for all.

    Args:
        file: An adapter file of any tool, its folder or run directory.
        tool: One of `dora_mm.registries.tools.other_tools`, or "all".
        base: The model: a folder, a single-file checkpoint or a hub name; None: the one that the file names.
        axis: The axis of the magnitudes, where their shape does not say it.
        as_json: Whether to print JSON, with every module.

    Raises:
        ValueError: The adapter or the model cannot be read, they do not belong together, or there is no such tool.
    """
    path = resolve_adapter(file, "FILE")
    base = base or base_of(path)
    if base is None:
        raise ValueError(f"{path} names no base model that is on this machine: give it with --base MODEL")
    verdicts = verify(path, tool, resolve_model(base, "--base"), axis=axis)
    if as_json:
        print(json.dumps([verdict.as_dict() for verdict in verdicts], indent=2))
        return
    print("\n\n".join(filter(None, sections(verdicts, path, base))))


def sections(verdicts: list[Verdict], file: Path, base: str) -> Iterator[str]:
    """The sections of the report: overview, cures and cautions first, numbers last."""
    yield overview(verdicts)
    yield cures(verdicts, file, base)
    yield cautions(verdicts)
    if verdicts[0].note:
        yield f"{file}: {verdicts[0].note}"
    yield details(verdicts[0]) if len(verdicts) == 1 else table(verdicts)
    yield MEASURE


def overview(verdicts: list[Verdict]) -> str:
    """A line for all tools that make the same of the file: first those that compute what it means."""
    found = {kind: defaultdict[str, list[str]](list) for kind in KINDS}
    for verdict in verdicts:
        kind, what = verdict_text(verdict)
        found[kind][what].append(verdict.title)
    return "\n".join(f"{kind:<8} {', '.join(titles)}: {what}" for kind in KINDS for what, titles in found[kind].items())


def verdict_text(verdict: Verdict) -> tuple[str, str]:
    """The verdict on a tool's loading of the file: one of KINDS, and a text about it."""
    counts = verdict.findings
    total = counts.total() - counts[NOT_FOUND]
    loaded = total - counts[IGNORED] - counts[FAILS]
    if reason := next((layer.reason for layer in verdict.layers if layer.finding == REFUSED), ""):
        return UNREAD, reason
    if not loaded:
        return UNREAD, "raises an error at every module" if counts[FAILS] else "does not know these names"
    amount = f"loads all {total} modules" if loaded == total else f"loads {loaded} of {total} modules"
    usage = f"; {verdict.usage}" if verdict.usage else ""
    if counts[RIGHT] == total:
        return RIGHT, f"{amount}{usage}"
    lost = f", without {counts[NO_MAGNITUDE]} magnitudes" if counts[NO_MAGNITUDE] else ""
    return WRONG, f"{wrong(verdict.error)}, {amount}{lost}{usage}"


def cures(verdicts: list[Verdict], file: Path, base: str) -> str:
    """For each command that makes another file, the tools that compute that one exactly.

    With `--rank` it is the closest file that the tool has a form for, and not the same.
    """
    tools: dict[str, list[str]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.cure:
            tools[verdict.cure].append(verdict.title)
    return "\n".join(
        f"{'closest' if '--rank' in cure else 'to cure'}  {', '.join(titles)}: "
        f"dora-mm convert {quoted(file)} OUT {cure} --base {quoted(base)}"
        for cure, titles in tools.items()
    )


def cautions(verdicts: list[Verdict]) -> str:
    """A line for each thing that a person has to know who loads more than this file, or into a quantised model."""
    tools: dict[str, list[str]] = defaultdict(list)
    for verdict in verdicts:
        for caution in verdict.cautions:
            tools[caution].append(verdict.title)
    return "\n".join(f"mind     {', '.join(titles)}: {caution}" for caution, titles in tools.items())


def wrong(error: float) -> str:
    """An error in words."""
    if not math.isfinite(error):
        return "some values are not finite"
    if f"{error:.2g}" == "1":
        return "unusable, as far off as without the adapter"
    if error > 1:
        return "unusable, further off than without the adapter"
    return f"off by {max(error, 0.001):.1%} of the change"


def table(verdicts: list[Verdict]) -> str:
    """A row for each tool."""
    rows = [("tool", "version", "finding", "error")]
    rows += [(verdict.tool, verdict.version, summary(verdict), number(verdict.error)) for verdict in verdicts]
    return aligned_columns(rows, num_text=3)


def summary(verdict: Verdict) -> str:
    """The findings of a tool in a line: `right` for all modules, or how many there are of each."""
    if set(verdict.findings) == {RIGHT}:
        return RIGHT
    total = len(verdict.layers)
    parts = [f"{name} ({count} of {total})" for name, count in verdict.findings.most_common()]
    reasons = Counter(layer.reason for layer in verdict.layers if layer.reason and layer.finding != REFUSED)
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
