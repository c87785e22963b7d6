"""What results.jsonl says: columns with intervals, comparisons, error types, pictures.

    report(run)         columns, categories, error types, what went wrong -> report.md, report.png
    compare(runs)       columns over the common cases, differences from the first run
    errors(file)        error types (iTool Figure 3) of any file of responses and targets
    columns_of(run)     columns that are complete, in percent
    bootstrap(results)  columns under resampling of the cases within each category

Intervals are the 2.5th and 97.5th percentiles over resampled cases, paired between runs. They say
how far another draw of cases may move a figure, not what another seed or prompt would do.
"""

import json
from collections import Counter
from pathlib import Path

import numpy

import rewards
from data import read_jsonl
from tasks import api_bank, bfcl

LABELS = {
    "overall_paper": "Overall (ToolUPT)",
    "non_live": "Non-live AST",
    "live": "Live AST",
    "multi_turn": "Multi-turn",
    "relevance": "Relevance",
    "irrelevance": "Irrelevance",
    "overall_v3": "Overall (iTool)",
    "non_live_v3": "Non-live with irrelevance (iTool)",
    "live_v3": "Live with relevance, irrelevance (iTool)",
    "live_multi_turn": "mean of that and Multi-turn (iTool Table 5)",
    "level_1": "L1",
    "level_2": "L2",
    "level_2_without_search": "L2 without ToolSearcher",
    "accuracy": "Accuracy",
    "tool_call": "Tool calls",
    "answer": "Answers",
}  # in the order of the papers' tables
SAMPLES = 1000  # of the bootstrap
# Entries of settings.json, other than the model, that a figure depends on.
SETTINGS = ("bfcl_eval", "judged_with", "file", "api_bank", "data", "half", "prompt", "format")
SETTINGS += ("keep_steps", "temperature", "max_tokens", "max_model_len", "stop_token_ids")
SETTINGS += ("engine", "dtype", "versions", "allow_thinking")


def file_columns(counts: dict) -> dict:
    """Accuracies in percent: all, tool calls, answers."""
    out = {name: 100 * correct / total for name, (correct, total) in counts.items()}
    correct, total = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    return {"accuracy": 100 * correct / total, **out} if counts else {}


COLUMNS = {"bfcl": bfcl.columns, "api_bank": api_bank.columns, "file": file_columns}


def report(out: Path) -> str:
    """Write report.md and report.png of a run; return the text."""
    rows, settings = _read(out)
    sizes, counts = settings["sizes"], _counts(rows)
    lines = [f"# {settings['model']} on {settings['bench']}", "", *_provenance(settings), ""]
    lines += _column_table([rows], [settings], [str(out)])
    partial_ones = [f"{k} {counts[k][1]} of {sizes[k]}" for k in counts if counts[k][1] < sizes[k]]
    if partial_ones:
        lines += ["", "**Not the whole benchmark**, no overall: " + ", ".join(partial_ones) + "."]
    elif settings["bench"] == "bfcl" and len(counts) < len(bfcl.CATEGORIES):
        lines += ["", f"{len(counts)} of 17 categories: no overall."]
    table = []
    for category, (correct, total) in counts.items():
        mine = [row for row in rows if row["category"] == category]
        shares = (correct, total, f"{100 * correct / total:.2f}")
        table.append([category, *shares, *_faults(mine)])
    columns = ("category", "correct", "cases", "accuracy", "malformed", "over-long", "cut")
    lines += ["", *_table([*columns, "force-quit"], table)]
    lines += ["", *_forms(rows)] if settings["format"] == "toolupt" else []
    lines += ["", *_notes(rows, settings)]
    errors, accuracies = error_counts(rows)
    lines += ["", "Error types (iTool Figure 3)", "", error_table(errors)]
    text = "\n".join(lines) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    picture(errors, out / "report.png", accuracies)
    return f"{text}\n{out}/report.md, report.png, results.jsonl"


def columns_of(out: Path) -> dict[str, float]:
    """The complete columns of a run in percent."""
    return _columns(*_read(out))[0]


def compare(outs: list[Path]) -> str:
    """Columns of runs over their common cases, with intervals and differences from the first."""
    results, settings = zip(*map(_read, outs))
    if len({s["bench"] for s in settings}) > 1:
        raise ValueError(f"different benchmarks: {', '.join(s['bench'] for s in settings)}")
    common = set.intersection(*({row["id"] for row in rows} for rows in results))
    if not common:
        raise ValueError(
            "the runs have no case in common; one that was interrupted has its rows in "
            "results.part*.jsonl: start it again, or --rescore it"
        )
    lines = [f"{len(common)} common cases"]
    lines += [f"  {out}: {len(rows)} cases" for out, rows in zip(outs, results)]
    for name in SETTINGS:
        given = [s.get(name) for s in settings]
        if len({None if x in (None, "") or x is False else str(x) for x in given}) > 1:
            lines += [f"WARNING: {name} differs: " + ", ".join(map(str, given))]
    targets = [  # an over-long prompt has none
        {row["id"]: row.get("target") for row in rows if not row["over_long"]} for rows in results
    ]
    other = sorted(i for i in common if len({t[i] for t in targets if i in t}) > 1)
    if other:
        raise ValueError(f"{len(other)} common cases have different targets, {other[0]} for one")
    results = [[row for row in rows if row["id"] in common] for rows in results]
    return "\n".join([*lines, "", *_column_table(results, settings, list(map(str, outs)))])


def errors(path: Path) -> str:
    """Error types of a .jsonl file of responses and targets: table, and a picture beside the file.

    A line has response (or text) and target, and optionally category (or kind), as rollouts.jsonl
    does. ValueError naming the line that lacks one.
    """
    counts, right = {}, Counter()
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            response = row["response"] if "response" in row else row["text"]
            kind = rewards.error_type(response, row["target"])
        except KeyError as error:
            raise ValueError(
                f"{path} line {number} has no {error}; it needs response (or text) and target"
            ) from None
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} line {number} needs a response and a target ({error})"
            ) from None
        category = str(row.get("category") or row.get("kind") or "all")
        right[category] += kind is None
        counts.setdefault(category, Counter()).update([kind] if kind else [])
    if not counts:
        raise ValueError(f"{path} is empty")
    image = picture(counts, path.with_suffix(".errors.png"))
    lines = [f"{k}: {right[k]} of {right[k] + n.total()} without error" for k, n in counts.items()]
    return "\n".join([*lines, "", error_table(counts), "", str(image)])


def error_counts(rows: list[dict]) -> tuple[dict[str, Counter], dict[str, float]]:
    """Error types of the wrong cases and percent of right ones: per category and, as in iTool's
    Figure 3, of all non-live and all live cases of BFCL."""
    parts = {category: (category,) for category in _counts(rows)}
    for name, group in (("all non-live", "non_live"), ("all live", "live")):
        parts |= {name: bfcl.GROUPS[group]} if parts.keys() & bfcl.GROUPS[group] else {}
    errors, accuracies = {}, {}
    for name, categories in parts.items():
        mine = [row for row in rows if row["category"] in categories]
        errors[name] = Counter(row["error_class"] for row in mine if not row["correct"])
        accuracies[name] = 100 * sum(row["correct"] for row in mine) / len(mine)
    return errors, accuracies


def error_table(counts: dict[str, Counter]) -> str:
    """A Markdown table of error classes per category."""
    rows = [
        [category, *(found[name] for name in bfcl.CLASSES)] for category, found in counts.items()
    ]
    return "\n".join(_table(["category", *bfcl.CLASSES], rows))


def picture(
    counts: dict[str, Counter], path: Path, accuracy: dict[str, float] | None = None
) -> Path:
    """Draw error classes per category as stacked bars, next to accuracies; return the path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{category} ({found.total()})" for category, found in counts.items()]
    size = (13 if accuracy else 9, 2.2 + 0.3 * len(counts))
    figure, axes = plt.subplots(1, 1 + bool(accuracy), figsize=size, squeeze=False, sharey=True)
    axis, left = axes[0][-1], numpy.zeros(len(names))
    for name in bfcl.CLASSES:
        shares = [100 * found[name] / max(1, found.total()) for found in counts.values()]
        axis.barh(names, shares, left=left, label=name)
        left += shares
    axis.set(xlabel="share of the wrong responses, % (their number in brackets)", xlim=(0, 100))
    axis.legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    if accuracy:
        bars = axes[0][0].barh(names, list(accuracy.values()), color="tab:green")
        axes[0][0].bar_label(bars, fmt=" %.1f", fontsize="small")
        axes[0][0].set(xlabel="accuracy, %", xlim=(0, 100))
    axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def bootstrap(results: list[list[dict]], bench: str, samples: int = SAMPLES, seed: int = 0) -> dict:
    """Columns under resampling of the cases within their categories, with one draw for all runs.

    results  rows per run, over the same cases
    Returns column -> (samples, runs) in percent.
    """
    rng, counts = numpy.random.default_rng(seed), {}
    by_id = [{row["id"]: row["correct"] for row in rows} for rows in results]
    for category in _counts(results[0]):
        ids = [row["id"] for row in results[0] if row["category"] == category]
        right = numpy.array([[run[i] for run in by_id] for i in ids], dtype=float)
        draws = rng.multinomial(len(ids), [1 / len(ids)] * len(ids), size=samples)
        counts[category] = (draws @ right, len(ids))
    return COLUMNS[bench](counts)


def _column_table(results, settings, names):
    """Markdown: columns of each run with 95 % intervals, and differences from the first run."""
    bench = settings[0]["bench"]
    exact, complete = zip(*map(_columns, results, settings))
    spread = bootstrap(results, bench)
    shown = [name for name in LABELS if all(name in columns for columns in exact)]
    whole = set.intersection(*complete)
    labels = [LABELS[name] + ("" if name in whole else " (part)") for name in shown]
    if not shown:
        return ["No column of the tables is complete."]
    lines = []
    for j, name in enumerate(names):
        cells = [f"{exact[j][c]:.2f} {_interval(spread[c][:, j])}" for c in shown]
        lines.append([name, *cells])
    for j, name in enumerate(names[1:], 1):
        cells = []
        for c in shown:
            low, high = numpy.percentile(gap := spread[c][:, j] - spread[c][:, 0], (2.5, 97.5))
            mark = " n.s." if low <= 0 <= high else ""
            cells.append(f"{exact[j][c] - exact[0][c]:+.2f} {_interval(gap)}{mark}")
        lines.append([f"{name} - {names[0]}", *cells])
    note = f"95 % intervals in brackets, from {SAMPLES} bootstrap samples of a category's cases."
    note += " n.s.: the interval of the difference contains 0." if len(names) > 1 else ""
    return [*_table(["run", *labels], lines), "", note]


def _columns(rows, settings):
    """The columns of a run, and the names of those all of whose cases are there.

    An overall needs all cases of all categories.
    """
    counts, sizes, columns = _counts(rows), settings["sizes"], COLUMNS[settings["bench"]]
    found, full = columns(counts), {k: c for k, c in counts.items() if c[1] >= sizes[k]}
    whole = {*columns(full)}
    if len(full) < len(counts):
        whole -= {"accuracy"}  # which is over all categories
    if len(full) < len(counts) or settings["half"] is not None:
        found = {k: v for k, v in found.items() if not k.startswith("overall")}
    return found, whole


def _clean(row, form):
    """Whether the only response is one answer and nothing else (ToolUPT: R_format = 1)."""
    if row["kinds"] != [["answer"]]:
        return False
    return form == "python" or rewards.binary(row["turns"][0][0], "<answer>any</answer>") == 1


def _forms(rows):
    """Markdown: how the responses of each category are wrapped, right or wrong (rewards.forms)."""
    names, lines = rewards.FORMS, []
    for category in _counts(rows):
        turns = [turn for row in rows if row["category"] == category for turn in row["turns"]]
        forms = [rewards.forms(response) for turn in turns for response in turn]
        lines.append([category, len(forms), *(sum(name in f for f in forms) for name in names)])
    note = "Untagged call: JSON in a code fence or between answer tags. Both: tags of both kinds."
    table = _table(["category", "responses", *names], lines)
    return ["Forms of the responses", "", *table, "", note]


def _interval(values):
    low, high = numpy.percentile(values, (2.5, 97.5))
    return f"[{low:.1f}, {high:.1f}]"


def _provenance(settings):
    versions = ", ".join(f"{name} {v}" for name, v in settings["versions"].items() if v)
    greedy = settings["temperature"] == 0
    sampling = (
        "greedy" if greedy else f"temperature {settings['temperature']}, seed {settings['seed']}"
    )
    lines = [
        f"- prompt {settings['format']} {settings['prompt']}; {sampling}; at most "
        f"{settings['max_tokens']} tokens; context {settings['max_model_len']}; "
        f"engine {settings['engine']}; {versions}"
    ]
    if settings["bfcl_eval"]:
        steps = "kept in" if settings["keep_steps"] else "dropped from"
        lines += [
            f"- bfcl-eval {settings['bfcl_eval']}; earlier turns' tool steps {steps} the prompt"
        ]
        if settings["judged_with"] != settings["bfcl_eval"]:
            lines += [f"- judged again with bfcl-eval {settings['judged_with']}"]
    if settings["half"] is not None:
        lines += [f"- BFCL-half: live cases outside the training half of seed {settings['half']}"]
    return lines


def _notes(rows, settings):
    """What readers need to know in order to trust the figures."""
    lines = []
    for category in ("irrelevance", "live_irrelevance"):
        mine = [row for row in rows if row["category"] == category]
        if mine:
            clean = sum(_clean(row, settings["format"]) for row in mine)
            share = f"{100 * clean / len(mine):.2f} % ({clean} of {len(mine)})"
            lines += [f"- {category}: {share} are clean answers; BFCL also credits broken calls."]
    if settings["bench"] == "bfcl":
        lines += [
            "- Overall (ToolUPT) = (Non-live + Live + Irrelevance + 3 Multi-turn) / 6, the scale of"
            " ToolUPT's tables. A model that never calls a tool gets 16.67 on it.",
            "- Overall (iTool) is the mean of BFCL-v3's three parts, on another scale: Multi-turn,"
            " and Non-live and Live, which there include relevance and irrelevance.",
            "- Error types: a wrong multi-turn case, a call where none is due and a missing call"
            " (relevance) count as Other.",
        ]
        raised = sum(str(row.get("error_type")).endswith(":raised") for row in rows)
        lines += [f"- {raised} cases count as wrong because BFCL's checker itself raised an error."]
    if settings["bench"] == "file" and settings["format"] == "toolupt":
        pairs = [(row["turns"][0][0], row["target"]) for row in rows if not row["over_long"]]
        totals = [rewards.outcome(*pair).total for pair in pairs] + [-3] * (len(rows) - len(pairs))
        mean = sum(totals) / (len(totals) or float("nan"))
        lines += [f"- mean outcome reward {mean:.3f} in [-3, 4] (Eq. 12; over-long prompts: -3)"]
    wrong, long, cut, quit = _faults(rows)
    lines += [
        f"- {len(rows)} cases: {wrong} with a malformed response, {long} with an over-long prompt"
        f" (wrong), {cut} with a response cut at {settings['max_tokens']} tokens, {quit} stopped"
        " after 20 steps in a turn."
    ]
    return lines


def _read(out):
    """The rows and the settings of a run."""
    rows = list(read_jsonl(out / "results.jsonl", growing=True))
    return rows, settings_of(out)


def settings_of(out: Path) -> dict:
    """What an evaluation wrote of itself; ValueError where none wrote into this folder."""
    if not (path := out / "settings.json").exists():
        raise ValueError(f"{out} holds no evaluation: give an --output_dir of eval.py")
    settings = json.loads(path.read_text())
    return {"judged_with": settings.get("bfcl_eval"), **settings}  # older ones do not say it


def _table(columns, rows):
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def _counts(rows):
    total, correct = Counter(row["category"] for row in rows), Counter()
    for row in rows:
        correct[row["category"]] += row["correct"]
    return {category: (correct[category], number) for category, number in total.items()}


def _faults(rows):
    """Cases with a malformed response, an over-long prompt, a cut response, too many steps."""
    malformed = sum(any("malformed" in turn for turn in row["kinds"]) for row in rows)
    names = ("over_long", "cut", "force_quit")
    return malformed, *(sum(bool(row.get(name)) for row in rows) for name in names)
