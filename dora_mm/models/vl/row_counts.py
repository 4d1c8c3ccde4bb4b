"""Counts of the rows of a training that are not learned as they are."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from dora_mm.utils.day import Day

log = logging.getLogger(__name__)


class RowCounts:
    """The rows of a training's batches that are not learned as they are, and their day: a part of its checkpoints.

    Of several processes the first one writes checkpoints, and each goes on from its numbers. So they are those of all
    processes, as far as `merge` was called after each step.

    Args:
        limit: The number of tokens that a row may have; 0: rows have no such limit.
        day: The day for chat templates that ask for it.

    Attributes:
        num_cut: How many lost text or whole exchanges, because they were too long.
        num_left_out: How many could not be encoded or lost their whole answer, and are missing in their batches.
        longest: The tokens of the longest row, before it was cut, whose loss was computed, also in a validation.
    """

    def __init__(self, limit: int = 0, day: Day | None = None):
        self.limit, self.day = limit, day or Day()
        self.num_cut = self.num_left_out = self.longest = 0
        self._merged = (0, 0)  # rows cut and left out that all processes know of
        self._named: set[str] = set()

    def add(self, num_cut: int, left_out: Iterable[str]) -> None:
        """Counts the rows of a batch whose loss is computed.

        Args:
            num_cut: How many lost text or whole exchanges.
            left_out: A sentence on each row that is missing; it is logged once.
        """
        self.num_cut += num_cut
        for sentence in left_out:
            self.num_left_out += 1
            if sentence not in self._named:
                self._named.add(sentence)
                log.warning("%s; left out of its batch", sentence)

    def numbers(self) -> list[int]:
        """What `merge` takes of each process."""
        return [self.num_cut, self.num_left_out, self.longest, self.day.num_requests]

    def merge(self, every: Sequence[Sequence[int]]) -> None:
        """Adds what other processes have counted since the last call, which all of them make.

        Args:
            every: The `numbers` of all processes, this one among them.
        """
        cut, left_out, longest, requests = zip(*every, strict=True)
        known_cut, known_left_out = self._merged
        self.num_cut = known_cut + sum(number - known_cut for number in cut)
        self.num_left_out = known_left_out + sum(number - known_left_out for number in left_out)
        self._merged = self.num_cut, self.num_left_out
        self.longest, self.day.num_requests = max(longest), max(requests)

    def state_dict(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("num_cut", "num_left_out", "longest", "limit")}
        return found | ({"day": self.day.recorded} if self.day.recorded else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the numbers of a checkpoint.

        Raises:
            ValueError: Rows may have another length now, and one that was seen would be cut in another way; or the
                finished steps have read rows of another day.
        """
        if day := state_dict.get("day"):
            if day != self.day.date:
                raise ValueError(
                    f"model.date: the finished steps have read rows of {day}, and rows have {self.day.date} now: go on "
                    f"with {day}, or start a new run"
                )
            self.day.num_requests = max(1, self.day.num_requests)
        before, longest = state_dict["limit"], state_dict["longest"]
        if before != self.limit and longest > min(before, self.limit):
            raise ValueError(
                f"model.max_length cannot change from {before:,} to {self.limit:,} tokens: the finished steps have "
                f"read rows of up to {longest:,}, which would be cut in another way; go on with {before:,}, or start a "
                "new run"
            )
        self.num_cut, self.num_left_out, self.longest = state_dict["num_cut"], state_dict["num_left_out"], longest
        self._merged = self.num_cut, self.num_left_out
