"""Names of dtypes as people type them."""

from typing import Any

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def full_name(name: Any) -> Any:
    """The name of a dtype as torch has it; what is no short name stays as it is."""
    return SHORT.get(name, name) if isinstance(name, str) else name
