"""What the GUI of kohya's scripts (bmaltais/kohya_ss) saves as JSON, as the flags with which it starts them."""

import re
from collections.abc import Mapping
from typing import Any

SCRIPTS = {  # by the box that is ticked; none: train_network.py
    "sdxl": "sdxl_train_network.py",
    "flux1_checkbox": "flux_train_network.py",
    "sd3_checkbox": "sd3_train_network.py",
    "hunyuan_image_checkbox": "hunyuan_image_train_network.py",
    "anima_checkbox": "anima_train_network.py",
    "lumina_checkbox": "lumina_train_network.py",
}
MODULES = {  # by LoRA_type; the types of LyCORIS have its module
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "LoRA-FA": "networks.lora_fa",
    "Kohya DyLoRA": "networks.dylora",
    "Kohya LoHa": "networks.loha",
    "Kohya LoKr": "networks.lokr",
    "Flux1": "networks.lora_flux",
    "Flux1 OFT": "networks.oft_flux",
    "Anima": "networks.lora_anima",
    "Lumina": "networks.lora_lumina",
    "HunyuanImage-2.1": "networks.lora_hunyuan_image",
}
NAMES = {  # of the GUI, by the flag
    "resolution": "max_resolution",
    "optimizer_type": "optimizer",
    "network_module": "LoRA_type",
    "network_args": "LoRA_type",
    "lr_warmup_steps": "lr_warmup",
    "network_train_unet_only": "text_encoder_lr",
    "network_train_text_encoder_only": "unet_lr",
}
OF_NETWORK = (  # arguments of the module, which the GUI saves beside its other keys
    *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "rank_dropout", "module_dropout"),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
)
OF_LYCORIS = ("dora_wd", "bypass_mode", "use_tucker", "use_scalar", "rank_dropout_scale", "train_norm")
OF_OTHER_METHODS = (  # or of the GUI itself
    *("factor", "unit", "constrain", "rescaled", "decompose_both", "train_on_input", "use_cp", "dim_from_weights"),
    *("LyCORIS_preset", "conv_dim", "conv_alpha", "additional_parameters", "training_preset", "model_list"),
    *("save_as_bool", "log_config", "use_wandb", "epoch", "lr_warmup", "ggpo_sigma", "ggpo_beta", "noise_offset_type"),
)
OF_FAMILIES = re.compile(  # keys of models that have a box of their own
    r"(flux1?|sd3|sdxl|hunyuan|anima|lumina|t5xxl|clip_[gl]|img|txt|single|double|blocks_to|train_(t5|single|double))_?\w*"
    r"|ae|apply_t5_attn_mask|cpu_offload_checkpointing|discrete_flow_shift|enable_all_linear|guidance_scale|in_dims"
    r"|logit_(mean|std)|mem_eff_save|mode(l_type|l_prediction_type|_scale)|pos_emb\w+|save_(clip|t5xxl)|show_timesteps\w*"
    r"|split_(mode|qkv)|timestep_sampling|train_blocks|weighting_scheme|disable_mmap\w+"
)
LAUNCH = re.compile(
    r"dynamo_\w+|(gpu_ids|multi_gpu|num_\w+|main_process_port|extra_accelerate_launch_args)|huggingface_\w+"
)
SAME = {
    "max_timestep": 1000,
    "huber_scale": 1,
    "clip_skip": 1,
    "multires_noise_discount": 0.3,
}  # what the scripts do anyway


def is_of_gui(values: Mapping[str, Any]) -> bool:
    """Whether a JSON was saved by the GUI: its keys for the type and the resolution are no flags of the scripts."""
    return "LoRA_type" in values or "max_resolution" in values


def flags_of(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The flags and the script that the GUI starts for what it has saved, where numbers are no text any more.

    Raises:
        ValueError: The file is that of a tab that trains no LoRA.
    """
    if "LoRA_type" not in values and "network_dim" not in values:
        raise ValueError(
            "the JSON of the GUI is not one of its LoRA tab (LoRA_type, network_dim): only that one is read"
        )
    given = {
        key: _integer_if_equal(value) for key, value in values.items() if value not in ("", None, False, 0)
    }  # it drops these
    script = next((name for box, name in SCRIPTS.items() if box in given), "train_network.py")
    kept = {
        key: value
        for key, value in given.items()
        if key not in (*OF_NETWORK, *OF_LYCORIS, *OF_OTHER_METHODS, *SCRIPTS)
        and not LAUNCH.fullmatch(key)
        and SAME.get(key) != value
        and not key.startswith("sdxl_")  # of the cache and the VAE's precision
        and not (OF_FAMILIES.fullmatch(key) and script in ("sdxl_train_network.py", "train_network.py"))
    }
    flags = {_flag(key): value for key, value in kept.items()} | _network(given) | _length(given)
    if given.get("noise_offset_type") == "Multires":
        flags.pop("noise_offset", None)
    else:
        flags.pop("multires_noise_iterations", None)
        flags.pop("multires_noise_discount", None)
    if "text_encoder_lr" not in given and "unet_lr" in given:
        flags["network_train_unet_only"] = True
    elif "unet_lr" not in given and "text_encoder_lr" in given:
        flags["network_train_text_encoder_only"] = True
    if isinstance(prompts := flags.get("sample_prompts"), str):
        flags["sample_prompts"] = prompts.splitlines()
    return flags, script


def _integer_if_equal(value: Any) -> Any:
    """A number such as 2.0, as it saves counts, as a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flag(key: str) -> str:
    return {"max_resolution": "resolution", "optimizer": "optimizer_type", "LoRA_type": "network_module"}.get(key, key)


def _network(given: Mapping[str, Any]) -> dict[str, Any]:
    """The module of a type, and its arguments."""
    kind = str(given.get("LoRA_type", "Standard"))
    kind = "LyCORIS/LoCon" if kind == "LoCon" else kind
    family, _, algorithm = kind.partition("/")
    lycoris = family == "LyCORIS"
    names = [*OF_NETWORK, *(OF_LYCORIS if lycoris else ())]
    if lycoris or kind == "Kohya LoCon":
        names += ["conv_dim", "conv_alpha"]
    arguments = [f"{name}={given[name]}" for name in names if name in given]
    if not lycoris:
        return {"network_module": MODULES.get(kind, kind), "network_args": arguments}
    preset = [f"preset={given['LyCORIS_preset']}"] if "LyCORIS_preset" in given else []
    algorithm = {"native fine-tuning": "full"}.get(algorithm.lower(), algorithm.lower())
    return {"network_module": "lycoris.kohya", "network_args": [f"algo={algorithm}", *preset, *arguments]}


def _length(given: Mapping[str, Any]) -> dict[str, Any]:
    """The epochs or steps, and the warm-up, which it saves as a percentage."""
    found: dict[str, Any] = {}
    if "max_train_epochs" not in given and "max_train_steps" not in given and "dataset_config" not in given:
        found["max_train_epochs"] = given.get("epoch", 1)
    if "lr_warmup_steps" not in given and isinstance(percent := given.get("lr_warmup"), int | float):
        found["lr_warmup_steps"] = percent / 100
    return found
