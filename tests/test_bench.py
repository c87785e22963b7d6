"""bench/gpu.py without a GPU: its ways of attending against dense attention, and the whole script on a small model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "bench"))

import gpu
import packing


@pytest.mark.parametrize("way", ["sdpa", "flex"])
def test_ways_of_attending_are_exact(way):
    assert gpu.attention_apart(gpu.ATTENTION[way], "toy", "cpu") < 1e-5


def test_a_wrong_mask_is_seen():
    """Responses that see each other, as in an ordinary row."""

    def causal(module, query, key, value, attention_mask, shared_prefix, scaling):
        own = packing.Packed(*(getattr(shared_prefix.packed, n) for n in ("input_ids", "position_ids")), (879,), ((1,),))
        kind = packing._Plan(own, query.device)
        return packing.shared_prefix_attention(module, query, key, value, None, kind, scaling)

    assert gpu.attention_apart(causal, "toy", "cpu") > 0.05


def test_every_way_is_measured_at_every_length(tmp_path):
    flags = "--device cpu --shapes toy --prompts 48 64 --answer 8 --steps 1 --tokens 300 --ways padded sdpa flex kept"
    out = tmp_path / "gpu.json"
    command = [sys.executable, "bench/gpu.py", *flags.split(), "--out", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["prompt"], row["way"]) for row in rows] == [
        (length, way) for length in (48, 64) for way in ("padded", "sdpa", "flex", "kept")
    ]
    for row in rows:
        assert row["seconds"] == 32 * row["seconds_per_group"] + row["optimizer_seconds"], row
        assert row.get("exact", row["way"] == "padded") and row["times_padded"] > 0, row
