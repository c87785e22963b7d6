"""The demo's picture; the pictures and the table under "Performance" in bench/README.md: all from recorded files.

    python bench/plot.py     writes demo.png, performance.png, gpu.png and the lines between README.md's markers

Only what was measured is drawn and listed. demo.jsonl is the metrics.jsonl of a run.
"""

import json

import common
from common import data

plt = common.pyplot()
OURS, THEIRS = "#1f77b4", "#c44e52"
PARTS = {part: part for part in ("rollout", "reward", "advantage", "update", "records", "sync")}
PARTS |= {"update": "training part", "sync": "weight sync"}
MARKERS = "<!-- bench -->\n", "<!-- /bench -->\n"


def read(name: str) -> dict | None:
    """The JSON of a script, None where it has not run."""
    path = common.BENCH / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def steps() -> dict[str, dict]:
    """The files of bench/step.py from the smallest model to the largest, rows by prompt length."""
    files = {path.stem: json.loads(path.read_text()) for path in common.BENCH.glob("step-*.json")}
    for file in files.values():
        file["results"].sort(key=lambda row: row["prompt"])
    return dict(sorted(files.items(), key=lambda item: item[1]["results"][0]["body"]))


def draw_demo() -> None:
    """demo.png: accuracy and reward over the steps of `make demo`."""
    settings, *rows = data.read_jsonl(common.BENCH / "demo.jsonl")
    titles = {"accuracy": "completely right, share", "reward": "mean reward"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items()):
        for key, style, label in (
            (name, "-", "rollouts"),
            (f"eval/{name}", "o--", "held out, greedy"),
        ):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points), style, label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    figure.suptitle(f"{settings['algo']}, toy_model, seed {settings['seed']}")
    figure.savefig(common.BENCH / "demo.png", dpi=100)
    plt.close(figure)


def gpu_rows() -> tuple[list[dict], list[dict]]:
    """The rows of bench/gpu.py's files, the largest model first, and the machines.

    MFU is given against the higher of the two matmul rates, those before and after the rows.
    """
    files = [json.loads(path.read_text()) for path in sorted(common.BENCH.glob("gpu-*.json"))]
    files = [file for file in files if not file["settings"].get("check")]
    rows = []
    for file in files:
        before, highest = file["matmul_tflops"][0], max(file["matmul_tflops"])
        own = [row for row in file["rows"] if "seconds" in row]
        rows += [row | {"mfu": row["mfu"] * before / highest} for row in own]
    for row in rows:
        switches = [name for name in ("compile", "fused_norm") if row.get(name)]
        row["label"] = ", ".join([row["way"], *switches]).replace("_", " ")
    rows.sort(key=lambda row: (-row["parameters"], row["prompt"], -row["tokens_per_second"]))
    return rows, [file["machine"] for file in files]


def draw_gpu(rows: list[dict]) -> None:
    """gpu.png: tokens per second of every way, a panel per model and length of the prompt."""
    cases = list(dict.fromkeys((row["shape"], row["prompt"]) for row in rows))
    figure, axes = plt.subplots(
        -(-len(cases) // 2), 2, figsize=(10, 2.2 * -(-len(cases) // 2)), squeeze=False
    )
    for axis, case in zip(axes.flat, cases):
        own = [row for row in rows if (row["shape"], row["prompt"]) == case][::-1]
        colors = [THEIRS if row["way"] == "padded" else OURS for row in own]
        rates = [row["tokens_per_second"] for row in own]
        bars = axis.barh([row["label"] for row in own], rates, color=colors)
        axis.bar_label(bars, [f" {r['mfu']:.0%} MFU" for r in own], fontsize=8)
        axis.set(xlim=(0, 1.25 * max(rates)), title=f"{case[0]}, prompt {case[1]:,}")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("tokens per second, each prompt counted once")
    figure.tight_layout()
    figure.savefig(common.BENCH / "gpu.png", dpi=120)


def gpu_table(rows: list[dict]) -> list[str]:
    """Markdown lines: a row per model, prompt and way."""
    lines = [
        "| model | prompt | way | tokens/s | x padded | MFU | peak memory | of the plan |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"{row['times_padded']:.1f}" if row.get("times_padded") else ""
        lines.append(
            f"| {row['shape']} | {row['prompt']:,} | {row['label']} | "
            f"{row['tokens_per_second']:,.0f} | {times} | {row['mfu']:.0%} | "
            f"{row['peak_bytes'] / 1e9:.0f} GB | {row['peak_to_planned']:.0%} |"
        )
    return lines


def draw_times(axis, rows: list[dict]) -> None:
    """Seconds of a step against prompt length, both arms, the largest model with several."""
    shapes = [row["shape"] for row in rows]
    rows = [row for row in rows if row["shape"] == max(shapes[::-1], key=shapes.count)]
    prompts = [row["prompt"] for row in rows]
    for arm, color, label in (("trl", THEIRS, "TRL"), ("ours", OURS, "ours")):
        for part, style, words in (("step", "o-", "whole step"), ("update", "o:", "training part")):
            seconds = [row[arm][part] for row in rows]
            axis.plot(prompts, seconds, style, color=color, label=f"{label}, {words}")
    floors = [row["floor_s"] for row in rows]
    axis.plot(prompts, floors, "--", color="gray", label="floor of the matrix work")
    top = 1.6 * max(row["trl"]["step"] for row in rows)  # room for the legend
    axis.set(
        xlabel="prompt tokens",
        ylabel="seconds",
        ylim=(0, top),
        xticks=prompts,
        title=f"a step of {rows[0]['prompts_per_step']} prompts, {rows[0]['shape']} parameters",
    )
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def draw_ratios(axis, rows: list[dict]) -> None:
    """How many times faster than TRL a step is, per model and length of the prompt."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        xy = [row["prompt"] for row in own], [row["ratio_step"] for row in own]
        axis.plot(*xy, "o-", label=f"{shape} parameters")
    prompts = sorted({row["prompt"] for row in rows})
    axis.axhline(1, color=THEIRS, linestyle="--", linewidth=1)
    axis.set(
        xlabel="prompt tokens",
        ylabel="TRL's step / ours",
        xticks=prompts,
        ylim=(0, None),
        title="times faster per step",
    )
    axis.legend(framealpha=1, edgecolor="none", fontsize=8, loc="lower right")


def draw_breakdown(axis, rows: list[dict]) -> None:
    """What a step is spent on, as shares, per model and length of the prompt."""
    names = [f"{row['shape']}, {row['prompt']:,}" for row in rows]
    left = [0.0] * len(rows)
    for part, label in PARTS.items():
        share = [100 * row["ours"].get(part, 0.0) / row["ours"]["step"] for row in rows]
        axis.barh(names, share, left=left, label=label)
        left = [a + b for a, b in zip(left, share)]
    axis.set(xlabel="% of our step", title="where our step goes", xlim=(0, 100))
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)


def draw_memory(axis, memory: dict) -> None:
    """Peak of live tensors of the training part, per way."""
    results, settings = memory["results"], memory["settings"]
    names = list(results)[::-1]
    sizes = [results[name]["tracked"] / 2**30 for name in names]
    bars = axis.barh(
        names, sizes, color=[OURS if n.startswith("packed") else THEIRS for n in names]
    )
    axis.bar_label(bars, [f" {size:.1f}" for size in sizes], fontsize=8)
    axis.set(
        xscale="log",
        xlabel="GiB on top of the weights",
        xlim=(None, 3 * max(sizes)),
        title=f"prompt {settings['prompt']:,}, {settings['group']} x {settings['answer']}, "
        f"{settings['vocabulary'] // 1000}k words",
    )


def table(rows, memory, sync, rollout, scaling, rows_of_data, search) -> list[str]:
    """Markdown lines: the table, then what it was measured on."""
    lines = ["| measured | result |", "|---|---|"]
    for row in rows:
        lines.append(
            f"| step, {row['shape']} parameters, prompt {row['prompt']:,}: ours / TRL | "
            f"{row['ours']['step']:.2f} s / {row['trl']['step']:.2f} s, "
            f"**{row['ratio_step']:.1f} x** (training part {row['ours']['update']:.2f} s / "
            f"{row['trl']['update']:.2f} s, {row['ratio_training']:.1f} x; "
            f"{row['times_floor']:.1f} x the floor) |"
        )
    if memory:
        ways = ("packed", "padded, full", "padded, answers")
        packed, full, answers = (memory["results"][way]["tracked"] for way in ways)
        lines.append(
            f"| peak memory of the training part, prompt {memory['settings']['prompt']:,}, "
            f"vocabulary {memory['settings']['vocabulary']:,} | {packed / 2**30:.2f} GiB, "
            f"1/{full / packed:.0f} of the padded computation with full logits "
            f"({full / 2**30:.1f} GiB, counted on tensors without data), "
            f"1/{answers / packed:.1f} of it with logits of responses only |"
        )
    if sync:
        lines.append(
            f"| weight sync, {sync['ranks']} ranks | {sync['share_of_step']:.1%} of a step; it "
            f"holds at most {sync['held_bytes'] / sync['model_bytes']:.0%} of the model in memory |"
        )
    if rollout:
        rate = common.median(rollout["rewards_per_second"])
        lines.append(
            f"| rollout against bare `vllm.LLM.generate` | {rollout['ratio']['same']:.0%} of its "
            f"speed on the same requests, {rollout['ratio']['plain']:.0%} of that on requests "
            "without seeds and log-probs |"
        )
        lines.append(f"| rewards | {rate:,.0f} per second of one core |")
    if scaling:
        two = scaling["results"]
        lines.append(
            f"| two ranks on two cores, prompts per second against one rank on one | "
            f"{two['2 ranks, strong']['speedup']:.2f} x strong, "
            f"{two['2 ranks, weak']['speedup']:.2f} x weak "
            f"(one rank with two threads: {two['1 rank, 2 threads']['speedup']:.2f} x) |"
        )
    if rows_of_data:
        row = rows_of_data["results"][-1]
        lines.append(
            f"| data | {row['rows']:,} xLAM-shaped rows converted in {row['convert_s']:.0f} s of "
            f"one core; what fits is known {row['fit_s']:.0f} s later (tokenising everything: "
            f"{row['tokenise_all_s']:.0f} s) |"
        )
    for order, row in search.items():
        lines.append(
            f"| iTool's search, {row['arguments']['trees']} trees, against a call per sample and "
            f"grade (on {row['naive']['trees']} trees), `--self_evaluation {order}` | "
            f"{row['ours']['seconds']:.2f} s / {row['naive']['seconds']:.1f} s a tree, "
            f"**{row['ratio']['seconds']:.0f} x** |"
        )
    return lines


def conditions(machines: list[dict]) -> list[str]:
    """Hardware, versions, and per measurement its commit, load and command."""
    first = machines[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [
        f"{first['cpu']}, {first['cores']} cores, {first['gpu'] or 'no GPU'}; "
        f"Python {first['python']}, {versions}.",
        "",
    ]
    for machine in machines:
        lines.append(
            f"- `{machine['command']}`: commit {machine['commit']}, load {machine['load_average']} "
            "before it"
        )
    return lines


def main() -> None:
    names = ("memory", "sync", "rollout", "scaling", "data")
    files = steps()
    rows = [row for file in files.values() for row in file["results"]]
    files |= {name: file for name in names if (file := read(name))}
    if not files:
        raise SystemExit("bench/ holds no result yet: run bench/step.py first")
    if (common.BENCH / "demo.jsonl").exists():
        draw_demo()
    panels = [(draw, rows) for draw in (draw_times, draw_ratios, draw_breakdown) if rows]
    if "memory" in files:
        panels.append((draw_memory, files["memory"]))
    if panels:
        figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(10, 7.5), squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (draw, results) in zip(axes.flat, panels):
            draw(axis, results)
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(common.BENCH / "performance.png", dpi=120)
    searches = read("mcts") or {}
    machines = [file["machine"] for file in [*files.values(), *searches.values()]]
    lines = table(rows, *(files.get(name) for name in names), searches)
    picture = ["![performance](performance.png)", ""] if panels else []
    on_gpu, gpus = gpu_rows()
    if on_gpu:
        draw_gpu(on_gpu)
        picture = [*picture, *gpu_table(on_gpu), "", "![on a GPU](gpu.png)", ""]
    text = "\n".join([*lines, "", *picture, *conditions(machines)]) + "\n"
    if on_gpu:
        text += "\n" + "\n".join(conditions(gpus)) + "\n"
    readme = common.BENCH / "README.md"
    before, _, rest = readme.read_text().partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    assert rest, f"{readme} has no line {MARKERS[0]!r}"
    readme.write_text(before + MARKERS[0] + text + MARKERS[1] + after)
    print(text)


if __name__ == "__main__":
    main()
