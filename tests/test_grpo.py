"""grpo.py against slow loops written from the equations, against oracles, and its properties."""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import grpo
from grpo import (
    clipped_surrogate,
    dapo_loss,
    drgrpo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    informative_groups,
    overlong_penalty,
    truncated_importance_weights,
)

ORACLES = json.loads((Path(__file__).parent / "oracles" / "grpo.json").read_text())
LENGTHS = [5, 3, 0, 1, 4, 2]  # one empty response
MAX_LENGTH = 7  # Dr.GRPO's generation limit in these tests


def oracle(name):
    return ORACLES[name]["inputs"], ORACLES[name]["expected"]


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def close(actual, expected, tolerance=6e-7):
    """Oracles are printed to six decimals."""
    torch.testing.assert_close(actual, f64(expected), rtol=1e-6, atol=tolerance)


# ---- slow loops, plain Python floats -------------------------------------------------------------


def slow_surrogate(logp, old, advantage, low, high):
    """-min(r A, clip(r, 1 - low, 1 + high) A)."""
    r = math.exp(logp - old)
    clipped = 1 - low if r < 1 - low else 1 + high if r > 1 + high else r
    return -min(r * advantage, clipped * advantage)


def slow_grpo(logps, old, advantages, lengths, low=0.2, high=0.2):
    total, rows = 0.0, 0
    for k, length in enumerate(lengths):
        if length == 0:
            continue
        row = 0.0
        for t in range(length):
            row += slow_surrogate(logps[k][t], old[k][t], advantages[k], low, high)
        total += row / length
        rows += 1
    return total / rows


def slow_dapo(logps, old, advantages, lengths, low=0.2, high=0.28, weights=None):
    total, tokens = 0.0, 0
    for k, length in enumerate(lengths):
        for t in range(length):
            a = advantages[k][t] if isinstance(advantages[k], list) else advantages[k]
            w = weights[k][t] if weights else 1.0
            total += w * slow_surrogate(logps[k][t], old[k][t], a, low, high)
            tokens += 1
    return total / tokens


def slow_gspo(logps, old, advantages, lengths, low=3e-4, high=4e-4):
    losses = []
    for k, length in enumerate(lengths):
        if length:
            mean = sum(logps[k][t] - old[k][t] for t in range(length)) / length
            losses.append(slow_surrogate(mean, 0.0, advantages[k], low, high))
    return sum(losses) / len(losses)


def slow_drgrpo(logps, old, advantages, lengths):
    total = 0.0
    for k, length in enumerate(lengths):
        for t in range(length):
            total += slow_surrogate(logps[k][t], old[k][t], advantages[k], 0.2, 0.2)
    return total / (len(lengths) * MAX_LENGTH)


def numeric_gradient(function, logps, h=1e-6):
    """Central differences of function(list of lists)."""
    gradient = torch.zeros(len(logps), len(logps[0]), dtype=torch.float64)
    for k, row in enumerate(logps):
        for t, x in enumerate(row):
            row[t] = x + h
            above = function(logps)
            row[t] = x - h
            gradient[k, t] = (above - function(logps)) / (2 * h)
            row[t] = x
    return gradient


FAST = {
    "grpo": grpo_loss,
    "dapo": dapo_loss,
    "gspo": partial(gspo_loss, clip_low=0.1, clip_high=0.15),
    "drgrpo": partial(drgrpo_loss, max_length=MAX_LENGTH),
}
SLOW = {
    "grpo": slow_grpo,
    "dapo": slow_dapo,
    "gspo": partial(slow_gspo, low=0.1, high=0.15),
    "drgrpo": slow_drgrpo,
}
# the denominator of the whole step, by keyword
COUNT = {
    "grpo": {"num_responses": 5},
    "dapo": {"num_tokens": sum(LENGTHS)},
    "gspo": {"num_responses": 5},
    "drgrpo": {"num_responses": 6},
}
each_loss = pytest.mark.parametrize("name", FAST)


def mask_of(lengths, width=5):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def batch(seed=0):
    """Off-policy rows, so that the clip acts on some tokens and not on others."""
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(6, 5, generator=g, dtype=torch.float64) * 2 - 0.05
    old = logps + 0.4 * torch.randn(6, 5, generator=g, dtype=torch.float64)
    advantages = torch.randn(6, generator=g, dtype=torch.float64)
    return logps, old, advantages, mask_of(LENGTHS)


def value_and_gradient(loss_function, logps, *rest, **kwargs):
    logps = logps.detach().clone().requires_grad_()
    loss, stats = loss_function(logps, *rest, **kwargs)
    assert loss.shape == () and all(s.shape == () for s in stats.values())
    assert not any(s.requires_grad for s in stats.values())
    loss.backward()
    return loss.detach(), logps.grad, stats


# ---- each loss equals its equation ---------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_value_and_gradient_equal_slow_loop(name, seed):
    logps, old, advantages, mask = batch(seed)
    loss, gradient, _ = value_and_gradient(FAST[name], logps, old, advantages, mask)

    def slow(rows):
        return SLOW[name](rows, old.tolist(), advantages.tolist(), LENGTHS)

    assert loss.item() == pytest.approx(slow(logps.tolist()), abs=1e-13)
    expected = numeric_gradient(slow, logps.tolist())
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)
    assert (gradient[mask] == 0).any() and (gradient[mask] != 0).any()  # clipped and not


def test_dapo_with_token_advantages_and_weights_equals_slow_loop():
    logps, old, _, mask = batch()
    g = torch.Generator().manual_seed(7)
    advantages = torch.randn(6, 5, generator=g, dtype=torch.float64)
    weights = torch.rand(6, 5, generator=g, dtype=torch.float64) * 2
    loss, gradient, _ = value_and_gradient(dapo_loss, logps, old, advantages, mask, weights=weights)

    def slow(rows):
        args = rows, old.tolist(), advantages.tolist(), LENGTHS
        return slow_dapo(*args, weights=weights.tolist())

    assert loss.item() == pytest.approx(slow(logps.tolist()), abs=1e-13)
    torch.testing.assert_close(gradient, numeric_gradient(slow, logps.tolist()), rtol=0, atol=1e-8)


@pytest.mark.parametrize("loss", [grpo_loss, dapo_loss, partial(drgrpo_loss, max_length=5)])
def test_stats_count_clipped_tokens_and_drift(loss):
    logps, old, advantages, _ = batch()
    lengths = [5, 5]  # full rows: all three denominators agree
    args = logps[:2], old[:2], advantages[:2], mask_of(lengths)
    _, gradient, stats = value_and_gradient(loss, *args)
    assert stats["clip_ratio"].item() == pytest.approx((gradient == 0).sum().item() / 10)
    assert 0 < stats["clip_ratio"] < 1
    assert stats["approx_kl"].item() == pytest.approx((old[:2] - logps[:2]).mean().item())


def test_gspo_stats_count_responses():
    logps, old, advantages, mask = batch()
    _, gradient, stats = value_and_gradient(FAST["gspo"], logps, old, advantages, mask)
    lost = [k for k, n in enumerate(LENGTHS) if n and not gradient[k].any()]
    assert stats["clip_ratio"].item() == pytest.approx(len(lost) / 5)
    means = [(old[k, :n] - logps[k, :n]).mean().item() for k, n in enumerate(LENGTHS) if n]
    assert stats["approx_kl"].item() == pytest.approx(statistics.mean(means))


# ---- properties of all losses --------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_may_hold_anything(name, junk):
    logps, old, advantages, mask = batch()
    clean_loss, clean_gradient, clean_stats = value_and_gradient(
        FAST[name], logps, old, advantages, mask
    )
    dirty_advantages = advantages.clone()
    dirty_advantages[2] = junk  # the empty response
    for dirty_old in (old.masked_fill(~mask, junk), old.masked_fill(~mask, 0.0)):
        loss, gradient, stats = value_and_gradient(
            FAST[name], logps.masked_fill(~mask, junk), dirty_old, dirty_advantages, mask
        )
        assert torch.equal(loss, clean_loss) and torch.equal(gradient, clean_gradient)
        assert stats == clean_stats
        assert not gradient[~mask].any()


@pytest.mark.parametrize("junk", [math.nan, -math.inf])
def test_padding_of_token_advantages_and_weights_may_hold_anything(junk):
    logps, old, _, mask = batch()
    advantages, weights = torch.sin(logps * 9), logps.exp()
    clean = value_and_gradient(dapo_loss, logps, old, advantages, mask, weights=weights)
    dirty = value_and_gradient(
        dapo_loss,
        logps,
        old,
        advantages.masked_fill(~mask, junk),
        mask,
        weights=weights.masked_fill(~mask, junk),
    )
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@each_loss
@pytest.mark.parametrize("split", [[1, 5], [2, 2, 2], [1] * 6])  # [1] * 6: one part is all empty
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up(name, split, as_tensor):
    inputs = batch()
    count = {k: torch.tensor(v) if as_tensor else v for k, v in COUNT[name].items()}
    loss, gradient, stats = value_and_gradient(FAST[name], *inputs)
    parts = [
        value_and_gradient(FAST[name], *part, **count)
        for part in zip(*(x.split(split) for x in inputs), strict=True)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), gradient)
    for key, value in stats.items():
        torch.testing.assert_close(
            sum(p[2][key] for p in parts), value, check_dtype=False, rtol=1e-6, atol=1e-7
        )


@each_loss
def test_denominator_divides(name):
    inputs = batch()
    key, count = next(iter(COUNT[name].items()))
    loss, gradient, _ = value_and_gradient(FAST[name], *inputs)
    tenth, tenth_gradient, _ = value_and_gradient(FAST[name], *inputs, **{key: 10 * count})
    torch.testing.assert_close(10 * tenth, loss)
    torch.testing.assert_close(10 * tenth_gradient, gradient)
    with pytest.raises(AssertionError, match="denominator 0"):
        FAST[name](*inputs, **{key: 0})


@each_loss
def test_empty_responses_contribute_nothing(name):
    logps, old, advantages, mask = batch()
    keep = mask.any(1)
    kwargs = COUNT[name] if name == "drgrpo" else {}  # Dr.GRPO counts empty rows
    full = value_and_gradient(FAST[name], logps, old, advantages, mask, **kwargs)
    args = logps[keep], old[keep], advantages[keep], mask[keep]
    without = value_and_gradient(FAST[name], *args, **kwargs)
    torch.testing.assert_close(full[0], without[0])
    torch.testing.assert_close(full[1][keep], without[1])
    assert not full[1][~keep].any()


@each_loss
@pytest.mark.parametrize("count", [None, 0, 9])
def test_no_token_at_all_is_zero(name, count):
    logps, old, advantages, mask = batch()
    kwargs = {} if count is None else {next(iter(COUNT[name])): count}
    if name == "drgrpo" and count == 0:
        kwargs = {"num_responses": 6}
    nothing = torch.zeros_like(mask)
    loss, gradient, stats = value_and_gradient(
        FAST[name], logps * math.nan, old, advantages, nothing, **kwargs
    )
    assert loss == 0 and not gradient.any() and not any(stats.values())


@each_loss
def test_order_of_responses_does_not_matter(name):
    inputs = batch()
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    loss, gradient, _ = value_and_gradient(FAST[name], *inputs)
    moved, moved_gradient, _ = value_and_gradient(FAST[name], *(x[order] for x in inputs))
    torch.testing.assert_close(moved, loss)
    torch.testing.assert_close(moved_gradient, gradient[order])


@each_loss
def test_on_policy_gradient_raises_good_responses_and_ignores_the_clip(name):
    logps, _, advantages, mask = batch()
    loss, gradient, stats = value_and_gradient(FAST[name], logps, logps, advantages, mask)
    sign = -advantages.sign()[:, None].expand_as(logps)
    assert torch.equal(gradient.sign()[mask], sign[mask])
    assert stats["clip_ratio"] == 0 and stats["approx_kl"] == 0
    wide = partial(FAST[name], clip_low=0.9, clip_high=9.0)
    assert torch.equal(value_and_gradient(wide, logps, logps, advantages, mask)[1], gradient)


@each_loss
def test_old_logps_and_advantages_are_detached(name):
    logps, _, advantages, mask = batch()
    leaf = logps.clone().requires_grad_()
    weight = advantages.clone().requires_grad_()
    FAST[name](leaf, leaf, weight, mask)[0].backward()  # undetached, the ratio would be constant
    expected = value_and_gradient(FAST[name], logps, logps.clone(), advantages, mask)[1]
    assert torch.equal(leaf.grad, expected) and weight.grad is None


@each_loss
def test_bfloat16_is_computed_in_float32(name):
    logps, old, advantages, mask = batch()
    low, low_old = logps.bfloat16(), old.bfloat16()
    loss, gradient, _ = value_and_gradient(FAST[name], low, low_old, advantages.float(), mask)
    exact = value_and_gradient(FAST[name], low.float(), low_old.float(), advantages.float(), mask)
    assert loss.dtype == torch.float32 and torch.equal(loss, exact[0])
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, exact[1].bfloat16())


@each_loss
def test_extreme_ratios_stay_finite(name):
    mask = mask_of([1, 1], width=1)
    logps, old = f64([[-0.1], [-3000.0]]), f64([[-3000.0], [-0.1]])
    for advantage in (1.0, -1.0):
        loss, gradient, _ = value_and_gradient(FAST[name], logps, old, f64([advantage] * 2), mask)
        assert loss.isfinite() and not gradient.any()


def test_log_ratio_is_clamped_at_20_and_for_gspo_at_10():
    logps, old, mask = f64([[-1.0]]), f64([[-31.0]]), mask_of([1], width=1)
    loss, _ = dapo_loss(logps, old, f64([-1.0]), mask)
    assert loss.item() == pytest.approx(math.exp(20))
    loss, _ = gspo_loss(logps, old, f64([-1.0]), mask)
    assert loss.item() == pytest.approx(math.exp(10))
    loss, _ = dapo_loss(old, logps, f64([1.0]), mask)
    assert loss.item() == pytest.approx(-math.exp(-20), rel=1e-9)
    weight = truncated_importance_weights(old, logps, mask)
    assert weight.item() == pytest.approx(math.exp(-20), rel=1e-9)


@pytest.mark.parametrize(
    "loss, low, high", [(grpo_loss, 0.2, 0.2), (dapo_loss, 0.2, 0.28), (gspo_loss, 3e-4, 4e-4)]
)
def test_default_clip_ranges(loss, low, high):
    mask = mask_of([1], width=1)
    for advantage, bound in (-1.0, 1 - low), (1.0, 1 + high):
        for ratio, clipped in (bound - advantage * 1e-5, 0), (bound + advantage * 1e-5, 1):
            args = f64([[math.log(ratio)]]), f64([[0.0]]), f64([advantage]), mask
            _, gradient, stats = value_and_gradient(loss, *args)
            assert stats["clip_ratio"] == clipped and (gradient == 0).item() == clipped


@each_loss
def test_wrong_arguments_are_assertions(name):
    logps, old, advantages, mask = batch()
    with pytest.raises(AssertionError, match="bool"):
        FAST[name](logps, old, advantages, mask.float())
    with pytest.raises(AssertionError):
        FAST[name](logps, old[:, :4], advantages, mask)
    with pytest.raises(AssertionError):
        FAST[name](logps, old, advantages[:5], mask)
    if name != "dapo":
        with pytest.raises(AssertionError, match="advantages"):
            FAST[name](logps, old, torch.zeros(6, 5), mask)


def test_drgrpo_refuses_a_row_beyond_the_limit():
    with pytest.raises(AssertionError, match="max_length 4"):
        drgrpo_loss(*batch(), max_length=4)


def test_clipped_surrogate_refuses_advantages_that_would_broadcast_along_tokens():
    square = torch.zeros(3, 3)
    with pytest.raises(AssertionError, match="advantages"):
        clipped_surrogate(square, square, torch.zeros(3), 0.2, 0.2)


# ---- group advantages ----------------------------------------------------------------------------


@pytest.mark.parametrize("std", [True, False])
def test_group_advantages_equal_slow_loop(std):
    groups = [[1.0, 0.0, 0.5, -3.0], [4.0, 2.5, 2.5, 2.5], [-3.0, 11 / 3, 1 / 3, 4.0]]
    expected = []
    for group in groups:
        mean = sum(group) / 4
        variance = sum((r - mean) ** 2 for r in group) / 3  # Bessel
        expected += [(r - mean) / (math.sqrt(variance) + 1e-6 if std else 1) for r in group]
    actual = group_advantages(f64(groups).flatten(), 4, std=std)
    torch.testing.assert_close(actual, f64(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group_size", range(2, 13))
@pytest.mark.parametrize("std", [True, False])
def test_tied_groups_are_exactly_zero_in_float32(group_size, std):
    values = [3.98647, 1 / 3, -7 / 3, 0.1, 11 / 3, 2.7, -3.0, 1e-3]
    rewards = torch.tensor(values).repeat_interleave(group_size)
    assert not group_advantages(rewards, group_size, std=std).any()
    assert not informative_groups(rewards, group_size).any()


def test_a_tie_in_one_group_leaves_the_others():
    advantages = group_advantages(torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.0]), 3)
    assert not advantages[:3].any() and advantages[3:].all()


def test_smallest_difference_is_no_tie():
    rewards = torch.tensor([1.0, 1.0, 1.0, 1.0 + 2**-23])
    assert group_advantages(rewards, 4).any() and informative_groups(rewards, 4).all()


def test_group_advantages_properties():
    rewards = f64([4.0, -3.0, 0.5, 2.0, 1.0, 0.0, 0.0, 3.5])
    advantages = group_advantages(rewards, 4)
    torch.testing.assert_close(advantages.view(2, 4).sum(1), f64([0.0, 0.0]))
    order = torch.tensor([2, 0, 3, 1, 5, 7, 6, 4])  # within each group
    torch.testing.assert_close(group_advantages(rewards[order], 4), advantages[order])
    torch.testing.assert_close(group_advantages(rewards[:4], 4), advantages[:4])
    torch.testing.assert_close(group_advantages(rewards + 5, 4), advantages)


@pytest.mark.parametrize("function", [group_advantages, informative_groups])
def test_groups_need_two_responses_and_whole_groups(function):
    with pytest.raises(AssertionError, match="group_size 1"):
        function(torch.tensor([1.0, 0.0]), 1)
    with pytest.raises(AssertionError, match="5 rewards"):
        function(torch.zeros(5), 2)


# ---- importance weights, overlong penalty --------------------------------------------------------


def test_importance_weights_equal_slow_loop():
    logps, sampler, _, mask = batch()
    sampler = logps + 2 * (sampler - logps)  # differences of about one nat: some beyond the cap
    weights = truncated_importance_weights(logps.requires_grad_(), sampler, mask, cap=1.5)
    assert not weights.requires_grad
    for k, length in enumerate(LENGTHS):
        for t in range(5):
            ratio = math.exp(logps[k, t].item()) / math.exp(sampler[k, t].item())
            expected = min(ratio, 1.5) if t < length else 0.0
            assert weights[k, t].item() == pytest.approx(expected, abs=1e-13)
    assert (weights == 1.5).any() and ((weights > 0) & (weights < 1)).any()


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_importance_weights_are_zero_on_padding(junk):
    logps, sampler, _, mask = batch()
    clean = truncated_importance_weights(logps, sampler, mask)
    dirty = truncated_importance_weights(
        logps.masked_fill(~mask, junk), sampler.masked_fill(~mask, -junk), mask
    )
    assert torch.equal(clean, dirty) and not dirty[~mask].any()


def test_weights_of_dapo_loss_scale_a_token_and_not_the_denominator():
    logps, old, advantages, mask = batch()
    plain = value_and_gradient(dapo_loss, logps, old, advantages, mask)
    weights = torch.full_like(logps, 0.5)
    half = value_and_gradient(dapo_loss, logps, old, advantages, mask, weights=weights)
    torch.testing.assert_close(2 * half[0], plain[0])
    torch.testing.assert_close(2 * half[1], plain[1])


def test_overlong_penalty_equals_slow_loop():
    for length in range(0, 30):
        if length <= 20 - 8:
            expected = 0.0
        elif length <= 20:
            expected = ((20 - 8) - length) / 8
        else:
            expected = -1.0
        assert overlong_penalty(torch.tensor([length]), 20, 8).tolist() == [expected]
    with pytest.raises(AssertionError, match="cache 0"):
        overlong_penalty(torch.tensor([3]), 20, 0)


# ---- oracles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["agg_1", "agg_2"])
def test_oracle_aggregations(case):
    """Any token loss l > -shift is ratio l + shift at advantage -1, less a loss that is shift."""
    inputs, expected = oracle(case)
    losses, mask, shift = f64(inputs["loss"]), f64(inputs["mask"]).bool(), 10.0
    minus, zero = -torch.ones(len(losses), dtype=torch.float64), torch.zeros_like(losses)

    def reduce(loss_function, **kwargs):
        high, _ = loss_function((losses + shift).log(), zero, minus, mask, **kwargs)
        return high - loss_function(zero + math.log(shift), zero, minus, mask, **kwargs)[0]

    L = inputs["L"]
    close(reduce(dapo_loss), expected["token_mean"])
    close(reduce(grpo_loss), expected["seq_mean_token_mean"])
    close(reduce(drgrpo_loss, max_length=L), expected["drgrpo"])
    close(reduce(drgrpo_loss, max_length=L, num_responses=1), expected["const_sum"])
    if "seq_mean_token_mean_count_empty" in expected:
        count_empty = reduce(grpo_loss, num_responses=len(losses))
        close(count_empty, expected["seq_mean_token_mean_count_empty"])
    close(dapo_loss(zero, zero, -losses, mask)[0], expected["token_mean"])


@pytest.mark.parametrize("case, key", [(1, "adv_ddof1"), (2, "adv"), (5, "adv")])
def test_oracle_group_advantages(case, key):
    inputs, expected = oracle(f"grpo_adv_{case}")
    K = len(inputs["rewards"])
    advantages = group_advantages(torch.tensor(inputs["rewards"]), K, eps=inputs["eps"])
    assert advantages.dtype == torch.float32
    if key == "adv":
        assert advantages.tolist() == expected["adv"]  # exact zeros
    close(advantages.double(), expected[key])


def test_oracle_group_advantages_trl_eps():
    inputs, expected = oracle("grpo_adv_1")
    close(group_advantages(f64(inputs["rewards"]), 8, eps=1e-4), expected["adv_trl"])


def test_oracle_grpo_loss():
    inputs, expected = oracle("grpo_loss_1")
    logps, old = f64(inputs["logp"]), f64(inputs["old_logp"])
    mask = f64(inputs["mask"]).bool()
    advantages = group_advantages(f64(inputs["rewards"]), 4)
    close(advantages[:, None] * mask, expected["adv"])
    loss, gradient, _ = value_and_gradient(
        partial(grpo_loss, clip_low=inputs["clip"]), logps, old, advantages, mask
    )
    close(loss, expected["loss_seq_mean"])
    close(gradient, expected["grad_seq_mean"])
    loss, gradient, _ = value_and_gradient(dapo_loss, logps, old, advantages, mask)
    close(loss, expected["loss_token_mean"])
    close(gradient, expected["grad_token_mean"])


def test_oracle_dapo_clip_higher():
    inputs, expected = oracle("dapo_loss_1")
    logps, old, advantages = f64(inputs["logp"]), f64(inputs["old_logp"]), f64(inputs["adv"])
    mask = f64(inputs["mask"]).bool()
    for name, high in ("clip_higher", 0.28), ("symmetric", 0.2):
        token_loss, clipped = clipped_surrogate(logps, old, advantages, 0.2, high)
        close(token_loss, expected[f"token_loss_{name}"])
        loss, gradient, stats = value_and_gradient(
            dapo_loss, logps, old, advantages, mask, clip_high=high
        )
        close(loss, expected[f"loss_{name}"])
        close(gradient, expected[f"grad_{name}"])
        assert torch.equal(clipped, f64(expected[f"grad_{name}"]) == 0)
        assert stats["clip_ratio"].item() == pytest.approx(clipped.double().mean().item())


def test_oracle_dual_clip_is_off():
    """At A = -1 the loss is the ratio, however large; c = 10 agrees where it does not act."""
    inputs, expected = oracle("dapo_dualclip_1")
    logps, old, advantages = f64(inputs["logp"]), f64(inputs["old_logp"]), f64(inputs["adv"])
    token_loss, clipped = clipped_surrogate(logps, old, advantages, 0.2, 0.28)
    close(token_loss, expected["ratio"], tolerance=1e-5)
    assert not clipped.any()
    mask = f64(inputs["mask"]).bool()
    _, gradient, _ = value_and_gradient(dapo_loss, logps, old, advantages, mask)
    assert gradient[0, 1].item() == pytest.approx(expected["grad_c10"][0][1])


def test_oracle_clip_cannot_matter_on_policy():
    inputs, expected = oracle("dapo_star_1")
    logps, old, advantages = f64(inputs["logp"]), f64(inputs["old_logp"]), f64(inputs["adv"])
    mask = f64(inputs["mask"]).bool()
    for high in "0.20", "0.28":
        loss, gradient, _ = value_and_gradient(
            dapo_loss, logps, old, advantages, mask, clip_high=float(high)
        )
        close(loss, expected[f"loss_hi_{high}"])
        close(gradient, expected[f"grad_hi_{high}"])


def test_oracle_overlong_penalty():
    inputs, expected = oracle("dapo_overlong_1")
    penalty = overlong_penalty(torch.tensor(inputs["len"]), inputs["L_max"], inputs["L_cache"])
    close(penalty.double(), expected["penalty"])


def test_oracle_dynamic_sampling_filter():
    inputs, expected = oracle("dapo_filter_1")
    rewards = torch.tensor([r for group in inputs["groups"].values() for r in group])
    keep = informative_groups(rewards, 4)
    kept = [name for name, k in zip(inputs["groups"], keep, strict=True) if k]
    assert kept == expected["kept"]


def test_oracle_gspo():
    inputs, expected = oracle("gspo_1")
    loss, gradient, stats = value_and_gradient(
        gspo_loss,
        f64(inputs["logp"]),
        f64(inputs["old_logp"]),
        f64(inputs["adv"]),
        f64(inputs["mask"]).bool(),
        clip_low=inputs["lo"],
        clip_high=inputs["hi"],
    )
    close(loss, expected["loss"])
    close(gradient, expected["grad"])
    assert stats["clip_ratio"] == sum(expected["clipped"]) / 2


def test_oracle_drgrpo():
    inputs, expected = oracle("drgrpo_1")
    advantages = group_advantages(f64(inputs["rewards"]), 4, std=False)
    mask = f64(inputs["mask"]).bool()
    close(advantages[:, None] * mask, expected["adv"])
    loss, gradient, _ = value_and_gradient(
        partial(drgrpo_loss, max_length=inputs["L"]),
        f64(inputs["logp"]),
        f64(inputs["old_logp"]),
        advantages,
        mask,
    )
    close(loss, expected["loss"])
    close(gradient, expected["grad"])


@pytest.mark.parametrize("case", ["tis_1", "tis_3"])
def test_oracle_importance_weights(case):
    inputs, expected = oracle(case)
    logps, mask = f64(inputs["train_logp"]), f64(inputs["mask"]).bool()
    weights = truncated_importance_weights(logps, f64(inputs["rollout_logp"]), mask, inputs["C"])
    close(weights, expected["w"])
    if "grad" in expected:
        loss, gradient, _ = value_and_gradient(
            dapo_loss, logps, logps, f64(inputs["adv"]), mask, weights=weights
        )
        close(loss, expected["loss_token_mean"])
        close(gradient, expected["grad"])


def test_imports_alone(tmp_path):
    shutil.copy(grpo.__file__, tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", "import grpo"], cwd=tmp_path, env=env, check=True)
