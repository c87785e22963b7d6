"""bench/compare.py: equal budgets, a resumed record, table and picture of hand-written rows."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import train
from methods import METHODS

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "bench"))

import compare

SHARED = "--max_steps 24 --train_batch_size 8 --num_generations 8 --eval_steps 6".split()


def settings_of(algo):
    return train.parse_args(compare.flags(algo, 3, 1e-4, 1e-3, SHARED))


def test_every_method_makes_the_same_updates_on_the_same_number_of_prompts():
    for algo in compare.COMPARED:
        config, method = settings_of(algo)
        sft = getattr(method, "sft_max_steps", 0)
        assert method.max_steps + sft == 24 and config.train_batch_size == 8, algo
        assert config.seed == 3 and config.learning_rate == 1e-4
        if "toolupt" in algo:  # two cycles, 1 : 2 as 100 : 200
            assert (method.balance_up, method.balance_down) == (4, 8)
        if algo != "sft":  # responses in a group, the expert's included
            assert method.num_generations + (algo in ("luffy", "srft")) == 8, algo
            assert method.max_steps == 24 / (1 + hasattr(method, "sft_max_steps")), algo


def test_all_methods_of_table_1_and_figure_4_are_compared():
    assert len(compare.COMPARED) == 13
    assert "dr_grpo" not in compare.COMPARED and set(compare.COMPARED) < set(METHODS)


def test_what_a_row_says_is_what_runs():
    """The common flags may not undo what makes a row of the table."""
    free = {
        "max_steps",
        "num_generations",
        "sft_max_steps",
        "sft_learning_rate",
        "balance_up",
        "balance_down",
    }
    for algo in compare.COMPARED:
        config, method = settings_of(algo)
        for name, (value, _) in METHODS[algo].defaults.items():
            assert name == "learning_rate" or getattr(config, name) == value, (algo, name)
        for f in fields(method):
            assert f.name in free or getattr(method, f.name) == f.default, (algo, f.name)


def test_two_stage_rows_select_nothing_on_the_test_world():
    config, method = settings_of("sft_dapo_star")
    assert method.sft_learning_rate == 1e-3 and config.learning_rate == 1e-4
    assert (
        config.eval_steps == 0
    )  # one evaluation at the end of the SFT stage: the best is the last


def row(algo, seed, step, accuracy, phase="test", rate=1e-4):
    return {
        "phase": phase,
        "algo": algo,
        "seed": seed,
        "learning_rate": rate,
        "commit": "abc",
        "settings": "0",
        "step": step,
        "accuracy": accuracy,
        "reward": 2.0 + seed,
        "tool_call_accuracy": accuracy,
        "answer_accuracy": accuracy,
        "rollouts": 64 * step,
    }


ROWS = [
    *(row(a, s, 0, 0.1) for a in ("sft", "toolupt") for s in (0, 1)),
    *(row("toolupt", s, 12, 0.2 + 0.1 * s) for s in (0, 1)),
    *(row("toolupt", s, 24, 0.5 + 0.2 * s) for s in (0, 1)),
    *(row("sft", s, 24, 0.4 + 0.1 * s) for s in (0, 1)),
    row("sft", 2, 12, 0.9),  # unfinished: in no table
    row("dapo_star", 1000, 24, 0.30, "grid", 1e-4),
    row("toolupt", 1000, 24, 0.34, "grid", 1e-4),
    row("dapo_star", 1000, 24, 0.40, "grid", 3e-4),
    row("toolupt", 1000, 24, 0.20, "grid", 3e-4),
]


def test_the_table_has_mean_deviation_and_paired_difference():
    head, _rule, *lines = compare.table(ROWS, 24).splitlines()
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines
    }
    assert list(cells) == ["base model", "`sft`", "`toolupt`"]  # in the order of METHODS
    names = [name.strip() for name in head.split("|")[2:-1]]
    sft, ours = dict(zip(names, cells["`sft`"])), dict(zip(names, cells["`toolupt`"]))
    assert sft["accuracy"] == "45.0 ± 7.1" and ours["accuracy"] == "60.0 ± 14.1"
    assert sft["minus toolupt"] == "-15.0 ± 7.1"  # -10 and -20 points
    assert ours["minus toolupt"] == "" and ours["rollouts"] == "1,536"
    assert sft["seeds"] == ours["seeds"] == "2" and ours["rate"] == "0.0001"
    assert dict(zip(names, cells["base model"]))["accuracy"] == "10.0 ± 0.0"


def test_the_rate_with_the_highest_mean_over_the_family_is_taken():
    pick = lambda rows: compare.choose(rows, "rl", 24, [1e-4, 3e-4])
    assert pick(ROWS) == 1e-4  # means 0.32 and 0.30
    better = [*ROWS[:-1], row("toolupt", 1000, 24, 0.26, "grid", 3e-4)]
    assert pick(better) == 3e-4  # 0.32 and 0.33
    assert pick([*ROWS, row("toolupt", 1000, 24, 0.9, "grid", 1e-2)]) == 1e-4  # not in the grid


def test_the_picture_shows_every_method(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "close", shown.append)
    rows = [row(a, s, t, t / 30) for a in compare.COMPARED for s in (0, 1) for t in (0, 12, 24)]
    text = compare.draw(rows, 24, tmp_path / "record.jsonl")
    assert (tmp_path / "record.png").stat().st_size > 10_000
    assert (tmp_path / "record.md").read_text() == text + "\n"
    curves = [a for a in shown[0].axes if a.get_xlabel() == "optimiser updates"]
    [ends] = [a for a in shown[0].axes if a not in curves]
    colours = {line.get_label(): line.get_color() for axis in curves for line in axis.lines}
    assert set(colours) == set(compare.COMPARED) and len(set(colours.values())) == len(colours)
    assert {t.get_text() for t in ends.get_yticklabels()} == set(compare.COMPARED)
    assert [line.get_ydata()[-1] for a in curves for line in a.lines] == [
        80.0
    ] * 14  # toolupt twice


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    config = {"algo": "its first line is the configuration"}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (config, *rows)))


def test_two_stages_lie_on_one_axis_and_rollouts_add_up(tmp_path):
    argv = compare.flags("sft_dapo_star", 0, 1e-4, 1e-3, SHARED)
    score = lambda x: {"eval/accuracy": x, "eval/reward": 0.0}
    sft = [
        {"step": 0, **score(0.1)},
        *({"step": i} for i in range(1, 12)),
        {"step": 12, **score(0.2)},
    ]
    rl = [{"step": 0, **score(0.25)}, *({"step": i, "rounds": 1.0} for i in range(1, 12))]
    rl += [{"step": 12, "rounds": 2.0, **score(0.5)}]
    write(tmp_path / "sft", sft)
    write(tmp_path, rl)
    found = compare.evaluations(tmp_path, argv)
    assert [(r["step"], r["accuracy"]) for r in found] == [(0, 0.1), (12, 0.25), (24, 0.5)]
    assert [r["rollouts"] for r in found] == [0, 0, 13 * 8 * 8]


def test_a_record_is_continued_and_other_flags_are_refused(tmp_path, monkeypatch):
    """Runs that the record holds to the end are not made again; half a run is."""
    out, calls = tmp_path / "record.jsonl", []

    def pretend(key, argv, folder, threads):
        held_out = {"grid": "toy:valid", "test": "toy:test"}[key["phase"]]
        assert train.parse_args(argv)[0].eval_file == [held_out]
        calls.append((key["phase"], key["algo"], key["seed"], key["learning_rate"]))
        return [{**row(key["algo"], 0, step, 0.5), **key} for step in (0, 24)]

    monkeypatch.setattr(compare, "run", pretend)
    argv = f"--out {out} --algos sft grpo --grid 1e-4 --sft_grid 1e-3 --valid_file toy:valid "
    argv += "--test_file toy:test"
    argv = [*argv.split(), *SHARED]
    compare.main([*argv, "--seeds", "0"])
    grid = [
        ("grid", a, 1000, 1e-3 if a == "sft" else 1e-4) for a in ("sft", "dapo_star", "toolupt")
    ]
    assert set(calls) == {*grid, ("test", "sft", 0, 1e-3), ("test", "grpo", 0, 1e-4)}
    assert len(out.read_text().splitlines()) == 2 * len(calls)

    calls.clear()
    kept = [line for line in out.read_text().splitlines() if not re.search("grpo.*step.: 24", line)]
    out.write_text("\n".join(kept) + "\n")
    compare.main([*argv, "--seeds", "0", "1"])
    assert sorted(calls) == [
        ("test", "grpo", 0, 1e-4),
        ("test", "grpo", 1, 1e-4),
        ("test", "sft", 1, 1e-3),
    ]
    with pytest.raises(SystemExit, match="other flags"):
        compare.main([*argv, "--learning_rate", "1", "--seeds", "0"])


def test_mistakes_are_named_before_anything_runs(capsys):
    for argv, why in (
        ("--algos ppo", "unknown method ppo"),
        ("--nonsense 1", "--nonsense"),
        ("--grid 1e-4", "--sft_grid: give at least one"),
    ):
        with pytest.raises(SystemExit):
            compare.parse_args(argv.split())
        assert why in capsys.readouterr().err
