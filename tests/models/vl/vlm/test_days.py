"""Rows whose chat template writes the day: they have that of their run, whatever the clock says."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers.utils import chat_template_utils

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import Example, Turn
from dora_mm.models.chat_templates import rendering_on
from dora_mm.models.vl.vlm.chat import render, render_prompt
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.loading import load_tokenizer
from dora_mm.models.vl.vlm.texts import TextProcessor
from dora_mm.utils.day import Day
from tests.documented.trl_labels import PAGE, PUBLISHED, with_template
from tests.shared.clock import Clock
from tests.shared.vl.templates import DATED

STORED = json.loads(PAGE.read_text(encoding="utf-8"))["templates"]
ASKING = {*DATED, "muse_glimmer"}
SYSTEM, ASKED, ANSWER = (
    Turn("system", "Be brief.", False),
    Turn("user", "What is one and one?", False),
    Turn("assistant", "two", True),
)
DATES = {"llama": "03 Feb 2027", "mistral": "2027-02-03", "hour": "Wednesday, February 3, 2027, 00:00:00"}


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch, "2026-12-01")


@pytest.fixture(scope="module")
def processor(tiny_vlm):
    return TextProcessor(load_tokenizer(str(tiny_vlm("qwen2")), None))


def rows(processor, day: Day) -> list:
    """A row to learn and one to answer, each without a system turn and with one."""
    with rendering_on(day):
        turns = ([ASKED, ANSWER], [SYSTEM, ASKED, ANSWER])
        return [*(render(processor, each) for each in turns), *(render_prompt(processor, each[:-1]) for each in turns)]


@pytest.mark.parametrize("name", [*STORED, *DATED])
def test_rows_of_a_run_are_the_same_on_every_day(name, processor, clock):
    assert set(STORED) == set(PUBLISHED)
    with_template(processor, name, (STORED | DATED)[name])
    day = Day("2027-02-03")
    found = rows(processor, day)
    clock.pass_days(40)
    assert rows(processor, day) == found
    assert (day.recorded is not None) == (name in ASKING)
    assert (rows(processor, Day("2027-02-04")) != found) == (name in ASKING)
    if name in DATES:
        assert DATES[name] in found[0][0]
        assert (DATES[name] in found[1][0]) == (name == "llama")


def dated_vlm(tiny_vlm, name: str, **settings) -> VLM:
    vlm = VLM(VLMModelConfig(path=str(tiny_vlm("qwen2")), **settings))
    vlm.rows.processor.tokenizer.chat_template = DATED[name]
    return vlm


def row_text(vlm: VLM, *turns: Turn) -> str:
    example = Example("1", (), "", turns=turns)
    return vlm.rows.processor.tokenizer.decode(vlm.rows.row("chat", example, None, "").inputs["input_ids"][0])


def test_the_day_counts_where_a_row_has_asked_and_reaches_threads(tiny_vlm):
    vlm = dated_vlm(tiny_vlm, "hour", date="2027-02-03")
    vlm.answerer("chat", DecodeConfig(), ())  # which renders a short exchange of its own
    assert "2027" not in row_text(vlm, SYSTEM, ASKED, ANSWER)
    assert vlm.day.recorded is None
    view = vlm.row_view("chat", Example("1", (), "", turns=(ASKED, ANSWER)), None)
    assert "dated 2027-02-03 (model.date)" in view.text()
    assert "dated" not in vlm.row_view("chat", Example("1", (), "", turns=(SYSTEM, ASKED, ANSWER)), None).text()
    assert vlm.day.recorded == "2027-02-03"
    with ThreadPoolExecutor(1) as pool:
        assert "February 3, 2027" in pool.submit(row_text, vlm, ASKED, ANSWER).result()
    assert vlm.fresh(0).day is vlm.day


def test_a_template_that_asks_on_no_day_is_a_bug_of_the_caller(tiny_vlm):
    """And no bad row, which `data.on_bad_data: skip` would leave out."""
    vlm = dated_vlm(tiny_vlm, "mistral")
    with pytest.raises(AssertionError, match=r"model\.date was not filled in"):
        row_text(vlm, ASKED, ANSWER)


def test_a_template_that_was_compiled_looks_its_day_up_when_it_is_called():
    template = chat_template_utils._compile_jinja_template(DATED["mistral"])
    messages = [{"role": "user", "content": "?"}]
    for day in ("2027-02-03", "2031-01-01"):
        with rendering_on(Day(day)):
            assert f"The current date is {day}." in template.render(messages=messages)
    with pytest.raises(ValueError, match="the chat template asks for the day, which only rows of"):
        template.render(messages=messages)  # as of a text encoder of images


def test_a_checkpoint_goes_on_with_its_day_alone(tiny_vlm):
    vlm = dated_vlm(tiny_vlm, "llama", date="2027-02-03")
    assert "day" not in vlm.counts.state_dict()
    row_text(vlm, ASKED, ANSWER)
    state = vlm.counts.state_dict()
    same, other = (dated_vlm(tiny_vlm, "llama", date=day) for day in ("2027-02-03", "2027-02-06"))
    same.counts.load_state_dict(state)
    assert same.day.recorded == "2027-02-03"
    with pytest.raises(ValueError, match="the finished steps have read rows of 2027-02-03, and rows have 2027-02-06"):
        other.counts.load_state_dict(state)


@pytest.mark.parametrize(("given", "kept"), [("2026-12-01", "2026-12-01"), ("20261201", "2026-12-01")])
def test_the_date_of_a_config_is_a_day(given, kept):
    assert VLMModelConfig(path="model", date=given).date == kept
    with pytest.raises(ValueError, match="is not a date such as 2026-12-01"):
        VLMModelConfig(path="model", date="yesterday")
