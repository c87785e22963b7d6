"""eval.py against the benchmarks' own data: oracle and corrupted answers, the loop, safety, records, reports."""

import argparse
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import bfcl_oracle
import pytest
from frozen import REPO, TOY

import api_bank
import bfcl
import data
import eval as evaluation
import rewards
import rollout
import scores

needs_bfcl = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None,
    reason="bfcl-eval is not installed: make eval-deps",
)
OFFICIAL = REPO.parent / "shared/data/eval/api_bank_official"
needs_api_bank = pytest.mark.skipif(
    not OFFICIAL.exists(), reason=f"API-Bank's test files are not in {OFFICIAL}"
)
ANSWER = "<answer>\nDone.\n</answer>"
AST = (*bfcl.SIMPLE, *bfcl.NON_LIVE, *bfcl.LIVE)


def options(**given) -> argparse.Namespace:
    parsed = vars(evaluation.parse_args(["model", "--output_dir", "out"]))
    for name in ("rescore", "compare", "errors"):
        del parsed[name]
    return argparse.Namespace(**(parsed | given))


def tool_call(calls) -> str:
    return f"<tool_call>\n{json.dumps(calls)}\n</tool_call>"


def python_calls(calls) -> str:
    written = [
        f"{c['name']}({', '.join(f'{k}={v!r}' for k, v in c['params'].items())})" for c in calls
    ]
    return f"[{', '.join(written)}]"


@pytest.fixture(scope="module")
def cases() -> dict[str, list]:
    """Category -> its (entry, case)."""
    found = {}
    for case in evaluation.bfcl_cases(options()):
        found.setdefault(case.category, []).append((case.score.args[0], case))
    return found


# --- columns ---


def row_of(non_live, live, multi_turn, relevance, irrelevance) -> dict:
    """Counts that give these columns: any split of the means over their categories will do."""
    n = {"simple_python": 400, "simple_java": 100, "simple_javascript": 50}
    counts = {name: (round(non_live / 100 * 10**6), 10**6) for name in (*n, *bfcl.NON_LIVE)}
    sizes = dict(zip(bfcl.LIVE, (258, 1053, 16, 24)))
    left = round(live / 100 * 1351)
    for name, size in sizes.items():
        counts[name] = (min(left, size), size)
        left -= counts[name][0]
    left = round(multi_turn / 100 * 800)
    for name in bfcl.MULTI_TURN:
        counts[name] = (min(left, 200), 200)
        left -= counts[name][0]
    counts["live_relevance"] = (round(relevance / 100 * 16), 16)
    for name in ("irrelevance", "live_irrelevance"):
        counts[name] = (round(irrelevance / 100 * 10**6), 10**6)
    return counts


@pytest.mark.parametrize(
    "printed",
    [  # ToolUPT, Tables 2 to 5: overall, non-live, live, multi-turn, relevance, irrelevance
        (48.65, 86.19, 73.87, 16.25, 87.50, 83.11),  # Qwen2.5-7B, ToolUPT
        (42.66, 85.90, 73.95, 5.88, 81.25, 78.50),  # Llama-3.1-8B, ToolUPT
        (62.32, 88.13, 76.68, 40.88, 81.25, 86.47),  # Qwen2.5-32B, ToolUPT
    ],
)
def test_overall_paper_reproduces_the_printed_overall(printed):
    overall, *columns = printed
    found = evaluation.columns(row_of(*columns))
    names = ("non_live", "live", "multi_turn", "relevance", "irrelevance")
    for name, value in zip(names, columns):
        assert found[name] == pytest.approx(value, abs=0.0051), name
    assert found["overall_paper"] == pytest.approx(overall, abs=0.0051)
    assert abs(found["overall_v3"] - overall) > 5  # another scale: never in one column


def test_columns_against_the_definitions_in_words():
    rng = random.Random(0)
    sizes = dict.fromkeys(bfcl.CATEGORIES, 10) | {"live_multiple": 70, "live_irrelevance": 50}
    counts = {name: (rng.randrange(size), size) for name, size in sizes.items()}
    share = {name: a / b for name, (a, b) in counts.items()}
    simple = (share["simple_python"] + share["simple_java"] + share["simple_javascript"]) / 3
    four = [simple, share["multiple"], share["parallel"], share["parallel_multiple"]]
    live = ["live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"]
    pooled = lambda names: sum(counts[n][0] for n in names) / sum(counts[n][1] for n in names)
    turns = sum(counts[n][0] for n in bfcl.MULTI_TURN) / 40
    irrelevance = (share["irrelevance"] + share["live_irrelevance"]) / 2
    wanted = {
        "non_live": sum(four) / 4,
        "live": pooled(live),
        "multi_turn": turns,
        "relevance": share["live_relevance"],
        "irrelevance": irrelevance,
        "overall_paper": (sum(four) / 4 + pooled(live) + irrelevance + 3 * turns) / 6,
        "overall_v3": (
            (sum(four) + share["irrelevance"]) / 5
            + pooled([*live, "live_irrelevance", "live_relevance"])
            + turns
        )
        / 3,
    }
    assert evaluation.columns(counts) == pytest.approx({k: 100 * v for k, v in wanted.items()})


def test_incomplete_columns_are_left_out():
    whole = row_of(80, 70, 10, 50, 60)
    for missing in bfcl.CATEGORIES:
        found = evaluation.columns({k: v for k, v in whole.items() if k != missing})
        assert not {"overall_paper", "overall_v3"} & found.keys()
        lost = evaluation.columns(whole).keys() - found.keys() - {"overall_paper", "overall_v3"}
        assert len(lost) == 1, missing
    assert evaluation.columns({}) == {}


def test_never_calling_scores_a_sixth():
    counts = {name: (int("irrelevance" in name), 1) for name in bfcl.CATEGORIES}
    assert evaluation.columns(counts)["overall_paper"] == pytest.approx(100 / 6)


# --- reading responses ---


@pytest.mark.parametrize(
    ("response", "kind", "names"),
    [
        (tool_call({"name": "f", "params": {}}), "tool_call", ["f"]),
        (
            tool_call([{"name": "f", "params": {}}, {"name": "g", "params": {"x": 1}}]),
            "tool_call",
            ["f", "g"],
        ),
        ("Sure: " + tool_call({"name": "f", "params": {}}) + ANSWER, "tool_call", ["f"]),
        (ANSWER, "answer", None),
        (ANSWER + tool_call({"name": "f", "params": {}}), "answer", None),
        ("<answer>" + tool_call({"name": "f", "params": {}}) + "</answer>", "malformed", None),
        (tool_call([]), "malformed", None),
        (tool_call({"name": "f", "arguments": {}}), "malformed", None),
        ("<tool_call>{'name': 'f'}</tool_call>", "malformed", None),
        ("<tool_call>" + tool_call({"name": "f", "params": {}})[11:-12], "malformed", None),
        ("plain prose", "malformed", None),
        ("", "malformed", None),
    ],
)
def test_first_tag_decides(response, kind, names):
    parsed = evaluation.decode(response, "toolupt")
    assert parsed.kind == kind
    assert [c["name"] for c in parsed.calls] == names if names else parsed.calls is None


def test_python_form():
    decode = lambda text, **how: evaluation.decode(text, "python", **how)
    calls = decode('[geo.find(city="Oslo", n=2, ok=True), ls()]').calls
    assert calls == [
        {"name": "geo.find", "params": {"city": "Oslo", "n": 2, "ok": True}},
        {"name": "ls", "params": {}},
    ]
    assert decode("I have no tool for this.").kind == "answer"
    assert decode("[find(city=").kind == decode("").kind == "malformed"
    java = decode('[f(a="new int[]{1}", b=3, c=true, d=None)]', as_source=True).calls
    assert java == [
        {"name": "f", "params": {"a": "new int[]{1}", "b": "3", "c": "true", "d": "null"}}
    ]


# --- the probe: oracle answers pass, corrupted ones fail ---


ORACLE = {  # 7 of 4,441 cannot be satisfied: empty lists of choices, parameters that are not documented
    "simple_java": ["simple_java_36", "simple_java_64", "simple_java_65"],
    "live_simple": ["live_simple_106-63-0", "live_simple_112-68-0"],
    "live_multiple": ["live_multiple_862-181-3", "live_multiple_964-207-0"],
}
LENIENT = {
    "simple_java": 10,
    "simple_javascript": 8,
}  # wrong values that pass: text behind a literal is not read
WITH_REQUIRED = {
    "live_simple": 235,
    "live_multiple": 842,
}  # cases with a required parameter, where not all


@needs_bfcl
def test_sizes(cases):
    assert {name: len(mine) for name, mine in cases.items()} == {
        "simple_python": 400, "simple_java": 100, "simple_javascript": 50, "multiple": 200, "parallel": 200,
        "parallel_multiple": 200, "live_simple": 258, "live_multiple": 1053, "live_parallel": 16,
        "live_parallel_multiple": 24, "irrelevance": 240, "live_irrelevance": 884, "live_relevance": 16,
        "multi_turn_base": 200, "multi_turn_miss_func": 200, "multi_turn_miss_param": 200,
        "multi_turn_long_context": 200,
    }  # fmt: skip
    assert len({case.id for mine in cases.values() for _, case in mine}) == 4441


@needs_bfcl
@pytest.mark.parametrize("category", AST)
def test_oracle_answers_pass_and_corrupted_ones_fail(cases, category):
    judge = lambda case, calls: case.score({"turns": [[tool_call(calls)]]})
    misses, passed, tried, classes = [], Counter(), Counter(), {}
    for entry, case in cases[category]:
        calls = bfcl_oracle.calls_of(entry)
        need = bfcl_oracle.required(entry, calls)
        misses += [] if judge(case, calls)["correct"] else [entry.id]
        for name, corrupt in bfcl_oracle.WRONG.items():
            if need or name not in ("missing required", "wrong value"):
                verdict = judge(case, corrupt(calls, need))
                tried[name] += 1
                passed[name] += verdict["correct"]
                classes.setdefault(name, Counter()).update([verdict["error_class"]])
        assert not case.score({"turns": [[ANSWER]]})["correct"]
    assert misses == ORACLE.get(category, [])
    assert +passed == Counter(
        {"wrong value": LENIENT.get(category, 0)} if category in LENIENT else {}
    )
    size = len(cases[category])
    assert tried["wrong name"] == size
    assert tried["missing required"] == WITH_REQUIRED.get(category, size)
    one = (
        "Code Syntax"
        if category in (*bfcl.SIMPLE, "multiple", "live_simple", "live_multiple")
        else "Tools Count"
    )
    assert classes["missing call"].most_common(1)[0][0] == one  # an empty list does not parse
    assert classes["extra call"] == {"Tools Count": size}
    for name, wanted in (("wrong name", "Tool Name"), ("extra param", "Parameter Name")):
        assert classes[name][wanted] >= 0.9 * size, (name, classes[name])
    assert classes["missing required"]["Parameter Count"] >= 0.9 * tried["missing required"]
    assert classes["wrong value"]["Parameter Value"] >= 0.8 * tried["wrong value"]


@needs_bfcl
@pytest.mark.parametrize(
    ("category", "size"), [("irrelevance", 240), ("live_irrelevance", 884), ("live_relevance", 16)]
)
def test_irrelevance_and_relevance(cases, category, size):
    responses = {
        "call": tool_call({"name": "anything", "params": {}}),
        "answer": ANSWER,
        "broken": '<tool_call>{"name": </tool_call>',
        "empty": tool_call([]),
    }
    right = {
        name: [c.score({"turns": [[r]]}) for _, c in cases[category]]
        for name, r in responses.items()
    }
    none = 0 if category == "live_relevance" else size
    found = {name: sum(v["correct"] for v in verdicts) for name, verdicts in right.items()}
    assert found == {"call": size - none, "answer": none, "broken": none, "empty": none}
    kinds = {name: verdicts[0]["kinds"] for name, verdicts in right.items()}
    assert kinds["answer"] == [["answer"]] and kinds["broken"] == kinds["empty"] == [["malformed"]]


@needs_bfcl
def test_python_form_of_oracle_answers(cases):
    """The Python categories in iTool's form; the same cases fail as in JSON."""
    read = lambda text: evaluation.decode(text, "python")
    for category in ("simple_python", "parallel_multiple", "live_simple"):
        misses = []
        for entry, _ in cases[category]:
            row = {"turns": [[python_calls(bfcl_oracle.calls_of(entry))]]}
            misses += [] if evaluation._bfcl_score(entry, read, row)["correct"] else [entry.id]
        assert misses == ORACLE.get(category, [])


def transcript(turns) -> list[list[str]]:
    """Responses per turn: one call per step, then an answer."""
    return [[*(tool_call(call) for call in turn), ANSWER] for turn in turns]


MULTI_TURN = {  # variant -> cases that pass per category, of 200 (of 173 for wrong values)
    "oracle": (200, 200, 200, 200),
    "oracle and a failing call": (200, 200, 200, 200),
    "a call where none is due": (2, 200, 200, 2),
    "nothing": (0, 0, 0, 0),
    "last turn empty": (0, 0, 0, 0),
    "last call dropped": (0, 0, 0, 0),
    "unknown call in the last turn": (1, 1, 1, 0),
}  # wrong values: a few leave state and results as they should be, which ones depends on the value


def corrupted(turns) -> dict[str, list]:
    last = max(i for i, turn in enumerate(turns) if turn)
    replace = lambda calls: [*turns[:last], calls, *turns[last + 1 :]]
    unknown = {"name": "open_the_door", "params": {"x": 1}}
    found = {
        "oracle": turns,
        "oracle and a failing call": [[*turn, unknown] if turn else [] for turn in turns],
        "nothing": [[] for _ in turns],
        "last turn empty": replace([]),
        "last call dropped": replace(turns[last][:-1]),
        "unknown call in the last turn": replace([unknown]),
    }
    if not all(turns):
        found["a call where none is due"] = [turn or [unknown] for turn in turns]
    params = turns[last][-1]["params"]
    if params:
        wrong = {key: bfcl_oracle._other(value) for key, value in params.items()}
        found["wrong values"] = replace([*turns[last][:-1], {**turns[last][-1], "params": wrong}])
    return found


@needs_bfcl
@pytest.mark.parametrize("category", bfcl.MULTI_TURN)
def test_multi_turn_oracle_passes_and_corrupted_ones_fail(cases, category):
    passed, tried = Counter(), Counter()
    for entry, case in cases[category]:
        for name, turns in corrupted(bfcl_oracle.turns_of(entry)).items():
            tried[name] += 1
            passed[name] += case.score({"turns": transcript(turns)})["correct"]
    index = bfcl.MULTI_TURN.index(category)
    assert {name: passed[name] for name in MULTI_TURN} == {
        name: n[index] for name, n in MULTI_TURN.items()
    }
    assert tried["wrong values"] == 173 and passed["wrong values"] <= 3
    assert not [name for name in vars(bfcl.package().simulator) if name.endswith("_instance")]


# --- the loop ---


class Chats:
    """A tokenizer whose ids are the number of a chat, so that a script can see what was asked."""

    chat_template = "{}"

    def __init__(self, lengths=None):
        self.chats, self.lengths = [], lengths

    def apply_chat_template(self, chat, **kwargs):
        self.chats.append(chat)
        return [len(self.chats) - 1] * (self.lengths(chat) if self.lengths else 1)

    def decode(self, ids, **kwargs):
        return self.chats[ids[0]][1]["content"]


class Scripted:
    """An engine that says what a script has for a case and step; the seed of the request tells which."""

    def __init__(self, script: dict[str, list[str]], lengths=None, max_model_len=32768, seed=0):
        self.tokenizer, self.max_model_len, self.rounds = Chats(lengths), max_model_len, []
        self.said = {
            evaluation.request_seed(seed, case, step): text
            for case, texts in script.items()
            for step, text in enumerate(texts)
        }

    def generate(self, prompts, *, n, temperature, max_tokens, seeds):
        assert n == 1 and len(prompts) == len(seeds)
        assert all(len(p) + max_tokens <= self.max_model_len for p in prompts)
        self.rounds.append(len(prompts))
        return [[rollout.Sample([1], [0.0], self.said[s], "stop")] for s in seeds]

    def close(self):
        pass


def play(cases, engine, **given) -> dict[str, dict]:
    rows = []
    evaluation.answer(cases, engine, options(**given), rows.append, quiet=True)
    assert len(rows) == len(cases)
    return {row["id"]: row for row in rows}


@needs_bfcl
def test_multi_turn_replay_through_the_loop(cases):
    """Ground truth, one call per step: 200/200/200/198; the two others need 34 steps in one turn, the limit is 20."""
    pairs = [pair for name in bfcl.MULTI_TURN for pair in cases[name]]
    script = {e.id: sum(transcript(bfcl_oracle.turns_of(e)), []) for e, _ in pairs}
    engine = Scripted(script)
    rows = play([case for _, case in pairs], engine, batch=300)
    assert engine.rounds[0] == 300 and sum(engine.rounds) < sum(map(len, script.values()))
    passed = Counter(row["category"] for row in rows.values() if row["correct"])
    assert [passed[name] for name in bfcl.MULTI_TURN] == [200, 200, 200, 198]
    quit = {name for name, row in rows.items() if row["force_quit"]}
    assert quit == {"multi_turn_long_context_38", "multi_turn_long_context_46"}
    assert all(
        max(map(len, rows[name]["turns"])) == 21 for name in quit
    )  # stopped after the 21st step
    assert not [name for name in vars(bfcl.package().simulator) if name.endswith("_instance")]


@needs_bfcl
def test_a_model_that_never_stops_is_stopped(cases):
    entry, case = cases["multi_turn_base"][0]
    [row] = play(
        [case], Scripted({entry.id: [tool_call({"name": "pwd", "params": {}})] * 30})
    ).values()
    assert row["force_quit"] and not row["correct"] and row["error_class"] == "Other"
    assert [len(turn) for turn in row["turns"]] == [21]


@needs_bfcl
def test_prompts_of_a_conversation(cases):
    """Results, earlier turns, held-out functions: each stands in the prompt when it should, and not before."""
    entry, case = next(
        (e, c) for e, c in cases["multi_turn_miss_func"] if e.id == "multi_turn_miss_func_0"
    )
    turns = bfcl_oracle.turns_of(entry)
    script = {entry.id: sum(transcript(turns), [])}
    engine = Scripted(script)
    play([case], engine)
    chats, place = engine.tokenizer.chats, 0
    held_out = entry.shown["missed_function"]["3"][0]["name"]
    for t, turn in enumerate(turns):
        for step in range(len(turn) + 1):
            system, user = (m["content"] for m in chats[place])
            tools = [
                json.loads(line)["name"]
                for line in system.splitlines()
                if line.startswith('{"name": "') and '"description"' in line
            ]
            assert (held_out in tools) == (t >= 3)
            assert '"response"' not in system and "Python 3 syntax" in system
            message = entry.shown["question"][t]
            query = (
                message[0]["content"]
                if message
                else "I have updated some more functions you can choose from. What about now?"
            )
            assert f"[User Query]\n{query}\n" in user
            assert (
                user.count("tool call:") == sum(map(len, turns[:t])) + step
            )  # earlier turns' steps stay
            assert user.count("assistant: Done.") == t
            place += 1
    assert place == len(chats)
    engine = Scripted(script)
    dropping = evaluation.bfcl_cases(options(keep_steps=False, categories=["multi_turn_miss_func"]))
    play(dropping[:1], engine)
    assert "tool call:" in engine.tokenizer.chats[1][1]["content"]
    assert "tool call:" not in engine.tokenizer.chats[len(turns[0]) + 1][1]["content"]


@needs_bfcl
def test_messages_of_one_turn(cases):
    """System messages become policy, earlier ones memory, the last one the query; hints for the prompt only."""
    seen = Counter()
    for entry, case in [
        pair for name in ("live_irrelevance", "simple_java") for pair in cases[name]
    ]:
        example = next(case.talk({}))
        messages = entry.shown["question"][0]
        assert example.query == messages[-1]["content"] and not example.steps
        assert example.history == [
            (m["role"], m["content"]) for m in messages[:-1] if m["role"] != "system"
        ]
        for message in messages:
            seen[message["role"]] += 1
            if message["role"] == "system":
                assert message["content"] + "\n\n## Available Tools" in example.system
    assert seen["system"] == 42 and seen["assistant"] == 11
    assert "Java 8 SDK syntax" in example.tools[0]["description"]
    assert "Java 8 SDK syntax" not in entry.checked["function"][0]["description"]


@needs_bfcl
def test_over_long_prompts_are_wrong_and_stop_nothing(cases):
    pairs = cases["multi_turn_base"][:3] + cases["simple_python"][:2]
    script = {e.id: sum(transcript(bfcl_oracle.turns_of(e)), []) for e, _ in pairs[:3]}
    script |= {e.id: [tool_call(bfcl_oracle.calls_of(e))] for e, _ in pairs[3:]}
    middle = pairs[1][0].shown["question"][1][0]["content"]  # second turn of the second case
    long = lambda chat: 80 if f"[User Query]\n{middle}\n" in chat[1]["content"] else 70
    rows = play([c for _, c in pairs], Scripted(script, long, max_model_len=100), max_tokens=30)
    verdicts = [rows[e.id]["correct"] for e, _ in pairs]
    assert verdicts == [True, False, True, True, True]
    row = rows[pairs[1][0].id]
    assert row["over_long"] and row["error_type"] == "over_long" and row["prompt_tokens"] == 80
    assert len(row["turns"]) == 2 and row["turns"][0] and not row["turns"][1]


@needs_bfcl
def test_a_checker_that_raises_is_a_wrong_answer(cases):
    entry, case = cases["simple_python"][0]
    calls = bfcl_oracle.calls_of(entry)
    for value in ([[[]]], {"a": [None]}, None, "\ud800", 10**400):
        params = dict.fromkeys(calls[0]["params"], value)
        assert not case.score({"turns": [[tool_call([{**calls[0], "params": params}])]]})["correct"]


# --- safety ---


def entry_like(**fields) -> bfcl.Entry:
    shown = {"initial_config": {}, "involved_classes": ["MathAPI"], **fields}
    return bfcl.Entry("multi_turn_base_900", "multi_turn_base", shown, shown, [])


ATTACKS = [
    {"name": "__import__('os').getpid", "params": {}},
    {"name": "__import__('os').system", "params": {"command": "touch {mark}"}},
    {"name": "open('{mark}', 'w').write", "params": {"s": "x"}},
    {"name": "exec", "params": {"source": "open('{mark}', 'w')"}},
    {"name": "open", "params": {"file": "{mark}", "mode": "w"}},
    {"name": "add", "params": {"a=1, b=open('{mark}', 'w') or 2, c": 1}},
    {"name": "add", "params": {"a": "__import__('os').getpid()", "b": 1}},
    {"name": "add.__globals__", "params": {}},
    {"name": "_api_description", "params": {}},
    {"name": "__class__", "params": {}},
    {"name": "add(a=1, b=2) or open('{mark}', 'w').write", "params": {"s": "x"}},
]


@needs_bfcl
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a["name"][:30])
def test_no_code_of_a_model_runs(attack, tmp_path):
    """Through both guards, and through the second one alone, which also covers the checker."""
    mark = tmp_path / "mark"
    call = json.loads(json.dumps(attack).replace("{mark}", str(mark)))
    entry, methods = entry_like(), bfcl.methods_of(["MathAPI"])
    assert "add" in methods and not any(name.startswith("_") for name in methods)
    raw = f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['params'].items())})"
    for source in (bfcl.call_string(call, methods), raw):
        [result] = bfcl.execute([source], entry)
        assert "rror" in result or "must be numbers" in result, result
        assert str(os.getpid()) not in result
    bfcl.purge(entry.id)
    assert not mark.exists()


@needs_bfcl
def test_what_is_allowed_still_works():
    entry, methods = entry_like(), bfcl.methods_of(["MathAPI"])
    string = bfcl.call_string({"name": "mean", "params": {"numbers": [1, 2, 6]}}, methods)
    assert string == "mean(numbers=[1, 2, 6])"
    assert bfcl.execute([string, "add(3, b=4.5)"], entry) == ['{"result": 3.0}', '{"result": 7.5}']
    assert bfcl.execute(["ls()"], entry) == ["Error during execution: name 'ls' is not defined"]
    assert bfcl.call_string({"name": "ls", "params": {}}, methods) == "ls()"
    assert bfcl.call_string({"name": "ls -a", "params": {}}, methods) == "no_such_function()"
    bfcl.purge(entry.id)


@needs_bfcl
@pytest.mark.parametrize(
    "source",
    [
        "logarithm(value=10, base=3, precision=987656)",
        "square_root(2, 10000000000)",
        "power(10, 10000000000)",
        "power(base=987654321987654321, exponent=987654321)",
    ],
)
def test_calls_that_would_hang_are_refused(source):
    entry = entry_like()
    assert "too many digits" in bfcl.execute([source], entry)[0]
    bfcl.purge(entry.id)


@needs_bfcl
def test_calls_run_under_a_time_limit(monkeypatch):
    monkeypatch.setattr(bfcl, "CALL_SECONDS", 0.05)

    def forever(self, a, b):
        while True:
            try:
                time.sleep(0.001)
            except TimeoutError:  # a tool that catches everything
                return {"error": "caught"}

    def stubborn(self, a, b):
        while True:
            time.sleep(0.001)

    entry = entry_like()
    bfcl.execute([], entry)
    cls = sys.modules[bfcl.package().paths["MathAPI"]].MathAPI
    monkeypatch.setattr(cls, "add", forever)
    monkeypatch.setattr(cls, "subtract", stubborn)
    results = bfcl.execute(["add(1, 2)", "subtract(1, 2)", "multiply(2, 3)"], entry)
    assert results == [
        '{"error": "caught"}',
        "Error during execution: stopped after 0.05 seconds",
        '{"result": 6}',
    ]
    bfcl.purge(entry.id)


@needs_bfcl
def test_state_does_not_outlive_a_case(cases):
    """Judging a wrong answer first does not change the verdict on the right one."""
    for entry, case in cases["multi_turn_base"][:50]:
        turns = bfcl_oracle.turns_of(entry)
        case.score({"turns": transcript([turn[:1] for turn in turns])})
        assert case.score({"turns": transcript(turns)})["correct"], entry.id


@needs_bfcl
def test_the_package_writes_nothing_into_site_packages():
    """In a fresh process: a whole look at all categories leaves the package's folder as it was."""
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import importlib.util, pathlib
root = pathlib.Path(importlib.util.find_spec("bfcl_eval").origin).parent
look = lambda: {str(p) for p in [*root.rglob("*"), *root.parent.glob("*")] if "__pycache__" not in str(p)}
before = look()
import os, bfcl
for name in bfcl.CATEGORIES: bfcl.entries(name)
scratch = os.environ["BFCL_PROJECT_ROOT"]
assert look() == before and pathlib.Path(scratch).exists()
print(scratch)
"""
    env = {k: v for k, v in os.environ.items() if k != "BFCL_PROJECT_ROOT"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(REPO)],
        env=env,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).exists()  # gone with the process


def test_without_the_package_the_error_says_what_to_install():
    code = """
import sys; sys.path.insert(0, sys.argv[1])
sys.modules["bfcl_eval"] = None
import eval
eval.main(["model", "--output_dir", "nowhere"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(REPO)], text=True, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert (
        "pip install --no-deps bfcl-eval==2026.3.23" in done.stderr
        and "Traceback" not in done.stderr
    )
