"""The reference images of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from dora_mm.config.paths import resolve_path
from dora_mm.data.images.references import ReferenceImage, load_reference, read_reference
from dora_mm.models.images.editing import EditingModel
from dora_mm.models.images.image_model import ImageModel
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.sampling.batch.requests import ImageRequest


def reference_of(path: str) -> ReferenceImage:
    """A reference by its path in a job, decoded once as long as its file stays as it is.

    Raises:
        ValueError: It is missing or no image.
    """
    file = resolve_path(path, "image")
    state = file.stat()
    return _decoded(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4096)
def _decoded(file: Path, mtime: int, size: int) -> ReferenceImage:
    return read_reference(file)


def check_references(model: ImageModel, requests: Sequence[ImageRequest]) -> None:
    """Checks the references of a job against a model whose weights are not loaded yet.

    Raises:
        ValueError: See `problem_of_references`; the message names the row.
    """
    for request in {request.row: request for request in requests}.values():
        if problem := problem_of_references(model, request.images, area_of(model, request)):
            raise ValueError(f"row {request.row}: {problem}")


def problem_of_references(model: ImageModel, images: Sequence[str], area: int | None) -> str | None:
    """Why a model makes no image of these references; None: it does.

    Raises:
        ValueError: One is missing or damaged.
    """
    if not images:
        needs = isinstance(model, EditingModel) and model.needs_references
        return f"{model.title} needs references: give images" if needs else None
    if not isinstance(model, EditingModel):
        others = ", ".join(family.title for family in IMAGE_FAMILIES.values() if family.edits)
        return f"{model.title} does not edit, so it takes no images: use a model that does ({others})"
    if area and model.scales_references_up:
        return f"reference_area has no effect on {model.title}, whose pipeline scales references up: leave it out"
    if len(images) > model.most_references:
        return f"{len(images)} images, and {model.title} takes {model.most_references}"
    sizes = ((path, model.prepared_size(reference_of(path).size, area)) for path in images)
    return next((f"image {path} {why}" for path, size in sizes if (why := model.why_not_reference(size))), None)


def with_references(model: ImageModel, request: ImageRequest) -> ImageRequest:
    """The request with the digests of its references, and a size where it has none.

    The size is that of the pipeline, by the references, or the model's own without references.
    """
    side = (model.resolution, model.resolution)
    references = [reference_of(path) for path in request.images]
    if references:
        assert isinstance(model, EditingModel)
        area = None if request.reference_area == "target" else area_of(model, request)
        side = model.edited_size([model.prepared_size(each.size, area) for each in references])
    height, width = request.height or side[0], request.width or side[1]
    digests = tuple(each.digest for each in references)
    return replace(request, width=width, height=height, image_digests=digests)


def area_of(model: ImageModel, request: ImageRequest) -> int | None:
    """The area in pixels to which larger references are scaled down; None: as the pipeline does."""
    if request.reference_area == "target":
        return (request.width or model.resolution) * (request.height or model.resolution)
    return None if request.reference_area == "pipeline" else int(request.reference_area)


def references_of(model: ImageModel, request: ImageRequest) -> tuple[Image.Image, ...]:
    """The references of an image as its pipeline is given them; see `prepared`."""
    return prepared(model, request.images, area_of(model, request))


def prepared(model: ImageModel, images: Sequence[str], area: int | None) -> tuple[Image.Image, ...]:
    """References by their paths as the pipeline is given them.

    Raises:
        ValueError: A file is not the one that was read before.
    """
    if not images:
        return ()
    assert isinstance(model, EditingModel)
    loaded = (load_reference(reference_of(path), alpha=model.references_have_alpha) for path in images)
    return tuple(model.prepare_reference(image, area) for image in loaded)
