"""What a run looks like: one page, and its last lines.

    python -m tools.show RUN    writes RUN/report.html, of a run that has ended or goes on

read(out)                what was logged: lines of metrics.jsonl by stage, and of searches.jsonl
report(out, tokenizer)   the page: curves, error types, responses with coloured tokens, settings
summary(out, tokenizer)  the lines that end a run, the page's path among them
milestones(metrics)      accuracy on held-out examples before, between and after the stages

The page needs neither network nor another file, and stays below 20 MB: of long runs it shows an
even selection, and says of how many. What a model or a user wrote is data in it, never markup:
tools/report.html makes text nodes of it.
"""

import argparse
import html
import json
import math
import sys
from array import array
from collections import Counter
from pathlib import Path

import rewards
from data import read_jsonl

STAGES = ("sft", "warmup", "")  # folders of a run, in their order; "": the last stage
POINTS = 6000  # steps that curves show, besides those with an evaluation
READ = 20_000  # rollouts whose errors are counted
BINS = 40  # of steps, in which errors are counted
GROUPS = 48  # prompts whose responses are shown
TOKENS = 2000  # of a response that are shown
SAMPLE_BYTES = 8 << 20  # of the responses of a page
ERRORS = ("Code Syntax", "Tools Count", "Tool Name", "Parameter Count", "Parameter Name")
ERRORS += ("Parameter Value", "Other", "reward only")
# title, unit of the axis ("%": of shares), metrics; the others follow by the part of their names
# before the slash
PANELS = (
    ("Held-out accuracy", "%", "eval/accuracy eval/tool_call_accuracy eval/answer_accuracy"),
    ("Accuracy of the rollouts", "%", "accuracy accuracy/calls accuracy/answers"),
    ("Mean reward", "reward", "reward eval/reward"),
    ("Mean response length", "tokens", "completions/mean_length"),
    ("Cut rollouts, tied groups", "%", "completions/clipped_ratio frac_reward_zero_std"),
    (
        "How rollouts are wrapped",
        "%",
        "form/call form/answer form/both form/untagged_call form/neither"
        + " form/empty_answer form/repeated_key",
    ),
    ("Loss", "loss", "loss eval/loss"),
    ("Gradient norm", "L2 norm", "grad_norm grad_norm/policy"),
    ("Gradient norm ratios", "of the policy's", "grad_norm_ratio/expert grad_norm_ratio/rejected"),
    ("Entropy", "nats per token", "entropy"),
    ("Expert tokens that rollouts have", "%", "tokens_matched/calls tokens_matched/answers"),
    ("Advantage of the first token", "mean", "first_advantage/calls first_advantage/answers"),
    ("Preference margin", "reward", "rewards/margins eval/rewards/margins"),
    ("Pairs ranked right", "%", "rewards/accuracies eval/rewards/accuracies"),
    ("Mean length of a pair's steps", "tokens", "lengths/chosen lengths/rejected"),
)
UNITS = {"timing_s": "seconds", "perf": "tokens per second", "logps": "nats per token"}


# -------------------------------------------------------------------------------------- the page


def read(out: Path) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """The lines of metrics.jsonl and of searches.jsonl, by the stages that have begun."""
    metrics, searches = (
        {stage: list(read_jsonl(out / stage / name, growing=True)) for stage in STAGES}
        for name in ("metrics.jsonl", "searches.jsonl")
    )
    begun = {stage: lines for stage, lines in metrics.items() if lines}
    if not begun:
        raise ValueError(f"{out} has no metrics.jsonl: give the --output_dir of a run")
    return begun, searches


def report(out: Path, tokenizer=None) -> Path:
    """Write report.html of a run and return its path; ValueError where there is no run.

    tokenizer  None: that of the run's newest checkpoint or of its base model; where neither can be
               had, responses are shown without colours
    """
    return write_report(out, *read(out), tokenizer)


def write_report(out: Path, metrics: dict, searches: dict, tokenizer) -> Path:
    """The same of a run that has been read."""
    settings = [lines[0] for lines in metrics.values()]
    config = settings[-1]
    samples, errors = [], None
    if (out / "rollouts.jsonl").exists():
        records = Lines(out / "rollouts.jsonl")
        if len(records):
            size, tokenizer = config.get("num_generations", 1), tokenizer or _tokenizer(out, config)
            samples.append(rollout_samples(records, size, tokenizer))
            errors = error_types(records)
    if (out / "pairs.jsonl").exists():
        samples.append(pair_samples(Lines(out / "pairs.jsonl")))
    name = f"{out.resolve().name}: {config.get('algo')}"
    tables = [hours_table(hours(metrics, searches))]
    if searches[""]:
        tables.insert(0, iterations(metrics[""][1:], searches[""]))
    page = curves(metrics) | {
        "title": name,
        "about": f"{settings[0].get('model_name_or_path')}, seed {config.get('seed')}, in {out}",
        "milestones": milestones(metrics),
        "errors": errors,
        "samples": samples,
        "tables": tables,
        "settings": [_settings("Settings", config)],
    }
    for stage, first in [*zip(metrics, settings)][:-1]:
        other = {k: v for k, v in first.items() if v != config.get(k)}
        page["settings"].append(_settings(f"Where those of {stage} differ", other))
    if errors:  # its steps are those of the last stage
        first = next(reversed(page["marks"]))["x"] if "" in metrics and len(metrics) > 1 else 0
        errors["x"] = [x + first for x in errors["x"]]
    if not samples:
        page["note"] += " This run has no record of single responses."
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # "<" begins every tag and comment that could end the script element that holds the data
    data = json.dumps(_finite(page), allow_nan=False).replace("<", "\\u003c")
    before, rest = template.split("__TITLE__")
    between, after = rest.split("__DATA__")
    path, text = out / "report.html", before + html.escape(name) + between + data + after
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
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
    chosen = {*_evenly(len(rows), POINTS)}
    kept = [row for i, row in enumerate(rows) if i in chosen or "eval/accuracy" in row[2]]
    names = {name for _, _, line in kept for name in line if line[name] is not None}
    names = sorted(names - {"step", "iteration"})
    panels = [
        {"title": title, "unit": unit, "metrics": [name for name in own.split() if name in names]}
        for title, unit, own in PANELS
    ]
    shown, others = {name for panel in panels for name in panel["metrics"]}, {}
    for name in names:
        if name not in shown:
            others.setdefault(name.rpartition("/")[0] or name, []).append(name)
    config, *lines = [*stages.values()][-1]
    last = lines[-1]["step"] if lines else "none"
    of = f" of {config['max_steps']}" if "max_steps" in config else ""
    stage = f" of {marks[-1]['name']}" if marks else ""
    note = f"Up to step {last}{of}{stage}. Step 0 is the evaluation before training. "
    if len(kept) < len(rows):
        note += f"Curves show {len(kept):,} of {len(rows):,} steps, evenly, and the evaluations. "
    return {
        "x": [x for x, _, _ in kept],
        "names": [step for _, step, _ in kept],
        "marks": marks,
        "axis": "optimiser steps" + (" of all stages" if len(stages) > 1 else ""),
        "metrics": {name: [line.get(name) for _, _, line in kept] for name in names},
        "panels": [panel for panel in panels if panel["metrics"]],
        "others": [
            {"title": title, "unit": UNITS.get(title, "value"), "metrics": own}
            for title, own in others.items()
        ],
        "note": note + "Point at a plot, or focus it and use ← →, to read its values.",
    }


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


def rollout_samples(records: Lines, size: int, tokenizer) -> dict:
    """The responses to some prompts, evenly over the run, with the numbers of every token.

    size  lines of a group
    """
    groups = []
    for i in _evenly(len(records) // size, GROUPS):
        rows = [records[k] for k in range(i * size, (i + 1) * size)]
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
    n, outcome, error = len(row["token_ids"]), row["outcome"], error_of(row) or "right"
    parts = outcome.get("parts") or outcome
    said = ", ".join(
        f"{name} {value:.3g}"
        for name, value in parts.items()
        if isinstance(value, (int, float)) and name not in ("total", "right")
    )
    head = f"response {row['k']}: reward {row['reward']:.3g}, {error} ({said}), {n} tokens"
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
        numbers = {name: row.get(f"{side}_{name}") for name in "QpRN"}
        said = ", ".join(f"{name} {x:.3g}" for name, x in numbers.items() if x is not None)
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
    rows = map(records.__getitem__, _evenly(total, READ))
    found = [(row["step"], error_of(row) or "right") for row in rows]
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


def iterations(lines: list[dict], searches: list[dict]) -> dict:
    """iTool's iterations as a table: searches, pairs, and what training on them changed.

    lines  of metrics.jsonl, without the settings
    """
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


def milestones(metrics: dict[str, list[dict]]) -> list[tuple[str, float]]:
    """(what, accuracy on held-out examples): before, after each stage and iteration, at the end."""
    marks = []
    for stage, (_, *rows) in metrics.items():
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


def hours(metrics: dict, searches: dict) -> dict[str, dict[str, float]]:
    """Hours of each stage by part, from the recorded timings (iTool Table 8); saves do not count.

    Parts are those of timing_s/*; "other" is the rest of the steps, "total" the sum.
    """
    found = {}
    for stage, (config, *lines) in metrics.items():
        seconds = Counter()
        for row in lines + searches[stage]:
            parts = {k[9:]: v for k, v in row.items() if k.startswith("timing_s/")}
            step, evaluation = parts.pop("step", 0.0), parts.get("evaluate", 0.0)
            seconds.update(parts | {"other": step - (sum(parts.values()) - evaluation)})
        seconds["total"] = sum(seconds.values())
        found[stage or config.get("algo")] = {k: s / 3600 for k, s in seconds.items()}
    return found


def hours_table(found: dict[str, dict[str, float]]) -> dict:
    """The hours of the stages as a table."""
    parts = sorted({part for own in found.values() for part in own} - {"total"})
    columns = ["stage", *parts, "total"]
    rows = [[stage, *(own.get(part, "–") for part in columns[1:])] for stage, own in found.items()]
    note = "By part of the steps, from the recorded timings; saves do not count."
    return {"title": "Hours", "note": note, "columns": columns, "rows": rows}


# ------------------------------------------------------------------------------- the last lines


def summary(out: Path, tokenizer) -> str:
    """The lines that end a run; writes report.html and hours.json."""
    metrics, searches = read(out)
    folders = [path for path in out.glob("checkpoint-*") if (path / "config.json").exists()]
    order = lambda path: (path.name.endswith("best"), path.stat().st_mtime)
    scores = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in milestones(metrics))
    spent = hours(metrics, searches)
    (out / "hours.json").write_text(json.dumps(spent, indent=1) + "\n")
    lines = [
        "",
        f"accuracy on held-out examples: {scores}",
        f"checkpoint   {max(folders, key=order, default='none')}",
        f"metrics      {out / 'metrics.jsonl'}",
    ]
    names = {"rollouts": "rollouts.jsonl", "pairs": "pairs.jsonl"}
    lines += [f"{k:12} {out / name}" for k, name in names.items() if (out / name).exists()]
    totals = ", ".join(f"{stage} {parts['total']:.2f}" for stage, parts in spent.items())
    lines += [f"hours        {totals}"]
    if (out / "trees-1.jsonl").exists():
        lines += [f"trees        python mcts.py show {out}/trees-1.jsonl"]
    lines += [f"report       {write_report(out, metrics, searches, tokenizer)}"]
    return "\n".join(lines)


def visible(text: str) -> str:
    """The text with its control characters spelt out."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _tokenizer(out: Path, config: dict):
    """The run's tokenizer: of its newest checkpoint, else of the base model; None for neither."""
    from transformers import AutoTokenizer

    saved = out.glob("checkpoint-*/tokenizer_config.json")
    newest = sorted(saved, key=lambda path: path.stat().st_mtime, reverse=True)
    trust_remote_code = config.get("trust_remote_code", False)  # the run has read it
    for where in (*(path.parent for path in newest), config.get("model_name_or_path")):
        try:
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
