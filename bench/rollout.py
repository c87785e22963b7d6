"""Our rollouts against a bare vllm.LLM.generate call on the same requests, and rewards per second of one core.

    OMP_NUM_THREADS=2 python bench/rollout.py                       about five minutes -> bench/rollout.json
    python bench/rollout.py --shape tiny --prompts 4 --prompt 128 --rounds 2 --out /tmp/rollout.json        a minute

One engine, the same prompts (token ids), 8 responses each, turns of:

    ours         engine.generate: a seed of its own per response, the log-prob of every token, text
    same         llm.generate with the very same requests and settings: what our wrapping costs
    plain        llm.generate with n=8 and no seeds or log-probs: what our settings cost

Throughput is sampled tokens per second; the prefix cache is emptied before every turn. Rewards are counted on typical
calls: one or two calls with two to four parameters, right, wrong in a value, malformed.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import common

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="14M", choices=common.SHAPES)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one of warm-up")
    parser.add_argument("--out", default=str(common.BENCH / "rollout.json"))
    args = parser.parse_args()
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

        def ours() -> int:
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
        for name in ("same", "plain")
    }
    for name, values in rates.items():
        print(f"{name:6} {common.median(values):8.0f} tokens/s")
    print(
        f"ours is {ratios['same']:.1%} of the same requests bare, {ratios['plain']:.1%} of plain ones"
    )
    common.write(args.out, {
        "machine": common.machine(), "settings": vars(args), "tokens_per_second": rates,
        "ratio": ratios, "rewards_per_second": per_second,
    })  # fmt: skip


if __name__ == "__main__":
    main()
