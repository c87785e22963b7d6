"""A study of readings: what the paper leaves open, where the expert knows something that rollouts do not.

    python bench/study.py --arms toolupt fg_dapo_star --seeds 0 1 2        on the validation world; resumes
    python bench/study.py --arms toolupt fg_dapo_star --world test
    python bench/study.py --draw                  OUT.md, OUT.png and OUT-rows.png (the papers' rows) of the record

World: the toy world's house level (tasks/toy.py). A seed draws training data, test examples and samples; arms of a
seed share the first two and are compared seed by seed. Every arm but iTool's makes --steps updates of 8 prompts
(two-stage rows: half of them SFT). Readings are chosen on toy:house-valid; toy:house-test has other tools and values.

Each line of OUT.jsonl is a run: the flags with which `python train.py` repeats it, commit, hash of the data, and how
many of the first MEASURED test examples are right after the last update: calls to which the house rule applies
("ruled"), other calls ("plain"), answers. All runs share a process and its engine.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev

import common
from common import REPO, data

from methods import METHODS
from tools.serving import this_commit

RECIPE = "recipes/study.args"
MEASURED = 256  # test examples; train.py's own evaluations are switched off
CONSTANT = "--balance_low 0.97 --balance_high 0.97"
STRONG = "--no_spo_phi --spo_beta 0.13"
ITOOL = (  # 512 examples, an epoch of each stage
    "--algo itool --train_fraction 0.125 --train_batch_size 16 --warmup_epochs 1 "
    "--warmup_learning_rates 5e-4 2e-4 1e-4 --temperature 1.0 --save_total_limit 1"
)
SEARCH = (  # 76 trees an iteration
    "--pool_fraction 0.5 --buffer_fraction 0.3 --self_evaluation none --learning_rate 1e-3"
)
STRONGEST = "Eq. 20, beta 0.13, gamma 0.97"
ROWS = [row for row in METHODS if row != "dr_grpo"]  # of Table 1 and Figure 4
ARMS = {  # name -> flags; the record has more, whose code was deleted after the study
    "base model": "--algo sft --learning_rate 0",
    **{row: f"--algo {row}" for row in ROWS},
    STRONGEST: f"--algo toolupt {STRONG} {CONSTANT}",
    "the same, no FGAE": f"--algo toolupt_no_fgae {STRONG} {CONSTANT}",
    "the same, gamma from 0.02 to 0.99": f"--algo toolupt {STRONG} --balance_high 0.99",
    "the same, gamma from 0.9 to 0.99": f"--algo toolupt {STRONG} --balance_low 0.9 --balance_high 0.99",
    "gamma to 0.9": "--algo toolupt --balance_high 0.9",
    "gamma 0.97": f"--algo toolupt {CONSTANT}",
    "Eq. 20": "--algo toolupt --no_spo_phi",
    "Eq. 20, beta 0.1": "--algo toolupt --no_spo_phi --spo_beta 0.1",
    "lcs": "--algo fg_dapo_star --alignment lcs",
    "itool, warm-up": f"{ITOOL} --stages warmup",
    "itool": f"{ITOOL} {SEARCH}",
}
QUESTIONS = [  # what a difference shows, the arm, the arm without it
    ("FGAE", "fg_dapo_star", "dapo_star"),
    ("FGAE", STRONGEST, "the same, no FGAE"),
    ("SPO", "toolupt", "fg_dapo_star"),
    ("SPO", STRONGEST, "fg_dapo_star"),
    ("SFT in SPO's place", "toolupt_no_spo", "fg_dapo_star"),
    ("SPO instead of SFT", STRONGEST, "toolupt_no_spo"),
    ("one stage", "toolupt", "sft_dapo_star"),
    ("one stage", STRONGEST, "sft_dapo_star"),
    ("one stage", STRONGEST, "sft_fg_dapo_star"),
    ("ToolUPT instead of SRFT", STRONGEST, "srft"),
    ("rollouts", STRONGEST, "sft"),
    ("iTool's iterations", "itool", "itool, warm-up"),
]
PARTS = {"all": "all", "ruled": "calls under the rule", "plain": "other calls", "answer": "answers"}
LOGGED = ["tokens_matched/calls", "first_advantage/calls", "first_advantage/answers", "entropy"]
NORMS = ["grad_norm/policy", "grad_norm_ratio/expert", "grad_norm_ratio/rejected"]
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # of 2, 3, ... seeds


# --------------------------------------------------------------------------------------- one run


def flags(arm: str, seed: int, world: str, steps: int) -> list[str]:
    """What follows `python train.py`, --output_dir apart."""
    own = ARMS[arm]
    if own.startswith("--algo sft_"):
        steps = steps // 2
        own += f" --sft_max_steps {steps}"
    if not own.startswith(ITOOL):
        own += f" --max_steps {steps}"
    return f"@{RECIPE} {own} --eval_file toy:house-{world} --seed {seed}".split()


def scores(run, world: str, seed: int) -> dict[str, list[int]]:
    """By part: [right, all] of the test examples, with the weights that the run ended with."""
    from run import sync

    sync(run)
    examples = data.load("toy", f"house-{world}", seed=seed)[:MEASURED]
    answers = run.engine.generate(
        [data.render(example, run.tokenizer) for example in examples],
        n=1,
        temperature=0.0,
        max_tokens=run.config.max_completion_length,
        seeds=[0] * len(examples),  # unused: greedy
    )
    counts = {part: [0, 0] for part in PARTS}
    for example, [sample] in zip(examples, answers, strict=True):
        right = run.reward.score(sample.text, example).right
        call = "ruled" if example.id.endswith("+rule") else "plain"
        for part in ("all", call if example.kind == "tool_call" else "answer"):
            counts[part][0] += right
            counts[part][1] += 1
    return counts


def carry_out(arm: str, seed: int, world: str, steps: int, engine) -> tuple[dict, object]:
    """A line of the record, and the engine for the next run."""
    import train

    words, began = flags(arm, seed, world, steps), time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        run = train.train(*train.parse_args([*words, "--output_dir", out]), engine)
        knobs, *rows = data.read_jsonl(Path(out) / "metrics.jsonl")
    seconds = round(time.perf_counter() - began, 1)
    values = {x: [r[x] for r in rows if r.get(x) is not None] for x in LOGGED + NORMS}
    line = {
        "arm": arm,
        "world": world,
        "seed": seed,
        "steps": steps,
        "commit": this_commit(),
        "flags": " ".join(words),
        "data": knobs["digests"],
        "seconds": seconds,
        "scores": scores(run, world, seed),
        "mean": {x: round(mean(values[x]), 4) for x in LOGGED if values[x]},
        "norms": {x: [round(v, 5) for v in values[x]] for x in NORMS if values[x]},
    }
    return line, run.engine


# --------------------------------------------------------------------------- the tables, the picture


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); infinite for one value."""
    n = len(values)
    return mean(values), T95[n - 2] * stdev(values) / math.sqrt(n) if n > 1 else math.inf


def percents(rows: list[dict], world: str) -> dict[str, dict[int, dict[str, float]]]:
    """arm -> seed -> part -> percent right."""
    found = defaultdict(dict)
    for row in (row for row in rows if row["world"] == world):
        own = {part: 100 * right / n for part, (right, n) in row["scores"].items()}
        found[row["arm"]][row["seed"]] = own
    return {arm: found[arm] for arm in dict.fromkeys([*ARMS, *found]) if arm in found}


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def table(rows: list[dict], world: str) -> str:
    """Percent right by arm and part, means over seeds."""
    lines = [
        [arm, *(f"{mean(s[part] for s in seeds.values()):.1f}" for part in PARTS), str(len(seeds))]
        for arm, seeds in percents(rows, world).items()
    ]
    return markdown(["arm", *PARTS.values(), "seeds"], lines)


def differences(rows: list[dict], world: str) -> str:
    """QUESTIONS in points, seed by seed: means with 95 % intervals."""
    of, lines = percents(rows, world), []
    for name, arm, other in QUESTIONS:
        seeds = [seed for seed in of.get(arm, {}) if seed in of.get(other, {})]
        if len(seeds) > 1:
            pairs = [[of[arm][s][part] - of[other][s][part] for s in seeds] for part in PARTS]
            cells = ["{:+.1f} ± {:.1f}".format(*interval(values)) for values in pairs]
            lines.append([name, f"{arm} minus {other}", *cells, str(len(seeds))])
    return markdown(["effect of", "difference", *PARTS.values(), "seeds"], lines)


def norms(rows: list[dict]) -> str:
    """Gradient norms of SPO's terms, before gamma, relative to the policy term's: medians."""
    lines = []
    for arm in dict.fromkeys([*ARMS, *(row["arm"] for row in rows)]):
        cells = []
        for name in NORMS[1:]:
            own = [r["norms"][name] for r in rows if r["arm"] == arm and name in r["norms"]]
            for values in ([x[0] for x in own], [y for x in own for y in x[1:]]):
                cells.append(f"{median(values):.2g}" if values else "")
        if any(cells):
            lines.append([arm, *cells])
    return markdown(["arm", "chosen, step 1", "step 21", "rejected, step 1", "step 21"], lines)


def picture(worlds: dict[str, dict], path: Path) -> None:
    """By arm and part: every seed, of three the mean and its 95 % interval; a row for each world.

    worlds  name -> what `percents` returns
    """
    plt = common.pyplot()
    heights = [len(of) + 2 for of in worlds.values()]
    figure, axes = plt.subplots(
        len(worlds),
        len(PARTS),
        figsize=(14, 0.3 * sum(heights) + 0.8),
        squeeze=False,
        sharey="row",
        layout="constrained",
        height_ratios=heights,
    )
    for row, (world, of) in zip(axes, worlds.items()):
        for axis, (part, title) in zip(row, PARTS.items()):
            for y, seeds in enumerate(of.values()):
                values = [own[part] for own in seeds.values()]
                centre, half = interval(values)
                axis.plot(values, [y] * len(values), "o", ms=4, alpha=0.5, color="#1f77b4")
                if len(values) > 2:  # of two, an interval is wider than the axis
                    axis.errorbar(centre, y, xerr=half, fmt="|", ms=11, color="black", lw=1)
            axis.set(title=title, xlabel=f"percent right, {world} world", xlim=(-3, 103))
            axis.grid(alpha=0.3)
        row[0].set_yticks(range(len(of)), of)
        row[0].invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --------------------------------------------------------------------------------- the program


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arms = [arm for arm, own in ARMS.items() if not own.startswith(ITOOL)]
    text = "default: all but iTool's, which need a process of their own"
    parser.add_argument(
        "--arms", nargs="+", default=arms, choices=[*ARMS], metavar="ARM", help=text
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--world", choices=["valid", "test"], default="valid")
    parser.add_argument("--steps", type=int, default=60, help="updates of a run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then begin no more runs")
    parser.add_argument("--out", type=Path, default=REPO / "bench/study.jsonl")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    done = {
        (row["arm"], row["seed"], row["world"]) for row in data.read_jsonl(args.out, growing=True)
    }
    wanted = [(arm, seed, args.world) for seed in args.seeds for arm in args.arms]
    todo = [] if args.draw else [job for job in wanted if job not in done]
    if len({ARMS[arm].startswith(ITOOL) for arm, *_ in todo}) > 1:
        parser.error("--arms: iTool's need a process of their own, for an engine of their own")
    if todo:
        from start import init_distributed

        os.chdir(REPO)
        init_distributed()
    engine, began = None, time.monotonic()
    for job in todo:
        if time.monotonic() - began > 60 * args.minutes:
            break
        line, engine = carry_out(*job, args.steps, engine)
        with open(args.out, "a") as file:
            file.write(json.dumps(line) + "\n")
    rows = list(data.read_jsonl(args.out, growing=True))
    text = "Percent right; differences in points, with 95 % intervals; gradient norms of SPO's "
    text += "terms before gamma, relative to the policy's.\n"
    for world in dict.fromkeys(row["world"] for row in rows):
        text += f"\n{world} world\n\n{table(rows, world)}\n\n{differences(rows, world)}\n"
    text += f"\n{norms(rows)}\n"
    print(text)
    args.out.with_suffix(".md").write_text(text)
    worlds = {world: of for world in ("valid", "test") if (of := percents(rows, world))}
    picture(worlds, args.out.with_suffix(".png"))
    names = {row: row for row in ("base model", *ROWS)} | {
        STRONGEST: "toolupt @recipes/strong-spo.args"
    }
    if of := {names[arm]: own for arm, own in worlds.get("test", {}).items() if arm in names}:
        picture({"test": of}, args.out.with_name(f"{args.out.stem}-rows.png"))


if __name__ == "__main__":
    main()
