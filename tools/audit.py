"""Recompute what a run was trained on from its rollouts.jsonl, and compare.

python -m tools.audit RUN
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import fields
from itertools import islice
from pathlib import Path

import torch

import data
import model as modeling
import rollout
import start
from methods import METHODS, Group, Rollouts
from records import lines_of
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
    file, K, seen = out / "rollouts.jsonl", method.num_generations, defaultdict(list)
    numbered = enumerate(data.read_jsonl(file), 1)
    while lines := list(islice(numbered, K)):
        if len(lines) < K:
            raise ValueError(f"{file} ends inside a group: {len(lines)} of {K} lines")
        rows = [row for _, row in lines]
        try:
            example = _example(rows[0], examples)
            again = _again(config, method, rows, example, tokenizer, reward)
            target = data.target_ids(example, tokenizer)
            for (number, row), values in zip(lines, again):
                _compare(f"{file} line {number}", row, "recomputed", values)
                text = rollout.text_of(tokenizer, row["token_ids"], row["finish_reason"])
                read = {"text": text, "target_ids": target}
                _compare(f"{file} line {number}", row, "by the tokenizer", read)
                seen[row["step"]].append((row["reward"], len(row["token_ids"])))
        except (LookupError, TypeError, OverflowError) as error:
            raise ValueError(f"{file} line {lines[-1][0]}: {error!r}") from None
    for step in sorted({*seen, *logged} - {0}):
        there, due = len(seen[step]), config.train_batch_size * K
        if step not in logged or there != due:
            raise ValueError(
                f"{file} has {there} lines of step {step}, "
                + (f"of {due}" if step in logged else "which metrics.jsonl does not have")
            )
        means = [sum(column) / there for column in zip(*seen[step])]
        for name, mean in zip(("reward", "completions/mean_length"), means):
            if not math.isclose(logged[step][name], mean, rel_tol=1e-6, abs_tol=1e-9):
                raise ValueError(
                    f"{file}: {name} of step {step} is {mean}, metrics.jsonl has "
                    f"{logged[step][name]}"
                )
    checked = sum(map(len, seen.values()))
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


def _example(row: dict, examples: dict[tuple[str, str], data.Example]) -> data.Example:
    known = data.Example(row["id"], [], [], "", [], row["target"], row["kind"])
    return examples.get((known.id, known.target), known)


def _again(
    config: Config,
    method: Rollouts,
    rows: list[dict],
    example: data.Example,
    tokenizer,
    reward: Reward,
) -> list[dict]:
    """The lines of a group, from their token ids, texts and log-probs."""
    first = rows[0]
    group = Group(
        example,
        [],
        first["target_ids"],
        max_length=config.max_completion_length,
        with_expert=method.learns_from_expert,
        seed=first["seed"],
        num_thoughts=len(data.no_thoughts(tokenizer)),
    )
    for row in rows:
        thoughts = rollout.num_thoughts(tokenizer, row["token_ids"])
        names = ("token_ids", "sampler_logps", "text", "finish_reason")
        group.samples.append(rollout.Sample(*(row[name] for name in names), thoughts))
    score(method, group, reward)
    group.advantages = method.advantages(group)
    logps = [torch.tensor(row["logps"]) for row in rows]
    group.logps = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)
    return lines_of(first["step"], group)


def _compare(where: str, row: dict, how: str, again: dict) -> None:
    """ValueError that names the first value of a line that is another one now."""
    for name, value in again.items():
        there = row[name]
        if json.dumps(there) == json.dumps(value):  # as text: NaN is not NaN
            continue
        if isinstance(there, list) and isinstance(value, list):
            if len(there) != len(value):
                name, there, value = f"the length of {name}", len(there), len(value)
            else:
                pairs = enumerate(zip(there, value))
                i = next(i for i, (a, b) in pairs if json.dumps(a) != json.dumps(b))
                name, there, value = f"{name}[{i}]", there[i], value[i]
        raise ValueError(f"{where}: {name} is {there!r}, {how} {value!r}")


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
