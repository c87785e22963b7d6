"""bench/gpu.py without a GPU: its ways of attending against dense attention, and the whole script on a small model."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "bench"))

import gpu
import packing


def test_our_attention_is_exact():
    assert gpu.attention_apart(gpu.ATTENTION["sdpa"], "toy", "cpu") < 1e-5


def test_flex_attends_to_what_it_should():
    """Its backward pass and varlen_attn need a GPU, where the script compares them itself."""
    packed = packing.join(
        [packing.pack(range(20), [range(7), range(3)]), packing.pack(range(5), [range(9)])]
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 44, 16) for heads in (4, 2, 2))
    dense = scaled_dot_product_attention(q, k, v, packing.attention_mask(packed), enable_gqa=True)
    out, _ = gpu.flex(None, q, k, v, None, shared_prefix=gpu.Plan(packed, q.device))
    assert torch.allclose(out.transpose(1, 2), dense, atol=1e-5)


def test_a_wrong_mask_is_seen():
    """Responses that see each other, as in an ordinary row."""

    def causal(module, query, key, value, attention_mask, shared_prefix, scaling):
        own = packing.Packed(
            *(getattr(shared_prefix.packed, n) for n in ("input_ids", "position_ids")),
            (879,),
            ((1,),),
        )
        kind = packing._Plan(own, query.device)
        return packing.shared_prefix_attention(module, query, key, value, None, kind, scaling)

    assert gpu.attention_apart(causal, "toy", "cpu") > 0.05


def test_every_way_is_measured_at_every_length(tmp_path):
    flags = "--device cpu --shapes toy --prompts 48 64 --answer 8 --steps 1 --tokens 300 --ways padded sdpa kept"
    out = tmp_path / "gpu.json"
    command = [sys.executable, "bench/gpu.py", *flags.split(), "--out", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["prompt"], row["way"]) for row in rows] == [
        (length, way) for length in (48, 64) for way in ("padded", "sdpa", "kept")
    ]
    for row in rows:
        assert row["seconds"] == 32 * row["seconds_per_group"] + row["optimizer_seconds"], row
        assert row.get("exact", row["way"] == "padded") and row["times_padded"] > 0, row
