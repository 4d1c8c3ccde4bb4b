"""Krea 2 (diffusers). `text` is what fuses the hidden states of its text encoder and brings them to its own width."""

from dora_mm.targets.blocks import Block, compose
from dora_mm.targets.flux import DEFAULT

_ATTENTION, _FEED_FORWARD = r"attn\.(to_[qkv]|to_gate|to_out\.0)", r"ff\.(gate|up|down)"

KREA2 = compose(
    "krea2",
    Block(r"transformer_blocks\.\d+", {"attn": (_ATTENTION, 5), "ff": (_FEED_FORWARD, 3)}),
    Block(r"text_fusion\.(layerwise|refiner)_blocks\.\d+", {"text": (f"{_ATTENTION}|{_FEED_FORWARD}", 8)}),
    default=DEFAULT,
    layers={"text": r"txt_in\.linear_[12]", "mod": "time_mod_proj"},
)
