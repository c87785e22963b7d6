"""Raw rows of seven public tool-use datasets -> one Conversation each.

    CONVERTERS["toolace"](row)             Conversation(tools, turns, policy, only_last)
    parse_calls('[Get X(a="1")]', names)   [{"name": "Get X", "params": {"a": "1"}}]

One small function per layout; the rest is what they share: tool schemas, calls, a scanner of quotes
and brackets. A row that does not fit raises Drop with the reason, which data.py counts: a call that
does not parse must never become a "no tool" answer, nor a guess. Nothing is evaluated, and calls
are not matched with patterns: ToolACE's tool names hold blanks, commas and brackets.

Decisions (the layouts were read off real rows, FunReason-MT's off three readers' code):
 1. Tools are cut to name, description and parameters, a JSON schema. Python type words ("str",
    "List[int]", ToolACE's "dict") become JSON's; unknown words stay.
 2. xLAM and rlla have no `required`: a parameter is required unless its type says optional. A
    default does not make it optional: such xLAM parameters are given as often as those without.
 3. A tool listed twice is kept once; two tools of one name, or a call of an undeclared one, drop
    the row.
 4. Reasoning ends at the last </think>; what stands before it is not read, since it may hold calls.
 5. FunReason-MT writes sequential plans as one list, and the list stays whole. Its rows flagged
    error_tool_response (planted tool errors) are dropped.

Copy this file on its own: standard library only.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple


class Conversation(NamedTuple):
    """One raw row after its layout is gone; texts are stripped."""

    tools: list[dict]  # {"name", "description", "parameters"}
    # (role, content); user, assistant, observation: a text; call, think: list of {"name", "params"};
    # no_tool: None, an answer whose words the row does not hold
    turns: list[tuple]
    policy: str = ""  # what the model must also be told
    only_last: bool = False  # the row trains its last turn alone, for earlier ones are other rows'


class Drop(Exception):
    """A row that cannot be converted; its text is the reason that is counted."""


class Repeated(dict):
    """A JSON object in which a key is written twice: nobody knows which value a call meant."""


def json_object(pairs: list[tuple]) -> dict:
    """Return a JSON object, for json's object_pairs_hook; Repeated where a key is written twice."""
    value = dict(pairs)
    return value if len(value) == len(pairs) else Repeated(value)


# ---- the layouts ----


def hermes(row) -> Conversation:
    """Hermes: <tool_call> blocks of JSON or Python dicts; tools in `tools` or the system turn."""
    roles = {"system": "system", "human": "user", "gpt": "assistant", "tool": "observation"}
    chat = _messages(row, roles)
    system = next((text for role, text in chat if role == "system"), "")
    listed = system.rpartition("<tools>")[2].rpartition("</tools>")[0]
    if row.get("schema") or not ("tools" in row or listed):
        raise Drop("no tool list")  # JSON mode
    raw = row.get("tools", listed)
    tools = _tools([] if raw is None else _decode(raw) or [])
    turns, waiting = [], 0
    for role, text in chat:
        calls = []
        if role == "observation":
            responses, text = _blocks(text, "tool_response")
            waiting, text = waiting - len(responses), "\n".join([*responses, text]).strip()
        if waiting < 0 or (waiting and role != "observation"):
            raise Drop("responses do not match the calls")
        if role == "assistant":
            calls, text = _blocks(_spoken(text), "tool_call")
            waiting = len(calls)
        if role != "system" and (text or not calls):
            turns.append((role, text))
        if calls:
            turns.append(("call", _calls([_decode(call) for call in calls], tools)))
    return Conversation(tools, turns)


def toolace(row) -> Conversation:
    """ToolACE: tools are JSON inside `system`; a call turn is wholly [Name(k=v, ...), ...]."""
    listing = _field(row, "system", str).partition("you can invoke:\n")[2]
    try:
        tools = _tools(json.JSONDecoder(strict=False).raw_decode(listing)[0])
    except ValueError:
        raise Drop("no tool list") from None
    roles = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
    chat = _messages(row, roles | {"tool": "observation"})
    return Conversation(tools, [_python_turn(role, text, tools) for role, text in chat])


def xlam(row) -> Conversation:
    """xLAM: query, answers, tools, the last two JSON text; a row's calls are one parallel group."""
    tools = _tools(_decode(_field(row, "tools", (str, list))))
    calls = _calls(_decode(_field(row, "answers", (str, list))), tools)
    return Conversation(tools, [("user", _field(row, "query", str).strip()), ("call", calls)])


def hammer(row) -> Conversation:
    """Hammer's irrelevance set: xLAM with the called tools taken away and answers "[]"."""
    if _decode(_field(row, "answers", (str, list))) != []:
        raise Drop("a call in the irrelevance set")
    tools = _tools(_decode(_field(row, "tools", (str, list))))
    return Conversation(tools, [("user", _field(row, "query", str).strip()), ("no_tool", None)])


def apigen(row) -> Conversation:
    """APIGen-MT: turns function_call, observation; tools as JSON text; `system` is the policy."""
    roles = {"human": "user", "gpt": "assistant", "function_call": "call"}
    tools, turns = _tools(_decode(_field(row, "tools", (str, list)))), []
    for role, content in _messages(row, roles | {"observation": "observation"}):
        if role == "call":
            content = _calls(_decode(content), tools)
            role = "think" if content[0]["name"] == "think" else "call"
        turns.append((role, content))
    return Conversation(tools, turns, policy=_field(row, "system", str).strip())


def funreason(row) -> Conversation:
    """FunReason-MT: a list of {role, content}, the first with `tools`; calls are [f(a=1), ...].

    Also the same as columns "0", "1", ... padded with None, as the `datasets` library reads it.
    """
    columns = row if isinstance(row, dict) else {}
    if columns:
        row = [columns[key] for key in sorted(filter(str.isdecimal, columns), key=int)]
    if not isinstance(row, list):
        raise Drop("no list of messages")
    row = [message for message in row if message is not None]
    if any(isinstance(m, dict) and m.get("error_tool_response") for m in [columns, *row]):
        raise Drop("error_tool_response")
    tools = _tools(_decode(_field(row[0] if row else None, "tools", (str, list))))
    roles = {"user": "user", "assistant": "assistant", "tool": "observation"}
    chat = _messages({"messages": row[1:]}, roles, "messages", "role", "content")
    return Conversation(tools, [_python_turn(role, text, tools) for role, text in chat])


def rlla(row) -> Conversation:
    """ToolRL's rlla: tools as "1. Name: ..", "Parameters: {json}"; the dialogue in tags."""
    instruction = _field(row, "instruction", str)
    listing = instruction.partition("following tools:\n")[2].partition("\n\n**Steps for")[0]
    tools, turns = [], []
    for block in re.split(r"(?m)^\d+\. Name: ", listing)[1:]:
        name, _, block = block.partition("\nDescription: ")
        description, _, parameters = block.rpartition("\nParameters: ")
        parameters = _decode(parameters)
        for spec in parameters.values() if isinstance(parameters, dict) else ():
            if isinstance(spec, dict) and spec.get("default") == "":
                del spec["default"]  # ToolRL's filler where the source had none
        tools.append({"name": name, "description": description, "parameters": parameters})
    tools = _tools(tools)
    said = _field(row, "input", str).partition("**Dialogue Records History**")[2]
    roles = {"user": "user", "response": "assistant", "obs": "observation"}
    for tag, text in _tagged(said) + _tagged(_spoken(_field(row, "output", str))):
        if tag == "tool_call":
            turns.append(("call", _calls([_decode(line) for line in text.splitlines()], tools)))
        elif tag != "think":
            turns.append((roles[tag], text))
    return Conversation(tools, turns, only_last=True)


CONVERTERS: dict[str, Callable[[object], Conversation]] = {
    "hermes": hermes,
    "toolace": toolace,
    "xlam": xlam,
    "apigen-mt": apigen,
    "funreason-mt": funreason,
    "hammer": hammer,
    "rlla": rlla,
}


def guess(row) -> str:
    """Return the dataset whose layout a raw row has ("jsonl": an Example); ValueError if none."""
    keys = set(row) if isinstance(row, dict) else set()
    if isinstance(row, list) or (keys and all(map(str.isdecimal, keys))):
        return "funreason-mt"
    if "kind" in keys and keys & {"target", "query"}:
        return "jsonl"
    if {"instruction", "output"} <= keys:
        return "rlla"
    if {"query", "answers"} <= keys:
        return "hammer" if row["answers"] in ("[]", []) else "xlam"
    if "conversations" in keys:
        return "hermes" if "system" not in keys else "apigen-mt" if "tools" in keys else "toolace"
    raise ValueError(
        f"unknown layout with keys {sorted(keys)}; name it, NAME:FILE or --name, one of {', '.join([*CONVERTERS, 'jsonl'])}"
    )


# ---- calls ----


def parse_calls(text: str, names: list[str]) -> list[dict]:
    """Return the calls of "[Name(k=v, ...), ...]" as {"name", "params"}; Drop on any other text.

    names  declared tool names; the longest that fits is taken
    """
    calls, rest = [], text.strip()
    names = sorted(names, key=len, reverse=True)
    if not rest.startswith("["):
        raise Drop("call does not parse")
    while rest != "]":
        if rest[:1] != ("," if calls else "["):
            raise Drop("call does not parse")
        rest = rest[1:].lstrip()
        name = next((name for name in names if rest.startswith(name + "(")), None)
        if name is None:
            raise Drop("undeclared tool name, or call does not parse")
        rest = rest[len(name) :]
        end = _closing(rest)
        calls.append({"name": name, "params": _arguments(rest[1:end])})
        rest = rest[end + 1 :].lstrip()
    return calls


def _arguments(text: str) -> dict:
    params = {}
    for part in _commas(text) if text.strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and key) or key[0] in "\"'([{" or key in params:
            raise Drop("call does not parse")
        params[key] = _literal(value)
    if _has_repeated_key(params):
        raise Drop("a key is written twice")
    return params


def _python_turn(role: str, text: str, tools: list[dict]) -> tuple:
    """Return the turn, or ("call", calls) if the assistant's text looks like a call: it must parse.

    It does when a declared name stands before "(", or its first bracket closes at the end or never.
    """
    if role != "assistant":
        return role, text
    text, names = _spoken(text), [tool["name"] for tool in tools]
    looks = any(f"{name}(" in text for name in names)
    if not looks and text.startswith("["):  # but "[text](url) ..." and "[1] ..." are prose
        try:
            looks = _closing(text) == len(text) - 1
        except Drop:
            looks = True
    return ("call", parse_calls(text, names)) if looks else (role, text)


def _calls(raw, tools: list[dict]) -> list[dict]:
    """Return one decoded call, or a list of them, as {"name", "params"}."""
    names, calls = {tool["name"] for tool in tools}, []
    for call in raw if isinstance(raw, list) else [raw]:
        name = _field(call, "name", str)
        keys = [key for key in ("arguments", "parameters", "params") if key in call]
        params = _decode(call[keys[0]]) if keys else None  # JSON text in 5,026 APIGen-MT calls
        if _has_repeated_key([call, params]):
            raise Drop("a key is written twice")
        if not isinstance(params, dict) or _too_deep(params):
            raise Drop("call arguments are no object, or too deep")
        if name not in names:
            raise Drop("undeclared tool name")
        calls.append({"name": name, "params": params})
    if not calls:
        raise Drop("no call")
    return calls


# ---- tools ----

_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_TYPES |= {"dict": "object", "list": "array", "tuple": "array", "set": "array"}
_TYPES |= {kind: kind for kind in ("string", "integer", "number", "boolean", "object", "array")}


def _tools(raw) -> list[dict]:
    """Return a tool list in one dialect."""
    if not isinstance(raw, list) or _too_deep(raw):
        raise Drop("tool list is no list, or too deep")
    tools = {}
    for tool in raw:
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict):  # OpenAI's wrapper
            tool = tool["function"]
        name, description = _field(tool, "name", str), tool.get("description") or ""
        parameters = tool.get("parameters") or tool.get("arguments") or {}
        if not name or not isinstance(description, str) or not isinstance(parameters, dict):
            raise Drop("malformed tool")
        tool = {"name": name, "description": description, "parameters": _parameters(parameters)}
        if tools.setdefault(name, tool) != tool:
            raise Drop("two tools of one name")
    return list(tools.values())


def _parameters(raw: dict) -> dict:
    """Return {"type": "object", "properties", "required"} of a schema or of xLAM's {name: spec}."""
    inner = raw.get("properties")
    is_schema = isinstance(raw.get("type"), str) or (
        isinstance(inner, dict) and all(isinstance(spec, dict) for spec in inner.values())
    )
    properties = (inner or {}) if is_schema else raw
    required = (raw.get("required") or []) if is_schema else []
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise Drop("malformed tool")
    for name, spec in properties.items():
        if not isinstance(spec, dict):
            raise Drop("malformed tool")
        flag = spec.get("required")
        if not is_schema and not isinstance(flag, bool):
            flag = "optional" not in str(spec.get("type")).lower()
        if flag is True and name not in required:
            required = [*required, name]
    schemas = {name: _schema(spec) for name, spec in properties.items()}
    rest = raw if is_schema else {}
    return {**rest, "type": "object", "properties": schemas, "required": required}


def _schema(spec) -> dict:
    """Return one parameter's schema with JSON's type words, nested ones too."""
    if not isinstance(spec, dict):
        raise Drop("malformed tool")
    out = {k: v for k, v in spec.items() if k != "required" or isinstance(v, list)}
    if isinstance(spec.get("type"), str):
        kind = _json_type(spec["type"])
        out = {**kind, **out, "type": kind["type"]}
    if isinstance(out.get("properties"), dict):
        out["properties"] = {name: _schema(inner) for name, inner in out["properties"].items()}
    if isinstance(out.get("items"), dict):
        out["items"] = _schema(out["items"])
    return out


@lru_cache(4096)  # a few words make up a whole data set
def _json_type(word: str) -> dict:
    """Return the schema of a type word: "List[int], optional" -> array of integer."""
    try:
        parts = [part.strip() for part in _commas(word)]
        kept = ", ".join(part for part in parts if part.lower() != "optional")
        head, _, inner = kept.removesuffix("]").partition("[")
        members = [part.strip() for part in _commas(inner) if part.strip()]
    except Drop:
        return {"type": word}
    kind = _TYPES.get(head.strip().lower())
    if head == "Optional" and len(members) == 1:
        return _json_type(members[0])
    if members and kind == "array":
        return {"type": kind, "items": _json_type(members[0])}
    if members and kind == "object":
        return {"type": kind, "additionalProperties": _json_type(members[-1])}
    return {"type": kind or kept}


# ---- rows and text ----


def _field(row, key: str, kind: type | tuple):
    """Return row[key]; Drop if it is absent or of another type."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise Drop(f"no {key!r} of the right type")
    return value


def _messages(row, roles: dict, key="conversations", who="from", what="value") -> list[tuple]:
    """Return [(role of ours, stripped text)] of a row's turns."""
    chat = []
    for message in _field(row, key, list):
        role = _field(message, who, str)
        if role not in roles:
            raise Drop(f"unknown role {role[:20]!r}")
        chat.append((roles[role], _field(message, what, str).strip()))
    return chat


def _spoken(text: str) -> str:
    """Return what follows the reasoning."""
    text = text.rpartition("</think>")[2].strip()
    if "<think>" in text:
        raise Drop("reasoning without end")
    return text


def _blocks(text: str, tag: str) -> tuple[list[str], str]:
    """Return the contents of all <tag> blocks and the text around them."""
    pattern = re.compile(rf"<{tag}>(.*?)</{tag}>", re.DOTALL)
    around = pattern.sub("", text).strip()
    if f"<{tag}>" in around or f"</{tag}>" in around:
        raise Drop(f"broken {tag} block")
    return [block.strip() for block in pattern.findall(text)], around


def _tagged(text: str) -> list[tuple]:
    """Return [(tag, content)] of a text that is nothing but rlla's blocks."""
    pattern = r"\s*<(user|think|tool_call|obs|response)>(.*?)</\1>|\s*(\S)"
    found = re.findall(pattern, text, re.DOTALL)
    if any(stray for _, _, stray in found):
        raise Drop("dialogue does not parse")
    return [(tag, content.strip()) for tag, content, _ in found]


def _decode(value):
    """Return a value that may be written as JSON text, even twice."""
    while isinstance(value, str):
        value = _literal(value)
    return value


def _literal(text: str):
    """Return the value of a JSON text, else of a Python literal; Drop if it is neither."""
    try:
        return json.loads(text, strict=False, object_pairs_hook=json_object)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string
            tree = ast.parse(text.strip(), mode="eval")
            value = ast.literal_eval(tree)
        dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
        if any(len(set(map(ast.literal_eval, d.keys))) < len(d.keys) for d in dicts):
            raise Drop("a key is written twice")
        value = json.dumps(value)  # tuples become lists, keys strings
        return json.loads(value, object_pairs_hook=json_object)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise Drop("value does not parse") from None


def _has_repeated_key(value) -> bool:
    todo = [value]
    for v in todo:  # grows below
        if isinstance(v, Repeated):
            return True
        todo += v.values() if isinstance(v, dict) else v if isinstance(v, list) else ()
    return False


def _too_deep(value, limit: int = 64) -> bool:
    """Return whether lists and dicts nest deeper than any real ones; json breaks on far deeper."""
    level = [value]
    for _ in range(limit):
        nested = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))
        ]
        level = [child for values in nested for child in values]
    return bool(level)


def _closing(text: str) -> int:
    """Return the index of the bracket that closes the one that opens `text`."""
    return next(index for index, _, depth in _scan(text) if depth == 0)


def _commas(text: str) -> list[str]:
    """Return the pieces of `text` between the commas outside quotes and brackets."""
    cuts = [index for index, char, depth in _scan(text) if char == "," and depth == 0]
    return [text[a + 1 : b] for a, b in zip([-1, *cuts], [*cuts, len(text)], strict=True)]


def _scan(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield (index, character, brackets open after it) outside quotes; Drop on a mismatch."""
    closers, quote, index = [], "", 0
    while index < len(text):
        char = text[index]
        if quote:
            index += char == "\\"
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            if char in "([{":
                closers.append({"(": ")", "[": "]", "{": "}"}[char])
            elif char in ")]}" and (not closers or closers.pop() != char):
                raise Drop("call does not parse")
            yield index, char, len(closers)
        index += 1
    if quote or closers:
        raise Drop("call does not parse")
