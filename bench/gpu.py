"""The training part on one GPU: random weights of Qwen2.5's shapes, tokens per second, MFU, peak memory.

    python bench/gpu.py                                        under eight minutes -> bench/gpu.json
    python bench/gpu.py --device cpu --shapes toy --prompts 64 --answer 8 --steps 1 --out /tmp/gpu.json       a minute

Needs torch and transformers, no vllm, no download. fp32 master weights and AdamW, bf16 compute through FSDP2 on one
rank, activation checkpointing (--no_recompute: without), 8 answers per prompt. For each shape and prompt length:

    padded         packing.padded_logps: the prompt once per answer
    sdpa           packing.shared_prefix_attention as it stands: a causal call, then masked blocks of responses
    flex           flex_attention with the same mask as a block mask, compiled
    varlen         varlen_attn: prompt and responses are sequences of one call; the prompt's keys go to each response

Every way is first held against `padded` in log-probs and in the gradient of one matrix, within bf16's accuracy; then it
is timed: forward, backward, clipping and AdamW. A shape that does not fit with AdamW (16 bytes per parameter) is
measured without the optimiser and says so.

    MFU = 6 * (body * (prompt + answers) + head * answers) / seconds / matmul rate of this card, bf16, measured here

so recomputation and attention count as overhead, and `padded` gets no credit for reading the prompt eight times.
"""

import argparse
import gc
import inspect
import time
from functools import lru_cache

import common
import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

import model as modeling
import packing
import train

# config.json of Qwen/Qwen2.5-1.5B-Instruct, -3B-Instruct and -7B-Instruct
SHAPES = {
    "1.5B": (151_936, 1536, 8960, 28, 12, 2, True),
    "3B": (151_936, 2048, 11_008, 36, 16, 2, True),
    "7B": (152_064, 3584, 18_944, 28, 28, 4, False),
    "toy": (1024, 64, 128, 2, 4, 2, True),
}
GROUP = 8


def make(shape: str, device: str, length: int, recompute: bool = True):
    """A sharded model on one rank, weights drawn on the device."""
    V, width, inner, layers, heads, kv_heads, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=V, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        max_position_embeddings=length, rope_theta=1e6,
    )  # fmt: skip
    with torch.device(device):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return modeling.shard(model)


class Plan(packing._Plan):
    """packing's plan, which also remembers the row: the other ways make theirs from it."""

    def __init__(self, packed, device):
        super().__init__(packed, device)
        self.packed = packed


# --------------------------------------------------------------------- the other ways to attend; sdpa is packing's own


def flex(module, query, key, value, attention_mask, shared_prefix=None, scaling=None, **kwargs):
    """flex_attention under the packed row's mask; the face is that of AttentionInterface."""
    shared_prefix.calls += 1
    if not hasattr(shared_prefix, "block_mask"):
        shared_prefix.block_mask = _block_mask(shared_prefix.packed, query.device)
    out = _compiled_flex(query.device.type)(
        query, key, value, block_mask=shared_prefix.block_mask, scale=scaling,
        enable_gqa=query.shape[1] > key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2), None


def varlen(module, query, key, value, attention_mask, shared_prefix=None, scaling=None, **kwargs):
    """varlen_attn: sequences [prompt], [prompt | r_1], ..., of which only the last part asks."""
    from torch.nn.attention.varlen import varlen_attn

    shared_prefix.calls += 1
    if not hasattr(shared_prefix, "lengths"):
        shared_prefix.lengths = _varlen_plan(shared_prefix.packed, query.device)
    keys, q_ends, k_ends, q_max, k_max = shared_prefix.lengths
    n = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    k, v = (x.index_select(0, keys) for x in (k, v))
    options = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": n > 1}  # torch 2.13's words
    known = inspect.signature(varlen_attn).parameters
    if "enable_gqa" not in known:
        k, v = (x.repeat_interleave(n, 1) for x in (k, v))
    if "window_size" not in known:
        options["is_causal"] = True
    options = {name: value for name, value in options.items() if name in known}
    return varlen_attn(q, k, v, q_ends, k_ends, q_max, k_max, **options)[None], None


def _block_mask(packed, device):
    from torch.nn.attention.flex_attention import create_block_mask

    owner = torch.zeros_like(packed.input_ids)  # 0 for a prompt, else the number of the response
    group = torch.zeros_like(packed.input_ids)
    for g, (prompt, responses) in enumerate(packing._spans(packed)):
        stop = responses[-1].stop if responses else prompt.stop
        group[prompt.start : stop] = g
        for k, response in enumerate(responses):
            owner[response] = k + 1
    owner, group = owner.to(device), group.to(device)

    def sees(b, h, i, j):
        same = (owner[i] == owner[j]) | (owner[j] == 0)
        return (i >= j) & (group[i] == group[j]) & same

    L = len(owner)
    return create_block_mask(sees, None, None, L, L, device=device)


@lru_cache
def _compiled_flex(device_type: str):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def _varlen_plan(packed, device):
    """Which key rows each sequence reads, and where the sequences end."""
    keys, q_lengths, k_lengths = [], [], []
    for prompt, responses in packing._spans(packed):
        P = list(range(prompt.start, prompt.stop))
        for own in [range(prompt.start, prompt.stop), *(range(r.start, r.stop) for r in responses)]:
            if own.stop > own.start:
                keys += P if own.start == prompt.start else [*P, *own]
                q_lengths.append(len(own))
                k_lengths.append(len(own) if own.start == prompt.start else len(P) + len(own))
    ends = [
        torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        for lengths in (q_lengths, k_lengths)
    ]
    return torch.tensor(keys, device=device), *ends, max(q_lengths), max(k_lengths)


# ------------------------------------------------------------------------------------------------------- measuring


def scores(way: str, model, prompt: list[int], answers: list[list[int]]):
    """Log-probs and entropies of one group, (8, T)."""
    if way == "padded":
        return packing.padded_logps(model, prompt, answers)
    from transformers import AttentionInterface

    ways = {"sdpa": packing.shared_prefix_attention, "flex": flex, "varlen": varlen}
    packing._Plan = Plan
    packing._use_shared_prefix(model)
    AttentionInterface.register(packing.ATTENTION, ways[way])
    return packing.response_logps(model, packing.pack(prompt, answers))


def update(way: str, model, optimizer, groups: list, device: str) -> float:
    """Seconds of forward, backward, clipping and AdamW over the groups, one at a time."""
    synchronize(device)
    start = time.perf_counter()
    tokens = sum(len(a) for _, answers in groups for a in answers)
    for prompt, answers in groups:
        logps, entropy = scores(way, model, prompt, answers)
        (-(logps.sum() + 3e-4 * entropy.sum()) / tokens).backward()
    modeling.clip_grad_norm(model, 1.0)
    if optimizer:
        optimizer.step()
    model.zero_grad()
    synchronize(device)
    return time.perf_counter() - start


def timing(way: str, model, optimizer, groups: list, args) -> dict:
    """Median seconds of an update, and the peak of memory on a GPU."""
    if args.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    update(way, model, optimizer, groups[:1], args.device)
    seconds = [update(way, model, optimizer, groups, args.device) for _ in range(args.steps)]
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if args.device == "cuda" else {}
    return {"seconds": common.median(seconds), **peak}


def agreement(way: str, model, group: tuple, expected: list | None) -> tuple[list, dict]:
    """Log-probs and one gradient of a way; how far they are from `padded`'s, relative to the largest entry."""
    logps, entropy = scores(way, model, *group)
    (-logps.sum() / logps.numel()).backward()
    gradient = model.get_decoder().layers[0].self_attn.k_proj.weight.grad
    found = [logps.detach().clone(), getattr(gradient, "_local_tensor", gradient).clone()]
    model.zero_grad()
    if expected is None:
        return found, {}
    apart = [float((a - e).abs().max() / e.abs().max()) for a, e in zip(found, expected)]
    return found, dict(zip(("logps_apart", "gradient_apart"), apart))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(shape: str, args, rate: float, deadline: float) -> list[dict]:
    """All ways at all prompt lengths for one shape."""
    rows = []
    model = make(shape, args.device, max(args.prompts) + args.answer, not args.no_recompute)
    body, head = common.matrix_parameters(model)
    total = sum(p.numel() for p in model.parameters())
    free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 1e12
    # learning rate 0: all ways see the same weights. 12 bytes per parameter: gradient and moments
    optimizer = modeling.optimizer(model, 0.0) if 13 * total < free else None
    for prompt_length in args.prompts:
        generator = torch.Generator().manual_seed(1)
        draw = lambda n: torch.randint(SHAPES[shape][0], (n,), generator=generator).tolist()
        count = max(1, args.tokens // (prompt_length + GROUP * args.answer))
        groups = [
            (draw(prompt_length), [draw(args.answer) for _ in range(GROUP)]) for _ in range(count)
        ]
        expected = None
        for way in args.ways:
            row = {"shape": shape, "prompt": prompt_length, "way": way, "parameters": total}
            rows.append(row)
            if time.time() > deadline:
                row["error"] = "not measured: the time is over"
                continue
            few = groups if way != "padded" else groups[:1]  # slow: one group tells its rate
            for _ in range(2):
                try:
                    found, apart = agreement(way, model, groups[0], expected)
                    expected = expected or found
                    row.update(apart, **timing(way, model, optimizer, few, args))
                except Exception as error:  # a kernel that this card or build lacks is a result too
                    row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                    model.zero_grad()
                    if isinstance(error, torch.OutOfMemoryError) and optimizer:
                        optimizer = None
                        continue
                break
            if "seconds" in row:
                row.pop("error", None)
                row["optimizer"] = optimizer is not None
                tokens = prompt_length + GROUP * args.answer
                row["tokens_per_second"] = len(few) * tokens / row["seconds"]
                work = len(few) * prompt_length, len(few) * GROUP * args.answer
                row["mfu"] = common.floor_flops(body, head, *work) / row["seconds"] / rate
            print(row, flush=True)
    del model, optimizer
    gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["1.5B", "3B", "7B"], choices=SHAPES)
    parser.add_argument("--prompts", nargs="+", type=int, default=[2048, 8192], help="tokens")
    parser.add_argument("--answer", type=int, default=100, help="tokens")
    parser.add_argument("--ways", nargs="+", default=["padded", "sdpa", "varlen", "flex"])
    parser.add_argument("--tokens", type=int, default=36_000, help="of a timed update, about")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--no_recompute", action="store_true", help="keep all activations")
    parser.add_argument("--minutes", type=float, default=6.5, help="then nothing new starts")
    parser.add_argument("--out", default=str(common.BENCH / "gpu.json"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible; --device cpu --shapes toy tries the script")
    deadline = time.time() + 60 * args.minutes
    train.init_distributed()
    on_gpu = args.device == "cuda"
    rate = common.matmul_rate(
        args.device, torch.bfloat16 if on_gpu else torch.float32, 8192 if on_gpu else 1024
    )
    result = {"machine": common.machine(), "matmul_tflops": rate / 1e12, "rows": []}
    print(f"matmul rate {rate / 1e12:.1f} TFLOP/s", flush=True)
    for shape in args.shapes:
        result["rows"] += measure(shape, args, rate, deadline)
        common.write(args.out, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
