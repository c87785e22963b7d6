"""The training part on one GPU: random weights of Qwen2.5's shapes, tokens per second, MFU, peak memory.

    python bench/gpu.py                                        under eight minutes -> bench/gpu.json
    python bench/gpu.py --device cpu --shapes toy --prompts 64 128 --answer 8 --ways padded sdpa kept --out /tmp/gpu.json

Needs torch and transformers, no vllm, no download. fp32 master weights and AdamW, bf16 compute through FSDP2 on one
rank, activation checkpointing, 8 answers per prompt, forward passes of at most train.py's --max_tokens_per_row tokens.
For each shape and prompt length:

    padded    packing.padded_logps: the prompt once per answer
    sdpa      packing.shared_prefix_attention as it stands: a causal call, then masked blocks of responses
    varlen    varlen_attn: prompt and responses are sequences of one call; the prompt's keys go to each response
    flex      flex_attention with the same mask as a block mask, compiled for each length
    kept      sdpa without activation checkpointing

Each way's attention is first held, value and gradient, against dense attention in float64 under packing.attention_mask,
with sharp scores: `attention_apart` is the relative error, `exact` says that it is bf16's. Then it is timed: seconds of
forward and backward per group, seconds of clipping and AdamW per update. An update has 32 groups (ToolUPT's 256 prompts
on 8 GPUs), its seconds are the sum. What does not fit with AdamW (16 bytes per parameter) is measured without and says so.

    MFU = 6 * (body * (prompt + answers) + head * answers) / seconds / matmul rate of this card, bf16, measured here

so recomputation and attention count as overhead, and `padded` gets no credit for reading the prompt eight times.
"""

import argparse
import gc
import inspect
import time
from collections.abc import Iterator
from functools import lru_cache

import common
import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

import model as modeling
import packing
from run import init_distributed
from train import Config

# config.json of Qwen/Qwen2.5-1.5B-Instruct, -3B-Instruct and -7B-Instruct
SHAPES = {
    "1.5B": (151_936, 1536, 8960, 28, 12, 2, True),
    "3B": (151_936, 2048, 11_008, 36, 16, 2, True),
    "7B": (152_064, 3584, 18_944, 28, 28, 4, False),
    "toy": (1024, 64, 128, 2, 4, 2, True),
}
GROUP = 8
BUDGET = Config.max_tokens_per_row  # tokens of a forward pass
GROUPS_PER_UPDATE = 32
ROOM = 20e9  # bytes for activations and gathered layers, beside 16 per parameter


def drawn(shape: str, device: str, length: int) -> Qwen2ForCausalLM:
    """A model of random weights, drawn on the device."""
    V, width, inner, layers, heads, kv_heads, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=V, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        max_position_embeddings=length, rope_theta=1e6,
    )  # fmt: skip
    with torch.device(device):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).train()


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

    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def _varlen_plan(packed, device):
    """Which key rows each sequence reads, and where the sequences end."""
    keys, q_lengths, k_lengths = [], [], []
    for prompt, responses in packing._spans(packed):
        seen = torch.arange(prompt.start, prompt.stop)
        keys.append(seen)
        q_lengths.append(len(seen))
        k_lengths.append(len(seen))
        for response in responses:
            own = torch.arange(response.start, response.stop)
            if len(own):
                keys += [seen, own]
                q_lengths.append(len(own))
                k_lengths.append(len(seen) + len(own))
    ends = [
        torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        for lengths in (q_lengths, k_lengths)
    ]
    return torch.cat(keys).to(device), *ends, max(q_lengths), max(k_lengths)


ATTENTION = {"sdpa": packing.shared_prefix_attention, "varlen": varlen, "flex": flex}
ATTENTION |= {"kept": ATTENTION["sdpa"]}
WAYS = ("padded", *ATTENTION)


# ------------------------------------------------------------------------------------------------------- measuring


@lru_cache  # the same at every prompt length
def attention_apart(attend, shape: str, device: str) -> float:
    """Relative error of a way's attention and of its three gradients, the worst, against dense attention in float64."""
    _, width, _, _, heads, kv_heads, _ = SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = [packing.pack(range(P), [range(n) for n in lengths]) for P, lengths in (
        (384, (40, 1, 47, 33, 60, 8, 21, 50)), (129, (17, 90)),
    )]  # fmt: skip
    packed = packing.join(rows)
    L, D = len(packed.input_ids), width // heads
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, H, L, D).to(device, dtype) for H in (heads, kv_heads, kv_heads, heads)
    )
    q *= 3  # sharp: a key more or less changes the output

    def values(q, k, v, attend):
        qkv = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = attend(*qkv)
        out.backward(grad.to(out.dtype))
        return [out.detach(), *(x.grad for x in qkv)]

    mask = packing.attention_mask(packed).to(device)
    dense = lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    expected = values(q.double(), k.double(), v.double(), dense)
    plan = Plan(packed, torch.device(device))

    def way(q, k, v):
        out, _ = attend(None, q, k, v, None, shared_prefix=plan, scaling=D**-0.5)
        return out.transpose(1, 2)

    found = values(q, k, v, way)
    return max(float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected))


def scores(way: str, model, groups: list) -> Iterator[tuple]:
    """Log-probs and entropies of the groups, (answers, T) per forward pass."""
    length, answers = len(groups[0][0]), groups[0][1]
    if way == "padded":
        n = max(1, BUDGET // (length + len(answers[0])))  # answers per forward pass
        for prompt, answers in groups:
            for i in range(0, len(answers), n):
                yield packing.padded_logps(model, prompt, answers[i : i + n])
    else:
        n = max(1, BUDGET // (length + sum(map(len, answers))))  # groups per forward pass
        for i in range(0, len(groups), n):
            row = packing.join([packing.pack(*group) for group in groups[i : i + n]])
            yield packing.response_logps(model, row)


def passes(way: str, model, groups: list) -> None:
    """Forward and backward over the groups."""
    tokens = sum(len(answer) for _, answers in groups for answer in answers)
    for logps, entropy in scores(way, model, groups):
        (-(logps.sum() + 3e-4 * entropy.sum()) / tokens).backward()


def seconds_of(work, device: str) -> float:
    """Seconds of work() alone."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def timing(way: str, shape: str, groups: list, adam: bool, args) -> dict:
    """Median seconds of the passes per group and of the optimiser per update, and the peak of memory on a GPU."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = drawn(shape, args.device, len(groups[0][0]) + args.answer)
    if way != "kept":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = modeling.shard(model)
    optimizer = modeling.optimizer(model, 1e-6) if adam else None
    packing._Plan = Plan
    packing._use_shared_prefix(model)
    AttentionInterface.register(packing.ATTENTION, ATTENTION.get(way, ATTENTION["sdpa"]))

    def finish():
        modeling.clip_grad_norm(model, 1.0)
        if optimizer:
            optimizer.step()
        model.zero_grad()

    times = []
    for _ in range(1 + args.steps):  # one warms up, compiles, and makes AdamW's moments
        forward_backward = seconds_of(lambda: passes(way, model, groups), args.device)
        times.append((forward_backward / len(groups), seconds_of(finish, args.device)))
    per_group, last = (common.median(column[1:]) for column in zip(*times))
    row = {"groups": len(groups), "seconds_per_group": per_group, "optimizer_seconds": last}
    row |= {"adam": adam, "seconds": GROUPS_PER_UPDATE * per_group + last}
    if args.device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str) -> float:
    """FLOP/s of square matrix products, back to back, after a second of them: the clocks are up."""
    if device == "cpu":
        return common.matmul_rate()
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products():
        for _ in range(50):
            a @ b

    start = time.perf_counter()
    while time.perf_counter() - start < 1:
        seconds_of(products, device)
    return 50 * 2 * size**3 / seconds_of(products, device)


def measure(shape: str, prompt_length: int, args, rate: float, deadline: float) -> Iterator[dict]:
    """A row per way for one shape and prompt length."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(SHAPES[shape][0], (n,), generator=generator).tolist()
    tokens = prompt_length + GROUP * args.answer
    groups = [
        (draw(prompt_length), [draw(args.answer) for _ in range(GROUP)])
        for _ in range(max(1, args.tokens // tokens))
    ]
    meta = drawn(shape, "meta", 1)
    (body, head), total = common.matrix_parameters(meta), sum(p.numel() for p in meta.parameters())
    memory = torch.cuda.mem_get_info()[1] if args.device == "cuda" else float("inf")
    padded = None
    for way in args.ways:
        row = {"shape": shape, "parameters": total, "prompt": prompt_length, "way": way}
        timed = groups[:1] if way == "padded" else groups  # slow: one group tells its rate
        for adam in (True, False) if 16 * total + ROOM < memory else (False,):
            if time.time() > deadline:
                row["error"] = "not measured: the time is over"
                break
            try:
                if way != "padded":
                    apart = attention_apart(ATTENTION[way], shape, args.device)
                    row |= {
                        "attention_apart": apart,
                        "exact": apart < (0.02 if args.device == "cuda" else 1e-5),
                    }
                row |= timing(way, shape, timed, adam, args)
                row.pop("error", None)
            except Exception as error:  # a kernel that this card or build lacks is a result too
                row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            gc.collect()
            torch.cuda.empty_cache()
            if "OutOfMemory" not in row.get("error", ""):
                break
        if "seconds" in row:
            work = GROUPS_PER_UPDATE * prompt_length, GROUPS_PER_UPDATE * GROUP * args.answer
            row["tokens_per_second"] = sum(work) / row["seconds"]
            row["mfu"] = common.floor_flops(body, head, *work) / row["seconds"] / rate
            padded = row["seconds_per_group"] if way == "padded" else padded
            row["times_padded"] = padded and padded / row["seconds_per_group"]
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["1.5B", "3B", "7B"], choices=SHAPES)
    parser.add_argument("--prompts", nargs="+", type=int, default=[2048, 8192], help="tokens")
    parser.add_argument("--answer", type=int, default=100, help="tokens")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--tokens", type=int, default=36_000, help="timed together, about")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=6.5, help="then nothing new starts")
    parser.add_argument("--out", default=str(common.BENCH / "gpu.json"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible; --device cpu --shapes toy tries the script")
    deadline = time.time() + 60 * args.minutes
    init_distributed()
    rate = matmul_rate(args.device)
    result = {"machine": common.machine(), "matmul_tflops": [rate / 1e12], "rows": []}
    print(f"matmul rate {rate / 1e12:.1f} TFLOP/s", flush=True)
    for shape in args.shapes:
        for prompt in args.prompts:
            result["rows"] += measure(shape, prompt, args, rate, deadline)
            common.write(args.out, result)
    result["matmul_tflops"].append(matmul_rate(args.device) / 1e12)  # first and last
    common.write(args.out, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
