"""Memory and time of a training step on given GPUs, by arithmetic from the model's config.json; train.py's check at start.

    python -m tools.plan qwen2.5-7b --gpus 8 --gpu-memory 80
    python -m tools.plan qwen2.5-7b --gpus 1 --gpu-memory 24 --lora_rank 16 --quant 4bit
    python -m tools.plan FOLDER --gpus 8 --gpu-memory 141 --nodes 2 --prompt 3000 --answer 120
    python -m tools.plan paper                        the paper's models on three machines, and single cards, as a table

Bytes per GPU. N parameters, W GPUs in all, T of the parameters trained: N, or the adapters' A = r (in + out) per matrix.

    resident    weights and moments: (4 + 8) N / W; LoRA (2 N + 12 A) / W; 4-bit 0.516 bytes per weight of the layers'
                matrices, 2 for the rest, 12 A, and nothing is sharded. --offload_moments takes 8 T / W of it to the host
    states      resident + fp32 gradients 4 T / W
    gathered    bf16 weights of the root (LM head, final norm, a tied embedding) and of two layers; while all is trained,
                also the root's bf16 gradient, and the largest unit's in bf16 and fp32 before it is reduced. 4-bit: one
                matrix in bf16
    activations tokens of a row * (2 h * layers + 4 (4 h + 2 q + 2 kv + 4 inner))   layer inputs, and one layer computed
                                   again with its gradients (activation checkpointing); 4-bit: 4 (5 h + q + inner) more,
                                   the adapters' inputs in fp32
    logits      4 * 4 * 512 * V    a chunk of the LM head, its softmax, their product, a gradient
    vLLM        2 N / t + working + KV cache    bf16 weights over t GPUs, the activations of 8,192 prompt tokens and logits
                of --max_num_seqs, and what `resident` and `kept` leave; in the update it sleeps, but for its CUDA
                graphs
    kept        CUDA graphs 1 GB at 256 sequences, 0.4 at least; CUDA, NCCL and fragments 6 GB, 2 on one GPU
    KV cache    4 * layers * kv    bytes per token over t GPUs; a group's prompt is there once (prefix caching)

Bytes per node: host memory 3 GB per process, 5 GB for the file being saved, offloaded moments (10 T / W, since pinned
blocks are not filled to the end). Disk: --save_total_limit + 1 checkpoints of 4 N + 12 T, with adapters 4 A more.

Seconds of a step, with the rates that the flags state:

    update      6 (body * tokens + head * responses) / (W * peak * MFU), 4 in place of 6 where the matrices are frozen, or
                the traffic if that is longer: FSDP2 moves 8 N bytes per micro-batch (bf16 gathered twice, fp32 reduced; 4 N
                with LoRA) over the link; offloaded moments cross the host's link twice, 16 T / W
    rollout     prefill 2 N * prompt tokens / (W * peak * 0.5), then decoding, bound by memory: (weights + KV of the
                responses under way) / (t * bandwidth * 0.6) per token of the longest response, in waves of max_num_seqs
    sync        4 N bytes over the link, 2 N with LoRA

t, vLLM's tensor parallel size, is the smallest power of two that divides the GPUs of a node and the KV heads and leaves
room for one group of the longest prompt and responses. GPUs are counted in GiB, as sold. A plan, not a measurement.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size,
# tie_word_embeddings, biases of q, k and v: from config.json of the models on the Hugging Face Hub
MODELS = {
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151_936, True, True),  # Qwen/Qwen2.5-1.5B-Instruct
    "qwen2.5-3b": (2048, 11_008, 36, 16, 2, 151_936, True, True),  # Qwen/Qwen2.5-3B-Instruct
    "qwen2.5-7b": (3584, 18_944, 28, 28, 4, 152_064, False, True),  # Qwen/Qwen2.5-7B-Instruct
    # meta-llama/Llama-3.1-8B-Instruct
    "llama-3.1-8b": (4096, 14_336, 32, 32, 8, 128_256, False, False),
    "qwen2.5-14b": (5120, 13_824, 48, 40, 8, 152_064, False, True),  # Qwen/Qwen2.5-14B-Instruct
    "qwen2.5-32b": (5120, 27_648, 64, 40, 8, 152_064, False, True),  # Qwen/Qwen2.5-32B-Instruct
}
PAPER = ("qwen2.5-7b", "llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b")
MACHINES = ((8, 80, 1), (8, 141, 1), (8, 80, 2))  # GPUs per node, GiB each, nodes
# single cards
SHORT = "--train_batch_size 32 --max_prompt_length 4096 --max_completion_length 512"
SHORT += " --max_tokens_per_row 8192"
CARD_24 = f"{SHORT} --max_num_seqs 64 --tflops 165 --bandwidth 1008"  # RTX 4090
CASES = (  # model, machine, flags, name
    ("qwen2.5-32b", (8, 80, 1), "--offload_moments", "moments on host"),
    ("qwen2.5-3b", (1, 24, 1), f"{CARD_24} --lora_rank 16", "LoRA"),
    ("qwen2.5-7b", (1, 24, 1), f"{CARD_24} --lora_rank 16 --quant 4bit", "QLoRA"),
    ("qwen2.5-3b", (1, 80, 1), SHORT, ""),
    ("qwen2.5-7b", (1, 80, 1), f"{SHORT} --lora_rank 16", "LoRA"),
)
CHUNK = 512  # packing.response_logps
PREFILL = 8192  # rollout.PREFILL_TOKENS
CACHE = 2**32  # bytes of the transformers engine's KV cache on a GPU (rollout.make_engine)
GB, GIB = 1e9, 2**30
NF4 = 0.5 + 0.127 / 8  # bytes per weight, doubly quantised constants included


def shape_of(model) -> dict:
    """Sizes of a model: a key of MODELS, a folder with config.json, or model.skeleton's; ValueError for other names."""
    if not isinstance(model, str):
        s = _sizes(model.config.get_text_config())
        exact = sum(parameter.numel() for parameter in model.parameters())
        return s | {"parameters": exact, "layer": (exact - s["root"]) // s["layers"]}
    if model in MODELS:
        names = (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size", "tie_word_embeddings", "attention_bias",
        )  # fmt: skip
        return _sizes(SimpleNamespace(**dict(zip(names, MODELS[model]))))
    if (Path(model) / "config.json").exists():
        config = json.loads((Path(model) / "config.json").read_text())
        return _sizes(SimpleNamespace(**config.get("text_config", config)))
    raise ValueError(
        f"{model}: give one of {', '.join(MODELS)}, paper, or a folder with config.json"
    )


def _sizes(config) -> dict:
    h, layers, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    heads, inner = config.num_attention_heads, getattr(config, "intermediate_size", None) or 4 * h
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    D = getattr(config, "head_dim", None) or h // heads
    tied = getattr(config, "tie_word_embeddings", False)
    bias = getattr(config, "attention_bias", getattr(config, "model_type", "") == "qwen2")
    q, kv = heads * D, kv_heads * D
    matrices = 2 * h * q + 2 * h * kv + 3 * h * inner
    layer = matrices + 2 * h + (q + 2 * kv) * bias
    embeddings = V * h * (1 if tied else 2)
    return {
        "h": h, "inner": inner, "layers": layers, "q": q, "kv": kv, "kv_heads": kv_heads, "V": V,
        "layer": layer, "body": layers * matrices, "head": V * h, "root": embeddings + h, "tied": tied,
        "rank_one": layers * (2 * (h + q) + 2 * (h + kv) + 3 * (h + inner)),
        "parameters": layers * layer + embeddings + h,
    }  # fmt: skip


def plan(s: dict, gpus: int, gpu_memory: float, nodes: int, args: argparse.Namespace) -> dict:
    """Bytes per GPU and node, tensor parallel size, tokens and seconds of a step.

    s           from `shape_of`
    gpus        per node
    gpu_memory  GiB of each
    """
    W, N, memory = gpus * nodes, s["parameters"], gpu_memory * GIB
    A, quantised = args.lora_rank * s["rank_one"], args.quant == "4bit"
    trained = (A or N) / (1 if quantised else W)  # of each GPU
    weights = (2 * N + 4 * A if A else 4 * N) / W
    if quantised:
        weights = NF4 * s["body"] + 2 * (N - s["body"]) + 4 * A
    resident = weights + 8 * trained * (not args.offload_moments)
    states = resident + 4 * trained
    gathered = _gathered(s, bool(A), quantised)
    group = args.prompt + (args.num_generations + 1) * args.answer  # mean, the expert included
    longest = args.max_prompt_length + (args.num_generations + 1) * args.max_completion_length
    per_token = 2 * s["h"] * s["layers"] + 4 * (
        4 * s["h"] + 2 * s["q"] + 2 * s["kv"] + 4 * s["inner"]
    )
    # adapters on 4-bit weights are not gathered in bf16: each keeps an fp32 copy of its input
    per_token += 4 * (5 * s["h"] + s["q"] + s["inner"]) * quantised
    activations = max(args.max_tokens_per_row, longest) * per_token
    logits = 4 * 4 * CHUNK * s["V"]
    graphs = 0.4 + 0.6 * min(1, args.max_num_seqs / 256)
    kept = GB * (graphs + (6 if W > 1 else 2))
    kv_token = 4 * s["layers"] * s["kv"]
    working = PREFILL * (6 * s["inner"] + 8 * s["h"]) + 8 * args.max_num_seqs * s["V"]
    room = memory - resident - kept
    t = args.vllm_tensor_parallel_size or 1
    while not args.vllm_tensor_parallel_size and t < gpus and s["kv_heads"] % (2 * t) == 0:
        if 2 * N + working + longest * kv_token <= t * room:
            break
        t *= 2
    kv_tokens = max(0, int((t * room - 2 * N - working) / kv_token))
    mean = args.prompt + args.num_generations * args.answer
    peak = states + gathered + activations + logits
    result = {
        "parameters": N, "trained": A or N, "gpus": gpus, "nodes": nodes, "gpu_memory": gpu_memory,
        "resident": resident, "states": states, "gathered": gathered, "activations": activations,
        "logits": logits, "update_peak": peak, "kept": kept, "tensor_parallel": t,
        "vllm_weights": 2 * N / t, "vllm_working": working / t, "kv_tokens": kv_tokens, "kv_token": kv_token,
        "concurrent": min(args.max_num_seqs, int(kv_tokens * args.num_generations / mean)),
        "utilization": math.floor(100 * room / max(1, memory)) / 100,
        "host": gpus * (3 * GB + max(10 * trained, GIB) * args.offload_moments) + 5 * GB,
        "disk": (args.save_total_limit + 1) * (4 * N + 12 * (A or N) + 4 * A),
        "fits": peak + kept <= memory and kv_tokens >= longest,
    }  # fmt: skip
    return result | seconds(s, result, group, args) if result["fits"] else result


def _gathered(s: dict, frozen: bool, quantised: bool) -> float:
    """Bytes beside this GPU's own part: weights as they are gathered, and gradients before they are reduced."""
    root, layer, head = s["root"], s["layer"], s["head"]
    if quantised:
        return 2 * max(s["h"] * s["inner"], head)
    if not s["tied"]:
        root -= head  # the embedding is a unit of its own
    if frozen:
        return 2 * root + 2 * max(2 * layer, head * (not s["tied"]))
    units = [2 * 2 * layer + 2 * layer + 4 * layer, 4 * root]
    if not s["tied"]:
        units.append((2 + 2 + 4) * head)
    return 2 * root + 2 * root + max(units)


def engine_memory_share(
    card: float, held: float, weights: float, working: float, longest: float, share: float = 0.0
) -> tuple[float, str]:
    """Share of a GPU's memory for vLLM, and its arithmetic in a line; ValueError where the model does not fit into it.

    card     bytes of the GPU
    held     while vLLM samples: the trainer's weights and moments, CUDA graphs, what CUDA and fragments take
    weights  of the model in vLLM, on this GPU
    working  of vLLM's activations and logits
    longest  of the KV cache of one longest sequence, on this GPU
    share    --vllm_gpu_memory_utilization; 0: all that is free
    """
    free = max(0, min(95, math.floor(100 * (card - held) / card))) / 100
    given, share = share > 0, share or free
    cache = share * card - weights - working
    text = (
        f"vLLM's share of the GPU: {share:.2f}{', as given,' * given} of {card / GB:.1f} GB; {held / GB:.1f} GB are held "
        f"by the trainer, CUDA and graphs; of the share {weights / GB:.1f} GB weights, {working / GB:.1f} GB "
        f"activations, {cache / GB:.1f} GB KV cache"
    )
    if cache < (0 if given else longest):  # a given share is refused only where the model does not fit
        raise ValueError(
            f"the GPU is too small for sampling. {text}; the longest sequence needs {longest / GB:.2f} GB of cache. Use "
            + "a larger --vllm_gpu_memory_utilization, " * (share < free)
            + "more GPUs, a larger --vllm_tensor_parallel_size, --offload_moments, --lora_rank 16 (with --quant 4bit), "
            "a shorter --max_prompt_length or a smaller model"
        )
    if given and (share > free or cache < longest):
        text += f"\nBy this count {free:.2f} are free, and the longest sequence needs {longest / GB:.2f} GB of cache"
    return share, text


def check_room(config, model, whole: bool = False) -> tuple[float, str]:
    """vLLM's share of each GPU in a run of train.py (0 on a CPU) and the arithmetic; collective, equal on all ranks.

    config  of train.py
    model   from model.skeleton
    whole   each rank reads all the weights into host memory, before it moves its part to the GPU
    ValueError where GPU or host are too small whatever the data is. Rows that may be too long are mentioned.
    """
    import torch
    import torch.distributed as dist

    card = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    memory = torch.tensor([card, available_memory()], dtype=torch.float64)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    world = dist.get_world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return room(config, shape_of(model), world, here, *memory.tolist(), whole)


def room(
    config, s: dict, world: int, here: int, card: float, host: float, whole: bool = False
) -> tuple[float, str]:
    """`check_room` by numbers: ranks in all and on this machine, bytes of each GPU (0: none) and of free host memory."""
    defaults = vars(parser().parse_args(["model"]))
    args = argparse.Namespace(**{name: getattr(config, name, x) for name, x in defaults.items()})
    p = plan(s, here, card / GIB, world // here, args)
    free = f"{host / GB:.1f} GB of host memory are free"
    if not card:
        trainer = (4 * p["parameters"] + 12 * p["trained"]) / world
        engine = 4 * p["parameters"] / p["tensor_parallel"]
        needed = here * (trainer + engine + p["logits"])
        if needed > host:
            raise ValueError(
                f"the model is too large for this machine: {here} x ({trainer / GB:.1f} GB weights, gradients and "
                f"moments + {engine / GB:.1f} GB weights of the engine + {p['logits'] / GB:.1f} GB logits) = "
                f"{needed / GB:.1f} GB, {free}; use --lora_rank 16, a smaller model or more machines"
            )
        return 0.0, ""
    own_engine = getattr(config, "engine", "vllm") == "transformers"
    read = p["parameters"] * max((2 if args.lora_rank else 4) * whole, 2 * own_engine)
    needed = p["host"] + here * read
    if needed > host:
        raise ValueError(
            f"too little host memory: {here} processes of 3 GB, 5 GB for saving"
            + " and the moments of --offload_moments" * args.offload_moments
            + f" make {p['host'] / GB:.1f} GB"
            + f", all weights read by each process {here * read / GB:.1f} GB" * (read > 0)
            + f", {free}; use more machines or fewer ranks"
            + ", or keep the moments on the GPUs" * args.offload_moments
        )
    parts = (
        f"{p['states'] / GB:.1f} GB weights, gradients and moments + {p['gathered'] / GB:.1f} GB gathered "
        f"+ {p['logits'] / GB:.1f} GB logits + {p['kept'] / GB:.1f} GB CUDA and graphs"
    )
    engine = 0.0
    if own_engine:  # it does not sleep
        engine = 2 * p["parameters"] + CACHE
        parts += f" + {engine / GB:.1f} GB weights and KV cache of --engine transformers"
    least = p["update_peak"] - p["activations"] + p["kept"] + engine
    if least > card:
        raise ValueError(
            f"the GPU is too small for an update: {parts} = {least / GB:.1f} GB of {card / GB:.1f} GB; use more GPUs, "
            "--offload_moments, --lora_rank 16 (with --quant 4bit) or a smaller model"
        )
    if engine:
        share, text = 0.0, f"the engine keeps {engine / GB:.1f} GB of the GPU: weights and KV cache"
    else:
        longest = args.max_prompt_length + args.max_completion_length
        share, text = engine_memory_share(
            card,
            p["resident"] + p["kept"],
            p["vllm_weights"],
            p["vllm_working"],
            longest * p["kv_token"] / p["tensor_parallel"],
            config.vllm_gpu_memory_utilization,
        )
    if p["update_peak"] + p["kept"] + engine > card:
        text += (
            f"\nThe longest rows may not fit into an update: {parts} + {p['activations'] / GB:.1f} GB activations of "
            f"{card / GB:.1f} GB; if so, lower --max_tokens_per_row or --max_prompt_length"
        )
    return share, text


def available_memory() -> float:
    """Bytes that this machine, or its container, can still give; infinite where neither can be read.

    What a container keeps of files that nobody reads any more counts as free, as MemAvailable does.
    """
    meminfo, group, free = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), [math.inf]
    if meminfo.exists():
        lines = [line.split() for line in meminfo.read_text().splitlines()]
        free += [int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"]
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(kept["inactive_file"])
            free.append(int(limit) - used)
    return min(free)


def seconds(s: dict, p: dict, group: int, args: argparse.Namespace) -> dict:
    """Seconds of rollout, update and weight sync at the stated rates, and the tokens of a step."""
    W, N, t = p["gpus"] * p["nodes"], s["parameters"], p["tensor_parallel"]
    K, B = args.num_generations, args.train_batch_size
    peak, link = args.tflops * 1e12, (args.network if p["nodes"] > 1 else args.link) * GB
    frozen = args.lora_rank > 0
    flops = (4 if frozen else 6) * (s["body"] * B * group + s["head"] * B * (K + 1) * args.answer)
    micro = math.ceil(B / W * group / args.max_tokens_per_row)
    moved = 0 if W == 1 or args.quant == "4bit" else (4 if frozen else 8) * N * micro
    compute, traffic = flops / (W * peak * args.mfu), moved / link
    moments = 16 * p["trained"] / W / (args.host_link * GB) * args.offload_moments
    prefill = 2 * N * B * args.prompt / (W * peak * 0.5)
    waves = math.ceil(B * K * t / W / p["concurrent"])
    active = min(p["concurrent"], B * K * t / W)
    cache = 4 * s["layers"] * s["kv"] * active * (args.prompt + args.answer)
    token = (2 * N + cache) / (t * args.bandwidth * GB * 0.6)
    parts = {
        "rollout": prefill + waves * 2 * args.answer * token,  # the longest: twice the mean
        "update": max(compute, traffic) + moments,
        "sync": (2 if frozen else 4) * N / link,
    }
    return {
        **parts, "step": sum(parts.values()), "tokens": B * group, "flops": flops, "micro_batches": micro,
        "traffic_bound": traffic > compute,
    }  # fmt: skip


def table(rows: list[tuple[str, dict]]) -> str:
    """A line per plan."""
    lines = [
        "model                        nodes x GPUs x GiB  params  states  update peak  tp  KV tokens   host   disk    tokens/step  rollout  update  sync   step"
    ]
    for name, p in rows:
        where = f"{p['nodes']} x {p['gpus']} x {p['gpu_memory']:.0f}"
        memory = f"{p['parameters'] / 1e9:5.1f}B {p['states'] / GB:6.1f}  {p['update_peak'] / GB:7.1f} GB  {p['tensor_parallel']:4d} {p['kv_tokens']:10,d} {p['host'] / GB:4.0f} GB {p['disk'] / GB:5.0f} GB"
        time = "   does not fit"
        if p["fits"]:
            time = f"{p['tokens']:12,d}  {p['rollout']:6.1f}s {p['update']:6.1f}s {p['sync']:5.2f}s {p['step']:6.1f}s"
            time += "  (update bound by traffic)" * p["traffic_bound"]
        lines.append(f"{name:28}  {where:18} {memory} {time}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The flags: machine, lengths, and the rates that are assumed."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = flags.add_argument
    add("model", help=f"{', '.join(MODELS)}, paper, or a folder with config.json")
    add("--gpus", type=int, default=8, help="per node")
    add("--gpu-memory", type=float, default=80, help="GiB of each")
    add("--nodes", type=int, default=1)
    add("--train_batch_size", type=int, default=256, help="prompts per step")
    add("--num_generations", type=int, default=8)
    add("--prompt", type=int, default=2000, help="mean tokens of a prompt")
    add("--answer", type=int, default=100, help="mean tokens of a response")
    add("--max_prompt_length", type=int, default=8192)
    add("--max_completion_length", type=int, default=1024)
    add("--max_tokens_per_row", type=int, default=16_384)
    add("--max_num_seqs", type=int, default=256)
    add("--vllm_tensor_parallel_size", type=int, help="left out: the smallest that fits")
    add("--lora_rank", type=int, default=0, help="0: all weights are trained")
    add("--quant", choices=("none", "4bit"), default="none")
    add("--offload_moments", action="store_true", help="Adam's moments on the host")
    add("--save_total_limit", type=int, default=2, help="checkpoints kept")
    add("--tflops", type=float, default=989, help="bf16 peak of a GPU; A100: 312")
    add("--bandwidth", type=float, default=3350, help="GB/s of its memory; A100: 2039, H200: 4800")
    add("--mfu", type=float, default=0.4, help="of the update, without recomputation")
    add("--link", type=float, default=300, help="GB/s between GPUs of a node, per GPU")
    add("--host_link", type=float, default=25, help="GB/s between GPU and host")
    add("--network", type=float, default=40, help="GB/s between nodes, per GPU")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Print the plan of a model, or the table of the paper's."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    cases = [(args.model, (args.gpus, args.gpu_memory, args.nodes), "", "")]
    if args.model == "paper":
        cases = [(name, m, "", "") for m in MACHINES for name in PAPER] + [*CASES]
    try:
        rows = []
        for name, machine, flags, way in cases:
            own = parser().parse_args([*argv, *flags.split()])
            rows.append((f"{name} {way}".strip(), plan(shape_of(name), *machine, own)))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(table(rows))
    if len(rows) == 1:
        [(_, p)] = rows
        for key in (
            "resident", "states", "gathered", "activations", "logits", "update_peak", "vllm_weights", "host", "disk"
        ):  # fmt: skip
            print(f"  {key:13} {p[key] / GB:7.1f} GB")
        print(
            f"  --vllm_tensor_parallel_size {p['tensor_parallel']} --vllm_gpu_memory_utilization {p['utilization']}"
        )
    print(
        f"assumed: {args.tflops:.0f} TFLOP/s, MFU {args.mfu:.0%}, {args.bandwidth:.0f} GB/s memory, {args.link:.0f} GB/s "
        f"in a node, {args.network:.0f} GB/s between; {args.train_batch_size} prompts of {args.prompt} tokens, "
        f"{args.num_generations} + 1 responses of {args.answer}"
    )


if __name__ == "__main__":
    main()
