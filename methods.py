"""The methods: one dataclass per row of ToolUPT's Table 1 and Figure 4, and Dr. GRPO.

Read a row from top to bottom:

    fields        the knobs that only this row reads, each with unit and source: flags of train.py
    defaults      values of common knobs (Config in train.py) that this row changes
    reward        what a response earns, from its outcome (Eqs. 3-12)
    keep          whether a group is trained on: DAPO's dynamic sampling
    advantages    of a group: per response (below Eq. 2) or per token (Eqs. 13-17)
    expert_in_group, divide_by_std  of the advantages per response
    objective     the loss of a micro-batch and its stats, before the entropy bonus of `loss`; on
                  rows masked to rollouts or experts, one term at balance 0 or 1 (term_norms)

A row that is another with one thing changed inherits and overrides that thing, so neighbours differ
by what the papers say they differ in. ToolUPT's code is not public: where its text is silent or
contradicts itself, the rows say what was chosen.

Training is strictly on-policy (Table 7), one update per batch: old log-probs are the detached ones,
the ratio is 1, and no clip range could act. Stats add up over micro-batches and ranks.

To add a method, write its loss in a mathematics file, a dataclass here and a line in METHODS.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import baselines
import fgae
import grpo
import spo
from knobs import Count, Natural, NotNegative, Positive, Several, Share, check_bounds, knob, unread

Stats = dict[str, Tensor]
Defaults = dict[str, tuple[Any, str]]  # knob -> value, source


# -------------------------------------------------------------------------------------- what flows


@dataclass(eq=False)
class Group:
    """One prompt and everything that answers it: the unit of work."""

    example: Any  # data.Example
    prompt: list[int]  # token ids
    target: list[int]  # token ids of the expert response and EOS
    max_length: int  # tokens, the limit of a response
    with_expert: bool  # whether the expert response is trained on
    seed: int  # of its rollouts
    place: int = 0  # in the stream of all batches
    num_thoughts: int = 0  # first tokens of `target` that are an empty block of thoughts
    samples: list = field(default_factory=list)  # K rollout.Sample
    outcomes: list = field(default_factory=list)  # K, of scoring.Reward
    bounds: tuple[float, float] = (-3.0, 4.0)  # of an outcome's total (Eq. 12)
    expert_outcome: Any = None  # the same of the expert response
    rewards: list[float] = field(default_factory=list)  # K, what the advantages are made of
    matched: Tensor | None = None  # (K, T) bool, tokens of `said` that are the expert's, if known
    token_rewards: Tensor | None = None  # (K, T), rows with token rewards only
    advantages: Tensor | None = None  # (K, T), or (K + 1, T) where the expert is in the group
    logps: Tensor | None = None  # (K, T) of the trainer, filled by the update

    @property
    def responses(self) -> list[list[int]]:
        """Token ids of the rollouts, then of the expert where it is trained on."""
        return [sample.token_ids for sample in self.samples] + [self.target] * self.with_expert

    @property
    def said(self) -> tuple[list[list[int]], list[int]]:
        """Token ids of the rollouts, and of the expert response, behind their thoughts."""
        rollouts = [sample.token_ids[sample.num_thoughts :] for sample in self.samples]
        return rollouts, self.target[self.num_thoughts :]

    @property
    def width(self) -> int:
        """T, tokens of the longest rollout."""
        return max(1, *(len(sample.token_ids) for sample in self.samples))


@dataclass
class Rows:
    """A micro-batch, one row per response, padded to T; a group's expert follows its rollouts."""

    mask: Tensor  # (R, T) bool
    is_expert: Tensor | None = None  # (R,) bool; SFT's rows have only the mask
    is_answer: Tensor | None = None  # (R,) bool, the ground truth is an answer
    correct: Tensor | None = None  # (R,) bool, completely right
    advantages: Tensor | None = None  # (R, T), 0 on experts outside the group
    sampler_logps: Tensor | None = None  # (R, T), 0 on experts


def rows_of(groups: list[Group], mask: Tensor) -> Rows:
    """What the losses need besides log-probs, shaped like `mask`, (R, T), and on its device."""
    advantages, sampler_logps = torch.zeros(mask.shape), torch.zeros(mask.shape)
    is_expert, is_answer, correct = [], [], []
    for group in groups:
        first, K, E = len(is_expert), len(group.samples), int(group.with_expert)
        for row, sample in enumerate(group.samples, first):
            sampler_logps[row, : len(sample.logps)] = torch.tensor(sample.logps)
        in_group, width = group.advantages.shape
        advantages[first : first + in_group, :width] = group.advantages
        is_expert += [False] * K + [True] * E
        is_answer += [group.example.kind == "answer"] * (K + E)
        correct += [outcome.right for outcome in group.outcomes] + [True] * E
    flags = [torch.tensor(x, dtype=torch.bool) for x in (is_expert, is_answer, correct)]
    return Rows(mask, *(x.to(mask.device) for x in (*flags, advantages, sampler_logps)))


# --------------------------------------------------------------------------------- what rows share


class Row:
    """The interface of every row; iTool's is in itool.py."""

    defaults: ClassVar[Defaults] = {}  # of common knobs
    logprobs_mode: ClassVar[str] = "processed_logprobs"  # of the engine
    keeps_best: ClassVar[bool] = False  # in checkpoint-best

    def check(self, config: Any) -> None:
        """ValueError if these knobs are invalid or contradict the common ones."""
        check_bounds(self)

    def check_examples(self, examples: list, config: Any) -> None:
        """ValueError if there are too few training examples."""

    def flags_without_effect(self) -> dict[str, str]:
        """Knobs that other knobs switch off, and why."""
        return {}

    def question_length(self, tokenizer: Any, max_length: int) -> int:
        """Tokens of the longest prompt that the method itself adds; 0: none."""
        return 0


@dataclass
class Rollouts(Row):
    """What all rows with rollouts share."""

    max_steps: Count = knob(600, "optimiser steps; ToolUPT Table 7")
    num_generations: Several = knob(8, "sampled responses per prompt; ToolUPT Table 7")
    entropy_coef: float = knob(3e-4, "weight of the entropy bonus; ToolUPT Table 7")
    learns_from_expert: ClassVar[bool] = False
    rejects: ClassVar[bool] = False  # pushes rollout tokens away in the expert's term, too
    expert_in_group: ClassVar[bool] = False  # its reward counts in the group's mean and std
    divide_by_std: ClassVar[bool] = True  # R - mean is divided by the group's std (below Eq. 2)
    alignment: ClassVar[str] = "positional"  # of the matched tokens that are logged
    keep: ClassVar[Any] = None  # every group is trained on

    def reward(self, outcome: Any, length: int, max_length: int) -> float:
        """The outcome reward, in [-3, 4] (Eq. 12) or a user's bounds; lengths in tokens."""
        return outcome.total

    def advantages(self, group: Group) -> Tensor:
        """Rewards relative to their group, one for all tokens of a response (below Eq. 2)."""
        scores = list(group.rewards)
        if self.expert_in_group:  # scored like every other response
            scores.append(self.reward(group.expert_outcome, len(group.target), group.max_length))
        own = grpo.group_advantages(torch.tensor(scores), len(scores), std=self.divide_by_std)
        return own[:, None].expand(-1, group.width)

    def schedule(self, step: int) -> dict[str, float]:
        """Values that change from step to step, by the name of their metric."""
        return {}

    def loss(
        self, rows: Rows, logps: Tensor, entropy: Tensor, totals: dict[str, int], step: int
    ) -> tuple[Tensor, Stats]:
        """The row's objective minus the entropy bonus, a scalar with gradient; and stats.

        rows     a micro-batch of R responses, at most T tokens long
        logps    (R, T) log-probs, with grad
        entropy  (R, T) entropy of the policy at each token, nats, with grad
        totals   tokens, responses and expert_tokens of the whole step, the denominators; max_length
                 of a response and tag_length of "<answer>", tokens
        step     optimiser step, from 0

        The bonus (Table 7) is the entropy of the rollouts alone, averaged as the policy loss is
        (LUFFY, SRFT: over rollout tokens alone). It stays outside the mix of Eq. 23, which does not
        show it.
        """
        balance = self.schedule(step).get("balance", 0.0)
        loss, stats = self.objective(rows, logps, entropy, totals, balance)
        rollouts = rows.mask & ~rows.is_expert[:, None]
        entropy = torch.where(rollouts, entropy, 0.0)
        loss = loss - self.entropy_coef * self.reduced(entropy, rollouts, totals)
        mean = entropy.detach().sum() / totals["tokens"]
        return loss, {**stats, "loss": loss.detach(), "entropy": mean}

    def reduced(self, entropy: Tensor, mask: Tensor, totals: dict[str, int]) -> Tensor:
        """Mean over the rollout tokens of the step."""
        return entropy.sum() / totals["tokens"]


# ----------------------------------------------------------------------------------------- Table 1


@dataclass
class Sft(Row):
    """Imitates the expert responses (Eq. 1) and keeps the checkpoint of lowest validation loss."""

    max_steps: Count = knob(3000, "optimiser steps; ToolUPT Table 7")
    keeps_best = True
    defaults: ClassVar[Defaults] = {
        "learning_rate": (1e-5, "ToolUPT Table 7"),
        "lr_scheduler_type": ("cosine", "ToolUPT Table 7"),
        "warmup_ratio": (0.1, "veRL's SFT trainer, whose defaults Table 7 repeats"),
        "adam_beta2": (0.95, "veRL's SFT trainer"),
    }

    def loss(self, rows, logps, entropy, totals, step) -> tuple[Tensor, Stats]:
        """Negative log-likelihood, mean over the expert tokens of the step (Eq. 1)."""
        loss, stats = spo.sft_loss(logps, rows.mask, num_tokens=totals["expert_tokens"])
        return loss, {**stats, "loss": loss.detach()}


@dataclass
class Grpo(Rollouts):
    """Binary reward, group advantages, mean over responses of token means (Eq. 2).

    The token mean, veRL's default, is what the paper presents as DAPO's change.
    """

    def reward(self, outcome, length, max_length) -> float:
        """1 where the response is completely right, else 0 (ToolUPT section 4.3)."""
        return float(outcome.right)

    def objective(self, rows, logps, entropy, totals, balance) -> tuple[Tensor, Stats]:
        A, N = rows.advantages[:, 0], totals["responses"]
        return grpo.grpo_loss(logps, logps, A, rows.mask, num_responses=N)[0], {}

    def reduced(self, entropy, mask, totals) -> Tensor:
        return (entropy.sum(1) / mask.sum(1).clamp(min=1)).sum() / totals["responses"]


@dataclass
class Dapo(Rollouts):
    """Outcome reward, token mean, dynamic sampling and the soft overlong penalty (DAPO).

    The penalty falls from 0 to -1 between 768 and 1,024 tokens; ToolUPT gives no numbers, DAPO's
    are the last 20 % of 20,480. Groups are kept or dropped by the reward without it.
    """

    generation_batches: Count = knob(1, "batches per round of dynamic sampling; DAPO's script: 3")
    overlong: Share = knob(0.25, "part of a response with a growing penalty; ours; DAPO 3.4: 0.2")
    tis_cap: NotNegative = knob(0.0, "truncated importance sampling, usually 2; 0: off, as in DAPO")

    def check(self, config: Any) -> None:
        super().check(config)
        if self.overlong and round(self.overlong * config.max_completion_length) < 1:
            raise ValueError(
                f"--overlong {self.overlong}: take 0, or a share of --max_completion_length that "
                "amounts to a token or more"
            )

    def reward(self, outcome, length, max_length) -> float:
        """The outcome reward, less up to 1 as the response nears its limit."""
        if not self.overlong:
            return outcome.total
        ramp = round(self.overlong * max_length)
        penalty = grpo.overlong_penalty(torch.tensor([length]), max_length, ramp)
        return outcome.total + float(penalty)

    def keep(self, group: Group) -> bool:
        """Whether the outcomes differ: if not, every advantage is 0 (DAPO section 3.2)."""
        totals = torch.tensor([outcome.total for outcome in group.outcomes])
        return bool(grpo.informative_groups(totals, len(totals)))

    def objective(self, rows, logps, entropy, totals, balance) -> tuple[Tensor, Stats]:
        on, N, weights, stats = ~rows.is_expert, totals["tokens"], None, {}
        logps, A, mask = logps[on], rows.advantages[on], rows.mask[on]
        if self.tis_cap:
            sampler = rows.sampler_logps[on]
            weights = grpo.truncated_importance_weights(logps, sampler, mask, self.tis_cap)
            stats["sampling/importance_sampling_ratio/mean"] = weights.sum() / N
        loss, _ = grpo.dapo_loss(logps, logps, A, mask, num_tokens=N, weights=weights)
        return loss, stats


@dataclass
class DapoStar(Dapo):
    """DAPO without dynamic sampling and the overlong penalty, all else kept (ToolUPT 4.3)."""

    generation_batches: int = unread(1)
    overlong: float = unread(0.0)
    keep = None


@dataclass
class FgDapoStar(DapoStar):
    """DAPO* with token rewards and token advantages (Eqs. 13-18)."""

    alignment: Literal["positional", "lcs"] = knob(
        "positional", "how tokens are compared with the expert's (fgae.py)"
    )

    def advantages(self, group: Group) -> Tensor:
        """Token rewards, normalised over all tokens of the group (Eqs. 13-17)."""
        K = len(group.samples)
        _, mask = _padded([sample.token_ids for sample in group.samples])
        matched = torch.zeros_like(mask)
        # answers have no process rewards: "for tool_call responses"
        if group.example.kind == "tool_call":
            group.matched = matched_tokens(*group.said, self.alignment)
            for k, own in enumerate(group.matched):
                first, end = group.samples[k].num_thoughts, len(group.samples[k].token_ids)
                matched[k, first:end] = own[: end - first]
        lower, upper = group.bounds
        scores = torch.tensor(group.rewards)
        group.token_rewards = fgae.token_rewards(scores, matched, upper=upper, lower=lower)
        return fgae.token_advantages(group.token_rewards, mask, K)


def matched_tokens(responses: list[list[int]], target: list[int], alignment: str) -> Tensor:
    """(K, T) bool, which tokens of the responses are the expert's (fgae.py)."""
    ids, mask = _padded(responses)
    expert_ids, expert_mask = _padded([target] * len(responses))
    if alignment == "lcs":
        expert_mask[:, -1] = False  # a wrong answer must not earn the bound for its EOS
    return fgae.matched_tokens(ids, mask, expert_ids, expert_mask, alignment=alignment)


def _padded(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids right-padded to (R, T), T at least 1, and their mask."""
    lengths = torch.tensor([len(ids) for ids in lists])
    mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.long)
    padded[mask] = torch.tensor([i for ids in lists for i in ids], dtype=torch.long)
    return padded, mask


@dataclass
class AfterSft:
    """SFT first; the row starts from its best checkpoint with a fresh optimiser (ToolUPT 4.3)."""

    sft_max_steps: Count = knob(3000, "optimiser steps of SFT; ToolUPT Table 7")
    sft_learning_rate: float = knob(1e-5, "of SFT; ToolUPT Table 7; its schedule is that of sft")

    def first_stage(self) -> tuple[Sft, dict[str, Any]]:
        """SFT, and its values of common knobs."""
        common = {name: value for name, (value, _) in Sft.defaults.items()}
        return Sft(self.sft_max_steps), {**common, "learning_rate": self.sft_learning_rate}


@dataclass
class SftDapoStar(AfterSft, DapoStar):
    """SFT, then DAPO* from SFT's best checkpoint."""


@dataclass
class SftFgDapoStar(AfterSft, FgDapoStar):
    """SFT, then FG-DAPO* from SFT's best checkpoint."""


@dataclass
class Luffy(Rollouts):
    """Rollouts and an expert response in one group, p/(p+0.1) on expert tokens (LUFFY Eq. 5).

    The reward is graded, as DAPO's; the advantages have no std (baselines.py).
    """

    num_generations: Several = knob(7, "responses per prompt; with the expert a group of 8")
    learns_from_expert = expert_in_group = True
    divide_by_std = False

    def objective(self, rows, logps, entropy, totals, balance) -> tuple[Tensor, Stats]:
        A, Z = rows.advantages[:, 0], totals["tokens"] + totals["expert_tokens"]
        return baselines.luffy_loss(logps, logps, A, rows.mask, rows.is_expert, num_tokens=Z)


@dataclass
class Srft(Rollouts):
    """Entropy-weighted SFT and RL on expert and rollouts in one loss (SRFT Eqs. 6-13).

    The reward is binary, as in its paper; advantages have the printed std, which both public codes
    leave out. The variant hpt shapes p and has no std; its denominators are the paper's.
    """

    num_generations: Several = knob(7, "responses per prompt, as in LUFFY; SRFT's own run: 8")
    srft_variant: Literal["paper", "hpt"] = knob("paper", "hpt: SRFT's public re-implementation")
    srft_shaped: bool = knob(False, "p/(p+0.1) in the expert's RL term, as public codes (and hpt)")
    learns_from_expert = expert_in_group = True
    reward = Grpo.reward

    @property
    def divide_by_std(self) -> bool:
        """As printed in the paper; hpt has R - mean."""
        return self.srft_variant == "paper"

    def objective(self, rows, logps, entropy, totals, balance) -> tuple[Tensor, Stats]:
        own = (rows.advantages[:, 0], rows.correct, rows.mask, rows.is_expert)
        kind = {"variant": self.srft_variant, "shaped": self.srft_shaped}
        counts = _both(totals)
        counts["num_tokens"] += counts["num_expert_tokens"]
        return baselines.srft_loss(logps, entropy, *own, **kind, **counts)


def _both(totals: dict[str, int]) -> dict[str, int]:
    """The denominators of rollout and expert tokens."""
    return {"num_tokens": totals["tokens"], "num_expert_tokens": totals["expert_tokens"]}


@dataclass
class Chord(Rollouts):
    """0.9 GRPO + 0.1 SFT weighted by p(1-p): CHORD-phi (CHORD Eq. 2).

    mu = 0.1 is the best of its paper on tool use, and needs no schedule. The experts are those of
    the step's own prompts; CHORD has a batch apart. ToolUPT does not say which reward this row had:
    it is binary, as in CHORD's ToolACE example.
    """

    chord_phi: bool = knob(True, "--no_chord_phi: CHORD-mu, plain SFT; needs a decaying mu")
    chord_mu: Share = knob(0.1, "weight mu of the SFT term; with a schedule, its final value")
    chord_mu_peak: Share = knob(0.1, "its highest value; CHORD-mu on tool use: 0.9, down to 0.05")
    chord_mu_warmup: Natural = knob(0, "steps from 0 to the peak")
    chord_mu_decay: Natural = knob(0, "steps of the cosine to --chord_mu; theirs: 30")
    learns_from_expert = True
    reward = Grpo.reward

    def check(self, config: Any) -> None:
        super().check(config)
        if self.chord_mu_warmup + self.chord_mu_decay and self.chord_mu_peak < self.chord_mu:
            raise ValueError(
                f"--chord_mu_peak {self.chord_mu_peak} is below --chord_mu {self.chord_mu}, where "
                "the schedule ends: raise the peak, or drop the schedule"
            )

    def flags_without_effect(self) -> dict[str, str]:
        why = {"chord_mu_peak": "--chord_mu is constant; give a --chord_mu_decay"}
        return {} if self.chord_mu_warmup + self.chord_mu_decay else why

    def schedule(self, step: int) -> dict[str, float]:
        steps = {"warmup": self.chord_mu_warmup, "decay": self.chord_mu_decay}
        ends = {"peak": self.chord_mu_peak, "valley": self.chord_mu}
        return {"balance": baselines.chord_mu_at(step, **steps, **ends)}

    def objective(self, rows, logps, entropy, totals, balance) -> tuple[Tensor, Stats]:
        on, off = ~rows.is_expert, rows.is_expert
        rollouts = (logps[on], logps[on], rows.advantages[on, 0], rows.mask[on])
        kind = {"mu": balance, "phi": self.chord_phi}
        experts = (logps[off], rows.mask[off])
        loss, stats = baselines.chord_loss(*rollouts, *experts, **kind, **_both(totals))
        return loss, {name: stats[name] for name in ("chord/grpo", "chord/sft", "expert_prob")}


@dataclass
class ToolUpt(FgDapoStar):
    """FG-DAPO* and selective preference optimisation, mixed by a cyclic weight (Eq. 23).

    phi (Eq. 22) silences SPO on tokens that the policy cannot sample. Where a toy world's expert
    follows a rule that the base model does not know, the defaults do no better than FG-DAPO*; SPO
    learns the rule without phi (Eq. 20), at beta 0.13 and a constant weight of 0.97
    (bench/study.py). The defaults keep the paper's last equation.
    """

    spo_beta: Positive = knob(1.0, "slope of SPO's logistic; ours: the paper gives no value")
    spo_phi: bool = knob(True, "weigh SPO's tokens by phi (Eq. 22); --no_spo_phi: Eq. 20")
    balance_low: Share = knob(0.02, "lowest weight of the expert loss; ours, as the next three")
    balance_high: Share = knob(0.3, "its highest weight; equal to the lowest: constant")
    balance_up: Count = knob(100, "steps from low to high")
    balance_down: Count = knob(200, "steps from high to low")
    learns_from_expert = rejects = True

    def check(self, config: Any) -> None:
        super().check(config)
        low, high = self.balance_low, self.balance_high
        if low > high:
            raise ValueError(f"--balance_low {low} is above --balance_high {high}: lower it")

    def schedule(self, step: int) -> dict[str, float]:
        low, high, up, down = (getattr(self, f"balance_{x}") for x in ("low", "high", "up", "down"))
        return {"balance": spo.balance_at(step, low=low, high=high, up=up, down=down)}

    def objective(self, rows, logps, entropy, totals, balance) -> tuple[Tensor, Stats]:
        policy, stats = super().objective(rows, logps, entropy, totals, balance)  # Eq. 18
        preference, parts = self.expert_loss(rows, logps, totals)  # Eq. 22
        return spo.toolupt_loss(preference, policy, balance), {**stats, **parts}

    def expert_loss(self, rows: Rows, logps: Tensor, totals: dict) -> tuple[Tensor, Stats]:
        """Expert tokens as chosen, rollout tokens of negative advantage as rejected (Eq. 22)."""
        on, off = ~rows.is_expert, rows.is_expert
        keep = spo.keep_mask(rows.mask[off], rows.is_answer[off], totals["tag_length"])  # Eq. 19
        experts = (logps[off], rows.mask[off], keep)
        rollouts = (logps[on], rows.advantages[on], rows.mask[on])
        form = {"beta": self.spo_beta, "weighted": self.spo_phi}
        return spo.spo_loss(*experts, *rollouts, **form, **_both(totals))


# ---------------------------------------------------------------------------------------- Figure 4


@dataclass
class ToolUptNoFgae(ToolUpt):
    """ToolUPT with sequence-level advantages and the outcome reward (Figure 4, left)."""

    alignment: str = unread("positional")
    advantages = Rollouts.advantages


@dataclass
class ToolUptNoSpo(ToolUpt):
    """ToolUPT with a plain SFT loss in place of SPO (Figure 4, right)."""

    spo_beta: float = unread(1.0)
    spo_phi: bool = unread(True)
    rejects = False

    def expert_loss(self, rows: Rows, logps: Tensor, totals: dict) -> tuple[Tensor, Stats]:
        off = rows.is_expert
        return spo.sft_loss(logps[off], rows.mask[off], num_tokens=totals["expert_tokens"])


# ------------------------------------------------------------------------ not in the paper's table


@dataclass
class DrGrpo(Grpo):
    """GRPO without std, over the constant denominator N * max_length (Dr.GRPO)."""

    divide_by_std = False

    def objective(self, rows, logps, entropy, totals, balance) -> tuple[Tensor, Stats]:
        A, N = rows.advantages[:, 0], totals["responses"]
        limit = {"max_length": totals["max_length"], "num_responses": N}
        return grpo.drgrpo_loss(logps, logps, A, rows.mask, **limit)[0], {}

    def reduced(self, entropy, mask, totals) -> Tensor:
        return entropy.sum() / (totals["responses"] * totals["max_length"])


METHODS = {
    "sft": Sft,
    "grpo": Grpo,
    "dapo": Dapo,
    "dapo_star": DapoStar,
    "fg_dapo_star": FgDapoStar,
    "sft_dapo_star": SftDapoStar,
    "sft_fg_dapo_star": SftFgDapoStar,
    "luffy": Luffy,
    "srft": Srft,
    "chord": Chord,
    "toolupt": ToolUpt,
    "toolupt_no_fgae": ToolUptNoFgae,
    "toolupt_no_spo": ToolUptNoSpo,
    "dr_grpo": DrGrpo,
}
