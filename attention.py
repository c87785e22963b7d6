"""Attention over a row of prompts and responses, each prompt read once, without a mask.

    SharedPrefix    a row [prompt | r_1 | ... | r_R] or several of them, one after the other: a
                    response sees its prompt and itself

Two calls of a flash kernel for a whole row, whatever it holds:

    1  every prompt and every response attends to itself, causally
    2  all responses of a group attend to their prompt, which they see whole

With l_1 and l_2 the logsumexp of a response token's scores in either call,

    l = log(e^l_1 + e^l_2)      out = e^(l_1 - l) out_1 + e^(l_2 - l) out_2

A flash kernel's backward pass makes weights and gradients of scores from l and out alone,

    w = e^(score - l)           dscore = w (grad . value - grad . out)

so that either call, given l and out of the whole, yields its share of the whole gradient.

Dimension key: G groups in the row, L tokens of the row, H heads, n heads that share a key, D head
width, N tokens that ask, M tokens that are seen. Copy this file on its own: it needs torch.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad


class SharedPrefix:
    """How a packed row attends; made once per row, called by every layer.

    prompt_lengths    (G,) tokens, each >= 1
    response_lengths  per group, tokens, each >= 0
    device            of queries, keys and values; its type must be a key of KERNELS
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        response_lengths: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        pieces, prompts, responses, stop = [], [], [], 0
        for P, lengths in zip(prompt_lengths, response_lengths, strict=True):
            lengths = [n for n in lengths if n > 0]
            start, stop = stop + P, stop + P + sum(lengths)
            if len(lengths) > 1:
                pieces += [P, *lengths]
                prompts.append(torch.arange(start - P, start))
                responses.append(torch.arange(start, stop))
            else:  # an ordinary causal sequence
                pieces.append(stop - start + P)
        self.kernel = KERNELS[device.type]
        self.pieces = _Sequences(pieces, device)
        self.responses, self.prompts = None, None  # positions in the row, where call 2 is needed
        if prompts:
            self.asking = _Sequences(map(len, responses), device)
            self.seen = _Sequences(map(len, prompts), device)
            self.responses, self.prompts = (torch.cat(x).to(device) for x in (responses, prompts))

    def takes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the device's kernel takes these; flash on a GPU wants bf16 or fp16, and Ampere."""
        return self.kernel.takes(query, key, value)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of the whole row, (1, L, H, D of the values).

        query       (1, H, L, D)
        key, value  (1, H / n, L, D); the values' D may differ
        scale       of the scores; None: D^-0.5

        The kernels want one dtype, one head width that 8 divides, and dense heads.
        """
        width, D = max(query.shape[-1], value.shape[-1]), value.shape[-1]
        width += -width % 8
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        q, k, v = (_widened(x, width).contiguous() for x in (q, k, v))
        return _Merged.apply(self, scale or query.shape[-1] ** -0.5, q, k, v)[None, ..., :D]


class _Merged(torch.autograd.Function):
    """The two calls and their merger; q (L, H, D), k and v (L, H / n, D) -> (L, H, D)."""

    @staticmethod
    def forward(ctx, plan: SharedPrefix, scale: float, q, k, v):
        forward, rows, keys = plan.kernel.forward, plan.responses, plan.prompts
        out, l = forward(q, k, v, plan.pieces, plan.pieces, True, scale)
        if rows is not None:
            out_2, l_2 = forward(q[rows], k[keys], v[keys], plan.asking, plan.seen, False, scale)
            out_1, l_1 = out[rows], l[:, rows]
            share = (l_2 - l_1).sigmoid().T[..., None]  # e^(l_2 - l), in float32 or float64
            merged = torch.lerp(out_1.to(share.dtype), out_2.to(share.dtype), share)
            out.index_copy_(0, rows, merged.to(out.dtype))
            l.index_copy_(1, rows, torch.logaddexp(l_1, l_2))
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(q, k, v, out, l)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, l = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, grad.contiguous()
        backward, rows, keys = plan.kernel.backward, plan.responses, plan.prompts
        gradients = backward(grad, q, k, v, out, l, plan.pieces, plan.pieces, True, scale)
        if rows is not None:
            own = grad[rows], q[rows], k[keys], v[keys], out[rows], l[:, rows].contiguous()
            shares = backward(*own, plan.asking, plan.seen, False, scale)
            for whole, at, share in zip(gradients, (rows, keys, keys), shares, strict=True):
                whole.index_copy_(0, at, whole[at] + share)  # each position once: no index_add
        return None, None, *gradients


class _Sequences:
    """Sequences that lie one after the other: their lengths, where they end, the longest."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        # where no sequence has two tokens, the kernel on GPUs orders its logsumexp another way
        self.longest = max(2, *self.lengths)


# A kernel attends within several sequences at once: query i of sequence s to the keys of sequence s.
#     takes(query, key, value)
#     forward(q (N, H, D), k (M, H / n, D), v, asking, seen, causal, scale) -> out, logsumexp (H, N)
#     backward(grad, q, k, v, out, logsumexp, asking, seen, causal, scale) -> dq, dk, dv
# `asking` and `seen` are the sequences of queries and of keys; causal: they are the same ones.


class _OnGpu:
    """Flash attention for sequences of any lengths: one launch, keys of n heads read once."""

    @staticmethod
    def takes(query, key, value):
        from torch.backends.cuda import SDPAParams, can_use_flash_attention

        shared = query.shape[1] > key.shape[1]
        return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, shared))

    @staticmethod
    def forward(q, k, v, asking, seen, causal, scale):
        out, logsumexp, *_ = _flash(
            q, k, v, asking.ends, seen.ends, asking.longest, seen.longest, 0.0, causal, False,
            scale=scale,
        )  # fmt: skip
        return out, logsumexp

    @staticmethod
    def backward(grad, q, k, v, out, logsumexp, asking, seen, causal, scale):
        random = q.new_empty(0)  # the state of dropout, of which there is none
        return _flash_backward(
            grad, q, k, v, out, logsumexp, asking.ends, seen.ends, asking.longest, seen.longest,
            0.0, causal, random, random, scale=scale,
        )  # fmt: skip


class _OnCpu:
    """Flash attention for CPUs, sequence by sequence.

    It takes as many heads of keys as of queries. Without a mask the n heads that share keys become
    n times the rows; with one, the keys are repeated.
    """

    @staticmethod
    def takes(query, key, value):
        return True

    @staticmethod
    def forward(q, k, v, asking, seen, causal, scale):
        n = q.shape[1] // k.shape[1]
        k, v, n = (_repeat(k, n), _repeat(v, n), 1) if causal else (k, v, n)
        parts = zip(*(x.split(s.lengths) for x, s in ((q, asking), (k, seen), (v, seen))))
        parts = [
            _flash_cpu(_rows(q, n), _rows(k), _rows(v), 0.0, causal, scale=scale)
            for q, k, v in parts
        ]
        out = torch.cat([_heads(out, n) for out, _ in parts])
        return out, torch.cat([l[0].unflatten(1, (n, -1)).flatten(0, 1) for _, l in parts], 1)

    @staticmethod
    def backward(grad, q, k, v, out, logsumexp, asking, seen, causal, scale):
        n, shared = q.shape[1] // k.shape[1], k.shape[1]
        k, v, n = (_repeat(k, n), _repeat(v, n), 1) if causal else (k, v, n)
        queries = zip(*(x.split(asking.lengths) for x in (grad, q, out, logsumexp.T[..., None])))
        keys = zip(*(x.split(seen.lengths) for x in (k, v)))
        parts = []
        for asks, sees in zip(queries, keys, strict=True):
            grad_i, q_i, out_i, l_i = (_rows(x, n) for x in asks)
            dq, dk, dv = _flash_cpu_backward(
                grad_i, q_i, *map(_rows, sees), out_i, l_i[..., 0], 0.0, causal, scale=scale
            )
            dk, dv = (_heads(x) for x in (dk, dv))
            if dk.shape[1] > shared:
                dk, dv = (x.unflatten(1, (shared, -1)).sum(2) for x in (dk, dv))
            parts.append((_heads(dq, n), dk, dv))
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))


_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
KERNELS = {"cpu": _OnCpu, "cuda": _OnGpu}  # by type of device


def _widened(x: Tensor, width: int) -> Tensor:
    """Zeros to the right, up to this width; `pad` copies even where there is nothing to add."""
    return pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _repeat(x: Tensor, n: int) -> Tensor:
    """(M, H / n, D) -> (M, H, D)."""
    return x.repeat_interleave(n, 1) if n > 1 else x


def _rows(x: Tensor, n: int = 1) -> Tensor:
    """(N, H, D) -> (1, H / n, n N, D): the n heads that share keys become n times the rows."""
    return x.unflatten(1, (-1, n)).permute(1, 2, 0, 3).flatten(1, 2)[None]


def _heads(x: Tensor, n: int = 1) -> Tensor:
    """The inverse of `_rows`."""
    return x[0].unflatten(1, (n, -1)).permute(2, 0, 1, 3).flatten(1, 2)
