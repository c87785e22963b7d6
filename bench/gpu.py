"""The training part on one GPU: random weights of Qwen2.5's shapes, tokens per second, MFU, peak memory.

    python bench/gpu.py                                    under eight minutes -> bench/gpu.json
    python bench/gpu.py --shapes 7B --prompts 2048 --ways merged padded        about a minute
    python bench/gpu.py --device cpu --shapes toy --prompts 64 128 --answer 8 --budget 400 --out /tmp/gpu.json

Needs torch and transformers, no vllm, no download. What a rank of train.py does, without the other ranks: fp32 master
weights, bf16 compute and fp32 reduction through FSDP2, activation checkpointing, rows of at most `--budget` tokens.
8 answers a prompt, of 100 tokens on average; prompts and answers vary in length, as in real steps. The ways:

    merged    attention.py: two flash calls for a whole row
    padded    packing.padded_logps: the prompt once per answer
    flex      flex_attention under the same mask as a block mask, compiled for lengths that change
    kept      merged, without activation checkpointing

Each row of the result is written as soon as it is there; a way that fails (memory, a kernel that is missing) says so
and the next one goes on. What is measured is what fits, and `weights` and `adam` say what that was: AdamW's 16 bytes
per parameter; else fp32 weights and gradients, 8; else bf16 weights and gradients, 4. With 7B parameters, on 80 GB, it
is 8: forward and backward pass are those of training, and only the optimiser, which 8 GPUs share, is left out.

    MFU = 6 (body (prompt + answers) + head answers) / seconds of forward and backward / matmul rate of this card

in bf16, measured here. Recomputation (activation checkpointing, 8 instead of 6) and attention count as overhead: 75 %
is the most that `merged` can reach, and `padded` gets no credit for reading the prompt eight times. `planned_bytes` is
the peak that tools/plan.py works out.
"""

import gc
import json
import os
import random
import time
from functools import lru_cache

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import common
import torch
import torch.distributed as dist
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

import model as modeling
import packing
from tools import plan as planning

# config.json of Qwen/Qwen2.5-1.5B-Instruct, -3B-Instruct and -7B-Instruct
SHAPES = {
    "7B": (152_064, 3584, 18_944, 28, 28, 4, False),
    "1.5B": (151_936, 1536, 8960, 28, 12, 2, True),
    "3B": (151_936, 2048, 11_008, 36, 16, 2, True),
    "toy": (1024, 64, 128, 2, 4, 2, True),
}
GROUP = 8
GROUPS_PER_UPDATE = 32  # ToolUPT's 256 prompts on 8 GPUs
ROOM = 20e9  # bytes for activations and gathered layers, beside weights, gradients and moments


def drawn(shape: str, device: str, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """A model of random weights, drawn on the device."""
    V, width, inner, layers, heads, kv_heads, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=V, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        max_position_embeddings=32_768, rope_theta=1e6,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return Qwen2ForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------- the ways to attend


def flex(plan, q, k, v, scale):
    """flex_attention under the packed row's mask."""
    if not hasattr(plan, "block_mask"):
        plan.block_mask = _block_mask(plan.packed, q.device)
    out = _compiled_flex(q.device.type)(
        q, k, v, block_mask=plan.block_mask, scale=scale, enable_gqa=q.shape[1] > k.shape[1]
    )
    return out.transpose(1, 2)


def _block_mask(packed, device):
    from torch.nn.attention.flex_attention import create_block_mask

    owner = torch.zeros_like(packed.input_ids)  # 0 for a prompt, else the number of the response
    group = torch.zeros_like(packed.input_ids)
    for g, (prompt, responses) in enumerate(packing._spans(packed)):
        group[prompt.start : responses[-1].stop] = g
        for k, response in enumerate(responses):
            owner[response] = k + 1
    owner, group = owner.to(device), group.to(device)

    def sees(b, h, i, j):
        same = (owner[i] == owner[j]) | (owner[j] == 0)
        return (i >= j) & (group[i] == group[j]) & same

    return create_block_mask(sees, None, None, len(owner), len(owner), device=device)


@lru_cache
def _compiled_flex(device_type: str):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def merged(plan, q, k, v, scale, attend=packing._Plan.attend):
    """packing's own; an error where it would quietly fall back to the mask."""
    assert plan.kernels and plan.kernels.takes(q, k, v), (
        f"no flash for {q.dtype}, width {q.shape[-1]}"
    )
    return attend(plan, q, k, v, scale)


ATTEND = {"merged": merged, "flex": flex, "kept": merged}
WAYS = ("merged", "padded", "flex", "kept")


# ------------------------------------------------------------------------------------------------------------ the work


def lengths_of(prompt: int, answer: int, rng: random.Random) -> tuple[int, list[int]]:
    """Tokens of a prompt and of its answers: means as given, as uneven as tool calls are."""
    scale = [rng.lognormvariate(0, 0.6) for _ in range(GROUP)]
    answers = [max(1, round(answer * s / 1.197)) for s in scale]  # mean of the lognormal: e^0.18
    return round(prompt * rng.uniform(0.9, 1.1)), answers


def rows_of(way: str, prompt: int, vocabulary: int, count: int, args) -> list[list]:
    """Groups (prompt ids, answers' ids) of each forward and backward pass; `padded`: one group, cut to the budget."""
    rng = random.Random(f"{prompt}/{args.answer}")
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(vocabulary, (n,), generator=generator).tolist()
    rows, room = [], 0
    while True:
        P, answers = lengths_of(prompt, args.answer, rng)
        group, tokens = (draw(P), [draw(n) for n in answers]), P + sum(answers)
        if way == "padded":
            n = max(1, args.budget // (P + max(answers)))
            return [[(group[0], group[1][i : i + n])] for i in range(0, GROUP, n)]
        if tokens > room:
            if len(rows) == count:
                return rows
            rows.append([])
            room = args.budget
        rows[-1].append(group)
        room -= tokens


def work_of(rows: list) -> tuple[int, int, int]:
    """Groups, prompt tokens (once a prompt, however often it is read) and answer tokens."""
    prompts = {id(prompt): len(prompt) for row in rows for prompt, _ in row}
    answers = sum(len(answer) for row in rows for _, group in row for answer in group)
    return len(prompts), sum(prompts.values()), answers


def forward_backward(way: str, model, row: list, args) -> None:
    """One micro-batch: log-probs, entropies, a loss of both, gradients."""
    if way == "padded":
        [(prompt, answers)] = row
        scores = packing.padded_logps(model, prompt, answers, chunk_size=args.chunk)
    else:
        joined = packing.join([packing.pack(*group) for group in row])
        scores = packing.response_logps(model, joined, chunk_size=args.chunk)
    logps, entropy = scores
    (-(logps.sum() + 3e-4 * entropy.sum()) / 1000).backward()


def seconds_of(work, device: str) -> float:
    """Seconds of work() alone."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str) -> float:
    """FLOP/s of square bf16 products, back to back, after a second of them: the clocks are what a long run has."""
    if device == "cpu":
        return common.matmul_rate()
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products():
        for _ in range(100):
            a @ b

    start = time.perf_counter()
    while time.perf_counter() - start < 1:
        seconds_of(products, device)
    return 100 * 2 * size**3 / seconds_of(products, device)


class Session:
    """A model and its optimiser, kept from one way to the next; drawn again after an error."""

    def __init__(self, args):
        self.args, self.key, self.model, self.optimizer = args, None, None, None

    def prepare(self, shape: str, way: str, weights: str, adam: bool) -> None:
        """The model of this shape, attending this way."""
        args = self.args
        if self.key != (shape, weights, adam):
            self.drop()
            dtype = torch.bfloat16 if weights == "bf16" else torch.float32
            model = drawn(shape, args.device, dtype)
            if args.compile:
                for layer in model.model.layers:
                    layer.forward = torch.compile(layer.forward)
            self.model = modeling.shard(model)
            self.optimizer = modeling.optimizer(self.model, 1e-6) if adam else None
            self.key = (shape, weights, adam)
        if way == "kept":
            self.model.gradient_checkpointing_disable()
        else:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        packing._use_shared_prefix(self.model)
        packing._Plan.attend = ATTEND.get(way, merged)
        attend = packing.shared_prefix_attention
        if way != "flex":  # which is compiled itself
            attend = torch.compiler.disable(attend)
        AttentionInterface.register(packing.ATTENTION, attend)

    def finish(self) -> None:
        """Clipping and AdamW."""
        modeling.clip_grad_norm(self.model, 1.0)
        if self.optimizer:
            self.optimizer.step()
        self.model.zero_grad()

    def drop(self) -> None:
        """Free the memory."""
        self.key = self.model = self.optimizer = None
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()


def measure(session: Session, shape: str, prompt: int, way: str, rate: float) -> dict:
    """One row of the result: the most complete state that fits."""
    args, meta = session.args, drawn(shape, "meta")
    N, (body, head) = sum(p.numel() for p in meta.parameters()), common.matrix_parameters(meta)
    row = {"shape": shape, "prompt": prompt, "answer": args.answer, "way": way, "parameters": N}
    row |= {"compile": args.compile, "checkpointing": way != "kept", "chunk": args.chunk}
    memory = torch.cuda.mem_get_info()[1] if args.device == "cuda" else float("inf")
    states = {16: ("fp32", True), 8: ("fp32", False), 4: ("bf16", False)}
    fits = [bytes_each for bytes_each in states if bytes_each * N + ROOM < memory]
    for bytes_each in (fits or [4])[:2]:
        weights, adam = states[bytes_each]
        row |= {"weights": weights, "adam": adam}
        try:
            session.prepare(shape, way, weights, adam)
            row |= timed(session, way, prompt, SHAPES[shape][0])
            row.pop("error", None)
            break
        except Exception as error:  # a kernel that this card or build lacks is a result too
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        session.drop()  # FSDP2's state and the memory are in disorder
        if "OutOfMemory" not in row["error"]:
            break
    if "seconds" in row:
        flops = common.floor_flops(body, head, row["prompt_tokens"], row["answer_tokens"])
        row["tokens_per_second"] = (row["prompt_tokens"] + row["answer_tokens"]) / row["seconds"]
        row["mfu"] = flops / row["seconds"] / rate
        row["seconds_per_group"] = row["seconds"] / row["groups"]
        if row["adam"]:
            update = GROUPS_PER_UPDATE * row["seconds_per_group"]
            row["mfu_with_optimizer"] = row["mfu"] * update / (update + row["optimizer_seconds"])
        if args.device == "cuda" and way != "kept" and shape != "toy":
            row["planned_bytes"] = planned(shape, row["largest_row"], bytes_each)
            row["peak_to_planned"] = row["peak_bytes"] / row["planned_bytes"]
    return row


def timed(session: Session, way: str, prompt: int, vocabulary: int) -> dict:
    """Seconds of forward and backward over some micro-batches, of the optimiser once, and the peak of memory."""
    args, rows = session.args, rows_of(way, prompt, vocabulary, session.args.rows, session.args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    once = lambda row: seconds_of(
        lambda: forward_backward(way, session.model, row, args), args.device
    )
    for row in rows[: 2 if args.compile or way == "flex" else 1]:  # two lengths: compiled for any
        warm_up = once(row)
    session.finish()  # makes AdamW's moments
    times = [once(row) for row in rows]
    groups, prompt_tokens, answer_tokens = work_of(rows)
    result = {
        "groups": groups,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
        "largest_row": max(size_of(way, row) for row in rows),
        "warm_up_seconds": warm_up,
        "row_seconds": times,
        "seconds": sum(times),
        "optimizer_seconds": seconds_of(session.finish, args.device),
    }
    if args.device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def size_of(way: str, row: list) -> int:
    """Tokens that go through the model together."""
    if way == "padded":
        return sum(len(answers) * (len(prompt) + max(map(len, answers))) for prompt, answers in row)
    return sum(len(prompt) + sum(map(len, answers)) for prompt, answers in row)


def planned(shape: str, tokens: int, bytes_each: int) -> float:
    """tools/plan.py's peak of the update, on one GPU, for a row of so many tokens and this state per parameter."""
    name = f"qwen2.5-{shape.lower()}"
    flags = f"{name} --max_tokens_per_row {tokens} --max_prompt_length 1 "
    flags += "--max_completion_length 1"
    sizes, args = planning.shape_of(name), planning.parser().parse_args(flags.split())
    found = planning.plan(sizes, 1, 1000.0, 1, args)
    return found["update_peak"] - found["states"] + bytes_each * sizes["parameters"]


def main() -> None:
    parser = common.parser(__doc__, "gpu.json")
    parser.add_argument("--shapes", nargs="+", default=["7B", "1.5B", "3B"], choices=SHAPES)
    parser.add_argument("--prompts", nargs="+", type=int, default=[2048, 8192], help="tokens, mean")
    parser.add_argument("--answer", type=int, default=100, help="tokens, mean")
    parser.add_argument("--ways", nargs="+", default=list(WAYS[:3]), choices=WAYS)
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=3, help="passes that are timed")
    parser.add_argument("--chunk", type=int, default=512, help="tokens whose logits exist together")
    parser.add_argument("--compile", action="store_true", help="as train.py's --torch_compile")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=7, help="then nothing new starts")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible; --device cpu --shapes toy tries the script")
    deadline = time.time() + 60 * args.minutes
    torch._dynamo.config.recompile_limit = 64  # lengths differ from row to row
    torch.backends.cuda.enable_cudnn_sdp(False)  # as packing.py does
    result = {"machine": common.machine(), "settings": vars(args).copy(), "rows": []}
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    rate = matmul_rate(args.device)
    result["matmul_tflops"] = [rate / 1e12]
    print(f"matmul rate {rate / 1e12:.1f} TFLOP/s", flush=True)
    session = Session(args)
    longest = 0.0
    for shape in args.shapes:
        for way in args.ways:
            for prompt in args.prompts:
                row = {"shape": shape, "prompt": prompt, "way": way}
                row["error"] = "not measured: the time is over"
                if (start := time.time()) + longest < deadline:
                    row = measure(session, shape, prompt, way, rate)
                    longest = max(longest, time.time() - start)
                    row["took_seconds"] = time.time() - start
                result["rows"].append(row)
                add_ratios(result["rows"])
                print(json.dumps(row), flush=True)
                common.write(args.out, result)
    session.drop()
    result["matmul_tflops"].append(matmul_rate(args.device) / 1e12)  # first and last
    common.write(args.out, result)
    dist.destroy_process_group()


def add_ratios(rows: list[dict]) -> None:
    """`times_padded`: how many times as fast as padding, by tokens per second, for the same shape and prompt."""
    rates = {(r["shape"], r["prompt"], r["way"]): r.get("tokens_per_second") for r in rows}
    for row in rows:
        padded = rates.get((row["shape"], row["prompt"], "padded"))
        if padded and "tokens_per_second" in row:
            row["times_padded"] = row["tokens_per_second"] / padded


if __name__ == "__main__":
    main()
