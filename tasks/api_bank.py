"""API-Bank, levels 1 and 2: the official test files as prompts, and call match.

    folder with level-1-api.json (399 samples) and level-2-api.json (135), from the folder
    api-bank/test-data of AlibabaResearch/DAMO-ConvAI or the hub data set liminghao1630/API-Bank

A sample is right if the response is one call of the gold API with equal arguments. For
ToolSearcher, the 45 searches of level 2, only the name counts, since its free-text keywords cannot
be matched. Values are compared as values: "5" is 5, 0.00001 and "1e-5" are "0.00001", "True" or
"true" is true, "['a']" is ["a"], and blanks around strings do not count. This is deterministic,
offline, and 100 % for the gold answers. The official execution, which is not implemented here,
gives them 84.5 % on level 1 because of lost state and changed databases.

Prompt: dialogue -> memory, its last user message -> query, earlier requests and results -> tool
steps. All documented parameters count as required (379 of 399 gold calls of level 1 use them all).
"""

import ast
import json
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

FILES = {"level_1": "level-1-api.json", "level_2": "level-2-api.json"}
POLICY = "The current year is 2023."  # the official instruction says so


@dataclass(frozen=True)
class Sample:
    """One call to make."""

    id: str
    category: str  # "level_1" | "level_2" | "level_2_search" (ToolSearcher)
    fields: dict  # of the prompt: tools, history, query, steps, policy
    gold: dict  # {"name", "params"}


def columns(counts: dict) -> dict:
    """Accuracies in percent: level 1, level 2 with and without its searches, where complete.

    counts  category -> (correct, total); numbers, or arrays of one shape
    """
    parts = {
        "level_1": ["level_1"],
        "level_2": ["level_2", "level_2_search"],
        "level_2_without_search": ["level_2"],
    }
    return {
        name: 100 * sum(counts[k][0] for k in names) / sum(counts[k][1] for k in names)
        for name, names in parts.items()
        if all(k in counts for k in names)
    }


def samples(folder: str | Path) -> list[Sample]:
    """The samples of both levels; ValueError or FileNotFoundError with the remedy."""
    found = []
    for level, file in FILES.items():
        path = Path(folder) / file
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; get {' and '.join(FILES.values())} from "
                "api-bank/test-data of AlibabaResearch/DAMO-ConvAI and pass their folder: "
                "--api_bank DIR"
            )
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        for index, row in enumerate(rows):
            try:
                gold, fields = read_request(row["expected_output"]), _fields(row)
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, sample {index}: {error!r}; take the official file"
                ) from None
            category = f"{level}_search" if gold["name"] == "ToolSearcher" else level
            found.append(Sample(f"{level}/{index}", category, fields, gold))
    return found


def read_request(text: str) -> dict:
    """The call of "API-Request: [Name(key='value', ...)]"; values are strings, not escaped."""
    match = re.fullmatch(r"\s*API-Request:\s*\[(\w+)\((.*)\)\]\s*", text, re.DOTALL)
    if not match:
        raise ValueError(f"no API-Request in {text[:200]!r}")
    pairs = re.findall(r"(\w+)='(.*?)'(?=, \w+='|$)", match[2], re.DOTALL)
    if ", ".join(f"{key}='{value}'" for key, value in pairs) != match[2]:
        raise ValueError(f"arguments of {text[:200]!r} do not read as key='value', ...")
    return {"name": match[1], "params": dict(pairs)}


def matches(calls: list[dict] | None, gold: dict) -> bool:
    """Whether the calls are the gold call and no other."""
    if not calls or len(calls) != 1 or calls[0]["name"] != gold["name"]:
        return False
    return gold["name"] == "ToolSearcher" or _same(calls[0]["params"], gold["params"])


def _fields(row):
    tools = [
        _tool(json.loads(line))
        for line in row["instruction"].split("API descriptions:\n")[1].splitlines()
    ]
    history, steps = [], []
    for role, text in re.findall(
        r"^(User|AI|API-Request): ?(.*?)(?=^(?:User|AI|API-Request|Generate API Request):)",
        row["input"],
        re.DOTALL | re.MULTILINE,
    ):
        text = text.strip()
        if role == "API-Request":
            request, _, result = text.partition(")]->")
            call = read_request(f"API-Request: {request})]")
            steps.append((json.dumps(call, ensure_ascii=False), result))
        else:
            history.append(("user" if role == "User" else "assistant", text))
    query = next(text for role, text in reversed(history) if role == "user")
    if history[-1][0] == "user":  # else the assistant spoke after it, and the memory shows both
        history = history[:-1]
    return {"tools": tools, "history": history, "query": query, "steps": steps, "policy": POLICY}


def _tool(doc):
    properties = doc["input_parameters"]
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": doc["name"], "description": doc["description"], "parameters": schema}


def _same(a, b) -> bool:
    a, b = _value(a), _value(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def _value(value):
    """Strings that read as numbers, booleans, lists or dicts as such; others stripped of blanks."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return value
    if isinstance(value, int):
        return Decimal(value)  # str() refuses more than 4,300 digits
    text = str(value).strip()  # of a small float with an exponent
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d{1,4})?", text):
        return Decimal(text)
    if text[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                pass
    return text
