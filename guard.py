"""What stops a run whose numbers would be wrong. Two checks before the first step, of what no list
of models can promise; all ranks take part:

check_logps(run)    the log-probs that training reads, of two groups joined in a row (or padded),
                    are those of an ordinary call of the model with each sequence alone
canary(run)         the engine follows the trainer's weights: it gets perturbed ones first, then,
                    within the context, the right ones, and its log-probs must move by as much as
                    the trainer's do

Both read a few hundred tokens of the training data, draw no random number, and leave weights,
optimiser and the engine's cache as they were, to the bit. Two at every step:

check_sample        the engine decodes a response as the trainer's tokenizer does
check_engine        the engine's log-probs of its own tokens are the trainer's

Each raises ValueError with the remedy.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import packing
import rollout
from run import Run, all_max, sync

PROMPT, RESPONSE = 96, 16  # tokens, at most, of what is read here
LIMITS = 1e-4, 0.05  # nats on average, of log-probs in float32 and in bfloat16
SHARES = 0.01, 0.5  # of the trainer's move that the engine's may miss, in float32 and otherwise
BIT = 3  # the perturbation flips the bit of the mantissa of weight 2^-3: 6 to 12 % of each weight


def check_logps(run: Run) -> None:
    """Compare log-probs as training computes them with the model's own logits of each sequence."""
    first, last = (run.demonstration(run.examples[i]) for i in (0, -1))
    responses = [first.target[: 2 * RESPONSE], last.target[:RESPONSE]]
    prompts = [first.prompt[-PROMPT:], last.prompt[-PROMPT // 2 :]]
    model, own = run.model, run.model.config._attn_implementation
    plain = torch.cat(
        [
            _plain(model, [*prompt, *response])[len(prompt) - 1 :].gather(
                1, torch.tensor(response, device=_device(model))[:, None]
            )[:, 0]
            for prompt in prompts
            for response in responses
        ]
    )

    def difference(share_prefix: bool) -> float:
        if share_prefix:
            row = packing.join([packing.pack(prompt, responses) for prompt in prompts])
            parts = [packing.response_logps(model, row)[0]]
        else:
            parts = [packing.padded_logps(model, prompt, responses)[0] for prompt in prompts]
        lengths = [*map(len, responses)] * len(prompts)
        rows = [row[:n] for row, n in zip((row for part in parts for row in part), lengths)]
        apart = float((torch.cat(rows) - plain).abs().mean())
        return all_max(apart if math.isfinite(apart) else math.inf)

    share, limit = run.config.share_prefix, LIMITS[_in_bf16(run.config)]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = difference(share)
        if found <= limit:
            return
        remedy = "choose another model"
        if share:
            model.set_attn_implementation(own)
            if difference(False) <= limit:
                remedy = "train it with --no_share_prefix, or choose another model"
    way = "in a row of several responses" if share else "in padded rows"
    raise ValueError(
        f"{run.config.model_name_or_path}: log-probs {way} differ by {found:.2g} nats on average "
        f"(limit {limit}) from those of each response alone: {remedy}"
    )


@contextmanager
def canary(run: Run) -> Iterator[None]:
    """Send perturbed weights to the engine before, and check after, that it follows the trainer.

    Within, the caller sends the right weights.
    """
    one = run.demonstration(run.examples[0])
    prompt, target = one.prompt[-PROMPT:], one.target[:RESPONSE]
    prefixes = [[*prompt, *target[:t]] for t in range(len(target))]
    ids = sorted({*target})

    def trainers() -> Tensor:
        return _plain(run.model, prefixes[-1])[len(prompt) - 1 :, ids].cpu()

    def engines() -> Tensor:
        return torch.tensor(run.engine.next_probs(prefixes, ids)).clamp(min=1e-30).log()

    with _perturbed(run.model):
        trainer = trainers()
        sync(run)
    engine = engines()
    run.engine.sleep()
    moved = trainer - trainers()
    yield
    missed = all_max(float((engine - engines() - moved).abs().mean() / moved.abs().mean()))
    inexact = _in_bf16(run.config) or run.config.quant != "none"
    if not missed <= SHARES[inexact]:
        raise ValueError(
            f"--engine {run.config.engine} does not follow the trainer's weights: when all of them "
            f"change a little, its log-probs miss {missed:.0%} of the change (limit "
            f"{SHARES[inexact]:.0%}), so that it would sample from an old model. Use another "
            "--engine or another model"
        )


def check_sample(tokenizer, stop_ids: list[int], sample: rollout.Sample) -> None:
    """Stop the run if the engine decodes tokens differently or returns invalid log-probs."""
    ids, stopped = sample.token_ids, sample.finish_reason == "stop"
    text = rollout.text_of(tokenizer, ids, sample.finish_reason)
    if text != sample.text or (stopped and ids[-1] not in stop_ids):
        raise ValueError(
            f"the engine decodes its tokens {ids[-20:]} as {sample.text[-60:]!r} "
            f"({sample.finish_reason}), the trainer's tokenizer as {text[-60:]!r}: give both the "
            "same tokenizer files"
        )
    invalid = [logp for logp in sample.logps if not logp <= 1e-3]  # NaN too; rounding may pass 0
    if invalid:
        raise ValueError(
            f"the engine returned invalid log-probs: {invalid[:5]}; compare with --engine "
            "transformers"
        )


def check_engine(config, difference: float, step: int) -> None:
    """Stop the run if engine and trainer disagree about the same tokens: their models differ.

    difference  mean |trainer - engine| over the sampled tokens, nats

    In float32 they agree to 1e-6, and the limit is 1e-3; bf16 and 4-bit need 0.1.
    """
    exact = config.quant == "none" and not _in_bf16(config)
    limit = config.max_logp_difference or (1e-3 if exact else 0.1)
    if not difference <= limit:  # NaN, too
        raise ValueError(
            f"step {step}: the engine's log-probs of its own tokens differ from the trainer's by "
            f"{difference:.3f} nats on average (limit {limit}): it has other weights, another "
            "tokenizer or other sampling settings. Check the weight sync, or compare with "
            "--engine transformers"
        )


def _in_bf16(config) -> bool:
    """Whether products are in bfloat16."""
    return config.bf16 or torch.cuda.is_available()


@contextmanager
def _perturbed(model: nn.Module) -> Iterator[None]:
    """Within, every weight differs by a few per cent; after it, all are what they were, to the bit.

    Flipping a bit of the mantissa needs no copy and no random numbers, and undoes itself. It moves
    no zero: adapters' B matrices, which start there, are added to instead.
    """
    kept = {}
    _flip(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                kept[name] = _local(parameter).clone()
                _local(parameter).add_(0.02)
    try:
        yield
    finally:
        _reshard(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    _local(parameter).copy_(kept[name])
        _flip(model)


@torch.no_grad()
def _flip(model: nn.Module) -> None:
    _reshard(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ".lora_B." not in name:  # NF4 is bytes
            weight = _local(parameter)
            mantissa = round(-math.log2(torch.finfo(weight.dtype).eps))
            integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
            weight.view(integer).bitwise_xor_(1 << (mantissa - BIT))


def _reshard(model: nn.Module) -> None:
    """Drop the gathered copies, so that `parameters` are the stored ones and are gathered anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(parameter: Tensor) -> Tensor:
    """What this rank stores of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def _plain(model: nn.Module, ids: list[int]) -> Tensor:
    """Log-probs (L, V) of what follows each token: an ordinary call, as its authors meant it.

    In training mode: dropout that is still on shows as a difference, and bitsandbytes packs the
    weights of a model in evaluation mode anew.
    """
    with torch.compiler.set_stance("force_eager"):
        logits = model(torch.tensor([ids], device=_device(model)), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
