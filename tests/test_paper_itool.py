"""iTool's objects of bench/paper.py: the printed numbers, what is run and evaluated, the tables from made-up results."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_whole_runs import REPO, launch, rows_of

sys.path.append(str(REPO / "bench"))

import paper
import paper_itool
from paper_itool import BASES, CELLS, COLUMNS, DATA, OBJECTS, TOY_COLUMNS

import train

PRINTED = {  # name -> overall, Non-live, Live, Multi-turn, Rel, Irrel
    " ".join(line.split()[1:-5]): [*map(float, [line.split()[0], *line.split()[-5:]])]
    for line in paper_itool.LEADERBOARD.strip().splitlines()
}
ODD = {"iTool-8B (FC)", "GPT-4-turbo-2024-04-09 (FC)"}
ODD |= {f"{name} (Prompt)" for name in ("Qwen2.5-1.5B-Instruct", "Llama-3.2-3B-Instruct")}


# ---- the paper's numbers ----


def test_a_printed_overall_is_the_mean_of_three_columns_but_for_those_named():
    off = {
        name for name, (all_, *three, _, _) in PRINTED.items() if abs(sum(three) / 3 - all_) > 0.011
    }
    assert len(PRINTED) == 27 and off == ODD
    for values, (overall, mean) in {
        BASES["Llama-3.1-8B-Instruct"][2]: (63.26, 63.65),
        BASES["Llama-3.2-3B-Instruct"][2]: (62.93, 60.95),
        BASES["Qwen2.5-7B-Instruct"][2]: (63.93, 65.32),
    }.items():
        assert values[0] == overall and sum(values[1:4]) / 3 == pytest.approx(mean, abs=0.006)


def test_the_tables_agree_with_each_other_and_with_the_text():
    base, sft, itool = (row for row in BASES["Llama-3.1-8B-Instruct"])
    assert [*itool] == PRINTED["iTool-8B (FC)"] and [*sft] == PRINTED["ToolACE-8B (FC)"]
    for model, rows in BASES.items():
        assert [*rows[0]] == PRINTED[f"{model} (Prompt)"]
    three = [*paper_itool.ABLATION.values()]
    assert (three[0], three[1], three[4]) == (base[1:4], sft[1:4], itool[1:4])
    mean = lambda row: (row[2] + row[3]) / 2
    assert DATA["ToolACE"]["Llama-3.1-8B-Instruct"] == pytest.approx(
        (mean(sft), mean(itool)), abs=0.01
    )
    assert itool[0] - base[0] == pytest.approx(13.11)
    assert itool[0] - PRINTED["xLAM-8x22b-r (FC)"][0] == pytest.approx(5.27)
    turns = [row[2] for row in three]
    gaps = [turns[3] - turns[1], turns[4] - turns[3], turns[4] - turns[1], turns[4] - turns[0]]
    assert [round(gap, 1) for gap in gaps] == [2.3, 4.2, 6.5, 12.5]


def test_the_grid_is_table_9_s():
    """Three values of DPO's, IPO's and ORPO's scale, two times three of SimPO's, each at three rates."""
    assert {loss: len(cells) for loss, cells in CELLS.items()} == {
        "simpo": 18,
        "dpo": 9,
        "ipo": 9,
        "orpo": 9,
    }
    assert all(paper_itool.BEST[loss] in cells for loss, cells in CELLS.items())
    assert len(OBJECTS["itool-table9"].runs) == 45
    for run in OBJECTS["itool-figure10"].runs:  # the best settings are the defaults of train.py
        config, method = train.parse_args([*run.flags, "--stages", "itool"])
        assert config == train.parse_args(["--algo", "itool", "--preference", method.preference])[0]
        same = train.parse_args(
            ["--algo", "itool", "--preference", method.preference, "--stages", "itool"]
        )[1]
        assert method == same


# ---- what is run ----


def test_the_flags_of_every_run_are_accepted():
    wanted = {}
    for thing in OBJECTS.values():
        for run in filter(lambda run: run.flags, thing.runs):
            wanted |= {(thing.toy, run.name): (*run.flags, *run.toy)} if run.toy is not None else {}
            wanted |= {(recipe, run.name): run.flags for recipe in thing.recipes[-1:]}
    assert len(wanted) > 70
    for (recipe, name), flags in wanted.items():
        _, method = train.parse_args([f"@{REPO / recipe}", *flags])
        alone = name in ("base_sft_irl", "no_mcts", "iterations") or name.split("_")[0] in CELLS
        first = "warmup" if name.startswith("base_sft") else "both"
        assert method.stages == ("itool" if alone else first), name


def plan_of(tmp_path, *names) -> paper.Plan:
    return paper.Plan(paper.parse_args([*names, "--toy", "--out", str(tmp_path)]))


def test_a_run_waits_for_the_one_that_it_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    plan = plan_of(tmp_path, "itool-figure6")
    names = lambda: [job.key[1:] for job in plan.due()]
    assert names() == [("itool", None)]
    plan.done["toy_model", "itool", None] = {"error": "out of memory"}
    assert names() == [("itool", None)]
    plan.done["toy_model", "itool", None] = {"error": None}
    assert names() == [("itool", "best"), ("no_mcts", None)]
    [_, job] = plan.due()
    start = job.argv[job.argv.index("--model_name_or_path") + 1]
    assert start == str(tmp_path / "toy_model/itool/warmup/checkpoint-best")


def test_objects_share_a_run_and_evaluate_their_own_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    plan = plan_of(tmp_path, "itool-table1", "itool-table3", "itool-figure5", "itool-table9")
    assert "ipo_0.1_1e-6" in {name for _, name in plan.runs}
    assert "ipo_0.1_5e-7" not in {name for _, name in plan.runs}  # not with --toy
    fake_records(tmp_path / "toy_model/itool")
    plan.done["toy_model", "itool", None] = {"error": None}
    due = {job.key[2] for job in plan.due() if job.key[1] == "itool"}
    assert due == {"warm-up", "best", "easy", "hard"}
    labels = lambda name: [row["checkpoint"] for row in plan.rows(name) if row["run"] == "itool"]
    assert labels("itool-table1") == ["best"] and labels("itool-table3") == ["warm-up", "best"]


# ---- checkpoints ----


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_records(run: Path) -> None:
    """A warm-up without medium examples, then three iterations, the second without a pair."""
    steps = [{"step": 0}, *({"step": k, "stage": 1 if k < 4 else 3} for k in range(1, 8))]
    write(run / "warmup/metrics.jsonl", [{"algo": "itool"}, *steps])
    steps = [{"step": 0, "eval/accuracy": 0.5}]
    steps += [
        {"step": k, "iteration": 1 if k < 3 else 3, "eval/accuracy": k / 10} for k in range(1, 6)
    ]
    write(run / "metrics.jsonl", [{"algo": "itool"}, *steps])
    searches = [
        {"iteration": k, "diversity/distinct_1": 0.5 / k, "diversity/distinct_calls": 0.25}
        for k in (1, 2, 3)
    ]
    write(run / "searches.jsonl", searches)
    parts = {
        "warmup": {"update": 1.5, "total": 1.5},
        "itool": {"search": 2.0, "update": 1.0, "total": 3.0},
    }
    (run / "hours.json").write_text(json.dumps(parts))


def test_the_ends_of_stages_and_iterations(tmp_path):
    run = tmp_path / "iterations"
    fake_records(run)
    assert paper_itool.stages(run) == {
        "easy": run / "warmup/checkpoint-3",
        "hard": run / "warmup/checkpoint-7",
    }
    assert paper_itool.iterations(run) == {
        "0": tmp_path / "itool/warmup/checkpoint-best",
        "1": run / "checkpoint-2",
        "2": run / "checkpoint-2",
        "3": run / "checkpoint-5",
    }


# ---- tables and pictures ----


def made_up(name: str, tmp_path: Path, toy: bool) -> tuple[list[dict], paper.Work, dict]:
    """Rows of an object with a score of its own in every cell, as the driver passes them; and the scores."""
    models = ["toy_model"] if toy else ["Llama-3.1-8B-Instruct", "Llama-3.2-3B-Instruct"]
    thing, rows, scores = OBJECTS[name], [], {}
    columns = TOY_COLUMNS.values() if toy else [*COLUMNS.values(), "live_multi_turn"]
    for model in models:
        for run in thing.runs:
            folder = tmp_path / model / run.name
            fake_records(folder)
            labels = ["base"] if run.flags is None else run.checkpoints(folder)
            for label in labels if not (toy and run.toy is None) else ():
                own = {
                    column: 20 + 0.01 * (len(scores) * 10 + k) for k, column in enumerate(columns)
                }
                scores[model, run.name, label] = own
                row = {"model": model, "run": run.name, "checkpoint": label, "scores": own}
                out = folder / f"eval-{label}"
                kinds = ["tool_call"] if toy else ["live_simple", "multiple"]
                cases = [{"category": k, "correct": False, "error_class": "Other"} for k in kinds]
                write(out / "results.jsonl", cases)
                rows.append(
                    row | {"error": None, "seconds": 9.0, "folder": folder, "evaluation": out}
                )
    return rows, paper.Work(("r",), toy, tmp_path / f"{name}.png"), scores


@pytest.mark.parametrize("toy", [False, True], ids=["paper", "toy"])
@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_shows_what_it_is_given(name, toy, tmp_path):
    """Each measured score is in the tables (or is what a gain starts from), and a picture is drawn."""
    rows, work, scores = made_up(name, tmp_path, toy)
    text = OBJECTS[name].show(rows, work)
    assert work.picture.read_bytes().startswith(b"\x89PNG")
    shown = Counter(re.findall(r"(?<![(\d.])\d+\.\d\d(?=[ |])", text))
    if name in ("itool-figure3", "itool-diversity"):
        assert "| 1 |" in text if name == "itool-figure3" else "| 0.500 | 0.250 | 0.167 |" in text
    elif name in ("itool-figure1b", "itool-figure8", "itool-figure9"):
        column = next(iter(TOY_COLUMNS if toy else {"Live": 0}))
        key = "accuracy" if toy else "live_v3"
        if name == "itool-figure9" and toy:
            column, key = "Calls", "tool_call"
        part = text.split(f"gain, {column} ")[1].split("\n\n")[0]
        for model in {row["model"] for row in rows}:
            before = scores[model, "zero_shot", "base"][key]
            for share in ("_0.3", ""):
                gain = scores[model, f"base_sft{share}", "best"][key] - before
                assert f" {gain:.2f} |" in part.split(f"{model}, SFT |")[1].split("\n")[0]
    else:
        own = "accuracy" if toy else ("live_multi_turn" if name == "itool-table5" else "live_v3")
        own = "tool_call" if toy and name == "itool-table8" else own
        for score in scores.values():
            assert shown[f"{score[own]:.2f}"] >= 1
    printed = name in {f"itool-table{k}" for k in (1, 3, 4, 5, 8)} and not toy
    assert bool(re.search(r"\(\+?\d+\.\d\d\)", text)) == printed


def test_cells_of_tables_1_3_5_and_8(tmp_path):
    """Ours in the right row and column, the paper's in brackets, differences between the right rows."""
    texts, found = {}, {}
    for k in (1, 3, 5, 8):
        rows, work, found[k] = made_up(f"itool-table{k}", tmp_path / str(k), False)
        texts[k] = OBJECTS[f"itool-table{k}"].show(rows, work)
    llama = lambda k, run, label="best": found[k]["Llama-3.1-8B-Instruct", run, label]
    ours = llama(1, "itool")["overall_v3"]
    assert f"| iTool-8B (FC) | {ours:.2f} (63.26) |" in texts[1]
    assert "| GPT-4o-2024-08-06 (FC) | – (62.19) |" in texts[1]
    assert f"the paper's | {ours - 57.99:+.2f} (+5.27) |" in texts[1]
    warm, itool = (llama(3, "itool", label) for label in ("warm-up", "best"))
    cells = " | ".join(
        f"{warm[column]:.2f} ({value})"
        for column, value in zip(("non_live_v3", "live_v3", "multi_turn"), (88.35, 75.84, 19.65))
    )
    assert f"| + warm-up SFT | {cells} |" in texts[3]
    gap = itool["multi_turn"] - warm["multi_turn"]
    assert f"| iTool - warm-up | {gap:+.2f} (+4.20) |" in texts[3]
    pair = [llama(5, run)["live_multi_turn"] for run in ("base_sft_xLAM", "itool_xLAM")]
    line = f"| xLAM | {pair[0]:.2f} (42.74) | {pair[1]:.2f} (48.47) | {pair[1] - pair[0]:+.2f} (+5.73) |"
    assert line in texts[5]
    assert f"| iTool | {llama(8, 'itool')['live_v3']:.2f} (78.29) |" in texts[8]
    assert "| 4.50 (28.00) | warm-up 1.50, search 2.00, preference update 1.00 |" in texts[8]
    assert "| Base Model |" in texts[8] and "| 0.00 (0.00) |" in texts[8]


def test_table_9_chooses_on_held_out_examples(tmp_path):
    """Among DPO's settings that with the highest accuracy in its metrics, whatever BFCL says."""
    rows, work, scores = made_up("itool-table9", tmp_path, False)
    chosen = next(row for row in rows if row["run"] == "dpo_0.05_5e-7")
    steps = rows_of(chosen["folder"] / "metrics.jsonl")
    write(chosen["folder"] / "metrics.jsonl", [*steps, {"step": 6, "eval/accuracy": 0.9}])
    text = OBJECTS["itool-table9"].show(rows, work)
    own = scores[chosen["model"], chosen["run"], "best"]["overall_v3"]
    head = "| dpo, dpo_beta 0.05, learning_rate 5e-7 (paper: dpo_beta 0.1, learning_rate 3e-7) |"
    assert f"{head} {own:.2f} |" in text
    assert "| dpo, dpo_beta 0.05, learning_rate 5e-7, 90.0 |" in text


def test_a_run_that_is_missing_leaves_a_dash(tmp_path):
    rows, work, _ = made_up("itool-table3", tmp_path, False)
    rows = [row for row in rows if row["run"] != "base_sft"]
    assert "| + base SFT | – (88.94) |" in OBJECTS["itool-table3"].show(rows, work)
    none = [row | {"scores": None, "checkpoint": None, "error": "x"} for row in rows]
    for name in ("itool-table1", "itool-table3", "itool-table8"):
        OBJECTS[name].show(none, work)


@pytest.mark.long
def test_figure_5_of_the_toy_world(tmp_path):
    """From the command to the picture: the warm-up's stages are kept, evaluated and tabulated."""
    (tmp_path / "short.args").write_text(
        "@recipes/paper-itool-toy.args\n--train_fraction 0.08 --iterations 1\n"
    )
    command = [
        "bench/paper.py",
        "itool-figure5",
        f"@{tmp_path}/short.args",
        "--toy",
        "--out",
        tmp_path,
    ]
    done = launch(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (tmp_path / "itool-figure5.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["base", "easy", "medium", "hard"]
    warmup = rows_of(tmp_path / "toy_model/itool/warmup/metrics.jsonl")
    for stage, line in zip((1, 2, 3), lines[3:6]):
        step = [row["step"] for row in warmup if row.get("stage") == stage][-1]
        folder = tmp_path / "toy_model/itool"
        assert (folder / f"warmup/checkpoint-{step}/config.json").exists()
        label = line.split("|")[1].strip()
        results = rows_of(folder / f"eval-{label}/results.jsonl")
        right = 100 * sum(row["correct"] for row in results) / len(results)
        assert float(line.split("|")[2]) == pytest.approx(right, abs=0.005)
    assert float(lines[5].split("|")[2]) > float(lines[2].split("|")[2])
    assert (tmp_path / "itool-figure5.png").stat().st_size > 5000
    logs = [path.stat().st_size for path in tmp_path.rglob("log.txt")]
    assert launch(*command).returncode == 0  # everything is there: nothing runs
    assert logs == [path.stat().st_size for path in tmp_path.rglob("log.txt")]
