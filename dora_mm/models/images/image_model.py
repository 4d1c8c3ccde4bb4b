"""The seam of image models: what training, sampling and evaluation need of a family. One family is one class.

A family subclasses `ImageModel` in a file of its own, and has a record in registries/image_families.py, a section in
config/models.py, a target map and a recipe; nothing else knows it. Shapes: B images or prompts, C channels, L tokens.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dora_mm import targets
from dora_mm.config.models import ModelConfig
from dora_mm.config.schema import Section
from dora_mm.config.streaming import Amount
from dora_mm.core import TargetMap
from dora_mm.data.images.buckets import Framing
from dora_mm.data.images.latents import Latents
from dora_mm.data.syntax import Wording
from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.models.images.components import Components, StreamedNetwork
from dora_mm.models.images.new_tokens import NewTokens
from dora_mm.models.images.noise import NoiseProcess
from dora_mm.registries.image_families import IMAGE_FAMILIES, ImageFamily
from dora_mm.registries.registry import load

TEXT_LAYOUT = 1  # increase it when a family encodes the same caption otherwise, such as longer ones than before
Prompt = Mapping[str, Tensor]  # one encoded prompt by name, without padding: (L, D), (P,)


@dataclass(frozen=True)
class SingleFile:
    """The parts of a pipeline that single-file checkpoints of a family lack.

    Attributes:
        configs: The folder of the index and configs of its pipeline, which such a file lacks.
        parts: Makes the components that it lacks, by their names.
        scheduler: Returns the scheduler settings that the names of its tensors imply; raises ValueError where they
            are of an unknown kind.
    """

    configs: Path
    parts: Callable[[], dict[str, Any]] = dict
    scheduler: Callable[[Collection[str]], dict[str, Any]] = lambda names: {}


@dataclass(frozen=True)
class Distilled:
    """The sampling settings that a model was distilled for.

    Attributes:
        steps: The denoising steps in which it generates.
        guidance: The scale of guidance with which it generates; 1 is none.
        evidence: The evidence in its files that it was distilled.
    """

    steps: int
    guidance: float
    evidence: str


class ImageModel(ABC):
    """A text-to-image model with all that turns images and captions into losses, and prompts into images.

    Args:
        components: Those of its pipeline, named as in diffusers; they are also attributes.
        settings: The family's section of the config.
    """

    name: ClassVar[str]  # its key in IMAGE_FAMILIES, which is that of its section in the config
    phases: ClassVar[
        tuple[tuple[str, ...], ...]
    ]  # its components, as they are loaded: the denoiser in a group of its own
    denoiser: ClassVar[str]  # the network that predicts
    maps: ClassVar[Mapping[str, str]]  # the target maps of the networks that can be adapted, the denoiser first
    cell: ClassVar[int]  # sides of images are multiples of this number of pixels
    vae_name: ClassVar[str] = "AutoencoderKL"  # the class of diffusers
    # Of its config: channels of latents, and a list of its levels
    vae_keys: ClassVar[tuple[str, str]] = ("latent_channels", "block_out_channels")
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")  # in which it computes what it should
    weighs_words: ClassVar[bool] = False  # whether `encode_for_drawing` takes prompts in pieces with weights
    rescales_guidance: ClassVar[bool] = False  # whether its pipeline takes `guidance_rescale`
    # What files call the tables of its text encoders, where words can be new tokens; empty: they cannot
    token_tables: ClassVar[Mapping[str, str]] = {}
    predictions: ClassVar[tuple[str, ...]] = ()  # what `model.prediction` can be beside "auto"
    single_file: ClassVar[SingleFile | None] = None  # how single checkpoints are read; None: the family has none

    # Whether the target map has layers on which no loss depends, such as those of a text that nothing reads any more
    has_unread_layers: ClassVar[bool] = False
    reads_denoisers: ClassVar[bool] = False  # whether `model.denoiser` can be a file

    def __init__(self, components: Components, settings: Section | None = None):
        self.components = components
        self.settings: Any = settings or load(self.record().section)()
        self.new_tokens = NewTokens()

    def __getattr__(self, name: str) -> Any:
        if name != "components" and name in self.components.names:
            return self.components[name]
        return object.__getattribute__(self, name)  # raises what was wrong, also inside of a property

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "components" and name in self.components.names:
            self.components[name] = value
        else:
            super().__setattr__(name, value)

    @classmethod
    def record(cls) -> ImageFamily:
        """The registry entry of the family, which can be read without importing this class."""
        return IMAGE_FAMILIES[cls.name]

    @classmethod
    def distilled(cls, files: ModelFolder) -> Distilled | None:
        """How a model generates that was distilled to few steps, by its index and configs; None: it was not."""
        return None

    @property
    def title(self) -> str:
        """The name of the family in messages."""
        return self.record().title

    def check(self, config: ModelConfig) -> None:
        """Checks the `model` section against the model's own files, before anything of the model is loaded.

        Raises:
            ValueError: The dtype, the VAE or the scheduler does not fit the family; the message names the key.
        """
        if config.dtype not in self.dtypes:
            known = " or ".join(self.dtypes)
            raise ValueError(f"model.dtype: {self.title} needs {known}, not {config.dtype}.")
        if config.prediction not in ("auto", *self.predictions):
            raise ValueError(f"model.prediction: {self.title} predicts a velocity, nothing else: leave it out.")
        if config.denoiser and not self.reads_denoisers:
            raise ValueError(f"model.denoiser is not for {self.title}: give a whole checkpoint as model.path.")
        if config.vae:
            own = self.components.config("vae")
            for key in self.vae_keys:
                given, wanted = (v if isinstance(v, int) else len(v) for v in (self.vae.config[key], own[key]))
                if given != wanted:
                    raise ValueError(f"model.vae: {config.vae} does not fit the model: {key}: {given}, not {wanted}.")
            if own.get("shift_factor") is not None and self.vae.config.get("shift_factor") is None:
                raise ValueError(f"model.vae: {config.vae} does not fit the model: it has no shift_factor.")

    # --- its networks ------------------------------------------------------------------------------------------------

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks that were not released, by component, loaded where they are not yet; the denoiser first."""
        return self._networks([self.denoiser, *(name for name in self.components.names if name != self.denoiser)])

    def _networks(self, names: Sequence[str]) -> dict[str, nn.Module]:
        found = {name: self.components[name] for name in names}
        return {name: component for name, component in found.items() if isinstance(component, nn.Module)}

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The networks that encode images and captions: all but the denoiser, which is not loaded for them."""
        return self._networks([name for name in self.components.names if name != self.denoiser])

    @property
    def adaptable(self) -> dict[str, nn.Module]:
        """The networks that can be adapted and were not released."""
        return {name: network for name, network in self.networks.items() if name in self.maps}

    @property
    def target_maps(self) -> dict[str, TargetMap]:
        """The target map of each network that can be adapted and was not released, the denoiser's first."""
        return {name: targets.find(self.maps[name]) for name in self.maps if not self.components.is_released(name)}

    @property
    def text_encoders(self) -> list[str]:
        """The names of the text encoders."""
        return [name for name in self.components.names if name.startswith("text_encoder")]

    def token_table(self, table: str) -> nn.Embedding:
        """The embedding of a text encoder, by what files call its table."""
        return self.components[self.token_tables[table]].get_input_embeddings()

    @property
    def token_widths(self) -> dict[str, int]:
        """The number of columns of each table, by what files call it."""
        return {table: self.token_table(table).embedding_dim for table in self.token_tables}

    @property
    def device(self) -> torch.device:
        return self.components.device

    def to(self, device: torch.device | str, *, denoiser: bool = True) -> ImageModel:
        """Moves all networks to a device, or all but the denoiser; returns self."""
        self.components.to(device, () if denoiser else (self.denoiser,))
        self.new_tokens.to(device)
        return self

    def stream(self, denoiser: Amount | None, text: Amount | None) -> ImageModel:
        """Lets blocks of the denoiser and of each text encoder wait in main memory, from when they are moved to a GPU.

        Returns:
            The model itself, of which these networks must not be loaded yet.
        """
        amounts = {self.denoiser: denoiser, **dict.fromkeys(self.text_encoders, text)}
        maps = self.target_maps
        self.components.streamed = {
            name: StreamedNetwork(amount, maps.get(name)) for name, amount in amounts.items() if amount is not None
        }
        return self

    def freeze(self) -> ImageModel:
        """Turns gradients off and eval mode on in all networks; returns self."""
        for network in self.networks.values():
            network.requires_grad_(False).eval()
        return self

    @property
    def vae_channels(self) -> int:
        """Channels of the VAE's latents."""
        return self.vae.config[self.vae_keys[0]]

    @property
    def vae_downscale(self) -> int:
        """Pixels per latent of the VAE, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def downscale(self) -> int:
        """Pixels per latent of the denoiser, along one side: some take patches of the VAE's latents for one."""
        return self.vae_downscale

    def empty_denoiser(self) -> nn.Module:
        """The denoiser without its weights, on the meta device, where the model's files have configs; else itself."""
        return self.components.empty(self.denoiser)

    @property
    def vae_identity(self) -> str:
        """Digest of the VAE as it is loaded, on which cached latents depend besides the image."""
        return self.components.digest("vae")

    @property
    def text_identity(self) -> str:
        """Digest of all inputs of encoded captions but their text: tokenizers, encoders, configs, dtype, settings."""
        tokenizers = [self.components[name] for name in self.components.names if name.startswith("tokenizer")]
        cut = [(each.backend_tokenizer.to_str(), each.model_max_length, each.chat_template) for each in tokenizers]
        encoders = [(self.components.digest(name), str(self.components.config(name))) for name in self.text_encoders]
        settings = self.settings.model_dump_json(exclude=set(self.settings.only_training))
        found = [self.title, TEXT_LAYOUT, cut, encoders, settings]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Side, in pixels, of the images that the model was trained on."""

    # --- training ----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def noise(self) -> NoiseProcess:
        """How latents are noised, and what the denoiser is asked for.

        Raises:
            ValueError: It is asked for something that cannot be trained.
        """

    @property
    def unconditional(self) -> str:
        """The embedding without a caption: "empty", the encoded empty text, or "zeros"."""
        return "empty"

    @abstractmethod
    def prompt_length(self, prompt: Wording) -> int:
        """How long a prompt is as the denoiser sees it: prompts of one length fill a batch without padding."""

    def num_tokens(self, prompt: str) -> int:
        """The tokens of a prompt, with those that the tokenizer adds, also where it is cut."""
        return len(self.tokenizer(prompt).input_ids)

    @property
    def most_tokens(self) -> int | None:
        """The tokens after which a prompt is cut; None: it is not."""
        return None

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are cut, because they have more than `most_tokens` tokens."""
        return [each for each in prompts if self.most_tokens is not None and self.num_tokens(each) > self.most_tokens]

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> list[Prompt]:
        """Encodes prompts of any length."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Latents:
        """The VAE's posterior of images (B, 3, H, W) in [-1, 1]: float32, as the VAE gives it."""

    @abstractmethod
    def normalized(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) that were drawn from the posterior as the denoiser expects them."""

    @abstractmethod
    def predict(self, noised: Tensor, time: Tensor, prompts: Sequence[Prompt], framings: Sequence[Framing]) -> Tensor:
        """Predicts the target of `noise` from noised latents (B, C, h, w) at times (B,).

        Args:
            noised: The latents.
            time: As `noise` gives them.
            prompts: B prompts; padding has no effect on the result.
            framings: How each image was brought to its size, for families that are conditioned on it.
        """

    # --- generating
    # -----------------------------------------------------------------------------------------------------

    def check_rescale(self, rescale: float, key: str) -> None:
        """Checks that the family can generate with this rescale of guidance.

        Raises:
            ValueError: It cannot; the message begins with the key.
        """
        if rescale and not self.rescales_guidance:
            raise ValueError(f"{key} is not for {self.title}, whose pipeline does not take it: leave it out")

    @abstractmethod
    def encode_for_sampling(self, prompt: Wording, negative_prompt: Wording | None) -> Prompt:
        """Encodes the prompts of one image, for `pipeline_inputs`.

        Args:
            prompt: A prompt of any length; in pieces with weights only where the family `weighs_words`.
            negative_prompt: None is what the family takes without one.
        """

    @abstractmethod
    def pipeline_inputs(
        self, encoded: Sequence[Prompt], *, steps: int, guidance: float, width: int, height: int
    ) -> dict[str, Any]:
        """The arguments of the pipeline for a batch of images.

        Args:
            encoded: From `encode_for_sampling`, one per image, of prompts of one length.
            steps: The number of denoising steps.
            guidance: The scale of classifier-free guidance; 1 is none.
            width: In pixels.
            height: In pixels.
        """

    @property
    def sampling_scheduler(self) -> Any:
        """The model's own scheduler as its pipeline has it; no network is loaded for it."""
        return self.scheduler

    def pipeline(self) -> Any:
        """A diffusers pipeline that shares these components (no copies), without those that were released."""
        pipe = self.make_pipeline({name: self.components[name] for name in self.components.names})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @classmethod
    def pipeline_class(cls) -> Any:
        """The class of diffusers."""
        import diffusers

        return getattr(diffusers, cls.record().pipeline)

    @classmethod
    def vae_class(cls) -> Any:
        """The class of diffusers."""
        import diffusers

        return getattr(diffusers, cls.vae_name)

    def make_pipeline(self, components: dict[str, Any]) -> Any:
        """Builds the pipeline of its components, of which some may be None."""
        return self.pipeline_class()(**components)


def pad_prompts(prompts: Sequence[Prompt], name: str) -> tuple[Tensor, Tensor | None]:
    """Pads embeddings of a batch.

    Args:
        prompts: B prompts.
        name: Which of their tensors, (L, ...) each.

    Returns:
        The embeddings (B, L, ...), L of the longest; and a mask (B, L) that is False where one is padded, or None if
        none is.
    """
    rows = [prompt[name] for prompt in prompts]
    lengths = [len(row) for row in rows]
    text = pad_sequence(rows, batch_first=True)
    if min(lengths) == max(lengths):
        return text, None
    mask = torch.arange(max(lengths), device=text.device) < torch.tensor(lengths, device=text.device)[:, None]
    return text, mask
