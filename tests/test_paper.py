"""bench/paper.py: the paper's numbers, what a driver does next, tables and pictures, and a drive that is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import pytest

REPO = Path(__file__).resolve().parent.parent
PAPER = REPO.parent / "shared/papers/toolupt.txt"
sys.path.append(str(REPO / "bench"))

import paper
import paper_toolupt as toolupt

from methods import METHODS

# ------------------------------------------------------------------------------ the paper's numbers


def test_the_numbers_are_those_of_the_paper():
    """Tables 1 to 7 as the paper's text prints them, cell by cell."""
    if not PAPER.exists():
        pytest.skip("../shared/papers/toolupt.txt is not there (optional data)")
    text = PAPER.read_text(encoding="utf-8").replace("<u>", "").replace("</u>", "")
    lines = [line.split("\t") for line in text.splitlines() if "\t" in line]
    printed = [cells for cells in lines if cells[0] in {name for name, _ in toolupt.ROWS.values()}]
    assert [cells[0] for cells in printed] == [name for name, _ in toolupt.ROWS.values()] * 5
    numbers = [[float(cell) for cell in cells[1:]] for cells in printed]
    for i, run in enumerate(toolupt.ROWS):
        per_model = [toolupt.PAPER[model][run] for model in toolupt.PAPER]
        overalls = [columns["overall_paper"] for columns in per_model]
        assert numbers[i] == [*overalls, toolupt.AVERAGES[run]], run
        for table, columns in enumerate(per_model, 1):
            assert numbers[12 * table + i] == list(columns.values()), (run, table)
    sizes = [line for line in lines if line[0].startswith(("Original", "Sampled", "Processed"))]
    for place, line in enumerate(sizes, 1):
        own = [int(cell.replace(",", "")) for cell in line[1:]]
        assert own == [size[place] for size in toolupt.SIZES.values()]
    said = [f"+{gap:.2f}" for gap in (*toolupt.FAMILIES.values(), *toolupt.FGAE.values())]
    assert re.findall(r"\+\d+\.\d\d", text)[:6] == said
    for _, drop in toolupt.ABLATIONS.values():
        assert f"from 54.92% to {drop}%" in text
    for name, *values in toolupt.SETTINGS.values():
        [line] = [line for line in lines if line[0].startswith(name)]
        for value, cell in zip(values, line[1:]):
            plain = re.sub(
                r"(\d+)×10\^\{(-\d+)\}", r"\1e\2", cell.replace("$", "").replace(",", "")
            )
            word = plain.split()[0]
            assert value == (None if word == "-" else float(word) if word[0].isdigit() else word)


def test_where_the_paper_contradicts_itself():
    """The docstring of paper_toolupt.py lists all rows that disagree with their columns."""
    wrong = {}
    for model, runs in toolupt.PAPER.items():
        for run, c in runs.items():
            overall = (c["non_live"] + c["live"] + c["irrelevance"] + 3 * c["multi_turn"]) / 6
            if abs(overall - c["overall_paper"]) > 0.0101:
                wrong[model, run] = round(overall, 2)
    assert wrong == {
        ("Qwen2.5-7B-Instruct", "sft"): 44.63,
        ("Qwen2.5-7B-Instruct", "grpo"): 40.82,
        ("Qwen2.5-14B-Instruct", "sft"): 44.77,
    }
    for run, printed in toolupt.AVERAGES.items():
        own = [runs[run]["overall_paper"] for runs in toolupt.PAPER.values()]
        assert mean(own) == pytest.approx(printed, abs=0.0051), run
    ours = {
        m: {r: c["overall_paper"] for r, c in runs.items()} for m, runs in toolupt.PAPER.items()
    }
    ours["Qwen2.5-14B-Instruct"]["sft"] = 44.77
    again = toolupt.averages(ours)
    assert round(again["sft"], 2) == 42.14 and round(again["toolupt"] - again["sft"], 1) == 10.0


def test_section_51_follows_from_table_1():
    """By the definition that is coded, the printed averages give all six printed differences."""
    printed = [*toolupt.FAMILIES.values(), *toolupt.FGAE.values()]
    assert list(toolupt.differences(toolupt.AVERAGES).values()) == pytest.approx(
        printed, abs=0.0051
    )
    assert toolupt.differences({"toolupt": 1.0, "sft": 3.0}) == {"ToolUPT - best of SFT": -2.0}


def test_every_method_has_a_run():
    assert set(toolupt.RUNS) == {"zero_shot", *METHODS} - {"dr_grpo"}


# --------------------------------------------------------------------------------------- the driver


def plan_of(tmp_path, *words):
    return paper.Plan(paper.parse_args([*words, "--out", str(tmp_path)]))


def ends(plan, job, error=None):
    """What a job leaves, without running it."""
    if not error and job.key[2] is None:
        for name in ("checkpoint-9", "checkpoint-10", "checkpoint-10-state"):
            folder = job.log.parent / name
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({int(bool(error))})"])
    process.wait()
    process.seconds, process.error = lambda: 5.0, lambda: error
    plan.note(job, process)


def test_what_is_due_after_every_end(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    words = ["figure4", "table1", "--toy", "--only", "zero_shot", "toolupt", "dapo"]
    plan = plan_of(tmp_path, *words)
    keys = lambda: [job.key[1:] for job in plan.due()]
    assert keys() == [
        ("toolupt", None),
        ("zero_shot", "base"),
        ("dapo", None),
    ]  # once in two objects
    ends(plan, plan.due()[2], "ValueError: no group")
    assert keys() == [("toolupt", None), ("zero_shot", "base"), ("dapo", None)]  # tried again
    training = plan.due()[0]
    assert training.argv[-4:-2] == ["--output_dir", str(tmp_path / "toy_model/toolupt")]
    assert training.argv[-1] == "latest"
    ends(plan, training)
    assert not list(tmp_path.rglob("*-state"))
    assert keys() == [("toolupt", "last"), ("zero_shot", "base"), ("dapo", None)]
    evaluation = plan.due()[0]
    assert evaluation.argv[1] == str(tmp_path / "toy_model/toolupt/checkpoint-10")
    assert "--file" in evaluation.argv
    ends(plan, evaluation)
    plan = plan_of(tmp_path, *words)  # another start reads the record
    assert keys() == [("zero_shot", "base"), ("dapo", None)]
    ends(plan, plan.due()[1])
    assert plan.done["toy_model", "dapo", None]["seconds"] == 10.0  # of both starts


def test_a_run_of_other_flags_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    plan = plan_of(tmp_path, "figure4", "--toy")
    ends(plan, plan.due()[0])
    other = tmp_path / "other.args"
    other.write_text("@recipes/paper-toy.args\n--seed 1\n")
    with pytest.raises(SystemExit, match="run toolupt with other flags.*another --out"):
        plan_of(tmp_path, "figure4", "--toy", f"@{other}")


def test_mistakes_end_the_program(tmp_path, capsys):
    for words, said in (
        (["table9000"], "unknown object table9000"),
        (["figure4", "--only", "sft"], "--only sft: choose among toolupt"),
    ):
        with pytest.raises(SystemExit):
            plan_of(tmp_path, *words)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("Traceback\n  File x\nRuntimeError: no room\nlast words\n", "RuntimeError: no room"),
        ("bar 1%\rbar 2%\nerror: raise --learning_rate\n\n", "error: raise --learning_rate"),
        ("rank 1: torch.OutOfMemoryError: full\n", "rank 1: torch.OutOfMemoryError: full"),
        ("train.py: error: unknown flag\n", "train.py: error: unknown flag"),
        ("Killed\n", "Killed"),
        ("", "exit code 3"),
    ],
)
def test_the_error_of_a_log(tmp_path, log, found):
    (tmp_path / "log.txt").write_text("ValueError: of the start before\n")
    code = f"import sys; sys.stdout.write({log!r}); sys.exit(3)"
    process = paper.Process(["-c", code], tmp_path / "log.txt", 1)
    process.wait()
    assert process.error() == found


def test_the_model_that_a_run_leaves(tmp_path):
    assert paper.last(tmp_path) == {}
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-20-state"):
        (tmp_path / name).mkdir()
        if "state" not in name:
            (tmp_path / name / "config.json").write_text("{}")
    assert paper.last(tmp_path) == {"last": tmp_path / "checkpoint-10"}
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best/config.json").write_text("{}")
    assert paper.last(tmp_path) == {"last": tmp_path / "checkpoint-best"}


# ----------------------------------------------------------------------------- tables and pictures


def rows(models, runs, value):
    """A row per model and run whose columns are all value(model, run); None: it has failed."""
    names = (*toolupt.COLUMNS, *toolupt.TOY_COLUMNS)
    found = []
    for model in models:
        for run in runs:
            score = value(model, run)
            row = {"model": model, "run": run, "checkpoint": "last", "scores": None}
            row |= {"error": "error: x"} if score is None else {"error": None}
            found.append(row | ({} if score is None else {"scores": dict.fromkeys(names, score)}))
    return found


def line_of(text, name):
    [line] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_table_1_has_averages_of_complete_rows_and_differences(tmp_path):
    models, runs = list(toolupt.PAPER)[:2], list(toolupt.ROWS)
    score = lambda model, run: (
        None if (model, run) == (models[1], "dapo") else 10.0 + runs.index(run)
    )
    found = rows(models, runs, score)
    text = toolupt.table1(found, paper.Work((), False, tmp_path / "a.png"))
    assert line_of(text, "SFT") == [
        "11.00 (26.84)",
        "11.00 (44.59)",
        "– (47.77)",
        "– (52.35)",
        "11.00 (42.89)",
    ]
    assert line_of(text, "DAPO")[-1] == "– (40.15)"  # one model lacks it
    assert line_of(text, "ToolUPT - best of SFT") == ["+10.00 (+9.25)"]
    assert line_of(text, "ToolUPT - best of Pure RL") == ["– (+8.43)"]
    assert line_of(text, "FG-DAPO* - DAPO*") == ["+1.00 (+4.11)"]
    assert "Qwen2.5-7B-Instruct/dapo/last: **failed**: `error: x`" in paper.failures(found)
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_tables_2_to_5_and_figure_4(tmp_path):
    work = paper.Work((), False, tmp_path / "a.png")
    model = "Qwen2.5-32B-Instruct"
    text = paper_object("table5").show(rows([model], toolupt.ROWS, lambda *_: 1.0), work)
    assert line_of(text, "ToolUPT")[3] == "1.00 (40.88)" and f"Table 5: {model}" in text
    other = paper_object("table5").show(rows(["mine"], toolupt.ROWS, lambda *_: 1.0), work)
    assert "(40.88)" not in other  # the paper's numbers of one model beside those of another
    text = paper_object("figure4").show(
        rows([model], ["toolupt", *toolupt.ABLATIONS], lambda *_: 2.0), work
    )
    assert line_of(text, "SPO") == ["2.00 (54.92)", "2.00 (53.52)"]


def paper_object(name):
    return paper.objects()[name]


def test_table_7_agrees_with_the_paper(monkeypatch):
    """With the paper's recipe every setting is the paper's."""
    monkeypatch.chdir(REPO)
    text = toolupt.table7([], paper.Work(("recipes/qwen2.5-7b.args",), False, Path("none")))
    cells = re.findall(r"([^|]+) \(([^|)]+)\)", text.partition("| --- |")[2])
    assert len(cells) == 15 and all(ours.strip() == paper for ours, paper in cells)


# -------------------------------------------------------------------------------- a drive, and a kill


@pytest.mark.long
def test_a_drive_is_killed_and_goes_on_past_a_row_that_fails(tmp_path):
    """Three rows of Table 1 on the toy world. The one with an SFT stage diverges and is named."""
    recipe, out = tmp_path / "three.args", tmp_path / "out"
    recipe.write_text("@recipes/paper-toy.args\n--sft_learning_rate 1e38\n--save_steps 2\n")
    command = [sys.executable, "bench/paper.py", "table1", f"@{recipe}", "--toy", "--out", str(out)]
    command += ["--only", "zero_shot", "sft_dapo_star", "toolupt", "--jobs", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.DEVNULL)
    run = out / "toy_model/toolupt"
    for _ in range(1200):
        if (run / "checkpoint-2-state").exists():
            break
        assert driver.poll() is None, "the driver ended before it was killed"
        time.sleep(1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    record = lambda: [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    before = record()
    assert {tuple(row["key"][1:]) for row in before} == {
        ("zero_shot", "base"),
        ("sft_dapo_star", None),
    }
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # a row has failed, in both drives
    after = record()[len(before) :]
    ended = {tuple(row["key"][1:]): row["error"] for row in after}
    assert set(ended) == {("sft_dapo_star", None), ("toolupt", None), ("toolupt", "last")}
    assert ended["sft_dapo_star", None].startswith("error: ")
    steps = [
        json.loads(line).get("step") for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps[1:] == list(range(11))  # no step twice, none lost
    assert (
        len(re.findall("right on 64 held-out", (run / "log.txt").read_text())) == 1
    )  # it was resumed
    text = (out / "table1.md").read_text()
    assert f"sft_dapo_star: **failed**: `{ended['sft_dapo_star', None]}`" in text
    assert "toy_model/sft: not finished" in text and (out / "table1.png").exists()
    ours = {name: line_of(text, name)[4] for name in ("Zero Shot", "SFT", "SFT+DAPO*", "ToolUPT")}
    assert ours["SFT"] == ours["SFT+DAPO*"] == "–"
    for run, name in (("zero_shot", "Zero Shot"), ("toolupt", "ToolUPT")):
        [results] = (out / "toy_model" / run).glob("eval-*/results.jsonl")
        right = [json.loads(line)["correct"] for line in results.read_text().splitlines()]
        assert len(right) == 200 and float(ours[name]) == pytest.approx(
            mean(right) * 100, abs=0.006
        )
