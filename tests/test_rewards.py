"""rewards.py against slow loops written from the papers, oracle cases, and hostile text."""

import ast
import itertools
import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

import rewards
from rewards import binary, error_type, outcome, parse

ORACLE = json.loads((Path(__file__).parent / "oracles" / "rewards.json").read_text())
SEVERITY = [None, "Parameter Value", "Parameter Name", "Parameter Count", "Tool Name"]
CLASSES = {*SEVERITY, "Tools Count", "Code Syntax", "Other"}

CALL = '<tool_call>\n{"name": "get_weather", "params": {"city": "Paris", "days": 3}}\n</tool_call>'
ANSWER = "<answer>\nWhich city?\n</answer>"


def tagged(calls) -> str:
    return f"<tool_call>\n{json.dumps(calls, ensure_ascii=False)}\n</tool_call>"


def call(name, **params) -> dict:
    return {"name": name, "params": params}


# --- slow re-implementations, from the papers' text ---


def slow_equal(a, b) -> bool:
    """JSON equality: bool, number, string, null, array, object are six different kinds."""

    def kind(v):
        kinds = [bool, (int, float), str, type(None), list, dict]
        return next(i for i, types in enumerate(kinds) if isinstance(v, types))

    if kind(a) != kind(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(slow_equal(a[i], b[i]) for i in range(len(a)))
    if isinstance(a, dict):
        return sorted(a) == sorted(b) and all(slow_equal(a[k], b[k]) for k in a)
    return a == b


def slow_rewards(P, G):
    """r_name and r_param of Eqs. 5-10 as exact fractions."""
    n_p, n_g = [], []
    for names, calls in (n_p, P), (n_g, G):
        for c in calls:
            if c["name"] not in names:
                names.append(c["name"])
    common = [name for name in n_p if name in n_g]
    r_name = Fraction(len(common), len(n_p) + len(n_g) - len(common))

    U, best_sum = [], Fraction(0)
    for i in range(len(G)):
        scores = {}
        for j in range(len(P)):
            if G[i]["name"] == P[j]["name"] and j not in U:
                g, p = G[i]["params"], P[j]["params"]
                common = [k for k in g if k in p]
                union = list(g) + [k for k in p if k not in g]
                equal = [k for k in common if slow_equal(g[k], p[k])]
                s_key = Fraction(len(common), len(union)) if union else Fraction(1)
                s_value = Fraction(len(equal), max(len(g), len(p))) if union else Fraction(1)
                scores[j] = (s_key + s_value) / 2
        best = max(scores.values(), default=Fraction(0))
        if best > 0:
            best_sum += best
            U.append(min(j for j in scores if scores[j] == best))
    return r_name, best_sum / max(len(P), len(G))


def slow_error(P, G):
    """Error class by trying every assignment of the calls (spec: least severe mismatch)."""

    def normal(v):
        if isinstance(v, str):
            return "".join(c for c in v.lower() if c not in " ,./-_*^")
        if isinstance(v, list):
            return [normal(x) for x in v]
        return {k: normal(x) for k, x in v.items()} if isinstance(v, dict) else v

    def severity(p, g):
        if p["name"] != g["name"]:
            return 4
        if len(p["params"]) != len(g["params"]):
            return 3
        if set(p["params"]) != set(g["params"]):
            return 2
        return 0 if slow_equal(normal(p["params"]), normal(g["params"])) else 1

    if len(P) != len(G):
        return "Tools Count"
    worst = [max(map(severity, order, G)) for order in itertools.permutations(P)]
    return SEVERITY[min(worst)]


VALUES = json.loads("""[1, 1.0, true, 0, false, null, "1", "", "A b", "ab", "a,B.", [], [1, 2],
    [2, 1], [true], {}, {"x": 1, "y": [null]}, {"y": [null], "x": 1.0}, {"x": true},
    [{"k": "a_b"}], [{"k": "AB"}]]""")


def random_calls(rng, most=4) -> list[dict]:
    def params():
        return {k: rng.choice(VALUES) for k in rng.sample("abc", rng.randint(0, 3))}

    return [call(rng.choice("fg"), **params()) for _ in range(rng.randint(1, most))]


def as_python(calls) -> str:
    def args(params):
        return ", ".join(f"{k}={v!r}" for k, v in params.items())

    return "[" + ", ".join(f"{c['name']}({args(c['params'])})" for c in calls) + "]"


# --- Eqs. 3-12 ---


@pytest.mark.parametrize("case", ORACLE["toolupt_reward_1"])
def test_oracle_reward(case):
    row = ORACLE["toolupt_reward_1"][case]
    got = outcome(tagged(row["P"]), tagged(row["G"]))
    assert (got.format, got.syntax) == (1.0, 1.0)
    assert got.name == pytest.approx(row["r_name"], abs=1e-6)
    assert got.param == pytest.approx(row["r_param"], abs=1e-6)
    assert got.correct == pytest.approx(row["R_correct"], abs=1e-6)
    assert got.total == pytest.approx(1 + row["R_correct"], abs=1e-6)


def test_random_calls_equal_the_slow_loop():
    rng = random.Random(0)
    totals = set()
    for _ in range(500):
        P, G = random_calls(rng), random_calls(rng)
        r_name, r_param = slow_rewards(P, G)
        got = outcome(tagged(P), tagged(G))
        assert (got.syntax, got.name) == (1.0, pytest.approx(float(r_name)))
        assert got.param == pytest.approx(float(r_param))
        expected = float(6 * (1 + r_name + r_param) / 3 - 3)
        assert got.correct == pytest.approx(expected)
        assert got.total == got.format + got.correct
        totals.add(round(got.total, 6))
    assert len(totals) > 50, totals


@pytest.mark.parametrize(
    "P, G, r_param",
    [
        # a match that scores 0 uses up nothing: the second ground-truth call still gets its partner
        ([call("f", a=1)], [call("f", x=1), call("f", a=1)], 1 / 2),
        # a tie goes to the first candidate: 1/2 for G_1, then (1/3 + 1/2)/2 is left for G_2
        (
            [call("f", a=1, b=2), call("f", a=1, c=2)],
            [call("f", a=1), call("f", a=1, b=2)],
            11 / 24,
        ),
        # greedy, not optimal: G_1 takes the exact partner of G_2
        ([call("f", a=1, b=2)], [call("f", a=1), call("f", a=1, b=2)], 1 / 4),
        # a call is used once
        ([call("f", a=1)], [call("f", a=1), call("f", a=1)], 1 / 2),
        # calls without parameters: both 1, exactly one 0
        ([call("f")], [call("f")], 1),
        ([call("f", a=1)], [call("f")], 0),
        ([call("f")], [call("f", a=1)], 0),
        # two of three keys common, one value right: (2/4 + 1/3) / 2
        ([call("f", a=1, b=0, d=3)], [call("f", a=1, b=2, c=3)], 5 / 12),
        # another name is no candidate, whatever its parameters
        ([call("g", a=1)], [call("f", a=1)], 0),
    ],
)
def test_param_reward_by_hand(P, G, r_param):
    assert outcome(tagged(P), tagged(G)).param == pytest.approx(r_param)


@pytest.mark.parametrize(
    "predicted, wanted, equal",
    [
        ("1", "1.0", True),
        ("1", "true", False),
        ("0", "false", False),
        ("true", "true", True),
        ("true", '"true"', False),
        ("1", '"1"', False),
        ("null", "null", True),
        ("null", "false", False),
        ("[1, 2]", "[2, 1]", False),
        ("[1]", "[1, 2]", False),
        ("[1]", "[true]", False),
        ('{"a": 1, "b": [2]}', '{"b": [2.0], "a": 1}', True),
        ('{"a": 1}', '{"a": 1, "b": 2}', False),
        ("[]", "{}", False),
        ('"Paris"', '"paris"', False),
        ('"\\u00e9"', '"é"', True),
        ("9007199254740993", "9007199254740992.0", False),
    ],
)
def test_values_are_equal_as_json(predicted, wanted, equal):
    texts = [
        f'<tool_call>{{"name": "f", "params": {{"v": {v}}}}}</tool_call>'
        for v in (predicted, wanted)
    ]
    assert outcome(*texts).param == (1.0 if equal else 0.5)
    assert outcome(*texts[::-1]).param == (1.0 if equal else 0.5)


@pytest.mark.parametrize(
    "response, kind, format",
    [
        (CALL, "tool_call", 1),
        (f" \n{CALL}\n\n", "tool_call", 1),
        (CALL.replace("\n", ""), "tool_call", 1),
        (f"I will look. {CALL}", "tool_call", 0),
        (f"{CALL} Done.", "tool_call", 0),
        (CALL + CALL, "tool_call", 0),
        (f"{CALL}\n<answer>x</answer>", "tool_call", 0),
        (CALL.replace("Paris", "<answer>"), "tool_call", 1),
        (CALL.replace("</tool_call>", ""), "malformed", 0),
        (CALL.replace("<tool_call>", ""), "malformed", 0),
        ("<tool_call></tool_call>", "malformed", 1),
        (CALL.replace("tool_call", "TOOL_CALL"), "malformed", 0),
        (ANSWER, "answer", 0),
        ("plain text", "malformed", 0),
        ("", "malformed", 0),
    ],
)
def test_kind_and_format(response, kind, format):
    assert parse(response).kind == kind
    assert outcome(response, CALL).format == format


def test_correctness_is_independent_of_format():
    got = outcome(f"Let me see. {CALL} {CALL.replace('Paris', 'Rome')}", CALL)
    assert (got.format, got.correct, got.total) == (0.0, 3.0, 3.0)  # the first block counts
    assert outcome(f"{CALL.replace('Paris', 'Rome')} {CALL}", CALL).correct == pytest.approx(2.5)


@pytest.mark.parametrize(
    "block",
    [
        "",
        "[]",
        "{}",
        "null",
        '"f"',
        "[[]]",
        "{'name': 'f', 'params': {}}",
        '{"name": "f"}',
        '{"params": {}}',
        '{"name": "f", "params": null}',
        '{"name": "f", "params": []}',
        '{"name": "f", "params": "{}"}',
        '{"name": 1, "params": {}}',
        '{"name": null, "params": {}}',
        '{"name": "f", "arguments": {}}',
        '{"name": "f", "params": {}',
        '{"name": "f", "params": {}},',
        '{"name": "f", "params": {}} {"name": "f", "params": {}}',
        '[{"name": "f", "params": {}}, {"name": "f"}]',
        '[{"name": "f", "params": {}}, 1]',
        '{"name": "f", "params": {"a": NaN}}',
        '{"name": "f", "params": {"a": -Infinity}}',
        '{"name": "f", "params": {"a": %s}}' % ("9" * 5000),
        '```json\n{"name": "f", "params": {}}\n```',
    ],
)
def test_syntax_is_all_or_nothing(block):
    response = f"<tool_call>{block}</tool_call>"
    assert parse(response) == rewards.Parsed("malformed", None)
    got = outcome(response, tagged(call("f")))
    assert (got.syntax, got.name, got.param, got.correct, got.total) == (0, 0, 0, -3, -2)
    assert error_type(response, tagged(call("f"))) == "Code Syntax"


def test_parse_returns_the_calls():
    calls = [call("f", a=[1, {"b": None}]), call("g h/i.j")]
    assert parse(tagged(calls)) == rewards.Parsed("tool_call", calls)
    assert parse(tagged(calls[0])).calls == calls[:1]
    assert parse(ANSWER) == rewards.Parsed("answer", None)
    extra = {"id": 7, **call("f", a=1)}
    assert outcome(tagged(extra), tagged(call("f", a=1))).total == 4.0


@pytest.mark.parametrize(
    "response, total",
    [
        (ANSWER, 4),
        ("<answer></answer>", -2),
        ("<answer>\n \t</answer>", -2),
        ("well <answer></answer>", -3),
        ("<answer>.</answer>", 4),
        ("\n<answer>other words</answer>\n", 4),
        ("<answer>a <b> </answer", -3),
        (f"Sure. {ANSWER}", 3),
        (f"{ANSWER} bye", 3),
        ("<answer>a</answer><answer>b</answer>", 3),
        (f"{CALL}{ANSWER}", -3),
        (f"{ANSWER}{CALL}", -3),
        (f"{ANSWER}</tool_call>", -3),
        (f"<tool_call>{ANSWER}", -3),
        ("<tool_call><answer>x</answer></tool_call>", -3),
        (CALL.replace("Paris", "<answer>x</answer>"), -3),
        (f"<answer>{CALL}</answer>", -2),
        ("<answer>use <tool_call> here</answer>", -2),
        ("<answer>use </tool_call> here</answer>", -2),
        (f"<answer>a</answer>{CALL}<answer>b</answer>", -3),  # up to the *last* closing tag
        (f"well {ANSWER}{CALL}</answer>", -3),
        (CALL, -3),
        ("Which city?", -3),
        ("<answer>Which city?", -3),
        ("Which city?</answer>", -3),
        ("</answer>Which city?<answer>", -3),
        ("", -3),
    ],
)
def test_answer_targets(response, total):
    got = outcome(response, ANSWER)
    right = total >= 3
    assert got.total == total
    assert got.syntax == got.name == got.param == float(right)
    assert got.correct == (3 if right else -3)
    assert binary(response, ANSWER) == float(total == 4)


BLOCK = '<tool_call>{"name": "f", "params": %s}</tool_call>'


@pytest.mark.parametrize(
    "response, correct",
    [
        (f"{CALL}{ANSWER}", -3),
        (f"{ANSWER}{CALL}", -3),
        (f"{CALL}<answer>", -3),
        (f"{CALL}</answer>", -3),
        (f"<answer>{CALL}", -3),
        (f"</answer>{CALL}", -3),
        (f"<answer>{CALL}</answer>", -3),
        (f"<answer></answer>{CALL}", -3),
        (f"{CALL}{CALL.replace('Paris', '<answer>')}", -3),  # outside the *first* block
        (f"{CALL} <ANSWER> answer>", 3),  # no tag
        (f"<ans{CALL}wer>", 3),  # nor one made of two sides
    ],
)
def test_tags_of_both_kinds_are_no_decision(response, correct):
    got = outcome(response, CALL)
    assert (got.correct, got.total) == (correct, got.format + correct)
    assert got.syntax == got.name == got.param == float(correct == 3)
    assert binary(response, CALL) == 0.0 and binary(response, ANSWER) == 0.0
    assert (error_type(response, CALL) == "Other") == (correct == -3)
    assert outcome(response, ANSWER).correct == -3
    assert parse(response) == parse(CALL) == rewards.Parsed("tool_call", parse(CALL).calls)


def test_format_keeps_its_point_beside_a_wrong_decision():
    assert outcome(f"<answer>{CALL}</answer>", ANSWER).total == -2
    inside = CALL.replace("</tool_call>", "<answer>\n</tool_call>")  # in the block, no JSON
    assert (outcome(inside, CALL).total, error_type(inside, CALL)) == (-2, "Code Syntax")


@pytest.mark.parametrize(
    "value", ["<answer>", "</answer>", "<answer>x</answer>", "<answer></answer>"]
)
def test_an_answer_tag_inside_a_value_is_data(value):
    text = tagged(call("f", a=value))
    assert outcome(text, text).total == 4.0 and binary(text, text) == 1.0
    assert error_type(text, text) is None
    assert outcome(text, tagged(call("f", a="x"))).param == pytest.approx(0.5)
    assert error_type(text, ANSWER) == "Tools Count"


def test_an_empty_answer_and_a_call_beside_an_answer_are_wrong():
    responses = [ANSWER, "<answer></answer>", CALL, CALL + ANSWER, CALL + ANSWER]
    pairs = list(zip(responses, [ANSWER, ANSWER, CALL, CALL, ANSWER]))
    assert [outcome(*pair).total for pair in pairs] == [4, -2, 4, -3, -3]
    assert [binary(*pair) for pair in pairs] == [1, 0, 1, 0, 0]
    assert error_type("<answer> </answer>", ANSWER) == "Other"
    assert error_type("<answer> </answer>", CALL) == "Tools Count"


@pytest.mark.parametrize(
    "block, parses",
    [
        ('{"name": "f", "params": {"a": 2, "a": 1}}', False),
        ('{"name": "f", "params": {"a": 1, "a": 1}}', False),
        ('{"name": "f", "params": {"a": 1, "\\u0061": 1}}', False),  # one key, two spellings
        ('{"name": "g", "name": "f", "params": {"a": 1}}', False),
        ('{"name": "f", "params": {}, "params": {"a": 1}}', False),
        ('{"name": "f", "params": {"a": 1}, "id": 1, "id": 1}', False),
        ('{"name": "f", "params": {"a": 1}, "x": [{"y": {"b": 1, "b": 2}}]}', False),
        ('[{"name": "f", "params": {"a": 1}}, {"name": "f", "params": {"b": 1, "b": 1}}]', False),
        ('{"name": "f", "params": {"a": {"k": 1, "k": 1}}}', False),
        ('{"name": "f", "params": {"a": 1, "A": 1}}', True),
        ('{"name": "f", "params": {"a": 1, "a ": 1, "": 1}}', True),
        ('{"name": "f", "params": {"name": 1, "params": {"name": 1}}}', True),
        ('[{"name": "f", "params": {"a": 1}}, {"name": "f", "params": {"a": 1}}]', True),
    ],
)
def test_a_key_written_twice_does_not_parse(block, parses):
    response = f"<tool_call>{block}</tool_call>"
    assert parse(response).kind == ("tool_call" if parses else "malformed")
    got = outcome(response, BLOCK % '{"a": 1}')
    assert got.syntax == float(parses) and (parses or got.total == -2)
    assert (error_type(response, CALL) == "Code Syntax") == (not parses)
    assert ("repeated key" in rewards.forms(response)) == (not parses)


@pytest.mark.parametrize(
    "number, parses",
    [
        ("1e999", False),
        ("-1e999", False),
        ("1E+400", False),
        ("1" + "0" * 309 + ".0", False),
        ("NaN", False),
        ("Infinity", False),
        ("-Infinity", False),
        ("1.7976931348623157e308", True),
        ("-1e308", True),
        ("1e-999", True),  # zero
        ("1" + "0" * 400, True),  # an integer of Python's
        ('"1e999"', True),
    ],
)
def test_numbers_that_overflow_do_not_parse(number, parses):
    for value in (number, f"[{number}]", f'{{"k": [{number}]}}'):
        response = BLOCK % f'{{"a": {value}}}'
        assert parse(response).kind == ("tool_call" if parses else "malformed")
        assert outcome(response, CALL).syntax == float(parses)
        if parses:
            assert outcome(response, response).total == 4.0
        else:
            with pytest.raises(ValueError, match="target"):
                outcome(response, response)


@pytest.mark.parametrize(
    "text",
    ["[f(a=1e999)]", "[f(a=-1e999)]", "[f(a=[1, {'k': 1e999}])]", "[f(a=1e999j)]", "[f(a=-Infinity)]",
     "[f(a={'k': 1, 'k': 1})]", "[f(a=[{1: 2, 1.0: 2}])]", '[f(a={"k": true, "k": true})]'],
)  # fmt: skip
def test_the_same_in_python_calls(text):
    assert rewards.parse_python(text) == rewards.Parsed("malformed", None)
    assert error_type(text, "[f(a=1)]") == "Code Syntax"
    with pytest.raises(ValueError, match="target"):
        error_type("[f(a=1)]", text)


def test_python_calls_with_distinct_keys_and_finite_numbers_parse():
    text = "[f(a={'k': 1, 'K': 1e308, (1, 2): {'k': 2}}, b=[{'k': 1}, {'k': 1}])]"
    assert rewards.parse_python(text).kind == "tool_call"
    inside = '[f(a="<answer></answer><tool_call></tool_call>")]'
    assert error_type(inside, inside) is None  # tags inside a value


FENCED = '```json\n{"name": "f", "params": {"a": 1}}\n```'


@pytest.mark.parametrize(
    "response, kind, empty, repeated",
    [
        (CALL, "call", False, False),
        (f"Well. {CALL} Done.", "call", False, False),
        (CALL + CALL, "call", False, False),
        ("<tool_call>{}</tool_call>", "call", False, False),  # wrapped, though it does not parse
        (CALL.replace("Paris", "<answer></answer>"), "call", False, False),
        (BLOCK % '{"a": 1, "a": 2}', "call", False, True),
        (BLOCK % '{"a": 1, "a": 2', "call", False, False),  # no JSON either way
        (f"<tool_call>{FENCED}</tool_call>", "call", False, False),
        (ANSWER, "answer", False, False),
        (f"Sure. {ANSWER}", "answer", False, False),
        ("<answer></answer>", "answer", True, False),
        ("<answer>\n\n</answer>", "answer", True, False),
        ("<answer>```python\nprint(1)\n```</answer>", "answer", False, False),
        ('<answer>{"name": "Ann", "age": 3}</answer>', "answer", False, False),
        (CALL + ANSWER, "both", False, False),
        (ANSWER + CALL, "both", False, False),
        (f"<answer>{CALL}</answer>", "both", False, False),
        (f"<answer></answer>{CALL}", "both", True, False),
        ((BLOCK % '{"a": 1, "a": 2}') + ANSWER, "both", False, True),
        ("<answer>x</answer></tool_call>", "both", False, False),
        (FENCED, "untagged call", False, False),
        (f"I will look.\n{FENCED}\nDone.", "untagged call", False, False),
        (FENCED.removesuffix("```"), "untagged call", False, False),  # cut off
        (f"```\nx\n```\n{FENCED}", "untagged call", False, False),
        (FENCED.replace("params", "arguments"), "untagged call", False, False),
        ('<answer>{"name": "f", "params": {}}</answer>', "untagged call", False, False),
        (
            '<answer>I call [{ "name":"f","params":{"a": 1}}].</answer>',
            "untagged call",
            False,
            False,
        ),
        (f"<answer>{FENCED}</answer>", "untagged call", False, False),
        ('{"name": "f", "params": {"a": 1}}', "neither", False, False),
        (f"```\nx\n```\n{FENCED[8:-4]}", "neither", False, False),  # after the fence
        (CALL.replace("</tool_call>", ""), "neither", False, False),
        ("<answer>cut off", "neither", False, False),
        ("plain text", "neither", False, False),
        ("", "neither", False, False),
    ],
)
def test_forms_by_hand(response, kind, empty, repeated):
    assert kind in rewards.KINDS
    more = {"empty answer": empty, "repeated key": repeated}
    assert rewards.forms(response) == {kind, *(name for name, has in more.items() if has)}


ONE = '{"name": "f", "params": {"a": 1, "b": "x"}}'


@pytest.mark.parametrize(
    "response, total",
    [
        # ways to write the same call
        (f"<tool_call>[{ONE}]</tool_call>", 4),
        (f"<tool_call>{ONE.replace('1', '1.0')}</tool_call>", 4),
        (f"<tool_call>{ONE[:-1]}, \"thought\": [1]}}</tool_call>", 4),  # a key beside name, params
        # text around the first block costs the format's point alone
        (f"<think>f?</think><tool_call>{ONE}</tool_call>", 3),
        (f"<tool_call>{ONE}</tool_call><tool_call>{ONE}</tool_call>", 3),
        (f"<tool_call>{ONE}</tool_call><tool_call>no JSON", 3),
        (f"<tool_call>{ONE}</tool_call>\0", 3),
        # values that only look equal: half of the values, so r_param = (1 + 1/2) / 2
        (f"<tool_call>{ONE.replace('1', 'true')}</tool_call>", 3.5),
        (f"<tool_call>{ONE.replace('1', chr(34) + '1' + chr(34))}</tool_call>", 3.5),
        (f"<tool_call>{ONE.replace('x', 'X')}</tool_call>", 3.5),
        (f"<tool_call>{ONE.replace('x', 'x ')}</tool_call>", 3.5),
        (f"<tool_call>{ONE.replace('x', chr(0x445))}</tool_call>", 3.5),  # Cyrillic
        # more calls or parameters than are due do not pay: 1/2; 1/10; (2/3 + 2/3) / 2
        (f"<tool_call>[{ONE}, {ONE}]</tool_call>", 3),
        (f"<tool_call>[{', '.join([ONE] * 10)}]</tool_call>", 1 + 6 * (2 + 1 / 10) / 3 - 3),
        (f"<tool_call>{ONE.replace('}}', ', `c`: 0}}').replace('`', chr(34))}</tool_call>", 1 + 6 * (2 + 2 / 3) / 3 - 3),
        # what is no JSON call
        (f"<tool_call><tool_call>{ONE}</tool_call></tool_call>", -3),
        (f"<tool_call>{ONE} ok</tool_call>", -2),
        (f"<tool_call>{ONE}{ONE}</tool_call>", -2),
        (f"<tool_call>[[{ONE}]]</tool_call>", -2),
        (f"<tool_call>{ONE} // f</tool_call>", -2),
        (f"<tool_call>\ufeff{ONE}</tool_call>", -2),
        ('<tool_call>{"name": "f", "params": [["a", 1], ["b", "x"]]}</tool_call>', -2),
        (ONE, -3),
        # tags are these characters and no others
        (f"<TOOL_CALL>{ONE}</TOOL_CALL>", -3),
        (f"<tool_call >{ONE}</tool_call >", -3),
        (f"\uff1ctool_call\uff1e{ONE}\uff1c/tool_call\uff1e", -3),
        (f"<tool\u200b_call>{ONE}</tool\u200b_call>", -3),
    ],
)  # fmt: skip
def test_near_misses_by_hand(response, total):
    got = outcome(response, f"<tool_call>\n{ONE}\n</tool_call>")
    assert got.total == pytest.approx(total)


def test_wrong_kind_of_answer():
    assert outcome(ANSWER, CALL).total == -3
    assert outcome("<answer>x</answer>", CALL).format == 0


def test_scores_by_hand():
    wrong_name = CALL.replace("get_weather", "weather")
    assert outcome(wrong_name, CALL).correct == pytest.approx(-1)
    one_value = CALL.replace("Paris", "Rome")  # s_key 1, s_value 1/2
    assert outcome(one_value, CALL).total == pytest.approx(3.5)
    two_calls = tagged([call("get_weather", city="Paris", days=3), call("ping")])
    assert outcome(two_calls, CALL).total == pytest.approx(1 + 6 * (1 + 0.5 + 0.5) / 3 - 3)
    assert binary(CALL, CALL) == 1.0
    assert binary(f"x{CALL}", CALL) == binary(one_value, CALL) == binary(wrong_name, CALL) == 0.0


def test_weights_move_only_correct():
    rng = random.Random(1)
    for _ in range(100):
        P, G = random_calls(rng), random_calls(rng)
        raw = [rng.random() for _ in range(3)]
        weights = tuple(w / sum(raw) for w in raw)
        got, plain = outcome(tagged(P), tagged(G), weights=weights), outcome(tagged(P), tagged(G))
        parts = (got.syntax, got.name, got.param)
        assert parts == (plain.syntax, plain.name, plain.param)
        expected = 6 * sum(Fraction(w) * Fraction(r) for w, r in zip(weights, parts)) - 3
        assert got.correct == pytest.approx(float(expected), abs=1e-9)
        perfect = outcome(tagged(G), tagged(G), weights=weights)
        assert (perfect.correct, perfect.total) == (3.0, 4.0)  # exactly
        assert outcome(ANSWER, ANSWER, weights=weights).total == 4.0
        assert outcome("x", ANSWER, weights=weights).total == -3.0


def test_each_weight_belongs_to_its_part():
    P, G = [call("f", a=1), call("h")], [call("f", a=1, b=2), call("g")]
    assert outcome(tagged(P), tagged(G), weights=(1, 0, 0)).correct == 3
    assert outcome(tagged(P), tagged(G), weights=(0, 1, 0)).correct == pytest.approx(6 / 3 - 3)
    assert outcome(tagged(P), tagged(G), weights=(0, 0, 1)).correct == pytest.approx(6 / 4 - 3)


@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (0.5, 0.5), (1.5, -0.5, 0), (float("nan"), 0, 1), (0.25,) * 4]
)
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        outcome(CALL, CALL, weights=weights)


def test_order_of_calls_and_keys_does_not_matter():
    calls = [call("f", a=1, b=[1]), call("g", c="x"), call("h")]
    for order in itertools.permutations(calls):
        flipped = [
            {"params": dict(reversed(c["params"].items())), "name": c["name"]} for c in order
        ]
        assert outcome(tagged(flipped), tagged(calls)).total == 4.0
        assert error_type(as_python(order), as_python(calls)) is None


# --- targets ---


@pytest.mark.parametrize(
    "target",
    [
        "",
        "plain text",
        '{"name": "f", "params": {}}',
        "<tool_call>\n[]\n</tool_call>",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "params": {"a": NaN}}</tool_call>',
        CALL + CALL,
        f"I will look. {CALL}",
        CALL.replace("</tool_call>", ""),
        "<answer>unfinished",
        "<answer>a</answer><answer>b</answer>",
        f"<answer>{CALL}</answer>",
        "<answer>use </tool_call></answer>",
        "<answer> \n</answer>",
        BLOCK % '{"a": 1, "a": 1}',
        BLOCK % '{"a": {"k": [{"b": 1, "b": 1}]}}',
        BLOCK % '{"a": 1e999}',
    ],
)
def test_malformed_target_is_an_error(target):
    with pytest.raises(ValueError, match="target"):
        outcome(CALL, target)
    with pytest.raises(ValueError, match="target"):
        binary(CALL, target)


@pytest.mark.parametrize(
    "target",
    ["[f(a=1]", "[f]", "<tool_call>[]</tool_call>", "<answer>unfinished", "</tool_call>",
     "<answer></answer>", BLOCK % '{"a": 1, "a": 1}', BLOCK % '{"a": 1e999}', CALL + ANSWER],
)  # fmt: skip
def test_malformed_target_of_error_type(target):
    with pytest.raises(ValueError, match="target"):
        error_type(CALL, target)


# --- error classes ---


@pytest.mark.parametrize("case", ORACLE["error_types"], ids=lambda case: case["pred"])
def test_oracle_error_type(case):
    assert error_type(case["pred"], case["gt"]) == case["error"]


@pytest.mark.parametrize("write", [tagged, as_python])
def test_random_errors_equal_brute_force(write):
    rng = random.Random(2)
    seen = set()
    for _ in range(400):
        G = random_calls(rng, most=3)
        P = [call(c["name"], **c["params"]) for c in rng.sample(G, len(G))]
        for _ in range(rng.randint(0, 2)):  # near misses
            c = rng.choice(P)
            c["params"] = rng.choice([random_calls(rng, 1)[0]["params"], dict(c["params"])])
            c["params"].update(rng.choice([{}, {rng.choice("abc"): rng.choice(VALUES)}]))
            c["name"] = rng.choice([c["name"]] * 5 + ["g"])
        P = P + random_calls(rng, 1) if rng.random() < 0.05 else P
        expected = slow_error(P, G)
        assert error_type(write(P), tagged(G)) == expected, (P, G)
        assert error_type(write(P), as_python(G)) == expected, (P, G)
        seen.add(expected)
    assert seen == {*SEVERITY, "Tools Count"}


def test_pairs_are_made_with_the_least_severe_mismatch():
    """In the given order both pairs would break; crosswise only a value does."""
    wanted = "[f(a=1, b=2), f(c=1)]"
    assert error_type("[f(c=2), f(b=2, a=1)]", wanted) == "Parameter Value"
    assert error_type("[f(d=1), f(b=2, a=1)]", wanted) == "Parameter Name"
    assert error_type("[f(), f(b=2, a=1)]", wanted) == "Parameter Count"
    assert error_type("[f(c=1), g(b=2, a=1)]", wanted) == "Tool Name"
    assert error_type("[f(c=1), f(c=1)]", "[f(c=1), g(c=1)]") == "Tool Name"  # multisets


@pytest.mark.parametrize(
    "response, wanted, error",
    [
        ('[f(a="New York, NY")]', "[f(a='new_york ny')]", None),
        ("[f(a=1)]", "[f(a=1.0)]", None),
        ("[f(a=(1, 2))]", "[f(a=[1, 2])]", None),
        ("[f(a=true, b=null)]", "[f(a=True, b=None)]", None),
        ("[f(a=today)]", '[f(a="today")]', None),
        ('[f(a={"k": ["A b"]})]', "[f(a={'k': ['ab']})]", None),
        ("[f(a=1)]", "[f(a=True)]", "Parameter Value"),
        ("[f(a=1)]", "[f(a='1')]", "Parameter Value"),
        ("[f(a=b'x')]", "[f(a='x')]", "Parameter Value"),
        ("[f(a={'k': 1})]", "[f(a={'K': 1})]", "Parameter Value"),
        ("[F(a=1)]", "[f(a=1)]", "Tool Name"),
        ("[f(A=1)]", "[f(a=1)]", "Parameter Name"),
        ("[f(7, a=1)]", "[f(a=1)]", None),  # positional arguments are ignored
        ("[f(a=1)]", tagged(call("f", a=1)), None),
        (tagged(call("f", a=1)), "[f(a=1)]", None),
        (f"Well. {tagged(call('f', a=1))}", "[f(a=1)]", None),
        ("I cannot do that.", "[f(a=1)]", "Tools Count"),
        ("", "[f(a=1)]", "Tools Count"),
        ("[f(a=1)]", "Which city?", "Tools Count"),
        ("Here you are.", "Which city?", None),
        (ANSWER, "Which city?", None),
        (ANSWER, ANSWER, None),
        (f"Sure. {ANSWER}", ANSWER, None),  # format is not an error class
        ("Which city?", ANSWER, "Other"),
        ("<answer>cut off", ANSWER, "Other"),
        ("<answer>use <tool_call></answer>", ANSWER, "Other"),
        (CALL, ANSWER, "Tools Count"),
        (ANSWER, CALL, "Tools Count"),
        (f"<answer>{CALL}</answer>", ANSWER, "Other"),  # tags of both kinds
        (f"{CALL[:30]}{ANSWER}", CALL, "Other"),
        ("<answer>x</answer><tool_call>{}</tool_call>", CALL, "Other"),
        (f"{CALL}{ANSWER}", "[f(a=1)]", "Other"),
        (f"{CALL}{ANSWER}", "Which city?", "Other"),
        (CALL[:30], CALL, "Code Syntax"),
        (CALL.replace("<tool_call>", ""), CALL, "Code Syntax"),
        ("<tool_call>{}</tool_call>", ANSWER, "Code Syntax"),
        ('[f(a="<answer></answer>")]', '[f(a="<answer></answer>")]', None),
    ],
)
def test_error_type_by_hand(response, wanted, error):
    assert error_type(response, wanted) == error


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[",
        "[f]",
        "[f()",
        "[f(]",
        "[f()]]",
        "[f(),]",
        "[f() g()]",
        "[f()](x)",
        "[(a=1)]",
        '["f"(a=1)]',
        "[f(a)(b)]",
        "[f(a=)]",
        "[f(=1)]",
        "[f(a=1,)]",
        "[f(a=1, a=2)]",
        "[f(a==1)]",
        "[f(a=b=1)]",
        "[f('a'=1)]",
        "[f(a=b c)]",
        "[f(b c)]",
        "[f(a=os.sep)]",
        "[f(a=g(1))]",
        "[f(a=[1, 2)]",
        "[f(a='x)]",
        "[f(a='x\\')]",
        "[f(a={'k': true})]",
        "[f(a={[]: 1})]",
        "[f(a=f'{x}')]",
        "[f(a=" + "9" * 5000 + ")]",
        "[f(a=" + "(" * 400 + ")" * 400 + ")]",
    ],
)
def test_python_calls_that_do_not_parse(text):
    assert error_type(text, "[f(a=1)]") == "Code Syntax"


def test_python_calls_with_odd_names_and_values():
    text = r"""[ A b.c/d ( x = "a, (b) = ]", y='it\'s', z = {"k": [1, (2, -3.5)]}), Other() ]"""
    z = {"k": [1, [2, -3.5]]}
    assert (
        error_type(text, tagged([call("A b.c/d", x="a, (b) = ]", y="it's", z=z), call("Other")]))
        is None
    )
    assert (
        error_type(text, tagged([call("A b.c/d", x="a, (b) = ]", y="its", z=z), call("Other")]))
        == "Parameter Value"
    )


def test_every_text_agrees_with_itself():
    rng = random.Random(3)
    for _ in range(100):
        calls = random_calls(rng)
        for text in tagged(calls), as_python(calls):
            assert error_type(text, text) is None
        assert binary(tagged(calls), tagged(calls)) == 1.0


# --- hostile text ---

TARGETS = [CALL, ANSWER, tagged([call("f", a=1, b="x"), call("f", a=2), call("g")])]


def check(response: str, targets=TARGETS) -> None:
    parsed = parse(response)
    assert parsed.kind in ("tool_call", "answer", "malformed")
    assert (parsed.calls is not None) == (parsed.kind == "tool_call")
    assert len(rewards.forms(response) & {*rewards.KINDS}) == 1
    for target in targets:
        got = outcome(response, target)
        assert -3 <= got.total <= 4 and -3 <= got.correct <= 3
        assert got.total == got.format + got.correct
        assert binary(response, target) == (got.total == 4)
        error = error_type(response, target)
        assert error in CLASSES
        assert error is None or got.total < 4  # error_type is the looser one


@pytest.mark.filterwarnings("ignore:invalid escape")  # ast, of a model's strings
def test_fuzz():
    """Edited texts: pieces cut, doubled, moved and replaced by what parsers trip over."""
    rng = random.Random(4)
    calls = '[f(a=1, b="x, y"), Get It(c=[1, (2, 3)], d={"k": None})]'
    near = ['[get_weather(city="Rome", days=3)]', "[get_weather(city='Paris', days=3, x=1)]"]
    seeds = [*TARGETS, calls, *near, "[f(a='\\'')]"]
    pieces = [*"[](){}\"'\\,=: \n\0-é\ud800\U0001f600", "\\ud800", "9" * 4400, "f(", "0x", "None"]
    pieces += ["<tool_call>", "</tool_call>", "<answer>", "</answer>", "NaN", "1e999", "true"]
    kinds, errors = set(), set()
    for _ in range(2000):
        text = rng.choice(seeds)
        for _ in range(rng.randint(1, 4)):
            i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
            j = min(j, i + rng.choice([0, 1, 5, 100]))
            new = rng.choice([rng.choice(pieces), text[i:j] * 2, "", rng.choice(seeds)[i:j]])
            text = text[:i] + new + text[j:]
        check(text)
        kinds.add(parse(text).kind)
        errors |= {error_type(text, target) for target in TARGETS}
    assert kinds == {"tool_call", "answer", "malformed"}  # the edits reach every verdict
    assert errors == CLASSES


UNITS = [*"[{](\"\\' -9\0", '{"a":', "[{", '\\"', "f(", "f(),", "a=1,", "1+", "[],", "not "]
UNITS += ["```", '{"name": "', '```{ "name":"f", "params":', "{ "]
UNITS += ["<tool_call>", "</tool_call>", "<answer>", "</answer>", "<tool_call></tool_call>"]


@pytest.mark.parametrize("unit", UNITS)
def test_ladder_of_repeats(unit):
    """No text that repeats one unit raises, alone or where a value belongs."""
    for size in (10, 900, 1100, 4400, 20_000, 1_000_000):
        text = unit * (size // len(unit))
        for frame in "{}", "<tool_call>{}</tool_call>", '[f(a="x", b={})]', "[{}]":
            check(frame.format(text), TARGETS[:1])


@pytest.mark.parametrize("unit", ["[", "{", "[]", '{"a":', "<tool_call>", "<answer>", "f(", '\\"'])
def test_ten_million_characters(unit):
    text = unit * (10**7 // len(unit))
    for response in text, f"<tool_call>{text}</tool_call>", f"[{text}]":
        check(response, TARGETS[:1])


def test_deep_values():
    frame = '<tool_call>{{"name": "f", "params": {{"a": {}}}}}</tool_call>'
    for depth in (1, 10, 100, 500, 800):
        for opening, closing in ("[", "]"), ('{"k":', "}"):
            right, wrong = (frame.format(opening * depth + v + closing * depth) for v in "12")
            assert outcome(right, right).total == 4.0
            assert outcome(wrong, right).total == pytest.approx(3.0)
            assert error_type(wrong, right) == "Parameter Value"
    for depth in (2_000, 20_000):
        assert outcome(frame.format("[" * depth + "]" * depth), CALL).correct == -3


@pytest.mark.parametrize(
    "text",
    [
        tagged(call("f", a="x" * 40_000)),
        tagged(call("f", a=0)).replace("0", "9" * 4300),
        tagged(call("f", a=[1] * 15_000)),
        tagged([call("f", a=0)] * 1000),
        tagged([call("f", a=0)] * 100_000),
        "[f(a={" + ",".join(f"{i * (2**61 - 1)}: 1" for i in range(1000)) + "})]",  # equal hashes
        "[f(" + ", ".join(f"a{i}=1" for i in range(1000)) + ")]",
        "[f(a=[" + "1," * 5_000 + "])]",
        "[f(a=" + "1+" * 5_000 + "1)]",
        "[f(a=" + "a<b<" * 2_000 + "1)]",
    ],
    ids=lambda text: text[:50],
)
def test_large_values(text):
    check(text, TARGETS[2:])


def test_calls_beyond_the_limit_do_not_parse():
    def longest(size):
        return tagged(
            call("f", a="x" * (size - len(tagged(call("f", a=""))) + 2 * len("<tool_call>") + 1))
        )

    assert outcome(longest(rewards.MAX_CHARS), CALL).syntax == 1
    assert outcome(longest(rewards.MAX_CHARS + 1), CALL).syntax == 0
    assert outcome("<answer>" + "x" * 10**6 + "</answer>", ANSWER).total == 4.0


def test_small_stack():
    """Near the recursion limit of the caller values may stop to parse, but nothing raises."""

    def at_depth(n, text):
        return at_depth(n - 1, text) if n else error_type(text, TARGETS[2])

    error_type("x", TARGETS[2])
    for text in "[f(a=" + "1+" * 3000 + "1)]", "[f(a=" + "[" * 100 + "]" * 100 + ")]":
        for depth in range(500, 800, 50):
            assert at_depth(depth, text) in CLASSES


# --- the file itself ---


def test_imports_alone_and_from_the_standard_library(tmp_path):
    (tmp_path / "rewards.py").write_bytes(Path(rewards.__file__).read_bytes())
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import rewards; print(rewards.parse('').kind)"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "malformed"


def test_two_trys_and_no_eval():
    nodes = list(ast.walk(ast.parse(Path(rewards.__file__).read_text())))
    assert sum(isinstance(node, ast.Try) for node in nodes) == 2
    assert not {node.id for node in nodes if isinstance(node, ast.Name)} & {"eval", "exec"}
