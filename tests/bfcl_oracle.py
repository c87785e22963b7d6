"""Answers that BFCL must accept, from its ground truth, and corrupted ones that it must reject."""

import ast
import importlib
import inspect
import json

from tasks import bfcl

WRONG = {  # corruption -> what it does to the calls of an AST case
    "wrong name": lambda calls, need: [
        {**calls[0], "name": "other_" + calls[0]["name"]},
        *calls[1:],
    ],
    "extra param": lambda calls, need: _with(calls, {"surplus_parameter": "1"}),
    "missing call": lambda calls, need: calls[:-1],
    "extra call": lambda calls, need: [*calls, calls[0]],
    "missing required": lambda calls, need: _without(calls, need),
    "wrong value": lambda calls, need: _with(calls, {need: _other(calls[0]["params"][need])}),
}


def calls_of(entry: bfcl.Entry) -> list[dict]:
    """Calls of an AST case: the first choice of each required parameter, in its language's form."""
    docs = {doc["name"]: doc["parameters"] for doc in entry.checked["function"]}
    write = {"simple_java": _java, "simple_javascript": _javascript}.get(
        entry.category, lambda v, doc: v
    )
    calls = []
    for call in entry.truth:
        [(name, choices)] = call.items()
        doc, params = docs.get(name, {"properties": {}}), {}
        for key, options in choices.items():
            if "" not in options or key in doc.get("required", []):
                value = plain(next((o for o in options if o != ""), ""))
                params[key] = write(value, doc["properties"].get(key, {"type": "any"}))
        calls.append({"name": name, "params": params})
    return calls


def required(entry: bfcl.Entry, calls: list[dict]) -> str | None:
    """The first required parameter of the first call that it has."""
    for doc in entry.checked["function"]:
        if doc["name"] == calls[0]["name"]:
            return next(
                (k for k in doc["parameters"].get("required", []) if k in calls[0]["params"]), None
            )
    return None


def plain(choice):
    """The value of a choice; dicts hold lists of choices, and "" is one that may be left out."""
    if isinstance(choice, list):
        return [plain(item) for item in choice]
    if not isinstance(choice, dict):
        return choice
    out = {}
    for key, options in choice.items():
        if not isinstance(options, list):
            out[key] = options
        elif "" not in options:
            out[key] = plain(options[0])
    return out


def turns_of(entry: bfcl.Entry) -> list[list[dict]]:
    """Calls per turn of a multi-turn case; the simulator's signatures name positional arguments."""
    return [[_named(source, entry) for source in turn] for turn in entry.truth]


def _named(source, entry):
    call = ast.parse(source, mode="eval").body
    for name in entry.checked["involved_classes"]:
        cls = getattr(importlib.import_module(bfcl.package().paths[name]), name)
        if hasattr(cls, call.func.id):
            args = [ast.literal_eval(a) for a in call.args]
            kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
            bound = (
                inspect.signature(getattr(cls, call.func.id)).bind(None, *args, **kwargs).arguments
            )
            return {"name": call.func.id, "params": {k: v for k, v in list(bound.items())[1:]}}
    raise AssertionError(source)


def _with(calls, params):
    return [{**calls[0], "params": {**calls[0]["params"], **params}}, *calls[1:]]


def _without(calls, key):
    kept = {k: v for k, v in calls[0]["params"].items() if k != key}
    return [{**calls[0], "params": kept}, *calls[1:]]


def _other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 987654
    if isinstance(value, str):
        return value + " junk"
    return [*value, "junk"] if isinstance(value, list) else {**value, "junk": "junk"}


def _java(value, doc):
    kind, items = doc["type"], (doc.get("items") or {}).get("type")
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return str(value) + {"long": "L", "float": "f"}.get(kind, "")
    if kind == "Array" and isinstance(value, list):
        return f"new {items}[]{{{', '.join(_java(v, {'type': items}) for v in value)}}}"
    if kind == "ArrayList" and isinstance(value, list):
        parts = [f'"{v}"' if items == "String" else _java(v, {"type": items}) for v in value]
        return f"new ArrayList<{items}>(Arrays.asList({', '.join(parts)}))"
    if isinstance(value, dict):
        puts = [f'put("{k}", {json.dumps(v)});' for k, v in value.items()]
        return f"new HashMap<String, Object>() {{{{ {' '.join(puts)} }}}}"
    return value


def _javascript(value, doc):
    return value if isinstance(value, str) else json.dumps(value)
