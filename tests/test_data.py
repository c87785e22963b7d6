"""data.py: steps against a slow fold, the prompt against the figures, splits, selection, files."""

import gzip
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_converters as raw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from data import Example, load, messages, render, target_ids
from tasks.converters import Conversation

ORACLES = json.loads((Path(__file__).parent / "oracles" / "data.json").read_text())
SHARED = Path(__file__).resolve().parents[2] / "shared"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer(template=TEMPLATE, eos="<|end|>", merges=()):
    """A byte-level tokenizer that prepends a special token when asked for special tokens."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges))
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>", "<|bos|>"])
    from tokenizers.processors import TemplateProcessing

    bos = backend.token_to_id("<|bos|>")
    backend.post_processor = TemplateProcessing("<|bos|> $A", None, [("<|bos|>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token="<|bos|>", chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def example(query="q", target="<answer>\na\n</answer>", row="x/0/0", **fields):
    kind = "answer" if target.startswith("<answer>") else "tool_call"
    fields = {"tools": [], "history": [], "steps": [], **fields}
    return Example(id=row, query=query, target=target, kind=kind, **fields)


# ---- steps ----


def slow_context(turns, t):
    """Return (history, query, steps) before turn t, from the definition: one pass per question."""
    said = [i for i in range(t) if turns[i][0] == "user"]
    answered = [
        i for i in range(t) if turns[i][0] == "assistant" and not followed_by_call(turns, i)
    ]
    query = ""
    if said and (not answered or said[-1] > answered[-1]):
        query = turns[said[-1]][1]
        said = said[:-1]
    past = sorted([(i, "user") for i in said] + [(i, "assistant") for i in answered])
    steps = []
    for i in range(t):
        if turns[i][0] in ("call", "think"):
            results = []
            for j in range(i + 1, t):
                if turns[j][0] != "observation":
                    break
                results.append(turns[j][1])
            calls = turns[i][1]
            steps.append((json.dumps(calls if len(calls) > 1 else calls[0]), "\n".join(results)))
    return [(role, turns[i][1]) for i, role in past], query, steps


def followed_by_call(turns, i):
    return i + 1 < len(turns) and turns[i + 1][0] in ("call", "think")


def random_turns(rng):
    turns = []
    for n in range(rng.randint(1, 12)):
        kind = rng.choice(("user", "assistant", "call", "think", "user"))
        if kind in ("call", "think"):
            calls = [{"name": f"f{n}", "params": {"v": n}}] * rng.randint(1, 2)
            turns.append((kind, calls))
            turns += [("observation", f"seen {n} {m}") for m in range(rng.randint(1, 2))]
        else:
            turns.append((kind, f"{kind} says {n}"))
    if rng.random() < 0.3 and turns[-1][0] == "observation":
        turns = turns[: max(i for i, turn in enumerate(turns) if turn[0] in ("call", "think")) + 1]
    return turns


def test_steps_equal_the_slow_fold(monkeypatch):
    rng = random.Random(0)
    seen = Counter()
    for _ in range(300):
        turns = random_turns(rng)
        monkeypatch.setitem(data.CONVERTERS, "fake", lambda row: Conversation([], row))
        examples, drops = data.convert("fake", [turns])
        expected, refused = [], Counter()
        for t, (role, content) in enumerate(turns):
            if role in ("user", "observation"):
                continue
            history, query, steps = slow_context(turns, t)
            if role == "assistant" and followed_by_call(turns, t):
                refused["text: prose beside a call"] += 1
            elif role == "think":
                refused["turn: think call"] += 1
            elif not query:
                refused["turn: no user query"] += 1
            else:
                body = content
                if role == "call":
                    body = json.dumps(content if len(content) > 1 else content[0])
                tag = "tool_call" if role == "call" else "answer"
                target = f"<{tag}>\n{body}\n</{tag}>"
                expected.append(Example(f"fake/0/{t}", [], history, query, steps, target, tag))
        if not expected and not refused:
            refused["row: no assistant turn"] = 1
        assert examples == expected
        assert drops == refused
        seen += drops + Counter(e.kind for e in expected)
    assert min(seen[key] for key in ("answer", "tool_call", "turn: think call")) > 20


def test_earlier_rounds_keep_their_tool_steps_and_numbers():
    turn = '[Get Weather(city="%s")]'
    row = raw.toolace_row(
        ("user", "u1"),
        ("assistant", turn % "A"),
        ("tool", "o1"),
        ("assistant", "a1"),
        ("user", "u2"),
        ("assistant", turn % "B"),
        ("tool", "o2"),
        ("assistant", "a2"),
    )
    examples, drops = data.convert("toolace", [row])
    assert not drops and [e.id for e in examples] == [f"toolace/0/{t}" for t in (1, 3, 5, 7)]
    user = messages(examples[3])[1]["content"]
    call = '{"name": "Get Weather", "params": {"city": "%s"}}'
    assert user == (
        "[Chat Short Memory]\nuser: u1\nassistant: a1\n\n[User Query]\nu2\n\n"
        "[Intermediate Tools Calls and Returns]\n"
        f"Step-1 tool call: {call % 'A'}\nStep-1 observation: o1\n"
        f"Step-2 tool call: {call % 'B'}\nStep-2 observation: o2\n\n[Response]\n"
    )


def test_no_target_is_in_its_own_prompt():
    turns = [("user", "u0")]
    for n in range(6):
        turns += [
            ("call", [{"name": "f", "params": {"secret": f"s{n}"}}]),
            ("observation", f"o{n}"),
        ]
        turns += [("assistant", f"answer number {n}"), ("user", f"u{n + 1}")]
    pairs = data._steps("x/0", Conversation([], turns), 0)
    assert len(pairs) == 12
    for made, _ in pairs:
        text = "".join(message["content"] for message in messages(made))
        assert made.target.split("\n")[1] not in text
        later = turns[int(made.id.split("/")[2]) + 1 :]
        assert not any(str(content) in text for role, content in later if role != "call")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("user", "q"), ("call", [{}]), ("assistant", "a")], "row: call without observation"),
        ([("user", "q"), ("call", [{}]), ("user", "r")], "row: call without observation"),
        ([("user", "q"), ("observation", "o")], "row: observation without call"),
        ([("observation", "o")], "row: observation without call"),
        ([("user", "q")], "row: no assistant turn"),
        ([], "row: no assistant turn"),
        ([("user", ""), ("assistant", "a")], "turn: no user query"),
        ([("assistant", "hello")], "turn: no user query"),
        ([("user", "q"), ("assistant", "")], "turn: empty answer"),
        ([("user", "q"), ("assistant", "say </answer>")], "turn: a tag inside a text"),
        ([("user", "<tool_call>"), ("assistant", "a")], "turn: a tag inside a text"),
        ([("user", "[Response]"), ("assistant", "a")], "turn: a tag inside a text"),
        ([("user", "q"), ("call", [{"a": "</tool_call>"}])], "turn: a tag inside a text"),
    ],
)
def test_what_is_refused_and_counted(monkeypatch, turns, reason):
    monkeypatch.setitem(data.CONVERTERS, "fake", lambda row: Conversation([], row))
    assert data.convert("fake", [turns]) == ([], {reason: 1})


def test_empty_observations_stay_and_trailing_ones_are_no_target():
    row = raw.apigen_row(
        ("human", "q"),
        ("function_call", '{"name": "think", "arguments": {}}'),
        ("observation", ""),
        ("function_call", '{"name": "cancel", "arguments": {"id": "7"}}'),
        ("observation", "done"),
    )
    examples, drops = data.convert("apigen-mt", [row])
    assert len(examples) == 1 and drops == {"turn: think call": 1}
    assert examples[0].steps == [('{"name": "think", "params": {}}', "")]


def test_repetitions_are_kept_once_but_other_tools_are_another_example():
    row = raw.hermes_row(("human", "q"), ("gpt", "a"))
    other = raw.hermes_row(("human", "q"), ("gpt", "a"), tools="[]")
    examples, drops = data.convert("hermes", [row, row, other])
    assert len(examples) == 2 and drops == {"turn: exact repetition": 1}


def test_surface_of_targets():
    calls = [{"name": "f", "arguments": {"x": "é", "n": 1.0, "b": True}}]
    single, parallel = (data.convert("xlam", [raw.xlam_row(calls * n)])[0][0] for n in (1, 2))
    one = '{"name": "f", "params": {"x": "é", "n": 1.0, "b": true}}'
    assert single.target == f"<tool_call>\n{one}\n</tool_call>"
    assert parallel.target == f"<tool_call>\n[{one}, {one}]\n</tool_call>"
    assert single.kind == parallel.kind == "tool_call"


def test_irrelevance_answers_name_the_request_and_depend_on_seed_and_row():
    rows = [raw.xlam_row([], query=f"Find prime number {n}! Then stop.") for n in range(40)]
    answers = [e.target for e in data.convert("hammer", rows)[0]]
    assert answers == [e.target for e in data.convert("hammer", rows)[0]]
    assert answers != [e.target for e in data.convert("hammer", rows, seed=1)[0]]
    assert all(f'"Find prime number {n}"' in text for n, text in enumerate(answers))
    patterns = {text.replace(f"number {n}", "number N") for n, text in enumerate(answers)}
    assert len(patterns) == len(data.NO_TOOL)
    assert all(text.startswith("<answer>\n") for text in answers)


# ---- the prompt ----


def test_figures_are_verbatim():
    paper = SHARED / "papers" / "toolupt.txt"
    if not paper.exists():
        pytest.skip("../shared/papers/toolupt.txt is not there (optional data)")
    text = paper.read_text(encoding="utf-8")
    figure = text.partition("System Prompt for Training\n\n")[2].partition("\n\n```")[0]
    assert figure.strip() == data.SYSTEM_PROMPT
    figure = text.partition("User Prompt for Training\n\n")[2].partition("\n\n```")[0]
    headings = [line for line in figure.splitlines() if line.startswith("[")]
    assert headings == [line for line in data.USER_PROMPT.splitlines() if line.startswith("[")]
    shown = example(
        "__QUERY__",
        history=[
            ("user", "{Round 1 user input}"),
            ("assistant", "{Round 1 model answer}"),
            ("user", "{Round 2 user input}"),
            ("assistant", "{Round 2 model answer}"),
        ],
        steps=[("...", "..."), ("...", "...")],
    )
    lines = [line for line in figure.strip().splitlines() if line != "..."]
    assert messages(shown)[1]["content"].rstrip() == "\n".join(lines)


def test_system_prompt_holds_tools_one_per_line_and_the_policy_before_them():
    row = raw.apigen_row(("human", "q"), ("gpt", "a"), system="# Policy é\n__TOOL_DESCS__?")
    made = data.convert("apigen-mt", [row])[0][0]
    assert "# Policy é\n__TOOL_DESCS__?\n\n## Available" in messages(made)[0]["content"]
    row = raw.apigen_row(("human", "__STEPS__ __TOOL_DESCS__"), ("gpt", "a"), system="# Policy é")
    made = data.convert("apigen-mt", [row])[0][0]
    system, user = (message["content"] for message in messages(made))
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in made.tools)
    assert f"# Policy é\n\n## Available Tools Description\n{tools}\n\n## Overall" in system
    assert len(tools.splitlines()) == 2
    assert "[User Query]\n__STEPS__ __TOOL_DESCS__\n" in user  # user text is never expanded
    plain = example(tools=[{"name": "ü"}])
    assert messages(plain)[0]["content"] == data.SYSTEM_PROMPT.replace(
        "__TOOL_DESCS__", '{"name": "ü"}'
    )


def test_sections_are_there_when_empty():
    assert messages(example("hi"))[1]["content"] == (
        "[Chat Short Memory]\n\n\n[User Query]\nhi\n\n"
        "[Intermediate Tools Calls and Returns]\n\n\n[Response]\n"
    )


def test_render_is_the_chat_as_plain_ids(tokenizer):
    made = example("Grüße", tools=[{"name": "f"}])
    ids = render(made, tokenizer)
    assert type(ids) is list and set(map(type, ids)) == {int}
    system, user = (message["content"] for message in messages(made))
    text = f"<|start|>system\n{system}<|end|>\n<|start|>user\n{user}<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(ids) == text
    specials = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    assert [i for i in ids if i in specials] == [*specials, *specials, specials[0]]


TURN_ENDS = {  # template -> special tokens of its tokenizer, the end of an assistant's turn
    "Llama 3": (
        (
            "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
            "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
        ),
        ["<|head|>", "<|/head|>", "<|eot|>", "<|text|>"],
        "<|eot|>",
    ),
    "Phi-3": (
        (
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
        ),
        ["<|user|>", "<|assistant|>", "<|end|>", "<|text|>"],
        "<|end|>",
    ),
    "GLM": (
        (
            "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        ),
        ["[gMASK]", "<|user|>", "<|assistant|>", "<|text|>"],
        "<|user|>",
    ),
    "Mistral": (
        (
            "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
            "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
        ),
        ["<|text|>"],
        "<|text|>",
    ),
    "Llama 2": (
        (
            "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% else %}"
            "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
        ),
        ["<|text|>"],
        " <|text|>",
    ),
    "Cohere": (
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
            "{% if m.role == 'assistant' %}<|response|>{% endif %}{{ eos_token }}{% endfor %}"
        ),
        ["<|user|>", "<|assistant|>", "<|response|>", "<|text|>"],
        "<|response|><|text|>",
    ),
    "nothing": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}",
        ["<|text|>"],
        "<|text|>",
    ),
}


@pytest.mark.parametrize("family", TURN_ENDS)
def test_targets_end_as_the_template_ends_a_turn(family):
    """Also where the tokenizer's EOS, here <|text|>, is the end of texts and not of turns."""
    template, special, wanted = TURN_ENDS[family]
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.eos_token = "<|text|>"
    made = example()
    ids = target_ids(made, tokenizer)
    assert tokenizer.decode(ids) == made.target + wanted
    assert tokenizer.decode(ids[-1:]) == "<" + wanted.rpartition("<")[2]
    length = len(ids)
    assert data.fit([made], tokenizer, 9999, length)[0] == [made]
    assert data.fit([made], tokenizer, 9999, length - 1)[0] == []


def test_a_turn_that_no_stop_token_ends_is_rejected(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    data.check_turn_end(tokenizer, [end, end + 1])
    remedy = (
        rf'closes a turn with <\|end\|> .* with .*<\|bos\|>.*"eos_token_id": \[{end}, {end + 1}\]'
    )
    with pytest.raises(ValueError, match=remedy):
        data.check_turn_end(tokenizer, [end + 1])


def test_target_ids_end_with_one_eos_and_no_bos(tokenizer):
    made = example(target="<answer>\né\n</answer>")
    ids = target_ids(made, tokenizer)
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.bos_token_id not in ids and len(ids) == len(made.target.encode()) + 1
    assert tokenizer.decode(ids[:-1]) == made.target


@pytest.mark.parametrize("kind", ["bytes", "toy_model"])
def test_target_stands_where_the_template_puts_an_answer(kind, tokenizer):
    """The template's own text of the whole chat, tokenised at once, is prompt, target and EOS, token for token."""
    if kind == "toy_model":
        tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "toy_model")
    for target in (
        "<answer>\né.\n</answer>",
        '<tool_call>\n{"name": "f", "params": {}}\n</tool_call>',
    ):
        made = example("Grüße", target=target, tools=[{"name": "f"}])
        chat = [*messages(made), {"role": "assistant", "content": target}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = render(made, tokenizer) + target_ids(made, tokenizer)
        assert whole[: len(ids)] == ids
        assert tokenizer.decode(whole[len(ids) :]).strip() == ""  # at most the template's line end


def test_tokenizers_that_cannot_be_used():
    bare = byte_tokenizer(template=None)
    for call in (lambda: render(example(), bare), lambda: data.fit([example()], bare, 9, 9)):
        with pytest.raises(ValueError, match="no chat template; use an instruct model"):
            call()
    with pytest.raises(ValueError, match="EOS"):
        target_ids(example(), byte_tokenizer("{{ messages }}", eos=None))


def test_tag_length_with_and_without_merges(tokenizer):
    assert data.tag_length(tokenizer) == len("<answer>")
    newline = "Ċ"  # the byte-level alphabet's letter for \n
    merges = [("a", "n"), (">", newline)]
    merged = byte_tokenizer(merges=merges)
    count = data.tag_length(merged)
    assert count == len("<answer>") - 1  # "an" is one token
    ids = merged("<answer>\nYes.", add_special_tokens=False)["input_ids"]
    assert merged.decode(ids[:count]) == "<answer>\n"


def test_fit_drops_by_tokens_and_never_truncates(tokenizer):
    rng = random.Random(0)
    examples = [
        example(
            "q" * rng.randint(0, 400),
            f"<answer>\n{'a' * rng.randint(0, 99)}\n</answer>",
            system="__TOOL_DESCS__",
        )
        for _ in range(300)
    ]
    prompts = [len(render(e, tokenizer)) for e in examples]
    targets = [len(target_ids(e, tokenizer)) for e in examples]
    limit, most = sorted(prompts)[150], sorted(targets)[200]
    kept, drops = data.fit(examples, tokenizer, limit, most)
    fits = [p <= limit and t <= most for p, t in zip(prompts, targets, strict=True)]
    assert kept == [e for e, good in zip(examples, fits, strict=True) if good]
    assert drops == {
        f"turn: prompt longer than {limit} tokens": sum(p > limit for p in prompts),
        f"turn: target longer than {most} tokens": sum(
            p <= limit and t > most for p, t in zip(prompts, targets, strict=True)
        ),
    }
    assert data.fit([], tokenizer, 1, 1) == ([], Counter())


def test_fit_counts_tokens_and_tokenizes_only_what_might_be_too_long(tokenizer):
    texts = [
        "",
        "a" * 8,
        "a" * 9,
        "a" * 10,
        "a" * 11,
        "é" * 4,
        "é" * 5,
        "漢" * 3,
        "漢" * 4,
        "<answer>",
    ]
    read = []

    class Spy:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, batch, **options):
            read.extend([batch] if isinstance(batch, str) else batch)
            return tokenizer(batch, **options)

    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert counts[:8] == [0, 8, 9, 10, 11, 8, 10, 9]  # bytes
    assert data._fit(texts, 9, Spy()) == [count <= 9 for count in counts]
    assert not {"", "a" * 8, "<answer>"} & {*read} and {"a" * 10, "é" * 5, "漢" * 4} < {*read}
    read.clear()
    long = example("q" * 500, system="__TOOL_DESCS__")
    assert len(render(long, tokenizer)) > 400
    kept, drops = data.fit([example(system="__TOOL_DESCS__"), long], Spy(), 400, 99)
    assert [e.query for e in kept] == ["q"] and len(read) == 2  # and a turn's end
    assert drops == {"turn: prompt longer than 400 tokens": 1}


# ---- splits and selection ----


def conversations(rng, count=120):
    """Rows of one to four examples; every third row opens like an earlier one, but for the writing."""
    examples, openings = [], []
    for row in range(count):
        opening = f"Tell me about topic {row}, please."
        if openings and row % 3 == 0:
            opening = rng.choice(openings).upper().replace(",", " ").replace(".", "!?")
        openings.append(opening)
        history, query = [], opening
        for turn in range(rng.randint(1, 4)):
            examples.append(example(query, row=f"d/{row}/{turn}", history=history))
            history = [*history, ("user", query), ("assistant", "ok")]
            query = "yes, please"
    return examples


def opening_words(made):
    first = made.history[0][1] if made.history else made.query
    return "".join(c if c.isalnum() else " " for c in first.lower()).split()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_split_shares_no_row_and_no_opening(fraction):
    examples = conversations(random.Random(3))
    first, second = data.split(examples, fraction, seed=5)
    assert abs(len(first) - fraction * len(examples)) < 12
    assert [e for e in examples if e in first] == first  # order is kept, nothing lost
    assert sorted(e.id for e in first + second) == sorted(e.id for e in examples)
    assert not {e.id.split("/")[1] for e in first} & {e.id.split("/")[1] for e in second}
    openings = [{tuple(opening_words(e)) for e in part} for part in (first, second)]
    assert not openings[0] & openings[1]
    assert data.split(examples, fraction, seed=5) == (first, second)
    assert data.split(examples, fraction, seed=6)[0] != first


def test_split_joins_rows_by_a_long_later_query():
    long = "now compare the price of the red bicycle with that of the blue one"
    examples = []
    for row in range(40):
        start = [("user", f"start {row}"), ("assistant", "ok")]
        examples.append(example(f"{long} {row // 2}", row=f"d/{row}/3", history=start))
    for seed in range(4):
        first, second = data.split(examples, 0.5, seed)
        assert not {e.query for e in first} & {e.query for e in second}


def test_split_takes_an_id_of_another_form_for_a_row_of_its_own():
    examples = [
        example(f"question {n}", row=id) for n, id in enumerate(("17", "18", "mine/1", "mine/2"))
    ]
    assert [len(part) for part in data.split(examples, 0.5)] == [2, 2]
    one_row = [example(f"question {n}", row=f"mine/1/{n}") for n in range(4)]
    with pytest.raises(ValueError, match="4 examples in 1 groups"):
        data.split(one_row, 0.5)


def test_split_that_is_impossible():
    same = [example("Hi!", row=f"d/{n}/0") for n in range(9)]
    for examples, fraction in ((same, 0.5), ([], 0.5), (conversations(random.Random(0)), 1.0)):
        with pytest.raises(ValueError, match="a part would be empty"):
            data.split(examples, fraction)


def test_split_says_when_groups_are_too_large(capsys):
    examples = [example("Hi", row=f"d/{n}/0") for n in range(60)]
    examples += [example(f"q{n}", row=f"d/{60 + n}/0") for n in range(40)]
    first, _ = data.split(examples, 0.5)
    assert len(first) == 40 and "40 of 50 examples" in capsys.readouterr().err


@pytest.mark.parametrize("case", ORACLES["difficulty"], ids=str)
def test_difficulty_oracle(case):
    assert data.difficulty(case["a"], case["b"], case["c"]) == case["label"]


def test_difficulty_tests_hard_before_easy():
    assert data.difficulty(1, 100, 2) == "medium" and data.difficulty(1, 100, 4) == "hard"
    assert data.difficulty(4, 0, 0) == "hard" and data.difficulty(2, 0, 0) == "medium"
    with pytest.raises(AssertionError):
        data.difficulty(-1, 0, 0)


def test_select_complex_oracle():
    case = ORACLES["buffer"]
    assert data.select_complex(case["ppl"], case["is_call"]) == case["top10pct_stratified"]
    assert data.select_complex(case["ppl"], None) == case["top10pct_global"]


def slow_select(perplexities, is_call, fraction):
    chosen = []
    for kind in (True, False):
        left = [i for i in range(len(is_call)) if is_call[i] == kind]
        wanted = max(1, int(fraction * len(left) + 1e-9)) if left else 0
        for _ in range(wanted):
            best = left[0]
            for i in left:
                if perplexities[i] > perplexities[best]:
                    best = i
            left.remove(best)
            chosen.append(best)
    return sorted(chosen)


def test_select_complex_equals_picking_one_by_one():
    rng = random.Random(0)
    for n in (0, 1, 2, 9, 10, 11, 57, 100):
        for fraction in (0.1, 0.29, 1.0):
            values = [rng.choice([1.0, 1.5, 2.0, 7.5, math.inf]) for _ in range(n)]
            flags = [rng.random() < 0.4 for _ in range(n)]
            got = data.select_complex(values, flags, fraction)
            assert got == slow_select(values, flags, fraction)
    assert len(data.select_complex(range(1, 101), [True] * 100, 0.29)) == 29
    with pytest.raises(AssertionError):
        data.select_complex([1.0, math.nan], [True, True])


# ---- files ----


def test_unknown_names_and_missing_paths(tmp_path):
    with pytest.raises(ValueError, match="hermes, toolace, xlam, .*jsonl, toy"):
        load("glaive", "x.json")
    for name, (repo, file) in data.SOURCES.items():
        with pytest.raises(ValueError, match=f"download {repo} {file}"):
            load(name)
        with pytest.raises(FileNotFoundError, match=f"download {repo} {file}"):
            load(name, tmp_path / "absent.json")
    with pytest.raises(
        FileNotFoundError, match="foo:x.json does not exist.*NAME is one of hermes,"
    ):
        data.load_source("foo:x.json")
    with pytest.raises(ValueError, match=r"\.jsonl"):
        load("jsonl")
    with pytest.raises(FileNotFoundError):
        load("jsonl", tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.json", b'[{"query": "x", ', "a.json is not JSON"),
        ("a.json", b"", "a.json is not JSON"),
        (
            "a.jsonl",
            b'[]\n[{"query": "x", ',
            "line 2 of .*a.jsonl is not JSON.*each line must be one whole",
        ),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'{"query": "x"}', "not a list"),
        ("a.json", b"3", "not a list"),
        ("a.json", b'["\xff"]', "not UTF-8"),
        ("a.json", b"[" * 10_000 + b"]" * 10_000, "not JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ("a.jsonl", b'{"a": 1}\n{"a": ', "line 2"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.txt", b"[]", "is none of .json, .jsonl, .json.gz"),
        ("a.parquet", b"PAR1", "is not Parquet that can be read .*; is it whole"),
        ("a.json.gz", b"[]", "cannot be read .*; is it whole"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-6], "cannot be read .*; is it whole"),
        ("a.json", "[]".encode("utf-16"), "is not UTF-8 .*: iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", '{"a": "é"}'.encode("latin-1"), "is not UTF-8 .*: iconv -f ITS_ENCODING"),
        ("a.json", b'[{"text": "a"}]', r"could be read as 'xlam' \(1 row: no 'tools'"),
        ("a.json", b"[1, null]", r"could be read as 'xlam' \(2 row"),
    ],
)
def test_bad_files(tmp_path, file, content, message):
    path = tmp_path / file
    path.write_bytes(content)
    for source in (f"xlam:{path}", str(path)):
        with pytest.raises(ValueError, match=message if source[:5] == "xlam:" else None) as error:
            data.load_source(source)
        assert str(error.value).count(str(path)) == 1 and "\n" not in str(error.value)


def test_load_reads_files_folders_and_lines_and_reports_drops(tmp_path, capsys):
    row = raw.xlam_row([{"name": "f", "arguments": {}}], query="line\u2028separator")
    bad = {**raw.xlam_row([]), "answers": "null"}
    (tmp_path / "a.json").write_text(json.dumps([row, bad]), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no data")
    examples = load("xlam", tmp_path / "a.json")
    assert [e.query for e in examples] == ["line\u2028separator"]
    assert "1 examples; left out: 1 row: " in capsys.readouterr().err
    lines = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\n\n" + json.dumps(bad)
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    assert load("xlam", tmp_path / "b.jsonl") == examples
    capsys.readouterr()
    assert load("xlam", tmp_path) == examples
    out = capsys.readouterr().err.partition("left out: ")[2]
    assert sum(int(part.split()[0]) for part in out.split(", ")) == 3  # b repeats a
    expected = data.SOURCES["xlam"][1]
    (tmp_path / expected).write_text(json.dumps([{**row, "query": "own file"}]))
    assert [e.query for e in load("xlam", str(tmp_path))] == ["own file"]


def rows_of_every_layout():
    """Rows as people have them, in one file: xLAM, irrelevance, OpenAI, ShareGPT with and without calls."""
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    return [
        raw.xlam_row([{"name": "f", "arguments": {"x": 1}}]),
        raw.xlam_row([]),
        raw.openai_row(("user", "a\u2028b\u0085c"), raw.called('{"city": "Oslo"}')),
        raw.sharegpt_row(
            ("human", "q"), ("function_call", call), ("observation", "r"), ("gpt", "s")
        ),
        raw.sharegpt_row(("human", "r"), ("gpt", "t")),
        vars(example("mine")),
    ]


def write(path, rows):
    """Write rows as the name of the file says."""
    if path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
        return path
    dumps = lambda value: json.dumps(value, ensure_ascii=False)
    text = "\n".join(map(dumps, rows)) if ".jsonl" in path.name else dumps(rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_the_layout_is_guessed_row_by_row(tmp_path, name):
    examples = data.load_source(str(write(tmp_path / name, rows_of_every_layout())))
    found = [(e.id.split("/")[0], e.kind) for e in examples]
    assert found == [
        ("xlam", "tool_call"),
        ("hammer", "answer"),
        ("openai", "tool_call"),
        ("sharegpt", "tool_call"),
        ("sharegpt", "answer"),
        ("sharegpt", "answer"),
        ("x", "answer"),
    ]
    assert examples[2].query == "a\u2028b\u0085c"  # where str.splitlines would cut


def test_parquet_gives_the_examples_of_json(tmp_path):
    """Arrow gives every message, call and schema the keys of all; none of its nulls may be read."""
    time = {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]}
    time = {"name": "time", "description": "t", "parameters": time}
    rows = [
        raw.openai_row(
            ("user", f"q{n}"),
            raw.called({"city": "Oslo"}) if n % 2 else raw.called({"zone": "CET"}, "time"),
            {"role": "tool", "tool_call_id": "c1", "content": "r"},
            ("assistant", "done"),
            tools=[raw.WEATHER, time][: 1 + n % 3] if n % 2 else [time],
        )
        for n in range(6)
    ]
    expected = data.load_source(str(write(tmp_path / "a.json", rows)))
    path = write(tmp_path / "a.parquet", rows)
    assert data.load_source(str(path)) == expected and len(expected) == 12
    from pyarrow import parquet

    padded = parquet.read_table(path).to_pylist()
    assert None in padded[0]["messages"][0].values()
    assert data.load_source(str(write(tmp_path / "padded.json", padded))) == expected
    strings = [raw.hermes_row(("human", "q"), ("gpt", "a"), tools=None)] * 2
    strings[0] = raw.hermes_row(("human", "q"), ("gpt", "a"))
    assert (
        load("hermes", write(tmp_path / "b.parquet", strings)) == data.convert("hermes", strings)[0]
    )


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", rows_of_every_layout()[:1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="a.parquet is Parquet; to read it: pip install pyarrow"):
        data.load_source(str(path))


def test_parquet_values_that_are_not_json_are_dropped(tmp_path):
    from datetime import date

    rows = [raw.openai_row(("user", "q"), raw.called({"city": date(2024, 1, 1)}))]
    write(tmp_path / "a.parquet", rows)
    rows = data.read_rows(tmp_path / "a.parquet")
    assert data.convert("openai", rows) == ([], {"row: a value that is not JSON": 1})


def test_a_folder_is_read_whole_and_what_is_passed_over_is_said(tmp_path, capsys):
    rows = [raw.xlam_row([{"name": "f", "arguments": {"x": n}}], query=f"q{n}") for n in range(5)]
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    write(tmp_path / "a.json", rows[:1])
    write(tmp_path / "deep/b.jsonl.gz", rows[1:2])
    write(tmp_path / "deep/er/c.parquet", rows[2:3])
    write(tmp_path / ".cache/hidden.json", rows[3:4])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "dataset_infos.json").write_text("{}")
    examples = data.load_source(str(tmp_path))
    assert [e.query for e in examples] == ["q0", "q1", "q2"]
    assert [e.id for e in examples] == ["xlam/0/1", "xlam/1/1", "xlam/2/1"]  # none twice
    assert capsys.readouterr().err == (
        f"data: {tmp_path}: passed over README.md, dataset_infos.json\n"
    )
    expected = data.SOURCES["xlam"][1]
    write(tmp_path / "deep" / expected, rows[4:])
    assert len(data.load_source(str(tmp_path))) == 4  # a plain folder: that file is one of many
    capsys.readouterr()
    assert [e.query for e in data.load_source(f"xlam:{tmp_path}")] == ["q4"]
    assert capsys.readouterr().err == (
        f"data: {tmp_path}: passed over README.md, a.json, dataset_infos.json, "
        "deep/b.jsonl.gz, deep/er/c.parquet\n"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no rows; give a file or folder that does"):
        data.load_source(str(tmp_path / "empty"))


def rows_without_calls():
    """Chats of which all answers can be read and no call."""
    answers = [raw.sharegpt_row(("human", f"q{n}"), ("gpt", "a")) for n in range(3)]
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    return {
        "role": [*answers, raw.sharegpt_row(("human", "q"), ("tool-use", call), ("gpt", "a"))],
        "markup": [*answers, raw.sharegpt_row(("human", "q"), ("gpt", f"<functioncall> {call}"))],
        "undeclared": [
            *answers,
            raw.sharegpt_row(("human", "q"), ("function_call", call), tools=[]),
        ],
        "tools": [
            *answers,
            raw.openai_row(
                ("user", "q"), raw.called({}), tools=[{"name": "weather", "args": {"c": 1}}]
            ),
        ],
    }


@pytest.mark.parametrize("case", rows_without_calls())
def test_a_file_that_lost_all_its_calls_is_refused(tmp_path, case):
    rows = rows_without_calls()[case]
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(
        ValueError, match=r"no row with a call could be read in .*a\.json \(1 (row|turn): "
    ):
        data.load_source(str(path))
    with pytest.raises(ValueError, match="no row with a call"):
        data.main(["convert", str(path), str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()
    good = raw.openai_row(("user", "q"), raw.called({}))
    write(tmp_path / "good.json", [good])
    with pytest.raises(ValueError, match=r"a\.json \("):  # beside a file with calls
        data.load_source(str(tmp_path))
    assert len(data.load_source(str(write(path, [*rows, good])))) == 4
    assert len(data.load_source(str(write(path, rows[:3])))) == 3  # chats without any call


def test_rows_of_no_known_layout(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, *rows_of_every_layout()[:1]])
    assert len(data.load_source(str(path))) == 1
    assert "1 row: unknown layout" in capsys.readouterr().err
    call = '<tool_call>\n{"name": "f", "params": {}}\n</tool_call>'
    for text in ("b", call):  # the layout is named before the calls that are lost with it
        write(path, [{"text": "a"}, {"text": text}])
        with pytest.raises(
            ValueError, match=r"a.jsonl: unknown layout with keys \['text'\].*NAME:FILE"
        ):
            data.load_source(str(path))


def test_sampled_rows(tmp_path, capsys):
    turn = lambda n, k: (("human", f"q{n} {k}"), ("gpt", f"a{n} {k}"))
    rows = [raw.sharegpt_row(*turn(n, 0), *turn(n, 1)) for n in range(40)]
    path = write(tmp_path / "mail@work.json", rows)
    whole = data.load_source(str(path))
    some = data.load_source(f"{path}@10", seed=3)
    assert len(whole) == 80 and len(some) == 20 and [e for e in whole if e in some] == some
    assert {*Counter(e.id.rpartition("/")[0] for e in some).values()} == {2}  # whole conversations
    assert data.load_source(f"sharegpt:{path}@10", seed=3) == some
    assert data.load_source(f"{path}@10", seed=4) != some
    assert data.load_source(f"{tmp_path}@40") == data.load_source(str(tmp_path)) == whole
    times_drawn = Counter(
        e.id for seed in range(200) for e in data.load_source(f"{path}@10", seed=seed)
    )
    assert len(times_drawn) == 80 and max(times_drawn.values()) < 80  # 50 expected
    for number in (41, 0):
        with pytest.raises(ValueError, match=f"mail@work.json holds 40 rows; .* not @{number}"):
            data.load_source(f"{path}@{number}")
    path.rename(tmp_path / "rows@7")
    with pytest.raises(ValueError, match="is none of .json"):  # a path that exists is a path
        data.load_source(str(tmp_path / "rows@7"))
    with pytest.raises(FileNotFoundError, match=r"absent.json does not exist"):
        data.load_source(str(tmp_path / "absent.json@7"))


def test_table_6_names_every_sample():
    text = (Path(data.__file__).parent / "recipes/table6.args").read_text()
    sources = next(line for line in text.splitlines() if line.startswith("--train_file")).split()[
        1:
    ]
    found = {}
    for source in sources:
        name, path = data._named(source)
        path, _, rows = path.rpartition("@")
        assert Path(path).name == data.SOURCES[name][1]
        found[name] = int(rows)
    assert found == {
        "hermes": 2500,
        "toolace": 11300,
        "xlam": 10000,
        "apigen-mt": 2500,
        "funreason-mt": 10000,
        "hammer": 3500,
    }


def test_own_rows_take_wrapped_tools(tmp_path):
    plain = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    made = vars(example(tools=[plain]))
    forms = [
        {"type": "function", "function": plain},
        {"name": "f", "description": "d", "input_schema": {"type": "object"}},
        {"name": "f", "description": "d", "inputSchema": {"type": "object"}},
        plain,
    ]
    path = write(tmp_path / "a.jsonl", [{**made, "tools": [tool]} for tool in forms])
    assert data.load_source(str(path)) == [Example(**made)] * 4


def test_subsets_are_nested_and_keep_conversations_whole():
    examples = conversations(random.Random(1))
    parts = [data.subset(examples, share, seed=2) for share in (0.05, 0.3, 0.31, 0.8, 1)]
    for small, large in pairwise(parts):
        assert small == [e for e in large if e in small]
    assert parts[-1] == examples and abs(len(parts[1]) - 0.3 * len(examples)) < 4
    sizes = Counter(e.id.split("/")[1] for e in examples)
    for part in parts:
        assert all(sizes[row] == n for row, n in Counter(e.id.split("/")[1] for e in part).items())
    assert data.subset(examples, 0.3, seed=2) == parts[1] != data.subset(examples, 0.3, seed=3)
    for share in (0, 1.5, 1e-9):
        with pytest.raises(ValueError, match="share of"):
            data.subset(examples, share)


def test_digest_sees_every_change_and_no_other(tmp_path):
    examples = conversations(random.Random(1))
    data.write_jsonl(examples, tmp_path / "a.jsonl")
    assert data.digest(examples) == data.digest(load("jsonl", tmp_path / "a.jsonl"))
    assert data.digest([]) == "e3b0c44298fc1c14"  # SHA-256 of nothing: stable between versions
    first = examples[0]
    others = [replace(first, **{name: "z"}) for name in ("id", "query", "target", "system")]
    others.append(replace(first, tools=[{"name": "f"}]))
    changed = [[other, *examples[1:]] for other in others] + [examples[1:], examples[::-1]]
    assert len({data.digest(part) for part in [examples, *changed]}) == len(changed) + 1


def test_load_source_takes_a_name_a_file_or_both(tmp_path, monkeypatch):
    row = raw.xlam_row([{"name": "f", "arguments": {}}])
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    assert data.load_source(str(path)) == data.load_source(f"xlam:{path}") == load("xlam", path)
    data.write_jsonl(load("xlam", path), tmp_path / "own.jsonl")
    assert data.load_source(str(tmp_path / "own.jsonl")) == load("xlam", path)
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 8, "valid": 8, "test": 8})
    assert data.load_source("toy", seed=3) == load("toy", "train", seed=3)
    assert data.load_source("toy:hard-test") == load("toy", "hard-test")
    with pytest.raises(FileNotFoundError, match="NAME:FILE"):
        data.load_source("absent.json")
    with pytest.raises(ValueError, match="download"):
        data.load_source("xlam")


def test_jsonl_round_trip(tmp_path):
    rows = [raw.apigen_row(("human", "q\u2028é"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))]
    examples = data.convert("apigen-mt", rows)[0] + [example("plain")]
    data.write_jsonl(examples, tmp_path / "out.jsonl")
    assert load("jsonl", tmp_path / "out.jsonl") == examples
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    assert ["policy" in json.loads(line) for line in lines if line] == [True, True, False]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "call"},
        {"kind": "tool_call"},
        {"target": "a"},
        {"target": 3},
        {"query": None},
        {"tools": "[]"},
        {"tools": ["f"]},
        {"history": [["user"]]},
        {"history": [["user", 3]]},
        {"steps": "ab"},
        {"steps": None},
        {"system": "no slot"},
        {"extra": 1},
        {"query": "\ud800"},
        {"kind": "tool_call", "target": "<tool_call>\n{\n</tool_call>"},
        {
            "kind": "tool_call",
            "target": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        },
        {"kind": "tool_call", "target": '<tool_call>\n{"name": "f", "params": null}\n</tool_call>'},
        {"kind": "tool_call", "target": "<tool_call>\n[]\n</tool_call>"},
        {"kind": "tool_call", "target": "<tool_call>5</tool_call>"},
        {"target": "<answer>a <tool_call> b</answer>"},
        {"target": "<answer> \n</answer>"},
        {
            "kind": "tool_call",
            "target": '<tool_call>{"name": "f", "params": {"a": 1, "a": 1}}</tool_call>',
        },
        {
            "kind": "tool_call",
            "target": '<tool_call>{"name": "f", "params": {"a": [1e999]}}</tool_call>',
        },
        {"tools": [{"name": "f", "maximum": float("inf")}]},
    ],
    ids=str,
)
def test_jsonl_rows_that_are_no_examples(tmp_path, change):
    row = {**vars(example()), **change}
    good = vars(example())
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=r"a\.jsonl: row 2 is not a valid line"):
        load("jsonl", tmp_path / "a.jsonl")
    del good["query"]
    (tmp_path / "a.jsonl").write_text(json.dumps(good))
    for row, reason in (
        (good, "it lacks query"),
        ({"target": good["target"]}, "it lacks id, tools, history, query, steps, kind"),
        (vars(example()) | {"answer": "x"}, "nothing reads answer; it may hold id, "),
        ([], r"'\[\]' is not an object"),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        message = rf"a\.jsonl: row 1 is not a valid line: {reason}.*docs/data.md shows rows"
        with pytest.raises(ValueError, match=message):
            load("jsonl", tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"history": [{"role": "user", "content": "Hi"}]},
            'history holds.*role.*not ."user", "text"',
        ),
        ({"history": ["hi"]}, "history holds 'hi'"),
        ({"history": [["human", "Hi"]]}, "the role 'human', not user or assistant"),
        ({"steps": [{"call": "f", "observation": "1"}]}, 'steps holds.*not ."call", "observation"'),
        ({"steps": [["f", "1", "2"]]}, "steps holds"),
        ({"kind": "call"}, "row 1 is not a valid line: kind 'call', not tool_call or answer"),
    ],
)
def test_jsonl_pairs_of_another_form_are_refused(tmp_path, change, message):
    """Each unpacks into two, or looks like OpenAI's form: nothing may be read as something else."""
    (tmp_path / "a.jsonl").write_text(json.dumps(vars(example()) | change))
    with pytest.raises(ValueError, match=message):
        load("jsonl", tmp_path / "a.jsonl")


def test_toy_is_wired(monkeypatch):
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 40, "valid": 20, "test": 20})
    for name, size in (("train", 40), ("hard-test", 20), ("house-valid", 20)):
        examples = load("toy", name, seed=1)
        assert len(examples) == size and len({e.id for e in examples}) == size
        assert all(
            "__TOOL_DESCS__" in e.system and e.system != data.SYSTEM_PROMPT for e in examples
        )
        assert load("toy", name, seed=1) == examples != load("toy", name, seed=2)
    assert load("toy", seed=1) == load("toy", "train", seed=1)
    first, second = data.split(load("toy"), 0.5)
    assert first and second
    for name in ("dev", "hard", "hard-dev", "soft-test"):
        with pytest.raises(ValueError, match="unknown split"):
            load("toy", name)


# ---- command line ----


def test_stats_and_convert(tmp_path, capsys, monkeypatch, tokenizer):
    # AutoTokenizer imports every model's code, which takes longer than all these tests
    stub = SimpleNamespace(AutoTokenizer=PreTrainedTokenizerFast)
    monkeypatch.setitem(sys.modules, "transformers", stub)
    calls = [{"name": "f", "arguments": {"x": 1}}]
    rows = [raw.xlam_row(calls, query=f"q{n}") for n in range(3)] + [raw.xlam_row(calls * 2)]
    rows.append({**raw.xlam_row([]), "answers": "null"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file, out = str(tmp_path / "rows.json"), str(tmp_path / "out.jsonl")
    data.main(["stats", file, "--tokenizer", str(tmp_path / "tokenizer")])
    text = capsys.readouterr().out
    lengths = [len(render(e, tokenizer)) for e in load("xlam", file)]
    assert "(xlam)" in text and "original 5  sampled 5  processed 4  per row 0.80" in text
    assert "left out      1  row: no 'name' of the right type" in text
    assert "single call 75.0 %  parallel calls 25.0 %" in text
    assert f"tokens p50 {sorted(lengths)[1]}  p95 {max(lengths)}  max {max(lengths)}" in text
    data.main(["convert", file, out, "--name", "xlam"])
    assert load("jsonl", out) == load("xlam", file)
    capsys.readouterr()
    data.main(["stats", out, f"xlam:{file}@3"])
    text = capsys.readouterr().out
    assert "(jsonl)" in text and "original 5  sampled 3  processed " in text
    kept = 4 + len(data.load_source(f"xlam:{file}@3"))
    assert text.endswith(f"together\noriginal 9  sampled 7  processed {kept}\n")


def test_command_line_errors_are_one_line(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": 1}]')
    for file, message in (("a.json", "--name"), ("b.json", "b.json")):
        command = [sys.executable, data.__file__, "stats", str(tmp_path / file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and message in done.stderr
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_examples_are_frozen():
    with pytest.raises(AttributeError):
        example().query = "other"
    assert replace(example(), query="other").query == "other"


def test_the_rows_of_the_documentation_are_read():
    """docs/data.md's rows, as printed, are one conversation in four forms."""
    text = (Path(data.__file__).parent / "docs/data.md").read_text(encoding="utf-8")
    rows = [
        json.loads(block)
        for block in re.findall(r'```\n(\{"(?:tools|id)":.*?)```', text, re.DOTALL)
    ]
    assert [data.guess(row) for row in rows] == ["openai", "sharegpt", "openai", "jsonl"]
    for row in rows[:3]:
        call, answer = data.convert(None, [row])[0]
        assert call.target == (
            '<tool_call>\n{"name": "weather", "params": {"city": "Oslo"}}\n</tool_call>'
        )
        assert (answer.target, answer.steps[0][1]) == ("<answer>\nYes.\n</answer>", "rain")
    own = data.convert(None, rows[3:])[0][0]
    assert (own.query, own.steps, own.target) == (answer.query, answer.steps, answer.target)


def test_a_call_too_long_for_the_reward_is_dropped():
    """The reward reads calls of up to 50,000 characters; the targets are the longest ones kept."""

    def row(length):
        value = "x" * (length - len('{"name": "f", "params": {"a": ""}}'))
        call = {"function": {"name": "f", "arguments": {"a": value}}}
        tool = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
        return {"messages": turns, "tools": [tool]}

    kept, drops = data.convert(None, [row(49_000)])
    assert len(kept) == 1 and not drops
    kept, drops = data.convert(None, [row(50_001)])
    assert not kept and drops == {"turn: a target that the reward cannot read": 1}


@pytest.mark.parametrize("command", ["stats", "convert"])
def test_a_file_of_which_nothing_is_left_is_refused_by_the_commands_too(command, tmp_path):
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl could be read \(1 row: no assistant turn\)"):
        data.main([command, str(file), *([str(out)] if command == "convert" else [])])
    assert not out.exists()
