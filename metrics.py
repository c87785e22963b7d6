"""Numbers that show whether a method works, beside its loss; docs/running.md says what each means.

rollout_metrics      a step's rollouts: rewards, lengths, forms, matched tokens, first advantages
tally, shares        those by kind of example as sums, and the metrics made of the sums
logp_difference      log-probs of the rollouts: trainer against engine
evaluate             greedy accuracy on the evaluation subset
Clock                seconds of the parts of a step
term_norms           gradient norms of the terms of the loss, on one micro-batch
starting_point       what RL starts from: log-probs of the expert's tags and of what they enclose

All are computed over all ranks, so that every rank has the same numbers.
"""

import math
import random
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

import data
import model as modeling
import rewards
import scoring
from methods import Group, Rollouts, matched_tokens, rows_of
from run import Run, add, all_gather, all_max, all_sum, forward, micro_batches, part

KINDS = {"tool_call": "calls", "answer": "answers"}  # of an example, and in a metric's name
BY_KIND = {  # metric -> what it is per
    "accuracy": "responses",
    "tokens_matched": "expert_tokens",
    "first_advantage": "begun",
}
FORMS = {name: f"form/{name.replace(' ', '_')}" for name in rewards.FORMS}
START_EXAMPLES = 4  # of each kind, read before the first step
RARE = 1e-4  # probability of an opening tag below which no rollout will have it


class Clock:
    """Seconds spent in the parts of a step. Its total leaves out the part "evaluate"."""

    def __init__(self):
        self.start, self.seconds = time.perf_counter(), defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def metrics(self, tokens: int | None = None) -> dict:
        """timing_s/*; given the `tokens` that the update reads (a prompt once), also their rate."""
        step = time.perf_counter() - self.start - self.seconds.get("evaluate", 0.0)
        timing = {f"timing_s/{name}": seconds for name, seconds in self.seconds.items()}
        speed = {} if tokens is None else {"perf/tokens_per_second": tokens / step}
        return {**timing, "timing_s/step": step, **speed}


def rollout_metrics(groups: list[Group], alignment: str) -> dict[str, float]:
    """Rewards, lengths, forms and agreement with the expert of a step's rollouts."""
    samples = [sample for group in groups for sample in group.samples]
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    advantages = torch.cat(
        [g.advantages[k, : len(s.token_ids)] for g in groups for k, s in enumerate(g.samples)]
    )
    parts = [scoring.parts_of(outcome) for outcome in outcomes]
    names = sorted(set(all_gather(list({name for named in parts for name in named}))))
    counts = {"groups": len(groups), "responses": len(samples), "tokens": len(advantages)}
    sums = {  # what a metric is per -> metric -> sum over this rank's
        "groups": {
            "reward_std": sum(float(torch.tensor(group.rewards).std()) for group in groups),
            "frac_reward_zero_std": sum(max(g.rewards) == min(g.rewards) for g in groups),
        },
        "responses": {
            "reward": sum(sum(group.rewards) for group in groups),
            "accuracy": sum(outcome.right for outcome in outcomes),
            **{name: sum(named.get(name, 0.0) for named in parts) for name in names},
            "completions/mean_length": len(advantages),
            "completions/clipped_ratio": sum(s.finish_reason == "length" for s in samples),
        },
        "tokens": {
            "advantage/positive": float((advantages > 0).sum()),
            "advantage/negative": float((advantages < 0).sum()),
        },
    }
    if any(group.num_thoughts for group in groups):  # thoughts are allowed
        thoughts = sum(sample.num_thoughts for sample in samples)
        sums["responses"]["completions/mean_thought_length"] = thoughts
    here = counts | {name: value for by_name in sums.values() for name, value in by_name.items()}
    totals = all_sum(here)
    metrics = {
        name: totals[name] / totals[unit] for unit, by_name in sums.items() for name in by_name
    }
    tallies = {}
    for g in groups:
        tallied = tally(
            g.example.kind,
            *reversed(g.said),
            [s.text for s in g.samples],
            [outcome.right for outcome in g.outcomes],
            [float(g.advantages[k, 0]) for k, s in enumerate(g.samples) if s.token_ids],
            alignment,
            g.matched,
        )
        add(tallies, tallied)
    return metrics | shares(all_sum(tallies))


def tally(
    kind: str,
    target: list[int],
    responses: list[list[int]],
    texts: list[str],
    right: list[bool],
    first: list[float],
    alignment: str = "positional",
    matched: Tensor | None = None,
) -> dict[str, float]:
    """Sums over the responses to one prompt, for `shares`: they add up over prompts and ranks.

    kind       of the example, "tool_call" | "answer"
    target     token ids of the expert response, behind its thoughts
    responses  token ids, likewise
    texts      what they say
    right      whether they earn the highest reward
    first      advantages of the first tokens; a response without tokens has none
    alignment  of matched_tokens in fgae.py. "lcs" leaves out the last expert token, the EOS
    matched    their result, where it is known
    """
    matched = matched_tokens(responses, target, alignment) if matched is None else matched
    names = [f"{name}/{k}" for k in KINDS.values() for x in BY_KIND.items() for name in x]
    sums = dict.fromkeys([*names, *FORMS.values()], 0)
    found = {
        "responses": len(responses),
        "accuracy": sum(right),
        "begun": len(first),
        "first_advantage": sum(first),
        "expert_tokens": len(responses) * (len(target) - (alignment == "lcs")),
        "tokens_matched": int(matched.sum()),
    }
    add(sums, {f"{name}/{KINDS[kind]}": value for name, value in found.items()})
    for text in texts:
        for form in rewards.forms(text):
            sums[FORMS[form]] += 1
    return sums


def shares(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of added-up tallies; a kind that no example has gets none."""
    found = {
        f"{name}/{kind}": sums[f"{name}/{kind}"] / sums[f"{unit}/{kind}"]
        for kind in KINDS.values()
        for name, unit in BY_KIND.items()
        if sums[f"{unit}/{kind}"]
    }
    responses = sum(sums[f"responses/{kind}"] for kind in KINDS.values())
    return found | {name: sums[name] / responses for name in FORMS.values()}


def logp_difference(groups: list[Group]) -> dict[str, float]:
    """|trainer - engine| in nats over the tokens of a step's rollouts: the mean and the largest."""
    apart = torch.cat(
        [
            (group.logps[k, : len(sample.logps)] - torch.tensor(sample.logps)).abs()
            for group in groups
            for k, sample in enumerate(group.samples)
        ]
    )
    sums = all_sum({"apart": apart.sum(), "n": len(apart)})
    name = "sampling/sampling_logp_difference"
    return {f"{name}/mean": sums["apart"] / sums["n"], f"{name}/max": all_max(apart.max())}


def evaluate(config, run: Run) -> dict[str, float]:
    """Greedy accuracy on the fixed evaluation subset; the engine must hold the weights."""
    mine = part(run.eval_examples, data.characters, run.rank, run.world)
    answers = run.engine.generate(
        [data.render(example, run.tokenizer) for example in mine],
        n=1,
        temperature=0.0,
        max_tokens=config.max_completion_length,
        seeds=[0] * len(mine),  # unused: greedy
        progress=run.counts("held-out examples"),
    )
    texts = [sample.text for [sample] in answers]
    sums = all_sum(run.reward.tally(texts, mine))
    n, n_calls = sums["n"], sums["n_calls"]
    metrics = {"eval/accuracy": sums["accuracy"] / n, "eval/reward": sums["reward"] / n}
    if n_calls:
        metrics["eval/tool_call_accuracy"] = sums["tool_calls"] / n_calls
    if n > n_calls:
        metrics["eval/answer_accuracy"] = sums["answers"] / (n - n_calls)
    return metrics


def term_norms(
    config, method: Rollouts, model, groups: list[Group], totals: dict[str, int]
) -> dict[str, float]:
    """Gradient norm of the policy term, and of the other terms relative to it.

    groups, totals  this rank's part of a step, and the step's denominators

    Of each rank's first micro-batch, before --max_grad_norm; no gradient is left. "expert" is the
    term of the expert responses, "rejected" SPO's of the rollouts, each before the balance weighs
    it. NaN where the policy term has no gradient: all rewards of a group are equal. Each term has a
    forward pass of its own, since compiled layers run one backward pass per forward pass.
    """
    micro, norms = micro_batches(config, groups)[0], {}
    parts = {"policy": (False, 0.0)}  # of the expert's tokens or the rollouts', at which balance
    if method.learns_from_expert:
        parts["expert"] = (True, 1.0)
    if method.rejects:
        parts["rejected"] = (False, 1.0)
    for name, (of_expert, balance) in parts.items():
        logps, entropy, mask = forward(config, model, micro, config.temperature)
        rows = rows_of(micro, mask)
        rows = replace(rows, mask=mask & (rows.is_expert == of_expert)[:, None])
        method.objective(rows, logps, entropy, totals, balance)[0].backward()
        norms[name] = float(modeling.clip_grad_norm(model, math.inf))
        model.zero_grad()
    policy = norms.pop("policy")
    relative = {
        f"grad_norm_ratio/{x}": v / policy if policy else math.nan for x, v in norms.items()
    }
    return {"grad_norm/policy": policy, **relative}


def starting_point(run: Run) -> dict[str, float]:
    """What RL starts from, on a few training examples: can the tags be sampled?

    start/tag_logp   mean log-prob, in nats, of the tokens of the expert's tags
    start/body_logp  that of its other tokens, EOS included

    Says both, and where an opening tag is so rare that rollouts cannot have it, what to do.
    """
    config, examples = run.config, []
    for kind in KINDS:
        of_kind = [example for example in run.examples if example.kind == kind]
        order = random.Random(config.seed)
        examples += order.sample(of_kind, min(START_EXAMPLES, len(of_kind)))
    batch = [
        run.demonstration(example)
        for example in part(examples, data.characters, run.rank, run.world)
    ]
    names = ("tag", "tag_tokens", "body", "body_tokens")
    names = [*names, *(f"{x}/{kind}" for kind in KINDS for x in ("p", "n"))]
    sums = dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for micro in micro_batches(config, batch):
            logps, _, _ = forward(config, run.model, micro, config.temperature)
            for one, row in zip(micro, logps.tolist()):
                kind = one.example.kind
                opening, closing = tag_tokens(run.tokenizer, one.target, kind)
                for t, logp in enumerate(row[: len(one.target)]):
                    name = "tag" if t in opening | closing else "body"
                    add(sums, {name: logp, f"{name}_tokens": 1})
                p = math.exp(sum(row[t] for t in opening))
                add(sums, {f"p/{kind}": p, f"n/{kind}": 1})
    sums = all_sum(sums)
    found = {  # no tag, where the tokenizer does not decode it as it was written
        f"start/{name}_logp": sums[name] / sums[f"{name}_tokens"]
        for name in ("tag", "body")
        if sums[f"{name}_tokens"]
    }
    where = {"start/tag_logp": "in its tags", "start/body_logp": "elsewhere"}
    said = ", ".join(f"{value:.2f} {where[name]}" for name, value in found.items())
    run.say(f"before training: log-prob of a token of the expert response {said}")
    for kind in KINDS:
        n = sums[f"n/{kind}"]
        if n and sums[f"p/{kind}"] / n < RARE:
            run.say(
                f"warning: the model begins a response with <{kind}> with probability "
                f"{sums[f'p/{kind}'] / n:.1e}: where one is due all rollouts will fail, and equal "
                "rewards teach little or nothing. Teach the tags first: a row with an SFT stage "
                "(--algo sft_dapo_star), or --algo sft, whose checkpoint-best is then the model"
            )
    return found


def tag_tokens(tokenizer, target: list[int], kind: str) -> tuple[set[int], set[int]]:
    """Places of the tokens of an expert response's opening and closing tag.

    A token that holds more than the tag (byte-pair encodings merge ">\\n") is one of its tokens.
    """
    ends = [len(tokenizer.decode(target[:t])) for t in range(len(target) + 1)]
    text, places = tokenizer.decode(target), []
    for begin, tag in (
        (text.find(f"<{kind}>"), f"<{kind}>"),
        (text.rfind(f"</{kind}>"), f"</{kind}>"),
    ):
        end = begin + len(tag) if begin >= 0 else begin
        places.append({t for t in range(len(target)) if ends[t] < end and ends[t + 1] > begin})
    return places[0], places[1]
