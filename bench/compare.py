"""Compare methods over seeds: runs of train.py, a record, a picture, and a table like Table 1.

    python bench/compare.py @recipes/compare.args            everything; resumes if interrupted
    python bench/compare.py @recipes/compare.args --algos sft toolupt --seeds 0 1 2 3 4
    python bench/compare.py @recipes/compare.args --draw     picture and table of what is there

Flags that --help does not list go to train.py, which every run calls as a user would. The record
OUT.jsonl gets a line per evaluation; OUT.png shows accuracy over updates (mean and range over
seeds), OUT.md what was reached (mean and standard deviation over seeds).

Budget: every method makes --max_steps optimiser updates on --train_batch_size prompts each. A
method that rolls out samples --num_generations responses per prompt; where the expert is a row of
the group (luffy, srft) it takes the place of one. sft samples none. Two-stage methods spend the
first half of the updates on SFT, so they sample half as much; warm-up and cosine of an SFT stage
span that stage. dapo trains on as many responses as the others and samples more (dynamic sampling);
the table counts what was sampled. The weight of SPO (Eq. 23) goes through two cycles, as its
default does in 600 steps. Runs of one seed share training data, test examples and, except for dapo,
the order of prompts.

Learning rate: one per family (FAMILIES), since SFT, RL and RL after SFT differ by more than the
methods within a family. Before the comparison, the methods named there run at every rate of --grid
(--sft_grid for sft) and are evaluated on --valid_file, whose names and values occur neither in
training nor in test. The rate of the highest mean accuracy is taken; an SFT stage has the rate of
sft. These runs have their own seed and are lines of the record with "phase": "grid".

Selection: nothing is selected on --test_file. The last update counts, also for SFT.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

import common
from common import REPO, data
from tqdm import tqdm

import start
import train
from methods import METHODS, AfterSft, Luffy, Sft, Srft
from tools.serving import this_commit

FAMILIES = {"sft": ["sft"], "rl": ["dapo_star", "toolupt"], "sft,rl": ["sft_dapo_star"]}
GRID_SEED = 1000  # of the runs that choose a learning rate
PANELS = {
    "imitation, and RL after it": ("sft", "sft_dapo_star", "sft_fg_dapo_star"),
    "RL without expert responses in the loss": ("grpo", "dapo", "dapo_star", "fg_dapo_star"),
    "expert responses and rollouts in one stage": ("luffy", "srft", "chord", "toolupt"),
    "ToolUPT and its ablations": ("toolupt", "toolupt_no_fgae", "toolupt_no_spo"),
}
COMPARED = [algo for algo in METHODS if any(algo in panel for panel in PANELS.values())]
COLUMNS = {  # shares, printed in percent
    "accuracy": "accuracy",
    "tool_call_accuracy": "tool calls",
    "answer_accuracy": "answers",
}


# ------------------------------------------------------------------------------------- one run


def family(algo: str) -> str:
    """The group of methods that share a learning rate: sft | rl | sft,rl."""
    if issubclass(METHODS[algo], AfterSft):
        return "sft,rl"
    return "sft" if issubclass(METHODS[algo], Sft) else "rl"


def flags(algo: str, seed: int, rate: float, sft_rate: float, shared: list) -> list:
    """The command line of train.py for one run within the common budget.

    rate      learning rate of the last stage
    sft_rate  learning rate of the SFT stage, where there is one before RL
    shared    flags of all runs
    """
    _, toolupt = train.parse_args(["--algo", "toolupt", *shared])
    steps, up = toolupt.max_steps, max(1, toolupt.max_steps // 6)  # 100 : 200, twice in the run
    own = {"seed": seed, "learning_rate": rate, "max_steps": steps}
    if hasattr(METHODS[algo], "balance_up"):
        own |= {"balance_up": up, "balance_down": max(1, steps // 2 - up)}
    if issubclass(METHODS[algo], (Luffy, Srft)):  # the expert takes one of the places
        own["num_generations"] = toolupt.num_generations - 1
    if family(algo) == "sft,rl":
        first = steps // 2
        own |= {"sft_max_steps": first, "max_steps": steps - first, "sft_learning_rate": sft_rate}
        own["eval_steps"] = 0  # evaluated at the end of each stage only: the best is the last
    shared = start.own_flags(shared, train.Config, METHODS[algo])
    return ["--algo", algo, *shared, *(str(x) for k, v in own.items() for x in (f"--{k}", v))]


def evaluations(out: Path, argv: list) -> list[dict]:
    """What a finished run measured: step, scores, responses so far; both stages on one axis."""
    config, method = train.parse_args(argv)
    parts, first = [(out, 0)], 0
    per_round = config.train_batch_size * getattr(method, "num_generations", 0)
    if isinstance(method, AfterSft):
        first = method.sft_max_steps
        parts = [(out / "sft", 0), (out, first)]
    found, rollouts = {}, 0
    for folder, offset in parts:
        _, *rows = data.read_jsonl(folder / "metrics.jsonl")
        for row in rows:
            rollouts += int(row.get("rounds", 0)) * per_round
            if "eval/accuracy" in row:
                scores = {k.removeprefix("eval/"): v for k, v in row.items() if k[:5] == "eval/"}
                step = offset + row["step"]  # step `first` twice: the end of SFT is the start of RL
                found[step] = {"step": step, **scores, "rollouts": rollouts}
    return list(found.values())


def run(key: dict, argv: list, folder: Path, threads: int) -> list[dict]:
    """Run train.py; return one row per evaluation, with `key` in it. RuntimeError if it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run(
            [sys.executable, "train.py", *argv, "--output_dir", str(folder)],
            check=False,
            cwd=REPO,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        ).returncode
    if code:
        end = (folder / "log.txt").read_text()[-1500:]
        raise RuntimeError(f"{folder}: exit code {code}\n{end}")
    return [{**key, **row} for row in evaluations(folder, argv)]


# ---------------------------------------------------------------------------------- the record


def read(path: Path) -> list[dict]:
    """The rows of a record, none without a file. A repeated run replaces its earlier rows."""
    rows = data.read_jsonl(path, growing=True)
    names = ("phase", "algo", "seed", "learning_rate", "step")
    return list({tuple(row[name] for name in names): row for row in rows}.values())


def settings(args) -> str:
    """A short checksum of what all runs have in common."""
    shared = [args.shared, args.valid_file, args.test_file]
    return hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:8]


def last(rows: list[dict], phase: str, steps: int) -> dict:
    """(algo, seed, learning_rate) -> the row after the last update, of the runs that got there."""
    return {
        (row["algo"], row["seed"], row["learning_rate"]): row
        for row in rows
        if row["phase"] == phase and row["step"] == steps
    }


def carry_out(wanted: list[tuple], args, phase: str, sft_rate=None) -> list[dict]:
    """Run those of `wanted` (algo, seed, rate) that the record lacks; return the whole record."""
    steps, version, lock = args.steps, this_commit(), threading.Lock()
    done = last(read(args.out), phase, steps)
    todo = [job for job in wanted if job not in done]

    def one(job):
        algo, seed, rate = job
        argv = flags(algo, seed, rate, sft_rate or rate, args.shared)
        argv += ["--eval_file", *(args.valid_file if phase == "grid" else args.test_file)]
        key = {"phase": phase, "algo": algo, "seed": seed, "learning_rate": rate}
        key |= {"commit": version, "settings": settings(args)}
        rows = run(key, argv, args.runs / f"{phase}-{algo}-{seed}-{rate:g}", args.threads)
        assert rows[-1]["step"] == steps, (algo, rows[-1]["step"], steps)
        with lock, open(args.out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), desc=phase) as bar:
        for future in as_completed([pool.submit(one, job) for job in todo]):
            future.result()
            bar.update()
    return read(args.out)


def choose(rows: list[dict], kind: str, steps: int, grid: list[float]) -> float:
    """The rate of `grid` with the highest mean validation accuracy of a family; ties: the lower."""
    scores = defaultdict(list)
    for (algo, _, rate), row in last(rows, "grid", steps).items():
        if family(algo) == kind and rate in grid:
            scores[rate].append(row["accuracy"])
    return max(sorted(scores), key=lambda rate: mean(scores[rate]))


# ---------------------------------------------------------------------- the table, the picture


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """mean ± standard deviation (Bessel's), the mean alone for one value."""
    values = [scale * value for value in values]
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(rows: list[dict], steps: int, reference: str = "toolupt") -> str:
    """Table 1 of the record in Markdown: a line per method after the last update.

    Cells are mean ± standard deviation over seeds. Differences from `reference` are taken seed by
    seed: runs of one seed share training data, their order and the test set.
    """
    final = defaultdict(dict)
    for (algo, seed, _), row in last(rows, "test", steps).items():
        final[algo][seed] = row
    before = {r["seed"]: r for r in rows if r["phase"] == "test" and r["step"] == 0}
    final = {"base model": before, **{a: final[a] for a in COMPARED if a in final}}
    heads = ["method", *COLUMNS.values(), "reward", f"minus {reference}"]
    heads += ["rollouts", "rate", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for algo, by_seed in final.items():
        runs, others = list(by_seed.values()), final.get(reference, {})
        pairs = [r["accuracy"] - others[s]["accuracy"] for s, r in by_seed.items() if s in others]
        name = algo if algo == "base model" else f"`{algo}`"
        rate = "" if algo == "base model" else f"{runs[0]['learning_rate']:g}"
        cells = [name, *(spread([r[c] for r in runs], 100) for c in COLUMNS)]
        cells += [spread([r["reward"] for r in runs], digits=2)]
        cells += [spread(pairs, 100) if pairs and algo != reference else ""]
        cells += [f"{mean(r['rollouts'] for r in runs):,.0f}", rate, str(len(runs))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(rows: list[dict], steps: int, path: Path) -> Path:
    """Accuracy over updates in four groups of methods, and the last accuracy of every seed."""
    plt = common.pyplot()
    colours = dict(zip(COMPARED, plt.get_cmap("tab20").colors))
    curves = defaultdict(lambda: defaultdict(list))  # algo -> step -> accuracies
    for row in rows:
        if row["phase"] == "test":
            curves[row["algo"]][row["step"]].append(100 * row["accuracy"])
    figure, axes = plt.subplot_mosaic("abe;cde", figsize=(14, 8), layout="constrained")
    for place, (title, algos) in zip("abcd", PANELS.items()):
        axis = axes[place]
        for algo in (a for a in algos if a in curves):
            xs = sorted(curves[algo])
            ys = [curves[algo][x] for x in xs]
            axis.plot(xs, [mean(y) for y in ys], "o-", ms=4, label=algo, color=colours[algo])
            low, high = [min(y) for y in ys], [max(y) for y in ys]
            axis.fill_between(xs, low, high, alpha=0.15, color=colours[algo], lw=0)
        axis.set(title=title, xlabel="optimiser updates", ylabel="accuracy, %")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.sharey(axes["a"])
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=9)
    ends, axis = {algo: curve[steps] for algo, curve in curves.items() if steps in curve}, axes["e"]
    for y, algo in enumerate(order := sorted(ends, key=lambda a: mean(ends[a]))):
        axis.plot(ends[algo], [y] * len(ends[algo]), "o", color=colours[algo], alpha=0.7)
        axis.plot(mean(ends[algo]), y, "|", color="black", ms=16)
    axis.set(title="after the last update: seeds, mean", xlabel="accuracy, %")
    axis.set_yticks(range(len(order)), order)
    axis.grid(alpha=0.3)
    figure.suptitle("completely right on held-out examples: mean and range over seeds")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def draw(rows: list[dict], steps: int, out: Path) -> str:
    """Write OUT.png and OUT.md; return the table."""
    text = table(rows, steps)
    out.with_suffix(".md").write_text(text + "\n")
    picture(rows, steps, out.with_suffix(".png"))
    return text


# --------------------------------------------------------------------------------- the program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Own flags, and `shared`, those for train.py, whose mistakes also end the program here."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=raw, fromfile_prefix_chars="@", allow_abbrev=False
    )
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    add = parser.add_argument
    add("--algos", nargs="+", default=["all"], help="of Table 1 and Figure 4, or all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--grid", nargs="+", type=float, help="learning rates of rl and sft,rl")
    add("--sft_grid", nargs="+", type=float, help="learning rates of sft")
    add("--valid_file", nargs="+", help="--eval_file of the runs that choose a rate")
    add("--test_file", nargs="+", help="--eval_file of the comparison")
    add("--jobs", type=int, default=1, help="runs side by side")
    add("--threads", type=int, default=1, help="threads of a run")
    add("--out", type=common.file, default=str(common.BENCH / "compare.jsonl"))
    add("--runs", type=Path, default=REPO / "runs/compare", help="folders of runs")
    add("--draw", action="store_true", help="run nothing")
    args, args.shared = parser.parse_known_args(argv)
    args.algos = COMPARED if args.algos == ["all"] else args.algos
    if unknown := [algo for algo in args.algos if algo not in COMPARED]:
        parser.error(f"unknown method {unknown[0]}; choose among {', '.join(COMPARED)}")
    args.steps = train.parse_args(["--algo", "toolupt", *args.shared])[1].max_steps
    for name in ("grid", "sft_grid", "valid_file", "test_file"):
        if not args.draw and not getattr(args, name):
            parser.error(f"--{name}: give at least one, as in recipes/compare.args")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = read(args.out)
    if other := ", ".join({row["settings"] for row in rows} - {settings(args)}):
        sys.exit(f"error: {args.out} holds runs of other flags ({other}); give another --out")
    if not args.draw:
        rates, needed = {}, {"sft", *map(family, args.algos)}
        for wave in (("sft", "rl"), ("sft,rl",)):  # the latter needs the rate of sft
            grids = {k: args.sft_grid if k == "sft" else args.grid for k in wave if k in needed}
            wanted = [
                (a, GRID_SEED, x) for k, grid in grids.items() for x in grid for a in FAMILIES[k]
            ]
            rows = carry_out(wanted, args, "grid", rates.get("sft"))
            rates |= {k: choose(rows, k, args.steps, grid) for k, grid in grids.items()}
        print("learning rates", rates)
        wanted = [(a, seed, rates[family(a)]) for seed in args.seeds for a in args.algos]
        rows = carry_out(wanted, args, "test", rates["sft"])
    if not last(rows, "test", args.steps):
        sys.exit(f"error: {args.out} holds no finished run on the test world; run without --draw")
    print(draw(rows, args.steps, args.out))


if __name__ == "__main__":
    main()
