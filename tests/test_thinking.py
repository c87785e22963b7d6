"""--allow_thinking: a <think> block is cut before a response is judged, wherever it is judged."""

import json
from pathlib import Path

import frozen
import pytest
from frozen import one_rank  # noqa: F401 - a fixture
from transformers import AutoTokenizer

import data
import eval as evaluation
import itool
import metrics
import rewards
import rollout
import train
from methods import METHODS, Group
from scoring import Reward
from tools import audit

CALL = '<tool_call>\n{"name": "f", "params": {"a": 1, "b": "x"}}\n</tool_call>'
OTHER = CALL.replace("1", "2")
NO = "<answer>\nno\n</answer>"
OPENED = "<think>\n"
# A generation prompt as Qwen3 ends it, and as models do that always think.
ENDS = {
    "hybrid": "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}",
    "opens": OPENED,
}
EMPTY = {"hybrid": "<think>\n\n</think>\n\n", "opens": "\n</think>\n\n"}


def with_end(folder: Path, end: str):
    """The tokenizer of a model folder with another end of its generation prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.rstrip().removesuffix("{% endif %}")
    tokenizer.chat_template += "{{ '' }}" + end + "{% endif %}"
    return tokenizer


def marked(end: str):
    tokenizer = with_end(frozen.TOY, ENDS[end])
    data.allow_thinking(tokenizer)
    return tokenizer


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# what a response says, where the prompt has opened no block and where it has
CASES = [
    (CALL, CALL, ""),  # the second: a thought that never ends
    (f"<think>\nf(a)? é😀, so:\n</think>\n\n{CALL}", CALL, CALL),
    (f"  <think>{OTHER}</think>{CALL}", CALL, CALL),
    (f"I call f.</think>\n{CALL}", f"I call f.</think>\n{CALL}", CALL),
    (f"<think>\nI call f: {CALL}", "", ""),
    ("<think>\nI am sure.</think>", "", ""),
    (f"<think>a</think><think>b</think>{CALL}", f"<think>b</think>{CALL}", f"<think>b</think>{CALL}"),
    (f"{CALL}<think>right?</think>", f"{CALL}<think>right?</think>", ""),
    (f"<think>a</think>{CALL}</think>", f"{CALL}</think>", f"{CALL}</think>"),
    (f"<thinking>a</thinking>{CALL}", f"<thinking>a</thinking>{CALL}", ""),
    ("", "", ""),
]  # fmt: skip


@pytest.mark.parametrize("response, said, said_if_opened", CASES)
def test_what_a_response_says(response, said, said_if_opened):
    for end, expected in (("hybrid", said), ("opens", said_if_opened)):
        tokenizer = marked(end)
        ids = [*encode(tokenizer, response), tokenizer.eos_token_id]
        assert rollout.text_of(tokenizer, ids, "stop") == expected
        assert rollout.text_of(tokenizer, ids[:-1], "length") == expected
        # Slow: the first token that reaches beyond the thoughts and the white space after them.
        places, length = [], len(tokenizer.decode(ids[:-1]))
        for place in range(len(ids)):
            end_of_token = len(tokenizer.decode(ids[: place + 1]))
            if end_of_token > length - len(expected.lstrip()):
                places.append(place)
        begun = end == "opens" or response.lstrip().startswith("<think>")
        endless = begun and "</think>" not in response
        assert rollout.num_thoughts(tokenizer, ids) == (len(ids) if endless else places[0])
    plain = AutoTokenizer.from_pretrained(frozen.TOY)
    assert rollout.text_of(plain, encode(plain, response), "length") == response
    assert rollout.num_thoughts(plain, encode(plain, response)) == 0


def test_a_thought_neither_earns_nor_costs_anything(tmp_path):
    """In the papers' reward, the binary one, one's own, forms and error types."""
    own = tmp_path / "reward.py"
    own.write_text(
        "MINIMUM, MAXIMUM = 0, 99\ndef reward(response, example):\n    return {}, len(response)\n"
    )
    tokenizer, (end, target) = marked("hybrid"), ([2], CALL)
    example = data.Example("x", [], [], "q", [], target, "tool_call")
    expected = [  # response, total, binary, form, error type
        (f"<think>{OTHER}</think>\n{CALL}", 4, 1, "call", None),
        (f"<think>{CALL}</think>\n{OTHER}", 3.5, 0, "call", "Parameter Value"),
        (f"<think>or </answer></think>{NO}", -3, 0, "answer", "Tools Count"),
        (f"<think>{CALL}", -3, 0, "neither", "Tools Count"),
        (f"<think>a</think>{CALL}{NO}", -3, 0, "both", "Other"),
    ]
    for response, total, right, form, error in expected:
        ids = [*encode(tokenizer, response), *end]
        said = rollout.text_of(tokenizer, ids, "stop")
        assert Reward().score(said, example).total == pytest.approx(total)
        assert rewards.binary(said, target) == right
        assert rewards.forms(said) == {form}
        assert rewards.error_type(said, target) == error
        assert Reward(own).score(said, example).total == len(said)
    assert (
        rewards.outcome(f"<think>a</think>{CALL}", CALL).total == 3
    )  # without the flag: no format


@pytest.mark.parametrize("alignment", ["positional", "lcs"])
@pytest.mark.parametrize("end", ENDS)
def test_tokens_are_compared_with_the_experts_behind_the_thoughts(end, alignment):
    """Token rewards by hand: a thought earns the outcome, the expert's tokens the bound."""
    tokenizer, example = marked(end), data.Example("x", [], [], "q", [], CALL, "tool_call")
    opening = "" if end == "opens" else OPENED
    texts = [f"{opening}{t}</think>\n\n{c}" for t, c in (("Why?", CALL), ("f, I think: ", OTHER))]
    texts.append(f"{opening}never {CALL}")
    target = data.target_ids(example, tokenizer)
    assert tokenizer.decode(target) == EMPTY[end] + CALL + "<|im_end|>"
    lead = len(data.no_thoughts(tokenizer))
    assert tokenizer.decode(target[lead:]) == CALL + "<|im_end|>"
    group = Group(example, [1], target, max_length=99, with_expert=True, seed=0, num_thoughts=lead)
    for text in texts:
        ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
        said, count = rollout.text_of(tokenizer, ids, "stop"), rollout.num_thoughts(tokenizer, ids)
        group.samples.append(rollout.Sample(ids, [-1.0] * len(ids), said, "stop", count))
    method = METHODS["toolupt"](alignment=alignment)
    train.score(method, group, Reward())
    assert group.rewards == pytest.approx([4, 3.5, -3])
    method.advantages(group)
    wanted = target[lead:] if alignment == "positional" else target[lead:-1]
    for row, sample, total in zip(group.token_rewards, group.samples, group.rewards):
        thought, rest = (
            sample.token_ids[: sample.num_thoughts],
            sample.token_ids[sample.num_thoughts :],
        )
        expected = [total] * len(thought)
        expected += [4 if i < len(wanted) and x == wanted[i] else total for i, x in enumerate(rest)]
        assert row[: len(expected)].tolist() == pytest.approx(expected)
    assert group.samples[2].num_thoughts == len(group.samples[2].token_ids)
    sums = metrics.tally("tool_call", *reversed(group.said), ["", "", ""], [1, 0, 0], [], alignment)
    same = sum(a == b for said in group.said[0] for a, b in zip(said, wanted))
    assert sums["tokens_matched/calls"] == same
    assert sums["expert_tokens/calls"] == 3 * len(wanted)


@pytest.mark.parametrize("end", ENDS)
def test_prompts_targets_and_tags(end):
    tokenizer, plain = marked(end), with_end(frozen.TOY, ENDS[end])
    example = data.Example("x", [], [], "q", [], NO.replace("no", "No, never."), "answer")
    prompt = tokenizer.decode(data.render(example, tokenizer))
    assert prompt.endswith("assistant\n" + OPENED * (end == "opens"))
    target = data.target_ids(example, tokenizer)
    whole = prompt + tokenizer.decode(target)
    assert whole.endswith(f"assistant\n<think>\n\n</think>\n\n{example.target}<|im_end|>")
    kept = target[: data.tag_length(tokenizer)]  # by Eq. 19
    before = len(encode(tokenizer, EMPTY[end]))
    assert len(kept) == before + data.tag_length(AutoTokenizer.from_pretrained(frozen.TOY))
    assert tokenizer.decode(kept).startswith(EMPTY[end] + "<answer>")
    assert rollout.text_of(tokenizer, target, "stop") == example.target
    fits = lambda length: data.fit([example], tokenizer, 9999, length)[0]
    assert fits(len(target)) and not fits(len(target) - 1)
    if end == "opens":
        with pytest.raises(ValueError, match="--allow_thinking"):
            data.check_thinking(plain)
    else:
        data.check_thinking(plain)
        assert data.template_digest(plain) != data.template_digest(tokenizer)
    data.check_thinking(tokenizer)
    ids = itool.question(tokenizer, "paper", CALL, CALL)  # graded without thinking
    tail = "assistant\n<think>\n\n</think>\n\nThe option of overall quality is ("
    assert tokenizer.decode(ids).endswith(tail)


def test_a_search_cuts_no_thought_and_judges_what_follows():
    tokenizer = marked("hybrid")
    engine = type("Engine", (), {"stop_ids": [tokenizer.eos_token_id], "max_model_len": 999})()
    searcher = itool.Searcher(engine, tokenizer, self_evaluation="none")
    searcher.config, searcher.confidences = itool.SearchConfig(), {}
    root = itool.Node(token_ids=[1])
    example = data.Example("x", [], [], "q", [], CALL, "tool_call")
    searcher.examples = {id(root): example}
    thought = f"<think>\nFirst, f. Then [{OTHER}], no.\n</think>\n\n"
    ids = [*encode(tokenizer, thought + CALL), tokenizer.eos_token_id]
    step = searcher._cut(root, rollout.Sample(ids, [-1.0] * len(ids), "", "stop"))
    first = CALL.split(",")[1]
    assert step.text == thought + CALL[: CALL.index(first) + len(first) + 1]
    node = itool.Node(parent=root, token_ids=step.token_ids, depth=1)
    rest = searcher._cut(node, step.tail)
    assert step.text + rest.text == thought + CALL  # its last fragment
    assert searcher._state(node) == (id(root), step.text.removeprefix(thought))
    whole = itool.Node(parent=root, token_ids=ids, terminal=True, reason="eos")
    assert searcher.evaluate([whole]) == [(1.0, 0.0)]
    wrong = [*encode(tokenizer, f"<think>{CALL}</think>{OTHER}"), tokenizer.eos_token_id]
    wrong = itool.Node(parent=root, token_ids=wrong, terminal=True, reason="eos")
    endless = itool.Node(parent=root, token_ids=ids[:20], terminal=True, reason="length")
    assert searcher.evaluate([wrong, endless]) == [(-1.0, 0.0)] * 2


@pytest.mark.parametrize("end", ENDS)
def test_a_model_that_thinks_is_trained_evaluated_audited_and_trained_on(
    end, tmp_path, monkeypatch, capsys
):
    """It learns a thought by heart; what training says of it, eval.py says of its checkpoint."""
    model = frozen.tiny_model(tmp_path / "model")
    tokenizer = with_end(model, ENDS[end])
    tokenizer.save_pretrained(model)
    thought = "say no,\n</think>\n\n"
    block = thought if end == "opens" else f"<think>\n{thought}"
    shared = ["--max_completion_length", 64, "--eval_steps", 0]

    def run(out, *flags):
        argv = frozen.short_flags(model, tmp_path, *shared, "--output_dir", tmp_path / out, *flags)
        return train.train(*train.parse_args(list(map(str, argv))))

    teach = ["--algo", "sft", "--max_steps", 60, "--learning_rate", 0.01, "--save_steps", 60]
    with monkeypatch.context() as patch:
        patch.setattr(data, "no_thoughts", lambda t: encode(t, block))
        run("sft", *teach, "--allow_thinking")
    taught = tmp_path / "sft/checkpoint-60"
    log = lambda out: list(data.read_jsonl(tmp_path / out / "metrics.jsonl"))
    assert log("sft")[-1]["eval/accuracy"] == 1.0

    # The mark has travelled: nothing asks for it again.
    options = ["--bench", "file", "--file", f"jsonl:{tmp_path}/short.jsonl", "--max_tokens", "64"]
    options += ["--engine", "transformers", "--output_dir", str(tmp_path / "measured")]
    evaluation.evaluate(evaluation.parse_args([str(taught), *options]))
    rows = list(data.read_jsonl(tmp_path / "measured/results.jsonl"))
    assert [row["correct"] for row in rows] == [True] * 8
    assert {(row["turns"][0][0], row["thoughts"][0]) for row in rows} == {(NO, block)}
    assert json.loads((tmp_path / "measured/settings.json").read_text())["allow_thinking"]

    capsys.readouterr()
    flags = ["--model_name_or_path", taught, "--learning_rate", 1e-5]
    run("rl", *flags)
    assert f"thoughts are allowed, as saved with {taught}" in capsys.readouterr().out
    assert log("rl")[1]["eval/accuracy"] == 1.0
    assert log("rl")[2]["completions/mean_thought_length"] >= len(encode(tokenizer, block)) / 2
    rollouts = list(data.read_jsonl(tmp_path / "rl/rollouts.jsonl"))
    assert any(row["reward"] == 4 for row in rollouts)
    for row in rollouts:
        whole = tokenizer.decode(row["token_ids"])
        if row["reward"] == 4:
            assert row["text"] == NO and "</think>" in whole
    assert audit.audit(tmp_path / "rl").startswith("16 responses agree")
    assert data.thinks(AutoTokenizer.from_pretrained(tmp_path / "rl/checkpoint-2"))

    # Another chat template is noticed, by audit and when the run is resumed.
    settings = taught / "chat_template.jinja"
    settings.write_text(settings.read_text().replace("<|im_start|>", "-<|im_start|>", 1))
    with pytest.raises(ValueError, match="writes other prompts than in the run"):
        audit.audit(tmp_path / "rl")
    with pytest.raises(ValueError, match="--model_name_or_path: prompt .* -> prompt "):
        run("rl", *flags, "--max_steps", 3, "--resume_from_checkpoint", "latest")


def test_a_run_with_thoughts_is_not_resumed_without(tmp_path):
    model = frozen.tiny_model(tmp_path / "model")
    argv = frozen.short_flags(model, tmp_path, "--max_steps", 1, "--save_steps", 1)
    train.train(*train.parse_args([*argv, "--allow_thinking"]))
    again = [*argv, "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="--allow_thinking True -> False"):
        train.train(*train.parse_args(again))
