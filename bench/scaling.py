"""One and two ranks: the same step on both (strong scaling), and as many prompts per rank (weak).

    python bench/scaling.py                          ten minutes on two cores -> bench/scaling.json
    python bench/scaling.py --shape tiny --prompt 128 --steps 2 --rounds 1 --out /tmp/scaling.json

Whole steps of train.run_rl under torchrun, with vLLM on every rank and OMP_NUM_THREADS threads per
rank as printed. On a machine of two cores, two ranks of one thread have twice the cores of one rank
of one thread, and as many as one rank of two threads. The settings alternate, --rounds times;
figures are medians over all measured steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import common

PARTS = ("step", "timing_s/rollout", "timing_s/update", "timing_s/sync")
SETTINGS = {  # ranks, threads per rank, prompts per step relative to --prompts_per_step
    "1 rank": (1, 1, 1),
    "1 rank, 2 threads": (1, 2, 1),
    "2 ranks, strong": (2, 1, 1),
    "2 ranks, weak": (2, 1, 2),
}


def worker(folder: Path, args) -> None:
    """Under torchrun: measured steps as one JSON line of rank 0."""
    import torch.distributed as dist

    from start import init_distributed

    init_distributed()
    tokenizer = common.AutoTokenizer.from_pretrained(folder)
    examples = common.make_examples(args.prompts_per_step, args.prompt, args.answer, tokenizer)
    own = {"output_dir": str(folder / f"run-{os.environ['TORCHELASTIC_RUN_ID']}")}
    arm = common.Ours(folder, examples, args.answer, train_batch_size=args.prompts_per_step, **own)
    rows = arm.steps(args.steps)
    arm.run.close()
    arm.run.engine.close()
    if dist.get_rank() == 0:
        print("ROWS " + json.dumps([{name: row[name] for name in PARTS} for row in rows]))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = common.parser(__doc__, "scaling.json")
    common.add_step_flags(parser, steps=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    rows = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        folder = common.make_model(args.shape, Path(folder) / "model", args.prompt + args.answer)
        for _ in range(args.rounds):
            for name, (ranks, threads, factor) in SETTINGS.items():
                flags = f"--prompt {args.prompt} --answer {args.answer} --steps {args.steps} "
                flags += f"--prompts_per_step {args.prompts_per_step * factor}"
                torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}"
                command = [sys.executable, *torchrun.split(), __file__, *flags.split()]
                done = subprocess.run(
                    [*command, "--worker", str(folder)],
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                    text=True,
                    capture_output=True,
                    check=False,
                )
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                [line] = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
                rows[name] += json.loads(line.removeprefix("ROWS "))
                print(f"{name}: {[round(row['step'], 2) for row in rows[name]]} s", flush=True)
    results = {}
    for name, (ranks, threads, factor) in SETTINGS.items():
        middle = {part: common.median([row[part] for row in rows[name]]) for part in PARTS}
        prompts = args.prompts_per_step * factor
        results[name] = {"ranks": ranks, "threads": threads, "prompts": prompts, **middle}
        results[name]["prompts_per_second"] = prompts / middle["step"]
    base = results["1 rank"]["prompts_per_second"]
    for name, row in results.items():
        row["speedup"] = row["prompts_per_second"] / base
        print(
            f"{name:18} {row['prompts']:3d} prompts  step {row['step']:6.2f} s  "
            f"update {row['timing_s/update']:6.2f} s  rollout {row['timing_s/rollout']:6.2f} s  "
            f"{row['speedup']:.2f} x the prompts per second of one rank"
        )
    record = {"machine": common.machine(), "settings": {**vars(args), "worker": None}}
    common.write(args.out, record | {"results": results})


if __name__ == "__main__":
    main()
