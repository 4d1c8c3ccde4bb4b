"""Records of answers: thoughts, why they ended, and what is missing."""

import pytest

from dora_mm.data.vl.answers import TAGS, ModelAnswer, answer_notes, message_answer


@pytest.mark.parametrize(("begin", "end"), TAGS)
def test_a_thought_is_taken_off_and_may_be_put_back(begin, end):
    for raw in (f"{begin}\nso\n{end}\n\na dog", f"so{end}a dog", f"{begin}x{end}no{begin}y{end} a dog"):
        found = ModelAnswer(raw).without_thought()
        assert (found.text, found.has_thought) == ("a dog", True)
        assert found.with_thought() == ModelAnswer(raw)
    assert ModelAnswer(f"{begin} \n{end}a dog").without_thought().has_thought is False
    unfinished = ModelAnswer(f"\n{begin}a dog, or").without_thought()
    assert (unfinished.missing, unfinished.has_thought) == (True, True)


@pytest.mark.parametrize("text", ["a dog", " a dog", "the tag <think> begins a thought", ""])
def test_an_answer_without_a_thought_stays_as_it_is(text):
    assert ModelAnswer(text).without_thought() == ModelAnswer(text)


def test_thoughts_that_references_have_are_a_part_of_answers():
    answer = ModelAnswer("<think>so</think>a dog")
    assert answer.without_thought(["<think>a</think>b"]) == answer


def test_a_prompt_that_begins_a_thought_leaves_no_text_to_an_answer_that_was_cut_in_it():
    assert ModelAnswer("it is a", ended="length").without_thought(opened=True).missing
    assert ModelAnswer("red", ended="stop").without_thought(opened=True) == ModelAnswer("red", ended="stop")
    assert ModelAnswer("it is a", ended="length").without_thought().text == "it is a"


def test_a_message_may_have_its_thought_in_parts():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}, {"type": "text", "text": "a dog"}]
    for message in ({"content": parts}, {"content": "a dog", "reasoning": "so"}):
        assert message_answer(message, "stop") == ModelAnswer("a dog", "<think>so</think>", "stop")
    with pytest.raises(TypeError):
        message_answer({"content": {"text": "a dog"}})


def test_what_is_said_of_answers():
    lost = ModelAnswer("", failure="was longer than 9 bytes (server.max_bytes)")
    rows = [*((str(number), ModelAnswer("", ended="length")) for number in range(6)), ("6", lost)]
    rows += [("7", ModelAnswer("a", "<think>b</think>")), ("8", ModelAnswer("a", "<think></think>"))]
    assert answer_notes(rows) == (
        "7 of 9 answers are missing, and score 0 (ids 0, 1, 2, 3, 4, ...); "
        "1 was longer than 9 bytes (server.max_bytes)",
        "6 of 9 answers were cut at decode.max_new_tokens (ids 0, 1, 2, 3, 4, ...)",
        "thoughts were removed from 1 of 9 answers",
    )
    assert answer_notes([("1", ModelAnswer("a"))]) == ()
    assert answer_notes([("1", ModelAnswer("a", ended="tool_calls"))]) == ("1 of 1 answers ended by tool_calls (id 1)",)
