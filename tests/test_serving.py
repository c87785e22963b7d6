"""tools/serving.py and tools/vllm_tool_parser.py: a served checkpoint reads and writes what training did."""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import jinja2
import pytest
import torch
from frozen import needs_vllm
from transformers import AutoTokenizer

import data
import methods
import rewards
from tools import serving

REPO = Path(__file__).resolve().parent.parent
TOY = REPO / "toy_model"
LLAMA = (  # in the manner of Llama 3's
    "{{- bos_token }}\n"
    "{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n"
    "{%- if tools is not none %}\n    {{- 'Environment: ipython\\n' }}\n{%- endif %}\n"
    "{{- system_message }}\n{{- '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n"
    "    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "        {{- message['content'] | trim + '<|eot_id|>' }}\n"
    "    {%- else %}\n        {{- raise_exception('a call in the messages') }}\n    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
WHITE = (  # white space that a careless preamble would swallow
    "\n\n  {% for m in messages %}\n<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>\n"
    "  {% endfor %}\n"
)
THINKS = WHITE + "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
OWN = {  # prompts of a user's own, with what might upset a template
    "system_prompt": 'Say {{ "no" }} {% raw %} \\ \' "to"\r\ntools:\t😀 é\n__TOOL_DESCS__\n'
    "__OTHER__ %} %USER%",
    "user_prompt": "__STEPS__|__HISTORY__|__QUERY__\n\n{# {{ __QUERY__ }} #}\n",
}
FIGURES = {"system_prompt": data.SYSTEM_PROMPT, "user_prompt": data.USER_PROMPT}
WORDS = ["städte", "<b> & 'c'", 'a "quote"', "__STEPS__", "{{ x }}", "line\nline", "漢字 😀", "1.0"]


def toy_tokenizer(template=None):
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    if template:
        tokenizer.bos_token = "<|begin_of_text|>"
        special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = template
    return tokenizer


def tool(name):
    city = {"type": "string", "description": "Ünï <b>"}
    if name == "g":  # pydantic's order
        city = dict(sorted(city.items()))
    properties = {"city": city, "n": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["city"]}
    return {"name": name, "description": f"What {name} does", "parameters": schema}


def conversation(rng) -> tuple[list[dict], list[dict]]:
    """The turns of one conversation, in APIGen-MT's layout and as a chat client sends them."""
    raw, chat = [], []
    say = lambda: " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    for _ in range(rng.randint(1, 4)):
        for _ in range(rng.choice([1, 1, 1, 2])):  # sometimes a user speaks twice
            raw.append({"from": "human", "value": say()})
            chat.append({"role": "user", "content": raw[-1]["value"]})
        for _ in range(rng.randint(0, 3)):
            calls = [
                {
                    "name": rng.choice("fg"),
                    "arguments": {"city": say(), "n": rng.choice([1, 2.5, None])},
                }
                for _ in range(rng.choice([1, 1, 2, 3]))
            ]
            value = calls[0] if len(calls) == 1 else calls
            raw.append({"from": "function_call", "value": json.dumps(value)})
            asked = [
                {"id": f"call-{i}", "type": "function",
                 "function": {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
                for i, call in enumerate(calls)
            ]  # fmt: skip
            chat.append({"role": "assistant", "content": None, "tool_calls": asked})
            for call in asked:
                result = json.dumps({"result": say()}, ensure_ascii=False)
                raw.append({"from": "observation", "value": result})
                chat.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        raw.append({"from": "gpt", "value": say()})
        chat.append({"role": "assistant", "content": raw[-1]["value"]})
    return raw, chat


def parsed(messages):
    """The messages as transformers documents them and vLLM makes them: arguments are objects."""
    copy = json.loads(json.dumps(messages))
    for message in copy:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return copy


@pytest.mark.parametrize("base", [None, LLAMA, WHITE, THINKS])
@pytest.mark.parametrize("prompts", [FIGURES, OWN])
def test_a_request_reads_as_the_training_prompt(base, prompts):
    """At every assistant turn of random conversations: calls, later steps, answers; a policy."""
    tokenizer, rng = toy_tokenizer(base), random.Random(0)
    if base is THINKS:
        data.allow_thinking(tokenizer)
    serving.add_tool_template(tokenizer, **prompts)
    tools = [tool("f"), tool("g")]
    wrapped = [{"type": "function", "function": one} for one in tools]
    seen = {"tool_call": 0, "answer": 0, "parallel": 0, "later": 0}
    for _ in range(30):
        policy = rng.choice(["", "# Policy\nAlways {{ ask }}."])
        raw, chat = conversation(rng)
        row = {"conversations": raw, "tools": json.dumps(tools), "system": policy}
        examples, _ = data.convert("apigen-mt", [row])
        assert examples
        for example in examples:
            end = int(example.id.rpartition("/")[2])
            asked = [{"role": "system", "content": policy}] * bool(policy) + chat[:end]
            example = replace(example, user=prompts["user_prompt"])
            if prompts is OWN:  # its tools stand in the first lines: the policy is before all
                system = f"{policy}\n\n" * bool(policy) + prompts["system_prompt"]
                example = replace(example, system=system, policy="")
            wanted = data.render(example, tokenizer)
            for messages in (parsed(asked), asked):
                ids = tokenizer.apply_chat_template(
                    messages, tools=wrapped, add_generation_prompt=True, return_dict=False
                )
                assert tokenizer.decode(ids) == tokenizer.decode(wanted)
                assert ids == wanted
            seen[example.kind] += 1
            seen["parallel"] += any(call.startswith("[") for call, _ in example.steps)
            seen["later"] += len(example.steps) > 1 and bool(example.history)
    assert min(seen.values()) > 10, seen


def published() -> dict[str, str]:
    """Name -> chat template, of those that TRL collects."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec else Path()
    files = sorted(folder.glob("*.jinja")) if spec else []
    return {file.stem: file.read_text() for file in files if "training" not in file.stem}


@pytest.mark.parametrize("name", published())
def test_on_published_templates(name):
    """The same, as text, on the templates of Qwen, Llama, Gemma, Phi, GLM, DeepSeek and others."""
    tokenizer, rng = toy_tokenizer(), random.Random(0)
    tokenizer.chat_template = published()[name]
    say = lambda *chat, **more: tokenizer.apply_chat_template(
        [*chat], add_generation_prompt=True, tokenize=False, **more
    )
    try:
        say({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    except jinja2.TemplateError as error:  # no system message in Gemma 1, no plain text in LLaVA
        pytest.skip(f"cannot be trained on our prompt: {error}")
    serving.add_tool_template(tokenizer)
    tools = [tool("f"), tool("g")]
    raw, chat = conversation(rng)
    row = {"conversations": raw, "tools": json.dumps(tools), "system": "P."}
    examples, _ = data.convert("apigen-mt", [row])
    for example in examples:
        end = int(example.id.rpartition("/")[2])
        asked = say({"role": "system", "content": "P."}, *parsed(chat[:end]), tools=tools)
        assert asked == say(*data.messages(example), enable_thinking=False)


def test_the_default_template_stays():
    tokenizer, plain = toy_tokenizer(), toy_tokenizer()
    serving.add_tool_template(tokenizer)
    serving.add_tool_template(tokenizer)  # a checkpoint that is trained on
    for example in data.load("toy", "valid")[:5]:
        assert data.render(example, tokenizer) == data.render(example, plain)
        assert data.target_ids(example, tokenizer) == data.target_ids(example, plain)
    assert tokenizer.chat_template["default"] == plain.chat_template


def test_both_templates_are_saved(tmp_path):
    tokenizer = toy_tokenizer()
    serving.add_tool_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert (tmp_path / "chat_template.jinja").read_text() == (
        TOY / "chat_template.jinja"
    ).read_text()


def test_the_forms_in_which_clients_write_the_same():
    tokenizer = toy_tokenizer()
    serving.add_tool_template(tokenizer)
    full = tool("f")
    bare = {"name": "g", "description": None}
    example = data.Example("x/0/0", [full, {**bare, "description": "", "parameters": EMPTY}], [],
                           "a\nb", [('{"name": "g", "params": {}}', "done")], "", "answer",
                           policy="One.\n\nTwo.")  # fmt: skip
    call = {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [{"function": {"name": "g"}}],
    }
    part = lambda text: {"type": "text", "text": text}
    messages = [
        {"role": "system", "content": "One."},
        {"role": "developer", "content": [part(" Two.\n")]},
        {"role": "user", "content": [part("a"), part("b")]},
        call,
        {"role": "tool", "content": "done"},
    ]
    ids = tokenizer.apply_chat_template(
        messages, tools=[{"type": "function", "function": full}, bare], add_generation_prompt=True,
        return_dict=False,
    )  # fmt: skip
    assert tokenizer.decode(ids) == tokenizer.decode(data.render(example, tokenizer))


EMPTY = {"type": "object", "properties": {}, "required": []}


@pytest.mark.parametrize(
    "roles",
    [
        "user call",
        "user call user",
        "user tool",
        "user call tool user tool",
        "user calls tool user",
        "user calls tool",
        "user call tool tool",
        "user calls first other",
        "user calls first first",
        "user function",
        "user old",
    ],
)
def test_calls_and_results_that_do_not_match_are_errors(roles):
    tokenizer = toy_tokenizer()
    serving.add_tool_template(tokenizer)
    made = {
        "user": {"role": "user", "content": "hello"},
        "tool": {"role": "tool", "content": "done"},
        "call": {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        "first": {"role": "tool", "tool_call_id": "1", "content": "done"},
        "other": {"role": "tool", "tool_call_id": "9", "content": "done"},
        "function": {"role": "function", "name": "f", "content": "done"},
        "old": {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
    }
    two = [{"id": i, "function": {"name": "f", "arguments": {}}} for i in "12"]
    made["calls"] = {"role": "assistant", "tool_calls": two}
    wrong = "call without a result|without a tool call before|no call before it has|roles are|two messages"
    with pytest.raises(Exception, match=wrong):
        tokenizer.apply_chat_template([made[r] for r in roles.split()], tools=[tool("f")])


def test_results_stand_in_the_order_of_their_calls():
    tokenizer = toy_tokenizer()
    serving.add_tool_template(tokenizer)
    calls = [{"id": i, "function": {"name": "f", "arguments": {}}} for i in "12"]
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]
    told = [{"role": "tool", "tool_call_id": i, "content": f"result {i}"} for i in "12"]
    texts = [
        tokenizer.apply_chat_template([*asked, *results], tools=[tool("f")], tokenize=False)
        for results in (told, told[::-1])
    ]
    assert texts[0] == texts[1] and "observation: result 1\nresult 2" in texts[0]


def test_the_system_prompt_that_a_run_trained_with():
    toys = data.load("toy", "valid")[:3]
    figure = [replace(toys[0], system=data.SYSTEM_PROMPT, policy=p) for p in ("", "One.", "Two.")]
    assert serving.system_prompt_of(toys) == toys[0].system
    assert serving.system_prompt_of(figure) == data.SYSTEM_PROMPT
    assert serving.system_prompt_of([*toys, *figure, toys[0]]) == toys[0].system


# ---- the model card ----


def test_model_card(tmp_path, monkeypatch):
    rows = data.load("toy", "valid")[:20]
    calls = sum(row.kind == "tool_call" for row in rows)
    settings = {"algo": "toolupt", "max_steps": 600, "seed": 3}
    lines = [settings, *({"step": i, "eval/accuracy": x} for i, x in enumerate((0.25, 0.75)))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", "my runs"])
    run = SimpleNamespace(
        records=SimpleNamespace(settings=settings),
        command=SimpleNamespace(model_name_or_path="Org/Base-1B"),
        method=methods.ToolUpt(),
        examples=rows,
        tokenizer=toy_tokenizer(),
        out=tmp_path,
    )
    card = serving.model_card(run, 400)
    _, header, body = card.split("---\n", 2)
    assert "base_model: Org/Base-1B\n" in header
    for text in (
        "# Org/Base-1B, post-trained for tool use with toolupt",
        f"- Method: toolupt: {methods.ToolUpt.__doc__.splitlines()[0]}",
        "- Step 400 of 600, seed 3",
        f"- Commit: {serving.this_commit()}",
        f"| toy-valid-0 | {calls} | {20 - calls} |",
        "| before | 25.0% |\n| after | 75.0% |",
        "    python train.py --output_dir 'my runs'\n\nA response is",
    ):
        assert text in body, card
    run.command.model_name_or_path = str(TOY)
    local = serving.model_card(run, 400)
    assert "base_model" not in local and "# toy_model, post-trained" in local


def test_the_commit_is_named():
    commit = serving.this_commit()
    assert commit == "unknown" or re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?", commit)


# ---- the tool parser ----


def plugin():
    """The parser's file, loaded as vLLM loads it: by path."""
    path = REPO / "tools" / "vllm_tool_parser.py"
    spec = importlib.util.spec_from_file_location("vllm_tool_parser", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parsers():
    pytest.importorskip("vllm")
    return plugin()


F = {"name": "f", "params": {"a": 1}}
G = {"name": "g", "params": {}}
TAGGED = {"name": "f", "params": {"text": "</tool_call> <answer>"}}
CASES = [  # response, content, calls
    ("<answer>\nIt is done.\n</answer>", "It is done.", []),
    ('<tool_call>\n{"name": "f", "params": {"a": 1}}\n</tool_call>', "", [F]),
    (f"<tool_call>\n{json.dumps([F, G])}\n</tool_call>", "", [F, G]),
    (f"<tool_call>{json.dumps(F)}</tool_call>\n<tool_call>{json.dumps(G)}</tool_call>", "", [F, G]),
    (f"First.\n<tool_call>\n{json.dumps(F)}\n</tool_call>\n", "First.", [F]),
    (f"<tool_call>\n{json.dumps(F)}\n</tool_call>\n<answer>\nand\n</answer>", "and", [F]),
    (f"<tool_call>\n{json.dumps(TAGGED)}\n</tool_call>", "", [TAGGED]),
    ("plain words", "plain words", []),
    ("  a < b, <b>bold</b> <ans> <<\n c ", "a < b, <b>bold</b> <ans> <<\n c", []),
    ("", "", []),
    ("<answer>\n\n</answer>", "", []),
    ("<answer>\nhalf an ans", "half an ans", []),
    ("<answer>\ndone\n</answe", "done", []),
    ("one <", "one <", []),
    ("<answer>1 <answer>2</answer> 3</answer></tool_call>", "1 2 3", []),
    ("<ans<answer>wer>x</<tool_call</answer>>answer>", "x", []),
    ("<ans<answer>wer>y<<</answer>/answer>z", "y<z", []),
    ('<tool_call>\n{"name": "f", "params"\n</tool_call>', '{"name": "f", "params"', []),
    ('<tool_call>\n{"name": "f"}\n</tool_call>', '{"name": "f"}', []),
    ('<tool_call>\n{"name": "f", "par', '{"name": "f", "par', []),
    ("<tool_call>\n[]\n</tool_call>", "[]", []),
    (
        '<tool_call>{"name": "f", "params": {"a": "\\ud83d"}}</tool_call>',
        '{"name": "f", "params": {"a": "\\ud83d"}}',
        [],
    ),
    ('<tool_call>\n{"name": "f", "params": {"a": NaN}}\n</tool_call>',
     '{"name": "f", "params": {"a": NaN}}', []),
    ('<tool_call>\n{"name": "f", "params": {"a": 1e999}}\n</tool_call>',
     '{"name": "f", "params": {"a": 1e999}}', []),
    ("<tool_call>\nno <answer>json</answer>\n</tool_call>\n<answer>so</answer>", "no json\n\nso", []),
]  # fmt: skip


THOUGHTS = [  # opening of the prompt (None: not allowed), response, content, calls
    (None, "<think>x</think>y", "<think>x</think>y", []),
    ("", f"<think>\nf: {json.dumps(F)}? <answer>\n</think>\n\n<answer>\nyes\n</answer>", "yes", []),
    ("", f" \n<think><tool_call>{json.dumps(G)}</tool_call></think><tool_call>{json.dumps(F)}</tool_call>", "", [F]),
    ("", f"<tool_call>{json.dumps(F)}</tool_call>", "", [F]),
    ("", "so be it <think>x</think>", "so be it <think>x</think>", []),
    ("", "< b", "< b", []),
    ("", "<thin", "", []),
    ("", f"<think>endless <tool_call>{json.dumps(F)}</tool_call>", "", []),
    ("", "<think>a</thin", "", []),
    ("<think>\n", f"f, then.</think>\n<tool_call>{json.dumps([F, G])}</tool_call>", "", [F, G]),
    ("<think>\n", "<think>again</think>so", "so", []),
    ("<think>\n", f"endless <tool_call>{json.dumps(F)}</tool_call>", "", []),
    ("<think>\n", "", "", []),
]  # fmt: skip
ALL = [(None, *case) for case in CASES] + [("", *case) for case in CASES] + THOUGHTS


def read_in_pieces(module, pieces, opening=None):
    reader, content, calls = module.Reader(opening), "", []
    for piece in pieces:
        text, found = reader.feed(piece)
        content, calls = content + text, calls + found
    return content + reader.finish(), calls


@pytest.mark.parametrize("opening, response, content, calls", ALL)
def test_a_response_in_every_split(parsers, opening, response, content, calls):
    """Whole, in every two pieces, character by character, in random pieces: always the same."""
    rng, n = random.Random(0), len(response)
    splits = [[response], list(response), *([response[:i], response[i:]] for i in range(n))]
    for _ in range(50):
        cuts = sorted(rng.sample(range(n + 1), min(n, rng.randint(1, 8))))
        splits.append([response[a:b] for a, b in zip([0, *cuts], [*cuts, n])])
    for pieces in splits:
        assert read_in_pieces(parsers, pieces, opening) == (content, calls), pieces


def test_no_tag_in_any_text(parsers):
    """Random texts of tags, their halves and calls: no tag in the content, streamed or whole."""
    rng = random.Random(0)
    halves = [tag[:i] for tag in parsers.TAGS for i in range(1, len(tag))]
    halves += [tag[i:] for tag in parsers.TAGS for i in range(1, len(tag))]
    atoms = [
        *parsers.TAGS * 6,
        *halves,
        *[" ", "\n", "x", "<"] * 4,
        json.dumps(F),
        json.dumps([F, G]),
    ]
    for _ in range(3000):
        text = "".join(rng.choices(atoms, k=rng.randint(1, 12)))
        content, calls = read_in_pieces(parsers, [text])
        assert not any(tag in content for tag in parsers.TAGS), text
        assert (content, calls) == read_in_pieces(parsers, text), text


@pytest.mark.parametrize("opening, response, content, calls", ALL)
def test_the_parser_as_vllm_drives_it(parsers, opening, response, content, calls):
    """vLLM's own parser around ours, token by token and whole, with and without tools to call."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    tokenizer = toy_tokenizer()
    if opening is not None:
        tokenizer.init_kwargs["thought_opening"] = opening
    kind = ParserManager.get_parser(tool_parser_name="toolupt", enable_auto_tools=True)
    tools = [{"type": "function", "function": tool(name)} for name in "fg"]
    wanted = [(call["name"], call["params"]) for call in calls]
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    for choice, offered in (("auto", tools), ("required", tools), ("none", tools), (None, None)):
        fields = {} if choice is None else {"tools": offered, "tool_choice": choice}
        request = ChatCompletionRequest(
            model="m", messages=[{"role": "user", "content": "q"}], **fields
        )
        kept = wanted if choice in ("auto", "required") else []
        parser = kind(tokenizer, request.tools)
        _, text, found = parser.parse(response, request, enable_auto_tools=True)
        assert (text or "") == content
        assert [(c.name, json.loads(c.arguments)) for c in found or []] == kept
        parser, text, found = kind(tokenizer, request.tools), "", {}
        shown, parts = "", 0
        for place, token in enumerate(ids or [tokenizer.eos_token_id]):
            now = tokenizer.decode(ids[: place + 1]).rstrip("\ufffd")
            last = place + 1 >= len(ids)
            delta = parser.parse_delta(
                now[len(shown) :], [token], request, prompt_token_ids=[1], finished=last
            )
            shown = now
            text += (delta and delta.content) or ""
            parts += bool(delta and delta.content)
            for call in (delta and delta.tool_calls) or []:
                one = found.setdefault(call.index, [None, ""])
                one[0] = call.function.name or one[0]
                one[1] += call.function.arguments or ""
        assert text == content
        assert parts > 2 or content != "It is done."  # an answer comes as it is written
        assert [(name, json.loads(arguments)) for name, arguments in found.values()] == kept


# ---- stops ----


def test_a_model_whose_texts_end_otherwise_than_its_turns_learns_as_well(tmp_path):
    """The toy model's copy whose EOS is <|endoftext|> and whose turns end with <|im_end|>, as in
    Gemma or Phi-3, has the same steps and accuracy. One that never stops at <|im_end|> is rejected.
    """
    copy, never = tmp_path / "copy", tmp_path / "never"
    for folder, ids in ((copy, [0, 2]), (never, 0)):
        shutil.copytree(TOY, folder)
        change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
        change(folder / "generation_config.json", eos_token_id=ids)
        change(folder / "config.json", eos_token_id=0)
    flags = """--algo grpo --train_file toy --eval_file toy:valid --max_steps 2 --learning_rate 1e-4
    --train_batch_size 2 --num_generations 4 --eval_steps 2 --eval_size 16 --save_steps 2"""
    logs = [train(model, tmp_path / f"out-{i}", flags) for i, model in enumerate((TOY, copy))]
    assert len(logs[0]) == 4
    for name in ("eval/accuracy", "reward", "completions/mean_length", "loss"):
        values = [[line[name] for line in log[1:] if name in line] for log in logs]
        assert values[0] and values[0] == pytest.approx(values[1]), name
    assert logs[0][1]["eval/accuracy"] > 0.3
    saved = json.loads((tmp_path / "out-1" / "checkpoint-2" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 2]
    with pytest.raises(subprocess.CalledProcessError) as failure:
        train(never, tmp_path / "out-never", flags)
    assert "closes a turn with <|im_end|> (id 2)" in failure.value.stderr
    assert '"eos_token_id": [0, 2]' in failure.value.stderr


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def train(model: Path, out: Path, flags: str) -> list[dict]:
    """A run of train.py in a process of its own; the lines of its metrics.jsonl."""
    flags += f""" --model_name_or_path {model} --output_dir {out} --engine transformers
    --max_prompt_length 1024 --max_completion_length 128 --no_gradient_checkpointing"""
    command = [sys.executable, "train.py", *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPO, env=environment, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- the server ----

TASKS = ("single", "parallel", "second_step", "done")


@pytest.fixture(scope="module", params=["plain", "thinks"])
def served(tmp_path_factory, request):
    """vLLM's server on a checkpoint of train.py that knows one toy example of each task by heart.

    thinks: its template opens a block of thoughts, and --allow_thinking had the model close it.
    Returns an OpenAI client, the examples by task, and the checkpoint's folder.
    """
    openai, folder = pytest.importorskip("openai"), tmp_path_factory.mktemp("served")
    rows = data.load("toy", "valid")
    examples = {task: next(row for row in rows if row.id.endswith(task)) for task in TASKS}
    data.write_jsonl(list(examples.values()), folder / "four.jsonl")
    file = f"jsonl:{folder / 'four.jsonl'}"
    flags = f"""--algo sft --train_file {file} --eval_file {file} --max_steps 20
    --train_batch_size 4 --learning_rate 1e-3 --eval_steps 20 --save_steps 20"""
    model, thinks = TOY, request.param == "thinks"
    if thinks:
        model = shutil.copytree(TOY, folder / "model")
        template = (TOY / "chat_template.jinja").read_text().rstrip().removesuffix("{% endif %}")
        opens = "{{ '' if enable_thinking is false else '<think>\n' }}{% endif %}"
        (model / "chat_template.jinja").write_text(template + opens)
    log = train(model, folder / "out", flags + " --allow_thinking" * thinks)
    assert log[-1]["eval/accuracy"] == 1
    checkpoint = folder / "out" / "checkpoint-20"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"""{sys.executable} -m vllm.entrypoints.openai.api_server --model {checkpoint}
    --served-model-name toy --host 127.0.0.1 --port {port} --generation-config vllm
    --enable-auto-tool-choice --tool-parser-plugin tools/vllm_tool_parser.py
    --tool-call-parser toolupt --max-model-len 2048 --max-num-seqs 4 --dtype float32"""
    limits = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    words = [*command.split(), *([] if torch.cuda.is_available() else ["--enforce-eager"])]
    with open(folder / "server.log", "w") as said:
        server = subprocess.Popen(
            words,
            cwd=REPO,
            env=os.environ | limits,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    try:
        for _ in range(900):
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            with contextlib.suppress(openai.APIConnectionError):
                client.models.list()
                break
            time.sleep(1)
        yield client, examples, checkpoint
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def request(example: data.Example) -> dict:
    """What a chat client sends to be where the example is."""
    messages = [{"role": role, "content": text} for role, text in example.history]
    messages.append({"role": "user", "content": example.query})
    for step, (call, observation) in enumerate(example.steps):
        calls = json.loads(call)
        calls = calls if isinstance(calls, list) else [calls]
        asked = [
            {"id": f"call-{step}-{i}", "type": "function",
             "function": {"name": one["name"], "arguments": json.dumps(one["params"])}}
            for i, one in enumerate(calls)
        ]  # fmt: skip
        messages.append({"role": "assistant", "content": None, "tool_calls": asked})
        messages.append({"role": "tool", "tool_call_id": asked[-1]["id"], "content": observation})
    tools = [{"type": "function", "function": one} for one in example.tools]
    return {"model": "toy", "messages": messages, "tools": tools}


def ask(client, example, **fields):
    """The client's first choice, greedy."""
    asked = request(example) | {"temperature": 0, "max_tokens": 100} | fields
    return client.chat.completions.create(**asked).choices[0]


def told(calls) -> list[dict]:
    return [
        {"name": call.function.name, "params": json.loads(call.function.arguments)}
        for call in calls or []
    ]


def expected(example) -> tuple[str, list[dict]]:
    """Content and calls of an example's target."""
    calls = rewards.parse(example.target).calls
    text = example.target.removeprefix("<answer>").removesuffix("</answer>").strip()
    return ("", calls) if calls else (text, [])


@needs_vllm
@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_the_server_reads_the_training_prompt(served, task):
    client, examples, checkpoint = served
    fields = request(examples[task]) | {"add_generation_prompt": True}
    address = str(client.base_url).replace("/v1/", "/tokenize")
    ids = httpx.post(address, json=fields, timeout=60).json()["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert ids == data.render(examples[task], tokenizer)
    plain = data.render(examples[task], AutoTokenizer.from_pretrained(TOY))
    assert tokenizer.decode(ids).removesuffix("<think>\n") == tokenizer.decode(plain)
    assert data.thinks(tokenizer) == tokenizer.decode(ids).endswith("<think>\n")


@needs_vllm
@pytest.mark.long
@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("task", TASKS)
def test_a_call_parallel_calls_a_result_sent_back_and_an_answer(served, task, choice):
    client, examples, _ = served
    answer = ask(client, examples[task], tool_choice=choice)
    content, calls = expected(examples[task])
    assert (answer.message.content or "", told(answer.message.tool_calls)) == (content, calls)
    assert len(calls) == {"single": 1, "second_step": 1, "done": 0}.get(task, len(calls))
    assert (len(calls) > 1) == (task == "parallel")
    if choice == "auto":  # vLLM reports "tool_calls" for whatever was required
        assert answer.finish_reason == ("tool_calls" if calls else "stop")


@needs_vllm
@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_streaming(served, task):
    client, examples, _ = served
    asked = request(examples[task]) | {"temperature": 0, "max_tokens": 100, "stream": True}
    content, found = "", {}
    for chunk in client.chat.completions.create(**asked):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for call in delta.tool_calls or []:
            name, arguments = found.get(call.index, ("", ""))
            name, arguments = name + (call.function.name or ""), arguments + call.function.arguments
            found[call.index] = name, arguments
    calls = [{"name": name, "params": json.loads(params)} for name, params in found.values()]
    assert (content, calls) == expected(examples[task])


@needs_vllm
@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_no_tag_reaches_the_client(served, task):
    """Without a choice, without tools, and where a response is cut off anywhere."""
    client, examples, _ = served
    whole, calls = expected(examples[task])
    unchosen = ask(client, examples[task], tool_choice="none").message
    assert (unchosen.content or "", unchosen.tool_calls) == (whole, None)
    plain = ask(client, examples[task], tools=None, messages=[{"role": "user", "content": "hello"}])
    assert not plain.message.tool_calls
    texts = [plain.message.content]
    for length in range(1, 20):
        cut = ask(client, examples[task], max_tokens=length)
        texts.append(cut.message.content)
        assert not calls or not told(cut.message.tool_calls) or cut.finish_reason == "tool_calls"
    assert not any(tag[:-1] in (text or "") for tag in data.TAGS[:6] for text in texts), texts
