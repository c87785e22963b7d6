"""A user's own reward, prompts, data and trackers, in whole runs on a tiny random model."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import frozen
import pytest
import torch
from jobs import Job

import data
import rewards
import scoring
from methods import METHODS, Group
from tools import audit
from train import score

OWN = '''
import data
MINIMUM, MAXIMUM = -1, 2.5


def reward(response: str, example: data.Example):
    """Characters of the query that occur, and a bonus for brevity: nothing of the paper's."""
    said = sum(letter in response for letter in example.query) / len(example.query)
    short = 1.0 if len(response) < 40 else 0.0
    return {"said": said, "short": short}, min(2.5, 3 * said + short - 1)
'''
EXAMPLE = data.Example("mine/0/0", [], [], "abcd", [], "<answer>\nabcd\n</answer>", "answer")
LATEST = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return frozen.tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def job(tiny, tmp_path):
    """job(flags...) -> (exit code, what was printed) of a short run into tmp_path/job/out."""

    def run(*more):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        done = Job(frozen.short_flags(tiny, tmp_path / "job", *more), log)
        return done.wait(), done.text()

    return run


def own_file(tmp_path, text: str = OWN) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(text)
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the reward ----


def test_without_a_file_the_reward_is_the_papers():
    reward = scoring.Reward()
    call = replace(
        EXAMPLE, kind="tool_call", target='<tool_call>{"name": "f", "params": {}}</tool_call>'
    )
    texts = [EXAMPLE.target, "nothing", "<answer></answer>", call.target]
    for example in (EXAMPLE, call):
        for text in texts:
            outcome = reward.score(text, example)
            assert outcome == rewards.outcome(text, example.target)
            assert outcome.right == bool(rewards.binary(text, example.target))
    examples = [EXAMPLE, EXAMPLE, call, call]
    assert reward.tally(texts, examples) == rewards.tally(texts, [e.target for e in examples])


@pytest.mark.parametrize("algo", METHODS)
def test_every_method_sees_the_reward_and_its_bounds(algo, tmp_path):
    """Binary rewards are 1 exactly at MAXIMUM; token rewards take MAXIMUM where a token is the expert's."""
    method = METHODS[algo]()
    if algo == "sft":
        return
    texts = ["abcd", "ab", "", "x" * 50]  # totals 2.5 (capped at 3), 1.5, 0, -1
    call = replace(EXAMPLE, kind="tool_call")
    group = Group(
        call, [1], [7, 8, 9], max_length=64, with_expert=method.learns_from_expert, seed=0
    )
    ids = [[7, 1], [1, 8, 9], [2], [3, 8]]
    group.samples = [
        SimpleNamespace(token_ids=i, text=t, logps=[-1.0] * len(i), finish_reason="stop")
        for i, t in zip(ids, texts)
    ]
    score(method, group, scoring.Reward(own_file(tmp_path)))
    totals = [2.5, 1.5, 0.0, -1.0]
    assert [outcome.total for outcome in group.outcomes] == totals
    assert [outcome.right for outcome in group.outcomes] == [True, False, False, False]
    binary = algo in ("grpo", "dr_grpo", "srft", "chord")
    assert group.rewards == ([1.0, 0.0, 0.0, 0.0] if binary else totals)
    advantages = method.advantages(group)
    assert torch.isfinite(advantages).all()
    if group.token_rewards is None:
        return
    for row, (own, total) in enumerate(zip(ids, totals)):  # Eqs. 13, 14 by hand
        for t, token in enumerate(own):
            expected = max(2.5 if token == [7, 8, 9][t] else -1.0, total)
            assert float(group.token_rewards[row, t]) == expected


def test_a_run_with_ones_own_reward_is_recorded_and_audited(job, tmp_path):
    code, text = job("--reward_file", own_file(tmp_path), "--num_generations", 4)
    assert code == 0, text[-3000:]
    assert "the expert responses of 8 examples earn" in text
    out = tmp_path / "job/out"
    first, *metrics = lines_of(out / "metrics.jsonl")
    space = {}
    exec(OWN, space)
    queries = {f"short/{i}/0": SimpleNamespace(query=f"say {i}") for i in range(8)}
    rows = lines_of(out / "rollouts.jsonl")
    for row in rows:
        parts, total = space["reward"](row["text"], queries[row["id"]])
        assert row["outcome"] == {"parts": parts, "total": total, "right": total == 2.5}
        assert row["reward"] == total
    for step in (1, 2):
        said = [row["outcome"]["parts"]["said"] for row in rows if row["step"] == step]
        assert metrics[step]["reward/said"] == pytest.approx(sum(said) / len(said))
        assert "format" not in metrics[step]
    assert -1 <= metrics[0]["eval/reward"] <= 2.5
    own_file(tmp_path).unlink()  # the run holds a copy of its own
    assert "agree" in audit.audit(out)
    copy = out / "reward.py"
    copy.write_text(OWN.replace("3 *", "2 *"))
    with pytest.raises(ValueError, match=r"reward\.py was changed"):
        audit.audit(out)


@pytest.mark.parametrize(
    "text, message",
    [
        ("MINIMUM, MAXIMUM = 0, 1\n", "must hold MINIMUM, MAXIMUM"),
        (OWN.replace("-1, 2.5", "3, 2.5"), "must hold MINIMUM, MAXIMUM"),
        (OWN.replace("-1, 2.5", "0, float('nan')"), "must hold MINIMUM, MAXIMUM"),
        ("\nimport data\nx = 1 +\n", r"my_reward\.py line 3: invalid syntax"),
        ("\nimport nothing_of_this_name\n", r"my_reward\.py line 2: ModuleNotFoundError"),
        ("\n\n1 / 0\n", r"my_reward\.py line 3: ZeroDivisionError"),
    ],
)
def test_a_reward_file_that_cannot_be_read_names_its_line(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scoring.Reward(own_file(tmp_path, text))


@pytest.mark.parametrize(
    "body, message",
    [
        (
            "    return {}, 7\n",
            r"line 2: reward returned .* example mine/0/0; the total must be in",
        ),
        ("    return {}, float('nan')\n", r"line 2.*mine/0/0; return \(parts, total\)"),
        ("    return 1.0\n", r"line 2.*mine/0/0; return \(parts, total\)"),
        ("    return {'a': 'b'}, 1.0\n", r"line 2.*mine/0/0; return \(parts, total\)"),
        ("    x = {}\n    return x, x['a']\n", r"line 4: KeyError: 'a' at example mine/0/0"),
        ("    import json\n    return {}, json.loads(r)\n", r"line 4: JSONDecodeError.*mine/0/0"),
    ],
)
def test_a_reward_that_fails_names_line_and_example(body, message, tmp_path):
    file = own_file(tmp_path, f"MINIMUM, MAXIMUM = 0, 1\ndef reward(r, example):\n{body}")
    with pytest.raises(ValueError, match=message):
        scoring.Reward(file).score("text", EXAMPLE)


def test_a_reward_that_fails_in_mid_run_ends_it_in_one_line(job, tmp_path):
    failing = OWN.replace("    said =", '    assert "<answer>" in response, "unread"\n    said =')
    code, text = job("--reward_file", own_file(tmp_path, failing))
    assert code == 2 and "Traceback" not in text, text[-2000:]
    assert "my_reward.py line 8: AssertionError: unread at example short/" in text


# ---- changed data ----


def test_resuming_on_other_data_is_an_error_that_says_how_to_go_on(job, tmp_path, tiny):
    code, text = job("--save_steps", 1, *LATEST)
    assert code == 0, text[-3000:]
    flags = ["--save_steps", 1, "--max_steps", 3, *LATEST]
    argv = frozen.short_flags(tiny, tmp_path / "job", *flags)
    file = tmp_path / "job/short.jsonl"
    kept = file.read_text()
    file.write_text(kept.replace("say 3", "say 33"))
    done = Job(argv, tmp_path / "again.log")
    assert done.wait() == 2 and "Traceback" not in done.text(), done.text()[-3000:]
    assert "--train_file: 8 examples" in done.text() and "--eval_file" in done.text()
    assert "--model_name_or_path" in done.text() and "out/checkpoint-2" in done.text()
    file.write_text(kept)  # the same content under a new date
    done = Job(argv, tmp_path / "back.log")
    assert done.wait() == 0, done.text()[-3000:]


def test_resuming_with_another_reward_is_an_error(job, tmp_path):
    file = own_file(tmp_path)
    assert job("--save_steps", 1, "--reward_file", file, *LATEST)[0] == 0
    file.write_text(OWN.replace("< 40", "< 50"))
    code, text = job("--max_steps", 3, "--reward_file", file, *LATEST)
    assert code == 2 and "--reward_file: " in text, text[-2000:]
    code, text = job("--max_steps", 3, *LATEST)
    assert code == 2 and "--reward_file: " in text and "-> none" in text, text[-2000:]
