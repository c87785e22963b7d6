"""A run: its ranks, data, model, engine, optimiser and the records in its output folder. train.py drives it.

Run(config)      reads tokenizer and data and refuses what cannot work, before anything heavy is loaded
run.start()      loads engine and model, resumes, sends the weights to the engine
run.batch(step)  this rank's examples: a function of (seed, step)
run.all_sum, all_max, optimizer_step, log, log_rollouts, save

output_dir/metrics.jsonl            first line the config, then a line per step (step 0: before training)
output_dir/rollouts.jsonl           a line per response with all that it was trained on (train.records)
output_dir/pairs.jsonl              iTool: a line per preference pair; searches.jsonl: a line per iteration
output_dir/trees-ITERATION.jsonl    iTool: the search trees, for `python mcts.py show`
output_dir/checkpoint-STEP          a plain save_pretrained folder
output_dir/checkpoint-STEP-state    sharded weights and optimiser state, for resuming
"""

import json
import math
import random
import shutil
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
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

SKIPPED_STEPS = 3  # steps in a row without a finite gradient before the run stops
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # with adapters, not their base


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

    def __init__(self, config):
        """Read tokenizer and data; everything a user can get wrong is found before anything heavy is loaded."""
        self.config, self.out = config, Path(config.output_dir)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        check(config, self.world)
        self.tokenizer = modeling.load_tokenizer(
            config.model_name_or_path, trust_remote_code=config.trust_remote_code
        )
        check_context(config)
        self.examples, self.eval_examples = load_examples(
            config, self.tokenizer, quiet=self.rank > 0
        )
        self.tag_length = data.tag_length(self.tokenizer)
        self.first_step, self.skipped, self.epoch = 0, 0, (None, None)

    def start(self) -> None:
        """Load engine, model and optimiser: what takes time and memory."""
        config = self.config
        self.engine = rollout.make_engine(
            config.engine,
            config.model_name_or_path,
            max_model_len=self.longest(),
            max_num_seqs=config.max_num_seqs,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            logprobs_mode="raw_logprobs" if config.stages == "itool" else "processed_logprobs",
            seed=config.seed,
        )
        self.engine.sleep()
        torch.manual_seed(config.seed)  # adapters start at random, equal on all ranks
        self.model, _ = modeling.load(
            config.model_name_or_path,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            quant=config.quant,
            gradient_checkpointing=config.gradient_checkpointing,
            trust_remote_code=config.trust_remote_code,
        )
        self.model = modeling.shard(self.model)
        self.optimizer = modeling.optimizer(
            self.model, config.learning_rate, (0.9, config.adam_beta2), config.weight_decay
        )
        weights = sum(4 * parameter.numel() for parameter in self.model.parameters())
        modeling.check_disk(self.out / "checkpoint", 4 * weights)  # model, and again with 2 moments
        self.out.mkdir(parents=True, exist_ok=True)
        self.resume()
        self.metrics_file = self.rollouts_file = self.tracker = None
        self.searches = {}
        if config.stages == "itool":
            self.searches = read_searches(self.out, self.first_step)
            dist.barrier()
        if self.rank == 0:
            self.metrics_file = open_records(self.out / "metrics.jsonl", self.first_step)
            if config.log_rollouts and "rl" in config.stages:
                self.rollouts_file = open_records(self.out / "rollouts.jsonl", self.first_step)
            if self.metrics_file.tell() == 0:
                self.write(self.metrics_file, asdict(config))
            self.tracker = report.tracker(config.report_to, self.out, asdict(config))

    # data

    def batch(
        self, position: int, examples: list | None = None, *, size: int = 0
    ) -> list[data.Example]:
        """This rank's examples of batch number `position`: each epoch is a shuffle by (seed, epoch).

        examples  what to draw from; None: all training examples
        size      examples over all ranks; 0: train_batch_size
        """
        examples = self.examples if examples is None else examples
        size, n = size or self.config.train_batch_size, len(examples)
        mine = []
        for i in range(
            position * size + self.rank * size // self.world,
            position * size + (self.rank + 1) * size // self.world,
        ):
            if self.epoch[0] != (i // n, n):
                order = list(range(n))
                random.Random(f"{self.config.seed}/{i // n}").shuffle(order)
                self.epoch = ((i // n, n), order)
            mine.append(examples[self.epoch[1][i % n]])
        return mine

    def ids(self, example: data.Example) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the expert response with EOS: made here and nowhere else."""
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
        return -self.all_max(-report.lowest(self.out, name))

    # the optimiser

    def optimizer_step(self, lr: float, grad_norm: float) -> int:
        """Update the weights, unless the gradient is not finite; return how many steps in a row were skipped.

        ValueError when that happens SKIPPED_STEPS times in a row. The gradient is forgotten either way.
        """
        self.skipped = 0 if math.isfinite(grad_norm) else self.skipped + 1
        if self.skipped == 0:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        elif self.skipped == SKIPPED_STEPS:
            raise ValueError(
                f"no finite gradient in {self.skipped} steps in a row; see the last responses in "
                f"{self.out}/rollouts.jsonl, and lower --learning_rate"
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
        if config.stages != "itool" or not config.mcts or config.self_evaluation == "none":
            return longest
        question = itool.question(self.tokenizer, config.self_evaluation, "", "")
        return max(longest, len(question) + 2 * config.max_completion_length + 1)

    def search_of(self, iteration: int) -> tuple[dict, list[dict]] | None:
        """Summary and pairs of a search that an interrupted run has finished, else None."""
        return self.searches.get(iteration)

    def log_search(self, summary: dict, pairs: list[dict]) -> None:
        """Append to pairs.jsonl, then to searches.jsonl, which tells that the pairs are whole."""
        if self.rank == 0:
            for name, rows in (("pairs.jsonl", pairs), ("searches.jsonl", [summary])):
                with open(self.out / name, "a") as file:
                    for row in rows:
                        self.write(file, row)
        dist.barrier()

    def log_trees(self, iteration: int, trees: list[dict]) -> None:
        """Write the trees of all ranks to trees-ITERATION.jsonl."""
        trees = self.all_gather(trees)
        if self.rank == 0 and trees:
            with open(self.out / f"trees-{iteration}.jsonl", "w") as file:
                for tree in trees:
                    self.write(file, tree)

    # records

    @contextmanager
    def progress(self, total: int, first: int | None = None, what: str = ""):
        """A bar on rank 0, from `first`, or over steps from the one that the run resumed at."""
        with tqdm(
            total=total,
            initial=self.first_step if first is None else first,
            desc=what or self.config.algo,
            disable=self.rank > 0,
            dynamic_ncols=True,
        ) as bar:
            yield bar

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

    def log_rollouts(self, rows: list[dict]) -> None:
        """Append the rows of all ranks to rollouts.jsonl."""
        gathered = [None] * self.world if self.rank == 0 else None
        dist.gather_object(rows, gathered)
        for part in gathered or []:
            for row in part:
                self.write(self.rollouts_file, row)

    def save(self, step: int) -> None:
        """Write checkpoint-STEP, a plain model folder, and checkpoint-STEP-state, what resuming needs (DCP)."""
        self.out.mkdir(parents=True, exist_ok=True)
        modeling.save(self.model, self.tokenizer, self.out / f"checkpoint-{step}")
        weights, moments = get_state_dict(self.model, self.optimizer, options=TRAINED)
        checkpoint.save(
            {"model": weights, "optimizer": moments},
            checkpoint_id=self.out / f"checkpoint-{step}-state",
        )
        limit = self.config.save_total_limit
        if self.rank == 0 and limit:
            remove(self.out, saved_steps(self.out)[:-limit])

    def resume(self) -> None:
        """Take step, weights and optimiser from --resume_from_checkpoint; data and seeds follow from the step."""
        where = self.config.resume_from_checkpoint
        if not where:
            return
        steps = saved_steps(self.out)
        if where == "latest" and not steps:
            return  # the first start of a job that always passes latest
        folder = self.out / f"checkpoint-{steps[-1]}" if where == "latest" else Path(where)
        state = folder.with_name(folder.name + "-state")
        if not (state / ".metadata").exists():
            raise ValueError(
                f"--resume_from_checkpoint {where}: no optimiser state in {state}; choose among {steps}"
            )
        weights, moments = get_state_dict(self.model, self.optimizer, options=TRAINED)
        checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=state)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=weights,
            optim_state_dict=moments,
            options=TRAINED,
        )
        self.first_step = int(folder.name.removeprefix("checkpoint-"))
        later = [step for step in steps if step > self.first_step]
        if self.rank == 0 and later:
            print(
                f"going on after step {self.first_step}: checkpoints of later steps {later} are deleted"
            )
            remove(self.out, later)

    def close(self) -> None:
        """Free the engine and close the records."""
        self.engine.close()
        for file in (self.metrics_file, self.rollouts_file):
            if file:
                file.close()


def read_searches(out: Path, step: int) -> dict[int, tuple[dict, list[dict]]]:
    """Iteration -> summary and pairs of the searches made before `step`; the later ones are forgotten.

    Call it on all ranks, then a barrier: rank 0 rewrites the two files.
    """
    kept = {}
    for name in ("searches.jsonl", "pairs.jsonl"):
        path = out / name
        lines = path.read_text().split("\n")[:-1] if step and path.exists() else []
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
            new = out / f".{name}.kept"
            new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            new.rename(out / name)
    return found


def open_records(path: Path, step: int):
    """Open a .jsonl file for appending, without the lines of steps after `step`: those will be run again."""
    kept = path.with_name(f".{path.name}.kept")
    with open(kept, "w") as new:
        if step and path.exists():
            with open(path) as old:  # a crash may have cut the last line
                whole = (line for line in old if line.endswith("\n"))
                new.writelines(line for line in whole if json.loads(line).get("step", 0) <= step)
    kept.rename(path)
    return open(path, "a")


def saved_steps(out: Path) -> list[int]:
    """Steps of the whole checkpoints in `out`, ascending: DCP writes .metadata last."""
    return sorted(
        int(p.parent.name.split("-")[1]) for p in out.glob("checkpoint-*-state/.metadata")
    )


def remove(out: Path, steps: list[int]) -> None:
    """Delete the checkpoints of these steps."""
    for step in steps:
        for folder in (f"checkpoint-{step}-state", f"checkpoint-{step}"):
            shutil.rmtree(out / folder, ignore_errors=True)


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
        if not quiet:
            print(
                f"{name}: {len(part)} examples"
                + "".join(f", {n} dropped: {why}" for why, n in drops.items())
            )
        if not part:
            raise ValueError(
                f"no {name} example fits; raise --max_prompt_length or --max_completion_length"
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
    if not config.eval_file and not 0 < config.eval_fraction < 1:
        raise ValueError(
            f"--eval_fraction {config.eval_fraction} leaves no validation data; give --eval_file, "
            "or hold out a share between 0 and 1"
        )
    if "rl" in config.stages and config.num_generations < 2:
        raise ValueError(
            "--num_generations 1: a group advantage compares responses; take at least 2"
        )
    if config.tis_cap < 0:
        raise ValueError(f"--tis_cap {config.tis_cap}: take 0 (off) or a positive cap, 2 is usual")
    if not 0 <= config.balance_low <= config.balance_high <= 1:
        raise ValueError("--balance_low and --balance_high: take 0 <= low <= high <= 1")
    if not 0 <= config.overlong <= 1:
        raise ValueError(
            f"--overlong {config.overlong}: a share of --max_completion_length, 0 .. 1"
        )
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
    if "itool" in config.stages:
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
    for name in ("iterations", "preference_epochs", "warmup_epochs"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)}: must be at least 1")
    if not 0 <= config.held_out_pairs < 1:
        raise ValueError(f"--held_out_pairs {config.held_out_pairs}: a share, 0 .. below 1")
    if config.mcts_width < 2:
        raise ValueError("--mcts_width 1: a pair compares two steps; take at least 2")
    if len(config.warmup_learning_rates) != 3:
        raise ValueError("--warmup_learning_rates: give three, for easy, medium and hard")
    if config.vllm_tensor_parallel_size > 1:
        raise ValueError(
            "--vllm_tensor_parallel_size: each rank searches its own trees; take 1, or --quant 4bit "
            "and a lower --vllm_gpu_memory_utilization where memory is short"
        )


def check_context(config) -> None:
    """Refuse lengths beyond what the model can read."""
    model = AutoConfig.from_pretrained(
        config.model_name_or_path, trust_remote_code=config.trust_remote_code
    )
    room, wanted = (
        model.max_position_embeddings,
        config.max_prompt_length + config.max_completion_length,
    )
    if wanted > room:
        raise ValueError(
            f"{config.model_name_or_path} reads {room} tokens; --max_prompt_length {config.max_prompt_length} and "
            f"--max_completion_length {config.max_completion_length} need {wanted}: lower them"
        )
