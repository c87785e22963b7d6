"""Tables and figures of both papers, each by one command: train, evaluate, tabulate, draw.

    python bench/paper.py --list                          the objects, and what each needs
    python bench/paper.py table1                          the paper's models, a recipe each
    python bench/paper.py table1 table3 @recipes/qwen2.5-7b.args
    python bench/paper.py table1 figure4 --toy            a 2M-parameter model on two CPU cores
    python bench/paper.py table1 --only sft toolupt       some rows
    python bench/paper.py table1 --draw                   run nothing, show what there is

An object (OBJECTS of paper_toolupt.py and paper_itool.py) is a list of runs and a function that
shows what they measured. train.py trains each run from each recipe, eval.py measures its
checkpoints on BFCL (--toy: on the toy world's test), as a user would call them. Objects that name
the same run share it.

OUT/MODEL/RUN/              train.py's folder and log.txt; eval-CHECKPOINT/, eval.py's
OUT/results.jsonl           a line per run and per evaluation that has ended, with what was run
OUT/OBJECT.md, OBJECT.png   the paper's layout and numbers, ours beside them

The same command goes on where it stopped: what has ended is not repeated, a run continues from its
latest checkpoint, an evaluation with its next case. A run that fails is named in the tables with
the last error of its log, the others go on, and the next start tries it again. Optimiser states of
finished runs are deleted.
"""

import argparse
import ctypes
import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
sys.modules.setdefault("paper", sys.modules[__name__])  # what the objects import
sys.path[:0] = [str(REPO), str(REPO / "bench")]
KNOWN: dict[str, "Object"] = {}  # filled by parse_args
PATIENCE = 120  # seconds that the processes of a killed driver have to save and leave
TOY = ("--bench", "file", "--file", "toy:test", "--limit", "100")  # cases of each kind
TOY += ("--max_tokens", "128", "--max_model_len", "1152")


# ------------------------------------------------------------------------------------ an object


def last(run: Path) -> dict[str, Path]:
    """The model that a run leaves: the best by validation where it keeps one (SFT), else the last."""
    found = [p for p in run.glob("checkpoint-*") if (p / "config.json").exists()]
    by_step = lambda path: int(path.name.split("-")[1].replace("best", str(10**9)))
    return {"last": max(found, key=by_step)} if found else {}


@dataclass(frozen=True)
class Run:
    """One training and what of it is evaluated; shared by all objects that name it."""

    name: str  # its folder below the model's; runs of a name may differ in checkpoints alone
    flags: tuple[str, ...] | None  # for train.py, after the recipe; None: the model as published
    toy: tuple[str, ...] | None = ()  # further ones with --toy; None: no such run with it
    evals: tuple[str, ...] = ()  # for eval.py on BFCL, such as --half 0
    checkpoints: Callable[[Path], dict[str, Path]] = last  # finished run's folder -> label: model
    start: str = ""  # RUN or RUN/STAGE: an earlier run whose checkpoint-best this one starts from


@dataclass(frozen=True)
class Work:
    """What `Object.show` is told beside the rows."""

    recipes: tuple[str, ...]
    toy: bool
    picture: Path  # to be written, or not

    def column(self, name: str) -> str:
        """The column that stands for one of BFCL: with --toy, accuracy stands for an overall."""
        return "accuracy" if self.toy and name.startswith("overall") else name


@dataclass(frozen=True)
class Object:
    """A table or figure.

    show  rows, work -> Markdown; draws work.picture where there is something to draw. A row, in
          the order recipes x runs x checkpoints:
              model       last part of the model's name, such as Qwen2.5-7B-Instruct
              run         Run.name
              checkpoint  label; None while the run has not ended
              scores      columns in percent: those of eval.columns; accuracy, tool_call and answer
                          with --toy; None without
              error       last line of a log; None where nothing has failed
              folder      of the run
              evaluation  folder of results.jsonl and report.md
              seconds     that training took, over the starts whose end the driver saw, or None
    """

    what: str  # one line, for --list
    runs: tuple[Run, ...]
    show: Callable[[list[dict], Work], str]
    recipes: tuple[str, ...] = ("recipes/qwen2.5-7b.args",)  # where the command line has none
    toy: str = "recipes/paper-toy.args"  # the recipe with --toy


# --------------------------------------------------------------------------------------- the work


@dataclass(frozen=True)
class Job:
    """A command that is due."""

    key: tuple[str, str, str | None]  # model, run, checkpoint; None: training
    argv: list[str]  # program and flags
    log: Path


class Process(subprocess.Popen):
    """A program of this repository whose output goes to a log; it gets SIGTERM when we end."""

    def __init__(self, argv: list[str], log: Path, threads: int, **options):
        self.began = time.time()
        log.parent.mkdir(parents=True, exist_ok=True)
        linux = sys.platform == "linux"
        die = (lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM)) if linux else None
        with open(log, "a") as file:
            self.log, self.start = log, file.tell()
            super().__init__(
                [sys.executable, *argv], cwd=REPO, stdout=file, stderr=subprocess.STDOUT, preexec_fn=die,
                env={"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ},
                **options,
            )  # fmt: skip

    def seconds(self) -> float:
        return round(time.time() - self.began, 1)

    def error(self) -> str:
        """The last line of the log that names an error, else its last line."""
        lines = self.log.read_bytes()[self.start :].decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()] or [f"exit code {self.returncode}"]
        named = [
            x
            for x in lines
            if re.match(r"(rank \d+: |\w+\.py: )?(error|[\w.]*(Error|Exception)): ", x)
        ]
        return (named or lines)[-1]


class Plan:
    """The runs of some objects and recipes: what has ended, what is due."""

    def __init__(self, args: argparse.Namespace):
        import data
        import train

        self.args, self.path, self.runs, self.settings = args, args.out / "results.jsonl", {}, {}
        self.views = defaultdict(dict)  # what objects evaluate of a run
        for name in args.objects:
            for at, run in self.runs_of(name):
                self.views[at][run.checkpoints] = None
                same = replace(self.runs.setdefault(at, run), checkpoints=run.checkpoints)
                assert same == run, f"two runs are named {run.name}"
        for (recipe, name), run in self.runs.items():
            flags = [f"@{recipe}", *(run.flags or ("--algo", "sft")), *self._toy(run)]
            with redirect_stdout(StringIO()):  # flags of other methods in the recipe
                self.settings[recipe, name] = train.parse_args(flags)[0]
        folders = [self.folder(at) for at in self.runs]
        assert len(folders) == len(set(folders)), "two recipes have the same model"
        rows = data.read_jsonl(self.path, growing=True)
        self.done = {tuple(row["key"]): row for row in rows}  # key -> line of the record
        for at in self.runs:
            old, new = self.done.get((self.model(at), at[1], None)), self.argv(at)
            if old and old["argv"] != new:
                raise SystemExit(
                    f"error: {self.path} has run {at[1]} with other flags ({' '.join(old['argv'])} "
                    f"then, {' '.join(new)} now): give another --out"
                )

    def recipes(self, name: str) -> list[str]:
        """The recipes of an object."""
        thing = KNOWN[name]
        return self.args.recipes or ([thing.toy] if self.args.toy else [*thing.recipes])

    def runs_of(self, name: str) -> list[tuple[tuple, Run]]:
        """(recipe, name of the run) and run, of an object."""
        runs = [run for run in KNOWN[name].runs if not (self.args.toy and run.toy is None)]
        return [((recipe, run.name), run) for recipe in self.recipes(name) for run in runs]

    def _toy(self, run: Run) -> tuple:
        return run.toy if self.args.toy and run.flags is not None else ()

    def model(self, at: tuple) -> str:
        return Path(self.settings[at].model_name_or_path).name

    def folder(self, at: tuple) -> Path:
        return self.args.out / self.model(at) / at[1]

    def argv(self, at: tuple) -> list[str]:
        """train.py's command line, where a run has one."""
        run, argv = self.runs[at], ["train.py", f"@{at[0]}"]
        if run.start:
            model = self.args.out / self.model(at) / run.start / "checkpoint-best"
            argv += ["--model_name_or_path", str(model)]
        return [*argv, *(run.flags or ()), *self._toy(run)]

    def ended(self, key: tuple) -> bool:
        return key in self.done and not self.done[key]["error"]

    def checkpoints(self, at: tuple, views: Iterable[Callable]) -> dict[str, Path | str]:
        """What is to be evaluated of a run, as far as it is known."""
        if self.runs[at].flags is None:
            return {"base": self.settings[at].model_name_or_path}
        trained = self.ended((self.model(at), at[1], None))
        found = [view(self.folder(at)) for view in views] if trained else []
        return {label: path for view in found for label, path in view.items()}

    def due(self) -> list[Job]:
        """All that can begin now, evaluations of a run before the next run."""
        found = []
        wanted = self.args.only or {name for _, name in self.runs}
        for at, run in [(at, run) for at, run in self.runs.items() if at[1] in wanted]:
            model, folder, settings = self.model(at), self.folder(at), self.settings[at]
            begins = not run.start or self.ended((model, run.start.split("/")[0], None))
            if run.flags is not None and begins and not self.ended((model, at[1], None)):
                argv = [*self.argv(at), "--output_dir", str(folder)]
                argv += ["--resume_from_checkpoint", "latest"]
                found.append(Job((model, at[1], None), argv, folder / "log.txt"))
            for label, checkpoint in self.checkpoints(at, self.views[at]).items():
                if self.ended((model, at[1], label)):
                    continue
                out = folder / f"eval-{label}"
                argv = ["eval.py", str(checkpoint), *(TOY if self.args.toy else run.evals)]
                argv += ["--output_dir", str(out), "--engine", settings.engine]
                argv += ["--max_num_seqs", str(settings.max_num_seqs)]
                argv += ["--tensor_parallel_size", str(settings.vllm_tensor_parallel_size)]
                for name in ("system_prompt", "user_prompt"):
                    path = getattr(settings, name)
                    argv += [f"--{name}", path] if path and run.flags is None else []
                found.append(Job((model, at[1], label), argv, out / "log.txt"))
        return found

    def note(self, job: Job, process: Process) -> None:
        """Record how a job ended; a training's seconds are those of all its starts."""
        error = process.error() if process.returncode else None
        row = {"key": job.key, "error": error, "seconds": process.seconds()}
        earlier = self.done.get(job.key, {}).get("seconds", 0)
        row["seconds"] = round(row["seconds"] + earlier, 1)
        if job.key[2] is None:
            row["argv"] = job.argv[: job.argv.index("--output_dir")]
        self.done[job.key] = row
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if not error and job.key[2] is None:
            for state in job.log.parent.rglob("checkpoint-*-state"):
                shutil.rmtree(state)

    def rows(self, name: str) -> list[dict]:
        """What `Object.show` gets."""
        from tasks import scores

        found = []
        for at, run in self.runs_of(name):
            training = self.done.get((self.model(at), at[1], None), {"error": "not run"})
            labels = [*self.checkpoints(at, [run.checkpoints])]
            for label in labels or [None] * bool(training["error"]):
                own = self.done.get((self.model(at), at[1], label), {})
                out = self.folder(at) / f"eval-{label}"
                whole = label is not None and own and not own["error"]
                row = {"model": self.model(at), "run": at[1], "checkpoint": label}
                row |= {"scores": scores.columns_of(out) if whole else None}
                row |= {"error": own.get("error"), "seconds": training.get("seconds")}
                found.append(row | {"folder": self.folder(at), "evaluation": out})
        return found


def carry_out(plan: Plan, args: argparse.Namespace) -> list[str]:
    """Start what is due, args.jobs at a time, until nothing is left; the errors of what failed."""
    lock = open(args.out / ".lock", "w")  # noqa: SIM115 - held by us and by what we start
    for second in range(PATIENCE + 1):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if second == 0:
                print(f"{args.out} is in use; waiting {PATIENCE} s for its processes to end")
            time.sleep(1)
    else:
        raise SystemExit(f"error: another driver works in --out {args.out}: end it, or wait for it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    threads = max(1, (os.cpu_count() or 1) // (args.jobs * args.ranks))
    running, failed = {}, {}
    bar = tqdm(desc="runs and evaluations", dynamic_ncols=True)
    try:
        while True:
            for job, process in [*running.values()]:
                if process.poll() is not None:
                    del running[job.key]
                    plan.note(job, process)
                    name = "/".join(filter(None, job.key))
                    if process.returncode:
                        failed[job.key] = f"{name}: {process.error()} ({job.log})"
                        bar.write(f"failed  {failed[job.key]}")
                    bar.update()
            due = [job for job in plan.due() if job.key not in {**running, **failed}]
            for job in due[: args.jobs - len(running)]:
                argv = [*torchrun, *job.argv] if args.ranks > 1 else job.argv
                process = Process(argv, job.log, threads, pass_fds=(lock.fileno(),))
                running[job.key] = job, process
            left = {*running, *(job.key for job in due)}
            bar.total = bar.n + sum(
                1 + (key[2] is None) for key in left
            )  # an evaluation of each run
            names = ", ".join("/".join(filter(None, key)) for key in running)
            bar.set_postfix_str(names, refresh=names != bar.postfix)
            if not running:
                return list(failed.values())
            time.sleep(0.2)
    finally:
        bar.close()
        for _, process in running.values():
            process.send_signal(signal.SIGTERM)
        for _, process in running.values():
            process.wait()


# -------------------------------------------------------------------------- for tables and pictures


def table(heads: list[str], lines: list[list]) -> str:
    """Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def cell(ours: float | None, paper: float | None = None, form: str = ".2f") -> str:
    """`ours (paper)`, a dash for ours that is missing and nothing for the paper's."""
    text = "–" if ours is None else format(ours, form)
    return text if paper is None else f"{text} ({paper:{form}})"


def failures(rows: list[dict]) -> str:
    """Markdown: a line for every row without a result."""
    lines = []
    for row in rows:
        if row["scores"] is None:
            name = "/".join(filter(None, (row["model"], row["run"], row["checkpoint"])))
            state = f"**failed**: `{row['error']}`" if row["error"] else "not finished"
            lines.append(f"- {name}: {state}")
    return "\n".join(lines)


def bars(panels: dict[str, dict[str, tuple]], picture: Path, columns: int = 3) -> None:
    """Draw a panel per title: for each row, ours as a bar, the paper's as a mark (either None)."""
    from common import pyplot

    plt = pyplot()
    columns = min(columns, len(panels))
    high = -(-len(panels) // columns)
    names = list(next(iter(panels.values())))
    size = (2 + 3.2 * columns, 0.9 + high * (0.6 + 0.26 * len(names)))
    figure, axes = plt.subplots(high, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, values) in zip(axes.flat, panels.items()):
        known = [(y, ours) for y, (ours, _) in enumerate(values.values()) if ours is not None]
        drawn = axis.barh(*zip(*known), color="#1f77b4", label="ours") if known else []
        if known:
            axis.bar_label(drawn, fmt=" %.1f", fontsize=7)
        marks = [(paper, y) for y, (_, paper) in enumerate(values.values()) if paper is not None]
        if marks:
            axis.plot(*zip(*marks), "D", ms=5, mfc="none", mec="#d62728", label="the paper's")
        axis.set_yticks(range(len(values)), values if axis.get_subplotspec().is_first_col() else [])
        axis.set(title=title, xlim=(0, None), ylim=(len(values) - 0.5, -0.5))
        axis.spines[["top", "right"]].set_visible(False)
    found = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels())
    }
    figure.legend(found.values(), found, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel("percent", fontsize=9)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------ the program


def objects() -> dict[str, Object]:
    """All objects by name, ToolUPT's and iTool's."""
    found = {}
    for module in ("paper_toolupt", "paper_itool"):
        if (REPO / f"bench/{module}.py").exists():
            found |= importlib.import_module(module).OBJECTS
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Own flags; `objects` and `recipes` from the positional words."""
    KNOWN.update(objects())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="OBJECT | @RECIPE", help="see --list")
    parser.add_argument("--list", action="store_true", help="the objects")
    parser.add_argument(
        "--toy", action="store_true", help="a small model, the toy world, few steps"
    )
    parser.add_argument("--only", nargs="+", metavar="RUN", help="rows to run, others stay open")
    parser.add_argument("--out", type=Path, help="default: runs/paper, runs/paper-toy with --toy")
    parser.add_argument("--ranks", type=int, help="of a run; default: the GPUs, else 1")
    parser.add_argument("--jobs", type=int, help="side by side; default: 1, two with --toy")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_intermixed_args(argv)
    if args.list:
        for name, thing in KNOWN.items():
            print(f"{name:18s}{thing.what}  [{len(thing.runs)} runs]")
        parser.exit()
    args.objects = [word for word in args.words if word[0] != "@"]
    args.recipes = [word[1:] for word in args.words if word[0] == "@"]
    unknown = [name for name in args.objects if name not in KNOWN]
    if unknown or not args.objects:
        wrong = f"unknown object {unknown[0]}" if unknown else "name an object"
        parser.error(f"{wrong}; choose among {', '.join(KNOWN)}")
    rows = [run.name for name in args.objects for run in KNOWN[name].runs]
    for name in args.only or []:
        if name not in rows:
            parser.error(f"--only {name}: choose among {', '.join(dict.fromkeys(rows))}")
    args.out = (args.out or REPO / f"runs/paper{'-toy' * args.toy}").absolute()
    if args.ranks is None:
        import torch

        args.ranks = max(1, torch.cuda.device_count())
    args.jobs = args.jobs or (2 if args.toy else 1)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 1 if a run failed."""
    args = parse_args(argv)
    os.chdir(REPO)  # recipes and data are named from here
    plan = Plan(args)
    failed = [] if args.draw or not plan.runs else carry_out(plan, args)
    for name in args.objects:
        work = Work(tuple(plan.recipes(name)), args.toy, args.out / f"{name}.png")
        rows = plan.rows(name)
        text = "\n\n".join(filter(None, (KNOWN[name].show(rows, work), failures(rows))))
        (args.out / f"{name}.md").write_text(text + "\n")
        print(f"\n{text}\n\n{args.out}/{name}.md{', .png' * work.picture.exists()}")
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
