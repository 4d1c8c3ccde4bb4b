"""dora-mm new: a config of one's own, from a packaged recipe and from what one's images and captions are."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from dora_mm.config import load_config, resolve_model, resolve_path, run_name
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.models import starts
from dora_mm.config.paths import find_path
from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.images.folder import CaptionedImage, read_captioned_images
from dora_mm.data.images.masks import by_kind
from dora_mm.data.images.references import named_alike
from dora_mm.data.images.shared_words import NUM_PROMPTS, PLACEHOLDER, example_prompts, shared_word
from dora_mm.preview.drafts import Changes, Draft, folder_of_images, print_next, write_files
from dora_mm.preview.images import (
    describe_captions,
    describe_images,
    describe_length,
    describe_masks,
    describe_references,
    repeats_of,
)
from dora_mm.preview.look import describe_look
from dora_mm.preview.machine import GPUInfo, fitting, largest_gpu
from dora_mm.preview.recipe_steps import remark_on_steps, steps_for
from dora_mm.preview.vl_drafts import write_vl
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.registries.vl_families import VL_FAMILIES
from dora_mm.utils.atomic import already_there
from dora_mm.utils.folders import OPTION, Links
from dora_mm.utils.home import expanded
from dora_mm.utils.messages import nearest
from dora_mm.utils.shell import quoted
from dora_mm.utils.tables import csv_records
from dora_mm.utils.yaml12 import MISSING

SMALL = 1e9  # bytes of the weights of a model that is trained on a CPU
MOST_BETWEEN = 250  # steps from one checkpoint to the next: what a stop can lose
UNCAPTIONED = "data.instance_prompt"  # the source of a caption that no file has


def main(
    family: str,
    name: str,
    *,
    images: str | None = None,
    references: Sequence[str] = (),
    data: str | None = None,
    model: str | None = None,
    vram: float | None = None,
    follow_links: bool = False,
) -> None:
    """Writes NAME.yaml, for images NAME_prompts.txt, else NAME_eval.yaml, and prints what was found and what is next.

    Where images have references, the prompts are a table, NAME_prompts.csv.

    Args:
        family: A key of `starts()`.
        name: The name of the new config, with or without .yaml.
        images: The folder of images; None: all rows of `data` are texts.
        references: Folders of reference images, for a model that edits.
        data: The file of questions, of vision-language models.
        model: The model: a folder, a file or a hub name; None: the recipe's.
        vram: GB of the GPU that will train; None: those of the GPU of this machine.
        follow_links: Whether links that lead out of a folder of images are followed, also by the new config.

    Raises:
        ValueError: There is no such family, or it has no recipe to start from; a file exists already, or the images
            or the model cannot be used.
    """
    check_starts(family)
    check_edits(family, references)
    if images is not None and family in IMAGE_FAMILIES:  # of questions, the rows say which folder it may be
        resolve_path(images, "--images")
    if model is not None:
        resolve_model(model, "--model")
    file = expanded(f"{name.removesuffix('.yaml')}.yaml")
    if run_name(file) != file.stem:
        raise ValueError(f"NAME {name} cannot be that of a run: take letters, digits, - and _")
    recipe, reason = starting_recipe(family, model, vram)
    draft = Draft(family, file, recipe, images, tuple(references), data, model, follow_links, reason)
    if draft.file.exists():  # the last to appear; the prompts may be there after a kill
        raise already_there(draft.file)
    start = load_config(draft.recipe)
    if isinstance(start, TrainDiffusionConfig):
        check_family(model, family)
        style(draft, start)
    else:
        assert isinstance(start, TrainVLConfig)
        write_vl(draft, start)


def starting_recipe(family: str, model: str | None, vram: float | None = None) -> tuple[str, str]:
    """The packaged config to start from, and why: that of the model, or the largest that fits the GPU."""
    recipes = starts()[family]
    paths = {recipe: load_config(recipe).model_dump()["model"]["path"] for recipe in recipes.values()}
    of_model = [recipe for recipe in recipes.values() if paths[recipe] == model]
    if len(of_model) == 1:
        return of_model[0], ", which is for this model"
    if model is not None and 0 in recipes and is_small(model):
        return recipes[0], ", for small models: --model has less than 1 GB"
    by_size, gpu = {size: recipe for size, recipe in recipes.items() if size}, largest_gpu()
    if vram is not None:
        gpu = GPUInfo("--vram", vram, "bf16")
    return (recipe := fitting(by_size, gpu)), _fits(next(size for size in by_size if by_size[size] == recipe), gpu)


def _fits(size: int, gpu: GPUInfo | None) -> str:
    if gpu is None:
        return f", for {size} GB, the smallest one: no GPU was found here (--vram GB chooses for another machine's)"
    return f", for {size} GB: {gpu.name} has {gpu.memory:.0f} GB"


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


def check_edits(family: str, references: Sequence[str]) -> None:
    """Checks that a family takes reference images, where some are given.

    Raises:
        ValueError: It does not.
    """
    if references and not edits(family):
        title = (IMAGE_FAMILIES.get(family) or VL_FAMILIES[family]).title
        editing = ", ".join(name for name, each in IMAGE_FAMILIES.items() if each.edits and each.starts)
        raise ValueError(f"--references: {title} takes no reference images; of {editing}, dora-mm new has recipes")


def edits(family: str) -> bool:
    """Whether a family is one of image models that take references."""
    record = IMAGE_FAMILIES.get(family)
    return record is not None and record.edits


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
    images = read_captioned_images(
        folder,
        instance_prompt=PLACEHOLDER,
        key="--images",
        masks=masks,
        references=draft.references,
        reference_key="--references",
        look=True,
        links=Links(draft.follow_links, OPTION),
    )
    if any(image.references for image in images) or start.data.references:
        edit(draft, start, images, masks=bool(masks))
        return
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
    config = write_files(
        draft, changes, about, with_file(draft.prompts(), "".join(f"{prompt}\n" for prompt in prompts))
    )
    unused = named_alike([image.path for image in images], images[0].path.parent) if edits(draft.family) else []
    uncaptioned = [image._replace(caption=instance) if image.source == UNCAPTIONED else image for image in images]
    trigger = f"trigger   {remark_on(word, len(captions))}"
    print(describe_style(uncaptioned, config, start.train.num_steps, trigger))
    for path in unused:
        print(
            f"pairs     {path.name} has an image for each of these: --references {quoted(path)} makes an edit of both"
        )
    print(f"prompts   {prompts[0]}, ...\n\nwritten   {draft.file}, {draft.prompts()}")
    print_next_of_images(draft, config, draft.prompts())


def print_next_of_images(draft: Draft, config: TrainDiffusionConfig, prompts: Path) -> None:
    """Prints the recipe and the commands that follow for an adapter of an image model."""
    print(f"recipe    {draft.recipe}{draft.reason}")
    seeds = [f"seeds={list(config.sample.seeds)}"] if config.sample.seeds != (0,) else []
    contact_sheet = ["sample", prompts, "--set", f"adapter.path={draft.run}", *seeds, "strengths=[0, 1]"]
    sampled = f"runs/{prompts.stem}/001"
    print_next(
        config,
        {
            "--dry-run first: what it takes": ["train", draft.file],
            "without and with the adapter": contact_sheet,
            "a page of all images": ["gallery", sampled],
        },
    )


def edit(draft: Draft, start: TrainDiffusionConfig, images: Sequence[CaptionedImage], *, masks: bool) -> None:
    """Writes the config of an edit that is learned from pairs of images, and a table of some of them.

    Raises:
        ValueError: No image has references, or the family takes none.
    """
    pairs = [image for image in images if image.references]
    if not pairs:
        raise ValueError(f"--references is missing: {draft.recipe} is for images with what each is made of")
    captions = list(dict.fromkeys(image.caption for image in pairs if image.source != UNCAPTIONED))
    instruction = captions[0] if captions else f"make it {PLACEHOLDER}"
    images = [image._replace(caption=instruction) if image.source == UNCAPTIONED else image for image in images]
    shown = [image for image in images if image.references][:NUM_PROMPTS]
    prompts = [image.caption for image in shown]
    changes = style_changes(draft, start, len(images), prompts)
    changes[("data", "references")] = list(draft.references) or MISSING
    changes[("data", "placeholder")] = MISSING
    uncaptioned = any(image.source == UNCAPTIONED for image in images)
    changes[("data", "instance_prompt")] = instruction if uncaptioned else MISSING
    if masks:
        changes[("data", "mask")] = {}
    references = [[shown_path(each.path) for each in image.references] for image in shown]
    changes |= {("sample", "prompts"): prompts, ("sample", "images"): references}
    about = (
        f"An edit from {len(pairs)} of {len(images)} images in {draft.images}, which have references.\n"
        f"It started from {draft.recipe}, whose head says what memory it takes; so does --dry-run.\n"
        "The keys are explained in docs/train_images.md, those of data in docs/image_data.md."
    )
    config = write_files(
        draft, changes, about, with_file(table := draft.prompts(".csv"), table_of(prompts, references))
    )
    print(describe_style(images, config, start.train.num_steps))
    print(f"prompts   {prompts[0]}, ...\n\nwritten   {draft.file}, {table}")
    print_next_of_images(draft, config, table)


def shown_path(path: Path) -> str:
    """A path as configs have it: relative to the current folder where it is in it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def table_of(prompts: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    """A CSV table of prompts and their references, in the columns of jobs."""
    names = ["image", *(f"image_{number}" for number in range(2, max(map(len, references)) + 1))]
    rows = zip(prompts, references, strict=True)
    return csv_records([{"prompt": prompt, **dict(zip_longest(names, paths, fillvalue=""))} for prompt, paths in rows])


def style_changes(draft: Draft, start: TrainDiffusionConfig, num_images: int, prompts: Sequence[str]) -> Changes:
    """The changes to the recipe, without those for captions."""
    steps = steps_for(num_images, start.train.num_steps)
    changes: Changes = {("data", "folder"): folder_of_images(draft), ("train", "steps"): steps}
    changes[("data", "follow_links")] = True if draft.follow_links else MISSING
    changes[("train", "checkpoint_every")] = min(steps // 4, MOST_BETWEEN)
    changes |= {("tokens",): MISSING, ("train", "stop_tokens_after"): MISSING}  # the word may be one of the model's own
    if start.schedule.warmup_steps:
        changes[("schedule", "warmup_steps")] = round(start.schedule.warmup_steps * steps / start.train.num_steps)
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


def with_file(file: Path, text: str) -> Callable[[object], Mapping[Path, str]]:
    """The only file beside a config, whatever that is."""
    return lambda _: {file: text}


def describe_style(
    images: Sequence[CaptionedImage], config: TrainDiffusionConfig, recipe_steps: int, *remarks: str
) -> str:
    """Report on the folder of images, with the consequences for the training and the recipe's steps."""
    return "\n".join(
        [
            describe_images(images, config.data),
            describe_captions(images, config.data, None),
            *describe_references(images, None, config.data),
            *(f"{line}: data.mask; null trains on all of each image" for line in describe_masks(images, config.data)),
            *describe_look(images, config.data),
            *remarks,
            describe_length(repeats_of(images, config.data), config.train),
            *remark_on_steps(len(images), recipe_steps),
        ]
    )


def remark_on(word: str | None, num_captions: int) -> str:
    """The remark on the style's trigger word: whether prompts need it."""
    if word is None:
        return "No word is in all captions, so every image will show the style: to call it, add a word to each."
    where = "is in the captions" if num_captions else "stands for the style, since there are no captions"
    return f"{word} {where}: prompts need it, too."
