"""Under torchrun: gradients of one frozen step for several methods and micro-batch budgets (test_whole_runs.py).

torchrun --nproc_per_node=N tests/gradient_worker.py MODEL FOLDER OUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import frozen

import train
from run import init_distributed

METHODS = ("toolupt", "grpo", "dapo", "srft", "sft")
BUDGETS = (1, 100_000)

if __name__ == "__main__":
    model, folder, out = map(Path, sys.argv[1:])
    init_distributed()
    gradients = {}
    for method in METHODS:
        for budget in BUDGETS:
            more = ["--algo", method, "--max_tokens_per_row", budget]
            settings = train.parse_args(frozen.flags(model, folder, *more))
            gradients[f"{method} {budget}"], _ = frozen.one_step(*settings)
    if dist.get_rank() == 0:
        torch.save(gradients, out)
    dist.barrier()
    dist.destroy_process_group()
