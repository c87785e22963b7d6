"""A run that survives what days bring: stops, kills, failing ranks, two nodes. Every job is a process of its own.

Jobs run the transformers engine on one thread, where the same seed gives the same bits: what was interrupted is compared
with what was not, file by file.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import frozen
import pytest
import torch
from jobs import Fault, Job
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import data
from tools import audit

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
pytestmark = pytest.mark.long
LATEST = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return frozen.tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(tiny, tmp_path):
    """command(NAME, flags...): the command line of a short run into tmp_path/NAME/out; every step is saved."""
    always = ["--save_steps", 1, "--max_steps", 5, *LATEST]
    return lambda name, *more: frozen.short_flags(tiny, tmp_path / name, *always, *more)


@pytest.fixture
def start(tmp_path):
    """start(argv, ...) -> Job; what still runs at the end of the test is killed."""
    jobs = []

    def begin(argv, **options):
        jobs.append(Job(argv, tmp_path / f"{len(jobs)}.log", **options))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


def finished(job) -> str:
    code = job.wait()
    assert code == 0, (code, job.text()[-3000:])
    return job.text()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without the configuration and what a clock says."""
    timed = ("timing_s/", "perf/")
    rows = lines_of(out / "metrics.jsonl")[1:]
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two folders of safetensors hold the same bits under the same names."""
    files = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (a, b)]
    assert files[0] and files[0] == files[1], files
    for name in files[0]:
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        if not all(torch.equal(first[key], second[key]) for key in first):
            return False
    return True


def check_same_run(out: Path, reference: Path, step: int) -> None:
    """Metrics, rollouts, weights and moments to the bit."""
    assert untimed(out) == untimed(reference)
    if (reference / "rollouts.jsonl").exists():
        assert (out / "rollouts.jsonl").read_bytes() == (reference / "rollouts.jsonl").read_bytes()
    for name in (f"checkpoint-{step}", f"checkpoint-{step}-state"):
        assert same_tensors(out / name, reference / name), name


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("ranks", [0, 2])  # 0: without torchrun
def test_two_stages_interrupted_in_each_and_between_equal_one_go(ranks, command, start, tmp_path):
    """SFT with its cosine schedule, then RL: SIGTERM within SFT, in its last step, behind it and within RL."""
    flags = (
        "--algo sft_fg_dapo_star --sft_max_steps 4 --eval_steps 2 --sft_learning_rate 0.01".split()
    )
    finished(start(command("whole", *flags), ranks=ranks))
    argv, flag = command("parts", *flags), tmp_path / "flag"
    faults = ("sft loss", 3, 143), ("sync", 2, 143), ("sync", 2, -15), ("loss", 2, 143)
    for stage, call, code in faults:
        once = f"{flag} {stage} {code}"
        job = start(argv, ranks=ranks, fault=Fault(stage, 0, call, "SIGTERM", once))
        expected = 1 if ranks else code  # torchrun's own
        assert job.wait() == expected, job.text()[
            -3000:
        ]  # between the loops there is nothing to save
        assert ("SIGTERM: left after step" in job.text()) == (code == 143)
        assert "Traceback" not in job.text() or ranks
    finished(start(argv, ranks=ranks))
    whole, parts = tmp_path / "whole/out", tmp_path / "parts/out"
    check_same_run(parts, whole, 5)
    check_same_run(parts / "sft", whole / "sft", 4)
    assert same_tensors(parts / "sft/checkpoint-best", whole / "sft/checkpoint-best")
    assert [row["step"] for row in untimed(whole)] == [0, 1, 2, 3, 4, 5]
    assert any(row["grad_norm"] > 0 for row in untimed(whole)[1:])


def test_two_ranks_resume_on_two_and_on_one(command, start, tmp_path):
    """One of the ranks gets SIGTERM, both save and leave; two go on to the bit, one to rounding."""
    finished(start(command("whole"), ranks=2))
    job = start(command("two"), ranks=2, fault=Fault("roll out", 1, 3, "SIGTERM"))
    assert job.wait() != 0 and "left after step 2" in job.text(), job.text()[-3000:]
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    finished(start(command("two"), ranks=2))
    finished(start(command("one")))
    whole, one = tmp_path / "whole/out", tmp_path / "one/out"
    check_same_run(tmp_path / "two/out", whole, 5)
    for row, expected in zip(untimed(one), untimed(whole), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    weights, expected = (load_file(out / "checkpoint-5/model.safetensors") for out in (one, whole))
    assert frozen.relative_difference(weights, expected) < 1e-4


@pytest.mark.parametrize("ranks", [0, 2])
def test_itool_interrupted_in_each_phase_equals_one_go(ranks, start, tmp_path):
    """One rank gets SIGTERM in its search, between two steps on pairs, and among the next iteration's perplexities."""
    examples = tmp_path / "examples.jsonl"
    data.write_jsonl(data.load("toy", "train")[:24], examples)

    def command(name):
        text = f"""--algo itool --stages itool --iterations 2 --model_name_or_path {frozen.TOY} --engine transformers
        --train_file {examples} --eval_file toy:test --eval_size 4 --output_dir {tmp_path / name} --pool_fraction 1
        --buffer_fraction 0.6 --mcts_iterations 2 --min_q -9 --min_gap 0.01 --self_evaluation none --learning_rate 3e-4
        --train_batch_size 2 --max_prompt_length 1024 --max_completion_length 80 --preference_epochs 5 --eval_steps 0
        --held_out_pairs 0 --no_gradient_checkpointing --save_steps 1"""
        return [*text.split(), *LATEST]

    finished(start(command("whole"), ranks=ranks))
    whole, parts, flag = tmp_path / "whole", tmp_path / "parts", tmp_path / "flag"
    steps = [row.get("iteration", 0) for row in untimed(whole)]
    assert steps.count(1) > 2 and steps.count(2) > 1, steps
    first = steps.count(1)  # steps of the first iteration
    fault = lambda stage, call: Fault(
        stage, max(0, ranks - 1), call, "SIGTERM", f"{flag} {stage} {call}"
    )
    for stage, call, step in (("search", 2, 0), ("preference", 2, 2), ("perplexity", 3, first)):
        job = start(command("parts"), ranks=ranks, fault=fault(stage, call))
        assert job.wait() == (1 if ranks else 143), job.text()[-3000:]
        assert f"SIGTERM: left after step {step};" in job.text(), job.text()[-3000:]
    finished(start(command("parts"), ranks=ranks))
    check_same_run(parts, whole, untimed(whole)[-1]["step"])
    for name in ("pairs.jsonl", "trees-1.jsonl", "trees-2.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert [row["step"] for row in lines_of(parts / "searches.jsonl")] == [0, first]


@frozen.needs_vllm
def test_two_ranks_resume_with_vllm(start, tmp_path):
    """Four steps in one go, and two and two; the demo's model, for vLLM on a CPU knows few head sizes."""

    def command(name, steps):
        text = f"""--algo toolupt @{frozen.REPO}/recipes/demo.args --model_name_or_path {frozen.TOY}
        --output_dir {tmp_path / name} --max_steps {steps} --train_batch_size 4 --num_generations 4 --eval_size 4
        --eval_steps 2 --save_steps 2 --resume_from_checkpoint latest"""
        return text.split()

    finished(start([command("whole", 4), command("parts", 2), command("parts", 4)], ranks=2))
    whole, parts = untimed(tmp_path / "whole"), untimed(tmp_path / "parts")
    assert [row["step"] for row in parts] == [0, 1, 2, 3, 4]
    for row, expected in zip(parts, whole, strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(command, start, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finished(start(command(name, "--seed", seed, "--max_steps", 2)))
    check_same_run(tmp_path / "a/out", tmp_path / "b/out", 2)
    ids = [
        [row["token_ids"] for row in lines_of(tmp_path / name / "out/rollouts.jsonl")]
        for name in "ac"
    ]
    assert ids[0] != ids[1]


# ---------------------------------------------------------------------------------------------------- kills


def whole_steps(out: Path) -> list[int]:
    """Steps of the named checkpoints, each of which must be whole: weights, moments and tokenizer can be read."""
    steps = []
    for state in out.glob("checkpoint-*-state"):
        step = int(state.name.split("-")[1])
        if (out / f".checkpoint-{step}.old").exists() and not (out / f"checkpoint-{step}").exists():
            continue  # killed between the two renames of its removal; the next start clears the rest
        assert (out / f"checkpoint-{step}/tokenizer_config.json").exists()
        weights = load_file(out / f"checkpoint-{step}/model.safetensors")
        stored = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
        named = {f"model.{name}" for name in weights}
        kinds = ("exp_avg", "exp_avg_sq", "step")
        moments = {f"optimizer.{name}.{kind}" for name in weights for kind in kinds}
        assert set(stored) == named | moments, state
        steps.append(step)
    return sorted(steps)


def wait_for(condition, job) -> None:
    while job.process.is_alive() and not condition():
        time.sleep(0.002)


def test_twenty_kills_change_nothing(command, start, tmp_path):
    """SIGKILL while it starts, at random moments of steps and of saves, and between a save's files and its rename.

    The job would go on for a thousand steps, so that it never ends before it is killed; it is let finish at the end.
    On a busy machine the tester may be too late for a save: in those five of the twenty the job kills itself.
    """
    seed = 7
    print("seed", seed)
    rng, out = random.Random(seed), tmp_path / "killed/out"
    argv = command("killed", "--max_steps", 1000)
    logged = lambda: (out / "metrics.jsonl").read_text().count("\n") if out.exists() else 0
    unfinished, resumed = 0, []
    for i in range(20):
        itself = i % 4 == 3
        fault = Fault("save", 0, rng.randint(1, 4), "kill")
        job = start(argv, fault=fault if itself else None)
        if itself:
            job.process.join()
        elif i % 5 == 0:
            time.sleep(rng.uniform(0, 3))
        elif i % 2:
            wait_for(lambda: any(out.glob(".checkpoint-*.incomplete")), job)
            time.sleep(rng.uniform(0, 0.03))
        else:
            enough = partial(lambda n: logged() >= n, logged() + rng.randint(1, 2))
            wait_for(enough, job)
            time.sleep(rng.uniform(0, 0.2))
        job.kill()
        assert job.process.exitcode == -signal.SIGKILL, job.text()[-3000:]
        unfinished += any(out.glob(".checkpoint-*.incomplete"))
        resumed.append(max(whole_steps(out), default=0))
    assert unfinished >= 3, "no kill met a save"
    assert resumed == sorted(resumed) and 0 < resumed[-1], resumed
    steps = resumed[-1] + 2
    for name in ("killed", "whole"):
        finished(start(command(name, "--max_steps", steps)))
    check_same_run(out, tmp_path / "whole/out", steps)
    assert [row["step"] for row in untimed(out)] == list(range(steps + 1))
    names = {path.name for path in out.iterdir() if "checkpoint" in path.name}
    assert names == {f"checkpoint-{n}{x}" for n in (steps - 1, steps) for x in ("", "-state")}


def test_torchrun_restarts_after_one_rank_is_killed(command, start, tmp_path):
    """--max_restarts of the real torchrun: all ranks start again and resume."""
    finished(start(command("whole"), ranks=2))
    done = torchrun("--max_restarts=1", *faulty("kill", tmp_path / "flag"), *command("killed"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "flag").exists() and "exitcode: -9" in done.stderr
    check_same_run(tmp_path / "killed/out", tmp_path / "whole/out", 5)


def test_sigterm_to_torchrun_saves_and_leaves(command, start, tmp_path):
    """The job's first process gets it; nothing of the job is left, and the next start goes on."""
    out = tmp_path / "run/out"
    job = start(command("run", "--max_steps", 1000), ranks=2)
    wait_for(lambda: any(out.glob("checkpoint-*-state")), job)
    job.send(signal.SIGTERM)
    assert job.wait() != 0  # `wait` looks for orphans
    assert "SIGTERM: left after step" in job.text(), job.text()[-3000:]
    last = untimed(out)[-1]["step"]
    assert whole_steps(out)[-1] == last
    finished(start(command("run", "--max_steps", last + 1), ranks=2))
    assert [row["step"] for row in untimed(out)] == list(range(last + 2))


def test_ctrl_c_at_the_real_torchrun_saves_and_leaves(command, tmp_path):
    """Processes, not forks; torchrun alone hears the terminal, and its ranks are gone when it is."""
    out = tmp_path / "run/out"
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            [*TORCHRUN, frozen.REPO / "train.py", *map(str, command("run", "--max_steps", 1000))],
            env=plain_environment(),
            stdout=log,
            stderr=log,
        )
    while job.poll() is None and not any(out.glob("checkpoint-*-state")):
        time.sleep(0.05)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=900) != 0
    text = (tmp_path / "log").read_text()
    assert "SIGINT: left after step" in text, text[-3000:]
    assert len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert whole_steps(out)[-1] == untimed(out)[-1]["step"]


def test_a_killed_torchrun_leaves_no_orphans(command, start, tmp_path):
    job = start(command("run", "--max_steps", 1000), ranks=2)
    wait_for(lambda: any((tmp_path / "run/out").glob("checkpoint-*-state")), job)
    job.send(signal.SIGKILL)
    limit = time.monotonic() + 60
    while job.members() and time.monotonic() < limit:
        time.sleep(0.1)
    assert not job.members(), job.text()[-3000:]
    assert "SIGTERM: left after step" in job.text()


def test_two_runs_do_not_write_into_one_folder(command, start, tmp_path):
    first = start(command("run", "--max_steps", 1000))
    wait_for(lambda: any((tmp_path / "run/out").glob("checkpoint-*-state")), first)
    second = start(command("run"))
    assert second.wait() == 2
    assert "error: another run writes into --output_dir" in second.text()
    first.kill()


# ------------------------------------------------------------------------------------------------ failing ranks

FAULTS = {
    "sample": "raise",
    "roll out": "oom",
    "reward": "kill",
    "advantage": "raise",
    "loss": "oom",
    "optimiser": "kill",
    "sync": "raise",
}


@pytest.mark.parametrize("stage", FAULTS)
def test_a_failing_rank_ends_the_job_and_has_the_last_word(command, start, stage):
    act = FAULTS[stage]
    job = start(command(stage.replace(" ", "_")), ranks=2, fault=Fault(stage, 1, 2, act))
    wait_for(lambda: "before training" in job.text(), job)
    begin = time.monotonic()
    assert job.wait() == 1
    assert time.monotonic() - begin < 60
    last_words = job.text().rpartition("Root Cause")[2]
    assert "rank      : 1" in last_words, job.text()[-3000:]
    words = {"raise": "RuntimeError: injected into", "oom": "OutOfMemoryError: injected into"}
    assert words.get(act, "Signal 9 (SIGKILL)") in last_words


def test_a_failing_rank_under_the_real_torchrun(command):
    """Processes, not forks; the error of the rank is the end of what is printed."""
    done = torchrun(*faulty("raise", ""), *command("run"))
    assert done.returncode == 1
    last_words = done.stderr.rpartition("Root Cause")[2]
    assert "rank      : 1" in last_words, done.stderr[-3000:]
    assert last_words.rstrip(" =\n").endswith("RuntimeError: injected into loss"), last_words


def faulty(act: str, flag) -> list:
    """train.py whose rank 1 fails in the loss of its third step."""
    return [frozen.REPO / "tests/jobs.py", "loss", 1, 3, act, flag]


def torchrun(*command) -> subprocess.CompletedProcess:
    """The real one, to its end."""
    return subprocess.run(
        [*TORCHRUN, *map(str, command)],
        env=plain_environment(),
        text=True,
        capture_output=True,
        timeout=900,
        check=False,
    )


def plain_environment() -> dict:
    """This process's, as a shell outside torchrun has it."""
    env = {k: v for k, v in os.environ.items() if "RANK" not in k and "MASTER" not in k}
    return env | {"OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------------------ several nodes


def test_two_nodes_of_one_rank_are_one_node_of_two(command, start, tmp_path):
    """Two agents that meet over loopback; the same metrics, rollouts, weights and moments to the bit."""
    finished(start(command("one"), ranks=2))
    argv = command("two")
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = [start(argv, ranks=1, nodes=2, endpoint=endpoint) for _ in range(2)]
    for node in nodes:
        finished(node)
    check_same_run(tmp_path / "two/out", tmp_path / "one/out", 5)
    assert "2 rank(s); a step" in nodes[0].text() + nodes[1].text()
    assert audit.audit(tmp_path / "two/out").startswith("40 responses agree")


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
