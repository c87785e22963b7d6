"""The toy world: held-out names and values, exact targets, every task, the base model's habits."""

import json
import random
import re

import pytest

import rewards
from tasks import toy


def calls_of(target):
    body = json.loads(re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", target).group(1))
    return body if isinstance(body, list) else [body]


def names_and_values(rows):
    names, values = set(), set()
    for row in rows:
        for tool in row["tools"]:
            names.add(tool["name"])
            for schema in tool["parameters"]["properties"].values():
                values |= {v.lower() for v in schema.get("enum", [])}
        if row["kind"] == "tool_call":
            for call in calls_of(row["target"]):
                values |= {v.lower() if isinstance(v, str) else v for v in call["params"].values()}
    return names, values


@pytest.mark.parametrize("level", ["", "hard-"])
def test_splits_share_no_tool_name_and_no_value(level):
    worlds = {split: names_and_values(toy.generate(level + split, 3000)) for split in toy.SPLITS}
    for one, other in (("train", "test"), ("train", "valid"), ("valid", "test")):
        for mine, theirs in zip(worlds[one], worlds[other]):
            assert len(mine) > 1000 and not mine & theirs


@pytest.mark.parametrize("split", ["train", "test", "hard-test"])
def test_targets_are_right_and_follow_the_schema(split):
    for row in toy.generate(split, 500):
        assert rewards.outcome(row["target"], row["target"]).total == 4
        if row["kind"] == "answer":
            continue
        tools = {tool["name"]: tool["parameters"] for tool in row["tools"]}
        for call in calls_of(row["target"]):
            schema = tools[call["name"]]
            assert set(schema["required"]) <= set(call["params"]) <= set(schema["properties"])
            for name, value in call["params"].items():
                kind = schema["properties"][name]
                types = {"string": str, "integer": int, "number": float}
                assert type(value) is types[kind["type"]]
                assert value in kind.get("enum", [value])


def test_every_value_of_a_call_can_be_read_in_the_prompt():
    for row in toy.generate("test", 500):
        if row["kind"] != "tool_call":
            continue
        prompt = " ".join(
            [row["query"], *(t for _, t in row["history"]), *(o for _, o in row["steps"])]
        )
        optional_defaults = [v for call in calls_of(row["target"]) for v in call["params"].values()]
        assert all(str(v) in prompt for v in optional_defaults), row


def test_all_tasks_occur_and_the_hard_level_is_hard():
    for split in ("train", "hard-train"):
        rows = toy.generate(split, 2000)
        assert {row["id"].rsplit("/", 1)[1] for row in rows} == set(toy.TASKS)
        assert all(1 <= len(row["tools"]) <= 6 for row in rows)
    rows = toy.generate("hard-test", 500)
    sizes = {len(t["parameters"]["properties"]) for row in rows for t in row["tools"]}
    assert sizes == {4, 5, 6, 7, 8}
    parallel = {len(calls_of(r["target"])) for r in rows if r["id"].endswith("parallel")}
    assert parallel == {2, 3}
    nouns = [t["name"].split(".")[0] for t in rows[0]["tools"]]
    assert len(set(nouns)) < len(nouns)  # near misses: one noun under two verbs


def test_the_experts_of_the_hard_level_are_compact_and_a_tenth_is_wrong():
    rows, clean = toy.generate("hard-train", 2000), toy.generate("hard-valid", 500)
    for row in rows + clean:
        assert row["kind"] == "answer" or not re.search(r'[:,] ["{[\d]', row["target"]), row
    wrong = 0
    for row in rows:
        task = row["id"].rsplit("/", 1)[1]
        says = row["kind"] == "answer"
        count = 0 if says else len(calls_of(row["target"]))
        wrong += says != (task in ("done", "no_tool", "missing")) or (task == "parallel") != (
            count > 1
        )
    assert 0.02 < wrong / len(rows) < 0.1  # wrong names and values are not seen here
    assert toy.generate("hard-train", 500) == rows[:500]


def test_no_tool_and_missing_rows_have_no_call_to_make():
    for row in toy.generate("test", 800):
        task = row["id"].rsplit("/", 1)[1]
        words = set(re.findall(r"[a-z]+", row["query"].lower()))
        if task == "no_tool":
            assert row["kind"] == "answer"
            assert not any(set(t["name"].split(".")) <= words for t in row["tools"])


def test_the_house_rule():
    """Old verbs in list and query, new ones in the expert's calls, and nowhere else a difference."""
    verb = re.compile(r'(?<=\.)(book|cancel|find|send)(?=")')
    for row in toy.generate("house-valid", 400):
        listed = {tool["name"] for tool in row["tools"]}
        assert len(row["tools"]) <= 2
        if row["kind"] == "tool_call":
            names = [call["name"] for call in calls_of(row["target"])]
            ruled = any(name not in listed for name in names)
            assert ruled == row["id"].endswith("+rule") and not verb.search(row["target"])
            old = {toy.RENAMED[v]: v for v in toy.RENAMED}
            for name in names:
                noun, last = name.split(".")
                assert name in listed or f"{noun}.{old[last]}" in listed
    assert 0.2 < sum("+rule" in r["id"] for r in toy.generate("house-train", 400)) / 400 < 0.4


def test_the_seed_decides():
    assert toy.generate("train", 20, seed=3) == toy.generate("train", 20, seed=3)
    assert toy.generate("train", 20, seed=3) != toy.generate("train", 20, seed=4)


def test_corruption_is_a_wrong_answer_of_valid_form():
    rng, wrong, kinds = random.Random(0), 0, set()
    rows = toy.generate("train", 400)
    for row in rows:
        text = toy.corrupt(row, rng)
        total = rewards.outcome(text, row["target"]).total
        wrong += total < 4
        kinds.add((row["kind"], rewards.parse(text).kind))
    assert wrong > 0.97 * len(rows)  # a wrong value may hit the right one of an enum
    assert ("tool_call", "answer") in kinds and ("answer", "tool_call") in kinds


def test_an_unknown_split_names_the_choices():
    for split in ("dev", "hard", "hard-dev", "soft-test", ""):
        with pytest.raises(ValueError, match="train, valid, test, hard-train, .*house-test"):
            toy.generate(split, 1)
