"""bench/study.py: equal budgets, a resumed record, intervals, picture and tables of hand-written rows."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "bench"))

import study


def test_every_arm_makes_the_same_updates_and_is_a_command(monkeypatch):
    monkeypatch.chdir(REPO)
    rows = {}
    for arm in study.ARMS:
        config, method = rows[arm] = train.parse_args(study.flags(arm, 3, "valid", 60))
        assert config.seed == 3 and config.eval_file == ["toy:house-valid"]
        assert config.train_file == ["toy:house-train"]
        if config.algo != "itool":
            assert method.max_steps + getattr(method, "sft_max_steps", 0) == 60, arm
            assert config.train_batch_size == 8
            assert config.learning_rate == (0 if arm == "base model" else 3e-4)
    method = rows["toolupt"][1]
    assert (method.balance_up + method.balance_down) * 2 == 60
    assert rows["lcs"][1].alignment == "lcs"
    both, alone = rows["itool"], rows["itool, warm-up"]
    assert replace(both[0], learning_rate=alone[0].learning_rate) == alone[0]
    assert alone[1].stages == "warmup"
    search = {
        n: getattr(alone[1], n) for n in ("pool_fraction", "buffer_fraction", "self_evaluation")
    }
    assert replace(both[1], stages="warmup", **search) == alone[1]  # the same warm-up


def test_an_interval_is_students():
    # four values of standard deviation 2: 3.182 * 2 / sqrt(4)
    centre, half = study.interval([1.0, 1.0, 1.0 + 12**0.5, 1.0 + 12**0.5])
    assert centre == pytest.approx(1 + 3**0.5) and half == pytest.approx(3.182, rel=1e-6)
    assert study.interval([5.0]) == (5.0, float("inf"))


def row(arm, seed, right, world="valid", norms=()):
    counts = {part: [right, 50] for part in study.PARTS}
    named = dict(zip(study.NORMS, norms))
    return {"arm": arm, "seed": seed, "world": world, "scores": counts, "norms": named}


def test_tables_compare_seed_by_seed(tmp_path):
    rows = [row("dapo_star", s, 10 + 10 * s) for s in (0, 1, 2)]
    rows += [row("fg_dapo_star", s, 11 + 10 * s) for s in (0, 1)]
    rows += [row("deleted", 0, 25, norms=([1.0], [0.5, 0.1], [0.25])), row("sft", 0, 5, "test")]
    assert "| dapo_star | 40.0 | 40.0 | 40.0 | 40.0 | 3 |" in study.table(rows, "valid")
    assert study.table(rows, "valid").splitlines()[-1].startswith("| deleted | 50.0 |")
    assert "sft" not in study.table(rows, "valid")
    [line] = study.differences(rows, "valid").splitlines()[2:]
    assert line.startswith("| FGAE | fg_dapo_star minus dapo_star | +2.0 ± 0.0 |")
    assert study.norms(rows).splitlines()[-1] == "| deleted | 0.5 | 0.1 | 0.25 |  |"
    study.picture({"valid": study.percents(rows, "valid")}, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_a_record_is_continued(tmp_path, monkeypatch):
    made, out = [], tmp_path / "study.jsonl"

    def pretend(arm, seed, world, steps, engine):
        assert engine == (len(made) or None) and steps == 60
        made.append((arm, seed))
        return row(arm, seed, 20, world), len(made)

    monkeypatch.setattr(study, "carry_out", pretend)
    monkeypatch.setattr("start.init_distributed", lambda: None)
    monkeypatch.chdir(REPO)
    argv = ["--out", str(out), "--arms", "sft", "toolupt", "--seeds"]
    study.main([*argv, "0"])
    assert made == [("sft", 0), ("toolupt", 0)]
    made.clear()
    study.main([*argv, "0", "1"])
    assert made == [("sft", 1), ("toolupt", 1)] and len(out.read_text().splitlines()) == 4
    made.clear()
    study.main([*argv, "0", "--world", "test"])
    study.main([*argv, "5", "--draw"])
    for name in ("study.png", "study-rows.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    with pytest.raises(SystemExit):  # another engine
        study.main(["--out", str(out), "--arms", "sft", "itool", "--seeds", "5"])
    assert len(made) == 2 and json.loads(out.read_text().splitlines()[0])["arm"] == "sft"
