"""BFCL-v3 through the package bfcl-eval: its data, checkers and simulators, our rules and columns.

    make eval-deps     or: pip install --no-deps bfcl-eval==2026.3.23 && pip install mpmath filelock

17 categories, 4,441 cases. Nothing of the package is copied. What its runner does around the
checkers is restated here, because importing it takes thirty vendors' SDKs:

    AST          right if the calls parse and the AST checker accepts them
    irrelevance  right if there is no call, be it an <answer> or broken JSON (a known leniency:
                 eval.py also prints the share of clean answers)
    relevance    right if there is a call, whatever it says
    multi-turn   right if no turn was cut off and the multi-turn checker accepts states and results

Columns, in percent; p is a category's accuracy, S = mean(simple_python, _java, _javascript):

    non_live     mean(S, multiple, parallel, parallel_multiple)
    live         correct / all of the four live AST categories (1,351)
    multi_turn   mean of its four categories
    relevance    live_relevance                irrelevance   mean(irrelevance, live_irrelevance)
    overall_paper = (non_live + live + irrelevance + 3 multi_turn) / 6          ToolUPT's tables
    non_live_v3  mean(S, multiple, parallel, parallel_multiple, irrelevance)
    live_v3      correct / all of live, live_irrelevance and live_relevance (2,251)
    overall_v3    = mean(non_live_v3, live_v3, multi_turn)                      iTool's tables
    live_multi_turn = mean(live_v3, multi_turn)                                 iTool's Table 5

ToolUPT's "Overall" is the first (45 of its 48 rows within 0.01), with non_live and live beside it;
iTool's baselines are on the second, with the columns in _v3. They are different scales.

Safety. The package's simulator passes strings to `eval`. Here no text of a model reaches it: a call
becomes a string only if it names a public method, with identifiers as keys (call_string), and the
simulator's `eval` is replaced by _call, which runs `instance.method(literals)` and nothing else,
for CALL_SECONDS at most, and rejects exponents and precisions that would hang inside one C call.
Instances, which the package keeps in globals, are deleted after each case. Its scratch files go to
a temporary folder, never into site-packages. Main thread only (SIGALRM).

Copy this file on its own: it needs bfcl-eval and the standard library.
"""

import ast
import atexit
import builtins
import importlib
import inspect
import os
import shutil
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import permutations

SIMPLE = ("simple_python", "simple_java", "simple_javascript")
NON_LIVE = ("multiple", "parallel", "parallel_multiple")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
HALLUCINATION = ("irrelevance", "live_irrelevance", "live_relevance")
MULTI_TURN = tuple(f"multi_turn_{k}" for k in ("base", "miss_func", "miss_param", "long_context"))
CATEGORIES = (*SIMPLE, *NON_LIVE, *LIVE, *HALLUCINATION, *MULTI_TURN)
GROUPS = {
    "all": CATEGORIES,
    "single_turn": CATEGORIES[:-4],
    "non_live": (*SIMPLE, *NON_LIVE, "irrelevance"),
    "live": (*LIVE, "live_irrelevance", "live_relevance"),
    "multi_turn": MULTI_TURN,
}
# Limit of one call in the simulator; the slowest one of the ground truth takes milliseconds.
CALL_SECONDS = 5.0
BITS = 10**6  # largest number that one C call may produce; Python prints 4,300 digits at most
CLASSES = (  # iTool Figure 3, from coarse to fine
    "Code Syntax",
    "Other",
    "Tools Count",
    "Tool Name",
    "Parameter Count",
    "Parameter Name",
    "Parameter Value",
)


@dataclass(frozen=True)
class Entry:
    """One case; its entry is here twice, because Java's and JavaScript's documents differ."""

    id: str
    category: str
    shown: dict  # what the model sees: with hints on the language
    checked: dict  # what the checker reads: without them
    truth: list  # calls with choices; multi-turn: strings per turn; empty for hallucination


def columns(counts: dict) -> dict:
    """The columns that are complete, in percent, and both overalls if all 17 categories are there.

    counts  category -> (correct, total); numbers, or arrays of one shape
    """
    p = {name: 100 * correct / total for name, (correct, total) in counts.items()}
    has = lambda *names: all(name in counts for name in names)
    mean = lambda *values: sum(values) / len(values)

    def pool(*names):
        return 100 * sum(counts[n][0] for n in names) / sum(counts[n][1] for n in names)

    out = {}
    if has(*SIMPLE, *NON_LIVE):
        ast4 = (mean(*(p[name] for name in SIMPLE)), *(p[name] for name in NON_LIVE))
        out["non_live"] = mean(*ast4)
        if has("irrelevance"):
            out["non_live_v3"] = mean(*ast4, p["irrelevance"])
    if has(*LIVE):
        out["live"] = pool(*LIVE)
        if has("live_irrelevance", "live_relevance"):
            out["live_v3"] = pool(*LIVE, "live_irrelevance", "live_relevance")
    if has(*MULTI_TURN):
        out["multi_turn"] = mean(*(p[name] for name in MULTI_TURN))
        if "live_v3" in out:
            out["live_multi_turn"] = mean(out["live_v3"], out["multi_turn"])
    if has("live_relevance"):
        out["relevance"] = p["live_relevance"]
    if has("irrelevance", "live_irrelevance"):
        out["irrelevance"] = mean(p["irrelevance"], p["live_irrelevance"])
    if has(*CATEGORIES):
        four = out["non_live"] + out["live"] + out["irrelevance"] + 3 * out["multi_turn"]
        out["overall_paper"] = four / 6
        out["overall_v3"] = mean(out["non_live_v3"], out["live_v3"], out["multi_turn"])
    return out


def categories(names: list[str]) -> list[str]:
    """The categories of names and groups, in the order of the tables; ValueError if unknown."""
    wanted = set()
    for name in names:
        if name not in GROUPS and name not in CATEGORIES:
            known = ", ".join([*GROUPS, *CATEGORIES])
            raise ValueError(f"BFCL has no category {name!r}; choose among {known}")
        wanted.update(GROUPS.get(name, (name,)))
    return [name for name in CATEGORIES if name in wanted]


def entries(category: str) -> list[Entry]:
    """The cases of a category, in the package's order."""
    load = package().utils.load_dataset_entry
    shown, checked = (load(category, include_language_specific_hint=hint) for hint in (True, False))
    truths = [[]] * len(shown)
    if category not in HALLUCINATION:
        truths = [row["ground_truth"] for row in package().utils.load_ground_truth_entry(category)]
    return [
        Entry(a["id"], category, a, b, truth)
        for a, b, truth in zip(shown, checked, truths, strict=True)
    ]


def question(entry: Entry) -> dict:
    """The fields of a prompt for a case of one turn: tools, history, query, steps, policy.

    A system message becomes the policy, earlier messages the history, the last one the query.
    """
    history, query, policy = _split(entry.shown["question"][0])
    tools = entry.shown["function"]
    return {"tools": tools, "history": history, "query": query, "steps": [], "policy": policy}


def conversation(
    entry: Entry, ask: Callable, read: Callable, record: dict, *, keep_steps: bool = True
) -> Generator:
    """Play a multi-turn case: yields each prompt and is sent the response to it.

    ask         fields of a prompt, as `question` returns them -> what is yielded
    read        response -> (calls or None, text of the call or answer for later prompts)
    record      filled on the way: turns (responses per turn), observations, force_quit
    keep_steps  later turns see earlier turns' tool steps, as in the training data

    A turn ends with a response that makes no call. Exceeding the official 20 steps in a turn ends
    the case. Held-out functions join the tool list in their turn, whose message is the package's.
    """
    prompts = package().prompts
    record.update(turns=[], observations=[], force_quit=False)
    methods = methods_of(entry.shown["involved_classes"])
    tools, history, steps = list(entry.shown["function"]), [], []
    try:
        for turn, messages in enumerate(entry.shown["question"]):
            added = entry.shown.get("missed_function", {}).get(str(turn), [])
            tools += added
            before, query, policy = _split(messages)
            history += before
            query = query or prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
            steps = steps if keep_steps else []
            record["turns"].append([])
            record["observations"].append([])
            while True:
                shown = [{k: v for k, v in tool.items() if k != "response"} for tool in tools]
                fields = {"tools": shown, "history": history, "query": query, "policy": policy}
                response = yield ask(fields | {"steps": steps})
                record["turns"][-1].append(response)
                calls, text = read(response)
                if not calls:
                    break
                results = execute([call_string(call, methods) for call in calls], entry)
                results = [encodable(result) for result in results]
                record["observations"][-1].append(results)
                steps = [*steps, (text, "\n".join(results))]
                if len(record["observations"][-1]) > prompts.MAXIMUM_STEP_LIMIT:
                    record["force_quit"] = True
                    return
            history = [*history, ("user", query), ("assistant", text)]
    finally:
        purge(entry.id)


def judge(entry: Entry, turns: list[list[list | None]], force_quit: bool = False) -> dict:
    """The verdict on a case: correct, error_type (the package's), error, error_class (Figure 3).

    turns  the calls of each response of each turn, None or [] where it has none

    Where a checker itself raised an error, error_type ends with :raised. error_class is "Other"
    where no check says more.
    """
    _need_main_thread()
    try:
        verdict = _judge(entry, turns, force_quit)
    except Exception as error:  # the multi-turn checker raises on unforeseen values
        verdict = _raised("multi_turn", error)
    finally:
        purge(entry.id)
    if verdict["valid"]:
        return {"correct": True, "error_type": None, "error": None, "error_class": None}
    kind = verdict["error_type"]
    paired = kind.endswith("cannot_find_match")
    return {
        "correct": False,
        "error_type": kind,
        "error": str(verdict.get("error") or verdict.get("error_message") or "")[:500],
        "error_class": _paired_class(entry, turns[0][0]) if paired else error_class(kind),
    }


def accepted(entry: Entry) -> list[dict]:
    """Calls that the checker accepts, from the first choices of the ground truth; [] without any.

    For Python's categories only: Java and JavaScript want source code as values.
    """
    docs = {doc["name"]: doc["parameters"].get("required", []) for doc in entry.checked["function"]}
    choices = [item for call in entry.truth for item in call.items()]
    calls = [{"name": n, "params": _first(params, docs.get(n, []))} for n, params in choices]
    return calls if calls and judge(entry, [[calls]])["correct"] else []


def error_class(error_type: str) -> str:
    """iTool's class (Figure 3) of one of the package's error types."""
    values = (
        "type_error",
        "value_error",
        "dict_checker",
        "list_dict_checker",
        "ast_checker:raised",
    )
    if error_type.startswith(values):
        return "Parameter Value"
    names = {
        "wrong_count": "Tools Count",
        "wrong_func_name": "Tool Name",
        "missing_required": "Parameter Count",
        "missing_optional": "Parameter Count",
        "unexpected_param": "Parameter Name",
    }
    name = error_type.rpartition(":")[2]
    return "Code Syntax" if name == "ast_decoder" else names.get(name, "Other")


def call_string(call: dict, methods: set[str]) -> str:
    """The call as Python source for the simulator: a method with literal arguments, or a dead name.

    call     {"name", "params"} as a model wrote it
    methods  public methods of the case's instances; held-out ones run too, as they do officially
    """
    name, params = call["name"], call["params"]
    if name in methods and all(key.isidentifier() for key in params):
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in params.items())})"
    known = name in methods or hasattr(builtins, name) or not name.isidentifier()
    return "no_such_function()" if known else f"{name}()"


def encodable(text: str) -> str:
    """The text with ? for lone surrogates, which JSON may hold and tokenizers reject."""
    return text.encode("utf-8", "replace").decode()


def methods_of(classes: list[str]) -> set[str]:
    """Names of the public methods of the simulator's classes."""
    names = set()
    for name in classes:
        cls = getattr(importlib.import_module(package().paths[name]), name)
        names.update(k for k, _ in inspect.getmembers(cls, inspect.isfunction) if k[0] != "_")
    return names


def execute(calls: list[str], entry: Entry) -> list[str]:
    """Results of calls on the case's own instances, which keep their state until `purge`."""
    _need_main_thread()
    where = (entry.checked["initial_config"], entry.checked["involved_classes"], "model", entry.id)
    return package().simulator.execute_multi_turn_func_call(
        calls, *where, long_context="long_context" in entry.id
    )[0]


def purge(entry_id: str) -> None:
    """Delete the instances of a case, which the package would otherwise use again."""
    names, mark = vars(package().simulator), f"_{entry_id.replace('-', '_')}_"
    for name in [n for n in names if n.endswith("_instance") and mark in n]:
        del names[name]


@lru_cache
def package() -> types.SimpleNamespace:
    """The parts of bfcl-eval in use, guarded; ImportError with the remedy where it is missing.

    The AST checker looks up one flag of the model's handler, for which its module imports every
    vendor's SDK. A stub says that dots in names are kept, as they are in prompts. Importing the
    package creates folders under BFCL_PROJECT_ROOT, by default inside site-packages.
    """
    if "BFCL_PROJECT_ROOT" not in os.environ:
        os.environ["BFCL_PROJECT_ROOT"] = tempfile.mkdtemp(prefix="bfcl-")
        atexit.register(shutil.rmtree, os.environ["BFCL_PROJECT_ROOT"], ignore_errors=True)
    stub = types.ModuleType("bfcl_eval.constants.model_config")
    stub.MODEL_CONFIG_MAPPING = _AnyModel()
    sys.modules.setdefault(stub.__name__, stub)
    root, checkers = "bfcl_eval", "bfcl_eval.eval_checker"
    modules = {
        "utils": f"{root}.utils",
        "prompts": f"{root}.constants.default_prompts",
        "enums": f"{root}.constants.enums",
        "config": f"{root}.constants.executable_backend_config",
        "ast": f"{checkers}.ast_eval.ast_checker",
        "multi_turn": f"{checkers}.multi_turn_eval.multi_turn_checker",
        "simulator": f"{checkers}.multi_turn_eval.multi_turn_utils",
    }
    try:
        found = {name: importlib.import_module(path) for name, path in modules.items()}
        importlib.import_module("mpmath")  # the simulator's MathAPI
    except ImportError as error:
        raise ImportError(
            f"BFCL cannot be loaded ({error}): pip install --no-deps bfcl-eval==2026.3.23 && "
            "pip install mpmath filelock (or `make eval-deps`)"
        ) from error
    found["simulator"].eval = _call
    return types.SimpleNamespace(
        **found,
        paths=found["config"].CLASS_FILE_PATH_MAPPING,
        version=version("bfcl-eval"),
    )


def _judge(entry, turns, force_quit):
    category = entry.category
    if category in MULTI_TURN:
        return _judge_multi_turn(entry, turns, force_quit)
    calls = turns[0][0]
    if category in HALLUCINATION:
        right = bool(calls) == (category == "live_relevance")
        return {"valid": right, "error_type": category, "error": "a call" if calls else "no call"}
    if calls is None:
        return {"valid": False, "error_type": "ast_decoder", "error": "the calls do not parse"}
    if not calls:
        return {"valid": False, "error_type": "none:wrong_count", "error": "no call"}
    return _check(entry, calls, entry.truth, category)


def _check(entry, calls, truth, category):
    languages = package().enums.Language
    language = {"simple_java": languages.JAVA, "simple_javascript": languages.JAVASCRIPT}
    try:
        # The regular expressions of the checker's JavaScript reader are exponential.
        with _time_limit(CALL_SECONDS):
            return package().ast.ast_checker(
                entry.checked["function"],
                [{call["name"]: call["params"]} for call in calls],
                truth,
                language.get(category, languages.PYTHON),
                category,
                "model",
            )
    except Exception as error:  # on unforeseen values, such as 10**400 for a float
        return _raised("ast_checker", error)


def _raised(checker, error):
    text = f"{type(error).__name__}: {error}"
    return {"valid": False, "error_type": f"{checker}:raised", "error": text}


def _need_main_thread():
    assert threading.current_thread() is threading.main_thread(), "time limits need the main thread"


def _paired_class(entry, calls):
    """The class of as many parallel calls as expected, paired for most right, then the latest class."""
    levels = []
    for truth in entry.truth:
        verdicts = [_check(entry, [call], [truth], "multiple") for call in calls]
        kinds = [error_class(v["error_type"]) if not v["valid"] else "" for v in verdicts]
        levels.append([CLASSES.index(kind) if kind else len(CLASSES) for kind in kinds])
    pairings = permutations(range(len(calls)))  # of eight at most
    found = (sorted(row[i] for row, i in zip(levels, order)) for order in pairings)
    best = max(found, key=lambda own: (own.count(len(CLASSES)), own[0]))
    return CLASSES[min(best[0], len(CLASSES) - 1)]  # all right where BFCL pairs greedily


def _judge_multi_turn(entry, turns, force_quit):
    if force_quit or len(turns) != len(entry.truth):
        kind = "force_quit" if force_quit else "turns"
        return {"valid": False, "error_type": f"multi_turn:{kind}", "error": f"{len(turns)} turns"}
    methods = methods_of(entry.checked["involved_classes"])
    strings = [
        [[call_string(call, methods) for call in calls] for calls in turn if calls]
        for turn in turns
    ]
    return package().multi_turn.multi_turn_checker(
        strings, entry.truth, entry.checked, entry.category, "model"
    )


def _first(params, required=()):
    """The first choice of each parameter; a choice of "" means that it may be left out."""
    return {
        key: _plain(next((choice for choice in choices if choice != ""), ""))
        for key, choices in params.items()
        if key in required or "" not in choices
    }


def _plain(value):
    """A choice as a value: a dict holds a list of choices per key, or a value outright."""
    if isinstance(value, dict):
        plain = {key: v for key, v in value.items() if not isinstance(v, list)}
        return _first({key: v for key, v in value.items() if key not in plain}) | plain
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _split(messages):
    """History, query and policy of one turn's messages; the query is the last, a user's."""
    policy = "\n".join(m["content"] for m in messages if m["role"] == "system")
    said = [(m["role"], m["content"]) for m in messages if m["role"] != "system"]
    assert not said or said[-1][0] == "user", said[-1]
    return said[:-1], said[-1][1] if said else "", policy


class _AnyModel(dict):
    def __missing__(self, name):
        return types.SimpleNamespace(underscore_to_dot=False)


def _call(source: str):
    """The simulator's `eval`: the value of `NAME_instance.method(literals)`, and nothing else."""
    call = ast.parse(source, mode="eval").body
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
        raise NameError(f"name '{call.func.id}' is not defined")  # what Python would say
    method = call.func if isinstance(call, ast.Call) else None
    owner = method.value if isinstance(method, ast.Attribute) else None
    if not isinstance(owner, ast.Name) or method.attr.startswith("_"):
        raise ValueError("only calls of the tools are executed")
    if not owner.id.endswith("_instance"):
        raise NameError(f"name '{owner.id}' is not defined")
    args = [ast.literal_eval(value) for value in call.args]
    kwargs = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
    if None in kwargs:
        raise ValueError("only calls with plain arguments are executed")
    _refuse_large(method.attr, args, kwargs)
    with _time_limit(CALL_SECONDS):
        return getattr(vars(package().simulator)[owner.id], method.attr)(*args, **kwargs)


def _refuse_large(name, args, kwargs):
    """OverflowError for digits that one uninterruptible C call would take hours to compute."""
    place = {
        "power": (1, "exponent"),
        "logarithm": (2, "precision"),
        "square_root": (1, "precision"),
    }
    if name not in place:
        return
    index, key = place[name]
    values = [*args, *kwargs.values()]
    factor = kwargs.get(key, args[index] if len(args) > index else 0)
    bits = max([abs(v).bit_length() for v in values if isinstance(v, int)], default=1)
    if isinstance(factor, (int, float)) and abs(factor) * bits > BITS:
        raise OverflowError("the result has too many digits")


@contextmanager
def _time_limit(seconds):
    def stop(signum, frame):
        raise TimeoutError(f"stopped after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, should the tool catch the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
