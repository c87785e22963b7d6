"""iTool's loop: stages, pool, search by an engine, pairs, the gradient of a step, and whole runs with their resumption."""

import itertools
import json
import math
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import frozen
import pytest
import torch
import torch.nn.functional as F
from test_whole_runs import launch, needs_vllm, rows_of, weights_of
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import data
import itool
import mcts
import model as modeling
import rewards
import rollout
import run as run_module
import train
from tasks import toy

REPO = frozen.REPO
TABLE_7 = mcts.SearchConfig()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return frozen.tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(frozen.TOY)


@pytest.fixture(scope="module")
def examples() -> list[data.Example]:
    return [data.Example(**row) for row in toy.generate("train", 60, max_tools=2)]


# ---- stages, pool ----


def test_stages_are_difficulty_s_and_lose_nothing(examples):
    parts = itool.stages_of(examples, "difficulty")
    assert list(parts) == ["easy", "medium", "hard"]
    for stage, part in parts.items():
        for e in part:
            tools = "\n".join(json.dumps(t, ensure_ascii=False) for t in e.tools)
            calls = 0
            if e.kind == "tool_call":
                inner = json.loads(e.target.split(">", 1)[1].rsplit("<", 1)[0])
                calls = len(inner) if isinstance(inner, list) else 1
            assert data.difficulty(len(e.tools), len(tools), calls) == stage
    assert sorted(e.id for part in parts.values() for e in part) == sorted(e.id for e in examples)
    assert itool.stages_of(examples, "none") == {"all": examples}


def test_even_stages_are_thirds_by_rank(examples):
    parts = list(itool.stages_of(examples, "even").values())
    assert [len(part) for part in parts] == [20, 20, 20]
    key = lambda e: (len(e.tools) >= 4, data.sizes(e)[1], data.sizes(e)[2])
    for easier, harder in itertools.pairwise(parts):
        assert max(map(key, easier)) <= min(map(key, harder))
    assert sorted(e.id for part in parts for e in part) == sorted(e.id for e in examples)


def test_pool_is_a_random_half(examples):
    pool = itool.pool_of(examples, 0.5, 0.1, seed=0)
    order = [e.id for e in examples]
    drawn = [order.index(e.id) for e in pool]
    assert len(drawn) == len(examples) // 2 and drawn == sorted({*drawn})
    other = itool.pool_of(examples, 0.5, 0.1, seed=1)
    assert {e.id for e in other} != {e.id for e in pool}


def test_a_pool_too_small_for_its_tenth_is_refused(examples):
    with pytest.raises(ValueError, match=r"10% of a pool of 9 examples.*--buffer_fraction"):
        itool.pool_of(examples[:18], 0.5, 0.1, seed=0)


# ---- the search by an engine ----


class Scripted:
    """An engine that writes what a table says: the k-th draw after a response so far; it counts its calls.

    The k-th draw continues the k-th text of `texts` that starts with the response so far, else the first one.
    """

    def __init__(self, tokenizer, prompts: list[list[int]], texts: list[str], end: bool = True):
        self.tokenizer, self.prompts, self.end = tokenizer, prompts, end
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.lists = [[*encode(text), *[tokenizer.eos_token_id] * end] for text in texts]
        self.calls, self.seeds, self.questions, self.drawn = Counter(), [], [], []
        self.max_model_len, self.stop_ids = 4096, [tokenizer.eos_token_id]

    def generate(self, prompts, *, n, max_tokens, seeds, **_):
        self.calls["generate"] += 1
        self.seeds += seeds
        groups = []
        for state, count, limit in zip(prompts, n, max_tokens):
            root = next(p for p in self.prompts if state[: len(p)] == p)
            done = state[len(root) :]
            fitting = [ids for ids in self.lists if ids[: len(done)] == done] or self.lists[:1]
            groups.append([])
            for k in range(count):
                ids = fitting[k % len(fitting)][len(done) :][:limit]
                reason = "stop" if ids[-1] == self.tokenizer.eos_token_id else "length"
                self.drawn.append((root, done, ids))
                groups[-1].append(rollout.Sample(ids, [-0.1 * (1 + k)] * len(ids), "", reason))
        return groups

    def option_probs(self, prompts):
        self.calls["option_probs"] += 1
        self.questions += [self.tokenizer.decode(p) for p in prompts]
        return [dict.fromkeys("ABCD", 0.1) for _ in prompts]


CALL = '<tool_call>\n{"name": "car.find", "params": {"city": "Rome", "size": %s, "year": 7}}\n</tool_call>'
TEXTS = [
    CALL % 3,
    CALL % 4,
    '<tool_call>\n{"name": "car.get", "params": {}}\n</tool_call>',
    "I cannot.",
]


def searched(tokenizer, *, texts=TEXTS, copies=1, end=True, limits=TABLE_7, **options):
    example = data.Example("x/1", [], [], "q", [], CALL % 3, "tool_call")
    examples = [data.Example(**{**vars(example), "id": f"x/{i}"}) for i in range(copies)]
    prompts = [[100 + i, 200, 300] for i in range(copies)]
    engine = Scripted(tokenizer, prompts, texts, end)
    searcher = itool.Searcher(engine, tokenizer, max_tokens=128, **options)
    return searcher, searcher.search(examples, prompts, limits), engine, examples


def nodes_of(root):
    yield root
    for child in root.children:
        yield from nodes_of(child)


def test_nodes_hold_the_sampled_tokens(tokenizer):
    """Paths are the scripted responses, cut as mcts.split_tokens cuts them; the last level takes the rest."""
    _, [root], engine, _ = searched(tokenizer)
    ends = [node for node in nodes_of(root) if node.terminal]
    assert ends
    for node in ends:
        ids = node.state_ids[3:]
        assert ids in engine.lists
        groups = mcts.split_tokens([tokenizer.decode([i]) for i in ids[:-1]] + [""])
        sizes = [len(group) for group in groups]
        steps = [len(step.token_ids) for step in node.path[1:]]
        whole = sizes[: len(steps) - 1]
        assert steps == [*whole, sum(sizes) - sum(whole)] or steps == sizes
        assert node.state_text == tokenizer.decode(ids[:-1])


def test_outcomes_are_those_of_error_type(tokenizer):
    _, [root], _, [example] = searched(tokenizer)
    seen = set()
    for node in nodes_of(root):
        if node is root:
            continue
        right = rewards.error_type(node.state_text, example.target) is None
        expected = 0.0 if not node.terminal else (1.0 if right else -1.0)
        assert node.O == expected
        seen.add(expected)
    assert seen == {0.0, 1.0, -1.0}


def test_a_model_that_never_ends_gets_minus_one_and_is_counted(tokenizer):
    searcher, [root], _, _ = searched(tokenizer, texts=["and so on, " * 200], end=False)
    ends = [node for node in nodes_of(root) if node.terminal]
    assert ends and all(node.O == -1 and node.reason == "length" for node in ends)
    assert all(len(node.state_ids) - 3 <= 128 for node in nodes_of(root))
    assert searcher.stats["ends_over_length"] == searcher.stats["ends"] > 0
    rows, _ = itool.pair_rows(root, TABLE_7)
    assert rows == []


def test_a_tail_is_one_of_the_draws(tokenizer):
    """Every expansion below a cut sample draws one sample less, and none is lost."""
    searcher, [root], _, _ = searched(tokenizer)
    with_tail = [n for n in nodes_of(root) if n.children and n.tail is not None]
    assert with_tail
    stats = searcher.stats
    assert stats["tails_used"] == len(with_tail)
    assert stats["samples"] == 3 * stats["expansions"] - stats["tails_used"]
    for node in with_tail:
        rest = node.tail.token_ids
        assert any(child.token_ids == rest[: len(child.token_ids)] for child in node.children)


def test_one_call_of_each_kind_per_wave_whatever_the_number_of_trees(tokenizer):
    _, _, alone, _ = searched(tokenizer)
    _, roots, many, _ = searched(tokenizer, copies=5)
    assert many.calls == alone.calls
    assert len({json.dumps([n.Q for n in nodes_of(root)]) for root in roots}) == 1


def test_a_state_is_graded_once(tokenizer):
    searcher, roots, engine, _ = searched(tokenizer, copies=2)
    states = {(id(n.path[0]), n.state_text) for root in roots for n in nodes_of(root) if n.parent}
    assert len(engine.questions) == len(states) == searcher.stats["evaluations"]


def test_seeds_differ_by_node_example_and_iteration(tokenizer):
    _, _, first, _ = searched(tokenizer, copies=3, seed="0/1")
    _, _, again, _ = searched(tokenizer, copies=3, seed="0/1")
    _, _, later, _ = searched(tokenizer, copies=3, seed="0/2")
    assert len(set(first.seeds)) == len(first.seeds)
    assert first.seeds == again.seeds and not set(first.seeds) & set(later.seeds)


@pytest.mark.parametrize("order", ["paper", "cache"])
def test_the_question_is_table_10_s(tokenizer, order):
    text = tokenizer.decode(itool.question(tokenizer, order, "THE TARGET", "THE RESPONSE"))
    for line in mcts.EVAL_PROMPT["user"].splitlines():
        line = line.replace("{gt_ans}", "THE TARGET").replace("{response}", "THE RESPONSE")
        assert line in text
    assert text.endswith("The option of overall quality is (")
    early = text.index("THE TARGET") < text.index("Evaluation Criteria")
    assert early == (order == "paper")


def test_a_state_too_long_to_be_graded_counts_as_c_zero(tokenizer):
    example = data.Example("x/1", [], [], "q", [], CALL % 3, "tool_call")
    engine = Scripted(tokenizer, [[100, 200, 300]], TEXTS)
    engine.max_model_len = len(itool.question(tokenizer, "paper", example.target, "")) + 20
    searcher = itool.Searcher(engine, tokenizer, max_tokens=128)
    [root] = searcher.search([example], [[100, 200, 300]], TABLE_7)
    assert searcher.stats["evaluations_too_long"] > 0
    for node in nodes_of(root):
        if node.parent:
            ids = itool.question(tokenizer, "paper", example.target, node.state_text)
            assert (node.C == 0.0) == (len(ids) >= engine.max_model_len)


def test_an_empty_answer_is_not_right(tokenizer):
    texts = ["<answer></answer>", "<answer>\nYes, it is.\n</answer>"]
    example = data.Example("x/1", [], [], "q", [], "<answer>\nYes.\n</answer>", "answer")
    searcher = itool.Searcher(
        Scripted(tokenizer, [[5, 6]], texts), tokenizer, self_evaluation="none"
    )
    [root] = searcher.search([example], [[5, 6]], TABLE_7)
    ends = {n.state_text: n.O for n in nodes_of(root) if n.terminal}
    assert ends == {texts[0]: -1.0, texts[1]: 1.0}


def test_a_sampled_control_token_opens_no_turn_in_the_question(tokenizer):
    clean = itool.question(tokenizer, "paper", "T", "ab")
    assert itool.question(tokenizer, "paper", "T", f"a{tokenizer.eos_token}b") == clean


def test_special_tokens_that_no_field_names_belong_to_no_fragment(tokenizer):
    """Llama 3.1's <|eom_id|> and <|start_header_id|> are special in tokenizer.json only."""
    named = AutoTokenizer.from_pretrained(frozen.TOY)
    named.backend_tokenizer.add_special_tokens(["<|turn|>"])
    own = AutoTokenizer.from_pretrained(frozen.TOY)
    own._tokenizer = named.backend_tokenizer
    token = own.convert_tokens_to_ids("<|turn|>")
    assert token not in own.all_special_ids and data.special_tokens(own)[token] == "<|turn|>"
    searcher = itool.Searcher(Scripted(own, [[5]], TEXTS), own)
    assert searcher._piece(token) == "" != searcher._piece(own.convert_tokens_to_ids("a"))
    clean = itool.question(own, "paper", "T", "ab")
    assert itool.question(own, "paper", "T", "a<|turn|>b") == clean


def test_blanks_that_sentencepiece_drops_at_a_start_are_kept_within_a_response():
    """Mistral's and Phi-3's decoder: without them prose would be one fragment, and steps run together."""
    words = "<s> </s> _a a _It _is _hot . _Take _water".replace("_", "\u2581").split()
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>")
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    own = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    engine = SimpleNamespace(stop_ids=[1])
    searcher = itool.Searcher(engine, own, self_evaluation="none")
    searcher.anchor = [2]
    ids = [4, 5, 6, 7, 8, 9, 7, 1]
    pieces = [searcher._piece(i) for i in ids]
    assert pieces == [" It", " is", " hot", ".", " Take", " water", ".", ""]
    first = mcts.first_fragment([], pieces)
    assert ids[:first] == [4, 5, 6, 7]
    texts = searcher._text(ids[:first]), searcher._text(ids[first:], behind=True)
    assert "".join(texts) == own.decode(ids[:-1]) == "It is hot. Take water."


def test_without_self_evaluation_c_is_zero_and_nobody_is_asked(tokenizer):
    _, [root], engine, _ = searched(tokenizer, self_evaluation="none")
    assert engine.calls["option_probs"] == 0 and all(node.C == 0 for node in nodes_of(root))


def test_search_over_a_real_engine_keeps_its_log_probs(tiny, tokenizer, examples):
    """Priors are exp of the mean log-prob at temperature 1 of the model's own forward pass."""
    engine = rollout.make_engine(
        "transformers", str(tiny), max_model_len=2048, logprobs_mode="raw_logprobs"
    )
    searcher = itool.Searcher(engine, tokenizer, max_tokens=24, seed=3)
    prompts = [data.render(e, tokenizer) for e in examples[:3]]
    roots = searcher.search(examples[:3], prompts, TABLE_7)
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    checked = 0
    for root in roots:
        assert root.N == TABLE_7.iterations
        for node in nodes_of(root):
            if node.parent is None:
                continue
            ids = torch.tensor(node.state_ids)
            with torch.no_grad():
                logps = plain(ids[None]).logits[0].log_softmax(-1)
            n = len(node.token_ids)
            own = [float(logps[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids))]
            assert math.isclose(node.prior, math.exp(sum(own) / n), rel_tol=1e-4)
            assert -2 <= node.C <= 1
            checked += 1
    assert checked > 10


def test_diversity_is_that_of_a_slow_count(tokenizer):
    """Distinct n-grams of what the engine drew and distinct calls of the whole responses, tree by tree."""
    searcher, roots, engine, _ = searched(tokenizer, copies=2)
    for root, prompt in zip(roots, engine.prompts):
        assert root.token_ids == prompt
    slow = Counter()
    for prompt in engine.prompts:
        mine = [(done, ids) for root, done, ids in engine.drawn if root == prompt]
        assert len(mine) > 3
        for n in (1, 2, 3):
            grams = []
            for _, ids in mine:
                for i in range(len(ids) - n + 1):
                    grams.append(tuple(ids[i : i + n]))
            slow[f"diversity/distinct_{n}"] += len({*grams})
            slow[f"diversity/distinct_{n} of"] += len(grams)
        calls = []
        for done, ids in mine:
            text = tokenizer.decode([i for i in done + ids if i != tokenizer.eos_token_id])
            if "<tool_call>" in text:
                calls.append(
                    re.sub(r"\s", "", text.split("<tool_call>")[1].split("</tool_call>")[0])
                )
        slow["diversity/distinct_calls"] += len({*calls})
        slow["diversity/distinct_calls of"] += len(calls)
    found = {name: value for name, value in searcher.stats.items() if "diversity" in name}
    assert found == slow
    assert 0 < slow["diversity/distinct_calls"] < slow["diversity/distinct_calls of"]


def test_the_order_of_keys_makes_no_other_call():
    write = lambda text: ([1, 2, 1], f"<tool_call>\n{text}\n</tool_call>")
    calls = [
        '{"name": "f", "params": {"a": 1, "b": 2}}',
        '{"params": {"b": 2, "a": 1}, "name": "f"}',
    ]
    calls += ['[{"name": "f", "params": {"a": 1, "b": 2}}, {"name": "f", "params": {}}]', "no call"]
    counts = itool.diversity([list(map(write, calls)), [write(calls[0])], []])
    assert counts["diversity/distinct_calls"] == 2 + 1
    assert counts["diversity/distinct_calls of"] == 4 + 1
    assert counts["diversity/distinct_2"] == 2 + 2 and counts["diversity/distinct_2 of"] == 8 + 2
    assert itool.diversity([]) == {}


# ---- pairs ----


def test_pair_rows_are_the_kept_pairs(tokenizer):
    _, [root], _, _ = searched(tokenizer)
    rows, drops = itool.pair_rows(root, TABLE_7)
    kept = mcts.preference_pairs(root, TABLE_7)
    assert len(rows) == len(kept) > 0
    for row, pair in zip(rows, kept):
        assert row["prefix_ids"] == pair.node.state_ids
        assert row["prefix_ids"] + row["chosen_ids"] == pair.chosen.state_ids
        assert row["prefix_ids"] + row["rejected_ids"] == pair.rejected.state_ids
        assert row["chosen_Q"] - row["rejected_Q"] >= 0.1 and row["chosen_Q"] >= 0.3
    dropped = [pair.dropped_by for pair in mcts.all_pairs(root, TABLE_7) if pair.dropped_by]
    assert sum(drops.values()) == sum(map(len, dropped))


def test_the_pair_without_a_search_is_best_against_worst_mean():
    sample = lambda text, *logps: rollout.Sample([1] * len(logps), list(logps), text, "stop")
    samples = [
        sample("a", -1.0, -1.0),
        sample("b", -3.0),
        sample("c", -0.2, -0.4),
        sample("d", -3.0),
    ]
    [row], _ = itool.sampled_pair([9], samples)
    assert (row["chosen"], row["rejected"]) == ("c", "d")  # ties: the last is rejected
    assert math.isclose(row["chosen_p"], math.exp(-0.3))
    assert itool.sampled_pair([9], [sample("a", -1.0), sample("a", -2.0)])[0] == []


def test_every_epoch_trains_on_every_pair_once():
    flags = ["--algo", "itool", "--train_batch_size", "4", "--preference_epochs", "3"]
    config, method = train.parse_args(flags)
    run = SimpleNamespace(config=config, method=method)
    pairs = list(range(7))
    batches = [itool.pair_batch(run, pairs, 1, i) for i in range(math.ceil(21 / 4))]
    flat = [pair for batch in batches for pair in batch]
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 1]
    for epoch in range(3):
        assert sorted(flat[7 * epoch : 7 * epoch + 7]) == pairs
    assert batches == [itool.pair_batch(run, pairs, 1, i) for i in range(6)]
    assert [itool.pair_batch(run, pairs, 2, i) for i in range(6)] != batches


# ---- the gradient of a step ----

SLOW = {  # iTool Table 9, one pair; M mean and S summed log-probs, r reference sums
    "simpo": lambda Mw, Ml, Sw, Sl, rw, rl: -F.logsigmoid(2.5 * Mw - 2.5 * Ml - 0.5),
    "dpo": lambda Mw, Ml, Sw, Sl, rw, rl: -F.logsigmoid(0.1 * (Sw - rw) - 0.1 * (Sl - rl)),
    "ipo": lambda Mw, Ml, Sw, Sl, rw, rl: ((Sw - rw) - (Sl - rl) - 1 / 0.2) ** 2,
    "orpo": lambda Mw, Ml, Sw, Sl, rw, rl: (
        -Mw - 0.1 * F.logsigmoid((Mw - torch.log(1 - Mw.exp())) - (Ml - torch.log(1 - Ml.exp())))
    ),
}


def some_pairs(tokenizer, examples, n: int) -> list[itool.PreferencePair]:
    rng = random.Random(5)
    words = lambda: [rng.randrange(100, len(tokenizer)) for _ in range(rng.randrange(1, 9))]
    rows = [
        {"prefix_ids": data.render(e, tokenizer)[:60], "chosen_ids": words(), "rejected_ids": words(),
         "chosen_ref": rng.uniform(-30, -5), "rejected_ref": rng.uniform(-30, -5)}
        for e in examples[:n]
    ]  # fmt: skip
    return [itool.PreferencePair(row) for row in rows]


@pytest.mark.parametrize("preference", SLOW)
@pytest.mark.parametrize("budget", [100, 100_000])
def test_gradient_of_a_batch_of_pairs_is_that_of_a_slow_loop(
    preference, budget, tiny, tokenizer, examples, tmp_path
):
    """Packed rows in float32, some per micro-batch, against one unpacked response at a time in float64."""
    more = ["--algo", "itool", "--preference", preference, "--max_tokens_per_row", budget]
    config, method = train.parse_args([*frozen.flags(tiny, tmp_path), *map(str, more)])
    run = one_rank(tiny, config, method)
    pairs = some_pairs(tokenizer, examples, 5)
    stats = itool.preference_gradient(run, pairs)
    actual = {name: p.grad for name, p in run.model.named_parameters()}

    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    total = 0
    for pair in (pair.row for pair in pairs):
        means, sums = [], []
        for side in ("chosen_ids", "rejected_ids"):
            prompt, step = pair["prefix_ids"], pair[side]
            logps = plain(torch.tensor([prompt + step])).logits[0].log_softmax(-1)
            own = [logps[len(prompt) + i - 1, token] for i, token in enumerate(step)]
            sums.append(sum(own))
            means.append(sum(own) / len(own))
        total = (
            total + SLOW[preference](*means, *sums, pair["chosen_ref"], pair["rejected_ref"]) / 5
        )
    total.backward()
    assert math.isclose(stats["loss"], float(total.detach()), rel_tol=1e-4)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert frozen.relative_difference(actual, expected) < 2e-4


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank without a process group: sums over ranks are this rank's."""
    for module in (itool, run_module):
        monkeypatch.setattr(module, "all_gather", lambda rows: rows, raising=False)
        monkeypatch.setattr(module, "all_max", float, raising=False)
        monkeypatch.setattr(
            module,
            "all_sum",
            lambda values: {k: float(v) for k, v in values.items()},
            raising=False,
        )


def one_rank(folder: Path, config, method) -> run_module.Run:
    """A Run with a model, but without data and engine."""
    run = object.__new__(run_module.Run)
    run.config, run.method, run.rank, run.world, run.signal = config, method, 0, 1, 0
    run.first_step = 0
    run.model, run.tokenizer = modeling.load(folder)
    return run


def test_perplexities_are_those_of_a_slow_loop(tiny, tokenizer, examples, tmp_path):
    """Eq. 4: exp of minus the mean log-prob of the target's tokens, EOS included."""
    config, method = train.parse_args([*frozen.flags(tiny, tmp_path), "--algo", "itool"])
    actual = itool.perplexities(one_rank(tiny, config, method), examples[:7], 0)
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    for example, value in zip(examples, actual):
        prompt, target = data.render(example, tokenizer), data.target_ids(example, tokenizer)
        with torch.no_grad():
            logps = plain(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        nll = [-float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(target)]
        assert math.isclose(value, math.exp(sum(nll) / len(nll)), rel_tol=1e-4)


def test_learning_rates_are_table_6_s_and_9_s():
    """The oracle's cosine schedule; stages' rates; DPO and ORPO have their own."""
    values = [
        0.0,
        3.333333333333e-07,
        6.666666666667e-07,
        1e-06,
        9.949107209405e-07,
        9.797464868072e-07,
    ]
    config, method = train.parse_args(["--algo", "itool"])
    for step, value in enumerate(values):
        assert math.isclose(train.learning_rate_at(config, step, 25, 1e-6), value, rel_tol=1e-9)
    assert math.isclose(
        train.learning_rate_at(config, 24, 25, 1e-6), 5.089279059534e-09, rel_tol=1e-9
    )
    assert method.warmup_learning_rates == [5e-5, 2e-5, 1e-5] and config.learning_rate == 1e-6
    for preference, rate in {"simpo": 1e-6, "dpo": 3e-7, "ipo": 1e-6, "orpo": 3e-7}.items():
        own, _ = train.parse_args(["--algo", "itool", "--preference", preference])
        assert own.learning_rate == rate
    assert train.learning_rate_at(config, 0, 1, 1e-6) == 1e-6  # a single step must move
    own = ["--algo", "itool", "--preference", "dpo", "--learning_rate", "2e-7"]
    assert train.parse_args(own)[0].learning_rate == 2e-7


# ---- quantised base ----


def test_qlora_merges_the_original_weights(tmp_path):
    """NF4 rounds the frozen weights; what is saved, and sent to the engine, is peft's merge without that error."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from peft import PeftModel

    network, tokenizer = modeling.load(frozen.TOY, lora_rank=4, quant="4bit")
    kinds = {type(m).__name__ for m in network.modules()}
    assert "Linear4bit" in kinds
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    modeling.save(network, tokenizer, tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(frozen.TOY, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, tmp_path / "saved" / "adapter").merge_and_unload()
    saved, sent = weights_of(tmp_path / "saved"), dict(modeling.full_tensors(network))
    for name, weight in expected.state_dict().items():
        assert torch.allclose(saved[name], weight, atol=1e-6)
        assert torch.equal(saved[name], sent[name])
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


# ---- whole runs ----


def command(out, *more) -> list[str]:
    file = out.parent / "examples.jsonl"
    if not file.exists():
        data.write_jsonl(data.load("toy", "train")[:96], file)
    text = f"""train.py --algo itool --model_name_or_path {frozen.TOY} --train_file {file} --eval_file toy:test
    --output_dir {out} --train_batch_size 8 --iterations 2
    --pool_fraction 1 --buffer_fraction 0.6 --temperature 1 --self_evaluation none --seed 0 --learning_rate 3e-4 --max_prompt_length 1024 --max_completion_length 96
    --eval_size 16 --eval_steps 0 --no_gradient_checkpointing --held_out_pairs 0.3"""
    warmup = "--warmup_epochs 1 --warmup_learning_rates 1e-3 1e-3 1e-3"
    more = [*map(str, more)]
    return [*text.split(), *(warmup.split() if more[-1:] != ["itool"] else []), *more]


@needs_vllm
@pytest.mark.long
def test_itool_on_two_ranks_with_vllm(tmp_path):
    """Warm-up and two iterations with real search: files, counts, a margin that rises on held-out pairs."""
    out = tmp_path / "out"
    done = launch(*command(out), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for text in ("warm-up, easy:", "warm-up, hard:", "iteration 1:", "after iteration 2:"):
        assert text in done.stdout + done.stderr

    warmup = rows_of(out / "warmup" / "metrics.jsonl")[1:]
    assert warmup[-1]["eval/loss"] < warmup[1]["loss"]
    assert {row["stage"] for row in warmup[1:]} == {1, 2, 3}
    for last in [[row for row in warmup[1:] if row["stage"] == k][-1] for k in (1, 2, 3)]:
        assert (out / "warmup" / f"checkpoint-{last['step']}" / "config.json").exists()
    searches, pairs = rows_of(out / "searches.jsonl"), rows_of(out / "pairs.jsonl")
    assert [row["iteration"] for row in searches] == [1, 2]
    for row in searches:
        mine = [pair for pair in pairs if pair["iteration"] == row["iteration"]]
        assert len(mine) == row["pairs"] + row["held_out"] and row["pairs"] > 0
        assert row["trees"] == len(rows_of(out / f"trees-{row['iteration']}.jsonl"))

    _, _, *steps = rows_of(out / "metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    ends = [[s for s in steps if s["iteration"] == row["iteration"]][-1] for row in searches]
    assert all(0 <= end["eval/accuracy"] <= 1 for end in ends)
    norms = [end["adapter_norm"] for end in ends]
    assert 0 < norms[0] < norms[1]  # one adapter, continued
    assert searches[0]["held_out"] >= 4
    for end, row in zip(ends, searches):
        for name in itool.DIVERSITY:
            assert end[name] == row[name] and 0 < row[name] <= 1
    hours = json.loads((out / "hours.json").read_text())
    assert hours["warmup"].keys() == {"load", "update", "sync", "evaluate", "other", "total"}
    more = {"perplexity", "search", "reference"}
    assert hours["itool"].keys() == hours["warmup"].keys() | more
    assert all(seconds > 0 for stage in hours.values() for seconds in stage.values())
    assert ends[0]["eval/rewards/margins"] > searches[0]["eval/rewards/margins"]

    folder = out / f"checkpoint-{len(steps)}"
    before, after = weights_of(out / "warmup" / "checkpoint-best"), weights_of(folder)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(
        out / "warmup" / "checkpoint-best", dtype=torch.float32
    )
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    B = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert norms[1] == pytest.approx(sum(float((p**2).sum()) for p in B) ** 0.5, rel=1e-5)
    merged = adapted.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], after[name], atol=1e-6) for name in after)

    shown = launch("mcts.py", "show", out / "trees-1.jsonl")
    assert shown.returncode == 0 and "pairs" in shown.stdout
    assert (out / "trees-1.svg").read_text().startswith("<svg")


def itool_alone(out, *more):
    """One rank, a small search, a step on two pairs at a time, a checkpoint after each."""
    text = """--engine transformers --buffer_fraction 0.15 --mcts_iterations 2 --min_q -9 --min_gap 0.01 --train_batch_size 2
    --held_out_pairs 0 --preference_epochs 4 --max_completion_length 64 --eval_size 4 --save_steps 1"""
    return launch(*command(out, *text.split(), *more))


WITHOUT_WARMUP = ("--stages", "itool")


@pytest.mark.long
def test_a_run_that_was_cut_between_its_phases_goes_on(tmp_path):
    """After the warm-up and before the first search: the same pairs, metrics and weights, and no second warm-up."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = "--split none --train_batch_size 16 --iterations 1".split()
    done = itool_alone(whole, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(whole / "warmup", cut / "warmup")
    done = itool_alone(cut, *flags, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr[-3000:]
    names = ("metrics.jsonl", "pairs.jsonl")
    assert (cut / "warmup/metrics.jsonl").read_text() == (
        whole / "warmup/metrics.jsonl"
    ).read_text()
    timed = lambda name: name.startswith(("timing_s/", "perf/"))
    for name, first in zip(names, (1, 0)):
        rows = [
            [{k: v for k, v in row.items() if not timed(k)} for row in rows_of(out / name)[first:]]
            for out in (cut, whole)
        ]
        assert rows[0] == rows[1] and len(rows[0]) > 1
    last = f"checkpoint-{rows_of(whole / names[0])[-1]['step']}"
    weights = [weights_of(out / last) for out in (cut, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.long
def test_no_pair_at_all_is_said_and_leaves_the_model(tmp_path):
    out = tmp_path / "out"
    done = itool_alone(
        out, "--min_q", 9, "--iterations", 1, "--self_evaluation", "paper", *WITHOUT_WARMUP
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = done.stdout + done.stderr
    assert (
        "option mass" in text
        and "no pair to train on" in text
        and "accept_q" in text
        and "saved as it was" in text
    )
    before, after = weights_of(frozen.TOY), weights_of(out / "checkpoint-0")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "wrong", [["--preference", "dpo", "--simpo_beta", "2"], ["--no_mcts", "--mcts_depth", "2"]]
)
def test_a_flag_that_another_switches_off_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--algo", "itool", *wrong])
    assert "has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, needs",
    [
        (["--max_steps", "5"], "belongs to --algo sft, grpo"),
        (["--num_generations", "4"], "belongs to --algo grpo"),
        (["--entropy_coef", "0"], "belongs to --algo grpo"),
        (["--stages", "warmup", "--iterations", "5"], "--stages warmup has no iterations"),
        (["--stages", "itool", "--warmup_epochs", "1"], "--stages itool has no warm-up"),
    ],
)
def test_a_flag_that_itool_does_not_read_is_refused(flags, needs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--algo", "itool", *flags])
    assert needs in capsys.readouterr().err
    (tmp_path / "all.args").write_text(" ".join(flags))  # a file may serve several methods
    train.parse_args(["--algo", "itool", f"@{tmp_path}/all.args"])


def test_without_curriculum_the_warm_up_is_one_shuffled_stage():
    """--no_warmup (Table 3): SFT on all examples in one stage, at the first rate, then the iterations."""
    config, method = train.parse_args(["--algo", "itool", "--no_warmup", "--quant", "4bit"])
    first, last = train.stages_of(config, method)
    assert first[0] == replace(config, output_dir="runs/itool/warmup", quant="none")
    assert first[1:] == (method, train.run_sft) and last == (config, method, itool.run_itool)
    rows = [data.Example(**row) for row in toy.generate("train", 60, max_tools=2)]
    run = SimpleNamespace(examples=rows, say=lambda text: None)
    [(_, examples, _, learning_rate)] = itool.warmup_stages(config, method, run)
    assert len(examples) == 60 and learning_rate == 5e-5


@pytest.mark.parametrize("stage, loop", [("warmup", train.run_sft), ("itool", itool.run_itool)])
def test_a_stage_alone(stage, loop):
    config, method = train.parse_args(["--algo", "itool", "--stages", stage])
    assert train.stages_of(config, method) == [(config, method, loop)]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mcts_width", "1"], "--mcts_width 1: must be >= 2"),
        (["--buffer_fraction", "0"], "--buffer_fraction"),
        (["--preference", "ppo"], "--preference: invalid choice: 'ppo'"),
        (["--vllm_tensor_parallel_size", "2"], "each rank searches its own trees"),
        (["--quant", "8bit"], "--quant: invalid choice: '8bit'"),
        (["--quant", "4bit", "--lora_rank", "0"], "--lora_rank"),
        (["--warmup_learning_rates", "1e-5"], "give three"),
        (["--stages", "warmup", "--warmup_learning_rates", "1e-5", "1e-5"], "give three"),
        (["--stages", "warmup", "--warmup_epochs", "0"], "--warmup_epochs 0"),
        (["--iterations", "0"], "--iterations 0"),
        (["--mcts_iterations", "0"], "--mcts_iterations 0"),
        (["--mcts_depth", "0"], "depth=0"),
        (["--simpo_beta", "0"], "--simpo_beta"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags, message, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.parse_args([*frozen.flags(tiny, tmp_path), "--algo", "itool", *flags])
    assert message in capsys.readouterr().err
