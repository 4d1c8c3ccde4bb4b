"""A folder of captioned images: captions from its files (see captions.py), else the instance prompt.

With `data.subfolders`, the images of its subfolders count, too. A folder named as in kohya's trainers, 10_name, repeats
its images 10 times in every epoch.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image

from dora_mm.config import resolve_path
from dora_mm.config.images import CaptionConfig, DataConfig
from dora_mm.data.images.buckets import Size
from dora_mm.data.images.captions import CAPTION_SUFFIXES, METADATA, CaptionFiles, is_image, is_metadata
from dora_mm.data.images.decoders import SUFFIXES, MissingDecoderError
from dora_mm.data.images.listing import files_in, folders_in, only_references
from dora_mm.data.images.look import Look, look_at
from dora_mm.data.images.masks import (
    ImagesByKind,
    MaskFile,
    MaskFiles,
    by_kind,
    folders_of_masks,
    mask_digest,
    no_masks,
)
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.images.references import ReferenceFiles, ReferenceImage, read_reference
from dora_mm.utils.digest import file_digest
from dora_mm.utils.folders import REFUSED, Links
from dora_mm.utils.messages import log_once
from dora_mm.utils.progress import tracked
from dora_mm.utils.shell import quoted

log = logging.getLogger(__name__)
MOST_NAMED = 8  # files in one message
SMALL = 2**15  # bytes of an image file, on average, below which several threads are no faster than one
_AS_MASKS = "images with the names of those in"  # as masks have
_USING_MASKS = "if they are masks, name it in data.mask.folder, or as masks of its folder in data.folders"
REPEATS = re.compile(r"(\d+)_.*")  # kohya's name of a folder whose images are repeated


_Files: TypeAlias = tuple[Path, MaskFile | None, tuple[Path, ...]]  # an image, its mask and its references
_Content: TypeAlias = tuple[Size, str, str, float, Look | None, tuple[ReferenceImage, ...]]


class CaptionedImage(NamedTuple):
    """One training image and its caption."""

    path: Path
    caption: str
    size: Size  # (h, w), upright, before resizing
    digest: str  # SHA-256 of the file, part of the key of cached latents
    source: str = METADATA[0]  # where the caption is from: a file name, ".txt", ".caption" or "data.instance_prompt"
    repeats: float = 1  # how often it occurs in an epoch, by the name of its subfolder and data.folders
    folder: int = 0  # the number of its folder among data.folders
    more: tuple[str, ...] = ()  # further captions, of which one is drawn in every epoch
    mask: str = ""  # SHA-256 of the file of its mask, or "alpha"; empty: none is used
    mask_file: MaskFile | None = None  # its mask, used or not
    look: Look | None = None  # what it looks like, where that was asked for
    references: tuple[ReferenceImage, ...] = ()  # what a model that edits sees beside the caption, in its order
    resolution: int | None = None  # at which it is trained on, from `at_resolutions`; None: that is not chosen yet


def read_captioned_images(
    folder: str | Path,
    *,
    instance_prompt: str | None = None,
    placeholder: str | None = None,
    subfolders: bool = False,
    unused_captions: str = "stop",
    key: str = "data.folder",
    prompt_key: str = "data.instance_prompt",
    lines: bool = False,
    masks: str | None = None,
    mask_folder: str | None = None,
    mask_key: str = "data.mask.folder",
    references: Sequence[str] = (),
    reference_key: str = "data.references",
    look: bool = False,
    links: Links = REFUSED,
) -> list[CaptionedImage]:
    """Reads every image of a folder with its caption, sorted by path.

    All images are decoded once, so that a broken one stops the run at its start. A blank caption counts as missing: the
    next source of captions is used. Images that take the instance prompt, duplicates and ignored files are logged by
    name, with what looks like captions and is not used.

    Args:
        folder: The folder, relative to the current directory or to the packaged configs, or absolute.
        instance_prompt: The caption of images that have none.
        placeholder: A word that at least one caption must contain.
        subfolders: Whether to read the images of subfolders, too, with a metadata file in any of them. Hidden folders
            and linked ones are left out.
        unused_captions: "stop": files that look like captions and are not used are an error; "ignore": a warning.
        key: The key of the config that names the folder, for messages.
        prompt_key: That of the instance prompt.
        lines: Whether each line of a text is a caption of its own.
        masks: Where masks are, "file" or "alpha"; None: they are not used, and files of masks are no images either.
        mask_folder: A folder of masks that are named as the images; None: they lie beside the images.
        mask_key: The key of the config that names it.
        references: Folders of reference images.
        reference_key: The key of the config that names them.
        look: Whether to keep what each image looks like.
        links: What becomes of links that lead out of a folder.

    Raises:
        ValueError: Lists all problems of the folder: it is missing, unreadable or has no images; an image or a
            reference is broken, empty or too large; a metadata file is malformed or names an image that is missing,
            outside the folder or listed already; a file is a link that leads out of its folder; an image has no
            caption; captions are not used; no caption contains the placeholder; all images are in subfolders, or the
            name of a subfolder asks for 0 repeats; a mask cannot be used, has no image or is one of two; a subfolder
            has the masks of another one; or a reference belongs to no image.
    """
    root = resolve_path(folder, key)
    mask_root = None if mask_folder is None else resolve_path(mask_folder, mask_key)
    others = [] if mask_root is None else [mask_root]
    others += [reference_folder(path, root, reference_key) for path in references]
    folders = folders_in(root, *others) if subfolders else [root]
    listed_in = partial(files_in, subfolders=subfolders, links=links)
    entries = listed_in(root, key, *others)
    files = CaptionFiles(root, entries, lines=lines, links=links)
    problems, kinds = files.problems, by_kind({*entries, *files.rows})
    listed = {path: row.references for path, row in files.rows.items()}
    seen_only = only_references(listed)
    paths = sorted((kinds.images - seen_only) | {path for path in files.rows if not is_image(path.name)})
    found_masks = _masks(kinds, root, mask_root, mask_key, listed_in)
    reference_roots = others[mask_root is not None :]
    reference_files = [(each, listed_in(each, reference_key)) for each in reference_roots]
    found_references = ReferenceFiles(paths, listed, reference_files, root)
    deeper = [] if subfolders else _images_in_subfolders(root, others, [*paths, *seen_only])
    if not paths and not problems:
        raise ValueError(_no_images(root, deeper, key, packed=any(path.suffix == ".parquet" for path in entries)))

    images, uncaptioned, undecoded = [], [], []
    all_files = [(path, found_masks.of_image(path), found_references.of_image(path)) for path in paths]
    contents = _contents(all_files, root=root if subfolders else None, masks=masks, look=look)
    shown = tracked(contents, "reading images", "images", len(paths))
    for (path, mask_file, _), content in zip(all_files, shown, strict=True):
        found = files.of_image(path)
        caption, source, more = found[:3] if found else (instance_prompt or "", prompt_key, ())
        if not caption:
            uncaptioned.append(path)
        if isinstance(content, MissingDecoderError):
            undecoded.append(content)
        elif isinstance(content, ValueError):
            problems.append(str(content))
        else:
            size, digest, mask, repeats, seen, references_of = content
            settings = {"more": more, "mask": mask, "mask_file": mask_file, "look": seen, "references": references_of}
            images.append(CaptionedImage(path, caption, size, digest, source, repeats, **settings))
    problems += _undecoded(undecoded)
    if uncaptioned:
        problems.append(f"{_counted(uncaptioned)} without a caption: caption them or set {prompt_key}")
    if orphans := found_masks.orphans(paths):
        problems.append(f"{_counted(orphans)} the mask of no image: rename or remove it")
    problems += found_masks.ambiguous() if masks == "file" else []
    problems += found_references.problems(reference_key)
    if subfolders:
        problems += [f"{folder.relative_to(root)} has {_AS_MASKS} {masked}: {_USING_MASKS}, or rename it"
                     for folder, masked in folders_of_masks(paths).items()]  # fmt: skip
    files.note_unused(entries, paths)
    if files.unused and unused_captions == "stop":
        problems.append(_about_unused(root, files.unused) + ": to train without, set data.unused_captions=ignore")
    if not problems and placeholder:
        problems += _check_placeholder(images, placeholder)
    if problems:
        raise ValueError(_report(root, problems, key))
    if files.unused:
        log.warning("%s", _about_unused(root, files.unused))
    others = [path for path in entries if path not in folders and path not in files.unused]
    _log_notes(others, images, deeper, prompt_key)
    _log_masks(images, found_masks.paths(), masks)
    if kinds.conditions:
        log.warning("%s what OneTrainer or ai-toolkit conditions on, and not used", _counted(sorted(kinds.conditions)))
    return images


def uncaptioned_images(root: Path, links: Links = REFUSED) -> tuple[list[Path], int]:
    """The images of a folder that have no caption, for a line in metadata.jsonl, and the number of the others.

    Raises:
        ValueError: There are no images, a file with captions is malformed, or a line cannot be added: the folder has a
            metadata.csv, or an image has a line without a caption.
    """
    entries = files_in(root, "FOLDER", subfolders=False, links=links)
    files, images = CaptionFiles(root, entries, links=links), by_kind(entries).images
    problems, without = files.problems, []
    for name in (path.name for path in entries if is_metadata(path.name) and path.name != METADATA[0]):
        problems.append(f"has {name}, beside which {METADATA[0]} is not read: put its rows there first")
    for path in sorted(images):
        if files.of_image(path) is None:
            without.append(path)
    problems += [f"{files.rows[path].source} names {path.name} without a caption: remove its line" for path in without
                 if path in files.rows]  # fmt: skip
    if not images:
        problems.append(f"has no images ({', '.join(SUFFIXES)})")
    if problems:
        raise ValueError(_report(root, problems, "FOLDER"))
    return without, len(images) - len(without)


def _masks(
    kinds: ImagesByKind, root: Path, folder: Path | None, key: str, listed: Callable[[Path, str], list[Path]]
) -> MaskFiles:
    """The masks of a folder of images: those beside them, and those in a folder of their own."""
    if folder is not None and folder.resolve() == root.resolve():
        raise ValueError(f"{key}: {folder} is the folder of the images: give one that has masks alone")
    return MaskFiles(kinds.masks, root, folder, listed(folder, key) if folder else [])


def reference_folder(path: str, root: Path, key: str) -> Path:
    """A folder of references, of which the images have one of their own.

    Raises:
        ValueError: It does not exist, or is that of the images.
    """
    folder = resolve_path(path, key)
    if folder.resolve() == root.resolve():
        raise ValueError(f"{key}: {folder} is the folder of the images: give one that has references alone")
    return folder


def read_images(data: DataConfig, role: str, *, look: bool = False) -> list[CaptionedImage]:
    """Reads the images of all folders with a role in a config's `data` section; see `read_captioned_images`.

    Raises:
        ValueError: As there; and no caption of the images that are trained on has the placeholder.
    """
    images, folders = [], data.all_folders
    captions = data.captions or CaptionConfig()
    always = data.placeholder and any(
        contains_word(text or "", data.placeholder) for text in (captions.prefix, captions.suffix)
    )
    placeholder = data.placeholder if role == "train" and not always else None
    # Images of a class count as a whole, and the instance prompt has the placeholder
    masks, prompt = (data.mask and data.mask.source, data.instance_prompt) if role != "preserve" else (None, None)
    for number, (key, folder) in enumerate(folders.items()):
        if folder.role == role:
            found = read_captioned_images(
                folder.path,
                instance_prompt=folder.prompt or prompt,
                placeholder=placeholder if len(folders) == 1 else None,
                lines=captions.lines,
                masks=masks,
                mask_folder=folder.masks,
                mask_key="data.mask.folder" if data.folder else f"{key}.masks",
                references=folder.references,
                reference_key="data.references" if data.folder else f"{key}.references",
                subfolders=data.subfolders,
                unused_captions=data.unused_captions,
                key=key,
                prompt_key=f"{key}.prompt" if folder.prompt or role == "preserve" else "data.instance_prompt",
                look=look,
                links=data.links,
            )
            # A whole number stays one, which the digest of the images depends on
            times = (image.repeats if folder.repeats == 1 else image.repeats * folder.repeats for image in found)
            images += [image._replace(repeats=n, folder=number) for image, n in zip(found, times, strict=True)]
    if role == "train" and masks and images and not any(image.mask for image in images):
        raise ValueError(f"data.mask: {no_masks(masks)}")
    if placeholder and len(folders) > 1:
        for problem in _check_placeholder(images, placeholder):
            raise ValueError(f"data.folders: {problem}")
    return images


def read_training_images(data: DataConfig) -> list[CaptionedImage]:
    """Reads the images of a config's `data` section that are trained on, or held out of these; see `read_images`."""
    return read_images(data, "train")


def digest_of(images: Sequence[CaptionedImage]) -> str:
    """SHA-256 that identifies a data set: the content of its images, masks and references, captions, order, repeats."""
    rows = []
    for image in images:
        others = {"more": image.more, "mask": image.mask, "references": [each.digest for each in image.references]}
        found = {name: value for name, value in others.items() if value}
        rows.append((image.digest, image.caption, *([image.repeats] if image.repeats != 1 else []), *found.items()))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def contains_word(text: str, word: str) -> bool:
    """Whether the text contains the word as a separate word: "a TOK icon" contains TOK, "TOKYO" does not."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _images_in_subfolders(root: Path, others: Sequence[Path], listed: Sequence[Path]) -> list[Path]:
    """The images in subfolders that are not read without `data.subfolders`: those that no metadata file names."""
    folders = folders_in(root, *others)[1:]
    return sorted(by_kind(path for folder in folders for path in folder.iterdir()).images - set(listed))


def _no_images(root: Path, deeper: Sequence[Path], key: str, *, packed: bool) -> str:
    if packed:
        unpack = f"dora-mm unpack {quoted(root)} OUT"
        return f"{key}: {root} has Parquet files: {unpack} writes their rows as a folder of images"
    if not deeper:
        return f"{key}: {root} has no images ({', '.join(SUFFIXES)})"
    first = deeper[0].relative_to(root)
    return (
        f"{key}: {root} has no images itself, but {len(deeper)} in subfolders, such as {first}: set "
        "data.subfolders=true to read these"
    )


def _contents(images: Sequence[_Files], **settings: Any) -> Iterator[_Content | ValueError]:
    """The result of `_content` for each image, in order: large ones by threads, since Pillow decodes without the GIL.

    Threads that read small ones wait for it: 20,000 of 64 x 64 take two of them 7.5 s, and one 4.9 s.
    """

    def content_of(image: _Files) -> _Content | ValueError:
        return _content(*image, **settings)

    sizes = [path.stat().st_size for path, *_ in images[:100] if path.is_file()]
    if sum(sizes) < SMALL * len(sizes):
        yield from map(content_of, images)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            yield from threads.map(content_of, images)


def _content(
    path: Path,
    mask_file: MaskFile | None,
    references: tuple[Path, ...],
    root: Path | None,
    masks: str | None,
    *,
    look: bool,
) -> _Content | ValueError:
    """What is kept of an image, which is decoded in full as its references are, or why it cannot be used."""
    try:
        repeats = 1 if root is None else _repeats(root, path)
        image: Image.Image = load_rgb(path)
        size = image.height, image.width
        mask, seen = mask_digest(path, mask_file, size, masks), look_at(image) if look else None
        return size, file_digest(path), mask, repeats, seen, tuple(map(read_reference, references))
    except ValueError as error:
        return error


def _undecoded(errors: Sequence[MissingDecoderError]) -> Iterator[str]:
    """One sentence for each format that nothing installed decodes."""
    for kind, advice in dict.fromkeys((error.kind, error.advice) for error in errors):
        paths = dict.fromkeys(error.path for error in errors if error.kind == kind and error.path)
        yield f"{_counted(paths)} in {kind} and not read: {advice}"


def _log_masks(images: Sequence[CaptionedImage], files: Iterable[Path], used: str | None) -> None:
    """Logs the images that lack a mask where masks are used, and the masks where their files are not."""
    without = [image.path for image in images if not image.mask]
    if used and without:
        log.warning("%s without a mask: all of it counts alike", _counted(without))
    if used != "file" and files:
        advice = "data.mask.source=file uses it" if used else "set data.mask"
        log.warning("%s the mask of an image, and not used: %s", _counted(sorted(files)), advice)


def _repeats(root: Path, path: Path) -> int:
    """How often the image occurs in an epoch: the number in the name of the innermost folder that has one, else 1."""
    for name in reversed(path.relative_to(root).parts[:-1]):
        if found := REPEATS.fullmatch(name):
            if int(found[1]) == 0:
                raise ValueError(f"{path}: the folder {name} asks for 0 repeats: rename it, or move it elsewhere")
            return int(found[1])
    return 1


def _check_placeholder(images: Sequence[CaptionedImage], placeholder: str) -> list[str]:
    without = [image.path for image in images if not contains_word(image.caption, placeholder)]
    if len(without) < len(images):
        if without:
            log.warning("%s without the placeholder %s", _counted(without), placeholder)
        return []
    return [
        f"no caption contains the placeholder {placeholder} as a word; the first is {images[0].caption!r}: set "
        f"data.placeholder to a word of theirs, or to null; or, for images without captions, data.instance_prompt"
    ]


def _report(root: Path, problems: list[str], key: str) -> str:
    if len(problems) == 1:
        return f"{key} {root}: {problems[0]}"
    return "\n  ".join([f"{key} {root}: {len(problems)} problems", *problems])


def _about_unused(root: Path, unused: Mapping[Path, str]) -> str:
    """The start of a sentence: "2 files look like captions without being used (a.json: only ...; b.txt: ...)"."""
    named = [f"{path.relative_to(root)}: {reason}" for path, reason in list(unused.items())[:MOST_NAMED]]
    listed = "; ".join(named) + ("; ..." if len(unused) > MOST_NAMED else "")
    files = f"{len(unused)} files look" if len(unused) > 1 else "1 file looks"
    return f"{files} like captions without being used ({listed})"


def _log_notes(entries: Sequence[Path], images: list[CaptionedImage], deeper: Sequence[Path], prompt_key: str) -> None:
    """Logs what the user should know, although it does not stop the run.

    Args:
        entries: All files and folders that were found.
        images: The images that are used.
        deeper: Images in subfolders, which are not used.
        prompt_key: The key of the instance prompt.
    """
    masks = folders_of_masks([*(image.path for image in images), *deeper])
    for folder, masked in masks.items():
        log.warning("%s has %s %s, and is not used: %s", folder, _AS_MASKS, masked, _USING_MASKS)
    if unread := [path for path in deeper if path.parent not in masks]:
        log.warning("%s not used, because in subfolders: data.subfolders=true reads these, too", _counted(unread))
    repeated = Counter((image.path.parent, image.repeats) for image in images if image.repeats != 1)
    for (folder, repeats), count in sorted(repeated.items()):
        log_once(log, f"{folder}: {count} image{'s' * (count > 1)}, {repeats} times in an epoch")
    with_prompt = [image.path for image in images if image.source == prompt_key]
    if len(with_prompt) < len(images) and with_prompt:
        log.warning("%s without a caption: %s is used", _counted(with_prompt), prompt_key)
    first_of: dict[str, Path] = {}
    duplicates = [image for image in images if first_of.setdefault(image.digest, image.path) != image.path]
    if duplicates:
        pairs = [f"{image.path.name} to {first_of[image.digest].name}" for image in duplicates[:MOST_NAMED]]
        copies = _counted([image.path for image in duplicates])
        log.warning("%s identical to another image of the folder: %s", copies, ", ".join(pairs))
    folders = {path.parent for path in deeper}
    folders |= {folder for path in folders for folder in path.parents}
    stems = {image.path.with_suffix("") for image in images}
    captions = {path for path in entries if path.suffix.lower() in CAPTION_SUFFIXES and path.with_suffix("") in stems}
    used = captions | folders | {path for path in entries if is_metadata(path.name) or is_image(path.name)}
    others = [path for path in entries if path not in used]
    if others:
        log.info("%s ignored: neither images nor captions", _counted(others, "file"))


def _counted(paths: Iterable[Path], noun: str = "image") -> str:
    """The start of a sentence: "3 images (a.png, b.png, c.png) are"."""
    names = [path.name for path in paths]
    listed = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({listed}) {'are' if len(names) > 1 else 'is'}"
