"""Post-train a language model for tool use: ToolUPT, the rows it is compared with, their ablations, and iTool.

    torchrun --nproc_per_node=8 train.py --algo toolupt --train_file xlam:xlam.json toolace:data.json ...
    torchrun --nproc_per_node=2 train.py --algo toolupt @recipes/demo.args     the embedded toy world, on a laptop
    torchrun --nproc_per_node=8 train.py --algo itool --train_file toolace:data.json ...
    python train.py --list                      the methods, one row each
    python train.py audit RUN                   recompute what a run was trained on from its rollouts.jsonl
    python train.py show RUN --step N           responses of a step, tokens coloured by advantage

One file, top to bottom: the knobs (Config), the methods (PRESETS), the three loops (run_rl, run_sft, run_itool), the losses
of a micro-batch (policy_loss, preference_loss), then the parts they name. The mathematics lies in grpo.py, fgae.py, spo.py,
baselines.py, mcts.py and simpo.py.

run_rl, one step:
    1 sample a batch    prompts are a function of (seed, step)
    2 roll out          K responses per prompt from vLLM
    3 reward            verifiable outcome in [-3, 4] (Eqs. 3-12)
    4 advantage         per group (Eq. 2) or per token (Eqs. 13-17)
    5 loss              forward and backward over micro-batches, each prompt read once (Eqs. 18-23)
    6 optimiser step    AdamW on fp32 master weights
    7 weight sync       the new weights go to vLLM

run_itool, one iteration, after an easy-to-hard warm-up (run_sft):
    1 replay buffer     the examples of highest perplexity (iTool Eq. 4)
    2 search            a tree of fragments for each, by the policy itself (Eqs. 5-9)
    3 pairs             best against worst step of each state (Appendix B.1)
    4 optimise          SimPO on the steps (Eqs. 10, 11), or DPO, IPO, ORPO
    5 weight sync       the policy of the next iteration

Ranks split the prompts of a step. Every denominator is counted over all micro-batches and ranks before the first
backward pass, and gradients are summed, so the result does not depend on the split.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from inspect import getsource
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

import baselines
import data
import eval as evaluation
import fgae
import grpo
import itool
import mcts
import model as modeling
import packing
import report
import rewards
import rollout
import simpo
import spo
from run import Clock, Interrupted, Run, check, refuse_earlier_run


# fmt: off
@dataclass
class Config:
    """Every knob, its unit and its source. Order of precedence: this default, PRESETS[algo], command line."""

    algo: str = "toolupt"  # a row of PRESETS
    # model and data
    model_name_or_path: str = "Qwen/Qwen2.5-7B-Instruct"  # ToolUPT section 4.4: 7B to 32B, Llama-3.1-8B
    trust_remote_code: bool = False  # run Python code that comes with a model folder
    train_file: list[str] = field(default_factory=lambda: ["toy"])  # NAME, FILE or NAME:FILE each (data.py)
    eval_file: list[str] = field(default_factory=list)  # likewise; empty: toy's test world, or a split of train_file
    eval_fraction: float = 0.02  # ours: share of train_file held out when eval_file is empty
    max_prompt_length: int = 8192  # tokens; ToolUPT Table 7; longer examples are dropped and counted
    max_completion_length: int = 1024  # tokens; ToolUPT Table 7
    output_dir: str = "runs/toolupt"  # metrics.jsonl, rollouts.jsonl, checkpoints, pictures
    seed: int = 0  # data order and request seeds are functions of (seed, step)
    # the step
    max_steps: int = 600  # optimiser steps; ToolUPT Table 7
    train_batch_size: int = 256  # prompts per step over all ranks; ToolUPT Table 7 (README, choice 24)
    num_generations: int = 8  # sampled responses per prompt; ToolUPT Table 7
    temperature: float = 1.0  # ToolUPT Table 7
    learning_rate: float = 1e-6  # ToolUPT Table 7
    lr_scheduler_type: str = "constant"  # constant | cosine (to 0); ToolUPT Table 7
    warmup_ratio: float = 0.0  # share of max_steps with a linearly rising rate; veRL's default
    weight_decay: float = 0.01  # veRL's default, on matrices only
    adam_beta2: float = 0.999  # veRL's default for actors
    max_grad_norm: float = 1.0  # veRL's default
    entropy_coef: float = 3e-4  # ToolUPT Table 7; added outside the mix of Eq. 23 (README, choice 14)
    # the method: what the rows of PRESETS differ in
    stages: str = "rl"  # rl | sft | sft,rl | itool | warmup,itool
    reward: str = "outcome"  # outcome: Eq. 12 in [-3, 4]; binary: 1 when completely right
    advantage: str = "fgae"  # fgae: per token, Eqs. 13-17; group: per response, Eq. 2; luffy: per response, no std
    loss: str = "dapo"  # grpo: sequence mean, Eq. 2; dapo: token mean, Eq. 18; luffy | srft | chord: baselines.py
    expert: str = "spo"  # none; spo: Eq. 22; sft: Eq. 1; group: the expert is one more row of the group
    balance: str = "cycle"  # weight of the expert loss: cycle (Eq. 23), decay (CHORD-mu; both below) or a number
    clip_low: float = 0.2  # DAPO section 4.1; no effect on-policy
    clip_high: float = 0.28  # DAPO section 4.1; no effect on-policy
    dynamic_sampling: bool = False  # DAPO: replace groups whose rewards are all equal
    generation_batches: int = 1  # batches sampled per round of dynamic sampling; DAPO's script: 3
    overlong: float = 0.0  # last share of max_completion_length in which DAPO's length penalty rises to -1; 0: none
    # details of the method
    alignment: str = "positional"  # fgae: positional | lcs (README, choice 6)
    spo_beta: float = 1.0  # ours: the paper gives no value (README, choice 11)
    balance_low: float = 0.02  # ours, as the next three: the paper gives no values (README, choice 12)
    balance_high: float = 0.3
    balance_up: int = 100  # steps; cycle: low -> high; decay: 0 -> high
    balance_down: int = 200  # steps; cycle: high -> low, in a line; decay: in a cosine, and low from there on
    srft_variant: str = "paper"  # paper | hpt, its public re-implementation
    srft_shaped: bool = False  # p/(p+0.1) for p in SRFT's expert term, as both public codes run
    chord_phi: bool = True  # --no_chord_phi: CHORD-mu, plain SFT with a decaying --balance
    tis_cap: float = 0.0  # truncated importance sampling, 2 is usual; 0: off, as in the paper
    # two-stage rows: the SFT stage in front; its schedule is the row sft's
    sft_max_steps: int = 3000  # ToolUPT Table 7
    sft_learning_rate: float = 1e-5  # ToolUPT Table 7
    # adapters
    lora_rank: int = 0  # 0: all weights are trained; iTool Appendix B.1: 16
    lora_alpha: int = 32  # iTool Appendix B.1
    quant: str = "none"  # none | 4bit: frozen weights in NF4 (QLoRA); iTool's is 4bit, for want of memory
    # iTool's warm-up
    warmup: bool = True  # --no_warmup: --split none for it (Table 3, w/o warm-up); --stages itool: no SFT at all
    split: str = "difficulty"  # stages: difficulty (section 3.1) | even (three equal parts) | none (one: base SFT)
    warmup_learning_rates: list[float] = field(default_factory=lambda: [5e-5, 2e-5, 1e-5])  # easy (and base SFT), medium, hard; Table 6
    warmup_epochs: int = 3  # per stage; Table 6
    # iTool's replay buffer, search and preference optimisation
    iterations: int = 3  # Figure 7: best at about three
    pool_fraction: float = 0.5  # random share of the training examples; section 4.1
    buffer_fraction: float = 0.1  # of the pool, of highest perplexity; section 3.2
    buffer_rank: str = "stratified"  # stratified: calls and answers ranked apart (README, iTool's choice 6) | global
    mcts: bool = True  # --no_mcts: best and worst of four samples, no search (Figure 6)
    mcts_depth: int = 3  # fragments per path, the last one free; Table 7
    mcts_width: int = 3  # children per node; Table 7
    mcts_simulation: int = 2  # roll-out steps after an expansion; Table 7
    mcts_iterations: int = 5  # select-expand-backup rounds per tree; Table 7
    mcts_c: float = 1.0  # exploration; Table 7
    mcts_discount: float = 1.0  # gamma of Eq. 9; Xie et al.: the paper gives no value
    max_similarity: float = 0.95  # Appendix B.1, as the next two
    min_gap: float = 0.1
    min_q: float = 0.3
    top_p: float = 1.0  # of the search's samples
    self_evaluation: str = "paper"  # paper: Table 10 | cache: its fixed text first, cheaper | none: outcome only
    preference: str = "simpo"  # simpo | dpo | ipo | orpo
    preference_epochs: int = 2  # per iteration; Table 6
    simpo_beta: float = 2.5  # Table 9, as the next five
    simpo_margin: float = 0.5
    dpo_beta: float = 0.1
    ipo_tau: float = 0.1
    ipo_mean: bool = False  # mean over tokens, as TRL; Table 9 prints sums
    orpo_lam: float = 0.1
    held_out_pairs: float = 0.1  # ours: share of trees whose pairs are measured, not trained on
    # machine
    engine: str = "vllm"  # vllm | transformers
    vllm_gpu_memory_utilization: float = 0.5  # share of a GPU's memory for vLLM's weights and KV cache
    vllm_tensor_parallel_size: int = 1
    max_num_seqs: int = 256  # responses that vLLM decodes together, per rank
    max_tokens_per_row: int = 16384  # budget of a micro-batch: prompts counted once (packing.py)
    share_prefix: bool = True  # --no_share_prefix: the naive padded computation, for checking
    gradient_checkpointing: bool = True  # recompute layers in the backward pass
    torch_compile: bool = False  # compile layers: a minute or two at the start, then faster steps
    # records
    eval_steps: int = 50  # steps between greedy evaluations; 0: only before and after
    eval_size: int = 512  # examples of eval_file, a fixed subset
    save_steps: int = 100  # steps between checkpoints; the last step is always saved
    save_total_limit: int = 2  # older checkpoints are deleted; 0: keep all
    resume_from_checkpoint: str = ""  # latest, or RUN/checkpoint-STEP: go on with its step, weights and optimiser
    log_rollouts: bool = True  # write every response with its rewards and advantages to rollouts.jsonl
    max_logp_difference: float = 0.0  # nat; engine and trainer further apart on average: the run stops; 0: 1e-3 in float32, else 0.1
    report_to: str = "none"  # none | tensorboard | wandb, beside metrics.jsonl
# fmt: on


# ToolUPT's Table 1 and Figure 4. A row says what differs from Config's defaults, which are the row `toolupt`.
_DAPO_STAR = {"advantage": "group", "expert": "none"}
_SFT = {
    "max_steps": 3000,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "adam_beta2": 0.95,
}
PRESETS = {
    "sft": {"stages": "sft", **_SFT},
    "grpo": {**_DAPO_STAR, "reward": "binary", "loss": "grpo", "clip_high": 0.2},
    "dapo": {**_DAPO_STAR, "dynamic_sampling": True, "overlong": 0.25},
    "dapo_star": _DAPO_STAR,
    "fg_dapo_star": {"expert": "none"},
    "sft_dapo_star": {"stages": "sft,rl", **_DAPO_STAR},
    "sft_fg_dapo_star": {"stages": "sft,rl", "expert": "none"},
    "luffy": {"advantage": "luffy", "loss": "luffy", "expert": "group", "num_generations": 7},
    "srft": {"reward": "binary", "advantage": "group", "loss": "srft", "expert": "group", "num_generations": 7},
    "chord": {"reward": "binary", "advantage": "group", "loss": "chord", "expert": "sft", "balance": "0.1"},
    "toolupt": {},
    "toolupt_no_fgae": {"advantage": "group"},
    "toolupt_no_spo": {"expert": "sft"},
    "itool": {
        "stages": "warmup,itool", "expert": "none", "advantage": "group", "lora_rank": 16,
        "model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct", "eval_fraction": 0.1, "seed": 42,
        "train_batch_size": 64, "temperature": 1.5, "max_completion_length": 512, "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.0, "entropy_coef": 0.0,
        "save_total_limit": 0,
    },
}  # fmt: skip
TABLE_9 = {"simpo": 1e-6, "dpo": 3e-7, "ipo": 1e-6, "orpo": 3e-7}  # iTool's learning rates
# Where the values come from: "KNOB VALUE", or "ROW KNOB VALUE" where rows have different grounds. `--list` prints it.
SOURCES = {
    "stages sft": "ToolUPT 4.3: the best checkpoint by validation",
    "stages sft,rl": "ToolUPT 4.3: SFT, then RL from it",
    "max_steps 3000": "ToolUPT Table 7",
    "learning_rate 1e-05": "ToolUPT Table 7",
    "lr_scheduler_type cosine": "ToolUPT Table 7",
    "warmup_ratio 0.1": "veRL's SFT trainer, whose defaults Table 7 repeats",
    "adam_beta2 0.95": "veRL's SFT trainer",
    "advantage group": "Eq. 2, with Bessel's std as in veRL",
    "toolupt_no_fgae advantage group": "ToolUPT 5.2, ablation I: sequence-level advantage and outcome reward",
    "expert none": "ToolUPT 4.3: rollouts only",
    "grpo reward binary": "ToolUPT 4.3: 0/1 reward",
    "loss grpo": "Eq. 2: mean over responses of the mean over their tokens; veRL: over tokens",
    "clip_high 0.2": "Eq. 2: one range on both sides; PPO's 0.2",
    "dynamic_sampling True": "DAPO 3.2; at most ten rounds: its script",
    "overlong 0.25": "DAPO 3.4, whose 4,096 of 20,480 tokens are 20 %; ours: 256 of 1,024",
    "advantage luffy": "LUFFY's script: no std; its Eq. 4 has one",
    "loss luffy": "LUFFY, Eq. 5, without clip as in its script",
    "luffy expert group": "LUFFY: the expert is one more row of its group",
    "num_generations 7": "LUFFY: 7 rollouts and the expert make a group of 8",
    "srft num_generations 7": "as LUFFY's, a group of 8 with the expert; SRFT's own run: 8 rollouts",
    "srft reward binary": "SRFT: 1 where right, else 0",
    "srft advantage group": "SRFT: over rollouts and expert, with std; both public codes have none",
    "loss srft": "SRFT, Eqs. 6-13, with the signs of the paper",
    "srft expert group": "SRFT: expert and rollouts in one group",
    "chord reward binary": "CHORD's ToolACE example",
    "loss chord": "CHORD-phi: (1 - mu) GRPO (its Eq. 2) + mu SFT",
    "chord expert sft": "CHORD: an SFT term beside the policy loss",
    "balance 0.1": "CHORD: mu of CHORD-phi, the same in paper and code",
    "expert sft": "ToolUPT 5.2, ablation II: plain SFT for SPO",
    "stages warmup,itool": "iTool 3.1, then 3.2",
    "itool expert none": "not read by iTool",
    "itool advantage group": "not read by iTool",
    "lora_rank 16": "iTool Appendix B.1",
    "model_name_or_path meta-llama/Llama-3.1-8B-Instruct": "iTool 4.1",
    "seed 42": "iTool Table 7",
    "eval_fraction 0.1": "iTool 4.1: 90 % for the warm-up",
    "train_batch_size 64": "iTool Table 6",
    "temperature 1.5": "iTool Table 7, of the search",
    "max_completion_length 512": "ours: the script's 50 cut parallel calls",
    "learning_rate 1e-06": "iTool Table 9, that of SimPO",
    "itool lr_scheduler_type cosine": "iTool Appendix B.1",
    "itool warmup_ratio 0.1": "iTool Appendix B.1",
    "weight_decay 0.0": "iTool's trainer, LLaMA-Factory: its default",
    "entropy_coef 0.0": "no entropy bonus in iTool",
    "save_total_limit 0": "iTool Figures 5 and 7: each stage and iteration is evaluated",
}  # fmt: skip
SENTENCES = {
    "sft": "imitates the expert responses (Eq. 1)",
    "grpo": "binary reward, group advantages, mean over sequences (Eq. 2)",
    "dapo": "outcome reward, clip-higher, dynamic sampling, token mean, soft overlong penalty",
    "dapo_star": "DAPO without dynamic sampling and overlong penalty",
    "fg_dapo_star": "DAPO* with token rewards and token advantages (Eqs. 13-18)",
    "sft_dapo_star": "SFT, then DAPO* from its best checkpoint",
    "sft_fg_dapo_star": "SFT, then FG-DAPO* from its best checkpoint",
    "luffy": "rollouts and an expert response in one group, p/(p+0.1) shaping on expert tokens",
    "srft": "entropy-weighted SFT and RL on expert and rollouts in one loss",
    "chord": "0.9 GRPO + 0.1 SFT weighted by p(1-p)",
    "toolupt": "FG-DAPO and selective preference optimisation, mixed by a cyclic weight (Eq. 23)",
    "toolupt_no_fgae": "ToolUPT with sequence-level advantages (Figure 4, left)",
    "toolupt_no_spo": "ToolUPT with a plain SFT loss for SPO (Figure 4, right)",
    "itool": "easy-to-hard warm-up, then iterations of tree search on hard examples and SimPO (iTool)",
}
# Flags that only some methods read: typed for another they are refused; in a file, which may serve all, they are not.
_rl = lambda c: "rl" in c.stages
_steps = lambda c: "rl" in c.stages or "sft" in c.stages
_balanced = lambda c: _rl(c) and c.expert in ("spo", "sft")
NEEDS = {
    "max_steps": ("another method than iTool, which counts --warmup_epochs and --preference_epochs", _steps),
    "num_generations": ("another method than iTool, which has --mcts_width", _steps),
    "entropy_coef": ("another method than iTool", _steps),
    "reward": ("an RL stage", _rl),
    "advantage": ("an RL stage", _rl),
    "loss": ("an RL stage", _rl),
    "expert": ("an RL stage", _rl),
    "balance": ("--expert spo or sft", _balanced),
    "clip_low": ("--loss grpo or dapo", lambda c: _rl(c) and c.loss in ("grpo", "dapo")),
    "clip_high": ("--loss grpo or dapo", lambda c: _rl(c) and c.loss in ("grpo", "dapo")),
    "dynamic_sampling": ("an RL stage", _rl),
    "generation_batches": ("--dynamic_sampling", lambda c: _rl(c) and c.dynamic_sampling),
    "overlong": ("--advantage group or luffy", lambda c: _rl(c) and c.advantage != "fgae" and c.loss != "srft"),
    "alignment": ("--advantage fgae", lambda c: _rl(c) and c.advantage == "fgae"),
    "spo_beta": ("--expert spo", lambda c: _rl(c) and c.expert == "spo"),
    "srft_variant": ("--loss srft", lambda c: _rl(c) and c.loss == "srft"),
    "srft_shaped": ("--loss srft", lambda c: _rl(c) and c.loss == "srft"),
    "chord_phi": ("--loss chord", lambda c: _rl(c) and c.loss == "chord"),
    "tis_cap": ("--loss dapo", lambda c: _rl(c) and c.loss == "dapo"),
    "sft_max_steps": ("an SFT stage in front (--max_steps is that of --algo sft)", lambda c: c.stages == "sft,rl"),
    "sft_learning_rate": ("an SFT stage in front (or take --learning_rate)", lambda c: c.stages == "sft,rl"),
}  # fmt: skip
_NAMES = [f.name for f in fields(Config)]
_OF_ITOOL = _NAMES[_NAMES.index("warmup") : _NAMES.index("held_out_pairs") + 1]
for _name in _OF_ITOOL:
    _stage = "warmup" if _name in ("warmup", "split", "warmup_learning_rates", "warmup_epochs") else "itool"
    NEEDS[_name] = (f"iTool's stage {_stage}", lambda c, stage=_stage: stage in c.stages)
for _loss, _scales in {
    "simpo": ("simpo_beta", "simpo_margin"), "dpo": ("dpo_beta",), "ipo": ("ipo_tau", "ipo_mean"), "orpo": ("orpo_lam",),
}.items():  # fmt: skip
    NEEDS |= {
        name: (
            f"--algo itool --preference {_loss}",
            lambda c, loss=_loss: "itool" in c.stages and c.preference == loss,
        )
        for name in _scales
    }
NEEDS |= {
    name: ("iTool's tree search", lambda c: "itool" in c.stages and c.mcts)
    for name in _OF_ITOOL
    if name.startswith("mcts_") or name in ("max_similarity", "min_gap", "min_q", "self_evaluation")
}
BEST = 4.0  # R_outcome of a completely right response (Eq. 12)
ECHO = 10  # seconds that a rank waits before it reports the loss of a peer as its own failure
ROUNDS = 10  # DAPO: generation batches per step before dynamic sampling gives up


@dataclass
class Group:
    """One prompt and everything that answers it: the unit of work."""

    example: data.Example
    prompt: list  # token ids
    target: list  # token ids of the expert response and EOS
    expert: list  # the same where the method trains on it, else []
    seed: int  # of its rollouts
    samples: list  # K rollout.Sample
    outcomes: list = field(default_factory=list)  # K rewards.Outcome
    rewards: list = field(default_factory=list)  # K floats, what the advantage is made of
    token_rewards: Tensor | None = None  # (K, T), fgae only
    advantages: Tensor | None = None  # (K + experts in the group, T)
    logps: Tensor | None = None  # (K, T) of the trainer, filled by the update
    idle: bool = False  # a repeat that only keeps the ranks in step
    place: int = 0  # in the stream of all batches


@dataclass
class Rows:
    """A micro-batch of groups, one row per response, padded to T; each group's expert follows its rollouts."""

    mask: Tensor  # (R, T) bool
    is_expert: Tensor  # (R,) bool
    is_answer: Tensor  # (R,) bool, ground truth is an answer
    correct: Tensor  # (R,) bool
    advantages: Tensor  # (R, T), 0 on experts outside the group
    sampler_logps: Tensor  # (R, T), 0 on experts


# ---------------------------------------------------------------------------------------------------- the loops


def run_rl(config: Config, run: Run) -> None:
    """Reinforcement learning, with or without experts: every row of PRESETS but the SFT stage."""
    with run.progress(config.max_steps) as bar:
        for step in range(run.first_step, config.max_steps):
            run.stop_if_asked(step)
            clock = Clock()

            # 1 sample a batch, 2 roll out, 3 reward
            groups, rounds, kept, sampled = [], 0, 0, 0
            size = config.train_batch_size
            if config.dynamic_sampling:
                size *= config.generation_batches
            while kept < config.train_batch_size:
                if rounds == ROUNDS:
                    give_up(config, kept)
                position = step * ROUNDS + rounds if config.dynamic_sampling else step
                with clock("rollout"):
                    new = roll_out(config, run, run.batch(position, size=size))
                with clock("reward"):
                    for group in new:
                        score(config, group)
                if config.dynamic_sampling:
                    new = informative(config, new)
                groups += new
                rounds, sampled = rounds + 1, sampled + size
                kept = run.all_sum({"groups": len(groups)})["groups"]
            if config.dynamic_sampling:
                groups = share_out(run, groups, config.train_batch_size)
            run.stop_if_asked(step)

            # 4 advantage
            with clock("advantage"):
                for group in groups:
                    add_advantages(config, group)

            # 5 loss: forward and backward
            run.engine.sleep()
            totals = count(config, run, groups)
            balance = balance_of(config, step)
            stats, largest = defaultdict(float), defaultdict(float)
            with clock("update"):
                for micro in micro_batches(config, run, groups):
                    logps, entropy = forward(config, run.model, micro, config.temperature)
                    rows = gather_rows(micro, logps)
                    loss, parts = policy_loss(config, rows, logps, entropy, balance, totals)
                    loss.backward()
                    apart, worst = sampling_difference(config, rows, logps)
                    for name, value in {**parts, **apart}.items():
                        stats[name] += float(value)
                    for name, value in worst.items():
                        largest[name] = max(largest[name], value)
                    keep_logps(micro, logps)
                stats = run.all_sum(stats)
            if config.log_rollouts:
                with clock("records"):
                    run.log_rollouts([r for group in groups for r in records(step + 1, group)])
            apart = stats["sampling/sampling_logp_difference/mean"] / totals["tokens"]
            check_engine(config, apart, step + 1)

            # 6 optimiser step
            with clock("update"):
                lr = learning_rate_at(config, step)
                grad_norm = float(modeling.clip_grad_norm(run.model, config.max_grad_norm))
                skipped = run.optimizer_step(lr, stats["loss"], grad_norm, groups)

            # 7 weight sync
            with clock("sync"):
                sync(run)

            metrics = rollout_metrics(run, groups)
            metrics.update(
                {
                    k: v / totals["tokens"] if k.startswith(("sampling/", "entropy")) else v
                    for k, v in stats.items()
                },
                grad_norm=grad_norm,
                learning_rate=lr,
                balance=balance,
                skipped=skipped,
                rounds=rounds,
                frac_groups_kept=kept / sampled,
                **{name: run.all_max(value) for name, value in largest.items()},
                **clock.metrics(
                    totals["tokens"] + totals["expert_tokens"] + totals["prompt_tokens"]
                ),
            )
            last = step + 1 == config.max_steps
            if last or (config.eval_steps and (step + 1) % config.eval_steps == 0):
                metrics.update(evaluate(config, run))
            run.end_step(bar, step, metrics, last)


def run_sft(config: Config, run: Run) -> Path:
    """Supervised fine-tuning (Eq. 1), in stages; the checkpoint of lowest validation loss lies in the folder returned."""
    best, best_loss = Path(config.output_dir) / "checkpoint-best", run.lowest("eval/loss")
    stages = sft_stages(config, run)
    end = 0  # of the stage
    with run.progress(sum(stage.steps for stage in stages)) as bar:
        for stage in stages:
            start, end = end, end + stage.steps
            for step in range(max(start, run.first_step), end):
                run.stop_if_asked(step)
                clock = Clock()
                if step == start:
                    run.restart_optimizer()
                run.engine.sleep()
                batch = [example for _, example in run.batch(step - start, stage.examples)]
                groups = [expert_group(run, example) for example in batch]
                totals = count(config, run, groups)
                stats = defaultdict(float)
                with clock("update"):
                    for micro in micro_batches(config, run, groups):
                        logps, _ = forward(config, run.model, micro, temperature=1.0)
                        mask = gather_rows(micro, logps).mask
                        loss, parts = spo.sft_loss(logps, mask, num_tokens=totals["expert_tokens"])
                        loss.backward()
                        for name, value in {"loss": loss.detach(), **parts}.items():
                            stats[name] += float(value)
                    grad_norm = float(modeling.clip_grad_norm(run.model, config.max_grad_norm))
                    lr = learning_rate_at(config, step - start, stage.steps, stage.learning_rate)
                    stats = run.all_sum(stats)
                    skipped = run.optimizer_step(lr, stats["loss"], grad_norm, groups)
                metrics = {
                    **stats,
                    "skipped": skipped,
                    "grad_norm": grad_norm,
                    "learning_rate": lr,
                }
                metrics.update(clock.metrics(totals["expert_tokens"] + totals["prompt_tokens"]))
                last = step + 1 == end
                if last or (config.eval_steps and (step + 1) % config.eval_steps == 0):
                    sync(run)
                    metrics.update(evaluate(config, run))
                    run.engine.sleep()
                    metrics["eval/loss"] = validation_loss(config, run)
                    if metrics["eval/loss"] < best_loss:
                        best_loss = metrics["eval/loss"]
                        modeling.save(run.model, run.tokenizer, best)
                run.end_step(bar, step, metrics, last, stage=stage.name)
    if best_loss == math.inf:
        raise ValueError("SFT had no finite validation loss: lower the learning rate")
    return best


def run_itool(config: Config, run: Run) -> Path:
    """iTool's iterations (section 3.2): hard examples, tree search, preference pairs, preference optimisation.

    The checkpoint of highest accuracy (Appendix B.1), be it the one before all iterations, lies in the folder returned.
    """
    best, best_accuracy = Path(config.output_dir) / "checkpoint-best", run.highest("eval/accuracy")
    if run.first_step == 0:
        modeling.save(run.model, run.tokenizer, best)
    pool, ungraded = run.pool
    run.say(f"pool: {len(pool)} examples, {ungraded} more left out: their calls do not parse")
    end = 0  # optimiser steps up to and with the iteration
    for iteration in range(1, config.iterations + 1):
        # 1 replay buffer, 2 search, 3 pairs
        found = run.searches.get(iteration)  # of an interrupted run
        if found is None:
            found = find_pairs(config, run, pool, iteration, end)
            run.log_search(*found)
        summary, pairs = found
        run.say(itool.summary(summary))
        trained = [pair for pair in pairs if not pair["held_out"]]
        held_out = [pair for pair in pairs if pair["held_out"]]

        # 4 optimise
        steps = math.ceil(config.preference_epochs * len(trained) / config.train_batch_size)
        start, end = end, end + steps
        run.engine.sleep()
        first = min(max(start, run.first_step), end)
        with run.progress(end, first, f"iteration {iteration}, {config.preference}") as bar:
            for step in range(first, end):
                run.stop_if_asked(step)
                clock = Clock()
                if step == start:
                    run.restart_optimizer()
                with clock("update"):
                    batch = pair_batch(config, trained, iteration, step - start)
                    stats = preference_gradient(config, run, batch)
                    grad_norm = float(modeling.clip_grad_norm(run.model, config.max_grad_norm))
                    lr = learning_rate_at(config, step - start, steps, config.learning_rate)
                    mine = batch[run.rank :: run.world]
                    skipped = run.optimizer_step(lr, stats["loss"], grad_norm, mine)
                metrics = {**stats, "iteration": iteration, "skipped": skipped}
                metrics |= {"grad_norm": grad_norm, "learning_rate": lr, **clock.metrics()}
                last = step + 1 == end
                if last:  # 5 weight sync
                    metrics.update(held_out_metrics(config, run, held_out))
                    metrics["adapter_norm"] = modeling.adapter_norm(run.model)
                    sync(run)
                    metrics.update(evaluate(config, run))
                    if metrics["eval/accuracy"] > best_accuracy:
                        best_accuracy = metrics["eval/accuracy"]
                        modeling.save(run.model, run.tokenizer, best)
                run.end_step(bar, step, metrics, last)
        if first < end:
            accuracy = metrics["eval/accuracy"]
            run.say(f"after iteration {iteration}: {accuracy:.1%} right on held-out examples")
        elif start == end:
            run.say(f"after iteration {iteration}: accuracy as before")
    if end == 0:
        run.say("no iteration found a pair: the model is saved as it was")
        run.save(0)
    return best


# ------------------------------------------------------------------------------------------ the loss of a micro-batch


def policy_loss(
    config: Config, rows: Rows, logps: Tensor, entropy: Tensor, balance: float, totals: dict
) -> tuple[Tensor, dict]:
    """The loss of one micro-batch under the method of `config`, and stats that add up; all (R, T) like `logps`.

    balance  weight of the expert loss in this step
    totals   token and response counts of the whole step: the denominators
    """
    on, off = ~rows.is_expert, rows.is_expert
    experts = {"num_expert_tokens": totals["expert_tokens"]}
    tokens = {"num_tokens": totals["tokens"]}
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    old = logps.detach()  # strictly on-policy: one update per batch of rollouts
    rollouts = (logps[on], old[on], rows.advantages[on], rows.mask[on])
    chosen = (logps[off], rows.mask[off])

    if config.loss == "luffy":
        loss, stats = baselines.luffy_loss(
            logps,
            old,
            rows.advantages[:, 0],
            rows.mask,
            off,
            num_tokens=totals["tokens"] + totals["expert_tokens"],
        )
    elif config.loss == "srft":
        loss, stats = baselines.srft_loss(
            logps, entropy, rows.advantages[:, 0], rows.correct, rows.mask, off,
            variant=config.srft_variant, shaped=config.srft_shaped,
            num_tokens=totals["tokens"] + totals["expert_tokens"], **experts,
        )  # fmt: skip
    elif config.loss == "chord":
        logps_on, old_on, advantages, mask = rollouts
        loss, stats = baselines.chord_loss(
            logps_on, old_on, advantages[:, 0], mask, *chosen,
            mu=balance, phi=config.chord_phi, **tokens, **experts,
        )  # fmt: skip
    elif config.loss == "grpo":
        logps_on, old_on, advantages, mask = rollouts
        loss, stats = grpo.grpo_loss(
            logps_on, old_on, advantages[:, 0], mask, num_responses=totals["responses"], **clip
        )
    else:
        weights = tis_weights(config, rows, old)[on] if config.tis_cap else None
        loss, stats = grpo.dapo_loss(*rollouts, weights=weights, **tokens, **clip)
        if config.expert == "spo":
            keep = spo.keep_mask(rows.mask[off], rows.is_answer[off], totals["tag_length"])
            preference, parts = spo.spo_loss(
                *chosen,
                keep,
                logps[on],
                rows.advantages[on],
                rows.mask[on],
                beta=config.spo_beta,
                **tokens,
                **experts,
            )
        elif config.expert == "sft":
            preference, parts = spo.sft_loss(*chosen, num_tokens=totals["expert_tokens"])
        if config.expert != "none":
            loss, stats = spo.toolupt_loss(preference, loss, balance), {**stats, **parts}

    # entropy bonus on rollouts, reduced like the policy loss, outside the mix (spec section 5, A25)
    on_entropy = torch.where(rows.mask[on], entropy[on], 0.0)
    if config.loss == "grpo":
        bonus = (on_entropy.sum(1) / rows.mask[on].sum(1).clamp(min=1)).sum() / totals["responses"]
    else:
        bonus = on_entropy.sum() / totals["tokens"]
    loss = loss - config.entropy_coef * bonus
    return loss, {**stats, "loss": loss.detach(), "entropy": on_entropy.detach().sum()}


def preference_loss(
    config: Config, chosen: Tensor, rejected: Tensor, masks: tuple, refs: tuple, num_pairs: int
) -> tuple[Tensor, dict]:
    """The loss of one micro-batch of pairs under --preference (iTool Eqs. 10, 11, Table 9), and its stats.

    chosen, rejected  (N, T) log-probs of the steps;  masks  (N, T) of the two;  refs  (N,) summed reference log-probs of the two
    """
    rows = (chosen, masks[0], rejected, masks[1])
    if config.preference == "simpo":
        scale = {"beta": config.simpo_beta, "margin": config.simpo_margin}
        return simpo.simpo_loss(*rows, **scale, num_pairs=num_pairs)
    if config.preference == "dpo":
        return simpo.dpo_loss(*rows, *refs, beta=config.dpo_beta, num_pairs=num_pairs)
    if config.preference == "ipo":
        scale = {"tau": config.ipo_tau, "average": config.ipo_mean}
        return simpo.ipo_loss(*rows, *refs, **scale, num_pairs=num_pairs)
    return simpo.orpo_loss(*rows, lam=config.orpo_lam, num_pairs=num_pairs)


def balance_of(config: Config, step: int) -> float:
    """The weight of the expert loss at `step`: a constant, the cycle of Eq. 23, or CHORD's decay; 0 without such a loss."""
    if config.expert not in ("spo", "sft"):
        return 0.0
    low, high, up, down = (getattr(config, f"balance_{x}") for x in ("low", "high", "up", "down"))
    if config.balance == "cycle":
        return spo.balance_at(step, low=low, high=high, up=up, down=down)
    if config.balance == "decay":
        return baselines.chord_mu_at(step, warmup=up, decay=down, peak=high, valley=low)
    return float(config.balance)


def learning_rate_at(
    config: Config, step: int, steps: int | None = None, peak: float | None = None
) -> float:
    """Linear warm-up from 0, then constant or a half cosine to 0.

    steps, peak  of the stage that `step` belongs to; None: max_steps and learning_rate of the config
    """
    steps = config.max_steps if steps is None else steps
    peak = config.learning_rate if peak is None else peak
    warmup = min(
        math.ceil(config.warmup_ratio * steps), steps - 1
    )  # a single step must not have rate 0
    if step < warmup:
        return peak * step / warmup
    if config.lr_scheduler_type == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ------------------------------------------------------------------------------------------------ the steps' parts


def roll_out(config: Config, run: Run, batch: list[tuple[int, data.Example]]) -> list[Group]:
    """Sample K responses for each (place, example); request seeds depend on (seed, place) only."""
    places, examples = zip(*batch)
    ids = [run.ids(example) for example in examples]
    seeds = [random.Random(f"{config.seed}/{place}").getrandbits(62) for place in places]
    samples = run.engine.generate(
        [prompt for prompt, _ in ids],
        n=config.num_generations,
        temperature=config.temperature,
        max_tokens=config.max_completion_length,
        seeds=seeds,
    )
    for group in samples:
        for sample in group:
            check_sample(run.tokenizer, run.stop_ids, sample)
    use_expert = config.expert != "none"
    return [
        Group(example, prompt, target, target if use_expert else [], seed, answers, place=place)
        for place, example, (prompt, target), seed, answers in zip(places, examples, ids, seeds, samples)
    ]


def score(config: Config, group: Group) -> None:
    """Fill a group's outcomes (Eqs. 3-12) and the rewards its advantages are made of."""
    target = group.example.target
    group.outcomes = [rewards.outcome(sample.text, target) for sample in group.samples]
    if config.reward == "binary":
        group.rewards = [rewards.binary(sample.text, target) for sample in group.samples]
    else:
        group.rewards = [outcome.total for outcome in group.outcomes]
    if config.overlong:
        lengths = torch.tensor([len(sample.token_ids) for sample in group.samples])
        cache = round(config.overlong * config.max_completion_length)
        penalty = grpo.overlong_penalty(lengths, config.max_completion_length, cache)
        group.rewards = [r + float(p) for r, p in zip(group.rewards, penalty)]


def informative(config: Config, groups: list[Group]) -> list[Group]:
    """The groups whose rewards, without length penalty, differ: DAPO's dynamic sampling keeps these."""
    plain = torch.tensor([o.total for group in groups for o in group.outcomes])
    if config.reward == "binary":
        plain = plain == BEST
    keep = grpo.informative_groups(plain.float(), config.num_generations)
    return [group for group, kept in zip(groups, keep.tolist()) if kept]


def share_out(run: Run, groups: list[Group], wanted: int) -> list[Group]:
    """This rank's part of the first `wanted` groups of all ranks, in the order of sampling; what is over is dropped."""
    everyone = sorted(run.all_gather(groups), key=lambda group: group.place)
    return run.deal(everyone[:wanted], tokens_of)


def give_up(config: Config, kept: float) -> None:
    """End a run whose dynamic sampling finds too few informative groups; all ranks come here together."""
    raise ValueError(
        f"dynamic sampling: {ROUNDS} rounds gave {kept:.0f} prompts whose rewards differ, of {config.train_batch_size}; "
        "the data are too easy or too hard for this model: mix them, raise --generation_batches, or use --algo dapo_star"
    )


def add_advantages(config: Config, group: Group) -> None:
    """Fill a group's advantages, (K, T), or (K + 1, T) where the expert is a row of the group."""
    K = len(group.samples)
    ids, mask = pad([sample.token_ids for sample in group.samples])
    scores = torch.tensor(group.rewards)
    if config.advantage == "fgae":
        is_call = group.example.kind == "tool_call"  # others have no process rewards (README, choice 6)
        expert_ids, expert_mask = pad([group.target] * K)
        expert_mask = expert_mask & is_call
        if config.alignment == "lcs":
            expert_mask[:, -1] = False  # a wrong answer must not earn the bound for its EOS
        matched = fgae.matched_tokens(
            ids, mask, expert_ids, expert_mask, alignment=config.alignment
        )
        group.token_rewards = fgae.token_rewards(scores, matched)
        group.advantages = fgae.token_advantages(group.token_rewards, mask, K)
        return
    if config.expert == "group":  # the demonstration is scored like every other row
        text = group.example.target
        reward = (
            rewards.binary(text, text)
            if config.reward == "binary"
            else rewards.outcome(text, text).total
        )
        scores = torch.cat([scores, torch.tensor([reward])])
    hpt = config.loss == "srft" and config.srft_variant == "hpt"  # whose code has no std either
    advantages = grpo.group_advantages(
        scores, len(scores), std=config.advantage != "luffy" and not hpt
    )
    group.advantages = advantages[:, None].expand(-1, ids.shape[1])


def count(config: Config, run: Run, groups: list[Group]) -> dict:
    """The denominators of a step, over all micro-batches and ranks, and the length of the answer tag (Eq. 19)."""
    sizes = [len(sample.token_ids) for group in groups for sample in group.samples]
    totals = run.all_sum(
        {
            "tokens": sum(sizes),
            "responses": len(sizes),
            "expert_tokens": sum(len(group.expert) for group in groups),
            "prompt_tokens": sum(len(group.prompt) for group in groups),
        }
    )
    return {**{name: int(value) for name, value in totals.items()}, "tag_length": run.tag_length}


def micro_batches(config: Config, run: Run, groups: list[Group]) -> list[list[Group]]:
    """Split groups into micro-batches within the token budget: the same number on every rank, of even lengths."""

    def fill(bins):
        parts = [[] for _ in range(bins)]
        loads = [0] * bins
        for group in sorted(groups, key=tokens_of, reverse=True):  # longest first into the emptiest
            lightest = loads.index(min(loads))
            parts[lightest].append(group)
            loads[lightest] += tokens_of(group)
        return parts, max(loads)

    if not config.share_prefix:
        return [[group] for group in groups]
    bins = 1
    while bins < len(groups) and fill(bins)[1] > config.max_tokens_per_row:
        bins += 1
    return fill(int(run.all_max(bins)))[0]


def tokens_of(group: Group) -> int:
    """Tokens that a group adds to a packed row."""
    return len(group.prompt) + sum(len(s.token_ids) for s in group.samples) + len(group.expert)


def expert_group(run: Run, example: data.Example) -> Group:
    """A group of the expert response alone: SFT's unit."""
    prompt, target = run.ids(example)
    return Group(example, prompt, target, target, seed=0, samples=[])


def responses_of(group: Group) -> list[list[int]]:
    """Token ids of the rollouts, then of the expert if the method has one."""
    return [s.token_ids for s in group.samples] + [group.expert] * bool(group.expert)


def forward(config: Config, model, micro: list[Group], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (R, T) of all responses of a micro-batch, with gradient."""
    if config.share_prefix:
        row = packing.join([packing.pack(group.prompt, responses_of(group)) for group in micro])
        return packing.response_logps(model, row, temperature=temperature)
    [group] = micro
    return packing.padded_logps(model, group.prompt, responses_of(group), temperature=temperature)


def gather_rows(micro: list[Group], logps: Tensor) -> Rows:
    """Everything but the log-probs that the losses need, on the device and in the shape (R, T) of `logps`."""
    R, T = logps.shape
    advantages, sampler_logps = torch.zeros(R, T), torch.zeros(R, T)
    is_expert, is_answer, correct, lengths = [], [], [], []
    for group in micro:
        first, K = len(lengths), len(group.samples)
        for k, sample in enumerate(group.samples):
            sampler_logps[first + k, : len(sample.logps)] = torch.tensor(sample.logps)
        if group.advantages is not None:
            rows, width = group.advantages.shape
            advantages[first : first + rows, :width] = group.advantages
        lengths += map(len, responses_of(group))
        experts = len(lengths) - first - K
        is_expert += [False] * K + [True] * experts
        is_answer += [group.example.kind == "answer"] * (K + experts)
        correct += [o.total == BEST for o in group.outcomes] + [True] * experts
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    flags = [torch.tensor(x, dtype=torch.bool) for x in (is_expert, is_answer, correct)]
    return Rows(*(x.to(logps.device) for x in (mask, *flags, advantages, sampler_logps)))


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-pad token ids to (R, T), with their mask."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([i for row in rows for i in row], dtype=torch.long)
    return ids, mask


def keep_logps(micro: list[Group], logps: Tensor) -> None:
    """Store the trainer's log-probs of each group's rollouts, for rollouts.jsonl."""
    row = 0
    for group in micro:
        group.logps = logps.detach()[row : row + len(group.samples)].float().cpu()
        row += len(responses_of(group))


def sampling_difference(config: Config, rows: Rows, logps: Tensor) -> tuple[dict, dict]:
    """|trainer - sampler| in nat over rollout tokens: the sum, which adds up, and the largest; likewise TIS weights."""
    on = rows.mask & ~rows.is_expert[:, None]
    values = {"sampling_logp_difference": (logps.detach() - rows.sampler_logps).abs()[on]}
    if config.tis_cap:
        values["importance_sampling_ratio"] = tis_weights(config, rows, logps)[on]
    sums = {f"sampling/{name}/mean": value.sum() for name, value in values.items()}
    worst = {f"sampling/{name}/max": float(v.max()) for name, v in values.items() if len(v)}
    return sums, worst


def tis_weights(config: Config, rows: Rows, logps: Tensor) -> Tensor:
    """Truncated importance weights (R, T) of trainer over sampler; no meaning on experts."""
    return grpo.truncated_importance_weights(
        logps.detach(), rows.sampler_logps, rows.mask, config.tis_cap
    )


def check_sample(tokenizer, stop_ids: list[int], sample: rollout.Sample) -> None:
    """Stop the run when the engine reads its tokens otherwise than the trainer, or has no log-probs for them."""
    ids, stopped = sample.token_ids, sample.finish_reason == "stop"
    text = rollout.text_of(tokenizer, ids, sample.finish_reason)
    if text != sample.text or (stopped and ids[-1] not in stop_ids):
        raise ValueError(
            f"the engine reads its tokens {ids[-20:]} as {sample.text[-60:]!r} ({sample.finish_reason}), the trainer's "
            f"tokenizer as {text[-60:]!r}: give both the same tokenizer files"
        )
    if not all(logp <= 1e-3 for logp in sample.logps):  # NaN too; rounding may pass 0
        raise ValueError(
            f"the engine gives log-probs that are none: {[p for p in sample.logps if not p <= 1e-3][:5]}; "
            "compare with --engine transformers"
        )


def check_engine(config: Config, difference: float, step: int) -> None:
    """Stop the run when engine and trainer disagree about the same tokens: they hold different models.

    Where both compute in float32 they agree to 1e-6 nat and the limit is 1e-3; bf16 and 4-bit weights need 0.1.
    """
    exact = config.quant == "none" and not torch.cuda.is_available()
    limit = config.max_logp_difference or (1e-3 if exact else 0.1)
    if difference > limit:
        raise ValueError(
            f"step {step}: the engine's log-probs of its own tokens differ from the trainer's by {difference:.3f} nat on "
            f"average (limit {limit}): it samples from other weights, another tokenizer or other "
            "sampling settings. Check the weight sync, or compare with --engine transformers"
        )


def sync(run: Run) -> None:
    """Send the trainer's weights to the engine, one whole parameter at a time, and forget what it cached."""
    run.engine.load_weights(modeling.full_tensors(run.model))
    run.engine.wake()


def evaluate(config: Config, run: Run) -> dict:
    """Greedy accuracy on the fixed evaluation subset, by eval.py; split over ranks, the engine must hold the weights."""
    cases = [evaluation.example_case(e) for e in run.eval_examples[run.rank :: run.world]]
    options = argparse.Namespace(batch=len(run.eval_examples), temperature=0.0, seed=config.seed)
    options.max_tokens, rows = config.max_completion_length, []
    evaluation.answer(cases, run.engine, options, rows.append, run.all_max, quiet=True)
    texts = [row["turns"][0][0] for row in rows]
    sums = run.all_sum(rewards.tally(texts, [row["target"] for row in rows]))
    n, n_calls = sums["n"], sums["n_calls"]
    metrics = {"eval/accuracy": sums["accuracy"] / n, "eval/reward": sums["reward"] / n}
    if n_calls:
        metrics["eval/tool_call_accuracy"] = sums["tool_calls"] / n_calls
    if n > n_calls:
        metrics["eval/answer_accuracy"] = sums["answers"] / (n - n_calls)
    return metrics


def validation_loss(config: Config, run: Run) -> float:
    """Token-mean loss (Eq. 1) on the evaluation subset."""
    n = len(run.eval_examples)
    places = range(
        run.rank, math.ceil(n / run.world) * run.world, run.world
    )  # as many on each rank
    groups = [expert_group(run, run.eval_examples[i % n]) for i in places]
    own = groups[: len(range(run.rank, n, run.world))]  # what is beyond fills up and does not count
    ids, totals, loss = {id(group) for group in own}, count(config, run, own), 0.0
    with torch.no_grad():
        for micro in micro_batches(config, run, groups):
            logps, _ = forward(config, run.model, micro, temperature=1.0)
            counts = torch.tensor([id(group) in ids for group in micro], device=logps.device)
            mask = gather_rows(micro, logps).mask & counts[:, None]
            loss += float(spo.sft_loss(logps, mask, num_tokens=totals["expert_tokens"])[0])
    return run.all_sum({"loss": loss})["loss"]


# ------------------------------------------------------------------------------------------------ SFT's and iTool's parts


@dataclass
class Stage:
    """A part of SFT with examples, schedule and optimiser state of its own."""

    name: str
    examples: list
    steps: int
    learning_rate: float


def sft_stages(config: Config, run: Run) -> list[Stage]:
    """SFT's one stage, or iTool's warm-up from easy to hard (section 3.1)."""
    if config.stages == "sft":
        return [Stage("sft", run.examples, config.max_steps, config.learning_rate)]
    parts = itool.stages_of(run.examples, config.split)
    rates = config.warmup_learning_rates[: len(parts)]
    steps = lambda part: math.ceil(config.warmup_epochs * len(part) / config.train_batch_size)
    stages = [
        Stage(*x, steps(x[1]), rate) for x, rate in zip(parts.items(), rates, strict=True)
    ]
    for stage in stages:
        run.say(
            f"warm-up, {stage.name}: {len(stage.examples)} examples, {stage.steps} steps, learning rate {stage.learning_rate}"
        )
    return [stage for stage in stages if stage.steps]


class Asked(Exception):
    """This rank was asked to stop, in the middle of its search."""


def find_pairs(
    config: Config, run: Run, pool: list, iteration: int, step: int
) -> tuple[dict, list[dict]]:
    """One iteration's search: a line of searches.jsonl, and the lines of pairs.jsonl, equal on all ranks."""
    clock = Clock()
    run.engine.sleep()
    with clock("perplexity"):
        values = perplexities(config, run, pool, step)
        calls = [example.kind == "tool_call" for example in pool]
        strata = calls if config.buffer_rank == "stratified" else None
        chosen = [pool[i] for i in data.select_complex(values, strata, config.buffer_fraction)]
    sync(run)
    mine = chosen[run.rank :: run.world]
    prompts = [run.ids(example)[0] for example in mine]
    searcher = run.searcher(f"{config.seed}/{iteration}")
    limits, trees, found = itool.search_config(config), [], []
    with clock("search"), run.progress(len(mine), 0, f"iteration {iteration}, trees") as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)
            if run.signal:  # each rank has waves of its own: it ends its search, then all meet
                raise Asked

        with suppress(Asked):
            if config.mcts:
                trees = searcher.search(mine, prompts, limits, advance)
                found = [itool.pair_rows(*x, limits) for x in zip(trees, mine)]
            else:
                found = searcher.sampled_pairs(mine, prompts)
                bar.update(len(mine))
        run.stop_if_asked(step)
    run.engine.sleep()
    drops, pairs = Counter(), []
    places = range(run.rank, len(chosen), run.world)
    for place, example, (rows, dropped) in zip(places, mine, found):
        drops.update(dropped)
        held_out = itool.is_held_out(example, config.held_out_pairs, config.seed)
        own = {"iteration": iteration, "tree": place, "held_out": held_out}
        pairs += [{**own, **row} for row in rows]
    saved = [
        mcts.tree_to_dict(
            tree, limits, tree=place, iteration=iteration, id=e.id, query=e.query, target=e.target
        )
        for place, tree, e in zip(places, trees, mine)
    ]
    run.log_trees(iteration, saved)
    pairs = sorted(run.all_gather(pairs), key=lambda pair: pair["tree"])  # whatever the ranks
    with clock("reference"):
        add_references(config, run, pairs)
    apart = engine_difference(pairs) if pairs else None  # nothing to compare
    if pairs and config.quant == "none":  # else the engine's weights are not the trainer's NF4 ones
        check_engine(config, apart, step)
    stats, drops = run.all_count(searcher.stats), run.all_count(drops)
    held_out = sum(pair["held_out"] for pair in pairs)
    mean = lambda kind: (
        sum(v for v, c in zip(values, calls) if c is kind) / max(1, calls.count(kind))
    )
    summary = {"iteration": iteration, "step": step, "pool": len(pool), "trees": len(chosen)}
    summary |= {"perplexity/calls": mean(True), "perplexity/answers": mean(False)}
    summary |= {"pairs": len(pairs) - held_out, "held_out": held_out, "dropped": dict(drops)}
    summary |= {name: stats[name] for name in itool.COUNTS}
    summary["sampling/sampling_logp_difference/mean"] = apart
    summary["option_mass"] = stats["option_mass"] / max(1, stats["evaluations"])
    summary |= held_out_metrics(config, run, [pair for pair in pairs if pair["held_out"]])
    return summary | clock.metrics(), pairs


def perplexities(config: Config, run: Run, examples: list, step: int) -> list[float]:
    """Perplexity of each expert response (iTool Eq. 4) under the weights after `step` steps, on every rank."""
    values = {}
    mine = run.share(len(examples))
    with run.progress(len(mine), 0, "perplexity") as bar, torch.no_grad():
        for start in range(0, len(mine), config.train_batch_size):
            run.stop_if_asked(step)
            part = mine[start : start + config.train_batch_size]
            groups = [expert_group(run, examples[i]) for i in part]
            index = {id(group): i for group, i in zip(groups, part)}
            for micro in micro_batches(config, run, groups):
                logps, _ = forward(config, run.model, micro, temperature=1.0)
                found = simpo.perplexity(logps, gather_rows(micro, logps).mask).tolist()
                values.update(zip([index[id(group)] for group in micro], found))
            bar.update(len(part))
    values = dict(run.all_gather(list(values.items())))
    return [values[i] for i in range(len(examples))]


def pair_group(pair: dict, idle: bool = False) -> Group:
    """A pair as a group: its state is the prompt, the two steps are the responses."""
    steps = [rollout.Sample(pair[side], [], "", "") for side in ("chosen_ids", "rejected_ids")]
    return Group(None, pair["prefix_ids"], [], [], 0, steps, idle=idle)


def pair_batch(config: Config, pairs: list[dict], iteration: int, position: int) -> list[dict]:
    """Batch number `position` of an iteration; the last one may be short. Each epoch is a shuffle."""
    order = []
    for epoch in range(config.preference_epochs):
        shuffled = list(range(len(pairs)))
        random.Random(f"pairs/{config.seed}/{iteration}/{epoch}").shuffle(shuffled)
        order += shuffled
    size = config.train_batch_size
    return [pairs[i] for i in order[position * size : (position + 1) * size]]


def preference_gradient(config: Config, run: Run, pairs: list[dict], train: bool = True) -> dict:
    """Backward passes of a batch of pairs, split over ranks; its loss and stats. train=False: the stats alone."""
    mine, stats = run.share(len(pairs)), defaultdict(float)
    own = len(range(run.rank, len(pairs), run.world))
    groups = [pair_group(pairs[i], idle=n >= own) for n, i in enumerate(mine)]
    of = {id(group): pairs[i] for group, i in zip(groups, mine)}
    with torch.set_grad_enabled(train):
        for micro in micro_batches(config, run, groups):
            logps, _ = forward(config, run.model, micro, temperature=1.0)
            loss = 0.0 * logps.sum()
            real = [n for n, group in enumerate(micro) if not group.idle]
            if real:
                chosen, rejected, *masks = sides(micro, logps, real)
                refs = [
                    torch.tensor([of[id(micro[n])][name] for n in real], device=logps.device)
                    for name in ("chosen_ref", "rejected_ref")
                ]
                value, parts = preference_loss(config, chosen, rejected, masks, refs, len(pairs))
                loss = loss + value
                for name, part in {"loss": value.detach(), **parts}.items():
                    stats[name] += float(part)
            if train:
                loss.backward()
    names = sorted(set().union(*run.all_gather([list(stats)])))
    return run.all_sum({name: stats[name] for name in names})


def sides(micro: list[Group], logps: Tensor, which: list[int]) -> tuple:
    """Log-probs and masks of the chosen and of the rejected steps of the pairs `which`: four of (N, T)."""
    lengths = torch.tensor([[len(s.token_ids) for s in micro[n].samples] for n in which])
    masks = torch.arange(logps.shape[1]) < lengths[..., None]
    rows = logps.view(len(micro), 2, -1)[which]
    masks = masks.to(logps.device)
    return rows[:, 0], rows[:, 1], masks[:, 0], masks[:, 1]


def add_references(config: Config, run: Run, pairs: list[dict]) -> None:
    """Fill each pair's chosen_ref and rejected_ref: summed log-probs before the iteration's first update."""
    mine, sums = run.share(len(pairs)), []
    groups = [pair_group(pairs[i]) for i in mine]
    index = {id(group): i for group, i in zip(groups, mine)}
    with torch.no_grad():
        for micro in micro_batches(config, run, groups) if groups else []:
            logps, _ = forward(config, run.model, micro, temperature=1.0)
            totals = logps.float().sum(1).view(-1, 2).tolist()
            sums += [(index[id(group)], total) for group, total in zip(micro, totals)]
    for i, (chosen, rejected) in run.all_gather(sums):
        pairs[i] |= {"chosen_ref": chosen, "rejected_ref": rejected}


def engine_difference(pairs: list[dict]) -> float:
    """Mean |trainer - engine| of the steps' mean log-probs, nat per token: the same weights give 0."""
    apart = [
        abs(math.log(pair[f"{side}_p"]) - pair[f"{side}_ref"] / len(pair[f"{side}_ids"]))
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    return sum(apart) / len(apart)


def held_out_metrics(config: Config, run: Run, pairs: list[dict]) -> dict:
    """Preference margin and accuracy on pairs that were not trained on; nothing where there are none."""
    if not pairs:
        return {}
    stats = preference_gradient(config, run, pairs, train=False)
    return {f"eval/{name}": stats[name] for name in ("rewards/margins", "rewards/accuracies")}


# ---------------------------------------------------------------------------------------------------------------- metrics


def rollout_metrics(run: Run, groups: list[Group]) -> dict:
    """Rewards and lengths of a step's rollouts, over all ranks."""
    samples = [s for g in groups for s in g.samples]
    spread = [
        torch.tensor(g.rewards).std() if len(g.rewards) > 1 else torch.tensor(0.0) for g in groups
    ]
    outcomes = [o for g in groups for o in g.outcomes]
    advantages = torch.cat(
        [g.advantages[k, : len(s.token_ids)] for g in groups for k, s in enumerate(g.samples)]
    )
    sums = run.all_sum(
        {
            "groups": len(groups),
            "samples": len(samples),
            "tokens": len(advantages),
            "reward": sum(sum(g.rewards) for g in groups),
            "reward_std": float(sum(spread)),
            "frac_reward_zero_std": sum(max(g.rewards) == min(g.rewards) for g in groups),
            "accuracy": sum(o.total == BEST for o in outcomes),
            "format": sum(o.format for o in outcomes),
            "completions/mean_length": len(advantages),
            "completions/clipped_ratio": sum(s.finish_reason == "length" for s in samples),
            "advantage/positive": float((advantages > 0).sum()),
            "advantage/negative": float((advantages < 0).sum()),
        }
    )
    per = {"reward_std": "groups", "frac_reward_zero_std": "groups"}
    per.update({"advantage/positive": "tokens", "advantage/negative": "tokens"})
    counts = {name: sums.pop(name) for name in ("groups", "samples", "tokens")}
    return {name: value / counts[per.get(name, "samples")] for name, value in sums.items()}


# ------------------------------------------------------------------------------------------------------------- audit


def records(step: int, group: Group) -> list[dict]:
    """The lines of rollouts.jsonl for one group: all that its responses were trained on."""
    rounded = lambda values: [round(float(v), 6) for v in values]
    rows = []
    for k, (sample, outcome) in enumerate(zip(group.samples, group.outcomes)):
        n = len(sample.token_ids)
        rows.append(
            {
                "step": step,
                "id": group.example.id,
                "k": k,
                "seed": group.seed,
                "kind": group.example.kind,
                "target": group.example.target,
                "target_ids": group.target,
                "text": sample.text,
                "token_ids": sample.token_ids,
                "finish_reason": sample.finish_reason,
                "outcome": asdict(outcome),
                "reward": group.rewards[k],
                "token_rewards": None
                if group.token_rewards is None
                else rounded(group.token_rewards[k, :n]),
                "advantages": rounded(group.advantages[k, :n]),
                "sampler_logps": rounded(sample.logps),
                "logps": rounded(group.logps[k, :n]),
            }
        )
        rows[-1]["crc32"] = checksum(rows[-1])
    return rows


def checksum(row: dict) -> int:
    """CRC-32 of a line of rollouts.jsonl without this field: finds what a disk or an editor changed."""
    return zlib.crc32(json.dumps({k: v for k, v in row.items() if k != "crc32"}).encode())


def audit(out: Path) -> str:
    """Recompute rewards, token rewards and advantages from rollouts.jsonl and compare with what was trained on.

    Also that texts and targets are what the run's tokenizer reads and writes, that the means of each step are those
    of metrics.jsonl, and that each line is as it was written (CRC-32).
    Returns one line that says what was checked; ValueError naming the first line that differs.
    """
    config, logged = _audited_run(out)
    tokenizer = modeling.load_tokenizer(
        config.model_name_or_path, trust_remote_code=config.trust_remote_code
    )
    checked, pending, seen = 0, [], defaultdict(list)
    with open(out / "rollouts.jsonl") as file:
        for number, line in enumerate(file, 1):
            try:
                pending.append((number, json.loads(line)))
                if len(pending) == config.num_generations:
                    _audit_group(config, pending, tokenizer, out)
            except (json.JSONDecodeError, LookupError, TypeError, OverflowError) as error:
                raise ValueError(f"{out}/rollouts.jsonl line {number}: {error!r}") from None
            if len(pending) == config.num_generations:
                for _, row in pending:
                    seen[row["step"]].append((row["reward"], len(row["token_ids"])))
                checked, pending = checked + len(pending), []
    if pending:
        raise ValueError(
            f"{out}/rollouts.jsonl ends inside a group: {len(pending)} of {config.num_generations} lines"
        )
    for step in sorted({*seen, *logged} - {0}):
        there, due = len(seen[step]), config.train_batch_size * config.num_generations
        if step not in logged or there != due:
            raise ValueError(
                f"{out}/rollouts.jsonl has {there} lines of step {step}, "
                + (f"of {due}" if step in logged else "which metrics.jsonl does not have")
            )
    for step, pairs in seen.items():
        means = [sum(column) / len(pairs) for column in zip(*pairs)]
        for name, mean in zip(("reward", "completions/mean_length"), means):
            if not math.isclose(logged[step][name], mean, rel_tol=1e-6, abs_tol=1e-9):
                raise ValueError(
                    f"{out}/rollouts.jsonl: {name} of step {step} is {mean}, metrics.jsonl has {logged[step][name]}"
                )
    return f"{checked} responses agree with their text, rewards, token rewards and advantages"


def _audited_run(out: Path) -> tuple[Config, dict[int, dict]]:
    """A run's configuration and its metrics by step; ValueError where there is nothing to audit, or it is damaged."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if not (out / name).exists():
            raise ValueError(
                f"{out}/{name} does not exist: only RL runs with their rollouts (not --no_log_rollouts) can be audited"
            )
    rows = []
    with open(out / "metrics.jsonl") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{out}/metrics.jsonl line {number} is no JSON ({error.msg}): resume the run, which drops a torn line"
                ) from None
    try:
        return Config(**rows[0]), {row["step"]: row for row in rows[1:]}
    except (LookupError, TypeError) as error:
        raise ValueError(f"{out}/metrics.jsonl is not of this version: {error!r}") from None


def _audit_group(config: Config, lines: list[tuple[int, dict]], tokenizer, out: Path) -> None:
    rows = [row for _, row in lines]
    first = rows[0]
    example = data.Example(first["id"], [], [], "", [], first["target"], first["kind"])
    samples = [
        rollout.Sample(r["token_ids"], r["sampler_logps"], r["text"], r["finish_reason"])
        for r in rows
    ]
    expert = first["target_ids"] if config.expert != "none" else []
    group = Group(example, [], first["target_ids"], expert, first["seed"], samples)
    target_ids = data.target_ids(example, tokenizer)
    score(config, group)
    add_advantages(config, group)
    group.logps = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(r["logps"]) for r in rows], batch_first=True
    )
    for (number, row), again in zip(lines, records(first["step"], group)):
        for name, value in again.items():
            if json.dumps(value) != json.dumps(row[name]):  # as text: NaN is not NaN
                raise ValueError(
                    f"{out}/rollouts.jsonl line {number}: {name} is {row[name]}, recomputed {value}"
                )
        text = rollout.text_of(tokenizer, row["token_ids"], row["finish_reason"])
        for name, again in (("text", text), ("target_ids", target_ids)):
            if again != row[name]:
                raise ValueError(
                    f"{out}/rollouts.jsonl line {number}: {name} is {row[name]!r}, by the tokenizer {again!r}"
                )
        if row["crc32"] != checksum(row):
            raise ValueError(f"{out}/rollouts.jsonl line {number} was changed: crc32 differs")


# --------------------------------------------------------------------------------------------------------- the program


def parse_args(argv: list[str]) -> Config:
    """Config from the command line: defaults, then the preset of --algo, then flags; @FILE reads flags from a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@", argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    parser.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    parser.add_argument("--list", action="store_true", help="print the methods and stop")
    words = dict(re.findall(r"^    (\w+): .*?  # (.+)$", getsource(Config), re.MULTILINE))
    for f in fields(Config):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        about = {"help": f"{default}: {words.get(f.name, '')}".replace("%", "%%")}
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", **about)
            parser.add_argument(f"--no_{f.name}", dest=f.name, action="store_false")
        elif f.name == "algo":
            parser.add_argument("--algo", choices=PRESETS, **about)
        elif f.type in (list[str], list[float]):
            parser.add_argument(f"--{f.name}", nargs="+", type=get_args(f.type)[0], **about)
        else:
            parser.add_argument(f"--{f.name}", type=f.type, **about)
    flags = vars(parser.parse_args(argv))
    if flags.pop("list", False):
        print(table())
        sys.exit(0)
    algo = flags.get("algo", Config.algo)
    own = {"output_dir": f"runs/{algo}", **PRESETS[algo]}
    if algo == "itool":
        own["learning_rate"] = TABLE_9.get(flags.get("preference", "simpo"), 0.0)
    config = Config(**{**own, **flags})
    if config.stages == "sft" and algo != "sft":
        parser.error(f"--stages sft with --algo {algo}: take --algo sft, which has the rates and schedule of SFT")
    typed = {word.partition("=")[0] for word in argv}
    for flag, (needs, is_read) in NEEDS.items():
        if typed & {f"--{flag}", f"--no_{flag}"} and not is_read(config):
            parser.error(f"--{flag} has no effect here (--algo {algo}, --stages {config.stages}): it needs {needs}")
    return config


def table() -> str:
    """The methods: name and what it is, then, one per line, what differs from ToolUPT's row and where it comes from."""
    width, lines = max(map(len, PRESETS)), []
    for name, preset in PRESETS.items():
        lines += [f"{name:{width}}  {SENTENCES[name]}"]
        for knob, value in preset.items():
            flag = f"--{knob}" if value is True else f"--{knob} {_text(value)}"
            lines += [f"{'':{width}}    {flag:28}  {source_of(name, knob, value)}"]
    lines += [
        "",
        "Every other value is a default of Config in train.py, where its source stands beside it.",
    ]
    return "\n".join(lines)


def source_of(algo: str, knob: str, value: object) -> str:
    """Where a value of a row of PRESETS comes from."""
    return SOURCES.get(f"{algo} {knob} {_text(value)}") or SOURCES[f"{knob} {_text(value)}"]


def _text(value: object) -> str:
    """A value as the command line takes it."""
    return " ".join(value) if isinstance(value, list) else str(value)


def announce(config: Config, world: int) -> str:
    """What is about to happen: every knob, the method in a sentence, tokens per step, the output folder."""
    prompts, sampled = config.train_batch_size, config.train_batch_size * config.num_generations
    knobs = "\n".join(f"  {name} = {value}" for name, value in asdict(config).items())
    step = (
        f"{prompts} prompts of up to {config.max_prompt_length} tokens, {sampled} responses of up to "
        f"{config.max_completion_length}, at most "
        f"{prompts * config.max_prompt_length + sampled * config.max_completion_length:,} tokens"
    )
    if "rl" not in config.stages:
        pairs = " or pairs" if "itool" in config.stages else ""
        step = f"{prompts} examples{pairs}, prompts of up to {config.max_prompt_length} tokens"
    if config.stages == "sft,rl":
        step += f"\n{config.sft_max_steps} steps of SFT (--sft_max_steps), then {config.max_steps} of RL (--max_steps)"
    return (
        f"{knobs}\n{config.algo}: {SENTENCES[config.algo]}\n"
        f"{world} rank(s); a step: {step}\noutput: {config.output_dir}"
    )


def init_distributed() -> None:
    """Join torchrun's process group, or make one of a single rank."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    if "TORCHELASTIC_RESTART_COUNT" in os.environ and os.environ["GROUP_WORLD_SIZE"] == "1":
        # torchrun keeps one store over its restarts: without a prefix, ranks find the addresses of those that died.
        # Agents count their own restarts, so several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    else:
        dist.init_process_group(backend)


def train(config: Config, then: str = "") -> Run:
    """Run the stages of `config`; a second stage starts from the first one's best checkpoint, with a fresh optimiser.

    then  the stage that follows those of `config`: what it cannot work with is refused now
    """
    check(config, dist.get_world_size())  # a mistake of the second stage, too, ends the run here
    if not config.warmup:
        config = replace(config, split="none")
    name, _, rest = config.stages.partition(",")
    if rest:
        own = {"stages": name, "output_dir": f"{config.output_dir}/{name}"}
        if name == "sft":
            own = {**PRESETS["sft"], **own, "max_steps": config.sft_max_steps}
            own |= {"learning_rate": config.sft_learning_rate}
        if name == "warmup":
            own["quant"] = "none"  # Appendix B.1: LoRA in the warm-up, QLoRA after it
        first = replace(config, **own)
        where = config.resume_from_checkpoint  # a path belongs to the stage whose folder it lies in
        if where not in ("", "latest"):
            in_rest = Path(where).resolve().parent == Path(config.output_dir).resolve()
            first = replace(first, resume_from_checkpoint="latest" if in_rest else where)
            config = replace(config, resume_from_checkpoint=where if in_rest else "")
        refuse_earlier_run(replace(config, stages=rest))  # before hours of the first stage
        best = train(first, then=rest).best
        gc.collect()  # model and moments of the first stage, before the second takes memory
        torch.cuda.empty_cache()
        config = replace(config, stages=rest, model_name_or_path=str(best))
    run = Run(config, then)
    run.start()
    sync(run)
    loop = {"rl": run_rl, "sft": run_sft, "warmup": run_sft, "itool": run_itool}[config.stages]
    if run.first_step == 0:
        before = evaluate(config, run)
        run.log(-1, before)
        if run.rank == 0:
            n, accuracy = len(run.eval_examples), before["eval/accuracy"]
            print(
                f"before training: {accuracy:.1%} right on {n} held-out examples", flush=True
            )
    run.best = loop(config, run)
    run.close()
    return run


def inspect(argv: list[str]) -> None:
    """`train.py audit RUN` and `train.py show RUN --step N`."""
    parser = argparse.ArgumentParser(prog="train.py")
    parser.add_argument("command", choices=("audit", "show"))
    parser.add_argument("run", type=Path, help="output folder of a run")
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--by", choices=("advantages", "token_rewards"), default="advantages")
    args = parser.parse_args(argv)
    try:
        shown = (
            audit(args.run)
            if args.command == "audit"
            else report.show(args.run, args.step, args.by)
        )
        print(shown)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def main(argv: list[str] | None = None) -> None:
    """The command line; `leave` lists the exit codes."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["audit"], ["show"]):
        return inspect(argv)
    config = parse_args(argv)
    init_distributed()
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # where torchrun is killed its ranks save and leave too
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    first = dist.get_rank() == 0
    try:
        check(config, dist.get_world_size())
        if first:
            print(announce(config, dist.get_world_size()), flush=True)
        run = train(config)
        if first:
            print(report.summary(run.out, run.tokenizer))
    except BaseException as error:  # noqa: BLE001 - nothing may leave a rank waiting
        leave(error)
    dist.destroy_process_group()


def leave(error: BaseException) -> None:
    """Say why this rank ends and end it, at once: its peers may be waiting for it in a collective.

    Exit code 2: a user's mistake or a check that failed, one line; 143 after SIGTERM and 130 after Ctrl-C, when all is
    saved; 1: anything else, with a traceback. torchrun prints the first failure last, from the file that is written here.
    """
    rank = dist.get_rank()
    plain, code = f"error: {error}", 2
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        number = getattr(error, "signal", signal.SIGINT)
        plain, code = str(error) or "interrupted before the first step", 128 + number
    elif not isinstance(error, (ValueError, OSError, ImportError)):
        plain, code = "".join(traceback.format_exception(error)), 1
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(ECHO)  # a peer ended first; torchrun tells, and ends this rank meanwhile
    else:
        error = error.with_traceback(None)  # torchrun prints one line, too
        error.__cause__, error.__suppress_context__ = None, True
    if code in (1, 2) or rank == 0:
        print(plain if rank == 0 else f"rank {rank}: {plain}", file=sys.stderr)
    if code in (1, 2):
        get_error_handler().record_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
