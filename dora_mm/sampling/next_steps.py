"""Commands to run after a training, which prints them and shows them on its page."""

import json
from pathlib import Path

from dora_mm.config.commands import resuming, twice_as_long
from dora_mm.config.generation import BatchGenerationConfig
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.paths import packaged_configs
from dora_mm.config.schema import PipelineConfig
from dora_mm.config.slider import TrainSliderConfig
from dora_mm.config.vl import TrainVLConfig
from dora_mm.utils.run_directory import SAMPLE_NOW, RunDirectory
from dora_mm.utils.shell import command_line, quoted


def sampling_command(config: TrainDiffusionConfig, run: RunDirectory) -> str:
    """The command that samples the adapter: the prompts file that `dora-mm new` has written, or the config's prompts.

    The seeds are those of the contact sheet, as are the settings that the adapter's file says: see
    `with_usual_settings`.
    """
    words, prompts = ["dora-mm", "sample"], Path(f"{config.name}_prompts.txt")
    if prompts.is_file():
        words.append(str(prompts))
    words += ["--set", f"adapter.path={run.path}"]
    if not prompts.is_file():
        prompt = next(iter(config.sample.prompts), config.data.instance_prompt or "a lighthouse")
        words.append(f"prompts=[{json.dumps(prompt, ensure_ascii=False)}]")
    if config.sample.seeds != BatchGenerationConfig.model_fields["seeds"].default:
        words.append(f"seeds={list(config.sample.seeds)}")
    if "full" not in config.adapter.methods:  # the base is replaced
        words.append("strengths=[0, 1]")
    return command_line(*words)


def sliding_command(config: TrainSliderConfig, run: RunDirectory, prompt: str) -> str:
    """The command that samples a slider with a prompt at several strengths."""
    words = ["dora-mm", "sample", "--set", f"adapter.path={run.path}"]
    words.append(f"prompts=[{json.dumps(prompt or 'a lighthouse', ensure_ascii=False)}]")
    strengths = ", ".join(f"{each:g}" for each in config.sample.strengths)
    return command_line(*words, f"strengths=[{strengths}]")


def scoring_command(run: RunDirectory) -> str:
    """Scores an adapter of images by the training images, without a classifier."""
    config = next(name for name in packaged_configs() if name.endswith("/eval_style.yaml"))
    return command_line("dora-mm", "eval", config, "--set", f"adapter.path={run.path}")


def asking_command(config: TrainVLConfig, run: RunDirectory, request: str = "[IMAGE] QUESTION") -> str:
    """Asks a model with its adapter; a person replaces the words in capitals."""
    return f"dora-mm ask {quoted(config.model.path)} {request} --adapter {quoted(run.path)}"


def next_steps(config: PipelineConfig, run: RunDirectory, done: int, *, finished: bool) -> dict[str, str]:
    """The commands to run next, by their purpose.

    Args:
        config: The config of a training.
        run: Its run directory.
        done: The number of finished steps.
        finished: Whether the training has ended.
    """
    if not finished:
        request = "answers now" if isinstance(config, TrainVLConfig) else "a contact sheet now"
        return {"after a stop": resuming(run), request: f"touch {quoted(run.path / SAMPLE_NOW)}"}
    patience = " evaluate.patience=null" if getattr(getattr(config, "evaluate", None), "patience", None) else ""
    found = {}
    if isinstance(config, TrainDiffusionConfig):
        found = {"generate with it": sampling_command(config, run), "score its style": scoring_command(run)}
    elif isinstance(config, TrainVLConfig):
        found = {"ask it": asking_command(config, run)}
    return found | {"train it longer": f"{resuming(run)} --set {twice_as_long(config, done)}{patience}"}
