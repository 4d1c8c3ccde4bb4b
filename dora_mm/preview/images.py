"""Data preview of an image training: images by bucket, captions, and how often each image is seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dora_mm.config.images import DataConfig, TrainDiffusionConfig
from dora_mm.config.losses import LossConfig
from dora_mm.config.training import TrainConfig, ValidationConfig
from dora_mm.data.images.folder import CaptionedImage, contains_word
from dora_mm.data.images.resolutions import at_resolutions, bucket_of, is_smaller, resolution_of, resolutions_of
from dora_mm.data.images.wording import FIXED, all_unchanged, rendered, unchanged
from dora_mm.data.syntax import syntax_in
from dora_mm.preview.image_sizes import describe_resolutions, num_measured
from dora_mm.preview.look import describe_look
from dora_mm.preview.training import per_example_line, when

if TYPE_CHECKING:  # with diffusers, which takes seconds to load: `new` describes images without a model
    from dora_mm.models.images.image_model import ImageModel
    from dora_mm.tasks.image_batches import CaptionedBatches
    from dora_mm.tasks.preservation import PreservingBatches

# Steps x batch / images of the DoRA paper's two styles (the configs 3d_icon.yaml and lego.yaml).
RECIPES = {"3d_icon": 1000 * 3 / 23, "lego": 1000 * 3 / 61}
MOST_NAMES = 8  # of images in a line
MOST_RENDERED = 3  # captions of a folder
LARGE_CACHE = 2e9  # bytes of latents in main memory from which a folder for them is recommended
FAR = 3  # a training that shows each image this many times less or more often than the recipes is remarked upon


def describe_data(
    images: Sequence[CaptionedImage],
    config: TrainDiffusionConfig,
    model: ImageModel | None,
    num_processes: int = 1,
    held_out: Sequence[CaptionedImage] = (),
    class_images: Sequence[CaptionedImage] = (),
) -> str:
    """Lines about the images, their captions, and how often the training shows each image.

    Args:
        images: The images with their captions.
        config: The config of the training.
        model: Its tokenizer counts the tokens of the captions; None: characters are counted.
        num_processes: The number of processes that train.
        held_out: The held-out images.
        class_images: Those of folders of role preserve.
    """
    num_tokens = model.num_tokens if model else None
    return "\n".join(
        [
            describe_images(images, config.data),
            describe_captions(images, config.data, num_tokens),
            *describe_rendered(images, config),
            *describe_references(images, model, config.data),
            *describe_masks(images, config.data),
            *describe_look(images, config.data),
            *describe_preserved(config, class_images),
            *describe_guided_target(config.loss),
            *([describe_held_out(held_out, config.evaluate, config.train.num_steps)] if held_out else []),
            *per_example_line(config.evaluate, len(images), num_measured(images, config.data), config.train.num_steps),
            describe_length(repeats_of(images, config.data), config.train, num_processes),
            *remark_on_length(repeats_of(images, config.data), config.train, num_processes),
            *(remark_on_distilled(config) if model else []),
            *remark_on_captions(model, images, config.data),
            *([] if model else [f"{config.model.path} is not on this machine: modules, memory and time are left out"]),
        ]
    )


def describe_images(images: Sequence[CaptionedImage], data: DataConfig) -> str:
    """Lines with the number of images, their sizes, the bucket that each goes to, and their repeats."""
    buckets = Counter(bucket_of(image, data) for image in at_resolutions(images, data))
    smaller = sum(is_smaller(image, resolution_of(image, data)) for image in images)
    repeats = Counter(image.repeats for image in images)
    lines = [f"images  {len(images)} in {data.folder}"] if data.folder else describe_folders(images, data)
    lines += describe_resolutions(images, data)
    lines.append(
        "buckets   " + ", ".join(f"{h} x {w}: {count}" for (h, w), count in sorted(buckets.items())) + " (h x w)"
    )
    if smaller:
        side = "resolution" if data.folders else data.all_resolutions[0]
        lines.append(f"enlarged  {smaller}: they have less than {side} x {side} pixels")
    if data.subfolders and set(repeats) != {1}:
        lines.append(
            "repeats   " + ", ".join(f"{count} images x {times:g}" for times, count in sorted(repeats.items()))
        )
    return "\n".join(lines)


def describe_folders(images: Sequence[CaptionedImage], data: DataConfig) -> list[str]:
    """A line with the number of all images, and one for each folder with its settings."""
    counts, lines = Counter(image.folder for image in images), []
    for number, folder in enumerate(data.folders):
        if folder.role == "train":
            settings = [f"{folder.repeats:g} times in an epoch"] if folder.repeats != 1 else []
            settings += [f"loss x {folder.weight:g}"] if folder.weight != 1 else []
            settings += [f"resolution {folder.resolution}"] if folder.resolution else []
            lines.append(", ".join([f"          {counts[number]} in {folder.path}", *settings]))
    return [f"images  {len(images)} in {len(lines)} folder{'s' if len(lines) > 1 else ''}", *lines]


def describe_captions(
    images: Sequence[CaptionedImage], data: DataConfig, num_tokens: Callable[[str], int] | None
) -> str:
    """Lines with the sources of the captions, the longest one, and those without the placeholder, if there are any.

    Args:
        images: The images with their captions.
        data: The `data` section of the config.
        num_tokens: Counts the tokens of a caption; None: the tokenizer is not there, so characters are counted.
    """
    sources = Counter(f"<name>{image.source}" if image.source.startswith(".") else image.source for image in images)
    captions = [unchanged(image, data.captions) for image in images]
    longest = max(captions, key=num_tokens or len)
    length = f"{num_tokens(longest)} tokens" if num_tokens else f"{len(longest)} characters"
    lines = ["captions  " + ", ".join(f"{count} from {source}" for source, count in sources.most_common())]
    lines.append(f"longest   {length}: {longest}")
    if data.placeholder:
        pairs = zip(images, captions, strict=True)
        missing = [image.path.name for image, caption in pairs if not contains_word(caption, data.placeholder)]
        if missing:
            named = f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}"
            lines.insert(1, f"          {len(missing)} without the trigger word {data.placeholder}: {named}")
    return "\n".join(lines)


def describe_rendered(images: Sequence[CaptionedImage], config: TrainDiffusionConfig) -> list[str]:
    """Three captions of each folder as the first epoch has them, where they do not stay as they are."""
    settings, found = config.data.captions, []
    if settings is None and not any(image.more for image in images):
        return []
    for number in sorted({image.folder for image in images}):
        some = [image for image in images if image.folder == number][:MOST_RENDERED]
        found += [f"rendered  {image.path.name}: {rendered(image, settings, config.seed, 0)}" for image in some]
    return found


def describe_masks(images: Sequence[CaptionedImage], data: DataConfig) -> list[str]:
    """A line with the number of masks, where they are, and what they do; none without masks."""
    files = [image.mask_file for image in images if image.mask_file]
    names = dict.fromkeys(f"NAME{file.ending}" if file.ending else f"in {file.path.parent}" for file in files)
    if data.mask is None:
        unused = f"masks     {len(files)} of {len(images)} ({', '.join(names)}), not used: data.mask={{}} uses them"
        return [unused] if files else []
    count = sum(bool(image.mask) for image in images)
    where = ", ".join(names) if data.mask.source == "file" else data.mask.source
    outside = ", held at the base model outside" if data.mask.outside == "base" else ""
    return [f"masks     {count} of {len(images)} ({where}), floor {data.mask.floor:g}{outside}"]


def describe_references(images: Sequence[CaptionedImage], model: ImageModel | None, data: DataConfig) -> list[str]:
    """A line with the images that have references, and with the most tokens that these are; none without references."""
    from dora_mm.tasks.references import num_tokens

    found = [image for image in images if image.references]
    if not found:
        return []
    counts = Counter(len(image.references) for image in images)
    each = ", ".join(f"{images} with {count}" for count, images in sorted(counts.items()))
    dropped = f", dropped with probability {data.reference_dropout:g}" if data.reference_dropout else ""
    tokens = ""
    if model:
        own, theirs = max((num_tokens(image, model, data) for image in at_resolutions(found, data)), key=sum)
        tokens = f", at most {theirs:,} tokens beside {own:,} of the image"
    return [f"references  {each}{tokens}{dropped}"]


def describe_latents(batches: CaptionedBatches, data: DataConfig) -> list[str]:
    """A line with the latents that are computed ahead of the steps, and where they are; none for random crops.

    Args:
        batches: The batches of the training, of which one may have been made to see how large latents are.
        data: The `data` section.
    """
    if batches.config.crop == "random":
        return []
    folder = data.latent_cache
    views = zip(batches.images, batches.layouts, strict=True)
    kinds = {kind for image, (_, *sizes) in views for kind in zip(image.references, sizes, strict=True)}
    sides, times = (
        [layout[0] for layout in batches.layouts] + [size for _, size in kinds],
        2 if batches.config.flip else 1,
    )
    count, pixels = len(sides) * times, sum(h * w for h, w in sides) * times
    size = (batches.cache.bytes_per_cell or 0) * pixels / batches.model.vae_downscale**2
    where = f"in {folder}" if folder else "in main memory"
    where += "; data.latent_cache keeps them on the disk" if size > LARGE_CACHE and not folder else ""
    return [f"latents   {count:,} before the first step{f', {size / 1e6:,.1f} MB' if size else ''} {where}"]


def describe_encoded(batches: CaptionedBatches | PreservingBatches, num_batches: int, data: DataConfig) -> list[str]:
    """A line with the captions that are encoded ahead of the steps, and where they are; none where all change.

    Args:
        batches: The batches of the training, of which one may have been made to see how large a caption is.
        num_batches: Their number.
        data: The `data` section.
    """
    texts = [text for text in batches.captions(num_batches) if not batches.prompts.changes(text)]
    if not texts:
        return []
    each = batches.prompts.bytes_per_caption
    size = f", {each * len(texts) / 1e6:,.1f} MB" if each else ""
    where = f"in {data.text_cache}" if data.text_cache else "in main memory"
    return [f"encoded   {len(texts):,} different texts before the first step{size} {where}"]


def describe_preserved(config: TrainDiffusionConfig, class_images: Sequence[CaptionedImage]) -> list[str]:
    """A line with the prompts on which the model is held, and how often; none without the section `preserve`."""
    preserve = config.preserve
    if preserve is None:
        return []
    prompt = preserve.prompt if preserve.prompt is None else repr(preserve.prompt)
    what = f"{len(class_images)} images" if class_images else prompt or f"captions without {config.data.placeholder}"
    often = "every step" if preserve.every == 1 else f"every {preserve.every} steps"
    return [f"preserve  {what}, loss x {preserve.weight:g}, {often}: two more forward passes and a backward pass"]


def describe_guided_target(config: LossConfig) -> list[str]:
    """A line with the guided target and what it takes; none without the section."""
    if (guided := config.guided_target) is None:
        return []
    scale = f"{guided.scale:g}" if guided.schedule == "constant" else f"(1 + {guided.scale - 1:g} sigma)"
    under = f"u the prediction under {guided.prompt!r}"
    return [f"guided    target u + {scale} (v - u), {under}: one more forward pass of every batch"]


def describe_held_out(held_out: Sequence[CaptionedImage], evaluate: ValidationConfig, steps: int) -> str:
    """A line with the images that are not trained on, and when their loss is computed."""
    names = ", ".join(image.path.name for image in held_out[:MOST_NAMES]) + (
        ", ..." if len(held_out) > MOST_NAMES else ""
    )
    return f"held out  {len(held_out)} ({names}), their loss {when(evaluate, steps)}"


def repeats_of(images: Sequence[CaptionedImage], data: DataConfig) -> list[float]:
    """How often each image occurs in an epoch at all of its resolutions, where `data.repeats` is 1."""
    return [image.repeats * len(resolutions_of(image, data)) for image in images]


def views_per_image(repeats: Sequence[float], train: TrainConfig, num_processes: int = 1) -> tuple[float, float]:
    """How often a training shows the image that it shows least, and the one that it shows most."""
    views = train.steps * train.batch_size * train.gradient_accumulation_steps * num_processes
    return views * min(repeats) / sum(repeats), views * max(repeats) / sum(repeats)


def times(views: float) -> str:
    """How often an image is seen: below ten with a digit behind the point."""
    return f"{views:.0f}" if views >= 10 else f"{views:.1g}" if views < 1 else f"{views:.2g}"


def often(views: float) -> str:
    """The same with its noun: `once`, `70 times`."""
    return "once" if times(views) == "1" else f"{times(views)} times"


def describe_length(repeats: Sequence[float], train: TrainConfig, num_processes: int = 1) -> str:
    """A line with the length of the training in steps, and what it means for an image.

    Args:
        repeats: How often each image occurs in an epoch.
        train: The `train` section.
        num_processes: The number of processes that train.
    """
    least, most = views_per_image(repeats, train, num_processes)
    views = often(least) if least == most else f"{times(least)} to {often(most)}"
    shown = f"{len(repeats)} images"
    shown = shown if least == most else f"{sum(repeats):g} places of {shown} in an epoch"
    factors = [f"{train.steps} steps", f"batch {train.batch_size}"]
    factors += [f"{train.gradient_accumulation_steps} accumulated"] if train.gradient_accumulation_steps > 1 else []
    factors += [f"{num_processes} processes"] if num_processes > 1 else []
    return f"length    {' x '.join(factors)} / {shown} = each is seen {views} ({_recipes()})"


def remark_on_length(repeats: Sequence[float], train: TrainConfig, num_processes: int = 1) -> list[str]:
    """A warning, if every image is seen far less or far more often than in the recipes; else nothing."""
    least, most = views_per_image(repeats, train, num_processes)
    low, high = min(RECIPES.values()) / FAR, max(RECIPES.values()) * FAR
    if low <= most and least <= high:
        return []
    views, bound = (most, "at most ") if most < low else (least, "at least ")
    usual = sorted(max(1, int(float(f"{each / views * train.steps:.2g}"))) for each in RECIPES.values())
    change = "little" if most < low else "much"
    return [
        f"Each image is seen {bound if least != most else ''}{often(views)}, which is {change} for a style. "
        f"For the usual {_usual()} times set train.steps from {usual[0]} to {usual[1]}."
    ]


def remark_on_distilled(config: TrainDiffusionConfig) -> list[str]:
    """A warning that training undoes the distillation of a few-step model; empty for other models.

    It is also empty where an assistant or a guided target is there to keep it.
    """
    from dora_mm.models.images.families import distilled_of

    found = None if config.adapter.assistant or config.loss.guided_target else distilled_of(config.model)
    if found is None:
        return []
    return [
        f"{config.model.path} was distilled to {found.steps} steps ({found.evidence}), and a training undoes that: its "
        "loss is not that of the distillation. Train the base model, and generate with this one and the adapter; or "
        "set adapter.assistant or loss.guided_target, as docs/train_images.md says."
    ]


def remark_on_captions(model: ImageModel | None, images: Sequence[CaptionedImage], data: DataConfig) -> list[str]:
    """Warnings of captions that lose their end, or keep alternatives as text.

    Args:
        model: The model, whose tokenizer counts; None: lengths are left out.
        images: The images.
        data: The `data` section.
    """
    texts = (text for image in images for text in all_unchanged(image, data.captions))
    remarks = remark_on_alternatives(images, data)
    if model and (cut := model.cut(list(dict.fromkeys(texts)))):
        most = f"{len(cut)} captions have more than {model.most_tokens} tokens"
        remarks.insert(0, f"{most} and lose their end, the first: {cut[0]}")
    return remarks


def remark_on_alternatives(images: Sequence[CaptionedImage], data: DataConfig) -> list[str]:
    """Warnings, if captions have alternatives or separators that stay as they are; else nothing."""
    parted = [image.path.name for image in images if FIXED in image.caption] if data.captions is None else []
    if parted:
        return [f"{len(parted)} captions have {FIXED} ({parted[0]}), as text: data.captions gives it a meaning"]
    having = [image.path.name for image in images if "{a|b}" in syntax_in(image.caption)]
    if not having or (data.captions and data.captions.alternatives):
        return []
    return [f"{len(having)} captions have {{a|b}} ({having[0]}), as text: data.captions.alternatives=true picks one"]


def _recipes() -> str:
    return f"usual for a style: {_usual()} times"


def _usual() -> str:
    """The range of the DoRA paper's recipes, in tens."""
    return f"{round(min(RECIPES.values()), -1):.0f} to {round(max(RECIPES.values()), -1):.0f}"
