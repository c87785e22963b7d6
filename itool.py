"""The parts of iTool's loop (`run_itool` in train.py): stages, pool, search by a model, pairs.

    stages_of       easy, medium, hard: the warm-up's curriculum                     Section 3.1
    pool_of         the examples that the replay buffer is chosen from               Section 3.2
    Searcher        `mcts.search` by an engine: samples and self-evaluations         Eqs. 5-9
    pair_rows       the preference pairs of a tree as lines of pairs.jsonl           Appendix B.1
    sampled_pair    the ablation without a search: best and worst of four samples    Figure 6

A wave of the search is one `Engine.generate` and one `Engine.option_probs` for all trees of a rank.
Samples run to their end and are cut afterwards; the unused rest of a sample is one of the draws of
the child it belongs to, which is exact: given the child's tokens it is a draw from the policy.

Departures from the paper, and choices where it is silent (mcts.py has the search's own):
 1. An example is one decision of the model. The pool takes every assistant turn of a conversation,
    calls and answers, not one turn per conversation.
 2. Outcome: +1 for a finished response without an error of Figure 3's classes, else -1.
 3. `split="even"` makes three equal parts by rank, as the word "evenly" asks; the printed criteria
    do not give equal parts.
 4. A tenth of the trees is held out, to see the preference margin on pairs that were not trained on.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import data
import mcts
import rewards
from mcts import Node, Proposal, SearchConfig
from rollout import Engine, Sample, derived_seed

STAGES = ("easy", "medium", "hard")
LETTER_PREFIX = mcts.EVAL_PROMPT["assistant"] + " ("  # the next token is the option's letter
SELF_EVALUATION = ("paper", "cache", "none")
COUNTS = (  # what a search counts, in searches.jsonl
    "expansions", "samples", "sampled_tokens", "tails_used", "nodes", "evaluations", "evaluation_tokens",
    "evaluations_too_long", "ends", "ends_parsed", "ends_over_length", "ends_correct",
)  # fmt: skip
SAMPLES_WITHOUT_SEARCH = 4  # iTool section 4.3.2: "four responses"


# ------------------------------------------------------------------------------------------ the examples


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
        order = sorted(
            range(len(examples)), key=lambda i: (sizes[i][0] >= 4, sizes[i][1], sizes[i][2], i)
        )
        names = [""] * len(examples)
        for rank, i in enumerate(order):
            names[i] = STAGES[3 * rank // len(examples)]
    return {stage: [e for e, name in zip(examples, names) if name == stage] for stage in STAGES}


def pool_of(
    examples: list[data.Example], fraction: float, buffer_fraction: float, seed: int
) -> tuple[list[data.Example], int]:
    """A random share of the examples, in their order, and how many targets of it cannot be graded.

    fraction         of the examples, in (0, 1]; iTool: 0.5
    buffer_fraction  of the pool that a search takes
    ValueError where that is less than one example.
    """
    size = round(fraction * len(examples))
    drawn = sorted(random.Random(f"pool/{seed}").sample(range(len(examples)), size))
    pool = [examples[i] for i in drawn if _gradable(examples[i].target)]
    if buffer_fraction * len(pool) < 1:
        raise ValueError(
            f"the replay buffer takes {buffer_fraction:.0%} of a pool of {len(pool)} examples, less than one: "
            "give more data, or raise --pool_fraction or --buffer_fraction"
        )
    return pool, size - len(pool)


def _gradable(target: str) -> bool:
    try:
        rewards.error_type(target, target)
    except ValueError:
        return False
    return True


# -------------------------------------------------------------------------------------------- the search


def search_config(config) -> SearchConfig:
    """Table 7's limits as the search wants them."""
    return SearchConfig(
        depth=config.mcts_depth, width=config.mcts_width, simulation=config.mcts_simulation,
        iterations=config.mcts_iterations, c=config.mcts_c, discount=config.mcts_discount,
        max_similarity=config.max_similarity, min_gap=config.min_gap, min_q=config.min_q,
    )  # fmt: skip


class Searcher:
    """`mcts.search` by an engine that holds the policy.

    engine           with logprobs_mode="raw_logprobs": Eq. 5 wants p(a|s) at temperature 1
    temperature      of the samples, 1.5 in Table 7;  top_p in (0, 1]
    max_tokens       of a whole response
    self_evaluation  "paper": Table 10's order; "cache": its fixed text first, which the engine's
                     prefix cache then holds; "none": C = 0
    seed             anything with a text form; a request's seed is a hash of it, the example and the
                     node's path
    stats            counts since the last `search`
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer,
        *,
        temperature: float = 1.5,
        top_p: float = 1.0,
        max_tokens: int = 512,
        self_evaluation: str = "paper",
        seed: object = 0,
    ) -> None:
        assert self_evaluation in SELF_EVALUATION, self_evaluation
        self.engine, self.tokenizer = engine, tokenizer
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens
        self.self_evaluation, self.seed = self_evaluation, seed
        self.stop_ids = set(engine.stop_ids)
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

        prompts    token ids of each, as `data.render` gives them
        progress   called with the number of finished trees
        """
        self.config, self.stats = config, Counter()
        roots = [Node(token_ids=list(prompt)) for prompt in prompts]
        self.examples = {id(root): example for root, example in zip(roots, examples, strict=True)}
        self.confidences: dict[tuple[int, str], float] = {}
        self.progress, self.roots = progress, roots
        mcts.search(roots, self.propose, self.evaluate, config)
        progress(len(roots))
        return roots

    def sampled_pairs(
        self, examples: list[data.Example], prompts: list[list[int]]
    ) -> list[tuple[list[dict], Counter]]:
        """`sampled_pair` of each example: the ablation without a search."""
        self.stats = Counter()
        drawn = self.engine.generate(
            prompts,
            n=SAMPLES_WITHOUT_SEARCH,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            seeds=[derived_seed(self.seed, example.id) for example in examples],
        )
        self.stats["samples"] = sum(map(len, drawn))
        self.stats["sampled_tokens"] = sum(len(s.token_ids) for group in drawn for s in group)
        return [sampled_pair(*x) for x in zip(examples, prompts, drawn)]

    def propose(self, nodes: list[Node], width: int) -> list[list[Proposal]]:
        """`width` samples of each node, cut to their first fragment; a tail is one of them."""
        self.progress(sum(root.N >= self.config.iterations for root in self.roots))
        paths = [node.path for node in nodes]
        tails = [[node.tail] * (node.tail is not None) for node in nodes]
        used = [sum(len(node.token_ids) for node in path[1:]) for path in paths]
        drawn = self.engine.generate(
            [node.state_ids for node in nodes],
            n=[width - len(tail) for tail in tails],
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=[self.max_tokens - length for length in used],
            seeds=[self._request_seed(path) for path in paths],
        )
        self.stats["expansions"] += len(nodes)
        self.stats["tails_used"] += sum(map(len, tails))
        self.stats["samples"] += sum(map(len, drawn))
        self.stats["sampled_tokens"] += sum(len(s.token_ids) for group in drawn for s in group)
        return [
            [self._cut(path, sample) for sample in (*tail, *samples)]
            for path, tail, samples in zip(paths, tails, drawn)
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

    def _cut(self, path: list[Node], sample: Sample) -> Proposal:
        """The first fragment of a sample, or all of it on the last level."""
        prefix = [self._piece(i) for node in path[1:] for i in node.token_ids]
        pieces = [self._piece(i) for i in sample.token_ids]
        last = len(path) == self.config.depth  # the root has depth 0
        n = len(pieces) if last else mcts.first_fragment(prefix, pieces)
        whole = n == len(pieces)
        ids, logps = sample.token_ids, sample.logps
        rest = None if whole else Sample(ids[n:], logps[n:], "", sample.finish_reason)
        reason = {"stop": "eos"}.get(sample.finish_reason, "length") if whole else None
        return Proposal(self._text(ids[:n]), ids[:n], logps[:n], whole, reason, rest)

    def _grade(self, states: list[tuple[int, str]]) -> None:
        """Self-evaluate the states that are not yet in the cache, in one call."""
        new = [state for state in dict.fromkeys(states) if state not in self.confidences]
        prompts = [
            question(self.tokenizer, self.self_evaluation, self.examples[root].target, text)
            for root, text in new
        ]
        room = self.engine.max_model_len - 1
        self.stats["evaluations_too_long"] += sum(len(prompt) > room for prompt in prompts)  # C = 0
        new = [state for state, prompt in zip(new, prompts) if len(prompt) <= room]
        prompts = [prompt for prompt in prompts if len(prompt) <= room]
        for state, options in zip(new, self.engine.option_probs(prompts)):
            self.confidences[state] = mcts.confidence(options)
            self.stats["option_mass"] += sum(options.values())
        self.stats["evaluations"] += len(new)
        self.stats["evaluation_tokens"] += sum(map(len, prompts))

    def _outcome(self, node: Node, root: int, text: str) -> float:
        """O of Eq. 6: +1 for a finished and right response, -1 for another end, 0 before the end."""
        if not node.terminal:
            return 0.0
        error = rewards.error_type(text, self.examples[root].target)
        if not text.replace("<answer>", "").replace("</answer>", "").strip():
            error = error or "Other"  # an empty answer is no answer
        self.stats["ends"] += 1
        self.stats["ends_parsed"] += error != "Code Syntax"
        self.stats["ends_over_length"] += node.reason == "length"
        self.stats["ends_correct"] += node.reason == "eos" and error is None
        return 1.0 if node.reason == "eos" and error is None else -1.0

    def _state(self, node: Node) -> tuple[int, str]:
        """The tree's root and the response so far: what a grade depends on."""
        root, *steps = node.path
        return id(root), self._text([i for step in steps for i in step.token_ids])

    def _text(self, ids: list[int]) -> str:
        body = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return self.tokenizer.decode(body, clean_up_tokenization_spaces=False)

    def _piece(self, token: int) -> str:
        """Text of one token, "" for special tokens: they belong to no fragment."""
        if token not in self.pieces:
            special = token in self.tokenizer.all_special_ids
            self.pieces[token] = "" if special else self.tokenizer.decode([token])
        return self.pieces[token]

    def _request_seed(self, path: list[Node]) -> int:
        return derived_seed(f"{self.seed}/{self.examples[id(path[0])].id}", _places(path))


def question(tokenizer, order: str, target: str, response: str) -> list[int]:
    """Table 10's prompt as token ids, up to the option's letter; order "paper" or "cache"."""
    for token in tokenizer.all_special_tokens:  # what a model writes must not open a turn here
        response = response.replace(token, "")
    user = mcts.EVAL_PROMPT["user"]
    if order == "cache":
        head, rest = user.split("\n\n", 1)
        user = f"{rest}\n\n{head}"
    chat = [
        {"role": "system", "content": mcts.EVAL_PROMPT["system"]},
        {"role": "user", "content": user.format(gt_ans=target, response=response)},
    ]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return [*ids, *tokenizer(LETTER_PREFIX, add_special_tokens=False)["input_ids"]]


# --------------------------------------------------------------------------------------------- the pairs


def pair_rows(
    root: Node, example: data.Example, config: SearchConfig
) -> tuple[list[dict], Counter]:
    """The kept pairs of a tree as lines of pairs.jsonl, and the reasons of the dropped ones."""
    rows, drops = [], Counter()
    for pair in mcts.all_pairs(root, config):
        drops.update(pair.dropped_by)
        if pair.dropped_by:
            continue
        row = _row(example, pair.prefix_ids, pair.chosen_ids, pair.rejected_ids)
        row |= {"prefix": pair.node.state_text, "path": _places(pair.node.path)}
        row |= {"depth": pair.node.depth}
        for side, node in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            row |= {side: node.text, f"{side}_p": node.prior, f"{side}_Q": node.Q}
            row |= {f"{side}_R": node.R, f"{side}_N": node.N}
        rows.append(row)
    return rows, drops


def sampled_pair(
    example: data.Example, prompt: list[int], samples: list[Sample]
) -> tuple[list[dict], Counter]:
    """Highest against lowest mean log-prob of a few samples: iTool without its search.

    At most one row; none where the two are equal. Ties: the first is chosen, the last rejected.
    """
    means = [math.fsum(s.logps) / len(s.logps) for s in samples]
    order = sorted(range(len(samples)), key=lambda k: (-means[k], k))
    chosen, rejected = samples[order[0]], samples[order[-1]]
    if chosen.text == rejected.text:
        return [], Counter({"similarity": 1})
    row = _row(example, prompt, chosen.token_ids, rejected.token_ids)
    row |= {"prefix": "", "depth": 0, "chosen": chosen.text, "rejected": rejected.text}
    row |= {"chosen_p": math.exp(means[order[0]]), "rejected_p": math.exp(means[order[-1]])}
    return [row], Counter()


def is_held_out(example: data.Example, fraction: float, seed: object) -> bool:
    """Whether the pairs of this example's tree are kept for measuring: a function of the seed."""
    return random.Random(f"held out/{seed}/{example.id}").random() < fraction


def summary(row: dict) -> str:
    """One iteration's search in words, from its line of searches.jsonl."""
    drops = ", ".join(f"{n} {why}" for why, n in sorted(row["dropped"].items())) or "none"
    text = f"iteration {row['iteration']}: {row['trees']} of {row['pool']} examples searched"
    if row["expansions"]:
        text += (
            f", {row['expansions']} expansions, {row['ends']} finished responses of which "
            f"{row['ends_parsed']} parse, {row['ends_correct']} are right and {row['ends_over_length']} too long"
        )
    if row["evaluations"]:
        text += f", option mass {row['option_mass']:.3f}"
    per_tree = (row["pairs"] + row["held_out"]) / max(1, row["trees"])
    text += f"; {row['pairs']} pairs to train on, {row['held_out']} held out ({per_tree:.2f} per tree); dropped: {drops}"
    if row["evaluations_too_long"]:
        text += f"; {row['evaluations_too_long']} states too long to be graded"
    if row["evaluations"] and row["option_mass"] < 0.01:
        text += (
            "\n  the model hardly puts its mass on the letters A to D: its self-evaluation says little; "
            "consider --self_evaluation none"
        )
    if not row["pairs"]:
        text += "\n  no pair to train on: this iteration leaves the model as it is; see the trees"
    return text


def _row(example: data.Example, prefix: list[int], chosen: list[int], rejected: list[int]) -> dict:
    return {
        "id": example.id,
        "query": example.query,
        "target": example.target,
        "prefix_ids": list(prefix),
        "chosen_ids": list(chosen),
        "rejected_ids": list(rejected),
    }


def _places(path: list[Node]) -> list[int]:
    """The way from the root as indices among siblings."""
    return [parent.children.index(child) for parent, child in itertools.pairwise(path)]
