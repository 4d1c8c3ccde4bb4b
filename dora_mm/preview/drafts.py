"""A config that `dora-mm new` writes: what it is made of, its files, and the commands that come next."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dora_mm.config import load_config, resolve_model, resolve_path
from dora_mm.config.paths import PACKAGE
from dora_mm.models.hub import local_copy
from dora_mm.utils.folders import written_together
from dora_mm.utils.shell import command_line, comment, quoted
from dora_mm.utils.yaml12 import KeyPath, edited, without_comment

Changes = dict[KeyPath, Any]
COUNTED: tuple[KeyPath, ...] = (("adapter", "parts"), ("tokens",))  # comments there count what the recipe's model has
SCHEMA = PACKAGE / "config" / "schema.json"  # what editors check a config against, of dora-mm schema


class Draft(NamedTuple):
    """A config to write, and its sources.

    Attributes:
        family: A key of `starts()`.
        file: The new config.
        recipe: The packaged config to start from.
        images: The folder of images; None: it is not given.
        references: Folders of reference images.
        data: The file of vision-language data; None: there are captions.
        model: The model; None: the recipe's.
        follow_links: Whether links that lead out of a folder of images are followed.
        reason: Why it is this recipe, to be printed behind it.
    """

    family: str
    file: Path
    recipe: str
    images: str | None
    references: tuple[str, ...]
    data: str | None
    model: str | None
    follow_links: bool = False
    reason: str = ""

    def prompts(self, suffix: str = ".txt") -> Path:
        """The file of prompts next to the config."""
        return self.file.with_name(f"{self.file.stem}_prompts{suffix}")

    @property
    def run(self) -> str:
        """The first run of the config."""
        return f"runs/{self.file.stem}/001"


def folder_of_images(draft: Draft) -> str:
    """The folder of images, which has to be given."""
    if draft.images is None:
        raise ValueError("--images is missing: the folder of your images")
    return draft.images


def write_files(
    draft: Draft, changes: Mapping[KeyPath, Any], about: str, others: Callable[[Any], Mapping[Path, str]] | None = None
) -> Any:
    """Writes the recipe with changes, under its own head, and other files together with it.

    Args:
        draft: The config to write.
        changes: The values that differ from those of the recipe.
        about: The head of the file, behind its command.
        others: The texts of other files by their paths beside the config, from this config; None: there are none.

    Returns:
        The config as it is read again.

    Raises:
        ValueError: A file exists already.
    """
    lines = resolve_path(draft.recipe).read_text(encoding="utf-8").split("\n")
    body = lines[next(number for number, line in enumerate(lines) if not line.startswith("#")) :]
    head = [head_of("train", draft.file, about), f"# yaml-language-server: $schema={SCHEMA.as_uri()}"]
    text = edited("\n".join([*head, *body]), changes)
    for path in COUNTED if draft.model is not None else ():
        text = without_comment(text, path)
    with written_together(draft.file.parent, last=draft.file.name) as folder:
        (folder / draft.file.name).write_text(text, encoding="utf-8")
        if others:
            for path, content in others(load_config(folder / draft.file.name)).items():
                (folder / path.name).write_text(content, encoding="utf-8")
    return load_config(draft.file)


def head_of(command: str, file: Path, about: str) -> str:
    """The comment on top of a config, which begins with the command that reads it."""
    return comment(f"dora-mm {command} {quoted(file)}\n\n{about}")


def print_next(config: Any, commands: Mapping[str, Sequence[object]]) -> None:
    """Prints how to get the model, if it is not on this machine, and the commands that follow, each with its reason."""
    path = config.model.path
    if local_copy(resolve_model(path), config.model.revision) is None:
        download = f"hf download {quoted(path)}"
        print(f"model     {path} is not on this machine: the training downloads it; before that: {download}")
        print("          or --model PATH takes one that you have")
    print_commands(commands)


def print_commands(commands: Mapping[str, Sequence[object]]) -> None:
    """Prints the commands that follow, each with its reason."""
    lines = {what: f"  dora-mm {command_line(*words)}" for what, words in commands.items()}
    width = max(map(len, lines.values()))
    print("next")
    for what, line in lines.items():
        print(f"{line:<{width}}   # {what}")
