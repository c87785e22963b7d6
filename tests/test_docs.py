"""README and docs: short enough, no dead link, no dead flag, and README's example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", REPO / "bench/README.md", *sorted((REPO / "docs").glob("*.md"))]


def test_readme_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) < 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_what_a_page_names_exists(page):
    """Links, relative to the page; paths in backquotes and recipes, relative to the repository."""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    paths = re.findall(r"`((?:bench|docs|recipes|tasks|tests|tools)/[\w./-]*\w)`", text)
    paths += re.findall(r"@(recipes/[\w.-]+)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (REPO / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_flag_is_one_of_a_program(page):
    """Its name occurs in the source; those of torchrun do not."""
    torchrun = {"max_restarts", "nnodes", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}
    folders = ("", "bench", "tasks", "tools")
    source = "".join(p.read_text() for folder in folders for p in (REPO / folder).glob("*.py"))
    names = set(re.findall(r"(?<![\w-])--(?:no_)?([a-z]\w*)(?![\w-])", page.read_text()))
    assert not [n for n in names - torchrun if not re.search(rf"\b{n}\b", source)]


def test_the_example_of_readme_runs():
    code = re.search(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)[1]
    code += "\nassert expert_logps.grad.abs().sum() > 0 and logps.grad.abs().sum() > 0"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
