"""LUFFY, SRFT and CHORD: baselines that mix expert responses with rollouts (ToolUPT Table 1).

    p = pi_theta(y_t | x, y_<t),  r = p / p_old,  A = advantage of the row,  sg = detach
    Z = tokens of all rows of the step, expert rows included;  Zx = its expert tokens

    luffy_loss   1/Z [ sum_rollout -A r  +  sum_expert -A f ],  f = p / (p + gamma)   LUFFY Eq. 5
    srft_loss    1/Zx sum_expert -w_sft log p,                                        SRFT Eqs. 6-13
                     w_sft = 0.5 sg exp(-H),  H = mean token entropy of the row
                 + 1/Z sum_expert -A p                (shaped: p / (p + 0.1) for p)
                 + 1/Z [ sum_right -w_rl log p  +  sum_wrong log p ],  w_rl = 0.1 sg exp(H)
    chord_loss   (1 - mu)/N sum_rollout -min(r A, clip(r, 0.8, 1.2) A)                CHORD Eq. 2
                 + mu/Nx sum_expert -sg(phi) log p,   N, Nx = rollout, expert tokens
                     phi = p (1 - p): CHORD-phi;  phi = 1: CHORD-mu

Advantages are the caller's, one number per row. LUFFY and SRFT put the expert row into its
prompt's group: with 7 rollouts and 1 expert per prompt they are `group_advantages(rewards, 8,
std=False)` of grpo.py for LUFFY and `(rewards, 8)` for SRFT. CHORD's groups hold rollouts only.
The expert's behaviour probability is taken as 1: its importance ratio is p, and nothing clips it.

Departures from the papers:
1. LUFFY has neither std in A nor a clip on rollouts, as in its script. Its equations have both; on
   strictly on-policy data a clip does nothing.
2. LUFFY takes the token mean of its Eq. 5. Its script divides by the constant 8192 instead,
   whatever the number of rows: pass num_tokens=8192 for that.
3. SRFT keeps the printed signs of H, with H per row as in the HPT re-implementation. The official
   code, known second-hand, has exp(+H) in w_sft where the paper argues for exp(-H). variant="hpt"
   is the re-implementation: always shaped. Its script also takes A without std and
   num_tokens=8192; we keep the paper's denominators.
4. SRFT's log p of wrong rows is unbounded below, as printed: it is unstable when most are wrong.
5. CHORD's phi is detached, as in both public codes; the paper is silent. Undetached it would push
   p to 0 or 1.

Shapes: B responses (for LUFFY and SRFT the expert rows are among them), T response tokens
(right-padded), E expert responses, S expert tokens. Masks are bool; padding may hold anything, even
nan, and an empty row contributes nothing. Arithmetic is float32 or wider. Denominators are keywords
that default to the local count. With micro-batches or several ranks pass the count of the whole
optimiser step: then losses, gradients and stats of the parts add up to those of the whole. Strictly
on-policy: pass old_logps = logps; the losses detach it, as they detach A and H. The entropy bonus
is the caller's. Copy this file on its own: it needs torch only.
"""

import math

import torch
from torch import Tensor

Stats = dict[str, Tensor]
CLIP = 0.2  # CHORD's clip range; without effect on strictly on-policy data


def luffy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    is_expert: Tensor,
    *,
    gamma: float = 0.1,
    num_tokens: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Token mean of -A r on rollouts and -A p/(p+gamma) on expert rows (LUFFY Eq. 5); and stats.

    logps          (B, T) float  log pi_theta of the response tokens, with gradient
    old_logps      (B, T) float  the sampler's, detached; not read on expert rows
    advantages     (B,)   float  R - mean over the prompt's rollouts and expert
    response_mask  (B, T) bool   response tokens, EOS included
    is_expert      (B,)   bool   rows that hold a demonstration
    gamma          > 0           shaping; the gradient weight gamma p/(p+gamma)^2 peaks at p = gamma
    num_tokens     int           Z, tokens of all rows of the step; default: counted here

    A tied group (all A = 0) teaches nothing, its expert row included; an expert row below its
    group's mean is pushed down. Stats: "luffy/rollout" and "luffy/expert", the terms of the loss.
    """
    _check_rows(logps, advantages, response_mask, is_expert)
    assert old_logps.shape == logps.shape, f"old_logps {old_logps.shape}, logps {logps.shape}"
    assert gamma > 0, f"gamma must be positive, got {gamma}"
    expert = response_mask & is_expert[:, None]
    rollout = response_mask & ~is_expert[:, None]
    ratio = _log_ratio(rollout, logps, old_logps).exp()
    probs = _masked(expert, logps).exp()
    count = _denominator(num_tokens, response_mask)
    on = (-_spread(rollout, advantages) * ratio).sum() / count
    off = (-_spread(expert, advantages) * probs / (probs + gamma)).sum() / count
    return on + off, {"luffy/rollout": on.detach(), "luffy/expert": off.detach()}


def srft_loss(
    logps: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    correct: Tensor,
    response_mask: Tensor,
    is_expert: Tensor,
    *,
    variant: str = "paper",
    shaped: bool = False,
    num_tokens: int | Tensor | None = None,
    num_expert_tokens: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Entropy-weighted SFT and RL on expert rows, plus RL on rollouts (SRFT Eqs. 6-13); and stats.

    logps              (B, T) float  log pi_theta of the response tokens, with gradient
    entropy            (B, T) float  policy entropy per token, in nats; weights only, no gradient
    advantages         (B,)   float  over the prompt's rollouts and expert; read on expert rows
    correct            (B,)   bool   the answer is completely right; read on rollouts
    response_mask      (B, T) bool   response tokens, EOS included
    is_expert          (B,)   bool   rows that hold a demonstration
    variant            "paper" | "hpt"; hpt implies shaped
    shaped             p/(p+0.1) in place of p in the expert's RL term, as both public codes run
    num_tokens         int           Z, tokens of all rows of the step; default: counted here
    num_expert_tokens  int           Zx, expert tokens of the step; default: counted here

    Without expert rows the two demo terms are 0; so is a half of the last term without right (or
    wrong) rollouts. Stats: "srft/demo_sft", "srft/demo_rl" and "srft/self", the terms of the loss;
    "expert_prob", the mean p of an expert token. ValueError for another variant.
    """
    _check_rows(logps, advantages, response_mask, is_expert)
    assert entropy.shape == logps.shape, f"entropy {entropy.shape}, logps {logps.shape}"
    assert correct.shape == is_expert.shape and correct.dtype == torch.bool, f"correct: {correct}"
    if variant not in ("paper", "hpt"):
        raise ValueError(f"unknown SRFT variant {variant!r}; choose 'paper' or 'hpt'")
    expert = response_mask & is_expert[:, None]
    rollout = response_mask & ~is_expert[:, None]
    lengths = response_mask.sum(1).clamp(min=1)
    row_entropy = _masked(response_mask, entropy).sum(1) / lengths
    w_sft = 0.5 * torch.exp(-row_entropy)  # the sg() of the formula is in _spread
    w_self = torch.where(correct, 0.1 * torch.exp(row_entropy), -1.0)  # w_rl if right, -1 if wrong

    logps = _masked(response_mask, logps)
    probs = logps.exp()
    ratio = probs / (probs + 0.1) if shaped or variant == "hpt" else probs
    count = _denominator(num_tokens, response_mask)
    expert_count = _denominator(num_expert_tokens, expert)
    demo_sft = (-_spread(expert, w_sft) * logps).sum() / expert_count
    demo_rl = (-_spread(expert, advantages) * ratio).sum() / count
    self_rl = (-_spread(rollout, w_self) * logps).sum() / count
    return demo_sft + demo_rl + self_rl, {
        "srft/demo_sft": demo_sft.detach(),
        "srft/demo_rl": demo_rl.detach(),
        "srft/self": self_rl.detach(),
        "expert_prob": (probs.detach() * expert).sum() / expert_count,
    }


def chord_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    expert_logps: Tensor,
    expert_mask: Tensor,
    *,
    mu: float = 0.1,
    phi: bool = True,
    num_tokens: int | Tensor | None = None,
    num_expert_tokens: int | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """(1 - mu) clipped token-mean GRPO (CHORD Eq. 2) + mu SFT, phi-weighted; and stats.

    logps              (B, T) float  log pi_theta of the rollouts, with gradient
    old_logps          (B, T) float  the sampler's, detached
    advantages         (B,)   float  (R - mean) / std over the prompt's rollouts
    response_mask      (B, T) bool   rollout tokens, EOS included
    expert_logps       (E, S) float  log pi_theta of the expert tokens, with gradient
    expert_mask        (E, S) bool   expert tokens, EOS included
    mu                 in [0, 1]     weight of the SFT term: 0.1 with phi, else chord_mu_at(step)
    phi                True CHORD-phi (token weight p(1-p), detached), False CHORD-mu (weight 1)
    num_tokens         int           N, rollout tokens of the step; default: counted here
    num_expert_tokens  int           Nx, expert tokens of the step; default: counted here

    Without rollout tokens the first term is 0, without expert tokens the second. phi is not
    normalised: it shrinks the SFT term. Stats: "chord/grpo" and "chord/sft", the terms before mu;
    "clip_ratio", share of rollout tokens whose gradient the clip removed; "approx_kl", their mean
    old_logps - logps, in nats; "expert_prob", the mean p of an expert token.
    """
    _check_rows(logps, advantages, response_mask)
    assert old_logps.shape == logps.shape, f"old_logps {old_logps.shape}, logps {logps.shape}"
    assert expert_logps.shape == expert_mask.shape, f"expert_mask {expert_mask.shape}"
    assert expert_mask.dtype == torch.bool, f"expert_mask must be bool, got {expert_mask.dtype}"
    assert 0 <= mu <= 1, f"mu must lie in [0, 1], got {mu}"
    count = _denominator(num_tokens, response_mask)
    expert_count = _denominator(num_expert_tokens, expert_mask)
    log_ratio = _log_ratio(response_mask, logps, old_logps)
    ratio, adv = log_ratio.exp(), _spread(response_mask, advantages)
    free, clipped = ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv
    grpo = -torch.minimum(free, clipped).sum() / count

    expert_logps = _masked(expert_mask, expert_logps)
    probs = expert_logps.detach().exp()
    weights = probs * (1 - probs) if phi else 1.0
    sft = -(weights * expert_logps).sum() / expert_count
    return (1 - mu) * grpo + mu * sft, {
        "chord/grpo": grpo.detach(),
        "chord/sft": sft.detach(),
        "clip_ratio": (clipped < free).sum() / count,
        "approx_kl": -log_ratio.detach().sum() / count,
        "expert_prob": (probs * expert_mask).sum() / expert_count,
    }


def chord_mu_at(
    step: int, *, warmup: int = 0, decay: int = 0, peak: float = 0.1, valley: float = 0.1
) -> float:
    """CHORD's SFT weight mu at a step: linear 0 -> peak, cosine peak -> valley, then the valley.

    step          0-based optimiser step
    warmup        steps of the linear rise; 0 starts at the peak
    decay         steps of the cosine fall; 0 drops to the valley at once
    peak, valley  in [0, 1]; CHORD-phi: 0.1 and 0.1; CHORD-mu on tool use: 0.9 -> 0.05 in 30 steps
                  (CHORD A.1; its ToolACE example has 0.6 -> 0.0 in 20)
    """
    assert min(step, warmup, decay) >= 0, f"negative step count: {step}, {warmup}, {decay}"
    if step < warmup:
        return peak * step / warmup
    if step < warmup + decay:
        return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))
    return valley


def _masked(mask: Tensor, x: Tensor) -> Tensor:
    """x, (B, 1) or (B, T), as floats with 0 outside the mask.

    `where` before any arithmetic: 0 * nan is nan, and so is its gradient.
    """
    assert mask.dtype == torch.bool, f"mask is {mask.dtype}: want torch.bool"
    assert x.shape in (mask.shape, (len(mask), 1)), f"{tuple(x.shape)} for {tuple(mask.shape)}"
    return torch.where(mask, _float(x), 0.0)


def _spread(mask: Tensor, rows: Tensor) -> Tensor:
    """One detached number per row on each of its tokens, 0 off the mask."""
    return _masked(mask, rows.detach()[:, None])


def _log_ratio(mask: Tensor, logps: Tensor, old_logps: Tensor) -> Tensor:
    """log(p / p_old), 0 off the mask; held within 20 nats, as in veRL, so that exp stays finite."""
    return (_masked(mask, logps) - _masked(mask, old_logps.detach())).clamp(-20, 20)


def _denominator(given: int | Tensor | None, mask: Tensor) -> int | Tensor:
    """The count of the whole step if given, else the local one; 1 for an average of nothing."""
    count = mask.sum() if given is None else given
    assert count > 0 or not mask.any(), f"denominator {count} for {int(mask.sum())} local items"
    return count or 1


def _check_rows(
    logps: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor | None = None
) -> None:
    assert logps.shape == mask.shape, f"logps {logps.shape}, response_mask {mask.shape}"
    assert mask.dtype == torch.bool, f"response_mask must be bool, got {mask.dtype}"
    assert advantages.shape == logps.shape[:1], f"advantages {advantages.shape}: want (B,)"
    if is_expert is not None:
        assert is_expert.shape == logps.shape[:1], f"is_expert {is_expert.shape}: want (B,)"
        assert is_expert.dtype == torch.bool, f"is_expert must be bool, got {is_expert.dtype}"


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
