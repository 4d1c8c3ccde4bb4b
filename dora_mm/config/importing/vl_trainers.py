"""What the configs of LLaMA-Factory, ms-swift and axolotl say beyond names of keys."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_mm.config.importing.foreign import Foreign
from dora_mm.config.importing.translation import Translation
from dora_mm.config.importing.values import OF_METHODS, number_of, put_optimizer_options, put_warmup, refuse
from dora_mm.utils.messages import nearest, shown
from dora_mm.utils.shell import command_line

LANGUAGE_MODEL = ("text.attn", "text.mlp")
# Modules of the parts that LLaMA-Factory freezes, by their names in transformers: its COMPOSITE_MODELS in visual.py
TOWERS = r"vision_tower|vision_model|visual\.(?:patch_embed|pos_embed|blocks|deepstack_merger_list)|vpm|audio_tower"
CONNECTORS = r"multi_modal_projector|connector|visual\.merger|embed_vision|embed_audio|resampler|aligner|mlp1"
OF_IMAGES = "visual|vision|audio|vpm|projector|connector|resampler|aligner|mlp1"  # both, in few words
LANGUAGE = r"language_model|text_model|lm_head|llm"
MAX_PIXELS = 768 * 768  # of an image, of `ProcessorArguments` in LLaMA-Factory's model_args.py
QWEN_VL = re.compile(r"qwen.*(?:vl|omni)|qwen3[._]5|qvq", re.I)  # those that read images, by their names
SEED = 42  # of TrainingArguments in transformers, which all three take over
LOSSES = ("sigmoid", "robust", "ipo")
OF_STAGES = "conversations (sft) and pairs of answers (dpo) are trained"
OF_PREFERENCES = "preference.loss is sigmoid (DPO), robust or ipo (docs/preferences.md)"
COLUMNS = ("messages", "images", "videos", "system", "tools", "chosen", "rejected", "prompt", "query", "response")


def translate_llama_factory(foreign: Foreign, found: Translation) -> None:
    """LLaMA-Factory: a YAML of `llamafactory-cli train`, with the `dataset_info.json` of its folder of data sets.

    Raises:
        ValueError: It is one of `export` or `chat`, its method has no equal, or a data set is not in that file.
    """
    _check_trains(foreign)
    is_preference = _start(found, "stage", str(foreign.take("stage", "sft")))
    _llama_factory_data(foreign, found, is_preference=is_preference)
    method = str(foreign.take("finetuning_type", "lora"))
    _put_method(
        foreign,
        found,
        "full" if method == "full" else "dora" if foreign.flag("use_dora") else "lora",
        "finetuning_type",
        method,
    )
    rank = foreign.take("lora_rank", 8)
    _put_rank(found, rank, foreign.take("lora_alpha", 2 * rank), foreign.take("lora_dropout", 0.0), "lora_rank")
    frozen = (foreign.flag("freeze_vision_tower", True), foreign.flag("freeze_multi_modal_projector", True))
    _put_parts(
        found,
        foreign.take("lora_target", "all"),
        "lora_target",
        *frozen,
        language=not foreign.flag("freeze_language_model"),
        freezes_names=True,
    )
    found.put("model.max_length", foreign.take("cutoff_len", 2048), "cutoff_len")
    if foreign.flag("train_on_prompt"):
        found.put("model.loss_over", "prompts and answers", "train_on_prompt")
    _put_quantization(foreign, found, foreign.take("quantization_bit"), "quantization_bit")
    _put_length(found, foreign, "num_train_epochs", 3, 5e-5, 8)
    found.put("optimizer.weight_decay", number_of(foreign.take("weight_decay", 0.0)), "weight_decay")
    found.put("schedule.name", foreign.take("lr_scheduler_type", "linear"), "lr_scheduler_type")
    if is_preference:
        loss = foreign.take("pref_loss")
        refuse("pref_loss", loss, (None, "sigmoid", "ipo"), OF_PREFERENCES)
        found.put("preference.loss", loss, "pref_loss")
    else:
        foreign.drop("pref_loss", "pref_beta")
    foreign.take("template")
    _put_pixels(foreign, found)
    _put_adapter(foreign, found)
    found.differs("template is not needed: rows are written by the chat template in the model's own files.")
    _common(foreign, found)


def _llama_factory_data(foreign: Foreign, found: Translation, *, is_preference: bool) -> None:
    names = [name.strip() for name in str(foreign.take("dataset", "")).split(",") if name.strip()]
    folder = foreign.file(str(foreign.take("dataset_dir", "data")))
    media = foreign.take("media_dir", str(folder))
    file = folder / "dataset_info.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if names and not known:
        found.differs(f"{file} was not found, so data.train.file is only the name of the data set.")
    evaluated = [name.strip() for name in str(foreign.take("eval_dataset", "")).split(",") if name.strip()]
    for key, requested in (("dataset", names), ("eval_dataset", evaluated)):
        if unknown := [name for name in requested if known and name not in known]:
            raise ValueError(f"{key}: {file} has no entry {unknown[0]!r}{nearest(unknown[0], known)}")
    sources = [_of_dataset_info(name, known.get(name, {}), folder, media, found) for name in names]
    limit = foreign.take("max_samples")
    _put_sources(
        found,
        [{**each, **({"limit": limit} if limit else {})} for each in sources],
        "dataset",
        is_preference=is_preference,
    )
    size = number_of(foreign.take("val_size"))
    if size and size < 1:
        found.put("data.valid.share", size, "val_size")
    elif size:
        found.has_no_equal("val_size", size, "data.valid.share is a share of the rows")
    if evaluated:
        first, *others = evaluated
        source = _of_dataset_info(first, known.get(first, {}), folder, media, found)
        found.put("data.valid", {"format": "preferences" if is_preference else "chat", **source}, "eval_dataset")
        if others:
            found.has_no_equal("eval_dataset", ", ".join(others), "data.valid is one source")


def _of_dataset_info(
    name: str, record: Mapping[str, Any], folder: Path, media: str, found: Translation
) -> dict[str, Any]:
    """A source from an entry of dataset_info.json."""
    if hub := record.get("hf_hub_url") or record.get("ms_hub_url"):
        command = command_line("hf", "download", "--repo-type", "dataset", hub, "--local-dir", f"data/{name}")
        found.differs(f"{shown(hub)} is on the hub: {command}")
        source: dict[str, Any] = {"file": f"data/{name}"}
    else:
        source = {"file": str(folder / record["file_name"]) if "file_name" in record else name, "images": media}
    columns = {ours: theirs for ours, theirs in record.get("columns", {}).items() if ours in COLUMNS and theirs != ours}
    return {**source, **({"columns": columns} if columns else {})}


def translate_ms_swift(foreign: Foreign, found: Translation) -> None:
    """ms-swift: a command line of `swift sft` or `swift rlhf`, or its YAML."""
    kind = str(foreign.take("rlhf_type", "dpo"))
    is_preference = _start(found, "rlhf_type", kind if foreign.flag("rlhf") else "sft")
    given = foreign.take("dataset", [])
    sources = [_of_swift(str(each)) for each in (given if isinstance(given, list) else [given])]
    _put_sources(found, sources, "dataset", is_preference=is_preference)
    found.put("model.path", foreign.take("model"), "model")
    key = "tuner_type" if "tuner_type" in foreign.left else "train_type"
    method = str(foreign.take(key, "lora"))
    foreign.drop("train_type")
    _put_method(
        foreign, found, "full" if method == "full" else "dora" if foreign.flag("use_dora") else "lora", key, method
    )
    rank, alpha = foreign.take("lora_rank", 8), foreign.take("lora_alpha", 32)
    _put_rank(found, rank, alpha, foreign.take("lora_dropout", 0.05), "lora_rank")
    frozen = (foreign.flag("freeze_vit", True), foreign.flag("freeze_aligner", True))
    _put_parts(
        found,
        foreign.take("target_modules", "all-linear"),
        "target_modules",
        *frozen,
        language=not foreign.flag("freeze_llm"),
    )
    _put_quantization(foreign, found, foreign.take("quant_bits"), "quant_bits")
    foreign.drop("quant_method")
    found.put("data.valid.share", number_of(foreign.take("split_dataset_ratio")) or None, "split_dataset_ratio")
    _put_length(found, foreign, "num_train_epochs", 3, 1e-4, 1)
    found.put("optimizer.weight_decay", number_of(foreign.take("weight_decay", 0.1)), "weight_decay")
    found.put("schedule.name", foreign.take("lr_scheduler_type", "cosine"), "lr_scheduler_type")
    found.put("train.gradient_checkpointing", foreign.flag("gradient_checkpointing", True), "gradient_checkpointing")
    if is_preference:
        found.put("preference.beta", number_of(foreign.take("beta")), "beta")
        losses = foreign.take("loss_type")
        refuse("loss_type", losses, (None, *LOSSES), OF_PREFERENCES)
        found.put("preference.loss", losses, "loss_type")
    found.put("adapter.init_from", foreign.take("adapters"), "adapters")
    foreign.drop("template")
    _common(foreign, found)


def _of_swift(given: str) -> dict[str, Any]:
    """A source from a data set of ms-swift: a file or a hub name, with `:subset` and `#rows`."""
    name, _, rows = given.partition("#")
    path = name.partition(":")[0] if not Path(name).exists() else name
    return {"file": path, **({"limit": int(rows)} if rows.isdecimal() else {})}


def translate_axolotl(foreign: Foreign, found: Translation) -> None:
    """axolotl: a YAML of `axolotl train`."""
    rl = str(foreign.take("rl", "sft"))
    is_preference = _start(found, "rl", "dpo" if rl == "ipo" else rl)
    if rl == "ipo":
        found.put("preference.loss", "ipo", "rl")
    sources = []
    for each in foreign.take("datasets", []):
        files = each.get("data_files") or each.get("path")
        source: dict[str, Any] = {"file": files[0] if isinstance(files, list) and len(files) == 1 else files}
        field = each.get("field_messages")
        sources.append({**source, **({"columns": {"messages": field}} if field and field != "messages" else {})})
        split = str(each.get("split", ""))
        if "[" in split:
            found.has_no_equal("datasets.split", split, "data.train.limit is a number of rows")
    _put_sources(found, sources, "datasets", is_preference=is_preference)
    kind = str(foreign.take("adapter", "full"))
    method = "dora" if foreign.flag("peft_use_dora") else "full" if kind == "full" else "lora"
    _put_method(foreign, found, method, "adapter", kind)
    bits = 4 if foreign.flag("load_in_4bit") or kind == "qlora" else 8 if foreign.flag("load_in_8bit") else None
    _put_quantization(foreign, found, bits, "load_in_4bit, load_in_8bit")
    _put_rank(found, foreign.take("lora_r", 8), foreign.take("lora_alpha"), foreign.take("lora_dropout", 0.0), "lora_r")
    chosen = foreign.take("lora_target_modules")
    if foreign.flag("lora_target_linear"):
        chosen = "all-linear"
    found.put(
        "adapter.parts",
        [f"re:{chosen}"] if isinstance(chosen, str) and chosen != "all-linear" else chosen,
        "lora_target_modules",
    )
    found.put("adapter.init_from", foreign.take("lora_model_dir"), "lora_model_dir")
    found.put("data.valid.share", number_of(foreign.take("val_set_size")) or None, "val_set_size")
    if foreign.flag("train_on_inputs"):
        found.put("model.loss_over", "prompts and answers", "train_on_inputs")
    _put_length(found, foreign, "num_epochs", 1, 2e-4, 1)
    found.put("optimizer.weight_decay", number_of(foreign.take("weight_decay", 0.0)), "weight_decay")
    found.put("schedule.name", foreign.take("lr_scheduler", "cosine"), "lr_scheduler")
    options = {
        key: foreign.take(f"adam_{name}") for key, name in (("beta1", "beta1"), ("beta2", "beta2"), ("eps", "epsilon"))
    }
    put_optimizer_options(found, options, "adam_beta1, adam_beta2, adam_epsilon")
    if foreign.flag("sample_packing"):
        found.has_no_equal("sample_packing", True, "rows of about one length are grouped by data.group_by_length")
    for key, ours in (("saves_per_epoch", "train.checkpoint_every"), ("evals_per_epoch", "evaluate.every")):
        if (times := foreign.take(key)) is not None:
            found.has_no_equal(key, times, f"{ours} is a number of steps")
    foreign.drop("chat_template")
    _common(foreign, found)


def _start(found: Translation, key: str, stage: str) -> bool:
    """Puts what every config begins with; whether it is one of preferences.

    Raises:
        ValueError: The stage has no equal here.
    """
    refuse(key, stage, ("sft", "dpo"), OF_STAGES)
    found.put("pipeline", "train_vl")
    found.put("model.family", "vlm")
    if stage == "dpo":
        found.put("data.task", "preference", key)
    return stage == "dpo"


def _check_trains(foreign: Foreign) -> None:
    """Checks that a YAML of LLaMA-Factory is one of a training.

    Raises:
        ValueError: It merges or asks a model.
    """
    words = [foreign.left.get("model_name_or_path"), foreign.left.get("adapter_name_or_path")]
    model, adapter = (str(foreign.file(word)) if isinstance(word, str) else "ADAPTER" for word in words)
    if (out := foreign.left.get("export_dir")) is not None:
        command = command_line("dora-mm", "merge", model, adapter, str(out))
        raise ValueError(f"export_dir: it merges an adapter into its model and trains nothing: {command}")
    if not foreign.left.get("dataset") and not foreign.flag("do_train") and words[1] is not None:
        command = command_line("dora-mm", "ask", model, "IMAGE", "QUESTION", "--adapter", adapter)
        raise ValueError(f"adapter_name_or_path without dataset: it asks a model and trains nothing: {command}")


def _put_pixels(foreign: Foreign, found: Translation) -> None:
    """LLaMA-Factory's limit of an image's pixels, of which it has a default, too."""
    if "image_max_pixels" in foreign.left:
        return  # as any known key
    if QWEN_VL.search(str(foreign.left.get("model_name_or_path", ""))):
        found.put("model.max_pixels", MAX_PIXELS, "image_max_pixels")
    else:
        found.differs(
            f"LLaMA-Factory shrinks images of more than {MAX_PIXELS:,} pixels (image_max_pixels). Here the model's own "
            "limit holds. To set one, add model.max_pixels, or model.image_size if the model takes that instead."
        )


def _put_adapter(foreign: Foreign, found: Translation) -> None:
    """The adapter that LLaMA-Factory goes on with."""
    names = [name.strip() for name in str(foreign.take("adapter_name_or_path", "")).split(",") if name.strip()]
    if len(names) == 1 and not foreign.flag("create_new_adapter"):
        found.put("adapter.init_from", names[0], "adapter_name_or_path")
    elif names:
        found.has_no_equal(
            "adapter_name_or_path", ", ".join(names), "dora-mm merge puts each into the model, which is then model.path"
        )


def _put_sources(found: Translation, sources: Sequence[dict[str, Any]], key: str, *, is_preference: bool) -> None:
    form = "preferences" if is_preference else "chat"
    sources = [{"format": form, **each} for each in sources]
    if sources:
        for name, value in sources[0].items():
            found.put(f"data.train.{name}", value, {"file": key, "limit": "max_samples"}.get(name, ""))
        if "images" not in sources[0] and found.trainer != "llama-factory":  # whose paths start in media_dir
            found.differs("Image paths in the rows start in the folder data.train.images. Add it if they are relative.")
    found.put("data.more", sources[1:] or None, key)


def _put_method(foreign: Foreign, found: Translation, method: str, key: str, theirs: str) -> None:
    refuse(key, theirs, ("lora", "qlora", "full"), OF_METHODS)
    found.put("adapter.method", method, "use_dora, peft_use_dora" if method == "dora" else key)
    if foreign.flag("use_rslora") or foreign.flag("peft_use_rslora"):
        found.put("adapter.scaling", "sqrt", "use_rslora, peft_use_rslora")


def _put_rank(found: Translation, rank: Any, alpha: Any, dropout: Any, source: str) -> None:
    """The size of the adapter and its dropout; full fine-tuning has only a rank, which nothing uses."""
    found.put("adapter.rank", rank, source)
    if found.values["adapter.method"] != "full":
        found.put("adapter.alpha", number_of(alpha), "lora_alpha")
        found.put("adapter.dropout", number_of(dropout) or None, "lora_dropout")


def _put_parts(
    found: Translation,
    given: Any,
    source: str,
    tower_is_frozen: bool,
    connector_is_frozen: bool,
    *,
    language: bool,
    freezes_names: bool = False,
) -> None:
    """The parts for all linear layers of what is not frozen; names of modules as they are.

    Args:
        found: The new config.
        given: `all`, or names of modules.
        source: Their key.
        tower_is_frozen: Whether the vision tower is.
        connector_is_frozen: Whether what is between the tower and the language model is.
        language: Whether the language model is not.
        freezes_names: Whether named modules are frozen there, too, and not only those of `all`.
    """
    names = given if isinstance(given, list) else [each.strip() for each in str(given).split(",")]
    if names in (["all"], ["all-linear"]):
        parts = list(LANGUAGE_MODEL) if language else []
        parts += [] if tower_is_frozen else ["vision.attn", "vision.mlp"]
        parts += [] if connector_is_frozen else ["connector"]
        found.put("adapter.parts", parts, f"{source}, freeze_...")
        return
    towers = [rf"\b(?:{TOWERS})\b"] if tower_is_frozen else []
    connectors = [rf"\b(?:{CONNECTORS})\b"] if connector_is_frozen else []
    frozen = [OF_IMAGES] if towers and connectors else towers + connectors
    frozen += [] if language else [rf"\b(?:{LANGUAGE})\b"]
    if freezes_names and frozen:
        pattern = rf"re:(?!.*(?:{'|'.join(frozen)})).*\b(?:{'|'.join(map(re.escape, names))})"
        found.put("adapter.parts", [pattern], f"{source}, freeze_...")
        found.differs(
            f"{source} names modules in all of the model, and those of frozen networks are not trained: adapter.parts "
            "is a pattern that leaves them out. --dry-run lists what is trained."
        )
    else:
        found.put("adapter.parts", names, source)
        found.differs(
            "Modules with the names in adapter.parts are trained in all of the model, also in its vision tower: "
            "--dry-run lists them."
        )


def _put_quantization(foreign: Foreign, found: Translation, bits: Any, source: str) -> None:
    if bits is not None:
        found.put("model.quantization", {"4": "nf4", "8": "int8"}.get(str(bits), f"{bits} bits"), source)


def _put_length(
    found: Translation, foreign: Foreign, epochs: str, default: float, rate: float, batch_size: int
) -> None:
    """The number of steps or epochs, the batch size and the rate, with the other trainer's defaults."""
    found.put("optimizer.lr", number_of(foreign.take("learning_rate", rate)), "learning_rate")
    steps = foreign.take("max_steps")
    number = float(foreign.take(epochs, default))
    if steps and steps > 0:
        found.put("train.steps", steps, "max_steps")
    else:
        found.put("train.epochs", max(1, round(number)), epochs)
        if number != round(number):
            found.part_of_epochs = (epochs, number)
    given = foreign.take("per_device_train_batch_size", foreign.take("micro_batch_size", batch_size))
    name = "micro_batch_size" if found.trainer == "axolotl" else "per_device_train_batch_size"
    found.put("train.batch_size", given, name)


def _common(foreign: Foreign, found: Translation) -> None:
    """What the three have in common: precision, warm-up, and names that mean the same."""
    dtype = str(foreign.take("torch_dtype", foreign.take("infer_dtype", "")))
    half = [key for key in ("bf16", "fp16") if foreign.flag(key)]
    if half:
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[half[0]]
    found.put("model.dtype", dtype or "bfloat16", half[0] if half else "")
    found.put("train.mixed_precision", {"bfloat16": "bf16", "float16": "fp16"}.get(found.values["model.dtype"]))
    found.put("seed", foreign.take("seed", SEED), "seed")
    put_warmup(found, foreign.take("warmup_steps"), "warmup_steps")
    if "schedule.warmup_steps" in found.values:
        foreign.take("warmup_ratio")
    found.put("train.max_grad_norm", number_of(foreign.take("max_grad_norm")), "max_grad_norm")
    foreign.drop("eval_strategy", "evaluation_strategy", "save_strategy", "tf32", "resume_from_checkpoint")
    foreign.drop("output_dir")
    every = foreign.take("eval_steps")
    if every and ("data.valid.share" in found.values or "data.valid" in found.values):
        found.put("evaluate.every", every, "eval_steps")
    found.take_known(foreign)
