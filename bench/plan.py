"""Memory and time of a training step on given GPUs, by arithmetic from the model's config.json.

    python bench/plan.py qwen2.5-7b --gpus 8 --gpu-memory 80
    python bench/plan.py FOLDER --gpus 8 --gpu-memory 141 --nodes 2 --prompt 3000 --answer 120
    python bench/plan.py paper                                       the paper's models on three machines, as a table

Bytes per GPU, N parameters, W GPUs in all, everything of train.py's step (run_rl):

    states      16 N / W           fp32 weights 4, gradients 4, Adam's moments 8; in the rollout 12, without gradients
    gathered    2 (embedding + head) + 2 * 2 layer + 4 largest     bf16 weights of the root and of two layers, fp32
                                   gradient of the largest unit before it is reduced
    activations tokens of a row * (2 h * layers + 4 (4 h + 2 q + 2 kv + 4 inner))   layer inputs, and one layer computed
                                   again with its gradients (activation checkpointing)
    logits      4 * 4 * 512 * V    a chunk of the LM head, its softmax, their product, a gradient
    vLLM        2 N / t + KV cache bf16 weights over t GPUs, and what 12 N / W and --reserve leave; asleep in the update
    KV cache    4 * layers * kv    bytes per token over t GPUs; a group's prompt is there once (prefix caching)

Seconds of a step, with the rates that the flags state:

    update      6 (body * tokens + head * responses) / (W * peak * MFU), or the traffic if that is longer: FSDP2 moves
                8 N bytes per micro-batch (bf16 gathered twice, fp32 reduced) over the link
    rollout     prefill 2 N * prompt tokens / (W * peak * 0.5), then decoding, bound by memory: (weights + KV of the
                responses under way) / (t * bandwidth * 0.6) per token of the longest response, in waves of max_num_seqs
    sync        4 N bytes over the link

t, vLLM's tensor parallel size, is the smallest power of two that divides the GPUs of a node and the KV heads and leaves
room for one group of the longest prompt and responses. A plan, not a measurement: the rates are assumptions.
"""

import argparse
import json
import math
from pathlib import Path

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size,
# tie_word_embeddings, biases of q, k and v: from config.json of the models on the Hugging Face Hub
MODELS = {
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151_936, True, True),  # Qwen/Qwen2.5-1.5B-Instruct
    "qwen2.5-3b": (2048, 11_008, 36, 16, 2, 151_936, True, True),  # Qwen/Qwen2.5-3B-Instruct
    "qwen2.5-7b": (3584, 18_944, 28, 28, 4, 152_064, False, True),  # Qwen/Qwen2.5-7B-Instruct
    "llama-3.1-8b": (
        4096,
        14_336,
        32,
        32,
        8,
        128_256,
        False,
        False,
    ),  # meta-llama/Llama-3.1-8B-Instruct
    "qwen2.5-14b": (5120, 13_824, 48, 40, 8, 152_064, False, True),  # Qwen/Qwen2.5-14B-Instruct
    "qwen2.5-32b": (5120, 27_648, 64, 40, 8, 152_064, False, True),  # Qwen/Qwen2.5-32B-Instruct
}
PAPER = ("qwen2.5-7b", "llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b")
MACHINES = ((8, 80, 1), (8, 141, 1), (8, 80, 2))  # GPUs per node, GB each, nodes
CHUNK = 512  # packing.response_logps
GB = 1e9


def shape_of(name: str) -> dict:
    """Sizes of a model: a key of MODELS, or a folder with config.json; ValueError where it is neither."""
    if name in MODELS:
        h, inner, layers, heads, kv_heads, V, tied, bias = MODELS[name]
        D = h // heads
    elif (Path(name) / "config.json").exists():
        config = json.loads((Path(name) / "config.json").read_text())
        h, inner, layers = (
            config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
        )
        heads, V = config["num_attention_heads"], config["vocab_size"]
        kv_heads = config.get("num_key_value_heads") or heads
        tied = config.get("tie_word_embeddings", False)
        bias = config.get("attention_bias", config["model_type"] == "qwen2")
        D = config.get("head_dim") or h // heads
    else:
        raise ValueError(
            f"{name}: give one of {', '.join(MODELS)}, paper, or a folder with config.json"
        )
    q, kv = heads * D, kv_heads * D
    matrices = 2 * h * q + 2 * h * kv + 3 * h * inner
    layer = matrices + 2 * h + (q + 2 * kv) * bias
    return {
        "h": h, "inner": inner, "layers": layers, "q": q, "kv": kv, "kv_heads": kv_heads, "V": V,
        "layer": layer, "body": layers * matrices, "head": V * h, "root": V * h * (1 if tied else 2) + h,
        "parameters": layers * layer + V * h * (1 if tied else 2) + h,
    }  # fmt: skip


def plan(s: dict, gpus: int, gpu_memory: float, nodes: int, args: argparse.Namespace) -> dict:
    """Bytes per GPU, tensor parallel size, tokens and seconds of a step.

    s           from `shape_of`
    gpus        per node
    gpu_memory  GB of each
    """
    W, N, memory = gpus * nodes, s["parameters"], gpu_memory * GB
    K = args.num_generations
    group = args.prompt + (K + 1) * args.answer  # mean tokens, the expert's response included
    longest = args.max_prompt + (K + 1) * args.max_answer
    row = max(args.max_tokens_per_row, longest)
    states = 16 * N / W
    gathered = 2 * s["root"] + 2 * 2 * s["layer"] + 4 * max(s["root"], s["layer"])
    per_token = 2 * s["h"] * s["layers"] + 4 * (
        4 * s["h"] + 2 * s["q"] + 2 * s["kv"] + 4 * s["inner"]
    )
    update_bytes = gathered + row * per_token + 4 * 4 * CHUNK * s["V"]
    kv_token = 4 * s["layers"] * s["kv"]
    room = memory - 12 * N / W - args.reserve * GB  # without gradients
    t = 1
    while t < gpus and s["kv_heads"] % (2 * t) == 0 and 2 * N + longest * kv_token > t * room:
        t *= 2
    kv_tokens = max(0, int((t * room - 2 * N) / kv_token))
    concurrent = min(args.max_num_seqs, int(kv_tokens * K / (args.prompt + K * args.answer)))
    result = {
        "parameters": N, "gpus": gpus, "nodes": nodes, "gpu_memory": gpu_memory, "states": states,
        "gathered": gathered, "activations": row * per_token, "logits": 4 * 4 * CHUNK * s["V"],
        "update_peak": states + update_bytes, "tensor_parallel": t, "vllm_weights": 2 * N / t,
        "kv_tokens": kv_tokens, "concurrent": concurrent,
        "utilization": math.floor(100 * room / memory) / 100,
        "fits": states + update_bytes + args.reserve * GB <= memory and kv_tokens >= longest,
    }  # fmt: skip
    return result | seconds(s, result, group, args) if result["fits"] else result


def seconds(s: dict, p: dict, group: int, args: argparse.Namespace) -> dict:
    """Seconds of rollout, update and weight sync at the stated rates, and the tokens of a step."""
    W, N, t, K, B = (
        p["gpus"] * p["nodes"],
        s["parameters"],
        p["tensor_parallel"],
        args.num_generations,
        args.batch,
    )
    peak, link = args.tflops * 1e12, (args.network if p["nodes"] > 1 else args.link) * GB
    flops = 6 * (s["body"] * B * group + s["head"] * B * (K + 1) * args.answer)
    micro = math.ceil(B / W * group / args.max_tokens_per_row)
    compute, traffic = flops / (W * peak * args.mfu), 8 * N * micro / link
    prefill = 2 * N * B * args.prompt / (W * peak * 0.5)
    waves = math.ceil(B * K * t / W / p["concurrent"])
    active = min(p["concurrent"], B * K * t / W)
    cache = 4 * s["layers"] * s["kv"] * active * (args.prompt + args.answer)
    token = (2 * N + cache) / (t * args.bandwidth * GB * 0.6)
    parts = {
        "rollout": prefill + waves * 2 * args.answer * token,  # the longest: twice the mean
        "update": max(compute, traffic),
        "sync": 4 * N / link,
    }
    return {
        **parts, "step": sum(parts.values()), "tokens": B * group, "flops": flops, "micro_batches": micro,
        "traffic_bound": traffic > compute,
    }  # fmt: skip


def table(rows: list[tuple[str, dict]]) -> str:
    """A line per plan."""
    lines = [
        "model          GPUs x GB  params  states  update peak  tp  KV tokens   tokens/step  rollout  update  sync   step"
    ]
    for name, p in rows:
        where = f"{p['nodes']} x {p['gpus']} x {p['gpu_memory']:.0f}"
        memory = f"{p['parameters'] / 1e9:5.1f}B {p['states'] / GB:6.1f}  {p['update_peak'] / GB:7.1f} GB  {p['tensor_parallel']:4d} {p['kv_tokens']:10,d}"
        time = "   does not fit"
        if p["fits"]:
            time = f"{p['tokens']:12,d}  {p['rollout']:6.1f}s {p['update']:6.1f}s {p['sync']:5.2f}s {p['step']:6.1f}s"
            time += "  (update bound by traffic)" * p["traffic_bound"]
        lines.append(f"{name:13}  {where:10} {memory} {time}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The flags: machine, lengths, and the rates that are assumed."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("model", help=f"{', '.join(MODELS)}, paper, or a folder with config.json")
    flags.add_argument("--gpus", type=int, default=8, help="per node")
    flags.add_argument("--gpu-memory", type=float, default=80, help="GB of each")
    flags.add_argument("--nodes", type=int, default=1)
    flags.add_argument("--batch", type=int, default=256, help="prompts per step")
    flags.add_argument("--num_generations", type=int, default=8)
    flags.add_argument("--prompt", type=int, default=2000, help="mean tokens of a prompt")
    flags.add_argument("--answer", type=int, default=100, help="mean tokens of a response")
    flags.add_argument("--max_prompt", type=int, default=8192)
    flags.add_argument("--max_answer", type=int, default=1024)
    flags.add_argument("--max_tokens_per_row", type=int, default=16_384)
    flags.add_argument("--max_num_seqs", type=int, default=256)
    flags.add_argument("--reserve", type=float, default=6, help="GB for CUDA, NCCL, fragments")
    flags.add_argument("--tflops", type=float, default=989, help="bf16 peak of a GPU; A100: 312")
    flags.add_argument(
        "--bandwidth", type=float, default=3350, help="GB/s of its memory; A100: 2039, H200: 4800"
    )
    flags.add_argument(
        "--mfu", type=float, default=0.4, help="of the update, without recomputation"
    )
    flags.add_argument(
        "--link", type=float, default=300, help="GB/s between GPUs of a node, per GPU"
    )
    flags.add_argument("--network", type=float, default=40, help="GB/s between nodes, per GPU")
    flags.add_argument("--out", help="write the plans as JSON")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Print the plan of a model, or the table of the paper's."""
    args = parser().parse_args(argv)
    names = PAPER if args.model == "paper" else (args.model,)
    machines = MACHINES if args.model == "paper" else ((args.gpus, args.gpu_memory, args.nodes),)
    try:
        rows = [(n, plan(shape_of(n), *m, args)) for m in machines for n in names]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(table(rows))
    if len(rows) == 1:
        [(_, p)] = rows
        for key in ("states", "gathered", "activations", "logits", "update_peak", "vllm_weights"):
            print(f"  {key:13} {p[key] / GB:7.1f} GB")
        print(
            f"  --vllm_tensor_parallel_size {p['tensor_parallel']} --vllm_gpu_memory_utilization {p['utilization']}"
        )
    print(
        f"assumed: {args.tflops:.0f} TFLOP/s, MFU {args.mfu:.0%}, {args.bandwidth:.0f} GB/s memory, {args.link:.0f} GB/s "
        f"in a node, {args.network:.0f} GB/s between; {args.batch} prompts of {args.prompt} tokens, "
        f"{args.num_generations} + 1 responses of {args.answer}"
    )
    if args.out:
        Path(args.out).write_text(json.dumps([{"model": n, **p} for n, p in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
