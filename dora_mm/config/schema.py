"""The schemas of configs: one pydantic model per section and per pipeline.

This module holds what all schemas are made of, the others those of what they configure; pipelines.py lists the recipes.
Types are strict (no "8" for 8, no true for 1), unknown keys are errors, and instances are frozen. All defaults are
defined in these modules and nowhere else. In the comments, null is YAML's null, Python's None.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from enum import Enum
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, field_validator

from dora_mm.config.latest import ADAPTER, numbered
from dora_mm.registries.registry import Registry
from dora_mm.utils.dtypes import full_name

T = TypeVar("T")


# YAML has only lists, which a strict tuple field would reject; the items remain strict.
Items = Annotated[tuple[T, ...], Field(strict=False)]


Text = Annotated[str, Field(min_length=1)]


# How far a larger reference image is scaled down: as the model's pipeline does, to the area of the image that is made
# of it, or to this number of pixels
ReferenceArea = Literal["pipeline", "target"] | PositiveInt


class PathKind(Enum):
    """The kind of path that a key holds; `dora_mm.config.paths` checks it."""

    INPUT = "a file or folder that must exist"
    ADAPTER = "an adapter file, its folder or a run directory, which must exist"
    MODEL = "a file or folder that must exist, or the name of a hub repository"
    FOLDER = "a folder that is written to"
    NEW_FOLDER = "a folder that is written to, and must not exist yet"


_Numbered = AfterValidator(numbered)  # runs/NAME/latest
_NumberedOutput = AfterValidator(partial(numbered, new=True))


InputPath = Annotated[Text, PathKind.INPUT, _Numbered]


AdapterPath = Annotated[Text, PathKind.ADAPTER, AfterValidator(partial(numbered, wanted=ADAPTER))]


ModelPath = Annotated[Text, PathKind.MODEL, _Numbered]


OutputFolder = Annotated[Text, PathKind.FOLDER, _NumberedOutput]


NewFolder = Annotated[Text, PathKind.NEW_FOLDER, _NumberedOutput]


Positive = Annotated[float, Field(gt=0)]


NonNegative = Annotated[float, Field(ge=0)]


Share = Annotated[float, Field(ge=0, lt=1)]


Count = Annotated[int, Field(ge=0)]


Backend = Literal["auto", "torch", "triton"]
# A dtype that may be given as bf16, say
ByShortName = BeforeValidator(
    full_name, json_schema_input_type=Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
)
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], ByShortName]


Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _iso_date(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()  # 20261201 is written as 2026-12-01
    except ValueError:
        raise ValueError("is not a date such as 2026-12-01") from None


IsoDate = Annotated[str, AfterValidator(_iso_date)]


def name_in(registry: Registry[Any]) -> AfterValidator:
    """A validator for names in a registry; an unknown name is refused with the nearest one."""
    return AfterValidator(registry.check)


class Section(BaseModel):
    """Base of every section and pipeline config."""

    # Pairs of keys of which only one can be given: `--set` with one of them removes the other of the file
    exclusive: ClassVar[tuple[tuple[str, str], ...]] = ()

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _text_has_no_nul(cls, value: T) -> T:
        """No file has a NUL character in its name, and no prompt needs one."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and "\0" in text:
                raise ValueError(f"contains a NUL character: {text!r}")
        return value


class PipelineConfig(Section):
    """Base of the config of every pipeline."""

    command: ClassVar[str]  # the dora-mm command that runs this pipeline
    # Keys and sections on which the finished steps of a run do not depend; None: a resumed run finds out by itself
    changeable: ClassVar[tuple[str, ...] | None] = ()
    pipeline: Text  # the recipe that reads this config
    name: Annotated[
        str, Field(pattern=r"^[\w][\w.+-]*$", max_length=200)
    ]  # runs/<name>/<NNN>; left out: the file name without .yaml


@dataclass(frozen=True)
class SectionChoice:
    """Chooses the class of a section that is one of several: `Discriminator(SectionChoice(...).tag_of)`.

    Attributes:
        key: The key whose value names the class, by the `Tag` that it has in the union.
        default: The name where the key is not given.
    """

    key: str
    default: str

    def tag_of(self, value: Any) -> str:
        """The tag of a section, given as keys and values or as an instance."""
        if isinstance(value, Mapping):
            return str(value.get(self.key, self.default))
        return getattr(value, self.key, self.default)


SectionT = TypeVar("SectionT", bound=Section)


def raise_problems(section: SectionT, problems: list[str]) -> SectionT:
    """Ends a model validator of mode "after".

    Returns:
        The section or config, if there are no problems.

    Raises:
        ValueError: There are problems; the message contains all of them.
    """
    if problems:
        raise ValueError("; ".join(problems))
    return section
