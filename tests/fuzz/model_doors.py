"""The doors to a folder of a vision-language model: tokenizer, processor, configs, and the chat template."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.models.opening import without_bars
from dora_mm.models.vl.vlm.family import VLM
from tests.fuzz.door import Door
from tests.fuzz.mutations import inserted, placed
from tests.shared.vl import vocabularies
from tests.shared.vl.qwen_models import qwen2_vl
from tests.shared.vl.sizes import text_config
from tests.shared.vl.templates import TEXT

QUESTION = f"What is it? {'a' * 40}! Übung \N{SNOWMAN}\n\n  e\u0301"
TURNS = tuple(Turn(role, text, role == "assistant") for role, text in (
    ("system", "Be brief."), ("user", f"{IMAGE}{QUESTION}"), ("assistant", "A dog."), ("user", "And?"),
    ("assistant", "<think>So?</think>A cat."),
))  # fmt: skip
EXAMPLES = (
    ("chat", Example("1", ("image.png",), "And?", ("A cat.",), (1.0,), turns=TURNS)),
    ("docvqa", Example("2", ("image.png",), QUESTION, ("a dog",), (1.0,))),
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PROCESSOR = ("processor_config.json", "tokenizer_config.json")
CONFIGS = ("config.json", "generation_config.json")
TEMPLATE = "chat_template.jinja"
HOLE = {"Regex": "(a+)+$"}
TOKENIZER_VALUES: tuple[Any, ...] = (  # of tokenizer.json and tokenizer_config.json
    *(HOLE, {"Regex": "("}, {"Regex": "(?<=a*)b"}, {"String": ""}, {"Regex": ""}, "(a+)+$", "AAAA", "!" * 7),
    {"type": "Split", "pattern": HOLE, "behavior": "Isolated", "invert": False},
    {"type": "Replace", "pattern": HOLE, "content": "a" * 1000},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "CAAAAP//////////AAAA"},
    {"type": "Prepend", "prepend": "a" * 10**5},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "processors": [], "decoders": []},
    {"type": "Strip", "content": "a", "start": 2**31, "stop": 2**31},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "b", "continuing_subword_prefix": "#"},
    {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 5},
    {"direction": "Right", "strategy": {"Fixed": 10**9}, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
    *("BertTokenizer", "LlamaTokenizer", "T5Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer"),
    *(6, 0, -5, 2**31, 2**63, 10**30, "left", ["<|im_start|>"], {"content": "a", "special": True}, 1e-300),
)
MODEL_VALUES: tuple[Any, ...] = (  # of the other JSON files of a model
    *("somebody/kernel", "flash_attention_2", "eager", "float8_e4m3fn", "torch.float32", "gelu_new", "Linear", "nn"),
    *("auto_map", "own.py--Own", {"AutoConfig": "own.Own"}, {"AutoProcessor": "somebody/code--own.Own"}, "qwen3_vl"),
    *("Qwen2VLProcessor", "CLIPImageProcessor", "LlavaProcessor", "Qwen2VLForConditionalGeneration", "PreTrainedModel"),
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4, "dataset": "c4"},
    {"rope_type": "yarn", "factor": 1e9, "mrope_section": [1, 1, 1]},
    {"shortest_edge": 2**31, "longest_edge": 2**40},
    {"height": 10**6, "width": 1},
    *(0, 1, 2, 6, 16, 2**20, 2**31, 2**40, -1, 0.0, 1e-38, [0.0] * 3, [1e308] * 4, [0, 1, 2, 3, 4, 5, 6, 7]),
)
PIECES = (  # of chat templates
    *("{% for i in range(99999) %}", "{% for a in messages %}{% for b in range(9999) %}", "{% endfor %}"),
    "{% endif %}",
    *("{{ 'a' * 10**9 }}", "{{ 'é' * 39999 }}", "{{ messages }}", "{{ messages|tojson(indent=99999) }}", "{{", "%}"),
    *("{{ ''.__class__.__mro__ }}", "{% include 'own.jinja' %}", "{% import '/etc/passwd' as own %}"),
    *("{{ raise_exception('no') }}", "{{ strftime_now('%Y' * 9999) }}", "{{ strftime_now('%') }}", "{{ cycler() }}"),
    *("{% macro own() %}{{ own() }}{% endmacro %}{{ own() }}", "{% set ns = namespace(a='') %}", "{# "),
    "{% for i in range(90000) %}{{ ('a' * 6000).title() }}{% endfor %}",
    "{% set ns = namespace(a='é') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=[]) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=[]) %}{% for i in range(900) %}{% set ns.a = ns.a + ['é' * 999999] %}{% endfor %}",
    "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a }}",
    "{{ '%099999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}", "{{ 'a,' * 9 ** 6 | wordwrap(1) }}",
    "{{ messages | groupby('role') | list }}", "{{ messages[0].content | urlize }}", "{{ (" + "(" * 3000,
    "{% generation %}", "{% endgeneration %}", "{% break %}", "{{ 9 ** 9 ** 9 }}", "{{ 'aaaa' | center(10**9) }}",
    "{% call(a) own() %}{% endcall %}", "{% filter upper %}", "{% block a %}{% endblock %}", "{{ caller() }}",
)  # fmt: skip


def make_model(folder: Path) -> None:
    """Qwen2-VL with some thousand weights."""
    _save(folder, qwen2_vl)


def make_language_model(folder: Path) -> None:
    """A Llama without a processor, whose class of tokenizers takes all that tokenizer.json says."""
    _save(folder, llama3)


def llama3() -> tuple[PreTrainedModel, Any]:
    names = {"pad_token": "<|pad|>", "eos_token": "<|im_end|>"}
    tokenizer = vocabularies.llama3(chat_template=TEXT, **names)
    return LlamaForCausalLM(LlamaConfig(**text_config(tokenizer, "llama"))), tokenizer


def _save(folder: Path, build: Callable[[], tuple[Any, Any]]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = build()
    with without_bars():
        model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.new("RGB", (40, 30), (200, 90, 160)).save(folder / "image.png")


def encoded(folder: Path) -> VLM:
    """What the dry run of a training does: rows as tokens, and as text again."""
    model = VLM(VLMModelConfig(path=str(folder), date="2026-12-01"))
    for task, example in EXAMPLES:
        model.prompts.row(task, example, str(folder), None)
        model.row_view(task, example, str(folder))
    return model


def load(folder: Path) -> None:
    """What an evaluation does before it computes: where a class fails at its own settings, that is its error."""
    model = encoded(folder)
    for task, example in EXAMPLES:
        model.batch(task, [example], str(folder), [(example.answers[0], 1.0)])
        model.answerer(task, DecodeConfig(max_new_tokens=2), ())


def encode_text(folder: Path) -> None:
    """As `encoded`, of rows without images."""
    model = VLM(VLMModelConfig(path=str(folder), date="2026-12-01"))
    for task, example in EXAMPLES:
        turns = tuple(turn._replace(text=turn.text.removeprefix(IMAGE)) for turn in example.turns)
        model.row_view(task, replace(example, images=(), turns=turns), None)


MODEL_DOORS = (
    Door("tokenizer", make_model, TOKENIZER, encoded, (placed(TOKENIZER_VALUES),)),
    Door("tokenizer of texts", make_language_model, TOKENIZER, encode_text, (placed(TOKENIZER_VALUES),)),
    Door("processor", make_model, PROCESSOR, encoded, (placed(MODEL_VALUES),)),
    Door("model configs", make_model, CONFIGS, load, (placed(MODEL_VALUES),)),
    Door("chat template", make_model, (TEMPLATE,), encoded, (inserted(PIECES), inserted(PIECES))),
)
