"""bench/plot.py: between its markers bench/README.md says what the recorded JSON files hold."""

import shutil
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.append(str(BENCH))

import common
import plot


def test_the_readme_holds_the_recorded_figures(tmp_path, monkeypatch):
    for path in [*BENCH.glob("*.json"), BENCH / "demo.jsonl", BENCH / "README.md"]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(common, "BENCH", tmp_path)
    plot.main()
    assert (tmp_path / "README.md").read_text() == (BENCH / "README.md").read_text()
    for name in ("performance", "gpu", "demo"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
