"""Scores a model where it is served, by an OpenAI-compatible server, on validation or test splits."""

import logging
from functools import partial
from pathlib import Path

from dora_mm.config.served import EvalServerConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.image_folder import image_path
from dora_mm.data.vl.splits import ValidationSet, open_split
from dora_mm.eval.vl.predictions.scored import UNKNOWN
from dora_mm.eval.vl.reports import write_answers, write_examples, write_report
from dora_mm.models.vl.server import Server, ServerAnswers
from dora_mm.registries.suites import suite_file
from dora_mm.sampling.answers import AnswersFolder, answer_all, mixed_circumstances
from dora_mm.train.run import check_reopened, evaluation_run
from dora_mm.train.validation import main_values
from dora_mm.utils.digest import files_digest
from dora_mm.utils.processes import num_started
from dora_mm.utils.threads import as_completed

log = logging.getLogger(__name__)
ANSWERS = "answers"  # the folder of a run
FREE = ("name", "server.timeout", "server.max_bytes", "server.concurrency")  # keys that change no answer that arrives


def main(config: EvalServerConfig, *, resume: Path | None = None) -> None:
    """Answers the splits by the server, scores the answers and prints the report.

    Writes to the run directory what `eval_vl` does; the same evaluation goes on from answers/ if `output` names it.

    Args:
        config: The config.
        resume: Unused: the same command goes on.

    Raises:
        ServerError: The server does not answer.
        ValueError: It refuses a row, the data cannot be used, `output` is that of another evaluation, or several
            processes were started.
    """
    if num_started() > 1:
        raise ValueError("eval_server asks server.concurrency rows at a time in one process: start it without torchrun")
    server = Server(config.server)
    served = ServerAnswers(server, server.model(), config.decode, config.prompts)
    splits = splits_of(config, served)
    inputs = inputs_of(served, splits)
    check_reopened(config, inputs, FREE)
    answers = {name: served.answerer(name) for name in splits}
    with evaluation_run(config, inputs, FREE) as run:
        kept = AnswersFolder(run.path / ANSWERS, images_digest)
        answered = answer_all(
            answers, (), splits, 1, mapped=partial(as_completed, config.server.concurrency), folder=kept
        )
        settings = {"decode": config.decode.model_dump(mode="json"), "server": {"model": served.model}}
        log.info("The day that the chat template of the server gets, if it asks for one, is not known here")
        notes = {name: mixed_circumstances(kept.path, name) for name in answered}
        scores = write_answers(run.path, answered, settings, inputs, config.prompts, notes, UNKNOWN)
        unscored = [name for name in answered if name not in scores]
        write_report(run.path, config.name, scores, unscored, main_values(scores))
        folders = {name: split.images for name, split in splits.items()}
        write_examples(run.path, config.name, answered, folders, config.examples)


def splits_of(config: EvalServerConfig, served: ServerAnswers) -> dict[str, ValidationSet]:
    """The rows of each task that can be sent.

    Raises:
        ValueError: As in `open_split`.
    """
    found = {}
    for task in config.data.all_tasks:
        source = task.source_of("valid")
        assert source is not None
        found[task.task] = ValidationSet(open_split(task, "valid", config.data, served), source.images)
    return found


def images_digest(example: Example, folder: str | None) -> str:
    """Changes with the images of an example."""
    return files_digest(image_path(folder, name) for name in example.images)


def inputs_of(served: ServerAnswers, splits: dict[str, ValidationSet]) -> dict[str, str]:
    """The inputs of the answers: the rows, the suites, and the name that the server gives its model."""
    inputs = {f"the data of {name}": found.identity for name, found in splits.items()}
    inputs |= {f"the suite {name}": files_digest([file]) for name in splits if (file := suite_file(name))}
    return inputs | {"the model of the server": served.model}
