"""Rows of METHODS and preference losses against TRL's own trainers: loss and gradient on the same tokens.

TRL's GRPOTrainer, DPOTrainer and CPOTrainer are made as a user makes them, around a tiny model, and asked for the loss
of a frozen batch (requirements-peer.txt). Rewards, padding, log-probs, advantages and loss are theirs on their side.
"""

import copy

import frozen
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install -r requirements-peer.txt")
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

import grpo
import packing
import simpo
from methods import METHODS, Rows

pytestmark = pytest.mark.long
K = 4
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]
LENGTHS = [7, 1, 4, 9, 3, 8, 8, 2]
REWARDS = [4.0, -3.0, 2.5, 2.5, 1.0, 1.0, -1.0, 3.5]
CLIP_HIGH = {"grpo": 0.2, "dapo": 0.28}  # of grpo.py
TRL_EPS = 1e-4  # beside the std of an advantage; ours, as veRL's, is 1e-6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return frozen.tiny_model(tmp_path_factory.mktemp("tiny"))


def responses() -> list[list[int]]:
    """K responses for each of PROMPTS, of LENGTHS."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, 400, (n,), generator=generator).tolist() for n in LENGTHS]


def models(tiny, n=2) -> list:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).train()
    return [model, *(copy.deepcopy(model) for _ in range(n - 1))]


def settings(tmp_path, size) -> dict:
    """What all trainers are told: one CPU, one batch, nothing logged."""
    return {
        "output_dir": str(tmp_path), "per_device_train_batch_size": size, "use_cpu": True, "bf16": False,
        "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip


def same(ours, theirs, our_model, their_model) -> None:
    """Equal losses and gradients, in float32."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    ours.backward()
    theirs.backward()
    ours, theirs = (
        {name: p.grad for name, p in model.named_parameters()} for model in (our_model, their_model)
    )
    assert frozen.relative_difference(ours, theirs) < 1e-4
    assert max(gradient.abs().max().item() for gradient in theirs.values()) > 1e-3


# ------------------------------------------------------------------------------------------------- GRPO and DAPO


def trl_batch(row, model, tiny, tmp_path) -> tuple[GRPOTrainer, dict]:
    """TRL's trainer for a row, and its tensors for the frozen responses and rewards."""
    trainer = GRPOTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(tiny),
        reward_funcs=lambda completions, **_: REWARDS,
        train_dataset=Dataset.from_dict({"prompt": ["p"]}),
        args=GRPOConfig(
            **settings(tmp_path, len(LENGTHS)), num_generations=K, beta=0.0, loss_type=row,
            epsilon=0.2, epsilon_high=CLIP_HIGH[row], temperature=1.0,
        ),
    )  # fmt: skip
    prompts = [prompt for prompt in PROMPTS for _ in range(K)]
    texts = [[{"role": "assistant", "content": ""}]] * len(prompts)
    trainer._generate = lambda _: (prompts, responses(), None, texts, None, {}, None, None)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._generate_and_score_completions([{"prompt": "p"}] * len(prompts))


def our_rows(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, advantages (B,) and mask of the same batch, prompts read once."""
    groups = [responses()[:K], responses()[K:]]
    row = packing.join([packing.pack(p, group) for p, group in zip(PROMPTS, groups)])
    logps, _ = packing.response_logps(model, row)
    return logps, grpo.group_advantages(torch.tensor(REWARDS), K, eps=TRL_EPS), row.response_mask


@pytest.mark.parametrize("row", ["grpo", "dapo"])
def test_a_row_on_policy(row, tiny, tmp_path):
    """The row's loss, as the loop calls it: the ratio is 1 everywhere."""
    ours, theirs = models(tiny)
    trainer, batch = trl_batch(row, theirs, tiny, tmp_path)
    logps, advantages, mask = our_rows(ours)
    none = torch.zeros(len(mask), dtype=torch.bool)
    rows = Rows(mask, none, none, none, advantages[:, None] * mask, torch.zeros_like(logps))
    totals = {"tokens": sum(LENGTHS), "responses": len(LENGTHS), "expert_tokens": 0}
    method = METHODS[row](entropy_coef=0.0)
    loss, _ = method.loss(rows, logps, torch.zeros_like(logps), totals, 0)
    same(loss, trainer.compute_loss(theirs, batch), ours, theirs)


@pytest.mark.parametrize("row", ["grpo", "dapo"])
def test_a_row_off_policy(row, tiny, tmp_path):
    """The samples are another policy's: tokens are clipped on both sides."""
    ours, theirs = models(tiny)
    trainer, batch = trl_batch(row, theirs, tiny, tmp_path)
    logps, advantages, mask = our_rows(ours)
    noise = 0.4 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    old = logps.detach() + noise
    batch["old_per_token_logps"] = old
    loss_of = {"grpo": grpo.grpo_loss, "dapo": grpo.dapo_loss}[row]
    loss, stats = loss_of(logps, old, advantages, mask)  # with its own clip range
    same(loss, trainer.compute_loss(theirs, batch), ours, theirs)
    metrics = trainer._metrics["train"]
    low, high = (metrics[f"clip_ratio/{side}_mean"][0] for side in ("low", "high"))
    assert low > 0 and high > 0
    if row == "dapo":  # TRL's shares are of tokens, as are ours for the token mean
        assert float(stats["clip_ratio"]) == pytest.approx(low + high, rel=1e-5)


# ------------------------------------------------------------------------------------------------ SimPO and DPO

PAIRS = [(PROMPTS[0], 0, 5), (PROMPTS[1], 3, 2)]  # prompt, its chosen and its rejected response


def pair_logps(model) -> tuple[torch.Tensor, ...]:
    """Chosen log-probs and mask, rejected log-probs and mask."""
    row = packing.join(
        [packing.pack(prompt, [responses()[c], responses()[r]]) for prompt, c, r in PAIRS]
    )
    logps, _ = packing.response_logps(model, row)
    mask = row.response_mask
    return logps[::2], mask[::2], logps[1::2], mask[1::2]


def test_simpo(tiny, tmp_path):
    ours, theirs = models(tiny)
    trainer = CPOTrainer(
        model=theirs,
        processing_class=AutoTokenizer.from_pretrained(tiny),
        train_dataset=Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}] * 2),
        args=CPOConfig(
            **settings(tmp_path, len(PAIRS)), loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=0.5
        ),
    )  # fmt: skip
    batch = {}
    for side in (1, 2):
        name = ("", "chosen", "rejected")[side]
        ids = [torch.tensor([*pair[0], *responses()[pair[side]]]) for pair in PAIRS]
        labels = [
            torch.where(torch.arange(len(row)) < len(pair[0]), -100, row)
            for pair, row in zip(PAIRS, ids)
        ]
        batch[f"{name}_input_ids"] = pad_sequence(ids, batch_first=True)
        batch[f"{name}_labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        ones = [torch.ones_like(row) for row in ids]
        batch[f"{name}_attention_mask"] = pad_sequence(ones, batch_first=True)
    loss, _ = simpo.simpo_loss(*pair_logps(ours), beta=2.5, margin=0.5)
    same(loss, trainer.compute_loss(theirs, batch), ours, theirs)


def test_dpo(tiny, tmp_path):
    ours, theirs, reference = models(tiny, 3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
        refs = pair_logps(copy.deepcopy(reference))
    trainer = DPOTrainer(
        model=theirs,
        ref_model=reference,
        processing_class=AutoTokenizer.from_pretrained(tiny),
        train_dataset=Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}] * 2),
        args=DPOConfig(**settings(tmp_path, len(PAIRS)), beta=0.1),
    )
    batch = trainer.data_collator(
        [
            {"prompt_ids": p, "chosen_ids": responses()[c], "rejected_ids": responses()[r]}
            for p, c, r in PAIRS
        ]
    )
    refs = [(logps * mask).sum(1) for logps, mask in (refs[:2], refs[2:])]
    loss, _ = simpo.dpo_loss(*pair_logps(ours), *refs, beta=0.1)
    same(loss, trainer.compute_loss(theirs, batch), ours, theirs)
