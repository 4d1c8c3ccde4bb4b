"""dora-mm import: a config of another trainer as one of ours, with what differs and what has no equal."""

import math
from importlib.util import find_spec
from pathlib import Path

from dora_mm.config import find_path, run_name
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.importing import Translation, translate
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import TrainVLConfig
from dora_mm.data.vl.json_items import json_lines, list_items
from dora_mm.preview.vl_drafts import OF_PAIRS, evaluation_text
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.utils.folders import written_together
from dora_mm.utils.home import expanded
from dora_mm.utils.shell import quoted

SIZES = ("model.max_pixels", "model.min_pixels")  # which not every model takes


def main(file: Path, *, output: str | None = None) -> None:
    """Writes the config, with one of an evaluation where it has validation rows, and prints what a person has to know.

    Args:
        file: A config file of another trainer, or a text file with its command line.
        output: The new file; None: the name of `file` with .yaml, in the current directory, with _dora_mm where that is
            `file` itself.

    Raises:
        ValueError: The file cannot be read, is of no known trainer, or a new file exists.
    """
    source = expanded(file)
    target = expanded(output) if output else default_name(source)
    translation = translate(source)
    leave_out_sizes(translation)
    if translation.part_of_epochs:
        put_steps(translation)
    put_steps_between(translation)
    evaluation = target.with_name(f"{target.stem}_eval.yaml")
    if target.exists():  # the last to appear
        raise ValueError(f"{target} exists already: --output NEW.yaml names a new file")
    texts = {target: translation.text(source, target)}
    config = None if translation.missing else translation.config()
    if isinstance(config, TrainVLConfig) and config.data.all_tasks[0].valid:
        texts[evaluation] = evaluation_text(target, evaluation, config, metric_of(config))
    with written_together(target.parent, last=target.name) as folder:
        for path, text in texts.items():
            (folder / path.name).write_text(text, encoding="utf-8")
    for title, lines in translation.report().items():
        print(f"{title}:", *(f"  {line}" for line in lines), sep="\n")
    if translation.values.get("adapter.method") == "lora":
        print("method    lora, as before; for DoRA set adapter.method: dora in the new file")
    print(f"written   {', '.join(map(str, texts))}\nnext\n  dora-mm train {quoted(target)} --dry-run")
    if evaluation in texts:
        print(f"  dora-mm eval {quoted(evaluation)}   # after the training: the score of its validation rows")


def default_name(source: Path) -> Path:
    """The name of the new config in the current directory, which is not that of the file that is read."""
    target = Path(f"{run_name(source)}.yaml")
    return target if target.absolute() != source.absolute() else Path(f"{run_name(source)}_dora_mm.yaml")


def leave_out_sizes(translation: Translation) -> None:
    """Leaves out limits of images that the model does not take; one that is not on this machine is not checked."""
    values, path = translation.values, str(translation.values.get("model.path", ""))
    given = [key for key in SIZES if key in values]
    if not given or not path or find_path(path) is None or find_spec("transformers") is None:
        return
    from dora_mm.models.folders import read_config  # these need the extra vl
    from dora_mm.models.vl.vlm.image_limits import limits_of
    from dora_mm.models.vl.vlm.loading import load_processor

    try:
        config = read_config(path, None)
        processor = load_processor(VLMModelConfig(path=path), config)
    except ValueError as error:
        translation.differs(f"Whether the model takes {', '.join(given)} was not checked: {error}.")
        return
    known = limits_of(processor, config) if processor.image_processor is not None else {}
    others = " or ".join(f"model.{name}" for name in known) or "no limit"
    for key in given:
        if key.partition(".")[2] not in known:
            source = translation.sources.pop(key, key)
            translation.has_no_equal(source, values.pop(key), f"{path} takes {others}")


def put_steps(translation: Translation) -> None:
    """Puts the steps of a part of an epoch where its rows can be counted, as transformers' Trainer does."""
    assert translation.part_of_epochs
    key, epochs = translation.part_of_epochs
    found = num_rows(translation)
    if found is None:
        translation.differs(
            f"{key} is {epochs:g}, and train.epochs a whole number: {translation.values['train.epochs']} is written. "
            f"For {epochs:g} give train.steps instead: {epochs:g} x rows / (batch_size x gradient_accumulation_steps)."
        )
        return
    rows, held_out = found
    batches = math.ceil(rows / int(translation.values["train.batch_size"]))
    accumulated = int(translation.values.get("train.gradient_accumulation_steps", 1))
    steps = math.ceil(epochs * math.ceil(batches / accumulated))
    del translation.values["train.epochs"]
    translation.put("train.steps", steps, key)
    of = (
        f"about {rows:,} of {rows + held_out:,} rows, without the held-out ones (the dry run counts them)"
        if held_out
        else f"{rows:,} rows"
    )
    translation.differs(f"{key} is {epochs:g}: train.steps is {steps}, for {of}.")


def put_steps_between(translation: Translation) -> None:
    """Puts in steps what another trainer does every so many epochs, where its images can be counted."""
    if not translation.every_epochs:
        return
    from dora_mm.train.epochs import views_per_epoch

    values = translation.values
    try:
        config = None if translation.missing else translation.config()
        views = views_per_epoch(config.data) if isinstance(config, TrainDiffusionConfig) else None
    except ValueError:  # the dry run says what is wrong with the images
        views = None
    for ours, (key, epochs) in translation.every_epochs.items():
        if ours == "sample.every" and "sample.prompts" not in values:
            translation.has_no_equal(key, epochs, "sample.prompts is empty")
            continue
        if views is None:
            reason = f"{ours} counts steps: give {epochs} x images x repeats / batch size"
            translation.has_no_equal(key, epochs, reason)
            continue
        per_step = int(values["train.batch_size"]) * int(values.get("train.gradient_accumulation_steps", 1))
        translation.put(ours, epochs * math.ceil(views / per_step), f"{key} {epochs}")


def num_rows(translation: Translation) -> tuple[int, int] | None:
    """How many rows are trained on, and how many are held out where each has an image of its own.

    None: a file is not on this machine, or neither JSON nor JSON lines.
    """
    values = translation.nested["data"]
    sources = [values["train"], *values.get("more", ())] if "train" in values else []
    counts = []
    for source in sources:
        path = Path(str(source["file"]))
        if not path.is_file() or path.suffix not in (".json", ".jsonl"):
            return None
        number = sum(1 for _ in (json_lines if path.suffix == ".jsonl" else list_items)(path))
        counts.append(min(number, source.get("limit", number)))
    share = values.get("valid", {}).get("share", 0)
    held_out = max(1, round(share * sum(counts))) if share else 0
    return (sum(counts) - held_out, held_out) if counts else None


def metric_of(config: TrainVLConfig) -> str:
    """The metric of the first task, as the end of a sentence."""
    if TASKS[config.data.all_tasks[0].task].pairs:
        return OF_PAIRS
    return "exact match, with ROUGE-L beside it (data.task: chat_sentences, in both files, puts ROUGE-L first)"
