"""model.py: folders in and out, LoRA, and FSDP2 on 1 and 2 gloo ranks against one process."""

import json
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import checkpoint
import model as library
from packing import join, pack, response_logps

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
KINDS = ["qwen2", "llama"]  # tied, untied
RUNS = [("qwen2", 0), ("llama", 2)]  # (checkpoint, LoRA rank); one rank does the first only
MICRO_BATCHES = [  # two optimiser micro-batches for each of two ranks, of unequal sizes
    pack([3, 1, 4, 1, 5, 9], [[2, 6, 5], [], [3]]),
    join([pack([2, 7], [[1, 8, 2, 8]]), pack([1, 8], [[2], [8, 4]])]),
    pack([5, 9, 0, 4], [[5, 2, 3, 5, 3, 6, 0]]),
    pack([7], [[]]),  # a rank that ran out of work
]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two checkpoints as transformers writes them."""
    torch.manual_seed(0)
    made = {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    }
    root = tmp_path_factory.mktemp("checkpoints")
    for kind, network in made.items():
        network.save_pretrained(root / kind)
        tokenizer().save_pretrained(root / kind)
    return root


def tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}"):
    words = models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0")
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0")
    fast.chat_template = template
    return fast


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def backward(network, micro_batches, num_tokens=25):
    """Gradients of a loss in both outputs with a global denominator, accumulated."""
    for packed in micro_batches:
        logps, entropy = response_logps(network, packed, temperature=0.9)
        weights = 1 + torch.arange(logps.shape[1], device=logps.device)
        ((weights * logps).sum() / num_tokens - 0.1 * entropy.sum() / num_tokens).backward()


def randomise_adapters(network):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            drawn = torch.empty(parameter.shape).normal_(std=0.1, generator=generator)
            if isinstance(parameter, DTensor):
                drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(drawn)  # larger ones saturate


def gradients(network):
    return {
        name: whole(parameter.grad)
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_gradients_close(actual, expected):
    assert actual.keys() == expected.keys() and len(actual) > 0
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max()
        assert error <= 1e-5 * max(gradient.abs().max(), 1e-2 * largest), name


# load


def test_load_gives_fp32_master_weights_and_the_tokenizer(folders, tmp_path):
    plain(folders / "qwen2").bfloat16().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    network, words = library.load(tmp_path)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network.training and words.chat_template
    expected = plain(tmp_path).state_dict()
    assert all(torch.equal(p, expected[n]) for n, p in network.named_parameters())


def test_load_turns_dropout_off(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    network, _ = library.load(tmp_path / "a", gradient_checkpointing=True)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(network(ids).logits, network(ids).logits)
    assert network.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "no config.json"),
        ("*.safetensors", "no .*safetensors"),
        ("tokenizer*", "no tokenizer"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_load_names_what_is_missing(folders, tmp_path, remove, message):
    folder = tmp_path / "broken"
    shutil.copytree(folders / "qwen2", folder)
    removed = list(folder.glob(remove))
    assert removed
    for file in removed:
        file.unlink()
    with pytest.raises(ValueError, match=message) as caught:
        library.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_the_folder_of_a_run_names_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^\.: no config.json in this folder; write it"):
        library.check_folder(".")
    for name in ("checkpoint-2", "checkpoint-2-state"):
        (tmp_path / name).mkdir()
        with pytest.raises(
            ValueError, match="no config.json in this folder; take .*/checkpoint-2$"
        ):
            library.check_folder(str(tmp_path))
    with pytest.raises(ValueError, match="; take .*/checkpoint-2$"):
        library.check_folder(str(tmp_path / "checkpoint-2-state"))


def test_load_refuses_a_missing_folder_and_missing_weights(folders, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        library.load(tmp_path / "nowhere")
    shutil.copytree(folders / "llama", tmp_path / "llama")
    config = json.loads((tmp_path / "llama/config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "llama/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="9 weights are missing, model.layers.2"):
        library.load(tmp_path / "llama")


LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CHECKPOINTS = {
    "tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama3": LlamaConfig(**SHAPE, tie_word_embeddings=False, rope_parameters=LLAMA_3_ROPE),
}


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_ranks_read_by_shard_what_from_pretrained_reads(tmp_path, capfd, kind, max_shard_size):
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_config(CHECKPOINTS[kind]).bfloat16()
    network.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(tmp_path)
    for name in ("consolidated", "adapter_model"):  # other tensors of the same names
        save_file(
            {n: p * 2 for n, p in network.named_parameters()}, tmp_path / f"{name}.safetensors"
        )
    files = len(list(tmp_path.glob("model*.safetensors")))
    assert files == 1 if max_shard_size == "5GB" else files > 1
    on_ranks(2, compare_with_from_pretrained, tmp_path)
    assert "reads all the weights" not in capfd.readouterr().out


def compare_with_from_pretrained(rank, world, folder):
    actual, _ = library.load(folder)
    expected = plain(folder).train()
    for (name, p), (other, q) in zip(
        actual.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(whole(p), q) and p.dtype == torch.float32
        assert isinstance(p, DTensor) and p.to_local().shape[0] == (q.shape[0] + 1 - rank) // 2
    buffers = dict(expected.named_buffers())
    assert buffers and all(torch.equal(b, buffers[n]) for n, b in actual.named_buffers())
    ids = torch.arange(40)[None] % 61  # beyond the original length of the rope
    assert torch.equal(actual(ids).logits, expected(ids).logits)
    expected = library.shard(expected)
    for packed in MICRO_BATCHES[rank::2]:
        logps = [response_logps(network, packed) for network in (actual, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*logps))
    for network in (actual, expected):
        backward(network, MICRO_BATCHES[rank::2])
    actual, expected = gradients(actual), gradients(expected)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_rank_holds_its_share_only_while_it_loads(tmp_path):
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16_000}
    config = LlamaConfig(**SHAPE | shape | {"num_hidden_layers": 4}, tie_word_embeddings=False)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(tmp_path, max_shard_size="50MB")
    tokenizer().save_pretrained(tmp_path)
    size = 4 * sum(p.numel() for p in network.parameters())
    assert size > 350e6
    del network
    on_ranks(2, watch_growth, tmp_path, 1.3 * size / 2)


def watch_growth(rank, world, folder, limit):
    checkpoint._trim_memory()  # else what earlier tests freed is filled again, and nothing grows
    done, grown, start = threading.Event(), [], anonymous_bytes()

    def watch():
        while not done.wait(0.005):
            grown.append(anonymous_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    network, _ = library.load(folder)
    done.set()
    thread.join()
    held = sum(p.to_local().nbytes for p in network.parameters())
    assert 0.8 * held < max(grown) < limit, f"grew by {max(grown)} bytes, holds {held}"


def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["RssAnon"].split()[0]) * 1024


def test_adapters_are_the_same_on_any_number_of_ranks(folders):
    one, two = (
        {name: p for name, p in network.named_parameters() if "lora_" in name}
        for network in (library.load(folders / "llama", lora_rank=3, seed=s)[0] for s in (7, 8))
    )
    on_ranks(2, compare_adapters, folders / "llama", one, "none")
    for name in one:
        bound = one[name].shape[1] ** -0.5  # peft's: kaiming_uniform_(a=sqrt(5))
        assert one[name].abs().max() <= bound and "lora_A" in name or not one[name].any()
        assert torch.equal(one[name], two[name]) == ("lora_B" in name)


def test_a_quantised_model_is_whole_on_every_rank_with_the_same_adapters(folders, capfd):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    network, _ = library.load(folders / "llama", lora_rank=3, seed=7, quant="4bit")
    adapters = {name: p for name, p in network.named_parameters() if "lora_" in name}
    capfd.readouterr()
    on_ranks(2, compare_adapters, folders / "llama", adapters, "4bit")
    assert capfd.readouterr().out.count("each rank reads all the weights (--quant 4bit)") == 1


def compare_adapters(rank, world, folder, expected, quant):
    network, _ = library.load(folder, lora_rank=3, seed=7, quant=quant)
    sharded = isinstance(next(network.parameters()), DTensor)
    assert sharded == (quant == "none")
    adapters = {name: whole(p) for name, p in network.named_parameters() if "lora_" in name}
    assert adapters.keys() == expected.keys()
    assert all(torch.equal(adapters[name], expected[name]) for name in expected)


def test_a_quantised_run_goes_on_from_its_checkpoint(folders, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    on_ranks(2, compare_resumed, folders / "llama", tmp_path / "state")


def compare_resumed(rank, world, folder, state):
    def start():
        network, _ = library.load(folder, lora_rank=3, seed=7, quant="4bit")
        return network, library.optimizer(network, 1e-2)

    def step(network, optimizer):
        backward(network, MICRO_BATCHES)
        optimizer.step()
        optimizer.zero_grad()

    whole_run, resumed = start(), start()
    step(*whole_run)
    checkpoint.save_state(*whole_run, state)
    step(*whole_run)
    checkpoint.load_state(*resumed, state)
    step(*resumed)
    ends = [[p for p in run[0].parameters() if p.requires_grad] for run in (whole_run, resumed)]
    assert len(ends[0]) > 2
    atol = 1e-5 * ends[0][0].is_cuda  # sums on a GPU are not ordered
    assert all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(*ends, strict=True))


@needs_gpu
def test_a_quantised_run_on_a_gpu_goes_on_from_its_checkpoint(folders, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        compare_resumed(0, 1, folders / "llama", tmp_path / "state")
    finally:
        dist.destroy_process_group()


def test_weights_under_other_names_are_read_by_transformers(folders, tmp_path, capsys):
    plain(folders / "qwen2").model.save_pretrained(tmp_path)  # no prefix "model."
    tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["Qwen2ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    network, _ = library.load(tmp_path)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "renames or reshapes model.embed_tokens.weight" in out
    expected = plain(folders / "qwen2").state_dict()
    assert all(torch.equal(p, expected[n]) for n, p in network.named_parameters())
    on_ranks(2, compare_weights, tmp_path, expected)


def compare_weights(rank, world, folder, expected):
    network, _ = library.load(folder)
    assert all(isinstance(p, DTensor) for p in network.parameters())
    assert all(torch.equal(whole(p), expected[n]) for n, p in network.named_parameters())


def test_a_tied_head_that_differs_on_disk_is_not_tied(folders, tmp_path, capsys):
    shutil.copytree(folders / "llama", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    network, _ = library.load(tmp_path)
    assert "lm_head.weight is tied in config.json only" in capsys.readouterr().out
    assert not torch.equal(network.lm_head.weight, network.model.embed_tokens.weight)

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    network, _ = library.load(tmp_path)
    assert capsys.readouterr().out == ""
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_adapters_alone_are_no_model(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no model.safetensors in this folder"):
        library.load(tmp_path)


def test_a_missing_part_of_the_weights_is_named(folders, tmp_path):
    plain(folders / "llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path)
    [part] = tmp_path.glob("model-00002-*")
    part.unlink()
    with pytest.raises(ValueError, match=part.name) as caught:
        library.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [
    GPTNeoXConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, hidden_dropout=0.5, attention_dropout=0.5),
    FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 hidden_dropout=0.5, attention_dropout=0.5),
    PhiConfig(**SHAPE, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
], ids=lambda config: config.model_type)  # fmt: skip
def test_dropout_under_other_names_is_off(tmp_path, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    network, _ = library.load(tmp_path)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert network.training and torch.equal(network(ids).logits, plain(tmp_path).eval()(ids).logits)


def test_dropout_written_in_a_models_code_is_off(folders, monkeypatch):
    make = LlamaMLP.__init__

    def with_dropout(self, config):
        make(self, config)
        self.act_fn = nn.Sequential(self.act_fn, nn.Dropout(0.5))

    monkeypatch.setattr(LlamaMLP, "__init__", with_dropout)
    network, _ = library.load(folders / "llama")
    ids = torch.tensor([[1, 2, 3, 4]])
    assert network.training and torch.equal(network(ids).logits, network(ids).logits)


def test_a_generation_config_that_could_not_be_saved_is_repaired(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "a")
    file = tmp_path / "a/generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}))
    network, words = library.load(tmp_path / "a")
    library.save(network, words, tmp_path / "b")
    saved = json.loads((tmp_path / "b/generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and saved["do_sample"] and saved["eos_token_id"] == [1, 2]
    file.write_text(json.dumps({"num_beams": 1, "num_return_sequences": 3}))
    with pytest.raises(ValueError, match="correct or delete its generation_config.json"):
        library.load(tmp_path / "a")


# full_tensors and save


def test_frozen_weights_are_handed_over_in_their_own_dtype(folders):
    network, _ = library.load(folders / "llama", lora_rank=2)
    randomise_adapters(network)
    for name, parameter in network.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    tensors = dict(library.full_tensors(network))
    merged = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert len(merged) == 2 * 7 and all("proj" in name for name in merged)
    assert {t.dtype for n, t in tensors.items() if n not in merged} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_full_tensors_are_the_weights_with_tied_heads_twice(folders, kind):
    network, _ = library.load(folders / kind)
    tensors = dict(library.full_tensors(network))
    expected = plain(folders / kind).state_dict()
    assert tensors.keys() == expected.keys() and "lm_head.weight" in tensors
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_full_tensors_merge_lora_as_peft_does(folders, kind):
    network, _ = library.load(folders / kind, lora_rank=2, lora_alpha=6)
    randomise_adapters(network)
    tensors = dict(library.full_tensors(network))
    expected = network.merge_and_unload().state_dict()
    assert tensors.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(tensors[name], expected[name], rtol=1e-6, atol=1e-7), name
    original = plain(folders / kind).state_dict()
    changed = {name for name in original if not torch.equal(original[name], tensors[name])}
    assert len(changed) == 2 * 7 and all("proj" in name for name in changed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_save_then_from_pretrained(folders, tmp_path, kind, lora_rank):
    network, words = library.load(folders / kind, lora_rank=lora_rank)
    randomise_adapters(network)
    response_logps(network, MICRO_BATCHES[0])  # our attention must not end up in config.json
    library.save(network, words, tmp_path / "a/b/best", max_shard_size="20KB")
    assert [entry.name for entry in (tmp_path / "a/b").iterdir()] == ["best"]
    files = sorted(file.name for file in (tmp_path / "a/b/best").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a/b/best", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(again) is type(plain(folders / kind)) and again.dtype == torch.float32
    expected = dict(library.full_tensors(network))
    assert all(torch.equal(p, expected[n]) for n, p in again.state_dict().items())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(again(ids).logits, network(ids).logits, atol=1e-4)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a/b/best")
    assert loaded.chat_template == words.chat_template and loaded.get_vocab() == words.get_vocab()
    assert "shared_prefix" not in (tmp_path / "a/b/best/config.json").read_text()


def test_save_replaces_the_older_folder(folders, tmp_path):
    network, words = library.load(folders / "llama")
    library.save(network, words, tmp_path / "last", max_shard_size="20KB")
    with torch.no_grad():
        network.lm_head.weight.add_(1.0)
    library.save(network, words, tmp_path / "last")
    files = [file.name for file in (tmp_path / "last").glob("*.safetensors*")]
    assert files == ["model.safetensors"]
    assert torch.equal(plain(tmp_path / "last").lm_head.weight, network.lm_head.weight)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


def test_save_checks_the_disk_before_it_writes(folders, tmp_path, monkeypatch):
    network, words = library.load(folders / "qwen2")
    size = sum(4 * p.numel() for p in network.parameters())
    leave_free(monkeypatch, size)
    with pytest.raises(ValueError, match="are free; make room, choose another --output_dir"):
        library.save(network, words, tmp_path / "new/best")
    assert list(tmp_path.iterdir()) == []
    leave_free(monkeypatch, 2 * size)
    library.save(network, words, tmp_path / "new/best")


def leave_free(monkeypatch, size):
    usage = SimpleNamespace(total=10**9, used=0, free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_checkpoint_takes_what_is_counted(folders, tmp_path, monkeypatch, lora_rank):
    base = library.skeleton(folders / "qwen2")
    matrix = 61 * 32 + 2 * (32 * (32 + 2 * 16 + 32) + 3 * 32 * 48)
    model = matrix + 2 * (32 + 2 * 16) + 5 * 32  # biases of q, k, v; norms
    inputs_and_outputs = 32 + 32 + 2 * (32 + 16) + 32 + 32 + 3 * (32 + 48)
    trained = 2 * 2 * inputs_and_outputs if lora_rank else model
    beside = (16 if lora_rank else 12) * trained
    assert library.checkpoint_bytes(base, lora_rank) == (4 * model, beside)
    leave_free(monkeypatch, int(1.05 * 4 * model) + 1)
    library.check_disk(tmp_path / "run", 4 * model)
    leave_free(monkeypatch, int(1.05 * 4 * model) - 1)
    with pytest.raises(ValueError, match="a model and 5 % of slack .*--save_total_limit"):
        library.check_disk(tmp_path / "run", 4 * model, "a model")


def test_a_gpu_that_pytorch_cannot_use_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # `make test-gpu`, too
    library.check_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nGo")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(ValueError, match='too old .*11040.*CUDA_VISIBLE_DEVICES=""') as caught:
        library.check_gpu(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    library.check_gpu(tmp_path)


# optimiser


def test_optimizer_decays_matrices_only(folders):
    network, _ = library.load(folders / "qwen2")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    step = library.optimizer(network, 0.1, (0.8, 0.9), 0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.step()
    for name, parameter in network.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.ndim == 2 else 1.0
        assert torch.allclose(parameter, factor * before[name]), name
    assert all(group["betas"] == (0.8, 0.9) for group in step.param_groups)


def test_optimizer_takes_adapters_only(folders):
    network, _ = library.load(folders / "llama", lora_rank=2)
    step = library.optimizer(network, 1e-4, (0.9, 0.999), 0.0)
    named = {id(p): name for name, p in network.named_parameters()}
    names = [named[id(p)] for group in step.param_groups for p in group["params"]]
    assert len(names) == 2 * 2 * 7 and all("lora" in name for name in names)


def test_moments_on_the_host_change_nothing(folders):
    on_ranks(2, compare_optimizers, folders / "qwen2")


def compare_optimizers(rank, world, folder):
    """Three steps, the last after a way through a state dict, as a checkpoint takes it."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights = []
    for offload in (False, True):
        network, _ = library.load(folder)
        step = library.optimizer(network, 1e-2, (0.8, 0.9), 0.1, offload=offload)
        assert isinstance(step, library.HostAdamW) == offload
        for i in range(3):
            backward(network, MICRO_BATCHES[rank::2])
            if i == 2:
                _, moments = get_state_dict(network, step, options=options)
                step = library.optimizer(network, 1e-2, (0.8, 0.9), 0.1, offload=offload)
                set_state_dict(
                    network, step, model_state_dict={}, optim_state_dict=moments, options=options
                )
            step.step()
            step.zero_grad()
            assert len(step.param_groups) == 2 and len(step.param_groups[0]["params"]) > 1
        weights.append([whole(p) for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@needs_gpu
def test_moments_leave_the_gpu_on_a_gpu():
    def trained(offload):
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda()
        size = sum(4 * p.numel() for p in layers.parameters())
        layers(torch.ones(2, 1024, device="cuda")).sum().backward()  # cuBLAS takes its workspace
        layers.zero_grad()
        start = torch.cuda.memory_allocated()
        step = library.optimizer(layers, 1e-2, offload=offload)
        for _ in range(3):
            layers(torch.ones(2, 1024, device="cuda")).square().mean().backward()
            step.step()
            step.zero_grad()
        held = torch.cuda.memory_allocated() - start
        return [p.detach().clone() for p in layers.parameters()], held / size, step

    (there, held, _), (here, rest, step) = trained(False), trained(True)
    assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))
    assert 1.9 < held < 2.1 and rest < 0.1
    assert all(state["exp_avg"].is_pinned() for state in step.state.values())


@needs_gpu
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_sharded_model_and_its_moments_on_a_gpu(folders, tmp_path, lora_rank):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        network, _ = library.load(folders / "llama", lora_rank=lora_rank)
        assert all(p.is_cuda and isinstance(p, DTensor) for p in network.parameters())
        frozen = {p.dtype for p in network.parameters() if not p.requires_grad}
        assert frozen == ({torch.bfloat16} if lora_rank else set())
        held = torch.bfloat16 if lora_rank else torch.float32  # what is frozen was rounded at load
        expected = plain(folders / "llama").state_dict()
        for name, tensor in library.full_tensors(network):
            assert torch.equal(tensor.cpu().float(), expected[name].to(held).float()), name
        step = library.optimizer(network, 1e-2, offload=True)
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        for _ in range(2):
            network(torch.tensor([[1, 2, 3]], device="cuda")).logits.square().sum().backward()
            step.step()
            step.zero_grad()
            assert all(s["exp_avg"].to_local().is_pinned() for s in step.state.values())
            _, moments = get_state_dict(network, step, options=options)
            set_state_dict(
                network, step, model_state_dict={}, optim_state_dict=moments, options=options
            )
            assert not any(s["exp_avg_sq"].to_local().is_cuda for s in step.state.values())
    finally:
        dist.destroy_process_group()


def test_clip_grad_norm(folders):
    network, _ = library.load(folders / "llama")
    backward(network, MICRO_BATCHES)
    before = gradients(network)
    norm = sum((gradient**2).sum() for gradient in before.values()) ** 0.5
    assert torch.allclose(library.clip_grad_norm(network, 1e9), norm)
    assert all(torch.equal(before[n], g) for n, g in gradients(network).items())
    assert torch.allclose(library.clip_grad_norm(network, norm.item() / 4), norm)
    for name, gradient in gradients(network).items():
        assert torch.allclose(gradient, before[name] / 4, atol=1e-6, rtol=1e-4)


# FSDP2


@pytest.mark.parametrize(("name", "own"), [("llama", True), ("qwen2", False)])
def test_an_embedding_that_is_not_tied_is_gathered_by_itself(folders, tmp_path, name, own):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        network, _ = library.load(folders / name)
        assert network.config.tie_word_embeddings is not own
        assert isinstance(network.get_input_embeddings(), FSDPModule) == own
        assert all(isinstance(layer, FSDPModule) for layer in network.model.layers)
    finally:
        dist.destroy_process_group()


def test_shard_needs_a_process_group(folders):
    network, _ = library.load(folders / "llama")
    with pytest.raises(AssertionError, match="init_process_group"):
        library.shard(network)


@pytest.mark.parametrize("world", [1, 2])
def test_fsdp_equals_one_process(folders, tmp_path, world):
    on_ranks(world, train_and_save, folders, tmp_path)
    for kind, lora_rank in RUNS[:world]:
        results = torch.load(tmp_path / f"{kind}.pt")
        network, _ = library.load(folders / kind, lora_rank=lora_rank)
        randomise_adapters(network)
        before = {name: t.clone() for name, t in library.full_tensors(network)}
        assert before.keys() == results["before"].keys()
        for name, tensor in before.items():
            assert results["before"][name].dtype == torch.float32
            assert torch.equal(results["before"][name], tensor), name

        backward(network, MICRO_BATCHES)
        assert_gradients_close(results["gradients"], gradients(network))
        assert torch.allclose(results["norm"], library.clip_grad_norm(network, 0.5), rtol=1e-5)
        one_step(network)
        after = dict(library.full_tensors(network))
        for name, tensor in after.items():
            assert torch.allclose(results["after"][name], tensor, atol=1e-6), name
        assert any(not torch.equal(after[name], before[name]) for name in before)

        saved = plain(tmp_path / kind).state_dict()
        assert all(torch.equal(saved[name], results["after"][name]) for name in saved)
        error = (results["bf16"] - response_logps(network, MICRO_BATCHES[0])[0]).abs().max()
        assert 1e-4 < error < 0.5  # computed in bf16 indeed
        assert results["bf16_dtypes"] == {torch.float32}


def one_step(network):
    """Of AdamW with a large eps, which makes the step proportional to the gradient."""
    step = library.optimizer(network, 1e-2, (0.9, 0.999), 0.1)
    for group in step.param_groups:
        group["eps"] = 1.0
    step.step()


def on_ranks(world, work, *arguments):
    """Runs work(rank, world, *arguments) on gloo ranks; what fails there fails here."""
    with tempfile.TemporaryDirectory() as folder:  # fork: ranks need not import everything again
        everything = (f"{folder}/store", world, work, *arguments)
        mp.start_processes(rank_of, everything, nprocs=world, start_method="fork")


def rank_of(rank, store, world, work, *arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    work(rank, world, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def train_and_save(rank, world, folders, out):
    """One rank of `test_fsdp_equals_one_process`; rank 0 leaves what it saw in `out`."""
    for kind, lora_rank in RUNS[:world]:
        checkpointing = lora_rank > 0
        network, words = library.load(
            folders / kind, lora_rank=lora_rank, gradient_checkpointing=checkpointing
        )
        randomise_adapters(network)
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        with torch.no_grad():  # leaves the root gathered
            response_logps(network, MICRO_BATCHES[0])
        result = {"before": {n: t.clone() for n, t in library.full_tensors(network)}}
        backward(network, MICRO_BATCHES[rank::world])
        result["gradients"] = gradients(network)
        result["norm"] = library.clip_grad_norm(network, 0.5)
        one_step(network)
        result["after"] = {n: t.clone() for n, t in library.full_tensors(network)}
        library.save(network, words, out / kind)

        half, _ = library.load(out / kind, compute_dtype=torch.bfloat16)
        with torch.no_grad():  # leaves bf16 weights in the root
            response_logps(half, MICRO_BATCHES[0])
        masters = list(library.full_tensors(half))
        logps, _ = response_logps(half, MICRO_BATCHES[0])
        logps.sum().backward()
        result["bf16"] = logps.detach()
        tensors = [logps, *dict(masters).values(), *gradients(half).values()]
        result["bf16_dtypes"] = {tensor.dtype for tensor in tensors}
        if rank == 0:
            torch.save(result, out / f"{kind}.pt")
        dist.barrier()
