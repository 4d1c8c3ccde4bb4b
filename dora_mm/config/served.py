"""The config schema of evaluations whose answers come from a server. See schema.py for the rules."""

from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, field_validator, model_validator

from dora_mm.config.schema import (
    Count,
    OutputFolder,
    PipelineConfig,
    Positive,
    Section,
    Text,
    raise_problems,
)
from dora_mm.config.vl import TextSamplingConfig
from dora_mm.config.vl_data import TaskName, VLDataConfig, missing_splits
from dora_mm.registries.vl_tasks import TASKS

KEY_VARIABLE = "DORA_MM_API_KEY"  # of the environment: the server's key, which is recorded nowhere


class ServerConfig(Section):
    """A server that answers as OpenAI's does: vLLM, SGLang, llama.cpp. Its key comes from DORA_MM_API_KEY."""

    url: Text  # the base URL before /chat/completions, such as http://localhost:8000/v1
    model: Text | None = None  # the served model's name; null: the only one
    concurrency: PositiveInt = 8  # requests at a time
    timeout: Positive = 600.0  # limit of a response in seconds; a longer one counts as missing
    max_bytes: PositiveInt = 2**26  # limit of a response in bytes; a longer one counts as missing

    @field_validator("url")
    @classmethod
    def _is_an_address_without_secrets(cls, given: str) -> str:
        parts = urlsplit(given)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"must be an address such as http://localhost:8000/v1, got {given!r}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"has more than a host and a path: a key belongs into the variable {KEY_VARIABLE}")
        return given.rstrip("/")


class EvalServerConfig(PipelineConfig):
    command: ClassVar[str] = "eval"
    pipeline: Literal["eval_server"]
    output: OutputFolder | None = None  # the run directory; an interrupted one continues; null: runs/<name>/<NNN>
    server: ServerConfig
    prompts: dict[TaskName, Text] = Field(default_factory=dict)  # replace the tasks' own prompts; {text}: the question
    data: VLDataConfig
    decode: TextSamplingConfig = TextSamplingConfig()
    examples: Count = 48  # examples of each task on the HTML page

    @model_validator(mode="after")
    def _a_server_can_answer(self) -> "EvalServerConfig":
        problems = missing_splits(self.data, "valid")
        for task in self.data.all_tasks:
            record, source = TASKS[task.task], task.source_of("valid")
            if record.prompt is None or record.pairs or record.clips:
                problems.append(f"{self.data.key_of(task.task)} is no task that a server answers")
            elif source and record.images != 0 and source.lacks_images:
                problems.append(f"{self.data.key_of(task.task)} has a source without images")
        known = [task.task for task in self.data.all_tasks]
        problems += [
            f"prompts: {name} has no effect: data has no such task" for name in self.prompts if name not in known
        ]
        return raise_problems(self, problems)
