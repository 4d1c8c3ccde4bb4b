import threading

import pytest

from dora_mm.train.prefetch import Prefetcher


def test_the_next_batch_is_prepared_while_the_caller_works():
    prepared = threading.Event()

    def batches(number: int) -> str:
        if number == 1:
            prepared.set()
        return f"batch {number} in {threading.current_thread().name.split('_')[0]}"

    with Prefetcher(batches) as batch_at:
        first = batch_at(0)
        assert prepared.wait(timeout=10)
        assert first == f"batch 0 in {threading.current_thread().name}"
        assert batch_at(1) == "batch 1 in batches"


@pytest.mark.parametrize("enabled", [True, False])
def test_it_gives_the_batches_of_any_order(enabled):
    with Prefetcher(lambda number: number**2, enabled=enabled) as batch_at:
        assert [batch_at(number) for number in (0, 1, 5, 6, 6, 2)] == [0, 1, 25, 36, 36, 4]


def test_an_error_is_raised_where_its_batch_is_asked_for():
    def batches(number: int) -> int:
        if number == 1:
            raise ValueError("row 7 cannot be read")
        return number

    with Prefetcher(batches) as batch_at:
        assert batch_at(0) == 0
        with pytest.raises(ValueError, match="row 7"):
            batch_at(1)
