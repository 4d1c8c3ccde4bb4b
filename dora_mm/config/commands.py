"""The commands by which a person goes on with a training: it prints them, and its page shows them."""

from dora_mm.config.schema import PipelineConfig
from dora_mm.utils.run_directory import RunDirectory
from dora_mm.utils.shell import quoted


def resuming(run: RunDirectory) -> str:
    """The command that resumes a run."""
    return f"dora-mm train --resume {quoted(run.path)}"


def twice_as_long(config: PipelineConfig, steps: int) -> str:
    """The override that doubles the length of a training."""
    epochs = getattr(getattr(config, "train", None), "epochs", None)
    return f"train.epochs={2 * epochs}" if epochs else f"train.steps={2 * steps}"
