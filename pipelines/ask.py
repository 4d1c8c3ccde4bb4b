"""dora-mm ask: what a vision-language model says about images, without and with an adapter."""

from dora_mm import formats
from dora_mm.adapting.files import load_trained, saved_config, seed_of
from dora_mm.config.loader import resolve_model, resolve_path
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.example import Example
from dora_mm.models.families import load_to_ask
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
    vl = load_to_ask(
        path,
        (run.model, run.vision) if run else None,
        seed=seed_of(folder) if folder and run else 0,
        trained_tower=bool(run and run.adapter.vision_parts),
        given={key: value for key, value in (("dtype", dtype), ("revision", revision)) if value},
        device=default_device(),
    )
    if len(files) > 1 and not vl.reads_several:
        raise ValueError(f"{path} reads one image with a question, and {len(files)} are given")
    answer = vl.answerer(vl.question_task, DecodeConfig(max_new_tokens=max_new_tokens), ())
    row = Example("of the command", tuple(map(str, files)), question)
    bare = answer([row], "/")[0]
    if folder is None:
        print(bare)
        return
    load_trained(vl, folder, backend="auto")
    print(f"without adapter: {bare}")
    print(f"with adapter:    {answer([row], '/')[0]}")
