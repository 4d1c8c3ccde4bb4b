"""Which blocks wait in main memory, and how settings say it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from dora_mm.config.adapter import ImageAdapterConfig
from dora_mm.config.images import ImageTrainConfig
from dora_mm.config.streaming import Amount, StreamConfig, amount_of, check_streaming
from dora_mm.core.wrappers.streaming import is_streamed
from dora_mm.models.streaming import blocks_to_stream, chosen, freed, least_that_frees, streamable_blocks

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("value", "amount"),
    [
        ("all", Amount(share=1.0)),
        (12, Amount(blocks=12)),
        (0.5, Amount(share=0.5)),
        ("6GB", Amount(num_bytes=6e9)),
        ("0.5 GB", Amount(num_bytes=0.5e9)),
    ],
)
def test_what_settings_say(value, amount):
    given = StreamConfig(stream=value).stream
    assert given is not None
    assert amount_of(given) == amount


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.0, "half", "6", True, "GB"])
def test_other_settings_are_refused(value):
    with pytest.raises(ValidationError):
        StreamConfig(stream=value)


def test_what_streaming_excludes():
    train = ImageTrainConfig(steps=1, batch_size=1, shard=True)
    adapter = ImageAdapterConfig(rank=2, parts=("unet.attn",), method="full")
    problems = check_streaming(StreamConfig(stream="all"), train, adapter.methods, adapter.cache)
    assert [problem.partition(",")[0] for problem in problems] == [
        "memory.stream is for frozen weights",
        "memory.stream needs adapter.cache norms: else all adapted weights are kept on the GPU",
        "memory.stream is not for train.shard",
    ]
    assert check_streaming(StreamConfig(), train, adapter.methods, adapter.cache) == []


@given(SIZES, st.integers(1, 40), st.floats(0.01, 1))
def test_blocks_that_wait_are_spread_and_as_few_as_suffice(sizes, count, share):
    by_count, by_share = chosen(sizes, Amount(blocks=count)), chosen(sizes, Amount(share=share))
    assert len(set(by_count)) == min(count, len(sizes))
    gaps = [later - earlier for earlier, later in itertools.pairwise(by_count)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert sum(sizes[i] for i in by_share) >= share * sum(sizes) * (1 - 1e-9)
    assert chosen(sizes, Amount(share=1.0)) == chosen(sizes, Amount(blocks=len(sizes))) == list(range(len(sizes)))


@given(SIZES, st.integers(0, 20_000))
def test_as_few_wait_as_free_what_is_wanted(sizes, wanted):
    amount = least_that_frees(sizes, wanted)
    if amount is None:
        assert wanted == 0
        return
    count = amount.blocks
    assert count == len(sizes) or freed(sizes, chosen(sizes, amount)) >= wanted
    assert count == 1 or freed(sizes, chosen(sizes, Amount(blocks=count - 1))) < wanted


class Repeats(nn.Module):
    """A network of diffusers' kind, one of whose blocks is inside of another, and two of which share a weight."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Bilinear(2, 2, 2) for _ in range(4))
        self._repeated_blocks = ["Bilinear"]
        self.blocks[0].add_module("inner", nn.Bilinear(2, 2, 2))
        self.blocks[3].weight = self.blocks[2].weight


def test_blocks_inside_of_others_and_tied_ones_stay():
    network = Repeats()
    assert streamable_blocks(network) == [network.blocks[0], network.blocks[1]]


def test_on_a_processor_nothing_waits():
    network = Repeats()
    assert blocks_to_stream(network, None, Amount(share=1.0), torch.device("cpu")) == []
    assert not any(map(is_streamed, network.modules()))
