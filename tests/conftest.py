"""Put the repository root on sys.path, so that tests import the files by their plain names; long files go first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LONGEST = ("test_presets", "test_itool", "test_trust", "test_eval", "test_whole_runs", "test_rollout", "test_train")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; not in `make test`")


def pytest_collection_modifyitems(items):
    """Minutes come before seconds, so that the processes of `make test` end together."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
