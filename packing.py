"""One prompt, many responses, read once: log-probs and entropies of a group.

    pack            row [prompt | r_1 | ... | r_R]; positions restart after the prompt in every r_k
    attention_mask  a response sees the prompt and itself; joined groups do not see each other
    response_logps  z_t    = logits_t / temperature
                    logp_t = z_t[y_t] - logsumexp(z_t)
                    H_t    = logsumexp(z_t) - sum_v softmax(z_t)_v (z_t)_v

In tool use the prompt is long and its responses are short, so the forward and backward pass reads
the prompt once instead of R times. `padded_logps` is the same computation without the trick, and
`attention_mask` says what the fast attention means: two executable specifications, against which
the tests hold `response_logps` in values and gradients.

Two substitutions inside one ordinary call `model(...)` of an unmodified transformers model, so
that everything around that call (FSDP2 gathering, mixed precision, LoRA, gradient checkpointing)
does its work:
    attention  `shared_prefix_attention`, registered through AttentionInterface, piece by piece
    LM head    returns (logp_t, H_t) instead of logits, in chunks that the backward pass computes
               again: of the N x V logits only `chunk_size` x V exist, forward or backward

Dimension key: G groups in the row, P tokens of a prompt, R responses of the whole row, T tokens of
the longest response, N tokens of all responses, L tokens of the row, H heads, D head width, V
vocabulary. Copy this file on its own: it needs torch, and transformers for the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

ATTENTION = "shared_prefix"  # our name in transformers' AttentionInterface


@dataclass(frozen=True)
class Packed:
    """A row of one or more groups; made by `pack` and `join`."""

    input_ids: Tensor  # (L,) long
    position_ids: Tensor  # (L,) long, as if each response followed its prompt alone
    prompt_lengths: tuple[int, ...]  # (G,) tokens, each >= 1
    response_lengths: tuple[tuple[int, ...], ...]  # per group, tokens, each >= 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each of the R responses, over all groups in order."""
        return tuple(chain.from_iterable(self.response_lengths))

    @property
    def response_mask(self) -> Tensor:
        """(R, T) bool, True on response tokens; from lengths, never from token values."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        return torch.arange(max(self.lengths, default=0)) < lengths[:, None]


def pack(prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> Packed:
    """One row [prompt | r_1 | ... | r_R] of a prompt and its responses.

    prompt_ids  P token ids, P >= 1: its last token predicts the first token of every response
    responses   R lists of token ids, of any length, 0 included
    """
    assert len(prompt_ids) > 0, "an empty prompt predicts nothing: give at least one token"
    P, lengths = len(prompt_ids), tuple(len(response) for response in responses)
    ids = [torch.as_tensor(part, dtype=torch.long) for part in (prompt_ids, *responses)]
    positions = [torch.arange(P), *(P + torch.arange(length) for length in lengths)]
    return Packed(torch.cat(ids), torch.cat(positions), (P,), (lengths,))


def join(rows: Sequence[Packed]) -> Packed:
    """Several groups in one row, without attention between them; R counts over all, in order."""
    assert len(rows) > 0, "nothing to join"
    return Packed(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.position_ids for row in rows]),
        tuple(chain.from_iterable(row.prompt_lengths for row in rows)),
        tuple(chain.from_iterable(row.response_lengths for row in rows)),
    )


def attention_mask(packed: Packed) -> Tensor:
    """Which token (row) sees which (column), (L, L) bool: what `shared_prefix_attention` means."""
    mask = torch.zeros(2 * packed.input_ids.shape, dtype=torch.bool)
    for prompt, responses in _spans(packed):
        mask[prompt, prompt] = True
        for response in responses:
            mask[response, prompt] = True
            mask[response, response] = True
    return mask.tril()


def response_logps(
    model: nn.Module, packed: Packed, *, temperature: float = 1.0, chunk_size: int = 512
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens, each (R, T) fp32, 0 on padding.

    model        transformers causal LM, plain, LoRA-wrapped or sharded (model.shard); its attention
                 becomes `shared_prefix_attention`, which is sdpa for every other call
    packed       the row. Without any response token the results are empty, yet part of the graph:
                 a rank without work joins the others' collectives by `logps.sum().backward()`
    temperature  of the sampler, > 0: logits are divided by it
    chunk_size   response tokens whose logits exist together

    ValueError where a layer does not attend through AttentionInterface or has a sliding window
    shorter than the row (--no_share_prefix helps), and where the model transforms its logits.
    """
    _use_shared_prefix(model)
    device = next(model.parameters()).device
    plan = _Plan(packed, device)
    predictors, rows = (torch.tensor(x, dtype=torch.long) for x in _response_rows(packed))
    targets = packed.input_ids[rows].to(device)
    placeholder = torch.zeros(1, 1, 1, 1, device=device)  # 4D, so that no L x L mask is built
    with _scoring_head(model, targets, temperature, chunk_size):
        scores = model(
            input_ids=packed.input_ids.to(device)[None],
            position_ids=packed.position_ids.to(device)[None],
            attention_mask=placeholder,
            use_cache=False,
            logits_to_keep=predictors.to(device),
            shared_prefix=plan,
        ).logits
    layers = model.config.num_hidden_layers
    if plan.calls != layers:
        raise ValueError(
            f"{type(model).__name__}: {plan.calls} of {layers} layers attend "
            "through transformers' AttentionInterface: train this model with --no_share_prefix"
        )
    mask = packed.response_mask.to(device)
    blank = scores.new_zeros(mask.shape)
    logps, entropy = (blank.masked_scatter(mask, values) for values in scores.unbind(-1))
    return logps, entropy


def padded_logps(
    model: nn.Module,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """What `response_logps` returns for one group, from R right-padded rows (--no_share_prefix).

    Arguments as in `pack` and `response_logps`. No mask is needed: padding is on the right, where
    a causal model does not look.
    """
    assert len(prompt_ids) > 0, "an empty prompt predicts nothing: give at least one token"
    packed, P = pack(prompt_ids, responses), len(prompt_ids)
    device = next(model.parameters()).device
    mask = packed.response_mask.to(device)
    (R, T) = mask.shape
    targets = mask.long().masked_scatter(mask, packed.input_ids[P:].to(device))
    prompts = packed.input_ids[:P].to(device).expand(R, P)
    with _scoring_head(model, targets.flatten(), temperature, chunk_size):
        scores = model(
            input_ids=torch.cat([prompts, targets], dim=1),
            use_cache=False,
            logits_to_keep=torch.arange(P - 1, P - 1 + T, device=device),
        ).logits
    logps, entropy = (values.view(R, T).masked_fill(~mask, 0.0) for values in scores.unbind(-1))
    return logps, entropy


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix: "_Plan | None" = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention piece by piece of a packed row, (1, L, H, D), with the face of AttentionInterface.

    query          (1, H, L, D)
    key, value     (1, H / n, L, D): n heads share each (grouped-query attention)
    shared_prefix  what attends to what; None: an ordinary call, answered by transformers' sdpa
    """
    if shared_prefix is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    window, longest = kwargs.get("sliding_window"), shared_prefix.longest
    if window is not None and window < longest:
        raise ValueError(f"sliding window {window} < {longest} tokens: use --no_share_prefix")
    for name in ("softcap", "s_aux"):  # of Gemma 2's scores; gpt-oss's sinks
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}: use --no_share_prefix")
    shared_prefix.calls += 1
    sizes = [size for size, _, _ in shared_prefix.pieces]
    q, k, v = (x.split(sizes, 2) for x in (query, key, value))
    out = [
        attend(q[i], k[i], v[i], k[prompt], v[prompt], scaling)
        for i, (_, prompt, attend) in enumerate(shared_prefix.pieces)
    ]
    return torch.cat(out, 2).transpose(1, 2), None


class _Plan:
    """How `shared_prefix_attention` walks a row; made once per forward pass, read by every layer.

    pieces   what the row is cut into: (tokens, number of the piece that is its prompt, how it
             attends). A prompt attends `_causal`, the responses of a prompt `_merged` on a CPU, in
             `_masked` blocks elsewhere
    longest  tokens of the longest prompt + response
    calls    layers that came by: forward passes and recomputations
    """

    def __init__(self, packed: Packed, device: torch.device) -> None:
        self.calls, self.pieces = 0, []
        self.longest = int(packed.position_ids.max()) + 1
        for prompt, responses in _spans(packed):
            responses = [response for response in responses if response.stop > response.start]
            if len(responses) == 1:  # an ordinary causal sequence
                prompt, responses = slice(prompt.start, responses[0].stop), []
            cuts = [(prompt, _causal)]
            if responses and device.type in _MERGING:
                lengths = [response.stop - response.start for response in responses]
                cuts.append((slice(prompt.stop, responses[-1].stop), partial(_merged, lengths)))
            elif responses:
                for block in _blocks(responses, (prompt.stop - prompt.start) // 4):
                    attend = partial(_masked, _block_mask(prompt, block, device))
                    cuts.append((slice(block[0].start, block[-1].stop), attend))
            first = len(self.pieces)
            self.pieces += [(cut.stop - cut.start, first, attend) for cut, attend in cuts]


def _causal(q, k, v, prompt_k, prompt_v, scale):
    """A piece that attends to itself."""
    return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1])


def _masked(mask, q, k, v, prompt_k, prompt_v, scale):
    """A block of neighbouring responses: keys [prompt | block], (tokens, keys) bool mask.

    A block is one response, or several of together a quarter of the prompt at most: few calls,
    hardly a key too many, and no L x L mask. The n heads that share keys become n times the rows,
    so that no kernel repeats the keys.
    """
    n = q.shape[1] // k.shape[1]
    keys, values = torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)
    return _heads(sdpa(_rows(q, n), keys, values, mask.repeat(n, 1), scale=scale), n)


def _merged(lengths, q, k, v, prompt_k, prompt_v, scale):
    """All responses of a prompt: each token to the prompt, and to its own response; then merged.

    The kernel behind sdpa, called alone, wants one dtype, one head width and dense heads.
    """
    width, D = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    same = [
        (x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))).to(v.dtype).contiguous()
        for x in (q, k, v, prompt_k, prompt_v)
    ]
    return _Merged.apply(lengths, scale or q.shape[-1] ** -0.5, *same)[..., :D]


_MERGING = {"cpu"}  # devices whose kernel _Merged calls
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Merged(torch.autograd.Function):
    """Attention over two sets of keys, without a mask.

    With l_p and l_o the logsumexp of a token's scores on the prompt and on its own response,

        l = log(e^l_p + e^l_o)      out = e^(l_p - l) out_p + e^(l_o - l) out_o

    The kernel's backward pass makes weights and gradients of scores from l and out,

        w = e^(score - l)           dscore = w (grad . value - grad . out)

    so that either set of keys, given those of the whole, has its share of the whole's gradient.
    """

    @staticmethod
    def forward(ctx, lengths, scale, q, k, v, prompt_k, prompt_v):
        n = q.shape[1] // k.shape[1]
        to_prompt = _flash(_rows(q, n), prompt_k, prompt_v, 0.0, False, scale=scale)
        own = (q, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1))
        to_own = [_flash(*qkv, 0.0, True, scale=scale) for qkv in _cut(own, lengths)]
        out_p, l_p = (_heads(x, n) for x in to_prompt)
        out_o, l_o = (torch.cat(x, 2) for x in zip(*to_own, strict=True))
        share = (l_p - l_o).sigmoid()[..., None]  # e^(l_p - l), in float32 or float64
        out = torch.lerp(out_o.to(share.dtype), out_p.to(share.dtype), share).to(q.dtype)
        ctx.save_for_backward(q, k, v, prompt_k, prompt_v, out, torch.logaddexp(l_p, l_o))
        ctx.lengths, ctx.scale, ctx.n = lengths, scale, n
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, prompt_k, prompt_v, out, l = ctx.saved_tensors
        n, scale = ctx.n, ctx.scale  # below: no dropout, and causal or not
        grad_p, q_p, out_p, l_p = (_rows(x, n) for x in (grad, q, out, l))
        dq_p, *d_prompt = _flash_backward(
            grad_p, q_p, prompt_k, prompt_v, out_p, l_p, 0.0, False, scale=scale
        )
        own = (grad, q, k.repeat_interleave(n, 1), v.repeat_interleave(n, 1), out, l)
        d_own = [_flash_backward(*x, 0.0, True, scale=scale) for x in _cut(own, ctx.lengths)]
        dq, dk, dv = (torch.cat(x, 2) for x in zip(*d_own, strict=True))
        dk, dv = (x.unflatten(1, (-1, n)).sum(2) for x in (dk, dv))
        return None, None, dq + _heads(dq_p, n), dk, dv, *d_prompt


def _rows(x: Tensor, n: int) -> Tensor:
    """(1, H, N, ...) -> (1, H / n, n N, ...): the n heads that share keys become n times the rows."""
    return x.unflatten(1, (-1, n)).flatten(2, 3)


def _heads(x: Tensor, n: int) -> Tensor:
    """The inverse of `_rows`."""
    return x.unflatten(2, (n, -1)).flatten(1, 2)


def _cut(tensors: Sequence[Tensor], lengths: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' pieces of these lengths along the tokens, piece by piece."""
    return zip(*(x.split(lengths, 2) for x in tensors), strict=True)


def _spans(packed: Packed) -> Iterator[tuple[slice, list[slice]]]:
    """Where each group's prompt and responses lie in the row."""
    stop = 0
    for P, lengths in zip(packed.prompt_lengths, packed.response_lengths, strict=True):
        ends = list(accumulate(lengths, initial=stop + P))
        yield slice(stop, ends[0]), [slice(a, b) for a, b in pairwise(ends)]
        stop = ends[-1]


def _blocks(responses: list[slice], size: int) -> list[list[slice]]:
    """Neighbouring responses of at most `size` tokens together, at least one to a block."""
    blocks = []
    for response in responses:
        if blocks and response.stop - blocks[-1][0].start <= size:
            blocks[-1].append(response)
        else:
            blocks.append([response])
    return blocks


def _block_mask(prompt: slice, block: list[slice], device: torch.device) -> Tensor:
    """The prompt, and a causal triangle per response: (block tokens, P + block tokens) bool."""
    lengths = torch.tensor([response.stop - response.start for response in block], device=device)
    owner = torch.arange(len(block), device=device).repeat_interleave(lengths)
    own = (owner[:, None] == owner).tril()
    return torch.cat([own.new_ones(len(owner), prompt.stop - prompt.start), own], 1)


def _response_rows(packed: Packed) -> tuple[list[int], list[int]]:
    """For each of the N response tokens, the position of the row that predicts it, and its own.

    The last prompt position predicts the first token of every response of its group.
    """
    predictors, rows = [], []
    for prompt, responses in _spans(packed):
        for response in responses:
            own = range(response.start, response.stop)
            predictors += [prompt.stop - 1, *own][: len(own)]
            rows += own
    return predictors, rows


@contextmanager
def _scoring_head(
    model: nn.Module, targets: Tensor, temperature: float, chunk_size: int
) -> Iterator[None]:
    """Within, the LM head returns (log-prob, entropy) of `targets` (N,), (N, 2), and no logits.

    The model's own forward stays the only entry: its FSDP2 hooks gather lm_head.weight, here and
    for the backward pass. A separate call of `model.lm_head` would bypass them.
    """
    assert temperature > 0, f"temperature {temperature}: log-probs need a positive one"
    assert chunk_size > 0, f"chunk_size {chunk_size}"
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):  # after the LM head
        if getattr(model.config, name, None) not in (None, 1.0):
            raise ValueError(
                f"{type(model).__name__} transforms its logits ({name}): choose another model"
            )
    head = model.get_output_embeddings()
    scored = partial(_token_scores, head.forward, temperature)
    again = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random in there

    def score(hidden: Tensor) -> Tensor:
        chunks = hidden.flatten(0, -2).split(chunk_size), targets.split(chunk_size)
        scores = [checkpoint(scored, h, y, **again) for h, y in zip(*chunks, strict=True)]
        return torch.cat(scores)  # no view: FSDP2 hangs its backward hook on this tensor

    head.forward = score
    try:
        yield
    finally:
        del head.forward  # the instance's; the class's shows again


def _token_scores(
    project: Callable[[Tensor], Tensor], temperature: float, hidden: Tensor, targets: Tensor
) -> Tensor:
    """(log-prob, entropy) of each target, (n, 2) fp32, from hidden states (n, width)."""
    z = project(hidden).float() / temperature
    logsumexp = z.logsumexp(-1)
    logps = z.gather(-1, targets[:, None])[:, 0] - logsumexp
    entropy = logsumexp - (z.softmax(-1) * z).sum(-1)
    return torch.stack([logps, entropy], -1)


def _use_shared_prefix(model: nn.Module) -> None:
    """Makes `shared_prefix_attention` the model's attention, to stay: backward passes recompute."""
    if model.config._attn_implementation == ATTENTION:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    # not compiled, even inside compiled layers: lengths differ from row to row
    AttentionInterface.register(ATTENTION, torch.compiler.disable(shared_prefix_attention))
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for ordinary calls
    model.set_attn_implementation(ATTENTION)
