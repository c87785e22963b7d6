"""Post-train a language model for tool use: ToolUPT, the rows it is compared with, and iTool.

    torchrun --nproc_per_node=8 train.py --algo toolupt --train_file xlam:xlam.json
    torchrun --nproc_per_node=2 train.py --algo toolupt @recipes/demo.args     on a laptop
    torchrun --nproc_per_node=8 train.py --algo itool --train_file toolace:data.json
    python train.py --list                      the methods, one row each
    python train.py --algo NAME --help          the flags of one

The mathematics is in grpo.py, fgae.py, spo.py and baselines.py, the methods are in methods.py, and
run.py has what a rank does around them, records.py what it writes. One step of `run_rl`:

    1 sample a batch    prompts are a function of (seed, step)
    2 roll out          K responses per prompt from vLLM
    3 reward            verifiable outcome in [-3, 4] (Eqs. 3-12); 0 or 1 in some rows
    4 advantage         per group (Eq. 2) or per token (Eqs. 13-17)
    5 loss              forward and backward over micro-batches, each prompt read once (Eqs. 18-23)
    6 optimiser step    AdamW on fp32 master weights
    7 weight sync       the new weights go to vLLM

Ranks share the prompts of a step. Every denominator is counted over all micro-batches and ranks
before the first backward pass, and gradients are summed: the split changes rounding only.

Where the papers are silent:
1. Examples that are too long are dropped and counted, never cut. A response cut at the limit is
   scored like any other text.
2. train_batch_size counts prompts, which Table 7 leaves open: 600 steps of 256 are then about two
   epochs of Table 6's 80,119 examples, as the text says (recipes/table6.args draws that sample).
"""

import gc
import math
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import checkpoint
import data
import guard
import rollout
import start
from itool import ItoolConfig, run_itool, warmup_stages
from knobs import Count, Fraction, Natural, NotNegative, Positive, Share, check_bounds, knob
from methods import METHODS, AfterSft, Group, Rollouts, Row, Rows, Sft, rows_of
from metrics import Clock, evaluate, logp_difference, rollout_metrics, starting_point, term_norms
from records import keep_logps
from run import (
    Run,
    add,
    all_gather,
    all_sum,
    forward,
    learning_rate_at,
    micro_batches,
    part,
    sync,
    tokens_of,
)
from scoring import score
from tools import show


@dataclass
class Config:
    """The knobs that all methods share; those of one method are in its own dataclass."""

    algo: str = knob("toolupt", "a row of --list")
    # model and data
    model_name_or_path: str = knob(
        "Qwen/Qwen2.5-7B-Instruct", "ToolUPT section 4.4: 7B to 32B, Llama-3.1-8B"
    )
    trust_remote_code: bool = knob(False, "run Python code that comes with a model folder")
    train_file: list[str] = knob(["toy"], "each toy, bfcl_half or [NAME:]FILE[@ROWS]; docs/data.md")
    eval_file: list[str] = knob([], "likewise; none: toy's test world, or a split of train_file")
    eval_fraction: float = knob(0.02, "share of train_file held out without --eval_file; ours")
    train_fraction: Fraction = knob(1.0, "share of the training data; iTool Figures 1(b), 8, 9")
    reward_file: str = knob("", "a reward of your own (docs/own_reward.md); none: Eqs. 3-12")
    system_prompt: str = knob("", "a template of your own; none: the model's, or Figure 5")
    user_prompt: str = knob("", "likewise, of the user message; none: the model's, or Figure 6")
    allow_thinking: bool = knob(
        False, "cut a <think> block before a response is judged; else prompts ask for none"
    )
    max_prompt_length: Count = knob(8192, "tokens; longer examples are dropped; ToolUPT Table 7")
    max_completion_length: Count = knob(1024, "tokens; ToolUPT Table 7")
    output_dir: str = knob("runs/toolupt", "metrics.jsonl, rollouts.jsonl, checkpoints, pictures")
    seed: int = knob(0, "data order and request seeds are functions of (seed, step)")
    # the step
    train_batch_size: Count = knob(256, "prompts per step over all ranks; ToolUPT Table 7")
    temperature: Positive = knob(1.0, "of the samples; ToolUPT Table 7")
    learning_rate: float = knob(1e-6, "ToolUPT Table 7")
    lr_scheduler_type: Literal["constant", "cosine"] = knob(
        "constant", "of the rate after its warm-up; cosine: it falls to 0; ToolUPT Table 7"
    )
    warmup_ratio: Share = knob(0.0, "share of the steps in which the rate rises; veRL's default")
    weight_decay: NotNegative = knob(0.01, "of matrices only; veRL's default")
    adam_beta2: float = knob(0.999, "veRL's default for actors")
    max_grad_norm: Positive = knob(1.0, "veRL's default; 1e9: none")
    # adapters
    lora_rank: Natural = knob(0, "0: all weights are trained; iTool Appendix B.1: 16")
    lora_alpha: Count = knob(32, "adapters are scaled by alpha / rank; iTool Appendix B.1")
    quant: Literal["none", "4bit"] = knob("none", "4bit: frozen weights in NF4 (QLoRA)")
    # machine
    engine: Literal["vllm", "transformers"] = knob("vllm", "what samples")
    bf16: bool = knob(False, "compute in bfloat16 on a CPU, too, if it has avx512_bf16 or AMX")
    vllm_gpu_memory_utilization: Share = knob(0.0, "vLLM's share of a GPU; 0: what is free")
    vllm_tensor_parallel_size: Count = knob(1, "GPUs that one vLLM model spans")
    offload_moments: bool = knob(False, "keep AdamW's moments in host memory between steps")
    max_num_seqs: Count = knob(256, "responses that the engine decodes at a time, per rank")
    max_tokens_per_row: Count = knob(16384, "budget of a micro-batch; a prompt counts once")
    share_prefix: bool = knob(True, "--no_share_prefix: the naive padded computation, to compare")
    gradient_checkpointing: bool = knob(True, "recompute layers in the backward pass")
    torch_compile: bool = knob(False, "compile layers: minutes at the start, then faster steps")
    # records
    eval_steps: Natural = knob(50, "steps between greedy evaluations; 0: only before and after")
    eval_size: Count = knob(512, "examples of eval_file, a fixed subset")
    save_steps: Count = knob(100, "steps between checkpoints; the last step is always saved")
    save_total_limit: Natural = knob(2, "checkpoints to keep; 0: all")
    resume_from_checkpoint: str = knob("", "latest, or RUN/checkpoint-STEP")
    term_norm_steps: Natural = knob(
        0, "RL: steps between gradient norms of the loss's terms, of one micro-batch; 0: none"
    )
    log_rollouts: bool = knob(True, "write every response with its advantages to rollouts.jsonl")
    max_logp_difference: NotNegative = knob(
        0.0, "mean nats between engine and trainer that stops a run; 0: 1e-3 in fp32, else 0.1"
    )
    report_to: Literal["none", "tensorboard", "wandb"] = knob("none", "beside metrics.jsonl")

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.eval_file and not 0 < self.eval_fraction < 1:
            raise ValueError(
                f"--eval_fraction {self.eval_fraction} leaves no validation data; hold out a share "
                "between 0 and 1, or give --eval_file"
            )
        if self.quant != "none" and self.lora_rank == 0:
            raise ValueError("--quant 4bit trains adapters only: give a --lora_rank, 16 in iTool")

    def flags_without_effect(self) -> dict[str, str]:
        """Knobs that other knobs switch off, and why."""
        why = {"lora_alpha": "all weights are trained; give a --lora_rank too, 16 in iTool"}
        return {} if self.lora_rank else why


ROWS = {**METHODS, "itool": ItoolConfig}
ROUNDS = 10  # of dynamic sampling before a step gives up, as in DAPO's script


# --------------------------------------------------------------------------------------- the loops


def run_rl(config: Config, method: Rollouts, run: Run) -> None:
    """Reinforcement learning: every row with rollouts."""
    with run.progress(method.max_steps) as bar:
        for step in range(run.first_step, method.max_steps):
            run.stop_if_asked(step)
            clock = Clock()

            # 1 sample a batch, 2 roll out, 3 reward
            groups, sampling = sample_groups(config, method, run, step, clock)
            run.stop_if_asked(step)

            # 4 advantage
            with clock("advantage"):
                for group in groups:
                    group.advantages = method.advantages(group)

            # 5 loss: forward and backward, all denominators counted over the whole step
            run.engine.sleep()
            totals, stats, norms = count_tokens(config, run, groups), {}, {}
            if config.term_norm_steps and step % config.term_norm_steps == 0:
                with clock("term_norms"):
                    norms = term_norms(config, method, run.model, groups, totals)
            with clock("update"):
                for micro in micro_batches(config, groups):
                    logps, entropy, mask = forward(config, run.model, micro, config.temperature)
                    rows = rows_of(micro, mask)
                    loss, parts = method.loss(rows, logps, entropy, totals, step)
                    loss.backward()
                    add(stats, parts)
                    keep_logps(micro, logps)
                stats = all_sum(stats) | logp_difference(groups)
            if config.log_rollouts:
                with clock("records"):
                    run.records.log_rollouts(step + 1, groups)
            guard.check_engine(config, stats["sampling/sampling_logp_difference/mean"], step + 1)

            # 6 optimiser step
            with clock("update"):
                lr = learning_rate_at(config, step, method.max_steps, config.learning_rate)
                stats |= run.optimizer_step(lr, stats["loss"], groups)

            # 7 weight sync
            with clock("sync"):
                sync(run)

            read = totals["tokens"] + totals["expert_tokens"] + totals["prompt_tokens"]
            metrics = rollout_metrics(groups, method.alignment) | sampling | norms | stats
            metrics |= method.schedule(step)
            last = step + 1 == method.max_steps
            if run.evaluation_is_due(step, last):
                with clock("evaluate"):
                    metrics |= evaluate(config, run)
            run.end_step(bar, step, metrics | clock.metrics(read), last)


def run_sft(config: Config, method: Row, run: Run) -> Path:
    """Supervised fine-tuning (Eq. 1): in one stage, or from easy to hard (iTool section 3.1).

    Each stage has examples, a schedule and an optimiser state of its own. Returns the folder of the
    checkpoint with the lowest validation loss.
    """
    if isinstance(method, ItoolConfig):
        stages = warmup_stages(config, method, run)
    else:
        stages = [start.Stage("sft", run.examples, method.max_steps, config.learning_rate)]
    best = Path(config.output_dir) / "checkpoint-best"
    best_loss = min(run.records.history("eval/loss"), default=math.inf)
    end = 0  # of the stage
    with run.progress(sum(stage.steps for stage in stages)) as bar:
        for number, stage in enumerate(stages, 1):
            begin, end = end, end + stage.steps
            for step in range(max(begin, run.first_step), end):
                run.stop_if_asked(step)
                clock = Clock()
                if step == begin:
                    run.optimizer.state.clear()

                # 1 sample a batch
                drawn = run.batch(step - begin, stage.examples)
                batch = [run.demonstration(example) for _, example in drawn]

                # 2 loss
                run.engine.sleep()
                totals = count_tokens(config, run, batch)
                with clock("update"):
                    metrics = imitate(config, run, batch, totals)

                    # 3 optimiser step
                    lr = learning_rate_at(config, step - begin, stage.steps, stage.learning_rate)
                    metrics |= run.optimizer_step(lr, metrics["loss"], batch)

                # 4 validation
                if len(stages) > 1:
                    metrics["stage"] = number
                last = step + 1 == end
                if run.evaluation_is_due(step, last):
                    with clock("sync"):
                        sync(run)
                    with clock("evaluate"):
                        metrics |= evaluate(config, run)
                        run.engine.sleep()
                        metrics["eval/loss"] = validation_loss(config, run)
                metrics |= clock.metrics(totals["expert_tokens"] + totals["prompt_tokens"])
                if better := metrics.get("eval/loss", math.inf) < best_loss:
                    best_loss = metrics["eval/loss"]
                run.end_step(bar, step, metrics, last, better, stage=stage.name)
    if best_loss == math.inf:
        why = f"SFT had no finite validation loss after step {run.first_step}"
        raise ValueError(f"{why}: lower its learning rate, or resume from an earlier step")
    return best


# -------------------------------------------------------------------------------- the steps' parts


def sample_groups(
    config: Config, method: Rollouts, run: Run, step: int, clock: Clock
) -> tuple[list[Group], dict[str, float]]:
    """This rank's rewarded groups of a step, train_batch_size over all ranks; and metrics.

    A row that keeps only some groups (DAPO's dynamic sampling) samples round after round until
    enough are kept; they are pooled across ranks and any surplus is dropped. A step has ten batches
    of prompts to itself and skips those it does not need, so epochs are uneven.
    """

    def rewarded(batch: list) -> list[Group]:
        with clock("rollout"):
            groups = roll_out(config, method, run, batch)
        with clock("reward"):
            for group in groups:
                score(method, group, run.reward)
        return groups

    if not method.keep:
        return rewarded(run.batch(step)), {"rounds": 1, "frac_groups_kept": 1.0}
    size, kept = config.train_batch_size * method.generation_batches, []
    for rounds in range(1, ROUNDS + 1):
        kept += filter(method.keep, rewarded(run.batch(step * ROUNDS + rounds - 1, size=size)))
        count = int(all_sum({"groups": len(kept)})["groups"])
        if count >= config.train_batch_size:
            pool = sorted(all_gather(kept), key=lambda group: group.place)
            groups = part(pool[: config.train_batch_size], tokens_of, run.rank, run.world)
            return groups, {"rounds": rounds, "frac_groups_kept": count / (size * rounds)}
    raise ValueError(
        f"dynamic sampling: {ROUNDS} rounds gave {count} prompts whose rewards differ, of "
        f"{config.train_batch_size}; the data is too easy or too hard for this model: mix it, "
        "raise --generation_batches, or use --algo dapo_star"
    )


def roll_out(config: Config, method: Rollouts, run: Run, batch: list) -> list[Group]:
    """Sample K responses for each (place, example); request seeds depend on (seed, place) only."""
    groups = []
    for place, example in batch:
        expert = run.demonstration(example)
        group = Group(
            example,
            expert.prompt,
            expert.target,
            max_length=config.max_completion_length,
            with_expert=method.learns_from_expert,
            seed=random.Random(f"{config.seed}/{place}").getrandbits(62),
            place=place,
            num_thoughts=len(data.no_thoughts(run.tokenizer)),
        )
        groups.append(group)
    samples = run.engine.generate(
        [group.prompt for group in groups],
        n=method.num_generations,
        temperature=config.temperature,
        max_tokens=config.max_completion_length,
        seeds=[group.seed for group in groups],
        progress=run.counts("rollouts"),
    )
    for group, group.samples in zip(groups, samples, strict=True):
        for sample in group.samples:
            guard.check_sample(run.tokenizer, run.stop_ids, sample)
    return groups


def count_tokens(config: Config, run: Run, batch: list) -> dict[str, int]:
    """The denominators of a step, over all micro-batches and ranks, and two lengths in tokens."""
    rollouts = [s.token_ids for x in batch if isinstance(x, Group) for s in x.samples]
    experts = [x.target for x in batch if not isinstance(x, Group) or x.with_expert]
    own = {
        "tokens": sum(map(len, rollouts)),
        "responses": len(rollouts),
        "expert_tokens": sum(map(len, experts)),
        "prompt_tokens": sum(len(x.prompt) for x in batch),
    }
    totals = {name: int(total) for name, total in all_sum(own).items()}
    return totals | {"max_length": config.max_completion_length, "tag_length": run.tag_length}


def imitate(
    config: Config, run: Run, batch: list, totals: dict[str, int], train: bool = True
) -> dict[str, float]:
    """Backward passes of a batch of demonstrations (Eq. 1); returns its loss and stats.

    train  False: only the stats
    """
    stats = {}
    with torch.set_grad_enabled(train):
        for micro in micro_batches(config, batch):
            logps, entropy, mask = forward(config, run.model, micro, temperature=1.0)
            loss, parts = Sft().loss(Rows(mask), logps, entropy, totals, step=0)
            add(stats, parts)
            if train:
                loss.backward()
    return all_sum(stats)


def validation_loss(config: Config, run: Run) -> float:
    """Token-mean loss (Eq. 1) on the evaluation subset."""
    mine = part(run.eval_examples, data.characters, run.rank, run.world)
    batch = [run.demonstration(example) for example in mine]
    totals = count_tokens(config, run, batch)
    return imitate(config, run, batch, totals, train=False)["loss"]


# ------------------------------------------------------------------------------------- the program


def train(config: Config, method: Row, engine: rollout.Engine | None = None) -> Run:
    """Run the stages of a method and return the last Run; `engine` is that of an earlier one.

    A second stage starts from the best checkpoint of the first, with a fresh optimiser.
    """
    start.check_machine(config, dist.get_world_size())
    if dist.get_rank() == 0:
        print(start.announce(config, method, dist.get_world_size()), flush=True)
    stages = stages_of(config, method)
    for own, row, _ in stages:  # a mistake in the second must not cost the hours of the first
        checkpoint.refuse_earlier_run(start.settings(own, row))
    best, earlier = None, 0
    for own, row, loop in stages:
        run = None  # free its model and moments before the next ones are loaded
        gc.collect()
        torch.cuda.empty_cache()
        own = replace(own, model_name_or_path=str(best)) if best else own
        later = None if engine else stages[1:]
        run, clock = Run(own, row, config, earlier, later), Clock()
        with clock("load"):
            run.load(engine)
        guard.check_logps(run)
        starts = run.first_step == 0
        before = starting_point(run) if starts and isinstance(row, Rollouts) else {}
        with clock("sync"), guard.canary(run):
            sync(run)
        if starts:
            with clock("evaluate"):
                before |= evaluate(run.config, run)
            run.records.log(-1, before | clock.metrics())
            n, accuracy = len(run.eval_examples), before["eval/accuracy"]
            run.say(f"before training: {accuracy:.1%} right on {n} held-out examples")
        best, engine = loop(run.config, row, run), run.engine
        if loop is not stages[-1][2]:  # asked to stop in the last step of the first stage
            run.stop_if_asked(run.saved)
        run.close()
        earlier = len(run.records.history("step"))  # a line for each step, and for step 0
    return run


def stages_of(config: Config, method: Row) -> list[tuple[Config, Row, Callable]]:
    """The one or two stages of a method, each with its settings, row and loop."""
    if isinstance(method, ItoolConfig):
        loop = run_sft if method.stages == "warmup" else run_itool
    else:
        loop = run_sft if isinstance(method, Sft) else run_rl
    if isinstance(method, AfterSft):
        name = "sft"
        row, changed = method.first_stage()
    elif isinstance(method, ItoolConfig) and method.stages == "both":
        name = "warmup"
        row = method
        changed = {"quant": "none"}  # Appendix B.1: LoRA in the warm-up, QLoRA after it
    else:
        return [(config, method, loop)]
    own = checkpoint.of_stages(config.resume_from_checkpoint, Path(config.output_dir), name)
    first, last = (replace(config, resume_from_checkpoint=path) for path in own)
    first = replace(first, output_dir=f"{config.output_dir}/{name}", **changed)
    return [(first, row, run_sft), (last, method, loop)]


def parse_args(argv: list[str]) -> tuple[Config, Row]:
    """The common knobs and those of the row that --algo names."""
    if "--list" in argv:
        print(start.table(ROWS, Rollouts))
        sys.exit(0)
    return start.parse(argv, Config, ROWS)


def main(argv: list[str] | None = None) -> None:
    """The command line; `start.leave` lists the exit codes."""
    config, method = parse_args(sys.argv[1:] if argv is None else argv)
    start.init_distributed()
    try:
        run = train(config, method)
        if run.rank == 0:
            print(show.summary(run.out, run.tokenizer))
    except BaseException as error:  # noqa: BLE001 - nothing may leave a rank waiting
        start.leave(error)


if __name__ == "__main__":
    if {"--list", "--help", "-h"} & {*sys.argv}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
    start.end()
