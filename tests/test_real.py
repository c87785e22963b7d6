"""bench/real.py: the common start is train.py's SFT, the order of the work, and what is read off rollouts."""

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "bench"))

import real

import data

FLAGS = [
    "--engine", "transformers", "--model_name_or_path", "toy_model", "--train_file", "toy", "--eval_file", "toy:test",
    "--train_batch_size", "4", "--max_prompt_length", "1024", "--max_completion_length", "32", "--eval_size", "2",
]  # fmt: skip


def parsed(*argv) -> Namespace:
    return real.parse_args([*FLAGS, *map(str, argv)])


def test_the_start_is_sft_by_train_py(tmp_path):
    steps = "--start_steps 2 --start_share 2 --probe 2 --sft_learning_rate 1e-4".split()
    ours = ["bench/real.py", *FLAGS, *steps, "--output_dir", str(tmp_path / "ours"), "--only_start"]
    constant = "--lr_scheduler_type constant --warmup_ratio 0 --learning_rate 1e-4".split()
    theirs = ["train.py", "--algo", "sft", *FLAGS, *constant, "--max_steps", "2"]
    theirs += ["--eval_steps", "0", "--output_dir", str(tmp_path / "theirs")]
    for command in (ours, theirs):
        done = subprocess.run(
            [sys.executable, *command], cwd=REPO, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    a = load_file(tmp_path / "ours" / "start" / "model.safetensors")
    b = load_file(tmp_path / "theirs" / "checkpoint-2" / "model.safetensors")
    before = load_file(REPO / "toy_model" / "model.safetensors")
    moved = max(float((b[name] - before[name]).abs().max()) for name in b)
    apart = max(float((b[name] - a[name]).abs().max()) for name in b)
    assert moved > 1e-5 and apart == 0, (moved, apart)
    assert [row["step"] for row in real.read(tmp_path / "ours" / "start.jsonl")] == [0, 1, 2]


def test_arms_wait_for_the_start_and_for_their_turn(tmp_path):
    args = parsed("--output_dir", tmp_path, "--max_steps", 3, "--bfcl")
    names = lambda over=False: [name for name, _ in real.work(args, over)]
    assert names() == ["start", "eval/published-file"]
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text("{}")
    assert names() == [*args.arms, "eval/start-file", "eval/published-file"]
    for step in (2, 3):  # interrupted, then at its end
        (tmp_path / "toolupt" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "toolupt" / f"checkpoint-{step}" / "config.json").write_text("{}")
        over = ["eval/start-file", "eval/published-file"]
        assert names(over=True) == [f"eval/toolupt-{step}-file", *over]
        assert ("toolupt" in names()) == (step == 2)
    (tmp_path / "eval" / "toolupt-3-file").mkdir(parents=True)
    (tmp_path / "eval" / "toolupt-3-file" / "report.md").write_text("")
    assert "eval/toolupt-3-file" not in names()


def test_an_arm_is_called_as_a_user_would(tmp_path):
    args = parsed("--output_dir", tmp_path, "--max_steps", 150, "--learning_rate", "3e-6")
    last = lambda words, flag: words[len(words) - 1 - words[::-1].index(flag) + 1]
    for arm, (algo, origin, more) in real.ARMS.items():
        words = real.arm_command(args, arm)
        assert words[:4] == ["train.py", "--algo", algo, f"@{real.RECIPE}"]
        model = str(tmp_path / "start") if origin == "start" else "toy_model"
        assert last(words, "--model_name_or_path") == model
        assert last(words, "--learning_rate") == ("2e-05" if algo == "sft" else "3e-6")
        assert ("--balance_up" in words) == (algo == "toolupt")
        assert " ".join(words).endswith(more)


def response(step, kind, ids, target, advantages, text, total):
    return {
        "step": step, "kind": kind, "token_ids": ids, "target_ids": target, "advantages": advantages, "text": text,
        "outcome": {"total": total},
    }  # fmt: skip


def test_what_rollouts_tell(tmp_path):
    call = '<tool_call>\n{"name": "f", "params": {}}\n</tool_call>'
    rows = [
        response(
            1, "tool_call", [1, 2, 3], [1, 9, 3, 4], [0.5, 0.0, 0.0], call, 4
        ),  # 2 of 4 tokens
        response(1, "tool_call", [7], [1, 9, 3, 4], [-1.5], "<answer></answer>", -3),  # none of 4
        response(1, "answer", [5, 6], [5, 6], [0.25, 0.0], "<answer>\nno\n</answer>", 4),  # both
        response(2, "tool_call", [1], [1, 2], [1.0], call, 4),
    ]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rollouts.jsonl").write_text(whole + '{"step": 3, "torn')
    (tmp_path / "metrics.jsonl").write_text('{"alignment": "positional"}\n')
    found = real.read_rollouts(tmp_path)
    assert found["step"] == [1, 2]
    assert found["tokens_matched/calls"] == [0.25, 0.5]
    assert found["tokens_matched/answers"] == [1.0, None]
    assert found["first_advantage/calls"] == [-0.5, 1.0]
    assert found["accuracy/calls"] == [0.5, 1.0]
    assert found["form/call"] == [0.3333, 1.0]
    assert found["form/answer"] == [0.6667, 0.0]
    assert found["form/empty_answer"] == [0.3333, 0.0]


def test_responses_are_shown_with_their_query(tmp_path):
    target = '<tool_call>\n{"name": "f", "params": {}}\n</tool_call>'
    example = data.Example("x/0/0", [], [], "Is it raining?", [], target, "tool_call")
    prompt = "\n".join(message["content"] for message in data.messages(example))
    row = {"id": "x/0/0#0", "prompt": prompt, "category": "tool_call", "target": target}
    for name, right in (("start", False), ("toolupt-3", True)):
        folder = tmp_path / "eval" / f"{name}-file"
        folder.mkdir(parents=True)
        line = row | {"turns": [[f"of {name}"]], "correct": right}
        (folder / "results.jsonl").write_text(json.dumps(line) + "\n")
    [found] = real.responses(parsed("--output_dir", tmp_path), ("start", "toolupt-3"))
    assert found["query"] == "Is it raining?" and found["kind"] == "tool_call"
    assert found["responses"] == {
        "start": {"text": "of start", "right": False},
        "toolupt-3": {"text": "of toolupt-3", "right": True},
    }


@pytest.mark.parametrize("width", [1, 3])
def test_smooth_is_a_trailing_mean(width):
    values = [1.0, None, 3.0, 5.0]
    slow = []
    for i in range(len(values)):
        part = [v for v in values[: i + 1][-width:] if v is not None]
        slow.append(sum(part) / len(part) if part else None)
    found = real.smooth(values, width)
    assert [None if math.isnan(x) else x for x in found] == slow
