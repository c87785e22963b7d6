"""What a checkpoint needs to be served: a chat template for requests with tools, and a model card.

    add_tool_template(tokenizer, system_prompt, user_prompt)   before the tokenizer is saved
    tool_use_template(base_template, system_prompt, user_prompt)
    model_card(run, step)                                       the README.md of a checkpoint

A chat client sends tools, messages, calls and tool results; the model was trained on a system and a
user message that hold all of them (data.messages). The template "tool_use" writes the one as the
other, in two parts: a preamble collects the fields of data.Example from the messages, as data.py
does from a conversation, and fills the two prompts; the model's own template follows unchanged and
sees those two messages only. transformers and vLLM take it when a request has tools, and the
default template, the model's own, otherwise.

    system, developer          the policy, before the descriptions of the tools (data.policy_place)
    user                       the query; an earlier one moves to the history
    assistant                  the answer: query and answer move to the history
    assistant with tool_calls  a call, to the steps; text beside it is dropped, as in training
    tool                       its observation; those of parallel calls share one, a line each

A call without a result, or a result without a call, is an error of the request. Tools are written
in the form that converters.py gives them. How such a checkpoint is served: docs/serving.md.
"""

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import data
from tools import show

TEMPLATE = "tool_use"  # the name that transformers and vLLM look for when there are tools

# Filled by tool_use_template; %-fields stand for Jinja expressions of the two prompts. Blocks trim
# the white space around them, so that the preamble writes nothing itself.
PREAMBLE = """\
{#- Writes tools and messages as the two messages that this model was trained on. -#}
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content -%}
{%- for part in content -%}{{- ("" if loop.first else "\\n") ~ part["text"] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set chat = namespace(policy=[], history=[], query="", steps=[], call=none, ids=[], told=[]) -%}
{%- for message in messages -%}
{%- set content = text_of(message["content"]) | trim -%}
{%- if chat.call and message["role"] != "tool" -%}
{{- raise_exception("a tool call without a result: send a message with role tool for each call") -}}
{%- endif -%}
{%- if message["role"] in ("system", "developer") -%}
{%- set chat.policy = chat.policy + [content] -%}
{%- elif message["role"] == "user" -%}
{%- if chat.query -%}{%- set chat.history = chat.history + ["user: " ~ chat.query] -%}{%- endif -%}
{%- set chat.query = content -%}
{%- elif message["role"] == "tool" -%}
{%- if not chat.call -%}
{{- raise_exception("a message with role tool without a tool call before it") -}}
{%- endif -%}
{%- set id = message["tool_call_id"] or none -%}
{%- if id and chat.ids | select | list and id not in chat.ids -%}
{{- raise_exception("a message with role tool whose tool_call_id no call before it has") -}}
{%- endif -%}
{%- set place = chat.ids.index(id) if id and id in chat.ids else chat.told | length -%}
{%- set before = chat.told | map(attribute="0") | select("equalto", place) | list -%}
{%- if id and before | length >= chat.ids | select("equalto", id) | list | length > 0 -%}
{{- raise_exception("two messages with role tool for one tool_call_id") -}}
{%- endif -%}
{%- set chat.told = chat.told + [[place, content]] -%}
{%- if chat.told | length == chat.ids | length -%}
{%- set result = chat.told | sort(attribute="0") | map(attribute="1") | join("\\n") -%}
{%- set chat.steps = chat.steps + [[chat.call, result]] -%}
{%- set chat.call = none -%}
{%- endif -%}
{%- elif message["role"] != "assistant" or message["function_call"] -%}
{{- raise_exception("roles are system, developer, user, assistant and tool; calls are tool_calls") -}}
{%- elif message["tool_calls"] -%}
{%- set calls = namespace(texts=[]) -%}
{%- set chat.ids = [] -%}
{%- set chat.told = [] -%}
{%- for call in message["tool_calls"] -%}
{%- set chat.ids = chat.ids + [call["id"] or none] -%}
{%- set call = call["function"] or call -%}
{%- set params = call["arguments"] or "{}" -%}
{%- set params = params if params is string else params | tojson -%}
{%- set name = call["name"] | tojson -%}
{%- set calls.texts = calls.texts + ['{"name": ' ~ name ~ ', "params": ' ~ params ~ '}'] -%}
{%- endfor -%}
{%- set chat.call = calls.texts | join(", ") -%}
{%- if calls.texts | length > 1 -%}{%- set chat.call = "[" ~ chat.call ~ "]" -%}{%- endif -%}
{%- elif content -%}
{%- if chat.query -%}{%- set chat.history = chat.history + ["user: " ~ chat.query] -%}{%- endif -%}
{%- set chat.history = chat.history + ["assistant: " ~ content] -%}
{%- set chat.query = "" -%}
{%- endif -%}
{%- endfor -%}
{%- if chat.call -%}
{{- raise_exception("a tool call without a result: send a message with role tool for each call") -}}
{%- endif -%}
{%- set listed = namespace(tools=[], steps=[]) -%}
{%- for tool in tools or [] -%}
{%- set tool = tool["function"] or tool -%}
{%- set schema = dict(tool["parameters"] or {}, type="object") -%}
{%- set schema = dict(schema, properties=schema["properties"] or {}) -%}
{%- set schema = dict(schema, required=schema["required"] or []) -%}
{%- set shown = {"name": tool["name"], "description": tool["description"] or ""} -%}
{%- set listed.tools = listed.tools + [dict(shown, parameters=schema) | tojson] -%}
{%- endfor -%}
{%- for step in chat.steps -%}
{%- set head = "Step-" ~ loop.index -%}
{%- set written = head ~ " tool call: " ~ step[0] ~ "\\n" ~ head ~ " observation: " ~ step[1] -%}
{%- set listed.steps = listed.steps + [written] -%}
{%- endfor -%}
{%- set policy = chat.policy | select | join("\\n\\n") -%}
{%- set system_content = %SYSTEM% -%}
{%- set user_content = %USER% -%}
{%- set messages = [{"role": "system", "content": system_content}] -%}
{%- set messages = messages + [{"role": "user", "content": user_content}] -%}
{%- set enable_thinking = %THINKING% -%}
{%- set tools = none %}
"""
FIELDS = {
    "TOOL_DESCS": '(listed.tools | join("\\n"))',
    "POLICY": '(policy ~ "\\n\\n" if policy else "")',
    "HISTORY": '(chat.history | join("\\n"))',
    "QUERY": "chat.query",
    "STEPS": '(listed.steps | join("\\n"))',
}


def tool_use_template(
    base_template: str, system_prompt: str, user_prompt: str, thinking: bool = False
) -> str:
    """Return a Jinja template that renders a request with tools as `data.render` does an Example.

    base_template  the model's own chat template
    system_prompt  template with __TOOL_DESCS__; the request's system text goes where
                   data.policy_place puts a policy
    user_prompt    template with __HISTORY__, __QUERY__ and __STEPS__
    thinking       whether the prompt asks for thoughts
    """
    place = data.policy_place(system_prompt)
    prompts = {"%SYSTEM%": _concatenation(place), "%USER%": _concatenation(user_prompt)}
    prompts["%THINKING%"] = str(thinking).lower()
    preamble = re.sub("|".join(prompts), lambda match: prompts[match[0]], PREAMBLE)
    # The preamble's last block ends without a dash: it takes its own line break and no other.
    return preamble + base_template


def add_tool_template(
    tokenizer, system_prompt: str = data.SYSTEM_PROMPT, user_prompt: str = data.USER_PROMPT
) -> None:
    """Give the tokenizer, and so what it saves, the template "tool_use" beside its own one."""
    templates = tokenizer.chat_template
    templates = dict(templates) if isinstance(templates, dict) else {"default": templates}
    prompts, thinking = (system_prompt, user_prompt), data.thinks(tokenizer)
    templates[TEMPLATE] = tool_use_template(templates["default"], *prompts, thinking)
    tokenizer.chat_template = templates


def system_prompt_of(examples: list[data.Example]) -> str:
    """Return the system template of most examples."""
    return Counter(example.system for example in examples).most_common(1)[0][0]


def model_card(run, step: int) -> str:
    """Return the README.md of a run's checkpoint, with the header that the Hugging Face Hub reads."""
    settings, examples = run.records.settings, run.examples
    base, algo = run.command.model_name_or_path, settings["algo"]  # not that of the last stage
    kinds = Counter((example.id.partition("/")[0], example.kind) for example in examples)
    data_rows = "\n".join(
        f"| {source} | {kinds[source, 'tool_call']:,} | {kinds[source, 'answer']:,} |"
        for source in dict.fromkeys(source for source, _ in kinds)
    )
    scores = show.milestones(run.out)
    score_rows = "\n".join(f"| {name} | {accuracy:.1%} |" for name, accuracy in scores)
    of_steps = f" of {settings['max_steps']}" if "max_steps" in settings else ""
    on_hub = not Path(base).exists()
    base_model = f"base_model: {base}\n" * on_hub
    thoughts = "Thoughts, `<think>...</think>`, may come first.\n\n" * data.thinks(run.tokenizer)
    method = type(run.method).__doc__.partition("\n")[0]
    return f"""---
pipeline_tag: text-generation
library_name: transformers
tags: [tool-use]
{base_model}---
# {base if on_hub else Path(base).name}, post-trained for tool use with {algo}

- Base model: {base}
- Method: {algo}: {method}
- Step {step}{of_steps}, seed {settings["seed"]}
- Commit: {this_commit()}

| training data | tool calls | answers |
|---|---|---|
{data_rows}

| accuracy on held-out examples | |
|---|---|
{score_rows}

Trained by

    {shlex.join(["python", *sys.argv])}

{thoughts}\
A response is `<tool_call>JSON</tool_call>` or `<answer>text</answer>`. The chat
template `{TEMPLATE}`, which transformers and vLLM take when a request has tools,
writes the prompt that the model was trained on:

    tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
"""


def this_commit() -> str:
    """Return the commit of this repository, with "-dirty" where files differ; else "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _concatenation(template: str) -> str:
    """Return the Jinja expression of a prompt with __NAME__ fields: literals and fields, joined."""
    parts = re.split(r"(__[A-Z_]+?__)", template)
    names = [part.strip("_") for part in parts]
    # JSON's escapes are Python's, and so Jinja's; characters beyond ASCII stay as they are.
    literal = lambda part: json.dumps(part, ensure_ascii=False)
    return " ~ ".join(
        FIELDS[name] if f"__{name}__" == part and name in FIELDS else literal(part)
        for part, name in zip(parts, names)
        if part
    )
