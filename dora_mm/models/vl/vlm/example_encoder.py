"""Examples as rows of tokens: what a model is asked in each task, with its images and the answer to learn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dora_mm.data.images.frames import Video, frames_as_video, is_video, load_video
from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.seen import SeenFiles
from dora_mm.data.vl.example import IMAGE, VIDEO, Example, Turn, escaped, leading, pieces_of
from dora_mm.data.vl.image_folder import image_path
from dora_mm.models.chat_templates import rendering_on
from dora_mm.models.vl.vl_model import likeliest_answer
from dora_mm.models.vl.vlm.boxes import with_boxes
from dora_mm.models.vl.vlm.chat import is_prompt, render, render_prompt
from dora_mm.models.vl.vlm.encoding import RowEncoder, TokenRow, collate
from dora_mm.models.vl.vlm.forms import Form
from dora_mm.models.vl.vlm.prompts import EITHER, SAME_IMAGES, SAME_LENGTH, UNBATCHED_MODELS, FallbackPrompts
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.day import Day


class Exchange(NamedTuple):
    """An answer and the turns in front of it, up to the answer before, with their images and videos."""

    turns: Sequence[Turn]
    images: Sequence[Any]
    videos: Sequence[Video]


def exchanges_of(turns: Sequence[Turn], images: Sequence[Any], videos: Sequence[Video]) -> list[Exchange]:
    """The exchanges of a conversation. A question at its end, which has no answer, is in none."""
    found, start, num_images, num_videos = [], 0, 0, 0
    for end, turn in enumerate(turns, 1):
        turns_of_exchange = turns[start:end]
        if turn.role == "assistant" and is_prompt(turns_of_exchange):
            kinds = [kind for each in turns_of_exchange for kind in pieces_of(each.text)[1::2]]
            first, start = (num_images, num_videos), end
            num_images, num_videos = num_images + kinds.count("image"), num_videos + kinds.count("video")
            found.append(Exchange(turns_of_exchange, images[first[0] : num_images], videos[first[1] : num_videos]))
    return found


class ExampleEncoder:
    """Turns examples of tasks into rows, and rows into batches.

    Args:
        processor: The model's processor.
        config: The model's config.
        form: How it computes answers.
        fallback: What it reads without a chat template; None: its processor has one.
        prompts: Prompts that replace those of tasks.
        max_length: The number of tokens that a row may have.
        limit_from: What sets that number: a key of the config, or the model.
        fps: Frames that are read of a second of a video.
        max_frames: The most that are read of a video.
        files: Knows the content of images and videos that were read before.
        day: The day that its chat template may ask for.
        learns_prompts: All text of a row has loss, and not only its answers.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        form: Form,
        fallback: FallbackPrompts | None,
        prompts: Mapping[Any, str],
        max_length: int,
        limit_from: str,
        fps: float,
        max_frames: int,
        files: SeenFiles,
        day: Day,
        *,
        learns_prompts: bool = False,
    ):
        self.processor, self.model_type, self.form, self.fallback = processor, config.model_type, form, fallback
        self.prompts, self.max_length, self.limit_from = prompts, max_length, limit_from
        self.encoder = RowEncoder(processor, config, max_length, limit_from, learns_prompts=learns_prompts)
        self.fps, self.max_frames, self.files, self.day = fps, max_frames, files, day

    # --- rows --------------------------------------------------------------------------------------------------------

    def row(self, task: str, example: Example, folder: str | None, answer: str | None) -> TokenRow:
        """One example as the model reads it.

        Args:
            task: Name of the task.
            example: The example.
            folder: The folder of its images.
            answer: The answer with loss; None: only what the model reads before it answers.

        Raises:
            ValueError: An image cannot be read, or the row cannot be encoded; the message names the row.
        """
        return self.rows(task, example, folder, [answer])[0]

    def answered(self, task: str, example: Example, folder: str | None, answer: str) -> list[TokenRow]:
        """One example with its answer; of a pair with the chosen answer, and with the rejected one. See `row`."""
        if not example.rejected:
            return [self.row(task, example, folder, answer)]
        both = (example, example.with_rejected())
        return self._rows(task, folder, [(one, likeliest_answer(one)) for one in both])

    def rows(self, task: str, example: Example, folder: str | None, answers: Sequence[str | None]) -> list[TokenRow]:
        """One example with each of several answers; see `row`."""
        return self._rows(task, folder, [(example, answer) for answer in answers])

    def _rows(self, task: str, folder: str | None, requests: Sequence[tuple[Example, str | None]]) -> list[TokenRow]:
        """Examples of the same images, each with an answer; see `row`."""
        first, _ = requests[0]
        try:
            visuals = self._visuals(first, folder)
            return [self._row(task, example, visuals, answer) for example, answer in requests]
        except ValueError as error:
            raise ValueError(f"row {first.id} of {task}: {error}") from error

    def _visuals(self, example: Example, folder: str | None) -> tuple[list[Any], list[Video]]:
        """The images and the videos of an example."""
        if example.images and not self.encoder.kinds:
            raise ValueError("it has an image, and the model reads none")
        files = iter([image_path(folder, name) for name in example.images])
        sizes = example.frames or (0,) * len(example.images)
        shown = [list(islice(files, size)) if size else next(files) for size in sizes]
        filmed = [one for one in shown if isinstance(one, list) or is_video(one)]
        if filmed and "video" not in self.encoder.kinds:
            raise ValueError("it has a video, and the model reads none")
        if filmed and len(filmed) < len(shown) and self.model_type in EITHER:
            raise ValueError("it has images and videos, of which the model reads either")
        images = [
            load_rgb(one, "white", self.files.read) for one in shown if not (isinstance(one, list) or is_video(one))
        ]
        return images, list(map(self._video, filmed))

    def _video(self, file: Path | list[Path]) -> Video:
        """A video, from its file or from the images that are its frames."""
        if isinstance(file, list):
            return frames_as_video(file, self.fps, self.max_frames, self.files.read)
        return load_video(file, self.fps, self.max_frames, self.files.check)

    def _row(self, task: str, example: Example, visuals: tuple[list[Any], list[Video]], answer: str | None) -> TokenRow:
        if self.fallback is not None:
            return self._fallback_row(self.fallback, self.prompt(task, example.text), visuals[0], answer)
        turns = self.turns(task, example, answer)
        if example.boxes and example.turns:
            turns = with_boxes(turns, example.boxes, visuals[0], self.processor, self.model_type)
        for text in (piece for turn in turns for piece in pieces_of(turn.text)[::2]):
            self.encoder.check_text(text)
        if answer is None:
            with rendering_on(self.day):
                prompt = render_prompt(self.processor, turns, example.tools)
            return self.encoder.question(prompt, *visuals)
        return self._conversation(exchanges_of(turns, *visuals), example.tools)

    def _conversation(self, exchanges: Sequence[Exchange], tools: str) -> TokenRow:
        """A conversation as a row. One with images that is too long loses its last exchanges until the rest has room.

        One exchange that has none by itself is cut at its end, as texts are: it loses a part of its answer.
        """
        row = full_row = self._rendered(exchanges, tools)
        kept = exchanges
        while row.num_exchanges < len(kept) > 1 and any(each.images or each.videos for each in exchanges):
            kept = exchanges[: max(1, row.num_exchanges)]
            row = self._rendered(kept, tools)
        if kept is exchanges:
            return full_row
        return replace(
            row,
            num_cut=full_row.length + full_row.num_cut - row.length,
            num_image_cut=full_row.num_image_tokens + full_row.num_image_cut - row.num_image_tokens,
            num_exchanges_cut=len(exchanges) - len(kept),
            loses_answer=row.loses_answer or not any(each.turns[-1].loss for each in kept),
        )

    def _rendered(self, exchanges: Sequence[Exchange], tools: str) -> TokenRow:
        turns, images, videos = (list(chain.from_iterable(parts)) for parts in zip(*exchanges, strict=True))
        with rendering_on(self.day):  # here, since batches are prepared in a thread
            rendered = render(self.processor, turns, tools)
        return self.encoder.conversation(*rendered, images, videos)

    def _fallback_row(
        self, fallback: FallbackPrompts, requests: str, images: list[Any], answer: str | None
    ) -> TokenRow:
        if fallback.images == 0:
            return self._text_row(requests if requests[-1:].isspace() else requests + fallback.separator, answer)
        self.encoder.check_text(f"{requests}{fallback.separator}{answer or ''}")
        text = (self.processor.image_token * len(images) if fallback.image_token else "") + requests
        if self.form.continues:
            return self.encoder.question(text, images, answer=None if answer is None else fallback.separator + answer)
        row = self.encoder.question(text, images, ends=True)
        labels = self.encoder.decoder_target(answer or "", self.form.start)
        return replace(row, labels=labels, loses_answer=row.num_cut > 0)  # its question is whole, or it is left out

    def _text_row(self, requests: str, answer: str | None) -> TokenRow:
        """A text that is tokenized as a whole, as language models are trained, answer and end included."""
        if answer is None:
            return self.encoder.question(requests, ())
        text = f"{requests}{answer}{self.processor.tokenizer.eos_token or ''}"
        return self.encoder.conversation(text, [(len(requests), len(text))])

    def turns(self, task: str, example: Example, answer: str | None) -> list[Turn]:
        """The conversation of an example: its own, or the task's prompt with the images in front."""
        if example.turns:
            if answer is not None and TASKS[task].kind == "conversations":
                return [*example.turns]
            turns_of_exchange = [] if answer is None else [Turn("assistant", escaped(answer), True)]
            return [*(self._prompt_turns(task, turn) for turn in example.prompt_turns), *turns_of_exchange]
        turns_of_exchange = [self.prompt(task, example.text), *([] if answer is None else [answer])]
        turns_of_exchange = [escaped(text) for text in turns_of_exchange]
        requests = "".join([*(VIDEO if is_video(name) else IMAGE for name in example.images), turns_of_exchange[0]])
        return [Turn("user", requests, False), *(Turn("assistant", text, True) for text in turns_of_exchange[1:])]

    def _prompt_turns(self, task: str, turn: Turn) -> Turn:
        """A turn of a conversation; a question, of a task that asks questions, has its prompt."""
        if turn.role != "user" or TASKS[task].kind == "conversations":
            return turn
        marks, text = leading(turn.text)
        return turn._replace(text=marks + self.prompt(task, text))

    def prompt(self, task: str, text: str) -> str:
        """The prompt of the model for an example of a task with this text."""
        known = self.fallback.prompt(TASKS[task]) if self.fallback else TASKS[task].prompt
        prompt = self.prompts.get(task, known)
        assert prompt is not None, task  # see `VLM.check`
        return prompt.replace("{text}", text)

    # --- batches -----------------------------------------------------------------------------------------------------

    @property
    def num_groups_differ(self) -> bool:
        """Whether `groups` may find several of any rows, and so more in one batch than in another."""
        return self.model_type in {*SAME_IMAGES, *SAME_LENGTH, *UNBATCHED_MODELS}

    def videos_differ(self, row: TokenRow) -> bool:
        """Whether `groups` may find several in rows with videos: each length of their frames, or images apart."""
        return "pixel_values_videos" in row.inputs and (self.model_type in EITHER or row.frames is not None)

    def groups(self, rows: Sequence[TokenRow]) -> list[list[int]]:
        """The rows, by index, that this class can compute in one batch."""
        groups = defaultdict(list)
        for index, row in enumerate(rows):
            images = row.num_images if self.model_type in SAME_IMAGES else None
            length = row.length if self.model_type in SAME_LENGTH else None
            filmed = "pixel_values_videos" in row.inputs if self.model_type in EITHER else None
            groups[images, length, row.frames, filmed, index if self.model_type in UNBATCHED_MODELS else None].append(
                index
            )
        return list(groups.values())

    def collate(self, rows: Sequence[TokenRow], *, left: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """Rows as one batch; see `encoding.collate`."""
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return collate(rows, pad=pad, left=left)
