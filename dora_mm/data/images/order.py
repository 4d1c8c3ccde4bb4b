"""Which images make up a batch: a function of the seed and of the batch's number."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import floor

import torch

from dora_mm.data.images.buckets import Size
from dora_mm.utils.randomness import generator


class ImageOrder:
    """The images of every batch by its number, from 0, counted across epochs.

    An epoch has every image as often as its repeats say: 2.5 times is 2 and 3 times in turns, and of the images with
    the same repeats some begin with 2, others with 3. Only images of one layout share a batch; the last batch of a
    layout may be smaller. In every epoch images are reshuffled within their layout, then batches among each other.

    Args:
        layouts: The layout of each image: its bucket, and the sizes of its references in their order.
        repeats: How often each occurs in an epoch, more than 0.
        batch_size: Images per batch.
        seed: The seed of the run.

    Raises:
        ValueError: There are no images.
    """

    def __init__(self, layouts: Sequence[tuple[Size, ...]], repeats: Sequence[float], batch_size: int, seed: int):
        if not layouts:
            raise ValueError("There is nothing to train on: the data set has no images.")
        self.layouts, self.repeats, self.batch_size, self.seed = layouts, repeats, batch_size, seed
        counts, seen = Counter(repeats), Counter()
        self.phases = []
        for times in repeats:
            self.phases.append(seen[times] / counts[times])
            seen[times] += 1
        self._starts = [0]  # the number of the first batch of each epoch, as far as they are known
        self.batches_of = lru_cache(maxsize=2)(self._batches_of)

    def __call__(self, number: int) -> list[int]:
        """The indices of the images of batch `number`."""
        epoch = self.epoch(number)
        return self.batches_of(epoch)[number - self._starts[epoch]]

    def epoch(self, number: int) -> int:
        """The epoch of batch `number`."""
        while self._starts[-1] <= number:
            sizes = (len(group) for group in self.groups(len(self._starts) - 1))
            self._starts.append(self._starts[-1] + sum(-(-size // self.batch_size) for size in sizes))
        return bisect_right(self._starts, number) - 1

    def times(self, index: int, epoch: int) -> int:
        """How often an image occurs in an epoch: over all epochs, its repeats on average."""
        before, after = (floor(n * self.repeats[index] + self.phases[index]) for n in (epoch, epoch + 1))
        return after - before

    def groups(self, epoch: int) -> list[list[int]]:
        """The indices of the images of an epoch by layout, each as often as it occurs."""
        found: dict[tuple[Size, ...], list[int]] = {layout: [] for layout in sorted(set(self.layouts))}
        for index, layout in enumerate(self.layouts):
            found[layout] += [index] * self.times(index, epoch)
        return list(found.values())

    def _batches_of(self, epoch: int) -> list[list[int]]:
        stream = generator(self.seed, epoch, "data order")
        batches = []
        for group in self.groups(epoch):
            order = [group[index] for index in torch.randperm(len(group), generator=stream).tolist()]
            batches += [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[index] for index in torch.randperm(len(batches), generator=stream).tolist()]
