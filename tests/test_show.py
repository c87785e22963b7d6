"""tools/show.py: the page of a run against the run's files, and what could break or steer it."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import frozen
import pytest
from frozen import TOY, K, one_rank  # noqa: F401 - a fixture
from transformers import AutoTokenizer

import rewards
import train
from tools import audit, show

REPO = Path(__file__).resolve().parent.parent
EVIL = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\x1b[2J\x07", "<!--"]
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a run of two frozen steps."""
    folder = tmp_path_factory.mktemp("finished")
    tiny = frozen.tiny_model(folder / "tiny")
    frozen.one_step(*train.parse_args([*frozen.flags(tiny, folder), "--max_steps", "2"]))
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "out")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rollout_row(step, texts, **more):
    """A line of rollouts.jsonl, whose tokens are its texts."""
    n = len(texts)
    row = {"step": step, "id": "x", "k": 0, "kind": "answer", "target": "<answer>\nNo.\n</answer>"}
    row |= {"text": "".join(texts), "token_ids": [*range(n)], "finish_reason": "stop"}
    row |= {"outcome": {"format": 1.0, "total": 4.0}, "reward": 4.0, "token_rewards": None}
    row |= {name: [-0.5] * n for name in ("advantages", "logps", "sampler_logps")}
    return row | more


class Page(HTMLParser):
    """The elements of a page and its data; what would load something is an error."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.title, self.open = [], [], "", []
        self.markup = path.read_text()
        self.feed(self.markup)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        names = {name for name, _ in attributes}
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert not names & {"src", "href", "style", "srcdoc"}, attributes
        assert not any(name.startswith("on") for name in names), attributes
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        if self.open[-1:] == ["title"]:
            self.title += data


def page_of(out, tokenizer=None):
    return Page(show.report(out, tokenizer))


def test_the_page_needs_nothing_else(out):
    page = page_of(out)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert len(page.scripts) == 2
    own = page.markup.replace(page.scripts[0], "")
    for word in ("http:", "https:", "url(", "@import", "fetch(", "innerHTML", "eval("):
        assert word not in own, word


def test_the_curves_have_the_numbers_of_metrics(out):
    rows = lines_of(out / "metrics.jsonl")
    rows[2]["entropy"] = None
    write_lines(out / "metrics.jsonl", rows)
    data = page_of(out).data
    assert data["x"] == [0, 1, 2] and data["marks"] == []
    names = {name for row in rows[1:] for name in row} - {"step"}
    assert data["metrics"] == {name: [row.get(name) for row in rows[1:]] for name in names}
    shown = [s["metric"] for panel in data["panels"] + data["others"] for s in panel["series"]]
    assert sorted(shown) == sorted(names)  # each in one plot
    [settings] = data["settings"]
    assert settings["values"]["algo"] == "toolupt" and settings["values"].keys() == rows[0].keys()


def test_the_metrics_of_the_plots_are_documented():
    documented = (REPO / "docs/running.md").read_text()
    for _, _, names in show.PANELS:
        for name in names:
            first, _, last = name.rpartition("/")
            assert f"`{name}`" in documented or f"`{first}/" in documented, name
            assert f"{last}`" in documented, name


def test_responses_have_the_numbers_of_rollouts(out):
    audit.main([str(out)])  # the files themselves are right
    data, rows = page_of(out).data, lines_of(out / "rollouts.jsonl")
    [samples] = data["samples"]
    assert "32 of 32 responses" in samples["note"]
    shown = [(g, r) for g in samples["groups"] for r in g["responses"]]
    assert len(shown) == len(rows) == 2 * 4 * K
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    for (group, response), row in zip(shown, rows):
        assert group["name"] == f"step {row['step']}, {row['id']}"
        assert group["target"] == row["target"]
        assert response["ids"] == row["token_ids"]
        for mine, name in (("logps", "logps"), ("sampled", "sampler_logps")):
            assert response[mine] == row[name]
        assert response["advantages"] == row["advantages"]
        assert response["rewards"] == row["token_rewards"]
        text = tokenizer.decode(row["token_ids"])
        if "\ufffd" not in text:
            assert "".join(response["pieces"]) == show.visible(text)


def test_a_character_of_several_tokens_stands_with_its_last():
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    text = "Größe 日本😀 x"
    ids = tokenizer(text)["input_ids"]
    pieces = show.pieces(tokenizer, ids)
    assert len(pieces) == len(ids) > len(text) and "".join(pieces) == text
    assert [piece for piece in pieces if piece] == [*text]


def test_errors_are_those_of_a_slow_count(out):
    rows, found = lines_of(out / "rollouts.jsonl"), page_of(out).data["errors"]
    assert found["x"] == [1, 2] and "32 of 32 rollouts" in found["note"]
    for step, counts in zip(found["x"], found["counts"]):
        slow = {}
        for row in rows:
            if row["step"] == step:
                right = row["outcome"]["total"] == 4
                error = rewards.error_type(row["text"], row["target"])
                name = "right" if right else error or "reward only"
                slow[name] = slow.get(name, 0) + 1
        assert {k: n for k, n in zip(found["classes"], counts) if n} == slow
        assert len(slow) > 2


def test_what_a_model_or_a_user_writes_is_no_markup(tmp_path):
    """In responses, targets, ids, settings, metric names and the name of the folder."""
    out = tmp_path / EVIL[1]
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(EVIL[i] for i in ids))
    row = rollout_row(1, EVIL, id=EVIL[0], target="".join(EVIL))
    row["logps"][1], row["advantages"][2] = math.nan, math.inf
    write_lines(out / "rollouts.jsonl", [row])
    write_lines(
        out / "metrics.jsonl",
        [{"algo": EVIL[3], "model_name_or_path": EVIL[0]}, {"step": 1, EVIL[0]: 1}],
    )
    page = page_of(out, tokenizer)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and "img" not in tags and "<" not in page.scripts[0]
    assert page.title.startswith(EVIL[1])  # as text
    [group] = page.data["samples"][0]["groups"]
    assert group["responses"][0]["pieces"] == [*EVIL[:2], "\\x1b[2J\\x07", EVIL[3]]
    assert group["responses"][0]["logps"][1] is None
    assert group["responses"][0]["advantages"][2] is None
    assert "\x1b" not in page.markup
    assert page.data["metrics"] == {EVIL[0]: [1]}
    terminal = show.coloured(row | {"id": "\x1b[2J"}, tokenizer)
    assert "\x1b[2J" not in terminal and "\x07" not in terminal


def test_without_a_tokenizer_texts_are_shown(tmp_path):
    config = {"algo": "grpo", "model_name_or_path": str(tmp_path / "gone")}
    write_lines(tmp_path / "metrics.jsonl", [config, {"step": 1, "reward": 0.5}])
    write_lines(tmp_path / "rollouts.jsonl", [rollout_row(1, ["<answer>", "No."])])
    [samples] = page_of(tmp_path).data["samples"]
    assert samples["groups"][0]["responses"][0]["text"] == "<answer>No."
    assert "tokenizer was not found" in samples["note"]
    for name in ("tokenizer.json", "tokenizer_config.json"):  # an older checkpoint's will do
        (tmp_path / "checkpoint-1").mkdir(exist_ok=True)
        shutil.copy(TOY / name, tmp_path / "checkpoint-1" / name)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/tokenizer_config.json").write_text("{")
    [samples] = page_of(tmp_path).data["samples"]
    assert "pieces" in samples["groups"][0]["responses"][0]


def test_a_run_that_goes_on_is_shown_up_to_its_last_whole_line(out):
    whole = page_of(out).data
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(out / name, "a", encoding="utf-8") as file:
            file.write('{"step": 3, "rewa')
    assert page_of(out).data == whole
    lines = (out / "rollouts.jsonl").read_text().splitlines(keepends=True)
    (out / "rollouts.jsonl").write_text("".join([*lines[:3], "{broken\n", *lines[4:]]))
    with pytest.raises(ValueError, match="line 4 of .*rollouts.jsonl is not JSON"):
        show.report(out)


def test_a_run_that_has_just_begun(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"algo": "grpo", "model_name_or_path": "m"}])
    (tmp_path / "rollouts.jsonl").write_text("")
    data = page_of(tmp_path).data
    assert data["x"] == [] and data["panels"] == [] and data["errors"] is None
    with pytest.raises(SystemExit, match="nowhere has no metrics.jsonl: give the --output_dir"):
        show.main(["nowhere"])


def test_stages_follow_each_other_on_one_axis(tmp_path):
    """SFT alone, then both stages: the second's step 0 follows the first's last, as for trackers."""
    sft = [{"algo": "sft_dapo_star", "max_steps": 3, "seed": 1, "model_name_or_path": "base"}]
    sft += [{"step": step, "loss": 1 / (step + 1), "eval/accuracy": 0.1} for step in range(3)]
    write_lines(tmp_path / "sft/metrics.jsonl", sft)
    data = page_of(tmp_path).data
    assert data["x"] == [0, 1, 2] and "no record of single responses" in data["note"]
    assert "step 2 of 3." in data["note"]
    rl = [sft[0] | {"max_steps": 9, "model_name_or_path": "sft/checkpoint-best"}]
    rl += [{"step": step, "reward": step, "eval/accuracy": 0.3} for step in range(2)]
    write_lines(tmp_path / "metrics.jsonl", rl)
    rows = [rollout_row(1, ["a"], id=name) for name in "ab"]
    write_lines(tmp_path / "rollouts.jsonl", rows)
    data = page_of(tmp_path).data
    assert data["x"] == [0, 1, 2, 3, 4] and data["errors"]["x"] == [4]
    assert [(m["x"], m["name"]) for m in data["marks"]] == [(0, "sft"), (3, "sft_dapo_star")]
    assert data["metrics"]["loss"] == [1, 1 / 2, 1 / 3, None, None]
    assert data["metrics"]["reward"] == [None, None, None, 0, 1]
    assert data["about"].startswith("base,")
    assert data["settings"][1]["values"] == {"max_steps": "3", "model_name_or_path": "base"}
    assert data["milestones"] == [["before", 0.1], ["sft", 0.3], ["after", 0.3]]


def test_the_iterations_of_itool(tmp_path):
    margin = "eval/rewards/margins"
    lines = [{"algo": "itool", "model_name_or_path": "m"}]
    lines += [{"step": s, "iteration": 1 + s // 3, "loss": 0.5} for s in range(1, 5)]
    lines[2] |= {"eval/accuracy": 0.25, margin: 2.5}
    write_lines(tmp_path / "metrics.jsonl", lines)
    counts = {"trees": 7, "expansions": 5, "ends": 4, "ends_correct": 3, "pairs": 2, "held_out": 1}
    searches = [
        {"iteration": 1, "step": 0, **counts, "dropped": {"gap": 6}, margin: 1.5},
        {"iteration": 2, "step": 2, **counts, "dropped": {"similarity": 8}},
    ]
    write_lines(tmp_path / "searches.jsonl", searches)
    pair = {"iteration": 2, "id": "x", "held_out": True, "prefix": "p", "target": "t"}
    pair |= {"chosen": EVIL[0], "rejected": "r", "chosen_Q": 0.5, "rejected_Q": -0.5}
    write_lines(tmp_path / "pairs.jsonl", [pair])
    data = page_of(tmp_path).data
    assert [(m["x"], m["name"]) for m in data["marks"]] == [
        (1, "iteration 1"),
        (3, "iteration 2"),
    ]
    table = [dict(zip(data["tables"][0]["columns"], row)) for row in data["tables"][0]["rows"]]
    assert [row["dropped: gap"] for row in table] == [6, 0]
    assert [row["margin before"] for row in table] == [1.5, "–"]
    assert [row["margin after"] for row in table] == [2.5, "–"]
    assert [row["accuracy after, %"] for row in table] == [25, "–"]
    [samples] = data["samples"]
    [group] = samples["groups"]
    assert group["name"] == "iteration 2, x, held out" and "1 of 1 pairs" in samples["note"]
    assert [r["text"] for r in group["responses"]] == ["p", EVIL[0], "r"]
    assert group["responses"][1]["head"] == "chosen step: value 0.5"


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """5,000 steps of 58 metrics and 4 responses, of 3,000 tokens where the page looks."""
    out = tmp_path_factory.mktemp("long")
    names = [f"{kind}/{i}" for i in range(12) for kind in ("a", "b", "c", "timing_s")]
    names += [name for _, _, own in show.PANELS[:4] for name in own]
    config = {"algo": "grpo", "model_name_or_path": str(TOY), "max_steps": 5000}
    value = lambda step, k: math.sin(step / 97 + k) / 3
    steps = [{"step": s, **{n: value(s, k) for k, n in enumerate(names)}} for s in range(5001)]
    write_lines(out / "metrics.jsonl", [config, *steps])
    tails = {}
    for n in (60, 3000):
        values = [round(value(t, 0), 6) for t in range(n)]
        row = rollout_row(0, ["t"] * n, advantages=values, logps=values, sampler_logps=values)
        tails[n] = json.dumps({k: v for k, v in row.items() if k != "step"})[1:] + "\n"
    looks = {1 + line // 4 for line in show._evenly(20_000, show.GROUPS)}
    with open(out / "rollouts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(
            4 * (f'{{"step": {step}, ' + tails[3000 if step in looks else 60])
            for step in range(1, 5001)
        )
    return out


def test_a_long_run_stays_below_20_mb_and_is_shown_evenly(long_run):
    page = page_of(long_run)
    size, data = (long_run / "report.html").stat().st_size, page.data
    assert show.SAMPLE_BYTES / 2 < size < 20e6, size
    assert data["x"] == [*range(5001)]  # every step
    [samples] = data["samples"]
    shown = [int(re.search(r"step (\d+)", group["name"])[1]) for group in samples["groups"]]
    assert shown[-1] == 5000 and len(shown) > 8
    gaps = [b - a for a, b in pairwise(shown)]
    assert max(gaps) - min(gaps) <= 2
    responses = [r for group in samples["groups"] for r in group["responses"]]
    assert f"{len(responses)} of 20,000 responses" in samples["note"]
    assert max(r["tokens"] for r in responses) == 3000
    assert max(len(r["pieces"]) for r in responses) == show.TOKENS
    assert sum(map(sum, data["errors"]["counts"])) == 20_000 and len(data["errors"]["x"]) == 40


def test_the_selection_of_a_longer_run_says_so(long_run, tmp_path, monkeypatch):
    monkeypatch.setattr(show, "POINTS", 500)
    monkeypatch.setattr(show, "EVALUATIONS", 50)
    monkeypatch.setattr(show, "READ", 1000)
    monkeypatch.setattr(show, "SAMPLE_BYTES", 1_000_000)
    rows = lines_of(long_run / "metrics.jsonl")
    for i, row in enumerate(rows[1:]):
        row.pop("eval/accuracy")
        row |= {"eval/accuracy": 0.5} if i % 113 == 7 else {}
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "rollouts.jsonl").symlink_to(long_run / "rollouts.jsonl")
    data = page_of(tmp_path).data
    assert len(data["x"]) <= 550 and data["x"][0] == 0 and data["x"][-1] == 5000
    assert {i for i in range(5001) if i % 113 == 7} <= {*data["x"]}
    assert f"Curves show {len(data['x'])} of 5,001 steps" in data["note"]
    assert "1,000 of 20,000 rollouts" in data["errors"]["note"]
    assert sum(map(sum, data["errors"]["counts"])) == 1000
    assert len(json.dumps(data["samples"])) < 1_100_000


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_the_page(out):
    """The script runs through: figures with their last values, tokens, settings, and no alert."""
    page = page_of(out)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={out}/browser", "--dump-dom", f"file://{out}/report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    drawn = done.stdout.split("<script")[0]
    assert drawn.count("<figure") == len(page.data["panels"]) + 1
    assert drawn.count("<path") >= len(page.data["panels"])
    last = page.data["metrics"]["accuracy"][-1]
    assert f"all {100 * last:.1f} %" in drawn
    assert drawn.count("rgba(var(--") > 20 and "max_completion_length" in drawn


def test_colours_follow_sign_and_size():
    tokenizer = SimpleNamespace(
        decode=lambda ids: "".join(["t0", "t1", "t2", "t3\n"][i] for i in ids)
    )
    row = rollout_row(1, ["t"] * 4, advantages=[2.0, 0.1, 0.0, -2.0], target="<answer>")
    paint = lambda shade, text: f"\033[30;48;5;{shade}m{text}\033[0m"
    body = show.coloured(row, tokenizer).split("\n", 1)[1]
    strong, weak, red = show.SHADES[1][-1], show.SHADES[1][0], show.SHADES[-1][-1]
    assert (
        body == f"{paint(strong, 't0')}{paint(weak, 't1')}t2{paint(red, 't3')}\n\nexpert: <answer>"
    )
    assert "t0" in show.coloured({**row, "advantages": [0.0, math.nan, 0, 0]}, tokenizer)


def test_the_last_lines_of_a_run(out):
    rows = lines_of(out / "metrics.jsonl")
    rows[1]["eval/accuracy"], rows[-1]["eval/accuracy"] = 0.25, 0.5
    write_lines(out / "metrics.jsonl", rows)
    text = show.summary(out, AutoTokenizer.from_pretrained(TOY))
    assert "before 25.0%, after 50.0%" in text and "hours        toolupt 0.0" in text
    for name in ("metrics.jsonl", "rollouts.jsonl", "report.html"):
        assert str(out / name) in text and (out / name).exists()
    assert "\033[30;48;5;" in text
    (out / "rollouts.jsonl").unlink()
    assert "rollout" not in show.summary(out, None)


def test_hours_add_up_what_the_records_say(tmp_path):
    """iTool's Table 8: a warm-up, then a search and a step of 30 minutes with an evaluation beside it."""
    warmup, last = tmp_path / "warmup", tmp_path
    warmup.mkdir()
    seconds = lambda **parts: {f"timing_s/{name}": value for name, value in parts.items()}
    lines = {
        warmup / "metrics.jsonl": [
            {"algo": "itool"},
            seconds(load=360, evaluate=720, step=400),
            seconds(update=3600, step=3700),
            seconds(update=1800, sync=36, evaluate=180, step=1836),
        ],
        last / "searches.jsonl": [seconds(perplexity=360, search=7200, step=7920)],
        last / "metrics.jsonl": [{"algo": "itool"}, seconds(update=1000, evaluate=720, step=1800)],
    }
    for path, rows in lines.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words, found = show.write_hours(tmp_path), json.loads((tmp_path / "hours.json").read_text())
    assert [*found] == ["warmup", "itool"]
    expected = {"load": 0.1, "update": 1.5, "sync": 0.01, "evaluate": 0.25, "other": 140 / 3600}
    assert found["warmup"] == pytest.approx(expected | {"total": (400 + 3700 + 1836 + 900) / 3600})
    expected = {"perplexity": 0.1, "search": 2, "update": 1000 / 3600, "evaluate": 0.2}
    assert found["itool"] == pytest.approx(expected | {"other": (360 + 800) / 3600, "total": 2.9})
    assert words.startswith(
        "warmup 1.90 (update 1.50, evaluate 0.25, load 0.10, other 0.04, sync 0.01);"
    )
    assert (
        "itool 2.90 (search 2.00, other 0.32, update 0.28, evaluate 0.20, perplexity 0.10)" in words
    )
    table = show.hours_table(tmp_path)
    assert table["columns"] == [
        "stage",
        "evaluate",
        "load",
        "other",
        "perplexity",
        "search",
        "sync",
        "update",
        "total",
    ]
    assert [row[-1] for row in table["rows"]] == [part["total"] for part in found.values()]
