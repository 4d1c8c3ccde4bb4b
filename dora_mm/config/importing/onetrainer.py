"""What the configs of OneTrainer say beyond names of keys."""

import json

from dora_mm.config.importing.foreign import Foreign
from dora_mm.config.importing.translation import Translation
from dora_mm.config.importing.values import (
    OF_METHODS,
    number_of,
    put_optimizer_options,
    put_resolution,
    put_schedule,
    put_warmup,
    refuse,
    side_of,
)
from dora_mm.registries.other_trainers import DTYPES


def translate(foreign: Foreign, found: Translation) -> None:
    """OneTrainer: its JSON, with the concepts in it or in the file that it names."""
    found.put("pipeline", "train_diffusion")
    method = str(foreign.take("training_method", "LORA"))
    refuse("training_method", method, ("LORA", "FINE_TUNE"), OF_METHODS)
    if method == "LORA":
        refuse("peft_type", str(foreign.take("peft_type", "LORA")), ("LORA",), OF_METHODS)
    kind = "full" if method == "FINE_TUNE" else "dora" if foreign.flag("lora_decompose") else "lora"
    found.put("adapter.method", kind, "training_method, lora_decompose")
    found.put("adapter.rank", foreign.take("lora_rank", 16), "lora_rank")
    found.put("adapter.alpha", number_of(foreign.take("lora_alpha", 1.0)), "lora_alpha")
    found.put("model.path", foreign.take("base_model_name"), "base_model_name")
    precision = {"BFLOAT_16": "bf16", "FLOAT_16": "fp16"}.get(str(foreign.take("train_dtype", "FLOAT_16")), "no")
    found.put("model.dtype", DTYPES[precision], "train_dtype")
    found.put("train.mixed_precision", precision, "train_dtype")
    put_resolution(found, foreign.take("resolution", "512"))
    found.put("optimizer.lr", number_of(foreign.take("learning_rate", 3e-6)), "learning_rate")
    optimizer = foreign.take("optimizer", {})
    found.put("optimizer.name", optimizer.get("optimizer") if isinstance(optimizer, dict) else optimizer, "optimizer")
    if isinstance(optimizer, dict):
        put_optimizer_options(
            found, {k: optimizer.get(k) for k in ("weight_decay", "beta1", "beta2", "eps")}, "optimizer"
        )
    put_schedule(found, foreign.take("learning_rate_scheduler", "CONSTANT"), "learning_rate_scheduler")
    put_warmup(found, foreign.take("learning_rate_warmup_steps", 200), "learning_rate_warmup_steps")
    found.put("train.epochs", foreign.take("epochs", 100), "epochs")
    found.put("train.batch_size", foreign.take("batch_size", 1), "batch_size")
    checkpointing = str(foreign.take("gradient_checkpointing", "ON"))
    found.put("train.gradient_checkpointing", checkpointing not in ("OFF", "False"), "gradient_checkpointing")
    if str(foreign.take("ema", "OFF")) != "OFF":
        found.put("ema.decay", number_of(foreign.take("ema_decay", 0.999)), "ema_decay")
    _onetrainer_loss(foreign, found)
    _onetrainer_concepts(foreign, found)
    for key in [
        key
        for key in foreign.left
        if key.startswith(("output_", "backup_", "save_", "sample_", "lora_weight", "layer_filter_preset"))
    ]:
        foreign.drop(key)
    foreign.drop("model_type", "concept_file_name", "workspace_dir", "cache_dir", "tensorboard")
    foreign.take("vae")
    for network in ("text_encoder", "text_encoder_2", "unet", "transformer", "prior"):
        settings = foreign.take(network, {})
        if network.startswith("text") and settings.get("train") is True:
            found.has_no_equal(
                f"{network}.train", True, "text_encoders.attn in adapter.parts, beside the denoiser's parts"
            )


def _onetrainer_loss(foreign: Foreign, found: Translation) -> None:
    times = {"UNIFORM": "uniform", "LOGIT_NORMAL": "logit_normal"}
    if (chosen := str(foreign.take("timestep_distribution", "UNIFORM"))) in times:
        found.put("loss.timesteps", times[chosen], "timestep_distribution")
    else:
        found.has_no_equal("timestep_distribution", chosen, "loss.timesteps")
    if chosen == "LOGIT_NORMAL":
        found.put("loss.timestep_mean", number_of(foreign.take("noising_bias")), "noising_bias")
        found.put("loss.timestep_std", number_of(foreign.take("noising_weight")), "noising_weight")
    weighting = str(foreign.take("loss_weight_fn", "CONSTANT"))
    strength = number_of(foreign.take("loss_weight_strength", 5.0))
    if weighting == "MIN_SNR_GAMMA":
        found.put("loss.min_snr_gamma", strength, "loss_weight_strength")
    elif weighting != "CONSTANT":
        found.has_no_equal("loss_weight_fn", weighting, "loss.weighting")
    if weighting != "MIN_SNR_GAMMA":
        found.values["loss.min_snr_gamma"] = None
    found.put("loss.noise_offset", number_of(foreign.take("offset_noise_weight")), "offset_noise_weight")
    if foreign.flag("masked_training"):
        found.put("data.mask.source", "file", "masked_training")
        found.put("data.mask.floor", number_of(foreign.take("unmasked_weight", 0.1)), "unmasked_weight")
    foreign.take("unmasked_weight")


def _onetrainer_concepts(foreign: Foreign, found: Translation) -> None:
    concepts = foreign.take("concepts")
    name = str(foreign.take("concept_file_name", "training_concepts/concepts.json"))
    if not concepts:
        file = foreign.file(name)
        concepts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        if not concepts:
            found.has_no_equal("concept_file_name", name, "it was not found: data.folder is the folder of images")
    roles = {"VALIDATION": "validate", "PRIOR_PREDICTION": "preserve"}
    folders, texts = [], []
    for each in concepts:
        if not each.get("enabled", True):
            continue
        image, text = each.get("image", {}), each.get("text", {})
        texts.append(text)
        size = side_of(image.get("resolution_override")) if image.get("enable_resolution_override") else None
        folder = {"path": each.get("path"), "role": roles.get(each.get("type"), "train"), "resolution": size}
        folder |= {"repeats": float(each.get("balancing", 1.0)), "weight": float(each.get("loss_weight", 1.0))}
        folders.append({key: value for key, value in folder.items() if value not in (None, "train", 1.0)})
        found.put("data.flip", image.get("enable_random_flip") or None, "concepts.image.enable_random_flip")
    if texts:
        found.put("data.captions.shuffle", texts[0].get("enable_tag_shuffling") or None, "enable_tag_shuffling")
        if texts[0].get("enable_tag_shuffling"):
            found.put("data.captions.keep", texts[0].get("keep_tags_count"), "keep_tags_count")
        if texts[0].get("tag_dropout_enable"):
            found.put("data.captions.tag_dropout", texts[0].get("tag_dropout_probability"), "tag_dropout_probability")
    found.put("data.folders", folders or None, "concepts")
