"""Losses with expert responses: SFT, selective preference optimisation (SPO), ToolUPT. ToolUPT 3.

With p = exp(logp), sigm the logistic function and * for expert tokens:

    sft_loss            -1/N_exp sum log p*                                       Eq. 1
    keep_mask           1_preserve: of an answer only the opening <answer> tag    Eq. 19
    uncertainty_weight  phi(p) = p (1 - p), detached                              Eq. 21
    spo_loss            1/N_exp  sum phi(p*) 1_preserve [1 - sigm( beta log p*)]
                      + 1/N_roll sum phi(p)  1(A < 0)   [1 - sigm(-beta log p)]   Eqs. 20, 22
    toolupt_loss        balance L_SPO + (1 - balance) L_FG-DAPO                   Eq. 23
    balance_at          low -> high -> low in straight lines, again and again     gamma of Eq. 23

Departures from the paper:
1. Sign. Eqs. 20 and 22 print a minus before both sums; descent would then make expert tokens less
   likely and rejected tokens more likely. KTO, which they adapt, minimises 1 - sigm(...); so do we.
2. beta has no value in the paper; we take 1.0. With KTO's 0.1, which is meant for whole responses,
   the gradient of a token is 9 times smaller at p = 0.5.
   No value of beta reaches improbable expert tokens through phi (slope below p / 4). Without it
   (Eq. 20) the slope is at most 0.224 / |log p|, at beta = 1.54 / |log p|: see bench/README.md.
3. phi is detached, as in both public codes of CHORD. Undetached it would push p to 0 or 1.
4. The schedule of gamma is described in words only; all its numbers are ours. The ends 0.02 and 0.3
   both occur in CHORD, but not as a pair: its mixed recipe goes from 0.02 to 0.5, and its appendix
   has a peak of 0.3. 100 steps up and 200 down make two cycles of the paper's 600 steps.
5. Eq. 22 averages the experts over B examples and the rollouts over B-hat prompts. Here the experts
   are those of the step's own prompts, so B = B-hat.
6. Eq. 19 cuts an answer after as many tokens as "<answer>" has when tokenised alone.

As printed, and unlike KTO, there is no reference model. N_exp and N_roll count all tokens,
including those that are not preserved or whose advantage is not negative. A = 0 is not rejected.
The entropy bonus is left to the caller, outside the mix of Eq. 23, which does not show it.

Denominators (num_tokens, num_expert_tokens) default to the local count. With micro-batches or
several ranks pass the count of the whole optimiser step: then losses, gradients and stats of the
parts add up to those of the whole.

Padding may hold anything, -inf and nan included. A response without tokens contributes nothing.
bfloat16 becomes float32.

B responses, T response tokens, E expert responses, S expert tokens (right-padded). Masks are bool.
Copy this file on its own: it needs torch only.
"""

import torch
from torch import Tensor

Stats = dict[str, Tensor]


def sft_loss(
    logps: Tensor, expert_mask: Tensor, *, num_tokens: int | Tensor | None = None
) -> tuple[Tensor, Stats]:
    """Negative log-likelihood of the expert, mean over all tokens (Eq. 1).

    logps        (E, S) log-probs of the expert tokens, with grad
    expert_mask  (E, S) bool
    num_tokens   expert tokens of the whole step; default: of this call

    Returns scalar loss and stats: "nll", the loss; "expert_prob", mean probability of a token.
    """
    count = _denominator(num_tokens, expert_mask)
    logps = _masked(expert_mask, logps)
    loss = -logps.sum() / count
    probability = (logps.detach().exp() * expert_mask).sum() / count
    return loss, {"nll": loss.detach(), "expert_prob": probability}


def keep_mask(expert_mask: Tensor, is_answer: Tensor, tag_length: int) -> Tensor:
    """Expert tokens to learn from: all of a tool call, the opening tag of an answer (Eq. 19).

    expert_mask  (E, S) bool
    is_answer    (E,) bool, the expert response is an <answer>
    tag_length   tokens of "<answer>", without special tokens

    Returns (E, S) bool, False on padding.
    """
    assert is_answer.shape == expert_mask.shape[:1], f"is_answer {tuple(is_answer.shape)}"
    assert is_answer.dtype == torch.bool, f"is_answer is {is_answer.dtype}: want torch.bool"
    assert tag_length > 0, f"tag_length {tag_length}: no token of the tag would be learnt"
    in_tag = torch.arange(expert_mask.shape[1], device=expert_mask.device) < tag_length
    return expert_mask & (in_tag | ~is_answer[:, None])


def uncertainty_weight(logps: Tensor) -> Tensor:
    """phi = p (1 - p): 0 where p is 0 or 1, at most 0.25 (Eq. 21).

    logps  log-probs, any shape

    Returns the same shape, detached.
    """
    logps = _float(logps.detach())
    return logps.exp() * -torch.expm1(logps)


def spo_loss(
    expert_logps: Tensor,
    expert_mask: Tensor,
    expert_keep: Tensor,
    logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    beta: float = 1.0,
    weighted: bool = True,
    detached: bool = False,
    num_expert_tokens: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Expert tokens as chosen and rollout tokens of negative advantage as rejected (Eqs. 20, 22).

    expert_logps       (E, S) log-probs of the expert tokens, with grad
    expert_mask        (E, S) bool, all tokens of the expert responses
    expert_keep        (E, S) bool, of keep_mask
    logps              (B, T) log-probs of the rollout tokens, with grad
    advantages         (B, T) token advantages
    response_mask      (B, T) bool
    beta               slope of the logistic function
    weighted           True: with phi, Eq. 22. False: Eq. 20
    detached           True: the terms of Eqs. 20, 22 are weights, detached, of -log p for chosen
                       and log p for rejected tokens. Not in the paper
    num_expert_tokens  N_exp, expert tokens of the whole step; default: of this call
    num_tokens         N_roll, rollout tokens of the whole step; default: of this call

    Returns scalar loss and stats: "spo/chosen" and "spo/rejected", the two terms of the loss;
    "spo/kept" and "spo/negative", shares of expert tokens preserved and rollout tokens rejected.
    """
    for mask in expert_mask, expert_keep, response_mask:
        assert mask.dtype == torch.bool, f"mask is {mask.dtype}: want torch.bool"
    assert expert_keep.shape == expert_mask.shape, f"expert_keep {tuple(expert_keep.shape)}"
    assert advantages.shape == response_mask.shape, f"advantages {tuple(advantages.shape)}"
    expert_count = _denominator(num_expert_tokens, expert_mask)
    count = _denominator(num_tokens, response_mask)
    kept = expert_mask & expert_keep
    negative = response_mask & (advantages < 0)
    chosen = _preference_sum(expert_logps, kept, beta, weighted, detached) / expert_count
    rejected = _preference_sum(logps, negative, -beta, weighted, detached) / count
    return chosen + rejected, {
        "spo/chosen": chosen.detach(),
        "spo/rejected": rejected.detach(),
        "spo/kept": kept.sum() / expert_count,
        "spo/negative": negative.sum() / count,
    }


def toolupt_loss(spo: Tensor, dapo: Tensor, balance: float) -> Tensor:
    """SPO and FG-DAPO losses mixed, balance * spo + (1 - balance) * dapo (Eq. 23).

    spo      scalar of spo_loss
    dapo     scalar of dapo_loss in grpo.py with token advantages (Eq. 18)
    balance  gamma of Eq. 23, in [0, 1]
    """
    assert 0 <= balance <= 1, f"balance {balance}: want 0 .. 1"
    return balance * spo + (1 - balance) * dapo


def balance_at(
    step: int, *, low: float = 0.02, high: float = 0.3, up: int = 100, down: int = 200
) -> float:
    """gamma of Eq. 23 at a step: a triangle low -> high -> low, period up + down.

    step       optimiser step, from 0
    low, high  its ends, in [0, 1]
    up, down   steps of the rise and of the fall
    """
    assert up >= 0 and down >= 0 and up + down > 0, f"up {up}, down {down}: want a period"
    phase = step % (up + down)
    share = phase / up if phase < up else (up + down - phase) / down
    return low + (high - low) * share


def _preference_sum(
    logps: Tensor, mask: Tensor, beta: float, weighted: bool, detached: bool
) -> Tensor:
    """sum over mask of phi(p) [1 - sigm(beta log p)], or of that as a weight of -+log p."""
    assert logps.shape == mask.shape, f"logps {tuple(logps.shape)} for {tuple(mask.shape)}"
    logps = _masked(mask, logps)
    terms = torch.sigmoid(-beta * logps)  # = 1 - sigm(beta log p), without cancellation
    if weighted:
        terms = terms * uncertainty_weight(logps)
    if detached:
        terms = terms.detach() * (-logps if beta > 0 else logps)
    return (terms * mask).sum()


def _masked(mask: Tensor, x: Tensor) -> Tensor:
    """x, (B, 1) or (B, T), as floats with 0 outside the mask.

    `where` before any arithmetic: 0 * nan is nan, and so is its gradient.
    """
    assert mask.dtype == torch.bool, f"mask is {mask.dtype}: want torch.bool"
    assert x.shape in (mask.shape, (len(mask), 1)), f"{tuple(x.shape)} for {tuple(mask.shape)}"
    return torch.where(mask, _float(x), 0.0)


def _denominator(given: int | Tensor | None, mask: Tensor) -> int | Tensor:
    """The count of the whole step if given, else the local one; 1 for an average of nothing."""
    count = mask.sum() if given is None else given
    assert count > 0 or not mask.any(), f"denominator {count} for {int(mask.sum())} local items"
    return count or 1


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
