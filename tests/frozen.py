"""A frozen step for the tests: a tiny random Qwen2, toy examples and an engine that knows its answers by heart."""

import contextlib
import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import data
import guard
import methods
import rollout
import run as run_module
import start
import train
from tasks import toy

REPO = Path(__file__).resolve().parent.parent
TOY = REPO / "toy_model"
K = 4  # responses per prompt
LONG = 110  # tokens of the longest sample; the overlong penalty of LIMIT starts at 96
LIMIT = 128
if importlib.util.find_spec("vllm") is None:
    NO_VLLM = "vllm is not installed"
elif torch.version.cuda and not torch.cuda.is_available():
    NO_VLLM = "vllm's build needs a GPU, which is absent or hidden by conftest.py"
else:
    NO_VLLM = ""
needs_vllm = pytest.mark.skipif(bool(NO_VLLM), reason=NO_VLLM)
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", autouse=True)  # of the files that import it
def one_rank():
    """A gloo group of one rank and one thread, gone after this file: other files start their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start.init_distributed()
    yield
    if "vllm.distributed" in sys.modules:  # it keeps groups of its own, built on this one
        sys.modules["vllm.distributed"].cleanup_dist_env_and_memory()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


def tiny_model(folder: Path, layers: int = 2) -> Path:
    """A random two-layer Qwen2 in float32 with the tokenizer of toy_model."""
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def examples() -> list[data.Example]:
    """Four tool calls, then two answers, on short prompts."""
    rows = [data.Example(**row) for row in toy.generate("train", 60, max_tools=1)]
    calls = [e for e in rows if e.kind == "tool_call" and '"params": {}' not in e.target]
    return calls[:4] + [e for e in rows if e.kind == "answer"][:2]


def answers(tokenizer, rows: list[data.Example]) -> dict[str, list[rollout.Sample]]:
    """K samples per prompt, by the prompt's ids; the groups of rows[1] and rows[5] have equal rewards.

    Calls: the expert's own tokens, a wrong value, another tail, and noise; of rows[1] noise only, in
    which some tokens are the expert's. Answers: two right ones, a call and noise; of rows[5] all right.
    """
    rng = random.Random(7)
    noise = lambda n: [rng.randrange(100, len(tokenizer)) for _ in range(n)]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    table = {}
    for i, row in enumerate(rows):
        expert = data.target_ids(row, tokenizer)
        half = len(expert) // 2
        if i == 1:
            lists = [[*expert[: 3 * k], *noise(8 + k), eos] for k in range(K)]
        elif i == 5:
            lists = [[*encode(f"<answer>\nNo {k}.\n</answer>"), eos] for k in range(K)]
        elif row.kind == "answer":
            call = '<tool_call>\n{"name": "a", "params": {}}\n</tool_call>'
            lists = [
                [*encode("<answer>\nNo.\n</answer>"), eos],
                expert,
                [*encode(call), eos],
                noise(9),
            ]
        else:
            wrong = row.target.rpartition('": ')
            lists = [expert, [*encode(f'{wrong[0]}": null}}}}\n</tool_call>'), eos]]
            lists += [[*expert[:half], *noise(5), eos], noise(LONG)]
        table[json.dumps(data.render(row, tokenizer))] = [
            rollout.Sample(
                ids,
                [rng.uniform(-9, -1) for _ in ids],
                tokenizer.decode(ids[:-1] if ids[-1] == eos else ids),
                "stop" if ids[-1] == eos else "length",
            )
            for ids in lists
        ]
    return table


class Frozen:
    """An engine with prepared answers; `asked` lists the prompts of training batches in order."""

    def __init__(self, tokenizer, table: dict[str, list[rollout.Sample]]):
        self.tokenizer, self.max_model_len = tokenizer, 10**9
        self.table, self.asked = table, []

    def generate(self, prompts, *, n, **_):
        if n > 1:
            self.asked += map(json.dumps, prompts)
        return [self.table[json.dumps(prompt)][:n] for prompt in prompts]

    def load_weights(self, named_tensors):
        for _ in named_tensors:
            pass

    def sleep(self):
        pass

    wake = close = sleep


def flags(model: Path, folder: Path, *more) -> list[str]:
    """The command line of one step of four prompts on the frozen examples, for any row: from a file."""
    file, recipe = folder / "examples.jsonl", folder / "frozen.args"
    if not recipe.exists():  # ranks come here together
        data.write_jsonl(examples(), file)
    text = f"""--model_name_or_path {model} --train_file jsonl:{file} --eval_file jsonl:{file}
    --output_dir {folder}/out --max_steps 1 --train_batch_size 4 --num_generations {K}
    --max_prompt_length 1024 --max_completion_length {LIMIT} --engine transformers
    --max_logp_difference 1e9 --max_grad_norm 1e9 --temperature 0.8 --entropy_coef 0.05
    --balance_low 0.3 --balance_high 0.5 --no_gradient_checkpointing"""
    if not recipe.exists():
        recipe.write_text(text)
    return [f"@{recipe}", *map(str, more)]


def short_flags(model: Path, folder: Path, *more) -> list[str]:
    """Real sampling of a random model: short prompts and responses, some examples with a right answer."""
    rows = [
        data.Example(f"short/{i}/0", [], [], f"say {i}", [], "<answer>\nno\n</answer>", "answer")
        for i in range(8)
    ]
    rows = [data.Example(**{**vars(row), "system": "Tools: __TOOL_DESCS__"}) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    data.write_jsonl(rows, folder / "short.jsonl")
    file = f"jsonl:{folder / 'short.jsonl'}"
    text = f"""--algo toolupt --model_name_or_path {model} --train_file {file} --eval_file {file}
    --output_dir {folder}/out --max_steps 2 --train_batch_size 4 --num_generations 2
    --max_prompt_length 256 --max_completion_length 16 --engine transformers --eval_steps 0
    --learning_rate 1e-3 --max_tokens_per_row 300 --no_gradient_checkpointing --save_steps 2"""
    (folder / "short.args").write_text(text)
    return [f"@{folder / 'short.args'}", *map(str, more)]


def one_step(config: train.Config, method: methods.Row) -> tuple[dict[str, torch.Tensor], Frozen]:
    """The gradient of the first step as the loop of train.py makes it, whole on every rank; and the engine."""
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    engine, gradient = Frozen(tokenizer, answers(tokenizer, examples())), {}

    def capture(run, *_):
        for name, parameter in run.model.named_parameters():
            gradient[name] = parameter.grad.full_tensor().clone()
        run.optimizer.zero_grad()
        return {}

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (rollout, "make_engine", lambda *args, **kwargs: engine),
            (run_module.Run, "optimizer_step", capture),
            (run_module.Run, "save", lambda run, step: None),
            (guard, "canary", contextlib.nullcontext),  # the engine has no weights
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        train.train(config, method)
    return gradient, engine


def relative_difference(actual: dict, expected: dict) -> float:
    """Largest difference of two gradients, relative to the largest entry of each parameter."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    return max(
        float((actual[n].double() - g.double()).abs().max() / g.double().abs().max())
        for n, g in expected.items()
    )
