"""What the jobs of ai-toolkit say beyond names of keys."""

from collections.abc import Mapping
from typing import Any

from dora_mm.config.importing.foreign import Foreign
from dora_mm.config.importing.translation import Translation
from dora_mm.config.importing.values import OF_METHODS, number_of, put_optimizer_options, put_schedule, refuse
from dora_mm.registries.other_trainers import DTYPES


def translate(foreign: Foreign, found: Translation) -> None:
    """ai-toolkit: the first process of a job."""
    config = foreign.take("config", {})
    foreign.take("job")
    foreign.take("meta")
    found.put("pipeline", "train_diffusion")
    process, *others = config["process"] or [{}]
    if others:
        found.has_no_equal("process", f"{len(others)} more", "one config trains one adapter")
    flat = _flattened(process)
    inner = Foreign("ai-toolkit", flat, foreign.folder)
    for key in ("type", "training_folder", "device", "performance_log_every", "sqlite_db_path"):
        inner.drop(key)
    if process.get("network"):
        _ai_toolkit_network(inner, found)
    else:
        found.put("adapter.method", "full")
        found.differs(
            "There is no section network, so all weights of the model are trained (adapter.method: full), as there. "
            "For a LoRA: --set adapter.method=lora adapter.rank=16, and a higher optimizer.lr, such as 1e-4."
        )
    _ai_toolkit_training(inner, found)
    _ai_toolkit_data(inner, found)
    _ai_toolkit_model(inner, found)
    _ai_toolkit_samples(inner, found)
    found.take(
        inner, {"save.save_every": "train.checkpoint_every", "save.max_step_saves_to_keep": "train.keep_checkpoints"}
    )
    for key in list(inner.left):
        if key.startswith(("save.", "logging.")):
            inner.drop(key)
        elif key.startswith("network.conv") and inner.left[key]:
            found.has_no_equal(key, inner.take(key), "convolutions are a part where the family has one (adapter.parts)")
    foreign.left |= inner.left
    foreign.dropped |= inner.dropped


def _ai_toolkit_network(inner: Foreign, found: Translation) -> None:
    kind = str(inner.take("network.type", "lora")).lower()
    refuse("network.type", kind, ("lora", "dora"), OF_METHODS)
    found.put("adapter.method", kind, "network.type")
    rank = inner.take("network.rank", inner.take("network.linear", 4))
    inner.take("network.linear")
    found.put("adapter.rank", rank, "network.linear")
    alpha = inner.take("network.linear_alpha", inner.take("network.alpha", 1.0))
    found.put("adapter.alpha", number_of(alpha), "network.linear_alpha")


def _ai_toolkit_training(inner: Foreign, found: Translation) -> None:
    names = {
        "train.steps": "train.steps",
        "train.batch_size": "train.batch_size",
        "train.gradient_checkpointing": "train.gradient_checkpointing",
        "train.max_grad_norm": "train.max_grad_norm",
        "train.noise_offset": "loss.noise_offset",
        "train.min_snr_gamma": "loss.min_snr_gamma",
        "train.snr_gamma": "loss.min_snr_gamma",
        "network.dropout": "adapter.dropout",
        "network.pretrained_lora_path": "adapter.init_from",
        "train.diff_output_preservation_multiplier": "preserve.weight",
    }
    accumulation = inner.take("train.gradient_accumulation_steps", inner.take("train.gradient_accumulation"))
    found.put("train.gradient_accumulation_steps", accumulation, "train.gradient_accumulation_steps")
    found.put("optimizer.lr", number_of(inner.take("train.lr", 1e-6)), "train.lr")
    found.put("optimizer.name", inner.take("train.optimizer"), "train.optimizer")
    put_optimizer_options(found, _within(inner, "train.optimizer_params"), "train.optimizer_params")
    put_schedule(found, inner.take("train.lr_scheduler", "constant"), "train.lr_scheduler")
    precision = str(inner.take("train.dtype", "fp32")).lower().replace("fp32", "no").replace("float32", "no")
    found.put("model.dtype", DTYPES.get(precision), "train.dtype")
    found.put("train.mixed_precision", precision, "train.dtype")
    if inner.flag("train.ema_config.use_ema"):
        found.put("ema.decay", number_of(inner.take("train.ema_config.ema_decay", 0.999)), "train.ema_config.ema_decay")
    inner.take("train.ema_config.ema_decay")
    if inner.flag("train.diff_output_preservation"):
        found.put(
            "preserve.prompt", inner.take("train.diff_output_preservation_class", ""), "diff_output_preservation_class"
        )
    else:
        inner.take("train.diff_output_preservation_class")
        inner.take("train.diff_output_preservation_multiplier")
    if inner.flag("train.blank_prompt_preservation"):
        found.put("preserve.prompt", "", "train.blank_prompt_preservation")
        found.put("preserve.weight", number_of(inner.take("train.blank_prompt_preservation_multiplier")))
    times = inner.take("train.timestep_type")
    known = {"sigmoid": "logit_normal", "linear": "uniform"}
    if times in known:
        found.put("loss.timesteps", known[times], "train.timestep_type")
    elif times is not None:
        found.has_no_equal("train.timestep_type", times, "loss.timesteps")
    if inner.flag("train.train_text_encoder"):
        found.has_no_equal("train.train_text_encoder", True, "text_encoders.attn in adapter.parts, with the UNet's")
    for key in (
        "train.train_unet",
        "train.noise_scheduler",
        "train.cache_text_embeddings",
        "train.unload_text_encoder",
    ):
        inner.drop(key)
    found.put("train.steps", inner.take("train.steps", 1000), "train.steps")
    found.put("train.batch_size", inner.take("train.batch_size", 1), "train.batch_size")
    found.take(inner, names)


def _ai_toolkit_data(inner: Foreign, found: Translation) -> None:
    datasets = inner.take("datasets", [])
    first = datasets[0] if datasets else {}
    sizes = first.get("resolution", 512)
    sizes = sizes if isinstance(sizes, list) else [sizes]
    if len(sizes) > 1:
        found.put("data.resolutions", sizes, "datasets.resolution")
    else:
        found.put("data.resolution", sizes[0], "datasets.resolution")
    if len(datasets) == 1 and not first.get("is_reg"):
        found.put("data.folder", first.get("folder_path"), "datasets.folder_path")
        found.put("data.repeats", first.get("num_repeats"), "datasets.num_repeats")
    else:
        folders = [
            {
                "path": each.get("folder_path"),
                **({"repeats": float(each["num_repeats"])} if "num_repeats" in each else {}),
                **({"weight": float(each["loss_multiplier"])} if "loss_multiplier" in each else {}),
                **({"role": "preserve"} if each.get("is_reg") else {}),
            }
            for each in datasets
        ]
        found.put("data.folders", folders or None, "datasets")
    names = {
        "caption_dropout_rate": "data.caption_dropout",
        "shuffle_tokens": "data.captions.shuffle",
        "keep_tokens": "data.captions.keep",
        "token_dropout_rate": "data.captions.tag_dropout",
        "flip_x": "data.flip",
        "mask_path": "data.mask.folder",
        "mask_min_value": "data.mask.floor",
        "default_caption": "data.instance_prompt",
    }
    for theirs, ours in names.items():
        found.put(ours, first.get(theirs), f"datasets.{theirs}")
    if control := first.get("control_path"):
        found.put("data.references", control if isinstance(control, list) else [control], "datasets.control_path")
    handled = {*names, "folder_path", "num_repeats", "resolution", "loss_multiplier", "is_reg", "control_path"}
    without_effect = {"caption_ext", "cache_latents_to_disk", "cache_latents", "buckets", "cache_text_embeddings"}
    for number, each in enumerate(datasets):
        for key in each:
            if key not in handled | without_effect and each[key] not in (None, False, [], ""):
                found.has_no_equal(f"datasets.{number}.{key}", each[key])
    if word := inner.take("trigger_word"):
        found.put("data.captions.prefix", f"{word}, ", "trigger_word")
        found.differs(
            "ai-toolkit adds trigger_word to captions that lack it; data.captions.prefix is in front of every caption."
        )


def _ai_toolkit_model(inner: Foreign, found: Translation) -> None:
    found.put("model.path", inner.take("model.name_or_path"), "model.name_or_path")
    found.put("model.vae", inner.take("model.vae_path"), "model.vae_path")
    found.put("adapter.assistant.path", inner.take("model.assistant_lora_path"), "model.assistant_lora_path")
    kinds = {"qfloat8": "float8", "float8": "float8", "qint8": "int8", "int8": "int8"}
    for flag, kind, ours in (("quantize", "qtype", "quantization"), ("quantize_te", "qtype_te", "text_quantization")):
        chosen = str(inner.take(f"model.{kind}", "qfloat8")).partition("|")[0]
        if inner.flag(f"model.{flag}"):
            if chosen in kinds:
                found.put(f"model.{ours}", kinds[chosen], f"model.{flag}")
            else:
                found.has_no_equal(f"model.{kind}", chosen, f"model.{ours}")
    if inner.flag("model.is_v_pred"):
        found.put("model.prediction", "v_prediction", "model.is_v_pred")
    for key in ("model.arch", "model.is_xl", "model.is_v3", "model.is_flux", "model.low_vram", "model.dtype"):
        inner.drop(key)  # the family is read from the model's files


def _ai_toolkit_samples(inner: Foreign, found: Translation) -> None:
    prompts = inner.take("sample.prompts") or [each.get("prompt") for each in inner.take("sample.samples", [])]
    if inner.flag("train.disable_sampling"):
        return
    found.put("sample.prompts", prompts or None, "sample.prompts")
    names = {
        "sample.sample_every": "sample.every",
        "sample.sample_steps": "sample.steps",
        "sample.neg": "sample.negative_prompt",
    }
    found.take(inner, names)
    found.put("sample.guidance", number_of(inner.take("sample.guidance_scale")), "sample.guidance_scale")
    seed = inner.take("sample.seed")
    found.put("sample.seeds", None if seed is None else [seed], "sample.seed")
    for key in ("sampler", "width", "height", "walk_seed", "sample_start_step"):
        inner.drop(f"sample.{key}")


def _flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _within(foreign: Foreign, section: str) -> dict[str, Any]:
    """The keys of a section of flattened values, without it."""
    keys = [key for key in foreign.left if key.startswith(f"{section}.")]
    return {key.removeprefix(f"{section}."): foreign.take(key) for key in keys}
