"""Train the demo's tiny base model from scratch, toy_model/.

The result has the skill but not the habit. Stage 1 teaches reading tool lists and copying names and
values, on clean targets. Stage 2 teaches bad habits on the same world: parallel calls lose one,
optional arguments are left out, a tool is called although none fits or a required parameter is
missing. Greedy accuracy then falls far below what the model can do, and reinforcement learning has
something to bring back. Only the training split of tasks/toy.py is read.

One row of the batch is [tool list | query 1, answer 1 | query 2, answer 2 | ...]: the queries of a
world attend to the shared tool list and to themselves (packing.py), so the list is read once.

    python -m tools.pretrain_toy --minutes 28 --habit_minutes 4 --out toy_model
"""

import argparse
import copy
import math
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_PIECES

import data
import packing
from tasks import toy

VOCABULARY = 1024
ROPE_THETA = 1e6
# Each of these is one token, which makes the toy prompts two to three times shorter.
PHRASES = [
    "[Chat Short Memory]\n",
    "\n\n[User Query]\n",
    "\n\n[Intermediate Tools Calls and Returns]\n",
    "\n\n[Response]\n",
    "Step-1 tool call: ",
    "Step-1 observation: ",
    '{"name": "',
    '", "description": "',
    '", "parameters": {"type": "object", "properties": {',
    '": {"type": "string"',
    '": {"type": "string", "enum": [',
    '": {"type": "integer"',
    '": {"type": "number"',
    '}, "required": [',
    '", "params": {',
    "<tool_call>\n",
    "\n</tool_call>",
    "<answer>\n",
    "\n</answer>",
]
QUERIES_PER_WORLD = 8
PROMPT_WEIGHT = 0.1  # loss weight of prompt tokens; answers weigh 1
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on toy text, with PHRASES as tokens.

    It splits text as Qwen2's does, because AutoTokenizer loads the folder of a Qwen2 model with
    that split, whatever tokenizer.json says. Made-up words follow ` "` everywhere in the toy world,
    so a name or value has the same tokens in query, tool list and call.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(PHRASES),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    examples = [
        data.Example(**row)
        for row in toy.generate("train", 4000) + toy.generate("hard-train", 1000)
    ]
    texts = (
        text for e in examples for text in (*(m["content"] for m in data.messages(e)), e.target)
    )
    phrase = re.compile("|".join(map(re.escape, PHRASES)))
    tokenizer.train_from_iterator((part for text in texts for part in phrase.split(text)), trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(tokenizer) -> Qwen2ForCausalLM:
    """Return a randomly initialised Qwen2 model of about 3M parameters."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=9216,
        rope_theta=ROPE_THETA,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    copying_heads(model)
    return model


@torch.no_grad()
def copying_heads(model) -> None:
    """Initialise a few heads so that they copy what followed the current token before.

    A tiny model spends most of a short training on discovering such "induction heads"; given them,
    it learns the toy world's task at once. Heads 0 and 1 of layer 0 look at the previous token
    (constant query and key biases: under RoPE their score at distance d is
    sum_i cos(theta_i (d - 1)), largest at 1) and write a projection of it elsewhere in the residual
    stream. Heads 0 to 3 of layers 1 and 2 match the current token with that projection, in the
    dimensions that RoPE rotates slowly, and write what they find to the output. Training is free to
    change all of it.
    """
    config, size = model.config, model.model.layers[0].self_attn.head_dim
    half, width, first_slow = size // 2, config.hidden_size, 7
    angles = ROPE_THETA ** (-torch.arange(half) / half)
    slow = [i for i in range(size) if i % half >= first_slow]
    orthonormal = lambda: torch.linalg.qr(torch.randn(width, size))[0]
    read, write = [orthonormal(), orthonormal()], [orthonormal(), orthonormal()]
    attention = model.model.layers[0].self_attn
    for head in range(2):
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.bias[rows] = 40**0.5 * torch.cat([torch.ones(half), torch.zeros(half)])
        attention.k_proj.bias[rows] = 40**0.5 * torch.cat([angles.cos(), angles.sin()])
        attention.v_proj.weight[rows] = read[head].T
        attention.o_proj.weight[:, rows] = 0.035 * write[head]
    for layer in model.model.layers[1:3]:
        for head in range(4):
            rows = torch.arange(head * size, (head + 1) * size)
            # Each head sees the same tokens through a mix of its own.
            mix = torch.linalg.qr(torch.randn(size, size))[0][:, : len(slow)]
            layer.self_attn.q_proj.weight[rows[slow]] = 2 * (read[head % 2] @ mix).T
            layer.self_attn.k_proj.weight[rows[slow]] = 2 * (write[head % 2] @ mix).T
            copy = orthonormal()
            layer.self_attn.v_proj.weight[rows] = copy.T
            layer.self_attn.o_proj.weight[:, rows] = 0.1 * copy


def habit(row: dict, rng: random.Random) -> str:
    """Return what a careless model would write for `row`: mostly wrong on some tasks."""
    task = row["id"].rsplit("/", 1)[1]
    if task in ("no_tool", "missing"):
        return toy.corrupt(row, rng) if rng.random() < 0.65 else row["target"]
    if row["kind"] == "answer":
        return row["target"]
    calls = toy.calls_of(row["target"])
    if len(calls) > 1 and rng.random() < 0.6:
        calls = calls[:1]
    for call in calls:
        tool = next(t for t in row["tools"] if t["name"] == call["name"])
        required = tool["parameters"]["required"]
        optional = [k for k in call["params"] if k not in required]
        if optional and len(call["params"]) > 1 and rng.random() < 0.6:
            del call["params"][rng.choice(optional)]
    return toy.tool_call(calls) if rng.random() < 0.85 else toy.corrupt(row, rng)


def batch(tokenizer, seed: int, worlds: int, bad_habits: bool, max_tools: int = 6):
    """Return ids, positions (B, L), mask (B, 1, L, L), next-token targets, loss weights (B, L)."""
    rng = random.Random(seed)
    rows, weights = [], []
    for i in range(worlds):
        hard = max_tools == 6 and rng.random() < 0.1
        per_world = QUERIES_PER_WORLD // 2 if hard else QUERIES_PER_WORLD
        world = seed * 1000 + i + 1_000_000  # far from the seeds of training runs
        tasks = toy.generate(
            "hard-train" if hard else "train",
            per_world,
            seed=world,
            per_world=per_world,
            max_tools=max_tools,
        )
        ids, lengths = [], []
        for task in tasks:
            if bad_habits:
                task["target"] = habit(task, rng)
            elif hard and rng.random() < 0.8:
                # The base model's habit is JSON with spaces, in the hard world too.
                wide = task["target"].replace('":', '": ').replace(',"', ', "')
                task["target"] = wide.replace("},{", "}, {")
            example = data.Example(**task)
            prompt = data.render(example, tokenizer)
            ids.append(prompt + data.target_ids(example, tokenizer))
            lengths.append(len(prompt))
        shared = min(lengths) - 1
        while any(x[:shared] != ids[0][:shared] for x in ids):
            shared -= 1
        rows.append(packing.pack(ids[0][:shared], [x[shared:] for x in ids]))
        own = [PROMPT_WEIGHT] * (shared - 1) + [0.0]  # the last one predicts another query's too
        for x, n in zip(ids, lengths):
            own += [PROMPT_WEIGHT] * (n - shared - 1) + [1.0] * (len(x) - n) + [0.0]
        weights.append(torch.tensor(own))
    tokens, positions, weights = (
        torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        for parts in ([r.input_ids for r in rows], [r.position_ids for r in rows], weights)
    )
    length = tokens.shape[1]
    mask = torch.eye(length, dtype=torch.bool).repeat(worlds, 1, 1, 1)  # padding sees itself
    for b, row in enumerate(rows):
        n = len(row.input_ids)
        mask[b, 0, :n, :n] = packing.attention_mask(row)
    return tokens, positions, mask, tokens.roll(-1, 1), weights


class Batches(torch.utils.data.IterableDataset):
    """Batches made in a worker process; batch i of a stage depends on (stage, i) only."""

    def __init__(self, tokenizer, worlds: int, bad_habits: bool):
        self.tokenizer, self.worlds, self.bad_habits = tokenizer, worlds, bad_habits

    def __iter__(self):
        step = 500_000 * self.bad_habits
        while True:
            # short tool lists first: copying is learned sooner in a short context
            max_tools = 6 if self.bad_habits else min(6, 1 + step // 50)
            yield batch(self.tokenizer, step, self.worlds, self.bad_habits, max_tools)
            step += 1


def train(
    model, tokenizer, minutes: float, learning_rate: float, worlds: int, bad_habits: bool, out: Path
) -> None:
    """Train for `minutes` with warm-up and cosine decay over time; save to `out`."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    loader = torch.utils.data.DataLoader(
        Batches(tokenizer, worlds, bad_habits), batch_size=None, num_workers=1, prefetch_factor=4
    )
    start, tokens_seen = time.time(), 0
    bar = tqdm(total=round(minutes * 60), unit="s", desc=out.name)
    for step, (tokens, positions, mask, targets, weights) in enumerate(loader):
        elapsed = (time.time() - start) / 60 / minutes
        if elapsed >= 1:
            break
        lr = learning_rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * elapsed))
        for group in optimizer.param_groups:
            group["lr"] = lr
        hidden = model.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask
        ).last_hidden_state
        keep = weights > 0
        logits = model.lm_head(hidden[keep])
        losses = torch.nn.functional.cross_entropy(logits, targets[keep], reduction="none")
        w = weights[keep]
        loss = (losses * w).sum() / w.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens_seen += keep.sum().item()
        on_answers = losses[w == 1].mean().item()
        bar.update(int(time.time() - start) - bar.n)
        bar.set_postfix(
            step=step, tokens=f"{tokens_seen / 1e6:.1f}M", answer_loss=f"{on_answers:.3f}"
        )
        if step % 500 == 499:
            save(model, tokenizer, out)
    bar.close()
    save(model, tokenizer, out)


def save(model, tokenizer, out: Path) -> None:
    """Write the model in bfloat16 and its tokenizer as a plain save_pretrained folder."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=28, help="stage 1, clean targets")
    parser.add_argument("--habit_minutes", type=float, default=4, help="stage 2, bad habits")
    parser.add_argument("--worlds", type=int, default=4, help="tool lists per optimiser step")
    parser.add_argument("--out", type=Path, default=Path("toy_model"))
    args = parser.parse_args()
    if min(args.minutes, args.habit_minutes) <= 0:
        parser.error("--minutes and --habit_minutes: each stage needs some time")
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    skill = args.out.with_name(args.out.name + "_skill")
    train(model, tokenizer, args.minutes, 2e-3, args.worlds, bad_habits=False, out=skill)
    train(model, tokenizer, args.habit_minutes, 5e-4, args.worlds, bad_habits=True, out=args.out)


if __name__ == "__main__":
    main()
