"""Tools of conversations and their calls, in the forms in which files have them, as chat templates take them.

OpenAI         {"role": "assistant", "tool_calls": [{"id", "type", "function": {"name", "arguments": "{...}"}}]}
ms-swift       {"role": "tool_call", "content": '{"name": ..., "arguments": {...}}'}, a turn for each call
LLaMA-Factory  {"from": "function_call", "value": '{"name": ..., "arguments": {...}}'}, or a list of these
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dora_mm.data.vl.readers.conversation import ROLES, Dialogue
from dora_mm.data.vl.rows import RowError

CALLS = frozenset(("function_call", "tool_call", "tool_calls"))  # who says a call that is a turn


def tools_of(given: Any) -> str:
    """The tools of a row; see `Example.tools`.

    Raises:
        RowError: They are not a list of functions.
    """
    found = _listed(given, "tools")
    tools = [
        one if isinstance(one, dict) and "function" in one else {"type": "function", "function": one} for one in found
    ]
    if not all(isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str) for tool in tools):
        raise RowError("has `tools` that are not a list of functions with a `name`")
    return json.dumps(_without_nulls(tools), ensure_ascii=False) if tools else ""


def with_calls(dialogue: Dialogue, messages: Sequence[Any]) -> Dialogue:
    """A dialogue with the calls of its messages. Calls that are turns join the assistant's in front of them, if any.

    Raises:
        RowError: A call is none, or is another's than the assistant's.
    """
    if CALLS.isdisjoint(dialogue.names) and not any(message.get("tool_calls") for message in messages):
        return dialogue
    found, calls = Dialogue([], [], [], [], []), []
    for name, text, loss, references, message in zip(*dialogue[:4], messages, strict=True):
        is_call = name in CALLS
        given = text if is_call else message.get("tool_calls") or []
        own = [_call(one) for one in _listed(given, "tool calls")]
        if own and not is_call and ROLES.get(name.lower()) != "assistant":
            raise RowError(f"has tool calls in a turn of {name[:20]!r}: they are the assistant's")
        if is_call and found.names and ROLES.get(found.names[-1].lower()) == "assistant":
            calls[-1] += own
            found.losses[-1] = loss if found.losses[-1] is None else found.losses[-1]
            continue
        found.names.append("assistant" if is_call else name)
        found.texts.append("" if is_call else text)
        found.losses.append(loss)
        found.references.append(() if is_call else references)
        calls.append(own)
    return found._replace(calls=[json.dumps(own, ensure_ascii=False) if own else "" for own in calls])


def _call(given: Any) -> dict[str, Any]:
    """A call as templates take it, with arguments that are an object."""
    function = given.get("function") or given if isinstance(given, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("has a tool call without the `name` of a function")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise RowError("has a tool call whose `arguments` are not valid JSON") from None
    if not isinstance(arguments, dict):
        raise RowError("has a tool call whose `arguments` are not an object")
    call = {"type": "function", "function": {"name": function["name"], "arguments": _without_nulls(arguments)}}
    return call | ({"id": given["id"]} if isinstance(given.get("id"), str) else {})


def _listed(given: Any, what: str) -> list[Any]:
    """The value of a key of a row as a list; the row has it as JSON, one object or a list of objects."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else []
        except ValueError:
            raise RowError(f"has {what} that are not valid JSON") from None
    return given if isinstance(given, list) else [given]


def _without_nulls(value: Any) -> Any:
    """A value without the keys that have null: Arrow files have the keys of all rows in each."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    return [_without_nulls(member) for member in value] if isinstance(value, list) else value
