"""A job of images that two processes share: which batches each generates, and what the manifest says."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image
from torch.distributed import HashStore

from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.sampling.generating import generate, plan
from dora_mm.sampling.image_sampler import UnusableImageError
from dora_mm.sampling.manifest import read_manifest
from dora_mm.sampling.png import BaseModel
from dora_mm.utils.processes import SINGLE_PROCESS, OtherProcessError, Processes

IMAGE = ImageRequest(0, "", None, 0, 1, 1.0, 8, 8, None, (), 1.0)


class Sampler:
    """Generates images of one color each, by their seeds, from when all have their first batch.

    Args:
        start: Where they wait for each other.
        fails: Whether it generates none.
    """

    def __init__(self, start=None, fails=False):
        self.model = SimpleNamespace(new_tokens={}, adaptable={})
        self.start, self.fails, self.drawn = start, fails, []

    def forget_prompts(self):
        pass

    def scheduler_title(self, name):
        return "Euler"

    def generate(self, prompts, seeds, **settings):
        if self.start and not self.drawn:
            self.start.wait(20)
        if self.fails:
            raise ValueError("no more")
        self.drawn.append(tuple(seeds))
        return [Image.new("RGB", (8, 8), (s, 0, 0)) if s != 7 else UnusableImageError("is black") for s in seeds]


@pytest.fixture
def job(tmp_path):
    def planned(name):
        images = [replace(IMAGE, row=number + 1, prompt=str(number), seed=number) for number in range(13)]
        model = BaseModel("model", None, None, "float32", "0", None, {})
        about = {"adapters": {}, "environment": {}, "now": {}}
        return plan(tmp_path / name, images, lambda image: 1, batch_size=3, model=model, **about)

    return planned


def draw_in_two(jobs, samplers):
    """Generates in two threads, as in two processes; returns their errors."""
    store, errors = HashStore(), [None, None]

    def run(index):
        try:
            generate(jobs[index], samplers[index], print, Processes(store, index, 2))
        except ValueError as error:
            errors[index] = error
            Processes(store, index, 2).reports()

    threads = [threading.Thread(target=run, args=[index]) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return errors


def files_of(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_two_processes_draw_the_batches_and_the_files_of_one(job, tmp_path):
    whole, alone = job("whole"), Sampler()
    generate(whole, alone, print, SINGLE_PROCESS)
    jobs, start = [job("shared"), job("shared")], threading.Barrier(2)
    samplers = [Sampler(start), Sampler(start)]
    assert draw_in_two(jobs, samplers) == [None, None]
    assert sorted(samplers[0].drawn + samplers[1].drawn) == alone.drawn
    assert len(alone.drawn) == 5
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "whole")
    assert [entry.status for entry in read_manifest(tmp_path / "shared")].count("failed") == 1
    assert jobs[0].done == whole.done
    assert jobs[0].failed == {7: "is black"}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_the_other_and_what_is_drawn_stays(job, tmp_path, failing):
    start = threading.Barrier(2)
    samplers = [Sampler(start, fails=index == failing) for index in (0, 1)]
    errors = draw_in_two([job("shared"), job("shared")], samplers)
    assert str(errors[failing]) == "no more"
    # the other one learns of it when it takes its next batch, or waits for the one that will not come
    assert isinstance(errors[1 - failing], OtherProcessError)
    drawn = [seed for batch in samplers[1 - failing].drawn for seed in batch if seed != 7]
    assert len(list((tmp_path / "shared").rglob("*.png"))) == len(drawn)
    assert len(read_manifest(tmp_path / "shared")) == 13
