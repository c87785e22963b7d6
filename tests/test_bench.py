"""bench/gpu.py without a GPU: its ways of attending against dense attention, and the whole script on a small model."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import scaled_dot_product_attention

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "bench"))

import gpu

import packing


def test_flex_attends_to_what_it_should():
    """Its backward pass needs a GPU."""
    rows = [packing.pack(range(20), [range(7), range(3)]), packing.pack(range(5), [range(9)])]
    packed = packing.join(rows)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 44, 16) for heads in (4, 2, 2))
    dense = scaled_dot_product_attention(q, k, v, packing.attention_mask(packed), enable_gqa=True)
    out = gpu.flex(packing._Plan(packed, q.device), q, k, v, None)
    assert torch.allclose(out.transpose(1, 2), dense, atol=1e-5)


def test_lengths_have_the_means_that_are_asked_for():
    rng = random.Random(0)
    prompts, answers = zip(*(gpu.lengths_of(2048, 100, rng) for _ in range(2000)))
    answers = [n for group in answers for n in group]
    assert abs(sum(prompts) / len(prompts) - 2048) < 20
    assert abs(sum(answers) / len(answers) - 100) < 2
    assert min(answers) < 40 and max(answers) > 300


def test_rows_stay_within_the_budget():
    args = SimpleNamespace(answer=100, budget=16_384)
    rows = gpu.rows_of("merged", 2048, 1000, 3, args)
    assert len(rows) == 3 and all(len(row) > 3 for row in rows)
    assert all(gpu.size_of("merged", row) <= args.budget for row in rows)
    padded = gpu.rows_of("padded", 2048, 1000, 3, args)
    assert all(gpu.size_of("padded", row) <= args.budget for row in padded)
    groups, prompt, answers = gpu.work_of(padded)
    assert groups == 1 and prompt == len(rows[0][0][0])  # the first group of the others, read once
    assert answers == sum(map(len, rows[0][0][1]))


def run(tmp_path, flags):
    out = tmp_path / "gpu.json"
    flags = f"--device cpu --shapes toy --answer 8 --rows 2 --budget 300 {flags} --out {out}"
    command = [sys.executable, "bench/gpu.py", *flags.split()]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["rows"]


def test_every_way_is_measured_at_every_length(tmp_path):
    """What fails (flex, without a GPU) says so, and the next way is measured all the same."""
    rows = run(tmp_path, "--prompts 48 64 --ways merged flex padded")
    ways = [(way, prompt) for way in ("merged", "flex", "padded") for prompt in (48, 64)]
    assert [(row["way"], row["prompt"]) for row in rows] == ways
    for row in rows:
        if row["way"] == "flex":
            assert "CPU" in row["error"] and "seconds" not in row
            continue
        assert row["seconds"] == sum(row["row_seconds"]), row
        assert 0 < row["mfu_with_optimizer"] < row["mfu"] and row["times_padded"] > 0, row


def test_plan_is_for_the_measured_row():
    one, two = (gpu.planned("7B", tokens, 8) for tokens in (8192, 16_384))
    assert 8 * 7.6e9 < one < two < 1.5 * one
    assert gpu.planned("7B", 8192, 16) - one == 8 * 7_615_616_512
