"""guard.py: each check fires on the fault that it is there for, and is silent on a good model."""

import random
import shutil
from dataclasses import replace
from importlib.util import find_spec

import frozen
import pytest
import torch
from frozen import one_rank  # noqa: F401 - a fixture
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoConfig, AutoTokenizer

import data
import guard
import methods
import model as modeling
import packing
import rollout
import start
import train
from run import Run, sync
from tools import serving

needs_4bit = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
needs_bf16 = pytest.mark.skipif(bool(start.no_bf16()), reason=start.no_bf16())


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
    pytest.param("--algo grpo --lora_rank 4 --quant 4bit", marks=needs_4bit),
    pytest.param("--algo grpo --bf16", marks=needs_bf16),
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
        assert torch.equal(parameter, sent[name].to(parameter.dtype)), name


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


# ------------------------------------------------------------------------------- bfloat16 on a CPU


@needs_bf16
@pytest.mark.parametrize(
    "engine",
    ["transformers", pytest.param("vllm", marks=[frozen.needs_vllm, pytest.mark.long])],
)
def test_bf16_computes_in_bfloat16_and_keeps_float32(tiny, tmp_path, monkeypatch, engine):
    """Two steps: products and engine in bfloat16; weights, gradients and moments in float32."""
    seen, step = {"products": set(), "kept": set()}, Run.optimizer_step

    def note(run, *rest):
        for p in run.model.parameters():
            seen["kept"] |= {p.dtype, p.grad.dtype}
        skipped = step(run, *rest)
        moments = [t for state in run.optimizer.state.values() for t in state.values()]
        seen["kept"] |= {t.dtype for t in moments if t.numel() > 1}
        return skipped

    def watch(module, inputs):
        seen["products"].add((inputs[0].dtype, module.weight.dtype))

    def load(run, engine=None):
        real(run, engine)
        run.model.get_decoder().layers[0].mlp.down_proj.register_forward_pre_hook(watch)

    real = Run.load
    monkeypatch.setattr(Run, "optimizer_step", note)
    monkeypatch.setattr(Run, "load", load)
    flags = ["--bf16", "--engine", engine, "--term_norm_steps", "1"]
    run = train.train(*train.parse_args(frozen.short_flags(tiny, tmp_path, *flags)))
    assert seen == {"products": {(torch.bfloat16,) * 2}, "kept": {torch.float32}}
    if engine == "transformers":
        assert {p.dtype for p in run.engine.model.parameters()} == {torch.bfloat16}
    else:
        assert run.engine.llm.llm_engine.model_config.dtype == torch.bfloat16
        run.engine.close()
    lines = [*data.read_jsonl(run.out / "metrics.jsonl")][2:]  # after the settings and step 0
    apart = [line["sampling/sampling_logp_difference/mean"] for line in lines]
    assert len(apart) == 2 and all(1e-5 < x < 0.05 for x in apart), apart


def test_the_limit_of_the_engine_check_follows_the_arithmetic():
    config = train.Config()
    for bf16, passes, fails in ((False, 9e-4, 2e-3), (True, 0.09, 0.2)):
        config.bf16 = bf16
        guard.check_engine(config, passes, 1)
        with pytest.raises(ValueError, match="differ from the trainer's"):
            guard.check_engine(config, fails, 1)


def test_bf16_without_the_hardware_is_refused(monkeypatch):
    config, _ = train.parse_args(["--algo", "grpo", "--bf16"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    with pytest.raises(ValueError, match="--bf16: this CPU has neither avx512_bf16 nor AMX"):
        start.check_machine(config, 1)
    for name in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        start.check_machine(config, 1)
    quantised = replace(config, quant="4bit", lora_rank=4)
    with pytest.raises(ValueError, match="--bf16: with --quant 4bit"):
        start.check_machine(quantised, 1)


# --------------------------------------------------------------------------- from config.json alone


def config_of(family, folder, **changes):
    AutoConfig.for_model(family, **changes).save_pretrained(folder)
    return train.Config(model_name_or_path=str(folder), engine="vllm")


REFUSED = [
    ("qwen3_moe", {"num_experts": 8}, "mixture of experts.*--engine transformers"),
    ("mixtral", {}, "mixture of experts"),
    ("gpt_oss", {}, "mixture of experts"),
    ("deepseek_v3", {}, "mixture of experts"),
    ("aria_text", {}, "mixture of experts"),
    ("mamba", {}, "no engine reads on a CPU"),
    (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 1000,
            },
            "original_max_position_embeddings": 1000,
        },
        "longrope.*beyond 1000 tokens",
    ),
    (
        "llama",
        {
            "max_position_embeddings": 1000,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
        "dynamic.*beyond 1000 tokens",
    ),
]


@pytest.mark.parametrize("family, changes, why", REFUSED)
def test_what_cannot_be_trained_is_refused_from_its_config(
    family, changes, why, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = config_of(family, tmp_path, **changes)
    with pytest.raises(ValueError, match=why):
        start.suited(config, 1001)
    if "beyond" in why:
        assert start.suited(config, 1000) == (config, "")


PADDED = [
    ("mistral", {"sliding_window": 1000}, "sliding window of 1000 tokens, fewer than 1001"),
    ("gemma3_text", {"sliding_window": 1000}, "sliding window of 1000 tokens"),
    (
        "lfm2",
        {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
        "layers without attention",
    ),
    ("falcon_h1", {"lm_head_multiplier": 1.0}, "layers without attention"),
]


@pytest.mark.parametrize("family, changes, why", PADDED)
def test_what_no_joined_row_can_hold_takes_the_padded_path(
    family, changes, why, tmp_path, monkeypatch
):
    config = config_of(family, tmp_path, **changes)
    if "without" in why:
        with pytest.raises(ValueError, match="no engine reads on a CPU"):
            start.suited(config, 1001)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    changed, said = start.suited(config, 1001)
    assert changed == replace(config, share_prefix=False)
    assert why in said and "--no_share_prefix is taken" in said
    assert start.suited(changed, 1001) == (changed, "")
    with pytest.raises(ValueError, match=f"{why}.*--engine vllm"):
        start.suited(replace(config, engine="transformers"), 1001)
    if "window" in why:
        assert start.suited(config, 1000) == (config, "")


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "glm4", "gemma", "phi3", "olmo2", "smollm3", "gemma2", "granite"],
)
def test_ordinary_families_are_left_alone(family, tmp_path):
    config = config_of(family, tmp_path)
    assert start.suited(config, 1001) == (config, "")


def test_keys_that_a_family_does_not_have_change_nothing(tmp_path):
    """Their values may be anything: nobody reads them."""
    odd = {"num_experts": "8", "sliding_window": "512", "original_max_position_embeddings": "9"}
    config = config_of("llama", tmp_path, **odd)
    assert start.suited(config, 1001) == (config, "")


@pytest.mark.parametrize("family", ["bloom", "mpt", "mamba"])
def test_a_family_without_a_longest_position_has_no_limit(family, tmp_path):
    config = config_of(family, tmp_path)
    wanted = config.max_prompt_length + config.max_completion_length
    assert start.longest(config, methods.METHODS["grpo"](), None) == wanted


# ---------------------------------------------------------------------------------- chat templates

TURNS = """{% for m in messages %}<|im_start|>{{ m["role"] }}
{{ m["content"] }}<|im_end|>
{% endfor %}"""
NO_SYSTEM = {
    "raises on a system role": """{% if messages[0]["role"] == "system" %}
{{- raise_exception("System role not supported") }}{% endif %}"""
    + TURNS,
    "strict alternation": """{% for m in messages %}{% if (m["role"] == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("roles must alternate") }}{% endif %}{% endfor %}"""
    + TURNS,
    "drops it": TURNS.replace("in messages", 'in messages if m["role"] != "system"'),
}


def with_template(tiny, folder, template):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = template
    shutil.copytree(tiny, folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", NO_SYSTEM)
def test_a_system_text_moves_to_the_users_turn(kind, tiny, tmp_path, capsys):
    folder = with_template(tiny, tmp_path / "model", NO_SYSTEM[kind])
    tokenizer = modeling.load_tokenizer(folder)
    assert "takes no system message" in capsys.readouterr().out
    example = frozen.examples()[0]
    system, user = (message["content"] for message in data.messages(example))
    text = tokenizer.decode(data.render(example, tokenizer))
    assert text.startswith(f"<|im_start|>user\n{system}\n\n{user}<|im_end|>")
    modeling.load_tokenizer(folder)
    assert capsys.readouterr().out == ""  # said once
    serving.add_tool_template(tokenizer)  # and a served checkpoint does the same
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(tiny / "config.json", tmp_path / "saved")
    shutil.copy(tiny / "model.safetensors", tmp_path / "saved")
    saved = modeling.load_tokenizer(tmp_path / "saved")
    assert data.render(example, saved) == data.render(example, tokenizer)
    chat = [{"role": "user", "content": example.query}]
    served = saved.apply_chat_template(chat, tools=example.tools, tokenize=False)
    assert served.startswith("<|im_start|>user\n") and "<|im_start|>system" not in served


def test_the_date_of_a_template_is_pinned(tiny, tmp_path, capsys):
    template = (
        """{%- set date = strftime_now( "%d %b %Y" ) -%}Today: {{ date }}, {{ strftime_now('%Y-%m-%d') }}
"""
        + TURNS
    )
    tokenizer = modeling.load_tokenizer(with_template(tiny, tmp_path / "model", template))
    assert "prints today's date: it is 26 Jul 2024" in capsys.readouterr().out
    text = tokenizer.decode(data.render(frozen.examples()[0], tokenizer))
    assert text.startswith("Today: 26 Jul 2024, 2024-07-26\n")
