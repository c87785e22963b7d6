"""A study of readings: what the paper leaves open, one at a time, where the expert knows something that rollouts do not.

    python bench/study.py                                     all arms on the validation world; goes on where it stopped
    python bench/study.py --arms toolupt fg_dapo_star --world test --seeds 0 1 2 3 4
    python bench/study.py --draw                              picture and tables of what the record holds

World: the toy world's house level (tasks/toy.py). A seed draws training data, test examples and samples; arms of one
seed share the first two, so arms are compared seed by seed. Every arm makes --steps updates of 8 prompts. Readings
are chosen on toy:house-valid; toy:house-test has other tools, names and values.

Every line of OUT.jsonl is a run: its flags, with which `python train.py` repeats it, commit, seed, hash of the data,
and what was right after the last update: of calls in which the rule applies ("ruled"), of other calls
("plain") and of answers. All runs share a process and its engine, since the start is a fifth of a run.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

MEASURED = 256  # test examples after the last update; train.py's own evaluations are switched off
RECIPE = "recipes/study.args"
ARMS = {  # name -> flags
    "sft": "--algo sft",
    "dapo_star": "--algo dapo_star",
    "fg_dapo_star": "--algo fg_dapo_star",
    "toolupt": "--algo toolupt",
    "sft_dapo_star": "--algo sft_dapo_star",
    "toolupt_no_fgae": "--algo toolupt_no_fgae",
    "toolupt_no_spo": "--algo toolupt_no_spo",
    "phi: weight": "--algo toolupt --spo_phi weight",
    "phi: none": "--algo toolupt --spo_phi none",
    "phi: none, beta 0.1": "--algo toolupt --spo_phi none --spo_beta 0.1",
    "sigm weighs -log p": "--algo toolupt --spo_phi sigm",
    "phi: none, beta 0.13, gamma 0.97": "--algo toolupt --spo_phi none --spo_beta 0.13 "
    "--balance_low 0.97 --balance_high 0.97",
    "gamma 0.97": "--algo toolupt --balance_low 0.97 --balance_high 0.97",
    "phi: weight, gamma 0.97": "--algo toolupt --spo_phi weight --balance_low 0.97 --balance_high 0.97",
    "the same, denominator: kept": "--algo toolupt --spo_phi none --spo_beta 0.13 "
    "--balance_low 0.97 --balance_high 0.97 --spo_denominator kept",
    "the same, no FGAE": "--algo toolupt_no_fgae --spo_phi none --spo_beta 0.13 "
    "--balance_low 0.97 --balance_high 0.97",
    "beta 0.1": "--algo toolupt --spo_beta 0.1",
    "beta 3": "--algo toolupt --spo_beta 3",
    "denominator: kept": "--algo toolupt --spo_denominator kept",
    "gamma to 0.9": "--algo toolupt --balance_high 0.9",
    "gamma 0.5": "--algo toolupt --balance_low 0.5 --balance_high 0.5",
    "lcs": "--algo fg_dapo_star --alignment lcs",
    "restyled": "--algo fg_dapo_star --alignment restyled",
    "fields": "--algo fg_dapo_star --alignment fields",
    "no process reward for tags": "--algo fg_dapo_star --no_process_tags",
    "luffy": "--algo luffy",
    "srft": "--algo srft",
    "srft, graded": "--algo srft --graded_reward",
    "chord": "--algo chord",
    "chord, graded": "--algo chord --graded_reward",
}
PARTS = {"all": "all", "ruled": "calls, rule applies", "plain": "other calls", "answer": "answers"}
LOGGED = ("tokens_matched/calls", "first_advantage/calls", "first_advantage/answers", "entropy", "spo/kept",
          "accuracy/calls", "accuracy/answers")  # fmt: skip
NORMS = ("grad_norm/policy", "grad_norm_ratio/expert", "grad_norm_ratio/rejected")
T95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # by seeds


# ------------------------------------------------------------------------------------------------------------ one run


def flags(arm: str, seed: int, world: str, steps: int) -> list[str]:
    """What follows `python train.py`, --output_dir apart."""
    own = ARMS[arm]
    if own == "--algo sft_dapo_star":
        steps = steps // 2
        own += f" --sft_max_steps {steps}"
    return (
        f"{own} @{RECIPE} --eval_file toy:house-{world} --seed {seed} --max_steps {steps}".split()
    )


def part_of(example) -> str:
    """open | plain | answer"""
    if example.kind == "answer":
        return "answer"
    return "ruled" if example.id.endswith("+rule") else "plain"


def scores(run, world: str, seed: int) -> dict[str, list[int]]:
    """Right and all of the first MEASURED test examples, by part, with the weights that the run ended with."""
    import data
    from run import sync

    sync(run)
    examples = data.load("toy", f"house-{world}", seed=seed)[:MEASURED]
    prompts = [data.render(example, run.tokenizer) for example in examples]
    limit = run.config.max_completion_length
    answers = run.engine.generate(
        prompts, n=1, temperature=0.0, max_tokens=limit, seeds=[0] * len(prompts)
    )
    counts = {part: [0, 0] for part in PARTS}
    for example, [sample] in zip(examples, answers, strict=True):
        right = run.reward.score(sample.text, example).right
        for part in ("all", part_of(example)):
            counts[part][0] += right
            counts[part][1] += 1
    return counts


def carry_out(
    arm: str, seed: int, world: str, steps: int, engine, version: str
) -> tuple[dict, object]:
    """A line of the record, and the engine for the next run."""
    import train
    from data import read_jsonl

    words, out = flags(arm, seed, world, steps), Path(tempfile.mkdtemp(prefix="study-"))
    began = time.perf_counter()
    run = train.train(*train.parse_args([*words, "--output_dir", str(out)]), engine)
    seconds = round(time.perf_counter() - began, 1)
    knobs, *rows = read_jsonl(out / "metrics.jsonl")
    line = {
        "arm": arm,
        "world": world,
        "seed": seed,
        "steps": steps,
        "commit": version,
        "flags": " ".join(words),
    }
    line |= {"data": knobs["digests"], "seconds": seconds, "scores": scores(run, world, seed)}
    line["mean"] = {
        x: round(mean(v), 4) for x in LOGGED if (v := [r[x] for r in rows if r.get(x) is not None])
    }
    line["norms"] = {
        x: [round(r[x], 5) for r in rows if r.get(x) is not None]
        for x in NORMS
        if any(x in r for r in rows)
    }
    shutil.rmtree(out)
    return line, run.engine


def commit() -> str:
    """The commit that runs, with "+" if Python files differ from it."""
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=REPO, text=True, capture_output=True, check=False
    )
    changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    return git("rev-parse", "--short", "HEAD").stdout.strip() + "+" * bool(changed)


# --------------------------------------------------------------------------------------------- the tables, the picture


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); infinite for one value."""
    n = len(values)
    return mean(values), T95[n] * stdev(values) / math.sqrt(n) if n > 1 else math.inf


def percents(rows: list[dict], world: str) -> dict[str, dict[int, dict[str, float]]]:
    """arm -> seed -> part -> percent right, in the order of ARMS."""
    found = defaultdict(dict)
    for row in rows:
        if row["world"] == world:
            found[row["arm"]][row["seed"]] = {
                part: 100 * right / n for part, (right, n) in row["scores"].items()
            }
    return {arm: found[arm] for arm in ARMS if arm in found}


def differences(of: dict, arm: str, other: str, part: str) -> list[float]:
    """arm minus other, seed by seed."""
    return [
        of[arm][seed][part] - of[other][seed][part] for seed in of[arm] if seed in of.get(other, {})
    ]


def table(rows: list[dict], world: str, reference: str = "toolupt") -> str:
    """Percent right by arm and part (mean over seeds), and paired differences from an arm with 95 % intervals."""
    of = percents(rows, world)
    heads = [
        "arm",
        *PARTS.values(),
        *(f"{name}, minus {reference}" for name in PARTS.values()),
        "seeds",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, seeds in of.items():
        cells = [f"{mean(s[part] for s in seeds.values()):.1f}" for part in PARTS]
        for part in PARTS:
            apart = differences(of, arm, reference, part) if arm != reference else []
            cells.append("{:+.1f} ± {:.1f}".format(*interval(apart)) if len(apart) > 1 else "")
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(lines)


QUESTIONS = [
    ("FGAE", "fg_dapo_star", "dapo_star"),
    ("FGAE beside SPO", "toolupt", "toolupt_no_fgae"),
    ("SPO", "toolupt", "fg_dapo_star"),
    ("an SFT term in SPO's place", "toolupt_no_spo", "fg_dapo_star"),
    ("ToolUPT against two stages", "toolupt", "sft_dapo_star"),
    ("ToolUPT against SFT", "toolupt", "sft"),
]


def answers_of(rows: list[dict], world: str) -> str:
    """The questions of the study: paired differences in points, with 95 % intervals."""
    of = percents(rows, world)
    lines = [
        f"| question | difference | {' | '.join(PARTS.values())} | seeds |",
        "|---" * (len(PARTS) + 3) + "|",
    ]
    for name, arm, other in QUESTIONS:
        apart = [differences(of, arm, other, part) if arm in of else [] for part in PARTS]
        if len(apart[0]) > 1:
            cells = " | ".join("{:+.1f} ± {:.1f}".format(*interval(values)) for values in apart)
            lines.append(f"| {name} | {arm} - {other} | {cells} | {len(apart[0])} |")
    return "\n".join(lines)


def norms(rows: list[dict]) -> str:
    """Gradient norms of the expert's terms relative to the policy's, before gamma weighs them: medians over runs."""
    from statistics import median

    lines = [
        "| arm | chosen, first update | chosen, later | rejected, first update | rejected, later |",
        "|---|---|---|---|---|",
    ]
    for arm in ARMS:
        cells = []
        for name in ("grad_norm_ratio/expert", "grad_norm_ratio/rejected"):
            own = [
                row["norms"][name] for row in rows if row["arm"] == arm and row["norms"].get(name)
            ]
            for values in ([x[0] for x in own], [y for x in own for y in x[1:]]):
                cells.append(f"{median(values):.3g}" if values else "")
        if any(cells):
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(rows: list[dict], path: Path) -> None:
    """By arm and part: every seed, and the mean with its 95 % interval; a row of panels for each world."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worlds = {w: of for w in ("valid", "test") if (of := percents(rows, w))}
    heights = [len(of) + 1 for of in worlds.values()]
    figure, axes = plt.subplots(
        len(worlds), len(PARTS), figsize=(14, 0.32 * sum(heights) + 1.2), squeeze=False, sharey="row",
        layout="constrained", height_ratios=heights,
    )  # fmt: skip
    for row, (world, of) in zip(axes, worlds.items()):
        for axis, (part, title) in zip(row, PARTS.items()):
            for y, (arm, seeds) in enumerate(of.items()):
                values = [own[part] for own in seeds.values()]
                centre, half = interval(values)
                colour = "#d62728" if arm == "toolupt" else "#1f77b4"
                axis.plot(values, [y] * len(values), "o", ms=4, alpha=0.45, color=colour)
                if half < math.inf:
                    axis.errorbar(centre, y, xerr=half, fmt="|", ms=11, color="black", lw=1)
            axis.set(title=f"{title} ({world} world)", xlabel="percent right")
            axis.grid(alpha=0.3)
        row[0].set_yticks(range(len(of)), of)
        row[0].invert_yaxis()
    figure.suptitle("after the last update: seeds, mean and 95 % interval")
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------- the program


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--world", choices=["valid", "test"], default="valid")
    parser.add_argument("--steps", type=int, default=40, help="updates of a run")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no run after that time"
    )
    parser.add_argument("--out", type=Path, default=REPO / "bench/study.jsonl")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    rows = read(args.out)
    done = {(row["arm"], row["seed"], row["world"]) for row in rows}
    wanted = [(arm, seed, args.world) for seed in args.seeds for arm in args.arms]
    if todo := [] if args.draw else [job for job in wanted if job not in done]:
        os.chdir(REPO)
        from run import init_distributed

        init_distributed()
        engine, version, began = None, commit(), time.monotonic()
        for job in todo:
            if time.monotonic() - began > 60 * args.minutes:
                break
            line, engine = carry_out(*job, args.steps, engine, version)
            print(json.dumps(line), flush=True)
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")
    rows = read(args.out)
    for world in dict.fromkeys(row["world"] for row in rows):
        print(f"\n{world} world\n\n{table(rows, world)}\n\n{answers_of(rows, world)}")
    print(f"\n{norms(rows)}")
    picture(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
