"""What the configs of kohya's scripts (train_network.py and its siblings) say beyond names of keys."""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_mm.config.importing.foreign import Foreign
from dora_mm.config.importing.translation import Translation
from dora_mm.config.importing.values import (
    OF_METHODS,
    number_of,
    pairs_of,
    put_optimizer_options,
    put_resolution,
    put_schedule,
    put_warmup,
    refuse,
    side_of,
)
from dora_mm.registries.other_trainers import CAPTION_FILES, DTYPES
from dora_mm.utils.prompt_lines import of_line
from dora_mm.utils.shell import quoted

UNET = ("unet.attn", "unet.cross", "unet.ff", "proj_in", "proj_out")  # all layers of its Transformer2DModel
TEXT_ENCODERS = ("text_encoders.attn", "text_encoders.ff")
PRESETS = {  # of LyCORIS: the parts of the UNet and of the text encoders
    "full": ((*UNET, "unet.conv"), TEXT_ENCODERS),
    "full-lin": (UNET, TEXT_ENCODERS),
    "attn-mlp": (UNET, TEXT_ENCODERS),
    "attn-only": (("unet.attn", "unet.cross"), ("text_encoders.attn",)),
    "unet-only": ((*UNET, "unet.conv"), ()),
    "unet-transformer-only": (UNET, ()),
    "unet-convblock-only": (("unet.conv",), ()),
}
CAPTION_SUFFIXES = (".txt", ".caption")  # the first comes first
NUMBERED = re.compile(r"(\d+)_(.+)")
CAPTIONS = {
    "caption_prefix": "data.captions.prefix",
    "caption_suffix": "data.captions.suffix",
    "enable_wildcard": "data.captions.alternatives",
    "shuffle_caption": "data.captions.shuffle",
    "keep_tokens": "data.captions.keep",
    "caption_tag_dropout_rate": "data.captions.tag_dropout",
    "caption_dropout_rate": "data.caption_dropout",
    "flip_aug": "data.flip",
}

DEFAULTS = {"steps": 30, "guidance": 7.5}  # of a line of prompts, of kohya's train_util.py
SHARED: dict[str, Callable[[Any], tuple[str, Any]]] = {  # settings of a line of prompts that contact sheets have
    "negative_prompt": lambda text: ("sample.negative_prompt", text),
    "steps": lambda text: ("sample.steps", int(text)),
    "guidance": lambda text: ("sample.guidance", float(text)),
    "seed": lambda text: ("sample.seeds", [int(text)]),
}


def translate(foreign: Foreign, found: Translation) -> None:
    """Translates flags of kohya's scripts, or a TOML with the same names."""
    found.put("pipeline", "train_diffusion")
    _kohya_precision(foreign, found)
    _kohya_network(foreign, found)
    _kohya_data(foreign, found)
    _kohya_optimizer(foreign, found)
    _kohya_samples(foreign, found)
    if (epochs := foreign.take("max_train_epochs")) is not None:
        found.put("train.epochs", epochs, "max_train_epochs")
        foreign.drop("max_train_steps")
    else:
        found.put("train.steps", foreign.take("max_train_steps", 1600), "max_train_steps")
    found.put("train.batch_size", foreign.take("train_batch_size", found.values.get("train.batch_size", 1)))
    if foreign.flag("fp8_base"):
        found.put("model.quantization", "float8", "fp8_base")
    found.put("loss.min_snr_gamma", foreign.take("min_snr_gamma"), "min_snr_gamma")
    if "loss.min_snr_gamma" not in found.values:
        found.values["loss.min_snr_gamma"] = None  # they weigh no timestep where they are not asked to
    _kohya_huber(foreign, found)
    foreign.drop("output_dir")
    found.take_known(foreign)


def _kohya_huber(foreign: Foreign, found: Translation) -> None:
    """The Huber loss, whose delta follows the noise level there unless its schedule is constant."""
    if foreign.left.get("loss_type") != "huber":
        return
    found.put("loss.delta", foreign.take("huber_c", 0.1), "huber_c")
    schedule = str(foreign.take("huber_schedule", "snr"))
    if schedule != "constant":
        found.differs(
            f"huber_schedule is {schedule} ({'as given' if 'huber_schedule' in foreign.given else 'the default'}): "
            "delta depends on the noise level there, and is the same at all levels here (loss.delta)."
        )


def _kohya_precision(foreign: Foreign, found: Translation) -> None:
    precision = str(foreign.take("mixed_precision", "no")).lower()
    full = [key for key in ("full_bf16", "full_fp16") if foreign.flag(key)]
    found.put("model.dtype", DTYPES.get(precision), "mixed_precision")
    found.put("train.mixed_precision", precision, "mixed_precision")
    if full:
        found.has_no_equal(full[0], True, "adapters and their gradients stay in float32")


def _kohya_network(foreign: Foreign, found: Translation) -> None:
    options = pairs_of(foreign.take("network_args", ()))
    module = str(foreign.take("network_module", "networks.lora"))
    is_dora = str(options.pop("dora_wd", False)).lower() == "true"
    algorithm = str(options.pop("algo", "lora")).lower()
    is_known = module.startswith(("networks.lora", "lycoris")) and module != "networks.lora_fa"
    if algorithm not in ("lora", "locon") or not is_known:
        refuse(foreign.names.get("network_module", "network_module"), f"{module} {algorithm}", (), OF_METHODS)
    found.put("adapter.method", "dora" if is_dora else "lora", "network_module")
    found.put("adapter.rank", foreign.take("network_dim", 4), "network_dim")
    found.put("adapter.alpha", number_of(foreign.take("network_alpha", 1.0)), "network_alpha")
    if foreign.script in ("", "train_network.py", "sdxl_train_network.py"):
        _kohya_parts(foreign, found, options, is_lycoris=module.startswith("lycoris"))
    else:
        foreign.drop("network_train_unet_only")  # as by default here
        found.differs(f"{foreign.script}: the default parts of the model's family are adapted (adapter.parts).")
    if foreign.script == "train_network.py":
        found.differs(
            "train_network.py trains Stable Diffusion 1 and 2, which are not trained here: give an SDXL model."
        )
    ratios = [options.pop(f"loraplus_{of}lr_ratio", None) for of in ("unet_", "")]
    found.put("optimizer.b_lr_ratio", next((each for each in ratios if each is not None), None), "network_args")
    for key, value in options.items():
        if value not in (None, "", False, 0):
            found.has_no_equal(f"network_args {key}", value)


def _kohya_parts(foreign: Foreign, found: Translation, options: dict[str, Any], *, is_lycoris: bool) -> None:
    """The parts of SDXL that networks.lora or a preset of LyCORIS adapts, the text encoders at their own rate."""
    preset = str(options.get("preset", "full")) if is_lycoris else "full"
    unet, text_encoders = PRESETS.get(preset, PRESETS["full"])
    if preset in PRESETS:
        options.pop("preset", None)
    rank, alpha = (number_of(options.pop(key, None)) for key in ("conv_dim", "conv_alpha"))
    if not is_lycoris:
        alpha = alpha or 1.0
        unet = tuple(name for name in unet if name != "unet.conv" or rank)
    parts: dict[str, Any] = {name: {} for name in unet}
    if "unet.conv" in parts and rank:
        of_all = (found.values["adapter.rank"], found.values["adapter.alpha"])
        own = (int(rank), alpha or of_all[1])
        parts["unet.conv"] = {"rank": own[0], "alpha": own[1]} if own != of_all else {}
    rate = foreign.take("text_encoder_lr")
    rate = number_of(rate[0] if isinstance(rate, list) else rate)
    unet_only = foreign.flag("network_train_unet_only") or rate == 0
    if rate and "prodigy" in str(foreign.left.get("optimizer_type", "")).lower():
        rate = None  # which would refuse the parts
        found.differs("text_encoder_lr: prodigy finds one rate for all parts here.")
    if not unet_only:
        parts |= {name: {} if rate is None else {"lr": rate} for name in text_encoders}
    if foreign.flag("network_train_text_encoder_only"):
        parts = {name: {} for name in text_encoders}
    source = "network_train_unet_only, text_encoder_lr, network_args"
    found.put("adapter.parts", parts if any(parts.values()) else list(parts), source)


def _kohya_data(foreign: Foreign, found: Translation) -> None:
    config = foreign.take("dataset_config")
    general = foreign.take("general", {})
    datasets = foreign.take("datasets", [])
    if config is not None:
        read = _toml(foreign.file(str(config)))
        general, datasets = read.get("general", {}), read.get("datasets", [])
    subsets = [subset for dataset in datasets for subset in dataset.get("subsets", [])]
    foreign.given.update(*(general, *datasets, *subsets))
    prior_weight = number_of(foreign.take("prior_loss_weight", 1.0))
    if subsets:
        for subset in subsets:
            if (metadata := subset.get("metadata_file")) is not None:
                _kohya_metadata("metadata_file", metadata, subset.get("image_dir"), foreign, found)
        _kohya_subsets(general, datasets, prior_weight, foreign, found)
    else:
        _kohya_folder(foreign, prior_weight, found)
    put_resolution(found, foreign.take("resolution"))
    if foreign.flag("random_crop"):
        found.put("data.crop", "random", "random_crop")
    if (share := number_of(foreign.take("validation_split"))) is not None:
        found.put("data.valid.share", share or None, "validation_split")
    found.take(foreign, {"caption_dropout_rate": "data.caption_dropout"})
    if found.values.get("data.caption_dropout"):
        found.differs(
            "A dropped caption is zeros here; with model.sdxl.unconditional: empty it is the encoded empty text."
        )
    foreign.drop("min_bucket_reso", "max_bucket_reso", "bucket_no_upscale")  # shapes follow from data.resolution alone


def _kohya_folder(foreign: Foreign, prior_weight: float | None, found: Translation) -> None:
    """`train_data_dir` and `reg_data_dir`, whose folders are named `10_name`."""
    folder, regularization = foreign.take("train_data_dir"), foreign.take("reg_data_dir")
    if folder is None:
        return
    _kohya_captions(foreign.take("caption_extension"), foreign.file(str(folder)), found)
    trained, held = (_numbered(path, foreign) for path in (folder, regularization))
    if trained and held:
        folders = [*trained, *({**each, "role": "preserve"} for each in held)]
        found.put("data.folders", folders, "train_data_dir, reg_data_dir")
        _kohya_preserve(prior_weight, found)
        return
    if regularization is not None:
        found.has_no_equal(
            "reg_data_dir",
            regularization,
            "no folder such as 10_name was found in it and in train_data_dir: give each as a folder in data.folders, "
            "those of reg_data_dir with role: preserve",
        )
    found.put("data.folder", folder, "train_data_dir")
    if (metadata := foreign.take("in_json")) is not None:
        _kohya_metadata("in_json", metadata, folder, foreign, found)
        found.put("data.repeats", foreign.take("dataset_repeats"), "dataset_repeats")
    else:
        found.put("data.subfolders", True, "train_data_dir with folders such as 10_name")
        _kohya_class_tokens(foreign.file(str(folder)), found)


def _numbered(folder: Any, foreign: Foreign) -> list[dict[str, Any]]:
    """The folders `10_name` in a folder, with their repeats and the caption of images that have none."""
    path = None if folder is None else foreign.file(str(folder))
    names = sorted(each.name for each in path.iterdir() if each.is_dir()) if path and path.is_dir() else []
    found = [(name, match) for name in names if (match := NUMBERED.fullmatch(name))]
    return [
        {
            "path": f"{folder}/{name}",
            **({"repeats": float(match[1])} if float(match[1]) != 1 else {}),
            "prompt": match[2],
        }
        for name, match in found
    ]


def _kohya_preserve(weight: float | None, found: Translation) -> None:
    """Regularization images, whose weight has no effect where there are none."""
    found.put("preserve.weight", weight, "prior_loss_weight")
    found.differs(
        "Regularization images keep the prediction of the base model (preserve), and not the noise, as the target. "
        "Each step here has images of both kinds; there half of the steps' images are regularization images."
    )


def _kohya_captions(extension: Any, folder: Path, found: Translation) -> None:
    """Caption files are .txt, or else .caption, whatever is given."""
    if extension is None or extension == CAPTION_SUFFIXES[0]:
        return
    if extension not in CAPTION_SUFFIXES:
        found.has_no_equal("caption_extension", extension, "captions are files that end in .txt or .caption")
    elif folder.is_dir() and any(file.with_suffix(".txt").exists() for file in folder.rglob(f"*{extension}")):
        found.differs(
            f"caption_extension: {folder} has .txt files beside the {extension} files, and the .txt files are read "
            "here: move them away."
        )


def _kohya_class_tokens(folder: Path, found: Translation) -> None:
    """The caption of images that have none: the name in `10_name`."""
    paths = folder.iterdir() if folder.is_dir() else ()
    names = sorted({named[2] for path in paths if path.is_dir() and (named := NUMBERED.fullmatch(path.name))})
    if len(names) == 1:
        found.put("data.instance_prompt", names[0], "train_data_dir, of images without a caption")
    elif names:
        found.differs(
            f"Images without a caption have the name of their folder as theirs there ({', '.join(names)}): here give "
            "each folder its path and its prompt in data.folders."
        )


def _kohya_metadata(key: str, metadata: Any, folder: Any, foreign: Foreign, found: Translation) -> None:
    """The captions of a folder in one file, which is read where it lies beside the images."""
    file = Path(str(metadata))
    if CAPTION_FILES.fullmatch(file.name) and folder and foreign.file(str(file)).parent == foreign.file(str(folder)):
        found.differs(f"{key}: captions are read from {file.name} in {folder}; sizes in it are not, they are measured.")
    elif file.suffix == ".json":
        name = file.name if CAPTION_FILES.fullmatch(file.name) else "meta_cap.json"
        target = Path(str(folder or "the folder of the images")) / name
        found.has_no_equal(key, metadata, f"it is read in the folder of its images: copy it to {target}")
    else:
        found.has_no_equal(key, metadata, "write it as metadata.jsonl in the folder, with file_name and text")


def _kohya_subsets(
    general: Mapping[str, Any],
    datasets: Sequence[Mapping[str, Any]],
    prior_weight: float | None,
    foreign: Foreign,
    found: Translation,
) -> None:
    """`[[datasets.subsets]]` as folders; what is one setting here is that of the first subset."""
    folders, shared = [], {}
    first = {**general, **datasets[0]}
    put_resolution(found, first.get("resolution"))
    found.put("train.batch_size", first.get("batch_size"), "batch_size")
    for dataset in datasets:
        for subset in dataset.get("subsets", []):
            given = {**general, **{key: value for key, value in dataset.items() if key != "subsets"}, **subset}
            folder = {
                "path": given.pop("image_dir", None),
                "repeats": float(given.pop("num_repeats", 1)),
                "prompt": given.pop("class_tokens", None),
            }
            folder["role"] = "preserve" if given.pop("is_reg", False) else "train"
            folder["masks"] = given.pop("conditioning_data_dir", None)
            size = side_of(given.get("resolution"))
            folder["resolution"] = size if size != found.values.get("data.resolution") else None
            folders.append({key: value for key, value in folder.items() if value not in (None, 1.0, "train")})
            shared = shared or given
    found.put("data.folders", folders, "datasets.subsets")
    extension = shared.get("caption_extension", foreign.take("caption_extension"))
    for folder in folders:
        _kohya_captions(extension, foreign.file(str(folder.get("path", ""))), found)
    if any("role" in folder for folder in folders):
        _kohya_preserve(prior_weight, found)
    for key, ours in CAPTIONS.items():
        found.put(ours, shared.get(key), key)


def _kohya_optimizer(foreign: Foreign, found: Translation) -> None:
    rate = foreign.take("unet_lr", foreign.left.get("learning_rate"))
    foreign.take("learning_rate")
    found.put("optimizer.lr", number_of(rate if rate is not None else 2e-6), "unet_lr, learning_rate")
    if foreign.flag("use_8bit_adam"):
        found.put("optimizer.name", "adamw_8bit", "use_8bit_adam")
    put_optimizer_options(found, pairs_of(foreign.take("optimizer_args", ())), "optimizer_args")
    put_warmup(found, foreign.take("lr_warmup_steps"), "lr_warmup_steps")
    found.put("schedule.cycles", foreign.take("lr_scheduler_num_cycles", 1), "lr_scheduler_num_cycles")
    found.put("schedule.power", number_of(foreign.take("lr_scheduler_power", 1.0)), "lr_scheduler_power")
    put_schedule(found, foreign.take("lr_scheduler", "constant"), "lr_scheduler")


def _kohya_samples(foreign: Foreign, found: Translation) -> None:
    name = foreign.take("sample_prompts")
    if isinstance(name, list) and all(isinstance(each, str) for each in name):  # of the GUI
        _kohya_prompts([line.strip() for line in name if line.strip()], "sample_prompts", found)
    elif isinstance(name, list):
        found.put("sample.prompts", [each["prompt"] for each in name if isinstance(each, dict) and "prompt" in each])
    elif name is not None and (file := foreign.file(str(name))).is_file() and file.suffix == ".txt":
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        _kohya_prompts([line.strip() for line in lines if line.strip() and not line.startswith("#")], file.name, found)
    elif name is not None:
        found.has_no_equal("sample_prompts", name, "the file was not found: sample.prompts is a list of prompts")
    if (clip_skip := foreign.take("clip_skip")) is not None:
        found.has_no_equal("clip_skip", clip_skip, "SDXL always takes the second to last layer, also there")
    for theirs, ours in (("sample_every_n_epochs", "sample.every"), ("save_every_n_epochs", "train.checkpoint_every")):
        if (epochs := foreign.take(theirs)) is not None:
            found.every_epochs[ours] = (theirs, int(epochs))


def _kohya_prompts(lines: Sequence[str], file: str, found: Translation) -> None:
    """Prompts with flags such as `--s 20`; contact sheets have one value for all prompts."""
    try:
        rows = [of_line(line) for line in lines]
        found.put("sample.prompts", [row.pop("prompt", "").strip() for row in rows], "sample_prompts")
        given = {column for row in rows for column in row}
        rows = [DEFAULTS | row for row in rows]
        separate = []
        for column in dict.fromkeys(column for row in rows for column in row):
            values = {row.get(column) for row in rows}
            if len(values) == 1 and column in SHARED:
                found.put(*SHARED[column](values.pop()), file if column in given else "default of kohya's scripts")
            else:
                separate.append(column)
    except ValueError as error:
        found.has_no_equal("sample_prompts", file, str(error))
        return
    if separate:
        found.differs(
            f"The contact sheets of the training ignore {', '.join(separate)} of each line of {file}. "
            + (f"`dora-mm sample {quoted(Path(file))}` uses them." if file.endswith(".txt") else "")
        )


def _toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"dataset_config: {path} does not exist")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"dataset_config: {path} cannot be read: {error}") from None
