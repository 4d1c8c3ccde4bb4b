"""Our keys while a config is imported: what was found, what differs, what has no equal, and the text of the file."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dora_mm.config.importing.foreign import TITLES, Foreign
from dora_mm.config.models import validated
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.config.report import all_keys, describe
from dora_mm.config.schema import PipelineConfig
from dora_mm.registries.optimizers import OPTIMIZERS
from dora_mm.registries.other_trainers import KEYS, NO_EFFECT, VALUES
from dora_mm.utils import yaml12
from dora_mm.utils.messages import shown
from dora_mm.utils.shell import comment, quoted

MISSING = "is missing"  # in messages about keys that have to be given
WIDTH = 117  # of a line of comments
WITH_A_REASON = {
    "trust_remote_code": "no code from a model's folder is ever run; models are those that transformers has itself",
    "sample_sampler": "contact sheets use the model's own scheduler; `dora-mm sample` takes `scheduler`",
    "output_dir": "runs go to runs/NAME/001 and so on; `output` names another folder",
}
PATHS = {  # keys whose values may be files or folders beside the other config
    *("model.path", "model.vae", "adapter.init_from", "adapter.assistant.path", "data.folder", "data.folders"),
    *("data.references", "data.mask.folder", "data.train.file", "data.train.images", "data.more", "data.valid"),
}
PATHS_WITHIN = ("path", "masks", "file", "images")


class Translation:
    """A config that is being imported.

    Attributes:
        trainer: The other trainer.
        values: Our values by dotted key.
        sources: The other trainer's key by dotted key of ours.
        differences: What another result may come from, a sentence each.
        without_equal: The other trainer's keys that have none here, with their values and a reason, which may be empty.
        not_needed: The other trainer's keys that have no effect on what is trained.
        missing: Our keys that have to be given, which the other config does not say.
        every_epochs: The key and the number of epochs, by our dotted key, which counts steps.
        part_of_epochs: The key and the number of epochs, where that is no whole number; None: it is one.
    """

    def __init__(self, trainer: str):
        self.trainer = trainer
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.differences: list[str] = []
        self.without_equal: list[tuple[str, Any, str]] = []
        self.not_needed: list[str] = []
        self.missing: list[str] = []
        self.every_epochs: dict[str, tuple[str, int]] = {}
        self.part_of_epochs: tuple[str, float] | None = None

    def put(self, key: str, value: Any, source: str = "") -> None:
        """Sets a key of ours, unless the value is None."""
        if value is not None:
            self.values[key] = VALUES[key].get(str(value).lower(), str(value).lower()) if key in VALUES else value
            if source:
                self.sources[key] = source

    def take(self, foreign: Foreign, names: Mapping[str, str]) -> None:
        """Takes keys that need no more than another name.

        Args:
            foreign: The other config.
            names: Our dotted keys by theirs.
        """
        for theirs, ours in names.items():
            self.put(ours, foreign.take(theirs), theirs)

    def take_known(self, foreign: Foreign) -> None:
        """Takes what is left of the keys whose meaning does not depend on the trainer."""
        ours = set(all_keys(SCHEMAS[self.values["pipeline"]])) - set(self.values)
        self.take(foreign, {key: KEYS[key] for key in list(foreign.left) if KEYS.get(key) in ours})

    def differs(self, sentence: str) -> None:
        """Adds a sentence on what is not the same here."""
        self.differences.append(sentence)

    def has_no_equal(self, key: str, value: Any, reason: str = "") -> None:
        """Adds a key of the other trainer that has no equal here."""
        self.without_equal.append((key, value, reason))

    def finish(self, foreign: Foreign) -> None:
        """Lists the keys that nobody has taken, finds the paths, and leaves out what our schema refuses."""
        foreign.drop(*(key for key in foreign.left if key in NO_EFFECT))
        self.not_needed += [key for key in foreign.dropped if key not in WITH_A_REASON]
        for key, value in foreign.dropped.items():
            if key in WITH_A_REASON:
                self.has_no_equal(key, value, WITH_A_REASON[key])
        for key, value in foreign.left.items():
            if value not in (None, "", False, [], {}):
                self.has_no_equal(key, value, WITH_A_REASON.get(key, ""))
        self._differs_without_gpu()
        for key in PATHS & self.values.keys():
            self.values[key] = _located(self.values[key], foreign)
        self.sources = {key: self._given(source, foreign) for key, source in self.sources.items()}
        self._leave_out_refused()

    def _differs_without_gpu(self) -> None:
        name = self.values.get("optimizer.name")
        if isinstance(name, str) and name in OPTIMIZERS and OPTIMIZERS[name].needs_gpu:
            self.differs(f"optimizer.name {name} needs a GPU. Without one: --set optimizer.name=adamw")

    @property
    def nested(self) -> dict[str, Any]:
        """The values as sections, in the order of the schema."""
        found: dict[str, Any] = {}
        order = list(SCHEMAS[self.values["pipeline"]].model_fields)
        for key in sorted(self.values, key=lambda key: order.index(key.partition(".")[0])):
            *sections, last = key.split(".")
            node = found
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = self.values[key]
        return found

    def config(self) -> PipelineConfig:
        """The new config, of which no key is missing."""
        return validated(SCHEMAS[self.values["pipeline"]], {"name": "imported", **self.nested})

    def _leave_out_refused(self) -> None:
        schema = SCHEMAS[self.values["pipeline"]]
        for _ in range(len(self.values)):
            try:
                validated(schema, {"name": "imported", **self.nested})
                return
            except ValidationError as error:
                problems = describe(error, schema, {})
            refused = False
            for problem in problems:
                refused_keys = (problem.key or problem.message, f"{problem.key}.{problem.message}")
                key = next((key for key in self.values if any(_is_within(name, key) for name in refused_keys)), None)
                if key is None or MISSING in problem.message:
                    continue
                self.has_no_equal(self.sources.pop(key, key), self.values.pop(key), problem.message)
                refused = True
            if not refused:
                self.missing = [str(problem) for problem in problems]
                return

    def text(self, source: Path, target: Path) -> str:
        """The YAML file: its head says what differs and what has no equal, its lines the other trainer's keys."""
        head = [
            f"dora-mm train {quoted(target)}",
            "",
            f"Imported from {source.name} ({TITLES[self.trainer]}), whose keys stand behind ours.",
            *self._remarks(),
        ]
        return f"{comment(chr(10).join(head))}\n{self._body()}"

    def _remarks(self) -> list[str]:
        lines = [
            line
            for title, found in self.report().items()
            for line in ("", f"{title}:", *(f"- {each}" for each in found))
        ]
        return [shortened for line in lines for shortened in _wrapped(line)]

    def report(self) -> dict[str, list[str]]:
        """What a person has to know, as lists of sentences by their titles; empty lists are left out."""
        without = [
            f"{key}: {shown(value, 80)}" + (f" ({reason})" if reason else "")
            for key, value, reason in self.without_equal
        ]
        found = {"Still missing": self.missing, "What differs": self.differences, "No equal here, or unknown": without}
        found["Not needed here"] = [", ".join(self.not_needed)] if self.not_needed else []
        return {title: each for title, each in found.items() if each}

    def _given(self, source: str, foreign: Foreign) -> str:
        """The keys of a source that the config has; without one, that the value is the other trainer's default."""
        words = source.split(", ")
        there = [foreign.names.get(word, word) for word in words if word in foreign.given or not word.isidentifier()]
        if there:
            return ", ".join(dict.fromkeys(there))
        return f"{words[0]}, default of {TITLES[self.trainer]}"

    def _body(self) -> str:
        text = yaml12.write(self.nested)
        lines, at = text.split("\n"), yaml12.read(text).lines
        for key, source in self.sources.items():
            number = at.get(tuple(key.split("."))) if key in self.values else None
            if number is not None:
                lines[number - 1] += f" # {source}"
        return "\n".join(lines)


def _located(value: Any, foreign: Foreign) -> Any:
    """Relative paths as they are seen from the current directory, where they lie in the folder of the config."""
    if isinstance(value, str):
        found = foreign.file(value)
        return str(found) if found.exists() else value
    if isinstance(value, list):
        return [_located(each, foreign) for each in value]
    if isinstance(value, dict):
        return {key: _located(each, foreign) if key in PATHS_WITHIN else each for key, each in value.items()}
    return value


def _is_within(where: str, key: str) -> bool:
    """Whether a problem is that of a key: at it, inside it, or in its section's message that begins with the key."""
    path = where.split(" ")[0].rstrip(":")
    return path == key or path.startswith((f"{key}.", f"{key}["))


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False) or [""]
