"""The rows of a metrics.jsonl file that a process may have left unfinished."""

import json
import math
from pathlib import Path
from typing import Any

from dora_mm.utils.json_text import parse_json


def rows_until(path: Path, step: float = math.inf) -> list[dict[str, Any]]:
    """The rows up to a step of a metrics.jsonl file that a killed process may have left; none without a file."""
    rows = path.read_bytes() if path.exists() else b""
    return [json.loads(row) for row in complete_rows(step, rows).splitlines()]


def complete_rows(step: float, rows: bytes) -> bytes:
    """The rows up to a step. The last one ends it, too, if a process was killed while it wrote that."""
    kept = []
    for row in rows.splitlines(keepends=True):
        try:
            if parse_json(row, "a row")["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(row)
    return b"".join(kept)
