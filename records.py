"""The records of a run, all written by rank 0 and flushed line by line.

    output_dir/metrics.jsonl     first line the settings, then a line per step (0: before training)
    output_dir/rollouts.jsonl    a line per response with everything it was trained on
    output_dir/bad_batch.jsonl   what a run that could not go on was trained on last
    tensorboard/, W&B            the metrics again, if --report_to says so

A resumed run drops the lines after its checkpoint's step: those steps run again.
"""

import json
import math
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

import data
import scoring
from methods import Group, Rollouts
from start import settings


class Records:
    """The records of one stage of a command, on all ranks: the others only send their part."""

    def __init__(self, config, method, command, earlier: int):
        """Settings of the stage and of the whole command; what the trackers' steps start from."""
        self.config, self.method, self.command, self.earlier = config, method, command, earlier
        self.out, self.is_first = Path(config.output_dir), dist.get_rank() == 0
        self.settings = settings(config, method)
        self.metrics = self.rollouts = self.tracker = None

    def open(self, step: int, digests: dict[str, str], reward: scoring.Reward) -> None:
        """Open the files after `step` steps; of a new run, write its settings and its reward."""
        self.step = step
        if not self.is_first:
            return
        self.metrics = open_to_append(self.out / "metrics.jsonl", step)
        if self.config.log_rollouts and isinstance(self.method, Rollouts):
            self.rollouts = open_to_append(self.out / "rollouts.jsonl", step)
        if self.metrics.tell() == 0:
            write(self.metrics, self.settings | {"digests": digests})
        if reward.file:
            (self.out / scoring.COPY).write_bytes(reward.source)

    def history(self, name: str) -> list[float]:
        """The values of a metric so far, as rank 0 finds them; all ranks call."""
        found = [None]
        if self.is_first:
            rows = list(data.read_jsonl(self.out / "metrics.jsonl", growing=True))[1:]
            found = [[row[name] for row in rows if row.get(name) is not None]]
        dist.broadcast_object_list(found)
        return found[0]

    def log(self, step: int, metrics: dict) -> None:
        """One line of metrics.jsonl, and the tracker of --report_to."""
        if self.is_first:
            finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
            write(self.metrics, {"step": step + 1, **finite})  # NaN is not JSON
            self.track(step + 1, metrics)

    def track(self, step: int, metrics: dict) -> None:
        """Send metrics to the tracker of --report_to; the steps of two stages follow each other."""
        if self.config.report_to == "none":
            return
        if self.tracker is None:  # not before: a stage that is over must not touch the next one's
            out, knobs = Path(self.command.output_dir), settings(self.command, self.method)
            first = self.earlier + (self.step + 1 if self.step else 0)
            self.tracker = tracker(self.config.report_to, out, knobs, first)
        self.tracker.log(metrics, self.earlier + step)

    def log_rollouts(self, step: int, groups: list[Group]) -> None:
        """Append the lines of all ranks' groups to rollouts.jsonl."""
        for row in to_first([row for group in groups for row in lines_of(step, group)]):
            write(self.rollouts, row)

    def write_batch(self, batch: list) -> Path:
        """Write the records of all ranks to bad_batch.jsonl, with their prompts and tensors."""
        path = self.out / "bad_batch.jsonl"
        rows = to_first([asdict(record) for record in batch])
        if self.is_first:
            lines = [json.dumps(row, default=torch.Tensor.tolist) for row in rows]
            path.write_text("\n".join(lines) + "\n")
        return path

    def close(self) -> None:
        """Close files and tracker."""
        for opened in (self.tracker, self.metrics, self.rollouts):
            if opened:
                opened.close()


def to_first(rows: list) -> list:
    """The rows of all ranks, on rank 0; none on the others."""
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rows, gathered)
    return [row for part in gathered or [] for row in part]


def write(file, row: dict) -> None:
    """Append a row to an open .jsonl file and flush; OSError names path and bytes if that fails."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        file.write(line)
        file.flush()
    except OSError as error:
        size = len(line.encode())
        raise OSError(f"{file.name}: {size:,} bytes could not be written ({error})") from error


def open_to_append(path: Path, step: int):
    """Open a .jsonl file for appending, without the lines after `step`: those steps run again."""
    kept = path.with_name(f".{path.name}.incomplete")
    with open(kept, "w") as new:
        if step and path.exists():
            with open(path) as old:  # a kill may have cut the last line
                whole = (line for line in old if line.endswith("\n"))
                new.writelines(line for line in whole if json.loads(line).get("step", 0) <= step)
        new.flush()
        os.fsync(new.fileno())
    kept.rename(path)
    return open(path, "a")


def lines_of(step: int, group: Group) -> list[dict]:
    """The lines of rollouts.jsonl for one group: everything its responses were trained on."""
    rounded = lambda values: [round(float(v), 6) for v in values]
    rows = []
    for k, (sample, outcome) in enumerate(zip(group.samples, group.outcomes)):
        n, token_rewards = len(sample.token_ids), group.token_rewards
        row = {
            "step": step,
            "id": group.example.id,
            "k": k,
            "seed": group.seed,
            "kind": group.example.kind,
            "target": group.example.target,
            "target_ids": group.target,
            "text": sample.text,
            "token_ids": sample.token_ids,
            "finish_reason": sample.finish_reason,
            "outcome": asdict(outcome),
            "reward": group.rewards[k],
            "token_rewards": None if token_rewards is None else rounded(token_rewards[k, :n]),
            "advantages": rounded(group.advantages[k, :n]),
            "sampler_logps": rounded(sample.logps),
            "logps": rounded(group.logps[k, :n]),
        }
        rows.append({**row, "crc32": checksum(row)})
    return rows


def keep_logps(micro: list[Group], logps: Tensor) -> None:
    """Store the trainer's log-probs of each group's rollouts, for rollouts.jsonl and metrics."""
    rows = logps.detach().float().cpu().split([len(group.responses) for group in micro])
    for group, own in zip(micro, rows):
        group.logps = own[: len(group.samples)]


def checksum(row: dict) -> int:
    """CRC-32 of a line of rollouts.jsonl without this field, to detect later changes."""
    return zlib.crc32(json.dumps({k: v for k, v in row.items() if k != "crc32"}).encode())


# ------------------------------------------------------------------------------------- --report_to


def tracker(kind: str, out: Path, knobs: dict, first: int) -> SimpleNamespace:
    """An object with log(metrics, step) and close(), of "tensorboard" or "wandb".

    out    of the whole command: all stages and resumptions are one run, on one axis
    first  the first step to come: what an interrupted run has logged from there on is replaced, in
           W&B kept as it was
    """
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return _tensorboard(SummaryWriter(out / "tensorboard", purge_step=first))
    import wandb

    name = out / "wandb_run"  # the id of the run
    known = name.read_text().strip() if first and name.exists() else None
    own = {"id": known, "resume": "allow" if known else None, "allow_val_change": True}
    run = wandb.init(project="toolupt", dir=str(out), config=knobs, **own)
    name.write_text(run.id + "\n")
    logged = run.step  # wandb accepts no step below those that it has seen

    def log(metrics: dict, step: int) -> None:
        if step >= logged:
            run.log(metrics, step=step)

    return SimpleNamespace(log=log, close=run.finish)


def _tensorboard(writer) -> SimpleNamespace:
    """The same of a SummaryWriter."""

    def log(metrics: dict, step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return SimpleNamespace(log=log, close=writer.close)
