"""bench/plan.py against parameter counts from model cards and numbers worked out by hand."""

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "bench"))

import plan

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
    root = 2 * 152_064 * 3584 + 3584
    assert p["gathered"] == 2 * root + 4 * layer + 4 * root
    row = 8192 + 9 * 1024  # longer than --max_tokens_per_row 16384
    assert p["activations"] == row * (28 * 2 * 3584 + 4 * (6 * 3584 + 2 * 512 + 4 * 18_944))
    assert p["logits"] == 16 * 512 * 152_064
    assert p["update_peak"] == sum(p[k] for k in ("states", "gathered", "activations", "logits"))
    kv = 2 * 28 * 4 * 128 * 2  # keys and values, layers, KV heads, head width, bf16
    free = 80e9 - 6e9 - 12 * 7_615_616_512 / 8 - 2 * 7_615_616_512
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
    free = 2 * (80e9 - 6e9 - 12 * 32_763_876_352 / 16) - 2 * 32_763_876_352
    assert p["kv_tokens"] == int(free / (2 * 64 * 8 * 128 * 2))


def test_micro_batches_over_a_slow_network_bound_the_update():
    p = plan.plan(plan.shape_of("qwen2.5-7b"), 8, 80, 2, args("--network", "1"))
    micro = 3  # 16 prompts of 2,900 tokens per rank in rows of 16,384
    assert p["micro_batches"] == micro and p["traffic_bound"]
    assert p["update"] == pytest.approx(8 * 7_615_616_512 * micro / 1e9)


def test_an_unknown_model_is_named(capsys):
    with pytest.raises(SystemExit, match="no-such-model"):
        plan.main(["no-such-model"])
