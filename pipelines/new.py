"""dora-mm new: a config of one's own, from a packaged recipe and from what one's images and captions are."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dora_mm.config import load_config, resolve_model, resolve_path, run_name
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.models import starts
from dora_mm.config.paths import find_path
from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.images.folder import CaptionedImage, read_captioned_images
from dora_mm.data.images.masks import by_kind
from dora_mm.data.images.shared_words import PLACEHOLDER, example_prompts, shared_word
from dora_mm.models.hub import local_copy
from dora_mm.preview.images import describe_captions, describe_images, describe_length, describe_masks, repeats_of
from dora_mm.preview.look import describe_look
from dora_mm.preview.machine import fitting, largest_gpu
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.registries.vl_families import VL_FAMILIES
from dora_mm.utils.atomic import already_there
from dora_mm.utils.folders import written_together
from dora_mm.utils.home import expanded
from dora_mm.utils.messages import nearest
from dora_mm.utils.yaml12 import MISSING, KeyPath, edited

Changes = dict[KeyPath, Any]
SMALL = 1e9  # bytes of the weights of a model that is trained on a processor
STYLE_IMAGES = (23, 61)  # the numbers of images that the recipes' steps are for
FEWEST_STEPS, MOST_STEPS = 50, 10_000
MOST_BETWEEN = 250  # steps from one checkpoint to the next: what a stop can lose
FEW_ROWS = 1000  # of questions: fewer are seen three times
UNCAPTIONED = "data.instance_prompt"  # the source of a caption that no file has


class Draft(NamedTuple):
    """A config to write, and its sources.

    Attributes:
        file: The new config.
        recipe: The packaged config to start from.
        images: The folder of images; None: it is not given.
        data: The file of vision-language data; None: there are captions.
        model: The model; None: the recipe's.
    """

    file: Path
    recipe: str
    images: str | None
    data: str | None
    model: str | None

    @property
    def prompts(self) -> Path:
        """The file of prompts next to the config."""
        return self.file.with_name(f"{self.file.stem}_prompts.txt")

    @property
    def run(self) -> str:
        """The first run of the config."""
        return f"runs/{self.file.stem}/001"


def main(
    family: str, name: str, *, images: str | None = None, data: str | None = None, model: str | None = None
) -> None:
    """Writes NAME.yaml and, for images, NAME_prompts.txt, and prints what was found and what comes next.

    Args:
        family: A key of `starts()`.
        name: The name of the new config, with or without .yaml.
        images: The folder of images; None: all rows of `data` are texts.
        data: The file of questions, of vision-language models.
        model: The model: a folder, a file or a hub name; None: the recipe's.

    Raises:
        ValueError: There is no such family, or it has no recipe to start from; a file exists already, or the images
            or the model cannot be used.
    """
    check_starts(family)
    if images is not None:
        resolve_path(images, "--images")
    if model is not None:
        resolve_model(model, "--model")
    file = expanded(f"{name.removesuffix('.yaml')}.yaml")
    if run_name(file) != file.stem:
        raise ValueError(f"NAME {name} cannot be that of a run: take letters, digits, - and _")
    draft = Draft(file, starting_recipe(family, model), images, data, model)
    if draft.file.exists():  # the last to appear; the prompts may be there after a kill
        raise already_there(draft.file)
    start = load_config(draft.recipe)
    if isinstance(start, TrainDiffusionConfig):
        check_family(model, family)
        style(draft, start)
    else:
        assert isinstance(start, TrainVLConfig)
        vl(draft, start)


def starting_recipe(family: str, model: str | None) -> str:
    """The packaged config to start from: that of the model, or the largest that fits the GPU of this machine."""
    recipes = starts()[family]
    paths = {recipe: load_config(recipe).model_dump()["model"]["path"] for recipe in recipes.values()}
    of_model = [recipe for recipe in recipes.values() if paths[recipe] == model]
    if len(of_model) == 1:
        return of_model[0]
    if model is not None and 0 in recipes and is_small(model):
        return recipes[0]
    return fitting({size: recipe for size, recipe in recipes.items() if size}, largest_gpu())


def folder_of_images(draft: Draft) -> str:
    """The folder of images, which has to be given."""
    if draft.images is None:
        raise ValueError("--images is missing: the folder of your images")
    return draft.images


def check_starts(family: str) -> None:
    """Checks that there is a family, and a packaged recipe of it to start from.

    Raises:
        ValueError: There is not.
    """
    if family in (known := starts()):
        return
    if record := IMAGE_FAMILIES.get(family) or VL_FAMILIES.get(family):
        raise ValueError(
            f"{record.title} ({family}) has no recipe to start from (`starts` of its record): write a config for "
            f"dora-mm train, or choose from {', '.join(known)}"
        )
    raise ValueError(f"there is no family {family!r}{nearest(family, known)}: choose from {', '.join(known)}")


def check_family(model: str | None, family: str) -> None:
    """Checks that an image model on this machine is one that `train` accepts in a config of a family.

    Raises:
        ValueError: It is of another family, or of none.
    """
    if model is None or find_path(model) is None:
        return
    from dora_mm.models.images.families import family_of  # after the checks of what needs no diffusers

    found = family_of(resolve_model(model)).name
    if found != family:
        check_starts(found)
        raise ValueError(f"--model: {model} is of the family {found}: dora-mm new {found} NAME starts from its recipe")


def is_small(model: str) -> bool:
    """Whether the weights of a model on this machine are those of a small one."""
    path = Path(resolve_model(model))
    files = path.rglob("*.safetensors") if path.is_dir() else [path] if path.is_file() else []
    return 0 < sum(file.stat().st_size for file in files) < SMALL


# --- images --------------------------------------------------------------------------------------------------------


def style(draft: Draft, start: TrainDiffusionConfig) -> None:
    """Writes the config of a style, and its prompts."""
    if draft.data is not None:
        raise ValueError("--data belongs to questions: captions lie beside the images, or in metadata.jsonl")
    folder = folder_of_images(draft)
    masks = "file" if by_kind(resolve_path(folder, "--images").glob("*")).masks else None
    images = read_captioned_images(folder, instance_prompt=PLACEHOLDER, key="--images", masks=masks, look=True)
    captions = [image.caption for image in images if image.source != UNCAPTIONED]
    word = shared_word(captions) if captions else PLACEHOLDER
    instance = f"a picture in the style of {word}" if word else "a picture"
    prompts = example_prompts(captions or [f"a picture of {thing} in the style of {word}" for thing in "ab"], word)
    changes = style_changes(draft, start, len(images), prompts)
    changes[("data", "placeholder")] = word or MISSING
    changes[("data", "instance_prompt")] = instance if len(captions) < len(images) else MISSING
    if masks:
        changes[("data", "mask")] = {}
    about = (
        f"A style from {len(images)} images in {draft.images}. {remark_on(word, len(captions))}\n"
        f"It started from {draft.recipe}, whose head says what memory it takes; so does --dry-run.\n"
        "The keys are explained in docs/train_images.md, those of data in docs/image_data.md."
    )
    config = write_files(draft, changes, about, prompts)
    uncaptioned = [image._replace(caption=instance) if image.source == UNCAPTIONED else image for image in images]
    print(describe_style(uncaptioned, config, word, start.train.steps))
    print(f"prompts   {prompts[0]}, ...\n\nwritten   {draft.file}, {draft.prompts}")
    seeds = [f"seeds={list(config.sample.seeds)}"] if config.sample.seeds != (0,) else []
    contact_sheet = ["sample", draft.prompts, "--set", f"adapter.path={draft.run}", *seeds, "strengths=[0, 1]"]
    sampled = f"runs/{draft.prompts.stem}/001"
    print_next(
        config,
        {
            "--dry-run first: what it takes": ["train", draft.file],
            "without and with the adapter": contact_sheet,
            "a page of all images": ["gallery", sampled],
        },
    )


def style_changes(draft: Draft, start: TrainDiffusionConfig, num_images: int, prompts: Sequence[str]) -> Changes:
    """The changes to the recipe, without those for captions."""
    steps = min(max(FEWEST_STEPS, steps_in_proportion(num_images, start.train.steps)), MOST_STEPS)
    changes: Changes = {("data", "folder"): folder_of_images(draft), ("train", "steps"): steps}
    changes[("train", "checkpoint_every")] = min(steps // 4, MOST_BETWEEN)
    changes |= {("tokens",): MISSING, ("train", "stop_tokens_after"): MISSING}  # the word may be one of the model's own
    if start.schedule.warmup_steps:
        changes[("schedule", "warmup_steps")] = round(start.schedule.warmup_steps * steps / start.train.steps)
    if start.sample.prompts:
        changes[("sample", "prompts")] = list(prompts)
    if start.sample.every:
        changes[("sample", "every")] = steps // 4
    gpu = largest_gpu()
    if gpu and gpu.precision == "fp16" and start.model.dtype == "bfloat16":
        changes |= {("model", "dtype"): "float16", ("train", "mixed_precision"): "fp16"}
    if draft.model not in (None, start.model.path):
        changes |= {("model", "path"): draft.model, ("model", "vae"): MISSING}  # it has a VAE of its own
    return changes


def describe_style(
    images: Sequence[CaptionedImage], config: TrainDiffusionConfig, word: str | None, recipe_steps: int
) -> str:
    """Report on the folder of images, with the consequences for the training and the recipe's steps."""
    num_captions = sum(image.source != UNCAPTIONED for image in images)
    return "\n".join(
        [
            describe_images(images, config.data),
            describe_captions(images, config.data, None),
            *(f"{line}: data.mask; null trains on all of each image" for line in describe_masks(images, config.data)),
            *describe_look(images, config.data),
            f"trigger   {remark_on(word, num_captions)}",
            describe_length(repeats_of(images), config.train),
            *remark_on_steps(len(images), recipe_steps),
        ]
    )


def remark_on(word: str | None, num_captions: int) -> str:
    """The remark on the style's trigger word: whether prompts need it."""
    if word is None:
        return "No word is in all captions, so every image will show the style: to call it, add a word to each."
    where = "is in the captions" if num_captions else "stands for the style, since there are no captions"
    return f"{word} {where}: prompts need it, too."


def steps_in_proportion(num_images: int, steps: int) -> int:
    """The steps in which each image is seen as often as in the recipe."""
    few, many = STYLE_IMAGES
    return 50 * round(steps * num_images / min(max(num_images, few), many) / 50)


def remark_on_steps(num_images: int, steps: int) -> list[str]:
    """A line where there are so many images that each is seen less often than in the recipe."""
    if (proportional := steps_in_proportion(num_images, steps)) <= MOST_STEPS:
        return []
    return [
        f"steps     {MOST_STEPS:,}, where {proportional:,} would show each of the {num_images:,} images as often as "
        "in the recipe: a style is learned long before, and train.steps can be raised when the run is resumed"
    ]


# --- questions -------------------------------------------------------------------------------------------------------


def vl(draft: Draft, start: TrainVLConfig) -> None:
    """Writes the config of a training on conversations."""
    from dora_mm.data.vl.readers.chat import find_shape, read_chat  # these need the extra vl
    from dora_mm.data.vl.readers.file_rows import file_items
    from dora_mm.data.vl.readers.hub_files import files_of
    from dora_mm.data.vl.rows import BadRows

    if draft.data is None:
        raise ValueError("--data is missing: the file of your questions and answers, such as my.json")
    path = resolve_path(draft.data, "--data")
    files = files_of(path)
    shape, num_rows = find_shape(files[0]).name, sum(1 for file in files for _ in file_items(file))
    source = start.data.all_tasks[0].train
    assert source is not None
    rows = read_chat(source.model_copy(update={"file": draft.data}), BadRows("skip"))
    has_images = any(row.images for row in rows)
    folder = folder_of_images(draft) if has_images else MISSING
    changes: Changes = {("data", "train", "file"): draft.data, ("data", "train", "images"): folder}
    changes[("train", "epochs")] = 1 if num_rows >= FEW_ROWS else 3
    if draft.model is not None:
        changes[("model", "path")] = draft.model
    if not has_images:  # nothing passes the connector that some recipes train; a language model has none, and no images
        changes |= {("model", "max_pixels"): MISSING, ("adapter", "parts"): MISSING}
    if largest_gpu() is None:  # many processors emulate half precision
        changes |= {("model", "dtype"): "float32", ("train", "mixed_precision"): "no"}
    about = (
        f"{num_rows} rows of {draft.data}{f' about the images in {draft.images}' if has_images else ''}.\n"
        f"It started from {draft.recipe}, whose head says what memory it takes.\n"
        "--dry-run checks every row and shows some as the model sees them. Every key is explained in docs/vlm.md."
    )
    config = write_files(draft, changes, about)
    where = f"images in {draft.images}" if has_images else "no row has an image"
    print(f"questions {num_rows} rows of {draft.data}, {shape}; {where}\n\nwritten   {draft.file}")
    question = ["IMAGE", "QUESTION"] if has_images else ["QUESTION"]
    print_next(
        config,
        {
            "--dry-run first: every row is checked": ["train", draft.file],
            "without and with the adapter": ["ask", config.model.path, *question, "--adapter", draft.run],
            "for transformers and vLLM": ["merge", config.model.path, draft.run, "merged"],
        },
    )


# --- both ------------------------------------------------------------------------------------------------------------


def write_files(draft: Draft, changes: Mapping[KeyPath, Any], about: str, prompts: Sequence[str] = ()) -> Any:
    """Writes the prompts, if there are any, and the recipe with changes, under a head of its own, and reads that."""
    lines = resolve_path(draft.recipe).read_text(encoding="utf-8").split("\n")
    body = lines[next(number for number, line in enumerate(lines) if not line.startswith("#")) :]
    head = [f"# {line}".rstrip() for line in [f"dora-mm train {shlex.quote(str(draft.file))}", "", *about.split("\n")]]
    with written_together(draft.file.parent, last=draft.file.name) as folder:
        (folder / draft.file.name).write_text(edited("\n".join([*head, *body]), changes), encoding="utf-8")
        if prompts:
            (folder / draft.prompts.name).write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return load_config(draft.file)


def print_next(config: Any, commands: Mapping[str, Sequence[object]]) -> None:
    """Prints how to get the model, if it is not on this machine, and the commands that follow, each with its reason."""
    path = config.model.path
    if local_copy(resolve_model(path), config.model.revision) is None:
        print(f"model     {path} is not on this machine: the training downloads it; before that: hf download {path}")
        print("          or --model PATH takes one that you have")
    lines = {what: f"  dora-mm {shlex.join(map(str, words))}" for what, words in commands.items()}
    width = max(map(len, lines.values()))
    print("next")
    for what, line in lines.items():
        print(f"{line:<{width}}   # {what}")
