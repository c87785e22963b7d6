"""Weight sync: its share of a step, the bytes that move, and what a rank holds meanwhile.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 bench/sync.py      five minutes -> bench/sync.json
    ... bench/sync.py --shape tiny --prompt 128 --steps 2 --out /tmp/sync.json

Steps of train.run_rl with vLLM on every rank. `model.full_tensors` gathers one parameter at a time.
In one more step, which is not timed, rank 0's memory is read whenever the next parameter is handed
over: what the process holds above what it held before, after returning free heap to the system (on
a GPU: what torch's allocator holds). A second copy of the model would show there as 100 %. What
vLLM needs for a moment within a layer (gathered, new and packed weight) is not included.
"""

import ctypes
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import common
import torch
import torch.distributed as dist

import model as modeling
from start import init_distributed


class Watch:
    """Replaces model.full_tensors and counts what it yields; into `held`, memory at each yield."""

    def __init__(self):
        self.gather, self.held = modeling.full_tensors, None

    def __call__(self, model):
        own = {p.untyped_storage().data_ptr() for p in local_tensors(model)}
        self.names = self.bytes = 0
        start = memory() if self.held is not None else 0
        for name, tensor in self.gather(model):
            self.names += 1
            if tensor.untyped_storage().data_ptr() not in own:  # one rank: nothing is copied at all
                self.bytes += tensor.nbytes
            if self.held is not None:
                self.held.append(memory() - start)
            yield name, tensor
            del tensor


def memory() -> int:
    """Bytes that this process holds: resident without free heap; on a GPU torch's allocator's."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return common.resident("VmRSS")


def local_tensors(model):
    """What this rank stores of the parameters."""
    return [getattr(p, "_local_tensor", p) for p in model.parameters()]


def main() -> None:
    parser = common.parser(__doc__, "sync.json")
    common.add_step_flags(parser, steps=5)
    parser.add_argument("--tensor_parallel", type=int, default=1, help="ranks per vLLM model")
    args = parser.parse_args()
    init_distributed()
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0]) / "model"
    if dist.get_rank() == 0:
        common.make_model(args.shape, folder, args.prompt + args.answer)
    dist.barrier()
    tokenizer = common.AutoTokenizer.from_pretrained(folder)
    examples = common.make_examples(args.prompts_per_step, args.prompt, args.answer, tokenizer)
    settings = {
        "train_batch_size": args.prompts_per_step,
        "vllm_tensor_parallel_size": args.tensor_parallel,
    }
    arm = common.Ours(folder, examples, args.answer, **settings)
    modeling.full_tensors = watch = Watch()
    rows = arm.steps(args.steps)
    watch.held = []
    arm.step()
    arm.run.close()
    arm.run.engine.close()
    weights = sum(p.numel() * 4 for p in arm.run.model.parameters())
    if dist.get_rank() == 0:
        share = common.median([row["timing_s/sync"] / row["step"] for row in rows])
        result = {
            "machine": common.machine(),
            "settings": vars(args),
            "ranks": dist.get_world_size(),
            "share_of_step": share,
            "sync_s": common.median([row["timing_s/sync"] for row in rows]),
            "step_s": common.median([row["step"] for row in rows]),
            "tensors": watch.names,
            "model_bytes": weights,
            "gathered_bytes": watch.bytes,
            "held_bytes": max(watch.held),
        }
        print(
            f"{result['ranks']} ranks: sync takes {share:.1%} of a step ({result['sync_s']:.3f} of "
            f"{result['step_s']:.2f} s); {watch.names} tensors, {watch.bytes / 1e6:.1f} MB "
            f"gathered of a model of {weights / 1e6:.1f} MB, at most "
            f"{max(watch.held) / 1e6:.1f} MB held, {max(watch.held) / weights:.1%} of the model"
        )
        common.write(args.out, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
