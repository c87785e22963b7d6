"""What a response earns: the papers' outcome reward (rewards.py), or that of a user's own file.

    Reward(file)                .minimum, .maximum: the bounds of a total; .digest of the file
    reward.score(text, example) an outcome: .total, and .right where it is at the maximum
    reward.tally(texts, examples)   sums for evaluation
    score(method, group, reward)    fills a group's outcomes and rewards

A file of one's own (--reward_file, docs/own_reward.md) holds

    MINIMUM, MAXIMUM = 0.0, 1.0
    def reward(response: str, example: data.Example) -> tuple[dict[str, float], float]:
        return {"a part": 0.5, "another": 0.0}, 0.5     # parts, which are only logged; total

Whatever is wrong with it ends the run with file, line and, where there is one, the example.
"""

import hashlib
import importlib.util
import math
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import rewards

COPY = "reward.py"  # in the output folder: what the audit of a run recomputes with


@dataclass(frozen=True)
class OwnOutcome:
    """What a user's reward says of a response."""

    parts: dict[str, float]
    total: float  # in [MINIMUM, MAXIMUM]
    right: bool  # total is MAXIMUM


def parts_of(outcome) -> dict[str, float]:
    """The parts of an outcome that are metrics, by their names there."""
    if isinstance(outcome, OwnOutcome):
        return {f"reward/{name}": value for name, value in outcome.parts.items()}
    return {"format": outcome.format}


class Reward:
    """The reward of a run.

    file  of a user's own; "": the outcome reward of Eqs. 3-12
    ValueError where the file does not hold MINIMUM < MAXIMUM and a function `reward`.
    """

    def __init__(self, file: str | Path = ""):
        self.file, self.minimum, self.maximum, self.digest = str(file), -3.0, 4.0, ""
        if file:
            self._load(Path(file))

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"--reward_file {path}: no such file")
        self.source = path.read_bytes()
        self.digest = hashlib.sha256(self.source).hexdigest()[:16]
        spec = importlib.util.spec_from_loader("own_reward", loader=None)
        module = importlib.util.module_from_spec(spec)
        sys.modules["own_reward"] = module  # where pickle looks up the file's classes
        try:
            exec(compile(self.source, self.file, "exec"), vars(module))
        except SyntaxError as error:
            raise ValueError(f"{path} line {error.lineno}: {error.msg}") from None
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self._line(error)}: {_named(error)}") from error
        need = "MINIMUM, MAXIMUM (numbers, the first below) and reward(response, example)"
        bounds = [getattr(module, name, None) for name in ("MINIMUM", "MAXIMUM")]
        self.function = getattr(module, "reward", None)
        if not (callable(self.function) and all(map(_is_number, bounds)) and bounds[0] < bounds[1]):
            raise ValueError(f"{path} must hold {need}; docs/own_reward.md has an example")
        self.minimum, self.maximum = map(float, bounds)

    def score(self, text: str, example) -> rewards.Outcome | OwnOutcome:
        """The outcome of a response; ValueError where a user's reward fails or leaves its bounds.

        example  a data.Example; the papers' reward reads its target only
        """
        if not self.file:
            return rewards.outcome(text, example.target)
        try:
            found = self.function(text, example)
        except (Exception, SystemExit) as error:
            where = f"{self._line(error)}: {_named(error)}"
            raise ValueError(f"{where} at example {example.id}, response {text[:200]!r}") from error
        code = getattr(self.function, "__code__", None)
        where = f"{self.file} line {code.co_firstlineno}" if code else self.file
        about = f"{where}: reward returned {str(found)[:200]} for example {example.id}"
        parts, total = found if type(found) is tuple and len(found) == 2 else (None, None)
        if not isinstance(parts, dict) or not all(map(_is_number, [total, *parts.values()])):
            raise ValueError(f"{about}; return (parts, total): a dict of numbers, and a number")
        if not self.minimum <= total <= self.maximum:
            bounds = f"[MINIMUM, MAXIMUM] = [{self.minimum}, {self.maximum}]"
            raise ValueError(f"{about}; the total must be in {bounds}")
        parts = {str(name): float(value) for name, value in parts.items()}
        return OwnOutcome(parts, float(total), bool(total == self.maximum))

    def tally(self, texts: list[str], examples: list) -> dict[str, float]:
        """Sums over held-out examples, which add up over ranks.

        n, accuracy (completely right), reward (totals); n_calls, tool_calls: number of tool calls
        and how many of them are right; answers: how many of the others are.
        """
        outcomes = [self.score(*pair) for pair in zip(texts, examples, strict=True)]
        right = [outcome.right for outcome in outcomes]
        calls = [example.kind == "tool_call" for example in examples]
        return {
            "n": len(examples),
            "accuracy": sum(right),
            "reward": sum(outcome.total for outcome in outcomes),
            "n_calls": sum(calls),
            "tool_calls": sum(r for r, call in zip(right, calls) if call),
            "answers": sum(r for r, call in zip(right, calls) if not call),
        }

    def try_on(self, examples: list) -> str:
        """Score the expert responses of some examples; one line on what they earn.

        So that a mistake in a user's file is found before a model is loaded.
        """
        sums = self.tally([example.target for example in examples], examples)
        return (
            f"{self.file}: the expert responses of {sums['n']} examples earn "
            f"{sums['reward'] / sums['n']:.3g} on average; {sums['accuracy']} earn the maximum, "
            f"{self.maximum:g}"
        )

    def _line(self, error: BaseException) -> str:
        """The last line of the user's file that an error went through."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == self.file]
        return f"{self.file} line {lines[-1]}" if lines else self.file


def score(method, group, reward: Reward) -> None:
    """Fill a group's outcomes (Eqs. 3-12) and the rewards its advantages are made of.

    method, group  a Rollouts and a Group of methods.py
    """
    group.bounds = reward.minimum, reward.maximum
    group.outcomes = [reward.score(sample.text, group.example) for sample in group.samples]
    if group.with_expert:
        group.expert_outcome = reward.score(group.example.target, group.example)
    group.rewards = [
        method.reward(outcome, len(sample.token_ids), group.max_length)
        for outcome, sample in zip(group.outcomes, group.samples)
    ]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
