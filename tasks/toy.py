"""A seeded, procedural tool world: unlimited tool-use examples with exact answers, no download.

    generate("train", 1000)        rows for training
    generate("test", 512)          rows with held-out names and values
    generate("hard-train", 1000)   4-8 parameters, near-miss tools, 2-3 parallel calls, noisy and
                                   compact experts
    generate("house-train", 1000)  a house rule: see below

Every row has the fields of data.Example (plus `system`, a short system prompt with Figure 5's
structure), so data.py wraps it in one line. A world is a list of 1-6 tools named `noun.verb` with
typed, required and optional parameters. Nouns and string values are made-up words, integers and
numbers are drawn at random. Each belongs to exactly one split by a checksum of its text, so that
train, valid and test share no tool name and no argument value: a model can only do well by reading
the prompt. Eight tasks (TASKS) cover one call, parallel calls, a two-step plan before and after the
first observation, an answer after the last observation, no fitting tool, a missing required
parameter, and the call once the user has named it.

House rule: some verbs were renamed after the tool lists were written (RENAMED); the expert calls
"noun.order" where list and user say "noun.book". Nothing in the prompt says so. toy_model gives the
new verb a probability of 8e-5 (median): what an expert knows, and rollouts do not find.

Copy this file on its own: standard library only.
"""

import json
import random
import zlib

SYSTEM_PROMPT = """## Role
You use tools to solve the [User Query].
## Tools
__TOOL_DESCS__
## Format
Call every tool that can run now: <tool_call>one json object, or a list</tool_call>
If no tool fits, a required parameter is missing, or all is done: <answer>text</answer>"""

VERBS = [
    "find",
    "book",
    "get",
    "send",
    "list",
    "open",
    "check",
    "order",
    "cancel",
    "update",
    "move",
    "rate",
]
RENAMED = {"book": "order", "cancel": "update", "find": "check", "send": "move"}  # the house rule
PARAMETERS = {
    "string": [
        "city",
        "name",
        "title",
        "color",
        "owner",
        "street",
        "brand",
        "team",
        "guest",
        "topic",
    ],
    "integer": ["count", "size", "year", "level", "floor", "age", "days", "seats"],
    "number": ["price", "weight", "height", "speed", "score", "width"],
    "enum": ["mode", "kind", "unit", "style"],
}
SPLITS = ("train", "valid", "test")
LEVELS = ("", "hard-", "house-")
# Share of each task. The last four need an answer in words, or more than the last user turn.
TASKS = {
    "single": 0.28,
    "parallel": 0.22,
    "first_step": 0.08,
    "second_step": 0.10,
    "done": 0.08,
    "no_tool": 0.09,
    "missing": 0.09,
    "clarified": 0.06,
}
NOISE = 0.1  # share of corrupted expert responses in the hard training world


def generate(
    split: str, n: int, *, seed: int = 0, per_world: int = 1, max_tools: int = 6
) -> list[dict]:
    """Return `n` rows, each a dict with the fields of data.Example.

    split      "train" | "valid" | "test": which names and values may appear. With "hard-" before
               it: 4-8 parameters, near-miss tools, 2-3 parallel calls; noisy training experts.
               With "house-": the house rule, and at most two tools; the id of a row to which the
               rule applies ends in "+rule"
    n          number of rows
    seed       the same (split, seed) gives the same rows
    per_world  rows that share one tool list (which tools/pretrain_toy.py then reads once)
    max_tools  longest tool list, 1 to 6; no effect on the hard world
    """
    choices = [level + name for level in LEVELS for name in SPLITS]
    if split not in choices:
        raise ValueError(
            f"unknown split {split!r} of the toy world; choose one of {', '.join(choices)}"
        )
    level, _, split = split.rpartition("-")
    hard, house = level == "hard", level == "house"
    rng = random.Random(f"{split}-{seed}-{'house' if house else hard}")
    rows, tools = [], []
    for i in range(n):
        if i % per_world == 0:
            tools = _tools(rng, split, hard, min(max_tools, 2) if house else max_tools)
        task = rng.choices(list(TASKS), TASKS.values())[0]
        row = _row(rng, split, tools, task, hard)
        row["id"] = f"toy-{split}{level and f'-{level}'}-{seed}/{i}/{task}"
        if house and row["kind"] == "tool_call":
            target = tool_call([_by_house_rule(call) for call in calls_of(row["target"])])
            row["id"] += "+rule" * (target != row["target"])
            row["target"] = target
        if hard and split == "train" and rng.random() < NOISE:
            row["target"] = corrupt(row, rng, compact=True)  # spaces must not give it away
            row["kind"] = "answer" if row["target"].startswith("<answer>") else "tool_call"
        rows.append(row)
    return rows


def tool_call(calls: list, compact: bool = False) -> str:
    """Return the expert text of `calls`: a bare object for one, a list for several."""
    body = calls[0] if len(calls) == 1 else calls
    text = json.dumps(body, separators=(",", ":") if compact else None)
    return f"<tool_call>\n{text}\n</tool_call>"


def answer(text: str) -> str:
    """Return `text` as an expert answer."""
    return f"<answer>\n{text}\n</answer>"


def calls_of(target: str) -> list:
    """Return the calls of a tool_call target, the inverse of `tool_call`."""
    body = json.loads(target.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    return body if isinstance(body, list) else [body]


def corrupt(row: dict, rng: random.Random, compact: bool = False) -> str:
    """Return a plausible wrong target for `row`: what a careless model would write.

    Calls lose an argument, get a wrong value or another tool's name, lose a call, or become an
    answer; an answer becomes a call of some tool with random arguments.
    """
    split, tools = row["id"].split("-")[1], row["tools"]
    if row["kind"] == "answer":
        tool = rng.choice(tools)
        names = tool["parameters"]["required"] or list(tool["parameters"]["properties"])[:1]
        params = {k: _value(rng, split, tool, k) for k in names}
        return tool_call([{"name": tool["name"], "params": params}], compact)
    calls = calls_of(row["target"])
    call = rng.choice(calls)
    ways = ["value", "argument"] * bool(call["params"]) + ["tool", "answer"]
    way = rng.choice(ways + ["drop"] * 3 * (len(calls) > 1))
    if way == "answer":
        return answer("I cannot do that.")
    if way == "drop":
        calls.remove(call)
    elif way == "tool":
        others = [t["name"] for t in tools if t["name"] != call["name"]]
        call["name"] = rng.choice(others or ["find"])
    else:
        key = rng.choice(list(call["params"]))
        tool = next(t for t in tools if t["name"] == call["name"])
        if way == "value":
            call["params"][key] = _value(rng, split, tool, key)
        else:
            del call["params"][key]
    return tool_call(calls, compact)


def _row(rng, split, tools, task, hard) -> dict:
    """One query of `task` over `tools`, with its expert target."""
    history, steps = [], []
    tool = rng.choice(tools)
    params = _arguments(rng, split, tool)
    call = {"name": tool["name"], "params": params}
    if task == "single":
        query, target = _request(rng, tool, params), [call]
    elif task == "parallel":
        calls, parts = [call], [_request(rng, tool, params)]
        for _ in range(rng.choice((1, 2)) if hard else 1):
            other = rng.choice(tools)
            arguments = _arguments(rng, split, other)
            calls.append({"name": other["name"], "params": arguments})
            parts.append("Also " + _request(rng, other, arguments, plain=True))
        query, target = " ".join(parts), calls
    elif task in ("first_step", "second_step"):
        later = rng.choice([t for t in tools if t["parameters"]["required"]] or tools)
        arguments = _arguments(rng, split, later)
        key = rng.choice(list(arguments))
        value = arguments[key]
        said = {k: v for k, v in arguments.items() if k != key}
        query = f"{_request(rng, tool, params)} Then {_action(later)} with "
        query += (_list(said) + " and " if said else "") + f"the {key} it returns."
        target = [call]
        if task == "second_step":
            steps = [(json.dumps(call), json.dumps({key: value}))]
            target = [{"name": later["name"], "params": arguments}]
    elif task == "done":
        key = rng.choice(PARAMETERS["integer"])
        value = _value(rng, split, None, key)
        query = _request(rng, tool, params)
        steps = [(json.dumps(call), json.dumps({key: value}))]
        target = answer(f"The {key} is {value}.")
    elif task == "no_tool":
        absent = _absent_tool(rng, split, tools, hard)
        query = _request(rng, absent, _arguments(rng, split, absent))
        target = answer(f"No tool can {_action(absent)}.")
    else:  # missing, clarified
        required = tool["parameters"]["required"]
        if not required:  # nothing can be missing: fall back on the plain request
            return _row(rng, split, tools, "single", hard)
        key = rng.choice(required)
        query = _request(rng, tool, {k: v for k, v in params.items() if k != key})
        target = answer(f"Which {key} should I use?")
        if task == "clarified":
            history = [("user", query), ("assistant", f"Which {key} should I use?")]
            query, target = f"The {key} is {_quote(params[key])}.", [call]
    kind = "answer" if isinstance(target, str) else "tool_call"
    if kind == "tool_call":
        target = tool_call(target, compact=hard)
    return {
        "id": "",
        "tools": tools,
        "history": history,
        "query": query,
        "steps": steps,
        "target": target,
        "kind": kind,
        "system": SYSTEM_PROMPT,
    }


def _tools(rng, split, hard, max_tools) -> list:
    """A tool list; the hard world crosses two nouns with two verbs, which gives near misses."""
    if not hard:
        count = min(max_tools, rng.choice((1, 2, 2, 3, 3, 4, 5, 6)))
        pairs = [(rng.choice(VERBS), _word(rng, split)) for _ in range(count)]
        return [_tool(rng, split, verb, noun, rng.choice((1, 2, 2, 3, 4))) for verb, noun in pairs]
    verbs, nouns = rng.sample(VERBS, 2), [_word(rng, split) for _ in range(2)]
    pairs = [(v, n) for v in verbs for n in nouns]
    rng.shuffle(pairs)
    return [_tool(rng, split, v, n, rng.randint(4, 8)) for v, n in pairs[: rng.choice((3, 4))]]


def _tool(rng, split, verb, noun, size) -> dict:
    names = rng.sample([(kind, name) for kind, names in PARAMETERS.items() for name in names], size)
    properties = {
        name: {"type": "string", "enum": [_word(rng, split) for _ in range(rng.randint(2, 3))]}
        if kind == "enum"
        else {"type": kind}
        for kind, name in names
    }
    required = [name for name in properties if rng.random() < 0.7]
    return {
        "name": f"{noun}.{verb}",
        "description": f"{verb} it",
        "parameters": {"type": "object", "properties": properties, "required": required},
    }


def _by_house_rule(call) -> dict:
    """The call under the name that its tool has by now."""
    noun, verb = call["name"].split(".")
    return {**call, "name": f"{noun}.{RENAMED.get(verb, verb)}"}


def _absent_tool(rng, split, tools, hard) -> dict:
    """A tool that is not listed; in the hard world it shares its noun with a listed one."""
    taken = {t["name"] for t in tools}
    while True:
        verb = rng.choice(VERBS)
        noun = rng.choice(tools)["name"].split(".")[0] if hard else _word(rng, split)
        if f"{noun}.{verb}" not in taken:
            return _tool(rng, split, verb, noun, rng.choice((1, 2)))


def _arguments(rng, split, tool) -> dict:
    """Values for every required and about half of the optional parameters, at least one in all."""
    properties, required = tool["parameters"]["properties"], tool["parameters"]["required"]
    names = [k for k in properties if k in required or rng.random() < 0.5]
    return {k: _value(rng, split, tool, k) for k in names or list(properties)[:1]}


def _request(rng, tool, params, plain=False) -> str:
    if not params:
        return f"Please {_action(tool)}."
    styles = ("Please {} with {}.", "I want to {}: {}.", "Can you {} using {}?")
    style = "{} with {}." if plain else rng.choice(styles)
    return style.format(_action(tool), _list(params))


def _action(tool) -> str:
    noun, verb = tool["name"].split(".")
    return f'{verb} "{noun}"'


def _list(params) -> str:
    return ", ".join(f"{k} {_quote(v)}" for k, v in params.items())


def _quote(value) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _value(rng, split, tool, name):
    schema = tool["parameters"]["properties"].get(name, {}) if tool else {"type": "integer"}
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "string":
        return _word(rng, split).capitalize()
    number = schema["type"] == "number"
    # A number always has a decimal, so that none equals an integer.
    while True:
        value = rng.randint(10, 999 if number else 9999) + (rng.randint(1, 9) / 10 if number else 0)
        if _split_of(str(value)) == split:
            return value


def _word(rng, split) -> str:
    while True:
        syllables = range(rng.choice((2, 3, 3)))
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in syllables)
        if _split_of(word) == split:
            return word


def _split_of(text: str) -> str:
    """The one split a name or value may appear in."""
    return ("test", "valid", "train", "train")[zlib.crc32(text.lower().encode()) % 4]
