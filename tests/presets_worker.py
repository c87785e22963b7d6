"""Under torchrun: a few steps of every row of METHODS on the embedded default, one after the other (test_presets.py).

torchrun --nproc_per_node=2 tests/presets_worker.py OUT
"""

import sys
import time
from pathlib import Path

import torch.distributed as dist

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import data
import train
from methods import METHODS
from start import init_distributed

STEPS, PROMPTS = 3, 2


def settings_of(algo: str, out: Path) -> tuple:
    """The demo, shortened, under the method `algo`; the number of rollouts is the row's own."""
    text = f"""@{REPO}/recipes/demo.args --algo {algo} --model_name_or_path {REPO}/toy_model
    --train_file jsonl:{out}/train.jsonl --eval_file jsonl:{out}/eval.jsonl --output_dir {out}/{algo}
    --max_steps {STEPS} --train_batch_size {PROMPTS} --eval_steps 0 --max_num_seqs 32 --max_completion_length 96"""
    if hasattr(METHODS[algo], "first_stage"):
        text += f" --sft_max_steps {STEPS}"
    return train.parse_args(text.split())


def write_data(out: Path) -> None:
    """A part of the toy world: all of it takes seconds to tokenise, once for each row."""
    data.write_jsonl(data.load("toy", "train")[:64], out / "train.jsonl")
    test = data.load("toy", "test")
    both = [[e for e in test if e.kind == kind][:4] for kind in ("tool_call", "answer")]
    data.write_jsonl(sum(both, []), out / "eval.jsonl")


if __name__ == "__main__":
    init_distributed()
    if dist.get_rank() == 0:
        write_data(Path(sys.argv[1]))
    dist.barrier()
    engine = None  # one of all rows
    for algo in METHODS:
        start = time.perf_counter()
        engine = train.train(*settings_of(algo, Path(sys.argv[1])), engine).engine
        if dist.get_rank() == 0:
            print(f"{algo}: {time.perf_counter() - start:.1f} s", flush=True)
    engine.close()
    dist.destroy_process_group()
