"""A long run: 500 steps of the demo on two ranks. Does memory, open files or disk use grow?

    python bench/long.py       a quarter of an hour on two cores -> bench/long.json, bench/long.png
    python bench/long.py --steps 40 --engine transformers --out /tmp/long.json

Starts `torchrun train.py` and reads twice a second, for each rank, resident memory, open file
handles and threads from /proc, and the size of the output folder. A row of the JSON is the last
reading before each fifth step. The verdict compares the rows after step 50 with that of step 50:
resident memory of each rank at most 10 % more, no more file handles, and the output folder without
its records (*.jsonl, which grow with every step) at most 10 % more. Otherwise the exit code is 1.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from common import REPO, data

FLAGS = (
    "--train_batch_size 4 --num_generations 4 --max_completion_length 64 --eval_steps 100 "
    "--eval_size 16 --save_steps 25 --save_total_limit 2"
)
VERDICTS = ("memory_is_stable", "handles_are_bounded", "disk_is_bounded")
SETTLED = 50  # steps until caches, allocator and compiled code have their size


def main() -> None:
    parser = common.parser(__doc__, "long.json")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--engine", default="vllm")
    args = parser.parse_args()
    machine = common.machine()
    folder = Path(tempfile.mkdtemp(prefix="long-"))
    try:
        rows, seconds = watch(args.steps, args.engine, folder)
        _, *lines = data.read_jsonl(folder / "run/metrics.jsonl")
        steps = [line["step"] for line in lines]
        assert steps == list(range(args.steps + 1)), "a step is missing"
    finally:
        shutil.rmtree(folder)
    verdict = judge(rows)
    record = {"steps": args.steps, "engine": args.engine, "flags": FLAGS, "seconds": round(seconds)}
    common.write(args.out, {"machine": machine, **record, **verdict, "rows": rows})
    draw(rows, verdict, args.out.with_suffix(".png"))
    print(json.dumps(verdict, indent=1))
    sys.exit(not all(verdict[name] for name in VERDICTS))


def watch(steps: int, engine: str, folder: Path) -> tuple[list[dict], float]:
    """Run it; a row per fifth step, and the seconds of all."""
    out, log = folder / "run", folder / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train.py", "--algo", "toolupt", "@recipes/demo.args", *FLAGS.split()]
    command += ["--output_dir", out, "--max_steps", steps, "--engine", engine]
    rows, start = {}, time.monotonic()
    with open(log, "w") as file:
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        job = subprocess.Popen(
            [*map(str, command)], cwd=REPO, env=env, stdout=file, stderr=subprocess.STDOUT
        )
        while job.poll() is None:
            step = steps_done(out)
            if step % 5 == 0 and (look := ranks_of(job.pid)):
                records = size_of(out, "*.jsonl")
                rest = size_of(out, "*") - records
                rows[step] = {"step": step, **look, "record_bytes": records, "other_bytes": rest}
            time.sleep(0.5)
    assert job.returncode == 0, log.read_text()[-3000:]
    return list(rows.values()), time.monotonic() - start


def steps_done(out: Path) -> int:
    """The last step in metrics.jsonl."""
    path = out / "metrics.jsonl"
    return max(0, path.read_text().count("\n") - 2) if path.exists() else 0


def ranks_of(agent: int) -> dict[str, list[int]]:
    """Resident bytes, file handles and threads of each rank; {} while one of them comes or goes."""
    try:
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        looks = []
        for pid in children:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            handles = len(os.listdir(f"/proc/{pid}/fd"))
            looks.append((int(status["VmRSS"].split()[0]) * 1024, handles, int(status["Threads"])))
    except (OSError, KeyError):
        return {}
    columns = map(list, zip(*looks))
    return dict(zip(("rss", "handles", "threads"), columns)) if len(looks) == 2 else {}


def size_of(folder: Path, pattern: str) -> int:
    """Bytes of the files below of such names; a checkpoint may go while we look."""
    total = 0
    for path in folder.rglob(pattern):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            pass
    return total


def judge(rows: list[dict]) -> dict:
    """What the rows after step 50 say against the row of step 50."""
    settled = [row for row in rows if row["step"] >= SETTLED] or rows[-1:]
    base, growth = settled[0], []
    for rank, rss in enumerate(base["rss"]):
        growth.append(round(max(row["rss"][rank] for row in settled) / rss - 1, 4))
    most_before = max(row["other_bytes"] for row in rows if row["step"] <= base["step"] + 25)
    handles = [max(row["handles"][rank] for row in settled) for rank in range(2)]
    return {
        "rss_growth_after_step_50": growth,
        "handles_at_step_50": base["handles"],
        "most_handles_after": handles,
        "memory_is_stable": max(growth) <= 0.1,
        "handles_are_bounded": all(n <= m + 8 for n, m in zip(handles, base["handles"])),
        "disk_is_bounded": max(row["other_bytes"] for row in settled) <= 1.1 * most_before,
        "record_bytes_per_step": round(
            (settled[-1]["record_bytes"] - base["record_bytes"])
            / max(1, settled[-1]["step"] - base["step"])
        ),
        "other_bytes": [most_before, max(row["other_bytes"] for row in settled)],
    }


def draw(rows: list[dict], verdict: dict, path: Path) -> None:
    plt = common.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.5))
    steps = [row["step"] for row in rows]
    for rank in range(2):
        axes[0].plot(steps, [row["rss"][rank] / 2**20 for row in rows], label=f"rank {rank}")
        axes[1].plot(steps, [row["handles"][rank] for row in rows], label=f"rank {rank}")
    for what in ("record_bytes", "other_bytes"):
        label = "records" if what == "record_bytes" else "checkpoints, pictures"
        axes[2].plot(steps, [row[what] / 2**20 for row in rows], label=label)
    axes[2].legend()
    titles = ("resident memory, MiB", "open file handles", "output folder, MiB")
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    grown = max(verdict["rss_growth_after_step_50"])
    figure.suptitle(f"{steps[-1]} steps on two ranks; memory {grown:+.1%} after step {SETTLED}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
