"""What a run looks like: one page, and its last lines.

    python -m tools.show RUN    writes RUN/report.html, of a run that has ended or goes on

report(out, tokenizer)   that page: curves, error types, responses with coloured tokens, settings
summary(out, tokenizer)  the lines that end a run, the page's path among them
milestones(out)          accuracy on held-out examples before, between and after the stages

The page needs neither network nor another file, and stays below 20 MB: of long runs it shows an
even selection, and says of how many. What a model or a user wrote is data in it, never markup:
tools/report.html makes text nodes of it.
"""

import argparse
import html
import json
import math
import random
import sys
from array import array
from collections import Counter
from pathlib import Path

import rewards
from data import read_jsonl

STAGES = ("sft", "warmup", "")  # folders of a run, in their order; "": the last stage
POINTS, EVALUATIONS = 6000, 1000  # steps that curves show
READ = 20_000  # rollouts whose errors are counted
BINS = 40  # of steps, in which errors are counted
GROUPS = 48  # prompts whose responses are shown
TOKENS = 2000  # of a response that are shown
SAMPLE_BYTES = 8 << 20  # of the responses of a page
ERRORS = ("Code Syntax", "Tools Count", "Tool Name", "Parameter Count", "Parameter Name")
ERRORS += ("Parameter Value", "Other", "reward only")
PLAIN = "\033[0m"
SHADES = {
    1: (194, 157, 120, 83),
    -1: (224, 217, 210, 203),
}  # 256-colour backgrounds, weak to strong
# title, unit of the axis ("%": of shares), metric -> its name in the plot; the others follow by
# the part of their names before the slash
PANELS = (
    (
        "Accuracy on held-out examples",
        "%",
        {
            "eval/accuracy": "all",
            "eval/tool_call_accuracy": "calls",
            "eval/answer_accuracy": "answers",
        },
    ),
    (
        "Accuracy of the rollouts",
        "%",
        {"accuracy": "all", "accuracy/calls": "calls", "accuracy/answers": "answers"},
    ),
    ("Reward, mean", "reward", {"reward": "rollouts", "eval/reward": "held-out examples"}),
    ("Response length, mean", "tokens", {"completions/mean_length": "rollouts"}),
    (
        "Rollouts cut at the limit, groups of equal rewards",
        "%",
        {"completions/clipped_ratio": "cut", "frac_reward_zero_std": "equal rewards"},
    ),
    (
        "How rollouts are wrapped",
        "%",
        {
            "form/call": "call",
            "form/answer": "answer",
            "form/both": "both",
            "form/untagged_call": "untagged call",
            "form/neither": "neither",
            "form/empty_answer": "empty answer",
            "form/repeated_key": "repeated key",
        },
    ),
    ("Loss", "loss", {"loss": "training", "eval/loss": "held-out examples"}),
    ("Gradient norm", "L2 norm", {"grad_norm": "loss", "grad_norm/policy": "policy term"}),
    (
        "Gradient norms of the other terms",
        "times the policy term's",
        {"grad_norm_ratio/expert": "expert", "grad_norm_ratio/rejected": "rejected"},
    ),
    ("Entropy", "nats per token", {"entropy": "rollouts"}),
    (
        "Expert tokens that rollouts have",
        "%",
        {"tokens_matched/calls": "calls", "tokens_matched/answers": "answers"},
    ),
    (
        "Advantage of the first token, mean",
        "advantage",
        {"first_advantage/calls": "calls", "first_advantage/answers": "answers"},
    ),
    (
        "Reward margin of preference pairs",
        "reward",
        {"rewards/margins": "training", "eval/rewards/margins": "held-out trees"},
    ),
    (
        "Preference pairs ranked right",
        "%",
        {"rewards/accuracies": "training", "eval/rewards/accuracies": "held-out trees"},
    ),
    (
        "Length of the steps of a pair, mean",
        "tokens",
        {"lengths/chosen": "chosen", "lengths/rejected": "rejected"},
    ),
)
UNITS = {"timing_s": "seconds", "perf": "tokens per second", "logps": "nats per token"}


# -------------------------------------------------------------------------------------- the page


def report(out: Path, tokenizer=None) -> Path:
    """Write report.html of a run and return its path; ValueError where there is no run.

    tokenizer  None: that of the run's newest checkpoint or of its base model; where neither can be
               had, responses are shown without colours
    """
    stages = {name: list(read_jsonl(out / name / "metrics.jsonl", growing=True)) for name in STAGES}
    stages = {name: lines for name, lines in stages.items() if lines}
    if not stages:
        raise ValueError(f"{out} has no metrics.jsonl: give the --output_dir of a run")
    settings = [lines[0] for lines in stages.values()]
    config = settings[-1]
    samples, errors = [], None
    if (out / "rollouts.jsonl").exists():
        records = Lines(out / "rollouts.jsonl")
        if len(records):
            samples.append(rollout_samples(records, tokenizer or _tokenizer(out, config)))
            errors = error_types(records)
    if (out / "pairs.jsonl").exists():
        samples.append(pair_samples(Lines(out / "pairs.jsonl")))
    name = f"{out.resolve().name}: {config.get('algo')}"
    page = curves(stages) | {
        "title": name,
        "about": f"{settings[0].get('model_name_or_path')}, seed {config.get('seed')}, in {out}",
        "milestones": milestones(out),
        "errors": errors,
        "samples": samples,
        "tables": [table for table in (iterations(out), hours_table(out)) if table],
        "settings": [_settings("Settings", config)],
    }
    for stage, first in [*zip(stages, settings)][:-1]:
        other = {k: v for k, v in first.items() if v != config.get(k)}
        page["settings"].append(_settings(f"Where those of {stage} differ", other))
    if errors:  # its steps are those of the last stage
        first = next(reversed(page["marks"]))["x"] if "" in stages and len(stages) > 1 else 0
        errors["x"] = [x + first for x in errors["x"]]
    if not samples:
        page["note"] += " This run has no record of single responses."
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # "<" begins every tag and comment that could end the script element that holds the data
    data = json.dumps(_finite(page), allow_nan=False).replace("<", "\\u003c")
    before, rest = template.split("__TITLE__")
    between, after = rest.split("__DATA__")
    path = out / "report.html"
    path.write_text(
        before + html.escape(name) + between + data + after,
        encoding="utf-8",
        errors="backslashreplace",
    )
    return path


def curves(stages: dict[str, list[dict]]) -> dict:
    """The metrics of all stages as columns over one axis, on which a stage follows the other.

    stages  folder of a stage -> the lines of its metrics.jsonl

    The axis is that of --report_to: the second stage's step 0 follows the first's last step.
    """
    rows, marks = [], []  # (place on the axis, step in words, metrics)
    for stage, (config, *lines) in stages.items():
        first, label = rows[-1][0] + 1 if rows else 0, stage or str(config.get("algo"))
        if len(stages) > 1 and not any("iteration" in line for line in lines):
            marks.append({"x": first, "name": label})
        of = f" of {label}" if len(stages) > 1 else ""
        iteration = None
        for line in lines:
            if line.get("iteration", iteration) != iteration:
                iteration = line["iteration"]
                marks.append({"x": first + line["step"], "name": f"iteration {iteration}"})
            rows.append((first + line["step"], f"{line['step']}{of}", line))
    evaluated = [i for i, (_, _, line) in enumerate(rows) if "eval/accuracy" in line]
    chosen = {evaluated[i] for i in _evenly(len(evaluated), EVALUATIONS)}
    kept = [rows[i] for i in sorted(chosen.union(_evenly(len(rows), POINTS)))]
    names = dict.fromkeys(name for _, _, line in kept for name in line)
    metrics = {
        name: [_number(line.get(name)) for _, _, line in kept]
        for name in names
        if name not in ("step", "iteration")
    }
    metrics = {name: xs for name, xs in metrics.items() if any(x is not None for x in xs)}
    panels = [_panel(title, unit, own, metrics) for title, unit, own in PANELS]
    shown, others = {name for _, _, own in PANELS for name in own}, {}
    for name in sorted(metrics.keys() - shown):
        others.setdefault(name.rpartition("/")[0] or name, {})[name] = name
    config, *lines = [*stages.values()][-1]
    last = lines[-1]["step"] if lines else "none"
    longer = lines and lines[-1]["step"] > config.get("max_steps", 0)  # raised when it was resumed
    of = f" of {config['max_steps']}" if "max_steps" in config and not longer else ""
    stage = f" of {marks[-1]['name']}" if marks else ""
    note = f"Up to step {last}{of}{stage}. Step 0 is the evaluation before training. "
    if len(kept) < len(rows):
        note += f"Curves show {len(kept):,} of {len(rows):,} steps, evenly, and the evaluations. "
    return {
        "x": [x for x, _, _ in kept],
        "names": [step for _, step, _ in kept],
        "marks": marks,
        "axis": "optimiser steps" + (" of all stages" if len(stages) > 1 else ""),
        "metrics": metrics,
        "panels": [panel for panel in panels if panel["series"]],
        "others": [_panel(k, UNITS.get(k, "value"), own, metrics) for k, own in others.items()],
        "note": note + "Point at a plot, or focus it and use ← →, to read its values.",
    }


def _panel(title: str, unit: str, names: dict[str, str], metrics: dict) -> dict:
    own = [{"metric": name, "label": label} for name, label in names.items() if name in metrics]
    return {"title": title, "unit": unit, "series": own}


class Lines:
    """The lines of a .jsonl file by number, not held in memory; one that is cut short is left out."""

    def __init__(self, path: Path):
        self.path, self.file, self.starts = path, open(path, "rb"), array("q", [0])  # noqa: SIM115
        for line in self.file:
            if line.endswith(b"\n"):
                self.starts.append(self.starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> dict:
        self.file.seek(self.starts[i])
        try:
            return json.loads(self.file.readline())
        except ValueError as error:
            raise ValueError(f"line {i + 1} of {self.path} is not JSON ({error})") from None

    def group(self, i: int) -> range:
        """Numbers of the lines around line i with its step and example."""
        of = lambda k: [self[k].get(name) for name in ("step", "iteration", "id")]
        first = last = i
        while first > 0 and of(first - 1) == of(i):
            first -= 1
        while last + 1 < len(self) and of(last + 1) == of(i):
            last += 1
        return range(first, last + 1)


def rollout_samples(records: Lines, tokenizer) -> dict:
    """The responses to some prompts, evenly over the run, with the numbers of every token."""
    ranges = dict.fromkeys(records.group(i) for i in _evenly(len(records), GROUPS))
    groups = []
    for lines in ranges:
        rows = [records[i] for i in lines]
        groups.append(
            {
                "name": f"step {rows[0]['step']}, {rows[0]['id']}",
                "target": visible(rows[0]["target"]),
                "responses": [_response(row, tokenizer) for row in rows],
            }
        )
    groups = _within(groups)
    shown = sum(len(group["responses"]) for group in groups)
    note = f"{shown:,} of {len(records):,} responses are shown: {len(groups)} prompts, evenly over "
    note += "the run, with all responses to each."
    if tokenizer is None:
        note += " The tokenizer was not found, so that tokens are not told apart."
    return {"title": "Responses", "note": note, "groups": groups}


def _response(row: dict, tokenizer) -> dict:
    """What the page says of a line of rollouts.jsonl."""
    n, outcome = len(row["token_ids"]), row["outcome"]
    parts = ", ".join(f"{name} {value:.3g}" for name, value in (outcome.get("parts") or outcome).items()
                      if isinstance(value, (int, float)) and name not in ("total", "right"))  # fmt: skip
    error = error_of(row)
    head = (
        f"response {row['k']}: reward {row['reward']:.3g}, {error or 'right'} ({parts}), {n} tokens"
    )
    head += ", cut at the limit" * (row["finish_reason"] == "length")
    if tokenizer is None:
        return {"head": head, "text": visible(row["text"])}
    ids, rewarded = row["token_ids"][:TOKENS], row["token_rewards"] or [row["reward"]] * n
    return {
        "head": head,
        "tokens": n,
        "pieces": [visible(piece) for piece in pieces(tokenizer, ids)],
        "ids": ids,
        "advantages": row["advantages"][:TOKENS],
        "rewards": rewarded[:TOKENS],
        "logps": row["logps"][:TOKENS],
        "sampled": row["sampler_logps"][:TOKENS],
    }


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """Texts of the tokens, which join to that of all; a character of several stands with its last."""
    texts, begin, end = [], 0, 0  # ids[begin:end] are the last ones whose text is whole
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[begin:n])
        if text.endswith("\ufffd") and n < len(ids) and n - end < 4:
            texts.append("")
            continue
        texts.append(text[len(tokenizer.decode(ids[begin:end])) if end > begin else 0 :])
        begin, end = end, n
    return texts


def pair_samples(records: Lines) -> dict:
    """Some of iTool's preference pairs, evenly over the iterations."""

    def step(row: dict, side: str) -> dict:
        numbers = {"value": "Q", "probability": "p", "reward": "R", "visits": "N"}
        found = {name: row.get(f"{side}_{key}") for name, key in numbers.items()}
        said = ", ".join(f"{name} {x:.3g}" for name, x in found.items() if x is not None)
        return {"head": f"{side} step: {said}", "text": visible(row[side])}

    groups = []
    for i in _evenly(len(records), GROUPS):
        row = records[i]
        name = f"iteration {row['iteration']}, {row['id']}" + ", held out" * row["held_out"]
        before = {"head": "the response so far", "text": visible(row["prefix"])}
        sides = [step(row, side) for side in ("chosen", "rejected")]
        groups.append(
            {"name": name, "target": visible(row["target"]), "responses": [before, *sides]}
        )
    groups = _within(groups)
    note = f"{len(groups):,} of {len(records):,} pairs are shown, evenly over the iterations."
    return {"title": "Preference pairs", "note": note, "groups": groups}


def _within(groups: list[dict]) -> list[dict]:
    """The groups, or every second, fourth ... of them, so that they fit on the page."""
    sizes = [len(json.dumps(_finite(group))) for group in groups]
    every = 1
    while sum(sizes[::-every]) > SAMPLE_BYTES and every < len(groups):
        every *= 2
    return groups[::-every][::-1]


def error_of(row: dict) -> str | None:
    """The class of a rollout's error (iTool's Figure 3), None where its reward is the highest.

    "reward only": wrong by the reward alone, which also looks at the format and the exact spelling.
    """
    outcome = row["outcome"]
    if outcome.get("right", outcome["total"] == 4):
        return None
    try:
        return rewards.error_type(row["text"], row["target"]) or "reward only"
    except ValueError:  # the target has no class
        return "Other"


def error_types(records: Lines) -> dict:
    """Counts of error types in bins of steps, from READ rollouts at most."""
    total = len(records)
    chosen = range(total)
    if total > READ:
        chosen = sorted({0, total - 1, *random.Random(0).sample(chosen, READ - 2)})
    found = [(row["step"], error_of(row) or "right") for row in map(records.__getitem__, chosen)]
    first, last = found[0][0], found[-1][0]
    width = math.ceil((last - first + 1) / BINS)
    count = math.ceil((last - first + 1) / width)
    classes = ["right", *(e for e in ERRORS if any(error == e for _, error in found))]
    counts = [[0] * len(classes) for _ in range(count)]
    for step, error in found:
        counts[(step - first) // width][classes.index(error)] += 1
    begins = [first + i * width for i in range(count)]
    named = [str(x) if width == 1 else f"{x} to {min(x + width - 1, last)}" for x in begins]
    about = f"share by the first class that applies; {len(found):,} of {total:,} rollouts"
    about += f"; each bar: {width} steps" * (width > 1)
    xs = [x + (width - 1) / 2 for x in begins]
    return {"x": xs, "names": named, "classes": classes, "counts": counts, "note": about}


def iterations(out: Path) -> dict | None:
    """iTool's iterations as a table: searches, pairs, and what training on them changed."""
    searches = list(read_jsonl(out / "searches.jsonl", growing=True))
    if not searches:
        return None
    lines = list(read_jsonl(out / "metrics.jsonl", growing=True))[1:]
    ends = {line["iteration"]: line for line in lines if "iteration" in line}
    reasons = sorted({why for row in searches for why in row["dropped"]})
    margin = "eval/rewards/margins"
    columns = ["iteration", "trees", "expansions", "finished responses", "of them right"]
    columns += ["pairs to train on", "held out", *(f"dropped: {why}" for why in reasons)]
    columns += ["margin before", "margin after", "accuracy after, %"]
    rows = []
    for row in searches:
        end = ends.get(row["iteration"], {})
        accuracy = end.get("eval/accuracy")
        values = [row.get(x) for x in ("iteration", "trees", "expansions", "ends", "ends_correct")]
        values += [row["pairs"], row["held_out"], *(row["dropped"].get(why, 0) for why in reasons)]
        values += [row.get(margin), end.get(margin), accuracy and 100 * accuracy]
        rows.append(["–" if value is None else value for value in values])
    note = "Searches, preference pairs, and the reward margin on pairs of held-out trees."
    return {"title": "Iterations", "note": note, "columns": columns, "rows": rows}


def milestones(out: Path) -> list[tuple[str, float]]:
    """(what, accuracy on held-out examples): before, after each stage and iteration, at the end."""
    marks = []
    for stage in STAGES:
        rows = list(read_jsonl(out / stage / "metrics.jsonl", growing=True))[1:]
        scores = [row for row in rows if row.get("eval/accuracy") is not None]
        if not scores:
            continue
        if not marks:
            marks.append(("before", scores[0]["eval/accuracy"]))
        last = {f"iteration {row['iteration']}": row for row in scores if "iteration" in row}
        last = last or {stage or "after": scores[-1]}
        # RL starts from the best checkpoint, not from the last step
        if not stage and marks[-1][0] in ("sft", "warmup"):
            marks[-1] = (marks[-1][0], scores[0]["eval/accuracy"])
        marks += [(name, row["eval/accuracy"]) for name, row in last.items()]
    return marks


def hours(out: Path) -> dict[str, dict[str, float]]:
    """Hours of each stage by part, from the recorded timings (iTool Table 8); saves do not count.

    Parts are those of timing_s/*; "other" is the rest of the steps, "total" the sum.
    """
    found = {}
    for stage in STAGES:
        seconds, algo = Counter(), stage
        for name in ("metrics.jsonl", "searches.jsonl"):
            for row in read_jsonl(out / stage / name, growing=True):
                algo = row.get("algo", algo)  # of the settings, the first line
                parts = {k[9:]: v for k, v in row.items() if k.startswith("timing_s/")}
                step, evaluation = parts.pop("step", 0.0), parts.get("evaluate", 0.0)
                seconds.update(parts | {"other": step - (sum(parts.values()) - evaluation)})
        if seconds:
            seconds["total"] = sum(seconds.values())
            found[stage or algo] = {k: s / 3600 for k, s in seconds.items()}
    return found


def hours_table(out: Path) -> dict:
    """The hours of the stages as a table."""
    found = hours(out)
    parts = sorted({part for own in found.values() for part in own} - {"total"})
    rows = [
        [stage, *(own.get(part, "–") for part in (*parts, "total"))] for stage, own in found.items()
    ]
    note = "By part of the steps, from the recorded timings; saves do not count."
    return {"title": "Hours", "note": note, "columns": ["stage", *parts, "total"], "rows": rows}


def write_hours(out: Path) -> str:
    """Write hours.json; return it in words."""
    found = hours(out)
    (out / "hours.json").write_text(json.dumps(found, indent=1) + "\n")
    words = []
    for stage, parts in found.items():
        largest = sorted((k for k in parts if k != "total"), key=parts.get, reverse=True)
        shown = ", ".join(f"{k} {parts[k]:.2f}" for k in largest if parts[k] >= 0.005)
        words += [f"{stage} {parts['total']:.2f}{shown and f' ({shown})'}"]
    return "; ".join(words)


# ------------------------------------------------------------------------------- the last lines


def summary(out: Path, tokenizer) -> str:
    """The lines that end a run; writes report.html."""
    folders = [path for path in out.glob("checkpoint-*") if (path / "config.json").exists()]
    order = lambda path: (path.name.endswith("best"), path.stat().st_mtime)
    scores = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in milestones(out))
    lines = [
        "",
        f"accuracy on held-out examples: {scores}",
        f"checkpoint   {max(folders, key=order, default='none')}",
        f"metrics      {out / 'metrics.jsonl'}",
    ]
    names = {"rollouts": "rollouts.jsonl", "pairs": "pairs.jsonl"}
    lines += [f"{k:12} {out / name}" for k, name in names.items() if (out / name).exists()]
    lines += [f"hours        {write_hours(out)}"]
    if (out / "trees-1.jsonl").exists():
        lines += [f"trees        python mcts.py show {out}/trees-1.jsonl"]
    lines += [f"report       {report(out, tokenizer)}"]
    if (out / "rollouts.jsonl").exists() and (row := _telling(Lines(out / "rollouts.jsonl"))):
        about = "a rollout, tokens coloured by advantage (green: made likelier, red: less likely)"
        lines += ["", about, "", coloured(row, tokenizer)]
    return "\n".join(lines)


def coloured(row: dict, tokenizer) -> str:
    """A response for a terminal: advantages on green (positive) or red, stronger with size."""
    values = [value if math.isfinite(value) else 0 for value in row["advantages"]]
    strongest, text = max(map(abs, values), default=0) or 1, ""
    for piece, value in zip(pieces(tokenizer, row["token_ids"]), values):
        piece = visible(piece)
        if value:
            shade = SHADES[1 if value > 0 else -1][min(3, int(4 * abs(value) / strongest))]
            piece = "\n".join(
                f"\033[30;48;5;{shade}m{part}{PLAIN}" if part else "" for part in piece.split("\n")
            )
        text += piece
    head = f"step {row['step']}  {row['id']}  response {row['k']}  reward {row['reward']:.2f}"
    return f"{visible(head)}\n{text}\nexpert: {visible(row['target'])}"


def visible(text: str) -> str:
    """The text without control characters: what a model writes must not steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _telling(records: Lines) -> dict | None:
    """The latest of the last rollouts with both positive and negative tokens, else the last."""
    last = [records[i] for i in range(max(0, len(records) - 1000), len(records))]
    both = [
        row
        for row in last
        if row["advantages"] and min(row["advantages"]) < 0 < max(row["advantages"])
    ]
    return (both or last or [None])[-1]


def _tokenizer(out: Path, config: dict):
    """The run's tokenizer: of its newest checkpoint, else of the base model; None for neither."""
    from transformers import AutoTokenizer

    folders = sorted(
        out.glob("checkpoint-*/tokenizer_config.json"), key=lambda x: x.stat().st_mtime
    )
    trust_remote_code = config.get("trust_remote_code", False)
    for where in (*(path.parent for path in reversed(folders)), config.get("model_name_or_path")):
        try:
            # the run has read it
            return AutoTokenizer.from_pretrained(
                where, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError):
            continue
    return None


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly, the first and the last among them."""
    if count <= most:
        return [*range(count)]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _number(value):
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _finite(value):
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(title: str, values: dict) -> dict:
    said = lambda v: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
    return {"name": title, "values": {name: said(value) for name, value in values.items()}}


def main(argv: list[str] | None = None) -> None:
    """`python -m tools.show RUN`."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.show", description="Write a run's report.html."
    )
    parser.add_argument("run", type=Path, help="output folder of a run")
    try:
        print(report(parser.parse_args(argv).run))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
