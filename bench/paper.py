"""Tables and figures of both papers, each by one command: train, evaluate, tabulate.

    python bench/paper.py table1 @recipes/llama-3.1-8b.args @recipes/qwen2.5-7b.args    a recipe per model
    python bench/paper.py table1 figure4 --toy        the toy world, one small model, minutes on a CPU

An object (OBJECTS of paper_toolupt.py and paper_itool.py) is a list of runs and a function that
shows what they measured. A run is trained by train.py under torchrun for every recipe, its
checkpoints are evaluated by eval.py, and each evaluation is a line of OUT/results.jsonl. Objects
that name the same run (same name and flags) share it. The program goes on where it stopped, and
past a run that fails: the table names it with the last line of its log.

OUT/MODEL/RUN/          the run folder of train.py, with log.txt; eval-LABEL/ per checkpoint
OUT/results.jsonl       a line per evaluation
OUT/OBJECT.md, .png     the table in the paper's layout, the paper's numbers beside ours; the picture
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def last(run: Path) -> dict[str, Path]:
    """The final checkpoint of a finished run, the default of Run.checkpoints."""
    raise NotImplementedError


@dataclass(frozen=True)
class Run:
    """One training and what of it is evaluated; shared by all objects that name it."""

    name: str  # its folder below the model's; the same name means the same flags
    flags: tuple[str, ...] | None  # for train.py, after the recipe; None: no training, zero-shot
    toy: tuple[str, ...] = ()  # further flags with --toy, last
    evals: tuple[str, ...] = ()  # further flags for eval.py on BFCL, such as --half 0
    checkpoints: Callable[[Path], dict[str, Path]] = last  # run folder -> {label: checkpoint}


@dataclass(frozen=True)
class Work:
    """What the command line asked for, given to Object.show."""

    out: Path
    recipes: tuple[str, ...]  # @FILE arguments, without the @
    toy: bool
    picture: Path  # where show draws


@dataclass(frozen=True)
class Object:
    """A table or figure: what it needs, and how it looks.

    show takes rows in the order recipes x runs x checkpoints and returns Markdown; where it draws,
    it writes work.picture. A row: {"model": last part of the model's name, "run": Run.name,
    "checkpoint": label, "scores": {column: percent} or None, "error": last log line or None,
    "folder": the run folder or None}. Columns are those of eval.columns (overall, non_live, ...);
    with --toy they are overall, tool_call, answer.
    """

    what: str  # one line, for --help
    runs: tuple[Run, ...]
    show: Callable[[list[dict], Work], str]
