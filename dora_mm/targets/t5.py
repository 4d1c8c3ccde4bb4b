"""T5, mT5 and UMT5 (transformers), with or without the decoder."""

from dora_mm.targets.blocks import Block, compose


def t5(prefix: str) -> Block:
    """The blocks of both stacks; those of the decoder also have `cross`."""
    parts = {
        "text.attn": (r"layer\.0\.SelfAttention\.[qkvo]", 4),
        "text.mlp": (r"layer\.[12]\.DenseReluDense\.(wi|wi_0|wi_1|wo)", (2, 3)),
        "cross": (r"layer\.1\.EncDecAttention\.[qkvo]", (0, 4)),
    }
    return Block(rf"{prefix}(encoder|decoder)\.block\.\d+", parts)


T5 = compose("t5", t5(""))
