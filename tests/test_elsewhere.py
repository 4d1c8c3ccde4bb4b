"""The conditions of `make test-elsewhere`, as a suite of two tests meets them."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests import elsewhere
from tests.elsewhere import DAYS, ENCODINGS, OTHERS, Condition, concurrency, passes, run, usable

SUITE = """
import datetime, json, os, pathlib, sys, time

def test_of_what_is_around():
    old = os.umask(0)
    pathlib.Path("seen.json").write_text(json.dumps({
        "2028-02-29": datetime.date.today().isoformat(),
        "TZ": time.tzname[0],
        "LC_ALL": os.environ.get("LC_ALL"),
        "umask 077": oct(old),
        "no HOME": os.environ.get("HOME"),
        "unknown uid": os.getuid(),
    }), encoding="utf-8")

def test_that_fails():
    assert False
"""
SEEN = {
    "2028-02-29": "2028-02-29",
    "TZ": "+0545",
    "LC_ALL": "C",
    "umask 077": "0o77",
    "no HOME": None,
    "unknown uid": 12345,
}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name == "LD_PRELOAD" or "FAKETIME" in name]:
        monkeypatch.delenv(name)  # this test may run under faketime itself
    (tmp_path / "test_suite.py").write_text(SUITE, encoding="utf-8")
    return tmp_path


def test_all_conditions_are_there_at_once(suite):
    here = list(usable(condition for condition in (*DAYS, *OTHERS) if condition.name in SEEN))
    assert {"TZ", "LC_ALL", "umask 077", "no HOME"} <= {condition.name for condition in here}
    everything = concurrency(here)
    condition = replace(everything, options=(*everything.options, "-n", "0"), folder=suite)
    counts = run(Path(sys.executable), condition, [], suite / "log", 60)
    assert (counts["passed"], counts["failed"]) == (1, 1)
    seen = json.loads((suite / "seen.json").read_text("utf-8"))
    assert {condition.name: seen[condition.name] for condition in here} == {
        condition.name: SEEN[condition.name] for condition in here
    }


def test_a_pass_that_does_not_end_has_failed(suite):
    assert run(Path(sys.executable), Condition("", folder=suite), [], suite / "log", 0.01)["failed"] == 1


def test_what_cannot_be_had_is_left_out_by_name(monkeypatch, capsys):
    monkeypatch.setattr(elsewhere, "works", lambda *command: not {"faketime", "unshare"} & {*command})
    here = list(usable((*DAYS, *OTHERS)))
    left = re.findall("Left out: (.*), since `.*(?:faketime|unshare) ", capsys.readouterr().out)
    assert left == ["2027-02-28", "2028-02-29", "2031-01-01", "unknown uid"]
    (whole, everything), *alone, (last, _) = passes("3.12", here, None, None)
    assert (whole.name, everything, last) == ("all at once, today", [], ENCODINGS)
    assert [condition for condition, _ in alone] == here
    assert not {"faketime", "unshare"} & {*whole.wrapper}
