"""Config keys of frozen weights that stay in main memory until they are used. See schema.py for the rules."""

import re
from collections.abc import Collection
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, PositiveInt

from dora_mm.config.schema import Section
from dora_mm.config.training import TrainConfig

_GIGABYTES = re.compile(r"(\d+(?:\.\d+)?) ?GB")


class Amount(NamedTuple):
    """How much of a network waits in main memory: one of both is set.

    Attributes:
        blocks: A number of blocks.
        share: A share of the bytes of all blocks.
        num_bytes: A number of bytes.
    """

    blocks: int | None = None
    share: float | None = None
    num_bytes: float | None = None


def _checked(given: int | float | str) -> int | float | str:
    if isinstance(given, float) and not 0 < given <= 1:
        raise ValueError(f"a share is above 0 and at most 1, got {given:g}")
    if isinstance(given, str) and given not in ("all", "auto") and not _GIGABYTES.fullmatch(given):
        raise ValueError(f"must be all, auto, a number of blocks, a share such as 0.5, or 6GB, got {given!r}")
    return given


# How much of the frozen weights waits in main memory: all blocks, a number of them, a share of their bytes such as 0.5,
# or 6GB of them; auto: as much as the GPU needs by the estimate of the dry run
Streamed = Annotated[PositiveInt | float | str, AfterValidator(_checked)]


def amount_of(streamed: int | float | str) -> Amount:
    """What a value of `Streamed` other than auto says."""
    if isinstance(streamed, int):
        return Amount(blocks=streamed)
    if isinstance(streamed, float):
        return Amount(share=streamed)
    found = _GIGABYTES.fullmatch(streamed)
    return Amount(num_bytes=float(found[1]) * 1e9) if found else Amount(share=1.0)


class StreamConfig(Section):
    """Frozen weights that wait in main memory, and are on the GPU while their block computes; no bit differs by it."""

    stream: Streamed | None = None  # blocks of the trained network in main memory: all, auto, 8, 0.5 or 6GB; null: none


class ImageStreamConfig(StreamConfig):
    """The same for image models."""

    stream_text: Streamed | None = None  # of each text encoder, likewise; null: none


def check_streaming(memory: StreamConfig, train: TrainConfig, methods: Collection[str], cache: str) -> list[str]:
    """Finds settings that streamed weights cannot have, or with which they would stay on the GPU after all.

    Args:
        memory: The `memory` section.
        train: The `train` section.
        methods: Those of the adapters.
        cache: The key `adapter.cache`.

    Returns:
        One message per problem, each naming the keys.
    """
    if memory.stream is None:
        return []
    problems = []
    if "full" in methods:
        problems.append("memory.stream is for frozen weights, and adapter.method full trains them: leave it out")
    if cache != "norms":
        problems.append("memory.stream needs adapter.cache norms: else all adapted weights are kept on the GPU")
    if train.shard:
        problems.append("memory.stream is not for train.shard, which gathers weights from other processes: choose one")
    return problems
