"""A conversation with calls of tools, as several formats write it."""

import json

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALLS = [
    {"type": "function", "function": {"name": "weather", "arguments": {"place": place}}} for place in ("Rom", "Ulm")
]
ASKED = {"role": "user", "content": "How is it in Rom and Ulm?"}
FOUND = [{"role": "tool", "content": "20 degrees"}, {"role": "tool", "content": "7 degrees"}]
ANSWER = {"role": "assistant", "content": "20 and 7 degrees."}
SAID = [ASKED, {"role": "assistant", "content": "", "tool_calls": CALLS}, *FOUND, ANSWER]
OPENAI = [
    {
        "id": f"call_{n}",
        "type": "function",
        "function": {"name": "weather", "arguments": json.dumps(call["function"]["arguments"])},
    }
    for n, call in enumerate(CALLS)
]
SWIFT = [{"role": "tool_call", "content": json.dumps(call["function"])} for call in CALLS]
ROWS = {  # of the same conversation
    "templates": {"messages": SAID, "tools": [TOOL]},
    "OpenAI": {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": OPENAI}, *FOUND, ANSWER],
               "tools": [TOOL]},
    "ms-swift": {"messages": [ASKED, *SWIFT, *(one | {"role": "tool_response"} for one in FOUND), ANSWER],
                 "tools": json.dumps([TOOL["function"]])},
    "LLaMA-Factory": {"conversations": [
        {"from": "human", "value": ASKED["content"]},
        {"from": "function_call", "value": json.dumps([call["function"] for call in CALLS])},
        *({"from": "observation", "value": one["content"]} for one in FOUND),
        {"from": "gpt", "value": ANSWER["content"]}], "tools": json.dumps([TOOL["function"]])},
}  # fmt: skip
