"""A few clips made of scenes, in the formats of TVQA, How2QA, TVC and YC2C, with subtitles and features.

A clip consists of a few shots, each a scene whose objects drift sideways while one line is spoken. There is no video
file: the models for these tasks read features, one vector per 1.5 seconds.

    video/features/<vid_name>.npz      `features`, (T, 512) float16
    video/subtitles.jsonl              of all clips
    video/tvqa_train.jsonl, how2qa_train.jsonl, tvc_train.jsonl, yc2c_train.jsonl, and the same for val
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dora_mm.utils.atomic import write_atomically, write_text
from samples.build.scenes.colors import PAINTS
from samples.build.scenes.pictures import Artist
from samples.build.scenes.scenes import SIZE, Placed, Scene, make_scene
from samples.build.scenes.sentences import background_words, full_name
from samples.build.scenes.things import Thing, with_a

SECONDS = 1.5  # from one feature to the next
WIDTH = 512  # of a feature
GRID = 8  # cells along each side of a frame, whose mean colours make up the features
SHOTS = (3, 4)  # least and greatest number in a clip
FRAMES = (3, 5)  # least and greatest number in a shot
LINES = ("Look, here is {}.", "And now comes {}.", "This is {}.", "Do you see {}?", "There is {}!")


@dataclass(frozen=True)
class Shot:
    """A part of a clip that shows one scene.

    Attributes:
        scene: The scene in the first frame.
        star: The object that questions are about; it is in no other shot.
        line: The subtitle.
        num_frames: The number of frames.
        drift: How far all objects move from one frame to the next, in pixels; positive: to the right.
    """

    scene: Scene
    star: Placed
    line: str
    num_frames: int
    drift: int


@dataclass(frozen=True)
class Clip:
    """A clip: its name and its shots."""

    name: str
    shots: tuple[Shot, ...]

    def span(self, number: int) -> tuple[float, float]:
        """Start and end of a shot, in seconds."""
        start = SECONDS * sum(shot.num_frames for shot in self.shots[:number])
        return start, start + SECONDS * self.shots[number].num_frames

    @property
    def duration(self) -> float:
        """In seconds."""
        return self.span(len(self.shots) - 1)[1]


def make_clip(things: Sequence[Thing], seed: int, split: str, index: int) -> Clip:
    """Makes the clip of an index; a pure function of the arguments."""
    stream = random.Random(f"clip/{seed}/{split}/{index}")
    shots: list[Shot] = []
    seen: set[str] = set()
    num_shots, attempt = stream.randint(*SHOTS), 0
    while len(shots) < num_shots:
        scene = make_scene(things, seed, f"clip/{split}/{index}", attempt)
        attempt += 1
        stars = [placed for placed in scene.only() if placed.color is not None]
        if len(scene.objects) > 3 or not stars or seen & {placed.name for placed in scene.objects}:
            continue
        seen |= {placed.name for placed in scene.objects}
        star = stream.choice(stars)
        line = stream.choice(LINES).format(with_a(full_name(star)))
        shots.append(Shot(scene, star, line, stream.randint(*FRAMES), stream.choice((-3, -2, 2, 3))))
    return Clip(f"clips_{split}_{index:03d}", tuple(shots))


def frames(clip: Clip) -> Iterator[Scene]:
    """The scene of every frame: the objects of a shot drift together, but not beyond the edges of the image."""
    for shot in clip.shots:
        for number in range(shot.num_frames):
            moved = [
                replace(placed, x=min(max(placed.x + shot.drift * number, placed.size // 2), SIZE - placed.size // 2))
                for placed in shot.scene.objects
            ]
            yield replace(shot.scene, objects=tuple(moved))


def frame_features(images: Sequence[Image.Image]) -> np.ndarray:
    """Computes the features of frames.

    A feature is a fixed random projection (of signs) of the mean colours of GRID x GRID cells and of their deviations
    from the frame's mean. The computation uses integers up to the last division, so that the result is bit-identical on
    every machine.

    Args:
        images: T images of frames.

    Returns:
        (T, 512) float16.
    """
    stream = random.Random("features of frames")
    cells = np.stack([np.asarray(p.convert("RGB").resize((GRID, GRID), Image.Resampling.BOX)) for p in images])
    flat = cells.reshape(len(images), -1).astype(np.int64) - 128
    statistics = np.concatenate([flat, np.abs(flat - flat.mean(axis=1, keepdims=True).astype(np.int64))], axis=1)
    signs = np.array([stream.choice((-1, 1)) for _ in range(statistics.shape[1] * WIDTH)])
    return (statistics @ signs.reshape(statistics.shape[1], WIDTH) / 4096).astype(np.float16)


def subtitles(clip: Clip) -> dict[str, Any]:
    """The entry of a clip in subtitles.jsonl."""
    lines = [
        {"text": shot.line, "start": clip.span(number)[0] + 0.25, "end": clip.span(number)[1] - 0.25}
        for number, shot in enumerate(clip.shots)
    ]
    return {"vid_name": clip.name, "sub": lines}


def clip_rows(things: Sequence[Thing], clip: Clip, number: int) -> dict[str, list[dict[str, Any]]]:
    """Makes the entries about a clip.

    Args:
        things: All objects, from which wrong answers are drawn.
        clip: The clip.
        number: The number of the clip among the clips of all splits; ids are derived from it.

    Returns:
        Task -> its entries.
    """
    stream = random.Random(f"rows of {clip.name}")
    questions = [question for shot in range(len(clip.shots)) for question in ask(things, clip, shot, stream)]
    rows: dict[str, list[dict[str, Any]]] = {"tvqa": [], "how2qa": [], "tvc": [], "yc2c": []}
    for task, num_choices in (("tvqa", 5), ("how2qa", 4)):
        for place, (text, truth, wrong, span) in enumerate(questions):
            choices = stream.sample([truth, *stream.sample(wrong, num_choices - 1)], num_choices)
            rows[task].append(
                {
                    "qid": number * 100 + place,
                    "q": text,
                    **{f"a{index}": choice for index, choice in enumerate(choices)},
                    "answer_idx": choices.index(truth),
                    "ts": f"{span[0]:.2f}-{span[1]:.2f}",
                    "vid_name": clip.name,
                    "show_name": "clips",
                }
            )
    for task in ("tvc", "yc2c"):
        for place, shot in enumerate(clip.shots):
            rows[task].append(
                {
                    "vid_name": clip.name,
                    "duration": clip.duration,
                    "ts": list(clip.span(place)),
                    "clip_id": number * 100 + place,
                    "descs": descriptions(shot, number * 100 + place, task),
                }
            )
    return rows


def ask(things: Sequence[Thing], clip: Clip, number: int, stream: random.Random) -> Iterator[tuple[Any, ...]]:
    """Yields questions about a shot: text, correct answer, at least four wrong ones, start and end in seconds."""
    star = clip.shots[number].star
    shown = {placed.name for shot in clip.shots for placed in shot.scene.objects}
    others = stream.sample(sorted({thing.name for thing in things} - shown), 6)
    yield f"What color is the {star.name}?", star.color, [c for c in PAINTS if c != star.color], clip.span(number)
    yield "What is in the picture?", with_a(star.name), [with_a(name) for name in others], clip.span(number)
    if number:
        before = clip.shots[number - 1].star
        others = [before.name, *others[:5]]
        span = (clip.span(number - 1)[0], clip.span(number)[1])
        text = f"What does the picture show after the {before.name} is gone?"
        yield text, with_a(star.name), [with_a(name) for name in others], span


def descriptions(shot: Shot, clip_id: int, task: str) -> list[dict[str, Any]]:
    """The descriptions of a shot: for TVC four, of what is seen (v), said (t) or both (vt); for YC2C one."""
    star = full_name(shot.star)
    texts = [
        ("v", f"{with_a(star)} moves across {background_words(shot.scene)}"),
        ("v", f"{with_a(star)} drifts to the {'right' if shot.drift > 0 else 'left'}"),
        ("t", f"somebody speaks of {with_a(star)}"),
        ("vt", f"{with_a(star)} is shown while somebody speaks of it"),
    ]
    if task == "yc2c":
        texts = [("vt", f"show {with_a(star)}")]
    return [{"desc": text, "desc_id": clip_id * 10 + place, "type": kind} for place, (kind, text) in enumerate(texts)]


def write_clips(folder: Path, things: Sequence[Thing], artist: Artist, numbers: dict[str, int], seed: int) -> None:
    """Writes the files of the layout above.

    Args:
        folder: The folder `video` of that layout.
        things: All objects.
        artist: Draws the frames.
        numbers: Split -> number of clips.
        seed: The seed of the clips.
    """
    clips = [(split, make_clip(things, seed, split, i)) for split, count in numbers.items() for i in range(count)]
    tables: dict[str, list[dict[str, Any]]] = {"subtitles": [subtitles(clip) for _, clip in clips]}
    for number, (split, clip) in enumerate(tqdm(clips, desc="clips", disable=None)):
        features = frame_features([artist.draw(scene) for scene in frames(clip)])
        path = folder / "features" / f"{clip.name}.npz"
        write_atomically(path, lambda partial, features=features: save_npz(partial, features))
        for task, rows in clip_rows(things, clip, number).items():
            tables.setdefault(f"{task}_{split}", []).extend(rows)
    for name, rows in tables.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def save_npz(path: Path, features: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, features=features)
