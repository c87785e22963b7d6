"""fgae.py against slow loops written from Eqs. 13-17, against its oracle, and its properties."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

import fgae
from fgae import matched_tokens, token_advantages, token_rewards
from grpo import dapo_loss

ORACLES = json.loads((Path(__file__).parent / "oracles" / "fgae.json").read_text())
each_alignment = pytest.mark.parametrize("alignment", ["positional", "lcs"])


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def padded(rows, width=None, fill=0):
    """Ragged lists -> ids (B, width), mask (B, width)."""
    width = width or max(map(len, rows))
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def match(responses, experts, alignment, fill=0):
    """matched_tokens on ragged lists, as ragged lists."""
    ids, mask = padded(responses, fill=fill)
    expert_ids, expert_mask = padded(experts, fill=fill)
    matched = matched_tokens(ids, mask, expert_ids, expert_mask, alignment=alignment)
    assert matched.dtype == torch.bool and not matched[~mask].any()
    return [matched[b, : len(row)].tolist() for b, row in enumerate(responses)]


# ---- Eq. 13: which tokens are correct ------------------------------------------------------------


def slow_lcs(response, expert):
    """First, in lexicographic order, of the largest index sets that spell a subsequence of expert.

    Tries every index set, so that it shares no idea with the table in fgae.py.
    """

    def is_subsequence(tokens):
        rest = iter(expert)
        return all(token in rest for token in tokens)

    for size in range(min(len(response), len(expert)), -1, -1):
        for indices in combinations(range(len(response)), size):  # in lexicographic order
            if is_subsequence([response[i] for i in indices]):
                return [i in indices for i in range(len(response))]


def slow_positional(response, expert):
    return [t < len(expert) and token == expert[t] for t, token in enumerate(response)]


SLOW = {"positional": slow_positional, "lcs": slow_lcs}


@each_alignment
@pytest.mark.parametrize("alphabet", [2, 3, 6])
def test_matched_tokens_equal_slow_loop(alignment, alphabet):
    rng = random.Random(alphabet)

    def sequence(longest):
        return [rng.randrange(alphabet) for _ in range(rng.randint(0, longest))]

    responses, experts = [[sequence(n) for _ in range(60)] for n in (9, 7)]
    expected = [SLOW[alignment](r, e) for r, e in zip(responses, experts, strict=True)]
    assert match(responses, experts, alignment) == expected
    assert match(responses, experts, alignment, fill=1) == expected  # padding is a real token


@pytest.mark.parametrize(
    "response, expert, expected",
    [
        ([1, 1, 2], [1, 2], [1, 0, 1]),  # two longest: the earlier token wins
        ([1, 2], [1, 1, 2], [1, 1]),
        ([1, 2, 1], [2, 1, 2], [1, 1, 0]),  # [1, 2] and [2, 1] are both longest
        ([3, 1, 2, 4], [1, 2, 3, 4], [0, 1, 1, 1]),  # 3 first would cost the longest
        ([9, 1, 2, 3], [1, 2, 3], [0, 1, 1, 1]),  # insertion
        ([1, 3], [1, 2, 3], [1, 1]),  # deletion
        ([7, 8], [1, 2], [0, 0]),
    ],
)
def test_lcs_by_hand(response, expert, expected):
    assert match([response], [expert], "lcs") == [[bool(x) for x in expected]]


def test_insertion_spoils_the_rest_for_positional_only():
    response, expert = [1, 2, 9, 3, 4, 5], [1, 2, 3, 4, 5]
    assert match([response], [expert], "positional") == [[True, True, False, False, False, False]]
    assert match([response], [expert], "lcs") == [[True, True, False, True, True, True]]


@each_alignment
def test_common_prefix_and_whole_match(alignment):
    expert = [5, 6, 5, 6, 7, 2]
    assert match([expert], [expert], alignment) == [[True] * 6]
    assert match([expert + [5, 6]], [expert], alignment) == [[True] * 6 + [False] * 2]
    assert match([expert[:3]], [expert], alignment) == [[True] * 3]


def test_lcs_matches_at_least_as_many_tokens_as_positional():
    rng = random.Random(1)
    rows = [[[rng.randrange(4) for _ in range(12)] for _ in range(40)] for _ in range(2)]
    for longest, positional in zip(match(*rows, "lcs"), match(*rows, "positional"), strict=True):
        assert sum(longest) >= sum(positional)


@each_alignment
def test_tokens_outside_expert_mask_never_match(alignment):
    ids = torch.tensor([[1, 2, 3, 2], [1, 2, 3, 2]])
    mask = torch.ones(2, 4, dtype=torch.bool)
    expert_mask = mask.clone()
    expert_mask[0] = False  # an answer target: no process reward
    expert_mask[1, 3] = False  # EOS cleared
    matched = matched_tokens(ids, mask, ids, expert_mask, alignment=alignment)
    assert matched.tolist() == [[False] * 4, [True, True, True, False]]


@each_alignment
def test_empty_sides(alignment):
    assert match([[], [1], []], [[1], [], []], alignment) == [[], [False], []]
    none, some = torch.zeros(2, 0, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    for ids, expert in (none, some), (some, none):
        args = ids, ids.bool(), expert, expert.bool()
        assert not matched_tokens(*args, alignment=alignment).any()


def test_lcs_of_long_responses():
    """1,024 against 1,024 tokens with one insertion and one deletion: both places are found."""
    g = torch.Generator().manual_seed(0)
    expert = torch.randint(10, 50_000, (8, 1024), generator=g)
    response = torch.cat([expert[:, :100], expert[:, :1] * 0, expert[:, 100:-1]], 1)
    mask = torch.ones_like(expert, dtype=torch.bool)
    matched = matched_tokens(response, mask, expert, mask, alignment="lcs")
    expected = mask.clone()
    expected[:, 100] = False
    assert torch.equal(matched, expected)


def test_matched_tokens_refuses():
    ids, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="'LCS'.*'positional' or 'lcs'"):
        matched_tokens(ids, mask, ids, mask, alignment="LCS")
    with pytest.raises(AssertionError, match="bool"):
        matched_tokens(ids, mask.float(), ids, mask)
    with pytest.raises(AssertionError, match="mask"):
        matched_tokens(ids, mask, ids, mask[:, :1])


# ---- Eqs. 13, 14: rewards ------------------------------------------------------------------------


def test_token_rewards_equal_slow_loop():
    outcome = [4.0, 11 / 3, -3.0, 0.5]
    matched = [[True, False, True], [False, False, True], [True, True, False], [False] * 3]
    expected = []
    for k in range(4):
        process = [4.0 if hit else -3.0 for hit in matched[k]]  # Eq. 13
        expected.append([max(p, outcome[k]) for p in process])  # Eq. 14
    actual = token_rewards(f64(outcome), torch.tensor(matched))
    assert actual.dtype == torch.float64 and actual.tolist() == expected


def test_token_rewards_bounds_are_arguments():
    rewards = token_rewards(
        f64([0.1, 0.9]), torch.tensor([[True, False]] * 2), upper=0.7, lower=0.3
    )
    assert rewards.tolist() == [[0.7, 0.3], [0.9, 0.9]]


def test_token_rewards_of_integer_outcomes_are_floats():
    rewards = token_rewards(torch.tensor([1, -3]), torch.tensor([[True, False]] * 2))
    assert rewards.dtype == torch.float32 and rewards.tolist() == [[4.0, 1.0], [4.0, -3.0]]


# ---- Eqs. 15-17: advantages ----------------------------------------------------------------------


def slow_advantages(rewards, lengths, K, eps):
    result = [[0.0] * len(row) for row in rewards]
    for start in range(0, len(rewards), K):
        tokens = [(k, t) for k in range(start, start + K) for t in range(lengths[k])]
        values = [rewards[k][t] for k, t in tokens]
        if not values or max(values) == min(values):
            continue
        mean = sum(values) / len(values)  # Eq. 15
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))  # Eq. 16
        for k, t in tokens:
            result[k][t] = (rewards[k][t] - mean) / (std + eps)  # Eq. 17
    return result


LENGTHS = [4, 0, 2, 5, 1, 3, 0, 0, 0]  # an empty response, an empty group


def rewards_and_mask(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(9, 5, generator=g, dtype=torch.float64).to(dtype) * 7 - 3
    return rewards, torch.arange(5) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_token_advantages_equal_slow_loop(eps):
    rewards, mask = rewards_and_mask()
    expected = f64(slow_advantages(rewards.tolist(), LENGTHS, 3, eps))
    actual = token_advantages(rewards, mask, 3, eps=eps)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [3.98647, 1 / 3, -7 / 3, 0.1, 4.0])
@pytest.mark.parametrize("lengths", [[1000, 7], [1, 2], [0, 3], [333, 333]])
def test_one_reward_for_all_tokens_is_exactly_zero_in_float32(value, lengths):
    """Padding holds other values: only response tokens decide on the tie."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rewards = torch.where(mask, torch.tensor(value), 7.0)
    assert not token_advantages(rewards, mask, 2).any()


def test_a_tie_in_one_group_leaves_the_others():
    rewards, mask = torch.full((4, 3), 0.1), torch.ones(4, 3, dtype=torch.bool)
    rewards[3, 2] = 4.0
    advantages = token_advantages(rewards, mask, 2)
    assert not advantages[:2].any() and advantages[2:].all()


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_may_hold_anything(junk):
    rewards, mask = rewards_and_mask()
    clean = token_advantages(rewards, mask, 3)
    assert torch.equal(token_advantages(rewards.masked_fill(~mask, junk), mask, 3), clean)
    assert not clean[~mask].any() and clean[mask].all()


def test_token_advantages_have_mean_zero_and_population_variance_one():
    rewards, mask = rewards_and_mask()
    advantages = token_advantages(rewards, mask, 3, eps=0.0)
    for rows in slice(0, 3), slice(3, 6):
        tokens = advantages[rows][mask[rows]]
        assert tokens.mean().item() == pytest.approx(0, abs=1e-12)
        assert tokens.square().mean().item() == pytest.approx(1)


def test_token_advantages_do_not_depend_on_order_other_groups_or_padding():
    rewards, mask = rewards_and_mask()
    advantages = token_advantages(rewards, mask, 3)
    order = torch.tensor([2, 0, 1, 5, 4, 3, 8, 6, 7])  # within each group
    moved = token_advantages(rewards[order], mask[order], 3)
    torch.testing.assert_close(moved, advantages[order])
    torch.testing.assert_close(token_advantages(rewards[:3], mask[:3], 3), advantages[:3])
    wide = torch.nn.functional.pad(rewards, (0, 4), value=math.nan)
    wide = token_advantages(wide, torch.nn.functional.pad(mask, (0, 4)), 3)
    torch.testing.assert_close(wide[:, :5], advantages)


def test_long_group_in_float32_is_accurate():
    g = torch.Generator().manual_seed(0)
    rewards = torch.where(torch.rand(8, 1024, generator=g) < 0.9, 4.0, 11 / 3)
    mask = torch.ones(8, 1024, dtype=torch.bool)
    exact = token_advantages(rewards.double(), mask, 8)
    torch.testing.assert_close(
        token_advantages(rewards, mask, 8).double(), exact, rtol=1e-4, atol=1e-4
    )


def test_token_advantages_refuse():
    rewards, mask = rewards_and_mask()
    with pytest.raises(AssertionError, match="group_size 1"):
        token_advantages(rewards, mask, 1)
    with pytest.raises(AssertionError, match="9 rows"):
        token_advantages(rewards, mask, 2)
    with pytest.raises(AssertionError, match="bool"):
        token_advantages(rewards, mask.float(), 3)
    with pytest.raises(AssertionError, match="rewards"):
        token_advantages(rewards[:, 0], mask, 3)


# ---- oracle, and the whole path to the gradient --------------------------------------------------


@each_alignment
def test_oracle_fgae(alignment):
    case = ORACLES["toolupt_fgae_1"]
    inputs, expected = case["inputs"], case["expected"][alignment]
    ids, mask = padded(inputs["rollouts"])
    expert_ids, expert_mask = padded([inputs["expert"]] * 4)
    matched = matched_tokens(ids, mask, expert_ids, expert_mask, alignment=alignment)
    rewards = token_rewards(f64(inputs["R_outcome"]), matched)
    advantages = token_advantages(rewards, mask, 4, eps=inputs["eps"])
    for b, row in enumerate(inputs["rollouts"]):
        n = len(row)
        assert matched[b, :n].int().tolist() == expected["match"][b]
        assert rewards[b, :n].tolist() == expected["R"][b]
        assert advantages[b, :n].tolist() == pytest.approx(expected["adv"][b], abs=6e-7)
    tokens = rewards[mask]
    assert tokens.mean().item() == pytest.approx(expected["mean"], abs=6e-7)
    assert tokens.std(correction=0).item() == pytest.approx(expected["std"], abs=6e-7)


def test_descent_raises_right_tokens_of_a_wrong_response_and_lowers_its_wrong_ones():
    ids, mask = padded([[1, 2, 3, 4], [1, 9, 3, 4]])
    expert_ids, expert_mask = padded([[1, 2, 3, 4]] * 2)
    matched = matched_tokens(ids, mask, expert_ids, expert_mask)
    advantages = token_advantages(token_rewards(f64([4.0, 1.0]), matched), mask, 2)
    logps = torch.full((2, 4), -1.0, dtype=torch.float64, requires_grad=True)
    dapo_loss(logps, logps, advantages, mask)[0].backward()  # Eq. 18
    assert (logps.grad > 0).tolist() == [[False] * 4, [False, True, False, False]]


def test_imports_alone(tmp_path):
    shutil.copy(fgae.__file__, tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", "import fgae"], cwd=tmp_path, env=env, check=True)
