"""Decoder language models of transformers: one map for all, from a table of their names.

Of a mixture of experts the attention is adapted by default, and the experts where they are named.
"""

from typing import NamedTuple

from dora_mm.registries.target_maps import DECODERS
from dora_mm.targets.blocks import Block, compose, either


class LayerNames(NamedTuple):
    """How a family of models names its layers."""

    key: str  # of DECODERS, which has the model types of transformers with these names
    blocks: str  # where the blocks are, in the model without its head
    attention: str
    num_attention: int  # layers of a block
    mlp: str
    num_mlp: int

    @property
    def types(self) -> str:
        return DECODERS[self.key]


QKVO = r"self_attn\.(q|k|v|o)_proj"
FUSED = r"(query_key_value|dense)"  # q, k and v are rows of one layer: the same as three that share A
UP4 = r"mlp\.dense_(h_to_4h|4h_to_h)"
TABLE = (
    LayerNames("llama", "layers", QKVO, 4, r"mlp\.(gate|up|down)_proj", 3),
    LayerNames("nemotron", "layers", QKVO, 4, r"mlp\.(up|down)_proj", 2),
    LayerNames("glm", "layers", QKVO, 4, r"mlp\.(gate_up|down)_proj", 2),
    LayerNames("phi3", "layers", r"self_attn\.(qkv|o)_proj", 2, r"mlp\.(gate_up|down)_proj", 2),
    LayerNames("phi", "layers", r"self_attn\.((q|k|v)_proj|dense)", 4, r"mlp\.fc[12]", 2),
    LayerNames("nanochat", "layers", QKVO, 4, r"mlp\.fc[12]", 2),
    LayerNames("starcoder2", "layers", QKVO, 4, r"mlp\.c_(fc|proj)", 2),
    LayerNames("persimmon", "layers", rf"self_attn\.{FUSED}", 2, UP4, 2),
    LayerNames("gpt_neox", "layers", rf"attention\.{FUSED}", 2, UP4, 2),
    LayerNames("bloom", "h", rf"self_attention\.{FUSED}", 2, UP4, 2),
    LayerNames("gpt2", "h", r"attn\.c_(attn|proj)", 2, r"mlp\.c_(fc|proj)", 2),
    LayerNames("gpt_neo", "h", r"attn\.attention\.(q|k|v|out)_proj", 4, r"mlp\.c_(fc|proj)", 2),
    LayerNames("gptj", "h", r"attn\.(q|k|v|out)_proj", 4, r"mlp\.fc_(in|out)", 2),
    LayerNames("codegen", "h", r"attn\.(qkv|out)_proj", 2, r"mlp\.fc_(in|out)", 2),
    LayerNames("mpt", "blocks", r"attn\.(Wqkv|out_proj)", 2, r"ffn\.(up|down)_proj", 2),
    LayerNames("xglm", "layers", r"self_attn\.(q|k|v|out)_proj", 4, "fc[12]", 2),
    LayerNames("opt", r"decoder\.layers", r"self_attn\.(q|k|v|out)_proj", 4, "fc[12]", 2),
)


def decoder(prefix: str) -> Block:
    """The blocks of a decoder language model, whichever of the table it is.

    Args:
        prefix: A regular expression for the path of the model without its head, up to and with the last dot.
    """
    return either(*(block_of(row, prefix) for row in TABLE))


def block_of(row: LayerNames, prefix: str) -> Block:
    """The blocks of the models of one row."""
    parts = {"text.attn": (row.attention, row.num_attention), "text.mlp": (row.mlp, row.num_mlp)}
    return Block(rf"{prefix}{row.blocks}\.\d+", parts)


WITH_HEAD = r"(\w+\.)?"  # `model.` or `transformer.`; a model without its head has no prefix
DECODER = compose("llm", decoder(WITH_HEAD))
EXPERTS = r"(mlp|block_sparse_moe)\.experts\.(gate_up|down)"
MIXTURE = compose(
    "llm-moe",
    Block(rf"{WITH_HEAD}layers\.\d+", {"text.attn": (QKVO, 4), "text.experts": (EXPERTS, (0, 2))}),
    default=("text.attn",),
)
