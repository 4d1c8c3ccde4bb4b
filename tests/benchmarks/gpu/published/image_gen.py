"""FLUX.2 klein on images of one cat as PEFT's method comparison trains it, scored by DINOv2."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.training_utils import offload_models
from peft import get_peft_model
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel

from tests.benchmarks.gpu.published.inputs import Inputs, shuffled
from tests.benchmarks.gpu.published.record import lora_config

EVALUATION, DRIFT = 100_000, 100_000_000  # added to the seed, so that images begin with other noise than trainings
TEST_REPEATS = 3


class ImageGeneration:
    """The transformer of a pipeline that learns images, with the latents and prompts that are computed once."""

    scores_apart = True
    frees_every = 0

    def __init__(self, inputs: Inputs, device: torch.device, settings: dict[str, Any], adapter: dict[str, Any]):
        self.inputs, self.device, self.settings = inputs, device, settings
        self.dtype = getattr(torch, settings["dtype"])
        folder = inputs.model(settings["model_id"])
        self.pipeline: Any = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=self.dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        transformer = self.pipeline.transformer.to(device)
        if settings["use_gc"]:
            transformer.enable_gradient_checkpointing()
        self.config = lora_config(adapter)
        kept = settings["autocast_adapter_dtype"]
        self.model: Any = get_peft_model(transformer, self.config, autocast_adapter_dtype=kept)
        self.pipeline.transformer = self.model
        dino = inputs.model(settings["dino_model_id"])
        self.processor, self.dino = AutoImageProcessor.from_pretrained(dino), AutoModel.from_pretrained(dino).to(device)
        self.num_samples, self.num_tokens = 0, []

    @torch.no_grad()
    def prepare(self) -> None:
        """Divides the images, encodes images and prompts, and lets the text encoder go."""
        paths, prompts = self.inputs.images(), self.settings["instance_prompts"]
        if len(paths) != len(prompts):
            raise ValueError(
                f"{self.inputs.folder / 'cats'} has {len(paths)} images, and there are {len(prompts)} prompts."
            )
        rows = [
            (ImageOps.exif_transpose(Image.open(path).convert("RGB")), prompt)
            for path, prompt in zip(paths, prompts, strict=True)
        ]
        order, num_tests = shuffled(len(rows)), self.settings["test_size"]
        num_trained = len(rows) - num_tests - self.settings["valid_size"]
        trained, validation, tests = order[:num_trained], order[num_trained:-num_tests], order[-num_tests:]
        self.validation, self.tests = [rows[row] for row in validation], [rows[row] for row in tests]
        later = [prompt for _, prompt in self.validation + self.tests] + self.settings["drift_image_prompts"]
        with offload_models(self.pipeline.text_encoder, device=self.device):
            self.texts = torch.cat([self.encoded(rows[row][1]) for row in trained])
            self.encodings = {prompt: self.encoded(prompt) for prompt in ["", *later]}
        self.pipeline.text_encoder = None
        images, size = [rows[row][0] for row in trained], self.settings["batch_size"]
        batches = [images[start : start + size] for start in range(0, len(images), size)]
        with offload_models(self.pipeline.vae, device=self.device):
            self.latents = torch.cat([self.latents_of(batch) for batch in batches])
        self.noise = torch.Generator(self.device).manual_seed(self.settings["seed"])
        self.order = self.permutations(self.settings["max_steps"] * self.settings["batch_size"])
        self.levels = copy.deepcopy(self.pipeline.scheduler)

    def permutations(self, count: int) -> Tensor:
        """The rows of the steps: all in another order, again and again."""
        size = len(self.latents)
        times = self.settings["repeats"]
        found = [torch.randperm(size, generator=self.noise, device=self.device) for _ in range(times)]
        if count > size * times:
            raise ValueError(f"{count} rows are trained on, and {times} repeats of {size} images are fewer.")
        return torch.cat(found)

    def encoded(self, prompt: str) -> Tensor:
        length, layers = self.settings["max_sequence_length"], self.settings["text_encoder_out_layers"]
        return self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=length, text_encoder_out_layers=layers
        )[0]

    def latents_of(self, images: Sequence[Image.Image]) -> Tensor:
        """The normalized latents of images, which are stretched to squares."""
        vae, side = self.pipeline.vae, self.settings["resolution"]
        squares = [image.resize((side, side), Image.Resampling.BILINEAR) for image in images]
        pixels = torch.from_numpy(self.pipeline.image_processor.pil_to_numpy(squares)).permute(0, 3, 1, 2) * 2 - 1
        pixels = pixels.contiguous().to(self.device, self.dtype)
        patches = self.pipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())
        mean, variance = (each.view(1, -1, 1, 1).to(patches) for each in (vae.bn.running_mean, vae.bn.running_var))
        return (patches - mean) / (variance + vae.config.batch_norm_eps).sqrt()

    def loss(self, step: int) -> Tensor:
        size = self.settings["batch_size"]
        rows = self.order[(step - 1) * size : step * size]
        self.num_samples += len(rows)
        latents, text = self.latents[rows], self.texts[rows]
        noise = torch.randn(latents.shape, generator=self.noise, device=self.device, dtype=latents.dtype)
        at = (torch.rand(len(rows)) * self.levels.config.num_train_timesteps).long()
        sigma = self.levels.sigmas[at].to(latents).view(-1, 1, 1, 1)
        found = self.model(
            hidden_states=self.pipeline._pack_latents((1 - sigma) * latents + sigma * noise),
            timestep=self.levels.timesteps[at].to(self.device) / 1000,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=self.pipeline._prepare_text_ids(text).to(self.device),
            img_ids=(positions := self.pipeline._prepare_latent_ids(latents).to(self.device)),
            return_dict=False,
        )[0]
        predicted = self.pipeline._unpack_latents_with_ids(found, positions)
        return F.mse_loss(predicted.float(), (noise - latents).float())

    def validate(self) -> dict[str, float]:
        return {"dino_similarity": self.similarity(self.validation, 1)}

    def test(self) -> dict[str, float]:
        return {"dino_similarity": self.similarity(self.tests, TEST_REPEATS), "drift": self.drift()}

    def similarity(self, rows: Sequence[tuple[Image.Image, str]], repeats: int) -> float:
        """The mean cosine of the features of images and of those that are generated for their prompts."""
        generator = torch.Generator(self.device).manual_seed(self.settings["seed"] + EVALUATION)
        wanted = self.features([image for image, _ in rows])
        found = [self.features(self.images([prompt for _, prompt in rows], generator)) for _ in range(repeats)]
        return torch.stack([(each * wanted).sum(-1).mean() for each in found]).mean().item()

    def drift(self) -> float:
        """Half of 1 - the mean cosine of images with the adapter and without, for prompts of other things."""
        seed, prompts = self.settings["seed"] + DRIFT, self.settings["drift_image_prompts"]
        with self.model.disable_adapter():
            before = self.features(self.images(prompts, torch.Generator(self.device).manual_seed(seed)))
        after = self.features(self.images(prompts, torch.Generator(self.device).manual_seed(seed)))
        return (1 - (before * after).sum(-1).mean().item()) / 2

    def images(self, prompts: Sequence[str], generator: torch.Generator) -> list[Image.Image]:
        """Generated images, one by one."""
        side = self.settings["resolution"]
        options = {"num_inference_steps": self.settings["num_inference_steps"], "height": side, "width": side}
        options |= {"guidance_scale": self.settings["guidance_scale"], "generator": generator}
        options["negative_prompt_embeds"] = self.encodings[""]
        with offload_models(self.pipeline.vae, device=self.device):
            return [self.pipeline(prompt_embeds=self.encodings[each], **options).images[0] for each in prompts]

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """The normalized features (B, D) of DINOv2."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        return F.normalize(self.dino(**inputs).last_hidden_state[:, 0], dim=-1)
