"""Trains the projector and the tower's last stage of the embedded vision-language model; all else is frozen.

First the visual tokens learn to resemble the words for what they show, then captions go through the frozen language
model. No question is among them: answering is left to learn. The scenes are those of the split `captions/pretrain`, of
which samples/vl has none.
"""

import io
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dora_mm.config.loader import dump_config
from dora_mm.utils.atomic import write_atomically
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.tensor_writer import save_tensors
from samples.build.packages import ROOT
from samples.build.pretraining.batches import batch_indices
from samples.build.pretraining.shared_image import SharedImageBatch, SharedImageTask, row_of
from samples.build.pretraining.stages import train_stage
from samples.build.pretraining.tiny_vlm import build_tiny_vlm, trained_parameters
from samples.build.pretraining.vision_end import VisionEnd, features_before
from samples.build.pretraining.words import Words
from samples.build.scenes.build import load_artist, prepare
from samples.build.scenes.files import JPEG_QUALITY, SEED, scenes_of
from samples.build.scenes.pictures import Artist
from samples.build.scenes.scenes import Scene
from samples.build.scenes.sentences import captions
from samples.build.scenes.things import Thing
from samples.build.schema import PretrainTinyVLMConfig

log = logging.getLogger(__name__)
FEATURES = ROOT / "build" / "features"
AT_ONCE = 32  # images whose features are computed together


def main(config: PretrainTinyVLMConfig, *, resume: Path | None = None) -> None:
    """Trains in two stages, and writes the weights to model.safetensors in the run directory.

    Args:
        config: The config.
        resume: The run directory to resume; None: a new run.

    Raises:
        ValueError: A package is missing.
    """
    things, artist = load_artist(prepare())
    model, processor = build_tiny_vlm(weights=None)
    model.requires_grad_(False)
    scenes = scenes_of(things, "captions", "pretrain", config.scenes)
    data = Data(config, things, scenes, features_of(model, artist, scenes))
    run = (
        RunDirectory.resume(resume) if resume else RunDirectory.create(config.name, dump_config(config), config.output)
    )
    tokenizer, end = Tokenizer(processor), VisionEnd(model)
    learn_words(data, model, end, tokenizer, run.stage("words"))
    learn_sentences(data, model, end, tokenizer, run.stage("sentences"))
    trained = {name: parameter.half() for name, parameter in trained_parameters(model).items()}
    save_tensors(run.path / "model.safetensors", trained, {"format": "pt"})
    log.info("The weights are in %s.", run.path / "model.safetensors")


class Tokenizer:
    """Text -> token ids, without special tokens.

    Args:
        processor: The processor of the model.
    """

    def __init__(self, processor: Any):
        self.tokenizer, self.image_id = processor.tokenizer, processor.image_token_id

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Data:
    """Scenes with their features (number, 49, channels); the first `config.held_out` are not trained on."""

    config: PretrainTinyVLMConfig
    things: Sequence[Thing]
    scenes: Sequence[Scene]
    features: np.ndarray

    def features_at(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.features[indices]).float()

    def draw(self, size: int, number: int) -> list[int]:
        """The indices of a batch, none of which is held out."""
        held_out = self.config.held_out
        drawn = batch_indices(len(self.scenes) - held_out, size, number, self.config.seed)
        return [held_out + index for index in drawn]


def features_of(model: Any, artist: Artist, scenes: Sequence[Scene]) -> np.ndarray:
    """The features of all scenes (number, 49, channels), in half precision; they are kept in build/features."""
    file = FEATURES / f"tiny_vlm_{len(scenes)}.npy"
    if not file.exists():
        found, images = [], (compressed(artist.draw(scene)) for scene in tqdm(scenes, "scenes", disable=None))
        while batch := list(islice(images, AT_ONCE)):
            found.append(features_before(model, batch))
        write_atomically(file, lambda partial: save_array(partial, np.concatenate(found)))
    return np.load(file, mmap_mode="r")


def save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:
        np.save(stream, array)


def compressed(image: Image.Image) -> Image.Image:
    """An image as it is after it was saved in samples/vl."""
    content = io.BytesIO()
    image.save(content, "jpeg", quality=JPEG_QUALITY)
    return Image.open(content).convert("RGB")


def learn_words(data: Data, model: Any, end: VisionEnd, tokenizer: Tokenizer, run: RunDirectory) -> None:
    words = Words(model.get_input_embeddings().weight.detach(), tokenizer, data.things)
    with torch.no_grad():
        end.projector.linear_2.bias.copy_(words.mean)
    labels = torch.stack([words.labels(scene) for scene in data.scenes])
    stage = data.config.words

    def batch_at(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = data.draw(stage.train.batch_size, number)
        return data.features_at(indices), labels[indices]

    def loss(batch: tuple[torch.Tensor, torch.Tensor], stream: torch.Generator) -> torch.Tensor:
        return words.loss(end(batch[0]), batch[1])

    train_stage(data.config.seed, stage, {"end": end}, loss, batch_at, run)
    held_out = list(range(data.config.held_out))
    right = words.accuracy(end(data.features_at(held_out)).detach(), labels[held_out])
    log.info("right names %.3f, colours %.3f, sizes %.3f, across %.3f, down %.3f", *right)


def learn_sentences(data: Data, model: Any, end: VisionEnd, tokenizer: Tokenizer, run: RunDirectory) -> None:
    stage, seed = data.config.sentences, data.config.seed
    if stage.train.mixed_precision == "bf16":  # autocast would convert the frozen weights in every step
        model.model.language_model.to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)

    def batch_at(number: int) -> SharedImageBatch:
        indices = data.draw(stage.train.batch_size, number)
        stream = random.Random(f"sentences/{seed}/{number}")
        shuffled = [stream.sample(found, len(found)) for found in (captions(data.scenes[i], SEED) for i in indices)]
        rows = [row_of(each, tokenizer, tokenizer.image_id, data.config.row_length) for each in shuffled]
        return SharedImageBatch(data.features_at(indices), *torch.stack(rows).unbind(1))

    task = SharedImageTask(model, end, tokenizer.image_id)
    if data.config.compile:
        task.language = torch.compile(task.language)
    train_stage(seed, stage, {"end": end}, task.loss, batch_at, run)
