"""Base model and adapters of a job, and how both are found and loaded."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from dora_mm import backend, formats
from dora_mm.config.generation import WITHOUT_GUIDANCE, ImageGenerationConfig
from dora_mm.config.models import EMBEDDED_IMAGE_MODEL, ModelConfig, validated
from dora_mm.config.paths import find_path, resolve_adapter, resolve_model
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.files.tensor_file import read_metadata
from dora_mm.models.hub import check_named_by
from dora_mm.models.images.families import distilled_of, file_digests, load_image_model
from dora_mm.models.images.fitting import changes_text, check_denoiser
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.images.memory import check_offload, save_memory, stream_networks
from dora_mm.models.images.new_tokens import load_adapter, read_tokens
from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.sampling.generating import BatchGeneration, check_what_is_there, generate, plan, remove_adapters
from dora_mm.sampling.image_sampler import MOST_ENCODED, ImageSampler
from dora_mm.sampling.png import BaseModel
from dora_mm.sampling.references import area_of, check_references, references_of, with_references
from dora_mm.sampling.strengths import HashableStrength
from dora_mm.utils.circumstances import circumstances
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import data_digest, known_digest
from dora_mm.utils.json_text import parse_json
from dora_mm.utils.processes import SINGLE_PROCESS, Processes
from dora_mm.utils.progress import tracked

log = logging.getLogger(__name__)
EMBEDDED = ModelConfig(path=EMBEDDED_IMAGE_MODEL)
SETTINGS = "base_settings"  # the key of a header


@dataclass
class LoadedModel:
    """A base model that generates jobs, with or without adapters.

    Attributes:
        model: The model, not adapted.
        sampler: Generates with it.
        base: What images say about it.
        adapters: The files of the adapters, by the path that jobs name.
        environment: What else images depend on (see `png.GenerationMetadata`).
        forward: The implementation of adapted layers.
        frees_text: Whether prompts can be encoded before the denoiser is loaded: no adapter changes what they become,
            and networks do not wait in main memory for their turn.
    """

    model: ImageModel
    sampler: ImageSampler
    base: BaseModel
    adapters: Mapping[str, Path]
    environment: Mapping[str, Any]
    forward: Any
    frees_text: bool

    def load_adapter(self, path: str, strength: HashableStrength, name: str) -> None:
        """Loads an adapter into the model.

        Raises:
            ValueError: It does not fit the model.
        """
        try:
            chosen: Any = dict(strength) if isinstance(strength, tuple) else strength
            load_adapter(self.model, self.adapters[path], strength=chosen, name=name, forward=self.forward)
        except ValueError as error:
            raise ValueError(with_base(str(error), path, self.adapters[path], self.base.path)) from error

    def load(self, requests: Sequence[ImageRequest]) -> None:
        """Loads the model; where that can be, text encoders encode the prompts and are freed before the denoiser comes.

        Raises:
            ValueError: Weights are missing or damaged.
        """
        first = {(request.prompts, request.images, area_of(self.model, request)): request for request in requests}
        if self.frees_text and len(first) <= MOST_ENCODED:
            shown = tracked(list(first.values()), "encoding prompts", unit="prompts")
            self.sampler.keep_prompts((each.prompts, references_of(self.model, each)) for each in shown)
        self.sampler.load()

    def check_adapters(self, requests: Sequence[ImageRequest]) -> None:
        """Loads every adapter once, or with each of its strengths by part.

        Raises:
            ValueError: An adapter does not fit the model; or it replaces weights of the base, and a job has images
                without it, or at another strength.
        """
        combinations = {request.active_adapters for request in requests}
        for path in self.adapters:
            if not replaces_weights(self.adapters[path]):
                used = {strength for weights in combinations for name, strength in weights if name == path}
                for strength in [s for s in used if isinstance(s, tuple)] or [1.0]:  # those by part can be wrong
                    try:
                        self.load_adapter(path, strength, "checked")
                    finally:
                        remove_adapters(self.model)
            elif combinations != {((path, 1.0),)}:
                raise ValueError(
                    f"{path} holds weights that replace those of the base (method full, biases or norms): it cannot be "
                    "generated at another strength than 1, nor beside other adapters or images without it"
                )

    def check(self, requests: Sequence[ImageRequest]) -> None:
        """Checks that images can be generated.

        Raises:
            ValueError: A size, a scheduler, a setting or an adapter does not fit the model.
        """
        check_references(self.model, requests)
        requests = [with_references(self.model, request) for request in requests]
        self.check_sizes(requests)
        self.check_schedulers(requests)
        if any(request.prompt_syntax != "plain" for request in requests) and not self.model.weighs_words:
            raise ValueError(
                f"prompt_syntax a1111 is not for {self.model.title}, whose encoder takes no weights: use plain"
            )
        for request in requests:
            self.model.check_rescale(request.guidance_rescale, f"row {request.row}: guidance_rescale")
        self.load(requests)
        self.check_adapters(requests)
        unguided = [request for request in requests if request.guidance <= WITHOUT_GUIDANCE]
        for key in ("negative_prompt", "guidance_rescale"):
            if found := [request for request in unguided if getattr(request, key)]:
                log.warning("%d images have a %s without effect: their guidance is at most 1", len(found), key)
        prompts = [text for p in requests for text in (p.prompt, p.negative_prompt) if text]
        if cut := self.model.cut(list(dict.fromkeys(prompts))):
            most = self.model.most_tokens
            log.warning("%d prompts have more than %d tokens and lose their end, the first: %s", len(cut), most, cut[0])

    def check_sizes(self, requests: Sequence[ImageRequest]) -> None:
        """Checks that the model can generate images of these sizes.

        Raises:
            ValueError: A side is not a multiple of the model's cell.
        """
        cell = self.model.cell
        for request in requests:
            for name, side in (("width", request.width), ("height", request.height)):
                if side is not None and side % cell:
                    raise ValueError(
                        f"row {request.row}: {name} {side} must be a multiple of {cell} for {self.model.title}"
                    )

    def check_schedulers(self, requests: Sequence[ImageRequest]) -> None:
        """Checks that the schedulers can take the requested number of steps.

        Raises:
            ValueError: One cannot: LCM's takes at most 50, and others as many as the model has noise levels. Or it is
                not for this model.
        """
        rows = {(request.scheduler, request.steps): request.row for request in reversed(requests)}
        for (scheduler, steps), row in rows.items():
            if problem := self.sampler.why_not(scheduler, steps):
                raise ValueError(f"row {row}: {problem}")

    def prompt_length(self, request: ImageRequest) -> int:
        """The length of an image's prompts, with the new tokens of its adapters.

        Raises:
            ValueError: Two of them have the same.
        """
        for path, _ in request.active_adapters:
            for word, rows in self.new_tokens[path].items():
                self.model.new_tokens.add(word, rows)
        try:
            return self.sampler.length(request.prompts)
        finally:
            self.model.new_tokens.clear()

    @cached_property
    def new_tokens(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """The rows of new tokens by the path of their adapter, word and table."""
        return {path: read_tokens(AdapterFile(file)) for path, file in self.adapters.items()}

    def adapter_hashes(self) -> dict[str, tuple[str, str]]:
        """The two hashes of each adapter (see `png.UsedAdapter`), by the path that jobs name."""
        return {path: (formats.adapter_digest(file), data_digest(file)[:12]) for path, file in self.adapters.items()}

    def plan(self, folder: Path, requests: Sequence[ImageRequest], batch_size: int) -> BatchGeneration:
        """Plans the batches of a job: see `generating.plan`. Images without a size get that of `with_references`."""
        return plan(
            folder,
            [with_references(self.model, request) for request in requests],
            self.prompt_length,
            batch_size=batch_size,
            model=self.base,
            adapters=self.adapter_hashes(),
            environment=self.environment,
            now=circumstances(backend.about_layers(self.environment["backend"])),
        )

    def generate(
        self, folder: Path, requests: Sequence[ImageRequest], batch_size: int, processes: Processes = SINGLE_PROCESS
    ) -> BatchGeneration:
        """Generates the images of a job that are not in its run directory yet, in the processes that share them.

        Returns:
            The job; in the main process with what has become of all images.
        """
        generation = self.plan(folder, requests, batch_size)
        if processes.is_main:
            check_what_is_there(generation)
        generation.done = dict(processes.from_main(list(generation.done.items())))
        generate(generation, self.sampler, self.load_adapter, processes)
        return generation


def load_model(config: ImageGenerationConfig, adapters: Iterable[str]) -> LoadedModel:
    """Finds adapters and loads the base model.

    Args:
        config: The config. Where it names no model, that is the one that the adapters were trained on.
        adapters: The adapters that a job names: files, their folders, or run directories.

    Raises:
        ValueError: An adapter or the model cannot be found or loaded, or the adapters were trained on several models.
    """
    files, device = find_adapters(adapters), default_device()
    chosen = config.model or model_of(files)
    check_offload(config.memory, device, chosen.quantization, chosen.text_quantization)
    warn_of_other_bases(files, chosen, is_distilled=distilled_of(chosen) is not None)
    model = load_image_model(chosen)
    changes = check_fit(model, files, chosen.path)
    weights = " ".join(model.components.digest(name) for name in sorted(model.components.networks))
    digest = hashlib.sha256(f"{weights} {settings_text(model.sampling_scheduler)}".encode()).hexdigest()
    sampler = ImageSampler(model, partial(save_memory, config=config.memory, device=device))
    stream_networks(model, chosen, config.memory, device)
    stays = config.memory.offload == "none"  # on the device; else the pipeline moves networks there and back
    if stays:
        model.to(device)
    found = find_path(chosen.path)
    file_hash = known_digest(found) if found is not None and found.is_file() else None
    base = BaseModel(
        *(chosen.path, chosen.revision, chosen.vae, chosen.dtype, digest, file_hash, chosen.generation_settings()),
        files=file_digests(chosen) or None,  # a single checkpoint has none
    )
    environment = {"backend": config.backend, "memory": config.memory.model_dump(exclude_none=True)}
    frees_text = stays and not changes
    return LoadedModel(model, sampler, base, files, environment, backend.select(config.backend), frees_text)


def check_fit(model: ImageModel, files: Mapping[str, Path], base: str) -> bool:
    """Checks adapters against the configs of a model, before its weights are read.

    Returns:
        Whether one of them may change how prompts are encoded.

    Raises:
        ValueError: The denoiser lacks a module, or has it in another size.
    """
    if not files:
        return False
    denoiser = model.empty_denoiser()
    for path, file in files.items():
        try:
            check_denoiser(AdapterFile(file), model, denoiser)
        except ValueError as error:
            raise ValueError(with_base(str(error), path, file, base)) from error
    return any(changes_text(AdapterFile(file), model, denoiser) for file in files.values())


def with_base(problem: str, path: str, file: Path, base: str) -> str:
    """The problem of an adapter, with the model that it was trained on where that is not the base."""
    trained_on = read_metadata(file).get("base_model")
    return problem if trained_on in (None, base) else f"{path} was trained on {trained_on}, not on {base}: {problem}"


def settings_text(scheduler: Any) -> str:
    """The class of a model's own scheduler, and what its file says: what later releases add by default is no change."""
    config = scheduler.config
    added = set(config.get("_use_default_values", ()))
    settings = {key: value for key, value in config.items() if key[0] != "_" and key not in added}
    return f"{type(scheduler).__name__} {json.dumps(settings, sort_keys=True, default=str)}"


def find_adapters(paths: Iterable[str]) -> dict[str, Path]:
    """Finds the adapter file of each path: a file, its folder, or a run directory.

    Raises:
        ValueError: A path does not exist, or holds no adapter file or several.
    """
    return {path: formats.find_file(resolve_adapter(path, "adapter")) for path in sorted(set(paths))}


def model_of(files: Mapping[str, Path]) -> ModelConfig:
    """The base model that the headers of adapter files name, or the embedded one without adapters.

    Raises:
        ValueError: A header names no model, or one that is not there; or they name several.
    """
    found: dict[ModelConfig, str] = {}
    for path, file in files.items():
        header = read_metadata(file)
        if not header.get("base_model"):
            raise ValueError(f"{path} does not say which model it was trained on: set model.path")
        keys = {"path": "base_model", "revision": "base_revision", "vae": "base_vae", "dtype": "base_dtype"}
        values: dict[str, Any] = {name: header[key] for name, key in keys.items() if key in header}
        values |= family_settings(header, path)
        try:
            found.setdefault(validated(ModelConfig, values), path)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key, message = keys.get(str(problem["loc"][0]), SETTINGS), problem["msg"]
            raise ValueError(f"the header of {path} cannot be used ({key}: {message}): set model.path") from None
    folders = {Path(model.path).name for model in found if Path(model.path).name != model.path}
    found = {model: path for model, path in found.items() if model.path not in folders}  # converted: the name alone
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise ValueError(f"{first} was trained on {one.path}, and {second} on {other.path}: set model.path")
    for model, path in found.items():
        try:
            resolve_model(model.path)
        except ValueError:
            raise ValueError(f"{path} was trained on {model.path}, which is not here: set model.path") from None
        check_named_by(path, model.path, model.revision)
        check_named_by(path, model.vae)
    return next(iter(found), EMBEDDED)


def family_settings(header: Mapping[str, str], path: str) -> dict[str, Any]:
    """The settings of the base model's family that a header names, such as those of its prompts.

    Raises:
        ValueError: They cannot be read.
    """
    try:
        found = parse_json(header.get(SETTINGS, "{}"), SETTINGS)
    except ValueError:
        found = None
    if found is None or set(found) & {"path", "revision", "vae", "dtype"}:
        raise ValueError(f"the header of {path} cannot be used ({SETTINGS}): set model.path")
    return found


def warn_of_other_bases(files: Mapping[str, Path], model: ModelConfig, *, is_distilled: bool = False) -> None:
    """Names adapters that were trained on another model than the one that generates.

    Those of a base model are meant for what is distilled of it, too: that is said once.
    """
    generating = (find_path(model.path) or model.path, Path(model.path).name)  # converted files have the name alone
    others: dict[str, str] = {}
    for path, file in files.items():
        trained_on = read_metadata(file).get("base_model")
        if trained_on and (find_path(trained_on) or trained_on) not in generating:
            others[path] = trained_on
    if others and is_distilled:
        bases = " and ".join(dict.fromkeys(others.values()))
        log.info("What was trained on %s is generated with %s, which was distilled.", bases, model.path)
        return
    for path, trained_on in others.items():
        log.warning("%s was trained on %s, and is used with %s.", path, trained_on, model.path)


def replaces_weights(file: Path) -> bool:
    """Whether an adapter file has weights of method `full` or other parameters of the base, such as biases."""
    adapter = AdapterFile(file)
    return bool(adapter.others) or any("weight" in endings for endings in adapter.modules.values())
