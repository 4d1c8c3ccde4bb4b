"""The names in other trainers of the keys of a config, and of some of their values."""

from collections.abc import Sequence

KEYS = {  # by the flags of kohya's scripts and diffusers'
    "pretrained_model_name_or_path": "model.path",
    "vae": "model.vae",
    "pretrained_vae_model_name_or_path": "model.vae",
    "mixed_precision": "model.dtype",
    "train_data_dir": "data.folder",
    "instance_data_dir": "data.folder",
    "instance_prompt": "data.instance_prompt",
    "resolution": "data.resolution",
    "repeats": "data.repeats",
    "caption_dropout_rate": "data.caption_dropout",
    "shuffle_caption": "data.captions.shuffle",
    "keep_tokens": "data.captions.keep",
    "caption_tag_dropout_rate": "data.captions.tag_dropout",
    "caption_prefix": "data.captions.prefix",
    "caption_suffix": "data.captions.suffix",
    "enable_wildcard": "data.captions.alternatives",
    "masked_loss": "data.mask",
    "alpha_mask": "data.mask.source",
    "conditioning_data_dir": "data.mask.folder",
    "control_directory": "data.references",
    "with_prior_preservation": "preserve",
    "class_prompt": "preserve.prompt",
    "prior_loss_weight": "preserve.weight",
    "v_parameterization": "model.prediction",
    "flip_aug": "data.flip",
    "random_flip": "data.flip",
    "output_dir": "output",
    "output_name": "name",
    "seed": "seed",
    "network_dim": "adapter.rank",
    "rank": "adapter.rank",
    "network_alpha": "adapter.alpha",
    "use_rslora": "adapter.scaling",
    "network_dropout": "adapter.dropout",
    "network_weights": "adapter.init_from",
    "assistant_lora_path": "adapter.assistant.path",
    "guidance_loss_target": "loss.guided_target.scale",
    "guidance_loss_schedule": "loss.guided_target.schedule",
    "unconditional_prompt": "loss.guided_target.prompt",
    "learning_rate": "optimizer.lr",
    "unet_lr": "optimizer.lr",
    "optimizer_type": "optimizer.name",
    "optimizer": "optimizer.name",
    "lr_scheduler": "schedule.name",
    "lr_warmup_steps": "schedule.warmup_steps",
    "max_train_steps": "train.steps",
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "save_every_n_steps": "train.checkpoint_every",
    "checkpointing_steps": "train.checkpoint_every",
    "min_snr_gamma": "loss.min_snr_gamma",
    "snr_gamma": "loss.min_snr_gamma",
    "noise_offset": "loss.noise_offset",
    "logit_mean": "loss.timestep_mean",
    "logit_std": "loss.timestep_std",
    "weighting_scheme": "loss.timesteps",
    "sample_every_n_steps": "sample.every",
}
# Their meaning without another flag is not sure: kohya's scripts have masks and conditions in one folder
UNSURE = {"conditioning_data_dir": ("masked_loss", "data.references", "what a model that edits sees")}
WITHOUT_VALUE = {  # flags that are a value of ours by themselves; others are true
    "alpha_mask": "alpha",
    "masked_loss": "{}",
    "with_prior_preservation": "{}",
    "use_rslora": "sqrt",
    "v_parameterization": "v_prediction",
}
VALUES = {
    "optimizer.name": {
        "adamw8bit": "adamw_8bit",
        "pagedadamw8bit": "paged_adamw_8bit",
        "adamwschedulefree": "schedule_free",
    },
    "schedule.name": {"constant_with_warmup": "constant", "cosine_with_restarts": "restarts"},
}
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of the weights, by the precision of a training


def key_of(word: str) -> str | None:
    """Our key for a flag or key of another trainer, with or without its hyphens; None: it is not known."""
    return KEYS.get(_name(word))


def other_meaning(word: str, given: Sequence[str] = ()) -> str:
    """The other meaning of a flag or key that `key_of` knows, as the end of a sentence; empty where it has one.

    Args:
        word: The flag or key.
        given: All flags, by one of which the meaning may be sure.
    """
    name = _name(word)
    flag, key, meaning = UNSURE.get(name, ("", "", ""))
    if not flag or any(_name(each) == flag for each in given):
        return ""
    return f" with {flag} (masks), and {key} where it has {meaning}: which of both is it?"


def _name(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def settings_of(flag: str, value: str | None) -> list[str]:
    """A flag of another trainer that `key_of` knows, as `--set` takes it.

    Args:
        flag: The flag, without a value.
        value: Its value; None: it has none.
    """
    key, word = KEYS[name := _name(flag)], (value or "").lower()
    if name == "mixed_precision" and word in DTYPES:
        return [f"{key}={DTYPES[word]}", f"train.mixed_precision={word}"]
    if key in VALUES:
        return [f"{key}={VALUES[key].get(word, word) or 'VALUE'}"]
    given = WITHOUT_VALUE.get(name, "true") if value is None else value
    return [f"{key}=[{given}]" if key == "data.references" else f"{key}={given}"]
