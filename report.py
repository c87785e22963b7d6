"""What a run looks like: learning curve, coloured rollouts, trackers. Reads metrics.jsonl and rollouts.jsonl only.

summary(out, tokenizer)   the lines that end a run: accuracy before and after, where things lie, one coloured rollout
show(out, step)           `python train.py show RUN --step N`
learning_curve(out)       out/learning_curve.png
tracker(kind, ...)        TensorBoard or Weights & Biases beside metrics.jsonl
"""

import json
from collections.abc import Callable
from pathlib import Path

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
        "exact-match accuracy on held-out examples: "
        + ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in scores),
        f"checkpoint   {newest}",
        f"metrics      {out / 'metrics.jsonl'}",
    ]
    if (out / "rollouts.jsonl").exists():
        lines += [f"rollouts     {out / 'rollouts.jsonl'}"]
    lines += [f"picture      {learning_curve(out)}"]
    if (out / "searches.jsonl").exists():
        lines += [f"             {iterations(out)}"]
        lines += [f"pairs        {out / 'pairs.jsonl'}"]
        lines += [f"trees        python mcts.py show {out}/trees-1.jsonl --svg {out}/trees.svg"]
    if (out / "rollouts.jsonl").exists():
        lines += [
            "",
            "a rollout, tokens coloured by advantage (green: made likelier, red: less likely)",
            "",
        ]
        lines += [coloured(_telling(out / "rollouts.jsonl"), tokenizer)]
    return "\n".join(lines)


def show(out: Path, step: int) -> str:
    """The responses of one step, tokens coloured by advantage; ValueError where the step has none."""
    from transformers import AutoTokenizer

    config = next(_lines(out / "metrics.jsonl"))
    rows = [row for row in _lines(out / "rollouts.jsonl") if row["step"] == step]
    if not rows:
        raise ValueError(f"{out}/rollouts.jsonl has no step {step}; see --step")
    tokenizer = AutoTokenizer.from_pretrained(config["model_name_or_path"])
    return "\n\n".join(coloured(row, tokenizer) for row in rows)


def coloured(row: dict, tokenizer) -> str:
    """One response for a terminal: its tokens on green (positive advantage) or red, stronger with size."""
    strongest = max(map(abs, row["advantages"]), default=0) or 1
    text = ""
    for token, advantage in zip(row["token_ids"], row["advantages"]):
        piece = tokenizer.decode([token])
        if advantage:
            shade = SHADES[1 if advantage > 0 else -1][min(3, int(4 * abs(advantage) / strongest))]
            piece = "\n".join(
                f"\033[30;48;5;{shade}m{part}{PLAIN}" if part else "" for part in piece.split("\n")
            )
        text += piece
    head = f"step {row['step']}  {row['id']}  response {row['k']}  reward {row['reward']:.2f}"
    return f"{head}\n{text}\nexpert: {row['target']}"


def milestones(out: Path) -> list[tuple[str, float]]:
    """(what, accuracy on held-out examples): before, after each stage in front and each iteration, at the end."""
    marks = []
    for stage in ("sft", "warmup", ""):
        path = out / stage / "metrics.jsonl"
        rows = list(_lines(path))[1:] if path.exists() else []
        scores = [row for row in rows if row.get("eval/accuracy") is not None]
        if not scores:
            continue
        if not marks:
            marks.append(("before", scores[0]["eval/accuracy"]))
        last = {f"iteration {row['iteration']}": row for row in scores if "iteration" in row}
        last = last or {stage or "after": scores[-1]}
        if not stage and marks[-1][0] in (
            "sft",
            "warmup",
        ):  # the best checkpoint, not the last step
            marks[-1] = (marks[-1][0], scores[0]["eval/accuracy"])
        marks += [(name, row["eval/accuracy"]) for name, row in last.items()]
    return marks


def iterations(out: Path) -> Path:
    """Draw iTool's course into iterations.png: accuracy, pairs, and the margin on held-out pairs; return its path."""
    plt = _pyplot()
    searches = list(_lines(out / "searches.jsonl"))
    ends = {
        row["iteration"]: row
        for row in list(_lines(out / "metrics.jsonl"))[1:]
        if "iteration" in row
    }
    figure, (accuracy, pairs, margin) = plt.subplots(1, 3, figsize=(14, 3.8))
    names, values = zip(*milestones(out))
    accuracy.plot(names, values, "o-")
    accuracy.set(title="exact-match accuracy, held-out examples", ylim=(0, 1))
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
    for row in searches:
        end = ends.get(row["iteration"], {})
        if "eval/rewards/margins" in row and "eval/rewards/margins" in end:
            before_after = row["eval/rewards/margins"], end["eval/rewards/margins"]
            margin.plot([row["iteration"], row["iteration"] + 0.8], before_after, "o-")
    margin.set(title="reward margin on held-out pairs, before and after", xlabel="iteration")
    for axis in (accuracy, pairs, margin):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path = out / "iterations.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def learning_curve(out: Path) -> Path:
    """Draw accuracy and reward over steps into learning_curve.png; return its path."""
    plt = _pyplot()
    config, *rows = _lines(out / "metrics.jsonl")
    panels = [("accuracy", "exact-match accuracy"), ("reward", "mean reward"), ("loss", "loss")]
    panels = [(n, t) for n, t in panels if any(n in row or f"eval/{n}" in row for row in rows)]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, (name, title) in zip(axes[0], panels):
        for key, label, style in (
            (name, "rollouts", "-"),
            (f"eval/{name}", "held-out, greedy", "o--"),
        ):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points), style, label=label, alpha=0.9)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{config['algo']}, {config['model_name_or_path']}, seed {config['seed']}")
    figure.tight_layout()
    path = out / "learning_curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def lowest(out: Path, name: str) -> float:
    """The lowest value of a metric so far; infinity before the first."""
    path = out / "metrics.jsonl"
    rows = list(_lines(path))[1:] if path.exists() else []
    return min((row[name] for row in rows if row.get(name) is not None), default=float("inf"))


def tracker(kind: str, out: Path, config: dict) -> Callable[[dict, int], None] | None:
    """A function that takes (metrics, step), or None for "none"; ImportError with the remedy if it is not installed."""
    if kind == "none":
        return None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out / "tensorboard")

            def log(metrics, step):
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)

            return log
        import wandb
    except ImportError as error:
        raise ImportError(f"--report_to {kind}: {error}; pip install {kind}") from error
    wandb.init(project="toolupt", dir=str(out), config=config)
    return lambda metrics, step: wandb.log(metrics, step=step)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _telling(path: Path) -> dict:
    """The last rollout with both positive and negative tokens, else the last."""
    best = None
    for row in _lines(path):
        if best is None or (
            min(row["advantages"], default=0) < 0 < max(row["advantages"], default=0)
        ):
            best = row
    return best


def _lines(path: Path):
    with open(path) as file:
        for line in file:
            yield json.loads(line)
