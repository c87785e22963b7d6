"""Put the repository root on sys.path, so that tests import the files by their plain names; hide the GPU; long files go first.

Comparisons to the bit are those of fp32 on a CPU, so no test sees a GPU unless `-k` asks for it: `pytest -k gpu`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LONGEST = (
    *("test_trust", "test_presets", "test_itool", "test_serving", "test_whole_runs"),
    *("test_train", "test_eval", "test_rollout", "test_attention", "test_model"),
)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "long: kills, faults, servers, whole runs; `make test-long` runs it"
    )
    if "gpu" not in config.option.keyword:  # before anything imports torch
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Minutes come before seconds, so that the two processes end together."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
