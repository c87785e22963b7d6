"""spo.py against slow loops written from Eqs. 1 and 19-23, against oracles, and its properties."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spo
from grpo import dapo_loss
from spo import balance_at, keep_mask, sft_loss, spo_loss, toolupt_loss, uncertainty_weight

ORACLES = json.loads((Path(__file__).parent / "oracles" / "spo.json").read_text())
EXPERT_LENGTHS, LENGTHS = [4, 0, 2, 3], [3, 5, 0, 1, 4, 2]  # an empty response in each
IS_ANSWER = [False, False, True, True]


def oracle(name):
    return ORACLES[name]["inputs"], ORACLES[name]["expected"]


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def close(actual, expected, tolerance=6e-7):
    """Oracles are printed to six decimals."""
    torch.testing.assert_close(actual, f64(expected), rtol=1e-6, atol=tolerance)


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def batch(seed=0):
    """The six positional arguments of spo_loss."""
    g = torch.Generator().manual_seed(seed)
    expert_mask, mask = mask_of(EXPERT_LENGTHS, 4), mask_of(LENGTHS, 5)
    expert_logps = -torch.rand(4, 4, generator=g, dtype=torch.float64) * 3 - 0.02
    logps = -torch.rand(6, 5, generator=g, dtype=torch.float64) * 3 - 0.02
    advantages = torch.randn(6, 5, generator=g, dtype=torch.float64)
    advantages[0, 0] = 0.0  # neither rejected nor reinforced
    keep = keep_mask(expert_mask, torch.tensor(IS_ANSWER), 1)
    return [expert_logps, expert_mask, keep, logps, advantages, mask]


def run(args, **kwargs):
    """Loss, the gradients of both log-probs, stats."""
    args = list(args)
    args[0] = args[0].detach().clone().requires_grad_()
    args[3] = args[3].detach().clone().requires_grad_()
    loss, stats = spo_loss(*args, **kwargs)
    assert loss.shape == () and all(s.shape == () for s in stats.values())
    assert not any(s.requires_grad for s in stats.values())
    loss.backward()
    return loss.detach(), args[0].grad, args[3].grad, stats


# ---- slow loops, plain Python floats -------------------------------------------------------------


def sigm(z):
    return 1 / (1 + math.exp(-z))


def slow_spo(expert, keep, rollout, advantages, beta, weighted, weights_at=None, detached=False):
    """Eqs. 20 and 22 with a plus sign. weights_at: log-probs at which phi is taken, held fixed.

    detached: [1 - sigm], too, is taken there, and what it weighs is -log p or log p.
    """
    fixed_expert, fixed_rollout = weights_at or (expert, rollout)

    def preference(logp, fixed, beta):
        return 1 - sigm(beta * (fixed if detached else logp))

    def phi(logp):
        p = math.exp(logp)
        return p * (1 - p) if weighted else 1.0

    chosen = rejected = 0.0
    for i, length in enumerate(EXPERT_LENGTHS):
        for t in range(length):
            if keep[i][t]:
                term = phi(fixed_expert[i][t]) * preference(expert[i][t], fixed_expert[i][t], beta)
                chosen += term * -expert[i][t] if detached else term
    for k, length in enumerate(LENGTHS):
        for t in range(length):
            if advantages[k][t] < 0:
                fixed = fixed_rollout[k][t]
                term = phi(fixed) * preference(rollout[k][t], fixed, -beta)
                rejected += term * rollout[k][t] if detached else term
    return chosen / sum(EXPERT_LENGTHS) + rejected / sum(LENGTHS)


def numeric_gradient(function, rows, h=1e-6):
    """Central differences of function() as each entry of rows moves in place."""
    gradient = torch.zeros(len(rows), len(rows[0]), dtype=torch.float64)
    for i, row in enumerate(rows):
        for t, x in enumerate(row):
            row[t] = x + h
            above = function()
            row[t] = x - h
            gradient[i, t] = (above - function()) / (2 * h)
            row[t] = x
    return gradient


# ---- SFT, Eq. 1 ----------------------------------------------------------------------------------


def test_sft_equals_slow_loop():
    logps, mask = batch()[:2]
    logps.requires_grad_()
    loss, stats = sft_loss(logps, mask)
    loss.backward()
    total, probability, tokens = 0.0, 0.0, 0
    for i, length in enumerate(EXPERT_LENGTHS):
        for t in range(length):
            total += logps[i, t].item()
            probability += math.exp(logps[i, t].item())
            tokens += 1
    assert loss.item() == pytest.approx(-total / tokens, abs=1e-13)
    torch.testing.assert_close(logps.grad, torch.where(mask, -1.0 / tokens, 0.0).double())
    assert stats["nll"] == loss and not stats["nll"].requires_grad
    assert stats["expert_prob"].item() == pytest.approx(probability / tokens)


@pytest.mark.parametrize("split", [[1, 3], [1] * 4])
def test_sft_micro_batches_add_up(split):
    logps, mask = batch()[:2]
    whole, stats = sft_loss(logps, mask)
    parts = [
        sft_loss(x, m, num_tokens=sum(EXPERT_LENGTHS))
        for x, m in zip(logps.split(split), mask.split(split), strict=True)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), whole)
    for key, value in stats.items():
        torch.testing.assert_close(sum(p[1][key] for p in parts), value)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_sft_padding_may_hold_anything(junk):
    logps, mask = batch()[:2]
    dirty = logps.masked_fill(~mask, junk).requires_grad_()
    loss, stats = sft_loss(dirty, mask)
    loss.backward()
    clean, clean_stats = sft_loss(logps, mask)
    assert torch.equal(loss, clean) and stats == clean_stats
    assert dirty.grad.isfinite().all() and not dirty.grad[~mask].any()


@pytest.mark.parametrize("count", [None, 0, 5])
def test_sft_without_tokens_is_zero(count):
    logps = torch.full((2, 3), math.nan, requires_grad=True)
    loss, stats = sft_loss(logps, torch.zeros(2, 3, dtype=torch.bool), num_tokens=count)
    loss.backward()
    assert loss == 0 and not logps.grad.any() and not any(stats.values())


# ---- Eqs. 19, 21 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tag_length", [1, 3, 9])
def test_keep_mask_equals_slow_loop(tag_length):
    expert_mask, is_answer = mask_of([6, 6, 2, 0, 0], 6), [True, False, True, True, False]
    keep = keep_mask(expert_mask, torch.tensor(is_answer), tag_length)
    for i in range(5):
        for t in range(1, 7):  # t counts from 1 in the paper
            preserve = 0 if is_answer[i] and t > tag_length else 1
            assert keep[i, t - 1].item() == bool(preserve and expert_mask[i, t - 1])


def test_uncertainty_weight_equals_slow_loop_and_is_detached():
    p = [1e-12, 0.01, 0.3, 0.5, 0.9, 1 - 1e-12]
    logps = torch.tensor([math.log(x) for x in p], dtype=torch.float64, requires_grad=True)
    weight = uncertainty_weight(logps)
    assert not weight.requires_grad
    assert weight.tolist() == pytest.approx([x * (1 - x) for x in p], rel=1e-4)
    assert weight.max() == 0.25 == weight[3]


def test_uncertainty_weight_at_the_ends():
    ends = uncertainty_weight(torch.tensor([0.0, -math.inf]))
    assert ends.tolist() == [0.0, 0.0]
    # 1 - exp(-1e-9) is 0 in float32; the weight is not
    assert uncertainty_weight(torch.tensor([-1e-9])).item() == pytest.approx(1e-9)


# ---- SPO, Eqs. 20, 22 ----------------------------------------------------------------------------


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_spo_value_and_gradient_equal_slow_loop(weighted, beta, detached):
    args = batch()
    form = {"weighted": weighted, "detached": detached}
    loss, expert_gradient, gradient, _ = run(args, beta=beta, **form)
    expert, keep, rollout, advantages = (args[i].tolist() for i in (0, 2, 3, 4))
    weights_at = args[0].tolist(), args[3].tolist()

    def slow():
        return slow_spo(expert, keep, rollout, advantages, beta, weighted, weights_at, detached)

    assert loss.item() == pytest.approx(slow(), abs=1e-13)
    expected = numeric_gradient(slow, expert)
    torch.testing.assert_close(expert_gradient, expected, rtol=0, atol=1e-9)
    expected = numeric_gradient(slow, rollout)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_spo_stats():
    args = batch()
    loss, _, _, stats = run(args)
    torch.testing.assert_close(stats["spo/chosen"] + stats["spo/rejected"], loss)
    alone, _ = spo_loss(*args[:5], torch.zeros_like(args[5]))
    torch.testing.assert_close(stats["spo/chosen"], alone)
    assert stats["spo/kept"].item() == pytest.approx((4 + 0 + 1 + 1) / 9)
    negative = sum((args[4][k, :n] < 0).sum().item() for k, n in enumerate(LENGTHS))
    assert stats["spo/negative"].item() == pytest.approx(negative / sum(LENGTHS))


def test_descent_raises_expert_tokens_and_lowers_rejected_ones():
    args = batch()
    _, expert_gradient, gradient, _ = run(args)
    assert torch.equal(expert_gradient < 0, args[2])
    assert torch.equal(gradient > 0, (args[4] < 0) & args[5])
    assert (expert_gradient <= 0).all() and (gradient >= 0).all()


def test_phi_is_not_differentiated():
    """Undetached, phi would reverse the gradient below p = sqrt(2) - 1 (beta 1)."""
    args = batch()
    _, expert_gradient, gradient, _ = run(args)
    _, plain_expert, plain, _ = run(args, weighted=False)
    p, p_rollout = args[0].exp(), args[3].exp()
    torch.testing.assert_close(expert_gradient, plain_expert * p * (1 - p))
    torch.testing.assert_close(gradient, plain * p_rollout * (1 - p_rollout))


def test_denominators_count_unpreserved_and_non_negative_tokens():
    args = batch()
    loss, expert_gradient, gradient, _ = run(args)
    half, half_expert, half_gradient, _ = run(
        args, num_expert_tokens=2 * sum(EXPERT_LENGTHS), num_tokens=2 * sum(LENGTHS)
    )
    torch.testing.assert_close(2 * half, loss)
    torch.testing.assert_close(2 * half_expert, expert_gradient)
    torch.testing.assert_close(2 * half_gradient, gradient)
    with pytest.raises(AssertionError, match="denominator 0"):
        spo_loss(*args, num_tokens=0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_spo_micro_batches_add_up(as_tensor):
    """Expert and rollout rows are split independently; some parts have no expert or no rollout."""
    args = batch()
    count = {"num_expert_tokens": sum(EXPERT_LENGTHS), "num_tokens": sum(LENGTHS)}
    count = {k: torch.tensor(v) if as_tensor else v for k, v in count.items()}
    experts = zip(*(x.split([2, 2, 0]) for x in args[:3]), strict=True)
    rollouts = zip(*(x.split([1, 2, 3]) for x in args[3:]), strict=True)
    parts = [run([*e, *r], **count) for e, r in zip(experts, rollouts, strict=True)]
    loss, expert_gradient, gradient, stats = run(args)
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), expert_gradient)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), gradient)
    for key, value in stats.items():
        torch.testing.assert_close(sum(p[3][key] for p in parts), value)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, -1e30])
def test_spo_padding_may_hold_anything(junk, weighted):
    expert_logps, expert_mask, keep, logps, advantages, mask = batch()
    clean = run(batch(), weighted=weighted)
    dirty = run(
        [
            expert_logps.masked_fill(~expert_mask, junk),
            expert_mask,
            keep | ~expert_mask,  # a caller's mask that also keeps padding
            logps.masked_fill(~mask, junk),
            advantages.masked_fill(~mask, junk),
            mask,
        ],
        weighted=weighted,
    )
    for x, y in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(x, y)
    assert clean[3] == dirty[3]


def test_spo_is_finite_where_a_token_is_certain_or_impossible():
    expert_logps, expert_mask, keep, logps, advantages, mask = batch()
    for value in (0.0, -math.inf, -1e4):
        loss, expert_gradient, gradient, _ = run(
            [
                torch.full_like(expert_logps, value),
                expert_mask,
                keep,
                torch.full_like(logps, value),
                advantages,
                mask,
            ]
        )
        assert loss.isfinite()
        assert expert_gradient.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("counts", [{}, {"num_expert_tokens": 0, "num_tokens": 0}])
def test_spo_without_tokens_is_zero(counts):
    expert_logps, expert_mask, keep, logps, advantages, mask = batch()
    loss, expert_gradient, gradient, stats = run(
        [
            expert_logps * math.nan,
            torch.zeros_like(expert_mask),
            keep,
            logps * math.nan,
            advantages,
            torch.zeros_like(mask),
        ],
        **counts,
    )
    assert loss == 0 and not expert_gradient.any() and not gradient.any()
    assert not any(stats.values())


def test_spo_order_of_rows_does_not_matter():
    args = batch()
    expert_order, order = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
    moved = run([x[expert_order] for x in args[:3]] + [x[order] for x in args[3:]])
    loss, expert_gradient, gradient, _ = run(args)
    torch.testing.assert_close(moved[0], loss)
    torch.testing.assert_close(moved[1], expert_gradient[expert_order])
    torch.testing.assert_close(moved[2], gradient[order])


def test_bfloat16_is_computed_in_float32():
    args = batch()
    args[0], args[3], args[4] = args[0].bfloat16(), args[3].bfloat16(), args[4].float()
    loss, expert_gradient, _, _ = run(args)
    exact = run([args[0].float(), *args[1:3], args[3].float(), *args[4:]])
    assert loss.dtype == torch.float32 and torch.equal(loss, exact[0])
    assert torch.equal(expert_gradient, exact[1].bfloat16())
    low, _ = sft_loss(args[0], args[1])
    assert low.dtype == torch.float32 and torch.equal(low, sft_loss(args[0].float(), args[1])[0])


def test_wrong_arguments_are_assertions():
    args = batch()
    wrong = {
        "bool": (1, args[1].float()),
        "expert_keep": (2, args[2][:, :2]),
        "logps": (3, args[3][:, :4]),
        "advantages": (4, args[4][:, 0]),
    }
    for message, (position, value) in wrong.items():
        changed = list(args)
        changed[position] = value
        with pytest.raises(AssertionError, match=message):
            spo_loss(*changed)
    with pytest.raises(AssertionError, match="tag_length 0"):
        keep_mask(args[1], torch.tensor(IS_ANSWER), 0)
    with pytest.raises(AssertionError, match="is_answer"):
        keep_mask(args[1], torch.tensor([True]), 1)


# ---- Eq. 23 --------------------------------------------------------------------------------------


def test_toolupt_loss_mixes_values_and_gradients():
    spo_term, dapo_term = f64(3.0).requires_grad_(), f64(5.0).requires_grad_()
    loss = toolupt_loss(spo_term, dapo_term, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.3 * 3 + 0.7 * 5)
    assert spo_term.grad.item() == pytest.approx(0.3) and dapo_term.grad.item() == 0.7
    assert toolupt_loss(spo_term, dapo_term, 0) == 5 and toolupt_loss(spo_term, dapo_term, 1) == 3
    with pytest.raises(AssertionError, match="balance 1.1"):
        toolupt_loss(spo_term, dapo_term, 1.1)


def test_balance_equals_slow_walk():
    """Walk one period a step at a time, then compare it with the next periods."""
    low, high, up, down = 0.1, 0.6, 4, 7
    value, walk = low, []
    for step in range(up + down):
        walk.append(value)
        value += (high - low) / up if step < up else -(high - low) / down
    assert value == pytest.approx(low)
    got = [balance_at(s, low=low, high=high, up=up, down=down) for s in range(3 * (up + down))]
    assert got == pytest.approx(walk * 3)
    assert max(got) == got[up] == pytest.approx(high) and min(got) == got[0] == low


def test_balance_without_rise_or_fall_and_without_period():
    assert [balance_at(s, low=0, high=1, up=0, down=4) for s in range(5)] == [1, 0.75, 0.5, 0.25, 1]
    assert [balance_at(s, low=0, high=1, up=4, down=0) for s in range(5)] == [0, 0.25, 0.5, 0.75, 0]
    with pytest.raises(AssertionError, match="period"):
        balance_at(3, up=0, down=0)


# ---- oracles -------------------------------------------------------------------------------------


def test_oracle_sft():
    inputs, expected = oracle("sft_1")
    logps = f64(inputs["logp"]).requires_grad_()
    loss, _ = sft_loss(logps, f64(inputs["mask"]).bool())
    loss.backward()
    close(loss.detach(), expected["loss_token_mean"])
    close(logps.grad, expected["grad_token_mean"])


def oracle_spo_args():
    inputs, expected = oracle("toolupt_spo_1")
    args = [
        f64(inputs["expert_logp"]),
        f64(inputs["expert_mask"]).bool(),
        f64(inputs["preserve"]).bool(),
        f64(inputs["rollout_logp"]),
        f64(inputs["adv"]),
        f64(inputs["rollout_mask"]).bool(),
    ]
    return args, expected


@pytest.mark.parametrize("beta", ["0.1", "1"])
@pytest.mark.parametrize("weighted", [True, False])
def test_oracle_spo(beta, weighted):
    args, expected = oracle_spo_args()
    expected = expected[f"beta{beta}_{'phi' if weighted else 'nophi'}"]
    loss, expert_gradient, gradient, _ = run(args, beta=float(beta), weighted=weighted)
    close(loss, expected["loss_plus_sign"])
    close(expert_gradient, expected["grad_expert"])
    close(gradient, expected["grad_rollout"])


def test_oracle_spo_keep_mask_and_defaults():
    args, expected = oracle_spo_args()
    keep = keep_mask(args[1], torch.tensor([False, True]), 1)
    assert torch.equal(keep, args[2] & args[1])
    close(run(args)[0], expected["beta1_phi"]["loss_plus_sign"])


def test_oracle_balance():
    inputs, expected = oracle("toolupt_gamma_1")
    kwargs = {key: inputs[key] for key in ("low", "high", "up", "down")}
    assert [balance_at(s, **kwargs) for s in inputs["steps"]] == pytest.approx(expected["gamma"])
    assert [balance_at(s) for s in inputs["steps"]] == pytest.approx(expected["gamma"])  # defaults


def test_oracle_total():
    inputs, expected = oracle("toolupt_total_1")
    args, _ = oracle_spo_args()
    spo_term, _ = spo_loss(*args, beta=inputs["beta"])
    dapo_term, _ = dapo_loss(args[3], args[3], args[4], args[5])
    close(spo_term, expected["L_spo_phi"])
    close(dapo_term, expected["L_fg_dapo"])
    loss = toolupt_loss(spo_term, dapo_term, inputs["gamma"]) - inputs["coef"] * inputs["H_mean"]
    close(loss, expected["loss"])


def test_oracle_size_of_an_expert_gradient():
    inputs, expected = oracle("toolupt_scale_1")
    logps = f64([inputs["p"]]).log()
    close(uncertainty_weight(logps)[0], expected["chord_phi"])
    mask = torch.ones_like(logps, dtype=torch.bool)
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    for beta in "0.1", "1":
        args = [logps, mask, mask, nothing, nothing, nothing.bool()]
        _, gradient, _, _ = run(args, beta=float(beta), num_expert_tokens=1)
        torch.testing.assert_close(
            -gradient[0], f64(expected[f"spo_phi_beta{beta}"]), rtol=3e-5, atol=0
        )


def test_imports_alone(tmp_path):
    shutil.copy(spo.__file__, tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", "import spo"], cwd=tmp_path, env=env, check=True)
