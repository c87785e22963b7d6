"""Recompute what a run was trained on from its rollouts.jsonl, and compare.

python -m tools.audit RUN
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import torch

import data
import model as modeling
import rollout
import start
from methods import METHODS, Group, Rollouts
from records import checksum, lines_of
from scoring import COPY, Reward
from train import Config, score


def audit(out: Path) -> str:
    """Recompute rewards, token rewards and advantages and compare with what was trained on.

    Also that texts and targets are what the run's tokenizer reads and writes, that the means of
    each step are those of metrics.jsonl, and that each line is as it was written (CRC-32).
    Returns one line that says what was checked; ValueError naming the first line that differs.
    """
    config, method, logged, digests = _audited_run(out)
    reward, examples = _own_reward(config, digests, out)
    tokenizer = modeling.load_tokenizer(
        config.model_name_or_path, trust_remote_code=config.trust_remote_code
    )
    if config.allow_thinking:
        data.allow_thinking(tokenizer)
    there, now = digests.get("model_name_or_path"), f"prompt {data.template_digest(tokenizer)}"
    if there != now:
        raise ValueError(
            f"{config.model_name_or_path} writes other prompts than in the run ({there}, now "
            f"{now}): put its chat template and tokenizer back to audit"
        )
    checked, pending, seen = 0, [], defaultdict(list)
    for number, row in enumerate(data.read_jsonl(out / "rollouts.jsonl"), 1):
        pending.append((number, row))
        if len(pending) == method.num_generations:
            try:
                _audit_group(config, method, pending, tokenizer, out, reward, examples)
            except (LookupError, TypeError, OverflowError) as error:
                raise ValueError(f"{out}/rollouts.jsonl line {number}: {error!r}") from None
            for _, row in pending:
                seen[row["step"]].append((row["reward"], len(row["token_ids"])))
            checked, pending = checked + len(pending), []
    if pending:
        raise ValueError(
            f"{out}/rollouts.jsonl ends inside a group: {len(pending)} of "
            f"{method.num_generations} lines"
        )
    for step in sorted({*seen, *logged} - {0}):
        there, due = len(seen[step]), config.train_batch_size * method.num_generations
        if step not in logged or there != due:
            raise ValueError(
                f"{out}/rollouts.jsonl has {there} lines of step {step}, "
                + (f"of {due}" if step in logged else "which metrics.jsonl does not have")
            )
    for step, pairs in seen.items():
        means = [sum(column) / len(pairs) for column in zip(*pairs)]
        for name, mean in zip(("reward", "completions/mean_length"), means):
            if not math.isclose(logged[step][name], mean, rel_tol=1e-6, abs_tol=1e-9):
                raise ValueError(
                    f"{out}/rollouts.jsonl: {name} of step {step} is {mean}, metrics.jsonl has "
                    f"{logged[step][name]}"
                )
    return f"{checked} responses agree with their text, rewards, token rewards and advantages"


def _own_reward(config: Config, digests: dict, out: Path) -> tuple[Reward, dict]:
    """The reward of a run, and the examples by id and target where a user's reward reads them."""
    if not config.reward_file:
        return Reward(), {}
    reward = Reward(out / COPY)
    if reward.digest != digests["reward_file"]:
        raise ValueError(f"{reward.file} was changed: its hash differs from that in metrics.jsonl")
    found = start.read_sources(config.train_file, config.seed)
    if (now := start.digest(found)) != digests["train_file"]:
        raise ValueError(
            f"--train_file is not what the run read ({digests['train_file']}, now {now}): a reward "
            "of one's own may read all of an example; put the data back to audit"
        )
    prompts = data.read_prompts(config.model_name_or_path, config.system_prompt, config.user_prompt)
    examples = [data.with_prompts(example, prompts) for example in found]
    return reward, {(example.id, example.target): example for example in examples}


def _audited_run(out: Path) -> tuple[Config, Rollouts, dict[int, dict], dict[str, str]]:
    """A run's settings, its metrics by step, its digests; ValueError if it cannot be audited."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if not (out / name).exists():
            raise ValueError(
                f"{out}/{name} does not exist: only RL runs with their rollouts (not "
                "--no_log_rollouts) can be audited"
            )
    settings, *rows = data.read_jsonl(out / "metrics.jsonl")
    try:
        digests = settings.pop("digests", {})
        config = Config(**{f.name: settings.pop(f.name) for f in fields(Config)})
        steps = {row["step"]: row for row in rows}
        return config, METHODS[config.algo](**settings), steps, digests
    except (LookupError, TypeError) as error:
        raise ValueError(f"{out}/metrics.jsonl is not of this version: {error!r}") from None


def _audit_group(
    config: Config,
    method: Rollouts,
    lines: list[tuple[int, dict]],
    tokenizer,
    out: Path,
    reward: Reward,
    examples: dict[tuple[str, str], data.Example],
) -> None:
    rows = [row for _, row in lines]
    first = rows[0]
    known = data.Example(first["id"], [], [], "", [], first["target"], first["kind"])
    example = examples.get((known.id, known.target), known)
    group = Group(
        example,
        [],
        first["target_ids"],
        max_length=config.max_completion_length,
        with_expert=method.learns_from_expert,
        seed=first["seed"],
        num_thoughts=len(data.no_thoughts(tokenizer)),
        tokenizer=tokenizer,
    )
    group.samples = [
        rollout.Sample(
            r["token_ids"],
            r["sampler_logps"],
            r["text"],
            r["finish_reason"],
            rollout.num_thoughts(tokenizer, r["token_ids"]),
        )
        for r in rows
    ]
    target_ids = data.target_ids(example, tokenizer)
    score(method, group, reward)
    group.advantages = method.advantages(group)
    group.logps = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(r["logps"]) for r in rows], batch_first=True
    )
    for (number, row), again in zip(lines, lines_of(first["step"], group)):
        for name, value in again.items():
            if json.dumps(value) != json.dumps(row[name]):  # as text: NaN is not NaN
                where, there, value = _first_difference(name, row[name], value)
                raise ValueError(
                    f"{out}/rollouts.jsonl line {number}: {where} is {there}, recomputed {value}"
                )
        text = rollout.text_of(tokenizer, row["token_ids"], row["finish_reason"])
        for name, again in (("text", text), ("target_ids", target_ids)):
            if again != row[name]:
                where, there, again = _first_difference(name, row[name], again)
                raise ValueError(
                    f"{out}/rollouts.jsonl line {number}: {where} is {there!r}, "
                    f"by the tokenizer {again!r}"
                )
        if row["crc32"] != checksum(row):
            raise ValueError(f"{out}/rollouts.jsonl line {number} was changed: crc32 differs")


def _first_difference(name: str, there, again) -> tuple:
    """What differs and its two values: of lists of one length an entry, of others the length."""
    if not (isinstance(there, list) and isinstance(again, list)):
        return name, there, again
    if len(there) != len(again):
        return f"the length of {name}", len(there), len(again)
    pairs = enumerate(zip(there, again))
    i = next(i for i, (a, b) in pairs if json.dumps(a) != json.dumps(b))
    return f"{name}[{i}]", there[i], again[i]


def main(argv: list[str] | None = None) -> None:
    """`python -m tools.audit RUN`."""
    parser = argparse.ArgumentParser(prog="python -m tools.audit", description="Audit a run.")
    parser.add_argument("run", type=Path, help="output folder of a run")
    args = parser.parse_args(argv)
    try:
        print(audit(args.run))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
