"""Raw rows of tool-use data -> one Conversation each: public data sets, OpenAI and ShareGPT chats.

    guess(row)                             the layout of a row, a key of CONVERTERS
    CONVERTERS["toolace"](row)             Conversation(tools, turns, policy, only_last)
    parse_calls('[Get X(a="1")]', names)   [{"name": "Get X", "params": {"a": "1"}}]

One small function per layout; the rest is what they share: turns, tool schemas, calls, a scanner of
quotes and brackets. A row that does not fit raises Drop with the reason, which data.py counts: a
call that does not parse must never become a "no tool" answer, nor a guess. Nothing is evaluated,
and calls are not matched with patterns: ToolACE's tool names hold blanks, commas and brackets.

Decisions (the layouts were read off real rows, FunReason-MT's off three readers' code):
 1. Tools are cut to name, description and parameters, a JSON schema. Python type words ("str",
    "List[int]", ToolACE's "dict") become JSON's; unknown words stay.
 2. xLAM and rlla have no `required`: a parameter is required unless its type says optional. A
    default does not make it optional: such xLAM parameters are given as often as those without.
 3. A tool listed twice is kept once; two tools of one name, or a call of an undeclared one, drop
    the row. So does a tool whose parameters stand under a key that is not known.
 4. Reasoning ends at the last </think>; what stands before it is not read, since it may hold calls.
 5. FunReason-MT writes sequential plans as one list, and the list stays whole. Its rows flagged
    error_tool_response (planted tool errors) are dropped.
 6. The system text of a chat is its policy, unless it lists tools between <tools> tags, as Hermes
    does: then it explains a form of call that is not ours.
 7. A call without arguments (none, null or "") has the arguments {}.

To add a layout: a function, a line in CONVERTERS, a case in `guess`; its published file in
data.SOURCES. Copy this file on its own: standard library only.
"""

import ast
import itertools
import json
import re
import warnings
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple


class Conversation(NamedTuple):
    """One raw row after its layout is gone; texts are stripped."""

    tools: list[dict]  # {"name", "description", "parameters"}
    # (role, content); user, assistant, observation: a text; call, think: [{"name", "params"}, ..];
    # no_tool: None, an answer whose words the row does not hold
    turns: list[tuple]
    policy: str = ""  # what the model must also be told
    only_last: bool = False  # the row trains its last turn alone, for earlier ones are other rows'


class Drop(Exception):
    """A row that cannot be converted; its text is the reason that is counted."""


# the words for who speaks -> ours
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant"}
ROLES |= dict.fromkeys(("function_call", "tool_call"), "call")
ROLES |= dict.fromkeys(("tool", "function", "observation", "tool_response"), "observation")


class Repeated(dict):
    """A JSON object in which a key is written twice: nobody knows which value a call meant."""


def json_object(pairs: list[tuple]) -> dict:
    """Return a JSON object, for json's object_pairs_hook; Repeated where a key is written twice."""
    value = dict(pairs)
    return value if len(value) == len(pairs) else Repeated(value)


# ---- the layouts ----


def chat(row) -> Conversation:
    """OpenAI, TRL (`messages`, `tool_calls`), ShareGPT, APIGen-MT (`conversations`), with `tools`.

    Calls are `tool_calls`, Anthropic's `tool_use`, turns of their own, or <tool_call> blocks of JSON.
    """
    said = _messages(row)
    if any(role == "user" and None in message.values() for role, _, message in said):
        row = unpadded(row)  # written from Arrow, where every turn has the keys of all
        said = _messages(row)
    listed = _listed(said)
    raw = row.get("tools", row.get("functions", listed))
    tools = _tools(_decode(raw or "[]") or [])
    system = [text for role, text, _ in said if role == "system"]
    if any(role == "system" for role, *_ in said[len(system) :]):
        raise Drop("a system turn in mid-conversation")
    policy = [_text(row.get("system"), "system"), *system]
    policy = [text for text in policy if text and "</tools>" not in text]
    return Conversation(tools, _turns(said, tools), "\n\n".join(policy))


def hermes(row) -> Conversation:
    """Hermes: a chat with its tools in `tools` or in the system turn; without, it is JSON mode."""
    said = _messages(row)
    if row.get("schema") or ("tools" not in row and not _listed(said)):
        raise Drop("no tool list")
    return chat(row)


def toolace(row) -> Conversation:
    """ToolACE: tools are JSON inside `system`; a call turn is wholly [Name(k=v, ...), ...]."""
    listing = _field(row, "system", str).partition("you can invoke:\n")[2]
    try:
        tools = _tools(json.JSONDecoder(strict=False).raw_decode(listing)[0])
    except ValueError:
        raise Drop("no tool list") from None
    return Conversation(tools, _turns(_messages(row), tools, python=True))


def xlam(row) -> Conversation:
    """xLAM: query, answers, tools, the last two JSON text; a row's calls are one parallel group."""
    tools = _tools(_json_field(row, "tools"))
    calls = _calls(_json_field(row, "answers"), tools)
    return Conversation(tools, [("user", _field(row, "query", str).strip()), ("call", calls)])


def hammer(row) -> Conversation:
    """Hammer's irrelevance set: xLAM with the called tools taken away and answers "[]"."""
    if _json_field(row, "answers") != []:
        raise Drop("a call in the irrelevance set")
    tools = _tools(_json_field(row, "tools"))
    return Conversation(tools, [("user", _field(row, "query", str).strip()), ("no_tool", None)])


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
    tools = _tools(_json_field(row[0] if row else None, "tools"))
    return Conversation(tools, _turns(_messages({"messages": row[1:]}), tools, python=True))


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
            turns.append(("call", _calls([_decode(line) for line in text.split("\n")], tools)))
        elif tag != "think":
            turns.append((roles[tag], text))
    return Conversation(tools, turns, only_last=True)


CONVERTERS: dict[str, Callable[[object], Conversation]] = {
    "hermes": hermes,
    "toolace": toolace,
    "xlam": xlam,
    "apigen-mt": chat,
    "funreason-mt": funreason,
    "hammer": hammer,
    "rlla": rlla,
    "openai": chat,
    "sharegpt": chat,
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
    if "messages" in keys:
        return "openai"
    if "conversations" in keys:
        turns = str(row["conversations"])
        if "you can invoke:\n" in str(row.get("system")):
            return "toolace"
        if row.get("system") and "tools" in keys:
            return "apigen-mt"
        turns_of_their_own = "'function_call'" in turns or "'observation'" in turns
        marked = "schema" in keys or {"id", "tools"} <= keys or "<tools>" in turns
        return "hermes" if marked and not turns_of_their_own else "sharegpt"
    raise ValueError(
        f"unknown layout with keys {sorted(map(str, keys))}; name it, NAME:FILE or --name, "
        f"one of {', '.join([*CONVERTERS, 'jsonl'])}"
    )


# ---- calls ----


def parse_calls(text: str, names: list[str]) -> list[dict]:
    """Return the calls of "[Name(k=v, ...), ...]" as {"name", "params"}; Drop on any other text.

    names  declared tool names; the longest that fits is taken
    """
    calls, rest = [], text.strip()
    names = sorted(names, key=len, reverse=True)
    while not calls or rest != "]":
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


def _is_python_call(text: str, names: list[str]) -> bool:
    """Return whether a text is meant as "[Name(k=v, ...), ...]": then it must parse.

    It is when a declared name stands before "(", or its first bracket closes at the end or never.
    """
    if any(f"{name}(" in text for name in names):
        return True
    try:  # "[text](url) ..." and "[1] ..." are prose
        return text.startswith("[") and _closing(text) == len(text) - 1
    except Drop:
        return True


_ARGUMENTS = ("arguments", "parameters", "params")
_BESIDE_CALL = {*_ARGUMENTS, "name", "id", "type", "index", "call_id"}


def _calls(raw, tools: list[dict]) -> list[dict]:
    """Return one decoded call, or a list of them, as {"name", "params"}."""
    names, calls = {tool["name"] for tool in tools}, []
    for whole in raw if isinstance(raw, list) else [raw]:
        call = whole
        if isinstance(call, dict) and isinstance(call.get("function"), dict):  # OpenAI's wrapper
            call = call["function"]
        name = _field(call, "name", str)
        params = next((call[key] for key in _ARGUMENTS if call.get(key) is not None), None)
        if params is None and any(call[key] is not None for key in call.keys() - _BESIDE_CALL):
            raise Drop("call arguments under an unknown key")
        if isinstance(params, str):  # JSON text is OpenAI's form, and in 5,026 APIGen-MT calls
            params = _decode(params) if params.strip(' "') else None
        params = {} if params is None else params
        if _has_repeated_key([whole, params]):
            raise Drop("a key is written twice")
        if not isinstance(params, dict) or _too_deep(params):
            raise Drop("call arguments are no object, or too deep")
        if name not in names:
            raise Drop("undeclared tool name")
        calls.append({"name": name, "params": params})
    if not calls:
        raise Drop("no call")
    return calls


# Calls in the markup of other models. <tool_call> blocks are not among them: they are read.
_MARKUP = re.compile(
    r"""<[|/]?(?:functions?[ _-]?calls?|tool[ _-]?(?:calls|use)|function=|invoke\b|｜tool)
    | <\|(?:tool_call|python)_?(?:start|tag)?\|> | <toolcall> | \[TOOL_CALLS\] | functools\[ | ✿FUNCTION✿ | ```tool
    | <tool_code> | <start_function_call> | \bto=functions\.
    | ^[ ]*Action[ ]*:.*\n\s*Action[ ]Input[ ]*:
    | ["'](?:name|function)["']\s*:\s*["'][^"']*["']\s*,\s*["'](?:arguments|parameters|params)["']\s*:
    | \{\s*["'](?:arguments|parameters|params)["']\s*:\s*[{"']""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
_BARE = re.compile(  # where a call begins, not in mid-sentence
    r"^[ \t]*(?:Action[ ]*:[ ]*)?\[?([\w.-]+)\(\s*\w+\s*=(?!=|\s*\.\.\.)", re.MULTILINE
)
_NAMED = re.compile(r"""["'](?:name|function|tool|tool_name|action)["']\s*:\s*["']([^"']*)["']""")


def looks_like_call(text: str, names: list[str] = ()) -> bool:
    """Return whether an answer seems to be a call in a markup that is not read.

    names  declared tool names: {"name": "f"} and f(a=1) are calls only of these
    """
    named = _NAMED.findall(text) + _BARE.findall(text)
    if _MARKUP.search(text) or any(name in names for name in named):
        return True
    start = re.sub(r"\A\s*```\w*\s", "", text).lstrip("`[( \n").removeprefix("print(")
    return any(start.startswith(f"{name}(") for name in names)


def holds_call(row) -> bool:
    """Return whether a row that was dropped seems to hold a call, whatever its layout."""
    turns = row
    if isinstance(row, dict):
        turns = row.get("messages") or row.get("conversations") or [row]
    for turn in turns if isinstance(turns, list) and not _too_deep(turns) else ():
        turn = turn if isinstance(turn, dict) else {}
        role = turn.get("from") or turn.get("role") or "assistant"
        said = " ".join(str(turn.get(key)) for key in ("value", "content", "answers", "output"))
        if ROLES.get(str(role)) not in ("system", "user", "assistant") or turn.get("tool_calls"):
            return True
        marked = re.search(r"<tool_call>|'tool_use'|\[[^\[\](]+\(\w+ ?=", said)
        if ROLES[role] == "assistant" and (marked or looks_like_call(said)):
            return True
    return False


# ---- tools ----

_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_TYPES |= {"dict": "object", "list": "array", "tuple": "array", "set": "array"}
_TYPES |= {kind: kind for kind in ("string", "integer", "number", "boolean", "object", "array")}


_SCHEMAS = ("arguments", "input_schema", "inputSchema")  # Hermes, Anthropic, MCP
_BESIDE_TOOL = {"required", "strict", "returns", "return", "response", "responses", "output"}
_BESIDE_TOOL |= {"output_schema", "outputSchema", "annotations", "examples", "tags", "metadata"}


def bare(tool):
    """Return a tool without OpenAI's wrapper, its schema under "parameters"; others as they are."""
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        tool = tool["function"]
    if isinstance(tool, dict) and not tool.get("parameters"):
        for key in _SCHEMAS:
            if tool.get(key):
                rest = {k: v for k, v in tool.items() if k != key}
                return {**rest, "parameters": tool[key]}
    return tool


def _tools(raw) -> list[dict]:
    """Return a tool list in one dialect."""
    if not isinstance(raw, list) or _too_deep(raw):
        raise Drop("tool list is no list, or too deep")
    tools = {}
    for tool in raw:
        tool = bare(tool)
        name, description = _field(tool, "name", str), tool.get("description") or ""
        parameters = _decode(tool.get("parameters") or "{}") or {}
        unknown = [tool[key] for key in tool.keys() - _BESIDE_TOOL]
        if not parameters and any(isinstance(value, (dict, list)) and value for value in unknown):
            raise Drop("tool with parameters under an unknown key")
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
        isinstance(inner, dict)
        and all(spec is None or isinstance(spec, (dict, bool)) for spec in inner.values())
    )
    properties = (inner or {}) if is_schema else raw
    required = (raw.get("required") or []) if is_schema else []
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise Drop("malformed tool")
    if None in properties.values():  # Arrow gives every tool the parameters of all
        properties = unpadded(properties)
    for name, spec in properties.items():
        if is_schema and isinstance(spec, bool):  # JSON schema's "anything" and "nothing"
            continue
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
    if isinstance(spec, bool):
        return spec
    if not isinstance(spec, dict):
        raise Drop("malformed tool")
    out = {k: v for k, v in spec.items() if k != "required" or isinstance(v, list)}
    if isinstance(spec.get("type"), str):
        kind = _json_type(spec["type"])
        out |= {k: v for k, v in kind.items() if k == "type" or k not in out}  # in its place
    if isinstance(out.get("properties"), dict):
        inner = out["properties"].items()
        out["properties"] = {name: _schema(spec) for name, spec in inner if spec is not None}
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


def _json_field(row, key: str):
    """Return row[key], a list or a JSON text of one."""
    return _decode(_field(row, key, (str, list)))


def unpadded(value):
    """Return a JSON value without the keys of value null: Arrow gives all objects all keys."""
    if isinstance(value, dict):
        kept = {key: unpadded(inner) for key, inner in value.items() if inner is not None}
        return type(value)(kept)
    return [unpadded(inner) for inner in value] if isinstance(value, list) else value


def _messages(row) -> list[tuple[str, str, dict]]:
    """Return [(our role, stripped text, message)] of a chat with OpenAI's or ShareGPT's keys."""
    chat = []
    openai = isinstance(row, dict) and "messages" in row
    said = _field(row, "messages" if openai else "conversations", list)
    for message in itertools.chain.from_iterable(map(_without_blocks, said)):
        keys = ("role", "content") if openai else ("from", "value")
        if isinstance(message, dict) and not message.get(keys[0]):
            keys = ("from", "value") if openai else ("role", "content")
        word = _field(message, keys[0], str)
        if word not in ROLES:
            raise Drop(f"unknown role {word[:20]!r}")
        chat.append((ROLES[word], _text(message.get(keys[1]), ROLES[word]), message))
    return chat


def _without_blocks(message) -> list:
    """Return a message whose content holds Anthropic's tool_use or tool_result blocks as OpenAI's."""
    content = message.get("content") if isinstance(message, dict) else None
    blocks = content if isinstance(content, list) else []
    kinds = [block.get("type") if isinstance(block, dict) else None for block in blocks]
    thoughts = {"thinking", "redacted_thinking"}
    if not {"tool_use", "tool_result", *thoughts} & set(map(str, kinds)):
        return [message]
    found, calls, rest = [], [], []
    for kind, block in zip(kinds, blocks, strict=True):
        if kind == "tool_use":
            calls.append({**block, "arguments": block.get("input"), "input": None})
        elif kind == "tool_result":
            reply = {"tool_call_id": block.get("tool_use_id"), "content": block.get("content")}
            found.append({"role": "tool", **reply})
        elif kind not in thoughts:
            rest.append(block)
    if calls or rest or not found:
        calls = calls or message.get("tool_calls")
        found.append({**message, "content": rest or None, "tool_calls": calls})
    return found


def _text(content, role: str) -> str:
    """Return the stripped text of a turn: a text, OpenAI's list of parts, or a tool's result."""
    if isinstance(content, list) and content:
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) == len(content):
            content = "\n".join(_field(part, "text", str) for part in parts)
    if role == "observation" and isinstance(content, (dict, list)):
        content = json.dumps(content, ensure_ascii=False, default=str)
    if not isinstance(content, (str, type(None))):
        raise Drop("a turn that is no text")
    return (content or "").strip()


def _turns(said: list[tuple], tools: list[dict], python: bool = False) -> list[tuple]:
    """Return the turns of a Conversation; results that name their call by id stand in its order.

    python  calls are "[Name(k=v, ...)]"; else JSON, in the message or in <tool_call> blocks
    """
    names = [tool["name"] for tool in tools]
    turns, ids, places, asked, answered, told = [], [], [], 0, 0, []
    for role, text, message in said:
        if role == "observation":
            responses, text = _blocks(text, "tool_response")
            reply = message.get("tool_call_id")
            place = ids.index(reply) if reply in ids else len(ids)
            answered += len(responses) or reply in ids
            told.append(reply if reply in ids else None)
            twice = reply in ids and told.count(reply) > ids.count(reply)
            if answered > asked or twice or (ids and reply and reply not in ids):
                raise Drop("responses do not match the calls")
            index = bisect(places, place)
            places.insert(index, place)
            text = "\n".join([*responses, text]).strip()
            turns.insert(len(turns) - len(places) + 1 + index, (role, text))
        elif role != "system":
            plain = 0 if answered else len(told)  # without ids: one for all calls, or one for each
            if answered not in (0, asked) or (asked > 1 and plain not in (0, 1, asked)):
                raise Drop("responses do not match the calls")
            calls, raw = [], []
            if role == "assistant":
                text = _spoken(text)
            if role == "assistant" and python and _is_python_call(text, names):
                calls, text = parse_calls(text, names), ""
            elif role == "call" and python:
                raise Drop("a call turn, where calls are in the text")
            elif role == "call":
                calls, text = _calls(_decode(text), tools), ""
            elif role == "assistant" and not python:
                raw, text = _json_calls(text, message)
                calls = _calls(raw, tools) if raw else []
            if text or not calls:
                turns.append((role, text))
            if calls:
                thoughts = {call["name"] == "think" for call in calls}
                if len(thoughts) > 1:
                    raise Drop("think beside another call")
                turns.append(("think" if True in thoughts else "call", calls))
            ids = [call.get("id") for call in raw]
            ids, places, asked, answered, told = ids if all(ids) else [], [], len(calls), 0, []
    return turns


def _json_calls(text: str, message: dict) -> tuple[list, str]:
    """Return the raw calls in the fields or the text of an assistant's turn, and the other text."""
    blocks, text = _blocks(text, "tool_call")
    raw, fields = [], [message.get(key) or "[]" for key in ("tool_calls", "function_call")]
    for calls in map(_decode, [*blocks, *fields]):
        raw += calls if isinstance(calls, list) else [calls]
    return raw, text


def _listed(said: list[tuple]) -> str | None:
    """Return what the system turn of a chat holds between <tools> tags; None without such tags."""
    system = next((text for role, text, _ in said if role == "system"), "")
    _, tag, listed = system.rpartition("<tools>")
    return listed.rpartition("</tools>")[0] if "</tools>" in listed else None


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
    with suppress(ValueError, RecursionError):
        return json.loads(text, strict=False, object_pairs_hook=json_object)
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
