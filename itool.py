"""iTool: hard examples, tree search, preference pairs and preference optimisation, in iterations.

    stages_of, warmup_stages   easy, medium, hard: the warm-up's curriculum          Section 3.1
    run_itool                  the iterations after the warm-up, each in five stages Section 3.2
        1 replay buffer        the examples of highest perplexity                    Eq. 4
        2 search               a tree of fragments for each, by the policy itself    Eqs. 5-9
        3 pairs                best against worst step of each state                 Appendix B.1
        4 optimise             SimPO on the steps; or DPO, IPO, ORPO                 Eqs. 10, 11
        5 weight sync          the policy of the next iteration

    output_dir/pairs.jsonl             a line per preference pair
    output_dir/searches.jsonl          a line per iteration, written when its pairs are complete
    output_dir/trees-ITERATION.jsonl   the search trees, for `python mcts.py show`

A wave of the search is one `Engine.generate` and one `Engine.option_probs` for all trees of a rank.
Samples run to their end and are cut afterwards. The unused rest of a sample is one of the draws of
the child it belongs to; this is exact, since given the child's tokens it is a draw from the policy.

Departures from the paper, and choices where it is silent (mcts.py has the search's own):
 1. An example is one assistant turn, trained in ToolUPT's JSON form: calls are counted per turn,
    and characters are those of the tools' JSON list. Where the printed definitions of difficulty
    overlap, hard wins, then easy; medium is the rest. Three epochs per stage.
 2. `split="even"` makes three equal parts by rank, as the word "evenly" asks; the printed criteria
    do not give equal parts. Base SFT, one stage, has the first rate. All of them train on the part
    that is not held out, where the paper has "the entire gold labeled dataset" for base SFT.
 3. The warm-up's best checkpoint is that of the lowest validation loss over all stages on one
    validation set, so it may be an early stage's. The paper does not say whether it means each
    stage or the end.
 4. The pool is half of the training part (the paper: of the data set) and takes every assistant
    turn. The buffer ranks calls and answers apart: prose has higher perplexity and would fill it.
 5. O is +1 or -1 at the end of a response and 0 before, after Xie et al.; the paper has no formula.
    +1 takes a finished response without an error of Figure 3's classes; an empty answer is wrong. A
    state too long to be graded has C = 0 and is counted. With --reward_file, +1 takes its maximum.
 6. A tenth of the trees is held out, for the preference margin on pairs that are not trained on;
    --held_out_pairs 0 is the paper's.
 7. The adapter starts on the merged warm-up weights and is trained on through all iterations;
    optimiser and schedule restart in each.
 8. Without a search (Figure 6), "highest and lowest probabilities" are those of the mean log-prob.

The code that iTool's authors published differs from their paper nearly everywhere; we follow the
paper. Theirs selects with another bonus (value / (visits + 1) + p sqrt(ln N / (n + 1))), cuts
finished text at ". ", ", ", "=" and "(" and joins the pieces with blanks, scores steps by format
agreement and word overlap instead of an outcome, reads C from one sample of seven tokens with a
substring test, sums rewards instead of Eqs. 8 and 9, accepts Q from -0.3 instead of 0.3, takes 30 %
instead of 10 %, samples with a repetition penalty of 0.75, appends an end-of-turn token to
unfinished fragments, and merges a fresh rank-8 adapter in every iteration.
"""

import itertools
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import checkpoint
import data
import mcts
import model as modeling
import rewards
import simpo
from guard import check_engine
from knobs import Count, Fraction, HeldOut, Positive, Several, knob
from mcts import Node, Proposal, SearchConfig
from methods import Defaults, Row
from metrics import Clock, evaluate
from records import write
from rollout import Engine, Sample, derived_seed, num_thoughts, without_thoughts
from run import (
    Run,
    add,
    all_gather,
    all_sum,
    forward,
    learning_rate_at,
    micro_batches,
    part,
    shuffled,
    sync,
    tokens_of,
)
from scoring import Reward
from start import Stage

STAGES = ("easy", "medium", "hard")
COUNTS = (  # what a search counts, in searches.jsonl
    *("expansions", "samples", "sampled_tokens", "tails_used", "nodes", "evaluations"),
    *("evaluation_tokens", "evaluations_too_long"),
    *("ends", "ends_parsed", "ends_over_length", "ends_correct"),
)
NGRAMS = (1, 2, 3)
DIVERSITY = [*(f"diversity/distinct_{n}" for n in NGRAMS), "diversity/distinct_calls"]
SAMPLES_WITHOUT_SEARCH = 4  # section 4.3.2: "four responses"
LEARNING_RATES = {"simpo": 1e-6, "dpo": 3e-7, "ipo": 1e-6, "orpo": 3e-7}  # Table 9


@dataclass
class ItoolConfig(Row):
    """Easy-to-hard warm-up, then iterations of tree search on hard examples and SimPO (iTool)."""

    defaults: ClassVar[Defaults] = {
        "model_name_or_path": ("meta-llama/Llama-3.1-8B-Instruct", "iTool 4.1"),
        "lora_rank": (16, "iTool Appendix B.1"),
        "eval_fraction": (0.1, "iTool 4.1: 90 % for the warm-up"),
        "seed": (42, "iTool Table 7"),
        "train_batch_size": (64, "iTool Table 6; examples or pairs"),
        "temperature": (1.5, "iTool Table 7, of the search"),
        "max_completion_length": (512, "ours: the script's 50 cut parallel calls"),
        "learning_rate": (None, "iTool Table 9: 1e-6; of DPO and ORPO 3e-7"),
        "lr_scheduler_type": ("cosine", "iTool Appendix B.1"),
        "warmup_ratio": (0.1, "iTool Appendix B.1"),
        "weight_decay": (0.0, "iTool's trainer, LLaMA-Factory: its default"),
        "save_total_limit": (0, "iTool Figures 5 and 7: each stage and iteration is evaluated"),
    }
    logprobs_mode: ClassVar[str] = "raw_logprobs"  # Eq. 5 wants p(a|s) at temperature 1
    keeps_best: ClassVar[bool] = True

    stages: Literal["both", "warmup", "itool"] = knob(
        "both", "the warm-up of section 3.1, then the iterations of 3.2; or one of them"
    )
    # the warm-up
    warmup: bool = knob(True, "--no_warmup: one stage of SFT on all (Table 3, w/o warm-up)")
    split: Literal["difficulty", "even", "none"] = knob(
        "difficulty", "stages of section 3.1; even: three equal parts; none: one, base SFT"
    )
    warmup_learning_rates: list[float] = knob(
        [5e-5, 2e-5, 1e-5], "easy (and base SFT), medium, hard; Table 6"
    )
    warmup_epochs: Count = knob(3, "per stage; Table 6")
    # the replay buffer
    iterations: Count = knob(3, "Figure 7: best at about three")
    pool_fraction: Fraction = knob(0.5, "random share of the training examples; section 4.1")
    buffer_fraction: Fraction = knob(0.1, "of the pool, of highest perplexity; section 3.2")
    buffer_rank: Literal["stratified", "global"] = knob(
        "stratified", "calls and answers are ranked apart; global: together"
    )
    # the search
    mcts: bool = knob(True, "--no_mcts: best and worst of four samples, no search (Figure 6)")
    mcts_depth: int = knob(3, "fragments per path, the last one free; Table 7")
    mcts_width: Several = knob(3, "children per node, of which a pair takes two; Table 7")
    mcts_simulation: int = knob(2, "roll-out steps after an expansion; Table 7")
    mcts_iterations: Count = knob(5, "select-expand-backup rounds per tree; Table 7")
    mcts_c: float = knob(1.0, "exploration; Table 7")
    mcts_discount: float = knob(1.0, "gamma of Eq. 9; Xie et al.: the paper gives no value")
    top_p: Fraction = knob(1.0, "of the search's samples")
    self_evaluation: Literal["paper", "cache", "none"] = knob(
        "paper", "Table 10; cache: its fixed text first, cheaper; none: outcome only"
    )
    # the pairs
    max_similarity: float = knob(0.95, "Appendix B.1, as the next two")
    min_gap: float = knob(0.1, "between the values of a pair")
    min_q: float = knob(0.3, "of the chosen step")
    held_out_pairs: HeldOut = knob(0.1, "share of trees whose pairs are only measured; ours")
    # preference optimisation
    preference: Literal["simpo", "dpo", "ipo", "orpo"] = knob("simpo", "Eqs. 10, 11; Table 9")
    preference_epochs: Count = knob(2, "per iteration; Table 6")
    simpo_beta: Positive = knob(2.5, "Table 9, as the next five")
    simpo_margin: float = knob(0.5, "gamma of Eq. 11, nats")
    dpo_beta: Positive = knob(0.1, "scale of the log-ratios")
    ipo_tau: Positive = knob(0.1, "the gap is pulled to 1/(2 tau) nats")
    ipo_mean: bool = knob(False, "mean over tokens, as in TRL; Table 9 prints sums")
    orpo_lam: Positive = knob(0.1, "weight of the odds-ratio term")

    @property
    def learning_rate(self) -> float:
        """Table 9's, of the preference loss."""
        return LEARNING_RATES[self.preference]

    @property
    def search_config(self) -> SearchConfig:
        """The knobs mcts_* and those of the pairs, as mcts.py takes them."""
        names = ("depth", "width", "simulation", "iterations", "c", "discount")
        limits = {name: getattr(self, f"mcts_{name}") for name in names}
        pairs = {name: getattr(self, name) for name in ("max_similarity", "min_gap", "min_q")}
        return SearchConfig(**limits, **pairs)

    def check(self, config: Any) -> None:
        super().check(config)
        assert self.search_config  # rejects depths and roll-outs that are too small
        one = self.split == "none" or not self.warmup
        if len(self.warmup_learning_rates) not in ((1, 3) if one else (3,)):
            raise ValueError(
                "--warmup_learning_rates: give three, for easy, medium and hard, or one for "
                "--split none"
            )
        if config.vllm_tensor_parallel_size > 1:
            raise ValueError(
                "--vllm_tensor_parallel_size: each rank searches its own trees; take 1, and if "
                "memory is short --quant 4bit and a lower --vllm_gpu_memory_utilization"
            )

    def flags_without_effect(self) -> dict[str, str]:
        names = list(self.__dataclass_fields__)
        of = lambda first, last: names[names.index(first) : names.index(last) + 1]
        why = {}
        if self.stages == "itool":
            why |= dict.fromkeys(of("warmup", "warmup_epochs"), "--stages itool has no warm-up")
        if self.stages == "warmup":
            why |= dict.fromkeys(of("iterations", "orpo_lam"), "--stages warmup has no iterations")
            why["learning_rate"] = "it is the iterations'; the warm-up has --warmup_learning_rates"
        if not self.mcts:
            unread = [*of("mcts_depth", "mcts_discount"), *of("self_evaluation", "min_q")]
            why |= dict.fromkeys(unread, "--no_mcts has no tree search")
        for name in of("simpo_beta", "orpo_lam"):
            loss = name.partition("_")[0]
            if loss != self.preference:
                why[name] = f"it needs --preference {loss}"
        return why

    def check_examples(self, examples: list[data.Example], config: Any) -> None:
        if self.stages != "warmup":  # reject a pool that is too small before the warm-up
            pool_of(examples, self.pool_fraction, self.buffer_fraction, config.seed)

    def question_length(self, tokenizer, max_length: int) -> int:
        if self.stages == "warmup" or not self.mcts or self.self_evaluation == "none":
            return 0
        return len(question(tokenizer, self.self_evaluation, "", "")) + 2 * max_length + 1


@dataclass(eq=False)
class PreferencePair:
    """A state and two steps from it, the better one first."""

    row: dict  # its line of pairs.jsonl: token ids, texts, values of the search, references

    @property
    def prompt(self) -> list[int]:
        """Token ids of the state, the prompt included."""
        return self.row["prefix_ids"]

    @property
    def responses(self) -> list[list[int]]:
        """Token ids of the chosen and of the rejected step."""
        return [self.row["chosen_ids"], self.row["rejected_ids"]]


# ---------------------------------------------------------------------------------- the iterations


def run_itool(config, method: ItoolConfig, run: Run) -> Path:
    """iTool's iterations (section 3.2) after the warm-up.

    Returns the folder of the checkpoint with the highest accuracy (Appendix B.1), which may be that
    before all iterations.
    """
    best = Path(config.output_dir) / "checkpoint-best"
    best_accuracy = max(run.records.history("eval/accuracy"), default=-math.inf)
    if run.first_step == 0:
        run.save_best(0)
    shares = method.pool_fraction, method.buffer_fraction
    pool = pool_of(run.examples, *shares, config.seed)
    run.say(f"pool: {len(pool)} examples")
    searches = read_searches(run)  # of an interrupted run
    end = 0  # optimiser steps up to the end of the iteration
    for iteration in range(1, method.iterations + 1):
        if iteration not in searches:
            if run.first_step > end:
                raise ValueError(
                    f"--resume_from_checkpoint {config.resume_from_checkpoint}: the search of "
                    f"iteration {iteration}, before that step, is not in {run.out}; resume in the "
                    "run's own folder, or start anew with the checkpoint as --model_name_or_path"
                )
            clock = Clock()
            with checkpoint.on_signals(run.note):  # what was searched is written first
                # 1 replay buffer
                buffer, summary = replay_buffer(run, pool, end, clock)
                # 2 search
                rows, counts = grow_trees(run, buffer, iteration, end, clock)
                # 3 pairs
                pairs, found = collect_pairs(run, rows, end, clock)
                summary |= counts | found | clock.metrics() | {"iteration": iteration, "step": end}
                summary |= {"pool": len(pool), "trees": len(buffer)}
                log_search(run, summary, pairs)
            searches[iteration] = summary, pairs
        summary, pairs = searches[iteration]
        run.say(describe(summary))
        trained = [pair for pair in pairs if not pair.row["held_out"]]
        held_out = [pair for pair in pairs if pair.row["held_out"]]

        # 4 optimise
        steps = math.ceil(method.preference_epochs * len(trained) / config.train_batch_size)
        begin, end = end, end + steps
        run.engine.sleep()
        first = min(max(begin, run.first_step), end)
        with run.progress(
            end, initial=first, desc=f"iteration {iteration}, {method.preference}"
        ) as bar:
            for step in range(first, end):
                run.stop_if_asked(step)
                clock = Clock()
                if step == begin:
                    run.optimizer.state.clear()
                batch = pair_batch(run, trained, iteration, step - begin)
                with clock("update"):
                    stats = preference_gradient(run, batch)
                    lr = learning_rate_at(config, step - begin, steps, config.learning_rate)
                    mine = part(batch, tokens_of, run.rank, run.world)
                    metrics = stats | run.optimizer_step(lr, stats["loss"], mine)
                metrics["iteration"] = iteration

                # 5 weight sync
                last = step + 1 == end
                if last:
                    metrics |= {k: v for k, v in summary.items() if k.startswith("diversity/")}
                    metrics["adapter_norm"] = modeling.adapter_norm(run.model)
                    with clock("evaluate"):
                        metrics |= held_out_metrics(run, held_out)
                    with clock("sync"):
                        sync(run)
                    with clock("evaluate"):
                        metrics |= evaluate(config, run)
                metrics |= clock.metrics()
                if better := metrics.get("eval/accuracy", -math.inf) > best_accuracy:
                    best_accuracy = metrics["eval/accuracy"]
                run.end_step(bar, step, metrics, last, better)
        if first < end:
            accuracy = metrics["eval/accuracy"]
            run.say(f"after iteration {iteration}: {accuracy:.1%} right on held-out examples")
        elif begin == end:
            run.say(f"after iteration {iteration}: accuracy as before")
    if end == 0:
        run.say("no iteration found a pair: the model is saved as it was")
        run.save(0)
    return best


class Asked(Exception):
    """This rank was asked to stop in the middle of its search."""


def replay_buffer(
    run: Run, pool: list[data.Example], step: int, clock: Clock
) -> tuple[list[data.Example], dict[str, float]]:
    """The examples of highest perplexity (Eq. 4), and mean perplexities; equal on all ranks."""
    method = run.method
    run.engine.sleep()
    with clock("perplexity"):
        values = perplexities(run, pool, step)
    calls = [example.kind == "tool_call" for example in pool]
    strata = calls if method.buffer_rank == "stratified" else None
    chosen = [pool[i] for i in data.select_complex(values, strata, method.buffer_fraction)]
    means = {}
    for name, kind in (("perplexity/calls", True), ("perplexity/answers", False)):
        if own := [value for value, is_call in zip(values, calls) if is_call is kind]:
            means[name] = sum(own) / len(own)
    return chosen, means


def grow_trees(
    run: Run, buffer: list[data.Example], iteration: int, step: int, clock: Clock
) -> tuple[list[dict], dict]:
    """Search a tree for each example (Eqs. 5-9) and write trees-ITERATION.jsonl.

    Returns the lines of pairs.jsonl that this rank's trees yield, and counts over all ranks.
    """
    config, method = run.config, run.method
    with clock("sync"):
        sync(run)
    mine = part(list(enumerate(buffer)), lambda item: data.characters(item[1]), run.rank, run.world)
    examples = [example for _, example in mine]
    prompts = [run.demonstration(example).prompt for example in examples]
    limits = method.search_config
    searcher = Searcher(
        run.engine,
        run.tokenizer,
        temperature=config.temperature,
        top_p=method.top_p,
        max_tokens=config.max_completion_length,
        self_evaluation=method.self_evaluation,
        seed=f"{config.seed}/{iteration}",
        reward=run.reward,
    )
    roots, found = [], []
    with (
        clock("search"),
        run.progress(len(mine), initial=0, desc=f"iteration {iteration}", unit=" trees") as bar,
    ):

        def advance(done: int) -> None:
            bar.update(done - bar.n)
            if run.signal:  # ranks have waves of their own: end this search, then meet the others
                raise Asked

        with suppress(Asked):
            if method.mcts:
                roots = searcher.search(examples, prompts, limits, advance)
                found = [pair_rows(root, limits) for root in roots]
            else:
                found = searcher.sampled_pairs(examples, prompts)
                advance(len(mine))
        run.stop_if_asked(step)
    run.engine.sleep()
    about = [
        {"iteration": iteration, "tree": i, "id": e.id, "query": e.query, "target": e.target}
        for i, e in mine
    ]
    trees = all_gather([mcts.tree_to_dict(root, limits, **x) for x, root in zip(about, roots)])
    if run.rank == 0 and trees:
        trees.sort(key=lambda tree: tree["tree"])
        write_whole(run.out / f"trees-{iteration}.jsonl", trees)
    rows, dropped = [], Counter()
    for of_tree, example, (own, drops) in zip(about, examples, found):
        held_out = is_held_out(example, method.held_out_pairs, config.seed)
        rows += [of_tree | {"held_out": held_out} | row for row in own]
        dropped += drops
    stats = count_over_ranks(searcher.stats)
    counts = {name: stats[name] for name in COUNTS} | {"dropped": count_over_ranks(dropped)}
    some = [name for name in DIVERSITY if stats[f"{name} of"]]
    counts |= {name: stats[name] / stats[f"{name} of"] for name in some}
    return rows, counts | {"option_mass": stats["option_mass"] / max(1, stats["evaluations"])}


def collect_pairs(
    run: Run, rows: list[dict], step: int, clock: Clock
) -> tuple[list[PreferencePair], dict]:
    """The kept pairs of all ranks (Appendix B.1) with reference log-probs; and their counts."""
    rows = sorted(all_gather(rows), key=lambda row: row["tree"])  # whatever the number of ranks
    pairs = [PreferencePair(row) for row in rows]
    with clock("reference"):
        add_references(run, pairs)
    apart = engine_difference(pairs) if pairs else None  # nothing to compare
    if pairs and run.config.quant == "none":  # with NF4 the engine's weights are not the trainer's
        check_engine(run.config, apart, step)
    held_out = [pair for pair in pairs if pair.row["held_out"]]
    counts = {"pairs": len(pairs) - len(held_out), "held_out": len(held_out)}
    counts["trees_with_pairs"] = len({row["tree"] for row in rows})
    counts["sampling/sampling_logp_difference/mean"] = apart
    return pairs, counts | held_out_metrics(run, held_out)


def count_over_ranks(counts: Counter) -> Counter:
    """Counts of all ranks, added up; their names may differ between ranks."""
    return sum(map(Counter, all_gather([dict(counts)])), Counter())


# ------------------------------------------------------------------------------------ the examples


def stages_of(examples: list[data.Example], split: str) -> dict[str, list[data.Example]]:
    """The warm-up's parts in training order.

    split   "difficulty": by tools, characters of their JSON and calls (Section 3.1); "even": three
            equal parts by rank of (four tools or more, characters, calls); "none": one part, all
    """
    if split == "none":
        return {"all": examples}
    sizes = [data.sizes(example) for example in examples]
    if split == "difficulty":
        names = [data.difficulty(*size) for size in sizes]
    else:
        hardness = lambda i: (sizes[i][0] >= 4, sizes[i][1], sizes[i][2], i)
        names = [""] * len(examples)
        for rank, i in enumerate(sorted(range(len(examples)), key=hardness)):
            names[i] = STAGES[3 * rank // len(examples)]
    return {stage: [e for e, name in zip(examples, names) if name == stage] for stage in STAGES}


def warmup_stages(config, method: ItoolConfig, run: Run) -> list[Stage]:
    """The warm-up from easy to hard, or in one stage."""
    parts = stages_of(run.examples, method.split if method.warmup else "none")
    rates, stages = method.warmup_learning_rates[: len(parts)], []
    for (name, examples), rate in zip(parts.items(), rates, strict=True):
        steps = math.ceil(method.warmup_epochs * len(examples) / config.train_batch_size)
        run.say(f"warm-up, {name}: {len(examples)} examples, {steps} steps, learning rate {rate}")
        stages.append(Stage(name, examples, steps, rate))
    return stages


def pool_of(
    examples: list[data.Example], fraction: float, buffer_fraction: float, seed: int
) -> list[data.Example]:
    """A random share of the examples, in their order.

    fraction         of the examples, in (0, 1]; iTool: 0.5
    buffer_fraction  of the pool, for the search; ValueError if that is less than one example
    """
    size = round(fraction * len(examples))
    drawn = sorted(random.Random(f"pool/{seed}").sample(range(len(examples)), size))
    if buffer_fraction * size < 1:
        raise ValueError(
            f"the replay buffer takes {buffer_fraction:.0%} of a pool of {size} examples, "
            "less than one: give more data, or raise --pool_fraction or --buffer_fraction"
        )
    return [examples[i] for i in drawn]


def perplexities(run: Run, examples: list[data.Example], step: int) -> list[float]:
    """Perplexity of each expert response (Eq. 4), behind the empty block of thoughts if it has one.

    step  optimiser steps whose weights these are
    """
    size, found, unsaid = run.config.train_batch_size, [], len(data.no_thoughts(run.tokenizer))
    with (
        run.progress(len(examples), initial=0, desc="perplexity", unit=" examples") as bar,
        torch.no_grad(),
    ):
        for first in range(0, len(examples), size):
            run.stop_if_asked(step)
            chunk = list(enumerate(examples))[first : first + size]
            mine = part(chunk, lambda item: data.characters(item[1]), run.rank, run.world)
            batch = [run.demonstration(example, place) for place, example in mine]
            for micro in micro_batches(run.config, batch):
                logps, _, mask = forward(run.config, run.model, micro, temperature=1.0)
                values = simpo.perplexity(logps[:, unsaid:], mask[:, unsaid:]).tolist()
                found += [(one.place, value) for one, value in zip(micro, values)]
            bar.update(len(chunk))
    return [value for _, value in sorted(all_gather(found))]


# -------------------------------------------------------------------------------------- the search


@dataclass(eq=False)
class Searcher:
    """`mcts.search` with an engine that holds the policy; `stats` counts since the last search."""

    engine: Engine  # with logprobs_mode="raw_logprobs": Eq. 5 wants p(a|s) at temperature 1
    tokenizer: Any
    temperature: float = 1.5  # of the samples; Table 7
    top_p: float = 1.0
    max_tokens: int = 512  # of a whole response
    # "paper": Table 10's order; "cache": its fixed text first, so that the engine's prefix cache
    # holds it; "none": C = 0
    self_evaluation: str = "paper"
    seed: object = 0  # printable: a request's seed is a hash of it, the example and the node's path
    reward: Reward = field(default_factory=Reward)  # a user's: right is what earns its maximum

    def __post_init__(self) -> None:
        self.stop_ids = set(self.engine.stop_ids)
        special = data.special_tokens(self.tokenizer)
        self.special = {i for i, text in special.items() if text not in data.TAGS}
        self.anchor = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        self.pieces: dict[int, str] = {}  # token id -> text
        self.stats: Counter = Counter()

    def search(
        self,
        examples: list[data.Example],
        prompts: list[list[int]],
        config: SearchConfig,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Node]:
        """One tree per example, all in lock step.

        prompts    token ids of each, from `data.render`
        progress   called with the number of finished trees
        """
        self.config, self.stats, self.drawn = config, Counter(), defaultdict(list)
        roots = [Node(token_ids=list(prompt)) for prompt in prompts]
        self.examples = {id(root): example for root, example in zip(roots, examples, strict=True)}
        self.confidences: dict[tuple[int, str], float] = {}
        self.progress, self.roots = progress, roots
        mcts.search(roots, self.propose, self.evaluate, config)
        self.stats += diversity(self.drawn.values())
        progress(len(roots))
        return roots

    def sampled_pairs(
        self, examples: list[data.Example], prompts: list[list[int]]
    ) -> list[tuple[list[dict], Counter]]:
        """`sampled_pair` of each example: the ablation without a search."""
        drawn = self._draw(
            prompts,
            n=SAMPLES_WITHOUT_SEARCH,
            max_tokens=self.max_tokens,
            seeds=[derived_seed(self.seed, example.id) for example in examples],
        )
        self.stats += diversity([(s.token_ids, s.text) for s in group] for group in drawn)
        return [sampled_pair(*x) for x in zip(prompts, drawn)]

    def propose(self, nodes: list[Node], width: int) -> list[list[Proposal]]:
        """`width` samples of each node, cut to their first fragment; a tail is one of them."""
        self.progress(sum(root.N >= self.config.iterations for root in self.roots))
        tails = [[node.tail] * (node.tail is not None) for node in nodes]
        responses = [node.response_ids for node in nodes]
        drawn = self._draw(
            [node.state_ids for node in nodes],
            n=[width - len(tail) for tail in tails],
            max_tokens=[self.max_tokens - len(response) for response in responses],
            seeds=[self._request_seed(node.path) for node in nodes],
        )
        self.stats["expansions"] += len(nodes)
        self.stats["tails_used"] += sum(map(len, tails))
        for node, response, group in zip(nodes, responses, drawn):
            self.drawn[id(node.path[0])] += [
                (s.token_ids, self._text(response + s.token_ids)) for s in group
            ]
        return [
            [self._cut(node, sample) for sample in (*tail, *samples)]
            for node, tail, samples in zip(nodes, tails, drawn)
        ]

    def evaluate(self, nodes: list[Node]) -> list[tuple[float, float]]:
        """(O, C) of each node: the outcome of finished responses, the model's grade of all."""
        states = [self._state(node) for node in nodes]
        if self.self_evaluation != "none":
            self._grade(states)
        self.stats["nodes"] += len(nodes)
        return [
            (self._outcome(node, *state), self.confidences.get(state, 0.0))
            for node, state in zip(nodes, states)
        ]

    def _draw(self, prompts: list[list[int]], **request) -> list[list[Sample]]:
        """Samples of each prompt, which are counted."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p}
        drawn = self.engine.generate(prompts, **sampling, **request)
        self.stats["samples"] += sum(map(len, drawn))
        self.stats["sampled_tokens"] += sum(len(s.token_ids) for group in drawn for s in group)
        return drawn

    def _cut(self, node: Node, sample: Sample) -> Proposal:
        """The first fragment of a sample, or all of it on the last level."""
        response, ids, logps = node.response_ids, sample.token_ids, sample.logps
        thoughts = num_thoughts(self.tokenizer, response + ids)  # belong to the first fragment
        texts = [self._piece(i) for i in response + ids]
        texts[:thoughts] = [""] * thoughts
        prefix, pieces = texts[: len(response)], texts[len(response) :]
        last = node.depth + 1 == self.config.depth
        n = len(pieces) if last else mcts.first_fragment(prefix, pieces)
        whole = n == len(pieces)
        rest = None if whole else Sample(ids[n:], logps[n:], "", sample.finish_reason)
        reason = {"stop": "eos"}.get(sample.finish_reason, "length") if whole else None
        text = self._text(ids[:n], behind=bool(response))
        return Proposal(text, ids[:n], logps[:n], whole, reason, rest)

    def _grade(self, states: list[tuple[int, str]]) -> None:
        """Self-evaluate the states that are not in the cache yet, in one call."""
        questions = {
            (root, text): question(
                self.tokenizer, self.self_evaluation, self.examples[root].target, text
            )
            for root, text in dict.fromkeys(states)
            if (root, text) not in self.confidences
        }
        fitting = {k: ids for k, ids in questions.items() if len(ids) < self.engine.max_model_len}
        self.stats["evaluations_too_long"] += len(questions) - len(fitting)  # C = 0
        for state, options in zip(fitting, self.engine.option_probs([*fitting.values()])):
            self.confidences[state] = mcts.confidence(options)
            self.stats["option_mass"] += sum(options.values())
        self.stats["evaluations"] += len(fitting)
        self.stats["evaluation_tokens"] += sum(map(len, fitting.values()))

    def _outcome(self, node: Node, root: int, text: str) -> float:
        """O of Eq. 6: +1 for a finished, right response, -1 for any other end, 0 before the end."""
        if not node.terminal:
            return 0.0
        error = rewards.error_type(text, self.examples[root].target)
        if not text.replace("<answer>", "").replace("</answer>", "").strip():
            error = error or "Other"  # an empty answer is wrong
        right = error is None
        if self.reward.file:
            right = self.reward.score(text, self.examples[root]).right
        right = right and node.reason == "eos"
        self.stats["ends"] += 1
        self.stats["ends_parsed"] += error != "Code Syntax"
        self.stats["ends_over_length"] += node.reason == "length"
        self.stats["ends_correct"] += right
        return 1.0 if right else -1.0

    def _state(self, node: Node) -> tuple[int, str]:
        """What a grade depends on: the tree and the response so far."""
        text = self._text(node.response_ids)
        return id(node.path[0]), without_thoughts(self.tokenizer, text)

    def _text(self, ids: list[int], behind: bool = False) -> str:
        """Text of tokens; `behind` others, with the blank that SentencePiece drops at a start."""
        body = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        return decode(self.anchor + body)[len(decode(self.anchor)) :] if behind else decode(body)

    def _piece(self, token: int) -> str:
        """Text of one token, "" for special and stop tokens: they belong to no fragment."""
        if token not in self.pieces:
            special = token in self.special
            self.pieces[token] = "" if special else self._text([token], behind=True)
        return self.pieces[token]

    def _request_seed(self, path: list[Node]) -> int:
        return derived_seed(f"{self.seed}/{self.examples[id(path[0])].id}", _places(path))


def question(tokenizer, order: str, target: str, response: str) -> list[int]:
    """Table 10's prompt as token ids, up to the option's letter; order "paper" or "cache"."""
    for token in data.special_tokens(tokenizer).values():  # a response must not open a turn here
        response = response.replace(token, "")
    user = mcts.EVAL_PROMPT["user"]
    if order == "cache":
        head, rest = user.split("\n\n", 1)
        user = f"{rest}\n\n{head}"
    chat = [
        {"role": "system", "content": mcts.EVAL_PROMPT["system"]},
        {"role": "user", "content": user.format(gt_ans=target, response=response)},
    ]
    ids = tokenizer.apply_chat_template(chat, return_dict=False, **data.PROMPT)
    start = "\n</think>\n\n" * bool(data.thought_opening(tokenizer))
    start += mcts.EVAL_PROMPT["assistant"] + " ("
    return [*ids, *tokenizer(start, add_special_tokens=False)["input_ids"]]


def diversity(samples: Iterable[list[tuple[list[int], str]]]) -> Counter:
    """What the samples of each example differ in, as sums over examples (Li et al. 2016).

    samples  per example: token ids of each sample, and the response that they complete

    Each name of DIVERSITY counts an example's different n-grams or calls, "NAME of" all of them.
    """
    counts = Counter()
    for drawn in samples:
        found = {
            f"diversity/distinct_{n}": [
                g for ids, _ in drawn for g in zip(*(ids[k:] for k in range(n)))
            ]
            for n in NGRAMS
        }
        calls = [call for _, text in drawn for call in rewards.parse(text).calls or []]
        found["diversity/distinct_calls"] = [json.dumps(call, sort_keys=True) for call in calls]
        for name, items in found.items():
            counts += {name: len(set(items)), f"{name} of": len(items)}
    return counts


# --------------------------------------------------------------------------------------- the pairs


def pair_rows(root: Node, config: SearchConfig) -> tuple[list[dict], Counter]:
    """The kept pairs of a tree as lines of pairs.jsonl, and why the others were dropped."""
    rows, drops = [], Counter()
    for pair in mcts.all_pairs(root, config):
        drops.update(pair.dropped_by)
        if pair.dropped_by:
            continue
        row = {"prefix": pair.node.state_text, "prefix_ids": pair.prefix_ids}
        row |= {"depth": pair.node.depth, "path": _places(pair.node.path)}
        for side, node in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            row |= {side: node.text, f"{side}_ids": list(node.token_ids)}
            row |= {f"{side}_p": node.prior, f"{side}_Q": node.Q}
            row |= {f"{side}_R": node.R, f"{side}_N": node.N}
        rows.append(row)
    return rows, drops


def sampled_pair(prompt: list[int], samples: list[Sample]) -> tuple[list[dict], Counter]:
    """Highest against lowest mean log-prob of a few samples: iTool without its search.

    At most one row; none where the two are equal. Ties: the first is chosen, the last rejected.
    """
    means = [math.fsum(s.logps) / len(s.logps) for s in samples]
    order = sorted(range(len(samples)), key=lambda k: (-means[k], k))
    row = {"prefix": "", "prefix_ids": prompt, "depth": 0}
    for side, k in (("chosen", order[0]), ("rejected", order[-1])):
        row |= {side: samples[k].text, f"{side}_ids": samples[k].token_ids}
        row |= {f"{side}_p": math.exp(means[k])}
    if row["chosen"] == row["rejected"]:
        return [], Counter({"similarity": 1})
    return [row], Counter()


def is_held_out(example: data.Example, fraction: float, seed: object) -> bool:
    """Whether the pairs of this example's tree are only measured; a function of the seed."""
    return random.Random(f"held out/{seed}/{example.id}").random() < fraction


def describe(row: dict) -> str:
    """One iteration's search in words, from its line of searches.jsonl."""
    drops = ", ".join(f"{n} {why}" for why, n in sorted(row["dropped"].items())) or "none"
    text = f"iteration {row['iteration']}: {row['trees']} of {row['pool']} examples searched"
    if row["expansions"]:
        text += (
            f", {row['expansions']} expansions, {row['ends']} finished responses of which "
            f"{row['ends_parsed']} parse, {row['ends_correct']} are right and "
            f"{row['ends_over_length']} too long"
        )
    text += f"; {row['pairs']} pairs to train on, {row['held_out']} held out; dropped: {drops}"
    if row["evaluations"]:
        text += f"; option mass {row['option_mass']:.3f}"
        if row["option_mass"] < 0.01:
            text += (
                "\n  the letters A to D have hardly any mass: the self-evaluation says little; "
                "consider --self_evaluation none"
            )
    if row["evaluations_too_long"]:
        text += f"\n  {row['evaluations_too_long']} states were too long to be graded"
    if not row["pairs"]:
        text += "\n  no pair to train on: this iteration leaves the model as it is; see the trees"
    return text


def _places(path: list[Node]) -> list[int]:
    """The path from the root as indices among siblings."""
    return [parent.children.index(child) for parent, child in itertools.pairwise(path)]


# ------------------------------------------------------------------------- preference optimisation


def pair_batch(run: Run, pairs: list, iteration: int, position: int) -> list:
    """Batch `position` of an iteration, whose last may be short. Each epoch is a shuffle."""
    order, seed = [], f"pairs/{run.config.seed}/{iteration}"
    for epoch in range(run.method.preference_epochs):
        order += shuffled(len(pairs), f"{seed}/{epoch}")
    size = run.config.train_batch_size
    return [pairs[i] for i in order[position * size : (position + 1) * size]]


def preference_gradient(
    run: Run, pairs: list[PreferencePair], train: bool = True
) -> dict[str, float]:
    """Backward passes of a batch of pairs, shared by the ranks; returns its loss and stats.

    train  False: only the stats
    """
    mine, stats = part(pairs, tokens_of, run.rank, run.world), {}
    with torch.set_grad_enabled(train):
        for micro in micro_batches(run.config, mine):
            logps, _, mask = forward(run.config, run.model, micro, temperature=1.0)
            sides = logps[0::2], mask[0::2], logps[1::2], mask[1::2]
            refs = [
                torch.tensor([pair.row[name] for pair in micro], device=logps.device)
                for name in ("chosen_ref", "rejected_ref")
            ]
            loss, parts = preference_loss(run.method, sides, refs, len(pairs))
            add(stats, {"loss": loss.detach(), **parts})
            if train:
                loss.backward()
    return all_sum(stats)


def preference_loss(
    method: ItoolConfig, sides: tuple, refs: list[Tensor], num_pairs: int
) -> tuple[Tensor, dict]:
    """The loss of a micro-batch of N pairs under --preference (Eqs. 10, 11, Table 9); and stats.

    sides  (N, T) each: log-probs and mask of the chosen steps, then of the rejected ones
    refs   (N,) each: summed reference log-probs of the two
    """
    if method.preference == "simpo":
        scale = {"beta": method.simpo_beta, "margin": method.simpo_margin}
        return simpo.simpo_loss(*sides, **scale, num_pairs=num_pairs)
    if method.preference == "dpo":
        return simpo.dpo_loss(*sides, *refs, beta=method.dpo_beta, num_pairs=num_pairs)
    if method.preference == "ipo":
        scale = {"tau": method.ipo_tau, "average": method.ipo_mean}
        return simpo.ipo_loss(*sides, *refs, **scale, num_pairs=num_pairs)
    return simpo.orpo_loss(*sides, lam=method.orpo_lam, num_pairs=num_pairs)


def add_references(run: Run, pairs: list[PreferencePair]) -> None:
    """Fill chosen_ref and rejected_ref: summed log-probs before the iteration's first update."""
    # micro-batches are in an order of their own
    place, refs = {id(pair): i for i, pair in enumerate(pairs)}, []
    mine = part(pairs, tokens_of, run.rank, run.world)
    with torch.no_grad():
        for micro in micro_batches(run.config, mine):
            logps, _, _ = forward(run.config, run.model, micro, temperature=1.0)
            sums = logps.float().sum(1).view(len(micro), 2).tolist()
            refs += [(place[id(pair)], *own) for pair, own in zip(micro, sums)]
    for i, chosen, rejected in all_gather(refs):
        pairs[i].row |= {"chosen_ref": chosen, "rejected_ref": rejected}


def engine_difference(pairs: list[PreferencePair]) -> float:
    """Mean |trainer - engine| of the steps' mean log-probs, nats per token; 0 for equal weights."""
    apart = [
        abs(math.log(pair.row[f"{side}_p"]) - pair.row[f"{side}_ref"] / len(ids))
        for pair in pairs
        for side, ids in zip(("chosen", "rejected"), pair.responses)
    ]
    return sum(apart) / len(apart)


def held_out_metrics(run: Run, pairs: list[PreferencePair]) -> dict:
    """Preference margin and accuracy on pairs that are not trained on; {} without pairs."""
    if not pairs:
        return {}
    stats = preference_gradient(run, pairs, train=False)
    return {f"eval/{name}": stats[name] for name in ("rewards/margins", "rewards/accuracies")}


# ------------------------------------------------------------------------------------- the records


def log_search(run: Run, summary: dict, pairs: list[PreferencePair]) -> None:
    """Append to pairs.jsonl, then to searches.jsonl; numbers to the tracker."""
    if run.rank > 0:
        return
    numbers = {k: v for k, v in summary.items() if isinstance(v, (int, float))}
    run.records.track(summary["step"], {f"search/{k}": v for k, v in numbers.items()})
    rows = [pair.row for pair in pairs]
    for name, lines in (("pairs.jsonl", rows), ("searches.jsonl", [summary])):
        with open(run.out / name, "a") as file:
            for line in lines:
                write(file, line)


def write_whole(path: Path, lines: Iterable[dict]) -> None:
    """Replace a .jsonl file, which is complete at any moment."""
    new = path.with_name(f".{path.name}.incomplete")
    with open(new, "w") as file:
        for line in lines:
            write(file, line)
    new.rename(path)


def read_searches(run: Run) -> dict[int, tuple[dict, list[PreferencePair]]]:
    """Iteration -> summary and pairs of the searches that an interrupted run has made.

    Those after the step that the run resumes from are dropped, from the two files too. A start that
    does not resume keeps none.
    """
    resumes = run.first_step > 0 or run.config.resume_from_checkpoint == "latest"
    step = run.first_step if resumes else -1
    read = [[*data.read_jsonl(run.out / f"{x}.jsonl", growing=True)] for x in ("searches", "pairs")]
    dist.broadcast_object_list(read)  # a network file system may show ranks different files
    found, rows = read
    searches = {row["iteration"]: row for row in found if row["step"] <= step}
    rows = [row for row in rows if row["iteration"] in searches]
    if run.rank == 0:
        for row in found:  # trees of dropped searches
            if row["iteration"] not in searches:
                (run.out / f"trees-{row['iteration']}.jsonl").unlink(missing_ok=True)
        write_whole(run.out / "searches.jsonl", searches.values())
        write_whole(run.out / "pairs.jsonl", rows)
    of = lambda iteration: [PreferencePair(row) for row in rows if row["iteration"] == iteration]
    return {iteration: (summary, of(iteration)) for iteration, summary in searches.items()}
