"""ToolUPT on the toy world on a GPU: does it run, resume, and agree with the CPU?

    python bench/gpu_toy.py                 about three minutes on one GPU -> bench/gpu_toy.json
    python bench/gpu_toy.py --device cpu --out /tmp/toy.json      the same comparison on a machine without

Flags that are not its own go to train.py.

Four runs of train.py, each a process of its own with `--engine transformers`:
    whole    ToolUPT, --steps steps on the device
    resumed  the same, stopped after half of the steps and resumed from its checkpoint
    cpu      the same on the CPU, in float32
    one      a single step of fg_dapo_star without entropy bonus on the device, whose gradient is -sum A grad log p / tokens

The record holds accuracy before and after of the first three, the differences between `whole` and `resumed`, and, for the
responses of `one`, log-probs and gradient norm against a plain float32 transformers model on the CPU, one response at a time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from common import REPO
from transformers import AutoModelForCausalLM, AutoTokenizer

import data

METRICS = ("reward", "entropy", "grad_norm", "completions/mean_length")


def run(out: Path, device: str, flags: list[str]) -> list[dict]:
    """The metrics of a run of train.py, step 0 first."""
    command = [sys.executable, "train.py", "@recipes/demo.args", "--engine", "transformers"]
    command += ["--output_dir", str(out), *flags]
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=REPO, env={**os.environ, **hidden}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return list(data.read_jsonl(out / "metrics.jsonl"))[1:]


def against_float32(out: Path) -> dict:
    """Log-probs and gradient norm of a run's first step against one response at a time in float32."""
    model = AutoModelForCausalLM.from_pretrained(REPO / "toy_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REPO / "toy_model")
    examples = {example.id: example for example in data.load("toy")}
    rows = list(data.read_jsonl(out / "rollouts.jsonl"))
    tokens = sum(len(row["token_ids"]) for row in rows)
    apart = {"trainer": 0.0, "sampler": 0.0}
    for row in rows:
        prompt = data.render(examples[row["id"]], tokenizer)
        ids = torch.tensor([prompt + row["token_ids"]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        (-(torch.tensor(row["advantages"]) * logps).sum() / tokens).backward()
        for side, name in (("trainer", "logps"), ("sampler", "sampler_logps")):
            apart[side] += float((logps.detach() - torch.tensor(row[name])).abs().sum()) / tokens
    norm = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    return {"responses": len(rows), "tokens": tokens, "logp_difference": apart, "grad_norm": norm}


def main() -> None:
    parser = common.parser(__doc__, "gpu_toy.json")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=20)
    args, more = parser.parse_known_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible; --device cpu tries the script")
    toolupt = ["--algo", "toolupt", *more]
    half, whole = str(args.steps // 2), str(args.steps)
    record = {"machine": common.machine(), "device": args.device, "steps": args.steps}
    if args.device == "cuda":
        record["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        folder, rows = Path(folder), {}
        for name, device in (("whole", args.device), ("cpu", "cpu")):
            start = time.perf_counter()
            rows[name] = run(folder / name, device, [*toolupt, "--max_steps", whole])
            record[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
        halves = [*toolupt, "--save_steps", half]
        run(folder / "resumed", args.device, [*halves, "--max_steps", half])
        halves += ["--max_steps", whole, "--resume_from_checkpoint", "latest"]
        rows["resumed"] = run(folder / "resumed", args.device, halves)
        one = ["--algo", "fg_dapo_star", "--entropy_coef", "0", "--max_steps", "1", *more]
        [_, one] = run(folder / "one", args.device, one)
        record["one_step"] = {
            **against_float32(folder / "one"),
            "grad_norm_of_the_run": one["grad_norm"],
        }
    for name, steps in rows.items():
        accuracy = [row["eval/accuracy"] for row in steps if "eval/accuracy" in row]
        record[name] = {"accuracy": accuracy, "reward": [row["reward"] for row in steps[1:]]}
    pairs = list(zip(rows["whole"][1:], rows["resumed"][1:], strict=True))
    record["resumed_apart"] = {name: [abs(a[name] - b[name]) for a, b in pairs] for name in METRICS}
    common.write(args.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
