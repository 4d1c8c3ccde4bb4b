"""The batches of several tasks and processes, and the answers that are drawn for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.data.vl.example import Example
from dora_mm.data.vl.splits import TrainingSet
from dora_mm.tasks.vl import VLBatches, sample_answer


class Recorder:
    """A model whose batches show what is learned."""

    def batch(self, task, examples, images, targets, *, on_bad_data):
        return task, [(example.id, *target) for example, target in zip(examples, targets, strict=True)]


def example(number: int, answers=("yes", "no", "two"), scores=(1.0, 0.3, 0.6)) -> Example:
    return Example(str(number), (), "?", tuple(answers), tuple(scores))


def batches(sizes: dict[str, tuple[int, int]], factor: int = 1, seed: int = 0, **settings) -> VLBatches:
    """Of tasks with these numbers of rows and, times `factor`, batch sizes."""
    sets = {
        name: TrainingSet([example(i) for i in range(rows)], None, factor * size, 1.5)  # type: ignore[arg-type]
        for name, (rows, size) in sizes.items()
    }
    return VLBatches(Recorder(), sets, seed=seed, **settings)  # type: ignore[arg-type]


def test_a_batch_is_a_function_of_its_number():
    sizes = {"vqa": (10, 4), "caption": (4, 2)}
    one, other, otherwise = batches(sizes), batches(sizes), batches(sizes, seed=1)
    assert one.steps_per_epoch == 4 + 3
    numbers = (9, 0, 9)
    assert [one(number) for number in numbers] == [other(number) for number in numbers]
    assert [one(number) for number in numbers] != [otherwise(number) for number in numbers]
    assert {one(number)[0] for number in range(7)} == {"vqa", "caption"}


@pytest.mark.parametrize(("num_processes", "accumulated"), [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("sizes", [{"vqa": (13, 3)}, {"vqa": (13, 3), "nlvr2": (5, 2), "caption": (2, 1)}])
def test_processes_and_micro_batches_share_the_batches_of_one_with_larger_ones(num_processes, accumulated, sizes):
    """In every step all have the same task, and together they learn the same answers of the same rows, in order."""
    whole = batches(sizes, num_processes * accumulated)
    processes = [(index, num_processes) for index in range(num_processes)]
    parts = [batches(sizes, accumulated=accumulated, process=process) for process in processes]
    assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch}
    drawn = set()
    for step in range(3 * whole.steps_per_epoch):
        task, rows = whole(step)
        found = [part(step * accumulated + micro) for micro in range(accumulated) for part in parts]
        assert {of_part for of_part, _ in found} == {task}
        assert [row for _, of_part in found for row in of_part] == rows
        assert len({len(of_part) for _, of_part in found}) == 1
        drawn |= {answer for _, answer, _ in rows}
    assert drawn == {"yes", "no", "two"}


def test_answers_are_drawn_in_proportion_to_their_scores():
    row = example(0, ("yes", "never", "no"), (1.0, 0.0, 0.3))
    drawn = [sample_answer(row, (number + 0.5) / 1300) for number in range(1300)]
    assert drawn == [("yes", 1.0)] * 1000 + [("no", 0.3)] * 300


@given(st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), max_size=6), st.floats(0, 1, exclude_max=True))
def test_an_answer_without_score_is_never_drawn(scores, draw):
    answer, score = sample_answer(example(0, map(str, range(len(scores))), scores), draw)
    assert (score > 0) == any(scores)
    assert score == (scores[int(answer)] if answer else 0.0)
