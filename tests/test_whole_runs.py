"""Whole runs as users start them: torchrun with two ranks and vLLM, python alone, two stages, a mistake."""

import json
import math
import os
import subprocess
import sys

import frozen
import gradient_worker
import pytest
import torch
from frozen import REPO, TOY, needs_vllm
from transformers import AutoModelForCausalLM, AutoTokenizer

from methods import METHODS
from tools import audit


def launch(*command, ranks: int = 0) -> subprocess.CompletedProcess:
    """A process of its own in the repository, under torchrun where `ranks` is given; never hangs for ever."""
    env = {k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD" not in k}
    env |= {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [sys.executable, *(torchrun if ranks else []), *map(str, command)],
        check=False,
        cwd=REPO,
        env=env,
        text=True,
        capture_output=True,
        timeout=1500,
    )


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(folder) -> dict:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def moved(before: dict, after: dict) -> bool:
    assert before.keys() == after.keys()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    return any(not torch.equal(before[name], after[name]) for name in before)


@needs_vllm
def test_toolupt_on_two_ranks_with_vllm(tmp_path):
    """The demo, shortened: rollouts from vLLM, eleven steps, two FSDP2 ranks."""
    out, steps, prompts, K = tmp_path / "out", 11, 8, 4
    text = f"""train.py --algo toolupt @recipes/demo.args --output_dir {out} --max_steps {steps}
    --train_batch_size {prompts} --num_generations {K} --eval_size 16 --eval_steps 0"""
    done = launch(*text.split(), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]

    config, *rows = rows_of(out / "metrics.jsonl")
    assert config["algo"] == "toolupt" and config["max_steps"] == steps
    assert [row["step"] for row in rows] == list(range(steps + 1))
    for row in rows[1:]:
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["grad_norm"] > 0 and row["skipped"] == 0
        # the last row's samples come from weights that ten optimiser steps and ten syncs made
        assert row["sampling/sampling_logp_difference/max"] < 1e-3, row["step"]
    for name in (
        "reward", "reward_std", "frac_reward_zero_std", "accuracy", "completions/mean_length", "entropy", "loss",
        "balance", "learning_rate", "timing_s/rollout", "timing_s/update", "timing_s/sync", "perf/tokens_per_second",
    ):  # fmt: skip
        assert all(name in row for row in rows[1:]), name
    assert "eval/accuracy" in rows[0] and "eval/accuracy" in rows[-1]

    rollouts = rows_of(out / "rollouts.jsonl")
    assert len(rollouts) == steps * prompts * K
    assert {row["step"] for row in rollouts} == set(range(1, steps + 1))
    assert any(advantage for row in rollouts for advantage in row["advantages"])
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    for row in rollouts[::7]:
        ids = row["token_ids"][:-1] if row["finish_reason"] == "stop" else row["token_ids"]
        assert tokenizer.decode(ids) == row["text"]
        assert len(ids) <= len(row["advantages"]) == len(row["logps"]) == len(row["sampler_logps"])
    assert audit.audit(out).startswith(f"{len(rollouts)} responses agree")

    assert moved(weights_of(TOY), weights_of(out / f"checkpoint-{steps}"))
    AutoTokenizer.from_pretrained(out / f"checkpoint-{steps}")
    sentence = METHODS["toolupt"].__doc__.split("\n")[0]
    assert "learning_rate = 0.0003" in done.stdout and sentence in done.stdout
    assert "2 rank(s); a step: 8 prompts" in done.stdout
    assert done.stdout.index("2 rank(s)") < done.stdout.index("accuracy")
    for name in (f"checkpoint-{steps}", "metrics.jsonl", "rollouts.jsonl", "report.html"):
        assert str(out / name) in done.stdout and (out / name).exists(), name
    assert "\033[30;48;5;" in done.stdout  # a rollout in colours


def test_gradient_does_not_depend_on_ranks_or_micro_batches(tmp_path):
    """One and two FSDP2 ranks, one group per micro-batch and all together: float32, 1e-5."""
    model = frozen.tiny_model(tmp_path / "tiny")
    frozen.flags(model, tmp_path)  # writes the examples
    worker, gradients = REPO / "tests/gradient_worker.py", {}
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.pt"
        done = launch(worker, model, tmp_path, file, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        gradients[ranks] = torch.load(file)
    for method in (*gradient_worker.METHODS, "pairs"):
        one, *others = [
            gradients[ranks][f"{method} {budget}"]
            for ranks in (1, 2)
            for budget in gradient_worker.BUDGETS
        ]
        assert len(others) == 3 and max(float(g.abs().max()) for g in one.values()) > 0
        for other in others:
            assert frozen.relative_difference(other, one) < 1e-5, method


def test_a_mistake_ends_all_ranks_with_one_line(tmp_path):
    text = f"""train.py @recipes/demo.args --output_dir {tmp_path}/out --train_batch_size 5
    --engine transformers"""
    done = launch(*text.split(), ranks=2)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error: --train_batch_size 5" in line]
    assert lines and all("not divisible by the 2 ranks" in line for line in lines)
    assert str(REPO / "train.py") not in done.stderr  # no traceback of ours; torchrun adds its own
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=needs_vllm)])
def test_two_stages_without_torchrun(engine, tmp_path):
    """`python train.py` runs SFT, then FG-DAPO* from its best checkpoint, with one engine, and ends with code 0."""
    out = tmp_path / "out"
    text = f"""train.py @recipes/demo.args --algo sft_fg_dapo_star --engine {engine} --output_dir {out}
    --sft_max_steps 2 --max_steps 2 --train_batch_size 4 --num_generations 4 --eval_size 4 --eval_steps 1"""
    done = launch(*text.split())
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]

    sft, *rows = rows_of(out / "sft/metrics.jsonl")
    assert (sft["max_steps"], sft["lr_scheduler_type"], sft["warmup_ratio"]) == (2, "cosine", 0.1)
    assert "num_generations" not in sft
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
        assert math.isfinite(row["eval/loss"]) and 0 <= row["eval/accuracy"] <= 1
    best = out / "sft/checkpoint-best"
    assert moved(weights_of(TOY), weights_of(best))  # step 1 warms up from 0: step 2 moved them

    rl, *rows = rows_of(out / "metrics.jsonl")
    assert rl["model_name_or_path"] == str(best) and rl["num_generations"] == 4
    assert rl["learning_rate"] == 3e-4 and rl["lr_scheduler_type"] == "constant"
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/accuracy"] == pytest.approx(accuracy_of_best(out / "sft/metrics.jsonl"))
    assert moved(weights_of(best), weights_of(out / "checkpoint-2"))
    assert audit.audit(out).startswith("32 responses agree")


def accuracy_of_best(path) -> float:
    """Accuracy of the SFT checkpoint with the lowest validation loss."""
    rows = [row for row in rows_of(path)[1:] if "eval/loss" in row]
    return min(rows, key=lambda row: row["eval/loss"])["eval/accuracy"]
