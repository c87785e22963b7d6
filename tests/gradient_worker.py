"""Under torchrun: gradients of one frozen step for several methods and micro-batch budgets (test_whole_runs.py).

torchrun --nproc_per_node=N tests/gradient_worker.py MODEL FOLDER OUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import frozen

import itool
import model as modeling
import train
from run import Run
from start import init_distributed

METHODS = ("toolupt", "grpo", "dapo", "srft", "sft")
BUDGETS = (1, 100_000)


def gradient_of_pairs(folder: Path, files: Path, budget: int) -> dict[str, torch.Tensor]:
    """iTool's, of one pair: a rank has none."""
    more = f"--algo itool --pool_fraction 1 --buffer_fraction 1 --max_tokens_per_row {budget}"
    config, method = train.parse_args(frozen.flags(folder, files, *more.split()))
    run = Run(config, method)
    run.model, _ = modeling.load(folder)
    one = run.demonstration(frozen.examples()[0])
    row = {"prefix_ids": one.prompt, "chosen_ids": one.target, "rejected_ids": one.target[3:9]}
    row |= {"chosen_ref": -1.0, "rejected_ref": -2.0}
    itool.preference_gradient(run, [itool.PreferencePair(row)])
    return {name: p.grad.full_tensor().clone() for name, p in run.model.named_parameters()}


if __name__ == "__main__":
    model, folder, out = map(Path, sys.argv[1:])
    init_distributed()
    gradients = {}
    for method in METHODS:
        for budget in BUDGETS:
            more = ["--algo", method, "--max_tokens_per_row", budget]
            settings = train.parse_args(frozen.flags(model, folder, *more))
            gradients[f"{method} {budget}"], _ = frozen.one_step(*settings)
    for budget in BUDGETS:
        gradients[f"pairs {budget}"] = gradient_of_pairs(model, folder, budget)
    if dist.get_rank() == 0:
        torch.save(gradients, out)
    dist.barrier()
    dist.destroy_process_group()
