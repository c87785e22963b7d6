"""Rewards and error classes: two strings, a response and its ground truth, become numbers.

    P predicted calls (m), G ground-truth calls (n), N sets of tool names, keys of a call's params

    _format     R_format  = 1 if the text is <tag> ... </tag>, each tag exactly once, else 0  Eq. 3
    _json_calls r_syntax  = 1 if the first block is JSON calls {"name", "params"}, else 0     Eq. 4
    _names      r_name    = |N_P & N_G| / |N_P | N_G|                                         Eq. 5
    _params     j may answer G_i if name_Gi = name_Pj and j is not used                       Eq. 6
    _keys       s_key     = |keys_G & keys_P| / |keys_G | keys_P|                             Eq. 7
    _values     s_value   = #(common keys with equal values) / max(|values_G|, |values_P|)    Eq. 8
    _params     s_best    = max over the candidates j of (s_key + s_value) / 2                Eq. 9
    _params     r_param   = sum over G_i of s_best(G_i) / max(m, n)                           Eq. 10
    outcome     R_correct = 6 (w1 r_syntax + w2 r_name + w3 r_param) - 3                      Eq. 11
    outcome     R_outcome = R_format + R_correct, in [-3, 4]                                  Eq. 12

(ToolUPT, section 3.2.1.) error_type names what is wrong in iTool's classes (Figure 3, appendix
A.1); forms says how a response is wrapped.

Where the paper is silent or misprinted:
1. Format ignores surrounding white space and checks only the tags of the target's type. "Each tag
   exactly once" is ours: the paper asks for tags at the start and the end of the output.
   Correctness reads the first block wherever it is.
2. Syntax is all or nothing: one bad call, missing or null params, an empty list, or a key repeated
   in an object at any depth, and r_syntax, r_name and r_param are 0. Extra keys are allowed.
3. Names are a set, as printed: a wrong number of calls shows in max(m, n) only.
4. Eq. 10's sum runs over the n ground-truth calls and U over the m predicted ones (printed the
   other way round). Matching is greedy in ground-truth order, as in ToolRL, from which this reward
   descends; the first best candidate wins, and a match that scores 0 uses up nothing.
5. Two calls without parameters have s_key = s_value = 1 (0/0 in print).
6. Values are equal as JSON: 1 = 1.0, true is not 1, "1" is not 1, lists ordered, objects not.
7. The weights are 1/3 each (no value in print), so a wrong name in good syntax still scores -1.
8. For an <answer> target R_correct is +3 for an answer in tags without a tool call, else -3: only
   this gives the stated range. Its words are free, but not empty. An answer is the text between the
   first <answer> and the last </answer>.
9. A response with tags of both kinds has not decided, as the prompt asks it to: R_correct is -3
   either way, or a policy in doubt would be paid for hedging. Tags inside the first block are data.

Nothing a model writes can raise, hang or leave [-3, 4]. NaN, Infinity and numbers beyond a float's
range (1e999) do not parse, nor do integers beyond Python's digit limit, nesting beyond its
recursion limit or calls longer than MAX_CHARS. Targets are data: a malformed one is a ValueError.
Copy this file on its own: it needs the standard library only.
"""

import ast
import cmath
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Longer calls do not parse: a response of 1,024 tokens has about 5,000 characters, and megabytes
# would take seconds in ast.literal_eval and in matching.
MAX_CHARS = 50_000


@dataclass(frozen=True)
class Parsed:
    """What a response is."""

    kind: str  # "tool_call" | "answer" | "malformed"
    calls: list[dict] | None  # of a tool_call: each with "name": str and "params": dict


@dataclass(frozen=True)
class Outcome:
    """The parts of the outcome reward (Eqs. 3-12)."""

    format: float  # R_format, 0.0 or 1.0
    syntax: float  # r_syntax, 0.0 or 1.0
    name: float  # r_name in [0, 1]
    param: float  # r_param in [0, 1]
    correct: float  # R_correct in [-3, 3]
    total: float  # R_outcome in [-3, 4]

    @property
    def right(self) -> bool:
        """Whether the response is completely right."""
        return self.total == 4


KINDS = (  # how a response is wrapped, right or wrong: exactly one applies
    "call",  # a <tool_call> block, whether it parses or not
    "answer",
    "both",  # tags of both kinds
    "untagged call",  # JSON in a code fence or between answer tags
    "neither",
)
FORMS = (  # a kind, and any of the others
    *KINDS,
    "empty answer",  # white space between the answer tags
    "repeated key",  # the first block would parse, but for a key written twice in one object
)


def parse(response: str) -> Parsed:
    """The first <tool_call> block as calls; without a block, whether there is an <answer>.

    A block that does not hold JSON calls is "malformed", and so is a text without block and answer.
    """
    _, block, _ = _around_block(response)
    if block is not None:
        calls = _json_calls(block)
        return Parsed("tool_call" if calls else "malformed", calls)
    return Parsed("malformed" if _answer(response) is None else "answer", None)


def forms(response: str) -> set[str]:
    """Which of FORMS a response, any text, has."""
    _, block, _ = _around_block(response)
    answer = _answer(response)
    fenced = response.split("```")[1::2]
    if _has_both(response):
        found = {"both"}
    elif block is not None:
        found = {"call"}
    elif _has_call_tag(response):
        found = {"neither"}  # half a block
    elif any(map(_LIKE_A_CALL.search, [*fenced, answer or ""])):
        found = {"untagged call"}
    else:
        found = {"neither"} if answer is None else {"answer"}
    if answer is not None and not answer.strip() and "call" not in found:
        found.add("empty answer")
    if block is not None and _json(block) is _BAD and _json(block, _LENIENT) is not _BAD:
        found.add("repeated key")
    return found


def parse_python(response: str) -> Parsed:
    """The calls of iTool's form, [Func Name(a="v", n=1), Other()]; other text is an "answer"."""
    text = response.strip()
    if not text.startswith("["):
        return Parsed("answer" if text else "malformed", None)
    calls = _python_calls(text)
    return Parsed("tool_call" if calls else "malformed", calls)


def outcome(
    response: str, target: str, *, weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
) -> Outcome:
    """Outcome reward of a response and its parts (Eqs. 3-12).

    response  str        any text, without the EOS token
    target    str        ground truth, one <tool_call> or one <answer> block
    weights   (3,) float of syntax, name and param, in [0, 1], sum 1

    For an <answer> target syntax = name = param = 1.0 or 0.0.
    Raises ValueError if the target is malformed or the weights do not sum to 1.
    """
    if not (len(weights) == 3 and min(weights) >= 0 and abs(sum(weights) - 1) < 1e-6):
        raise ValueError(f"weights (syntax, name, param) must be >= 0 and sum to 1: {weights}")
    wanted = _read_target(target)
    if wanted.kind == "answer":
        syntax = name = param = float(_is_answer(response))
    else:
        calls = None if _has_both(response) else parse(response).calls
        syntax = float(calls is not None)  # Eq. 4
        name = _names(calls, wanted.calls) if calls else 0.0
        param = _params(calls, wanted.calls) if calls else 0.0
    score = weights[0] * syntax + weights[1] * name + weights[2] * param
    # Eq. 11; dividing by the weights added in the same order makes a perfect score exactly 3
    correct = 6 * (score / (weights[0] + weights[1] + weights[2])) - 3
    format = _format(response, wanted.kind)
    return Outcome(format, syntax, name, param, correct, total=format + correct)  # Eq. 12


def binary(response: str, target: str) -> float:
    """1.0 if the response is completely right, i.e. R_outcome is 4, else 0.0 (Naive GRPO)."""
    return float(outcome(response, target).right)


def error_type(response: str, target: str) -> str | None:
    """The first class of iTool's Figure 3 that applies, None if the calls are right.

    response, target  str  <tool_call>{"name": .., "params": ..}</tool_call>, or Python calls
                           [Func Name(a="v", n=1), Other()], or a text without a call

    In this order: "Other" (tags of both kinds), "Code Syntax", "Other" (no call on either side, but
    an <answer> target not met), "Tools Count", "Tool Name", "Parameter Count", "Parameter Name",
    "Parameter Value". Calls may come in any order; they are paired so that the first class that
    applies is as late as possible.
    Looser than binary: format does not count, and strings are compared after BFCL's normalisation.
    A text against a target without tags and calls is right. ValueError if the target is malformed.
    """
    is_answer = target.lstrip().startswith("<answer>") and bool(_read_target(target))
    calls, wanted = _any_calls(response), _any_calls(target)
    if wanted is None or _is_undecided(target):
        raise ValueError(f"the target's calls do not parse; drop the example: {target[:200]!r}")
    if _is_undecided(response):
        return "Other"
    if calls is None:
        return "Code Syntax"
    if not calls and not wanted:
        return "Other" if is_answer and not _is_answer(response) else None
    if len(calls) != len(wanted):
        return "Tools Count"
    broken = (error for error, alike in _ALIKE.items() if not _pair_up(calls, wanted, alike))
    return next(broken, None)


# --- the equations ---


def _format(text: str, kind: str) -> float:
    """R_format (Eq. 3): 1.0 if the text is one block of this kind and nothing else."""
    text, opening, closing = text.strip(), f"<{kind}>", f"</{kind}>"
    anchored = text.startswith(opening) and text.endswith(closing)
    return float(anchored and text.count(opening) == text.count(closing) == 1)


def _json_calls(block: str) -> list[dict] | None:
    """The calls of a block, or None where the syntax requirements are not met (Eq. 4)."""
    value = _json(block)
    calls = value if isinstance(value, list) else [value]
    return calls if calls and all(map(_is_call, calls)) else None


def _is_call(call: Any) -> bool:
    call = call if isinstance(call, dict) else {}
    return isinstance(call.get("name"), str) and isinstance(call.get("params"), dict)


def _names(predicted: list[dict], wanted: list[dict]) -> float:
    """r_name (Eq. 5): Jaccard index of the two sets of tool names."""
    names_p, names_g = {p["name"] for p in predicted}, {g["name"] for g in wanted}
    return len(names_p & names_g) / len(names_p | names_g)


def _params(predicted: list[dict], wanted: list[dict]) -> float:
    """r_param (Eqs. 6, 9, 10): mean best score of the ground-truth calls over the larger count."""
    total, used = 0.0, set()
    for g in wanted:
        best, match = 0.0, None
        for j, p in enumerate(predicted):
            if p["name"] == g["name"] and j not in used:  # Eq. 6
                score = (_keys(g["params"], p["params"]) + _values(g["params"], p["params"])) / 2
                if score > best:  # Eq. 9
                    best, match = score, j
        used.add(match)
        total += best
    return total / max(len(predicted), len(wanted))  # Eq. 10


def _keys(g: dict, p: dict) -> float:
    """s_key (Eq. 7); 1.0 if neither call has parameters."""
    return len(g.keys() & p.keys()) / len(g.keys() | p.keys()) if g or p else 1.0


def _values(g: dict, p: dict) -> float:
    """s_value (Eq. 8); 1.0 if neither call has parameters."""
    equal = sum([_same(g[key], p[key]) for key in g if key in p])
    return equal / max(len(g), len(p)) if g or p else 1.0


def _same(g: Any, p: Any, text: Callable[[str], str] = str) -> bool:
    """Equality of JSON values; strings are compared after `text`. A loop: values may be deep."""
    todo = [(g, p)]
    for a, b in todo:  # grows below
        if isinstance(a, str) and isinstance(b, str):
            same = text(a) == text(b)
        elif isinstance(a, bool) or isinstance(b, bool):
            same = a is b
        elif isinstance(a, (int, float)) and isinstance(b, (int, float)):
            same = a == b
        elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            same = len(a) == len(b)
            todo.extend(zip(a, b))
        elif isinstance(a, dict) and isinstance(b, dict):
            same = a.keys() == b.keys()
            todo.extend((a[key], b[key]) for key in a if same)
        else:
            same = type(a) is type(b) and a == b  # None; from Python calls also bytes, sets, ...
        if not same:
            return False
    return True


# --- targets, answers and tags ---


@lru_cache(maxsize=1024)  # K responses of a group share it
def _read_target(target: str) -> Parsed:
    """The parsed target; ValueError unless it would earn the maximum of 4 itself."""
    parsed = parse(target)
    right = parsed.calls or _is_answer(target)
    if parsed.kind == "malformed" or not (right and _format(target, parsed.kind)):
        calls = f'JSON calls {{"name", "params"}} of at most {MAX_CHARS} characters'
        need = f"one <tool_call> block of {calls}, or one <answer> block of text without such tags"
        raise ValueError(f"the target must be {need}; drop the example: {target[:200]!r}")
    return parsed


def _answer(text: str) -> str | None:
    """The text between the first <answer> and the last </answer>, None if a tag is missing."""
    _, opened, rest = text.partition("<answer>")
    content, closed, _ = rest.rpartition("</answer>")
    return content if opened and closed else None


def _is_answer(text: str) -> bool:
    """Whether the text is correct for an <answer> target: a non-empty answer, no tool-call tag."""
    return bool((_answer(text) or "").strip()) and not _has_call_tag(text)


def _around_block(text: str) -> tuple[str, str | None, str]:
    """The text before, in and after the first <tool_call> block; (text, None, "") without one."""
    before, _, rest = text.partition("<tool_call>")
    block, closed, after = rest.partition("</tool_call>")
    return (before, block, after) if closed else (text, None, "")


def _has_call_tag(text: str) -> bool:
    return "<tool_call>" in text or "</tool_call>" in text


def _has_both(text: str) -> bool:
    """Whether the text holds tags of both kinds; an answer tag inside the first block is data."""
    before, _, after = _around_block(text)
    answer = any(tag in part for tag in ("<answer>", "</answer>") for part in (before, after))
    return answer and _has_call_tag(text)


def _is_undecided(text: str) -> bool:
    """_has_both, for a text that may be Python calls, where every tag is data."""
    return not text.lstrip().startswith("[") and _has_both(text)


# --- error classes ---


def _any_calls(text: str) -> list[dict] | None:
    """Calls in either syntax; [] if the text has none, None if they do not parse."""
    text = text.strip()
    if text.startswith("["):
        return _python_calls(text)
    parsed = parse(text)
    return [] if parsed.kind == "answer" or not _has_call_tag(text) else parsed.calls


def _pair_up(calls: list[dict], wanted: list[dict], alike: Callable[[dict, dict], bool]) -> bool:
    """Whether every call has a partner of its own; greedy is right: `alike` is an equivalence."""
    rest = list(calls)
    for g in wanted:
        j = next((j for j, p in enumerate(rest) if alike(g, p)), None)
        if j is None:
            return False
        del rest[j]
    return True


def _bfcl(text: str) -> str:
    """BFCL's normalisation of strings: lower case, without blanks and , . / - _ * ^"""
    return text.translate(_IGNORED).lower()


_IGNORED = str.maketrans("", "", " ,./-_*^")

# Each row is finer than the one above, so pairs that agree on a row agree on all above it.
_ALIKE = {
    "Tool Name": lambda g, p: g["name"] == p["name"],
    "Parameter Count": lambda g, p: (g["name"], len(g["params"])) == (p["name"], len(p["params"])),
    "Parameter Name": lambda g, p: (g["name"], {*g["params"]}) == (p["name"], {*p["params"]}),
    "Parameter Value": lambda g, p: (
        g["name"] == p["name"] and _same(g["params"], p["params"], _bfcl)
    ),
}


# --- reading what a model wrote ---

_BAD = object()  # does not parse; None is a value
_LIKE_A_CALL = re.compile(
    r'\{\s*"name"\s*:\s*"[^"]*"\s*,\s*"(params|parameters|arguments)"\s*:\s*\{'
)


def _finite(text: str) -> float:
    """The number; ValueError for 1e999 and for the constants NaN, Infinity and -Infinity."""
    value = float(text)
    if not cmath.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    """The object; ValueError for a key written twice, of which json would take the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is written twice")
    return value


# Made once: json.loads would build a decoder on every call.
_LENIENT = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique)


def _json(text: str, decoder: json.JSONDecoder = _DECODER) -> Any:
    """The JSON value of a text, or _BAD."""
    if len(text) > MAX_CHARS:
        return _BAD
    try:
        return decoder.decode(text)
    except (ValueError, RecursionError):  # ValueError also for more digits than int() takes
        return _BAD


def _python_calls(text: str) -> list[dict] | None:
    """Calls of '[Func Name(a="v", n=1), Other()]', or None; ast cannot: names may hold spaces."""
    if len(text) > MAX_CHARS or not text.endswith("]"):
        return None
    calls = [_python_call(item.strip()) for item in _split(text[1:-1], ",") or []]
    return calls if calls and None not in calls else None


def _python_call(item: str) -> dict | None:
    """The call of 'Func Name(a="v", n=1)', or None. Positional arguments must only parse."""
    name, _, rest = item.partition("(")
    args = _split(rest[:-1], ",") if rest.endswith(")") else None
    if args is None or not _is_plain(name):
        return None
    params = {}
    for arg in args if rest[:-1].strip() else []:
        *key, text = _split(arg, "=")
        value = _literal(text.strip())
        if value is _BAD or len(key) > 1:
            return None
        if key:
            if not _is_plain(key[0]) or key[0].strip() in params:
                return None
            params[key[0].strip()] = value
    return {"name": name.strip(), "params": params}


def _is_plain(name: str) -> bool:
    return bool(name.strip()) and not any(mark in name for mark in "\"'()[]{}")


def _literal(text: str) -> Any:
    """Value of an argument: Python literal, else JSON literal, else bare identifier, else _BAD."""
    try:
        tree = ast.parse(text, mode="eval")
        value = ast.literal_eval(tree)
        return value if all(map(_is_sound, ast.walk(tree))) else _BAD
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = _json(text)
    return text if value is _BAD and text.isidentifier() else value


def _is_sound(node: ast.AST) -> bool:
    """Whether a node is neither an infinite number nor a dict with a repeated key."""
    if isinstance(node, ast.Dict):
        return len({ast.literal_eval(key) for key in node.keys}) == len(node.keys)
    number = isinstance(node, ast.Constant) and isinstance(node.value, (float, complex))
    return not number or cmath.isfinite(node.value)


def _split(text: str, separator: str) -> list[str] | None:
    """Parts between separators outside quotes and brackets; None if those are unbalanced."""
    parts, start, quote, escaped, closers = [], 0, "", False, []
    for i, char in enumerate(text):
        if quote:
            quote = quote if escaped or char != quote else ""
            escaped = char == "\\" and not escaped
        elif char in "\"'":
            quote = char
        elif char in "([{":
            closers.append(")]}"["([{".index(char)])
        elif char in ")]}":
            if not closers or closers.pop() != char:
                return None
        elif char == separator and not closers:
            parts.append(text[start:i])
            start = i + 1
    return None if quote or closers else [*parts, text[start:]]
