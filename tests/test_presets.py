"""Every row of METHODS from start to end: torchrun with two ranks, vLLM, the embedded model and world."""

import json
import math

import pytest
import torch
from frozen import REPO, TOY, needs_vllm
from presets_worker import PROMPTS, STEPS
from test_whole_runs import launch, moved, rows_of, weights_of

from methods import METHODS, Rollouts
from tools import audit

pytestmark = [needs_vllm, pytest.mark.long]

ALWAYS = {
    "loss",
    "grad_norm",
    "learning_rate",
    "skipped",
    "timing_s/update",
    "timing_s/step",
    "perf/tokens_per_second",
}
RL = {
    "reward", "reward_std", "frac_reward_zero_std", "accuracy", "format", "completions/mean_length",
    "completions/clipped_ratio", "advantage/positive", "advantage/negative", "entropy", "rounds",
    "frac_groups_kept", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    "timing_s/rollout", "timing_s/reward", "timing_s/advantage", "timing_s/sync",
    "form/call", "form/answer", "form/both", "form/untagged_call", "form/neither",
    "form/empty_answer", "form/repeated_key",
}  # fmt: skip
BY_KIND = (
    "accuracy",
    "tokens_matched",
    "first_advantage",
)  # of the kinds that a step's prompts have
START = {"start/tag_logp", "start/body_logp"}
SPO = {"spo/chosen", "spo/rejected", "spo/kept", "spo/negative"}
SFT = {"nll", "expert_prob"}
OF_THE_LOSS = {
    "luffy": {"luffy/rollout", "luffy/expert"},
    "srft": {"srft/demo_sft", "srft/demo_rl", "srft/self", "expert_prob"},
    "chord": {"chord/grpo", "chord/sft", "expert_prob", "balance"},
    "toolupt": {"balance", *SPO},
    "toolupt_no_fgae": {"balance", *SPO},
    "toolupt_no_spo": {"balance", *SFT},
}
EVAL = {"eval/accuracy", "eval/reward", "eval/tool_call_accuracy", "eval/answer_accuracy"}
EVAL |= {"timing_s/evaluate"}
LOADED = {"timing_s/load", "timing_s/sync", "timing_s/step"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that holds an output folder per row."""
    out = tmp_path_factory.mktemp("presets")
    done = launch(REPO / "tests/presets_worker.py", out, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_the_worker_runs_every_method_of_the_paper(runs):
    table_1 = {
        "sft",
        "grpo",
        "dapo",
        "dapo_star",
        "fg_dapo_star",
        "sft_dapo_star",
        "sft_fg_dapo_star",
    }
    table_1 |= {"luffy", "srft", "chord", "toolupt"}
    figure_4 = {"toolupt_no_fgae", "toolupt_no_spo"}
    assert (
        table_1 | figure_4 <= {*METHODS} == {path.name for path in runs.iterdir() if path.is_dir()}
    )


def check_metrics(out, expected: set) -> dict:
    """Steps and metrics of one stage; returns its config."""
    config, before, *rows = rows_of(out / "metrics.jsonl")
    rl = "entropy" in expected
    assert before.keys() == {"step", *EVAL, *LOADED, *(START if rl else ())}
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    for row in rows:
        kinds = [kind for kind in ("calls", "answers") if f"accuracy/{kind}" in row]
        assert bool(kinds) is rl
        of_kinds = {f"{name}/{kind}" for name in BY_KIND for kind in kinds}
        last = (
            EVAL | ({"eval/loss"} & expected) | {"timing_s/sync"} if row["step"] == STEPS else set()
        )
        wanted = {"step", *(expected - {"eval/loss"}), *of_kinds, *last}
        assert row.keys() - {"timing_s/records"} == wanted
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["skipped"] == 0 and row["grad_norm"] > 0
        if "entropy" in row:  # vLLM has the weights of the step before
            assert row["sampling/sampling_logp_difference/max"] < 1e-3
    return config


@pytest.mark.parametrize("algo", METHODS)
def test_a_row_trains(algo, runs):
    out, begin = runs / algo, weights_of(TOY)
    row = METHODS[algo]
    if algo == "sft" or hasattr(row, "first_stage"):
        sft = out if algo == "sft" else out / "sft"
        config = check_metrics(sft, ALWAYS | SFT | {"eval/loss"})
        assert config["lr_scheduler_type"] == "cosine" and config["max_steps"] == STEPS
        assert moved(begin, weights_of(sft / "checkpoint-best"))
        begin = weights_of(sft / "checkpoint-best")
    if issubclass(row, Rollouts):
        config = check_metrics(out, ALWAYS | RL | OF_THE_LOSS.get(algo, set()))
        K = config["num_generations"]
        assert K == (7 if algo in ("luffy", "srft") else 8)
        rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
        assert len(rollouts) == STEPS * PROMPTS * K
        assert any(advantage for row in rollouts for advantage in row["advantages"])
        assert audit.audit(out).startswith(f"{len(rollouts)} responses agree")
        assert moved(begin, weights_of(out / f"checkpoint-{STEPS}"))
    assert all(torch.isfinite(w).all() for w in weights_of(out / f"checkpoint-{STEPS}").values())
