"""tools/plan.py against parameter counts from model cards and numbers worked out by hand."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parent.parent
from tools import plan

# of the checkpoints on the Hugging Face Hub (safetensors metadata)
COUNTS = {
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
}


def args(*more: str):
    return plan.parser().parse_args(["paper", *more])


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_of_the_checkpoints(name):
    assert plan.shape_of(name)["parameters"] == COUNTS[name]


def test_parameters_of_a_folder_are_those_of_its_model():
    from transformers import AutoModelForCausalLM

    folder = REPO / "toy_model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert plan.shape_of(str(folder))["parameters"] == model.num_parameters()


def test_bytes_of_7b_on_eight_gpus_by_hand():
    p = plan.plan(plan.shape_of("qwen2.5-7b"), 8, 80, 1, args())
    assert p["states"] == 16 * 7_615_616_512 / 8  # 15.2 GB
    layer = 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18_944 + 2 * 3584 + 3584 + 2 * 512
    head = (
        152_064 * 3584
    )  # the embedding is a unit of its own; its turn comes last, and is the largest
    assert 8 * head > 10 * layer
    assert p["gathered"] == 2 * 2 * (head + 3584) + 8 * head
    row = 8192 + 9 * 1024  # longer than --max_tokens_per_row 16384
    assert p["activations"] == row * (28 * 2 * 3584 + 4 * (6 * 3584 + 2 * 512 + 4 * 18_944))
    assert p["logits"] == 16 * 512 * 152_064
    assert p["update_peak"] == sum(p[k] for k in ("states", "gathered", "activations", "logits"))
    kv = 2 * 28 * 4 * 128 * 2  # keys and values, layers, KV heads, head width, bf16
    working = 8192 * (6 * 18_944 + 8 * 3584) + 256 * 8 * 152_064
    free = 80 * 2**30 - 7e9 - 12 * 7_615_616_512 / 8 - 2 * 7_615_616_512 - working
    assert p["host"] == 8 * 3e9 + 5e9 and p["disk"] == 3 * 16 * 7_615_616_512
    assert p["tensor_parallel"] == 1 and p["kv_tokens"] == int(free / kv) and p["fits"]


def test_seconds_of_7b_by_hand():
    p = plan.plan(plan.shape_of("qwen2.5-7b"), 8, 80, 1, args("--mfu", "0.5", "--tflops", "1000"))
    tokens = 256 * (2000 + 9 * 100)
    body = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18_944)
    flops = 6 * body * tokens + 6 * 152_064 * 3584 * 256 * 900
    assert p["tokens"] == tokens
    assert p["update"] == pytest.approx(flops / (8 * 1e15 * 0.5))
    assert p["sync"] == pytest.approx(4 * 7_615_616_512 / 300e9)
    active = 256  # responses of a GPU: 256 * 8 / 8, all at once
    cache = 57_344 * active * 2100
    token = (2 * 7_615_616_512 + cache) / (3350e9 * 0.6)
    prefill = 2 * 7_615_616_512 * 256 * 2000 / (8 * 1e15 * 0.5)
    assert p["rollout"] == pytest.approx(prefill + 200 * token)
    assert p["step"] == pytest.approx(p["rollout"] + p["update"] + p["sync"])


def test_what_does_not_fit_is_said():
    p = plan.plan(plan.shape_of("qwen2.5-32b"), 8, 80, 1, args())
    assert p["states"] == 16 * 32_763_876_352 / 8 and not p["fits"] and "step" not in p
    assert "does not fit" in plan.table([("qwen2.5-32b", p)])


def test_vllm_spreads_a_model_that_one_gpu_cannot_hold():
    p = plan.plan(plan.shape_of("qwen2.5-32b"), 8, 80, 2, args())
    assert p["tensor_parallel"] == 2 and p["vllm_weights"] == 32_763_876_352
    working = 8192 * (6 * 27_648 + 8 * 5120) + 256 * 8 * 152_064
    free = 2 * (80 * 2**30 - 7e9 - 12 * 32_763_876_352 / 16) - 2 * 32_763_876_352 - working
    assert p["kv_tokens"] == int(free / (2 * 64 * 8 * 128 * 2))


def test_micro_batches_over_a_slow_network_bound_the_update():
    p = plan.plan(plan.shape_of("qwen2.5-7b"), 8, 80, 2, args("--network", "1"))
    micro = 3  # 16 prompts of 2,900 tokens per rank in rows of 16,384
    assert p["micro_batches"] == micro and p["traffic_bound"]
    assert p["update"] == pytest.approx(8 * 7_615_616_512 * micro / 1e9)


def test_an_unknown_model_is_named(capsys):
    with pytest.raises(SystemExit, match="no-such-model"):
        plan.main(["no-such-model"])


def test_gathered_of_a_tied_model_by_hand():
    s = plan.shape_of("qwen2.5-1.5b")
    root, layer = 151_936 * 1536 + 1536, s["layer"]
    everything, frozen = (
        plan.plan(s, 8, 80, 1, args(*flags))["gathered"] for flags in ((), ("--lora_rank", "8"))
    )
    assert everything == 4 * root + max(4 * root, 10 * layer)
    assert frozen == 2 * root + 4 * layer


def test_32b_fits_eight_cards_with_its_moments_on_the_host():
    s = plan.shape_of("qwen2.5-32b")
    here, there = (plan.plan(s, 8, 80, 1, args(*f)) for f in ((), ("--offload_moments",)))
    N = 32_763_876_352
    assert here["states"] == 16 * N / 8 and there["states"] == 8 * N / 8
    assert here["update_peak"] - there["update_peak"] == 8 * N / 8
    assert not here["fits"] and there["fits"]
    assert there["host"] - here["host"] == 10 * N  # of a node
    back = plan.plan(s, 8, 141, 1, args())
    assert there["update"] - back["update"] == pytest.approx(16 * N / 8 / 25e9)


@pytest.mark.parametrize(("name", "world"), [("7b", 1), ("7b", 8), ("14b", 2), ("32b", 8)])
def test_the_blocks_of_pinned_moments_are_within_the_plan(monkeypatch, name, world):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from model import HostAdamW

    width, inner, layers, heads, kv_heads, vocabulary, tied, _ = plan.MODELS[f"qwen2.5-{name}"]
    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        network = Qwen2ForCausalLM(config)
    step = HostAdamW([torch.zeros(1, requires_grad=True)])
    blocks, empty = [], torch.empty

    def pin(size, dtype, pin_memory):
        assert pin_memory
        blocks.append(1 << (size * dtype.itemsize - 1).bit_length())  # torch rounds up
        return empty(size, dtype=dtype, device="meta")

    monkeypatch.setattr(torch, "empty", pin)
    held = 0
    for parameter in sorted(network.parameters(), key=lambda p: p.ndim < 2):  # matrices first
        part = -(-len(parameter) // world)  # FSDP2 shards the first dimension
        for _ in ("exp_avg", "exp_avg_sq"):
            held += 4 * step._pinned(empty(part, *parameter.shape[1:], device="meta")).numel()
    s, flags = plan.shape_of(f"qwen2.5-{name}"), args("--offload_moments")
    without, planned = (plan.plan(s, world, 80, 1, f)["host"] / world for f in (args(), flags))
    assert held <= sum(blocks) <= 1.02 * (planned - without)


def test_adapters_by_hand():
    s = plan.shape_of("qwen2.5-7b")
    per_layer = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18_944)
    N, A = 7_615_616_512, 16 * 28 * per_layer
    lora = plan.plan(s, 1, 80, 1, args("--lora_rank", "16"))
    assert lora["trained"] == A and lora["resident"] == 2 * N + 12 * A
    assert lora["states"] == 2 * N + 16 * A and lora["disk"] == 3 * (4 * N + 16 * A)
    quantised = plan.plan(s, 2, 24, 1, args("--lora_rank", "16", "--quant", "4bit"))
    body = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18_944)
    nf4 = 0.5 + 0.127 / 8  # 4 bits, and a constant of 8 bits per 64 weights, its own per 256
    assert nf4 == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-3)
    assert quantised["resident"] == pytest.approx(
        nf4 * body + 2 * (N - body) + 12 * A
    )  # not halved


def test_adapters_are_counted_as_peft_makes_them(tmp_path):
    import model as library

    network, _ = library.load(REPO / "toy_model", lora_rank=4)
    p = plan.plan(plan.shape_of(str(REPO / "toy_model")), 1, 80, 1, args("--lora_rank", "4"))
    trained = sum(
        parameter.numel() for parameter in network.parameters() if parameter.requires_grad
    )
    assert p["trained"] == trained


def test_a_skeleton_is_counted_exactly():
    import model as library

    model = library.skeleton(REPO / "toy_model")
    assert plan.shape_of(model) == plan.shape_of(str(REPO / "toy_model"))


@pytest.mark.parametrize("way", ["moments on host", "LoRA", "QLoRA", ""])
def test_the_table_s_single_cases_fit(way):
    cases = [case for case in plan.CASES if case[3] == way]
    assert cases
    for model, machine, flags, _ in cases:
        assert plan.plan(plan.shape_of(model), *machine, args(*flags.split()))["fits"], model


def test_share_of_a_24_gb_card():
    """7B in bf16 is 15.2 GB: a share of 0.5, 12.9 GB, cannot hold it."""
    share, text = plan.engine_memory_share(25.8e9, 8.0e9, 15.2e9, 1.0e9, 0.5e9)
    assert share == 0.68  # (25.8 - 8.0) / 25.8 = 0.689
    assert "0.68 of 25.8 GB; 8.0 GB are held" in text and "15.2 GB weights" in text
    assert "1.3 GB KV cache" in text  # 0.68 * 25.8 - 15.2 - 1.0
    with pytest.raises(ValueError, match="too small for sampling.*needs 2.00 GB") as caught:
        plan.engine_memory_share(25.8e9, 8.0e9, 15.2e9, 1.0e9, 2.0e9)
    assert "\n" not in str(caught.value) and "--quant 4bit" in str(caught.value)
    assert plan.engine_memory_share(100e9, 0, 1e9, 0, 0)[0] == 0.95


CONFIG = {
    "train_batch_size": 64, "max_prompt_length": 4096, "max_completion_length": 512,
    "vllm_tensor_parallel_size": 1, "vllm_gpu_memory_utilization": 0.0, "num_generations": 8,
    "max_tokens_per_row": 8192, "max_num_seqs": 64, "lora_rank": 0, "quant": "none",
}  # fmt: skip


def room(model, world, card, host, here=None, whole=False, **changes):
    config, shape = SimpleNamespace(**CONFIG | changes), plan.shape_of(model)
    return plan.room(config, shape, world, here or world, card * 2**30, host * 1e9, whole)


def test_room_of_a_gpu():
    share, text = room("qwen2.5-7b", 8, 80, 500)
    assert share == 0.79 and "\n" not in text  # (85.9 - 6.55 - 12 * 7.6 / 8) / 85.9
    assert room("qwen2.5-7b", 8, 80, 500, vllm_gpu_memory_utilization=0.4)[0] == 0.4
    share, text = room("qwen2.5-7b", 8, 80, 500, vllm_gpu_memory_utilization=0.85)
    assert share == 0.85 and "\nBy this count 0.79 are free" in text
    _, text = room("qwen2.5-7b", 8, 80, 500, max_tokens_per_row=100_000)
    assert "may not fit" in text and "--max_tokens_per_row" in text


@pytest.mark.parametrize(("arguments", "changes", "message"), [
    (("qwen2.5-7b", 1, 24, 64), {}, "too small for an update: 121.8 GB weights.*of 25.8 GB"),
    (("qwen2.5-7b", 1, 24, 64), {"lora_rank": 16}, "too small for sampling.*--quant 4bit"),
    (("qwen2.5-32b", 8, 80, 500), {}, "too small for sampling.*55.7 GB are held.*65.5 GB weights"),
    # 15.2 GB of weights in 0.15 of 85.9 GB
    (("qwen2.5-7b", 8, 80, 500), {"vllm_gpu_memory_utilization": 0.15},
     "0.15, as given, of 85.9 GB.*15.2 GB weights.*Use a larger --vllm_gpu_memory_utilization"),
    (("qwen2.5-32b", 8, 80, 200), {"offload_moments": True, "vllm_tensor_parallel_size": 2},
     "too little host memory.*make 356.6 GB, 200.0 GB"),
    (("qwen2.5-7b", 8, 80, 200), {"whole": True},  # 8 x 4 x 7.6 = 243.7
     "too little host memory.*make 29.0 GB, all weights read by each process 243.7 GB, 200.0 GB"),
    (("qwen2.5-7b", 8, 80, 150), {"engine": "transformers"}, "by each process 121.8 GB, 150.0 GB"),
    (("qwen2.5-7b", 2, 0, 64), {}, "too large for this machine: 2 x .60.9 GB weights.*64.0 GB"),
])  # fmt: skip
def test_what_is_too_small_is_refused_in_a_line(arguments, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        room(*arguments, **changes)
    assert "\n" not in str(caught.value) and "; use" in str(caught.value).lower().replace(
        ". use", "; use"
    )


def test_what_fits_is_not_refused():
    assert room("qwen2.5-7b", 1, 24, 64, lora_rank=16, quant="4bit")[0] == pytest.approx(
        0.66, abs=0.01
    )
    # recipes/one-gpu.args, on what an RTX 4090 reports
    short = {"lora_rank": 16, "quant": "4bit", "max_prompt_length": 2048}
    assert room("qwen2.5-7b", 1, 23.6, 64, **short)[0] > 0.6
    assert (
        room("qwen2.5-32b", 8, 80, 500, offload_moments=True, vllm_tensor_parallel_size=2)[0] > 0.6
    )
    assert room("qwen2.5-32b", 16, 80, 500, here=8, vllm_tensor_parallel_size=2)[0] > 0.5
    assert room("qwen2.5-1.5b", 2, 0, 64) == (0.0, "")


def test_available_memory_is_the_machine_s_or_the_container_s():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < plan.available_memory() <= total
