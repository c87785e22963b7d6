"""train.py, methods.py, run.py and tools/ in one process: every row of the table against slow loops, and what users meet.

The slow losses below are written from ToolUPT's equations and spec, one response and one token at a time, in float64
over an ordinary transformers model; the fast side is the gradient that the loop of train.py hands to its optimiser.
"""

import copy
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import frozen
import pytest
import torch
import torch.distributed as dist
from frozen import LIMIT, TOY, K, one_rank  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import data
import methods
import model as modeling
import records
import rewards
import rollout
import run as run_module
import start
import train
from methods import METHODS
from run import Run
from tools import audit

REAL = Path(__file__).resolve().parent.parent.parent / "shared/data/train/toolrl_rlla"
RL_ROWS = [name for name, row in METHODS.items() if issubclass(row, methods.Rollouts)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return frozen.tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


# ------------------------------------------------------------------------------- every row against slow loops


def slow_forward(model, prompt, response, temperature=0.8):
    """log pi and entropy of each response token from one ordinary forward pass."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
    logps, entropies = [], []
    for t, token in enumerate(response):
        log_p = torch.log_softmax(logits[len(prompt) + t - 1], 0)
        logps.append(log_p[token])
        entropies.append(-(log_p.exp() * log_p).sum())
    return logps, entropies


def slow_batch(model, tokenizer, asked, table, wanted, only_informative, temperature=0.8):
    """What a step trains on: for each prompt its rollouts, its expert and their outcome rewards."""
    by_prompt = {json.dumps(data.render(e, tokenizer)): e for e in frozen.examples()}
    batch = []
    for key in asked:
        example, prompt = by_prompt[key], json.loads(key)
        outcomes = [rewards.outcome(s.text, example.target).total for s in table[key]]
        if only_informative and len(set(outcomes)) == 1:
            continue
        if len(batch) == wanted:
            break
        rows = []
        for sample, outcome in zip(table[key], outcomes):
            logps, entropies = slow_forward(model, prompt, sample.token_ids, temperature)
            rows.append(
                SimpleNamespace(
                    ids=sample.token_ids, logps=logps, H=entropies, R=outcome, sampler=sample.logps
                )
            )
        ids = tokenizer(example.target, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        logps, entropies = slow_forward(model, prompt, ids, temperature)
        expert = SimpleNamespace(ids=ids, logps=logps, H=entropies, R=4.0)
        batch.append(SimpleNamespace(kind=example.kind, rows=rows, expert=expert))
    assert len(batch) == wanted
    return batch


def slow_group(values, std=True):
    """Eq. 2: (R - mean) / (Bessel std + 1e-6), 0 where all are equal."""
    mean = sum(values) / len(values)
    if max(values) == min(values):
        return [0.0] * len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [(v - mean) / (spread + 1e-6) if std else v - mean for v in values]


def slow_fgae(group):
    """Eqs. 13-17: per row a list of token advantages."""
    table = []
    for row in group.rows:
        table.append([])
        for t, token in enumerate(row.ids):
            right = (
                group.kind == "tool_call"
                and t < len(group.expert.ids)
                and token == group.expert.ids[t]
            )
            table[-1].append(max(4.0 if right else -3.0, row.R))
    values = [value for rewards_of_row in table for value in rewards_of_row]
    if max(values) == min(values):
        return [[0.0] * len(row) for row in table]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [[(v - mean) / (spread + 1e-6) for v in row] for row in table]


def slow_sequence(group, reward=lambda row: row.R):
    """Eq. 2's advantage on every token of a row."""
    advantages = slow_group([reward(row) for row in group.rows])
    return [[A] * len(row.ids) for A, row in zip(advantages, group.rows)]


def binary(row):
    return 1.0 if row.R == 4 else 0.0


def overlong(row):
    """DAPO's soft penalty with L_max = LIMIT and a cache of a quarter of it."""
    cache = LIMIT // 4
    return row.R + min(0.0, max(-1.0, ((LIMIT - cache) - len(row.ids)) / cache))


def ratio(logp):
    return torch.exp(logp - logp.detach())


def tokens_of(batch):
    return sum(len(row.ids) for group in batch for row in group.rows)


def expert_tokens_of(batch):
    return sum(len(group.expert.ids) for group in batch)


def slow_surrogate(batch, advantages_of, cap=None):
    """Eq. 18: token mean of -A r; with `cap`, times min(pi / pi_sampler, cap)."""
    total = 0.0
    for group in batch:
        for row, advantages in zip(group.rows, advantages_of(group)):
            for logp, A, sampler in zip(row.logps, advantages, row.sampler):
                weight = min(math.exp(logp.item() - sampler), cap) if cap else 1.0
                total = total - weight * A * ratio(logp)
    return total / tokens_of(batch)


def slow_grpo(batch, _):
    """Eq. 2: mean over responses of the mean over their tokens; binary reward."""
    total, N = 0.0, sum(len(group.rows) for group in batch)
    for group in batch:
        for row, advantages in zip(group.rows, slow_sequence(group, binary)):
            for logp, A in zip(row.logps, advantages):
                total = total - A * ratio(logp) / len(row.ids) / N
    return total


def slow_drgrpo(batch):
    """Dr.GRPO: A = R - mean on the binary reward, over the constant N * LIMIT."""
    total, N = 0.0, sum(len(group.rows) for group in batch)
    for group in batch:
        advantages = slow_group([binary(row) for row in group.rows], std=False)
        for row, A in zip(group.rows, advantages):
            for logp in row.logps:
                total = total - A * ratio(logp) / (N * LIMIT)
    return total


def slow_spo(batch, advantages_of, tag_length, beta=1.0, weighted=True):
    """Eqs. 19-22 with the plus sign; Eq. 20 unless `weighted`."""

    def term(logp, beta):
        p = math.exp(logp.item())
        return (p * (1 - p) if weighted else 1.0) * (1 - torch.sigmoid(beta * logp))

    chosen = rejected = 0.0
    for group in batch:
        for t, logp in enumerate(group.expert.logps):
            if group.kind == "tool_call" or t < tag_length:
                chosen = chosen + term(logp, beta)
        for row, advantages in zip(group.rows, advantages_of(group)):
            for logp, A in zip(row.logps, advantages):
                if A < 0:
                    rejected = rejected + term(logp, -beta)
    return chosen / expert_tokens_of(batch) + rejected / tokens_of(batch)


def slow_sft(batch, _=None):
    """Eq. 1."""
    return -sum(sum(group.expert.logps) for group in batch) / expert_tokens_of(batch)


def slow_mix(preference, policy, balance=0.3):
    """Eq. 23 at step 0 of a cycle that starts at balance_low = 0.3."""
    return balance * preference + (1 - balance) * policy


def slow_luffy(batch, _):
    """LUFFY: A = R - mean over rollouts and expert; -A r on rollouts, -A p / (p + 0.1) on the expert."""
    total = 0.0
    for group in batch:
        rows = [*group.rows, group.expert]
        for row, A in zip(rows, slow_group([row.R for row in rows], std=False)):
            for logp in row.logps:
                p = torch.exp(logp)
                total = total - A * (p / (p + 0.1) if row is group.expert else ratio(logp))
    return total / (tokens_of(batch) + expert_tokens_of(batch))


def slow_srft(batch, _, shaping=math.inf, std=True):
    """SRFT Eqs. 6-13, H the mean entropy of a row, detached; p in the expert's RL term, or p / (p + shaping)."""
    total, Z, Zx = 0.0, tokens_of(batch) + expert_tokens_of(batch), expert_tokens_of(batch)
    for group in batch:
        rows = [*group.rows, group.expert]
        advantages = slow_group([binary(row) for row in rows], std)
        for row, A in zip(rows, advantages):
            H = sum(h.item() for h in row.H) / len(row.H)
            for logp in row.logps:
                if row is group.expert:
                    p = torch.exp(logp)
                    f = p if shaping == math.inf else p / (p + shaping)
                    total = total - 0.5 * math.exp(-H) * logp / Zx - A * f / Z
                elif row.R == 4:
                    total = total - 0.1 * math.exp(H) * logp / Z
                else:
                    total = total + logp / Z
    return total


def slow_chord(batch, _, mu=0.1, phi=True):
    """(1 - mu) token-mean GRPO on the binary reward + mu SFT, in CHORD-phi with weights p (1 - p)."""
    sft = 0.0
    for group in batch:
        for logp in group.expert.logps:
            p = math.exp(logp.item())
            sft = sft - (p * (1 - p) if phi else 1.0) * logp
    policy = slow_surrogate(batch, lambda group: slow_sequence(group, binary))
    return (1 - mu) * policy + mu * sft / expert_tokens_of(batch)


SLOW = {
    "grpo": slow_grpo,
    "dapo": lambda b, _: slow_surrogate(b, lambda group: slow_sequence(group, overlong)),
    "dapo_star": lambda b, _: slow_surrogate(b, slow_sequence),
    "fg_dapo_star": lambda b, _: slow_surrogate(b, slow_fgae),
    "sft_dapo_star": lambda b, _: slow_surrogate(b, slow_sequence),
    "sft_fg_dapo_star": lambda b, _: slow_surrogate(b, slow_fgae),
    "luffy": slow_luffy,
    "srft": slow_srft,
    "chord": slow_chord,
    "toolupt": lambda b, n: slow_mix(slow_spo(b, slow_fgae, n), slow_surrogate(b, slow_fgae)),
    "toolupt_no_fgae": lambda b, n: slow_mix(
        slow_spo(b, slow_sequence, n), slow_surrogate(b, slow_sequence)
    ),
    "toolupt_no_spo": lambda b, n: slow_mix(slow_sft(b), slow_surrogate(b, slow_fgae)),
    "dapo --generation_batches 2": lambda b, _: SLOW["dapo"](b, _),
    "srft --srft_shaped": lambda b, _: slow_srft(b, _, shaping=0.1),
    "srft --srft_variant hpt": lambda b, _: slow_srft(b, _, shaping=0.1, std=False),
    "chord --no_chord_phi --chord_mu_peak 0.5 --chord_mu_decay 30": lambda b, _: slow_chord(
        b, _, mu=0.5, phi=False
    ),
    "dr_grpo": lambda b, _: slow_drgrpo(b),
    "toolupt --no_spo_phi --spo_beta 0.13": lambda b, n: slow_mix(
        slow_spo(b, slow_fgae, n, beta=0.13, weighted=False), slow_surrogate(b, slow_fgae)
    ),
    "toolupt --tis_cap 2": lambda b, n: slow_mix(
        slow_spo(b, slow_fgae, n), slow_surrogate(b, slow_fgae, cap=2.0)
    ),
}


def slow_bonus(batch, method):
    """The entropy of the rollouts, reduced like the policy loss."""
    rows = [row for group in batch for row in group.rows]
    if method == "dr_grpo":
        return sum(sum(row.H) for row in rows) / (len(rows) * LIMIT)
    if method == "grpo":
        return sum(sum(row.H) / len(row.H) for row in rows) / len(rows)
    return sum(sum(row.H) for row in rows) / tokens_of(batch)


def test_every_rl_row_has_a_slow_loss():
    assert {name.split()[0] for name in SLOW} == set(RL_ROWS)


def row_after_sft(row):
    """The row of a two-stage row's second stage."""
    own = METHODS[{"SftDapoStar": "dapo_star", "SftFgDapoStar": "fg_dapo_star"}[type(row).__name__]]
    return own(**{f.name: getattr(row, f.name) for f in fields(own) if f.init})


@pytest.mark.parametrize("method", SLOW)
def test_gradient_of_one_step_is_that_of_the_slow_loss(method, tiny, plain, tmp_path):
    """Float32 and shared prompts against float64, one response at a time; and the run's own audit."""
    config, row = train.parse_args(["--algo", *method.split(), *frozen.flags(tiny, tmp_path)])
    if hasattr(row, "first_stage"):  # the second stage alone
        config, row = replace(config, algo=config.algo.removeprefix("sft_")), row_after_sft(row)
    gradient, engine = frozen.one_step(config, row)

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = copy.deepcopy(plain).double()
    batch = slow_batch(
        model,
        tokenizer,
        engine.asked,
        engine.table,
        4,
        only_informative="dapo" == method.split()[0],
    )
    tag_length = len(tokenizer("<answer>", add_special_tokens=False)["input_ids"])
    loss = SLOW[method](batch, tag_length) - 0.05 * slow_bonus(batch, method)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert frozen.relative_difference(gradient, expected) < 1e-4

    logged = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[2])
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert logged["entropy"] == pytest.approx(slow_bonus(batch, "").item(), rel=1e-4)
    assert audit.audit(tmp_path / "out").startswith("16 responses agree")

    weights = [
        min(math.exp(logp.item() - sampler), 2.0)
        for group in batch
        for row in group.rows
        for logp, sampler in zip(row.logps, row.sampler)
    ]
    name = "sampling/importance_sampling_ratio"
    assert (f"{name}/mean" in logged) == ("tis_cap" in method)
    if "tis_cap" in method:
        assert logged[f"{name}/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-4)
    if method.split()[0] == "dapo":
        size = 8 if "generation_batches" in method else 4
        kept = sum(differs(engine.table[key], key, tokenizer) for key in engine.asked)
        assert len(engine.asked) == size * logged["rounds"]
        assert logged["frac_groups_kept"] == pytest.approx(kept / len(engine.asked))
        assert 0 < logged["frac_groups_kept"] < 1
    else:
        assert logged["frac_groups_kept"] == logged["rounds"] == 1


def differs(samples, key, tokenizer) -> bool:
    """Whether the outcome rewards of a frozen prompt's samples differ."""
    [target] = [e.target for e in frozen.examples() if json.dumps(data.render(e, tokenizer)) == key]
    return len({rewards.outcome(sample.text, target).total for sample in samples}) > 1


def test_dynamic_sampling_looks_at_the_outcomes():
    """Groups whose outcomes differ are kept, whatever the length penalty makes of their rewards."""
    outcome = rewards.outcome(
        '<tool_call>\n{"name": "f", "params": {}}\n</tool_call>', "<answer>no</answer>"
    )
    totals = [[4.0, 3.5], [3.5, 2.0], [4.0, 4.0]]
    kept = []
    for row in totals:
        group = methods.Group(None, [], [], 100, False, 0, rewards=[4.0, 3.0])
        group.outcomes = [replace(outcome, total=total) for total in row]
        kept.append(METHODS["dapo"]().keep(group))
    assert kept == [True, True, False]
    others = {name for name, row in METHODS.items() if getattr(row, "keep", None)}
    assert others == {"dapo"}


def test_the_frozen_step_has_every_case(tiny):
    """Calls and answers, mixed and equal groups, equal outcomes with unequal token rewards, capped TIS weights."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = frozen.examples()
    table = list(frozen.answers(tokenizer, rows).values())
    R = [[rewards.outcome(s.text, e.target).total for s in group] for e, group in zip(rows, table)]
    tied = [len(set(group)) == 1 for group in R]
    assert tied == [False, True, False, False, False, True]
    assert {e.kind for e in rows} == {"tool_call", "answer"}
    assert {4.0, -3.0} < {r for group in R for r in group}
    assert any(s.token_ids[0] == data.target_ids(rows[1], tokenizer)[0] for s in table[1])
    assert LIMIT * 3 / 4 < frozen.LONG < LIMIT  # the overlong penalty is at work


def test_sft_gradient_is_that_of_equation_1(tiny, plain, tmp_path):
    config = train.parse_args(["--algo", "sft", *frozen.flags(tiny, tmp_path)])
    gradient, _ = frozen.one_step(*config)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), copy.deepcopy(plain).double()
    examples = Run(*config).batch(0)
    total, count = 0.0, 0
    for _, example in examples:
        prompt, target = data.render(example, tokenizer), data.target_ids(example, tokenizer)
        logps, _ = slow_forward(model, prompt, target, temperature=1.0)
        total, count = total - sum(logps), count + len(target)
    (total / count).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert frozen.relative_difference(gradient, expected) < 1e-4


@pytest.mark.parametrize("method", ["toolupt", "grpo", "luffy"])
def test_gradient_does_not_depend_on_the_split_or_the_packing(method, tiny, tmp_path):
    command = ["--algo", method, *frozen.flags(tiny, tmp_path)]
    reference, _ = frozen.one_step(*train.parse_args([*command, "--max_tokens_per_row", "100000"]))
    for more in (
        ["--max_tokens_per_row", "1"],
        ["--max_tokens_per_row", "700", "--gradient_checkpointing"],
        ["--max_tokens_per_row", "700", "--no_share_prefix"],
    ):
        gradient, _ = frozen.one_step(*train.parse_args(command + more))
        assert frozen.relative_difference(gradient, reference) < 1e-5, more


def test_compiled_layers_have_the_same_gradient(tiny, tmp_path):
    command = [*frozen.flags(tiny, tmp_path), "--gradient_checkpointing"]
    reference, _ = frozen.one_step(*train.parse_args(command))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gradient, _ = frozen.one_step(*train.parse_args([*command, "--torch_compile"]))
    assert frozen.relative_difference(gradient, reference) < 1e-5
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    )  # before and after attention, two lengths


def test_compiling_needs_a_compiler(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"--torch_compile: no C\+\+ compiler"):
        config, _ = train.parse_args([*frozen.flags(tiny, tmp_path), "--torch_compile"])
        start.check_machine(config, 1)


def test_micro_batches_keep_every_record_and_the_budget(tiny, tmp_path, monkeypatch):
    config, method = train.parse_args(frozen.flags(tiny, tmp_path))
    run = Run(config, method)
    batch = [run.demonstration(example) for example in frozen.examples()]
    sizes = [run_module.tokens_of(record) for record in batch]
    for budget in (1, max(sizes), 2 * max(sizes), sum(sizes)):
        config.max_tokens_per_row = budget
        parts = run_module.micro_batches(config, batch)
        assert sorted(id(x) for part in parts for x in part) == sorted(map(id, batch))
        loads = [sum(map(run_module.tokens_of, part)) for part in parts]
        assert all(load <= budget or len(p) == 1 for load, p in zip(loads, parts)), (budget, loads)
    assert len(parts) == 1
    # another rank needs one pass more: so do all
    monkeypatch.setattr(run_module, "all_max", lambda bins: bins + 1)
    parts = run_module.micro_batches(config, batch)
    assert len(parts) == 2 and all(parts) and sum(map(len, parts)) == len(batch)
    assert run_module.micro_batches(config, []) == [[], []]
    config.share_prefix = False
    parts = run_module.micro_batches(config, batch)
    assert sorted(map(len, parts)) == [0] + [1] * len(batch)


def test_a_rank_without_records_adds_nothing(tiny, plain):
    """Its forward pass is part of the graph, so that its backward pass joins the others'."""
    model = copy.deepcopy(plain)
    logps, entropy, mask = run_module.forward(train.Config(), model, [], 1.0)
    assert len(logps) == len(entropy) == len(mask) == 0
    totals = {"tokens": 1, "responses": 1, "expert_tokens": 1, "max_length": 9, "tag_length": 1}
    for name, row in METHODS.items():
        rows = methods.rows_of([], mask)
        loss, stats = row().loss(rows, logps, entropy, totals, 0)
        loss.backward(retain_graph=True)
        assert loss == 0 and all(float(value) == 0 for value in stats.values()), name
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kinds", [("tool_call",), ("answer",), ("tool_call", "answer")])
def test_a_kind_that_no_example_has_gets_no_accuracy(kinds, tiny, tmp_path):
    config, method = train.parse_args(frozen.flags(tiny, tmp_path))
    run = Run(config, method)
    toy = data.load("toy", "test")
    run.eval_examples = [next(e for e in toy if e.kind == kind) for kind in kinds]
    said = [[rollout.Sample([], [], e.target, "stop")] for e in run.eval_examples]  # all right
    run.engine = SimpleNamespace(generate=lambda prompts, **_: said)
    scores = train.evaluate(config, run)
    assert scores == {
        "eval/accuracy": 1,
        "eval/reward": 4,
        **{f"eval/{kind}_accuracy": 1 for kind in kinds},
    }


@pytest.mark.parametrize("method", ["grpo", "toolupt", "chord"])
def test_entropy_bonus_has_a_gradient_of_its_own(method):
    """Without advantages the loss is the bonus: -coef/N on rollout tokens, 0 on experts and padding."""
    no_expert_loss = {"toolupt": {"balance_low": 0.0}, "chord": {"chord_mu": 0.0}}.get(method, {})
    row = METHODS[method](entropy_coef=0.5, **no_expert_loss)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    is_expert = torch.tensor([False, False, True])
    if method == "grpo":  # which has no expert rows
        mask[2], is_expert[2] = False, False
    flags = torch.zeros(3, dtype=torch.bool)
    rows = methods.Rows(mask, is_expert, flags, flags, torch.zeros(3, 3), torch.zeros(3, 3))
    logps = torch.full((3, 3), -1.0, requires_grad=True)
    entropy = torch.full((3, 3), 0.7, requires_grad=True)
    totals = {"tokens": 4, "responses": 2, "expert_tokens": 2, "tag_length": 1}
    loss, stats = row.loss(rows, logps, entropy, totals, 0)
    loss.backward()
    per_row = [[1 / 6] * 3, [1 / 2, 0, 0], [0] * 3]
    per_token = [[1 / 4] * 3, [1 / 4, 0, 0], [0] * 3]
    expected = -0.5 * torch.tensor(per_row if method == "grpo" else per_token)
    assert torch.allclose(entropy.grad, expected)
    assert logps.grad.abs().max() == 0
    assert float(stats["entropy"]) == pytest.approx(0.7)


# --------------------------------------------------------------------------------------- schedules and data order


def test_learning_rate_meets_the_oracles():
    oracle = json.loads((Path(__file__).parent / "oracles/train.json").read_text())
    for case in oracle["learning_rate"]:
        steps = case["config"].pop("max_steps")
        config = train.Config(**case["config"])
        for step, value in zip(case["steps"], case["values"]):
            rate = train.learning_rate_at(config, step, steps, config.learning_rate)
            assert rate == pytest.approx(value, rel=1e-5, abs=1e-15), (case["id"], step)


def test_learning_rate_of_toolupt_is_constant():
    config, method = train.parse_args(["--algo", "toolupt"])
    rate = lambda step: train.learning_rate_at(config, step, method.max_steps, config.learning_rate)
    assert {rate(step) for step in range(600)} == {1e-6}


def test_balance_cycles_or_is_a_number():
    balance = lambda row, step: row.schedule(step)["balance"]
    toolupt, chord = METHODS["toolupt"], METHODS["chord"]
    for step in range(600):
        phase = step % 300
        rising = 0.02 + 0.28 * phase / 100
        falling = 0.3 - 0.28 * (phase - 100) / 200
        assert balance(toolupt(), step) == pytest.approx(min(rising, falling)), step
        assert balance(chord(), step) == 0.1
    assert balance(toolupt(balance_low=0.25, balance_high=0.25), 77) == 0.25
    assert METHODS["dapo_star"]().schedule(77) == {}
    chord_mu = chord(chord_mu_decay=30, chord_mu_peak=0.9, chord_mu=0.05)
    for step in range(40):
        falling = 0.05 + 0.85 * (1 + math.cos(math.pi * min(step, 30) / 30)) / 2
        assert balance(chord_mu, step) == pytest.approx(falling), step


def test_ranks_get_equal_shares_of_a_batch_s_long_prompts():
    """Each of two ranks gets one of the two longest, one of the next two, and so on; nothing is lost or doubled."""
    lengths = [70, 10, 9000, 40, 8000, 30, 7000, 6000]
    examples = [
        data.Example(
            str(i), [], [], "x" * n, [], "<answer>ok</answer>", "answer", system="__TOOL_DESCS__"
        )
        for i, n in enumerate(lengths)
    ]
    parts = []
    for rank in range(2):
        run = object.__new__(Run)
        run.config, run.examples = train.Config(train_batch_size=8), examples
        run.rank, run.world = rank, 2
        parts.append([len(example.query) for _, example in run.batch(0)])
    assert sorted(parts[0] + parts[1]) == sorted(lengths)
    for pair in ((9000, 8000), (7000, 6000), (70, 40), (30, 10)):
        assert len({*pair} & {*parts[0]}) == len({*pair} & {*parts[1]}) == 1
    assert abs(sum(parts[0]) - sum(parts[1])) <= 50


def test_batches_are_a_function_of_seed_and_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "characters", lambda example: example % 3)

    def order(seed, world, position):
        """Ids of one batch, by rank; a fresh object each time: nothing but (seed, step) is known."""
        parts = []
        for rank in range(world):
            run = object.__new__(Run)
            run.config = train.Config(seed=seed, train_batch_size=4)
            run.examples, run.rank, run.world = list(range(10)), rank, world
            parts.append(run.batch(position))
        return parts

    whole = [order(3, 1, step)[0] for step in range(5)]
    for step in (4, 0, 2):  # in any order, on one, two or four ranks
        for world in (2, 4):
            parts = order(3, world, step)
            assert (
                sorted(chain(*parts)) == whole[step]
            )  # by place: nothing is lost, doubled or moved
            assert {len(part) for part in parts} == {4 // world}
    stream = [example for _, example in chain(*whole)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:] and stream[:10] != list(range(10))
    run = object.__new__(Run)
    run.config, run.examples = train.Config(seed=3, train_batch_size=4), list(range(10))
    run.rank, run.world = 0, 1
    assert run.batch(1, size=8) == [*enumerate(stream)][8:16]  # a larger batch of the same stream
    assert [order(4, 1, step)[0] for step in range(5)] != whole


def test_request_seeds_differ_by_prompt_and_step_only(tiny, tmp_path):
    config, method = train.parse_args(frozen.flags(tiny, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    run = Run(config, method)
    run.engine = frozen.Frozen(tokenizer, frozen.answers(tokenizer, frozen.examples()))
    seeds = {}
    for position in (0, 1):
        for world in (1, 2):
            run.world = world
            run_seeds = []
            for run.rank in range(world):
                groups = train.roll_out(config, method, run, run.batch(position))
                run_seeds += [(group.place, group.seed) for group in groups]
            seeds[position, world] = [seed for _, seed in sorted(run_seeds)]
    assert seeds[0, 1] == seeds[0, 2] and seeds[1, 1] == seeds[1, 2]
    assert len({*seeds[0, 1], *seeds[1, 1]}) == 8


# ------------------------------------------------------------------------------------------------ the command line


def test_defaults_of_toolupt_are_table_7():
    knobs = start.settings(*train.parse_args(["--algo", "toolupt"]))
    table_7 = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "train_batch_size": 256,
        "num_generations": 8,
        "max_steps": 600,
        "temperature": 1.0,
        "max_prompt_length": 8192,
        "max_completion_length": 1024,
        "entropy_coef": 3e-4,
        "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
    }
    assert {name: knobs[name] for name in table_7} == table_7
    sft, row = train.parse_args(["--algo", "sft"])
    assert (sft.learning_rate, sft.lr_scheduler_type, row.max_steps) == (1e-5, "cosine", 3000)
    _, two = train.parse_args(["--algo", "sft_dapo_star"])
    assert (two.sft_learning_rate, two.sft_max_steps, two.max_steps) == (1e-5, 3000, 600)


def test_help_is_that_of_one_method(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--algo", "grpo", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "sampled responses per prompt; ToolUPT Table 7 (default: 8)" in out
    assert "4bit: frozen weights in NF4 (QLoRA) (default: none)" in out
    assert "(default: runs/grpo)" in out
    for other in ("--spo_beta", "--overlong", "--mcts_depth", "--sft_max_steps"):
        assert other not in out


def test_precedence_is_default_row_flag():
    _, method = train.parse_args([])
    assert method.num_generations == 8
    config, method = train.parse_args(["--algo", "luffy"])
    assert method.num_generations == 7 and config.output_dir == "runs/luffy"
    _, method = train.parse_args(["--num_generations", "5", "--algo", "luffy"])
    assert method.num_generations == 5
    config, _ = train.parse_args(["--no_log_rollouts", "--train_file", "toy", "toy:hard-train"])
    assert config.log_rollouts is False and config.train_file == ["toy", "toy:hard-train"]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--learning_rat", "1"], "--learning_rat; did you mean --learning_rate?"),
        (["--algo", "toolup"], "toolup"),
        (["--max_steps", "ten"], "--max_steps"),
        (["@missing.args"], "missing.args"),
        (["--max_steps", "7", "eight"], "eight"),
        (["--max_step", "7"], "--max_step"),
    ],
)
def test_a_misspelt_flag_is_named(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(argv)
    assert stop.value.code != 0
    assert named in capsys.readouterr().err


def test_list_prints_every_row_and_what_differs(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--list"])
    assert not stop.value.code
    lines = capsys.readouterr().out.split("\n")
    for name, row in train.ROWS.items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(row.__doc__.split("\n")[0])
        block = lines[lines.index(line) + 1 :]
        block = block[: next(i for i, line in enumerate(block) if not line.startswith(" "))]
        words = [line.split(maxsplit=1) for line in block]
        own = {f.name: f for f in fields(row) if f.init and f.name in row.__annotations__}
        mixin = ["sft_max_steps", "sft_learning_rate"] * (methods.AfterSft in row.__bases__)
        flags = [flag for flag, _ in words]
        assert flags == [f"--{name}" for name in [*row.defaults, *own, *mixin]], name
        for knob, (value, source) in row.defaults.items():
            if (name, knob) == ("itool", "learning_rate"):
                value = 1e-6  # SimPO's, the default loss
            assert [text.split(maxsplit=1) for flag, text in words if flag == f"--{knob}"] == [
                [str(value), source]
            ]


def test_flags_from_a_file_with_comments(tmp_path):
    file = tmp_path / "my.args"
    file.write_text("# a comment\n--max_steps 7   # steps\n\n--train_file toy toy:valid\n")
    config, method = train.parse_args([f"@{file}", "--seed", "3"])
    assert (method.max_steps, config.train_file, config.seed) == (7, ["toy", "toy:valid"], 3)
    outer = tmp_path / "outer.args"
    outer.write_text(f"@{file}\n--algo luffy\n--seed 5")
    config, method = train.parse_args([f"@{outer}"])
    assert (config.algo, method.max_steps, config.seed) == ("luffy", 7, 5)


@pytest.mark.parametrize(
    "argv, named, owner",
    [
        ("--algo grpo --balance_low 0.3", "balance_low", "toolupt"),
        ("--algo chord --balance_up=3", "balance_up", "toolupt_no_fgae"),
        ("--algo luffy --tis-cap 2", "tis_cap", "dapo"),
        ("--algo dapo_star --alignment lcs", "alignment", "fg_dapo_star"),
        ("--algo toolupt_no_fgae --alignment lcs", "alignment", "toolupt_no_spo"),
        ("--algo toolupt_no_spo --spo_beta 2", "spo_beta", "toolupt_no_fgae"),
        ("--algo toolupt --srft_shaped", "srft_shaped", "srft"),
        ("--algo luffy --srft_variant hpt", "srft_variant", "srft"),
        ("--algo toolupt --no_chord_phi", "no_chord_phi", "chord"),
        ("--algo dapo_star --generation_batches 3", "generation_batches", "dapo"),
        ("--algo toolupt --overlong 0.2", "overlong", "dapo"),
        ("--algo grpo --tis_cap 2", "tis_cap", "toolupt"),
        ("--algo sft --num_generations 4", "num_generations", "grpo"),
        ("--algo sft --sft_max_steps 9", "sft_max_steps", "sft_dapo_star"),
        ("--algo toolupt --sft_learning_rate 1", "sft_learning_rate", "sft_fg_dapo_star"),
        ("--algo grpo --mcts_depth 4", "mcts_depth", "itool"),
    ],
)
def test_a_flag_of_another_row_is_rejected(argv, named, owner, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(argv.split())
    assert stop.value.code != 0
    error = capsys.readouterr().err
    [(owners, given)] = re.findall(
        rf"error: --{named} belongs to --algo (.*), not to (\S+)\n", error
    )
    assert given == argv.split()[1] and owner in owners.split(", ")
    file = tmp_path / "all.args"  # a file may serve several methods
    file.write_text(argv.replace(" --", "\n--"))
    train.parse_args([f"@{file}"])
    assert f"ignored: --{named}\n" in capsys.readouterr().out


def test_lora_alpha_without_adapters_is_an_error_where_it_is_typed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--lora_alpha", "64"])
    assert "--lora_alpha has no effect here: all weights" in capsys.readouterr().err
    file = tmp_path / "my.args"
    file.write_text("--lora_alpha 64")  # a recipe may serve both
    assert train.parse_args([f"@{file}"])[0].lora_alpha == 64
    for more in (["--lora_rank", "8"], ["--algo", "itool"]):
        assert train.parse_args(["--lora_alpha", "64", *more])[0].lora_alpha == 64


@pytest.mark.parametrize(("flags", "rate"), [([], "1e-06"), (["--preference", "dpo"], "3e-07")])
def test_help_prints_the_rate_that_itool_computes(flags, rate, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--algo", "itool", *flags, "--help"])
    said = rf"--learning_rate float\s[^-]*\(default: {rate}\)"
    assert re.search(said, capsys.readouterr().out)


def test_a_closed_pipe_ends_the_list_quietly():
    command = [sys.executable, str(frozen.REPO / "train.py"), "--list"]
    listing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    listing.stdout.close()  # as `| head` does
    with listing:
        assert listing.stderr.read() == ""
    assert listing.returncode == -signal.SIGPIPE


@pytest.mark.parametrize("flag", ["reward", "advantage", "loss", "expert", "balance", "stages"])
def test_a_method_is_chosen_by_its_name_alone(flag, tmp_path, capsys):
    """Even in a file: no row has such a flag, iTool's --stages aside."""
    file = tmp_path / "old.args"
    file.write_text(f"--{flag} x")
    for argv in ([f"--{flag}", "x"], [f"@{file}"]):
        if flag != "stages" or argv[0][0] != "@":
            with pytest.raises(SystemExit):
                train.parse_args(["--algo", "toolupt", *argv])
            assert f"--{flag}" in capsys.readouterr().err


def test_announcement_says_what_will_happen():
    text = start.announce(*train.parse_args([]), 8)
    assert "learning_rate = 1e-06" in text and METHODS["toolupt"].__doc__.split("\n")[0] in text
    assert "8 rank(s)" in text and f"{256 * 8192 + 256 * (8 + 1) * 1024:,} tokens" in text
    assert "output: runs/toolupt" in text and "data: the toy world" in text
    text = start.announce(*train.parse_args(["--algo", "grpo", "--train_file", "a", "b:c@9"]), 1)
    assert f"{256 * 8192 + 256 * 8 * 1024:,} tokens" in text and "\ndata: a b:c@9\n" in text


# ------------------------------------------------------------------------------------------------------- bad input


def refusal(call, *arguments) -> str:
    """The one line that a user reads."""
    with pytest.raises((ValueError, OSError, ImportError)) as error:
        call(*arguments)
    text = str(error.value)
    assert text and "\n" not in text, text
    return text


@pytest.mark.parametrize(
    "argv, named",
    [
        ("--alignment fuzzy", "--alignment"),
        ("--lr_scheduler_type linear", "--lr_scheduler_type"),
        ("--engine sglang", "--engine"),
        ("--report_to mlflow", "--report_to"),
        ("--quant 8bit", "--quant"),
        ("--quant 4bit", "--lora_rank"),
        ("--max_steps 0", "--max_steps"),
        ("--train_batch_size 0", "--train_batch_size"),
        ("--max_completion_length 0", "--max_completion_length"),
        ("--max_tokens_per_row 0", "--max_tokens_per_row"),
        ("--num_generations 1", "--num_generations"),
        ("--temperature 0", "--temperature"),
        ("--warmup_ratio 2", "--warmup_ratio"),
        ("--max_logp_difference -1", "--max_logp_difference"),
        ("--tis_cap -1", "--tis_cap"),
        ("--spo_beta 0", "--spo_beta"),
        ("--balance_high 1.5", "--balance_high"),
        ("--balance_low 0.5", "--balance_low"),
        ("--balance_up 0", "--balance_up"),
        ("--algo chord --chord_mu_decay -1", "--chord_mu_decay"),
        ("--algo chord --chord_mu 2", "--chord_mu"),
        ("--algo chord --chord_mu 0.5 --chord_mu_warmup 10", "--chord_mu_peak 0.1 is below"),
        ("--algo srft --srft_variant code", "--srft_variant"),
        ("--algo dapo --generation_batches 0", "--generation_batches"),
        ("--algo dapo --overlong 2", "--overlong"),
        ("--algo dapo --overlong 0.0001", "--overlong"),
        ("--algo sft --max_steps 0", "--max_steps"),
        ("--algo sft_dapo_star --sft_max_steps 0", "--sft_max_steps"),
        ("--algo sft_dapo_star --num_generations 1", "--num_generations"),
        ("--algo sft_dapo_star --tis_cap -1", "--tis_cap"),
        ("--eval_fraction 0", "--eval_file"),
        ("--eval_fraction 1", "--eval_file"),
        ("--save_steps 0", "--save_steps"),
        ("--save_total_limit -1", "--save_total_limit"),
        ("--max_grad_norm 0", "--max_grad_norm"),
        ("--lora_rank -1", "--lora_rank"),
        ("--algo chord --chord_mu_peak 0.9", "--chord_mu is constant; give a --chord_mu_decay"),
        ("--algo itool --stages warmup --learning_rate 1e-4", "--warmup_learning_rates"),
        ("--eval_size 0", "--eval_size"),
    ],
)
def test_bad_settings_are_named_before_anything_is_loaded(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(argv.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: error: ") and named in error


def test_a_batch_that_the_ranks_cannot_share_is_named():
    text = refusal(start.check_machine, train.Config(train_batch_size=10), 4)
    assert "--train_batch_size 10 is not divisible by the 4 ranks; take 8" in text


@pytest.mark.parametrize("algo", train.ROWS)
def test_every_row_is_a_good_setting(algo):
    start.check_machine(train.parse_args(["--algo", algo])[0], 8)


@pytest.mark.parametrize(
    "name", ["demo", "one-gpu", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.1-8b"]
)
def test_every_recipe_serves_every_row(name, monkeypatch):
    """The commands in recipes/ are read; a recipe leaves what the methods differ in to --algo."""
    monkeypatch.chdir(frozen.REPO)
    for algo, row in METHODS.items():
        config, method = train.parse_args([f"@recipes/{name}.args", "--algo", algo])
        start.check_machine(config, 8)
        fixed = [knob for knob in row.defaults if knob != "learning_rate"]
        assert all(getattr(config, knob) == row.defaults[knob][0] for knob in fixed)
        plain, free = (
            row(),
            ("max_steps", "sft_max_steps", "sft_learning_rate", "balance_up", "balance_down"),
        )
        for f in fields(row):
            assert f.name in free or getattr(method, f.name) == getattr(plain, f.name)
    assert name in ("demo", "one-gpu") or config.train_file[0].startswith("hermes:")


def broken_folder(tiny, tmp_path, *gone) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    for name in gone:
        for file in folder.glob(name):
            file.unlink()
    return folder


def test_bad_data_is_named(tiny, tmp_path):
    def refuse(file):
        return refusal(Run, *train.parse_args([*command, "--train_file", str(file)]))

    command = frozen.flags(tiny, tmp_path)
    assert "nowhere.json" in refuse("nowhere.json")
    assert "nowhere.json" in refuse("xlam:nowhere.json")
    assert "unknown" in refuse("toy:trian") and "trian" in refuse("toy:trian")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl holds no rows" in refuse(empty)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('[{"text": "hello"}]')
    assert "wrong.json" in refuse(f"xlam:{wrong}")
    refuse(wrong)
    wrong.write_text("{not json")
    assert "wrong.json" in refuse(wrong)
    text = refusal(Run, *train.parse_args([*command, "--max_prompt_length", "20"]))
    assert "--max_prompt_length" in text
    assert "--train_batch_size" in refusal(
        Run, *train.parse_args([*command, "--train_batch_size", "7"])
    )


def test_bad_models_are_named(tiny, tmp_path):
    def refuse(folder):
        return refusal(Run, *train.parse_args([*command, "--model_name_or_path", str(folder)]))

    command = frozen.flags(tiny, tmp_path)
    assert "no such folder" in refuse(tmp_path / "gone")
    assert "tokenizer" in refuse(broken_folder(tiny, tmp_path / "1", "tokenizer*"))
    assert "chat template" in refuse(broken_folder(tiny, tmp_path / "2", "chat_template*"))
    assert "no config.json" in refuse(broken_folder(tiny, tmp_path / "3", "config.json"))
    assert "safetensors" in refuse(broken_folder(tiny, tmp_path / "4", "*.safetensors"))
    text = refusal(Run, *train.parse_args([*command, "--max_prompt_length", "9000"]))
    assert "reads 4096 tokens" in text and "--max_prompt_length 9000" in text


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": None},
        {"hidden_size": "64"},
        {"layer_types": ["full_attention"]},
        {"rope_parameters": {"rope_type": "nope"}},
        {"hidden_act": "nope"},
        {"dtype": "float99"},
    ],
)
def test_a_value_of_config_json_that_cannot_be_is_one_line(change, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    text = refusal(Run, *train.parse_args(frozen.flags(tmp_path / "model", tmp_path)))
    assert text.startswith(f"{tmp_path}/model: correct its config.json (") and "\n" not in text


def test_rows_without_an_expert_response_are_rejected(tiny, tmp_path):
    command = frozen.flags(tiny, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    file = tmp_path / "bare.jsonl"
    for target, why in (
        ("<answer>\n</answer>", "the target"),
        ("", "no target, the expert response"),
        (None, "no target, the expert response"),
    ):
        lines = [*rows[:4], {**rows[4], "target": target}]
        file.write_text("".join(json.dumps(row) + "\n" for row in lines))
        text = refusal(Run, *train.parse_args([*command, "--train_file", f"jsonl:{file}"]))
        assert "row 5" in text and why in text


def test_sft_without_validation_data_is_refused(tiny, tmp_path):
    recipe = tmp_path / "frozen.args"
    command = [*frozen.flags(tiny, tmp_path), "--algo", "sft"]
    recipe.write_text(re.sub(r"--eval_file \S+", "", recipe.read_text()))
    text = refusal(Run, *train.parse_args([*command, "--eval_fraction", "0.01"]))
    assert "a part would be empty" in text and "--eval_file" in text


def test_a_mistake_of_the_second_stage_ends_the_first(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run_sft", lambda *_: pytest.fail("SFT ran first"))
    for name in ("checkpoint-2", "checkpoint-2-state"):
        (tmp_path / "out" / name).mkdir(parents=True)
    command = ["--algo", "sft_dapo_star", *frozen.flags(tiny, tmp_path)]
    assert "checkpoints of steps [2]" in refusal(train.train, *train.parse_args(command))


def test_a_hub_name_out_of_reach_is_named_at_once(tiny, tmp_path, monkeypatch):
    def unreachable(address, timeout):
        assert timeout <= 5 and address[1] == 443
        raise OSError("Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(modeling.socket, "create_connection", unreachable)
    monkeypatch.setattr(modeling.AutoTokenizer, "from_pretrained", None)  # which would retry
    flags = [*frozen.flags(tiny, tmp_path), "--model_name_or_path", "nobody/nothing-of-this-name"]
    text = refusal(Run, *train.parse_args(flags))
    assert "nobody/nothing-of-this-name: no such folder" in text and "Name or service" in text


def test_missing_vllm_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = train.parse_args([*frozen.flags(tiny, tmp_path), "--engine", "vllm"])
    text = refusal(train.train, *config)
    assert "vllm" in text and "--engine transformers" in text


def test_ranks_wait_for_hours():
    """For a save, or for each other's searches; torch's own limit is half an hour."""
    own = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    assert own == start.PATIENCE and own > timedelta(hours=12)


def test_a_full_disk_stops_the_run_before_the_first_step(tiny, tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    asked = []
    monkeypatch.setattr(train, "roll_out", lambda *a: asked.append(a))
    monkeypatch.setattr(train, "evaluate", lambda *a: {"eval/accuracy": 0.0})
    text = refusal(train.train, *train.parse_args(frozen.flags(tiny, tmp_path)))
    assert "GB are free" in text and "--output_dir" in text
    assert not asked, "training began before the disk was looked at"


def test_the_disk_must_hold_the_checkpoints_of_both_stages(tiny, tmp_path, monkeypatch):
    """Before the first stage loads: its three and its best, and the second's two."""
    flags = "--algo sft_dapo_star --sft_max_steps 300 --max_steps 200 --save_total_limit 2"
    command = train.parse_args(frozen.flags(tiny, tmp_path, *flags.split()))
    weights = AutoModelForCausalLM.from_pretrained(tiny).num_parameters()
    needed = int(1.05 * (6 * 4 + 5 * 12) * weights)
    usage = SimpleNamespace(total=10**12, used=0, free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = refusal(train.train, *command)
    assert "3 checkpoints of" in text and "2 checkpoints of" in text
    assert text.count("checkpoint-best of") == 1
    usage.free = needed + 2
    start.check_room(train.stages_of(*command))


@pytest.mark.parametrize(
    ("flags", "there", "count"),
    [
        ("--algo sft --max_steps 250 --save_total_limit 0", [], 3),
        ("--algo grpo --max_steps 250 --save_total_limit 0", [100], 2),
        ("--algo grpo --max_steps 900 --save_total_limit 4", [], 5),
        ("--algo grpo --max_steps 900 --save_total_limit 4", [300, 400, 500, 600], 1),
        ("--algo grpo --max_steps 900 --save_total_limit 1", [300, 400, 500], 1),
        ("--algo grpo --max_steps 200 --save_total_limit 4", [], 2),
        ("--algo grpo --max_steps 200 --save_total_limit 2", [100, 200], 0),
        ("--algo itool --stages warmup", [], 1),
    ],
)
def test_checkpoints_that_a_run_will_add(flags, there, count):
    command = train.parse_args([*flags.split(), "--save_steps", "100"])
    assert start.checkpoints_to_come(*command, there) == count


def test_resuming_from_nowhere_is_named(tiny, tmp_path):
    command = frozen.flags(tiny, tmp_path)
    text = refusal(
        train.train,
        *train.parse_args([*command, "--resume_from_checkpoint", str(tmp_path / "checkpoint-5")]),
    )
    assert "checkpoint-5-state" in text


# -------------------------------------------------------------------------------------- real rollouts of a tiny model


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def rollouts_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]


def noisy_rewards(monkeypatch):
    """A random model earns -3 always; here even tokens earn more, so that there is something to learn."""
    real = rewards.outcome

    def outcome(text, target):
        result = real(text, target)
        return type(result)(**{**vars(result), "total": float(len(text) % 5) - 3})

    monkeypatch.setattr(rewards, "outcome", outcome)


def test_the_run_stops_when_the_engine_keeps_old_weights(tiny, tmp_path, monkeypatch):
    real, calls = train.sync, []

    def only_once(run):
        if not calls:
            real(run)
        calls.append(run)

    noisy_rewards(monkeypatch)
    command = frozen.short_flags(tiny, tmp_path, "--max_steps", "6", "--learning_rate", "0.03")
    config, method = train.parse_args(command)
    assert train.train(config, method) is not None  # with the sync nothing is wrong
    monkeypatch.setattr(train, "sync", only_once)
    text = refusal(train.train, replace(config, output_dir=f"{tmp_path}/unsynced"), method)
    assert "differ from the trainer's" in text and "weight sync" in text
    assert re.match(r"step [1-9]\d*:", text), text


class OtherTokenizer:
    """A tokenizer of another model that happens to know the same ids: some read differently, or another id ends a text."""

    def __init__(self, real, shift=0, eos=None):
        self.real, self.shift = real, shift
        self.eos_token_id = real.eos_token_id if eos is None else eos

    def decode(self, ids, **options):
        return self.real.decode([i + self.shift for i in ids], **options)

    def __getattr__(self, name):  # prompts are rendered alike
        return getattr(self.real, name)


@pytest.mark.parametrize("other", [{"shift": 1}, {"eos": 300}])
def test_the_run_stops_when_the_engine_has_another_tokenizer(other, tiny, tmp_path, monkeypatch):
    real = rollout.make_engine

    def make(*arguments, **options):
        engine = real(*arguments, **options)
        engine.tokenizer = OtherTokenizer(engine.tokenizer, **other)
        engine.stop_ids = [engine.tokenizer.eos_token_id]
        return engine

    monkeypatch.setattr(rollout, "make_engine", make)
    more = ("--max_completion_length", 64, "--num_generations", 16)
    config, method = train.parse_args(frozen.short_flags(tiny, tmp_path, *more))
    with pytest.raises(ValueError, match="the trainer's tokenizer as .* same tokenizer files"):
        for seed in range(20):  # until a response ends with the wrong EOS
            train.train(replace(config, seed=seed, output_dir=f"{tmp_path}/{seed}"), method)


@pytest.mark.parametrize(
    "change", [{"temperature": 1.5}, {"temperature": 0.7}, {"top_p": 0.5}, {"raw": True}]
)
def test_the_run_stops_when_the_engine_samples_otherwise(change, tiny, tmp_path, monkeypatch):
    """Another temperature, a nucleus, or the log-probs of another temperature than the trainer's."""
    real = rollout.TransformersEngine._complete

    def complete(engine, prompts, seeds, temperature, max_tokens, top_p, *rest):
        if temperature:  # not in evaluations
            engine.raw = change.get("raw", False)
            temperature, top_p = change.get("temperature", temperature), change.get("top_p", top_p)
        return real(engine, prompts, seeds, temperature, max_tokens, top_p, *rest)

    config, method = train.parse_args(frozen.short_flags(tiny, tmp_path, "--temperature", "1.2"))
    train.train(config, method)  # as it should be, nothing is wrong
    config = replace(config, output_dir=f"{tmp_path}/otherwise")
    monkeypatch.setattr(rollout.TransformersEngine, "_complete", complete)
    assert "step 1: the engine's log-probs" in refusal(train.train, config, method)


def test_the_run_stops_at_log_probs_that_are_none(tiny, tmp_path, monkeypatch):
    real = rollout.TransformersEngine._sample

    def sample(engine, token_ids, logps, reason):
        return real(engine, token_ids, [*logps[:-1], math.nan], reason)

    monkeypatch.setattr(rollout.TransformersEngine, "_sample", sample)
    text = refusal(train.train, *train.parse_args(frozen.short_flags(tiny, tmp_path)))
    assert "invalid log-probs: [nan]" in text


def weights_of(run) -> dict:
    return {name: tensor.clone() for name, tensor in modeling.full_tensors(run.model)}


def test_steps_without_a_finite_gradient_are_skipped(tiny, tmp_path, monkeypatch):
    toolupt = METHODS["toolupt"]
    real, bad, before = toolupt.loss, {0}, {}

    def poisoned(method, rows, logps, *rest):
        loss, stats = real(method, rows, logps, *rest)
        return (loss * math.nan if len(before) in bad else loss), stats

    original = Run.optimizer_step

    def watched(run, *arguments):
        step, weights = len(before), weights_of(run)
        metrics = original(run, *arguments)
        moved = any(not torch.equal(weights[n], w) for n, w in weights_of(run).items())
        before[step] = moved
        assert (metrics["skipped"] == 0) == moved == (step not in bad)
        return metrics

    noisy_rewards(monkeypatch)
    monkeypatch.setattr(toolupt, "loss", poisoned)
    monkeypatch.setattr(Run, "optimizer_step", watched)
    train.train(*train.parse_args(frozen.short_flags(tiny, tmp_path / "1")))
    assert before == {0: False, 1: True}
    assert [row["skipped"] for row in metrics_of(tmp_path / "1/out")[2:]] == [1, 0]

    before.clear()
    bad |= {1, 2, 3}
    command = frozen.short_flags(tiny, tmp_path / "2", "--max_steps", "9")
    text = refusal(train.train, *train.parse_args(command))
    assert "no finite loss and gradient in 3 steps" in text
    file = tmp_path / "2/out/bad_batch.jsonl"
    assert str(file) in text
    groups = [json.loads(line) for line in file.read_text().splitlines()]
    third = [row for row in rollouts_of(tmp_path / "2/out") if row["step"] == 3]
    assert len(groups) == 4 and all(group["prompt"] for group in groups)
    samples = [sample["token_ids"] for group in groups for sample in group["samples"]]
    assert samples == [row["token_ids"] for row in third]
    assert before == {0: False, 1: False}  # the third raises


def test_dynamic_sampling_gives_up_after_ten_rounds(tiny, tmp_path, monkeypatch):
    """A random model's responses are all wrong: no group ever differs."""
    real, batches = train.roll_out, []

    def counted(config, method, run, batch):
        batches.append([place for place, _ in batch])
        return real(config, method, run, batch)

    monkeypatch.setattr(train, "roll_out", counted)
    command = [*frozen.short_flags(tiny, tmp_path), "--algo", "dapo"]
    text = refusal(train.train, *train.parse_args(command))
    assert "10 rounds gave 0 prompts whose rewards differ, of 4" in text
    assert batches == [list(range(4 * k, 4 * k + 4)) for k in range(10)]


def test_dynamic_sampling_never_trains_on_a_short_batch(tiny, tmp_path):
    """Of six frozen prompts four differ; every step has four of those, though a batch holds two or three."""
    config = train.parse_args([*frozen.flags(tiny, tmp_path), "--algo", "dapo", "--max_steps", "2"])
    frozen.one_step(*config)
    lines = (tmp_path / "out/rollouts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for step in (1, 2):
        totals = [row["outcome"]["total"] for row in rows if row["step"] == step]
        groups = [totals[i : i + K] for i in range(0, len(totals), K)]
        assert len(groups) == 4 and all(len(set(group)) > 1 for group in groups)
    assert metrics_of(tmp_path / "out")[2]["rounds"] > 1


def test_resuming_equals_not_stopping(tiny, tmp_path, monkeypatch):
    """Four steps in one go, and two, a new start and two more: the same metrics and weights, bit for bit."""
    noisy_rewards(monkeypatch)

    def go(folder, steps, *more):
        steps = ["--max_steps", steps, "--eval_steps", "1"]
        config = train.parse_args(frozen.short_flags(tiny, tmp_path / folder, *steps, *more))
        train.train(*config)
        return tmp_path / folder / "out"

    whole = go("whole", 4)
    go("parts", 2, "--resume_from_checkpoint", "latest")  # nothing there: starts at 0
    parts = go("parts", 4, "--resume_from_checkpoint", "latest")
    weights = [
        AutoModelForCausalLM.from_pretrained(out / "checkpoint-4").state_dict()
        for out in (whole, parts)
    ]
    start = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in start)
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)
    timed = ("timing_s/", "perf/")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in metrics_of(out)[1:]]
        for out in (whole, parts)
    ]
    assert [row["step"] for row in rows[0]] == [0, 1, 2, 3, 4]
    assert rows[0] == rows[1]
    rollouts = [(out / "rollouts.jsonl").read_text() for out in (whole, parts)]
    assert rollouts[0] == rollouts[1]

    kept = (parts / "metrics.jsonl").read_text()
    text = refusal(go, "parts", 5)
    assert "checkpoints of steps [2, 4]" in text and "--resume_from_checkpoint latest" in text
    assert (parts / "metrics.jsonl").read_text() == kept  # nothing of the earlier run is lost

    branch = go("branch", 4, "--resume_from_checkpoint", whole / "checkpoint-2")
    again = AutoModelForCausalLM.from_pretrained(branch / "checkpoint-4").state_dict()
    assert all(torch.equal(weights[0][name], again[name]) for name in start)


def test_rl_starts_at_the_best_sft_checkpoint_with_a_fresh_optimiser(tiny, tmp_path, monkeypatch):
    """Validation says that step 2 of 4 was best: neither the first, nor the last, nor the newest checkpoint.

    The engine is made once, for the longer prompts and the log-probs that the second stage needs, and never closed.
    """
    engines, make = [], rollout.make_engine
    close = lambda self: pytest.fail("the engine was closed")
    monkeypatch.setattr(
        rollout, "make_engine", lambda *a, **o: engines.append(make(*a, **o)) or engines[-1]
    )
    monkeypatch.setattr(rollout.TransformersEngine, "close", close)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.5}
    weights, begin = {0: weights_of_file(tiny)}, {}
    original, evaluated = Run.optimizer_step, []

    def validation_loss(config, run):
        evaluated.append(max(weights))
        return losses[max(weights)]

    def watched(run, lr, *rest):
        if isinstance(run.method, methods.Rollouts):
            begin.update(weights=weights_of(run), state=len(run.optimizer.state), lr=lr)
        result = original(run, lr, *rest)
        if isinstance(run.method, methods.Sft):
            weights[len(weights)] = weights_of(run)
        return result

    noisy_rewards(monkeypatch)
    monkeypatch.setattr(train, "validation_loss", validation_loss)
    monkeypatch.setattr(Run, "optimizer_step", watched)
    text = """--algo sft_dapo_star --sft_max_steps 4 --sft_learning_rate 0.01 --max_steps 1
    --learning_rate 0.001 --eval_steps 1 --save_total_limit 1 --save_steps 1"""
    train.train(*train.parse_args(frozen.short_flags(tiny, tmp_path, *text.split())))
    assert evaluated == [1, 2, 3, 4] and len(engines) == 1
    assert all(torch.equal(begin["weights"][name], w) for name, w in weights[2].items())
    for other in (0, 3, 4):
        assert any(not torch.equal(begin["weights"][n], w) for n, w in weights[other].items())
    assert begin["state"] == 0 and begin["lr"] == 0.001

    config, before, *rows = metrics_of(tmp_path / "out/sft")
    assert (config["lr_scheduler_type"], config["warmup_ratio"]) == ("cosine", 0.1)
    warm = math.ceil(0.1 * 4)  # one step, from 0; then half a cosine over the other three
    rates = [0.0] + [0.01 * (1 + math.cos(math.pi * i / (4 - warm))) / 2 for i in range(3)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    assert [row["eval/loss"] for row in rows] == [*losses.values()]
    assert all(0 <= row["eval/accuracy"] <= 1 for row in [before, *rows])
    card = (tmp_path / "out/sft/checkpoint-best/README.md").read_text()
    assert "- Step 2 of 4" in card and f"| after | {rows[1]['eval/accuracy']:.1%} |" in card


def weights_of_file(folder) -> dict:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_sft_that_never_has_a_finite_validation_loss_ends_with_a_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validation_loss", lambda *_: math.nan)
    command = frozen.short_flags(tiny, tmp_path, "--algo", "sft_dapo_star", "--sft_max_steps", "1")
    assert "no finite validation loss" in refusal(train.train, *train.parse_args(command))


@pytest.mark.parametrize("more", [[], ["--no_share_prefix"]], ids=["shared", "padded"])
def test_validation_loss_is_equation_1_on_the_evaluation_subset(more, tiny, plain, tmp_path):
    """On one rank, and on the second of two, which has the shorter two of three prompts."""
    config, method = train.parse_args(["--algo", "sft", *frozen.flags(tiny, tmp_path), *more])
    run, tokenizer = Run(config, method), AutoTokenizer.from_pretrained(tiny)
    run.model, run.eval_examples = copy.deepcopy(plain), run.eval_examples[:3]
    losses, lengths = [], []
    for example in run.eval_examples:
        prompt, target = data.render(example, tokenizer), data.target_ids(example, tokenizer)
        logps, _ = slow_forward(plain, prompt, target, temperature=1.0)
        losses, lengths = [*losses, -sum(logp.item() for logp in logps)], [*lengths, len(target)]
    expected = sum(losses) / sum(lengths)
    assert train.validation_loss(config, run) == pytest.approx(expected, rel=1e-4)
    run.rank, run.world = 1, 2
    longest = max(range(3), key=lambda i: data.characters(run.eval_examples[i]))
    losses.pop(longest), lengths.pop(longest)
    expected = sum(losses) / sum(lengths)
    assert train.validation_loss(config, run) == pytest.approx(expected, rel=1e-4)


def test_sft_trains_the_very_tokens_that_sampling_asks_for(tiny, tmp_path):
    """A model that knows one answer by heart says it, EOS included, where the engine starts to sample."""
    more = "--algo sft --max_steps 30 --learning_rate 0.01 --save_steps 30".split()
    train.train(*train.parse_args(frozen.short_flags(tiny, tmp_path, *more)))
    checkpoint, tokenizer = tmp_path / "out/checkpoint-30", AutoTokenizer.from_pretrained(tiny)
    engine = rollout.make_engine("transformers", str(checkpoint), max_model_len=300)
    examples = data.load("jsonl", tmp_path / "short.jsonl")
    prompts = [data.render(example, tokenizer) for example in examples]
    samples = engine.generate(prompts, n=1, temperature=0.0, max_tokens=16)
    for example, [sample] in zip(examples, samples):
        assert sample.token_ids == data.target_ids(example, tokenizer)
        assert sample.text == example.target and sample.finish_reason == "stop"


def test_old_checkpoints_go(tiny, tmp_path):
    command = frozen.short_flags(tiny, tmp_path, "--max_steps", "3", "--save_steps", "1")
    train.train(*train.parse_args([*command, "--save_total_limit", "2"]))
    names = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert names == {f"checkpoint-{n}{x}" for n in (2, 3) for x in ("", "-state")}


@pytest.mark.skipif(
    not REAL.exists(), reason=f"{REAL} is not here: optional data beside the checkout"
)
def test_two_steps_on_real_data(tiny, tmp_path):
    text = f"""--algo toolupt --model_name_or_path {tiny} --train_file {REAL}/test_from_parquet.json
    --output_dir {tmp_path}/out --max_steps 2 --train_batch_size 2 --num_generations 2 --eval_size 1
    --eval_fraction 0.1 --max_prompt_length 1500 --max_completion_length 100
    --engine transformers --max_tokens_per_row 4000"""
    train.train(*train.parse_args(text.split()))
    rows = metrics_of(tmp_path / "out")
    assert [row["step"] for row in rows[1:]] == [0, 1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows[2:])
    assert audit.audit(tmp_path / "out").startswith("8 responses agree")


# ------------------------------------------------------------------------------------------------ audit and report


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The output folder of a run of two frozen steps."""
    folder = tmp_path_factory.mktemp("finished")
    frozen.one_step(*train.parse_args([*frozen.flags(tiny, folder), "--max_steps", "2"]))
    return folder / "out"


def falsified(finished, tmp_path, change) -> tuple[Path, int]:
    """A copy of a run with one line changed, and that line's number."""
    out = tmp_path / "false"
    shutil.copytree(finished, out)
    lines = (out / "rollouts.jsonl").read_text().splitlines()
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        if change(row):
            lines[number - 1] = json.dumps(row)
            (out / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
            return out, number
    raise AssertionError("no line to falsify")


def flip_reward(row):
    row["reward"] += 0.001
    return row["step"] == 2


def flip_advantage(row):
    if len(row["advantages"]) > 5:
        row["advantages"][5] += 1e-6
    return len(row["advantages"]) > 5


def flip_text(row):
    """One letter of a right call's arguments."""
    place = row["text"].find('": ') - 1
    row["text"] = row["text"][:place] + "~" + row["text"][place + 1 :]
    return row["kind"] == "tool_call" and row["outcome"]["total"] == 4


def flip_token(row):
    """A token that was the expert's."""
    row["token_ids"][0] += 1
    return row["kind"] == "tool_call" and row["outcome"]["total"] == 3.5


@pytest.mark.parametrize("change", [flip_reward, flip_advantage, flip_text, flip_token])
def test_audit_finds_a_changed_line(finished, tmp_path, change):
    assert audit.audit(finished).startswith("32 responses agree")
    out, number = falsified(finished, tmp_path, change)
    with pytest.raises(ValueError, match=r"rollouts\.jsonl line (\d+): ") as error:
        audit.audit(out)
    found = int(re.search(r"line (\d+):", str(error.value))[1])
    assert (found - 1) // K == (number - 1) // K  # an advantage depends on its whole group
    assert change in (flip_token, flip_text) or found == number
    if change is flip_advantage:
        assert ": advantages[5] is " in str(error.value)


def test_audit_finds_every_flipped_digit(finished, tmp_path):
    """Any digit of any field, token ids and log-probs and seeds included; and any letter of a text."""
    out = tmp_path / "flipped"
    shutil.copytree(finished, out)
    text, rng = (out / "rollouts.jsonl").read_text(), random.Random(3)
    places = [i for i, c in enumerate(text) if c.isdigit()]
    for place in rng.sample(places, 60):
        other = rng.choice([d for d in "0123456789" if d != text[place]])
        (out / "rollouts.jsonl").write_text(text[:place] + other + text[place + 1 :])
        with pytest.raises(ValueError, match=r"rollouts\.jsonl"):
            audit.audit(out)
    first = text.index('"text": "') + 9
    (out / "rollouts.jsonl").write_text(text[:first] + "~" + text[first + 1 :])
    with pytest.raises(ValueError, match="line 1: "):
        audit.audit(out)


def test_audit_reads_texts_with_the_runs_tokenizer_and_the_means_of_the_metrics(finished, tmp_path):
    """Lines that are consistent in themselves, checksums included, but are not what was sampled or logged."""
    out = tmp_path / "forged"
    shutil.copytree(finished, out)
    rows = rollouts_of(out)

    def forge(change):
        forged = copy.deepcopy(rows)
        change(forged)
        for row in forged:
            row["crc32"] = records.checksum(row)
        (out / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in forged))

    def other_token(forged):  # in the noise of an answer: neither reward nor advantage change
        row = next(r for r in forged if r["kind"] == "answer" and r["finish_reason"] == "length")
        row["token_ids"][4] = row["token_ids"][5]
        assert row["token_ids"] != rows[forged.index(row)]["token_ids"]

    forge(lambda forged: None)
    assert audit.audit(out).startswith("32 responses agree")
    forge(other_token)
    with pytest.raises(ValueError, match="text is .* by the tokenizer"):
        audit.audit(out)
    forge(lambda forged: forged.__setitem__(slice(0, K), copy.deepcopy(forged[K : 2 * K])))
    with pytest.raises(ValueError, match="of step 1 is .* metrics.jsonl has"):
        audit.audit(out)


def test_audit_finds_missing_and_unknown_steps(finished, tmp_path):
    """A file without a step, an empty one, and one whose metrics have lost a step."""
    out = shutil.copytree(finished, tmp_path / "out")
    rows = (finished / "rollouts.jsonl").read_text().splitlines(keepends=True)
    for kept in ([row for row in rows if json.loads(row)["step"] != 1], []):
        (out / "rollouts.jsonl").write_text("".join(kept))
        with pytest.raises(ValueError, match="0 lines of step 1, of"):
            audit.audit(out)
    (out / "rollouts.jsonl").write_text("".join(rows))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="which metrics.jsonl does not have"):
        audit.audit(out)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    with pytest.raises(ValueError, match=f"line {len(lines)} of .*metrics.jsonl is not JSON"):
        audit.audit(out)


def test_a_run_is_resumed_with_its_own_settings_only(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for name in ("checkpoint-2", "checkpoint-2-state"):
        (out / name).mkdir()
    first = metrics_of(out)[0]
    knobs = {**first, "output_dir": str(out), "resume_from_checkpoint": "latest"}
    changed = checkpoint.refuse_earlier_run({**knobs, "max_steps": 99, "learning_rate": 1.0})
    steps, rate = (
        f"--max_steps {first['max_steps']} -> 99",
        f"--learning_rate {first['learning_rate']} -> 1.0",
    )
    assert {steps, rate} <= {*changed} <= {steps, rate, f"--output_dir {finished} -> {out}"}
    for name, value in (
        ("seed", 5),
        ("algo", "grpo"),
        ("num_generations", 16),
        ("eval_fraction", 0.5),
    ):
        text = refusal(checkpoint.refuse_earlier_run, {**knobs, name: value})
        assert f"--{name} {first[name]} -> {value}" in text
    (tmp_path / "other/checkpoint-2-state").mkdir(parents=True)
    elsewhere = {**knobs, "resume_from_checkpoint": f"{tmp_path}/other/checkpoint-2"}
    assert "holds a run's checkpoints" in refusal(checkpoint.refuse_earlier_run, elsewhere)
    misspelt = {**knobs, "resume_from_checkpoint": f"{out}/chekpoint-2"}
    text = refusal(checkpoint.refuse_earlier_run, misspelt)
    assert f"{out}/chekpoint-2-state" in text and "steps [2]" in text

    branch = {
        **knobs,
        "output_dir": f"{tmp_path}/new",
        "resume_from_checkpoint": f"{out}/checkpoint-2",
    }
    assert checkpoint.refuse_earlier_run({**branch, "learning_rate": 1.0})
    text = refusal(checkpoint.refuse_earlier_run, {**branch, "seed": 5})
    assert f"{out} holds a run with other settings (--seed {first['seed']} -> 5)" in text
    read = first["digests"]
    checkpoint.refuse_changed(tmp_path / "new", branch["resume_from_checkpoint"], read)
    checkpoint.refuse_changed(tmp_path / "new", "", {**read, "train_file": "another"})
    changed = {**read, "train_file": "another"}
    text = refusal(checkpoint.refuse_changed, tmp_path / "new", f"{out}/checkpoint-2", changed)
    assert f"what the run in {out} reads has changed" in text and "-> another" in text


def test_a_search_without_a_checkpoint_is_a_run_too(finished, tmp_path):
    """iTool's first search may take hours, and is reused: by the run that made it only."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished / "metrics.jsonl", out)
    knobs = {**metrics_of(out)[0], "output_dir": str(out), "resume_from_checkpoint": "latest"}
    other = {**knobs, "seed": knobs["seed"] + 1}
    assert checkpoint.refuse_earlier_run(other) == []
    (out / "searches.jsonl").write_text('{"iteration": 1, "step": 0}\n')
    assert "--seed" in refusal(checkpoint.refuse_earlier_run, other)
    assert checkpoint.refuse_earlier_run({**other, "resume_from_checkpoint": ""}) == []  # anew


def test_a_checkpoint_goes_to_the_stage_that_wrote_it(tmp_path):
    out = tmp_path / "out"
    of = lambda path: checkpoint.of_stages(str(path), out, "sft")
    assert of("") == ("", "") and of("latest") == ("latest", "latest")
    assert of(out / "checkpoint-7") == ("latest", f"{out}/checkpoint-7")
    for folder in (out, tmp_path / "earlier"):
        assert of(folder / "sft/checkpoint-7") == (f"{folder}/sft/checkpoint-7", "")
    text = refusal(checkpoint.of_stages, f"{tmp_path}/earlier/checkpoint-7", out, "sft")
    assert f"give a checkpoint in --output_dir {out}, or one of a first stage" in text


def test_audit_finds_a_missing_line(finished, tmp_path):
    out = tmp_path / "short"
    shutil.copytree(finished, out)
    lines = (out / "rollouts.jsonl").read_text().splitlines()
    (out / "rollouts.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match=f"{K - 1} of {K} lines"):
        audit.audit(out)


def test_a_tracker_that_is_missing_is_named_before_anything_is_loaded(monkeypatch):
    config, _ = train.parse_args(["--algo", "grpo", "--report_to", "wandb"])
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="--report_to needs wandb: pip install wandb"):
        start.check_machine(config, 1)


def test_bitsandbytes_that_fails_is_named_before_anything_is_loaded(monkeypatch):
    config, _ = train.parse_args(["--algo", "grpo", "--quant", "4bit", "--lora_rank", "16"])
    for error in (ModuleNotFoundError("no such module"), RuntimeError("CUDA setup failed")):

        def fails(name, error=error):
            assert name == "bitsandbytes"
            raise error

        monkeypatch.setattr(start, "import_module", fails)
        with pytest.raises(ImportError, match=f"{error}.*pip install --upgrade bitsandbytes"):
            start.check_machine(config, 1)


# -------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_part_deals_everything_once_by_size(world):
    rng = random.Random(world)
    items = [(i, rng.randrange(100)) for i in range(23)]
    size = lambda item: item[1]
    parts = [run_module.part(items, size, rank, world) for rank in range(world)]
    assert sorted(chain(*parts)) == items and all(part == sorted(part) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    loads = [sum(map(size, part)) for part in parts]
    assert max(loads) - min(loads) <= 100  # never more than the largest item apart
    assert [run_module.part([], size, rank, world) for rank in range(world)] == [[]] * world


@pytest.mark.parametrize("algo", ["toolupt", "sft"])
def test_stats_are_those_of_the_whole_step(algo, tiny, tmp_path, monkeypatch):
    """What a step logs does not depend on how many micro-batches it is cut into."""
    logged = []
    for number in (1, 3):
        cut = lambda config, batch, number=number: [batch[i::number] for i in range(number)]
        monkeypatch.setattr(train, "micro_batches", cut)
        folder = tmp_path / str(number)
        folder.mkdir()
        frozen.one_step(*train.parse_args(frozen.flags(tiny, folder, "--algo", algo)))
        step = metrics_of(folder / "out")[-1]
        timed = ("timing_s/", "perf/")
        logged.append({name: v for name, v in step.items() if not name.startswith(timed)})
    assert len(logged[0]) > 8 and logged[0]["step"] == 1
    assert logged[1] == pytest.approx(logged[0], rel=1e-4, abs=1e-6, nan_ok=True)
