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
    attention  `shared_prefix_attention`, registered through AttentionInterface: the kernels of
               attention.py, where that file lies beside this one and they take the device and the
               dtype; else SDPA with the (L, L) mask
    LM head    returns (logp_t, H_t) instead of logits, in chunks that the backward pass computes
               again: of the N x V logits only `chunk_size` x V exist, forward or backward. A model
               that scales or caps its logits (Granite, Cohere, Gemma 2) does so in there

Dimension key: G groups in the row, P tokens of a prompt, R responses of the whole row, T tokens of
the longest response, N tokens of all responses, L tokens of the row, H heads, D head width, V
vocabulary. Copy this file on its own, or with attention.py, which makes it fast: it needs torch,
and transformers for the model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

try:
    import attention
except ImportError:  # copied without it: the mask
    attention = None

ATTENTION = "shared_prefix"  # our name in transformers' AttentionInterface
# What models do to their logits, and the values at which they do nothing: Granite divides by the
# first, Cohere and Falcon-H1 multiply, Gemma 2 takes cap * tanh(logits / cap).
CAP = "final_logit_softcapping"
NEUTRAL = {"logits_scaling": 1.0, "logit_scale": 1.0, "lm_head_multiplier": 1.0, CAP: None}


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
    shorter than the row (--no_share_prefix helps).
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
    layers = model.config.get_text_config().num_hidden_layers
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
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a packed row, (1, L, H, D), with the interface of AttentionInterface.

    query          (1, H, L, D)
    key, value     (1, H / n, L, D): n heads share each (grouped-query attention)
    shared_prefix  what attends to what; None: an ordinary call, answered by transformers' sdpa
    softcap        of the scores (Gemma 2), which no kernel here knows: they are written out
    """
    if shared_prefix is None and softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if shared_prefix is None:
        return capped_attention(query, key, value, attention_mask, scaling, softcap), None
    window, longest = kwargs.get("sliding_window"), shared_prefix.longest
    if window is not None and window < longest:
        raise ValueError(f"sliding window {window} < {longest} tokens: use --no_share_prefix")
    if kwargs.get("s_aux") is not None:  # gpt-oss's sinks
        raise ValueError(f"{type(module).__name__} attends with s_aux: use --no_share_prefix")
    shared_prefix.calls += 1
    if softcap is not None:
        mask = shared_prefix.mask
        return capped_attention(query, key, value, mask, scaling, softcap), None
    return shared_prefix.attend(query, key, value, scaling), None


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, cap: float
) -> Tensor:
    """softmax(cap tanh(q k / cap)) v, (B, L, H, D), from (B, H, L, D); mask True where q sees k.

    Without a mask it is causal. All scores exist at once, H x L x L.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = cap * (query @ key.mT * (scaling / cap)).tanh()
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    hidden = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~mask, hidden).softmax(-1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).transpose(1, 2)


class _Plan:
    """How `shared_prefix_attention` walks a row; made once per forward pass, read by every layer.

    longest  tokens of the longest prompt + response
    calls    layers that came by: forward passes and recomputations
    """

    def __init__(self, packed: Packed, device: torch.device) -> None:
        self.packed, self.device, self.calls, self.kernels = packed, device, 0, None
        self.longest = int(packed.position_ids.max()) + 1
        if attention and device.type in attention.KERNELS:
            self.kernels = attention.SharedPrefix(
                packed.prompt_lengths, packed.response_lengths, device
            )

    @cached_property
    def mask(self) -> Tensor:
        """(L, L) bool, for what the kernels do not take."""
        return attention_mask(self.packed).to(self.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """(1, L, H, D)."""
        if self.kernels and self.kernels.takes(q, k, v):
            return self.kernels(q, k, v, scale)
        shared = q.shape[1] > k.shape[1]
        return sdpa(q, k, v, self.mask, scale=scale, enable_gqa=shared).transpose(1, 2)


def _spans(packed: Packed) -> Iterator[tuple[slice, list[slice]]]:
    """Where each group's prompt and responses lie in the row."""
    stop = 0
    for P, lengths in zip(packed.prompt_lengths, packed.response_lengths, strict=True):
        ends = list(accumulate(lengths, initial=stop + P))
        yield slice(stop, ends[0]), [slice(a, b) for a, b in pairwise(ends)]
        stop = ends[-1]


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
    # cuDNN's attention plans every shape anew and keeps each plan (pytorch #190388), and its
    # gradients can be NaN (pytorch #196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    head, own = model.get_output_embeddings(), _own_settings(model)
    values, plain_head = {name: value for _, name, value in own}, head.forward
    temperature *= values.get("logits_scaling", 1.0)
    temperature /= values.get("logit_scale", 1.0) * values.get("lm_head_multiplier", 1.0)
    cap = values.get(CAP)

    def score_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = plain_head(hidden)
        logits = logits if cap is None else cap * (logits / cap).tanh()
        return _Scores.apply(logits, targets, temperature)

    again = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random in there

    def score(hidden: Tensor) -> Tensor:
        chunks = hidden.flatten(0, -2).split(chunk_size), targets.split(chunk_size)
        scores = [checkpoint(score_chunk, h, y, **again) for h, y in zip(*chunks, strict=True)]
        return torch.cat(scores)  # no view: FSDP2 hangs its backward hook on this tensor

    head.forward = score
    for owner, name, _ in own:
        setattr(owner, name, NEUTRAL[name])
    try:
        yield
    finally:
        del head.forward  # the instance's; the class's shows again
        for owner, name, value in own:
            setattr(owner, name, value)


def _own_settings(model: nn.Module) -> list[tuple[object, str, float]]:
    """(owner, name, value) of what the model does to its logits after the LM head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = [
        (owner, name, getattr(owner, name, None))
        for owner in (base, base.base_model, base.config.get_text_config())
        for name in NEUTRAL
    ]
    return [each for each in found if each[2] is not None]


class _Scores(torch.autograd.Function):
    """(log-prob, entropy) of targets (n,), (n, 2) fp32, from logits (n, V) of any dtype.

        dlogp/dz = onehot - p        dH/dz = -p (log p + H)

    Written out, because n x V is large: as few passes over it as there can be, one copy to keep.
    """

    @staticmethod
    def forward(ctx, logits, targets, temperature):
        z = logits.float() if temperature == 1 else logits.float() / temperature
        log_p = z.log_softmax(-1)
        p = log_p.exp()
        entropy = -p.mul_(log_p).sum(-1)
        ctx.save_for_backward(log_p, targets, entropy)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return torch.stack([log_p.gather(-1, targets[:, None])[:, 0], entropy], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        log_p, targets, entropy = ctx.saved_tensors
        g, h = (grad / ctx.temperature)[..., None].unbind(1)  # of log-prob and entropy, (n, 1)
        dz = torch.addcmul(-(g + h * entropy[:, None]), h, log_p, value=-1).mul_(log_p.exp())
        return dz.scatter_add_(1, targets[:, None], g).to(ctx.dtype), None, None


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
