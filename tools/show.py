"""What a run looks like: its last lines, learning curve, coloured rollouts.

    python -m tools.show RUN --step N               responses of a step, coloured by advantage
    python -m tools.show RUN --step N --by token_rewards

summary(out, tokenizer)   the lines that end a run: accuracy before and after, where its files are
show(out, step)           the responses of a step in colour, and as a page
page(rows, tokenizer)     that page: self-contained HTML, a tooltip on every token
learning_curve(out)       out/learning_curve.png
"""

import argparse
import html
import json
import math
import sys
from collections import Counter
from pathlib import Path

from data import read_jsonl

PLAIN = "\033[0m"
SHADES = {
    1: (194, 157, 120, 83),
    -1: (224, 217, 210, 203),
}  # 256-colour backgrounds, weak to strong


def summary(out: Path, tokenizer) -> str:
    """The lines that end a run."""
    scores = milestones(out)
    folders = [path for path in out.glob("checkpoint-*") if (path / "config.json").exists()]
    order = lambda path: (path.name.endswith("best"), path.stat().st_mtime)
    newest = max(folders, key=order, default="none")
    lines = [
        "",
        "accuracy on held-out examples: "
        + ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in scores),
        f"checkpoint   {newest}",
        f"metrics      {out / 'metrics.jsonl'}",
    ]
    if (out / "rollouts.jsonl").exists():
        lines += [f"rollouts     {out / 'rollouts.jsonl'}"]
    lines += [f"hours        {write_hours(out)}"]
    lines += [f"picture      {learning_curve(out)}"]
    if (out / "searches.jsonl").exists():
        lines += [f"             {iterations(out)}"]
        lines += [f"pairs        {out / 'pairs.jsonl'}"]
        if (out / "trees-1.jsonl").exists():
            lines += [f"trees        python mcts.py show {out}/trees-1.jsonl"]
    if (out / "rollouts.jsonl").exists():
        lines += [
            "",
            "a rollout, tokens coloured by advantage (green: made likelier, red: less likely)",
            "",
        ]
        lines += [coloured(_telling(out / "rollouts.jsonl"), tokenizer)]
    return "\n".join(lines)


def show(out: Path, step: int, by: str = "advantages") -> str:
    """The responses of one step in colour, and the path of their HTML page; ValueError for none.

    by  "advantages" | "token_rewards": what colours the tokens
    """
    from transformers import AutoTokenizer

    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if not (out / name).exists():
            raise ValueError(
                f"{out}/{name} does not exist: only RL runs with their rollouts (not "
                "--no_log_rollouts) can be shown"
            )
    config = next(read_jsonl(out / "metrics.jsonl"))
    rows = [row for row in read_jsonl(out / "rollouts.jsonl") if row["step"] == step]
    if not rows:
        steps = sorted({row["step"] for row in read_jsonl(out / "rollouts.jsonl")})
        has = f"steps {steps[0]} to {steps[-1]}: --step N" if steps else "none"
        raise ValueError(f"{out}/rollouts.jsonl has no step {step}; it has {has}")
    trust_remote_code = config["trust_remote_code"]
    tokenizer = AutoTokenizer.from_pretrained(
        config["model_name_or_path"], trust_remote_code=trust_remote_code
    )
    if any(row[by] is None for row in rows):
        raise ValueError(f"{out} was trained without {by}: drop --by")
    path = out / f"step-{step}.html"
    path.write_text(page(rows, tokenizer), encoding="utf-8")
    return "\n\n".join([*(coloured(row, tokenizer, by) for row in rows), f"page   {path}"])


def coloured(row: dict, tokenizer, by: str = "advantages") -> str:
    """One response for a terminal: its tokens on green (positive) or red, stronger with size."""
    strongest = _largest(row[by])
    text = ""
    for token, value in zip(row["token_ids"], row[by]):
        piece = visible(tokenizer.decode([token]))
        if value and math.isfinite(value):
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


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>__TITLE__</title>
<style>
body { font: 15px/1.6 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
h2 { font-size: 1em; margin: 2em 0 0.3em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 0.5em }
.expert { color: #666 } label { margin-right: 1em }
span { border-radius: 2px; background: rgb(var(--a)) } span:hover { outline: 1px solid #000 }
#reward:checked ~ main span { background: rgb(var(--r)) }
</style>
<h1>__TITLE__</h1>
<p>Green: positive, made likelier where it is an advantage; red: negative. Point at a token for its
numbers: log-probs in nats of trainer and engine; phi = p (1 - p) (Eq. 21).</p>
<input type="radio" name="by" id="advantage" checked><label for="advantage">advantage</label>
<input type="radio" name="by" id="reward"><label for="reward">token reward</label>
<main>
__BODY__
</main></html>
"""


def page(rows: list[dict], tokenizer) -> str:
    """Responses as one HTML page without any outside resource; every text in it is escaped.

    rows  lines of rollouts.jsonl. A response without token rewards has its reward on every token
    """
    body = []
    for row in rows:
        rewards = row["token_rewards"] or [row["reward"]] * len(row["token_ids"])
        columns = (row["token_ids"], row["logps"], row["sampler_logps"], rewards, row["advantages"])
        tokens = []
        for token, logp, sampled, reward, advantage in zip(*columns, strict=True):
            p = math.exp(min(logp, 0.0))
            about = (
                f"token {token} {tokenizer.decode([token])!r}\n"
                f"log-prob {logp:.4f} (engine {sampled:.4f})\n"
                f"token reward {reward:.4f}\nadvantage {advantage:.4f}\nphi {p * (1 - p):.4f}"
            )
            a, r = _shade(advantage, row["advantages"]), _shade(reward, rewards)
            text = html.escape(visible(tokenizer.decode([token])))
            tokens.append(
                f'<span style="--a:{a};--r:{r}" title="{html.escape(about)}">{text}</span>'
            )
        head = f"{row['id']}, response {row['k']}, reward {row['reward']:.2f}"
        body += [
            f"<h2>{html.escape(head)}</h2>",
            f"<pre>{''.join(tokens)}</pre>",
            f'<pre class="expert">expert: {html.escape(visible(row["target"]))}</pre>',
        ]
    title = html.escape(f"step {rows[0]['step']}: {len(rows)} responses")
    return PAGE.replace("__TITLE__", title).replace("__BODY__", "\n".join(body))


def _shade(value: float, values: list[float]) -> str:
    """Red, green and blue of a value: white at 0, full colour at the largest of `values`."""
    faded = 255 - round(150 * abs(value) / _largest(values)) if math.isfinite(value) else 255
    return f"{faded} 255 {faded}" if value > 0 else f"255 {faded} {faded}"


def _largest(values: list[float]) -> float:
    """The largest size of the finite values, 1 where all are 0."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0) or 1


def milestones(out: Path) -> list[tuple[str, float]]:
    """(what, accuracy on held-out examples): before, after each stage and iteration, at the end."""
    marks = []
    for stage in ("sft", "warmup", ""):
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
    for stage in ("sft", "warmup", ""):
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


def iterations(out: Path) -> Path:
    """Draw accuracy, pairs and the margin on held-out pairs into iterations.png; its path."""
    plt = _pyplot()
    searches = list(read_jsonl(out / "searches.jsonl"))
    ends = {
        row["iteration"]: row
        for row in list(read_jsonl(out / "metrics.jsonl"))[1:]
        if "iteration" in row
    }
    margin = "eval/rewards/margins"
    margins = [
        (row["iteration"], row[margin], ends[row["iteration"]][margin])
        for row in searches
        if margin in row and margin in ends.get(row["iteration"], {})
    ]
    panels = 3 if margins else 2  # without held-out pairs no margin is known
    figure, axes = plt.subplots(1, panels, figsize=(14 * panels / 3, 3.8))
    accuracy, pairs = axes[:2]
    names, values = zip(*milestones(out))
    accuracy.plot(names, values, "o-")
    accuracy.set(title="accuracy, held-out examples", ylim=(0, 1))
    accuracy.tick_params(axis="x", rotation=20)
    numbers = [row["iteration"] for row in searches]
    counts = {"kept": [row["pairs"] + row["held_out"] for row in searches]}
    for why in sorted({why for row in searches for why in row["dropped"]}):
        counts[f"dropped: {why}"] = [row["dropped"].get(why, 0) for row in searches]
    for k, (name, heights) in enumerate(counts.items()):
        places = [n + 0.8 * (k - (len(counts) - 1) / 2) / len(counts) for n in numbers]
        pairs.bar(places, heights, 0.8 / len(counts), label=name)
    pairs.set(title="preference pairs", xlabel="iteration", xticks=numbers)
    pairs.legend()
    for iteration, *before_after in margins:
        axes[2].plot([iteration, iteration + 0.8], before_after, "o-")
    if margins:
        axes[2].set(title="reward margin on held-out pairs, before and after", xlabel="iteration")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path = out / "iterations.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def learning_curve(out: Path) -> Path:
    """Draw accuracy and reward over steps into learning_curve.png; return its path."""
    plt = _pyplot()
    config, *rows = read_jsonl(out / "metrics.jsonl")
    panels = [("accuracy", "accuracy"), ("reward", "mean reward"), ("loss", "loss")]
    panels = [(n, t) for n, t in panels if any(n in row or f"eval/{n}" in row for row in rows)]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, (name, title) in zip(axes[0], panels):
        for key, label, style in (
            (name, "training" if name == "loss" else "rollouts", "-"),
            (f"eval/{name}", "held-out, greedy", "o--"),
        ):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points), style, label=label, alpha=0.9)
        axis.set(title=title, xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{config['algo']}, {config['model_name_or_path']}, seed {config['seed']}")
    figure.tight_layout()
    path = out / "learning_curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _telling(path: Path) -> dict:
    """The last rollout with both positive and negative tokens, else the last."""
    best = None
    for row in read_jsonl(path):
        if best is None or (
            min(row["advantages"], default=0) < 0 < max(row["advantages"], default=0)
        ):
            best = row
    return best


def main(argv: list[str] | None = None) -> None:
    """`python -m tools.show RUN --step N`."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.show", description="Show a step's responses."
    )
    parser.add_argument("run", type=Path, help="output folder of a run")
    parser.add_argument("--step", type=int, default=1, help="optimiser step, from 1; default: 1")
    parser.add_argument(
        "--by",
        choices=("advantages", "token_rewards"),
        default="advantages",
        help="what colours the tokens; default: advantages",
    )
    args = parser.parse_args(argv)
    try:
        print(show(args.run, args.step, args.by))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
