"""A pretrained model on real data: methods from one start, measured before, during and after.

    python bench/real.py --minutes 60             the run of RECIPE; goes on where it stopped
    python bench/real.py --engine transformers --model_name_or_path DIR --max_steps 40 --jobs 1
    python bench/real.py --status                 where it is, from another terminal
    python bench/real.py --collect bench/real.json  the record so far, and its picture real.png
    python bench/real.py --draw bench/real.json   picture and README's table of a record

Flags that are not listed under --help go to train.py, which every arm calls as a user would, on
top of --recipe.

1. The model as published is measured on the test rows and on BFCL (eval.py).
2. The common start. The published model has the skill without the habit: in its own tokenizer
   `<tool_call>` is one token, whose probability as the first is about 1e-9, so that all rewards of
   a group are equal and RL has nothing to learn from. SFT (batches, loss and optimiser of
   `train.py --algo sft`, at a constant rate) goes on until a tenth of the calls sampled at
   temperature 1 are right, and a tenth of all responses: N steps, the least that do (of every
   --probe_every). Probed are the training prompts that SFT meets last.
3. The arms (ARMS), each with the same number of updates, prompts and responses, one seed, and one
   learning rate for all RL methods. `sft` goes on with its own rate; *_published are single-stage,
   from the model as published; *_strong have SPO as the study of readings found it strongest.
4. Each arm's last checkpoint is measured like 1. Nothing is selected on the test rows.

When --minutes are over no new work begins: arms save, leave and are measured as they are, and the
same command goes on later. Arms side by side share the card, so the seconds of one say little about
its cost alone; the record says who ran when.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median

import common
import torch
from common import REPO, data
from paper import Process

import checkpoint
import metrics
import model as modeling
import records
import start
import train
from methods import Sft
from run import Run, sync

RECIPE = "recipes/qwen2.5-coder-0.5b.args"
STRONG = "@recipes/strong-spo.args"
ARMS = {  # name -> --algo, the model that it begins with, flags
    "toolupt": ("toolupt", "start", ""),
    "toolupt_strong": ("toolupt", "start", STRONG),
    "dapo_star": ("dapo_star", "start", ""),
    "sft": ("sft", "start", ""),
    "fg_dapo_star": ("fg_dapo_star", "start", ""),
    "toolupt_published": ("toolupt", "published", ""),
    "toolupt_strong_published": ("toolupt", "published", STRONG),
}
COLOURS = {
    "toolupt": "#d62728",
    "toolupt_strong": "#ff7f0e",
    "dapo_star": "#bcbd22",
    "sft": "#1f77b4",
    "fg_dapo_star": "#17becf",
    "toolupt_published": "#9467bd",
    "toolupt_strong_published": "#e377c2",
}
CONSTANT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}  # SFT's arm goes on as it began
SAMPLES = 4  # responses to a probed prompt
BFCL_CASES = 10  # the first of each single-turn category
# exit codes after SIGTERM and Ctrl-C: all is saved, or nothing had begun
INTERRUPTED = (143, 130, -15, -2)


# --------------------------------------------------------------------------------------- the start


def common_start(args: argparse.Namespace) -> None:
    """SFT until --start_share of the samples are right; writes OUT/start and OUT/start.jsonl."""
    own = {"output_dir": str(args.output_dir / "sft-of-start"), "save_total_limit": 1}
    config = replace(shared(args), learning_rate=args.sft_learning_rate, **CONSTANT, **own)
    start.init_distributed()
    run = Run(config, Sft())
    run.load()
    probed = [example for _, example in run.batch(0, size=len(run.examples))][-args.probe :]
    rows = open(args.output_dir / "start.jsonl", "w")  # noqa: SIM115 - open to the end
    for step in range(args.start_steps + 1):
        if step % args.probe_every == 0 or step == args.start_steps:
            sync(run)
            row = {"step": step, **sampled(run, probed)}
            records.write(rows, row)
            print(row, flush=True)
            if min(row["calls"], row["all"]) >= args.start_share or step == args.start_steps:
                break
            run.engine.sleep()
        batch = [run.demonstration(example) for _, example in run.batch(step)]
        totals = train.count_tokens(config, run, batch)
        stats = train.imitate(config, run, batch, totals)
        run.optimizer_step(config.learning_rate, stats["loss"], batch)
    modeling.save(run.model, run.tokenizer, args.output_dir / "start")


def sampled(run: Run, examples: list) -> dict:
    """Shares of SAMPLES responses per example that are completely right: calls, answers, all."""
    groups = run.engine.generate(
        [data.render(example, run.tokenizer) for example in examples],
        n=SAMPLES,
        temperature=1.0,
        max_tokens=run.config.max_completion_length,
        seeds=[run.config.seed + i for i in range(len(examples))],
    )
    texts = [sample.text for group in groups for sample in group]
    found = run.reward.tally(texts, [example for example in examples for _ in range(SAMPLES)])
    others = found["n"] - found["n_calls"]
    return {
        "all": found["accuracy"] / found["n"],
        "calls": found["tool_calls"] / max(1, found["n_calls"]),
        "answers": found["answers"] / max(1, others),
        "reward": found["reward"] / found["n"],
        "n": [found["n_calls"], others],
    }


# -------------------------------------------------------------------------------------- the driver


def drive(args: argparse.Namespace) -> None:
    """Start what can start, `jobs` arms and two measurements at a time, until all is done."""
    alone = shared(args).engine == "vllm" and torch.cuda.is_available()
    if alone and args.jobs > 1:
        raise ValueError(
            f"--jobs {args.jobs}: vLLM takes all that is free of a GPU, so that one run at a time "
            "fits: --jobs 1, or --engine transformers"
        )
    if args.bfcl and not find_spec("bfcl_eval"):
        raise ValueError("--bfcl needs bfcl-eval: make eval-deps; or give --bfcl no category")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lock = checkpoint.lock(args.output_dir)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    end, running, failed, last_start = time.time() + 60 * args.minutes, {}, set(), 0.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine = common.machine() | ({"commit": args.commit} if args.commit else {})
    note(args, "begin", "all", command=sys.argv[1:], minutes=args.minutes, machine=machine)
    asked = False
    try:
        while True:
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    note(args, "end", name, code=process.returncode, seconds=process.seconds())
                    if process.returncode not in (0, *INTERRUPTED):
                        failed.add(name)
                    elif name in ARMS and reached(args, name) == args.max_steps:
                        for state in (args.output_dir / name).glob("checkpoint-*-state"):
                            shutil.rmtree(state)  # nothing goes on from here
            over = time.time() > end
            if over and not asked:
                asked = True
                for name in [name for name in running if name in ARMS]:
                    running[name].send_signal(signal.SIGTERM)
            wanted = [w for w in work(args, over) if w[0] not in running and w[0] not in failed]
            for name, argv in wanted:
                arms = sum(name in ARMS for name in running)
                measured = sum(name.startswith("eval/") for name in running)
                if alone and running:
                    break
                soon = time.time() < last_start + args.stagger
                if name in ARMS and (arms >= args.jobs or soon):
                    continue
                if name.startswith("eval/") and measured >= 2:
                    continue
                running[name] = Process(argv, log_of(args, name), threads)
                note(args, "start", name, command=argv, beside=[n for n in running if n != name])
                last_start = time.time() if name in ARMS else last_start
            if not running and not wanted:
                break
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for name, process in running.items():
            process.wait()
            note(args, "end", name, code=process.returncode, seconds=process.seconds())
        note(args, "stop", "all", failed=sorted(failed))
        lock.close()
    for name in sorted(failed):
        print(f"{name} failed: the end of its log {log_of(args, name)} says why", file=sys.stderr)
    sys.exit(1 if failed else 0)


def work(args: argparse.Namespace, over: bool) -> list[tuple[str, list[str]]]:
    """(name, command line) of all that is left and can begin now, in the order in which it should.

    over  the time is over: only what has been trained is measured
    """
    found, origin = [], args.output_dir / "start"
    ready = {"published": True, "start": (origin / "config.json").exists()}
    needed = [arm for arm in args.arms if reached(args, arm) < args.max_steps]
    if not over:
        if not ready["start"] and any(ARMS[arm][1] == "start" for arm in args.arms):
            found.append(("start", ["bench/real.py", *args.argv, "--only_start"]))
        for arm in needed:
            if not ready[ARMS[arm][1]]:
                break  # an arm further down must not take its place
            found.append((arm, arm_command(args, arm)))
    for arm in args.arms:
        if (step := reached(args, arm)) and (step == args.max_steps or over):
            last = args.output_dir / arm / f"checkpoint-{step}"
            found += measurements(args, f"{arm}-{step}", last)
    if ready["start"]:
        found += measurements(args, "start", origin)
    return found + measurements(args, "published", shared(args).model_name_or_path)


def arm_command(args: argparse.Namespace, arm: str) -> list[str]:
    """train.py's command line for an arm."""
    algo, origin, more = ARMS[arm]
    own = {"output_dir": args.output_dir / arm, "max_steps": args.max_steps}
    own |= {"resume_from_checkpoint": "latest"}
    if origin == "start":
        own["model_name_or_path"] = args.output_dir / "start"
    if algo == "sft":
        own |= {"learning_rate": args.sft_learning_rate, **CONSTANT}
    if algo == "toolupt":  # two cycles, a third of each rising (Eq. 23)
        own["balance_up"] = max(1, args.max_steps // 6)
        own["balance_down"] = max(1, args.max_steps // 2 - own["balance_up"])
    flags = [str(x) for name, value in own.items() for x in (f"--{name}", value)]
    return ["train.py", "--algo", algo, f"@{args.recipe}", *args.typed, *flags, *more.split()]


def measurements(
    args: argparse.Namespace, name: str, model: Path | str
) -> list[tuple[str, list[str]]]:
    """eval.py's command lines for what of a model is not measured yet."""
    config, found = shared(args), []
    benches = {"file": f"--file {config.eval_file[0]} --max_model_len 4096"}
    if args.bfcl:
        cases = f"--categories {' '.join(args.bfcl)} --limit {BFCL_CASES}"
        benches["bfcl"] = f"{cases} --max_model_len 8192"
    for bench, flags in benches.items():
        out = args.output_dir / "eval" / f"{name}-{bench}"
        if not (out / "report.md").exists():
            flags = f"--engine {config.engine} --max_num_seqs 64 --max_tokens 512 {flags}".split()
            own = ["--bench", bench, "--output_dir", str(out)]
            own += ["--dtype", "bfloat16"] * config.bf16
            found.append((f"eval/{name}-{bench}", ["eval.py", str(model), *flags, *own]))
    return found


def reached(args: argparse.Namespace, arm: str) -> int:
    """The step of an arm's newest whole checkpoint; 0: none."""
    paths = (args.output_dir / arm).glob("checkpoint-*/config.json")
    steps = (path.parent.name.split("-")[1] for path in paths)
    return max((int(step) for step in steps if step.isdigit()), default=0)


def log_of(args: argparse.Namespace, name: str) -> Path:
    return args.output_dir / "logs" / f"{name.replace('/', '-')}.txt"


def note(args: argparse.Namespace, event: str, name: str, **more) -> None:
    """A line of OUT/events.jsonl: who ran when, beside whom."""
    with open(args.output_dir / "events.jsonl", "a") as file:
        row = {"time": round(time.time(), 1), "event": event, "name": name, **more}
        records.write(file, row)
    print(f"{datetime.now():%H:%M:%S} {event} {name} {more.get('code', '')}", flush=True)


def read(path: Path) -> list[dict]:
    """The whole lines of a .jsonl file that may still be written; none where it does not exist."""
    return list(data.read_jsonl(path, growing=True))


def status(args: argparse.Namespace) -> str:
    """Where the run is: probes, and each arm's step, seconds per update and last scores."""
    lines, ended = [], {}
    for row in read(args.output_dir / "events.jsonl"):
        ended[row["name"]] = row if row["event"] == "end" else None
    for row in read(args.output_dir / "start.jsonl")[-3:]:
        right = f"calls {row['calls']:.1%}, all {row['all']:.1%}"
        lines.append(f"start, step {row['step']}: sampled right: {right}")
    for arm in args.arms:
        rows = read(args.output_dir / arm / "metrics.jsonl")[1:]
        if not rows:
            continue
        text = f"{arm}: step {rows[-1]['step']} of {args.max_steps}"
        if seconds := [row["timing_s/step"] for row in rows[-10:] if "timing_s/step" in row]:
            text += f", {median(seconds):.2f} s per update"
        scores = [row for row in rows if row.get("eval/accuracy") is not None]
        for row in scores[:1] + scores[-1:]:
            text += f"; after {row['step']}: {row['eval/accuracy']:.1%}"
        if rewards := [row["reward"] for row in rows[-10:] if "reward" in row]:
            text += f"; reward {mean(rewards):.2f}"
        lines.append(text)
    for name, row in ended.items():
        if row is None and name != "all":
            lines.append(f"running: {name}")
        elif row and row["code"] not in (0, *INTERRUPTED):
            end = log_of(args, name).read_text()[-1500:]
            lines.append(f"FAILED: {name}, exit code {row['code']}\n{end}")
        elif row:
            lines.append(f"ended: {name}, {row['seconds']} s")
    return "\n".join(lines) or f"nothing in {args.output_dir} yet"


# -------------------------------------------------------------------------------------- the record


def collect(args: argparse.Namespace) -> None:
    """Write the record --collect and its picture."""
    out, config = args.output_dir, shared(args)
    events = read(out / "events.jsonl")
    runs = [arm for arm in args.arms if len(read(out / arm / "metrics.jsonl")) > 1]
    models = ("published", "start", *(f"{arm}-{reached(args, arm)}" for arm in runs))
    with ProcessPoolExecutor(max(1, min(len(runs), os.cpu_count() or 1))) as pool:
        rollouts = dict(zip(runs, pool.map(read_rollouts, [out / arm for arm in runs])))
    begun = [row for row in events if row["event"] == "begin"]
    beside = f"up to {args.jobs} arms and two measurements ran side by side on one machine"
    share = f"{args.start_share:.0%} of sampled calls and of all samples are right"
    record = {
        "machines": [row["machine"] for row in begun],
        "commands": [f"python bench/real.py {' '.join(row['command'])}" for row in begun],
        "hours": round(hours(events), 3),
        "notes": [f"{beside}: see `beside`", *args.note],
        "model": config.model_name_or_path,
        "seed": config.seed,
        "data": {name: checksum(name) for name in (*config.train_file, *config.eval_file)},
        "start": {
            "rule": f"the least N, of every {args.probe_every}, at which {share}",
            "probe": f"{args.probe} training prompts, {SAMPLES} samples each, temperature 1",
            "learning_rate": args.sft_learning_rate,
            "steps": read(out / "start.jsonl"),
        },
        "arms": {arm: arm_record(args, arm, events, rollouts[arm]) for arm in runs},
        "evaluations": {name: found for name in models if (found := evaluation(args, name))},
        "examples": responses(args, models),
    }
    numbers = lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]"
    text = json.dumps(record, indent=1, ensure_ascii=False)
    args.collect.parent.mkdir(parents=True, exist_ok=True)
    args.collect.write_text(re.sub(r"\[\s+([-\d.,\seEnul]*?)\s+\]", numbers, text) + "\n")
    print(draw(args.collect))


def hours(events: list[dict]) -> float:
    """Hours that the driver ran, over all its starts."""
    total, begun = 0.0, None
    for row in events:
        if row["event"] == "begin":
            begun = row["time"]
        total += row["time"] - (begun or row["time"])
        begun = row["time"]
    return total / 3600


def checksum(source: str) -> str:
    """sha256 of the file of NAME:FILE; what stands there, where it is no file."""
    path = REPO / Path(source.partition(":")[2] or source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "generated"


def arm_record(args: argparse.Namespace, arm: str, events: list[dict], rollouts: dict) -> dict:
    """An arm: its command, its seconds and beside whom, and its metrics as columns over steps."""
    config, *rows = read(args.output_dir / arm / "metrics.jsonl")
    own = [row for row in events if row["name"] == arm]
    commands = [f"python {' '.join(row['command'])}" for row in own if row["event"] == "start"]
    kept = ("time", "event", "beside", "seconds", "code")
    steps = [row for row in rows if row["step"]]
    before = [row for row in rows if not row["step"]][:1]
    curve = [row for row in rows if row.get("eval/accuracy") is not None]
    apart = ("eval/", "timing_s", "perf/")
    names = sorted({name for row in steps for name in row if not name.startswith(apart)})
    rounded = lambda x: x if x is None or isinstance(x, (int, str)) else float(f"{x:.4g}")
    seconds = defaultdict(list)
    for row in steps:
        for name in row:
            if name.startswith("timing_s/"):
                seconds[name[9:]].append(row[name])
    return {
        "algo": ARMS[arm][0],
        "from": ARMS[arm][1],
        "updates": rows[-1]["step"],
        "command": commands[-1] if commands else None,
        "runs": [{key: row[key] for key in kept if key in row} for row in own],
        "median_seconds": {name: rounded(median(values)) for name, values in seconds.items()},
        "config": config,
        "curve": {
            name: [rounded(row.get(name)) for row in curve]
            for name in ("step", *sorted(name for name in curve[0] if name.startswith("eval/")))
        },
        "before": {k: v for row in before for k, v in row.items() if k.startswith("start/")},
        "metrics": {name: [rounded(row.get(name)) for row in steps] for name in names},
        "rollouts": rollouts,
    }


def read_rollouts(folder: Path) -> dict:
    """What an arm's rollouts tell, as columns over steps; {} where there are none.

    The columns are the metrics of metrics.shares, of runs too that did not log them yet.
    """
    sums = defaultdict(Counter)
    alignment = read(folder / "metrics.jsonl")[0].get("alignment", "positional")
    for row in data.read_jsonl(folder / "rollouts.jsonl", growing=True):
        first, right = row["advantages"][:1], row["outcome"]["total"] == 4
        one = [row["token_ids"]], [row["text"]], [right], first, alignment
        sums[row["step"]].update(metrics.tally(row["kind"], row["target_ids"], *one))
    steps = sorted(sums)
    found = [metrics.shares(sums[step]) for step in steps]
    names = sorted({name for row in found for name in row})
    rounded = lambda x: None if x is None else round(x, 4)
    columns = {name: [rounded(row.get(name)) for row in found] for name in names}
    return {"step": steps, **columns} if steps else {}


def evaluation(args: argparse.Namespace, name: str) -> dict:
    """[right, n] of what eval.py found for a model, by kind of test row and by category of BFCL."""
    found = {}
    for bench in ("file", "bfcl"):
        counts = defaultdict(lambda: [0, 0])
        folder = args.output_dir / "eval" / f"{name}-{bench}"
        for row in read(folder / "results.jsonl") if (folder / "report.md").exists() else []:
            counts[row["category"]][0] += bool(row["correct"])
            counts[row["category"]][1] += 1
        if counts:
            found[bench] = dict(counts)
    return found


def responses(args: argparse.Namespace, models: tuple[str, ...]) -> list[dict]:
    """All models' responses to the first test rows with a single call, parallel calls, an answer."""
    found = {}
    for name in models:
        chosen = {}
        for row in read(args.output_dir / "eval" / f"{name}-file" / "results.jsonl"):
            parallel = row["target"].startswith("<tool_call>\n[")
            chosen.setdefault("parallel calls" if parallel else row["category"], row)
        for kind, row in chosen.items():
            query = (
                row["prompt"].rpartition("[User Query]\n")[2].partition("[Intermediate Tools")[0]
            )
            about = {"id": row["id"], "kind": kind, "query": query.strip()}
            example = found.setdefault(kind, {**about, "target": row["target"], "responses": {}})
            text = row["turns"][0][0] if row["turns"] else None
            example["responses"][name] = {"text": text, "right": row["correct"]}
    return list(found.values())


# ------------------------------------------------------------------------------------- the picture


def draw(path: Path) -> str:
    """Write the picture of a record beside it; return README's table in Markdown."""
    plt = common.pyplot()
    record = json.loads(path.read_text())
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    for name, arm in record["arms"].items():
        style = {"label": name, "color": COLOURS.get(name)}
        curve, rollouts = arm["curve"], arm["rollouts"]
        for axis, key in zip(axes, ("eval/tool_call_accuracy", "eval/answer_accuracy")):
            points = [
                (x, 100 * y) for x, y in zip(curve["step"], curve.get(key, [])) if y is not None
            ]
            if points:
                axis.plot(*zip(*points), "o-", ms=4, **style)
        if rollouts:
            steps = rollouts["step"]
            axes[2].plot(steps, smooth(arm["metrics"]["reward"][: len(steps)]), **style)
            matched = [y and 100 * y for y in rollouts["tokens_matched/calls"]]
            axes[3].plot(steps, smooth(matched), **style)
    sizes = [arm["config"]["eval_size"] for arm in record["arms"].values()]
    titles = tuple(
        f"{what} right, in {min(sizes, default=0)} test rows" for what in ("calls", "answers")
    )
    titles += (
        "reward of rollouts, mean of ten updates",
        "expert tokens matched, mean of ten updates",
    )
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="optimiser updates", ylabel="" if "reward" in title else "%")
        axis.grid(alpha=0.3)
    if record["arms"]:
        axes[0].legend()
    figure.savefig(path.with_suffix(".png"), dpi=100)
    plt.close(figure)
    return table(record)


def smooth(values: list, width: int = 10) -> list[float]:
    """Means of up to `width` values, the last one included; unknown ones do not count."""
    parts = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    parts = ([value for value in part if value is not None] for part in parts)
    return [mean(part) if part else float("nan") for part in parts]


def table(record: dict) -> str:
    """The record in Markdown: before, the common start, and each arm after its last update."""
    heads = ("model", "updates", "calls", "answers", "BFCL calls", "BFCL no call due")
    lines = [f"| {' | '.join(heads)} | s per update |", "|---" * 7 + "|"]
    share = lambda right, n: f"{100 * right / n:.1f} ({right} of {n})" if n else "-"
    steps = record["start"]["steps"]
    names = {"published": "as published", "start": "start"}
    if steps:
        names["start"] = f"common start, {steps[-1]['step']} SFT steps"
    for name, scores in record["evaluations"].items():
        arm = record["arms"].get(name.rpartition("-")[0], {})
        rows, bfcl = scores.get("file", {}), scores.get("bfcl", {})
        due = [v for k, v in bfcl.items() if "irrelevance" not in k]
        none = [v for k, v in bfcl.items() if "irrelevance" in k]
        cells = [
            f"`{name.rpartition('-')[0]}`" if arm else names[name],
            str(arm.get("updates", "")),
        ]
        cells += [share(*rows.get(kind, [0, 0])) for kind in ("tool_call", "answer")]
        cells += [share(sum(v[0] for v in part), sum(v[1] for v in part)) for part in (due, none)]
        cells += [f"{arm['median_seconds']['step']:.1f}" if arm.get("median_seconds") else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the program


def shared(args: argparse.Namespace) -> train.Config:
    """What the start and the measurements read of train.py's flags: typed, else the recipe's."""
    own = start.own_flags([f"@{REPO / args.recipe}", *args.typed], train.Config, Sft)
    return train.parse_args([*own, "--algo", "sft"])[0]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Own flags; `typed`, those that go to train.py; `argv`, both."""
    argv = sys.argv[1:] if argv is None else argv
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--recipe", default=RECIPE, help="flags of train.py for all arms")
    add("--output_dir", type=Path, default=Path("runs/real"))
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="in this order")
    add("--jobs", type=int, default=1, help="arms side by side (vLLM on a GPU: 1)")
    add("--stagger", type=float, default=5.0, help="seconds between the starts of two arms")
    add("--minutes", type=float, default=1e6, help="then nothing new begins; arms save and leave")
    add("--max_steps", type=int, default=150, help="updates of an arm")
    add("--sft_learning_rate", type=float, default=2e-5, help="of the start and of the arm sft")
    add("--start_share", type=float, default=0.1, help="of samples right, at which the start ends")
    add("--start_steps", type=int, default=60, help="of SFT at most")
    add("--probe", type=int, default=64, help="training prompts that are sampled")
    add("--probe_every", type=int, default=1, help="steps of SFT between two samplings")
    add("--bfcl", nargs="*", default=["single_turn"], help="categories or groups; none: no BFCL")
    add("--commit", default="", help="for the record, where there is no git")
    add("--note", nargs="+", default=[], help="sentences for the record")
    add("--only_start", action="store_true", help=argparse.SUPPRESS)
    add("--status", action="store_true", help="say where the run is")
    add("--collect", type=Path, metavar="RECORD", help="write the record of the run as it is")
    add("--draw", type=Path, metavar="RECORD", help="picture and table of a record")
    args, args.typed = parser.parse_known_args(argv)
    args.argv, args.output_dir = argv, args.output_dir.absolute()
    return args


def main() -> None:
    args = parse_args()
    if args.draw:
        print(draw(args.draw))
    elif args.status:
        print(status(args))
    elif args.collect:
        collect(args)
    elif args.only_start:
        common_start(args)
    else:
        drive(args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
