"""A user's own reward, prompts, data and trackers, in whole runs on a tiny random model."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import frozen
import pytest
import torch
from jobs import Job
from safetensors.torch import load_file
from transformers import AutoTokenizer

import data
import eval as evaluation
import rewards
import rollout
import scoring
from methods import METHODS, Chord, Group, Grpo, Srft
from tools import audit, serving
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
    found = reward.tally(texts, [EXAMPLE, EXAMPLE, call, call])
    assert found == {
        "n": 4, "accuracy": 2, "reward": 4 - 3 - 3 + 4, "n_calls": 2, "tool_calls": 1, "answers": 1,
    }  # fmt: skip


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
        rollout.Sample(token_ids, [-1.0] * len(token_ids), text, "stop")
        for token_ids, text in zip(ids, texts)
    ]
    score(method, group, scoring.Reward(own_file(tmp_path)))
    totals = [2.5, 1.5, 0.0, -1.0]
    assert [outcome.total for outcome in group.outcomes] == totals
    assert [outcome.right for outcome in group.outcomes] == [True, False, False, False]
    binary = isinstance(method, (Chord, Grpo, Srft))
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
    _, *metrics = lines_of(out / "metrics.jsonl")
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


def test_a_reward_file_may_pickle_its_own_classes(tmp_path):
    """As those do that score in a pool of processes."""
    text = """
import pickle
MINIMUM, MAXIMUM = 0, 1
class Judge:
    pass
def reward(response, example):
    return {}, float(type(pickle.loads(pickle.dumps(Judge()))) is Judge)
"""
    assert scoring.Reward(own_file(tmp_path, text)).score("text", EXAMPLE).right


@pytest.mark.parametrize(
    "text, message",
    [
        ("MINIMUM, MAXIMUM = 0, 1\n", "must hold MINIMUM, MAXIMUM"),
        (OWN.replace("-1, 2.5", "3, 2.5"), "must hold MINIMUM, MAXIMUM"),
        (OWN.replace("-1, 2.5", "0, float('nan')"), "must hold MINIMUM, MAXIMUM"),
        ("\nimport data\nx = 1 +\n", r"my_reward\.py line 3: invalid syntax"),
        ("\nimport nothing_of_this_name\n", r"my_reward\.py line 2: ModuleNotFoundError"),
        ("\n\n1 / 0\n", r"my_reward\.py line 3: ZeroDivisionError"),
        ("\nimport sys\nsys.exit(3)\n", r"my_reward\.py line 3: SystemExit: 3"),
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
        ("    raise SystemExit(3)\n", r"line 3: SystemExit: 3 at example mine/0/0"),
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


# ---- the prompts ----

SYSTEM = "Policies first.\n\nYour functions, one a line:\n__TOOL_DESCS__\n"
USER = "__STEPS__\n\nIn short: __HISTORY__\nNow: __QUERY__"
RICH = data.Example(
    "mine/0/0", [{"name": "f"}], [("user", "a"), ("assistant", "b")], "q", [("c", "o")],
    "<answer>\nno\n</answer>", "answer", policy="Be __QUERY__.",
)  # fmt: skip


def prompt_files(tmp_path, system=SYSTEM, user=USER) -> list:
    (tmp_path / "s.txt").write_text(system)
    (tmp_path / "u.txt").write_text(user)
    return ["--system_prompt", tmp_path / "s.txt", "--user_prompt", tmp_path / "u.txt"]


def test_own_prompts_are_filled_and_need_no_heading():
    own = data.with_prompts(RICH, {"system": SYSTEM, "user": USER})
    system, user = (message["content"] for message in data.messages(own))
    assert system == (
        'Policies first.\n\nBe __QUERY__.\n\nYour functions, one a line:\n{"name": "f"}\n'
    )
    assert user == (
        "Step-1 tool call: c\nStep-1 observation: o\n\nIn short: user: a\nassistant: b\nNow: q"
    )
    placed = data.with_prompts(RICH, {"system": "__TOOL_DESCS__ | __POLICY__end"})
    assert data.messages(placed)[0]["content"] == '{"name": "f"} | Be __QUERY__.\n\nend'
    bare = replace(RICH, policy="", system="x\n\n__POLICY____TOOL_DESCS__")
    assert data.messages(bare)[0]["content"] == 'x\n\n{"name": "f"}'
    assert data.with_prompts(RICH, {}) is RICH


def test_examples_with_prompts_and_policies_survive_a_file(tmp_path):
    examples = [RICH, replace(RICH, id="mine/1/0", user=USER, system=SYSTEM, policy="")]
    data.write_jsonl(examples, tmp_path / "x.jsonl")
    assert data.load("jsonl", tmp_path / "x.jsonl") == examples


@pytest.mark.parametrize(
    "system, user, message",
    [
        ("no place", USER, r"s\.txt lacks __TOOL_DESCS__; it needs __TOOL_DESCS__"),
        (SYSTEM, "__QUERY__ alone", r"u\.txt lacks __HISTORY__, __STEPS__; it needs"),
        (SYSTEM, USER + "__TOOLS__", r"u\.txt: nothing fills __TOOLS__; it may hold"),
    ],
)
def test_a_prompt_without_its_placeholders_is_rejected(system, user, message, tmp_path):
    _, s, _, u = prompt_files(tmp_path, system, user)
    with pytest.raises(ValueError, match=message):
        data.read_prompts(tmp_path, s, u)
    with pytest.raises(ValueError, match="--system_prompt nowhere: no such file"):
        data.read_prompts(tmp_path, "nowhere")


def test_prompts_and_a_card_travel_with_the_checkpoint(job, tmp_path):
    files = prompt_files(tmp_path)
    code, text = job("--train_fraction", 0.8, *files)
    assert code == 0, text[-3000:]
    folder = tmp_path / "job/out/checkpoint-2"
    assert data.read_prompts(folder) == {"system": SYSTEM, "user": USER}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    example = data.load("jsonl", tmp_path / "job/short.jsonl")[0]
    prompt = data.with_prompts(example, {"system": SYSTEM, "user": USER})
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.query}],
        chat_template=tokenizer.get_chat_template("tool_use"),
        tools=[],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert served == data.render(prompt, tokenizer)
    card = (folder / "README.md").read_text()
    assert "- Step 2 of 2, seed 0" in card and "| short | 0 | 6 |" in card  # 0.8 of 8
    assert "| before |" in card and "| after |" in card and "Trained by\n\n    python " in card
    # eval.py takes the checkpoint's
    options = evaluation.parse_args([str(folder), "--bench", "file", "--file", "toy:test"])
    assert evaluation.own_prompts(options) == {"system": SYSTEM, "user": USER}
    options.format = "python"
    assert evaluation.own_prompts(options) == {"user": USER}
    # and a resumption wants the same
    (tmp_path / "u.txt").write_text(USER + "!")
    code, text = job("--train_fraction", 0.8, *files, "--max_steps", 3, *LATEST)
    assert code == 2 and "--user_prompt: " in text and "--system_prompt: " not in text


# ---- trackers ----

FAKE = """
import json, os
from types import SimpleNamespace

CALLS = os.environ["FAKE_WANDB"]
def note(*call):
    with open(CALLS, "a") as file:
        file.write(json.dumps(call) + "\\n")
def calls():
    return [json.loads(line) for line in open(CALLS)] if os.path.exists(CALLS) else []
def init(id=None, resume=None, **more):
    steps = [c[2] for c in calls() if c[0] == "log" and c[1] == id]
    id = id or f"run{len(calls())}"
    note("init", id, resume)
    log = lambda metrics, step: note("log", id, step, metrics)
    return SimpleNamespace(id=id, step=max(steps, default=-1) + 1, log=log, finish=lambda: note("finish", id))
"""


def run_with(tiny, tmp_path, *flags, **env) -> None:
    """A process of its own with a fake wandb, since it must import it."""
    (tmp_path / "fake").mkdir(exist_ok=True)
    (tmp_path / "fake/wandb.py").write_text(FAKE)
    paths = [str(tmp_path / "fake"), *sys.path]
    env = {k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD" not in k} | env
    env |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    argv = frozen.short_flags(tiny, tmp_path / "job", *flags)
    command = [sys.executable, "train.py", *map(str, argv)]
    done = subprocess.run(
        command, cwd=frozen.REPO, env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]


TWO_STAGES = "--algo sft_fg_dapo_star --sft_max_steps 2 --max_steps 4 --save_steps 2".split()


def lose_the_end(out: Path) -> None:
    """As if the run had been killed after step 4 and before its checkpoint."""
    for name in ("checkpoint-4", "checkpoint-4-state"):
        shutil.rmtree(out / name)


def test_two_stages_and_a_resumption_are_one_run_of_wandb(tiny, tmp_path):
    env = {"FAKE_WANDB": str(tmp_path / "calls.jsonl")}
    flags = [*TWO_STAGES, "--report_to", "wandb", *LATEST]
    run_with(tiny, tmp_path, *flags, **env)
    out = tmp_path / "job/out"
    lose_the_end(out)
    run_with(tiny, tmp_path, *flags[:-2], *LATEST, "--max_steps", 5, **env)
    calls = lines_of(tmp_path / "calls.jsonl")
    assert {call[1] for call in calls} == {(out / "wandb_run").read_text().strip()}
    assert [call[2] for call in calls if call[0] == "init"] == [None, "allow", "allow"]
    assert sum(call[0] == "finish" for call in calls) == 3
    logs = [call for call in calls if call[0] == "log"]
    # SFT: 0 .. 2; RL: 3 (before) .. 7; the second go logs 8 alone, for W&B keeps what it has
    assert [call[2] for call in logs] == [*range(8), 8]
    accuracies = [call[2] for call in logs if "eval/accuracy" in call[3]]
    assert accuracies == [0, 2, 3, 7, 8]


def test_two_stages_and_a_resumption_are_one_axis_of_tensorboard(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*TWO_STAGES, "--report_to", "tensorboard", *LATEST]
    run_with(tiny, tmp_path, *flags)
    lose_the_end(tmp_path / "job/out")
    run_with(tiny, tmp_path, *flags, "--max_steps", 5)
    read = EventAccumulator(str(tmp_path / "job/out/tensorboard"))
    read.Reload()
    steps = lambda name: [event.step for event in read.Scalars(name)]
    assert steps("loss") == [1, 2, 4, 5, 6, 7, 8]
    assert steps("eval/accuracy") == [0, 2, 3, 8]  # 7 was the end of what was killed


# ---- a full disk ----


@pytest.mark.parametrize("room, what", [(1.1, "incomplete"), (1.3, "state.incomplete")])
def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(room, what, tiny, tmp_path):
    """A real one: a tmpfs that ends within the second checkpoint's model, or within its state.

    The check of the free space before a save is taken away.
    """
    assert Job(frozen.short_flags(tiny, tmp_path / "sized"), tmp_path / "log").wait() == 0
    used = sum(f.stat().st_size for f in (tmp_path / "sized/out").rglob("*") if f.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(used * room)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs needs root and the right to mount")
    try:
        flags = ["--output_dir", disk / "out", "--save_steps", 1, "--save_total_limit", 0]
        argv = frozen.short_flags(tiny, tmp_path / "job", *flags)
        job = Job(argv, tmp_path / "full.log", fault=Unlimited())
        assert job.wait() == 2, job.text()[-3000:]
        assert "Traceback" not in job.text(), job.text()[-3000:]
        [line] = [line for line in job.text().splitlines() if line.startswith("error: ")]
        named = (
            rf"disk/out/\.checkpoint-2[.-]{what}: [\d,]+ bytes could not be written \(.*No space"
        )
        assert re.search(named, line), line
        assert (disk / "out/checkpoint-1/config.json").exists()
        assert same_tensors(disk / "out/checkpoint-1")
        assert not list((disk / "out").glob(".checkpoint-2*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def same_tensors(folder: Path) -> bool:
    """Whether a checkpoint and its state can be read, with the same weights."""
    weights = load_file(folder / "model.safetensors")
    state = {}
    for file in folder.with_name(folder.name + "-state").glob("*.safetensors"):
        state |= load_file(file)
    return all(torch.equal(weights[name], state[f"model.{name}"]) for name in weights)


class Unlimited:
    """A fault for Job: the check before a save, which would stop the run in time, finds room."""

    def arm(self) -> None:
        import model

        model.check_disk = lambda *_, **__: None


# ---- thoughts ----

# as Qwen3 writes its generation prompt, and as models do that always think
CLOSES = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
OPENS = "<think>\n"


def with_end(tiny, end: str):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = tokenizer.chat_template.rstrip().removesuffix("{% endif %}")
    tokenizer.chat_template += "{{ '' }}" + end + "{% endif %}"
    return tokenizer


def test_thinking_is_switched_off_where_the_template_can_in_training_and_when_served(tiny):
    tokenizer = with_end(tiny, CLOSES)
    data.check_thinking(tokenizer)
    example = replace(RICH, tools=[], history=[], steps=[], policy="")
    ids = data.render(example, tokenizer)
    assert tokenizer.decode(ids).endswith("<think>\n\n</think>\n\n")
    assert data.fit([example], tokenizer, len(ids), 64)[0]
    assert not data.fit([example], tokenizer, len(ids) - 1, 64)[0]
    serving.add_tool_template(tokenizer)
    chat = [{"role": "user", "content": example.query}]
    template = tokenizer.get_chat_template("tool_use")
    served = tokenizer.apply_chat_template(
        chat, tools=[], chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert served == ids


def test_a_template_that_always_opens_a_thought_is_rejected(tiny):
    with pytest.raises(ValueError, match="opens a <think> block in every prompt"):
        data.check_thinking(with_end(tiny, OPENS))
