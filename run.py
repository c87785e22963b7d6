"""A run: its ranks, data, model, engine, optimiser and the records in its output folder. train.py drives it.

Run(config)      reads tokenizer and data and refuses what cannot work, before anything heavy is loaded
run.start()      loads engine and model, resumes, sends the weights to the engine
run.batch(step)  this rank's examples and their places: a function of (seed, step)
run.all_sum, all_max, optimizer_step, log, log_rollouts, save

output_dir/metrics.jsonl            first line the config, then a line per step (step 0: before training)
output_dir/rollouts.jsonl           a line per response with all that it was trained on (train.records)
output_dir/pairs.jsonl              iTool: a line per preference pair; searches.jsonl: a line per iteration
output_dir/trees-ITERATION.jsonl    iTool: the search trees, for `python mcts.py show`
output_dir/checkpoint-STEP          a plain save_pretrained folder
output_dir/checkpoint-STEP-state    sharded weights and optimiser state, for resuming on any number of ranks

Whatever moment a run is killed at, what carries one of these names is whole: folders are written under a name that
starts with a dot and renamed, and what lies there unfinished is cleared at the next start. Both folders hold
safetensors: nothing is unpickled.
"""

import ctypes
import fcntl
import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from tqdm import tqdm
from transformers import AutoConfig

import data
import itool
import model as modeling
import report
import rollout
import serving
from bench import plan

MUST_AGREE = (  # between a run and what goes on with it: else its records and its audit would be of two runs
    "algo", "stages", "seed", "eval_fraction", "train_batch_size", "num_generations", "generation_batches",
    "max_prompt_length", "max_completion_length", "reward", "advantage", "alignment", "overlong", "loss", "expert",
    "lora_rank", "split", "preference",
)  # fmt: skip
SKIPPED_STEPS = 3  # steps in a row without a finite loss and gradient before the run stops
STATE_FILE_BYTES = 2**30  # of whole tensors per file of checkpoint-STEP-state: bounds memory
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # with adapters, not their base


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came and the run left at a safe point; `signal` is its number."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.signal = number


class Clock:
    """Seconds spent in the parts of a step."""

    def __init__(self):
        self.start, self.seconds = time.perf_counter(), defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def metrics(self, tokens: int | None = None) -> dict:
        """timing_s/*, and with `tokens`, what the update reads (each prompt once), those per second."""
        step = time.perf_counter() - self.start
        timing = {f"timing_s/{name}": seconds for name, seconds in self.seconds.items()}
        speed = {} if tokens is None else {"perf/tokens_per_second": tokens / step}
        return {**timing, "timing_s/step": step, **speed}


class Run:
    """What the loops share: ranks, data, model, engine, optimiser and the records of one output folder."""

    def __init__(self, config, then: str = ""):
        """Read tokenizer and data; everything a user can get wrong is found before anything heavy is loaded.

        then  the stage that will follow, which must be able to work with the same settings
        """
        self.config, self.out, self.searches_follow = config, Path(config.output_dir), "itool" in (config.stages, then)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        check(config, self.world)
        if changed := refuse_earlier_run(config):
            self.say(f"the run goes on with other settings: {', '.join(changed)}")
        self.tokenizer = modeling.load_tokenizer(
            config.model_name_or_path, trust_remote_code=config.trust_remote_code
        )
        self.stop_ids = rollout.stop_ids(self.tokenizer, config.model_name_or_path)
        data.check_turn_end(self.tokenizer, self.stop_ids)
        check_context(config, self.longest())
        skeleton = modeling.skeleton(
            config.model_name_or_path, trust_remote_code=config.trust_remote_code
        )
        self.gpu_share, arithmetic = plan.check_room(config, skeleton)
        if arithmetic:
            self.say(arithmetic)
        count = max(1, config.save_total_limit + 1 - len(saved_steps(self.out)))
        modeling.check_checkpoints(
            self.out / "checkpoint", skeleton, count, lora_rank=config.lora_rank
        )
        self.examples, self.eval_examples = load_examples(
            config, self.tokenizer, quiet=self.rank > 0
        )
        # the tokenizer is saved with every checkpoint
        serving.add_tool_template(self.tokenizer, serving.system_prompt_of(self.examples))
        if self.searches_follow:  # a pool too small is refused before the warm-up
            self.pool = itool.pool_of(
                self.examples, config.pool_fraction, config.buffer_fraction, config.seed
            )
        self.tag_length = data.tag_length(self.tokenizer)
        self.first_step, self.skipped, self.epoch = 0, 0, (None, None)
        self.saved, self.lock = 0, None
        self.signal = 0  # number of the signal that asked this rank to stop

    def start(self) -> None:
        """Load engine, model and optimiser: what takes time and memory."""
        config = self.config
        self.engine = rollout.make_engine(
            config.engine,
            config.model_name_or_path,
            max_model_len=self.longest(),
            max_num_seqs=config.max_num_seqs,
            gpu_memory_utilization=self.gpu_share,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            logprobs_mode="raw_logprobs" if config.stages == "itool" else "processed_logprobs",
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
        self.engine.sleep()
        self.model, _ = modeling.load(
            config.model_name_or_path,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            quant=config.quant,
            gradient_checkpointing=config.gradient_checkpointing,
            torch_compile=config.torch_compile,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
        )
        self.optimizer = modeling.optimizer(
            self.model, config.learning_rate, (0.9, config.adam_beta2), config.weight_decay
        )
        self.out.mkdir(parents=True, exist_ok=True)
        self.check_shared()
        if self.rank == 0:
            self.lock = lock(self.out)
            clean(self.out)
        self.resume()
        self.metrics_file = self.rollouts_file = self.tracker = None
        self.searches = {}  # iTool: what an interrupted run has found, by iteration
        if config.stages == "itool":
            again = self.first_step > 0 or config.resume_from_checkpoint == "latest"
            self.searches = read_searches(self.out, self.first_step if again else -1)
            dist.barrier()
        if self.rank == 0:
            self.metrics_file = open_records(self.out / "metrics.jsonl", self.first_step)
            if config.log_rollouts and "rl" in config.stages:
                self.rollouts_file = open_records(self.out / "rollouts.jsonl", self.first_step)
            if self.metrics_file.tell() == 0:
                self.write(self.metrics_file, asdict(config))
            self.tracker = report.tracker(config.report_to, self.out, asdict(config))
            self.skipped = next(reversed(report.history(self.out, "skipped")), 0)
        self.skipped = int(self.all_max(self.skipped))

    # data

    def batch(
        self, position: int, examples: list | None = None, *, size: int = 0
    ) -> list[tuple[int, data.Example]]:
        """This rank's part of batch number `position`: places in the stream of all batches, and examples.

        Each epoch is a shuffle by (seed, epoch). Prompts are dealt by length, so that ranks finish together.
        examples  what to draw from; None: all training examples
        size      examples over all ranks; 0: train_batch_size
        """
        examples = self.examples if examples is None else examples
        size, n = size or self.config.train_batch_size, len(examples)
        places, batch = range(position * size, (position + 1) * size), []
        for i in places:
            if self.epoch[0] != (i // n, n):
                order = list(range(n))
                random.Random(f"{self.config.seed}/{i // n}").shuffle(order)
                self.epoch = ((i // n, n), order)
            batch.append(examples[self.epoch[1][i % n]])
        return self.deal(list(zip(places, batch)), lambda item: data.characters(item[1]))

    def deal(self, items: list, size: Callable) -> list:
        """This rank's part of `items`, which all ranks hold: dealt by size, there and back, kept in their order."""
        if self.world == 1:
            return items
        largest_first = sorted(range(len(items)), key=lambda i: (-size(items[i]), i))
        there_and_back = [*range(self.world), *reversed(range(self.world))]
        ranks = dict(zip(largest_first, itertools.cycle(there_and_back)))
        return [item for i, item in enumerate(items) if ranks[i] == self.rank]

    def ids(self, example: data.Example) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, as eval.py renders it, and of the expert response with the turn's end."""
        return data.render(example, self.tokenizer), data.target_ids(example, self.tokenizer)

    # ranks

    def all_sum(self, values: dict) -> dict:
        """The values of all ranks, added up by name."""
        tensor = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
        dist.all_reduce(tensor)
        return dict(zip(values, tensor.tolist()))

    def all_max(self, value: float) -> float:
        """The largest value of all ranks."""
        tensor = torch.tensor([float(value)], dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def all_count(self, counts: dict) -> Counter:
        """Counts of all ranks, added up; ranks may know different names."""
        return sum(map(Counter, self.all_gather([dict(counts)])), Counter())

    def all_gather(self, rows: list) -> list:
        """The lists of all ranks, one after the other, on every rank."""
        parts = [None] * self.world
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def share(self, n: int) -> list[int]:
        """This rank's indices out of n, equally many on all ranks: the last may be a repeat."""
        return [(self.rank + i * self.world) % n for i in range(math.ceil(n / self.world))]

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            tqdm.write(text)

    def lowest(self, name: str) -> float:
        """The lowest value of a metric so far, on all ranks; infinity before the first."""
        return -self.all_max(-min(report.history(self.out, name), default=math.inf))

    def highest(self, name: str) -> float:
        """The highest value of a metric so far, on all ranks; minus infinity before the first."""
        return self.all_max(max(report.history(self.out, name), default=-math.inf))

    # the optimiser

    def optimizer_step(self, lr: float, loss: float, grad_norm: float, groups: list) -> int:
        """Update the weights, unless loss or gradient are not finite; return how many steps in a row were skipped.

        loss, grad_norm  of the whole step: equal on all ranks
        groups           this rank's train.Group, or pairs of iTool, written down before the run stops
        ValueError when SKIPPED_STEPS in a row are not finite. The gradient is forgotten either way.
        """
        self.skipped = 0 if math.isfinite(loss + grad_norm) else self.skipped + 1
        if self.skipped == 0:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        elif self.skipped == SKIPPED_STEPS:
            raise ValueError(
                f"no finite loss and gradient in {self.skipped} steps in a row (loss {loss}, gradient norm {grad_norm}); "
                f"the last batch lies in {self.write_batch(groups)}; lower --learning_rate, or look for what is odd in it"
            )
        self.optimizer.zero_grad()
        return self.skipped

    def restart_optimizer(self) -> None:
        """Forget the moments: a stage or iteration begins."""
        self.optimizer.state.clear()

    # iTool

    def searcher(self, seed: str) -> itool.Searcher:
        """The tree search of this run's engine."""
        config = self.config
        return itool.Searcher(
            self.engine,
            self.tokenizer,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_completion_length,
            self_evaluation=config.self_evaluation if config.mcts else "none",
            seed=seed,
        )

    def longest(self) -> int:
        """Tokens of the longest sequence that the engine will see."""
        config = self.config
        longest = config.max_prompt_length + config.max_completion_length
        if not self.searches_follow or not config.mcts or config.self_evaluation == "none":
            return longest
        question = itool.question(self.tokenizer, config.self_evaluation, "", "")
        return max(longest, len(question) + 2 * config.max_completion_length + 1)

    def log_search(self, summary: dict, pairs: list[dict]) -> None:
        """Append to pairs.jsonl, then to searches.jsonl, which tells that the pairs are whole; numbers to the tracker."""
        if self.rank == 0:
            if self.tracker:
                numbers = {k: v for k, v in summary.items() if isinstance(v, (int, float))}
                self.tracker({f"search/{k}": v for k, v in numbers.items()}, summary["step"])
            for name, rows in (("pairs.jsonl", pairs), ("searches.jsonl", [summary])):
                with open(self.out / name, "a") as file:
                    for row in rows:
                        self.write(file, row)
        dist.barrier()

    def log_trees(self, iteration: int, trees: list[dict]) -> None:
        """Write the trees of all ranks to trees-ITERATION.jsonl."""
        trees = sorted(self.all_gather(trees), key=lambda tree: tree["tree"])
        if self.rank == 0 and trees:
            new = self.out / f".trees-{iteration}.jsonl.incomplete"
            with open(new, "w") as file:
                for tree in trees:
                    self.write(file, tree)
            new.rename(self.out / f"trees-{iteration}.jsonl")

    # records

    @contextmanager
    def progress(self, total: int, first: int | None = None, what: str = ""):
        """A bar on rank 0, from `first`, or over steps from the one that the run resumed at.

        Within, SIGTERM and Ctrl-C wait for the next `stop_if_asked`.
        """

        def note(number, frame):
            self.signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with tqdm(
                total=total,
                initial=self.first_step if first is None else first,
                desc=what or self.config.algo,
                disable=self.rank > 0,
                dynamic_ncols=True,
            ) as bar:
                yield bar
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_if_asked(self, step: int) -> None:
        """Where any rank was asked to stop: save after `step` finished steps and raise Interrupted, on all ranks.

        To be called while the weights are those after `step` steps: anywhere before the optimiser moves them.
        """
        number = int(self.all_max(self.signal))
        if number:
            if step > self.saved:
                self.save(step)
            name = signal.Signals(number).name
            raise Interrupted(
                number,
                f"{name}: left after step {step}; --resume_from_checkpoint latest goes on from there",
            )

    @staticmethod
    def postfix(metrics: dict) -> dict:
        names = {
            "reward": "reward",
            "accuracy": "accuracy",
            "eval/accuracy": "eval",
            "loss": "loss",
        }
        return {short: f"{metrics[name]:.3f}" for name, short in names.items() if name in metrics}

    def write(self, file, row: dict) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()

    def log(self, step: int, metrics: dict) -> None:
        """One line of metrics.jsonl, and the tracker of --report_to."""
        if self.rank > 0:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.write(self.metrics_file, {"step": step + 1, **finite})  # NaN is not JSON
        if self.tracker:
            self.tracker(metrics, step + 1)

    def end_step(self, bar, step: int, metrics: dict, last: bool, **shown) -> None:
        """Log a step, move the bar, and save where --save_steps or the last step asks for it.

        last   of its loop, stage or iteration
        shown  what else the bar says
        """
        self.log(step, metrics)
        bar.set_postfix(self.postfix(metrics), **shown)
        bar.update()
        if last or (step + 1) % self.config.save_steps == 0:
            self.save(step + 1)

    def log_rollouts(self, rows: list[dict]) -> None:
        """Append the rows of all ranks to rollouts.jsonl."""
        gathered = [None] * self.world if self.rank == 0 else None
        dist.gather_object(rows, gathered)
        for part in gathered or []:
            for row in part:
                self.write(self.rollouts_file, row)

    def write_batch(self, groups: list) -> Path:
        """Write the groups of all ranks to bad_batch.jsonl, one line each, with prompts, tensors and NaN."""
        gathered = [None] * self.world if self.rank == 0 else None
        plain = [asdict(group) if is_dataclass(group) else group for group in groups]
        dist.gather_object(plain, gathered)
        path = self.out / "bad_batch.jsonl"
        if gathered:
            lines = [json.dumps(g, default=torch.Tensor.tolist) for part in gathered for g in part]
            path.write_text("\n".join(lines) + "\n")
        return path

    # checkpoints

    def save(self, step: int) -> None:
        """Write checkpoint-STEP, a plain model folder, and then checkpoint-STEP-state, what resuming needs (DCP)."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"checkpoint-{step}"
        modeling.save(self.model, self.tokenizer, path)
        save_state(self.model, self.optimizer, state_of(path))
        self.saved = step
        trim_memory()
        limit = self.config.save_total_limit
        if self.rank == 0 and limit:
            remove(self.out, saved_steps(self.out)[:-limit])

    def resume(self) -> None:
        """Take step, weights and optimiser from --resume_from_checkpoint; data and seeds follow from the step."""
        where = self.config.resume_from_checkpoint
        found = [saved_steps(self.out)]
        dist.broadcast_object_list(found)  # one view of the folder for all ranks
        steps = found[0]
        if not where or (where == "latest" and not steps):
            return  # also the first start of a job that always passes latest
        folder = self.out / f"checkpoint-{steps[-1]}" if where == "latest" else Path(where)
        load_state(self.model, self.optimizer, state_of(folder))
        self.first_step = self.saved = int(folder.name.removeprefix("checkpoint-"))
        later = [step for step in steps if step > self.first_step]
        if self.rank == 0 and later:
            print(
                f"going on after step {self.first_step}: checkpoints of later steps {later} are deleted"
            )
            remove(self.out, later)

    def check_shared(self) -> None:
        """ValueError on all ranks unless all of them see rank 0's output_dir: each writes its part of a checkpoint."""
        token, missing = self.out / ".shared", 0
        if self.rank == 0:
            token.write_text("all ranks must see this file\n")
        dist.barrier()
        for _ in range(50):  # a network file system may need some seconds
            missing = not token.exists()
            if not missing:
                break
            time.sleep(0.1)
        missing = self.all_sum({"ranks": missing})["ranks"]
        if self.rank == 0:
            token.unlink()
        if missing:
            raise ValueError(
                f"--output_dir {self.out}: {missing:.0f} of {self.world} ranks do not see the files of rank 0; "
                "choose a folder on a file system that all nodes share"
            )

    def close(self) -> None:
        """Free the engine and close the records."""
        self.engine.close()
        for file in (self.metrics_file, self.rollouts_file, self.lock):
            if file:
                file.close()


def trim_memory() -> None:
    """Give the system back what the process has freed: glibc keeps it, in pieces, and a long run grows."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
    if trim:
        trim(0)


def read_searches(out: Path, step: int) -> dict[int, tuple[dict, list[dict]]]:
    """Iteration -> summary and pairs of the searches made before `step`; the later ones are forgotten.

    step  optimiser steps that the run goes on from; -1: it begins anew, nothing is kept
    Call it on all ranks, then a barrier: rank 0 rewrites the two files and deletes other trees.
    """
    kept = {}
    for name in ("searches.jsonl", "pairs.jsonl"):
        path = out / name
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        kept[name] = [json.loads(line) for line in lines]  # a crash may have cut the last line
    searches = {row["iteration"]: row for row in kept["searches.jsonl"] if row["step"] <= step}
    found = {
        i: (row, [p for p in kept["pairs.jsonl"] if p["iteration"] == i])
        for i, row in searches.items()
    }
    dist.barrier()  # all have read
    if dist.get_rank() == 0:
        for name, rows in (
            ("searches.jsonl", list(searches.values())),
            ("pairs.jsonl", [pair for _, pairs in found.values() for pair in pairs]),
        ):
            new = out / f".{name}.incomplete"
            new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            new.rename(out / name)
        for path in out.glob("trees-*.jsonl"):
            if path.stem not in {f"trees-{iteration}" for iteration in found}:
                path.unlink()
    return found


def open_records(path: Path, step: int):
    """Open a .jsonl file for appending, without the lines of steps after `step`: those will be run again."""
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


def state_of(folder: Path) -> Path:
    """The folder that holds the optimiser state of a checkpoint."""
    return folder.with_name(folder.name + "-state")


def training_state(model, optimizer) -> dict:
    """Weights and moments by name, each tensor once, sharded as they are; all that is not a function of (config, step)."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    once = {name for name, _ in model.named_parameters()}  # tied weights have two names
    return {
        "model": {name: weights[name] for name in weights if name in once},
        "optimizer": moments["state"],
    }


def save_state(model, optimizer, path: Path) -> None:
    """Write weights and moments as sharded safetensors (DCP); the folder appears when it is whole, all ranks call."""
    state = training_state(model, optimizer)
    sizes = {f"model.{name}": tensor.nbytes for name, tensor in state["model"].items()}
    for name, moments in state["optimizer"].items():
        sizes |= {f"optimizer.{name}.{key}": tensor.nbytes for key, tensor in moments.items()}
    files, filled = {}, 0
    for name, size in sizes.items():
        filled += size
        files[name] = 1 + filled // STATE_FILE_BYTES
    files = {name: 1 + sorted({*files.values()}).index(file) for name, file in files.items()}
    temporary = path.with_name(f".{path.name}.incomplete")
    if dist.get_rank() == 0:  # the others write when rank 0 has planned the save
        shutil.rmtree(temporary, ignore_errors=True)
    writer = HuggingFaceStorageWriter(
        str(temporary), fqn_to_index_mapping=files, save_distributed=True
    )
    try:
        checkpoint.save(state, storage_writer=writer)
    except checkpoint.CheckpointException as error:
        raise OSError(f"{temporary} could not be written: {last_line(error)}") from error
    if dist.get_rank() == 0:
        modeling.replace_folder(path, temporary)
    dist.barrier()


def load_state(model, optimizer, path: Path) -> None:
    """Read what `save_state` wrote, on any number of ranks; ValueError where it is not of this model."""
    state = training_state(model, optimizer)
    try:
        checkpoint.load(state, storage_reader=HuggingFaceStorageReader(str(path)))
    except checkpoint.CheckpointException as error:
        raise ValueError(
            f"{path} does not hold the state of this model ({last_line(error)}): choose another checkpoint"
        ) from error
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    weights |= state["model"]
    moments["state"] = state["optimizer"]
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=TRAINED,
    )


def last_line(error: BaseException) -> str:
    """What went wrong, at the end of DCP's traceback of tracebacks."""
    return str(error).strip().splitlines()[-1]


def saved_steps(out: Path) -> list[int]:
    """Steps of the checkpoints in `out`, ascending: those with a model folder and a state to resume from."""
    states = out.glob("checkpoint-*-state")
    steps = (path.name.split("-")[1] for path in states)
    return sorted(int(step) for step in steps if (out / f"checkpoint-{step}").is_dir())


def remove(out: Path, steps: list[int]) -> None:
    """Delete the checkpoints of these steps; a kill in between leaves what `clean` clears."""
    for step in steps:
        for name in (f"checkpoint-{step}", f"checkpoint-{step}-state"):
            (out / name).rename(out / f".{name}.old")
            shutil.rmtree(out / f".{name}.old", ignore_errors=True)


def refuse_earlier_run(config) -> list[str]:
    """ValueError where a start would write over, or mix with, a run that it does not go on with, or has none to go on with.

    Returns what else differs from the settings of the run that it goes on with.
    """
    out, where = Path(config.output_dir), config.resume_from_checkpoint
    steps, path = saved_steps(out), out / "metrics.jsonl"
    if where not in ("", "latest"):
        folder = Path(where)
        if not state_of(folder).is_dir():
            raise ValueError(
                f"--resume_from_checkpoint {where}: no optimiser state in {state_of(folder)}; take latest, or "
                f"{folder.parent}/checkpoint-STEP of one of the steps {saved_steps(folder.parent)}"
            )
        if not folder.name.removeprefix("checkpoint-").isdigit():
            raise ValueError(f"--resume_from_checkpoint {where}: the folder's name must be checkpoint-STEP")
    own = where == "latest" or (where and Path(where).resolve().parent == out.resolve())
    if steps and not own:
        raise ValueError(
            f"--output_dir {out} holds a run's checkpoints of steps {steps}: --resume_from_checkpoint latest "
            "goes on with it; to begin anew take another folder, or delete this one"
        )
    if steps and path.exists():
        with open(path) as file:
            earlier, now = json.loads(next(file, "{}")), asdict(config)
        changed = {
            name: f"--{name} {earlier[name]} -> {now[name]}"
            for name in now
            if earlier.get(name, now[name]) != now[name] and name != "resume_from_checkpoint"
        }
        if wrong := [text for name, text in changed.items() if name in MUST_AGREE]:
            raise ValueError(
                f"--output_dir {out} holds a run with other settings ({', '.join(wrong)}): resume it with its own, "
                "or take another folder"
            )
        return list(changed.values())
    return []


def lock(out: Path):
    """An open file that is locked until this process ends; ValueError where another run holds it."""
    file = open(out / ".lock", "w")  # noqa: SIM115 - open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run writes into --output_dir {out}: end it, or choose another"
        ) from None
    return file


def clean(out: Path) -> None:
    """Clear what a kill left unfinished; where the rename of a new folder did not happen the old one comes back."""
    for old in out.glob(".checkpoint-*.old"):
        path = out / old.name[1 : -len(".old")]
        if path.name.endswith("best") and not path.exists():
            old.rename(path)
    for path in (*out.glob(".checkpoint-*.incomplete"), *out.glob(".checkpoint-*.old")):
        shutil.rmtree(path)
    for state in out.glob("checkpoint-*-state"):
        if not (out / state.name.removesuffix("-state")).exists():
            shutil.rmtree(state)


def load_examples(config, tokenizer, quiet: bool) -> tuple[list, list]:
    """Training examples and the fixed evaluation subset; what is too long is dropped, counted and said."""
    examples = [
        e for source in config.train_file for e in data.load_source(source, seed=config.seed)
    ]
    if config.eval_file:
        held_out = [
            e for source in config.eval_file for e in data.load_source(source, seed=config.seed)
        ]
    elif all(source.partition(":")[0] == "toy" for source in config.train_file):
        level = "hard-test" if any("hard" in source for source in config.train_file) else "test"
        held_out = data.load("toy", level)
    else:
        held_out, examples = data.split(examples, config.eval_fraction, config.seed)
    parts = []
    for name, part in (("train", examples), ("eval", held_out)):
        part, drops = data.fit(
            part, tokenizer, config.max_prompt_length, config.max_completion_length
        )
        dropped = "".join(f", {n} dropped: {why}" for why, n in drops.items())
        if not quiet:
            print(f"{name}: {len(part)} examples{dropped}")
        if not part:
            raise ValueError(
                f"no {name} example fits{dropped}; raise --max_prompt_length (prompt) or --max_completion_length (target); "
                "python data.py stats FILE --tokenizer MODEL shows lengths"
            )
        parts.append(part)
    train, held_out = parts
    check_experts(config, train)
    if len(train) < config.train_batch_size:
        raise ValueError(
            f"{len(train)} training examples are fewer than --train_batch_size {config.train_batch_size}; lower it"
        )
    return train, random.Random(config.seed).sample(held_out, min(config.eval_size, len(held_out)))


def check_experts(config, examples: list) -> None:
    """Refuse examples without an expert response where the method trains on it."""
    if config.expert == "none" and not {"sft", "warmup"} & {*config.stages.split(",")}:
        return
    bare = [
        e for e in examples if not e.target.removeprefix("<answer>")[: -len("</answer>")].strip()
    ]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(examples)} training examples have no expert response ({bare[0].id} first), which "
            f"--algo {config.algo} learns from: leave them out, or take --algo fg_dapo_star, which needs the tags only"
        )


def check(config, world: int) -> None:
    """Refuse settings that cannot work, before anything is loaded."""
    choices = {
        "stages": ("rl", "sft", "sft,rl", "itool", "warmup", "warmup,itool"), "reward": ("outcome", "binary"), "advantage": ("fgae", "group", "luffy"),
        "loss": ("dapo", "grpo", "luffy", "srft", "chord"), "expert": ("none", "spo", "sft", "group"),
        "alignment": ("positional", "lcs"), "lr_scheduler_type": ("constant", "cosine"),
        "split": ("difficulty", "even", "none"), "buffer_rank": ("stratified", "global"),
        "preference": ("simpo", "dpo", "ipo", "orpo"), "self_evaluation": itool.SELF_EVALUATION,
        "quant": ("none", "4bit"), "engine": ("vllm", "transformers"), "report_to": ("none", "tensorboard", "wandb"),
        "srft_variant": ("paper", "hpt"),
    }  # fmt: skip
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"--{name} {getattr(config, name)}: choose one of {', '.join(allowed)}"
            )
    for name in (
        "max_steps",
        "train_batch_size",
        "num_generations",
        "generation_batches",
        "max_completion_length",
        "max_tokens_per_row",
        "eval_size",
        "save_steps",
        "sft_max_steps",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)}: must be at least 1")
    if (config.algo == "itool") != bool({"itool", "warmup"} & {*config.stages.split(",")}):
        raise ValueError(
            f"--stages {config.stages} is not of --algo {config.algo}: iTool's are warmup, itool and warmup,itool, "
            "the others' rl, sft and sft,rl"
        )
    if not config.eval_file and not 0 < config.eval_fraction < 1:
        raise ValueError(
            f"--eval_fraction {config.eval_fraction} leaves no validation data; give --eval_file, "
            "or hold out a share between 0 and 1"
        )
    if "rl" in config.stages and config.num_generations < 2:
        raise ValueError(
            "--num_generations 1: a group advantage compares responses; take at least 2"
        )
    if config.max_logp_difference < 0:
        raise ValueError(f"--max_logp_difference {config.max_logp_difference}: in nat, 0 or above")
    if config.tis_cap < 0:
        raise ValueError(f"--tis_cap {config.tis_cap}: take 0 (off) or a positive cap, 2 is usual")
    if not 0 <= config.balance_low <= config.balance_high <= 1:
        raise ValueError("--balance_low and --balance_high: take 0 <= low <= high <= 1")
    if not 0 <= config.overlong <= 1:
        raise ValueError(
            f"--overlong {config.overlong}: a share of --max_completion_length, 0 .. 1"
        )
    if config.overlong and round(config.overlong * config.max_completion_length) < 1:
        raise ValueError(
            f"--overlong {config.overlong}: less than a token of --max_completion_length {config.max_completion_length}"
        )
    if config.spo_beta <= 0:
        raise ValueError(f"--spo_beta {config.spo_beta}: must be positive")
    if not 0 <= config.warmup_ratio <= 1:
        raise ValueError(f"--warmup_ratio {config.warmup_ratio}: a share of the steps, 0 .. 1")
    if config.overlong and config.advantage == "fgae":
        raise ValueError(
            "--overlong has no effect under --advantage fgae (Eq. 14): drop one of them"
        )
    if config.temperature <= 0:
        raise ValueError(
            f"--temperature {config.temperature}: sampling for training needs a positive temperature"
        )
    try:
        balance = 0.0 if config.balance in ("cycle", "decay") else float(config.balance)
    except ValueError:
        balance = math.nan
    if not 0 <= balance <= 1:
        raise ValueError(f"--balance {config.balance}: take cycle, decay or a number in 0 .. 1")
    shortest = 1 if config.balance == "cycle" else 0  # CHORD-mu has no rise
    for name in ("balance_up", "balance_down"):
        if getattr(config, name) < shortest:
            raise ValueError(
                f"--{name} {getattr(config, name)}: --balance {config.balance} takes at least {shortest}"
            )
    if config.train_batch_size % world:
        raise ValueError(
            f"--train_batch_size {config.train_batch_size} is not divisible by the {world} ranks; "
            f"take {config.train_batch_size // world * world or world}"
        )
    if config.quant != "none" and config.lora_rank == 0:
        raise ValueError("--quant 4bit trains adapters only: give a --lora_rank, 16 in iTool")
    if config.quant != "none" and not find_spec("bitsandbytes"):
        raise ImportError("--quant 4bit needs bitsandbytes: pip install bitsandbytes")
    if config.torch_compile and not torch.cuda.is_available():
        if not shutil.which(os.environ.get("CXX", "g++")):
            raise ValueError("--torch_compile: no C++ compiler; install g++, or leave the flag out")
    if "itool" in config.stages or "warmup" in config.stages:
        check_itool(config)
    fits = {"dapo": ("none", "spo", "sft"), "grpo": ("none",), "chord": ("sft",)}.get(
        config.loss, ("group",)
    )
    if "rl" in config.stages and config.expert not in fits:
        raise ValueError(
            f"--loss {config.loss} takes --expert {' or '.join(fits)}, not {config.expert}"
        )
    for name, on in (
        ("advantage fgae", config.advantage == "fgae"),
        ("tis_cap", config.tis_cap > 0),
    ):
        if "rl" in config.stages and on and config.loss != "dapo":
            raise ValueError(f"--{name} needs --loss dapo, a mean over tokens; not {config.loss}")
    if config.advantage == "fgae" and config.reward == "binary":
        raise ValueError(
            "--advantage fgae builds on the outcome reward in [-3, 4]: drop --reward binary"
        )


def check_itool(config) -> None:
    """Refuse settings of iTool that cannot work."""
    for name in ("pool_fraction", "buffer_fraction", "top_p"):
        if not 0 < getattr(config, name) <= 1:
            raise ValueError(f"--{name} {getattr(config, name)}: take a share above 0, at most 1")
    for name in ("iterations", "preference_epochs", "warmup_epochs", "mcts_iterations"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)}: must be at least 1")
    if not 0 <= config.held_out_pairs < 1:
        raise ValueError(f"--held_out_pairs {config.held_out_pairs}: a share, 0 .. below 1")
    for name in ("simpo_beta", "dpo_beta", "ipo_tau", "orpo_lam"):
        if getattr(config, name) <= 0:
            raise ValueError(f"--{name} {getattr(config, name)}: must be positive")
    itool.search_config(config)  # refuses depths and roll-outs below the least
    if config.mcts_width < 2:
        raise ValueError("--mcts_width 1: a pair compares two steps; take at least 2")
    if len(config.warmup_learning_rates) not in ((1, 3) if config.split == "none" else (3,)):
        raise ValueError("--warmup_learning_rates: give three, for easy, medium and hard; one will do for --split none")
    if config.vllm_tensor_parallel_size > 1:
        raise ValueError(
            "--vllm_tensor_parallel_size: each rank searches its own trees; take 1, or --quant 4bit "
            "and a lower --vllm_gpu_memory_utilization where memory is short"
        )


def check_context(config, wanted: int) -> None:
    """Refuse lengths beyond what the model can read; wanted  tokens of the longest sequence."""
    model = AutoConfig.from_pretrained(
        config.model_name_or_path, trust_remote_code=config.trust_remote_code
    )
    room = model.max_position_embeddings
    graded = wanted > config.max_prompt_length + config.max_completion_length
    if wanted > room:
        raise ValueError(
            f"{config.model_name_or_path} reads {room} tokens; --max_prompt_length {config.max_prompt_length} and "
            f"--max_completion_length {config.max_completion_length} need {wanted}: lower them"
            + " (iTool's question to grade a response, twice the latter: or --self_evaluation none)" * graded
        )
