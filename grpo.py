"""Policy-gradient losses on groups of responses: GRPO, DAPO, GSPO, Dr.GRPO.

With r = exp(logps - old_logps) and one prompt's K rewards R_1 .. R_K:

    group_advantages   A_k = (R_k - mean) / (std + eps)                         below Eq. 2
    clipped_surrogate  l   = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)  in Eqs. 2 and 18
    grpo_loss          1/N sum_k 1/|y_k| sum_t l_kt                             Eq. 2
    dapo_loss          1/(sum_k |y_k|) sum_k sum_t l_kt                         DAPO; Eq. 18
    gspo_loss          1/N sum_k l_k, with r_k = exp(mean_t log r_kt)           GSPO
    drgrpo_loss        1/(N max_length) sum_k sum_t l_kt, and A_k = R_k - mean  Dr.GRPO
    overlong_penalty   min(0, (max_length - cache - |y|) / cache), at least -1  DAPO
    informative_groups  max_k R_k > min_k R_k                                   DAPO
    truncated_importance_weights  min(exp(logps - sampler_logps), cap)          TIS

Equation numbers are those of the ToolUPT paper. Departures from it:
1. Eq. 2 uses one epsilon for the clip range and for the std guard; we take 0.2 and 1e-6.
2. "Standard deviation" is Bessel's (ddof 1), as in veRL, TRL and oat; the text does not say.
3. Equal rewards give exactly 0: in float32 mean and std carry round-off of the same size, and eight
   rewards of 3.98647 would otherwise get |A| = 0.3.
4. Eq. 18 prints a symmetric clip; dapo_loss has DAPO's 0.2 / 0.28. Neither acts when training is
   strictly on-policy (Table 7): the ratio is then 1.
5. The log-ratio is clamped to [-20, 20] before exp; beyond that a token has no gradient.

Denominators (num_tokens, num_responses) default to the local count. With micro-batches or several
ranks pass that of the whole optimiser step, as Eqs. 2 and 18 print it (veRL averages over
micro-batches instead): then losses, gradients and stats of the parts add up to those of the whole.
Stats carry the loss's own denominator, in Dr.GRPO N * max_length tokens:
    clip_ratio   share of tokens (GSPO: responses) whose gradient the clip removed
    approx_kl    mean of old_logps - logps, nats per token

Padding may hold anything, -inf and nan included. A response without tokens contributes nothing.
Strictly on-policy: pass old_logps = logps; the losses detach it. bfloat16 becomes float32.

P prompts, K responses per prompt, B = P*K responses, T response tokens (right-padded). Rows
p*K .. p*K+K-1 answer prompt p. Masks are bool. Copy this file on its own: it needs torch only.
"""

import torch
from torch import Tensor

Stats = dict[str, Tensor]


def group_advantages(
    rewards: Tensor, group_size: int, *, eps: float = 1e-6, std: bool = True
) -> Tensor:
    """Rewards relative to their group, (R - mean) / (std + eps) (below Eq. 2).

    rewards     (B,) float or int
    group_size  K >= 2, rows of one prompt are neighbours
    eps         added to the std
    std         False: R - mean (Dr.GRPO, LUFFY)

    Returns (B,). Exactly 0 where all K rewards are equal.
    """
    groups = _groups(rewards, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if std:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)  # Bessel: ddof 1
    tied = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(tied, 0.0).flatten()


def clipped_surrogate(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Token losses -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (in Eqs. 2 and 18).

    logps       (B, T) log-probs under the policy, with grad
    old_logps   (B, T) log-probs under the policy that sampled; detached here
    advantages  (B, 1) or (B, T); detached here

    Returns loss (B, T) and clipped (B, T) bool: True where the clip decides, so no gradient.
    There is no mask: padding must hold finite numbers (the losses below see to it).
    """
    assert advantages.dim() == 2, f"advantages {tuple(advantages.shape)}: want (B, 1) or (B, T)"
    logps, old_logps, advantages = _float(logps), _float(old_logps), _float(advantages)
    advantages = advantages.detach()
    ratio = (logps - old_logps.detach()).clamp(-20, 20).exp()
    plain = ratio * advantages
    limited = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(plain, limited), limited < plain


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    num_responses: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Clipped surrogate, mean over each response and then over responses (Eq. 2).

    logps          (B, T) log-probs, with grad
    old_logps      (B, T) log-probs at sampling time
    advantages     (B,)
    response_mask  (B, T) bool
    num_responses  N, non-empty responses of the whole step; default: of this call

    Returns scalar loss and stats (see top of file).
    """
    assert advantages.dim() == 1, f"advantages {tuple(advantages.shape)}: want (B,)"
    lengths = response_mask.sum(1, keepdim=True).clamp(min=1)
    divisor = lengths * _denominator(num_responses, response_mask.any(1))
    return _surrogate_sum(logps, old_logps, advantages, response_mask, clip_low, clip_high, divisor)


def dapo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    num_tokens: int | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Clipped surrogate, mean over all tokens (DAPO; Eq. 18 with token_advantages of fgae.py).

    logps          (B, T) log-probs, with grad
    old_logps      (B, T) log-probs at sampling time
    advantages     (B,) per response, or (B, T) per token
    response_mask  (B, T) bool
    num_tokens     response tokens of the whole step; default: of this call
    weights        (B, T) factor on each token's loss, e.g. truncated_importance_weights; detached.
                   The denominator stays the number of tokens

    Returns scalar loss and stats (see top of file).
    """
    count = _denominator(num_tokens, response_mask)
    return _surrogate_sum(
        logps, old_logps, advantages, response_mask, clip_low, clip_high, count, weights
    )


def gspo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    num_responses: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Clipped surrogate of one ratio per response, exp(mean_t log r_t), mean over responses (GSPO).

    A clipped response loses the gradient of all its tokens. The mean log-ratio is at most 10.
    Arguments and return as grpo_loss.
    """
    assert advantages.dim() == 1, f"advantages {tuple(advantages.shape)}: want (B,)"
    nonempty = response_mask.any(1, keepdim=True)
    lengths = response_mask.sum(1, keepdim=True).clamp(min=1)
    log_ratios = _masked(response_mask, logps) - _masked(response_mask, old_logps.detach())
    log_ratio = (log_ratios.sum(1, keepdim=True) / lengths).clamp(max=10)
    count = _denominator(num_responses, nonempty)
    at_sampling = torch.zeros_like(log_ratio)  # each response counts as one token
    return _surrogate_sum(log_ratio, at_sampling, advantages, nonempty, clip_low, clip_high, count)


def drgrpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    max_length: int,
    num_responses: int | Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, Stats]:
    """Clipped surrogate over the constant denominator N * max_length (Dr.GRPO).

    advantages     (B,) from group_advantages(std=False)
    max_length     the generation limit in tokens, not the longest response
    num_responses  N, all responses of the whole step, empty ones included; default: B

    Other arguments and return as grpo_loss.
    """
    assert advantages.dim() == 1, f"advantages {tuple(advantages.shape)}: want (B,)"
    assert (response_mask.sum(1) <= max_length).all(), f"max_length {max_length}: a row is longer"
    count = _denominator(num_responses, response_mask.new_ones(len(response_mask)))
    divisor = count * max_length
    return _surrogate_sum(logps, old_logps, advantages, response_mask, clip_low, clip_high, divisor)


def overlong_penalty(lengths: Tensor, max_length: int, cache: int) -> Tensor:
    """Soft overlong punishment in [-1, 0], to be added to the rewards (DAPO).

    lengths     (B,) response tokens
    max_length  the generation limit; -1 from there on
    cache       length of the linear ramp: 0 up to max_length - cache

    Returns (B,).
    """
    assert 0 < cache <= max_length, f"cache {cache}: want 1 .. max_length = {max_length}"
    return ((max_length - cache - _float(lengths)) / cache).clamp(-1, 0)


def informative_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups have rewards that differ, so a gradient (DAPO's dynamic sampling).

    rewards     (B,) unshaped: without overlong_penalty
    group_size  K >= 2

    Returns (P,) bool.
    """
    groups = _groups(rewards, group_size)
    return groups.amax(1) > groups.amin(1)


def truncated_importance_weights(
    logps: Tensor, sampler_logps: Tensor, response_mask: Tensor, cap: float = 2.0
) -> Tensor:
    """Probability of each token for the trainer over that for the sampler, at most cap (TIS).

    logps          (B, T) of the trainer, with the weights that sampled
    sampler_logps  (B, T) of the engine: after temperature, before top-p and top-k
    cap            upper bound; there is no lower one

    Returns (B, T), detached, 0 on padding.
    """
    logps, sampler_logps = (_masked(response_mask, x.detach()) for x in (logps, sampler_logps))
    ratio = (logps - sampler_logps).clamp(-20, 20).exp()
    return ratio.clamp(max=cap) * response_mask


def _surrogate_sum(
    logps, old_logps, advantages, mask, clip_low, clip_high, divisor, weights=None
) -> tuple[Tensor, Stats]:
    """Sum of token losses over divisor, a scalar or (B, 1): all in which the reductions differ."""
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    logps, old_logps, advantages = (_masked(mask, x) for x in (logps, old_logps, advantages))
    loss, clipped = clipped_surrogate(logps, old_logps, advantages, clip_low, clip_high)
    if weights is not None:
        loss = loss * _masked(mask, weights.detach())
    return (loss / divisor).sum(), {
        "clip_ratio": (clipped / divisor).sum(),
        "approx_kl": ((old_logps - logps).detach() / divisor).sum(),
    }


def _masked(mask: Tensor, x: Tensor) -> Tensor:
    """x, (B, T), or (B, 1) where a response has one number, as floats with 0 outside the mask.

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


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    assert group_size > 1, f"group_size {group_size}: one response has nothing to compare with"
    assert rewards.dim() == 1, f"rewards {tuple(rewards.shape)}: want (B,)"
    assert len(rewards) % group_size == 0, f"{len(rewards)} rewards in groups of {group_size}"
    return _float(rewards).reshape(-1, group_size)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
