"""Processes that were started together, here two in one interpreter that meet in a store; and their devices."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from dora_mm import cli
from dora_mm.utils import processes
from dora_mm.utils.devices import default_device
from dora_mm.utils.processes import (
    SINGLE_PROCESS,
    DividedWork,
    OtherProcessError,
    Processes,
    divided,
    reports_end,
    started_together,
)
from dora_mm.utils.run_directory import RunDirectory


@pytest.fixture
def two():
    store = HashStore()
    return Processes(store, 0, 2), Processes(store, 1, 2)


@pytest.fixture
def launched(monkeypatch):
    """As in a process that torchrun has started."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    started_together.cache_clear()
    yield monkeypatch
    started_together.cache_clear()


def test_each_piece_is_done_by_one_process_and_the_main_one_hears_of_all(two):
    main, other = (DividedWork(each, 5) for each in two)
    ours, theirs = iter(main), iter(other)
    assert [next(theirs), next(ours), next(theirs)] == [0, 1, 2]
    other.report(0, {"a": [1, None]})
    assert list(main.reported()) == [{"a": [1, None]}]
    assert list(main.reported()) == []
    assert [*ours] == [3, 4]
    assert [*theirs] == []
    other.report(2, "second")
    assert list(main.reported(wait=True)) == ["second"]
    assert list(other.reported(wait=True)) == []


def test_one_process_does_all_and_needs_no_store():
    share = DividedWork(SINGLE_PROCESS, 3)
    assert [*share] == [0, 1, 2]
    share.report(0, "done")
    assert list(share.reported(wait=True)) == []
    assert SINGLE_PROCESS.from_main("value") == "value"
    assert SINGLE_PROCESS.reports()


def test_the_main_process_opens_a_run_and_the_others_go_into_it(two, tmp_path):
    main, other = two
    entered = []

    @contextmanager
    def opened():
        entered.append(1)
        yield RunDirectory(tmp_path)

    with main.run(opened()) as run, other.run(opened()) as found:
        assert run.path == found.path == tmp_path
    assert entered == [1]


def test_all_have_the_results_of_all_in_order_and_the_main_process_says_what_others_warn_of(two, caplog):
    main, other = two

    def double(item):
        if item == 5:
            logging.getLogger("dora_mm.data").warning("%d is odd", item)
        return [2 * item, None]

    theirs = divided(other, double, [4, 5, 6, 7])
    assert [next(theirs), next(theirs)] == [[8, None], [10, None]]
    caplog.clear()
    ours = divided(main, double, [4, 5, 6, 7])
    assert [next(ours) for _ in range(4)] == [[8, None], [10, None], [12, None], [14, None]]
    assert caplog.messages == ["5 is odd"]
    assert [*theirs] == [[12, None], [14, None]]
    assert [*ours] == []
    assert logging.getLogger("dora_mm").propagate


def test_the_main_process_prepares_what_the_others_find(two, monkeypatch):
    main, other = two
    done = []

    def prepare(seconds):  # while the other waits
        with main.main_first():
            done.append("main")

    monkeypatch.setattr(processes, "time", SimpleNamespace(sleep=prepare))
    with other.main_first():
        done.append("other")
    with SINGLE_PROCESS.main_first():
        pass
    assert done == ["main", "other"]


def wait_for_a_value(main, other):
    other.from_main(None)


def wait_for_a_piece(main, other):
    next(iter(DividedWork(main, 2)))


def wait_for_a_result(main, other):
    share = DividedWork(main, 2)
    share._others = [0]
    list(share.reported(wait=True))


@pytest.mark.parametrize("wait", [wait_for_a_value, wait_for_a_piece, wait_for_a_result])
def test_nobody_waits_for_a_process_that_has_stopped_and_one_reports(two, monkeypatch, wait):
    main, other = two

    def fail(seconds):  # while the others wait
        assert other.reports()

    monkeypatch.setattr(processes, "time", SimpleNamespace(sleep=fail))
    if wait is wait_for_a_piece:
        fail(0)
    with pytest.raises(OtherProcessError, match="another of the 2 processes has stopped"):
        wait(main, other)
    assert not main.reports()
    assert other.reports()


def test_processes_that_cannot_meet_say_so(launched):
    launched.delenv("MASTER_ADDR", raising=False)
    launched.setenv("RANK", "1")
    with pytest.raises(ValueError, match="2 processes were started, and cannot meet: .*MASTER_ADDR expected"):
        started_together()
    assert reports_end()


def test_a_process_in_the_place_of_a_dead_one_stops_all(launched, capsys):
    """A pod is replaced while the first one, with its store, waits for the batch that the dead one had taken."""
    store = HashStore()
    launched.setattr(processes, "OURS", ())  # loggers of this process, which goes on
    launched.setattr("torch.distributed.rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    main = Processes(PrefixStore("dora_mm 0", store), 0, 2)
    dead = DividedWork(started_together(), 2)
    assert next(iter(dead)) == 0
    work = DividedWork(main, 2)
    assert [*work] == [1]
    started_together.cache_clear()
    with pytest.raises(ValueError, match="process 1 was started a second time: all of the 2 have to be started"):
        started_together()
    assert reports_end()
    with pytest.raises(OtherProcessError, match="another of the 2 processes has stopped"):
        list(work.reported(wait=True))


@pytest.mark.parametrize("arguments", [["sample", "nowhere.csv"], ["sample"], ["sampel"], ["sample", "--colour"]])
def test_a_process_that_does_not_report_ends_in_silence(monkeypatch, capsys, arguments):
    for name in ("dora_mm.cli", "dora_mm.cli.parser"):
        monkeypatch.setattr(f"{name}.reports_end", lambda: False)
    try:
        code = cli.main(arguments)
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err) == (cli.USER_ERROR, "", "")


def test_a_bug_of_several_processes_has_one_traceback(monkeypatch, capsys):
    def broken(arguments, recipes):
        raise RuntimeError("a bug")

    monkeypatch.setattr("dora_mm.cli.commands.run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["sample"])
    monkeypatch.setattr("dora_mm.cli.reports_end", lambda: False)
    assert cli.main(["sample"]) == cli.BUG
    assert capsys.readouterr().err == ""


def test_each_process_has_a_device_of_its_own_without_a_process_group(launched):
    chosen = []
    gpu = SimpleNamespace(type="cuda")
    launched.setattr(torch.accelerator, "is_available", lambda: True)
    launched.setattr(torch.accelerator, "current_accelerator", lambda: gpu)
    launched.setattr(torch.accelerator, "device_count", lambda: 2)
    launched.setattr(torch, "get_device_module", lambda device: SimpleNamespace(set_device=chosen.append))
    assert default_device() == torch.device("cuda", 1)
    assert chosen == [1]
    assert not torch.distributed.is_initialized()
    launched.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="more processes were started on this machine than it has devices: start 1"):
        default_device()
