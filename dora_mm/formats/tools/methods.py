"""Adapters of methods that are not read here, which are named and refused, with what can be done instead."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

_EXTRACT = (
    "merge it with PEFT (PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(MERGED)), and "
    "make an adapter of the result with dora-mm extract MERGED BASE OUT"
)
_MERGE = (
    "it changes more than the weights of linear layers: merge it with PEFT "
    "(PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(MERGED)), and use MERGED as a model"
)
_RUN = "it is no change of weights, and cannot be merged: run it with PEFT"
_TRAINED = "dora-mm train, eval and ask read such a file with its model"
_TOOL = "only LoRA and DoRA, and LoHa, LoKr and GLoRA are read: merge it in the tool that made it"


class Method(NamedTuple):
    """A method that is not read.

    Attributes:
        title: What it is called.
        keys: Matches the end of a key that only it has, from one of the names between dots on.
        advice: What a person can do with a file of it.
    """

    title: str
    keys: str
    advice: str


READ = ("LORA", "LOHA", "LOKR")  # the `peft_type` of what is read
METHODS = {  # by the `peft_type` of PEFT, BONE of its older releases; of other tools by names of ours
    "ADALORA": Method("AdaLoRA", r"lora_E", _EXTRACT),
    "ADAMSS": Method("AdaMSS", r"adamss_.*", _MERGE),
    "ADAPTION_PROMPT": Method("LLaMA-Adapter (prompts in attention)", r"adaption_(prompt|gate)", _RUN),
    "BEFT": Method("BEFT (biases)", r"beft_bias", _MERGE),
    "BOFT": Method("BOFT", r"boft_[Rs]", _EXTRACT),
    "BONE": Method("Bone", r"bone_.*", _EXTRACT),
    "C3A": Method("C3A", r"c3a_kernel", _EXTRACT),
    "CARTRIDGE": Method("a Cartridge (a learned prefix)", r"", _RUN),
    "CPT": Method("CPT (a learned prompt)", r"", _RUN),
    "DEFT": Method("DEFT", r"deft_.*", _EXTRACT),
    "DELORA": Method("DeLoRA", r"delora_.*", _EXTRACT),
    "FOURIERFT": Method("FourierFT", r"fourierft_.*", _EXTRACT),
    "FROD": Method("FRoD", r"frod_.*", _EXTRACT),
    "GLORA": Method("GLoRA of PEFT", r"glora_[A-E]\.\w+", _MERGE),
    "GRALORA": Method("GraLoRA", r"gralora_.*", _EXTRACT),
    "HIRA": Method("HiRA", r"hira_.*", _EXTRACT),
    "HRA": Method("HRA", r"hra_u", _EXTRACT),
    "IA3": Method("IA3", r"ia3_l", _MERGE),
    "LILY": Method("Lily (a router between adapters)", r"lily_.*", _RUN),
    "LN_TUNING": Method("LN tuning (norms)", r"ln_tuning_layers\..*", _MERGE),
    "MISS": Method("MiSS", r"miss_.*", _EXTRACT),
    "MULTITASK_PROMPT_TUNING": Method("multitask prompt tuning (a learned prompt)", r"prefix_task_\w+", _RUN),
    "OFT": Method("OFT", r"oft_(embedding_)?[Rrs](\.weight)?", _EXTRACT),
    "OSF": Method("OSF", r"osf_.*", _EXTRACT),
    "PEANUT": Method("PEANuT", r"peanut_.*", _EXTRACT),
    "POLY": Method("Poly (a mixture of adapters by the task)", r"poly_.*", _RUN),
    "PREFIX_TUNING": Method("a learned prefix or prompt", r"prompt_embeddings", f"{_TRAINED}, if it is a prefix"),
    "PROMPT_TUNING": Method("prompt tuning (a learned prompt)", r"", _RUN),
    "PSOFT": Method("PSOFT", r"psoft_.*", _EXTRACT),
    "PVERA": Method("PVeRA", r"pvera_.*", _EXTRACT),
    "P_TUNING": Method("p-tuning (a learned prompt)", r"", _RUN),
    "RANDLORA": Method("RandLoRA", r"randlora_.*", _EXTRACT),
    "ROAD": Method("RoAd", r"road_.*", _MERGE),
    "SHADOW": Method("Shadow (a second network beside the model)", r"shadow_.*", _RUN),
    "SHIRA": Method("SHiRA", r"shira_.*", _EXTRACT),
    "SUPERTUNING": Method("SuperTuning", r"supertuning_.*", _EXTRACT),
    "TINYLORA": Method("TinyLoRA", r"tinylora_.*", _EXTRACT),
    "TRAINABLE_TOKENS": Method("trained rows of an embedding", r"trainable_tokens_.*", _MERGE),
    "UNILORA": Method("Uni-LoRA", r"unilora_.*", _EXTRACT),
    "VBLORA": Method("VB-LoRA", r"vblora_.*", _EXTRACT),
    "VERA": Method("VeRA", r"vera_.*", _EXTRACT),
    "WAVEFT": Method("WaveFT", r"waveft_.*", _EXTRACT),
    "XLORA": Method("X-LoRA (a mixture of adapters by the token)", r"internal_xlora_.*", _RUN),
    "LyCORIS OFT": Method("OFT of LyCORIS", r"oft_diag", _TOOL),
    "LyCORIS BOFT": Method("OFT or BOFT of LyCORIS", r"oft_blocks", _TOOL),
    "LyCORIS IA3": Method("IA3 of LyCORIS", r"on_input", _TOOL),
    "Tucker": Method("a Tucker decomposition of another tool", r"lora_mid_A\.weight", _TOOL),
    "bottleneck": Method("series or parallel adapters", r"bottleneck\.down\.weight", _TRAINED),
}
_ONE = re.compile("|".join(rf"(?P<_{n}>{method.keys})" for n, method in enumerate(METHODS.values()) if method.keys))


def other_method(keys: Collection[str]) -> Method | None:
    """The method of a file, or of a module, by a key that is not read here; None where there is none."""
    for key in keys:
        for position in (0, *(found.end() for found in re.finditer(r"\.", key))):
            if found := _ONE.fullmatch(key, position):
                return list(METHODS.values())[int(str(found.lastgroup)[1:])]
    return None


def method_of_type(peft_type: str) -> Method | None:
    """The method of a `peft_type`; None for those that are read."""
    if peft_type in READ:
        return None
    unknown = Method(f"an adapter of PEFT's type {peft_type!r:.50}", "", f"it is not known here: {_EXTRACT}")
    return METHODS.get(peft_type, unknown)
