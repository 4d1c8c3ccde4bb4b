"""Adapters of other methods, which are named and refused."""

from __future__ import annotations

from collections.abc import Collection

METHODS = {  # by the end of a key
    "oft_blocks": "OFT or BOFT",
    "oft_diag": "OFT",
    "oft_R.weight": "OFT",
    "on_input": "IA3",
    "ia3_l": "IA3",
    "vera_lambda_b": "VeRA",
    "delora_lambda": "DeLoRA",
    "hra_u": "HRA",
    "bottleneck.down.weight": "series or parallel adapters, which dora-mm train, eval and ask read",
    "prompt_embeddings": "a learned prefix or prompt of PEFT, of which dora-mm train, eval and ask read prefixes",
    "lora_mid_A.weight": "a Tucker decomposition of another tool",
}
_ENDINGS = tuple(METHODS)


def other_method(keys: Collection[str]) -> str | None:
    """The method of a file that is neither LoRA nor DoRA, or has modules that are not; None for the two."""
    for key in filter(lambda key: key.endswith(_ENDINGS), keys):
        for ending, method in METHODS.items():
            if f".{key}".endswith(f".{ending}"):
                return method
    return None
