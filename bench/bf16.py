"""One RL step of a pretrained model on a CPU, in float32 and with --bf16, in turns, in one process.

    OMP_NUM_THREADS=2 python bench/bf16.py FOLDER FILE      20 minutes for 0.5B on two cores, 9 GB

FOLDER holds the model, FILE is a --train_file. A turn loads trainer and engine (--engine transformers) anew and takes one
step of `run_rl`: the prompt of FILE whose length is nearest to --prompt tokens, 8 responses of --answer tokens (no stop token
ends one) and the expert's. AdamW, which is float32 in both arms, is left out of the turns (its moments would
not fit beside other work) and timed by itself: `adamw_s`. `cpu` is the CPU time of a step: of an arm that shares the machine
with other work it says more than the wall time.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import common
import torch

import start


def turn(folder: Path, examples: list, args, bf16: bool) -> dict:
    """Seconds of a step and of its parts, and the model's parameters."""
    arm = common.Ours(
        folder, examples, args.answer, engine="transformers", train_batch_size=1, bf16=bf16
    )
    arm.run.engine.stop_ids = []
    arm.run.optimizer.step = lambda: None
    rate, busy = common.matmul_rate(), time.process_time()
    metrics = arm.step()
    busy = time.process_time() - busy  # of all threads: other work on the machine lengthens it less
    assert metrics["completions/mean_length"] == args.answer
    apart = metrics["sampling/sampling_logp_difference/mean"]
    found = {k.removeprefix("timing_s/"): v for k, v in metrics.items() if "timing_s" in k}
    found |= {
        "step": metrics["step"],
        "cpu": busy,
        "float32_gflops": rate / 1e9,
        "logp_difference": apart,
    }
    found["parameters"] = sum(p.numel() for p in arm.run.model.parameters())
    arm.run.close()
    arm.run.engine.close()
    return found


def adamw(parameters: int, share: int = 16) -> float:
    """Seconds of AdamW's second step, measured on a share of so many parameters."""
    weight = torch.nn.Parameter(torch.randn(parameters // share))
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    for _ in range(2):
        begin = time.perf_counter()
        optimizer.step()
    return share * (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of a pretrained model")
    parser.add_argument("file", help="of training examples")
    parser.add_argument("--prompt", type=int, default=640, help="tokens")
    parser.add_argument("--answer", type=int, default=32, help="tokens")
    parser.add_argument("--pairs", type=int, default=4, help="turns of each arm")
    parser.add_argument("--minutes", type=float, default=40, help="then no further pair starts")
    parser.add_argument("--out", type=common.file, default=common.BENCH / "bf16.json")
    args = parser.parse_args()
    start.init_distributed()
    start.check_room = lambda *_: (0.0, "")  # it would count AdamW's moments
    machine, deadline, pairs = common.machine(), time.time() + 60 * args.minutes, []
    with tempfile.TemporaryDirectory() as folder:
        for path in args.folder.iterdir():  # the run writes beside them
            Path(folder, path.name).symlink_to(path.resolve())
        tokenizer = common.AutoTokenizer.from_pretrained(folder)
        length = lambda example: len(common.data.render(example, tokenizer))
        examples = common.data.load(None, args.file)
        examples = sorted(examples, key=lambda example: abs(length(example) - args.prompt))[:1]
        while len(pairs) < args.pairs and (not pairs or time.time() < deadline):
            pair = {n: turn(Path(folder), examples, args, n == "bf16") for n in ("fp32", "bf16")}
            pairs.append(pair)
            print({n: {k: round(v, 4) for k, v in x.items()} for n, x in pair.items()}, flush=True)
    ratios = {
        part: sorted(round(p["fp32"][part] / p["bf16"][part], 3) for p in pairs)
        for part in ("step", "cpu", "update", "rollout")
    }
    result = {"machine": machine, "load_average_after": round(os.getloadavg()[0], 2)}
    result |= {
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("folder", "file")}
    }
    result |= {"ratios": ratios, "medians": {k: common.median(v) for k, v in ratios.items()}}
    result |= {"adamw_s": adamw(pairs[0]["fp32"]["parameters"]), "pairs": pairs}
    print(ratios, f"AdamW {result['adamw_s']:.1f} s", flush=True)
    common.write(args.out, result)


if __name__ == "__main__":
    main()
