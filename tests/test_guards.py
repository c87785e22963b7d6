"""guard.py: each check fires on the fault that it is there for, and is silent on a good model."""

import random

import frozen
import pytest
import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

import guard
import model as modeling
import packing
import rollout
import train
from run import Run, init_distributed, sync


@pytest.fixture(scope="module", autouse=True)
def group():
    if not torch.distributed.is_initialized():
        init_distributed()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return frozen.tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(tiny, tmp_path):
    def make(*flags):
        run = Run(*train.parse_args(frozen.flags(tiny, tmp_path, *flags)))
        run.load()
        return run

    return make


VARIANTS = [
    "--algo grpo",
    "--algo sft --no_share_prefix",
    "--algo grpo --gradient_checkpointing",
    "--algo toolupt --lora_rank 4",
    "--algo sft --torch_compile",
    "--algo grpo --lora_rank 4 --quant 4bit",
]


def stored(run) -> dict:
    weights = run.model.state_dict()
    return {name: guard._local(tensor).clone() for name, tensor in weights.items()}


@pytest.mark.parametrize("flags", VARIANTS)
def test_a_good_model_passes_and_nothing_is_changed(run, flags):
    run = run(*flags.split())
    before, draws = stored(run), (torch.get_rng_state(), random.getstate())
    guard.check_logps(run)
    with guard.canary(run):
        sync(run)
    assert run.model.training and not run.optimizer.state
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert torch.equal(torch.get_rng_state(), draws[0]) and random.getstate() == draws[1]
    after = stored(run)
    assert [n for n, tensor in before.items() if not torch.equal(after[n], tensor)] == []
    sent = dict(modeling.full_tensors(run.model))
    for name, parameter in run.engine.model.named_parameters():
        assert torch.equal(parameter, sent[name]), name


def test_perturbed_weights_move_by_six_to_twelve_per_cent():
    layer = torch.nn.Linear(50, 50)
    weight = layer.weight.detach().clone()
    with guard._perturbed(layer):
        share = ((layer.weight - weight) / weight).abs()
        assert share.min() > 0.06 and share.max() < 0.126
    assert torch.equal(layer.weight, weight)


def leaking(plan, q, k, v, scale):
    """Causal attention over the whole row: groups and responses see each other."""
    shared = q.shape[1] > k.shape[1]
    return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=shared).transpose(1, 2)


def test_a_leak_between_groups_is_seen(run, monkeypatch):
    run = run("--algo", "sft")
    monkeypatch.setattr(packing._Plan, "attend", leaking)
    with pytest.raises(ValueError, match="in a row of several responses .*--no_share_prefix"):
        guard.check_logps(run)


def mixing(real):
    """What a state-space layer without resets does: each token carries some of the one before."""

    def forward(module, hidden, *args, **kwargs):
        return real(module, hidden + 0.1 * pad(hidden, (0, 0, 1, -1)), *args, **kwargs)

    return forward


def test_a_mixer_that_ignores_the_mask_is_seen(run, monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    run = run("--algo", "sft")
    monkeypatch.setattr(Qwen2MLP, "forward", mixing(Qwen2MLP.forward))
    with pytest.raises(ValueError, match="several responses .*: train it with --no_share_prefix"):
        guard.check_logps(run)


@pytest.mark.parametrize("way", ["--share_prefix", "--no_share_prefix"])
def test_a_scale_after_the_head_is_seen_on_both_paths(run, monkeypatch, way):
    run = run("--algo", "sft", *[way] * (way != "--share_prefix"))
    run.model.register_forward_hook(
        lambda model, args, out: (
            setattr(out, "logits", out.logits * 0.5) if len(out.logits.shape) == 3 else None
        )
    )
    with pytest.raises(ValueError, match="differ by .* choose another model") as caught:
        guard.check_logps(run)
    assert "no_share_prefix" not in str(caught.value)


def test_dropout_is_seen(run):
    run = run("--algo", "sft")
    drop = torch.nn.Dropout(0.1)
    run.model.model.norm.register_forward_hook(
        lambda module, args, out: drop.train(module.training)(out)
    )
    with pytest.raises(ValueError, match="choose another model"):
        guard.check_logps(run)


@pytest.mark.parametrize("stale", ["", "mlp.down_proj", "layers.1.input_layernorm"])
def test_an_engine_that_keeps_old_weights_is_seen(run, monkeypatch, stale):
    """All of them, or one kind of layer only."""
    real = rollout.TransformersEngine.load_weights

    def load_weights(engine, named):
        kept = dict(engine.model.named_parameters(remove_duplicate=False))
        real(engine, [(n, kept[n].clone() if stale in n else tensor) for n, tensor in named])

    monkeypatch.setattr(rollout.TransformersEngine, "load_weights", load_weights)
    run = run("--algo", "grpo")
    with (
        pytest.raises(ValueError, match="does not follow the trainer's weights"),
        guard.canary(run),
    ):
        sync(run)
