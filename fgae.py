"""Fine-grained advantage estimation (FGAE): one reward and one advantage per token. ToolUPT 3.2.

    matched_tokens    which response tokens are those of the expert               Eq. 13, condition
    token_rewards     R_t = max(upper if token t is matched else lower, R_outcome)  Eqs. 13, 14
    token_advantages  A_t = (R_t - mean) / (std + eps)                              Eqs. 15, 16, 17
                      mean and population std over all tokens of the K responses

Train on them with dapo_loss of grpo.py (Eq. 18). A correct token of a wrong response earns
`upper`; every other token earns its response's outcome reward, of which `lower` is a bound.

Where the paper is silent:
1. "The t-th token is correct" (Eq. 13) leaves the alignment open. "positional" compares token t
   with expert token t; "lcs" takes a longest common subsequence, so that one inserted token does
   not spoil all that follow; nor does a token left out cost any other: in bench/README.md's toy
   world a policy does not learn a list's opening bracket. Either reading depends on how the expert
   writes its JSON: where the policy puts blanks and the expert does not, few positions agree.
2. Answers have no process reward, since the text speaks of tool_call responses and an answer may be
   worded in many ways: the caller passes an empty expert_mask. With "lcs" the caller clears the EOS
   column too, or else the EOS of any garbage would match.
3. The std is that of the population, as printed in Eq. 16. Where all tokens of a group have the
   same reward, advantages are exactly 0: in float32 mean and std carry round-off of the same
   size, and (R - mean) / (std + eps) would give advantages up to 0.5.

P prompts, K responses per prompt, B = P*K responses, T response tokens, S expert tokens (both
right-padded). Rows p*K .. p*K+K-1 answer prompt p. Masks are bool; padding may hold anything.
Copy this file on its own: it needs torch only.
"""

import torch
from torch import Tensor


def matched_tokens(
    response_ids: Tensor,
    response_mask: Tensor,
    expert_ids: Tensor,
    expert_mask: Tensor,
    *,
    alignment: str = "positional",
) -> Tensor:
    """Response tokens that agree with the expert response (the condition of Eq. 13).

    response_ids   (B, T) int
    response_mask  (B, T) bool
    expert_ids     (B, S) int, row b is the expert response to the prompt of row b
    expert_mask    (B, S) bool; a token left out is never matched, and none in an all-False row
    alignment      "positional": the same token at the same index.
                   "lcs": a longest common subsequence. Of several, the one whose response indices
                   come first (smallest in lexicographic order): a common prefix always matches

    Returns (B, T) bool, False on padding and beyond the end of the expert response.
    "lcs" needs 5 * B * T * S bytes: 42 MB for 8 rows of 1,024 tokens against 1,024.
    """
    for mask, ids in (response_mask, response_ids), (expert_mask, expert_ids):
        assert mask.dtype == torch.bool, f"mask is {mask.dtype}: want torch.bool"
        assert mask.shape == ids.shape, f"mask {tuple(mask.shape)} for ids {tuple(ids.shape)}"
    if alignment not in ("positional", "lcs"):
        raise ValueError(f"alignment {alignment!r}: want 'positional' or 'lcs'")
    if alignment == "lcs":
        equal = response_ids[:, :, None] == expert_ids[:, None, :]
        return _lcs(equal & response_mask[:, :, None] & expert_mask[:, None, :])
    n = min(response_ids.shape[1], expert_ids.shape[1])
    matched = torch.zeros_like(response_mask)
    matched[:, :n] = response_ids[:, :n] == expert_ids[:, :n]
    matched[:, :n] &= expert_mask[:, :n]
    return matched & response_mask


def token_rewards(
    outcome: Tensor, matched: Tensor, *, upper: float = 4.0, lower: float = -3.0
) -> Tensor:
    """Reward of each token, max(process, outcome) (Eqs. 13, 14).

    outcome  (B,) R_outcome in [lower, upper] (Eq. 12)
    matched  (B, T) bool, of matched_tokens
    upper    process reward of a matched token
    lower    process reward of any other

    Returns (B, T). Padding holds the outcome; token_advantages leaves it out.
    """
    assert outcome.shape == matched.shape[:1], f"{tuple(outcome.shape)}, {tuple(matched.shape)}"
    outcome = _float(outcome)[:, None]
    process = outcome.new_full(matched.shape, lower).masked_fill(matched, upper)  # Eq. 13
    return torch.maximum(process, outcome)  # Eq. 14


def token_advantages(
    rewards: Tensor, response_mask: Tensor, group_size: int, *, eps: float = 1e-6
) -> Tensor:
    """Token rewards normalised over all tokens of their group (Eqs. 15, 16, 17).

    rewards        (B, T) of token_rewards
    response_mask  (B, T) bool
    group_size     K >= 2; the expert response is not in the group
    eps            added to the std

    Returns (B, T), 0 on padding. Exactly 0 where all tokens of the group have one reward.
    """
    assert group_size > 1, f"group_size {group_size}: one response has nothing to compare with"
    assert len(rewards) % group_size == 0, f"{len(rewards)} rows in groups of {group_size}"
    assert response_mask.dtype == torch.bool, f"mask is {response_mask.dtype}: want torch.bool"
    assert rewards.shape == response_mask.shape, f"rewards {tuple(rewards.shape)}"
    shape = (len(rewards) // group_size, group_size * rewards.shape[1])  # one row per group
    mask, values = response_mask.reshape(shape), _float(rewards).reshape(shape)
    values = torch.where(mask, values, 0.0)
    count = mask.sum(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / count  # Eq. 15
    centred = torch.where(mask, values - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()  # Eq. 16: population, ddof 0
    highest = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    lowest = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    advantages = centred / (std + eps)  # Eq. 17
    return advantages.masked_fill(highest <= lowest, 0.0).view_as(rewards)  # or no token: 0 / 0


def _lcs(equal: Tensor) -> Tensor:
    """Response tokens of the first longest common subsequence; equal (B, T, S) bool -> (B, T) bool.

    The table is filled a row at a time: the running maximum along the expert stands for the usual
    recursion on the neighbouring cell. Then a walk forward takes a token wherever that loses none.
    """
    B, T, S = equal.shape
    matched = equal.new_zeros(B, T)
    if S == 0:
        return matched
    # best[i, :, j]: length of the LCS of response[i:] and expert[j:]
    best = torch.zeros(T + 1, B, S + 1, dtype=torch.int32, device=equal.device)
    for i in reversed(range(T)):
        extended = torch.maximum(best[i + 1, :, :-1], best[i + 1, :, 1:] + equal[:, i])
        best[i, :, :-1] = extended.flip(1).cummax(1).values.flip(1)
    free = torch.zeros(B, 1, dtype=torch.long, device=equal.device)  # first expert token not used
    columns = torch.arange(S, device=equal.device)
    for i in range(T):
        candidates = equal[:, i] & (columns >= free)
        first = candidates.int().argmax(1, keepdim=True)
        longest = best[i + 1].gather(1, first + 1) + 1 == best[i].gather(1, free)
        take = candidates.any(1, keepdim=True) & longest
        matched[:, i] = take[:, 0]
        free = torch.where(take, first + 1, free)
    return matched


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
