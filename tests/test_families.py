"""The families of docs/models.md with random weights: two layers each, and toy_model's tokenizer.

Each is read from disk as a run reads it; the oracle is an ordinary call with one sequence alone.
"""

import dataclasses

import pytest
import torch
from frozen import REPO, TOY, flags, needs_vllm, one_rank  # noqa: F401 - a fixture
from safetensors.torch import load_file
from test_model import randomise_adapters
from test_packing import assert_same
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

import guard
import model as modeling
import packing
import start
import train
from run import Run, sync

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIZE = {"head_dim": 32}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = EXPERTS | {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
GRANITE = {
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0156,
}
DENSE = {
    "llama": SIZE | {"rope_parameters": LLAMA_3},
    "mistral": SIZE,
    "qwen2": {"num_attention_heads": 2, "tie_word_embeddings": True},
    "qwen3": SIZE,
    "phi3": {"num_attention_heads": 2},
    "glm4": SIZE,
    "gemma": SIZE,
    "gemma2": SIZE | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": SIZE,
    "granite": {"num_attention_heads": 2, **GRANITE},
    "cohere": {"num_attention_heads": 2, "logit_scale": 0.25},
    "smollm3": {"num_attention_heads": 2},
    "olmo2": {"num_attention_heads": 2},
    "olmo3": {"num_attention_heads": 2},
    "seed_oss": SIZE,
    "starcoder2": {"num_attention_heads": 2},
    "phi": {"num_attention_heads": 2},
    "gpt_neox": {"num_attention_heads": 2},
}
MIXTURES = {
    "qwen3_moe": SIZE | EXPERTS | {"num_experts": 4},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "deepseek_v3": ROUTED | LATENT,
    "glm4_moe": SIZE | ROUTED,
}
PADDED = {  # no joined rows
    "gpt_oss": SIZE | EXPERTS | {"num_local_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": SIZE | {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 2},
}
FAMILIES = DENSE | MIXTURES | PADDED
PROMPTS = [5, 9, 300, 7, 41, 1000], [8, 77]
RESPONSES = [[8, 9, 712], [], [3, 1, 4, 1, 5, 2]]


@pytest.fixture
def whole(monkeypatch):
    """Models are not sharded, so that their tensors are plain ones."""
    monkeypatch.setattr(modeling, "shard", lambda model, **_: model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a family's random model, written once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            config = AutoConfig.for_model(family, **SHAPE | FAMILIES[family])
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for name, weight in (*model.named_parameters(), *model.named_buffers()):
                if "norm" in name or name.endswith(("bias", "sinks")):  # they start at 0 or 1
                    nn.init.normal_(weight, weight.detach().float().mean().item(), 0.05)
            model.save_pretrained(made[family])
            AutoTokenizer.from_pretrained(TOY).save_pretrained(made[family])
        return made[family]

    return get


def joined():
    return packing.join([packing.pack(prompt, RESPONSES) for prompt in PROMPTS])


def each(score):
    """Log-probs and entropies of all groups, from those of each."""
    return [torch.cat(parts) for parts in zip(*(score(prompt, RESPONSES) for prompt in PROMPTS))]


def alone(model, prompt, responses, temperature=1.0):
    """(R, T) log-probs and entropies from ordinary calls with one sequence each."""
    blank = torch.zeros(len(responses), max(map(len, responses)))
    logps, entropy = blank.clone(), blank.clone()
    for k, response in enumerate(responses):
        logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
        log_p = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        logps[k, : len(response)] = log_p[range(len(response)), response]
        entropy[k, : len(response)] = -(log_p.exp() * log_p).sum(-1)
    return logps, entropy


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_equals_each_sequence_alone(family, folder, whole):
    model, _ = modeling.load(folder(family))
    ids = torch.tensor([PROMPTS[0]])
    before = model(ids).logits
    expected = lambda: each(lambda *group: alone(model, *group, 0.7))
    padded = lambda *group: packing.padded_logps(model, *group, temperature=0.7)
    assert_same(model, each(padded), expected())
    if family not in PADDED:
        assert_same(model, packing.response_logps(model, joined(), temperature=0.7), expected())
        assert torch.equal(before, model(ids).logits)  # with our attention in its place


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_has_its_familys_names_and_reads_back(family, folder, tmp_path, capsys):
    model, tokenizer = modeling.load(folder(family))
    assert ("transformers converts" in capsys.readouterr().out) == (family in MIXTURES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    modeling.save(model, tokenizer, tmp_path / "saved")
    files = (path / "model.safetensors" for path in (folder(family), tmp_path / "saved"))
    theirs, ours = ({n: t.shape for n, t in load_file(file).items()} for file in files)
    assert ours == theirs
    expected = dict(modeling.full_tensors(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    again = dict(modeling.full_tensors(modeling.load(tmp_path / "saved")[0]))
    for state in (plain, again):
        assert state.keys() == expected.keys()
        assert [n for n, t in state.items() if not torch.equal(t, expected[n])] == []


@pytest.mark.parametrize("family", [*DENSE, "lfm2"])
def test_adapters_reach_every_linear_layer_and_merge(family, folder, whole):
    model, _ = modeling.load(folder(family), lora_rank=2)
    base = model.get_base_model()
    plain = modeling.skeleton(folder(family))
    linear = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear)} - {
        "lm_head",
        "embed_out",
    }
    assert {n for n, m in base.named_modules() if hasattr(m, "lora_A")} == linear
    randomise_adapters(model)
    score = lambda *group: packing.padded_logps(model, *group)
    scores = packing.response_logps(model, joined()) if family in DENSE else each(score)
    assert_same(model, scores, each(lambda *group: alone(model, *group)))
    merged = AutoModelForCausalLM.from_pretrained(folder(family), attn_implementation="eager")
    with torch.no_grad():
        before, _ = each(lambda *group: alone(merged, *group))
        merged.load_state_dict(dict(modeling.full_tensors(model)))
        logps, _ = each(lambda *group: alone(merged, *group))
    assert torch.allclose(logps, scores[0], atol=1e-4)
    assert (before - logps).abs().max() > 0.01  # the adapters say something


def run_of(family, folder, tmp_path, *more):
    run = Run(*train.parse_args(flags(folder(family), tmp_path, "--algo", "grpo", *more)))
    run.load()
    return run


def follow(run):
    """Both checks of a start, then an update and what the engine says of it."""
    guard.check_logps(run)
    with guard.canary(run):
        sync(run)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            parameter.mul_(1.1)
    sync(run)
    one = run.demonstration(run.examples[0])
    prompts = [one.prompt[-40:], one.prompt[-60:]]
    groups = run.engine.generate(prompts, n=2, temperature=0.8, max_tokens=6)
    for prompt, samples in zip(prompts, groups):
        logps, _ = packing.padded_logps(
            run.model, prompt, [s.token_ids for s in samples], temperature=0.8
        )
        for row, sample in zip(logps, samples):
            assert torch.allclose(
                row[: len(sample.logps)], torch.tensor(sample.logps), atol=2e-5
            ), (row, sample)


@pytest.mark.parametrize("family", [*DENSE, *MIXTURES])
def test_the_transformers_engine_follows_the_trainer(family, folder, tmp_path):
    follow(run_of(family, folder, tmp_path))


@pytest.mark.long
@needs_vllm
@pytest.mark.parametrize("family", DENSE)
def test_vllm_follows_the_trainer(family, folder, tmp_path):
    run = run_of(family, folder, tmp_path, "--engine", "vllm")
    try:
        follow(run)
    finally:
        run.engine.close()


@pytest.mark.parametrize("family", [*MIXTURES, "gpt_oss", "falcon_h1"])
def test_adapters_on_experts_are_refused(family, folder):
    config = train.Config(model_name_or_path=str(folder(family)), engine="transformers")
    with pytest.raises(ValueError, match="has (experts|a mixer), which adapters do not reach"):
        start.suited(dataclasses.replace(config, lora_rank=4), 100)


def test_a_model_that_sees_is_refused_and_its_language_model_is_not(tmp_path, whole):
    text = SHAPE | SIZE | {"sliding_window": 4096}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(TOY).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="gemma3.* reads more than text: .*docs/models.md"):
        Run(*train.parse_args(flags(tmp_path / "whole", tmp_path, "--algo", "grpo")))

    lines = (REPO / "docs/models.md").read_text()
    code = lines.partition("```python\n")[2].partition("```")[0]
    code = code.replace("google/gemma-3-4b-it", str(tmp_path / "whole"))
    exec(code.replace("models/gemma-3-4b-text", str(tmp_path / "text")))  # noqa: S102
    whole = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "whole")
    model, _ = modeling.load(tmp_path / "text")
    ids = torch.tensor([[5, 9, 300]])
    assert torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-5)
    assert start.suited(train.Config(model_name_or_path=str(tmp_path / "text")), 100)
