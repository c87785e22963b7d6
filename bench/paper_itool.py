"""iTool's tables and figures, for bench/paper.py: what each needs, and how it looks.

    python bench/paper.py itool-table3 itool-figure5
    python bench/paper.py itool-figure9 @recipes/itool-llama3.2-3b.args @recipes/MINE.args
    python bench/paper.py itool-figure7 --toy

One warm-up and one base SFT per model serve all objects: their runs start from the checkpoint-best
of `itool/warmup` or `base_sft`. Numbers in brackets are the paper's. Its figures print none, so
pictures have ours alone. The paper does not say which settings a preference loss was selected by;
here it is accuracy on the held-out examples, and BFCL only measures. checkpoint-best is chosen by
it as well: where no iteration raises it, iTool's row is the warm-up's. Shares of the training data
are ours.

Where the paper contradicts itself (tests/test_paper_itool.py repeats the arithmetic):
- An overall is the mean of Non-live, Live and Multi-turn in 23 of Table 1's 27 rows. It is not for
  iTool-8B (63.26; the mean is 63.65), GPT-4-turbo (FC; 61.89, 63.30), Qwen2.5-1.5B (48.82, 40.77)
  and Llama-3.2-3B (42.98, 22.01: its Non-live of 11.11 seems a misprint), nor for iTool in Table 4
  (62.93, 60.95; 63.93, 65.32).
- Section 4.3.3 names 63.22 for Qwen2.5-7B, where Table 4 has 63.93, and a gain of 18 points on
  Llama-3.2-3B, where it has 19.95.

With --toy, the columns are accuracy, and accuracy where a call and where an answer is due.
"""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from paper import Object, Run, Work, bars, cell, table

from data import read_jsonl
from tasks import scores

COLUMNS = {
    "Overall": "overall_v3",
    "Non-live": "non_live_v3",
    "Live": "live_v3",
    "Multi-turn": "multi_turn",
    "Rel": "relevance",
    "Irrel": "irrelevance",
}
TOY_COLUMNS = {"Overall": "accuracy", "Calls": "tool_call", "Answers": "answer"}
KEY = ("Overall", "Live", "Multi-turn")  # of the figures

# ------------------------------------------------------------------------------ the paper's numbers

LEADERBOARD = """
63.26 iTool-8B (FC) 88.82 78.29 23.84 84.90 80.72
62.19 GPT-4o-2024-08-06 (FC) 86.15 75.43 25.00 63.41 82.93
61.89 GPT-4-turbo-2024-04-09 (FC) 88.80 76.23 24.88 73.17 79.76
60.47 GPT-4o-mini-2024-07-18 (FC) 83.72 70.19 27.50 80.49 71.77
60.44 ToolACE-8B (FC) 88.94 74.99 17.38 80.49 85.71
58.15 GPT-4o-mini-2024-07-18 (Prompt) 88.69 74.63 11.13 75.61 81.00
57.99 xLAM-8x22b-r (FC) 87.51 71.97 14.50 85.37 67.29
57.92 Gemini-1.5-Flash-002 (Prompt) 87.60 76.28 9.88 85.37 78.54
57.69 Hammer2.0-7b (FC) 88.54 69.79 14.75 95.12 68.46
57.45 o1-mini-2024-09-12 (Prompt) 83.84 75.39 13.12 48.78 88.04
56.80 mistral-large-2407 (FC) 81.41 68.37 20.62 75.61 49.44
56.51 Gemini-1.5-Pro-002 (Prompt) 89.63 74.41 5.50 65.85 77.30
55.86 Gemini-1.5-Flash-001 (Prompt) 85.74 69.21 12.62 82.93 67.84
55.78 GPT-4-turbo-2024-04-09 (Prompt) 88.80 69.04 9.50 82.93 58.95
55.10 Gemini-1.5-Pro-001 (Prompt) 86.17 73.12 6.00 56.10 85.00
54.41 xLAM-7b-r (FC) 80.86 67.88 14.50 97.56 64.05
54.27 Qwen2.5-7B-Instruct (Prompt) 85.58 65.97 11.25 92.68 64.95
53.66 Llama-3.1-70B-Instruct (Prompt) 87.50 61.13 12.38 92.68 58.38
53.66 Gemma-2-27b-it (Prompt) 87.39 69.48 4.12 87.80 68.76
53.00 GPT-3.5-Turbo-0125 (FC) 78.52 61.22 19.25 97.56 35.16
52.50 Gemma-2-9b-it (Prompt) 84.52 69.21 3.75 87.80 72.45
51.59 Hammer2.0-1.5b (FC) 84.44 63.22 7.13 92.68 60.64
51.50 Meta-Llama-3-70B-Instruct (Prompt) 85.10 66.15 3.25 92.68 52.78
50.15 Llama-3.1-8B-Instruct (Prompt) 81.15 57.93 11.38 78.05 41.62
49.02 xLAM-8x7b-r (FC) 73.93 69.12 4.00 87.80 68.12
48.82 Qwen2.5-1.5B-Instruct (Prompt) 53.99 61.71 6.62 75.61 67.17
42.98 Llama-3.2-3B-Instruct (Prompt) 11.11 50.91 4.00 63.41 68.81
"""  # Table 1: overall, model, the other columns
ABLATION = {  # Table 3, on Llama-3.1-8B-Instruct: run, checkpoint -> Non-live, Live, Multi-turn
    "Base Model": (81.15, 57.93, 11.38),
    "+ base SFT": (88.94, 74.99, 17.38),
    "+ base SFT + IRL": (88.86, 76.51, 20.65),
    "+ warm-up SFT": (88.35, 75.84, 19.65),
    "+ warm-up SFT + IRL (iTool)": (88.82, 78.29, 23.84),
}
BASES = {  # Table 4: model -> all columns of the base model, of base SFT, of iTool
    "Llama-3.1-8B-Instruct": (
        (50.15, 81.15, 57.93, 11.38, 78.05, 41.62),
        (60.44, 88.94, 74.99, 17.38, 80.49, 85.71),
        (63.26, 88.82, 78.29, 23.84, 84.90, 80.72),
    ),
    "Llama-3.2-3B-Instruct": (
        (42.98, 11.11, 50.91, 4.00, 63.41, 68.81),
        (58.22, 89.27, 73.90, 11.50, 84.37, 78.20),
        (62.93, 90.59, 76.43, 15.82, 84.27, 87.82),
    ),
    "Qwen2.5-7B-Instruct": (
        (54.27, 85.58, 65.97, 11.25, 92.68, 64.95),
        (60.69, 90.02, 76.23, 15.92, 73.47, 86.98),
        (63.93, 91.29, 82.28, 22.38, 80.28, 85.12),
    ),
}
DATA = {  # Table 5: data -> model -> base SFT and iTool, mean of Live and Multi-turn
    "ToolACE": {
        "Llama-3.1-8B-Instruct": (46.18, 51.06),
        "Llama-3.2-3B-Instruct": (40.36, 46.85),
    },
    "xLAM": {"Llama-3.1-8B-Instruct": (42.74, 48.47), "Llama-3.2-3B-Instruct": (37.72, 42.14)},
    "BFCL-half": {"Llama-3.1-8B-Instruct": (41.32, 44.97), "Llama-3.2-3B-Instruct": (34.65, 36.82)},
}
XLAM = {"scores": {"overall_v3": 57.99}}  # xLAM-8x22b-r in Table 1
HOURS = {"Base Model": 0, "SFT Baseline": 10, "iTool": 28}  # Table 8, on eight V100
RATES = ("1e-6", "5e-7", "3e-7")  # Table 9, as the next two
GRID = {
    "simpo": {"simpo_beta": ("2.0", "2.5"), "simpo_margin": ("0.5", "1.0", "1.4")},
    "dpo": {"dpo_beta": ("0.01", "0.05", "0.1")},
    "ipo": {"ipo_tau": ("0.01", "0.05", "0.1")},
    "orpo": {"orpo_lam": ("0.01", "0.05", "0.1")},
}
BEST = {  # values in the order of GRID, then the rate
    "simpo": ("2.5", "0.5", "1e-6"),
    "dpo": ("0.1", "3e-7"),
    "ipo": ("0.1", "1e-6"),
    "orpo": ("0.1", "3e-7"),
}
SHARES = ("0.1", "0.3", "0.5", "0.75", "1")  # of the training data; Figures 1 (b), 8, 9; ours
TOY_SHARES = ("0.3",)  # and 1

# ---------------------------------------------------------------------------------- the checkpoints


def best(run: Path) -> dict[str, Path]:
    """The checkpoint of the highest accuracy on held-out examples; SFT: of the lowest loss."""
    return {"best": run / "checkpoint-best"}


def with_warmup(run: Path) -> dict[str, Path]:
    """What the warm-up left as well."""
    return {"warm-up": run / "warmup/checkpoint-best"} | best(run)


def stages(run: Path) -> dict[str, Path]:
    """The ends of the warm-up's stages."""
    ends = {row["stage"]: row["step"] for row in _steps(run / "warmup") if "stage" in row}
    names = {1: "easy", 2: "medium", 3: "hard"}
    return {names[k]: run / f"warmup/checkpoint-{step}" for k, step in ends.items()}


def iterations(run: Path) -> dict[str, Path]:
    """The ends of the iterations; 0 is the warm-up's best. One without pairs repeats the last."""
    found = {"0": run.parent / "itool/warmup/checkpoint-best"}
    ends = {row["iteration"]: row["step"] for row in _steps(run) if "iteration" in row}
    for row in read_jsonl(run / "searches.jsonl"):
        last = found[str(row["iteration"] - 1)]
        step = ends.get(row["iteration"])
        found[str(row["iteration"])] = run / f"checkpoint-{step}" if step else last
    return found


def _steps(run: Path) -> list[dict]:
    return list(read_jsonl(run / "metrics.jsonl"))[1:]


# ----------------------------------------------------------------------------------------- the runs

WARMUP, BASE_SFT = "itool/warmup", "base_sft"  # folders whose checkpoint-best runs start from
ALONE = ("--algo", "itool", "--stages", "itool")

BASE = Run("zero_shot", None)
ITOOL = Run("itool", ("--algo", "itool"), checkpoints=best)
SFT = Run(
    "base_sft", ("--algo", "itool", "--stages", "warmup", "--split", "none"), checkpoints=best
)
SFT_IRL = Run("base_sft_irl", ALONE, checkpoints=best, start=BASE_SFT)
NO_MCTS = Run("no_mcts", (*ALONE, "--no_mcts"), checkpoints=best, start=WARMUP)
ITERATIONS = Run("iterations", (*ALONE, "--iterations", "5"), checkpoints=iterations, start=WARMUP)
FILES = {  # Table 5's data sets beside that of the recipe, and what stands for them with --toy
    "xLAM": (["xlam:data/xlam_function_calling_60k.json"], ["toy:hard-train"]),
    "BFCL-half": (["bfcl_half"], ["toy", "toy:hard-train"]),
}


def on(data: str, run: Run) -> Run:
    """The same run on a row of Table 5; 42 is iTool's seed."""
    if data == "ToolACE":
        return run
    file, toy = FILES[data]
    flags, evals = (*run.flags, "--train_file", *file), ("--half", "42") * (data == "BFCL-half")
    name = f"{run.name}_{data}"
    return replace(run, name=name, flags=flags, toy=("--train_file", *toy), evals=evals)


def with_share(run: Run, share: str) -> Run:
    """The same run on a share of the training data; with --toy of an eighth of it."""
    if share == "1":
        return run
    toy = ("--train_fraction", str(float(share) / 8)) if share in TOY_SHARES else None
    flags = (*run.flags, "--train_fraction", share)
    return replace(run, name=f"{run.name}_{share}", flags=flags, toy=toy)


def preference(loss: str, values: tuple[str, ...]) -> Run:
    """iTool's iterations from the warm-up with a cell of Table 9's grid; the default is ITOOL."""
    if (loss, values) == ("simpo", BEST["simpo"]):
        return ITOOL
    *scales, rate = values
    flags = [*ALONE, "--preference", loss, "--learning_rate", rate]
    flags += [x for name, value in zip(GRID[loss], scales) for x in (f"--{name}", value)]
    toy = None
    if values == BEST[loss] or (loss, rate) == ("simpo", "5e-7") and scales == ["2.5", "0.5"]:
        toy = ("--learning_rate", str(100 * float(rate)))  # for adapters of the toy model
    name = "_".join((loss, *values))
    return Run(name, tuple(flags), toy, checkpoints=best, start=WARMUP)


CELLS = {loss: [*itertools.product(*scales.values(), RATES)] for loss, scales in GRID.items()}

# --------------------------------------------------------------------------- tables and pictures

Line = tuple[str, dict | None, tuple]  # name, our row, the paper's values by column


class Rows:
    """The rows of an object by model, run and checkpoint."""

    def __init__(self, rows: list[dict], work: Work):
        self.rows, self.work = rows, work
        self.models = [*dict.fromkeys(row["model"] for row in rows)]
        self.columns = TOY_COLUMNS if work.toy else COLUMNS
        self.key = [*TOY_COLUMNS] if work.toy else KEY

    def get(self, model: str, run: Run, checkpoint: str | None = None) -> dict | None:
        """The row of a checkpoint, the only one where none is named; None if it is missing."""
        found = [row for row in self.rows if (row["model"], row["run"]) == (model, run.name)]
        found = [row for row in found if checkpoint in (None, row["checkpoint"])]
        return found[-1] if found else None

    def score(self, row: dict | None, column: str) -> float | None:
        """Percent, None where it was not measured."""
        return ((row or {}).get("scores") or {}).get(self.columns.get(column, column))

    def tables(self, groups: dict[str, list[Line]], columns: Iterable[str], *, drawn: int) -> str:
        """A table per title, ours with the paper's in brackets; bars of the first `drawn`."""
        columns, parts, panels = [*columns], [], defaultdict(dict)
        shown = [*self.columns] if self.work.toy else columns
        for number, (title, lines) in enumerate(groups.items()):
            cells = []
            for name, row, papers in lines:
                theirs = {} if self.work.toy else dict(zip(columns, papers))
                pairs = [(self.score(row, column), theirs.get(column)) for column in shown]
                cells.append([name, *(cell(*pair) for pair in pairs)])
                for column, pair in zip(shown, pairs):
                    if number < drawn:
                        panels[column][name if drawn == 1 else f"{title}: {name}"] = pair
            parts.append(table([title, *shown], cells))
        if any(panels.values()):
            bars(panels, self.work.picture)
        return "\n\n".join(parts)

    def claims(self, model: str, column: str, found: list[tuple]) -> str:
        """A table of differences in a column: what, our two rows, the paper's difference."""
        lines = []
        for what, above, below, papers in found:
            pair = self.score(above, column), self.score(below, column)
            ours = None if None in pair else pair[0] - pair[1]
            lines.append([what, cell(ours, None if self.work.toy else papers, "+.2f")])
        return table([f"{model}: difference in {column}", "ours (the paper's)"], lines)


def curves(path: Path, panels: dict[str, dict[str, list]], x: str, y: str) -> None:
    """Draw a panel per title: label -> points (x, y); points without a value are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.8 * len(panels), 3.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for label, points in lines.items():
            if points := [point for point in points if None not in point]:
                axis.plot(*zip(*points), "o-", label=label)
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------- the tables


def table1(rows: list[dict], work: Work) -> str:
    """The leaderboard with our rows in it."""
    r, lines, ours = Rows(rows, work), [], {}
    for model in r.models:
        ours |= {f"{model} (Prompt)": r.get(model, BASE), f"iTool on {model}": r.get(model, ITOOL)}
    for line in () if work.toy else LEADERBOARD.strip().splitlines():
        overall, *name, a, b, c, d, e = line.split()
        name = " ".join(name)
        mine = "iTool on Llama-3.1-8B-Instruct" if name == "iTool-8B (FC)" else name
        lines.append((name, ours.pop(mine, None), tuple(map(float, (overall, a, b, c, d, e)))))
    lines += [(name, row, ()) for name, row in ours.items()]
    parts = [r.tables({"model": lines}, COLUMNS, drawn=1)]
    for model in r.models:
        rivals = (
            []
            if work.toy
            else [("iTool - xLAM-8x22b-r, the paper's", r.get(model, ITOOL), XLAM, 5.27)]
        )
        found = [("iTool - base model", r.get(model, ITOOL), r.get(model, BASE), 13.11), *rivals]
        parts.append(r.claims(model, "Overall", found))
    return "\n\n".join(parts)


def table3(rows: list[dict], work: Work) -> str:
    """Warm-up and iterations, each left out."""
    r, groups = Rows(rows, work), {}
    for model in r.models:
        found = [r.get(model, BASE), r.get(model, SFT), r.get(model, SFT_IRL)]
        found += [r.get(model, ITOOL, "warm-up"), r.get(model, ITOOL, "best")]
        known = model == "Llama-3.1-8B-Instruct"
        papers = [values if known else () for values in ABLATION.values()]
        groups[model] = [*zip(ABLATION, found, papers)]
    parts = [r.tables(groups, ("Non-live", "Live", "Multi-turn"), drawn=len(groups))]
    for model, lines in groups.items():
        base, sft, _, warm, itool = (row for _, row, _ in lines)
        found = [("warm-up - base SFT", warm, sft, 2.3), ("iTool - warm-up", itool, warm, 4.2)]
        found += [("iTool - base SFT", itool, sft, 6.5), ("iTool - base model", itool, base, 12.5)]
        parts.append(r.claims(model, r.key[-1 if not work.toy else 0], found))
    return "\n\n".join(parts)


def table4(rows: list[dict], work: Work) -> str:
    """Base model, base SFT and iTool of several models."""
    r, groups = Rows(rows, work), {}
    names = {"Vanilla": BASE, "Baseline": SFT, "Ours": ITOOL}
    for model in r.models:
        found = [r.get(model, run) for run in names.values()]
        groups[model] = [*zip(names, found, BASES.get(model, ((), (), ())))]
    gain = {"Llama-3.2-3B-Instruct": 18.0}
    parts = [r.tables(groups, COLUMNS, drawn=len(groups))]
    for model, lines in groups.items():
        (_, base, _), _, (_, ours, _) = lines
        found = [("iTool - base model", ours, base, gain.get(model))]
        parts.append(r.claims(model, "Overall", found))
    return "\n\n".join(parts)


def table5(rows: list[dict], work: Work) -> str:
    """Mean of Live and Multi-turn after training on three data sets."""
    r, column = Rows(rows, work), "accuracy" if work.toy else "live_multi_turn"
    parts, panels = [], defaultdict(dict)
    minus = lambda a, b: None if None in (a, b) else a - b
    for model in r.models:
        lines = []
        for name, papers in DATA.items():
            ours = [r.score(r.get(model, on(name, run)), column) for run in (SFT, ITOOL)]
            theirs = (None, None) if work.toy else papers.get(model, (None, None))
            cells = [cell(*pair) for pair in zip(ours, theirs)]
            cells += [cell(minus(*ours[::-1]), minus(*theirs[::-1]), "+.2f")]
            lines.append([name, *cells])
            for label, pair in zip(("base SFT", "iTool"), zip(ours, theirs)):
                panels[name][f"{model}: {label}"] = pair
        parts.append(table([model, "Baseline (SFT)", "iTool", "difference"], lines))
    bars(panels, work.picture)
    return "\n\n".join(parts)


def table8(rows: list[dict], work: Work) -> str:
    """Accuracy against hours of training."""
    r, parts, panels = Rows(rows, work), [], {}
    for model in r.models:
        known = model == "Llama-3.1-8B-Instruct" and not work.toy
        lines, panels[model] = [], {column: [] for column in r.key[1:]}
        for k, (name, run) in enumerate(zip(HOURS, (BASE, SFT, ITOOL))):
            row = r.get(model, run)
            spent = hours(row)
            total = None if spent is None else sum(spent.values())
            papers = BASES[model][k][2:4] if known else (None, None)
            values = [r.score(row, column) for column in r.key[1:]]
            cells = [cell(*pair) for pair in zip(values, papers)]
            cells += [cell(total, HOURS[name] if known else None)]
            shown = {part: x for part, x in (spent or {}).items() if x >= 0.005}
            cells += [", ".join(f"{part} {x:.2f}" for part, x in shown.items())]
            lines.append([name, *cells])
            for column, value in zip(panels[model], values):
                panels[model][column].append((total, value))
        parts.append(table([model, *r.key[1:], "hours", "of which"], lines))
    curves(work.picture, panels, "hours", "accuracy, %")
    return "\n\n".join([*parts, "Hours leave out saving. The paper's are of eight V100 of 32 GB."])


def hours(row: dict | None) -> dict[str, float] | None:
    """Hours of a run by part; none for a model as published, None where it has not ended."""
    file = Path(row["folder"]) / "hours.json" if row else None
    if row and row["run"] == BASE.name:
        return {}
    if not file or not file.exists():
        return None
    found = Counter()
    for stage, parts in json.loads(file.read_text()).items():
        update = "SFT" if row["run"] == SFT.name else "preference update"
        names = {"update": "warm-up" if stage == "warmup" else update}
        found.update({names.get(part, part): x for part, x in parts.items() if part != "total"})
    return dict(found)


def table9(rows: list[dict], work: Work) -> str:
    """Each preference loss at its best setting, and all that were measured."""
    r, groups = Rows(rows, work), {}
    for model in r.models:
        top, grid = [], []
        for loss, cells in CELLS.items():
            found = {values: r.get(model, preference(loss, values)) for values in cells}
            right = {v: held_out(row) for v, row in found.items() if row and row["scores"]}
            if right:
                best = max(right, key=right.get)
                papers = (
                    "the paper's choice"
                    if best == BEST[loss]
                    else f"paper: {say(loss, BEST[loss])}"
                )
                top.append((f"{loss}, {say(loss, best)} ({papers})", found[best], ()))
            grid += [
                (f"{loss}, {say(loss, v)}, {100 * accuracy:.1f}", found[v], ())
                for v, accuracy in right.items()
            ]
        groups[f"{model}: best on held-out examples"] = top
        if len(grid) > len(top):
            groups[f"{model}: all, accuracy on held-out examples"] = grid
    return r.tables(groups, COLUMNS, drawn=1)


def say(loss: str, values: tuple[str, ...]) -> str:
    """A cell of the grid in words."""
    return ", ".join(map(" ".join, zip((*GRID[loss], "learning_rate"), values)))


def held_out(row: dict) -> float:
    """The highest accuracy of a run on its held-out examples."""
    steps = _steps(Path(row["folder"]))
    return max(step["eval/accuracy"] for step in steps if "eval/accuracy" in step)


# -------------------------------------------------------------------------------------- the figures


def gains(labels: dict[str, Run], columns: Callable[[Rows], Sequence[str]]) -> Callable:
    """The `show` of a figure of gains over the base model against the share of training data."""

    def show(rows: list[dict], work: Work) -> str:
        r, parts, panels = Rows(rows, work), [], {}
        for column in columns(r):
            lines, panels[column] = [], {}
            for model, (label, run) in itertools.product(r.models, labels.items()):
                before = r.score(r.get(model, BASE), column)
                after = [r.score(r.get(model, with_share(run, share)), column) for share in SHARES]
                gain = [None if None in (x, before) else x - before for x in after]
                name = f"{model}, {label}"
                lines.append([name, *map(cell, gain)])
                points = [(0.0, 0.0), *zip((100 * float(share) for share in SHARES), gain)]
                panels[column][name] = points
            parts.append(table([f"gain, {column}", *SHARES], lines))
        curves(work.picture, panels, "share of the training data, %", "gain over the base, points")
        return "\n\n".join(parts)

    return show


def progress(what: str) -> Callable:
    """The `show` of a figure of accuracy over the checkpoints of a run."""

    def show(rows: list[dict], work: Work) -> str:
        r, panels, groups = Rows(rows, work), {}, {}
        for model in r.models:
            own = [row for row in r.rows if row["model"] == model and row["scores"]]
            lines = [(row["checkpoint"], row, ()) for row in own]
            groups[f"{model}, {what}"] = lines
            panels[model] = {
                column: [(name, r.score(row, column)) for name, row, _ in lines] for column in r.key
            }
        curves(work.picture, panels, what, "accuracy, %")
        return r.tables(groups, COLUMNS, drawn=0)

    return show


def figure3(rows: list[dict], work: Work) -> str:
    """Error types of base SFT over Live and Non-live."""
    counts = {}
    for row in rows:
        if row["scores"]:
            found, _ = scores.error_counts([*read_jsonl(row["evaluation"] / "results.jsonl")])
            shown = [name for name in found if work.toy or name.startswith("all ")]
            counts |= {f"{row['model']}, {name}": found[name] for name in shown}
    if counts:
        scores.picture(counts, work.picture)
    return scores.error_table(counts)


def figure6(rows: list[dict], work: Work) -> str:
    """With the search and without."""
    r, groups = Rows(rows, work), {}
    for model in r.models:
        names = {"iTool": ITOOL, "w/o MCTS": NO_MCTS}
        groups[model] = [(name, r.get(model, run), ()) for name, run in names.items()]
    return r.tables(groups, COLUMNS, drawn=len(groups))


def diversity(rows: list[dict], work: Work) -> str:
    """Distinct n-grams and calls of the search's samples, iteration by iteration."""
    r, parts, panels = Rows(rows, work), [], {}
    for model in r.models:
        folder = Path(r.get(model, ITERATIONS)["folder"])
        searches = list(read_jsonl(folder / "searches.jsonl", growing=True))
        numbers = [search["iteration"] for search in searches]
        lines, panels[model] = [], {}
        for name in [name for name in (searches or [{}])[0] if name.startswith("diversity/")]:
            values = [search[name] for search in searches]
            label = name.removeprefix("diversity/").replace("_", " ")
            lines.append([label, *(f"{value:.3f}" for value in values)])
            panels[model][label] = [*zip(numbers, values)]
        parts.append(table([f"{model}, iteration", *numbers], lines))
    curves(work.picture, panels, "iteration", "different / all")
    return "\n\n".join(parts)


def all_shares(*runs: Run) -> tuple[Run, ...]:
    return (BASE, *(with_share(run, share) for run in runs for share in SHARES))


TABLE_4 = tuple(f"recipes/itool-{x}.args" for x in ("llama3.1-8b", "llama3.2-3b", "qwen2.5-7b"))
FIGURE_9 = (*TABLE_4[1::-1], "recipes/itool-qwen2.5-32b.args")
SHARED = replace(ITOOL, checkpoints=lambda run: {})  # for its warm-up only


def thing(what: str, runs: Iterable[Run], show: Callable, recipes=TABLE_4[:1]) -> Object:
    """An object; runs that are named twice count once."""
    toy = "recipes/paper-itool-toy.args"
    return Object(what, tuple(dict.fromkeys(runs)), show, recipes, toy)


OBJECTS = {
    "itool-table1": thing(
        "leaderboard, base model and iTool among its rows", (BASE, ITOOL), table1
    ),
    "itool-table3": thing(
        "ablation of warm-up and iterations",
        (BASE, SFT, SFT_IRL, replace(ITOOL, checkpoints=with_warmup)),
        table3,
    ),
    "itool-table4": thing("three base models", (BASE, SFT, ITOOL), table4, TABLE_4),
    "itool-table5": thing(
        "ToolACE, xLAM, BFCL-half",
        (on(data, run) for data in DATA for run in (SFT, ITOOL)),
        table5,
        TABLE_4[:2],
    ),
    "itool-table8": thing("hours against accuracy", (BASE, SFT, ITOOL), table8),
    "itool-table9": thing(
        "preference losses, all settings",
        (ITOOL, *(preference(loss, values) for loss in GRID for values in CELLS[loss])),
        table9,
    ),
    "itool-figure1b": thing(
        "SFT, gain against the share of training data",
        all_shares(SFT),
        gains({"SFT": SFT}, lambda r: r.key if r.work.toy else ("Non-live", "Live")),
    ),
    "itool-figure3": thing("error types of base SFT", (SFT,), figure3),
    "itool-figure5": thing(
        "accuracy over the warm-up's stages",
        (BASE, replace(ITOOL, checkpoints=stages)),
        progress("stage"),
    ),
    "itool-figure6": thing("without the search", (ITOOL, NO_MCTS), figure6),
    "itool-figure7": thing(
        "accuracy over five iterations", (SHARED, ITERATIONS), progress("iteration")
    ),
    "itool-figure8": thing(
        "SFT and iTool, gain against the share of training data",
        all_shares(SFT, ITOOL),
        gains({"SFT": SFT, "iTool": ITOOL}, lambda r: r.key[:2]),
    ),
    "itool-figure9": thing(
        "SFT of three models, gain against the share of training data",
        all_shares(SFT),
        gains({"SFT": SFT}, lambda r: r.key[1:2]),
        FIGURE_9,
    ),
    "itool-figure10": thing(
        "preference losses at the paper's best settings",
        (ITOOL, *(preference(loss, values) for loss, values in BEST.items())),
        table9,
    ),
    "itool-diversity": thing(
        "diversity of the search's samples over five iterations", (SHARED, ITERATIONS), diversity
    ),
}
