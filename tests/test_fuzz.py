"""Hostile input: whatever a model or a file holds, only documented errors, no hang, no value out of range.

About 110,000 cases a run; a case is one call of one function on one text or row. FUZZ_SEED=N repeats a run,
FUZZ_ROUNDS=N makes it N times as long. The files of the product are searched for what could run foreign code.
"""

import ast
import contextlib
import json
import os
import random
import signal

import pytest
from frozen import REPO
from test_converters import good_rows, replace_at_random

import data
import mcts
import rewards
from tasks import toy
from tasks.converters import Drop, parse_calls

SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(10**6)))
ROUNDS = float(os.environ.get("FUZZ_ROUNDS", "1"))
NAMES = ["f", "Get Weather", "a(b", "x, y", "Toggle [beta]", "f"]
DEEP = 10_000
ERRORS = {
    None, "Parameter Value", "Parameter Name", "Parameter Count", "Tools Count", "Tool Name", "Code Syntax", "Other",
}  # fmt: skip

# what stands in responses and in places where parsers look
PIECES = [
    "<tool_call>", "</tool_call>", "<answer>", "</answer>", "<think>", "</think>", "\n", " ", ", ", ": ", "=", '"', "'",
    "\\", "[", "]", "{", "}", "(", ")", "(((((", "]]]]]", "{{{{{", '{"name": "f", "params": {"x": 1}}', "f(x=1)",
    'Get Weather(city="Bonn, Germany", days=3)', '"name"', '"params"', "null", "None", "NaN", "-Infinity", "1e999",
    "9" * 400, "0x_1", "1_000", "True", "true", "\\ud800", "\ud800", "\x00", "\u2028", "é", "٣", "𝒇", ".", "! ", "? ",
    "f'{x}'", "b'x'", "...", "lambda: 0", "__import__('os')", "# ", "-" * 30, "~" * 30, "[0]*9**9", "{*()}", "\t", "\r",
]  # fmt: skip


class Hang(Exception):
    """A case took more than a second of processor time."""


@contextlib.contextmanager
def case(what, inputs):
    """One case: raises with the input in the message where anything undocumented happens."""
    signal.setitimer(signal.ITIMER_VIRTUAL, 1.0)
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"seed {SEED}: {what} of {inputs!r:.2000}: {error!r}") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@pytest.fixture(autouse=True)
def watch():
    """An alarm after a second of a case; seeds are printed."""

    def hang(number, frame):
        raise Hang

    before = signal.signal(signal.SIGVTALRM, hang)
    print(f"FUZZ_SEED={SEED}")
    yield
    signal.signal(signal.SIGVTALRM, before)


def mutant(rng: random.Random, texts: list[str]) -> str:
    """A text a few edits away from a well-formed one, or a heap of pieces."""
    text = rng.choice(texts) if rng.random() < 0.8 else "".join(rng.choices(PIECES, k=12))
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        i, j = sorted(rng.choices(range(len(text) + 1), k=2))
        edit = rng.randrange(6)
        if edit == 0:
            text = text[:i] + rng.choice(PIECES) + text[i:]
        elif edit == 1:
            text = text[:i] + text[min(j, i + 5) :]
        elif edit == 2:
            text = text[:j] + text[i:]  # a piece twice
        elif edit == 3:
            text = text[:i]
        elif edit == 4:
            text = (
                text[:i]
                + chr(rng.choice((rng.randrange(128), rng.randrange(0x11000))))
                + text[i + 1 :]
            )
        else:
            text = rng.choice(texts)[:j] + text[i:]
    return text


def big_texts() -> list[str]:
    """Nested ten thousand deep, or long: what makes parsers recurse, backtrack or grow."""
    call = '<tool_call>\n{"name": "f", "params": {"x": %s}}\n</tool_call>'
    depths = [
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        "[" * DEEP,
        "(" * DEEP,
        "-" * DEEP,
    ]
    bodies = [
        *depths,
        "9" * 50_000,
        '"' + "\\" * 49_999,
        '"' + "a, " * 16_000 + '"',
        "[" + "1," * 20_000 + "1]",
    ]
    texts = [call % body for body in bodies] + [f"[f(x={body})]" for body in bodies] + bodies
    texts += [
        tag * 20_000
        for tag in ("<tool_call>", "<answer>", "</answer>", "<tool_call></tool_call>", ". ", "f(")
    ]
    return [
        *texts,
        '[f(x="' * 5_000,
        "[" + ", ".join(f"f(x{i}={i})" for i in range(5_000)) + "]",
        "a" * 10**6,
    ]


def seeds_of_texts() -> list[str]:
    rows = [*toy.generate("train", 40), *toy.generate("hard-train", 40)]
    python = [
        '[f(x=1), Get Weather(city="a, b", days=[1, {"k": (2, 3)}])]',
        "[]",
        "[f()]",
        '[x, y(k="]")]',
    ]
    return [row["target"] for row in rows] + python + ["It is 5. Is it? Yes!\nGood.", ""]


def check_reading(text: str, targets: list[str]) -> int:
    """rewards and mcts on one text; the number of cases."""
    with case("parse", text):
        parsed = rewards.parse(text)
        assert parsed.kind in ("tool_call", "answer", "malformed")
        assert (parsed.calls is not None) == (parsed.kind == "tool_call")
        json.dumps(parsed.calls, allow_nan=False)
    with case("form", text):
        forms = rewards.forms(text)
        assert forms <= {*rewards.FORMS} and len(forms & {*rewards.KINDS}) == 1
    for target in targets:
        with case("outcome", (text, target)):
            outcome = rewards.outcome(text, target)
            parts = (outcome.format, outcome.syntax, outcome.name, outcome.param)
            assert all(0 <= part <= 1 for part in parts) and -3 <= outcome.correct <= 3
            assert outcome.total == outcome.format + outcome.correct
            assert (rewards.binary(text, target) == 1) == (outcome.total == 4)
            due = "call" if target.startswith("<tool_call>") else "answer"
            assert forms in ({due}, {"untagged call"}) or outcome.correct == -3
        with case("error_type", (text, target)):
            assert rewards.error_type(text, target) in ERRORS
    with case("as a target", text), contextlib.suppress(ValueError):  # documented
        assert rewards.outcome(text, text).total == 4
    with case("split_fragments", text):
        fragments = mcts.split_fragments(text)
        assert "".join(fragments) == text and all(fragments)
    with case("split_tokens", text):
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        groups = mcts.split_tokens(pieces)
        assert [piece for group in groups for piece in group] == pieces
    with case("parse_calls", text), contextlib.suppress(Drop):  # documented
        calls = parse_calls(text, NAMES)
        assert all(call["name"] in NAMES and isinstance(call["params"], dict) for call in calls)
        json.dumps(calls)
    return 6 + 2 * len(targets)


def test_texts_that_models_write():
    rng, texts, cases = random.Random(SEED), seeds_of_texts(), 0
    targets = [row["target"] for row in toy.generate("train", 30)]
    for _ in range(round(9_000 * ROUNDS)):
        cases += check_reading(mutant(rng, texts), rng.sample(targets, 2))
    for text in big_texts():
        cases += check_reading(text, targets[:1])
    print(f"{cases} cases")
    assert cases >= 80_000 * ROUNDS


JUNK = [
    None, 0, -1.5, True, "", "x", [], {}, [[]], {"a": {}}, "\x00", "\ud800", float("nan"), float("inf"), "NaN", "[NaN]",
    "1e999", "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "9" * 5000, 10**400, "</tool_call>", ["x"] * 100, {"name": None},
    {"": ""}, {"name": "f", "parameters": {"type": []}}, {"from": "user", "value": 3},
]  # fmt: skip


def own_row() -> dict:
    return json.loads(json.dumps(toy.generate("train", 1)[0]))


def check_examples(examples: list[data.Example]) -> None:
    """What survives is an example: a target worth the full reward, text that can be written as UTF-8 JSON."""
    for example in examples:
        json.dumps(vars(example), allow_nan=False).encode()
        assert rewards.outcome(example.target, example.target).total == 4
        assert example.kind == rewards.parse(example.target).kind and example.query is not None


def test_rows_of_every_data_set():
    rng, cases = random.Random(SEED), 0
    nested = leaf = []
    for _ in range(900):  # as deep as json reads
        leaf.append([])
        leaf = leaf[0]
    rows = good_rows()
    for name, row in rows.items():
        for _ in range(round(3_500 * ROUNDS)):
            bad = row
            for _ in range(rng.choice((1, 1, 2, 4))):
                junk = rng.choice([*JUNK, nested, mutant(rng, [json.dumps(row)])])
                bad = replace_at_random(rng, bad, junk)
            with case(name, bad):
                examples, drops = data.convert(name, [bad])
                assert examples or drops
                check_examples(examples)
            cases += 1
    for _ in range(round(3_500 * ROUNDS)):
        bad = replace_at_random(rng, own_row(), rng.choice([*JUNK, nested]))
        with case("jsonl", bad), contextlib.suppress(ValueError):  # documented: names the row
            examples, _ = data.convert("jsonl", [bad])
            json.dumps(vars(examples[0]), allow_nan=False).encode()
        cases += 1
    print(f"{cases} cases")
    assert cases >= 27_000 * ROUNDS


def test_files(tmp_path, capsys):
    """Torn, wrongly encoded, foreign and deep files: examples, or one of two errors in one line."""
    rng, cases = random.Random(SEED), 0
    good = {name: [row] * 2 for name, row in good_rows().items()} | {"jsonl": [own_row()] * 2}
    whole = {name: json.dumps(rows).encode() for name, rows in good.items()}
    lines = {name: "\n".join(map(json.dumps, rows)).encode() for name, rows in good.items()}
    odd = [
        b"", b"\n\n", b"\xff\xfe", b"\xef\xbb\xbf[]", b"{}", b"null", b"3", b"[NaN]", b"[1e999]", b'"text"', b"\x00" * 99,
        b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP, b"[[]]", b"[{}]", b"[" + b"9" * 5000 + b"]", b'["\\ud800"]', b"PK\x03\x04",
    ]  # fmt: skip
    for _ in range(round(1_500 * ROUNDS)):
        name = rng.choice(list(good))
        suffix, text = rng.choice(((".json", whole[name]), (".jsonl", lines[name])))
        if rng.random() < 0.2:
            text = rng.choice(odd)
        for _ in range(rng.choice((1, 1, 3))):
            i = rng.randrange(len(text) + 1)
            text = rng.choice(
                (
                    text[:i],
                    text[i:],
                    text[:i] + bytes([rng.randrange(256)]) + text[i + 1 :],
                    text[:i] + text[i - 9 :],
                )
            )
        path = tmp_path / f"file{suffix}"
        path.write_bytes(text)
        source = rng.choice((f"{name}:{path}", str(path)))
        with case(source, text):
            try:
                data.load_source(source)
            except (ValueError, FileNotFoundError) as error:  # documented
                assert "\n" not in str(error) and len(str(error)) < 3000
        cases += 1
        capsys.readouterr()
    print(f"{cases} cases")
    assert cases >= 1_500 * ROUNDS


# --------------------------------------------------------------------------------------- what could run foreign code

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "system", "popen", "Popen", "check_output", "check_call", "getoutput",
    "torch.load", "pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "subprocess", "runpy",
}  # fmt: skip
ALLOWED = {  # with fixed words, or what the user asks for by name
    "scoring.py": {"exec", "compile"},  # --reward_file
    "serving.py": {"subprocess"},  # git rev-parse
}


def product_files() -> list:
    return sorted(
        path for folder in ("", "tasks", "tools") for path in (REPO / folder).glob("*.py")
    )


@pytest.mark.parametrize("path", product_files(), ids=lambda path: path.name)
def test_no_eval_no_shell_no_pickle(path):
    """By the syntax tree: no such call or import; models never come from pickles, nor run code unasked."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            names = [
                function,
                function if function.startswith("model.") else function.rpartition(".")[2],
            ]
            if function in ("re.compile", "torch.compile"):  # neither runs text
                names = ["", ""]
            for keyword in node.keywords:
                text = ast.unparse(keyword.value)
                assert keyword.arg != "shell", f"{path.name}:{node.lineno}"
                if keyword.arg == "trust_remote_code":
                    assert text.endswith("trust_remote_code"), f"{path.name}:{node.lineno}"
                if keyword.arg in ("weights_only", "allow_pickle", "use_safetensors"):
                    assert text == str(keyword.arg != "allow_pickle"), f"{path.name}:{node.lineno}"
            if names[1] in ("load", "torch.load") and function.startswith("torch."):
                names = ["torch.load"]
        elif isinstance(node, ast.Import):
            own = [alias for alias in node.names if alias.name == "eval"]  # our eval.py
            assert all(alias.asname for alias in own), f"{path.name}:{node.lineno}"
            names = [alias.name.partition(".")[0] for alias in node.names if alias not in own]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        forbidden = FORBIDDEN - ALLOWED.get(path.name, set())
        assert not forbidden & set(names), f"{path.name}:{node.lineno}: {names}"
        if isinstance(node, (ast.AnnAssign, ast.arg)) and "trust_remote_code" in ast.unparse(node):
            value = getattr(node, "value", None)
            value = "False" if value is None else ast.unparse(value)
            assert value == "False" or value.startswith("knob(False, "), (
                f"{path.name}:{node.lineno}"
            )
