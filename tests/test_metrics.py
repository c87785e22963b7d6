"""metrics.py: each number against a slow count, the norms against autograd on slow losses, in float64."""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict

import frozen
import pytest
import torch
from frozen import RANK_VARIABLES, TOY, K, one_rank  # noqa: F401 - a fixture
from test_train import tiny  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM

import data
import metrics
import model as modeling
import train
from methods import METHODS
from run import Run

EXPERT_ROWS = ("toolupt", "toolupt_no_spo", "toolupt_no_fgae", "chord", "luffy", "srft")


def rewarded(folder, files, *more):
    """Config, row, run and the groups of a frozen step with advantages."""
    config, method = train.parse_args(frozen.flags(folder, files, *more))
    run = Run(config, method)
    run.engine = frozen.Frozen(run.tokenizer, frozen.answers(run.tokenizer, frozen.examples()))
    groups = train.roll_out(config, method, run, list(enumerate(frozen.examples())))
    for group in groups:
        train.score(method, group, run.reward)
        group.advantages = method.advantages(group)
    return config, method, run, groups


# ---------------------------------------------------------------------------------- rollouts


def common(a, b):
    """Length of a longest common subsequence: the textbook's table."""
    best = defaultdict(int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i, j] = best[i - 1, j - 1] + 1 if x == y else max(best[i - 1, j], best[i, j - 1])
    return best[len(a) - 1, len(b) - 1]


@pytest.mark.parametrize("algo", ["toolupt", "dapo_star", "luffy", "toolupt --alignment lcs"])
def test_kinds_apart(algo, tiny, tmp_path):  # noqa: F811
    _, method, _, groups = rewarded(tiny, tmp_path, "--algo", *algo.split())
    found = metrics.rollout_metrics(groups, method.alignment)
    for kind, name in (("tool_call", "calls"), ("answer", "answers")):
        matched = expert = right = n = first = 0
        for group in groups:
            if group.example.kind != kind:
                continue
            for k, sample in enumerate(group.samples):
                ids, target = sample.token_ids, group.target
                if "lcs" in algo:  # without the EOS
                    matched, expert = matched + common(ids, target[:-1]), expert + len(target) - 1
                else:
                    matched += sum(a == b for a, b in zip(ids, target))
                    expert += len(target)
                right += group.outcomes[k].total == 4
                first += float(group.advantages[k][0])
                n += 1
        assert 0 < matched < expert and n
        assert found[f"tokens_matched/{name}"] == pytest.approx(matched / expert)
        assert found[f"first_advantage/{name}"] == pytest.approx(first / n, abs=1e-6)
        assert found[f"accuracy/{name}"] == pytest.approx(right / n)


def test_forms_by_hand():
    call = '{"name": "f", "params": {"a": 1}}'
    texts = {
        f"<tool_call>\n{call}\n</tool_call>": "call",
        '<tool_call>\n{"name": "f", "params": {"a": 1, "a": 2}}\n</tool_call>': "call",
        "<answer>\nNo.\n</answer>": "answer",
        "<answer> \n</answer>": "answer",
        f"<tool_call>{call}</tool_call><answer>No.</answer>": "both",
        f"```json\n{call}\n```": "untagged_call",
        f"<answer>\n{call}\n</answer>": "untagged_call",
        "No.": "neither",
    }
    n, ids = len(texts), [[1]] * len(texts)
    sums = metrics.tally("tool_call", [1, 2], ids, list(texts), [False] * n, [0.5] * n)
    found = metrics.shares(sums)
    for form in ("call", "answer", "both", "untagged_call", "neither"):
        assert found[f"form/{form}"] == list(texts.values()).count(form) / n
    assert found["form/repeated_key"] == found["form/empty_answer"] == 1 / n
    assert found["tokens_matched/calls"] == 0.5 and found["first_advantage/calls"] == 0.5
    assert not [name for name in found if name.endswith("/answers")]  # none was due


def test_a_response_without_tokens_has_no_first_advantage():
    sums = metrics.tally("answer", [1, 2], [[], [1]], ["", "x"], [False, False], [-1.0])
    assert metrics.shares(sums)["first_advantage/answers"] == -1.0
    assert metrics.shares(sums)["tokens_matched/answers"] == 0.25


# ------------------------------------------------------------------------- terms of the loss


def slow_terms(algo, model, groups, totals, tag_length):
    """The terms of a row, token by token in float64 over an ordinary model."""
    N, Nx = totals["tokens"], totals["expert_tokens"]
    policy = expert = rejected = 0.0
    for group in groups:
        for k, ids in enumerate(group.responses):
            logits = model(torch.tensor([[*group.prompt, *ids]])).logits[0].double() / 0.8
            table = torch.log_softmax(logits[len(group.prompt) - 1 : -1], -1)
            entropy = -(table.exp() * table).sum(-1).mean().item()
            for t, token in enumerate(ids):
                logp, p = table[t, token], table[t, token].exp()
                phi = (p * (1 - p)).item()
                if k < K:
                    A = float(group.advantages[k, t if t < group.advantages.shape[1] else -1])
                    if algo == "srft":
                        right = group.outcomes[k].total == 4
                        weight = 0.1 * math.exp(entropy) if right else -1.0
                        policy = policy - weight * logp / (N + Nx)
                    else:
                        Z = N + Nx if algo == "luffy" else N
                        policy = policy - A * (logp - logp.item()).exp() / Z
                    if A < 0:
                        rejected = rejected + phi * torch.sigmoid(logp) / N
                elif algo in ("toolupt", "toolupt_no_fgae"):
                    if group.example.kind == "tool_call" or t < tag_length:
                        expert = expert + phi * torch.sigmoid(-logp) / Nx
                elif algo == "toolupt_no_spo":
                    expert = expert - logp / Nx
                elif algo == "chord":
                    expert = expert - phi * logp / Nx
                elif algo == "luffy":
                    A = float(group.advantages[K, 0])
                    expert = expert - A * p / (p + 0.1) / (N + Nx)
                else:
                    A = float(group.advantages[K, 0])
                    expert = expert - 0.5 * math.exp(-entropy) * logp / Nx - A * p / (N + Nx)
    terms = {"policy": policy, "expert": expert}
    return terms | ({"rejected": rejected} if algo in ("toolupt", "toolupt_no_fgae") else {})


@pytest.mark.parametrize("algo", EXPERT_ROWS)
def test_norms_of_the_terms(algo, tiny, tmp_path):  # noqa: F811
    config, method, run, groups = rewarded(tiny, tmp_path, "--algo", algo)
    run.model, _ = modeling.load(tiny)
    totals = train.count_tokens(config, run, groups)
    found = metrics.term_norms(config, method, run.model, groups, totals)
    assert all(p.grad is None for p in run.model.parameters())
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).double()
    norms = {}
    for name, term in slow_terms(algo, plain, groups, totals, run.tag_length).items():
        grads = torch.autograd.grad(term, [*plain.parameters()], retain_graph=True)
        norms[name] = math.sqrt(sum(float(g.square().sum()) for g in grads))
    policy = norms.pop("policy")
    assert found.pop("grad_norm/policy") == pytest.approx(policy, rel=1e-4)
    assert found.keys() == {f"grad_norm_ratio/{name}" for name in norms}
    for name, norm in norms.items():
        assert norm and found[f"grad_norm_ratio/{name}"] == pytest.approx(norm / policy, rel=1e-4)


def test_rows_without_an_expert_have_the_policy_only(tiny, tmp_path):  # noqa: F811
    config, method, run, groups = rewarded(tiny, tmp_path, "--algo", "dapo_star")
    run.model, _ = modeling.load(tiny)
    totals = train.count_tokens(config, run, groups)
    found = metrics.term_norms(config, method, run.model, groups, totals)
    assert found.keys() == {"grad_norm/policy"} and found["grad_norm/policy"] > 0
    for group in groups:
        group.advantages = torch.zeros(K, group.width)
    found = metrics.term_norms(config, METHODS["toolupt"](), run.model, groups, totals)
    assert found["grad_norm/policy"] == 0 and math.isnan(found["grad_norm_ratio/rejected"])


@pytest.mark.parametrize("algo", ["toolupt", "srft"])
@pytest.mark.parametrize("more", [(), ("--gradient_checkpointing",)])
def test_measuring_leaves_the_step_alone(algo, more, tiny, tmp_path):  # noqa: F811
    command = [*frozen.flags(tiny, tmp_path, "--algo", algo, "--max_tokens_per_row", 1), *more]
    without, _ = frozen.one_step(*train.parse_args([*command, "--output_dir", f"{tmp_path}/a"]))
    norms = ["--term_norm_steps", "1", "--output_dir", f"{tmp_path}/b"]
    measured, _ = frozen.one_step(*train.parse_args([*command, *norms]))
    assert without.keys() == measured.keys()
    assert all(torch.equal(without[name], measured[name]) for name in without)
    a, b = (
        [json.loads(line) for line in (tmp_path / x / "metrics.jsonl").open()][-1] for x in "ab"
    )
    new = {name for name in b.keys() - a.keys() if not name.startswith("timing_s")}
    rejected = {"grad_norm_ratio/rejected"} if algo == "toolupt" else set()
    assert new == {"grad_norm/policy", "grad_norm_ratio/expert"} | rejected


def test_two_ranks_measure_what_one_does(tmp_path):
    """A step of real rollouts of the toy model; one micro-batch per rank holds the whole step."""
    flags = [
        "--algo",
        "toolupt",
        "--model_name_or_path",
        "toy_model",
        "--engine",
        "transformers",
        "--max_steps",
        "1",
        "--train_batch_size",
        "2",
        "--num_generations",
        "4",
        "--max_prompt_length",
        "2048",
        "--max_completion_length",
        "64",
        "--eval_size",
        "2",
        "--term_norm_steps",
        "1",
        "--temperature",
        "1.3",
    ]
    rows = []
    for ranks in (1, 2):
        program = [sys.executable]
        if ranks > 1:
            program += f"-m torch.distributed.run --nproc_per_node={ranks} --standalone".split()
        command = [*program, "train.py", *flags, "--output_dir", str(tmp_path / str(ranks))]
        environment = {name: v for name, v in os.environ.items() if name not in RANK_VARIABLES}
        environment["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(
            command, cwd=frozen.REPO, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / str(ranks) / "metrics.jsonl").read_text().splitlines()
        rows.append({**json.loads(lines[1]), **json.loads(lines[2])})
    names = ("start/", "grad_norm", "form/", "tokens_matched/", "first_advantage/", "accuracy/")
    numbers = [{n: v for n, v in row.items() if n.startswith(names)} for row in rows]
    assert numbers[0]["grad_norm/policy"] > 0 and numbers[0]["grad_norm_ratio/rejected"] > 0
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)


# --------------------------------------------------------------------------- where RL starts


@pytest.mark.parametrize("folder", ["tiny", "toy"])
def test_starting_point(folder, tiny, tmp_path, capsys):  # noqa: F811
    # in the random model every token is rare, and rarer still at a low temperature
    folder, temperature = (tiny, 0.05) if folder == "tiny" else (TOY, 0.8)
    flags = frozen.flags(folder, tmp_path, "--temperature", temperature)
    config, method = train.parse_args(flags)
    run = Run(config, method)
    run.model, _ = modeling.load(folder)
    found = metrics.starting_point(run)
    said = capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tag, body = [], []
    opening = defaultdict(list)
    for example in frozen.examples():  # four calls, two answers: all of them
        prompt = data.render(example, run.tokenizer)
        read = run.tokenizer(example.target, add_special_tokens=False, return_offsets_mapping=True)
        ids = [*read["input_ids"], run.tokenizer.eos_token_id]
        logits = plain(torch.tensor([[*prompt, *ids]])).logits[0].detach() / temperature
        table = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        first, last = len(f"<{example.kind}>"), example.target.index(f"</{example.kind}>")
        for t, token in enumerate(ids):
            start, end = [*read["offset_mapping"], (10**9, 10**9)][t]
            in_tag = start < first or last < end < 10**9
            (tag if in_tag else body).append(float(table[t, token]))
        p = math.exp(
            sum(
                float(table[t, ids[t]])
                for t, (start, _) in enumerate(read["offset_mapping"])
                if start < first
            )
        )
        opening[example.kind].append(p)
    assert found == {
        "start/tag_logp": pytest.approx(sum(tag) / len(tag), rel=1e-4),
        "start/body_logp": pytest.approx(sum(body) / len(body), rel=1e-4),
    }
    rare = {kind for kind, ps in opening.items() if sum(ps) / len(ps) < 1e-4}
    assert rare == ({"tool_call", "answer"} if folder == tiny else set())
    for kind in ("tool_call", "answer"):
        assert (f"begins a response with <{kind}>" in said) == (kind in rare)
    assert ("sft_dapo_star" in said) == bool(rare)


def test_a_tag_that_is_not_decoded_as_written_has_no_metric(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    config, method = train.parse_args(frozen.flags(tiny, tmp_path))
    run = Run(config, method)
    run.model, _ = modeling.load(tiny)
    monkeypatch.setattr(metrics, "tag_tokens", lambda *_: (set(), set()))
    assert [*metrics.starting_point(run)] == ["start/body_logp"]
    said = capsys.readouterr().out
    assert "elsewhere" in said and "in its tags" not in said


def test_step_0_says_it(tiny, tmp_path):  # noqa: F811
    frozen.one_step(*train.parse_args(frozen.flags(tiny, tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert rows[1]["step"] == 0 and rows[1]["start/tag_logp"] < 0 and "eval/accuracy" in rows[1]
