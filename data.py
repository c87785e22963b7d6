"""Raw tool-use data -> single-step Examples, ToolUPT's prompt, splits, iTool's choice of data.

    load_source("xlam:FILE@10000")  one Example per assistant turn, call or text (ToolUPT App. A)
    render(example, tokenizer)      system prompt (Figure 5) and user prompt (Figure 6) as token ids
    target_ids(example, tokenizer)  <tool_call>..</tool_call> or <answer>..</answer>, and the end of
                                    the assistant's turn
    difficulty, select_complex      iTool's warm-up stages (Sec. 3.1) and replay buffer (Eq. 4)

    python data.py stats SOURCE... [--name NAME] [--tokenizer FOLDER]    Table 6, drops and lengths
    python data.py convert SOURCE OUT.jsonl [--name NAME]                one Example per line

A source is [NAME:]PATH[@ROWS]: a file (.json, .jsonl, their .gz, .parquet) or a folder of such, the
layout of its rows (guessed row by row where it is not named), and how many of them to sample.
docs/data.md shows a row of every layout. Nothing is downloaded.
tasks/converters.py turns a raw row into a Conversation; `convert` cuts it into steps, so that all
datasets share one rule for history, tool steps and drops. What is left out is counted under a
reason that starts with its unit: "row: ", "turn: " (one example) or "text: " (prose beside a call).

Where the papers are silent, or we depart from them (the datasets' own points: tasks/converters.py):
 1. Tool steps of earlier rounds stay in the prompt, numbered on. Figure 6 shows the current query's
    only, but then up to 28 % of the calls have an argument that the prompt holds nowhere.
 2. APIGen-MT's policy, without which targets cannot be inferred, precedes the tool descriptions.
 3. Its `think` calls stay in the context but are not targets: an exact reward cannot judge prose.
 4. Prose beside a call is dropped: the format has room for one of the two.
 5. Answers of the irrelevance set are ours (NO_TOOL): the set holds none.
 6. Examples with one of our tags inside a text are dropped; exact repetitions are kept once.
 7. iTool's definitions of easy, medium and hard overlap: hard wins, then easy.
 8. A row of our own form with a mistake is an error; any other row that cannot be parsed is dropped.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import rewards
from tasks.converters import (
    CONVERTERS,
    Conversation,
    Drop,
    Repeated,
    bare,
    guess,
    holds_call,
    json_object,
    looks_like_call,
    unpadded,
)

# ToolUPT Figure 5, verbatim.
SYSTEM_PROMPT = """## Role
You are a helpful assistant skilled at using tools to solve user tasks.

## Task Definition
Based on the [User Query] and [Chat Short Memory] (user, assistant, etc.), and with reference to the [Intermediate Tools Calls and Returns], plan the tools necessary to solve the current [User Query]. If multiple tools are required, only need to output the tool names and parameter values for the first tool or the first group of tools that could be called in parallel!

## Available Tools Description
__TOOL_DESCS__

## Overall Response Format:
MUST choose one of the following two:
### Tool Usage
<tool_call>
If a tool is needed, specify the tool's name and parameter values
</tool_call>
### Answer Appropriately
<answer>
If an answer is needed, summary or ask user for necessary information
</answer>

## Tool Usage Output Requirements
For each tool call, return a json object with tool name and parameters within <tool_call> </tool_call> XML tags
### Format Requirements
1. When a single tool is required, the tool call must include the tool's name and parameter values. If no parameters are needed, leave the 'params' field an empty dictionary. The format is:
<tool_call>
{"name": "Tool name", "params": {"Parameter name": "Parameter value", "...": "..."}}
</tool_call>
2. When a single tool or multiple tools can be called IN PARALLEL, enclose each call in [], with tools separated by ', '. The format is:
<tool_call>
[{"name": "Tool-1 name", "params": {"Parameter name": "Parameter value", "...": "..."}}, {"name": "Tool-2 name", "params": {"Parameter name": "Parameter value", "...": "..."}}, ...]
</tool_call>
### Content Requirements
1. In the tool description, "required" corresponds to the list of mandatory parameters. Do not extract optional parameters that are not in this list and are not mentioned in the input content!

## Answer Output Requirements
When one of the following conditions is met, response an answer directly within <answer> </answer> XML tags
1. When all tools related to the current task have been called, summarize the tool returns and deliver a comprehensive response
2. When no available tool can fulfill the user request, point out that the requested task cannot be achieved due to lack of tools
3. When the value of the tool's required input parameter is missing, ambiguous, or cannot be inferred from the context, ask for clarifications

## Important Notes
1. Response at most one of <tool_call> or <answer>"""

# iTool's form of the response, Python calls (ToolACE): `--format python` of eval.py. The words are ours.
PYTHON_PROMPT = """## Role
You are a helpful assistant skilled at composing function calls to solve user tasks.

## Task Definition
Based on the [User Query] and [Chat Short Memory], and with reference to the [Intermediate Tools Calls and Returns], make one or more function calls to achieve the purpose of the current [User Query].

## Available Tools Description
__TOOL_DESCS__

## Response Format
If you call functions, answer with nothing but the calls, in this form:
[func_name1(param_name1=param_value1, param_name2=param_value2), func_name2(param_name1=param_value1)]
If no function fits, or a required parameter is missing and cannot be inferred, or nothing is left to call, answer in plain words instead."""

# ToolUPT Figure 6; `messages` writes its lines "user: ..", "assistant: ..", "Step-1 tool call: ..".
USER_PROMPT = """[Chat Short Memory]
__HISTORY__

[User Query]
__QUERY__

[Intermediate Tools Calls and Returns]
__STEPS__

[Response]
"""

# Answers for the irrelevance set; %s is the first sentence of the query.
NO_TOOL = (
    'None of the available tools can handle "%s". I cannot complete it without a suitable tool.',
    'I am sorry, but I have no tool for "%s", so this task cannot be done here.',
    'The request "%s" is outside what the tools I was given can do.',
    'To answer "%s" I would need a tool that is not in the list.',
    'This cannot be achieved because no tool at hand covers it: "%s".',
    'I checked the available tools and none of them fits "%s".',
)

# name -> hub repository and the file expected
SOURCES = {
    "hermes": ("NousResearch/hermes-function-calling-v1", "glaive-function-calling-5k.json"),
    "toolace": ("Team-ACE/ToolACE", "data.json"),
    "xlam": ("Salesforce/xlam-function-calling-60k", "xlam_function_calling_60k.json"),
    "apigen-mt": ("Salesforce/APIGen-MT-5k", "apigen-mt_5k.json"),
    "funreason-mt": ("Bingguang/FunReason-MT", "bfcl_multi_turn.json"),
    "hammer": ("MadeAgents/xlam-irrelevance-7.5k", "xlam-7.5k-irrelevancek.json"),
}
# How a chat template writes a prompt; reasoning models have it close the block that holds thoughts,
# unless `allow_thinking`.
PROMPT = {"add_generation_prompt": True, "enable_thinking": False}
THOUGHTS = "thought_opening"  # in tokenizer_config.json: what `allow_thinking` writes
PLACEHOLDERS = {
    "system": ("__TOOL_DESCS__",),
    "user": ("__HISTORY__", "__QUERY__", "__STEPS__"),
}
PROMPT_FILE = "{}_prompt.txt"  # beside a checkpoint that was trained with a prompt of one's own
TOY_SIZES = {"train": 4096, "valid": 512, "test": 512}
# reasons to leave out a call that could be read: these do not count as lost
HARMLESS = {"turn: exact repetition", "turn: think call"}
NAMES = [*CONVERTERS, "jsonl", "toy", "bfcl_half"]
DATA_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
TAGS = ["<tool_call>", "</tool_call>", "<answer>", "</answer>", "<think>", "</think>", "[Response]"]


@dataclass(frozen=True)
class Example:
    """One decision of the model: a prompt and the expert's response."""

    id: str  # "<dataset>/<row>/<turn>": turns of a row stay together in `split`
    tools: list[dict]  # {"name", "description", "parameters": JSON schema}
    history: list[tuple[str, str]]  # earlier rounds: (role "user" | "assistant", text)
    query: str  # the current user message
    steps: list[tuple[str, str]]  # (call text, observation text) of all rounds, oldest first
    target: str  # tagged text without EOS
    kind: str  # "tool_call" | "answer"
    system: str = SYSTEM_PROMPT  # template that holds __TOOL_DESCS__, perhaps __POLICY__
    user: str = USER_PROMPT  # template that holds __HISTORY__, __QUERY__ and __STEPS__
    policy: str = ""  # the data's own system text; `policy_place` says where it stands


class Loaded(NamedTuple):
    """What a source holds: Table 6's three sizes, and what became of the rows."""

    examples: list[Example]  # processed size: their number
    drops: Counter  # what was left out, by reason
    layouts: Counter  # rows by layout
    original: int  # rows of the files
    sampled: int  # rows taken from them


def load(name: str | None, path: str | Path | None = None, *, seed: int = 0) -> list[Example]:
    """Return the examples of a dataset; one line on stderr says what was left out.

    name  a key of tasks.converters.CONVERTERS (hermes, toolace, openai, ...), "jsonl" (ours), "toy" or
          "bfcl_half"; None: the layout of each row is guessed
    path  file or folder, FILE@ROWS to sample rows; toy: "train" | "valid" | "test" | "hard-train" ...;
          bfcl_half: "train" | "test"
    seed  of the toy world, of the halves, of the rows sampled, and of the choice among the answers
          of "hammer"
    ValueError or FileNotFoundError: unknown name, missing, broken or foreign file, nothing left.
    """
    loaded = _load(name, path, seed)
    if loaded.drops:
        count = f"{len(loaded.examples)} examples"
        listing = _listing(loaded.drops)
        _say(f"data: {name or path}: {count}; left out: {listing}")
    return loaded.examples


def load_source(source: str, *, seed: int = 0) -> list[Example]:
    """Return the examples of NAME, NAME:PATH or PATH, of PATH@ROWS a sample of rows.

    "toy", "toy:hard-train", "bfcl_half:test", "my_chats.jsonl", "xlam:xlam_function_calling_60k.json@10000"
    """
    return load(*_named(source), seed=seed)


def read_rows(path: str | Path) -> list:
    """Return the rows of a data file, or of all data files of a folder and its subfolders."""
    return [row for _, rows in _read_files(path) for row in rows]


def read_jsonl(path: str | Path, *, growing: bool = False) -> Iterator:
    """Yield the value of each line of a .jsonl or .jsonl.gz file; ValueError names a broken line.

    growing  the file is a run's record: it may not exist yet, and a last line that a crash or a
             write in progress cut short is left out

    Lines end with a line feed alone: str.splitlines would also cut at U+2028, which JSON texts hold.
    """
    if growing and not Path(path).exists():
        return
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if growing and not line.endswith("\n"):
                return
            try:
                if line.strip():
                    yield json.loads(line, object_pairs_hook=json_object)
            except (ValueError, RecursionError) as error:
                why = f"is not JSON ({error}); each line must be one whole JSON value"
                raise ValueError(f"line {number} of {path} {why}") from None


def convert(name: str | None, rows: list, *, seed: int = 0) -> tuple[list[Example], Counter]:
    """Return the examples of raw rows and what was left out, by reason.

    name  a key of CONVERTERS; "jsonl", where a bad row is a ValueError and not a drop; None: guessed
    """
    examples, drops, *_ = _convert(name, ((n, "rows", n + 1, r) for n, r in enumerate(rows)), seed)
    return examples, drops["rows"]


def write_jsonl(examples: list[Example], path: str | Path) -> None:
    """Write one Example per line, without what is as usual, Figure 5 say; load("jsonl") reads it."""
    usual = {field.name: field.default for field in fields(Example)}
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            row = {name: x for name, x in vars(example).items() if x != usual[name]}
            file.write(_dumps(row) + "\n")


def messages(example: Example) -> list[dict]:
    """Return the chat of an example: system message (Figure 5) and user message (Figure 6).

    Tools stand one JSON object per line. Figure 6's sections are always there, perhaps empty.
    """
    steps = "\n".join(
        f"Step-{i} tool call: {call}\nStep-{i} observation: {observation}"
        for i, (call, observation) in enumerate(example.steps, 1)
    )
    history = "\n".join(f"{role}: {text}" for role, text in example.history)
    tools = "\n".join(map(_dumps, example.tools))
    policy = f"{example.policy}\n\n" if example.policy else ""
    system = _fill(policy_place(example.system), TOOL_DESCS=tools, POLICY=policy)
    user = _fill(example.user, HISTORY=history, QUERY=example.query, STEPS=steps)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


@lru_cache
def policy_place(template: str = SYSTEM_PROMPT) -> str:
    """Return the system template with __POLICY__, which stands for a policy and an empty line, or nothing.

    Where it does not have one: before the lines, up to an empty one, that lead to __TOOL_DESCS__.
    """
    if "__POLICY__" in template:
        return template
    head, tools, rest = template.partition("__TOOL_DESCS__")
    before, gap, lines = head.rpartition("\n\n")
    return f"{before}{gap}__POLICY__{lines}{tools}{rest}"


def read_prompts(
    model: str | Path, system_file: str | None = None, user_file: str | None = None
) -> dict[str, str]:
    """Return the own prompts among "system" and "user": a file's, else those saved with the model.

    ValueError names the file and the placeholder that it lacks, or that nothing fills.
    """
    found = {}
    for part, file in (("system", system_file), ("user", user_file)):
        path = Path(file or Path(model) / PROMPT_FILE.format(part))
        if file and not path.is_file():
            raise ValueError(f"--{part}_prompt {file}: no such file")
        if path.is_file():
            text = found[part] = path.read_text(encoding="utf-8")
            needed = PLACEHOLDERS[part]
            if missing := [name for name in needed if name not in text]:
                raise ValueError(f"{path} lacks {', '.join(missing)}; it needs {', '.join(needed)}")
            known = (*needed, "__POLICY__") if part == "system" else needed
            if unknown := {*re.findall(r"__[A-Z_]+?__", text)} - {*known}:
                names = ", ".join(sorted(unknown))
                raise ValueError(f"{path}: nothing fills {names}; it may hold {', '.join(known)}")
    return found


def with_prompts(example: Example, prompts: dict[str, str]) -> Example:
    """Return the example with other templates for its messages; the policy stays."""
    return replace(example, **prompts) if prompts else example


def render(example: Example, tokenizer) -> list[int]:
    """Return the token ids of the prompt, up to and including the header of the assistant's turn.

    tokenizer  transformers tokenizer; ValueError if it has no chat template
    """
    _check_template(tokenizer)
    options = PROMPT | {"enable_thinking": thinks(tokenizer)}
    return list(tokenizer.apply_chat_template(messages(example), return_dict=False, **options))


def target_ids(example: Example, tokenizer) -> list[int]:
    """Return the token ids of `no_thoughts` and of the target, then those of `turn_end`."""
    ids = tokenizer(example.target, add_special_tokens=False)["input_ids"]
    return [*no_thoughts(tokenizer), *ids, *turn_end(tokenizer)]


def special_tokens(tokenizer) -> dict[int, str]:
    """Return the special tokens by id, those too that no field of the tokenizer names (Llama 3.1)."""
    added = tokenizer.added_tokens_decoder
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    return named | {i: str(token) for i, token in added.items() if token.special}


def turn_end(tokenizer) -> list[int]:
    """Return the ids with which the chat template closes an assistant turn.

    What it writes between a response and the next user message, up to and including the EOS, or
    else the first special token: <|im_end|>, <|eot_id|>, <end_of_turn>, and <|user|> where a turn
    has no end of its own (GLM). Without a special token there, the EOS; ValueError if there is none
    either.
    """
    _check_template(tokenizer)
    turns = [("user", "Turn-1"), ("assistant", "Turn-2"), ("user", "Turn-3")]
    chat = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    between = text.partition("Turn-2")[2].partition("Turn-3")[0]
    special = special_tokens(tokenizer)
    ids = tokenizer(between, add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    ends = {eos} if eos in ids else special
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    if eos is None:
        raise ValueError(
            "the chat template closes a turn with no special token and the tokenizer has no EOS; "
            "set eos_token to the token that ends a turn"
        )
    return [eos]


def check_turn_end(tokenizer, stop_ids: list[int]) -> None:
    """Raise ValueError unless the end of a target is one of the ids that end a response."""
    end = turn_end(tokenizer)[-1]
    if end not in stop_ids:
        name = tokenizer.convert_ids_to_tokens(end)
        raise ValueError(
            f"the chat template closes a turn with {name} (id {end}), but the model's responses end "
            f"with {tokenizer.convert_ids_to_tokens(stop_ids)} only: they would never stop. Copy "
            f'the model and write "eos_token_id": {sorted([*stop_ids, end])} in the copy\'s '
            "generation_config.json"
        )


def allow_thinking(tokenizer) -> None:
    """Let prompts ask for thoughts, which rollout.text_of then cuts before a response is judged.

    The mark is in tokenizer_config.json wherever the tokenizer is saved, so that evaluation and
    serving follow it: what the prompt has written of the block, "<think>\\n" say, or "".
    """
    tokenizer.init_kwargs[THOUGHTS] = thought_opening(tokenizer, enable_thinking=True)


def thinks(tokenizer) -> bool:
    """Return whether thoughts are allowed."""
    return THOUGHTS in tokenizer.init_kwargs


def thought_opening(tokenizer, *, enable_thinking: bool = False) -> str:
    """Return the <think> and white space at the end of the prompts that a chat template writes, or ""."""
    chat, options = [{"role": "user", "content": "Hi."}], {"enable_thinking": enable_thinking}
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, **PROMPT | options)
    return prompt[prompt.rindex("<think>") :] if prompt.rstrip().endswith("<think>") else ""


def no_thoughts(tokenizer) -> list[int]:
    """Return the ids before an expert response where thoughts are allowed: a block without any.

    As Qwen3 writes it; what the prompt opens is only closed.
    """
    if not thinks(tokenizer):
        return []
    block = "\n</think>\n\n" if tokenizer.init_kwargs[THOUGHTS] else "<think>\n\n</think>\n\n"
    return tokenizer(block, add_special_tokens=False)["input_ids"]


def check_thinking(tokenizer) -> None:
    """Raise ValueError where prompts open a block of thoughts that are not allowed."""
    if not thinks(tokenizer) and thought_opening(tokenizer):
        raise ValueError(
            "the chat template opens a <think> block in every prompt and does not know "
            "enable_thinking=False: responses would start inside it, and none would have the form "
            "that the reward asks for. Take --allow_thinking, which cuts thoughts before a response "
            "is judged, or an instruct model"
        )


def template_digest(tokenizer) -> str:
    """Return a hash of a fixed prompt's token ids: of what chat template and tokenizer do to a prompt."""
    return _hash(render(Example("", [], [], "Hi.", [], "", "answer"), tokenizer))[:16]


def tag_length(tokenizer) -> int:
    """Return how many first tokens of an answer target hold its tag "<answer>" (Eq. 19).

    With `no_thoughts` before it. The last may hold the newline too: byte-pair encodings merge ">\\n".
    """
    count = len(tokenizer("<answer>", add_special_tokens=False)["input_ids"])
    ids = tokenizer("<answer>\nYes.\n</answer>", add_special_tokens=False)["input_ids"]
    kept = tokenizer.decode(ids[:count])
    if not kept.startswith("<answer>"):
        raise ValueError(f"{count} tokens of an answer are {kept!r}, not its tag; other tokenizer?")
    return len(no_thoughts(tokenizer)) + count


def fit(
    examples: list[Example], tokenizer, max_prompt_length: int, max_completion_length: int
) -> tuple[list[Example], Counter]:
    """Return the examples that fit, and what was left out; nothing is ever truncated.

    max_prompt_length      most tokens of `render` (ToolUPT Table 7: 8192)
    max_completion_length  most tokens of `target_ids` (ToolUPT Table 7: 1024)

    Only texts that might be too long are tokenized, so that training starts soon.
    """
    kept, drops = [], Counter()
    room = max_completion_length - len(no_thoughts(tokenizer)) - len(turn_end(tokenizer))
    options = PROMPT | {"enable_thinking": thinks(tokenizer)}
    for start in range(0, len(examples), 256):  # batches tokenize in parallel; only lengths stay
        batch = examples[start : start + 256]
        chats, targets = [messages(e) for e in batch], [e.target for e in batch]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, **options)
        fits = zip(_fit(prompts, max_prompt_length, tokenizer), _fit(targets, room, tokenizer))
        for example, (prompt_fits, target_fits) in zip(batch, fits, strict=True):
            if prompt_fits and target_fits:
                kept.append(example)
            elif prompt_fits:
                drops[f"turn: target longer than {max_completion_length} tokens"] += 1
            else:
                drops[f"turn: prompt longer than {max_prompt_length} tokens"] += 1
    return kept, drops


def subset(examples: list[Example], fraction: float, seed: int = 0) -> list[Example]:
    """Return a share of the examples, whole conversations, in their order: iTool's Figures 1(b), 8, 9.

    fraction  in (0, 1]; the smaller of two shares with one seed is part of the larger
    ValueError where nothing would be left.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a share of {fraction} of the training data; choose one in (0, 1]")
    rows = defaultdict(list)
    for index, example in enumerate(examples):
        rows[_row(example)].append(index)
    order, taken = sorted(rows), []
    random.Random(seed).shuffle(order)
    for row in order:
        if len(taken) + len(rows[row]) > fraction * len(examples) + 1e-9:
            break
        taken += rows[row]
    if not taken:
        size = f"{len(examples)} examples"
        raise ValueError(f"a share of {fraction} of {size} holds no conversation; raise it")
    return [examples[index] for index in sorted(taken)]


def digest(examples: Iterable[Example]) -> str:
    """Return a hash of what was read, 16 hexadecimal digits: equal for the same examples in the same order."""
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps(vars(example)).encode())
    return total.hexdigest()[:16]


def split(
    examples: list[Example],
    fraction: float,
    seed: int = 0,
    *,
    ties: Callable[[Example], Iterable] = lambda example: (),
) -> tuple[list[Example], list[Example]]:
    """Return two parts that share no conversation; the first holds at most `fraction` of all.

    Rows stay whole, and rows that ask the same stay together: some sets repeat one chat under
    several tool lists, and irrelevance queries are xLAM queries. "The same" is the opening message
    or a later one of 12 words: shorter ones ("yes, please go ahead") would join whole datasets.
    fraction  in (0, 1); ValueError where a part would be empty
    ties      what an example must not share with the other part, beside that: hashable things
    """
    groups, first = _groups(examples, ties), set()
    random.Random(seed).shuffle(groups)
    room = round(fraction * len(examples))
    for group in groups:
        if len(group) <= room - len(first):
            first.update(group)
    if not 0 < len(first) < len(examples):
        sizes = f"{len(examples)} examples in {len(groups)} groups"
        remedy = "add data, raise --eval_fraction, or give a file of its own (--eval_file)"
        raise ValueError(f"cannot split {sizes} at {fraction}: a part would be empty; {remedy}")
    if len(first) < 0.9 * room:
        _say(f"data: split: {len(first)} of {room} examples; groups are large")
    parts = [], []
    for index, example in enumerate(examples):
        parts[index not in first].append(example)
    return parts


def bfcl_halves(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Return BFCL-Live in halves that share no query, no tool and no accepted call: iTool's BFCL-half (Table 5).

    Each holds live AST, irrelevance and relevance cases; the target is the first accepted answer,
    "" where BFCL accepts none (4 defects of its data, and relevance, which has no answers).
    ImportError with the remedy where bfcl-eval is missing.
    """
    from tasks import bfcl

    examples = []
    for entry in (entry for name in bfcl.GROUPS["live"] for entry in bfcl.entries(name)):
        asked = bfcl.question(entry)
        id = f"bfcl_half/{entry.id}/0"
        calls, text, kind = bfcl.accepted(entry), "", "tool_call"
        if entry.category == "live_irrelevance":
            text, kind = _no_tool(asked["query"], f"{seed}/{id}"), "answer"
        elif calls:
            text = _call_text(calls)
        target = text and f"<{kind}>\n{text}\n</{kind}>"
        examples.append(Example(id, **asked, target=target, kind=kind))
    return split(examples, 0.5, seed, ties=_live_ties)


def _live_ties(example):
    """Tools, whatever their case and punctuation; BFCL's number of the tool list; the accepted call."""
    yield re.search(r"(live_\w+)_\d+-(\d+)-", example.id).groups()
    for tool in example.tools:
        yield tuple(re.findall(r"\w+", json.dumps(tool, sort_keys=True).casefold()))
    if example.kind == "tool_call" and example.target:
        yield example.target


def difficulty(num_tools: int, tools_chars: int, num_calls: int) -> str:
    """Return iTool's warm-up stage "easy" | "medium" | "hard" (Sec. 3.1).

    num_tools    candidate tools
    tools_chars  characters of the tool list as JSON
    num_calls    calls of the expert in the sample
    """
    assert min(num_tools, tools_chars, num_calls) >= 0, (num_tools, tools_chars, num_calls)
    if num_tools >= 4 or tools_chars > 2000 or num_calls >= 4:
        return "hard"
    if num_tools <= 1 and tools_chars < 1000 and num_calls <= 1:
        return "easy"
    return "medium"


def sizes(example: Example) -> tuple[int, int, int]:
    """Return what `difficulty` looks at: tools, characters of their JSON, calls of the target."""
    calls = rewards.parse(example.target).calls or []
    return len(example.tools), len(_dumps(example.tools)), len(calls)


def characters(example: Example) -> int:
    """Return the length of the prompt's texts, a cheap guess at its tokens."""
    return sum(len(message["content"]) for message in messages(example))


def select_complex(
    perplexities: list[float], is_call: list[bool] | None, fraction: float = 0.1
) -> list[int]:
    """Return the indices of the highest perplexities (iTool Eq. 4), ascending.

    perplexities  (N,), of the target alone; ties: lower index
    is_call       (N,) bool; calls and texts are ranked apart, for texts would mostly win; None: not
    fraction      share taken of each, at least one where there is any
    """
    values = [float(value) for value in perplexities]
    flags = [True] * len(values) if is_call is None else [bool(flag) for flag in is_call]
    assert len(flags) == len(values), (len(flags), len(values))
    assert 0 < fraction <= 1, fraction
    assert not any(map(math.isnan, values)), values
    chosen = []
    for kind in (True, False):
        ranked = sorted((-value, i) for i, value in enumerate(values) if flags[i] is kind)
        count = max(1, math.floor(fraction * len(ranked) + 1e-9))  # 0.29 * 100 = 28.999999999999996
        chosen += [i for _, i in ranked[:count]]
    return sorted(chosen)


def statistics(loaded: Loaded, tokenizer=None) -> str:
    """Return a text in the style of ToolUPT's Table 6: counts, drops, shares and lengths."""
    examples = loaded.examples
    kinds, stages, prompts, targets = Counter(), Counter(), [], []
    for example in examples:
        tools, chars, calls = sizes(example)
        kinds[("answer", "single call", "parallel calls")[min(calls, 2)]] += 1
        stages[difficulty(tools, chars, calls)] += 1
        prompts.append(len(render(example, tokenizer)) if tokenizer else characters(example))
        targets.append(len(target_ids(example, tokenizer) if tokenizer else example.target))
    per_row = f"processed {len(examples)}  per row {len(examples) / loaded.sampled:.2f}"
    lines = [f"original {loaded.original}  sampled {loaded.sampled}  {per_row}"]
    lines += [f"left out {count:6d}  {reason}" for reason, count in loaded.drops.most_common()]
    for title, counts in (("shares", kinds), ("difficulty", stages)):
        shares = (f"{key} {100 * n / len(examples):.1f} %" for key, n in counts.most_common())
        lines.append(f"{title:10s} {'  '.join(shares)}")
    for title, lengths in (("prompt", prompts), ("target", targets)):
        ranked = sorted(lengths)
        p50, p95 = (ranked[math.ceil(q * len(ranked)) - 1] for q in (0.5, 0.95))
        unit = "tokens" if tokenizer else "characters"
        lines.append(
            f"{title:10s} {unit} p50 {p50}  p95 {p95}  max {ranked[-1]}  sum {sum(ranked)}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: stats and convert."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    stats = commands.add_parser("stats", help="counts, drops and lengths of raw files")
    to_jsonl = commands.add_parser("convert", help="raw file -> one Example per line")
    for command, number in ((stats, "+"), (to_jsonl, 1)):
        command.add_argument("sources", nargs=number, metavar="SOURCE", help="[NAME:]PATH[@ROWS]")
        command.add_argument("--name", choices=[*CONVERTERS, "jsonl"], help="guessed if absent")
        command.add_argument("--seed", type=int, default=0, help="of the rows sampled")
    stats.add_argument("--tokenizer", help="folder of a tokenizer with a chat template")
    to_jsonl.add_argument("out", metavar="OUT.jsonl")
    options, tokenizer, totals = parser.parse_args(arguments), None, Counter()
    if options.command == "stats" and options.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    for source in options.sources:
        name, path = (options.name, source) if options.name else _named(source)
        loaded = _load(name, path, options.seed)
        mixed = [f"{layout} {count}" for layout, count in loaded.layouts.items()]
        print(f"{source}  ({', '.join(mixed if len(mixed) > 1 else loaded.layouts)})")
        print(statistics(loaded, tokenizer))
        totals["original"] += loaded.original
        totals["sampled"] += loaded.sampled
        totals["processed"] += len(loaded.examples)
        if options.command == "convert":
            write_jsonl(loaded.examples, options.out)
    if len(options.sources) > 1:
        print("together\n" + "  ".join(f"{size} {count}" for size, count in totals.items()))


def _named(source: str) -> tuple[str | None, str | None]:
    """Return the NAME and PATH of a source; either may be absent."""
    name, _, path = source.partition(":")
    return (name, path or None) if name in NAMES else (None, source)


def _load(name: str | None, path: str | Path | None, seed: int) -> Loaded:
    """Return what a source holds; ValueError where nothing is left, or a file lost all its calls.

    A model trained on the rest of such a file would never call.
    """
    if name in ("toy", "bfcl_half"):
        made = (_toy if name == "toy" else _bfcl_half)(str(path or "train"), seed)
        examples, rows = [example for example in made if example.target], len(made)
        drops = +Counter({"row: BFCL accepts no answer": rows - len(examples)})
        return Loaded(examples, drops, Counter({name: rows}), rows, rows)
    if name not in [*NAMES, None]:
        raise ValueError(f"unknown dataset {name!r}; choose one of {', '.join(NAMES)}")
    path, wanted, expected = _find(name, path)
    files = _read_files(path, expected)
    rows = [(file, line, row) for file, found in files for line, row in enumerate(found, 1)]
    sampled = len(rows) if wanted is None else wanted
    if not 0 < sampled <= len(rows):
        size = f"{len(rows)} rows; sample 1 to {len(rows)} of them"
        raise ValueError(f"{path} holds {size}, not @{wanted}")
    chosen = range(len(rows))
    if wanted:
        chosen = sorted(random.Random(seed).sample(chosen, wanted))
    examples, drops, layouts, lost = _convert(name, [(n, *rows[n]) for n in chosen], seed)
    if not layouts:  # no row of a known one: guess says why
        try:
            guess(rows[0][-1])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if lost:
        named = ", ".join(f"{file} ({_listing(drops[file])})" for file in lost)
        remedy = (
            "docs/data.md shows the layouts and forms of call that are read; NAME:FILE names one"
        )
        raise ValueError(f"no row with a call could be read in {named}; {remedy}")
    all_drops = sum(drops.values(), Counter())
    if not examples:
        form = f" as {name!r}" if name else ""
        remedy = "without a NAME the layout is guessed; docs/data.md shows what is read"
        raise ValueError(
            f"no example of {path} could be read{form} ({_listing(all_drops)}); {remedy}"
        )
    return Loaded(examples, all_drops, layouts, len(rows), sampled)


def _find(name: str | None, path: str | Path | None) -> tuple[str, int | None, str | None]:
    """Return an existing path, the rows to sample (None: all), and the file that NAME expects."""
    repo, expected = SOURCES.get(name, (None, None))
    remedy = f"give a file ({', '.join(DATA_FILES)}), a folder, NAME or NAME:FILE; NAME is one of "
    remedy += ", ".join(NAMES)
    if repo:
        remedy = f"get {expected} and pass its path: huggingface-cli download {repo} {expected}"
        remedy += " --repo-type dataset --local-dir . (in newer clients `hf download ...`)"
    if path is None:
        raise ValueError(f"dataset {name!r} needs the path of its file; {remedy}")
    path, wanted = str(path), None
    if not Path(path).exists() and (sample := re.fullmatch(r"(.+)@(\d+)", path)):
        path, wanted = sample[1], int(sample[2])
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; {remedy}")
    return path, wanted, expected


def _convert(
    name: str | None, rows: Iterable[tuple[int, object, int, object]], seed: int
) -> tuple[list[Example], dict[object, Counter], Counter, list]:
    """Return the examples, what each file lost, rows by layout, and the files that lost all calls.

    rows  (number, which stands in ids; file; line of the file; row)
    """
    examples, drops, layouts, seen = [], defaultdict(Counter), Counter(), set()
    read, lost = Counter(), Counter()  # calls of each file
    for number, file, line, row in rows:
        try:
            layout = name or guess(row)
        except (ValueError, RecursionError):
            drops[file]["row: unknown layout"] += 1
            lost[file] += holds_call(row)
            continue
        layouts[layout] += 1
        if layout == "jsonl":
            examples.append(_own(row, f"{file}: row {line}"))
            read[file] += examples[-1].kind == "tool_call"
            continue
        try:
            conversation = CONVERTERS[layout](row)
            steps = _steps(f"{layout}/{number}", conversation, seed)
            if not steps:
                raise Drop("no assistant turn")
            common = _hash([conversation.tools, conversation.policy])
            hashes = [
                e and _hash([common, e.history, e.query, e.steps, e.target]) for e, _ in steps
            ]
        except (Drop, RecursionError) as error:
            drops[file][f"row: {error if isinstance(error, Drop) else 'nested too deep'}"] += 1
            lost[file] += holds_call(row)
            continue
        for (example, refusal), mark in zip(steps, hashes, strict=True):
            if not refusal and mark in seen:
                refusal = "turn: exact repetition"
            if example is None or example.kind == "tool_call":
                (lost if refusal and refusal not in HARMLESS else read)[file] += 1
            if refusal:
                drops[file][refusal] += 1
            else:
                seen.add(mark)
                examples.append(example)
    return examples, drops, layouts, [file for file in lost if lost[file] and not read[file]]


def _listing(drops: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in drops.most_common())


def _fit(texts: list[str], limit: int, tokenizer) -> list[bool]:
    """Return whether each text has at most `limit` tokens.

    A token stands for at least one character of an ASCII text, which no normalisation lengthens
    (beyond one blank in front): a text of fewer than `limit` characters fits unread.
    """
    fits = [text.isascii() and len(text) < limit for text in texts]
    unsure = [i for i, sure in enumerate(fits) if not sure]
    if unsure:
        ids = tokenizer([texts[i] for i in unsure], add_special_tokens=False)["input_ids"]
        for i, tokens in zip(unsure, ids, strict=True):
            fits[i] = len(tokens) <= limit
    return fits


def _steps(
    row: str, conversation: Conversation, seed: int
) -> list[tuple[Example | None, str | None]]:
    """Return one (example, why it is refused or None) per assistant turn.

    A turn, once made, is context of the next one; lists are replaced and never changed, for
    examples share them. A call in a markup that is not read ends the conversation: no later prompt
    could show it.
    """
    tools, turns, policy, only_last = conversation
    names = [tool["name"] for tool in tools]
    history, steps, query, call, found = [], [], "", None, []
    for turn, (role, content) in enumerate(turns):
        after = turns[turn + 1][0] if turn + 1 < len(turns) else None
        if call and role != "observation":
            raise Drop("call without observation")
        if role == "user":
            history, query = history + [("user", query)] * bool(query), content
        elif role == "observation":
            if call:
                steps, call = [*steps, (call, content)], None
            elif turn and turns[turn - 1][0] == role:  # one message per parallel call
                steps = [*steps[:-1], (steps[-1][0], f"{steps[-1][1]}\n{content}")]
            else:
                raise Drop("observation without call")
        else:
            kind = "tool_call" if role in ("call", "think") else "answer"
            beside = kind == "answer" and after in ("call", "think")
            if role == "assistant" and not beside and looks_like_call(content, names):
                later = sum(role in ("assistant", "call", "think") for role, _ in turns[turn + 1 :])
                found.append((None, "turn: call in a markup that is not read"))
                found += [(None, "turn: after a call that is not read")] * later
                break
            if kind == "tool_call":
                text = call = _call_text(content)
            else:
                text = content if role == "assistant" else _no_tool(query, f"{seed}/{row}")
            target = f"<{kind}>\n{text}\n</{kind}>"
            example = Example(
                f"{row}/{turn}", tools, history, query, steps, target, kind, policy=policy
            )
            if not (only_last and after):
                found.append((example, _refusal(example, text, role, beside)))
            if kind == "answer" and text and not beside:
                history = [*history, *[("user", query)] * bool(query), ("assistant", text)]
                query = ""
    return found


def _refusal(example: Example, text: str, role: str, beside: bool) -> str | None:
    """Return why a step is no training example, or None."""
    pairs = example.history + example.steps
    texts = [text, example.query, *(part for pair in pairs for part in pair)]
    if beside:
        return "text: prose beside a call"
    if role == "think":
        return "turn: think call"
    if not example.query:
        return "turn: no user query"
    if not text:
        return "turn: empty answer"
    if any(tag in part for part in texts for tag in TAGS):
        return "turn: a tag inside a text"
    try:
        rewards.binary(example.target, example.target)
    except ValueError:  # a call of more than rewards.MAX_CHARS, say
        return "turn: a target that the reward cannot read"
    return None


def _hash(value) -> str:
    """Return a hash of a JSON value; Drop for text that no tokenizer can read."""
    try:
        return hashlib.sha256(_dumps(value).encode()).hexdigest()
    except UnicodeEncodeError:
        raise Drop("lone surrogate in a text") from None


def _call_text(calls: list[dict]) -> str:
    """Return calls as a target holds them: one object, or a list of several."""
    return _dumps(calls[0] if len(calls) == 1 else calls)


def _no_tool(query: str, seed: str) -> str:
    """Return an answer that names what cannot be done, drawn from NO_TOOL by `seed`."""
    sentence = re.split(r"(?<=[.!?])\s", query, maxsplit=1)[0].rstrip(".!? ")
    words = sentence.split()
    wish = sentence if len(words) <= 30 else " ".join(words[:30]) + " ..."
    return random.Random(seed).choice(NO_TOOL) % wish


def _toy(split_name: str, seed: int) -> list[Example]:
    from tasks import toy

    size = TOY_SIZES.get(split_name.rpartition("-")[2], 0)
    return [Example(**row) for row in toy.generate(split_name, size, seed=seed)]


def _bfcl_half(part: str, seed: int) -> list[Example]:
    if part not in ("train", "test"):
        raise ValueError(f"bfcl_half has no part {part!r}: train or test")
    return bfcl_halves(seed)[part == "test"]


def _own(row, place: str) -> Example:
    """Return the Example that `write_jsonl` wrote; ValueError with its place if it is none."""
    remedy = "docs/data.md shows rows; data.write_jsonl writes them"
    try:
        if isinstance(row, Repeated):
            raise ValueError("a key is written twice")
        if type(row) is not dict:
            raise ValueError(f"{str(row)[:80]!r} is not an object")
        if not row.get("target"):
            raise ValueError("it has no target, the expert response, which every method needs")
        needed = {field.name: field.default is MISSING for field in fields(Example)}
        if missing := [name for name in needed if needed[name] and name not in row]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        if unknown := [name for name in row if name not in needed]:
            raise ValueError(f"nothing reads {', '.join(unknown)}; it may hold {', '.join(needed)}")
        pairs = {key: [_pair(key, item) for item in row[key]] for key in ("history", "steps")}
        wrapped = row["tools"] if type(row["tools"]) is list else [None]
        example = Example(**{**row, **pairs, "tools": [bare(tool) for tool in wrapped]})
        texts = [text for pair in example.history + example.steps for text in pair]
        texts += [x for name, x in vars(example).items() if name not in {*pairs, "tools"}]
        if {*map(type, texts)} != {str} or not all(isinstance(t, dict) for t in example.tools):
            raise ValueError("a field of the wrong type")
        if roles := {role for role, _ in example.history} - {"user", "assistant"}:
            raise ValueError(f"history with the role {min(roles)!r}, not user or assistant")
        for part, names in PLACEHOLDERS.items():
            if missing := [name for name in names if name not in getattr(example, part)]:
                raise ValueError(f"{part} without {missing[0]}")
        if example.kind not in ("tool_call", "answer"):
            raise ValueError(f"kind {example.kind!r}, not tool_call or answer")
        tag = f"<{example.kind}>", f"</{example.kind}>"
        if not (example.target.startswith(tag[0]) and example.target.endswith(tag[1])):
            raise ValueError("target without the tags of its kind")
        rewards.binary(example.target, example.target)  # refuses what no response could match
        _hash(row)
    except (Drop, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not a valid line: {error}; {remedy}") from None
    return example


def _pair(key: str, item) -> tuple[str, str]:
    """Return a round of the history or a step: exactly two texts, nothing that merely unpacks into two."""
    if type(item) is not list or len(item) != 2:
        form = '["user", "text"]' if key == "history" else '["call", "observation"]'
        raise ValueError(f"{key} holds {str(item)[:80]!r}, not {form}")
    return tuple(item)


def _groups(examples: list[Example], ties: Callable[[Example], Iterable]) -> list[list[int]]:
    """Return the indices of the examples in groups that must stay together (union-find)."""
    parent = {}

    def root(node):
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for example in examples:
        row = ("row", _row(example))
        said = [text for role, text in example.history if role == "user"] + [example.query]
        said = [re.findall(r"\w+", text.casefold()) for text in said]
        for words in [said[0], *(words for words in said[1:] if len(words) >= 12)]:
            parent[root(row)] = root(("query", *words))
        for tie in ties(example):
            parent[root(row)] = root(("tie", tie))
    groups = defaultdict(list)
    for index, example in enumerate(examples):
        groups[root(("row", _row(example)))].append(index)
    return list(groups.values())


def _row(example: Example) -> str:
    """Return the "<dataset>/<row>" of an id; an id of another form is a row of its own."""
    return example.id.rpartition("/")[0] if example.id.count("/") > 1 else example.id


def _say(text: str) -> None:
    """A line on stderr, once however many ranks read the data."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def _read_files(path: str | Path, expected: str | None = None) -> list[tuple[Path, list]]:
    """Return (file, rows) of a data file, or of those of a folder, and say what was passed over there."""
    path = Path(path)
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file()]
        inside = sorted(f for f in inside if "/." not in f"/{f.relative_to(path).as_posix()}")
        files = [file for file in inside if file.name.removesuffix(".gz") == expected]
        files = files or [file for file in inside if file.name.lower().endswith(DATA_FILES)]
        # a repository of data also holds JSON files that are no rows
        found = [(file, rows) for file in files if type(rows := _read(file)) is list]
        read = {file for file, _ in found}
        passed = [str(file.relative_to(path)) for file in inside if file not in read]
        more = f" and {len(passed) - 8} more" if len(passed) > 8 else ""
        if passed:
            _say(f"data: {path}: passed over {', '.join(passed[:8])}{more}")
    else:
        rows = _read(path)
        if type(rows) is not list:
            form = f"a JSON {type(rows).__name__}, not a list of rows"
            raise ValueError(f"{path} is {form}; name it .jsonl if it is one row")
        found = [(path, rows)]
    if not any(rows for _, rows in found):
        remedy = f"give a file or folder that does ({', '.join(DATA_FILES)})"
        raise ValueError(f"{path} holds no rows; {remedy}")
    return found


def _read(file: Path):
    """Return the JSON value of a file, the rows of one in lines; ValueError names file and remedy."""
    name = file.name.lower()
    if not name.endswith(DATA_FILES):
        raise ValueError(f"{file} is none of {', '.join(DATA_FILES)}; convert it first")
    try:
        if name.endswith(".parquet"):
            return _read_parquet(file)
        if ".jsonl" in name[-9:]:
            return list(read_jsonl(file))
        with _open(file) as opened:
            text = opened.read()
    except UnicodeDecodeError as error:
        coding = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "ITS_ENCODING"
        remedy = f"convert it: iconv -f {coding} -t UTF-8 OLD > NEW"
        raise ValueError(f"{file} is not UTF-8 ({error}); {remedy}") from None
    except (EOFError, OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error  # without the path
        raise ValueError(f"{file} cannot be read ({reason}); is it whole?") from None
    try:
        return json.loads(text, object_pairs_hook=json_object)
    except (ValueError, RecursionError) as error:
        remedy = "name it .jsonl if each line is an object; else, is it whole?"
        raise ValueError(f"{file} is not JSON ({error}); {remedy}") from None


def _open(file: str | Path):
    """Return a text file, open for reading, compressed or not."""
    opener = gzip.open if str(file).lower().endswith(".gz") else open
    return opener(file, "rt", encoding="utf-8-sig")


def _read_parquet(file: Path) -> list[dict]:
    """Return the rows of a Parquet file, without the nulls that pad its nested objects."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{file} is Parquet; to read it: pip install pyarrow") from None
    try:
        batches = parquet.ParquetFile(file).iter_batches()
        rows = [row for batch in batches for row in batch.to_pylist(maps_as_pydicts="strict")]
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        why = f"is not Parquet that can be read ({str(error).partition(chr(10))[0]})"
        raise ValueError(f"{file} {why}; is it whole?") from None
    return [{key: unpadded(value) for key, value in row.items()} for row in rows]


def _check_template(tokenizer) -> None:
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        remedy = "use an instruct model or set tokenizer.chat_template"
        raise ValueError(f"tokenizer {name!r} has no chat template; {remedy}")


def _fill(template: str, **values: str) -> str:
    """Return the template with its __NAME__ filled in one pass: inserted text is not expanded."""
    return re.sub(r"__([A-Z_]+?)__", lambda match: values.get(match[1], match[0]), template)


def _dumps(value) -> str:
    """Return JSON in the one form used everywhere: default separators, no escapes, no NaN."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise Drop("NaN or Infinity") from None
    except TypeError:  # dates and bytes, which Parquet holds
        raise Drop("a value that is not JSON") from None


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
