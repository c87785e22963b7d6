"""What a rank does: its part of the work, sums over ranks, forward passes, weight sync.

Run(config, method)    what the loops share; run.load() loads model, optimiser and engine
run.batch(step)        this rank's examples and their places: a function of (seed, step)
micro_batches, forward what a batch is cut into; log-probs of its responses, each prompt read once
sync                   weights to the engine
part                   the one rule by which ranks share work

Any record with a `prompt` (token ids) and `responses` (lists of token ids) can be batched: a Group
of methods.py, a Demonstration of start.py, a preference pair of itool.py. Results do not depend on
how ranks share the work: every denominator counts all ranks, and gradients are summed.
"""

import itertools
import math
import random
import signal
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import model as modeling
import packing
from records import Records
from start import Interrupted, Setup
from tools import serving

SKIPPED_STEPS = 3  # steps in a row without a finite loss and gradient before the run stops


# ------------------------------------------------------------------------------------------- ranks


def part(items: list, size: Callable[[Any], float], rank: int, world: int) -> list:
    """This rank's part of `items`, which all ranks hold, in their order.

    Items are dealt by size, there and back: ranks finish together, counts differ by at most 1.
    """
    largest_first = sorted(range(len(items)), key=lambda i: (-size(items[i]), i))
    there_and_back = [*range(world), *reversed(range(world))]
    ranks = dict(zip(largest_first, itertools.cycle(there_and_back)))
    return [item for i, item in enumerate(items) if ranks[i] == rank]


@lru_cache(maxsize=2)
def shuffled(n: int, seed: str) -> list[int]:
    """The order of n examples in an epoch."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def add(totals: dict, parts: dict) -> None:
    """Add `parts`, numbers or detached tensors, to the totals of the same names."""
    for name, value in parts.items():
        totals[name] = totals.get(name, 0.0) + value


def all_sum(values: dict[str, float]) -> dict[str, float]:
    """The values of all ranks, added up by name; every rank has the same names."""
    tensor = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    dist.all_reduce(tensor)
    return dict(zip(values, tensor.tolist()))


def all_max(value: float) -> float:
    """The largest value of all ranks."""
    tensor = torch.tensor([float(value)], dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def all_gather(rows: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


# ----------------------------------------------------------------------------------------- the run


class Run(Setup):
    """What the loops share: all that start.Setup reads and loads, and the records.

    command  the settings of all stages, where this is one of them
    earlier  what the trackers' steps start from: one more than the first stage's last step
    """

    def __init__(self, config, method, command=None, earlier: int = 0, later=()):
        super().__init__(config, method, later)
        self.command = command or config
        self.records = Records(self.config, method, self.command, earlier)
        self.first_step = self.saved = self.skipped = 0
        self.lock = None
        self.signal = 0  # number of the signal that asked this rank to stop

    def load(self, engine=None) -> None:
        """Load engine, model and optimiser, and resume; `engine`: that of an earlier stage."""
        super().load(engine)
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint.check_shared(self.out)
        if self.rank == 0:
            self.lock = checkpoint.lock(self.out)
            checkpoint.clean(self.out)
        self.first_step = self.saved = checkpoint.resume(
            self.out, self.config.resume_from_checkpoint, self.model, self.optimizer
        )
        self.records.open(self.first_step, self.digests, self.reward)
        self.skipped = [0, *self.records.history("skipped")][-1]

    # data

    def batch(
        self, position: int, examples: list | None = None, *, size: int = 0
    ) -> list[tuple[int, data.Example]]:
        """This rank's part of batch `position`: places in the stream of all batches, and examples.

        Each epoch is a shuffle by (seed, epoch).
        examples  what to draw from; None: all training examples
        size      examples over all ranks; 0: train_batch_size
        """
        examples = self.examples if examples is None else examples
        size = size or self.config.train_batch_size
        n = len(examples)
        places = range(position * size, (position + 1) * size)
        batch = [(i, examples[shuffled(n, f"{self.config.seed}/{i // n}")[i % n]]) for i in places]
        return part(batch, lambda item: data.characters(item[1]), self.rank, self.world)

    # the optimiser

    def optimizer_step(self, lr: float, loss: float, batch: list) -> dict[str, float]:
        """Update the weights if loss and gradient are finite; return the step's metrics.

        loss   of the whole step: equal on all ranks
        batch  this rank's records, saved before the run stops
        ValueError when SKIPPED_STEPS in a row are not finite. The gradient is cleared either way.
        """
        grad_norm = float(modeling.clip_grad_norm(self.model, self.config.max_grad_norm))
        self.skipped = 0 if math.isfinite(loss + grad_norm) else self.skipped + 1
        if self.skipped == 0:
            if not self.optimizer.state:  # keep the new moments out of the activations' segments
                torch.cuda.empty_cache()
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        elif self.skipped == SKIPPED_STEPS:
            written = self.records.write_batch(batch)
            raise ValueError(
                f"no finite loss and gradient in {self.skipped} steps in a row (loss {loss}, "
                f"gradient norm {grad_norm}); the last batch is in {written}; lower "
                "--learning_rate, or look for bad data in it"
            )
        self.optimizer.zero_grad()
        return {"grad_norm": grad_norm, "learning_rate": lr, "skipped": self.skipped}

    # stopping and saving

    @contextmanager
    def progress(self, total: int, **options):
        """A bar of tqdm on rank 0, from where the run resumed unless `options` say otherwise.

        Meanwhile SIGTERM and Ctrl-C wait for the next `stop_if_asked`.
        """
        of_steps = {"initial": self.first_step, "desc": self.config.algo, "unit": " steps"}
        options = {"disable": self.rank > 0, "dynamic_ncols": True} | of_steps | options
        with checkpoint.on_signals(self.note), tqdm(total=total, **options) as bar:
            yield bar

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal: `stop_if_asked` reads it."""
        self.signal = number

    def stop_if_asked(self, step: int) -> None:
        """If any rank was asked to stop, save after `step` steps and raise Interrupted on all.

        Call it while the weights are those after `step` steps, before the optimiser moves them.
        """
        if number := int(all_max(self.signal)):
            if step > self.saved:
                self.save(step)
            name = signal.Signals(number).name
            text = f"{name}: left after step {step}; continue with --resume_from_checkpoint latest"
            raise Interrupted(number, text)

    def save(self, step: int) -> None:
        """Write checkpoint-STEP and checkpoint-STEP-state."""
        state = self.model, self.optimizer, self.tokenizer
        checkpoint.save(self.out, step, *state, self.config.save_total_limit, self.texts(step))
        self.saved = step

    def save_best(self, step: int) -> None:
        """Write checkpoint-best, a model alone."""
        best = self.out / "checkpoint-best"
        modeling.save(self.model, self.tokenizer, best, texts=self.texts(step))

    def texts(self, step: int) -> dict[str, str]:
        """What lies beside a model: prompts of one's own, and the model card."""
        texts = {data.PROMPT_FILE.format(part): text for part, text in self.prompts.items()}
        return texts if self.rank else texts | {"README.md": serving.model_card(self, step)}

    # records

    def end_step(self, bar, step: int, metrics: dict, last: bool, best=False, **shown) -> None:
        """Log a step, move the bar, and save if --save_steps says so or the step is the last.

        last   of its loop, stage or iteration
        best   so far: it is saved as such, too, before the checkpoint from which a run resumes
        shown  what else the bar shows
        """
        self.records.log(step, metrics)
        if best:
            self.save_best(step + 1)
        names = ("reward", "accuracy", "eval/accuracy", "loss")
        bar.set_postfix(shown | {n: f"{metrics[n]:.3f}" for n in names if n in metrics})
        bar.update()
        if last or (step + 1) % self.config.save_steps == 0:
            self.save(step + 1)

    def evaluation_is_due(self, step: int, last: bool) -> bool:
        """Whether to evaluate after this step: every --eval_steps, and at the end of a loop."""
        every = self.config.eval_steps
        return last or (every > 0 and (step + 1) % every == 0)

    def close(self) -> None:
        """Close the records; the engine stays."""
        self.records.close()
        if self.lock:
            self.lock.close()


# ----------------------------------------------------------------------------------- forward, sync


def tokens_of(record) -> int:
    """Tokens of a record in a packed row."""
    return len(record.prompt) + sum(map(len, record.responses))


def micro_batches(config, records: list) -> list[list]:
    """Records in micro-batches of even length within the token budget, equally many on all ranks.

    A rank with too few records gets empty micro-batches, whose forward pass joins the others'.
    """

    def fill(bins: int) -> tuple[list[list], int]:
        parts, loads = [[] for _ in range(bins)], [0] * bins
        for record in sorted(records, key=tokens_of, reverse=True):  # longest to emptiest
            lightest = loads.index(min(loads))
            parts[lightest].append(record)
            loads[lightest] += tokens_of(record)
        return parts, max(loads)

    bins = 1 if config.share_prefix else max(1, len(records))  # padded: one at a time
    while bins < len(records) and fill(bins)[1] > config.max_tokens_per_row:
        bins += 1
    return fill(int(all_max(bins)))[0]


def forward(config, model, records: list, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies, with gradient, and the mask, each (R, T), of a micro-batch."""
    if not records:  # FSDP's collectives need this rank all the same
        nothing = packing.padded_logps(model, [0], [[0]])
        return *(x[:0] for x in nothing), nothing[0][:0].bool()
    rows = [packing.pack(record.prompt, record.responses) for record in records]
    if config.share_prefix:
        row = packing.join(rows)
        logps, entropy = packing.response_logps(model, row, temperature=temperature)
    else:
        [record], [row] = records, rows
        logps, entropy = packing.padded_logps(
            model, record.prompt, record.responses, temperature=temperature
        )
    return logps, entropy, row.response_mask.to(logps.device)


def sync(run: Run) -> None:
    """Stream the weights, gathered and with adapters merged, into the engine, one at a time."""
    torch.cuda.empty_cache()  # the engine allocates outside torch's cache
    run.engine.load_weights(modeling.full_tensors(run.model))  # also drops cached prefixes
    run.engine.wake()


def learning_rate_at(config, step: int, steps: int, peak: float) -> float:
    """Linear warm-up from 0 (none for a single step), then constant or a half cosine to 0."""
    warmup = min(math.ceil(config.warmup_ratio * steps), steps - 1)
    if step < warmup:
        return peak * step / warmup
    if config.lr_scheduler_type == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
