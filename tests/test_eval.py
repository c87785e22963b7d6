"""eval.py on the benchmarks' own data: oracle and corrupted answers, loop, safety, reports."""

import argparse
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import bfcl_oracle
import pytest
from frozen import REPO, TOY, needs_vllm

import data
import eval as evaluation
import rewards
import rollout
import scoring
from tasks import api_bank, bfcl, scores

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
        (62.32, 88.13, 76.68, 40.88, 87.50, 86.47),  # Qwen2.5-32B, ToolUPT
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
        "non_live_v3": (non_live := (sum(four) + share["irrelevance"]) / 5),
        "live_v3": (with_all := pooled([*live, "live_irrelevance", "live_relevance"])),
        "live_multi_turn": (with_all + turns) / 2,
        "overall_v3": (non_live + with_all + turns) / 3,
    }
    assert evaluation.columns(counts) == pytest.approx({k: 100 * v for k, v in wanted.items()})


def test_incomplete_columns_are_left_out():
    whole = row_of(80, 70, 10, 50, 60)
    for missing in bfcl.CATEGORIES:
        found = evaluation.columns({k: v for k, v in whole.items() if k != missing})
        assert not {"overall_paper", "overall_v3"} & found.keys()
        lost = evaluation.columns(whole).keys() - found.keys() - {"overall_paper", "overall_v3"}
        if missing in (*bfcl.SIMPLE, *bfcl.NON_LIVE):
            wanted = {"non_live", "non_live_v3"}
        elif missing in bfcl.LIVE:
            wanted = {"live", "live_v3", "live_multi_turn"}
        elif missing in bfcl.MULTI_TURN:
            wanted = {"multi_turn", "live_multi_turn"}
        else:
            wanted = {
                "irrelevance": {"irrelevance", "non_live_v3"},
                "live_irrelevance": {"irrelevance", "live_v3", "live_multi_turn"},
                "live_relevance": {"relevance", "live_v3", "live_multi_turn"},
            }[missing]
        assert lost == wanted, missing
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
    assert decode("[f(a=[1, 'x'])]", as_source=True).calls[0]["params"] == {"a": '[1, "x"]'}
    listed = tool_call(
        {"name": "f", "params": {"a": [1, "x"]}}
    )  # as the official handlers: no text
    assert evaluation.decode(listed, "toolupt", as_source=True).calls[0]["params"] == {
        "a": [1, "x"]
    }


HUGE = "[f(a=0x" + "f" * 6000 + ")]"  # more decimal digits than Python prints


@pytest.mark.parametrize(
    ("form", "response", "kind"),
    [
        ("toolupt", '<tool_call>{"name": "f", <answer>ok</answer>', "malformed"),
        ("toolupt", "<answer>ok</answer><tool_call>", "answer"),
        ("python", "[f(a={(1, 2): 3})]", "malformed"),
        ("python", "[f(a={1, 2})]", "malformed"),
        ("python", HUGE, "malformed"),
        ("python", "[f(a=1e999)]", "malformed"),
        ("python", "[f(a={'k': 1, 'k': 2})]", "malformed"),
        ("toolupt", tool_call({"name": "f", "params": {"a": math.inf}}), "malformed"),
        (
            "toolupt",
            tool_call({"name": "f", "params": {"a": 0}}).replace("0", "-1e999"),
            "malformed",
        ),
        (
            "toolupt",
            '<tool_call>{"name": "f", "params": {"a": 1, "a": 1}}</tool_call>',
            "malformed",
        ),
        ("python", "find(city=1)", "malformed"),
        ("python", "Here:\n```python\n[f()]\n```", "malformed"),
        ("python", '<tool_call>{"name": "f"}</tool_call>', "malformed"),
        ("python", "I cannot (sorry) do this.", "answer"),
    ],
)
def test_broken_calls_are_no_answers_and_stop_nothing(form, response, kind):
    parsed = evaluation.decode(response, form)
    assert parsed.kind == kind and parsed.calls is None


def test_examples_in_python_form():
    score = lambda said, target: evaluation._file_score(target, "python", {"turns": [[said]]})[
        "error_class"
    ]
    call = tool_call({"name": "f", "params": {"a": 1}})
    assert score("No tool does this.", ANSWER) is None
    assert score("[f(a=1)]", ANSWER) == "Tools Count" == score("No tool does this.", call)
    assert score("[f(a=1)]", call) is None and score("[f(a=2)]", call) == "Parameter Value"
    assert score(HUGE, call) == score("[f(a=1, a=1)]", call) == "Code Syntax"
    assert score("<answer> </answer>", ANSWER) == "Other" == score("<answer></answer>", ANSWER)
    assert score("[f(a='<answer></answer>')]", ANSWER) == "Tools Count"


def test_examples_in_the_papers_form():
    """The verdict is training's: tags of both kinds, an empty answer and a key written twice are wrong."""
    call = tool_call({"name": "f", "params": {"a": 1}})
    twice = call.replace('{"a": 1}', '{"a": 2, "a": 1}')
    for said, target, error in (
        (call, call, None), (ANSWER, ANSWER, None), (call + ANSWER, call, "Other"), (ANSWER + call, call, "Other"),
        (call + ANSWER, ANSWER, "Other"), ("<answer></answer>", ANSWER, "Other"), (twice, call, "Code Syntax"),
    ):  # fmt: skip
        row = evaluation._file_score(target, "toolupt", {"turns": [[said]]})
        assert (row["correct"], row["error_class"]) == (error is None, error), said


def test_earlier_steps_in_python_form():
    """A prompt that asks for Python calls shows earlier ones as such, with strings as in repr."""
    steps = [
        ('{"name": "f", "params": {"a": "x\'y", "n": [1, true]}}', "ok"),
        ('[{"name": "g", "params": {}}]', "no"),
    ]
    example = data.Example("e", [], [], "q", steps, "", "answer")
    shown = evaluation._in_python(example).steps
    assert shown == [("""[f(a="x'y", n=[1, True])]""", "ok"), ("[g()]", "no")]
    assert [rewards.parse_python(text).calls for text, _ in shown] == [
        [{"name": "f", "params": {"a": "x'y", "n": [1, True]}}],
        [{"name": "g", "params": {}}],
    ]


@pytest.mark.parametrize("step", ["I looked it up.", "", '{"name": "f"}', "[f(a=1", "[]", "3"])
def test_a_step_that_is_no_call_is_named(step):
    example = data.Example("mine/3", [], [], "q", [(step, "ok")], "", "answer")
    with pytest.raises(ValueError, match="mine/3: the tool step .* is neither.*--format toolupt"):
        evaluation._in_python(example)
    calls = evaluation.replace(example, steps=[("[f(a=1)]", "ok")])
    assert evaluation._in_python(calls) == calls  # in Python form already


def test_lone_surrogates_do_not_reach_the_tokenizer():
    read = lambda text: evaluation.decode(text, "toolupt")
    said = tool_call({"name": "f", "params": {"a": "\ud83d"}})
    assert "\\ud83d" in said  # escaped, as a model writes it
    calls, text = evaluation._as_shown(read, "toolupt", said)
    assert calls[0]["params"] == {"a": "\ud83d"} and json.loads(text)["params"] == {"a": "?"}
    example = data.load("toy", "test")[0]
    example = evaluation.replace(example, steps=[(text, bfcl.encodable("r\ud83d"))])
    assert data.render(example, rollout.AutoTokenizer.from_pretrained(str(TOY)))


# --- the probe: oracle answers pass, corrupted ones fail ---


# 7 of 4,441 cannot be satisfied: empty lists of choices, undocumented parameters.
ORACLE = {
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
        "simple_python": 400,
        "simple_java": 100,
        "simple_javascript": 50,
        "multiple": 200,
        "parallel": 200,
        "parallel_multiple": 200,
        "live_simple": 258,
        "live_multiple": 1053,
        "live_parallel": 16,
        "live_parallel_multiple": 24,
        "irrelevance": 240,
        "live_irrelevance": 884,
        "live_relevance": 16,
        "multi_turn_base": 200,
        "multi_turn_miss_func": 200,
        "multi_turn_miss_param": 200,
        "multi_turn_long_context": 200,
    }
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
    init_kwargs = {}

    def __init__(self, lengths=None):
        self.chats, self.lengths = [], lengths

    def apply_chat_template(self, chat, **kwargs):
        self.chats.append(chat)
        return [len(self.chats) - 1] * (self.lengths(chat) if self.lengths else 1)

    def decode(self, ids, **kwargs):
        return self.chats[ids[0]][1]["content"]


class Scripted:
    """An engine that follows a script; the seed of a request identifies case and step."""

    def __init__(self, script: dict[str, list[str]], lengths=None, max_model_len=32768, seed=0):
        self.tokenizer, self.max_model_len, self.rounds = Chats(lengths), max_model_len, []
        self.said = {
            evaluation.request_seed(seed, case, step): text
            for case, texts in script.items()
            for step, text in enumerate(texts)
        }

    def generate(self, prompts, *, n, temperature, max_tokens, seeds, progress):
        assert n == 1 and len(prompts) == len(seeds)
        assert all(len(p) + max_tokens <= self.max_model_len for p in prompts)
        self.rounds.append(len(prompts))
        self.progress = progress
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
    """Ground truth, one call per step: 200/200/200/198; two need 34 steps, 20 are allowed."""
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
@pytest.mark.parametrize("quiet", [False, True])
def test_the_first_rank_shows_progress_within_a_batch(cases, quiet):
    entry, case = cases["simple_python"][0]
    engine = Scripted({entry.id: ["No."]})
    evaluation.answer([case], engine, options(), lambda row: None, quiet=quiet)
    assert engine.progress == ("" if quiet else "turns")


@needs_bfcl
def test_prompts_of_a_conversation(cases):
    """Results, earlier turns, held-out functions: each is in the prompt when due, not before."""
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
    """System messages become policy, earlier ones memory, the last the query; hints only shown."""
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
                assert message["content"] == example.policy
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


@needs_bfcl
def test_a_check_that_raises_has_a_class():
    """Two calls with a value beyond a float, and a checker that raises for both kinds of cases."""
    doc = {"name": "f", "parameters": {"properties": {"a": {"type": "float"}}, "required": ["a"]}}
    shown = {"function": [doc], "question": []}
    truth = [{"f": {"a": [1.0]}}, {"f": {"a": [2.0]}}]
    entry = bfcl.Entry("parallel_multiple_0", "parallel_multiple", shown, shown, truth)
    calls = [{"name": "f", "params": {"a": value}} for value in (10**400, 2.0)]
    verdict = bfcl.judge(entry, [[calls]])
    assert not verdict["correct"] and verdict["error_class"] == "Parameter Value"
    one = bfcl.Entry("multiple_0", "multiple", shown, shown, truth[:1])
    assert bfcl.judge(one, [[calls[:1]]])["error_type"] == "ast_checker:raised"


@needs_bfcl
def test_calls_that_only_bfcls_greedy_pairing_finds_wrong_have_a_class():
    """a = 1 is taken by the truth that accepts 1 and 2, so the one that wants 1 finds none."""
    doc = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    shown, truth = {"function": [doc], "question": []}, [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}]
    entry = bfcl.Entry("parallel_0", "parallel", shown, shown, truth)
    calls = [{"name": "f", "params": {"a": value}} for value in (1, 2)]
    verdict = bfcl.judge(entry, [[calls]])
    assert not verdict["correct"] and verdict["error_class"] == "Parameter Value"
    assert bfcl.judge(entry, [[calls[::-1]]])["correct"]


@needs_bfcl
def test_a_checker_that_would_hang_is_stopped(cases, monkeypatch):
    """An unclosed list of lists, on which the JavaScript reader's pattern would take days."""
    monkeypatch.setattr(bfcl, "CALL_SECONDS", 0.3)
    entry, case = next(pair for pair in cases["simple_javascript"] if pair[0].id.endswith("_2"))
    calls = bfcl_oracle.calls_of(entry)
    bad = "[[1]" + ",[1]" * 40
    calls[0]["params"] = {**calls[0]["params"], "status": bad}
    verdict = case.score({"turns": [[tool_call(calls)]]})
    assert not verdict["correct"] and "stopped after" in verdict["error"]


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
found = lambda: [*root.rglob("*"), *root.parent.glob("*")]
look = lambda: {str(p) for p in found() if "__pycache__" not in str(p)}
before = look()
import os
from tasks import bfcl
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


# --- API-Bank ---


def api_bank_folder(tmp_path) -> Path:
    """Two files in the official layout."""
    doc = lambda name, *keys: json.dumps(
        {
            "name": name,
            "description": f"{name} does it.",
            "input_parameters": {key: {"type": "str", "description": key} for key in keys},
            "output_parameters": {},
        }
    )
    head = "\nGenerate an API request ...\nThe current year is 2023.\n\nAPI descriptions:\n"
    meeting = "[AddMeeting(token='t1', topic='Bob's talk', attendees='['Ann', 'Bob']')]"
    rows = [
        (
            "User: Add it.\nIt is\nurgent.\nAI: Sure.\nGenerate API Request:\n",
            doc("AddMeeting", "token", "topic", "attendees"),
            meeting,
        ),
        (
            "User: Hi\nAI: Hello!\nUser: Token?\nAPI-Request: [GetToken(user='ann')]->"
            "{'token': 't1'}\nGenerate API Request:\n",
            doc("GetToken", "user") + "\n" + doc("Now"),
            "[Now()]",
        ),
    ]
    search = (
        "User: Book a room.\nAI: I look for a tool.\nGenerate API Request:\n",
        doc("ToolSearcher", "keywords"),
        "[ToolSearcher(keywords='book room')]",
    )
    folder = tmp_path / "api_bank"
    folder.mkdir()
    for file, content in (("level-1-api.json", rows), ("level-2-api.json", [search, rows[0]])):
        texts = [
            {
                "file": "f",
                "id": i,
                "instruction": head + docs,
                "input": said,
                "expected_output": f"API-Request: {gold}",
            }
            for i, (said, docs, gold) in enumerate(content)
        ]
        (folder / file).write_text(json.dumps(texts))
    return folder


def test_api_bank_prompts_and_match(tmp_path):
    first, second, search, _ = api_bank.samples(api_bank_folder(tmp_path))
    assert first.gold["params"] == {
        "token": "t1",
        "topic": "Bob's talk",
        "attendees": "['Ann', 'Bob']",
    }
    assert first.fields["query"] == "Add it.\nIt is\nurgent."
    assert first.fields["history"] == [("user", "Add it.\nIt is\nurgent."), ("assistant", "Sure.")]
    assert second.fields["history"] == [("user", "Hi"), ("assistant", "Hello!")]
    assert second.fields["query"] == "Token?"
    call = '{"name": "GetToken", "params": {"user": "ann"}}'
    assert second.fields["steps"] == [(call, "{'token': 't1'}")]
    assert [tool["name"] for tool in second.fields["tools"]] == ["GetToken", "Now"]
    assert second.gold == {"name": "Now", "params": {}}
    assert [s.category for s in (first, search)] == ["level_1", "level_2_search"]
    listed = {**first.gold["params"], "attendees": ["Ann", "Bob "]}
    assert api_bank.matches([{"name": "AddMeeting", "params": listed}], first.gold)
    for wrong in (
        {"attendees": ["Bob", "Ann"]},
        {"topic": "bob's talk"},
        {"token": "t2"},
        {"more": "1"},
    ):
        assert not api_bank.matches(
            [{"name": "AddMeeting", "params": {**listed, **wrong}}], first.gold
        )
    assert not api_bank.matches([first.gold, first.gold], first.gold)
    assert not api_bank.matches([{**first.gold, "name": "Addmeeting"}], first.gold)
    assert not api_bank.matches([], first.gold) and not api_bank.matches(None, first.gold)
    assert api_bank.matches(
        [{"name": "ToolSearcher", "params": {"keywords": "rooms"}}], search.gold
    )
    value = lambda a, b: api_bank.matches(
        [{"name": "f", "params": {"x": a}}], {"name": "f", "params": {"x": b}}
    )
    assert (
        value(5, "5") and value("5.0", "5") and value(" a ", "a") and value({"k": 1}, "{'k': '1'}")
    )
    assert not any(
        (
            value("05", "5"),
            value(True, "1"),
            value("a", "b"),
            value(None, "None"),
            value("10" * 10, "10" * 9 + "11"),
        )
    )


@needs_api_bank
def test_api_bank_gold_answers_score_everything():
    cases = evaluation.api_bank_cases(options(bench="api_bank", api_bank=str(OFFICIAL)))
    assert Counter(c.category for c in cases) == {
        "level_1": 399,
        "level_2": 90,
        "level_2_search": 45,
    }
    golds = {s.id: s.gold for s in api_bank.samples(OFFICIAL)}
    for form, write in (("toolupt", tool_call), ("python", python_calls)):
        cases = evaluation.api_bank_cases(
            options(bench="api_bank", api_bank=str(OFFICIAL), format=form)
        )
        rows = [
            {"category": c.category, **c.score({"turns": [[write([golds[c.id]])]]})} for c in cases
        ]
        assert all(row["correct"] for row in rows)
        assert set(api_bank.columns(scores._counts(rows)).values()) == {100.0}

    # every gold call names documented parameters only: nothing was lost or invented in reading
    known = {
        s.id: {t["name"]: t["parameters"]["properties"] for t in s.fields["tools"]}
        for s in api_bank.samples(OFFICIAL)
    }
    full = [
        golds[k]["params"].keys() == known[k][golds[k]["name"]].keys()
        for k in golds
        if k.startswith("level_1") and golds[k]["name"] in known[k]
    ]
    assert sum(full) == 379


def test_api_bank_values():
    same = lambda a, b: api_bank.matches(
        [{"name": "f", "params": {"x": a}}], {"name": "f", "params": {"x": b}}
    )
    assert same(True, "True") and same(False, "false") and same("true", "True")
    assert not same(True, "False") and not same(True, "1") and not same(True, 1)
    assert same(0.00001, "0.00001") and same(0.00001, "1e-5") and same("1E-05", "0.00001")
    assert same(1e16, "10000000000000000") and same(-1.5e300, "-15e299") and same("1e2", "100.0")
    assert same([1e-05], "[0.00001]") and same({"k": "1e-5"}, "{'k': 0.00001}")
    assert not same(0.00001, "0.0001") and not same(1e-05, "1e5") and not same(1, "1e")
    assert not same(7, "007") and not same("1e99999", "2e99999") and not same("e5", "5")
    assert same(5, "5") and not same(5, "6") and not same("[0x" + "f" * 6000 + "]", "[1]")


def test_api_bank_columns():
    counts = {"level_1": (303, 399), "level_2": (40, 90), "level_2_search": (24, 45)}
    assert api_bank.columns(
        counts
    ) == pytest.approx(  # ToolACE's row of iTool's Table 2: 75.94 and 47.41
        {"level_1": 75.94, "level_2": 47.41, "level_2_without_search": 44.44}, abs=0.005
    )
    assert list(api_bank.columns({"level_1": (1, 2)})) == ["level_1"]


# --- a run, its records, its reports ---


class Interrupted(Exception):
    pass


def run(tmp_path, monkeypatch, script, stop_after=math.inf, **given):
    """evaluate() with a scripted engine; `stop_after` generate calls the machine dies."""
    engine = Scripted(script)
    generate, calls = engine.generate, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) > stop_after:
            raise Interrupted
        return generate(*args, **kwargs)

    engine.generate = dying
    monkeypatch.setattr(rollout, "make_engine", lambda *a, **k: engine)
    given = {"model": str(TOY), "output_dir": str(tmp_path / "out"), **given}
    return evaluation.evaluate(options(**given)), engine


@pytest.fixture
def own(tmp_path):
    """A file of twelve examples, and responses of which two calls and three answers are right."""
    examples = data.load("toy", "test")
    calls = [e for e in examples if e.kind == "tool_call"][:6]
    answers = [e for e in examples if e.kind == "answer"][:6]
    data.write_jsonl(calls + answers, tmp_path / "own.jsonl")
    said = [e.target for e in calls[:2]] + [ANSWER, "<tool_call>{", "prose", calls[0].target]
    said += [ANSWER] * 3 + [calls[0].target, "prose", "<answer>cut"]
    ids = [f"{e.id}#{i}" for i, e in enumerate(calls + answers)]
    return str(tmp_path / "own.jsonl"), {i: [text] for i, text in zip(ids, said)}


def test_a_file_of_examples(tmp_path, monkeypatch, own, capsys):
    file, script = own
    out, _ = run(tmp_path, monkeypatch, script, bench="file", file=file)
    rows = list(data.read_jsonl(out / "results.jsonl"))
    examples = data.load("jsonl", file)
    right = [
        rewards.outcome(script[r["id"]][0], e.target).total == 4 for r, e in zip(rows, examples)
    ]
    assert [r["correct"] for r in rows] == right and sum(right) == 5
    text = (out / "report.md").read_text()
    assert "| Accuracy | Tool calls | Answers |" in text
    assert "| 41.67 [" in text and " | 33.33 [" in text and " | 50.00 [" in text
    total = sum(rewards.outcome(script[r["id"]][0], r["target"]).total for r in rows) / 12
    assert f"mean outcome reward {total:.3f}" in text
    assert (out / "report.png").stat().st_size > 5000 and "Accuracy" in capsys.readouterr().out
    for key in ("id", "prompt", "turns", "decoded", "correct", "error", "error_class"):
        assert all(key in row for row in rows)
    assert all(row["prompt"] for row in rows)


def test_forms_of_the_responses(tmp_path, monkeypatch, own):
    """The report's table against counts by hand; results.jsonl stays JSON whatever a model writes."""
    file, script = own
    call = next(iter(script.values()))[0]
    fenced = f"```json\n{call[11:-12]}```"
    said = [call, call + ANSWER, fenced, f"<answer>{fenced}</answer>", call.replace('{"name"', '{"name": "f", "name"'),
            tool_call({"name": "f", "params": {"a": math.inf}}),
            ANSWER, "<answer></answer>", ANSWER + call, "<answer>cut", "prose", "<answer></answer>" + call]  # fmt: skip
    script = {i: [text] for i, text in zip(script, said)}
    out, _ = run(tmp_path, monkeypatch, script, bench="file", file=file)
    text = (out / "report.md").read_text()
    head = "| category | responses | call | answer | both | untagged call | neither | empty answer | repeated key |"
    assert head in text
    assert "| tool_call | 6 | 3 | 0 | 1 | 2 | 0 | 0 | 1 |" in text
    assert "| answer | 6 | 0 | 2 | 2 | 0 | 2 | 2 | 0 |" in text

    def refuse(constant):
        raise AssertionError(constant)

    for line in (out / "results.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_tally_is_what_training_reports(own):
    """Reward.tally against a slow count; train.evaluate divides these sums."""
    file, script = own
    examples, n = data.load("jsonl", file), Counter()
    for example, [text] in zip(examples, script.values()):
        outcome = rewards.outcome(text, example.target)
        right = outcome.format == 1 and outcome.correct == 3
        n["n"] += 1
        n["reward"] += outcome.total
        n["accuracy"] += right
        n["n_calls"] += example.kind == "tool_call"
        n["tool_calls" if example.kind == "tool_call" else "answers"] += right
    texts, tally = [text for [text] in script.values()], scoring.Reward().tally
    assert tally(texts, examples) == pytest.approx(dict(n))
    parts = [tally(texts[i::2], examples[i::2]) for i in (0, 1)]
    assert {k: parts[0][k] + parts[1][k] for k in n} == pytest.approx(dict(n))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, own):
    file, script = own
    given = {"bench": "file", "file": file, "batch": 4}
    whole, _ = run(tmp_path / "whole", monkeypatch, script, **given)
    with pytest.raises(Interrupted):
        run(tmp_path, monkeypatch, script, stop_after=2, **given)
    part = tmp_path / "out/results.part0.jsonl"
    assert len(list(data.read_jsonl(part))) == 8
    with open(part, "a") as file_:
        file_.write('{"id": "cut off in the mid')  # as a crash leaves it
    out, engine = run(tmp_path, monkeypatch, script, **given)
    assert engine.rounds == [4]
    assert (out / "results.jsonl").read_text() == (whole / "results.jsonl").read_text()
    assert not list(out.glob("*part*"))
    _, engine = run(tmp_path, monkeypatch, script, **given)
    assert engine.rounds == []  # nothing left to do
    with pytest.raises(ValueError, match="max_tokens 1024 -> 5.*another --output_dir"):
        run(tmp_path, monkeypatch, script, max_tokens=5, **given)


@needs_bfcl
def test_categories_limit_and_overalls(tmp_path, monkeypatch, cases):
    """No overall for a part of the benchmark; more categories join the same results."""
    script = {
        e.id: [tool_call(bfcl_oracle.calls_of(e))]
        for e, _ in cases["simple_python"][:3] + cases["multiple"][:3]
    }
    out, engine = run(tmp_path, monkeypatch, script, categories=["simple_python"], limit=2)
    assert engine.rounds == [2]
    out, engine = run(
        tmp_path, monkeypatch, script, categories=["simple_python", "multiple"], limit=3
    )
    assert engine.rounds == [4]
    text = (out / "report.md").read_text()
    assert (
        "**Not the whole benchmark**, no overall: simple_python 3 of 400, multiple 3 of 200."
        in text
    )
    assert "Overall" not in text.split("Error types")[0].split("- Overall (ToolUPT) =")[0]
    assert "bfcl-eval 2026.3.23" in text and "| simple_python | 3 | 3 | 100.00 |" in text
    with pytest.raises(ValueError, match="no category 'simple'"):
        run(tmp_path, monkeypatch, script, categories=["simple"])


def fake_run(folder: Path, correct: dict[str, list[bool]], **settings) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "id": f"{k}_{i}",
            "category": k,
            "correct": bool(v),
            "over_long": False,
            "cut": 0,
            "kinds": [["answer"]],
            "decoded": [[None]],
            "error_class": None if v else "Other",
            "turns": [["x"]],
        }
        for k, values in correct.items()
        for i, v in enumerate(values)
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {
        "model": "m",
        "bench": "bfcl",
        "bfcl_eval": "2026.3.23",
        "prompt": "p",
        "format": "toolupt",
        "max_tokens": 9,
    }
    known |= {
        "max_model_len": 99,
        "temperature": 0,
        "seed": 0,
        "keep_steps": True,
        "half": None,
        "engine": "vllm",
        "versions": {},
    }
    sizes = {k: len(v) for k, v in correct.items()}
    (folder / "settings.json").write_text(json.dumps(known | {"sizes": sizes} | settings))
    return folder


def test_reports_of_the_whole_benchmark_and_comparisons(tmp_path):
    rng = random.Random(0)
    draw = lambda p: {k: [rng.random() < p for _ in range(100)] for k in bfcl.CATEGORIES}
    low, high = draw(0.4), draw(0.6)
    near = {k: [not v[0], *v[1:]] for k, v in low.items()}
    a, b, c = (fake_run(tmp_path / n, x) for n, x in (("a", low), ("b", high), ("c", near)))
    text = scores.report(a)
    wanted = evaluation.columns({k: (sum(v), len(v)) for k, v in low.items()})
    for name, value in wanted.items():
        assert f"{value:.2f} [" in text, name
    assert (
        "| Overall (ToolUPT) | Non-live AST | Live AST | Multi-turn | Relevance | Irrelevance "
        "| Overall (iTool) | Non-live with irrelevance (iTool) | Live with relevance, irrelevance "
        "(iTool) | mean of that and Multi-turn (iTool Table 5) |" in text
    )
    lines = scores.compare([a, b, c]).splitlines()
    differs = next(line for line in lines if line.startswith(f"| {b} - {a}"))
    same = next(line for line in lines if line.startswith(f"| {c} - {a}"))
    assert "n.s." not in differs.split("|")[2] and "n.s." in same.split("|")[2]
    gap = (
        evaluation.columns({k: (sum(v), len(v)) for k, v in high.items()})["overall_paper"]
        - wanted["overall_paper"]
    )
    assert differs.split("|")[2].strip().startswith(f"{gap:+.2f} [")
    d = fake_run(tmp_path / "d", draw(0.5), bfcl_eval="2025.8.6.2")
    assert "WARNING: bfcl_eval differs" in scores.compare([a, d])
    e = fake_run(tmp_path / "e", {"level_1": [True]}, bench="api_bank")
    with pytest.raises(ValueError, match="different benchmarks"):
        scores.compare([a, e])


def test_error_types_are_pooled_over_live_and_non_live(tmp_path):
    """Figure 3's two bars: every wrong case of the group counts once, right ones and multi-turn never."""
    rng = random.Random(3)
    draw = {k: [rng.random() < 0.5 for _ in range(30)] for k in bfcl.CATEGORIES if "java" not in k}
    out = fake_run(tmp_path / "a", draw)
    rows = list(data.read_jsonl(out / "results.jsonl"))
    for row in rows:
        row["error_class"] = None if row["correct"] else rng.choice(bfcl.CLASSES)
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = scores.report(out).splitlines()
    for name, live in (("all live", True), ("all non-live", False)):
        slow = dict.fromkeys(bfcl.CLASSES, 0)
        for row in rows:
            of_group = row["category"].startswith("live_") == live
            if of_group and "multi_turn" not in row["category"] and not row["correct"]:
                slow[row["error_class"]] += 1
        assert sum(slow.values()) > 30
        assert f"| {name} | {' | '.join(map(str, slow.values()))} |" in lines
    small = fake_run(tmp_path / "b", {"simple_python": [False]})
    assert "all non-live" in (text := scores.report(small)) and "all live" not in text


def test_bootstrap_against_a_slow_loop():
    """The spread of a column under resampling equals that of a plain loop over drawn cases."""
    rng = random.Random(1)
    rows = [
        {"id": f"{k}{i}", "category": k, "correct": rng.random() < 0.3}
        for k, n in (("tool_call", 40), ("answer", 10))
        for i in range(n)
    ]
    other = [{**row, "correct": rng.random() < 0.5} for row in rows]
    found = scores.bootstrap([rows, other], "file", samples=4000)
    slow = []
    for _ in range(4000):
        right = 0
        for k in ("tool_call", "answer"):
            mine = [row["correct"] for row in rows if row["category"] == k]
            right += sum(rng.choice(mine) for _ in mine)
        slow.append(100 * right / 50)
    slow.sort()
    fast = sorted(found["accuracy"][:, 0])
    for q in (100, 1000, 2000, 3000, 3900):
        assert abs(fast[q] - slow[q]) <= 2.01  # one case is 2 %
    assert abs(found["accuracy"][:, 0].mean() - 2 * sum(row["correct"] for row in rows)) < 0.5
    assert found["tool_call"].shape == (4000, 2)
    assert (
        scores.bootstrap([rows, rows], "file")["accuracy"] @ [1, -1] == 0
    ).all()  # the same draw for both


def test_partial_columns_broken_calls_and_other_targets(tmp_path):
    """What readers are told: incomplete columns, unclean answers, figures that do not compare."""
    right = {"level_1": [True] * 4, "level_2": [True] * 2, "level_2_search": [True]}
    sizes = {"level_1": 4, "level_2": 9, "level_2_search": 1}
    a = fake_run(tmp_path / "a", right, bench="api_bank", sizes=sizes, bfcl_eval=None, dtype="x")
    assert "| run | L1 | L2 (part) | L2 without ToolSearcher (part) |" in scores.report(a)
    b = fake_run(tmp_path / "b", right, bench="api_bank", sizes=sizes, bfcl_eval=None, dtype="y")
    assert "WARNING: dtype differs: x, y" in scores.compare([a, b])
    rows = [row | {"target": "other"} for row in data.read_jsonl(b / "results.jsonl")]
    (b / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="7 common cases have different targets, level_1_0"):
        scores.compare([a, b])

    c = fake_run(tmp_path / "c", {"irrelevance": [True] * 4})
    rows = list(data.read_jsonl(c / "results.jsonl"))
    said = [ANSWER, "Sure. " + ANSWER, ANSWER + "<tool_call>", ANSWER + ANSWER]
    rows = [row | {"turns": [[text]], "error_type": None} for row, text in zip(rows, said)]
    rows[3] |= {"correct": False, "error_class": "Other", "error_type": "multi_turn:raised"}
    (c / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = scores.report(c)
    assert (
        "25.00 % (1 of 4) are clean answers" in text and "- 1 cases count as wrong because" in text
    )


def test_rescore_of_parts_and_of_other_data(tmp_path, monkeypatch, own, capsys):
    file, script = own
    out, _ = run(tmp_path, monkeypatch, script, bench="file", file=file)
    (out / "results.jsonl").rename(out / "results.part0.jsonl")  # as an interrupted run leaves it
    evaluation.rescore(out, *evaluation.recorded(out))
    assert len(list(data.read_jsonl(out / "results.jsonl"))) == 12
    lines = Path(file).read_text().splitlines(keepends=True)
    Path(file).write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="holds results of other settings .data"):
        run(tmp_path, monkeypatch, script, bench="file", file=file)
    with pytest.raises(SystemExit):
        evaluation.main(["--rescore", str(out)])
    gone = list(script)[-1]
    assert f"1 cases of {out} are not in the data any more, {gone}" in capsys.readouterr().err


def test_the_hash_of_the_data_is_that_of_the_file_in_either_format(own):
    made = lambda form: argparse.Namespace(file=own[0], seed=0, format=form)
    cases = [evaluation.file_cases(made(form)) for form in ("toolupt", "python", "toolupt")]
    hashes = [evaluation._data_read("file", each)["data"] for each in (*cases, cases[0][1:])]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_later_errors_keep_their_traceback(tmp_path, monkeypatch, own):
    def broken(*args, **kwargs):
        raise ValueError("a defect")

    monkeypatch.setattr(rollout, "make_engine", broken)
    argv = [str(TOY), "--bench", "file", "--file", own[0], "--output_dir", str(tmp_path / "x")]
    with pytest.raises(ValueError, match="a defect"):
        evaluation.main(argv)


def test_rescore_keeps_what_the_run_read(tmp_path, monkeypatch, own, capsys):
    """Another version of the data may judge again; it is written beside the run's own."""
    file, script = own
    out, _ = run(tmp_path, monkeypatch, script, bench="file", file=file)
    settings = json.loads((out / "settings.json").read_text())
    evaluation.main(["--rescore", str(out)])
    assert json.loads((out / "settings.json").read_text()) == settings
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    rows[0]["target"], rows[0]["kind"] = "<answer>\nAnother.\n</answer>", "answer"
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        evaluation.main(["--rescore", str(out)])
    assert f"1 targets of {out} are others in the data now" in capsys.readouterr().err


def test_rescore_reads_the_responses_only(tmp_path, monkeypatch, own):
    file, script = own
    out, _ = run(tmp_path, monkeypatch, script, bench="file", file=file)
    before = (out / "results.jsonl").read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    spoilt = [
        {**row, "correct": not row["correct"], "error_class": "Other", "decoded": None}
        for row in rows
    ]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spoilt))
    monkeypatch.setattr(rollout, "make_engine", None)
    evaluation.main(["--rescore", str(out)])
    assert [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines()] == rows


def test_error_types_of_a_file(tmp_path, capsys):
    """A pair per class of iTool's Figure 3 and a right one; files of pairs and of rollouts."""
    target = '[f(a=1, b="x"), g()]'
    said = {
        None: '[g(), f(a=1, b="X")]',
        "Code Syntax": "[f(a=1",
        "Tools Count": "[g()]",
        "Tool Name": '[f(a=1, b="x"), h()]',
        "Parameter Count": "[f(a=1), g()]",
        "Parameter Name": '[f(a=1, c="x"), g()]',
        "Parameter Value": '[f(a=2, b="x"), g()]',
    }
    rows = [{"response": text, "target": target, "category": "multi"} for text in said.values()]
    rows += [{"text": "prose", "target": ANSWER, "kind": "answer"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation.main(["--errors", str(path)])
    text = capsys.readouterr().out
    assert "multi: 1 of 7 without error" in text and "answer: 0 of 1 without error" in text
    assert (
        "| multi | 1 | 0 | 1 | 1 | 1 | 1 | 1 |" in text
        and "| answer | 0 | 1 | 0 | 0 | 0 | 0 | 0 |" in text
    )
    assert (tmp_path / "pairs.errors.png").stat().st_size > 5000
    path.write_text(path.read_text().rstrip("\n"))  # the last line counts without a newline
    evaluation.main(["--errors", str(path)])
    assert "answer: 0 of 1 without error" in capsys.readouterr().out
    for text, message in (('{"response": "x"}\n', "line 1 has no 'target'"), ("", "is empty")):
        path.write_text(text)
        with pytest.raises(SystemExit):
            evaluation.main(["--errors", str(path)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a model"),
        (["m", "--limit", "0"], "must be at least 1"),
        (["m", "--compare", "a", "b"], "give a model, or one of"),
        (["m", "--bench", "gorilla"], "invalid choice"),
        ([str(TOY), "--bench", "file"], "needs data: --file"),
        ([str(TOY), "--bench", "api_bank"], "--api_bank DIR"),
        (
            [str(TOY), "--bench", "api_bank", "--api_bank", "nowhere"],
            "nowhere/level-1-api.json does not exist",
        ),
        ([str(TOY), "--bench", "api_bank", "--half", "0"], "--half belongs to --bench bfcl"),
        (
            [str(TOY), "--bench", "file", "--no_keep_steps"],
            "--no_keep_steps belongs to --bench bfcl",
        ),
        (
            [str(TOY), "--bench", "file", "--file", "toy:test", "--max_tokens", "9216"],
            "leaves no room",
        ),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("[{]", "level-1-api.json is not valid JSON"), ("[{}]", "sample 0: KeyError")],
)
def test_damaged_files_of_api_bank_are_named(text, message, tmp_path):
    for name in api_bank.FILES.values():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        api_bank.samples(tmp_path)


# --- BFCL-half ---


@needs_bfcl
def test_bfcl_half_shares_no_query_no_tool_and_no_call():
    words = lambda text: tuple(
        "".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split()
    )
    opening = lambda e: next((text for role, text in e.history if role == "user"), e.query)
    for seed in (0, 1):
        train, test = data.bfcl_halves(seed)
        assert len(train) + len(test) == 2251 and abs(len(train) - len(test)) < 60
        parts = []
        for part in (train, test):
            tools = {words(json.dumps(tool, sort_keys=True)) for e in part for tool in e.tools}
            lists = {re.sub(r"_\d+-(\d+)-\d+$", r" \1", e.id.split("/")[1]) for e in part}
            calls = {e.target for e in part if e.kind == "tool_call"} - {""}
            parts.append((tools, lists, calls, {words(opening(e)) for e in part}))
        assert all(a and b and not a & b for a, b in zip(*parts))
    again, _ = data.bfcl_halves(1)
    assert again == train and train != data.bfcl_halves(0)[0]


@needs_bfcl
def test_bfcl_half_trains_on_accepted_answers_and_evaluates_the_rest(cases):
    train, test = data.load("bfcl_half", seed=3), data.load("bfcl_half", "test", seed=3)
    live = {case.id: case for name in bfcl.GROUPS["live"] for _, case in cases[name]}
    for example in train + test:
        case = live[example.id.split("/")[1]]
        assert case.category != "live_relevance"
        assert case.score({"turns": [[example.target]]})["correct"]
        asked = next(case.talk({}))
        same = ("query", "tools", "system", "user", "policy")
        assert all(getattr(asked, name) == getattr(example, name) for name in same)
    assert (
        len(train) + len(test) == 2251 - 16 - 4
    )  # relevance, and the four cases that no answer satisfies
    evaluated = {c.id for c in evaluation.bfcl_cases(options(half=3))}
    assert not evaluated & {e.id.split("/")[1] for e in train}
    assert {e.id.split("/")[1] for e in test} < evaluated
    other = [name for name in bfcl.CATEGORIES if name not in bfcl.GROUPS["live"]]
    assert sum(c.id in evaluated for name in other for _, c in cases[name]) == 4441 - 2251
    with pytest.raises(ValueError, match="no part 'valid'"):
        data.load("bfcl_half", "valid")


# --- real engines ---


def launch(*command, ranks=0) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD" not in k}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks else []), *map(str, command)]
    env["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command, check=False, cwd=REPO, env=env, text=True, capture_output=True, timeout=1500
    )


@needs_bfcl
@needs_vllm
@pytest.mark.long
def test_two_ranks_with_vllm_agree_with_transformers(tmp_path):
    """The toy model on a few cases: torchrun with an engine per rank, one process without vLLM."""
    common = [
        "eval.py",
        TOY,
        "--categories",
        "simple_python",
        "live_relevance",
        "multi_turn_base",
        "--limit",
        3,
    ]
    common += ["--max_tokens", 24, "--max_model_len", 9000, "--max_num_seqs", 8]
    done = launch(*common, "--output_dir", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    done = launch(*common, "--output_dir", tmp_path / "one", "--engine", "transformers")
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = (list(data.read_jsonl(tmp_path / name / "results.jsonl")) for name in ("two", "one"))
    assert [row["id"] for row in two] == [row["id"] for row in one] and len(one) == 9
    assert not list((tmp_path / "two").glob("*part*"))
    # Kernels sum in another order, which may change a greedy token near a tie, in float32 too.
    same = sum(a["turns"] == b["turns"] for a, b in zip(one, two))
    assert same >= 7, same
    assert (
        "going on: 9 of 9"
        in launch(*common, "--output_dir", tmp_path / "one", "--engine", "transformers").stdout
    )
