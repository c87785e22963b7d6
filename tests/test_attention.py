"""attention.py against attention under the whole mask, every score in float64.

On a CPU the path of GPUs runs too, with a slow loop in the place of the two kernels: plan, indices,
merger and backward pass are those of the GPU. Where a GPU is, the same tests run on its kernels.
"""

from itertools import pairwise

import pytest
import torch

import attention
from packing import attention_mask, join, pack

# (prompt, responses) of each group: uneven, single tokens, empty, one response, none
ROWS = {
    "one group": [(50, [7, 1, 30])],
    "several groups": [(40, [5, 0, 1, 30, 7]), (1, [1, 0, 3]), (9, [4]), (12, []), (3, [2, 2])],
    "longer than a block": [(600, [1, 30, 290]), (130, [200, 3])],
    "nothing to merge": [(9, [4]), (5, []), (7, [0, 3, 0])],
    "no sequence of two": [(1, [1, 1, 1])],
}


def slow_forward(q, k, v, q_ends, k_ends, max_q, max_k, dropout, causal, debug, *, scale):
    """_flash_attention_forward by its definition: sequence by sequence, head by head."""
    assert q_ends.dtype == k_ends.dtype == torch.int32 and dropout == 0 and not debug
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and q.shape[-1] % 8 == 0
    out, logsumexp = (
        torch.full_like(q, torch.nan),
        torch.full(q.shape[1::-1], torch.nan, dtype=q.dtype),
    )
    for (i, j), (a, b) in pairs(q_ends, k_ends, max_q, max_k):
        for h in range(q.shape[1]):
            scores = scores_of(q[i:j, h], k[a:b, h * k.shape[1] // q.shape[1]], causal, scale)
            logsumexp[h, i:j] = scores.logsumexp(-1)
            out[i:j, h] = scores.softmax(-1) @ v[a:b, h * k.shape[1] // q.shape[1]]
    return out, logsumexp, None, None, None


def slow_backward(
    grad, q, k, v, out, logsumexp, q_ends, k_ends, max_q, max_k, dropout, causal, seed, offset, *, scale
):  # fmt: skip
    """_flash_attention_backward: weights from the logsumexp that is given, not from the scores alone."""
    assert logsumexp.is_contiguous() and logsumexp.shape == q.shape[1::-1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for (i, j), (a, b) in pairs(q_ends, k_ends, max_q, max_k):
        for h in range(q.shape[1]):
            s = h * k.shape[1] // q.shape[1]
            w = (scores_of(q[i:j, h], k[a:b, s], causal, scale) - logsumexp[h, i:j, None]).exp()
            dscore = grad[i:j, h] @ v[a:b, s].T - (grad[i:j, h] * out[i:j, h]).sum(-1, keepdim=True)
            dq[i:j, h] += scale * (w * dscore) @ k[a:b, s]
            dk[a:b, s] += scale * (w * dscore).T @ q[i:j, h]
            dv[a:b, s] += w.T @ grad[i:j, h]
    return dq, dk, dv


def scores_of(q, k, causal, scale):
    scores = scale * q @ k.T
    return (
        scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf) if causal else scores
    )


def pairs(q_ends, k_ends, max_q, max_k):
    """Where the sequences of queries and of keys lie; they fill the row and none is longer than said."""
    q_ends, k_ends = q_ends.tolist(), k_ends.tolist()
    q_spans, k_spans = ([*pairwise(ends)] for ends in (q_ends, k_ends))
    assert len(q_spans) == len(k_spans) and max_q >= 2
    assert max_q >= max(b - a for a, b in q_spans) and max_k >= max(b - a for a, b in k_spans)
    assert all(b > a for a, b in (*q_spans, *k_spans))
    return zip(q_spans, k_spans)


def on_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.fixture(params=["cpu", "the GPU's path", "gpu"])
def device(request, monkeypatch):
    if request.param == "gpu" and not on_gpu():
        pytest.skip("needs a GPU with flash attention: make test-gpu")
    if request.param == "the GPU's path":
        monkeypatch.setitem(attention.KERNELS, "cpu", attention._OnGpu)
        monkeypatch.setattr(attention._OnGpu, "takes", lambda *qkv: True)
        monkeypatch.setattr(attention, "_flash", slow_forward)
        monkeypatch.setattr(attention, "_flash_backward", slow_backward)
    return torch.device("cuda" if request.param == "gpu" else "cpu")


def packed_row(groups):
    return join([pack([0] * P, [[0] * n for n in lengths]) for P, lengths in groups])


def dense(row, q, k, v, scale):
    """Attention (1, L, H, D) under the whole mask, from all L x L scores."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(
        ~attention_mask(row).to(q.device), -torch.inf
    )
    return (scores.softmax(-1) @ v).transpose(1, 2)


def both(row, inputs, scale, device):
    """Output and gradients of q, k and v: attention.py's, and dense ones in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    plan = attention.SharedPrefix(row.prompt_lengths, row.response_lengths, device)
    assert plan.takes(*inputs)
    actual = plan(*inputs, scale)
    expected = dense(row, *exact, scale or exact[0].shape[-1] ** -0.5)
    assert actual.shape == expected.shape and actual.dtype == inputs[2].dtype
    weights = torch.randn(expected.shape, dtype=torch.float64).to(device)
    return [
        (a.detach().double(), e.detach())
        for a, e in zip(
            (actual, *torch.autograd.grad((weights * actual).sum(), inputs)),
            (expected, *torch.autograd.grad((weights * expected).sum(), exact)),
            strict=True,
        )
    ]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("shared", [1, 2, 7])
@pytest.mark.parametrize("groups", ROWS.values(), ids=ROWS)
def test_equals_attention_under_the_mask(groups, shared, width, device):
    torch.manual_seed(shared)
    row, dtype = packed_row(groups), torch.bfloat16 if device.type == "cuda" else torch.float64
    inputs = [
        torch.randn(1, heads, len(row.input_ids), width).to(device, dtype).requires_grad_()
        for heads in (2 * shared, 2, 2)
    ]
    for actual, expected in both(row, inputs, 0.3 if shared == 2 else None, device):
        if dtype == torch.float64:
            assert (actual - expected).abs().max() <= 1e-12 * max(1, expected.abs().max())
        else:  # bf16 keeps 8 bits: 0.4 % of each value, which sums average out
            assert (actual - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_cpu_in_other_precisions(dtype, tolerance):
    torch.manual_seed(0)
    row = packed_row(ROWS["longer than a block"])
    inputs = [
        torch.randn(1, heads, len(row.input_ids), 16).to(dtype).requires_grad_()
        for heads in (6, 2, 2)
    ]
    for actual, expected in both(row, inputs, None, torch.device("cpu")):
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_takes_what_sdpa_takes():
    """Values of another width than the keys (DeepSeek's), heads that do not lie densely, mixed dtypes."""
    torch.manual_seed(0)
    row = packed_row([(7, [2, 3])])
    inputs = [torch.randn(1, 2, width, 12).transpose(2, 3).requires_grad_() for width in (8, 8, 6)]
    inputs[0] = inputs[0].detach().double().requires_grad_()
    for actual, expected in both(row, inputs, None, torch.device("cpu")):
        assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.skipif(not on_gpu(), reason="needs a GPU with flash attention: make test-gpu")
def test_gpu_takes_half_precision_only():
    row = packed_row(ROWS["one group"])
    plan = attention.SharedPrefix(row.prompt_lengths, row.response_lengths, torch.device("cuda"))
    for dtype, taken in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        q, k, v = (torch.randn(1, h, 88, 64, device="cuda", dtype=dtype) for h in (4, 2, 2))
        assert plan.takes(q, k, v) == taken
