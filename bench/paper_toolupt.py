"""ToolUPT's tables and figures: the paper's numbers, and how ours are laid out beside them.

Where the paper contradicts itself (tests/test_paper.py repeats the arithmetic):
- Section 5.1 gives ToolUPT's average as 56.6 %. Table 1 says 52.14, the mean of its four models,
  and all differences of that section follow from 52.14.
- Table 4, SFT: its columns give 44.77 as overall (evaluation.md has the formula), not 47.77. SFT's
  average would be 42.14 and ToolUPT's lead 10.00 instead of 9.25.
- Table 3, SFT and GRPO: the columns give 44.63 and 40.82 instead of 44.59 and 40.84.
All other rows agree with their columns within rounding, and all averages with their rows.
"""

import re
import subprocess
import sys
from functools import partial
from shlex import split
from statistics import mean

from paper import REPO, Object, Run, Work, bars, cell, table

ROWS = {  # run -> the paper's name and family
    "zero_shot": ("Zero Shot", ""),
    "sft": ("SFT", "SFT"),
    "grpo": ("Naive GRPO", "Pure RL"),
    "dapo": ("DAPO", "Pure RL"),
    "dapo_star": ("DAPO*", "Pure RL"),
    "fg_dapo_star": ("FG-DAPO*", "with FGAE"),
    "sft_dapo_star": ("SFT+DAPO*", "SFT-then-RL"),
    "sft_fg_dapo_star": ("SFT+FG-DAPO*", "with FGAE"),
    "luffy": ("LUFFY", "Single-stage"),
    "srft": ("SRFT", "Single-stage"),
    "chord": ("CHORD", "Single-stage"),
    "toolupt": ("ToolUPT", ""),
}
COLUMNS = {
    "overall_paper": "Overall Acc",
    "non_live": "Non-live (AST)",
    "live": "Live (AST)",
    "multi_turn": "Multi Turn",
    "relevance": "Relevance",
    "irrelevance": "Irrelevance",
}
TOY_COLUMNS = {"accuracy": "Accuracy", "tool_call": "Tool calls", "answer": "Answers"}
# Tables 2 to 5: the columns of COLUMNS in its order, a line per row of ROWS.
PRINTED = {
    "Llama-3.1-8B-Instruct": """
        17.03 27.21 36.79  0.00 56.25 38.16
        26.84 55.98 36.49  0.88 62.50 65.94
        27.96 40.35 31.01  0.00 25.00 96.39
        25.58 41.56 26.65  0.00 25.00 85.26
        30.54 62.33 49.22  1.37 62.50 67.56
        37.92 75.90 60.40  0.62 68.75 89.33
        39.79 86.31 63.51  0.25 75.00 88.17
        40.32 84.33 66.10  3.75 81.25 80.22
        22.94 23.54 28.28  0.75 43.75 83.59
        38.38 80.90 62.62  0.00 68.75 86.77
        33.48 72.25 56.40  1.00 75.00 69.20
        42.66 85.90 73.95  5.88 81.25 78.50""",
    "Qwen2.5-7B-Instruct": """
        28.87 35.79 61.81  2.75 87.50 67.39
        44.59 85.10 70.74  7.75 68.75 88.67
        40.84 84.88 71.80  0.00 56.25 88.26
        41.62 85.71 71.50  0.87 62.50 89.89
        41.89 88.25 75.94  4.62 87.50 73.27
        45.11 85.54 73.87  8.00 62.50 87.27
        46.06 85.71 70.91  9.38 62.50 91.59
        46.99 86.52 73.58 13.12 75.00 82.45
        43.13 88.42 76.83  3.12 81.25 84.15
        44.69 87.69 69.58  6.38 50.00 91.74
        44.25 81.83 74.76  8.38 75.00 83.80
        48.65 86.19 73.87 16.25 87.50 83.11""",
    "Qwen2.5-14B-Instruct": """
        30.01 28.71 43.15  8.25 56.25 83.43
        47.77 84.40 72.83  7.62 68.75 88.51
        42.40 86.73 75.43  2.12 62.50 85.86
        45.64 88.48 74.39  8.50 68.75 85.49
        46.67 86.90 75.13 11.25 56.25 84.26
        50.22 88.10 76.46 16.88 68.75 86.15
        49.08 86.27 72.32 19.25 81.25 78.13
        51.61 88.58 72.98 19.62 62.50 89.19
        52.20 89.67 77.65 22.00 87.50 79.91
        46.29 86.04 69.80  9.12 37.50 94.52
        51.04 91.38 73.80 18.38 68.75 85.94
        54.92 87.79 74.76 27.50 75.00 84.47""",
    "Qwen2.5-32B-Instruct": """
        43.59 82.69 77.05  8.00 93.75 77.81
        52.35 88.23 76.17 20.13 81.25 89.34
        50.39 88.83 76.76 15.12 68.75 91.40
        47.77 88.08 77.79 10.38 68.75 89.61
        55.73 87.81 76.17 26.75 75.00 90.14
        58.03 88.27 73.72 31.37 75.00 92.05
        59.29 89.50 76.24 35.25 81.25 84.22
        60.92 88.40 76.24 37.12 87.50 89.51
        58.15 84.44 75.94 31.63 75.00 93.67
        45.70 87.77 72.98  6.38 43.75 94.33
        60.46 89.65 79.20 36.88 81.25 83.28
        62.32 88.13 76.68 40.88 87.50 86.47""",
}
PAPER = {  # model -> run -> column -> percent
    model: {
        run: dict(zip(COLUMNS, map(float, line.split())))
        for run, line in zip(ROWS, text.strip().splitlines(), strict=True)
    }
    for model, text in PRINTED.items()
}
AVERAGES = dict(
    zip(ROWS, (29.88, 42.89, 40.40, 40.15, 43.71, 47.82, 48.56, 49.96, 44.11, 43.77, 47.31, 52.14))
)  # Table 1's last column
FAMILIES = {  # of Section 5.1: ToolUPT minus the best row of a family, without rows that use FGAE
    "SFT": 9.25,
    "Pure RL": 8.43,
    "SFT-then-RL": 3.58,
    "Single-stage": 4.83,
}
FGAE = {("fg_dapo_star", "dapo_star"): 4.11, ("sft_fg_dapo_star", "sft_dapo_star"): 1.40}
ABLATIONS = {"toolupt_no_fgae": ("FGAE", 52.2), "toolupt_no_spo": ("SPO", 53.52)}  # Figure 4, 14B
RECIPES = {
    "Llama-3.1-8B-Instruct": "recipes/llama-3.1-8b.args",
    "Qwen2.5-7B-Instruct": "recipes/qwen2.5-7b.args",
    "Qwen2.5-14B-Instruct": "recipes/qwen2.5-14b.args",
    "Qwen2.5-32B-Instruct": "recipes/qwen2.5-32b.args",
}
RUNS = {name: Run(name, None if name == "zero_shot" else ("--algo", name)) for name in ROWS}
RUNS |= {name: Run(name, ("--algo", name)) for name in ABLATIONS}
SIZES = {  # Table 6: original, sampled, processed
    "hermes": ("Hermes Glaive", 5000, 2500, 8829),
    "toolace": ("ToolACE", 11300, 11300, 12253),
    "xlam": ("xLAM", 60000, 10000, 10000),
    "apigen-mt": ("APIGen-MT", 5000, 2500, 21622),
    "funreason-mt": ("FunReason-MT", 16000, 10000, 23915),
    "hammer": ("Hammer (Irrelevance)", 7500, 3500, 3500),
}
SETTINGS = {  # Table 7: what, of RL, of SFT; Training Mode, "On-policy", is no setting here
    "max_steps": ("Training Steps", 600, 3000),
    "learning_rate": ("Learning Rate", 1e-6, 1e-5),
    "lr_scheduler_type": ("LR Scheduler", "constant", "cosine"),
    "train_batch_size": ("Batch Size", 256, 256),
    "max_prompt_length": ("Max Prompt Length", 8192, 8192),
    "max_completion_length": ("Max Response Length", 1024, 1024),
    "num_generations": ("Group Size", 8, None),
    "temperature": ("Rollout Temperature", 1.0, None),
    "entropy_coef": ("Entropy Coef.", 3e-4, None),
}


# ------------------------------------------------------------------------------- Table 1, Figure 4


def overalls(rows: list[dict], work: Work) -> dict[str, dict[str, float]]:
    """model -> run -> our overall in percent, of the rows that have one."""
    found = {row["model"]: {} for row in rows}
    for row in rows:
        value = (row["scores"] or {}).get(work.column("overall_paper"))
        if value is not None:
            found[row["model"]][row["run"]] = value
    return found


def averages(ours: dict[str, dict[str, float]]) -> dict[str, float]:
    """run -> mean over our models, of the runs that all of them have."""
    runs = set.intersection(*(set(found) for found in ours.values())) if ours else set()
    return {run: mean(found[run] for found in ours.values()) for run in runs}


def differences(of: dict[str, float]) -> dict[str, float]:
    """Section 5.1's differences of averages (run -> percent), those whose rows are all there."""
    found = {}
    for family in FAMILIES:
        rivals = [run for run, (_, own) in ROWS.items() if own == family]
        if {"toolupt", *rivals} <= of.keys():
            found[f"ToolUPT - best of {family}"] = of["toolupt"] - max(of[run] for run in rivals)
    for pair in FGAE:
        if {*pair} <= of.keys():
            found[" - ".join(ROWS[run][0] for run in pair)] = of[pair[0]] - of[pair[1]]
    return found


def table1(rows: list[dict], work: Work) -> str:
    """Overall per model, the averages, and Section 5.1."""
    ours = overalls(rows, work)
    models = [*PAPER, *(model for model in ours if model not in PAPER)]
    panels = {
        model: {
            name: (
                ours.get(model, {}).get(run),
                PAPER.get(model, {}).get(run, {}).get("overall_paper"),
            )
            for run, (name, _) in ROWS.items()
        }
        for model in models
    }
    mine = averages(ours)
    panels["Avg."] = {name: (mine.get(run), AVERAGES[run]) for run, (name, _) in ROWS.items()}
    bars(panels, work.picture)
    names = [name for name, _ in ROWS.values()]
    lines = [[name, *(cell(*panel[name]) for panel in panels.values())] for name in names]
    printed = differences(AVERAGES)
    gaps = [
        [name, cell(differences(mine).get(name), paper, "+.2f")] for name, paper in printed.items()
    ]
    which = "accuracy on the toy world" if work.toy else "BFCL, overall of ToolUPT's tables"
    return "\n\n".join(
        [
            f"# Table 1: {which}, in percent: ours (the paper's)",
            table(["", *panels], lines),
            f"Avg. is over {', '.join(ours)}; the paper's over its four models (its text says 56.6 for ToolUPT).",
            "# Section 5.1: differences of the averages",
            table(["", "ours (the paper's)"], gaps),
        ]
    )


def columns(model: str, number: int, rows: list[dict], work: Work) -> str:
    """Tables 2 to 5: all columns of one model."""
    scores = {row["run"]: row["scores"] or {} for row in rows}
    used = {row["model"] for row in rows}
    paper = {} if work.toy or used != {model} else PAPER[model]
    panels = {
        title: {
            name: (scores[run].get(column), paper.get(run, {}).get(column))
            for run, (name, _) in ROWS.items()
        }
        for column, title in (TOY_COLUMNS if work.toy else COLUMNS).items()
    }
    bars(panels, work.picture)
    lines = [[n, *(cell(*panel[n]) for panel in panels.values())] for n, _ in ROWS.values()]
    title = f"# Table {number}: {', '.join(sorted(used))}, in percent: ours (the paper's)"
    return f"{title}\n\n{table(['', *panels], lines)}"


def figure4(rows: list[dict], work: Work) -> str:
    """The ablations of FGAE and SPO."""
    [(model, ours)] = overalls(rows, work).items()
    printed = PAPER["Qwen2.5-14B-Instruct"]["toolupt"]["overall_paper"]
    panels = {
        part: {"ToolUPT": (ours.get("toolupt"), printed), f"w/o {part}": (ours.get(run), paper)}
        for run, (part, paper) in ABLATIONS.items()
    }
    bars(panels, work.picture)
    lines = [[part, *(cell(*pair) for pair in panel.values())] for part, panel in panels.items()]
    title = (
        f"# Figure 4: overall of {model}, in percent: ours (the paper's, of Qwen2.5-14B-Instruct)"
    )
    return f"{title}\n\n{table(['ablation', 'with', 'without'], lines)}"


# ------------------------------------------------------------------------------------ Tables 6 and 7


def table6(rows: list[dict], work: Work) -> str:
    """Data sets: `data.py stats` of every source; what it says where it fails."""
    words = (REPO / "recipes/table6.args").read_text().splitlines()
    sources = [word for line in words for word in split(line, comments=True)][1:]
    lines, notes = [], []
    for source in ["toy:train"] if work.toy else sources:
        known = SIZES.get(source.partition(":")[0], (source, None, None, None))
        done = subprocess.run(
            [sys.executable, "data.py", "stats", source],
            check=False,
            capture_output=True,
            text=True,
        )
        sizes = re.search(r"original (\d+)  sampled (\d+)  processed (\d+)", done.stdout)
        found = map(int, sizes.groups()) if sizes else [None] * 3
        lines.append([known[0], *(cell(a, b, ",") for a, b in zip(found, known[1:]))])
        said = done.stdout if sizes else (done.stderr.strip() or "no output").splitlines()[-1]
        notes.append(f"```\n{said.strip()}\n```")
    head = table(["", "original", "sampled", "processed"], lines)
    return "\n\n".join(["# Table 6: rows and examples: ours (the paper's)", head, *notes])


def table7(rows: list[dict], work: Work) -> str:
    """Hyperparameters of the recipe: ours beside the paper's."""
    import train

    lines, found = [], {}
    for algo in ("toolupt", "sft"):
        parsed = train.parse_args([f"@{work.recipes[0]}", "--algo", algo])
        found[algo] = {**vars(parsed[0]), **vars(parsed[1])}
    for knob, (name, *printed) in SETTINGS.items():
        ours = [found["toolupt"][knob], found["sft"][knob] if printed[1] is not None else None]
        lines.append([name, f"`--{knob}`", *(cell(*pair, "") for pair in zip(ours, printed))])
    title = f"# Table 7: settings with {work.recipes[0]}: ours (the paper's)"
    return f"{title}\n\n{table(['', 'flag', 'RL methods', 'SFT'], lines)}"


ALL = tuple(RUNS[name] for name in ROWS)
OBJECTS = {
    "table1": Object(
        "BFCL overall, 12 methods x 4 models, averages, Section 5.1",
        ALL,
        table1,
        (*RECIPES.values(),),
    ),
    **{
        f"table{number}": Object(
            f"the columns of {model}", ALL, partial(columns, model, number), (recipe,)
        )
        for number, (model, recipe) in enumerate(RECIPES.items(), 2)
    },
    "figure4": Object(
        "ablations of FGAE and SPO",
        tuple(RUNS[name] for name in ("toolupt", *ABLATIONS)),
        figure4,
        (RECIPES["Qwen2.5-14B-Instruct"],),
    ),
    "table6": Object("data sets: original, sampled and processed", (), table6),
    "table7": Object("hyperparameters", (), table7),
}
