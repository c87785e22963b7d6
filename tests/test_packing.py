"""packing.py against a loop that asks an ordinary model one response at a time."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import packing
from packing import attention_mask, join, pack, padded_logps, response_logps

V = 61
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
RESPONSES = [[8, 9, 7, 9, 3], [], [2], [3, 8], [], [4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5, 0], [2]]
PROMPTS = {"long prompt": PROMPT, "short prompt": PROMPT[:2], "one token": PROMPT[:1]}


def qwen2(**changes):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"tie_word_embeddings": True} | changes))


def llama(**changes):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": False} | changes))


MODELS = {"qwen2 tied": qwen2, "llama untied": llama}


def slow(model, prompt, responses, temperature=1.0):
    """One response at a time, one token at a time, from the full logits of an ordinary call."""
    T = max(map(len, responses))
    logps, entropy = [], []
    for response in responses:
        logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
        row_logps, row_entropy = [], []
        for t, token in enumerate(response):
            log_p = logits[len(prompt) + t - 1].log_softmax(0)
            row_logps.append(log_p[token])
            row_entropy.append(-sum(lp.exp() * lp for lp in log_p))
        padding = [torch.tensor(0.0)] * (T - len(response))
        logps.append(torch.stack(row_logps + padding))
        entropy.append(torch.stack(row_entropy + padding))
    return torch.stack(logps), torch.stack(entropy)


def gradients(model, logps, entropy):
    """Of a loss that weighs every log-prob and every entropy differently."""
    model.zero_grad()
    weights = torch.randn(2, *logps.shape, generator=torch.Generator().manual_seed(7))
    (weights[0] * logps + weights[1] * entropy).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected):
    """Relative to the largest entry: 1e-5 (float32, two orders of summation)."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * max(1e-3, expected.abs().max())


def assert_same(model, actual, expected):
    """Values, and gradients of a loss in both outputs."""
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)
    expected = gradients(model, *expected)
    actual = gradients(model, *actual)
    assert actual.keys() == expected.keys() and len(actual) > 0
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:  # key biases have gradient 0 up to round-off: softmax ignores them
        error = (actual[name] - expected[name]).abs().max()
        assert error <= 1e-5 * max(expected[name].abs().max(), 1e-2 * largest), name


@pytest.fixture(params=["kernels", "mask"])
def way(request, monkeypatch):
    """With attention.py and, as where this file is copied alone, without it."""
    if request.param == "mask":
        monkeypatch.setattr(packing, "attention", None)
    return request.param


def test_pack_lays_out_the_row():
    packed = pack([7, 8, 9], [[1, 2], [], [3]])
    assert packed.input_ids.tolist() == [7, 8, 9, 1, 2, 3]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert packed.prompt_lengths == (3,) and packed.response_lengths == ((2, 0, 1),)
    assert packed.response_mask.tolist() == [[True, True], [False, False], [True, False]]


def test_join_keeps_the_order_of_groups():
    packed = join([pack([7, 8], [[1], [2, 3]]), pack([9], [[4, 5, 6]])])
    assert packed.input_ids.tolist() == [7, 8, 1, 2, 3, 9, 4, 5, 6]
    assert packed.position_ids.tolist() == [0, 1, 2, 2, 3, 0, 1, 2, 3]
    assert packed.lengths == (1, 2, 3) and packed.response_mask.shape == (3, 3)


def test_attention_mask_by_definition():
    groups = [(2, [3, 0, 1]), (1, [2]), (3, [])]
    packed = join([pack([0] * P, [[0] * n for n in lengths]) for P, lengths in groups])
    tokens = []  # (group, 0 for the prompt or the number of the response)
    for group, (P, lengths) in enumerate(groups):
        tokens += [(group, 0)] * P
        tokens += [(group, k + 1) for k, n in enumerate(lengths) for _ in range(n)]
    mask = attention_mask(packed)
    assert mask.shape == (len(tokens), len(tokens))
    for i, (group, segment) in enumerate(tokens):
        for j, (other, source) in enumerate(tokens):
            sees = group == other and j <= i and source in (0, segment)
            assert mask[i, j] == sees, (i, j)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_shared_equals_padded_equals_slow_loop(make, prompt, way):
    model = make()
    expected = slow(model, prompt, RESPONSES, temperature=0.7)
    padded = padded_logps(model, prompt, RESPONSES, temperature=0.7)
    assert_same(model, padded, expected)
    shared = response_logps(model, pack(prompt, RESPONSES), temperature=0.7)
    assert_same(model, shared, slow(model, prompt, RESPONSES, temperature=0.7))
    assert all(x.dtype == torch.float32 for x in shared)
    padding = ~pack(prompt, RESPONSES).response_mask
    assert padding.any() and all((x[padding] == 0).all() for x in (*shared, *padded))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_attention_function_equals_mask(make, prompt, way):
    model = make()
    packed = join(
        [pack(prompt, RESPONSES), pack([2, 7, 1], RESPONSES[:1]), pack([8], [[2], [8, 1]])]
    )
    model.set_attn_implementation("sdpa")
    hidden = model.model(
        input_ids=packed.input_ids[None],
        position_ids=packed.position_ids[None],
        attention_mask=attention_mask(packed)[None, None],
    ).last_hidden_state
    packing._use_shared_prefix(model)
    fast = model.model(
        input_ids=packed.input_ids[None],
        position_ids=packed.position_ids[None],
        attention_mask=torch.zeros(1, 1, 1, 1),
        shared_prefix=packing._Plan(packed, torch.device("cpu")),
    ).last_hidden_state
    assert_close(fast, hidden)


def test_plan_chooses_the_way(way):
    """Kernels where they take what they are given, else the mask."""
    plan = packing._Plan(pack(PROMPT, RESPONSES), torch.device("cpu"))
    q, k, v = (torch.randn(1, heads, 34, 8) for heads in (4, 2, 2))
    out = plan.attend(q, k, v, None)
    assert ("mask" in vars(plan)) == (way == "mask")
    if plan.kernels:
        plan.kernels.takes = lambda *qkv: False
    assert_close(plan.attend(q, k, v, None), out)
    assert "mask" in vars(plan)


def test_file_copied_alone_works(tmp_path):
    """In an empty folder, one group: the same log-probs."""
    shutil.copy(packing.__file__, tmp_path)
    model = qwen2()
    model.save_pretrained(tmp_path / "model")
    script = f"""
import torch, packing, transformers
assert packing.attention is None
model = transformers.AutoModelForCausalLM.from_pretrained("model")
torch.save(packing.response_logps(model, packing.pack({PROMPT}, {RESPONSES})), "scores.pt")
"""
    alone = {**os.environ, "PYTHONPATH": ""}  # jobs.py puts the repository there
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=alone)
    expected = response_logps(model, pack(PROMPT, RESPONSES))
    for actual, e in zip(torch.load(tmp_path / "scores.pt"), expected, strict=True):
        assert_close(actual, e)


def test_joined_groups_equal_separate_groups(way):
    model = qwen2()
    groups = [(PROMPT, RESPONSES), ([2, 7], [[1, 8]]), ([2], [[8], [1, 8, 2]]), ([5, 6, 7], [[]])]
    rows = [pack(*group) for group in groups]

    def separate():
        parts = [response_logps(model, row) for row in rows]
        T = max(part[0].shape[1] for part in parts)
        return [
            torch.cat(
                [torch.nn.functional.pad(part[i], (0, T - part[i].shape[1])) for part in parts]
            )
            for i in range(2)
        ]

    assert_same(model, response_logps(model, join(rows)), separate())


def test_order_of_responses_permutes_the_rows():
    model = llama()
    order = [5, 0, 3, 1, 6, 2, 4]
    first = response_logps(model, pack(PROMPT, RESPONSES))
    second = response_logps(model, pack(PROMPT, [RESPONSES[i] for i in order]))
    for a, b in zip(first, second, strict=True):
        assert_close(b, a[order])


def test_cudnn_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    response_logps(llama(), pack(PROMPT, RESPONSES))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("chunk_size", [1, 4, 23])
def test_chunk_size_changes_nothing(chunk_size):
    model = qwen2()
    packed = pack(PROMPT, RESPONSES)
    small = response_logps(model, packed, chunk_size=chunk_size)
    assert_same(model, small, response_logps(model, packed, chunk_size=10_000))


def test_logits_never_exist_at_once():
    class Widest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] == V:
                    self.rows = max(self.rows, x.numel() // V)
            return out

    model, responses = llama(), RESPONSES * 3  # 69 tokens; the transposed LM head is (32, V)
    with Widest() as widest:
        gradients(model, *response_logps(model, pack(PROMPT, responses), chunk_size=40))
    assert widest.rows == 40
    with Widest() as widest:
        gradients(model, *padded_logps(model, PROMPT, responses, chunk_size=40))
    assert widest.rows == 40


def test_gradient_checkpointing_changes_nothing(way):
    model = qwen2().train()
    packed = join([pack(PROMPT, RESPONSES), pack([2, 7], [[1, 8], [2]])])
    expected = response_logps(model, packed)
    values, grads = [x.detach() for x in expected], gradients(model, *expected)
    model.gradient_checkpointing_enable()
    recomputed = response_logps(model, packed)
    for a, e in zip(recomputed, values, strict=True):
        assert_close(a, e)
    actual = gradients(model, *recomputed)
    for name, gradient in grads.items():
        assert_close(actual[name], gradient)


def test_lora(way):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(qwen2(), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                parameter, std=0.3
            )  # at 1 the slow loop itself is 1e-5 from float64
    shared = response_logps(model, pack(PROMPT, RESPONSES), temperature=1.5)
    assert_same(model, shared, slow(model, PROMPT, RESPONSES, temperature=1.5))
    shared = response_logps(model, pack(PROMPT, RESPONSES))
    assert all("lora" in name for name in gradients(model, *shared))


@pytest.mark.parametrize("responses", [[[]], [[], [], []]])
def test_row_without_tokens_has_a_zero_gradient(responses):
    model = qwen2()
    for logps, entropy in (
        response_logps(model, pack(PROMPT, responses)),
        padded_logps(model, PROMPT, responses),
    ):
        assert logps.shape == entropy.shape == (len(responses), 0)
        model.zero_grad()
        (logps.sum() + entropy.sum()).backward()
        used = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(used) > 0 and all((gradient == 0).all() for gradient in used)


def test_equal_logits_have_entropy_log_v():
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    logps, entropy = response_logps(model, pack(PROMPT, [[1, 2, 3]]))
    assert torch.allclose(logps, torch.full((1, 3), -math.log(V)))
    assert torch.allclose(entropy, torch.full((1, 3), math.log(V)))


def test_entropy_oracle():
    case = json.loads((Path(__file__).parent / "oracles/packing.json").read_text())["entropy_1"]
    logits = torch.tensor(case["inputs"]["logits"][0])
    scores = packing._Scores.apply(logits, torch.tensor([0, 1, 2]), 1.0)
    assert torch.allclose(scores[:, 1], torch.tensor(case["expected"]["H"][0]), atol=1e-6)
    hot = packing._Scores.apply(2 * logits, torch.tensor([0, 1, 2]), 2.0)
    assert torch.allclose(hot, scores)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_and_their_gradient_equal_autograds(temperature):
    """The handwritten backward pass against what autograd makes of the formulas, in float64's digits."""
    torch.manual_seed(0)
    logits = (5 * torch.randn(7, 300)).requires_grad_()
    targets, weights = torch.randint(300, (7,)), torch.randn(7, 2)
    exact = logits.detach().double().requires_grad_()
    z = exact / temperature
    logps = z[range(7), targets] - z.exp().sum(-1).log()
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    expected = torch.stack([logps, entropy], -1)
    actual = packing._Scores.apply(logits, targets, temperature)
    assert_close(actual.detach().double(), expected.detach())
    [g] = torch.autograd.grad((weights * actual).sum(), logits)
    [e] = torch.autograd.grad((weights * expected).sum(), exact)
    assert_close(g.double(), e)
    half = logits.detach().bfloat16().requires_grad_()
    packing._Scores.apply(half, targets, temperature).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_ordinary_calls_stay_ordinary():
    model = llama().eval()
    expected = copy.deepcopy(model)
    response_logps(model, pack(PROMPT, RESPONSES))
    ids = torch.tensor([[0, 0, 0, 4, 5], [6, 7, 8, 9, 1]])
    left_padded = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    real = left_padded.bool()
    actual = model(ids, attention_mask=left_padded).logits[real]
    assert_close(actual, expected(ids, attention_mask=left_padded).logits[real])
    assert actual.shape[-1] == V
    greedy = {"attention_mask": left_padded, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), expected.generate(ids, **greedy))


def test_head_is_restored_after_an_error():
    model = qwen2()
    with pytest.raises(IndexError):
        response_logps(model, pack([V + 5], [[1]]))
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, V)


def test_models_that_would_be_wrong_are_refused():
    hybrid = Lfm2ForCausalLM(Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]))
    with pytest.raises(ValueError, match="1 of 2 layers.*--no_share_prefix"):
        response_logps(hybrid, pack([1, 2], [[2], [3]]))
    query = torch.zeros(1, 1, 3, 8)
    plan = packing._Plan(pack([1], [[2, 3]]), torch.device("cpu"))
    with pytest.raises(ValueError, match="s_aux: use --no_share_prefix"):
        packing.shared_prefix_attention(hybrid, query, query, query, None, plan, s_aux=query)
    windowed = qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match="sliding window 4 < 6 tokens"):
        response_logps(windowed, pack([1, 2, 3], [[2, 3], [3, 4, 5]]))
    within = response_logps(windowed, pack([1, 2], [[2, 3], [3, 4]]))
    assert_same(windowed, within, slow(windowed, [1, 2], [[2, 3], [3, 4]]))


def test_programmer_errors():
    with pytest.raises(AssertionError, match="empty prompt"):
        pack([], [[1]])
    with pytest.raises(AssertionError, match="nothing to join"):
        join([])
    with pytest.raises(AssertionError, match="temperature 0"):
        response_logps(qwen2(), pack([1], [[2]]), temperature=0)
