"""What is meant by arguments that are not those of our commands: values without --set, and flags of other trainers."""

from collections.abc import Sequence

FLAGS = {  # of kohya's scripts and diffusers', as our config has them
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
    "network_dropout": "adapter.dropout",
    "network_weights": "adapter.init_from",
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
    "sample_every_n_steps": "sample.every",
}


def right_form(unknown: Sequence[str]) -> str:
    """How arguments that a parser does not know are written here; empty where nothing is known of them.

    Args:
        unknown: The arguments, such as `train.steps=20` or `--max_train_steps` and its value.
    """
    pairs = [text for text in unknown if "=" in text and not text.startswith("-")]
    meant = {text: key for text in unknown if text.startswith("--") and (key := _key_of(text))}
    if pairs:
        return f"values of a config follow --set: --set {' '.join(pairs)}"
    if meant:
        return "; ".join(f"{flag.partition('=')[0]} is --set {key}=VALUE here" for flag, key in meant.items())
    return ""


def _key_of(flag: str) -> str | None:
    return FLAGS.get(flag.removeprefix("--").partition("=")[0].replace("-", "_"))
