"""dora-mm ask: what a vision-language model says about images, without and with an adapter."""

from pathlib import Path

from dora_mm import formats
from dora_mm.adapting.files import load_trained, saved_config, seed_of
from dora_mm.config.loader import resolve_model, resolve_path
from dora_mm.config.models import VisionConfig, VLModelConfig
from dora_mm.config.vl import DecodeConfig, TrainVLConfig
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.example import Example
from dora_mm.models.families import load_family
from dora_mm.models.vl import VLModel
from dora_mm.models.vl_bart.loading import is_vl_bart
from dora_mm.models.vlm.family import VLM
from dora_mm.models.vlm.folders import saved_dtype
from dora_mm.models.vlm.loading import read_config
from dora_mm.utils.devices import default_device


def main(
    model: str,
    images: list[str],
    question: str,
    *,
    adapter: str | None = None,
    max_new_tokens: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> None:
    """Prints a model's answer to a question; with an adapter, the bare model's and the adapted one's.

    With the adapter of a run, the model is loaded as the run's config says (dtype, sizes of images, quantisation).

    Args:
        model: A folder of `save_pretrained`, or a hub name; or the folder of a VL-BART, with an adapter.
        images: The images that the question is about, in order.
        question: The question, which the model is asked as it is.
        adapter: A run directory, or an adapter's folder.
        max_new_tokens: The longest answer in tokens; None: 256, of VL-BART as long as its training's.
        dtype: The dtype of the weights; None: that of the run, else that of the model's config.
        revision: A commit, branch or tag of a hub model; None: its main branch.

    Raises:
        ValueError: The model, an image or the adapter cannot be used, or they do not belong together.
    """
    path, files = resolve_model(model, "MODEL"), [resolve_path(image, "IMAGE").absolute() for image in images]
    for file in files:
        load_rgb(file)
    if not question.strip():
        raise ValueError("QUESTION is empty")
    folder = formats.adapter_folder(resolve_path(adapter, "--adapter")) if adapter else None
    run = saved_config(folder) if folder else None
    if not is_vl_bart(path):
        vl, task = load_vlm(path, run, dtype, revision), "chat"
    elif dtype or revision:
        raise ValueError(f"--dtype and --revision are not for {path}, a VL-BART")
    else:
        vl, task = load_vl_bart(path, run, folder), "vqa"
    if len(files) > 1 and not reads_several(vl):
        raise ValueError(f"{path} reads one image with a question, and {len(files)} are given")
    answer = vl.answerer(task, DecodeConfig(max_new_tokens=max_new_tokens), ())
    row = Example("of the command", tuple(map(str, files)), question)
    bare = answer([row], "/")[0]
    if folder is None:
        print(bare)
        return
    load_trained(vl, folder, backend="auto")
    print(f"without adapter: {bare}")
    print(f"with adapter:    {answer([row], '/')[0]}")


def load_vlm(path: str, run: TrainVLConfig | None, dtype: str | None, revision: str | None) -> VLModel:
    """A model of transformers, with the settings of the run that trained the adapter."""
    given = {key: value for key, value in (("dtype", dtype), ("revision", revision)) if value}
    if run is not None and run.model.family == "vlm":
        same = {} if resolve_model(run.model.path) == path else {"revision": None}
        settings = run.model.model_copy(update={"path": path, **same, **given})
    else:
        given.setdefault("dtype", saved_dtype(path, read_config(path, revision)))
        settings = VLModelConfig.model_validate({"path": path, **given})
    return load_family(settings, VisionConfig(), seed=0, device=default_device())


def load_vl_bart(path: str, run: TrainVLConfig | None, folder: Path | None) -> VLModel:
    """A VL-BART with the vision tower of the run that trained the adapter, which encodes the images now."""
    if run is None or folder is None or run.model.family != "vl_bart":
        raise ValueError(f"{path} is a VL-BART, whose vision tower only a run of its own names: give one by --adapter")
    settings = run.model.model_copy(update={"path": path})
    vision = run.vision.model_copy(update={"features": ()})
    seed, trains_tower = seed_of(folder), any(folder.glob("*/*.safetensors"))
    vl = load_family(settings, vision, seed=seed, trained_tower=trains_tower, device=default_device())
    vl.check(["vqa"])
    return vl


def reads_several(vl: VLModel) -> bool:
    """Whether a question may have several images."""
    return isinstance(vl, VLM) and (vl.plain is None or vl.plain.images is None)
