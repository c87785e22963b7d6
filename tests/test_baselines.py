"""LUFFY, SRFT and CHORD against loops written from the papers, worked cases, and properties."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baselines import chord_loss, chord_mu_at, luffy_loss, srft_loss

ORACLES = json.loads((Path(__file__).parent / "oracles" / "baselines.json").read_text())
ROOT = Path(__file__).resolve().parent.parent
NAN, INF = float("nan"), float("inf")


# ---- slow loops: nested lists of the valid tokens only, no tensor, no padding, no mask ----


def slow_luffy(logps, old, adv, is_expert, gamma=0.1):
    total = 0.0
    for y, y_old, a, expert in zip(logps, old, adv, is_expert, strict=True):
        for lp, lp_old in zip(y, y_old, strict=True):
            p = math.exp(lp)
            total += -a * (p / (p + gamma) if expert else p / math.exp(lp_old))
    return total / sum(len(y) for y in logps)


def slow_srft(logps, entropy, adv, correct, is_expert, shaped):
    z = sum(len(y) for y in logps)
    z_expert = sum(len(y) for y, e in zip(logps, is_expert, strict=True) if e)
    sft = demo = right = wrong = 0.0
    for y, h, a, ok, expert in zip(logps, entropy, adv, correct, is_expert, strict=True):
        for lp in y:
            mean_h = sum(h) / len(h)
            p = math.exp(lp)
            if expert:
                sft += 0.5 * math.exp(-mean_h) * -lp
                demo += -a * (p / (p + 0.1) if shaped else p)
            elif ok:
                right += 0.1 * math.exp(mean_h) * -lp
            else:
                wrong += lp
    return (sft / z_expert if z_expert else 0.0) + (demo + right + wrong) / z


def slow_chord(logps, old, adv, expert_logps, mu, phis):
    """phis: the weight of each expert token, a given number since it is detached."""
    grpo = 0.0
    for y, y_old, a in zip(logps, old, adv, strict=True):
        for lp, lp_old in zip(y, y_old, strict=True):
            r = math.exp(lp - lp_old)
            grpo += -min(r * a, min(max(r, 0.8), 1.2) * a)
    sft = 0.0
    for y, w in zip(expert_logps, phis, strict=True):
        sft += sum(-w_t * lp for lp, w_t in zip(y, w, strict=True))
    n, n_expert = sum(map(len, logps)), sum(map(len, expert_logps))
    return (1 - mu) * grpo / n + mu * sft / n_expert


def slow_grad(loss, rows, step=1e-6):
    """Central differences of loss(rows) in every entry of rows."""
    grad = [[0.0] * len(y) for y in rows]
    for i, y in enumerate(rows):
        for t, value in enumerate(y):
            y[t] = value + step
            up = loss(rows)
            y[t] = value - step
            grad[i][t] = (up - loss(rows)) / (2 * step)
            y[t] = value
    return grad


# ---- from nested lists to padded tensors ----


def pad(rows, filler=0.0, width=None, dtype=torch.float64):
    width = width or max(map(len, rows), default=0)
    padded = [list(y) + [filler] * (width - len(y)) for y in rows]
    return torch.tensor(padded, dtype=dtype).reshape(len(rows), width)


def mask_of(rows, width=None):
    return pad([[1.0] * len(y) for y in rows], 0.0, width).bool()


def unpad(tensor, rows):
    """The entries of valid tokens; those of padding must be exactly 0."""
    for values, y in zip(tensor, rows, strict=True):
        assert (values[len(y) :] == 0).all(), values
    return [values[: len(y)].tolist() for values, y in zip(tensor, rows, strict=True)]


def flat(rows):
    return [x for y in rows for x in y]


def draw(lengths, seed, low=0.02, high=0.98):
    """Random log-probs: one list per row."""
    g = torch.Generator().manual_seed(seed)
    uniform = [torch.rand(n, generator=g, dtype=torch.float64) for n in lengths]
    return [torch.log(low + (high - low) * u).tolist() for u in uniform]


LENGTHS = [4, 2, 0, 5, 1, 3]  # one empty response
EXPERT = [False, True, False, False, False, True]
CORRECT = [True, True, False, False, True, False]
ADV = [0.7, 1.3, 0.4, -0.9, -0.2, -0.6]


def batch(seed=0, filler=NAN, width=7):
    """Six rows with everything the three losses read; fresh leaves that ask for gradients."""
    logps, old = draw(LENGTHS, seed), draw(LENGTHS, seed + 1)
    entropy = [[-2 * x for x in y] for y in draw(LENGTHS, seed + 2)]
    return {
        "rows": (logps, old, entropy),
        "logps": pad(logps, filler, width).requires_grad_(),
        "old_logps": pad(old, filler, width),
        "entropy": pad(entropy, filler, width),
        "advantages": torch.tensor(ADV, dtype=torch.float64),
        "correct": torch.tensor(CORRECT),
        "is_expert": torch.tensor(EXPERT),
        "response_mask": mask_of(logps, width),
    }


def luffy(b, rows=slice(None), **kw):
    names = ("logps", "old_logps", "advantages", "response_mask", "is_expert")
    return luffy_loss(*(b[k][rows] for k in names), **kw)


def srft(b, rows=slice(None), **kw):
    names = ("logps", "entropy", "advantages", "correct", "response_mask", "is_expert")
    return srft_loss(*(b[k][rows] for k in names), **kw)


def chord(b, rows=slice(None), **kw):
    """The expert side of CHORD: the same rows, transposed in role, so that one batch serves all."""
    rollout = [b[k][rows] for k in ("logps", "old_logps", "advantages", "response_mask")]
    return chord_loss(*rollout, b["old_logps"][rows], b["response_mask"][rows], **kw)


LOSSES = {
    "luffy": luffy,
    "srft": srft,
    "srft shaped": lambda b, rows=slice(None), **kw: srft(b, rows, shaped=True, **kw),
    "chord": chord,
}


# ---- values and gradients against the loops ----


@pytest.mark.parametrize("seed", [0, 10, 20])
@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_luffy_equals_the_loop(seed, gamma):
    b = batch(seed)
    logps, old, _ = b["rows"]

    def slow(x):
        return slow_luffy(x, old, ADV, EXPERT, gamma)

    loss, _ = luffy(b, gamma=gamma)
    loss.backward()
    assert loss.item() == pytest.approx(slow(logps), abs=1e-12)
    expected = flat(slow_grad(slow, logps))
    assert flat(unpad(b["logps"].grad, logps)) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize(
    "variant, shaped", [("paper", False), ("paper", True), ("hpt", False), ("hpt", True)]
)
def test_srft_equals_the_loop(seed, variant, shaped):
    b = batch(seed)
    logps, _, entropy = b["rows"]
    b["entropy"].requires_grad_()

    def slow(x):
        return slow_srft(x, entropy, ADV, CORRECT, EXPERT, shaped or variant == "hpt")

    loss, _ = srft(b, variant=variant, shaped=shaped)
    loss.backward()
    assert loss.item() == pytest.approx(slow(logps), abs=1e-12)
    expected = flat(slow_grad(slow, logps))
    assert flat(unpad(b["logps"].grad, logps)) == pytest.approx(expected, abs=1e-8)
    assert b["entropy"].grad is None, "the entropy weights must be detached"


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("mu, phi", [(0.1, True), (0.7, False), (0.0, True), (1.0, True)])
def test_chord_equals_the_loop(seed, mu, phi):
    b = batch(seed)
    logps, old, _ = b["rows"]
    experts = draw([3, 0, 6], seed + 5)
    fixed = [[math.exp(x) * (1 - math.exp(x)) if phi else 1.0 for x in y] for y in experts]
    expert_logps = pad(experts, -INF, 8).requires_grad_()
    loss, _ = chord_loss(
        b["logps"],
        b["old_logps"],
        b["advantages"],
        b["response_mask"],
        expert_logps,
        mask_of(experts, 8),
        mu=mu,
        phi=phi,
    )
    loss.backward()
    assert loss.item() == pytest.approx(slow_chord(logps, old, ADV, experts, mu, fixed), abs=1e-12)
    expected = slow_grad(lambda x: slow_chord(x, old, ADV, experts, mu, fixed), logps)
    assert flat(unpad(b["logps"].grad, logps)) == pytest.approx(flat(expected), abs=1e-8)
    expected = slow_grad(lambda x: slow_chord(logps, old, ADV, x, mu, fixed), experts)
    assert flat(unpad(expert_logps.grad, experts)) == pytest.approx(flat(expected), abs=1e-8)


# ---- worked cases ----


def column_of(rows):
    """The oracles repeat a row's advantage on every token; take the first."""
    return torch.tensor([y[0] for y in rows])


def oracle_rows(case):
    x = case["inputs"]
    mask = torch.tensor(x["mask"]).bool()
    return x, torch.tensor(x["logp"], requires_grad=True), mask


def close(value, expected, tolerance=2e-6):
    value = torch.as_tensor(value, dtype=torch.float64).detach()
    torch.testing.assert_close(
        value, torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=tolerance
    )


def test_luffy_advantages_are_group_advantages_without_std():
    from grpo import group_advantages  # the helper that the file's docstring names

    case = ORACLES["luffy_adv_1"]
    rewards = torch.tensor([*case["inputs"]["on_rewards"], case["inputs"]["expert_reward"]])
    close(group_advantages(rewards, 4, std=False), case["expected"]["adv_code_no_std"])
    close(group_advantages(rewards, 4), case["expected"]["adv_paper_std"])


def test_luffy_shape_oracle():
    case = ORACLES["luffy_shape_1"]
    p = torch.tensor(case["inputs"]["p"])
    logps = p.log()[:, None].requires_grad_()
    one = torch.ones(len(p))
    loss, _ = luffy_loss(
        logps,
        torch.zeros_like(logps),
        -one,
        one[:, None].bool(),
        one.bool(),
        gamma=case["inputs"]["gamma"],
        num_tokens=1,
    )
    loss.backward()
    close(loss, sum(case["expected"]["f"]), 1e-5)
    close(logps.grad[:, 0], case["expected"]["df_dlogp"])


@pytest.mark.parametrize("key", ["paper_Z", "code_const"])
def test_luffy_loss_oracle(key):
    case = ORACLES["luffy_loss_1"]
    x, logps, mask = oracle_rows(case)
    count = {"paper_Z": None, "code_const": x["L"]}[key]
    is_expert = torch.tensor(x["off_mask"]).bool().any(1)
    loss, stats = luffy_loss(
        logps, torch.tensor(x["old_logp"]), column_of(x["adv"]), mask, is_expert, num_tokens=count
    )
    loss.backward()
    close(loss, case["expected"][f"loss_{key}"])
    close(logps.grad, case["expected"][f"grad_{key}"])
    divisor = count or 9
    rows = case["expected"]["token_loss"]
    close(stats["luffy/rollout"], sum(map(sum, rows[:3])) / divisor)
    close(stats["luffy/expert"], sum(rows[3]) / divisor)


@pytest.mark.parametrize("key", ["identity", "shaped"])
def test_srft_loss_oracle(key):
    case = ORACLES["srft_loss_1"]
    x, logps, mask = oracle_rows(case)
    loss, _ = srft_loss(
        logps,
        torch.tensor(x["entropy"]),
        torch.tensor(case["expected"]["adv_group"]),
        torch.tensor(x["correct"]).bool(),
        mask,
        torch.tensor(x["off_mask"]).bool().any(1),
        shaped=key == "shaped",
    )
    loss.backward()
    close(loss, case["expected"][f"loss_{key}_Z"])
    close(logps.grad, case["expected"][f"grad_{key}_Z"])


def test_srft_weights_oracle():
    """One-token rows, advantage 0: the gradient of a row is minus its weight over the count."""
    case = ORACLES["srft_w_1"]
    entropy = torch.tensor(case["inputs"]["H"])[:, None]
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    for is_expert, key in ((yes, "w_sft_paper"), (no, "w_rl_paper")):
        logps = torch.full((4, 1), -0.7, requires_grad=True)
        loss, _ = srft_loss(logps, entropy, torch.zeros(4), yes, yes[:, None], is_expert)
        loss.backward()
        close(-4 * logps.grad[:, 0], case["expected"][key])


@pytest.mark.parametrize("name", ["mu_math", "mu_toolace", "phi", "repo_yaml_mixed"])
def test_chord_mu_oracle(name):
    x, expected = ORACLES["chord_mu_1"]["inputs"], ORACLES["chord_mu_1"]["expected"]
    values = [chord_mu_at(step, **x["configs"][name]) for step in x["steps"]]
    assert values == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("phi, key", [(True, "loss"), (False, "loss_plain_sft")])
def test_chord_phi_oracle(phi, key):
    case = ORACLES["chord_phi_1"]
    _, expert_logps, mask = oracle_rows(case)
    none = torch.zeros(0, 3)
    loss, stats = chord_loss(
        none, none, torch.zeros(0), none.bool(), expert_logps, mask, mu=1.0, phi=phi
    )
    loss.backward()
    close(loss, case["expected"][key])
    close(stats["chord/sft"], case["expected"][key])
    if phi:
        close(expert_logps.grad, case["expected"]["grad"])


def test_chord_total_oracle():
    case = ORACLES["chord_total_phi"]
    x, logps, mask = oracle_rows(case)
    loss, stats = chord_loss(
        logps,
        logps,
        column_of(x["adv"]),
        mask,
        torch.tensor(x["expert_logp"]),
        torch.tensor(x["expert_mask"]).bool(),
        mu=x["mu"],
    )
    loss.backward()
    close(loss, case["expected"]["loss"])
    close(stats["chord/grpo"], case["expected"]["loss_grpo"])
    close(stats["chord/sft"], case["expected"]["loss_sft"])
    close(logps.grad, (-0.9 * column_of(x["adv"])[:, None] * mask / mask.sum()).tolist())


# ---- properties ----


def run(name, b, rows=slice(None), **kw):
    b["logps"].grad = None
    loss, stats = LOSSES[name](b, rows, **kw)
    loss.backward()
    return loss.detach(), b["logps"].grad.clone(), stats


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("filler", [NAN, INF, -INF, 1e30])
def test_padding_never_leaks(name, filler):
    clean, dirty = batch(filler=0.0, width=5), batch(filler=filler, width=9)
    dirty["advantages"][2] = filler  # the row without a token
    loss, grad, stats = run(name, clean)
    loss2, grad2, stats2 = run(name, dirty)
    torch.testing.assert_close(loss2, loss)
    torch.testing.assert_close(grad2[:, :5], grad)
    assert (grad2[:, 5:] == 0).all() and (grad2[~dirty["response_mask"]] == 0).all()
    for key in stats:
        torch.testing.assert_close(stats2[key], stats[key])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[2], [1, 5], [0, 3], [4]]])
@pytest.mark.parametrize("wrap", [int, torch.tensor])
def test_micro_batches_add_up(name, parts, wrap):
    b = batch()
    whole, grad, stats = run(name, b)
    expert_tokens = sum(n for n, e in zip(LENGTHS, EXPERT, strict=True) if e)
    counts = {"num_tokens": wrap(sum(LENGTHS))}
    if name.startswith("srft"):
        counts["num_expert_tokens"] = wrap(expert_tokens)
    if name == "chord":
        counts["num_expert_tokens"] = wrap(sum(LENGTHS))
    pieces = [run(name, b, rows, **counts) for rows in parts]
    torch.testing.assert_close(sum(p[0] for p in pieces), whole)
    torch.testing.assert_close(sum(p[1] for p in pieces), grad)
    for key in stats:
        assert stats[key].dim() == 0 and not stats[key].requires_grad, key
        torch.testing.assert_close(sum(p[2][key] for p in pieces), stats[key])


@pytest.mark.parametrize("name", LOSSES)
def test_row_order_does_not_matter(name):
    b = batch()
    loss, grad, _ = run(name, b)
    order = [3, 5, 0, 2, 4, 1]
    loss2, grad2, _ = run(name, b, order)
    torch.testing.assert_close(loss2, loss)
    torch.testing.assert_close(grad2, grad)


@pytest.mark.parametrize("name", LOSSES)
def test_only_empty_rows_give_zero_with_a_gradient(name):
    b = batch()
    loss, grad, stats = run(name, b, [2])
    assert loss == 0 and (grad == 0).all() and all(v == 0 for v in stats.values())


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_computed_in_float32(name):
    b = batch()
    b["advantages"] = b["advantages"].float()
    floats = {k: b[k].detach().bfloat16() for k in ("logps", "old_logps", "entropy")}
    low, high = {**b, **floats}, {**b, **{k: v.float() for k, v in floats.items()}}
    low["logps"].requires_grad_()
    high["logps"].requires_grad_()
    loss, grad, _ = run(name, low)
    expected, expected_grad, _ = run(name, high)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad.bfloat16())


@pytest.mark.parametrize("name", ["luffy", "chord"])
def test_on_policy_old_logps_may_be_the_logps(name):
    """Old log-probs are detached inside: without that the gradient would vanish silently."""
    b = batch()
    b["is_expert"][:] = False
    b["old_logps"] = b["logps"]
    loss, stats = luffy(b) if name == "luffy" else chord(b, mu=0.0)
    loss.backward()
    expected = -b["advantages"][:, None] * b["response_mask"] / sum(LENGTHS)
    torch.testing.assert_close(b["logps"].grad, expected)
    if name == "chord":
        assert stats["clip_ratio"] == 0 and stats["approx_kl"] == 0


def test_advantages_take_no_gradient():
    for loss_of in LOSSES.values():
        b = batch()
        b["advantages"].requires_grad_()
        loss_of(b)[0].backward()
        assert b["advantages"].grad is None


def test_luffy_learns_nothing_from_a_tied_group():
    b = batch()
    b["advantages"].zero_()
    loss, grad, _ = run("luffy", b)
    assert loss == 0 and (grad == 0).all()


def test_luffy_gradient_pulls_good_experts_and_peaks_at_gamma():
    p = torch.tensor([0.001, 0.05, 0.1, 0.2, 0.9], dtype=torch.float64)
    yes = torch.ones(1, dtype=torch.bool)
    for sign in (1.0, -1.0):
        logps = p.log()[None].requires_grad_()
        adv = torch.tensor([sign], dtype=torch.float64)
        luffy_loss(logps, logps, adv, yes.expand(1, 5), yes)[0].backward()
        assert (sign * logps.grad < 0).all()
        assert logps.grad.abs().argmax() == 2


def test_luffy_does_not_clip_rollouts_and_does_not_read_the_experts_old_logps():
    logps = torch.tensor([[0.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-3.0], [NAN]], dtype=torch.float64)
    loss, _ = luffy_loss(
        logps, old, torch.ones(2), torch.ones(2, 1).bool(), torch.tensor([False, True])
    )
    loss.backward()
    p = math.exp(-1.0)
    assert loss.item() == pytest.approx(-(math.exp(3.0) + p / (p + 0.1)) / 2)
    assert logps.grad[0, 0].item() == pytest.approx(-math.exp(3.0) / 2)
    assert logps.grad[1, 0].item() == pytest.approx(-0.1 * p / (p + 0.1) ** 2 / 2)


def test_ratio_stays_finite_for_absurd_log_probs():
    b = batch()
    b["old_logps"] = b["old_logps"] - 1000
    for name in ("luffy", "chord"):
        loss, grad, _ = run(name, b)
        assert loss.isfinite() and grad.isfinite().all()


def test_chord_clips_both_sides():
    """ratio 1.5, 0.5: the surrogate is flat where the clip helps, and the stat counts it."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5], dtype=torch.float64)
    adv = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    logps = ratio.log()[:, None].requires_grad_()
    yes, none = torch.ones(4, 1).bool(), torch.zeros(0, 1)
    loss, stats = chord_loss(logps, 0 * logps, adv, yes, none, none.bool(), mu=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    expected = [0.0, -0.5 / 4, 1.5 / 4, 0.0]
    assert logps.grad[:, 0].tolist() == pytest.approx(expected)
    assert stats["clip_ratio"].item() == 0.5
    assert stats["approx_kl"].item() == pytest.approx(-ratio.log().mean().item())


def test_chord_phi_is_detached_and_ignores_sure_and_hopeless_tokens():
    p = torch.tensor([[1.0, 0.5, 1e-9]], dtype=torch.float64)
    logps, none = p.log().requires_grad_(), torch.zeros(0, 1)
    loss, _ = chord_loss(none, none, none[:, 0], none.bool(), logps, p > 0, mu=1.0)
    loss.backward()
    assert logps.grad[0].tolist() == pytest.approx([0.0, -0.25 / 3, 0.0], abs=1e-9)


@pytest.mark.parametrize("missing", ["expert", "right", "wrong"])
def test_srft_without_one_kind_of_row(missing):
    b = batch()
    drop = {
        "expert": b["is_expert"],
        "right": b["correct"] & ~b["is_expert"],
        "wrong": ~b["correct"] & ~b["is_expert"],
    }[missing]
    keep = (~drop).nonzero().flatten().tolist()
    loss, grad, stats = run("srft", b, keep)
    logps, _, entropy = ([rows[i] for i in keep] for rows in b["rows"])
    rest = [[x[i] for i in keep] for x in (ADV, CORRECT, EXPERT)]
    assert loss.item() == pytest.approx(slow_srft(logps, entropy, *rest, False))
    assert grad.isfinite().all()
    if missing == "expert":
        assert stats["srft/demo_sft"] == stats["srft/demo_rl"] == stats["expert_prob"] == 0
    else:
        assert (stats["srft/self"] > 0) == (missing == "wrong")  # only -log p, or only +log p


def test_srft_directions():
    """Descent raises expert and right tokens, right ones more when uncertain; lowers wrong ones."""
    b = batch()
    b["advantages"] = b["advantages"].abs()
    _, grad, _ = run("srft", b)
    right, expert, mask = b["correct"], b["is_expert"], b["response_mask"]
    assert (grad[expert][mask[expert]] < 0).all()
    assert (grad[~expert & right][mask[~expert & right]] < 0).all()
    assert (grad[~expert & ~right][mask[~expert & ~right]] > 0).all()
    b["entropy"] = b["entropy"] + 1
    _, more, _ = run("srft", b)
    rows = ~expert & right
    torch.testing.assert_close(more[rows], math.e * grad[rows])


def test_stats_are_the_terms_of_the_loss():
    b = batch()
    loss, stats = luffy(b)
    torch.testing.assert_close(stats["luffy/rollout"] + stats["luffy/expert"], loss.detach())
    loss, stats = srft(b)
    terms = stats["srft/demo_sft"] + stats["srft/demo_rl"] + stats["srft/self"]
    torch.testing.assert_close(terms, loss.detach())
    probs = [math.exp(x) for y, e in zip(b["rows"][0], EXPERT, strict=True) if e for x in y]
    assert stats["expert_prob"].item() == pytest.approx(sum(probs) / len(probs))
    loss, stats = chord(b, mu=0.3)
    torch.testing.assert_close(0.7 * stats["chord/grpo"] + 0.3 * stats["chord/sft"], loss.detach())


def test_chord_mu_is_continuous_and_monotone():
    up = [chord_mu_at(s, warmup=10, decay=20, peak=0.5, valley=0.1) for s in range(40)]
    assert up[0] == 0 and up[10] == 0.5 and up[30:] == [0.1] * 10
    assert up[20] == pytest.approx(0.3)  # half way down the cosine
    assert up[:11] == sorted(up[:11]) and up[10:] == sorted(up[10:], reverse=True)
    assert [chord_mu_at(s) for s in (0, 1, 599)] == [0.1] * 3


# ---- errors and independence ----


def test_errors_name_the_value():
    b = batch()
    with pytest.raises(ValueError, match="'official'"):
        srft(b, variant="official")
    with pytest.raises(AssertionError, match="gamma"):
        luffy(b, gamma=0.0)
    with pytest.raises(AssertionError, match="mu"):
        chord(b, mu=1.5)
    with pytest.raises(AssertionError, match="step"):
        chord_mu_at(-1)
    for loss_of in LOSSES.values():
        with pytest.raises(AssertionError, match="bool"):
            loss_of({**b, "response_mask": b["response_mask"].double()})
        with pytest.raises(AssertionError, match="advantages"):
            loss_of({**b, "advantages": b["logps"]})


def test_imports_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "baselines.py", tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import baselines; print(baselines.__file__)"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert Path(out.strip()).parent.samefile(tmp_path)
