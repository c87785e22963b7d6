"""tasks/converters.py: every raw layout by hand-written rows, calls against an independent writer, hostile rows."""

import json
import random
from pathlib import Path

import pytest

import data
from data import convert
from tasks import converters
from tasks.converters import CONVERTERS, Conversation, Drop, guess, looks_like_call, parse_calls

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "raw_samples"


def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": []}
    return {"name": name, "description": f"does {name}", "parameters": schema}


def toolace_row(*turns, tools=None):
    tools = tools or [
        {
            "name": "Get Weather",
            "description": "w",
            "parameters": {
                "type": "dict",
                "properties": {"city": {"type": "string"}, "days": {"type": "int"}},
                "required": ["city"],
            },
            "required": None,
        }
    ]
    system = (
        "Here is a list of functions in JSON format that you can invoke:\n"
        + json.dumps(tools)
        + ". \nShould you decide to return the function call(s). \nPut it in the format of [f(a=1)]\n"
    )
    return {"system": system, "conversations": [{"from": f, "value": v} for f, v in turns]}


def hermes_row(*turns, tools="default", **extra):
    listed = [{"type": "function", "function": tool("get_price", company={"type": "string"})}]
    tools = json.dumps(listed) if tools == "default" else tools
    return {
        "id": "x",
        "conversations": [{"from": f, "value": v} for f, v in turns],
        "tools": tools,
        **extra,
    }


def apigen_row(*turns, system="# Policy\nBe kind."):
    tools = json.dumps([tool("cancel", id={"type": "string"}), tool("think")])
    conversations = [{"from": f, "value": v} for f, v in turns]
    return {"conversations": conversations, "tools": tools, "system": system}


def xlam_row(answers, tools=None, query="q"):
    tools = tools or [{"name": "f", "description": "d", "parameters": {"x": {"type": "int"}}}]
    return {
        "id": 0,
        "query": query,
        "answers": json.dumps(answers),
        "tools": json.dumps(tools),
    }


def funreason_row(*turns, tools=None):
    tools = tools or [tool("pwd"), tool("find", path={"type": "string"}), tool("ls"), tool("cd")]
    head = {"role": "system", "content": "You are ...", "tools": tools}
    return [head, *({"role": role, "content": content} for role, content in turns)]


def rlla_row(said, output, parameters='{"x": {"type": "int", "default": ""}}'):
    instruction = (
        "**Available Tools**\nIn your response, you can use the following tools:\n"
        f"1. Name: Get X\nDescription: Gets\nParameters: {parameters}\n"
        '2. Name: other, thing\nDescription: two\nlines\nParameters: {"y": {"type": "str, optional"}}'
        "\n\n**Steps for Each Turn**\n1. **Think:** ..."
    )
    said = f"**Dialogue Records History**\n{said}"
    return {"instruction": instruction, "input": said, "output": output}


def reason(name, row):
    with pytest.raises(Drop) as drop:
        CONVERTERS[name](row)
    return str(drop.value)


# ---- layouts ----


def test_toolace_calls_observations_and_answers():
    row = toolace_row(
        ("user", "Weather?"),
        ("assistant", '[Get Weather(city="Oslo, NO", days=2), Get Weather(city="Bergen")]'),
        ("tool", '[{"name": "Get Weather", "results": {}}]'),
        ("assistant", "[Source](http://x.y/z) says rain.\n"),
    )
    got = CONVERTERS["toolace"](row)
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    }
    assert got == Conversation(
        [{"name": "Get Weather", "description": "w", "parameters": schema}],
        [
            ("user", "Weather?"),
            (
                "call",
                [
                    {"name": "Get Weather", "params": {"city": "Oslo, NO", "days": 2}},
                    {"name": "Get Weather", "params": {"city": "Bergen"}},
                ],
            ),
            ("observation", '[{"name": "Get Weather", "results": {}}]'),
            ("assistant", "[Source](http://x.y/z) says rain."),
        ],
    )
    old = toolace_row(("human", "Weather?"), ("gpt", '[Get Weather(city="Oslo")]'))
    assert CONVERTERS["toolace"](old).turns[1][0] == "call"


@pytest.mark.parametrize(
    "text",
    [
        "[Get Weather(]",
        '[Get Weather(city="Oslo")',
        '[Get Weather(city="Oslo)]',
        "[Get Weather(city=Oslo)]",
        '[Get Weather("Oslo")]',
        '[Get Weather(city="a", city="b")]',
        '[Get Weather(city="Oslo")] and more',
        'Sure: [Get Weather(city="Oslo")]',
        'Get Weather(city="Oslo")',
        '[Get Weather(city="Oslo") Get Weather(city="Oslo")]',
        '[Get Weather(city="Oslo"),]',
        "[Get Weather(city={1, 2})]",
        "[Get Weather(city=__import__('os'))]",
        '[Fetch Weather(city="Oslo")]',
        "[Get Weather]",
        "[]",
        "[Foo(a=1",
    ],
)
def test_toolace_broken_call_is_dropped_and_never_an_answer(text):
    row = toolace_row(("user", "Weather?"), ("assistant", text))
    examples, drops = convert("toolace", [row])
    assert examples == [] and sum(drops.values()) == 1 and next(iter(drops)).startswith("row: ")


@pytest.mark.parametrize(
    "text",
    [
        "Which city (or cities) do you mean?",
        "[Oslo](http://a.b) is [cold].",
        "[1] Rain, says the service.",
        "The Get Weather tool needs a city.",
        "It's [sic] fine",
    ],
)
def test_toolace_prose_with_brackets_is_an_answer(text):
    assert CONVERTERS["toolace"](toolace_row(("user", "q"), ("assistant", text))).turns[1] == (
        "assistant",
        text,
    )


def test_hermes_new_dialect_drops_prose_and_joins_responses():
    call = '<tool_call>\n{"name": "get_price", "arguments": {"company": "%s"}}\n</tool_call>'
    response = '<tool_response>\n{"name": "get_price", "content": %d}\n</tool_response>\n'
    row = hermes_row(
        ("system", "You are ... <tools></tools> ... <tool_call>\n{tool_call}\n</tool_call>"),
        ("human", "Apple and IBM?"),
        ("gpt", "Let me look.\n" + call % "Apple" + "\n" + call % "IBM"),
        ("tool", response % 1 + response % 2),
        ("gpt", "1 and 2."),
    )
    conversation = CONVERTERS["hermes"](row)
    assert conversation.tools == [tool("get_price", company={"type": "string"})]
    assert conversation.turns == [
        ("user", "Apple and IBM?"),
        ("assistant", "Let me look."),
        (
            "call",
            [
                {"name": "get_price", "params": {"company": "Apple"}},
                {"name": "get_price", "params": {"company": "IBM"}},
            ],
        ),
        (
            "observation",
            '{"name": "get_price", "content": 1}\n{"name": "get_price", "content": 2}',
        ),
        ("assistant", "1 and 2."),
    ]


def test_hermes_early_dialect_reads_python_and_the_tools_of_the_system_turn():
    listed = [{"type": "function", "function": tool("book", cheap={"type": "boolean"})}]
    system = f"signatures within <tools> </tools> tags.\n<tools>\n{listed}\n</tools>\nFor each"
    call = "<tool_call>\n{'arguments': {'cheap': True, 'to': None}, 'name': 'book'}\n</tool_call>"
    row = hermes_row(("system", system), ("human", "book"), ("gpt", call))
    del row["tools"]
    got = CONVERTERS["hermes"](row)
    assert got.tools == [tool("book", cheap={"type": "boolean"})]
    assert got.turns[1] == ("call", [{"name": "book", "params": {"cheap": True, "to": None}}])


def test_hermes_rows_that_are_dropped_and_kept():
    call = '<tool_call>\n{"name": "get_price", "arguments": {"company": "A"}}\n</tool_call>'
    answer = ("tool", "<tool_response>\n1\n</tool_response>")
    assert (
        reason("hermes", hermes_row(("human", "q"), ("gpt", "{}"), schema="{}")) == "no tool list"
    )
    unanswered = hermes_row(("human", "q"), ("gpt", call * 2), answer, ("gpt", "done"))
    assert reason("hermes", unanswered) == "responses do not match the calls"
    twice = hermes_row(("human", "q"), ("gpt", call), answer, answer, ("gpt", "done"))
    assert reason("hermes", twice) == "responses do not match the calls"
    literal = call.replace("\n", "\\n")  # the card's broken call: backslash-n, not newlines
    assert reason("hermes", hermes_row(("human", "q"), ("gpt", literal))) == "value does not parse"
    cut = hermes_row(("human", "q"), ("gpt", call[:-5]))
    assert reason("hermes", cut) == "broken tool_call block"
    undeclared = hermes_row(("human", "q"), ("gpt", call.replace("get_price", "g")))
    assert reason("hermes", undeclared) == "undeclared tool name"
    for empty in (None, "null", "[]"):  # 865 glaive rows have no tools: chat, kept
        assert (
            CONVERTERS["hermes"](hermes_row(("human", "q"), ("gpt", "a"), tools=empty)).tools == []
        )
    assert CONVERTERS["hermes"](hermes_row(("human", "q"), ("gpt", call))).turns[-1][0] == "call"


def test_xlam_reads_json_in_json_and_keeps_parallel_calls():
    answers = [{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": {"x": 1.0}}]
    got = CONVERTERS["xlam"](xlam_row(answers))
    assert json.dumps(got.turns[1][1]) == (
        '[{"name": "f", "params": {"x": 1}}, {"name": "f", "params": {"x": 1.0}}]'
    )
    encoded = xlam_row(answers)
    encoded = {**encoded, "answers": json.dumps(encoded["answers"])}  # a string in a string
    assert CONVERTERS["xlam"](encoded).turns == got.turns
    decoded = {**encoded, "answers": answers}
    assert CONVERTERS["xlam"](decoded).turns == got.turns


@pytest.mark.parametrize("answers", ["null", "", '"null"', "[]", "{}", "[{}]"])
def test_xlam_answers_that_parse_to_nothing_are_dropped(answers):
    examples, drops = convert("xlam", [{**xlam_row([]), "answers": answers}])
    assert not examples and drops.total() == 1


def test_arguments_must_be_an_object_or_json_text_of_one():
    for arguments, good in (
        ({}, True),
        ("{}", True),
        ('"{}"', True),
        ("null", True),
        (None, True),
        ("", True),
        ("[]", False),
        ("5", False),
        ("x", None),
    ):
        row = xlam_row([{"name": "f", "arguments": arguments}])
        if good:
            assert CONVERTERS["xlam"](row).turns[1] == ("call", [{"name": "f", "params": {}}])
        else:
            why = (
                "value does not parse"
                if good is None
                else "call arguments are no object, or too deep"
            )
            assert reason("xlam", row) == why


def test_hammer_wants_the_empty_list():
    assert CONVERTERS["hammer"](xlam_row([])).turns == [("user", "q"), ("no_tool", None)]
    assert CONVERTERS["hammer"]({**xlam_row([]), "tools": "[]"}).tools == []
    row = xlam_row([{"name": "f", "arguments": {}}])
    assert reason("hammer", row) == "a call in the irrelevance set"
    assert reason("hammer", {**row, "answers": "null"}) == "a call in the irrelevance set"
    assert reason("hammer", {**row, "answers": ""}) == "value does not parse"


def test_apigen_policy_encoded_arguments_and_think():
    row = apigen_row(
        ("human", "cancel 7"),
        ("function_call", '{"name": "cancel", "arguments": "{\\"id\\": \\"7\\"}"}'),
        ("observation", "ok"),
        ("function_call", '{"name": "think", "arguments": {"thought": "done?"}}'),
        ("observation", ""),
        ("gpt", "Done."),
    )
    got = CONVERTERS["apigen-mt"](row)
    assert got.policy == "# Policy\nBe kind."
    assert got.turns == [
        ("user", "cancel 7"),
        ("call", [{"name": "cancel", "params": {"id": "7"}}]),
        ("observation", "ok"),
        ("think", [{"name": "think", "params": {"thought": "done?"}}]),
        ("observation", ""),
        ("assistant", "Done."),
    ]


def test_funreason_cuts_reasoning_and_keeps_the_whole_list():
    row = funreason_row(
        ("user", "Where am I?"),
        ("assistant", '<think>\nI call [pwd()] or [ls(a=1)]\n</think>\n[pwd(), find(path=".")]'),
        ("tool", "[{'pwd()': '/w'}, {'find(path=\".\")': 'a'}]"),
        ("assistant", "<think>\nnow [ls()]?\n</think>\nYou are in /w."),
    )
    got = CONVERTERS["funreason-mt"](row)
    assert got.turns == [
        ("user", "Where am I?"),
        ("call", [{"name": "pwd", "params": {}}, {"name": "find", "params": {"path": "."}}]),
        ("observation", "[{'pwd()': '/w'}, {'find(path=\".\")': 'a'}]"),
        ("assistant", "You are in /w."),
    ]
    text_tools = [{**row[0], "tools": str(row[0]["tools"])}, *row[1:]]  # a Python-literal string
    columns = {str(i): message for i, message in enumerate(row)} | {"10": None, "11": None}
    for other in (text_tools, columns, [*row, None]):
        assert CONVERTERS["funreason-mt"](other) == got


def test_funreason_drops():
    flagged = funreason_row(("user", "q"), ("assistant", "[pwd()]"))
    flagged[1]["error_tool_response"] = True
    assert reason("funreason-mt", flagged) == "error_tool_response"
    columns = {"0": flagged[0], "error_tool_response": True}
    assert reason("funreason-mt", columns) == "error_tool_response"
    unclosed = funreason_row(("user", "q"), ("assistant", "<think>\n[pwd()]"))
    assert reason("funreason-mt", unclosed) == "reasoning without end"
    positional = funreason_row(("user", "q"), ("assistant", "[cd('a')]"))
    assert reason("funreason-mt", positional) == "call does not parse"


def test_rlla_dialogue_tools_and_only_the_last_turn():
    call = '<tool_call>\n{"name": "Get X", "parameters": {"x": 1}}\n</tool_call>'
    said = (
        "<user> one </user>\n\n<think> maybe <tool_call> </think>\n"
        f"{call}\n<obs> [1] </obs>\n\n<think> ok </think>\n<response> It is 1. </response>\n\n"
        "<user> two </user>"
    )
    two = '{"name": "Get X", "parameters": {}}\n{"name": "other, thing", "parameters": {}}'
    output = f"<think> a <tool_call> b </think>\n<tool_call>\n{two}\n</tool_call>"
    got = CONVERTERS["rlla"](rlla_row(said, output))
    assert got.only_last
    assert [t["name"] for t in got.tools] == ["Get X", "other, thing"]
    assert got.tools[0]["parameters"] == {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
    }
    assert got.tools[1]["description"] == "two\nlines"
    assert got.tools[1]["parameters"]["required"] == []
    assert got.turns == [
        ("user", "one"),
        ("call", [{"name": "Get X", "params": {"x": 1}}]),
        ("observation", "[1]"),
        ("assistant", "It is 1."),
        ("user", "two"),
        ("call", [{"name": "Get X", "params": {}}, {"name": "other, thing", "params": {}}]),
    ]
    examples, drops = convert("rlla", [rlla_row(said, output)])
    assert len(examples) == 1 and not drops and examples[0].query == "two"
    assert reason("rlla", rlla_row("<user> a </user> stray", output)) == "dialogue does not parse"


# ---- chats ----

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "w", "parameters": WEATHER}
OSLO = {"name": "weather", "params": {"city": "Oslo"}}


def openai_row(*messages, tools=(WEATHER,), **extra):
    """A row of OpenAI's chat format; a message is (role, content) or whole."""
    messages = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    tools = [{"type": "function", "function": tool} for tool in tools]
    return {"messages": messages, "tools": tools, **extra}


def called(arguments, name="weather", **extra):
    """OpenAI's assistant message with one call."""
    call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **extra}


def sharegpt_row(*turns, tools=(WEATHER,), **extra):
    conversations = [{"from": who, "value": text} for who, text in turns]
    return {"conversations": conversations, "tools": json.dumps(tools), **extra}


CHAT = [
    ("user", "Rain in Oslo?"),
    ("call", [OSLO]),
    ("observation", "rain"),
    ("assistant", "Yes."),
]


@pytest.mark.parametrize(
    "arguments", ['{"city": "Oslo"}', {"city": "Oslo"}], ids=["text", "object"]
)
@pytest.mark.parametrize("form", ["wrapped", "bare", "text", "anthropic", "mcp", "functions"])
def test_openai_chats(arguments, form):
    row = openai_row(
        ("system", "Be brief."),
        ("user", "Rain in Oslo?"),
        called(arguments),
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ("assistant", [{"type": "text", "text": "Yes."}]),
    )
    if form == "functions":
        row["functions"] = [tool["function"] for tool in row.pop("tools")]
        for message in row["messages"]:
            if message.get("tool_calls"):
                message["function_call"] = message.pop("tool_calls")[0]["function"]
            if message["role"] == "tool":
                message["role"] = "function"
    elif form == "text":
        row["tools"] = json.dumps(row["tools"])
    elif form != "wrapped":
        key = {"bare": "parameters", "anthropic": "input_schema", "mcp": "inputSchema"}[form]
        tool = {"name": "weather", "description": "w", key: WEATHER["parameters"]}
        row["tools"] = [tool]
    assert guess(row) == "openai"
    assert CONVERTERS["openai"](row) == Conversation([WEATHER], CHAT, "Be brief.")


def test_anthropic_blocks_are_read_as_calls_and_results():
    use = [
        {"type": "tool_use", "id": city, "name": "weather", "input": {"city": city}}
        for city in ("Oslo", "Rome")
    ]
    results = [
        {
            "type": "tool_result",
            "tool_use_id": "Rome",
            "content": [{"type": "text", "text": "sun"}],
        },
        {"type": "tool_result", "tool_use_id": "Oslo", "content": "rain"},
    ]
    thought = {"type": "thinking", "thinking": "Two cities.", "signature": "x"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    looking, more = [{"type": "text", "text": text} for text in ("Let me look.", "And Bonn?")]
    row = openai_row(
        ("user", "q"),
        ("assistant", [thought, looking, *use]),
        ("user", [*results, more]),
        ("assistant", [thought, hidden, {"type": "text", "text": "Which Bonn?"}]),
    )
    row["tools"] = [{"name": "weather", "description": "w", "input_schema": WEATHER["parameters"]}]
    row["system"] = "Be brief."
    turns = [
        ("user", "q"),
        ("assistant", "Let me look."),
        ("call", [OSLO, {"name": "weather", "params": {"city": "Rome"}}]),
        ("observation", "rain"),
        ("observation", "sun"),
        ("user", "And Bonn?"),
        ("assistant", "Which Bonn?"),
    ]
    assert CONVERTERS["openai"](row) == Conversation([WEATHER], turns, "Be brief.")
    use[0]["name"] = "undeclared"
    assert reason("openai", row) == "undeclared tool name"
    assert converters.holds_call(row)


def test_results_without_ids_are_one_for_all_calls_or_one_for_each():
    asked = called({"city": "Oslo"})
    del asked["tool_calls"][0]["id"]
    asked["tool_calls"] *= 3
    rows = [
        openai_row(("user", "q"), asked, *[("tool", "rain")] * n, ("user", "So?"))
        for n in range(1, 5)
    ]
    found = []
    for row in rows:
        try:
            CONVERTERS["openai"](row)
            found.append("")
        except Drop as drop:
            found.append(str(drop))
    assert found == ["", "responses do not match the calls", "", "responses do not match the calls"]
    halves = openai_row(("user", "q"), called({}), *[("tool", "rain")] * 2, ("user", "So?"))
    assert [role for role, _ in CONVERTERS["openai"](halves).turns].count("observation") == 2


def test_a_tool_list_in_a_system_field_is_no_policy():
    listed = f"Call <tools>{json.dumps([WEATHER])}</tools> so."
    row = {"messages": [{"role": "system", "content": listed}, {"role": "user", "content": "q"}]}
    assert CONVERTERS["openai"]({**row, "system": listed}).policy == ""
    assert CONVERTERS["openai"]({**row, "system": "Be brief."}).policy == "Be brief."
    row["messages"][0]["content"] = "Put them in <tools> tags."
    assert CONVERTERS["openai"](row).policy == "Put them in <tools> tags."


def test_a_result_twice_for_one_call_and_none_for_the_other():
    asked = called({"city": "Oslo"})
    asked["tool_calls"] = [asked["tool_calls"][0] | {"id": city} for city in ("Oslo", "Rome")]
    reply = {"role": "tool", "content": "rain", "tool_call_id": "Oslo"}
    row = openai_row(("user", "q"), asked, reply, reply)
    assert reason("openai", row) == "responses do not match the calls"


def test_a_list_of_calls_in_one_block_is_parallel_calls():
    calls = [{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")]
    row = openai_row(("user", "q"), ("assistant", f"<tool_call>{json.dumps(calls)}</tool_call>"))
    _, (role, read) = CONVERTERS["openai"](row).turns
    assert role == "call" and [call["params"]["city"] for call in read] == ["Oslo", "Rome"]


def test_a_thought_beside_a_call_is_no_decision():
    think = {"name": "think", "arguments": {"thought": "t"}}
    calls = [think, {"name": "weather", "arguments": {"city": "Oslo"}}]
    for order in (calls, calls[::-1]):
        row = sharegpt_row(("human", "q"), ("function_call", json.dumps(order)))
        row["tools"] = json.dumps([WEATHER, {"name": "think", "description": "", "parameters": {}}])
        assert reason("sharegpt", row) == "think beside another call"


def test_openai_results_stand_in_the_order_of_their_calls():
    calls = [called({"city": city})["tool_calls"][0] | {"id": city} for city in ("Oslo", "Rome")]
    result = lambda id: {"role": "tool", "tool_call_id": id, "content": f"rain in {id}"}
    both = {"role": "assistant", "content": "Let me look.", "tool_calls": calls}
    row = openai_row(("user", "q"), both, result("Rome"), result("Oslo"), ("assistant", "Both."))
    assert CONVERTERS["openai"](row).turns == [
        ("user", "q"),
        ("assistant", "Let me look."),
        ("call", [OSLO, {"name": "weather", "params": {"city": "Rome"}}]),
        ("observation", "rain in Oslo"),
        ("observation", "rain in Rome"),
        ("assistant", "Both."),
    ]
    for results in (["Oslo"], ["Oslo", "Rome", "Rome"], ["Oslo", "Bonn"]):
        row = openai_row(("user", "q"), both, *map(result, results), ("assistant", "Both."))
        assert reason("openai", row) == "responses do not match the calls"


def test_sharegpt_with_and_without_system():
    turns = [
        ("human", "Rain in Oslo?"),
        ("function_call", '{"name": "weather", "arguments": {"city": "Oslo"}}'),
        ("observation", "rain"),
        ("gpt", "Yes."),
    ]
    for system, policy in (
        ({}, ""),
        ({"system": ""}, ""),
        ({"system": None}, ""),
        ({"system": "P"}, "P"),
    ):
        row = sharegpt_row(*turns, **system)
        assert guess(row) == ("apigen-mt" if policy else "sharegpt")
        assert CONVERTERS[guess(row)](row) == Conversation([WEATHER], CHAT, policy)
    row = sharegpt_row(("system", "P"), *turns)
    assert CONVERTERS["sharegpt"](row) == Conversation([WEATHER], CHAT, "P")
    as_list = {**row, "tools": [WEATHER]}
    assert CONVERTERS["sharegpt"](as_list) == Conversation([WEATHER], CHAT, "P")
    said = row["conversations"]
    foreign = {**row, "conversations": [{**one, "role": "someone", "weight": 1} for one in said]}
    assert CONVERTERS["sharegpt"](foreign) == Conversation([WEATHER], CHAT, "P")  # its own keys win
    late = sharegpt_row(*turns, ("system", "P"), ("gpt", "a"))
    assert reason("sharegpt", late) == "a system turn in mid-conversation"
    for tools in ("", "[]", None):  # a chat without tools
        row = {**sharegpt_row(("human", "q"), ("gpt", "a")), "tools": tools}
        assert CONVERTERS["sharegpt"](row) == Conversation([], [("user", "q"), ("assistant", "a")])
    parallel = json.dumps([{"name": "weather", "arguments": {"city": city}} for city in "AB"])
    row = sharegpt_row(
        ("human", "q"), ("function_call", parallel), ("observation", "both"), ("gpt", "a")
    )
    assert len(CONVERTERS["sharegpt"](row).turns[1][1]) == 2


def test_nulls_of_arrow_are_no_arguments_and_no_parameters():
    """Every message, every tool and every call has the keys of all, as `datasets` writes them."""
    pad = {"content": None, "tool_calls": None, "tool_call_id": None}
    both = {"city": {"type": "string", "enum": None}, "zone": {"type": "string", "enum": None}}
    weather = {"type": "object", "properties": {**both, "zone": None}, "required": ["city"]}
    time = {"type": "object", "properties": {**both, "city": None}, "required": None}
    row = openai_row(
        {**pad, "role": "user", "content": "Rain in Oslo?"},
        {**pad, **called({"city": "Oslo", "zone": None})},
        {**pad, "role": "tool", "content": "rain"},
        {**pad, "role": "assistant", "content": "Yes."},
        tools=[
            {**WEATHER, "parameters": weather},
            {"name": "time", "description": None, "parameters": time},
        ],
    )
    got = CONVERTERS["openai"](row)
    assert got.turns == CHAT and got.tools == [
        WEATHER,
        {
            "name": "time",
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {"zone": {"type": "string"}},
                "required": [],
            },
        },
    ]
    row = openai_row(("user", "q"), called({"city": None}))  # not padded: the expert's own null
    assert CONVERTERS["openai"](row).turns[1][1] == [{"name": "weather", "params": {"city": None}}]


UNREAD_CALLS = [
    '<functioncall> {"name": "weather", "arguments": {"city": "Oslo"}} <|endoftext|>',
    "<functioncall> {\"name\": \"weather\", \"arguments\": '{\"city\": \"Oslo\"}'}",
    '<function_call>weather</function_call>',
    '{"name": "weather", "arguments": {"city": "Oslo"}}',
    '{"name": "unheard_of", "parameters": {}}',
    "{'arguments': {'city': 'Oslo'}, 'name': 'weather'}",
    '{"name": "weather"}',
    '[{"name": "weather", "arguments": {}}]',
    '<tool_calls>[{"name": "weather", "arguments": {}}]</tool_calls>',
    'Sure.\n```json\n{"name": "weather", "arguments": {"city": "Oslo"}}\n```',
    '{"tool": "weather", "tool_input": {"city": "Oslo"}}',
    "Thought: look.\nAction: weather\nAction Input: Oslo",
    '[TOOL_CALLS] [{"name": "weather"}]',
    "<function=weather>{}</function>",
    '<|python_tag|>weather.call(city="Oslo")',
    '[weather(city="Oslo")]',
    'weather(city="Oslo")',
    "```tool_code\nweather()\n```",
    '```python\nweather(city="Oslo")\n```',
    'print(weather(city="Oslo"))',
    '<tool_code>\nweather(city="Oslo")\n</tool_code>',
    "<start_function_call>call:weather{city:Oslo}<end_function_call>",
    '<|channel|>commentary to=functions.weather <|message|>{"city": "Oslo"}<|call|>',
    '<|tool_call_start|>[weather(city="Oslo")]<|tool_call_end|>',
    '<|python_start|>[weather(city="Oslo")]<|python_end|>',
    '<TOOLCALL>[weather(city="Oslo")]</TOOLCALL>',
    'Let me check.\n[weather(city="Oslo")]',
    'Let me check.\n```python\nweather( city="Oslo")\n```',
    'Action: weather(city="Oslo")',
]  # fmt: skip


@pytest.mark.parametrize("text", UNREAD_CALLS)
def test_a_call_in_other_markup_is_dropped_with_what_follows_and_never_an_answer(text):
    rows = {
        "openai": openai_row(
            ("user", "Hi"), ("assistant", "Hello."), ("user", "Rain?"), ("assistant", text), ("user", "So?"),
            ("assistant", "Rain."),
        ),
        "sharegpt": sharegpt_row(
            ("human", "Hi"), ("gpt", "Hello."), ("human", "Rain?"), ("gpt", text), ("observation", "rain"), ("gpt", "Rain."),
        ),
    }  # fmt: skip
    for name, row in rows.items():
        examples, drops = convert(None, [row])
        assert [e.target for e in examples] == ["<answer>\nHello.\n</answer>"]
        assert examples[0].id == f"{name}/0/1"
        assert drops == {
            "turn: call in a markup that is not read": 1,
            "turn: after a call that is not read": 1,
        }


@pytest.mark.parametrize(
    "text",
    [
        "The weather (Oslo) is fine.",
        'His name: "Ada". Action: call her.',
        '```json\n{"name": "Ada", "age": 36}\n```',
        "Use the weather tool, please.",
        "```python\nprint(7)\n```",
        "[1] Rain. [2](http://a.b)",
        "The function is f(x) = 2x, its arguments are real.",
        "Ask weather() for it, or f(x=1).",
        "I would call weather(city=...) or weather(city='Oslo') once you tell me where.",
        "a" * 100_000,
    ],
)
def test_prose_is_an_answer(text):
    assert not looks_like_call(text, ["weather"])
    examples, drops = convert("openai", [openai_row(("user", "q"), ("assistant", text))])
    assert len(examples) == 1 and not drops


@pytest.mark.parametrize("arguments", [{}, "{}", None, "null", "", " ", '""', ...], ids=repr)
def test_a_call_without_arguments_is_empty(arguments):
    call = {"name": "weather", "arguments": arguments}
    if arguments is ...:
        del call["arguments"]
    expected = ("call", [{"name": "weather", "params": {}}])
    message = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": call}]}
    assert CONVERTERS["openai"](openai_row(("user", "q"), message)).turns[1] == expected
    row = sharegpt_row(("human", "q"), ("function_call", json.dumps(call)))
    assert CONVERTERS["sharegpt"](row).turns[1] == expected
    row = xlam_row([call], [WEATHER])
    assert CONVERTERS["xlam"](row).turns[1] == expected
    elsewhere = sharegpt_row(
        ("human", "q"), ("function_call", '{"name": "weather", "args": {"city": "Oslo"}}')
    )
    assert reason("sharegpt", elsewhere) == "call arguments under an unknown key"


def test_unknown_tool_layouts_are_dropped_and_tools_without_parameters_are_not():
    chat = [("user", "q"), ("assistant", "a")]
    for tool in (
        {"name": "f", "description": "d", "args": {"city": {"type": "string"}}},
        {"name": "f", "schema": {"type": "object", "properties": {"city": {}}}},
        {"name": "f", "params": [{"name": "city"}]},
    ):
        assert convert("openai", [openai_row(*chat, tools=[tool])]) == (
            [],
            {"row: tool with parameters under an unknown key": 1},
        )
    for tool in (
        {"name": "f", "parameters": [{"name": "city"}]},
        {"name": "f", "parameters": {"city": "a text"}},
        {"tool": "f"},
        "f",
    ):
        assert convert("openai", [openai_row(*chat, tools=[tool])])[1].total() == 1
    empty = {"type": "object", "properties": {}, "required": []}
    for tool in (
        {"name": "f"},
        {"name": "f", "parameters": None},
        {"name": "f", "strict": True, "returns": {"type": "string"}, "parameters": {}},
        {"name": "f", "inputSchema": {"type": "object"}, "annotations": {"title": "F"}},
    ):
        got = CONVERTERS["openai"](openai_row(*chat, tools=[tool])).tools
        assert got == [{"name": "f", "description": "", "parameters": empty}]
    text = {**WEATHER, "parameters": json.dumps(WEATHER["parameters"])}
    assert CONVERTERS["openai"](openai_row(*chat, tools=[text])).tools == [WEATHER]


def test_a_boolean_schema_stays():
    schema = {"type": "object", "properties": {"a": {"type": "str"}, "b": True}, "required": ["a"]}
    for parameters in (schema, {**schema, "type": None}):
        got = CONVERTERS["openai"](
            openai_row(("user", "q"), tools=[{**WEATHER, "parameters": parameters}])
        )
        assert got.tools[0]["parameters"] == {
            "type": "object",
            "properties": {"a": {"type": "string"}, "b": True},
            "required": ["a"],
        }
    nested = {"type": "object", "properties": {"c": {"type": "object", "properties": {"d": False}}}}
    got = CONVERTERS["openai"](openai_row(("user", "q"), tools=[{**WEATHER, "parameters": nested}]))
    assert got.tools[0]["parameters"]["properties"]["c"]["properties"] == {"d": False}


def random_chat(rng):
    """Turns as a Conversation has them, and the tools they use."""
    tools = [tool(f"f{n}", x={"type": "string"}) for n in range(3)]
    turns = []
    for n in range(rng.randint(1, 5)):
        turns.append(("user", f"question {n}"))
        for k in range(rng.randint(0, 2)):
            names = rng.sample(["f0", "f1", "f2"], rng.randint(1, 3))
            turns.append(("call", [{"name": f, "params": {"x": random_value(rng)}} for f in names]))
            turns += [("observation", f"result {n} {k} of {name}") for name in names]
        turns.append(("assistant", f"answer {n}"))
    return tools, turns


def as_openai(rng, tools, turns):
    messages, ids = [], []
    for role, content in turns:
        if role == "call":
            ids = [f"id{len(messages)}-{n}" for n in range(len(content))]
            encode = rng.choice((json.dumps, dict))
            calls = [
                {"name": call["name"], "arguments": encode(call["params"])} for call in content
            ]
            calls = [
                {"id": id, "type": "function", "function": call}
                for id, call in zip(ids, calls, strict=True)
            ]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        elif role == "observation":
            messages.append({"role": "tool", "tool_call_id": ids.pop(0), "content": content})
        else:
            messages.append({"role": role, "content": content})
    return {"messages": messages, "tools": rng.choice((list, json.dumps))(tools)}


def as_sharegpt(rng, tools, turns):
    words = {"user": "human", "assistant": "gpt", "call": "function_call"}
    chat = []
    for role, content in turns:
        if role == "call":
            calls = [{"name": call["name"], "arguments": call["params"]} for call in content]
            content = json.dumps(calls if len(calls) > 1 else calls[0])
        chat.append({"from": words.get(role, role), "value": content})
    return {"conversations": chat, "tools": json.dumps(tools), "system": ""}


def as_hermes(rng, tools, turns):
    chat = [{"from": "system", "value": f"You may call <tools>{json.dumps(tools)}</tools> so: ..."}]
    for role, content in turns:
        if role == "call":
            calls = [{"arguments": call["params"], "name": call["name"]} for call in content]
            content = "\n".join(f"<tool_call>\n{json.dumps(c)}\n</tool_call>" for c in calls)
            chat.append({"from": "gpt", "value": content})
        elif role == "observation":
            content = f"<tool_response>\n{content}\n</tool_response>"
            chat.append({"from": "tool", "value": content})
        else:
            chat.append({"from": {"user": "human", "assistant": "gpt"}[role], "value": content})
    return {"conversations": chat}


def test_one_chat_in_three_forms_is_one_conversation():
    """Writers of the three forms, none of which the readers know of."""
    rng = random.Random(0)
    for _ in range(100):
        tools, turns = random_chat(rng)
        expected = Conversation(tools, turns)
        for name, writer in (
            ("openai", as_openai),
            ("sharegpt", as_sharegpt),
            ("hermes", as_hermes),
        ):
            row = json.loads(json.dumps(writer(rng, tools, turns)))
            assert guess(row) == name or not any(role == "call" for role, _ in turns)
            got = CONVERTERS[name](row)
            assert json.dumps(got) == json.dumps(expected)  # json.dumps: 1, 1.0 and True differ


def test_hermes_markup_in_any_chat():
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    row = openai_row(
        ("user", "Rain in Oslo?"), ("assistant", call), ("tool", "rain"), ("assistant", "Yes.")
    )
    assert CONVERTERS["openai"](row).turns == CHAT
    named = hermes_row(("system", "<tools></tools>"), ("human", "q"), ("gpt", "a"))
    named["tools"] = json.dumps([WEATHER])
    assert CONVERTERS["hermes"](named).policy == ""  # it explains another form of call


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x1c", "\r"])
def test_line_separators_inside_values_cut_no_call(mark):
    call = json.dumps({"name": "Get X", "parameters": {"x": f"a{mark}b"}}, ensure_ascii=mark < " ")
    output = f"<tool_call>\n{call}\n</tool_call>"
    got = CONVERTERS["rlla"](rlla_row("<user> q </user>", output))
    assert got.turns[-1] == ("call", [{"name": "Get X", "params": {"x": f"a{mark}b"}}])


# ---- tools ----


def test_parameters_of_every_dialect():
    flat = {
        "a": {"type": "str", "default": "x"},
        "b": {"type": "int, optional"},
        "c": {"type": "List[int], optional", "default": []},
        "type": {"type": "List[List[float]]"},
        "properties": {"description": "named like a keyword", "type": "Dict[str, int]"},
        "t": {"type": "Tuple[float, float]"},
        "u": {"type": "Union[int, float]"},
        "o": {"type": "Optional[bool]"},
        "m": {"type": "int, string", "required": False},
    }
    tools = [{"name": "f", "description": "d", "parameters": flat}]
    got = converters.xlam(xlam_row([{"name": "f", "arguments": {}}], tools)).tools[0]["parameters"]
    assert got["required"] == ["a", "type", "properties", "t", "u"]
    number, integer = {"type": "number"}, {"type": "integer"}
    types = {
        name: {k: v for k, v in spec.items() if k in ("type", "items", "additionalProperties")}
        for name, spec in got["properties"].items()
    }
    assert types == {
        "a": {"type": "string"},
        "b": integer,
        "c": {"type": "array", "items": integer},
        "type": {"type": "array", "items": {"type": "array", "items": number}},
        "properties": {"type": "object", "additionalProperties": integer},
        "t": {"type": "array", "items": number},
        "u": {"type": "Union[int, float]"},
        "o": {"type": "boolean"},
        "m": {"type": "int, string"},
    }
    assert got["properties"]["a"]["default"] == "x" and "required" not in got["properties"]["m"]


def test_schema_is_normalised_inside_and_stays_where_it_is_json_schema():
    inner = {"type": "dict", "properties": {"z": {"type": "float"}}, "required": ["z"]}
    schema = {
        "type": "dict",
        "properties": {"p": {"type": "array", "items": inner}, "q": {"type": ["string", "null"]}},
        "required": None,
    }
    row = xlam_row([], [{"name": "f", "description": None, "parameters": schema, "required": None}])
    got = CONVERTERS["hammer"](row).tools
    inner = {"type": "object", "properties": {"z": {"type": "number"}}, "required": ["z"]}
    properties = {"p": {"type": "array", "items": inner}, "q": {"type": ["string", "null"]}}
    schema = {"type": "object", "properties": properties, "required": []}
    assert got == [{"name": "f", "description": "", "parameters": schema}]
    empty = {"type": "object", "properties": {}, "required": []}
    for parameters in ({}, None, {"type": "object"}, {"type": "dict", "properties": {}}):
        row = xlam_row([], [{"name": "f", "description": "", "parameters": parameters}])
        assert CONVERTERS["hammer"](row).tools[0]["parameters"] == empty


def test_duplicate_names():
    one = {"name": "f", "description": "d", "parameters": {}}
    assert len(CONVERTERS["hammer"](xlam_row([], [one, one])).tools) == 1
    assert (
        reason("hammer", xlam_row([], [one, {**one, "description": "e"}]))
        == "two tools of one name"
    )


# ---- calls ----

NAMES = [
    "f",
    "Get",
    "Get Weather",
    "Daily Forecast (10 days)",
    "Daily Forecast",
    "Search for Words in Title, Text, or URL",
    "Driver's [License]",
    "a.b/c-d",
]


def python_style(value):
    return repr(value)


def json_style(value):
    return json.dumps(value, ensure_ascii=bool(len(str(value)) % 2))


def random_value(rng, depth=2):
    texts = [
        "",
        "a, b",
        ')"]',
        "it's",
        'say "hi"',
        "a=b",
        "\\",
        "New\nline",
        "é",
        "f(x=1)",
        "], f(",
    ]
    kinds = [rng.choice(texts), rng.randint(-5, 5), -8.5, True, False, None, "34.05", "true"]
    if depth:
        kinds.append([random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))])
        kinds.append({rng.choice("abc"): random_value(rng, depth - 1) for _ in range(2)})
    return rng.choice(kinds)


def test_parse_calls_reads_what_an_independent_writer_wrote():
    rng = random.Random(0)
    for _ in range(150):
        calls, texts = [], []
        for _ in range(rng.randint(1, 4)):
            params = {key: random_value(rng) for key in rng.sample(["a", "b-c", "d e", "f"], 3)}
            name, style = rng.choice(NAMES), rng.choice((python_style, json_style))
            arguments = rng.choice((", ", ",", " , ")).join(
                f"{key}{rng.choice(('=', ' = '))}{style(value)}" for key, value in params.items()
            )
            calls.append({"name": name, "params": params})
            texts.append(f"{name}({arguments})")
        text = f" [{', '.join(texts)}]\n"
        got = parse_calls(text, rng.sample(NAMES, len(NAMES)))
        assert json.dumps(got) == json.dumps(calls), text  # json.dumps: 1, 1.0 and True differ
        for cut in (1, len(text) // 2, len(text) - 3):  # a torn call never parses
            with pytest.raises(Drop):
                parse_calls(text[:cut], NAMES)


def test_numbers_keep_their_type():
    got = parse_calls('[f(a=1, b=1.0, c="1", d=true, e=True, g="true", h=null, i=None)]', ["f"])
    assert json.dumps(got[0]["params"]) == (
        '{"a": 1, "b": 1.0, "c": "1", "d": true, "e": true, "g": "true", "h": null, "i": null}'
    )


def test_guess():
    rows = {
        "hermes": hermes_row(("human", "q"), ("gpt", "a")),
        "toolace": toolace_row(("user", "q")),
        "xlam": xlam_row([{"name": "f", "arguments": {}}]),
        "hammer": xlam_row([]),
        "apigen-mt": apigen_row(("human", "q")),
        "funreason-mt": funreason_row(("user", "q")),
        "rlla": rlla_row("<user> q </user>", ""),
        "jsonl": {"id": "a/0/0", "target": "", "kind": "answer"},
    }
    assert {name: guess(row) for name, row in rows.items()} == {name: name for name in rows}
    assert guess({"0": {}, "1": None}) == "funreason-mt"
    assert guess(sharegpt_row(("human", "q"), ("gpt", "a"))) == "sharegpt"
    assert guess({"conversations": [{"from": "human", "value": "q"}]}) == "sharegpt"
    assert (
        guess({"query": "q", "kind": "answer"}) == "jsonl"
    )  # which then says that the target is missing
    for row in ({}, {"text": "a"}, "text", 3, None):
        with pytest.raises(ValueError, match="--name"):
            guess(row)


# ---- hostile rows ----


def good_rows():
    call = '<tool_call>\n{"name": "get_price", "arguments": {"company": "A"}}\n</tool_call>'
    return {
        "hermes": hermes_row(("human", "q"), ("gpt", call)),
        "toolace": toolace_row(("user", "q"), ("assistant", '[Get Weather(city="x")]')),
        "xlam": xlam_row([{"name": "f", "arguments": {"x": [1]}}]),
        "hammer": xlam_row([]),
        "apigen-mt": apigen_row(
            ("human", "q"), ("function_call", '{"name": "cancel", "arguments": {"id": "7"}}')
        ),
        "funreason-mt": funreason_row(("user", "q"), ("assistant", "[pwd()]")),
        "rlla": rlla_row("<user> q </user>", "<response> a </response>"),
        "openai": openai_row(("user", "q"), called({"city": "Oslo"})),
        "sharegpt": sharegpt_row(
            ("human", "q"), ("function_call", '{"name": "weather", "arguments": {"city": "Oslo"}}')
        ),
    }


def replace_at_random(rng, value, junk):
    """Return a copy of a JSON value in which one node, chosen by a random walk, is junk."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: replace_at_random(rng, value[key], junk)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], replace_at_random(rng, value[i], junk), *value[i + 1 :]]
    if isinstance(value, str) and rng.random() < 0.5:
        return value[: rng.randrange(len(value) + 1)]  # torn text
    return junk


def test_hostile_rows_are_examples_or_counted_drops():
    deep = "[" * 10_000 + "]" * 10_000
    nested = leaf = []
    for _ in range(500):
        leaf.append([])
        leaf = leaf[0]
    junk = [None, 0, -1.5, True, "", "x", [], {}, [[]], {"a": {}}, "\x00", "\ud800", float("nan")]
    junk += [float("inf"), "NaN", "[NaN]", "1e999", deep, nested, '{"a":' * 10_000, "9" * 5000]
    rng = random.Random(1)
    for name, row in good_rows().items():
        examples, drops = convert(name, [row])
        assert len(examples) == 1 and not drops, name
        for _ in range(150):
            bad = replace_at_random(rng, row, rng.choice(junk))
            examples, drops = convert(name, [bad])
            assert examples or drops
            for example in examples:  # what survives can be written as UTF-8 JSON
                json.dumps(vars(example), allow_nan=False).encode()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_not_a_number_is_dropped(value):
    answers = '[{"name": "f", "arguments": {"x": VALUE}}]'.replace("VALUE", value)
    row = {**xlam_row([]), "answers": answers}
    assert convert("xlam", [row]) == ([], {"row: NaN or Infinity": 1})
    row = toolace_row(("user", "q"), ("assistant", f"[Get Weather(city={value})]"))
    assert not convert("toolace", [row])[0]


TWICE = {
    "json": ('{"x": 1, "x": 2}', '{"x": 1, "X": 2}'),
    "nested": ('{"x": [{"k": 1, "k": 1}]}', '{"x": [{"k": 1}, {"k": 1}]}'),
    "escaped": ('{"x": 1, "\\u0078": 2}', '{"x": 1, "\\u0079": 2}'),
    "python": ("{'x': None, 'x': 2}", "{'x': None, 'y': 2}"),
    "nested python": ("{'x': [{'k': None, 'k': 1}]}", "{'x': {'x': None}}"),
}


@pytest.mark.parametrize(("bad", "good"), TWICE.values(), ids=TWICE)
def test_a_call_that_writes_a_key_twice_is_dropped(bad, good):
    """Of two values nobody knows which was meant; the same keys in objects of their own are fine."""
    for arguments, dropped in ((bad, True), (good, False)):
        call = '{"name": "f", "arguments": ARGUMENTS}'.replace("ARGUMENTS", arguments)
        call = call.replace('"', "'") if "None" in arguments else call
        row = {**xlam_row([]), "answers": f"[{call}]"}
        examples, drops = convert("xlam", [row])
        assert (len(examples), dict(drops)) == (
            (0, {"row: a key is written twice": 1}) if dropped else (1, {})
        )
        encoded = {**xlam_row([]), "answers": [{"name": "f", "arguments": arguments}]}
        assert bool(convert("xlam", [encoded])[0]) != dropped
        row = toolace_row(("user", "q"), ("assistant", f"[Get Weather(city={arguments})]"))
        assert bool(convert("toolace", [row])[0]) != dropped


def test_a_key_twice_in_the_file_itself(tmp_path):
    """Calls that are objects of the file and no text; a tool that repeats a key is only documentation."""
    row = json.dumps({**xlam_row([]), "answers": "ANSWERS", "tools": "TOOLS"})
    call = '[{"name": "f", "arguments": {"x": 1}}]'
    tool = '[{"name": "f", "description": "", "description": "d", "parameters": {"x": {"type": "int"}}}]'
    rows = [row.replace('"TOOLS"', tool).replace('"ANSWERS"', call)]
    rows += [rows[0].replace('{"x": 1}', '{"x": 1, "x": 1}')]
    rows += [rows[0].replace('"name": "f", "arg', '"name": "g", "name": "f", "arg')]
    for name, text in ("a.jsonl", "\n".join(rows)), ("a.json", f"[{', '.join(rows)}]"):
        (tmp_path / name).write_text(text)
        examples, drops = convert("xlam", data.read_rows(tmp_path / name))
        assert len(examples) == 1 and drops == {"row: a key is written twice": 2}
        assert examples[0].tools[0]["description"] == "d"


def test_deep_and_unreadable_values_are_dropped():
    deep = '{"a":' * 100 + "1" + "}" * 100
    row = {**xlam_row([]), "answers": '[{"name": "f", "arguments": ' + deep + "}]"}
    assert convert("xlam", [row]) == ([], {"row: call arguments are no object, or too deep": 1})
    row = {**xlam_row([]), "tools": "[" * 10_000 + "]" * 10_000}
    assert convert("hammer", [row]) == ([], {"row: value does not parse": 1})
    row = xlam_row([{"name": "f", "arguments": {"x": "\ud800"}}])
    assert convert("xlam", [row]) == ([], {"row: lone surrogate in a text": 1})


# ---- the real samples ----


def sample(file):
    if not (SAMPLES / file).exists():
        pytest.skip(f"{file} is not in ../shared/data/raw_samples (optional data)")
    return json.loads((SAMPLES / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "file", "roles"),
    [
        ("toolace", "toolace_rebuilt_from_zaego123.json", ("assistant",)),
        ("hermes", "hermes_glaive_layout_from_llamafactory_demo.json", ("gpt",)),
        ("hermes", "hermes_glaive_5k_rebuilt_3_truncated.json", ("gpt",)),
        ("hermes", "hermes_func_calling_singleturn_rebuilt_4.json", ("gpt",)),
        ("apigen-mt", "apigen_mt_5k_row0.json", ("gpt", "function_call")),
        (
            "apigen-mt",
            "taubench_gpt4o_airline_in_apigen_mt_layout_84.json",
            ("gpt", "function_call"),
        ),
    ],
)
def test_every_assistant_turn_of_a_sample_is_an_example_or_counted(name, file, roles):
    rows = sample(file)
    turns = [turn for row in rows for turn in row["conversations"] if turn["from"] in roles]
    examples, drops = convert(name, rows)
    assert len(examples) + drops.total() == len(turns)
    assert not [why for why in drops if why.startswith("row")]


def test_toolace_sample_has_149_call_turns():
    rows = sample("toolace_rebuilt_from_zaego123.json")
    examples, _ = convert("toolace", rows)
    calls = [e for e in examples if e.kind == "tool_call"]
    assert len(calls) == 149 and len(examples) - len(calls) == 248  # and 2 empty answers
    for example in calls:
        index, turn = map(int, example.id.split("/")[1:])
        raw = rows[index]["conversations"][turn]["value"]
        for call in as_list(json.loads(example.target[12:-13])):
            assert f"{call['name']}(" in raw and all(f"{key}=" in raw for key in call["params"])


def as_list(calls):
    return calls if isinstance(calls, list) else [calls]


def test_corrupted_toolace_file_yields_no_call_and_no_false_answer():
    rows = sample("toolace_zaego123_sharegpt_func_fixed_100.json")
    for name in ("toolace", "apigen-mt"):
        examples, drops = convert(name, rows)
        kept = {int(e.id.split("/")[1]) for e in examples}
        assert len(kept) + drops.total() == 100
        for index in kept:  # only chats without any call are left
            assert not any(t["from"] == "function_call" for t in rows[index]["conversations"])


def test_xlam_samples_against_their_own_json():
    for file, dropped in (
        ("xlam_60k_verbatim_3.json", 0),
        ("xlam_60k_unwrapped_from_hammer_8.json", 1),
        ("xlam_layout_rebuilt_from_toolrl_rlla.json", 1),
    ):
        rows = sample(file)
        examples, drops = convert("xlam", rows)
        assert drops.total() == drops["row: two tools of one name"] == dropped
        for example in examples:
            row = rows[int(example.id.split("/")[1])]
            expected = [
                {"name": call["name"], "params": call["arguments"]}
                for call in json.loads(row["answers"])
            ]
            got = json.loads(example.target[12:-13])
            assert isinstance(got, dict) == (len(expected) == 1) and as_list(got) == expected
            assert example.query == row["query"].strip()


def test_remaining_samples():
    examples, drops = convert("hermes", sample("hermes_card_verbatim_4.json"))
    assert [e.kind for e in examples] == ["tool_call", "answer"]
    assert drops == {"row: no tool list": 2, "row: value does not parse": 1}
    examples, drops = convert("hammer", sample("xlam_irrelevance_unwrapped_from_hammer_2.json"))
    assert [e.kind for e in examples] == ["answer"] * 2 and not drops


def test_sharegpt_sample_without_system_keeps_its_calls():
    """The count of every kind of turn, from the file itself: all 211 calls but repetitions are there."""
    rows = sample("../train/glaive_toolcall_en_demo.json")
    examples, drops = convert(None, rows)
    spoken = [
        t for row in rows for t in row["conversations"] if t["from"] in ("gpt", "function_call")
    ]
    assert {e.id.split("/")[0] for e in examples} == {"sharegpt"}
    assert len(examples) + drops["turn: exact repetition"] == len(spoken)
    assert drops.total() == drops["turn: exact repetition"]
    calls = {e.id: json.loads(e.target[12:-13]) for e in examples if e.kind == "tool_call"}
    for id, call in calls.items():
        _, row, turn = id.split("/")
        raw = rows[int(row)]["conversations"][int(turn)]
        raw = json.loads(raw["value"])
        assert call == {"name": raw["name"], "params": raw["arguments"]}
    repeated = {json.dumps([row["conversations"][: i + 1], row["tools"]]) for row in rows
                for i, t in enumerate(row["conversations"]) if t["from"] == "function_call"}  # fmt: skip
    assert len(calls) == len(repeated)


def test_rlla_files():
    total = 0
    for file in ("rlla_sft.json", "test_from_parquet.json"):
        path = f"../train/toolrl_rlla/{file}"
        rows = sample(path)
        examples, drops = convert("rlla", rows)
        total += len(examples)
        assert len(examples) + drops.total() == len(rows)
        for example in examples:
            output = rows[int(example.id.split("/")[1])]["output"].rpartition("</think>")[2]
            assert (example.kind == "tool_call") == ("<tool_call>" in output)
    assert total == 475  # of 480: four with undeclared names, one with two tools of one name
