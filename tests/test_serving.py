"""serving.py and tools/vllm_tool_parser.py: what a served checkpoint reads and writes is what training read and wrote."""

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import data
import serving

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
WHITE = "\n\n  {% for m in messages %}\n<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>\n  {% endfor %}\n"
OWN = {  # prompts of a user's own, with what might upset a template
    "system_prompt": 'Say {{ "no" }} {% raw %} \\ \' "to"\r\ntools:\t😀 é\n__TOOL_DESCS__\n__OTHER__ %}',
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
    properties = {"city": {"type": "string", "description": "Ünï <b>"}, "n": {"type": "integer"}}
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
                {"name": rng.choice("fg"), "arguments": {"city": say(), "n": rng.choice([1, 2.5, None])}}
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
    """The messages as transformers' documentation wants them and vLLM makes them: arguments as objects."""
    copy = json.loads(json.dumps(messages))
    for message in copy:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return copy


@pytest.mark.parametrize("base", [None, LLAMA, WHITE])
@pytest.mark.parametrize("prompts", [FIGURES, OWN])
def test_a_request_reads_as_the_training_prompt(base, prompts, monkeypatch):
    """At every assistant turn of random conversations: calls, parallel calls, later steps, answers; with a policy."""
    tokenizer, rng = toy_tokenizer(base), random.Random(0)
    serving.add_tool_template(tokenizer, **prompts)
    monkeypatch.setattr(data, "USER_PROMPT", prompts["user_prompt"])
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
            before = f"{policy}\n\n" * bool(policy)
            system = before + prompts["system_prompt"]  # which has no place for a policy
            if prompts is FIGURES:
                system = data.with_policy(policy)
            wanted = data.render(replace(example, system=system), tokenizer)
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
    assert (tmp_path / "chat_template.jinja").read_text() == (TOY / "chat_template.jinja").read_text()


def test_the_forms_in_which_clients_write_the_same():
    tokenizer = toy_tokenizer()
    serving.add_tool_template(tokenizer)
    full = tool("f")
    bare = {"name": "g", "description": None}
    example = data.Example("x/0/0", [full, {**bare, "description": "", "parameters": EMPTY}], [],
                           "a\nb", [('{"name": "g", "params": {}}', "done")], "", "answer",
                           data.with_policy("One.\n\nTwo."))  # fmt: skip
    call = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"function": {"name": "g"}}]}
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


@pytest.mark.parametrize("roles", ["user call", "user call user", "user tool", "user call tool user tool"])
def test_calls_and_results_that_do_not_match_are_errors(roles):
    tokenizer = toy_tokenizer()
    serving.add_tool_template(tokenizer)
    made = {
        "user": {"role": "user", "content": "hello"},
        "tool": {"role": "tool", "content": "done"},
        "call": {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    }
    with pytest.raises(Exception, match="a tool call without a result|without a tool call before"):
        tokenizer.apply_chat_template([made[r] for r in roles.split()], tools=[tool("f")])


def test_the_system_prompt_that_a_run_trained_with():
    toys = data.load("toy", "valid")[:3]
    figure = [replace(toys[0], system=data.with_policy(p)) for p in ("", "One.", "Two.")]
    assert serving.system_prompt_of(toys) == toys[0].system
    assert serving.system_prompt_of(figure) == data.SYSTEM_PROMPT
    assert serving.system_prompt_of([*toys, *figure, toys[0]]) == toys[0].system


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
    ("<ans<answer>wer>x</<tool_call</answer>>answer>", "x</<tool_call>answer>", []),
    ("<ans<answer>wer>y<<</answer>/answer>z", "yz"[:1] + "<z", []),
    ('<tool_call>\n{"name": "f", "params"\n</tool_call>', '{"name": "f", "params"', []),
    ('<tool_call>\n{"name": "f"}\n</tool_call>', '{"name": "f"}', []),
    ('<tool_call>\n{"name": "f", "par', '{"name": "f", "par', []),
    ("<tool_call>\n[]\n</tool_call>", "[]", []),
    ('<tool_call>\n{"name": "f", "params": {"a": NaN}}\n</tool_call>',
     '{"name": "f", "params": {"a": NaN}}', []),
    ('<tool_call>\n{"name": "f", "params": {"a": 1e999}}\n</tool_call>',
     '{"name": "f", "params": {"a": 1e999}}', []),
    ("<tool_call>\nno <answer>json</answer>\n</tool_call>\n<answer>so</answer>", "no json\n\nso", []),
]  # fmt: skip


def read_in_pieces(module, pieces):
    reader, content, calls = module.Reader(), "", []
    for piece in pieces:
        text, found = reader.feed(piece)
        content, calls = content + text, calls + found
    return content + reader.finish(), calls


@pytest.mark.parametrize("response, content, calls", CASES)
def test_a_response_in_every_split(parsers, response, content, calls):
    """As a whole, in every two pieces, character by character and in random pieces: always the same."""
    rng, n = random.Random(0), len(response)
    splits = [[response], list(response), *([response[:i], response[i:]] for i in range(n))]
    for _ in range(50):
        cuts = sorted(rng.sample(range(n + 1), min(n, rng.randint(1, 8))))
        splits.append([response[a:b] for a, b in zip([0, *cuts], [*cuts, n])])
    for pieces in splits:
        assert read_in_pieces(parsers, pieces) == (content, calls), pieces


def test_no_tag_in_any_text(parsers):
    """Random texts of tags, their halves and calls: content never holds a tag; streamed is whole."""
    rng = random.Random(0)
    halves = [tag[:i] for tag in parsers.TAGS for i in range(1, len(tag))]
    halves += [tag[i:] for tag in parsers.TAGS for i in range(1, len(tag))]
    atoms = [*parsers.TAGS * 6, *halves, *[" ", "\n", "x", "<"] * 4, json.dumps(F), json.dumps([F, G])]
    for _ in range(3000):
        text = "".join(rng.choices(atoms, k=rng.randint(1, 12)))
        content, calls = read_in_pieces(parsers, [text])
        assert not any(tag in content for tag in parsers.TAGS), text
        assert (content, calls) == read_in_pieces(parsers, text), text


@pytest.mark.parametrize("response, content, calls", CASES)
def test_the_parser_as_vllm_drives_it(parsers, response, content, calls):
    """vLLM's own parser around ours, token by token and whole, with and without tools to call."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    tokenizer = toy_tokenizer()
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
        shown = ""
        for place, token in enumerate(ids or [tokenizer.eos_token_id]):
            now = tokenizer.decode(ids[: place + 1]).rstrip("\ufffd")
            last = place + 1 >= len(ids)
            delta = parser.parse_delta(
                now[len(shown) :], [token], request, prompt_token_ids=[1], finished=last
            )
            shown = now
            text += (delta and delta.content) or ""
            for call in (delta and delta.tool_calls) or []:
                one = found.setdefault(call.index, [None, ""])
                one[0] = call.function.name or one[0]
                one[1] += call.function.arguments or ""
        assert text == content
        assert [(name, json.loads(arguments)) for name, arguments in found.values()] == kept
