"""SimPO, DPO, IPO and ORPO on preference pairs, and perplexity (iTool Eqs. 4, 10, 11, Table 9).

    S(y) = sum_i log pi(y_i | x, y_<i),  M(y) = S(y) / |y|,  w chosen, l rejected

    simpo_loss   -log sigma(beta M_w - beta M_l - margin)                             Eqs. 10, 11
    dpo_loss     -log sigma(beta (S_w - ref_w) - beta (S_l - ref_l))                  Table 9
    ipo_loss     ((S_w - ref_w) - (S_l - ref_l) - 1/(2 tau))^2                        Table 9
    orpo_loss    -M_w - lam log sigma(lo_w - lo_l),  lo = M - log(1 - exp(M))         Table 9
    perplexity   (1 / P(y | x))^(1/|y|) = exp(-M)                                     Eq. 4

Each loss is the mean over the pairs of the whole batch (64 in iTool): pass num_pairs when the batch
comes in micro-batches or on several ranks. The tensors hold the step tokens only, no prompt and no
shared prefix; EOS where it was generated. A pair with an empty side is a ValueError.

Departures and choices:
1. margin is Eq. 11's gamma. SimPO's own code stores gamma/beta, here 0.2; TRL adds an NLL term to
   its SimPO unless cpo_alpha is 0.
2. IPO sums over tokens, as printed. average=True is what TRL and LLaMA-Factory run: in nats per
   token, so that the target 1/(2 tau) = 5 is out of reach.
3. ORPO is LLaMA-Factory's, which is Table 9: the NLL is M_w of each pair, over the response only.
   In the odds M is at most -1e-6, since p = 1 has infinite odds.
4. The reference is the policy at the start of the iteration: compute its log-probs once, before the
   first step.

Shapes: N pairs, T chosen and U rejected tokens (right-padded), B responses. Masks are bool; padding
may hold anything, even nan. Arithmetic is float32 or wider. Stats are means over pairs with the
loss's own denominator num_pairs, so that with the count of the whole batch they add up over
micro-batches and ranks, as losses and gradients do. Copy this file on its own: it needs torch only.
    rewards/chosen, rewards/rejected   the two numbers whose difference the loss looks at
    rewards/margins                    chosen - rejected
    rewards/accuracies                 share of pairs with chosen > rejected
    logps/chosen, logps/rejected       M, nats per token
    lengths/chosen, lengths/rejected   |y|, tokens
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Stats = dict[str, Tensor]


def simpo_loss(
    chosen_logps: Tensor,
    chosen_mask: Tensor,
    rejected_logps: Tensor,
    rejected_mask: Tensor,
    *,
    beta: float = 2.5,
    margin: float = 0.5,
    num_pairs: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Mean over pairs of -log sigma(beta M_w - beta M_l - margin) (Eqs. 10, 11), and stats.

    chosen_logps    (N, T) float  log pi_theta of the chosen tokens, with gradient
    chosen_mask     (N, T) bool   chosen tokens, EOS included where generated
    rejected_logps  (N, U) float  log pi_theta of the rejected tokens, with gradient
    rejected_mask   (N, U) bool
    beta            > 0           scale of the length-normalised reward
    margin          >= 0, in nats  target reward margin, the paper's gamma
    num_pairs       int           pairs of the whole batch; default: N

    log(1 + e^margin) where both sides are equally likely.
    """
    sums, lengths = _sides(chosen_logps, chosen_mask, rejected_logps, rejected_mask)
    chosen, rejected = beta * sums / lengths  # Eq. 10
    losses = -F.logsigmoid(chosen - rejected - margin)  # Eq. 11
    return _means(losses, chosen, rejected, sums, lengths, num_pairs)


def dpo_loss(
    chosen_logps: Tensor,
    chosen_mask: Tensor,
    rejected_logps: Tensor,
    rejected_mask: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    beta: float = 0.1,
    num_pairs: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Mean over pairs of -log sigma(beta ((S_w - ref_w) - (S_l - ref_l))) (Table 9), and stats.

    chosen_logps .. rejected_mask, num_pairs  as in simpo_loss
    chosen_ref      (N,) float    summed log-prob of the chosen side under the reference, detached
    rejected_ref    (N,) float    the same of the rejected side
    beta            > 0

    log 2 where the policy is the reference.
    """
    sums, lengths = _sides(chosen_logps, chosen_mask, rejected_logps, rejected_mask)
    chosen, rejected = beta * (sums - _refs(chosen_ref, rejected_ref, sums))
    losses = -F.logsigmoid(chosen - rejected)
    return _means(losses, chosen, rejected, sums, lengths, num_pairs)


def ipo_loss(
    chosen_logps: Tensor,
    chosen_mask: Tensor,
    rejected_logps: Tensor,
    rejected_mask: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    tau: float = 0.1,
    average: bool = False,
    num_pairs: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Mean over pairs of ((S_w - ref_w) - (S_l - ref_l) - 1/(2 tau))^2 (Table 9), and stats.

    chosen_logps .. rejected_ref, num_pairs  as in dpo_loss: the references are sums in both modes
    tau             > 0           the log-ratio gap is pulled to 1/(2 tau) nats
    average         divide each side's log-ratio by its length, as TRL and LLaMA-Factory do

    1/(4 tau^2) where the policy is the reference.
    """
    assert tau > 0, f"tau must be positive, got {tau}"
    sums, lengths = _sides(chosen_logps, chosen_mask, rejected_logps, rejected_mask)
    log_ratios = sums - _refs(chosen_ref, rejected_ref, sums)
    chosen, rejected = log_ratios / lengths if average else log_ratios
    losses = (chosen - rejected - 1 / (2 * tau)) ** 2
    return _means(losses, chosen, rejected, sums, lengths, num_pairs)


def orpo_loss(
    chosen_logps: Tensor,
    chosen_mask: Tensor,
    rejected_logps: Tensor,
    rejected_mask: Tensor,
    *,
    lam: float = 0.1,
    num_pairs: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Mean over pairs of -M_w - lam log sigma(lo_w - lo_l), lo = log-odds (Table 9), and stats.

    chosen_logps .. rejected_mask, num_pairs  as in simpo_loss
    lam             >= 0          weight of the odds-ratio term; at 0 the loss is SFT, by row means
    """
    sums, lengths = _sides(chosen_logps, chosen_mask, rejected_logps, rejected_mask)
    means = sums / lengths
    odds_means = means.clamp(max=-1e-6)
    # expm1 keeps 1 - p exact near p = 1, where 1 - exp(M) cancels
    chosen, rejected = odds_means - torch.log(-torch.expm1(odds_means))
    losses = -means[0] - lam * F.logsigmoid(chosen - rejected)
    return _means(losses, chosen, rejected, sums, lengths, num_pairs)


def perplexity(logps: Tensor, response_mask: Tensor) -> Tensor:
    """Perplexity of each response, exp of its mean token NLL (Eq. 4): (B,) >= 1; 1 is certain.

    logps          (B, T) float  log pi_theta at temperature 1, of the ground truth in iTool
    response_mask  (B, T) bool   response tokens, EOS included

    ValueError for an empty response: Eq. 4 takes the |y|-th root.
    """
    return torch.exp(-_sums(response_mask, logps, "perplexity") / response_mask.sum(1))


def _sides(
    chosen_logps: Tensor, chosen_mask: Tensor, rejected_logps: Tensor, rejected_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """S and |y| of both sides of each pair: two (2, N) tensors, chosen first."""
    assert len(chosen_logps) == len(rejected_logps), f"{len(chosen_logps)}, {len(rejected_logps)}"
    chosen = _sums(chosen_mask, chosen_logps, "the chosen side of a pair")
    rejected = _sums(rejected_mask, rejected_logps, "the rejected side of a pair")
    return torch.stack([chosen, rejected]), torch.stack([chosen_mask.sum(1), rejected_mask.sum(1)])


def _sums(mask: Tensor, logps: Tensor, what: str) -> Tensor:
    """S(y) of each row, in float32 or wider."""
    assert mask.dtype == torch.bool, f"mask is {mask.dtype}: want torch.bool"
    assert mask.shape == logps.shape, f"{tuple(logps.shape)} for {tuple(mask.shape)}"
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{what} needs a token, rows {empty} have none (M is 0/0); drop them")
    # `where` before any arithmetic: 0 * nan is nan, and so is its gradient
    return torch.where(mask, _float(logps), 0.0).sum(1)


def _refs(chosen_ref: Tensor, rejected_ref: Tensor, sums: Tensor) -> Tensor:
    shapes = chosen_ref.shape, rejected_ref.shape
    assert shapes == (sums.shape[1:],) * 2, f"one sum per pair: {shapes}, {sums.shape[1]} pairs"
    return _float(torch.stack([chosen_ref, rejected_ref]).detach())


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _means(
    losses: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    sums: Tensor,
    lengths: Tensor,
    num_pairs: int | Tensor | None,
) -> tuple[Tensor, Stats]:
    """Loss and stats, each a sum over the pairs here divided by the pairs of the whole batch."""
    count = max(len(losses) if num_pairs is None else num_pairs, 1)
    per_pair = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": sums[0] / lengths[0],
        "logps/rejected": sums[1] / lengths[1],
        "lengths/chosen": lengths[0],
        "lengths/rejected": lengths[1],
    }
    return losses.sum() / count, {k: v.detach().sum() / count for k, v in per_pair.items()}
