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
    3 reward            verifiable outcome in [-3, 4] (Eqs. 3-12)
    4 advantage         per group (Eq. 2) or per token (Eqs. 13-17)
    5 loss              forward and backward over micro-batches, each prompt read once (Eqs. 18-23)
    6 optimiser step    AdamW on fp32 master weights
    7 weight sync       the new weights go to vLLM

Ranks share the prompts of a step. Every denominator is counted over all micro-batches and ranks
before the first backward pass, and gradients are summed: the result does not depend on the split.

Where the papers are silent:
1. Examples that are too long are dropped and counted, never cut. A response cut at the limit is
   scored like any other text.
2. train_batch_size counts prompts, which Table 7 leaves open: 600 steps of 256 are then about two
   epochs of Table 6's 80,119 examples, as the text says (recipes/table6.args draws that sample).
3. A step of dynamic sampling has ten batches of prompts to itself and reads as many as it needs,
   so a run does not pass through its data in even epochs.
"""

import gc
import math
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import checkpoint
import data
import guard
import model as modeling
import rollout
import scoring
import start
from itool import ItoolConfig, run_itool, warmup_stages
from methods import (
    METHODS,
    AfterSft,
    Count,
    Fraction,
    Group,
    Positive,
    Rollouts,
    Row,
    Rows,
    Sft,
    Share,
    check_bounds,
    knob,
    rows_of,
)
from metrics import rollout_metrics, starting_point, term_norms
from run import (
    Clock,
    Run,
    Stage,
    add,
    all_gather,
    all_sum,
    evaluate,
    forward,
    learning_rate_at,
    micro_batches,
    over_ranks,
    part,
    sync,
    tokens_of,
)
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
    weight_decay: float = knob(0.01, "of matrices only; veRL's default")
    adam_beta2: float = knob(0.999, "veRL's default for actors")
    max_grad_norm: float = knob(1.0, "veRL's default")
    # adapters
    lora_rank: int = knob(0, "0: all weights are trained; iTool Appendix B.1: 16")
    lora_alpha: int = knob(32, "adapters are scaled by alpha / rank; iTool Appendix B.1")
    quant: Literal["none", "4bit"] = knob("none", "4bit: frozen weights in NF4 (QLoRA)")
    # machine
    engine: Literal["vllm", "transformers"] = knob("vllm", "what samples")
    bf16: bool = knob(
        False, "bfloat16 products on a CPU with avx512_bf16 or AMX; on a GPU they always are"
    )
    vllm_gpu_memory_utilization: float = knob(0.0, "vLLM's share of a GPU; 0: what is free")
    vllm_tensor_parallel_size: int = knob(1, "GPUs that one vLLM model spans")
    offload_moments: bool = knob(False, "keep AdamW's moments in host memory between steps")
    max_num_seqs: int = knob(256, "responses that the engine decodes at a time, per rank")
    max_tokens_per_row: Count = knob(16384, "budget of a micro-batch; a prompt counts once")
    share_prefix: bool = knob(True, "--no_share_prefix: the naive padded computation, to compare")
    gradient_checkpointing: bool = knob(True, "recompute layers in the backward pass")
    torch_compile: bool = knob(False, "compile layers: minutes at the start, then faster steps")
    # records
    eval_steps: int = knob(50, "steps between greedy evaluations; 0: only before and after")
    eval_size: Count = knob(512, "examples of eval_file, a fixed subset")
    save_steps: Count = knob(100, "steps between checkpoints; the last step is always saved")
    save_total_limit: int = knob(2, "checkpoints to keep; 0: all")
    resume_from_checkpoint: str = knob("", "latest, or RUN/checkpoint-STEP")
    term_norm_steps: Annotated[int, ">= 0"] = knob(
        0, "steps between gradient norms of the loss's terms, of one micro-batch; 0: none"
    )
    log_rollouts: bool = knob(True, "write every response with its advantages to rollouts.jsonl")
    max_logp_difference: Annotated[float, ">= 0"] = knob(
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
                    add(stats, {**parts, **sampling_difference(rows, logps, totals)})
                    keep_logps(micro, logps)
                stats = over_ranks(stats)
            if config.log_rollouts:
                with clock("records"):
                    run.records.log_rollouts(step + 1, groups)
            guard.check_engine(config, stats["sampling/sampling_logp_difference/mean"], step + 1)

            # 6 optimiser step
            with clock("update"):
                lr = learning_rate_at(config, step, method.max_steps, config.learning_rate)
                grad_norm = float(modeling.clip_grad_norm(run.model, config.max_grad_norm))
                skipped = run.optimizer_step(lr, stats["loss"], grad_norm, groups)

            # 7 weight sync
            with clock("sync"):
                sync(run)

            read = totals["tokens"] + totals["expert_tokens"] + totals["prompt_tokens"]
            metrics = {
                **rollout_metrics(groups, "lcs" if method.alignment == "lcs" else "positional"),
                **stats,
                **sampling,
            }
            metrics |= {**norms, **method.schedule(step)}
            metrics |= {"grad_norm": grad_norm, "learning_rate": lr, "skipped": skipped}
            last = step + 1 == method.max_steps
            if run.evaluation_is_due(step, last):
                with clock("evaluate"):
                    metrics |= evaluate(config, run)
            metrics |= clock.metrics(read)
            run.end_step(bar, step, metrics, last)


def run_sft(config: Config, method: Sft, run: Run, stages: list[Stage]) -> Path:
    """Supervised fine-tuning (Eq. 1), stage by stage.

    Returns the folder of the checkpoint with the lowest validation loss.
    """
    best, best_loss = Path(config.output_dir) / "checkpoint-best", run.lowest("eval/loss")
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
                examples = [example for _, example in run.batch(step - begin, stage.examples)]
                batch = [run.demonstration(example) for example in examples]

                # 2 loss
                run.engine.sleep()
                totals, stats = count_tokens(config, run, batch), {}
                with clock("update"):
                    for micro in micro_batches(config, batch):
                        logps, entropy, mask = forward(config, run.model, micro, temperature=1.0)
                        loss, parts = method.loss(Rows(mask), logps, entropy, totals, step)
                        loss.backward()
                        add(stats, parts)
                    stats = over_ranks(stats)

                    # 3 optimiser step
                    lr = learning_rate_at(config, step - begin, stage.steps, stage.learning_rate)
                    grad_norm = float(modeling.clip_grad_norm(run.model, config.max_grad_norm))
                    skipped = run.optimizer_step(lr, stats["loss"], grad_norm, batch)

                # 4 validation
                metrics = {**stats, "grad_norm": grad_norm, "learning_rate": lr, "skipped": skipped}
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
                if metrics.get("eval/loss", math.inf) < best_loss:
                    best_loss = metrics["eval/loss"]
                    run.save_best(step + 1)
                run.end_step(bar, step, metrics, last, stage=stage.name)
    if best_loss == math.inf:
        raise ValueError("SFT had no finite validation loss: lower the learning rate")
    return best


# -------------------------------------------------------------------------------- the steps' parts


def sample_groups(
    config: Config, method: Rollouts, run: Run, step: int, clock: Clock
) -> tuple[list[Group], dict[str, float]]:
    """This rank's rewarded groups of a step, train_batch_size over all ranks; and metrics.

    A row that keeps only some groups (DAPO's dynamic sampling) samples round after round until
    enough are kept; they are pooled across ranks and any surplus is dropped. Its prompts are not
    those of the other rows: a step has ten batches of them to itself and mostly skips the rest.
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
    for rounds in range(ROUNDS):
        kept += filter(method.keep, rewarded(run.batch(step * ROUNDS + rounds, size=size)))
        count = int(all_sum({"groups": len(kept)})["groups"])
        if count >= config.train_batch_size:
            pool = sorted(all_gather(kept), key=lambda group: group.place)
            groups = part(pool[: config.train_batch_size], tokens_of, run.rank, run.world)
            share = count / (size * (rounds + 1))
            return groups, {"rounds": rounds + 1, "frac_groups_kept": share}
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
            tokenizer=run.tokenizer,
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


def score(method: Rollouts, group: Group, reward: scoring.Reward) -> None:
    """Fill a group's outcomes (Eqs. 3-12) and the rewards its advantages are made of."""
    group.bounds = reward.minimum, reward.maximum
    group.outcomes = [reward.score(sample.text, group.example) for sample in group.samples]
    if group.with_expert:
        group.expert_outcome = reward.score(group.example.target, group.example)
    group.rewards = [
        method.reward(outcome, len(sample.token_ids), group.max_length)
        for outcome, sample in zip(group.outcomes, group.samples)
    ]


def count_tokens(config: Config, run: Run, batch: list) -> dict[str, int]:
    """The denominators of a step, over all micro-batches and ranks, and two lengths in tokens."""
    rollouts = [s.token_ids for x in batch if isinstance(x, Group) for s in x.samples]
    experts = [x for x in batch if not isinstance(x, Group) or x.with_expert]
    longest = {"answer": run.tag_length}  # of what Eq. 19 keeps
    sums = all_sum(
        {
            "tokens": sum(map(len, rollouts)),
            "responses": len(rollouts),
            "expert_tokens": sum(len(x.target) for x in experts),
            "kept_tokens": sum(len(x.target[: longest.get(x.example.kind)]) for x in experts),
            "prompt_tokens": sum(len(x.prompt) for x in batch),
        }
    )
    lengths = {"max_length": config.max_completion_length, "tag_length": run.tag_length}
    return {**{name: int(value) for name, value in sums.items()}, **lengths}


def keep_logps(micro: list[Group], logps: Tensor) -> None:
    """Store the trainer's log-probs of each group's rollouts, for rollouts.jsonl."""
    rows = logps.detach().float().cpu().split([len(group.responses) for group in micro])
    for group, own in zip(micro, rows):
        group.logps = own[: len(group.samples)]


def sampling_difference(rows: Rows, logps: Tensor, totals: dict[str, int]) -> dict[str, Tensor]:
    """|trainer - engine| in nats over the rollout tokens of the step: the mean and the largest."""
    rollouts = rows.mask & ~rows.is_expert[:, None]
    apart = torch.where(rollouts, (logps.detach() - rows.sampler_logps).abs(), 0.0)
    name = "sampling/sampling_logp_difference"
    largest = apart.max() if apart.numel() else 0.0
    return {f"{name}/mean": apart.sum() / totals["tokens"], f"{name}/max": largest}


def validation_loss(config: Config, run: Run) -> float:
    """Token-mean loss (Eq. 1) on the evaluation subset."""
    mine = part(run.eval_examples, data.characters, run.rank, run.world)
    batch = [run.demonstration(example) for example in mine]
    totals, stats = count_tokens(config, run, batch), {}
    with torch.no_grad():
        for micro in micro_batches(config, batch):
            logps, entropy, mask = forward(config, run.model, micro, temperature=1.0)
            add(stats, Sft().loss(Rows(mask), logps, entropy, totals, step=0)[1])
    return over_ranks(stats)["loss"]


# ------------------------------------------------------------------------------------- the program


def train(config: Config, method: Row, engine: rollout.Engine | None = None) -> Run:
    """Run the stages of a method and return the last one; `engine` is that of an earlier run.

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
        own = replace(own, model_name_or_path=str(best)) if best else own
        run, clock = Run(own, row, config, earlier), Clock()
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
        run.close()
        earlier = len(run.records.history("step"))  # a line for each step, and for step 0
        if loop is not stages[-1][-1]:  # free model and moments before the next ones are loaded
            del run
            gc.collect()
            torch.cuda.empty_cache()
    return run


def stages_of(config: Config, method: Row) -> list[tuple[Config, Row, Callable]]:
    """The one or two stages of a method, each with its settings, row and loop."""
    if isinstance(method, ItoolConfig):
        loops = {"warmup": warm_up, "itool": run_itool}
        names = [*loops] if method.stages == "both" else [method.stages]
        first = names[0], method, {"quant": "none"}  # Appendix B.1: LoRA here, QLoRA after it
    elif isinstance(method, AfterSft):
        loops, names = {"sft": imitate, "rl": run_rl}, ["sft", "rl"]
        first = "sft", *method.first_stage()
    else:
        return [(config, method, imitate if isinstance(method, Sft) else run_rl)]
    last = config, method, loops[names[-1]]
    if len(names) == 1:
        return [last]
    name, row, changed = first
    first = replace(config, output_dir=f"{config.output_dir}/{name}", **changed)
    where = config.resume_from_checkpoint  # a path belongs to the stage whose folder holds it
    if where not in ("", "latest"):
        in_last = Path(where).resolve().parent == Path(config.output_dir).resolve()
        first = replace(first, resume_from_checkpoint="latest" if in_last else where)
        last = replace(config, resume_from_checkpoint=where if in_last else ""), *last[1:]
    return [(first, row, loops[name]), last]


def imitate(config: Config, method: Sft, run: Run) -> Path:
    """SFT on all training examples."""
    stage = Stage("sft", run.examples, method.max_steps, config.learning_rate)
    return run_sft(config, method, run, [stage])


def warm_up(config: Config, method: ItoolConfig, run: Run) -> Path:
    """iTool's SFT from easy to hard (section 3.1)."""
    return run_sft(config, Sft(), run, warmup_stages(config, method, run))


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
