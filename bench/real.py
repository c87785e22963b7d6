"""A pretrained model on real data: methods from one start, measured before, during and after.

    python bench/real.py --minutes 60             the run of RECIPE; goes on where it stopped
    python bench/real.py --engine transformers --model_name_or_path DIR --max_steps 40 --jobs 1
    python bench/real.py --status                 where it is, from another terminal
    python bench/real.py --collect bench          the record so far: real.json, real.png, rollouts
    python bench/real.py --draw bench/real.json   picture and README's table of a record

Flags that are not listed under --help go to train.py, which every arm calls as a user would, on
top of --recipe.

1. The model as published is measured on the test rows and on BFCL (eval.py).
2. The common start. The published model has the skill without the habit: `<tool_call>` as its
   first token has a probability of about 1e-9, so that all rewards of a group are equal and RL has
   nothing to learn from. SFT (batches, loss and optimiser of `train.py --algo sft`, at a constant
   rate) goes on until a tenth of the calls sampled at temperature 1 are right, and a tenth of all
   responses: N steps, the least that do. Probed are the training prompts that SFT meets last.
3. The arms (ARMS), each with the same number of updates, prompts and responses, one seed, and one
   learning rate for all RL methods. `sft` goes on with its own rate; `toolupt_published` is
   single-stage, from the model as published.
4. Each arm's last checkpoint is measured like 1. Nothing is selected on the test rows.

When --minutes are over no new work begins: arms save, leave and are measured as they are, and the
same command goes on later. Arms side by side share the card, so the seconds of one say little about
its cost alone; the record says who ran when.
"""

import argparse
import ctypes
import fcntl
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median

REPO = Path(__file__).resolve().parent.parent
RECIPE = "recipes/qwen2.5-coder-0.5b.args"
ARMS = {  # name -> --algo and the model that it begins with
    "toolupt": ("toolupt", "start"),
    "dapo_star": ("dapo_star", "start"),
    "sft": ("sft", "start"),
    "fg_dapo_star": ("fg_dapo_star", "start"),
    "toolupt_published": ("toolupt", "published"),
}
COLOURS = {
    "toolupt": "#d62728", "dapo_star": "#bcbd22", "sft": "#1f77b4", "fg_dapo_star": "#17becf",
    "toolupt_published": "#9467bd",
}  # fmt: skip
SFT = [
    "--lr_scheduler_type",
    "constant",
    "--warmup_ratio",
    "0",
]  # an arm goes on as its start began
SAMPLES = 4  # responses to a probed prompt
ROLLOUT_BYTES = (
    11 * 2**20
)  # of an arm's rollouts in the record; where there are more, evenly spaced steps are kept
BFCL_CASES = 10  # the first of each single-turn category
INTERRUPTED = (
    143,
    130,
    -15,
    -2,
)  # exit codes after SIGTERM and Ctrl-C: all is saved, or nothing had begun


# --------------------------------------------------------------------------------------- the start


def common_start(args: argparse.Namespace) -> None:
    """SFT until --start_share of the samples are right; writes OUT/start and OUT/start.jsonl."""
    import data
    import model as modeling
    import packing
    import rollout
    import spo
    from start import init_distributed

    args.output_dir.mkdir(parents=True, exist_ok=True)
    init_distributed()
    settings = shared(args)
    model, tokenizer = modeling.load(
        settings.model_name_or_path,
        gradient_checkpointing=not settings.no_gradient_checkpointing,
        seed=settings.seed,
    )
    optimizer = modeling.optimizer(model, settings.sft_learning_rate, (0.9, 0.95), 0.01)
    longest = settings.max_prompt_length, settings.max_completion_length
    engine = rollout.make_engine(
        settings.engine, settings.model_name_or_path, max_model_len=sum(longest),
        max_num_seqs=settings.max_num_seqs, gpu_memory_utilization=0.5, seed=settings.seed,
    )  # fmt: skip
    examples = [e for source in settings.train_file for e in data.load_source(source)]
    examples, _ = data.fit(examples, tokenizer, *longest)
    order = list(range(len(examples)))  # the first epoch of train.py
    random.Random(f"{settings.seed}/0").shuffle(order)
    probed = [examples[i] for i in order[-args.probe :]]
    rows = open(args.output_dir / "start.jsonl", "w")  # noqa: SIM115 - open to the end
    for step in range(args.start_steps + 1):
        engine.load_weights(modeling.full_tensors(model))
        engine.wake()
        row = {"step": step, **sampled(engine, probed, tokenizer, settings)}
        rows.write(json.dumps(row) + "\n")
        rows.flush()
        print(row, flush=True)
        if min(row["calls"], row["all"]) >= args.start_share or step == args.start_steps:
            break
        engine.sleep()
        batch = [
            examples[order[i % len(order)]]
            for i in range(step * settings.train_batch_size, (step + 1) * settings.train_batch_size)
        ]
        pairs = [(data.render(e, tokenizer), data.target_ids(e, tokenizer)) for e in batch]
        tokens = sum(len(target) for _, target in pairs)
        for micro in in_rows(pairs, settings.max_tokens_per_row):
            packed = packing.join([packing.pack(prompt, [target]) for prompt, target in micro])
            logps, _ = packing.response_logps(model, packed)
            mask = packed.response_mask.to(logps.device)
            spo.sft_loss(logps, mask, num_tokens=tokens)[0].backward()
        modeling.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    modeling.save(model, tokenizer, args.output_dir / "start")


def sampled(engine, examples: list, tokenizer, settings: argparse.Namespace) -> dict:
    """Shares of SAMPLES responses per example that are completely right: calls, answers, all."""
    import data
    import scoring

    groups = engine.generate(
        [data.render(example, tokenizer) for example in examples], n=SAMPLES, temperature=1.0,
        max_tokens=settings.max_completion_length, seeds=[settings.seed + i for i in range(len(examples))],
    )  # fmt: skip
    texts = [sample.text for group in groups for sample in group]
    answered = [example for example in examples for _ in range(SAMPLES)]
    found = scoring.Reward().tally(texts, answered)
    others = found["n"] - found["n_calls"]
    return {
        "all": found["accuracy"] / found["n"],
        "calls": found["tool_calls"] / max(1, found["n_calls"]),
        "answers": found["answers"] / max(1, others),
        "reward": found["reward"] / found["n"],
        "n": [found["n_calls"], others],
    }


def in_rows(pairs: list[tuple], budget: int) -> list[list[tuple]]:
    """Prompts and targets in order, as many to a row as fit in `budget` tokens, one at least."""
    rows, filled = [], budget
    for pair in pairs:
        size = sum(map(len, pair))
        if filled + size > budget:
            rows, filled = [*rows, []], 0
        rows[-1].append(pair)
        filled += size
    return rows


# -------------------------------------------------------------------------------------- the driver


def drive(args: argparse.Namespace) -> None:
    """Start what can start, `jobs` arms and two measurements at a time, until all is done."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lock = open(args.output_dir / ".lock", "w")  # noqa: SIM115 - open as long as the driver runs
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(
            f"error: another driver works in --output_dir {args.output_dir}: wait for it, or end it"
        )
    end, running, failed, last_start = time.time() + 60 * args.minutes, {}, set(), 0.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    note(args, "begin", "all", command=sys.argv[1:], minutes=args.minutes)
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
                soon = time.time() < last_start + args.stagger
                if name in ARMS and (arms >= args.jobs or soon):
                    continue
                if name.startswith("eval/") and measured >= 2:
                    continue
                running[name] = Process(args, name, argv)
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


class Process(subprocess.Popen):
    """A program of this repository with a log; it gets SIGTERM when the driver ends, however."""

    def __init__(self, args: argparse.Namespace, name: str, argv: list[str]):
        self.began = time.time()
        log_of(args, name).parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        die = (
            (lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM))
            if sys.platform == "linux"
            else None
        )
        with open(log_of(args, name), "a") as log:
            super().__init__(
                [sys.executable, *argv], cwd=REPO, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die,
                env={"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ},
            )  # fmt: skip

    def seconds(self) -> float:
        return round(time.time() - self.began, 1)


def work(args: argparse.Namespace, over: bool) -> list[tuple[str, list[str]]]:
    """(name, command line) of all that is left and can begin now, in the order in which it should.

    over  the time is over: only what has been trained is measured
    """
    found, start = [], args.output_dir / "start"
    ready = {"published": True, "start": (start / "config.json").exists()}
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
            found += measurements(
                args, f"{arm}-{step}", args.output_dir / arm / f"checkpoint-{step}"
            )
    if ready["start"]:
        found += measurements(args, "start", start)
    found += measurements(args, "published", args.model_name_or_path)
    return found


def arm_command(args: argparse.Namespace, arm: str) -> list[str]:
    """train.py's command line for an arm."""
    algo, origin = ARMS[arm]
    model = args.output_dir / "start" if origin == "start" else args.model_name_or_path
    own = {
        "output_dir": args.output_dir / arm,
        "model_name_or_path": model,
        "max_steps": args.max_steps,
    }
    own |= {"resume_from_checkpoint": "latest"}
    if algo == "sft":
        own["learning_rate"] = args.sft_learning_rate
    if algo == "toolupt":  # two cycles, a third of each rising (Eq. 23)
        own["balance_up"] = max(1, args.max_steps // 6)
        own["balance_down"] = max(1, args.max_steps // 2 - own["balance_up"])
    flags = [str(x) for name, value in own.items() for x in (f"--{name}", value)]
    return [
        "train.py",
        "--algo",
        algo,
        f"@{args.recipe}",
        *args.typed,
        *flags,
        *(SFT if algo == "sft" else []),
    ]


def measurements(
    args: argparse.Namespace, name: str, model: Path | str
) -> list[tuple[str, list[str]]]:
    """eval.py's command lines for what of a model is not measured yet."""
    settings, found = shared(args), []
    common = [
        "eval.py",
        str(model),
        "--engine",
        settings.engine,
        "--max_num_seqs",
        "64",
        "--max_tokens",
        "512",
    ]
    for bench, flags in {
        "file": [
            "--file",
            settings.eval_file[0],
            "--max_model_len",
            str(settings.max_prompt_length + 512),
        ],
        "bfcl": ["--categories", *args.bfcl, "--limit", str(BFCL_CASES), "--max_model_len", "8192"],
    }.items():
        out = args.output_dir / "eval" / f"{name}-{bench}"
        if (bench == "file" or (args.bfcl and find_spec("bfcl_eval"))) and not (
            out / "report.md"
        ).exists():
            found.append(
                (
                    f"eval/{name}-{bench}",
                    [*common, "--bench", bench, *flags, "--output_dir", str(out)],
                )
            )
    return found


def reached(args: argparse.Namespace, arm: str) -> int:
    """The step of an arm's newest whole checkpoint; 0: none."""
    steps = (
        path.parent.name.split("-")[1]
        for path in (args.output_dir / arm).glob("checkpoint-*/config.json")
    )
    return max((int(step) for step in steps if step.isdigit()), default=0)


def log_of(args: argparse.Namespace, name: str) -> Path:
    return args.output_dir / "logs" / f"{name.replace('/', '-')}.txt"


def note(args: argparse.Namespace, event: str, name: str, **more) -> None:
    """A line of OUT/events.jsonl: who ran when, beside whom."""
    row = {"time": round(time.time(), 1), "event": event, "name": name, **more}
    with open(args.output_dir / "events.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{datetime.now():%H:%M:%S} {event} {name} {more.get('code', '')}", flush=True)


def read(path: Path) -> list[dict]:
    """The whole lines of a .jsonl file that may still be written; none where it does not exist."""
    if not path.exists():
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def status(args: argparse.Namespace) -> str:
    """Where the run is: probes, and each arm's step, seconds per update and last scores."""
    events, lines = read(args.output_dir / "events.jsonl"), []
    ended = {}
    for row in events:
        ended[row["name"]] = row if row["event"] == "end" else None
    for row in read(args.output_dir / "start.jsonl")[-3:]:
        lines.append(
            f"start, step {row['step']}: sampled right: calls {row['calls']:.1%}, all {row['all']:.1%}"
        )
    for arm in args.arms:
        rows = read(args.output_dir / arm / "metrics.jsonl")[1:]
        if not rows:
            continue
        seconds = [row["timing_s/step"] for row in rows[-10:] if "timing_s/step" in row]
        parts = {k[9:]: round(v, 2) for k, v in rows[-1].items() if k.startswith("timing_s/")}
        scores = [row for row in rows if row.get("eval/accuracy") is not None]
        text = f"{arm}: step {rows[-1]['step']} of {args.max_steps}"
        text += f", {median(seconds):.2f} s per update {parts}" if seconds else ""
        for row in scores[:1] + scores[-1:]:
            kinds = [row.get(f"eval/{k}") for k in ("tool_call_accuracy", "answer_accuracy")]
            text += f"; after {row['step']}: " + ", ".join(
                "-" if k is None else f"{k:.1%}" for k in kinds
            )
        if "reward" in rows[-1]:
            text += f"; reward {mean(row['reward'] for row in rows[-10:] if 'reward' in row):.2f}"
        lines.append(text)
    for name, row in ended.items():
        if row is None and name != "all":
            lines.append(f"running: {name}")
        elif row and row["code"] not in (0, *INTERRUPTED):
            lines += [
                f"FAILED: {name}, exit code {row['code']}",
                log_of(args, name).read_text()[-1500:],
            ]
        elif row:
            lines.append(f"ended: {name}, {row['seconds']} s")
    return "\n".join(lines) or f"nothing in {args.output_dir} yet"


# -------------------------------------------------------------------------------------- the record


def collect(args: argparse.Namespace) -> None:
    """Write real.json, real.png and rollouts-ARM.jsonl.gz into the folder --collect."""
    import common

    args.collect.mkdir(parents=True, exist_ok=True)
    out, settings = args.output_dir, shared(args)
    events = read(out / "events.jsonl")
    runs = [arm for arm in args.arms if len(read(out / arm / "metrics.jsonl")) > 1]
    with ProcessPoolExecutor(max(1, min(len(runs), os.cpu_count() or 1))) as pool:
        texts = pool.map(
            read_rollouts,
            [out / arm for arm in runs],
            [args.collect / f"rollouts-{arm}.jsonl.gz" for arm in runs],
        )
        rollouts = dict(zip(runs, texts))
    begun = [row for row in events if row["event"] == "begin"]
    record = {
        "machine": {**common.machine(), **({"commit": args.commit} if args.commit else {})},
        "commands": [f"python bench/real.py {' '.join(row['command'])}" for row in begun],
        "hours": round(hours(events), 3),
        "notes": [
            f"up to {args.jobs} arms and two measurements ran side by side on one machine: see `beside`",
            *args.note,
        ],
        "model": settings.model_name_or_path,
        "seed": settings.seed,
        "data": {name: checksum(name) for name in (*settings.train_file, *settings.eval_file)},
        "start": {
            "rule": f"the least N at which {args.start_share:.0%} of sampled calls and of all samples are right",
            "probe": f"{args.probe} training prompts, {SAMPLES} samples each, temperature 1",
            "learning_rate": args.sft_learning_rate,
            "steps": read(out / "start.jsonl"),
        },
        "arms": {arm: arm_record(args, arm, events, rollouts[arm]) for arm in runs},
        "evaluations": {
            name: scores
            for name in ("published", "start", *(f"{arm}-{reached(args, arm)}" for arm in runs))
            if (scores := evaluation(args, name))
        },
        "examples": responses(args, runs),
    }
    path = args.collect / "real.json"
    numbers = lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]"
    text = json.dumps(record, indent=1, ensure_ascii=False)
    path.write_text(re.sub(r"\[\s+([-\d.,\seEnul]*?)\s+\]", numbers, text) + "\n")
    print(draw(path))


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
    path = Path(source.partition(":")[2] or source)
    path = path if path.is_absolute() else REPO / path
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "generated"


def arm_record(args: argparse.Namespace, arm: str, events: list[dict], rollouts: dict) -> dict:
    """An arm: its command, its seconds and beside whom, and its metrics as columns over steps."""
    config, *rows = read(args.output_dir / arm / "metrics.jsonl")
    own = [row for row in events if row["name"] == arm]
    steps = [row for row in rows if row["step"]]
    names = sorted(
        {
            name
            for row in steps
            for name in row
            if not name.startswith(("eval/", "timing_s", "perf/"))
        }
    )
    rounded = lambda x: x if x is None or isinstance(x, (int, str)) else float(f"{x:.4g}")
    curve = [row for row in rows if row.get("eval/accuracy") is not None]
    seconds = defaultdict(list)
    for row in steps:
        for name in row:
            if name.startswith("timing_s/"):
                seconds[name[9:]].append(row[name])
    return {
        "algo": ARMS[arm][0],
        "from": ARMS[arm][1],
        "updates": rows[-1]["step"],
        "command": next(
            (
                f"python {' '.join(row['command'])}"
                for row in reversed(own)
                if row["event"] == "start"
            ),
            None,
        ),
        "runs": [
            {k: row[k] for k in ("time", "event", "beside", "seconds", "code") if k in row}
            for row in own
        ],
        "median_seconds": {name: rounded(median(values)) for name, values in seconds.items()},
        "config": config,
        "curve": {
            name: [rounded(row.get(name)) for row in curve]
            for name in ("step", *sorted(k for k in curve[0] if k[:5] == "eval/"))
        },
        "metrics": {name: [rounded(row.get(name)) for row in steps] for name in names},
        "rollouts": rollouts,
    }


def read_rollouts(folder: Path, out: Path) -> dict:
    """What an arm's rollouts tell, as columns over steps; copies them to `out`, thinned to fit.

    The columns are the metrics of metrics.shares, of runs too that did not log them yet.
    """
    import metrics
    from run import add

    path, sums = folder / "rollouts.jsonl", defaultdict(dict)
    if not path.exists():
        return {}
    alignment = read(folder / "metrics.jsonl")[0].get("alignment", "positional")
    with open(path) as file, gzip.open(out, "wt", compresslevel=5) as copy:
        for line in file:
            if not line.endswith("\n"):
                break
            row = json.loads(line)
            copy.write(line)
            first, right = row["advantages"][:1], row["outcome"]["total"] == 4
            one = [row["token_ids"]], [row["text"]], [right], first, alignment
            add(sums[row["step"]], metrics.tally(row["kind"], row["target_ids"], *one))
    steps = sorted(sums)
    found = [metrics.shares(sums[step]) for step in steps]
    names = sorted({name for row in found for name in row})
    rounded = lambda x: None if x is None else round(x, 4)
    thin(path, out, steps)
    return {"step": steps, **{name: [rounded(row.get(name)) for row in found] for name in names}}


def thin(path: Path, out: Path, steps: list[int]) -> None:
    """Write every n-th step and the last to `out` again, so that it fits in ROLLOUT_BYTES."""
    every = -(-out.stat().st_size // ROLLOUT_BYTES)
    if every > 1:
        every += 1  # the last step, and steps of unequal size
        kept = {*steps[::every], steps[-1]}
        with open(path) as file, gzip.open(out, "wt", compresslevel=5) as copy:
            copy.writelines(
                line for line in file if line.endswith("\n") and json.loads(line)["step"] in kept
            )


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


def responses(args: argparse.Namespace, runs: list[str]) -> list[dict]:
    """All models' responses to the first test rows with a single call, parallel calls, an answer."""
    found = {}
    for name in ("published", "start", *(f"{arm}-{reached(args, arm)}" for arm in runs)):
        chosen = {}
        for row in read(args.output_dir / "eval" / f"{name}-file" / "results.jsonl"):
            parallel = row["category"] == "tool_call" and row["target"].split("\n")[1].startswith(
                "["
            )
            chosen.setdefault("parallel calls" if parallel else row["category"], row)
        for which, row in chosen.items():
            query = (
                row["prompt"]
                .partition("[User Query]")[2]
                .partition("[Intermediate Tools")[0]
                .strip()
            )
            example = found.setdefault(
                which,
                {
                    "id": row["id"],
                    "kind": which,
                    "query": query,
                    "target": row["target"],
                    "responses": {},
                },
            )
            example["responses"][name] = {
                "text": row["turns"][0][0] if row["turns"] else None,
                "right": row["correct"],
            }
    return list(found.values())


# ------------------------------------------------------------------------------------- the picture


def draw(path: Path) -> str:
    """Write the picture of a record beside it; return README's table in Markdown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = json.loads(path.read_text())
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    n = (
        record["evaluations"]
        .get("start", record["evaluations"].get("published", {}))
        .get("file", {})
    )
    counts = [n.get(kind, [0, "?"])[1] for kind in ("tool_call", "answer")]
    for name, arm in record["arms"].items():
        style = {"label": name, "color": COLOURS.get(name)}
        for axis, key in zip(axes, ("eval/tool_call_accuracy", "eval/answer_accuracy")):
            points = [
                (s, 100 * y)
                for s, y in zip(arm["curve"]["step"], arm["curve"].get(key, []))
                if y is not None
            ]
            axis.plot(*zip(*points), "o-", ms=4, **style) if points else None
        if arm["rollouts"]:
            steps = arm["rollouts"]["step"]
            axes[2].plot(steps, smooth(arm["metrics"]["reward"][: len(steps)]), **style)
            matched = [y and 100 * y for y in arm["rollouts"]["tokens_matched/calls"]]
            axes[3].plot(steps, smooth(matched), **style)
    for axis, title in zip(axes, (
        f"test calls right, of {counts[0]}", f"test answers right, of {counts[1]}",
        "reward of rollouts, mean of ten updates", "expert tokens matched, mean of ten updates",
    )):  # fmt: skip
        axis.set(title=title, xlabel="optimiser updates", ylabel="" if "reward" in title else "%")
        axis.grid(alpha=0.3)
    if record["arms"]:
        axes[0].legend()
    figure.savefig(path.with_suffix(".png"), dpi=100)
    plt.close(figure)
    return table(record)


def smooth(values: list, width: int = 10) -> list[float]:
    """Means of up to `width` values, the last one included; unknown ones do not count."""
    parts = (
        [v for v in values[max(0, i + 1 - width) : i + 1] if v is not None]
        for i in range(len(values))
    )
    return [mean(part) if part else float("nan") for part in parts]


def table(record: dict) -> str:
    """The record in Markdown: before, the common start, and each arm after its last update."""
    lines = [
        "| model | updates | calls | answers | BFCL calls | BFCL no call due | s per update |",
        "|---" * 7 + "|",
    ]
    share = lambda right, n: f"{100 * right / n:.1f} ({right} of {n})" if n else "-"
    for name, scores in record["evaluations"].items():
        arm = record["arms"].get(name.rpartition("-")[0], {})
        rows, bfcl = scores.get("file", {}), scores.get("bfcl", {})
        due = [v for k, v in bfcl.items() if "irrelevance" not in k]
        none = [v for k, v in bfcl.items() if "irrelevance" in k]
        cells = [
            f"`{name.rpartition('-')[0]}`"
            if arm
            else {
                "published": "as published",
                "start": f"common start, {record['start']['steps'][-1]['step']} SFT steps"
                if record["start"]["steps"]
                else "start",
            }[name]
        ]
        cells += [str(arm.get("updates", ""))]
        cells += [share(*rows.get(kind, [0, 0])) for kind in ("tool_call", "answer")]
        cells += [share(sum(v[0] for v in part), sum(v[1] for v in part)) for part in (due, none)]
        cells += [f"{arm['median_seconds']['step']:.1f}" if arm.get("median_seconds") else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the program


def shared(args: argparse.Namespace) -> argparse.Namespace:
    """What the start and the measurements read of train.py's flags: typed, else the recipe's."""
    parser = argparse.ArgumentParser(fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    parser.add_argument("--model_name_or_path", default=args.model_name_or_path)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--no_gradient_checkpointing", action="store_true")
    for name in ("train_file", "eval_file"):
        parser.add_argument(f"--{name}", nargs="+", required=True)
    for name, default in (
        ("seed", 0), ("train_batch_size", 16), ("max_prompt_length", 2048), ("max_completion_length", 256),
        ("max_tokens_per_row", 16384), ("max_num_seqs", 256),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    settings, _ = parser.parse_known_args([f"@{REPO / args.recipe}", *args.typed])
    settings.sft_learning_rate = args.sft_learning_rate
    return settings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Own flags; `typed`, those that go to train.py; `argv`, both."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", default=RECIPE, help="flags of train.py for all arms")
    add("--output_dir", type=Path, default=Path("runs/real"))
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="in this order")
    add("--jobs", type=int, default=3, help="arms side by side")
    add("--stagger", type=float, default=5.0, help="seconds between the starts of two arms")
    add(
        "--minutes",
        type=float,
        default=1e6,
        help="after which nothing new begins and arms save and leave",
    )
    add("--max_steps", type=int, default=150, help="updates of an arm")
    add(
        "--sft_learning_rate",
        type=float,
        default=2e-5,
        help="of the start and of the arm sft: between the paper's 1e-5 and 3e-5",
    )
    add(
        "--start_share",
        type=float,
        default=0.1,
        help="of sampled calls, and of all samples, that must be right at the start",
    )
    add("--start_steps", type=int, default=60, help="of SFT at most")
    add("--probe", type=int, default=64, help="training prompts that are sampled")
    add("--bfcl", nargs="*", default=["single_turn"], help="categories or groups; none: no BFCL")
    add("--commit", default="", help="for the record, where there is no git")
    add("--note", nargs="+", default=[], help="sentences for the record")
    add("--only_start", action="store_true", help=argparse.SUPPRESS)
    add("--status", action="store_true", help="say where the run is")
    add("--collect", type=Path, metavar="FOLDER", help="write the record of the run as it is")
    add("--draw", type=Path, metavar="RECORD", help="picture and table of a record")
    args, args.typed = parser.parse_known_args(argv)
    args.argv = argv
    args.output_dir = args.output_dir.absolute()
    args.model_name_or_path = None
    if not args.draw:
        args.model_name_or_path = shared(args).model_name_or_path
    return args


def main() -> None:
    args = parse_args()
    sys.path.insert(0, str(REPO))
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
    main()
