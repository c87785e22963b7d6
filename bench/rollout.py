"""Our rollouts against a bare vllm.LLM.generate call on the same requests, our two engines, rewards per second.

    OMP_NUM_THREADS=2 python bench/rollout.py                       about five minutes -> bench/rollout.json
    python bench/rollout.py --shape tiny --prompts 4 --prompt 128 --rounds 2 --out /tmp/rollout.json        a minute
    OMP_NUM_THREADS=2 python bench/rollout.py --engine transformers --shape 2M --out /tmp/engines.json       two minutes
    python bench/rollout.py --device-check --shape 0.5B --prompt 700 --answer 128                            a minute on a GPU

One engine, the same prompts (token ids), 8 responses each, turns of:

    ours         engine.generate: a seed of its own per response, the log-prob of every token, text
    same         llm.generate with the very same requests and settings: what our wrapping costs
    plain        llm.generate with n=8 and no seeds or log-probs: what our settings cost

With --engine transformers the turns are `ours` and `transformers`, the same call of the other engine. --device-check
needs no vLLM: it prints what a decoding step of the transformers engine takes and, on a GPU, its kernels.

Throughput is sampled tokens per second; the prefix cache is emptied before every turn. Rewards are counted on typical
calls: one or two calls with two to four parameters, right, wrong in a value, malformed.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import common
import torch

import rewards
from rollout import derived_seed, make_engine

GROUP = 8
ONE = '<tool_call>\n{"name": "search_flights", "params": {"origin": "Berlin", "destination": "Paris", "date": "2024-05-01", "passengers": 2}}\n</tool_call>'  # fmt: skip
TWO = '<tool_call>\n[{"name": "get_weather", "params": {"city": "Paris", "unit": "celsius"}}, {"name": "search_hotels", "params": {"city": "Paris", "stars": 4, "near": "Louvre"}}]\n</tool_call>'  # fmt: skip
PAIRS = [
    (ONE, ONE), (ONE.replace("2}", "3}"), ONE), (ONE.replace("Berlin", "Rome"), ONE), (ONE[:-20], ONE),
    (TWO, TWO), (TWO.replace("celsius", "kelvin"), TWO), (ONE, TWO), ("<answer>\nI cannot.\n</answer>", TWO),
]  # fmt: skip


def rewards_per_second(seconds: float) -> float:
    """Rewards that one core computes in a second of its time."""
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        for response, target in PAIRS * 20:
            rewards.outcome(response, target)
        count += 20 * len(PAIRS)
    return count / (time.process_time() - start)


def device_check(shape: str, prompt: int, answer: int, count: int) -> None:
    """Prints the transformers engine's times for a training step's rollouts and for an evaluation."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter
    print(common.machine(), flush=True)
    start = clock()
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cuda" if on_gpu else "cpu"):
            dtype = torch.bfloat16 if on_gpu else torch.float32
            folder = common.make_model(shape, Path(folder), prompt + answer, dtype)
        made = clock()
        engine = make_engine("transformers", str(folder), max_model_len=prompt + answer)
    print(f"model made in {made - start:.1f} s, engine in {clock() - made:.1f} s", flush=True)
    lengths = torch.randint(prompt // 2, prompt + 1, (5 * count,)).tolist()
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in lengths]

    def seconds(rows: list, n: int, temperature: float, tokens: int) -> float:
        start = clock()
        engine.generate(
            rows, n=n, temperature=temperature, max_tokens=tokens, seeds=[*range(len(rows))]
        )
        return clock() - start

    for name, call in {
        f"{count} prompts x {GROUP} sampled": (prompts[:count], GROUP, 1.0),
        f"{5 * count} prompts greedily": (prompts, 1, 0.0),
    }.items():
        first = seconds(*call, answer)
        short, long = (min(seconds(*call, tokens) for _ in range(3)) for tokens in (2, answer))
        tokens = len(call[0]) * call[1] * answer
        print(
            f"{name}: {1000 * (long - short) / (answer - 2):.2f} ms per decoding step, "
            f"{tokens / long:.0f} tokens/s, prompts {short:.2f} s, all {long:.2f} s, "
            f"first time {first:.2f} s",
            flush=True,
        )
    start = clock()
    engine.load_weights((name, p.clone()) for name, p in engine.model.named_parameters())
    print(f"load_weights: {clock() - start:.3f} s")
    if on_gpu:
        print(f"GPU memory at most {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            seconds(prompts[:count], GROUP, 1.0, 34)
        table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=25)
        print(table, flush=True)


def main() -> None:
    parser = common.parser(__doc__, "rollout.json")
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--device-check", action="store_true", help="the transformers engine alone")
    parser.add_argument("--shape", default="14M", choices=common.SHAPES)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one of warm-up")
    args = parser.parse_args()
    if args.device_check:
        return device_check(args.shape, args.prompt, args.answer, args.prompts)
    per_second = [rewards_per_second(2) for _ in range(3)]
    print(f"rewards: {common.median(per_second):.0f} per second of one core", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = common.make_model(args.shape, Path(folder) / "model", args.prompt + args.answer)
        tokenizer = common.AutoTokenizer.from_pretrained(folder)
        examples = common.make_examples(args.prompts, args.prompt, args.answer, tokenizer)
        prompts = [common.data.render(example, tokenizer) for example in examples]
        engine = make_engine("vllm", str(folder), max_model_len=args.prompt + args.answer)
        settings = {"temperature": 1.0, "max_tokens": args.answer, "ignore_eos": True,
                    "stop_token_ids": [tokenizer.eos_token_id]}  # fmt: skip

        def ours(engine=engine) -> int:
            samples = engine.generate(
                prompts,
                n=GROUP,
                temperature=1.0,
                max_tokens=args.answer,
                seeds=list(range(len(prompts))),
            )
            return sum(len(sample.token_ids) for group in samples for sample in group)

        def bare(rows: list, params: list) -> int:
            outs = engine.llm.generate(
                [{"prompt_token_ids": p} for p in rows], params, use_tqdm=False
            )
            return sum(len(completion.token_ids) for out in outs for completion in out.outputs)

        def same() -> int:
            seeds = [derived_seed(s, k) for s in range(len(prompts)) for k in range(GROUP)]
            params = [
                engine._params(**settings, seed=seed, logprobs=0, detokenize=False)
                for seed in seeds
            ]
            return bare([p for p in prompts for _ in range(GROUP)], params)

        def plain() -> int:
            return bare(prompts, [engine._params(**settings, n=GROUP) for _ in prompts])

        turns = {"ours": ours, "same": same, "plain": plain}
        if args.engine == "transformers":
            other = make_engine(
                "transformers", str(folder), max_model_len=args.prompt + args.answer
            )
            turns = {"ours": ours, "transformers": partial(ours, other)}
        rates = {name: [] for name in turns}
        for round_ in range(args.rounds + 1):
            for name, turn in turns.items():
                engine.llm.reset_prefix_cache()
                start = time.perf_counter()
                tokens = turn()
                if round_:
                    rates[name].append(tokens / (time.perf_counter() - start))
        engine.close()
    ratios = {
        name: common.median([o / b for o, b in zip(rates["ours"], rates[name])])
        for name in turns
        if name != "ours"
    }
    for name, values in rates.items():
        print(f"{name:12} {common.median(values):8.0f} tokens/s")
    for name, ratio in ratios.items():
        print(f"ours is {ratio:.1%} of {name}")
    common.write(args.out, {
        "machine": common.machine(), "settings": vars(args), "tokens_per_second": rates,
        "ratio": ratios, "rewards_per_second": per_second,
    })  # fmt: skip


if __name__ == "__main__":
    main()
