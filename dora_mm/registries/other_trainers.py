"""The names in other trainers of the keys of a config, and of some of their values.

`KEYS` has those that mean the same wherever they occur; what depends on the trainer is in `dora_mm.config.importing`.
"""

import re
from collections.abc import Sequence

KEYS = {  # by the flags of kohya's scripts, diffusers', LLaMA-Factory's and ms-swift's
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
    "loss_type": "loss.type",
    "logit_mean": "loss.timestep_mean",
    "logit_std": "loss.timestep_std",
    "weighting_scheme": "loss.timesteps",
    "sample_every_n_steps": "sample.every",
    "max_train_epochs": "train.epochs",
    "max_grad_norm": "train.max_grad_norm",
    "loraplus_lr_ratio": "optimizer.b_lr_ratio",
    "save_last_n_steps": "train.keep_checkpoints",
    # of vision-language models
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "image_max_pixels": "model.max_pixels",
    "image_min_pixels": "model.min_pixels",
    "max_pixels": "model.max_pixels",
    "cutoff_len": "model.max_length",
    "max_length": "model.max_length",
    "sequence_len": "model.max_length",
    "attn_impl": "model.attn_implementation",
    "torch_dtype": "model.dtype",
    "lora_rank": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.parts",
    "lora_target_modules": "adapter.parts",
    "target_modules": "adapter.parts",
    "dataset": "data.train.file",
    "media_dir": "data.train.images",
    "max_samples": "data.train.limit",
    "val_size": "data.valid.share",
    "val_set_size": "data.valid.share",
    "split_dataset_ratio": "data.valid.share",
    "group_by_length": "data.group_by_length",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "logging_steps": "train.log_every",
    "eval_steps": "evaluate.every",
    "weight_decay": "optimizer.weight_decay",
    "warmup_steps": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup_ratio",
    "lr_scheduler_type": "schedule.name",
    "pref_beta": "preference.beta",
    "rl_beta": "preference.beta",
    "label_smoothing": "preference.label_smoothing",
}
# What is no key here, with what does the same
PROCESSES = "torchrun --nproc-per-node N -m dora_mm COMMAND starts N processes, one per GPU"
GPU = "CUDA_VISIBLE_DEVICES=1 in front of the command chooses the GPU"
OUTSIDE = {
    **dict.fromkeys(("num_processes", "nproc_per_node", "num_gpus", "multi_gpu"), PROCESSES),
    **dict.fromkeys(("device", "gpu_ids", "gpu_id", "devices", "train_device"), GPU),
    "resume_from_checkpoint": "dora-mm train --resume RUN goes on with a run",
    "config_file": "the config is named without a flag: dora-mm train CONFIG.yaml",
    "dataset_config": "dora-mm import reads it, with the TOML or the command line that names it",
}
SERVING = "dora-mm merge MODEL ADAPTER OUT writes a folder, and vllm serve OUT serves it (docs/serving.md)"
ANSWERS = "dora-mm ask MODEL IMAGE QUESTION --adapter RUN prints answers without and with the adapter"
MERGING = "dora-mm merge MODEL ADAPTER OUT writes the merged model"
TRAINING = (
    "dora-mm new vlm NAME --data FILE writes a config, and dora-mm import FILE one from yours; dora-mm train runs it"
)
COMMANDS = {  # of llamafactory-cli, swift and axolotl
    **dict.fromkeys(("serve", "api", "deploy", "vllm-serve"), SERVING),
    **dict.fromkeys(("chat", "infer", "inference"), ANSWERS),
    **dict.fromkeys(("export", "merge-lora", "merge_lora"), MERGING),
    **dict.fromkeys(("sft", "rlhf", "dpo"), TRAINING),
    **dict.fromkeys(("webui", "webchat", "web-ui", "app"), f"the program has no web interface. {TRAINING}"),
    "preprocess": "dora-mm train CONFIG.yaml --dry-run checks and shows the rows",
    "evaluate": "dora-mm eval CONFIG.yaml scores a model and its adapter",
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
        "schedule_free_adamw": "schedule_free",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw_8bit": "paged_adamw_8bit",
    },
    "schedule.name": {
        "constant_with_warmup": "constant",
        "cosine_with_restarts": "restarts",
        "cosine_with_hard_restarts": "restarts",
    },
    "loss.type": {"l2": "mse", "mae": "l1", "pseudo_huber": "huber"},
}
CAPTION_FILES = re.compile(
    r"meta_\w+\.json"
)  # of kohya's finetune scripts: meta_cap.json, meta_clean.json, meta_lat.json
NO_EFFECT = (  # on what is trained: logs, workers, caches, kernels of attention, uploads
    *("attn_implementation", "bucket_reso_steps", "cache_latents", "cache_latents_to_disk"),
    *("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "caption_extension"),
    *("caption_extention", "data_seed", "dataloader_num_workers", "dataset_num_proc", "dataset_prepared_path"),
    *("ddp_timeout", "do_train", "enable_bucket", "flash_attention", "flash_attn", "fp8_base_unet"),
    *("hub_model_id", "huggingface_repo_id", "huggingface_token", "load_from_cache_file", "log_prefix"),
    *("log_tracker_name", "log_with", "logging_dir", "logging_first_step", "lowram"),
    *("max_data_loader_n_workers", "mem_eff_attn", "metadata_author", "metadata_description"),
    *(
        "max_token_length",
        "metadata_license",
        "metadata_tags",
        "metadata_title",
        "no_half_vae",
        "no_metadata",
        "overwrite_cache",
    ),
    *("overwrite_output_dir", "pad_to_sequence_len", "per_device_eval_batch_size"),
    *("persistent_data_loader_workers", "plot_loss", "preprocessing_num_workers", "processor_type"),
    *("push_to_hub", "remove_unused_columns", "report_to", "save_model_as", "save_only_model"),
    *("save_precision", "save_state", "sdpa", "skip_cache_check", "skip_prepare_dataset", "special_tokens"),
    *("stage", "training_comment", "trust_remote_code", "use_fast_tokenizer", "use_safetensors"),
    *("vae_batch_size", "wandb_api_key", "wandb_entity", "wandb_log_model", "wandb_name", "wandb_project"),
    *("wandb_run_name", "wandb_watch", "xformers"),
)
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


def outside(word: str) -> str:
    """What does here what a flag or key of another trainer does, where that is no key; empty where nothing does."""
    return OUTSIDE.get(_name(word), "")


def command_of(word: str) -> str:
    """What does here what a command of another trainer does; empty where nothing is known of it."""
    return COMMANDS.get(word, "")


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
