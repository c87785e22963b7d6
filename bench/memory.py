"""Peak memory of the training part with a vocabulary of 152k, packed against padded.

    python bench/memory.py                                     three minutes, 3 GB -> memory.json
    python bench/memory.py --prompt 256 --vocabulary 8192 --out /tmp/memory.json    half a minute

One group: --group responses of --answer tokens to one prompt, forward and backward of their
log-probs and entropies in float32, on a model with two layers of width 64, where the vocabulary
dominates. The ways to compute it:

    packed              packing.response_logps: the prompt once, logits in chunks
    packed, recomputed  the same with activation checkpointing
    padded, chunked     packing.padded_logps (--no_share_prefix): a prompt per response, chunks
    padded, answers     a prompt per response, the logits of all answer positions at once
    padded, full        a prompt per response, the logits of all positions at once
    one row, full       the same, one response at a time

Each runs in its own process. `tracked` is the peak of live tensors (torch's MemTracker:
activations, gradients and temporaries, without the weights). What would not fit into this machine
runs on fake tensors, which have sizes and no memory. `rss` is the growth of the process's peak
resident memory where the computation is real; the two agree within the allocator's slack, which
checks the tracker.
"""

import resource

import common
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen2Config, Qwen2ForCausalLM

import packing

WAYS = ("packed", "packed, recomputed")
WAYS += ("padded, chunked", "padded, answers", "padded, full", "one row, full")
FAKE_FROM = 4e9  # bytes of logits, above which tensors are fake


def scores(way: str, model, prompt: list[int], responses: list[list[int]]) -> torch.Tensor:
    """Something to call backward on: the sum of all log-probs and entropies."""
    if way.startswith("packed"):
        logps, entropy = packing.response_logps(model, packing.pack(prompt, responses))
    elif way == "padded, chunked":
        logps, entropy = packing.padded_logps(model, prompt, responses)
    else:
        ids, T = torch.tensor([prompt + response for response in responses]), len(responses[0])
        keep = T + 1 if way == "padded, answers" else 0
        logits = model(ids, use_cache=False, logits_to_keep=keep).logits[:, -T - 1 : -1]
        log_p = logits.log_softmax(-1)
        logps = log_p.gather(-1, ids[:, -T:, None])
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logps.sum() + entropy.sum()


def measure(way: str, tracked: bool, args) -> dict:
    """Peak bytes of one forward and backward pass: live tensors (`tracked`), or resident memory."""
    rows = 1 if way == "one row, full" else args.group
    positions = {"padded, full": rows, "one row, full": 1}.get(way, 0) * (args.prompt + args.answer)
    fake = 4.0 * positions * args.vocabulary > FAKE_FROM
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                **{**common.SHAPES["tiny"], "vocab_size": args.vocabulary},
                tie_word_embeddings=True,
                max_position_embeddings=args.prompt + args.answer,
            )
        ).train()
        if "recomputed" in way:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        prompt = [i % args.vocabulary for i in range(args.prompt)]
        responses = [[7 * i % args.vocabulary for i in range(args.answer)] for _ in range(rows)]
        if not fake:  # libraries and thread pools allocate on first use
            scores(way, model, prompt[:8], [r[:2] for r in responses]).backward()
            model.zero_grad()
        weights = sum(p.nbytes for p in model.parameters())
        before, tracker = common.resident("VmRSS"), MemTracker()
        if tracked:
            tracker.track_external(model)
            with tracker:
                scores(way, model, prompt, responses).backward()
            peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"] - weights
            return {"tracked": peak, "fake": fake}
        scores(way, model, prompt, responses).backward()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"rss": peak - before}


def main() -> None:
    parser = common.parser(__doc__, "memory.json")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens")
    parser.add_argument("--answer", type=int, default=100, help="tokens")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    args = parser.parse_args()
    results = {}
    for way in WAYS:
        results[way] = {}
        for tracked in (True, False):
            if tracked or not results[way]["fake"]:
                results[way] |= common.in_a_process(measure, way, tracked, args)
        row = results[way]
        row["times_packed"] = row["tracked"] / results["packed"]["tracked"]
        rss = f"{row['rss'] / 2**20:9.0f} MiB resident" if "rss" in row else " (fake tensors)"
        live = f"{row['tracked'] / 2**20:9.0f} MiB live"
        print(f"{way:20} {live}{rss}   {row['times_packed']:6.1f} x packed", flush=True)
    common.write(
        args.out, {"machine": common.machine(), "settings": vars(args), "results": results}
    )


if __name__ == "__main__":
    main()
