"""SimPO, DPO, IPO, ORPO and perplexity against loops from iTool's formulas; worked cases."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simpo import dpo_loss, ipo_loss, orpo_loss, perplexity, simpo_loss

ORACLES = json.loads((Path(__file__).parent / "oracles" / "simpo.json").read_text())
ROOT = Path(__file__).resolve().parent.parent
NAN, INF = float("nan"), float("inf")


# ---- slow loops: lists of the valid tokens; one number per pair ----


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def slow_simpo(win, lose, ref_w, ref_l, beta=2.5, margin=0.5):
    return -log_sigmoid(beta / len(win) * sum(win) - beta / len(lose) * sum(lose) - margin)


def slow_dpo(win, lose, ref_w, ref_l, beta=0.1):
    return -log_sigmoid(beta * (sum(win) - ref_w) - beta * (sum(lose) - ref_l))


def slow_ipo(win, lose, ref_w, ref_l, tau=0.1):
    return ((sum(win) - ref_w) - (sum(lose) - ref_l) - 1 / (2 * tau)) ** 2


def slow_ipo_mean(win, lose, ref_w, ref_l, tau=0.1):
    return ((sum(win) - ref_w) / len(win) - (sum(lose) - ref_l) / len(lose) - 1 / (2 * tau)) ** 2


def slow_orpo(win, lose, ref_w, ref_l, lam=0.1):
    p_w, p_l = math.exp(sum(win) / len(win)), math.exp(sum(lose) / len(lose))
    odds_ratio = math.log(p_w / (1 - p_w)) - math.log(p_l / (1 - p_l))
    return -math.log(p_w) - lam * log_sigmoid(odds_ratio)


def simpo(b, rows=slice(None), **kw):
    return simpo_loss(*(x[rows] for x in b[:4]), **kw)


def dpo(b, rows=slice(None), **kw):
    return dpo_loss(*(x[rows] for x in b), **kw)


def ipo(b, rows=slice(None), **kw):
    return ipo_loss(*(x[rows] for x in b), **kw)


def ipo_mean(b, rows=slice(None), **kw):
    return ipo_loss(*(x[rows] for x in b), average=True, **kw)


def orpo(b, rows=slice(None), **kw):
    return orpo_loss(*(x[rows] for x in b[:4]), **kw)


LOSSES = {
    "simpo": (simpo, slow_simpo),
    "dpo": (dpo, slow_dpo),
    "ipo_sum": (ipo, slow_ipo),
    "ipo_mean": (ipo_mean, slow_ipo_mean),
    "orpo": (orpo, slow_orpo),
}
SETTINGS = [  # other values than the defaults, grids of Table 9
    ("simpo", {"beta": 2.0, "margin": 1.4}),
    ("dpo", {"beta": 0.01}),
    ("ipo_sum", {"tau": 0.05}),
    ("ipo_mean", {"tau": 0.01}),
    ("orpo", {"lam": 0.05}),
] + [(name, {}) for name in LOSSES]


# ---- from lists to padded tensors ----


def pad(rows, filler=0.0, width=None, dtype=torch.float64):
    width = width or max(map(len, rows))
    return torch.tensor([list(y) + [filler] * (width - len(y)) for y in rows], dtype=dtype)


def mask_of(rows, width=None):
    return pad([[1.0] * len(y) for y in rows], 0.0, width).bool()


def tensors(pairs, filler=NAN, widths=(6, 8), dtype=torch.float64):
    """Pairs (win, lose, ref_w, ref_l) -> the six arguments; the log-probs are leaves."""
    win, lose, ref_w, ref_l = zip(*pairs, strict=True)
    return [
        pad(win, filler, widths[0], dtype).requires_grad_(),
        mask_of(win, widths[0]),
        pad(lose, filler, widths[1], dtype).requires_grad_(),
        mask_of(lose, widths[1]),
        torch.tensor(ref_w, dtype=dtype),
        torch.tensor(ref_l, dtype=dtype),
    ]


def draw(seed=0):
    """Four random pairs (win, lose, ref_w, ref_l) with lengths 1 to 5 against 1 to 7."""
    g = torch.Generator().manual_seed(seed)
    lengths = [(3, 4), (1, 7), (5, 1), (2, 2)]

    def log_probs(n):
        return torch.log(0.05 + 0.9 * torch.rand(n, generator=g, dtype=torch.float64)).tolist()

    return [(log_probs(n), log_probs(m), sum(log_probs(n)), sum(log_probs(m))) for n, m in lengths]


def gradients(loss, b):
    """Gradients of both sides; the padding's must be exactly 0."""
    win, lose = torch.autograd.grad(loss, (b[0], b[2]))
    assert (win[~b[1]] == 0).all() and (lose[~b[3]] == 0).all()
    return win, lose


def slow_gradient(f, pair, side, step=1e-6):
    """Central differences of f(*pair) in the log-probs of one side, 0 chosen or 1 rejected."""
    values, grad = pair[side], []
    for t, value in enumerate(values):
        up, down = [*values], [*values]
        up[t], down[t] = value + step, value - step
        up, down = (f(*pair[:side], x, *pair[side + 1 :]) for x in (up, down))
        grad.append((up - down) / (2 * step))
    return grad


# ---- values and gradients against the loops ----


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name, setting", SETTINGS)
def test_loss_equals_the_loop(name, setting, seed):
    fast, slow = LOSSES[name]
    pairs = draw(seed)
    b = tensors(pairs)
    loss, _ = fast(b, **setting)
    expected = sum(slow(*pair, **setting) for pair in pairs) / len(pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    grad_w, grad_l = gradients(loss, b)

    def mean_loss_of(*pair):
        return slow(*pair, **setting) / len(pairs)

    for i, pair in enumerate(pairs):
        for side, grad in enumerate((grad_w, grad_l)):
            expected = slow_gradient(mean_loss_of, pair, side)
            assert grad[i, : len(expected)].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_perplexity_equals_the_root_of_the_inverse_probability():
    rows = [win for win, *_ in draw()] + [lose for _, lose, *_ in draw(1)]
    expected = [math.prod(1 / math.exp(x) for x in y) ** (1 / len(y)) for y in rows]
    assert perplexity(pad(rows, NAN, 9), mask_of(rows, 9)).tolist() == pytest.approx(expected)


# ---- worked cases ----


def itool_pairs():
    return [(p["w"], p["l"], sum(p["rw"]), sum(p["rl"])) for p in ORACLES["losses"]["pairs"]]


@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-9), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", LOSSES)
def test_itool_oracle(name, dtype, rel):
    case = ORACLES["losses"][name]
    b = tensors(itool_pairs(), dtype=dtype)
    fast = LOSSES[name][0]
    loss, _ = fast(b)
    assert loss.item() == pytest.approx(case["batch_mean"], rel=rel)
    for i, expected in enumerate(case["per_pair"]):
        assert fast(b, [i])[0].item() == pytest.approx(expected, rel=rel)
    grad_w, grad_l = (3 * g for g in gradients(loss, b))  # the oracle has them per pair
    for i, expected in enumerate(case["grads"]):
        for grad, side in ((grad_w, "d_chosen_token"), (grad_l, "d_rejected_token")):
            values = grad[i, : len(expected[side])].tolist()
            assert values == pytest.approx(expected[side], rel=1e-5, abs=1e-6)


def toolupt_case(name):
    """The two pairs that several oracle cases share."""
    x = ORACLES[name]["inputs"]
    b = []
    for side in ("chosen", "rejected"):
        mask = torch.tensor(x[f"mask_{side}"]).bool()
        b += [torch.tensor(x[f"policy_{side}"], requires_grad=True), mask]
    for side in ("chosen", "rejected"):
        mask = torch.tensor(x[f"mask_{side}"])
        b.append((torch.tensor(x[f"ref_{side}"]) * mask).sum(1))
    return b, x, ORACLES[name]["expected"]


def test_dpo_oracle():
    b, x, expected = toolupt_case("dpo_1")
    loss, stats = dpo(b, beta=x["beta"])
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    grad_w, grad_l = gradients(loss, b)
    for i in range(2):
        assert grad_w[i][b[1][i]].tolist() == pytest.approx(
            [expected["grad_chosen_token"][i]] * int(b[1][i].sum()), abs=1e-6
        )
        assert grad_l[i][b[3][i]].tolist() == pytest.approx(
            [expected["grad_rejected_token"][i]] * int(b[3][i].sum()), abs=1e-6
        )
        _, one = dpo(b, [i], beta=x["beta"])
        assert one["rewards/chosen"].item() == pytest.approx(expected["reward_chosen"][i], abs=1e-6)
        assert one["rewards/rejected"].item() == pytest.approx(
            expected["reward_rejected"][i], abs=1e-6
        )
        margin = one["rewards/margins"].item() / x["beta"]
        assert margin == pytest.approx(expected["margin"][i], abs=1e-5)
    assert stats["rewards/accuracies"] == 1


def test_dpo_at_the_reference_oracle():
    expected = ORACLES["dpo_2"]["expected"]
    win, lose = [-0.3, -1.2], [-0.4]
    b = tensors([(win, lose, sum(win), sum(lose))])
    loss, _ = dpo(b, beta=ORACLES["dpo_2"]["inputs"]["beta"])
    grad_w, _ = gradients(loss, b)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    assert grad_w[0, 0].item() == pytest.approx(expected["grad_chosen_token"][0])


def test_ipo_oracle():
    b, x, expected = toolupt_case("ipo_1")
    for average, key in ((False, "sum"), (True, "avg")):
        loss, _ = ipo_loss(*b, tau=x["tau"], average=average)
        assert loss.item() == pytest.approx(expected[f"loss_{key}"], abs=2e-5)
        for i in range(2):
            _, one = ipo_loss(*(t[[i]] for t in b), tau=x["tau"], average=average)
            margin = one["rewards/margins"].item()
            assert margin == pytest.approx(expected[f"margin_{key}"][i], abs=1e-5)


def test_orpo_oracle():
    b, x, expected = toolupt_case("orpo_1")
    loss, _ = orpo(b, lam=x["lam"])
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    for i in range(2):
        _, one = orpo(b, [i], lam=x["lam"])
        assert one["logps/chosen"].item() == pytest.approx(expected["avg_chosen"][i], abs=1e-6)
        assert one["logps/rejected"].item() == pytest.approx(expected["avg_rejected"][i], abs=1e-6)
        assert one["rewards/margins"].item() == pytest.approx(
            expected["log_odds_ratio"][i], abs=1e-5
        )


def test_simpo_oracle():
    b, x, expected = toolupt_case("simpo_1")
    loss, _ = simpo(b, beta=x["beta"], margin=x["gamma"])
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    grad_w, grad_l = gradients(loss, b)
    assert grad_w[0].tolist() == pytest.approx([expected["grad_chosen_row0_token"]] * 3, abs=1e-6)
    assert grad_l[0].tolist() == pytest.approx([expected["grad_rejected_row0_token"]] * 4, abs=1e-6)
    for i in range(2):
        _, one = simpo(b, [i], beta=x["beta"], margin=x["gamma"])
        z = one["rewards/margins"].item() - x["gamma"]
        assert z == pytest.approx(expected["z"][i], abs=2e-6)


def test_perplexity_oracles():
    rows = [case["token_logprobs"] for case in ORACLES["ppl"]]
    rows.append(ORACLES["itool_ppl_1"]["inputs"]["logp"])
    expected = [case["ppl"] for case in ORACLES["ppl"]]
    expected.append(ORACLES["itool_ppl_1"]["expected"]["ppl"])
    assert perplexity(pad(rows, -INF), mask_of(rows)).tolist() == pytest.approx(expected, rel=1e-6)


# ---- identities ----


@pytest.mark.parametrize("margin", [0.5, 1.0, 1.4])
def test_simpo_at_equal_means(margin):
    b = tensors([([-0.4, -0.6], [-0.5], 0.0, 0.0)])
    loss, stats = simpo(b, margin=margin)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(margin)))
    assert stats["rewards/accuracies"] == 0, "a tie is not an accurate pair"
    grad_w, grad_l = gradients(loss, b)
    pull = 2.5 / (1 + math.exp(-margin))  # sigma(-z) beta / |y| per token
    assert grad_w[0, :2].tolist() == pytest.approx([-pull / 2] * 2)
    assert grad_l[0, 0].item() == pytest.approx(pull)


def test_identities_of_the_oracle():
    x = ORACLES["losses"]["identities"]
    win, lose = [-0.2, -0.8], [-0.5, -0.1, -0.9]
    b = tensors([(win, lose, sum(win), sum(lose))])
    assert simpo(b)[0].item() == pytest.approx(x["simpo_equal_mean_logp"])
    assert dpo(b)[0].item() == pytest.approx(x["dpo_at_reference"])
    assert ipo(b)[0].item() == pytest.approx(x["ipo_at_reference"])
    assert ipo_mean(b)[0].item() == pytest.approx(x["ipo_at_reference"])
    assert orpo(b)[0].item() == pytest.approx(x["orpo_equal"]["loss"])


def test_simpo_and_orpo_normalise_by_length_and_dpo_does_not():
    """Everything twice: means stay, sums double."""
    win, lose = [-0.3, -0.7], [-1.1]
    once, twice = tensors([(win, lose, 0.0, 0.0)]), tensors([(win * 2, lose * 2, 0.0, 0.0)])
    for f in (simpo, orpo, ipo_mean):
        assert f(once)[0].item() == pytest.approx(f(twice)[0].item())
    assert dpo(twice)[0].item() == pytest.approx(dpo(once, beta=0.2)[0].item())


def test_dpo_swapping_the_sides_negates_the_margin():
    b = tensors(draw())
    swapped = [b[2], b[3], b[0], b[1], b[5], b[4]]
    loss, stats = dpo(b)
    other, other_stats = dpo(swapped)
    assert other_stats["rewards/margins"].item() == pytest.approx(-stats["rewards/margins"].item())
    margin = stats["rewards/margins"].item()  # -log s(m) = -log s(-m) - m, so also for the means
    assert loss.item() == pytest.approx(other.item() - margin)


# ---- properties ----


@pytest.mark.parametrize("name", ["simpo", "dpo", "orpo"])
def test_descent_raises_chosen_and_lowers_rejected(name):
    b = tensors(draw())
    grad_w, grad_l = gradients(LOSSES[name][0](b)[0], b)
    assert (grad_w[b[1]] < 0).all() and (grad_l[b[3]] > 0).all()


def test_ipo_pulls_the_gap_to_its_target_from_both_sides():
    for gap, sign in ((4.0, -1), (6.0, 1)):  # target 5 at tau 0.1
        b = tensors([([-1.0], [-1.0], -1.0 - gap, -1.0)])
        grad_w, grad_l = gradients(ipo(b)[0], b)
        assert grad_w[0, 0].item() == pytest.approx(2 * sign)
        assert grad_l[0, 0].item() == pytest.approx(-2 * sign)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("filler", [NAN, INF, -INF, 1e30])
def test_padding_never_leaks(name, filler):
    fast = LOSSES[name][0]
    clean, dirty = tensors(draw(), 0.0, (5, 7)), tensors(draw(), filler, (9, 11))
    loss, stats = fast(clean)
    loss2, stats2 = fast(dirty)
    torch.testing.assert_close(loss2, loss)
    for grad, grad2 in zip(gradients(loss, clean), gradients(loss2, dirty), strict=True):
        torch.testing.assert_close(grad2[:, : grad.shape[1]], grad)
    for key in stats:
        torch.testing.assert_close(stats2[key], stats[key])
    torch.testing.assert_close(perplexity(*dirty[:2]), perplexity(*clean[:2]))


@pytest.mark.parametrize("wrap", [int, torch.tensor])
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[2], [], [3, 0, 1]]])
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(name, parts, wrap):
    """Also with a micro-batch of no pair at all, as the last, short accumulation may have."""
    fast = LOSSES[name][0]
    b = tensors(draw())
    loss, stats = fast(b)
    pieces = [fast(b, rows, num_pairs=wrap(4)) for rows in parts]
    total = sum(p[0] for p in pieces)
    torch.testing.assert_close(total, loss)
    for whole, added in zip(gradients(loss, b), gradients(total, b), strict=True):
        torch.testing.assert_close(added, whole)
    for key in stats:
        assert stats[key].dim() == 0 and not stats[key].requires_grad, key
        torch.testing.assert_close(sum(p[1][key] for p in pieces), stats[key])


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_pairs_does_not_matter(name):
    b = tensors(draw())
    fast = LOSSES[name][0]
    torch.testing.assert_close(fast(b, [2, 0, 3, 1])[0], fast(b)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_computed_in_float32(name):
    fast = LOSSES[name][0]
    low = [x.detach().bfloat16() if x.is_floating_point() else x for x in tensors(draw(), 0.0)]
    high = [x.float() if x.is_floating_point() else x for x in low]
    loss, _ = fast(low)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, fast(high)[0])
    assert torch.equal(perplexity(*low[:2]), perplexity(*high[:2]))


@pytest.mark.parametrize("name", ["dpo", "ipo_sum", "ipo_mean"])
def test_the_reference_takes_no_gradient(name):
    """The policy's own sums as reference: gradient as if they were numbers, not zero."""
    b = tensors(draw())
    b[4], b[5] = (torch.where(m, x, 0).sum(1) for x, m in ((b[0], b[1]), (b[2], b[3])))
    grad_w, _ = gradients(LOSSES[name][0](b)[0], b)
    assert (grad_w[b[1]] < 0).all()


@pytest.mark.parametrize("mean", [0.0, -1e-9, -1e-7, -1e-4])
@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
def test_orpo_is_finite_for_a_certain_response(mean, side):
    win = [mean] * 3 if side in ("chosen", "both") else [-0.5] * 3
    lose = [mean] * 2 if side in ("rejected", "both") else [-0.5] * 2
    b = tensors([(win, lose, 0.0, 0.0)], dtype=torch.float32)
    loss, _ = orpo(b)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, b))


def test_orpo_keeps_precision_near_certainty():
    """M = -1e-5 in float32: 1 - exp(M) would be off by 1%; compare with exact arithmetic."""
    pair = ([-1e-5], [-0.7, -0.2], 0.0, 0.0)
    loss, stats = orpo(tensors([pair], dtype=torch.float32))
    odds = [m - math.log(-math.expm1(m)) for m in (-1e-5, -0.45)]
    assert stats["rewards/chosen"].item() == pytest.approx(odds[0], rel=1e-6)
    assert loss.item() == pytest.approx(slow_orpo(*pair), rel=1e-5)


def test_losses_survive_extreme_margins():
    b = tensors([([-1e4], [-1e-3], 0.0, 0.0), ([-1e-3], [-1e4], 0.0, 0.0)], dtype=torch.float32)
    for fast, _ in LOSSES.values():
        loss, _ = fast(b)
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, b))
    assert simpo(b, [0])[0].item() == pytest.approx(2.5 * (1e4 - 1e-3) + 0.5)


def test_perplexity_properties():
    rows = draw()[1][1]
    value = perplexity(pad([rows]), mask_of([rows]))
    assert value.shape == (1,) and value > 1
    assert perplexity(pad([rows * 3]), mask_of([rows * 3])).item() == pytest.approx(value.item())
    uniform = [math.log(1 / 50)] * 6
    assert perplexity(pad([uniform]), mask_of([uniform])).item() == pytest.approx(50)


def test_stats_are_means_over_pairs():
    pairs = draw()
    _, stats = simpo(tensors(pairs))
    means = [(sum(win) / len(win), sum(lose) / len(lose)) for win, lose, *_ in pairs]
    assert stats["logps/chosen"].item() == pytest.approx(sum(m for m, _ in means) / 4)
    assert stats["logps/rejected"].item() == pytest.approx(sum(m for _, m in means) / 4)
    assert stats["rewards/chosen"].item() == pytest.approx(2.5 * sum(m for m, _ in means) / 4)
    assert stats["rewards/accuracies"].item() == sum(win > lose for win, lose in means) / 4
    assert stats["lengths/chosen"].item() == sum(len(win) for win, *_ in pairs) / 4
    assert stats["lengths/rejected"].item() == sum(len(lose) for _, lose, *_ in pairs) / 4


# ---- errors and independence ----


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("side, word", [(1, "chosen"), (3, "rejected")])
def test_a_pair_with_an_empty_side_is_an_error(name, side, word):
    b = tensors(draw())
    b[side][2] = False
    with pytest.raises(ValueError, match=rf"{word}.*\[2\].*drop"):
        LOSSES[name][0](b)


def test_perplexity_of_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"\[1\]"):
        perplexity(torch.zeros(2, 3), torch.tensor([[True] * 3, [False] * 3]))


def test_programmer_errors_are_asserted():
    b = tensors(draw())
    for name, (fast, _) in LOSSES.items():
        with pytest.raises(AssertionError):  # fewer rejected than chosen rows
            fast([*b[:2], b[2][:1], b[3][:1], *b[4:]])
        with pytest.raises(AssertionError, match="bool"):
            fast([b[0], b[1].double(), *b[2:]])
        if name in ("dpo", "ipo_sum", "ipo_mean"):
            with pytest.raises(AssertionError, match="per pair"):  # token log-probs, not sums
                fast([*b[:4], b[0], b[5]])
    with pytest.raises(AssertionError, match="tau"):
        ipo(b, tau=0.0)


def test_imports_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "simpo.py", tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import simpo; print(simpo.__file__)"
    command = [sys.executable, "-I", "-c", code, str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert Path(out.strip()).parent.samefile(tmp_path)
