"""A causal language model and its tokenizer: load, LoRA, shard, hand over, clip, optimise, save.

    load          fp32 master weights: at learning rate 1e-6 a bf16 master loses the update.
                  Each rank reads only its part of every weight
    shard         FSDP2: bf16 compute on a GPU (fp32 on a CPU), fp32 reduction. Gradients are the
                  SUM over ranks, not FSDP2's mean: every loss divides by a count of all ranks
    full_tensors  the weights for the sampler, one at a time, LoRA merged
                  W + alpha / r * B A
    optimizer     AdamW. Weight decay acts on matrices (weights and embeddings), not on biases and
                  norms; veRL and LLaMA-Factory decay everything, which hardly matters at 0.01

Log-probs are in packing.py. In a process group all ranks call `load`, `full_tensors`,
`clip_grad_norm` and `save` together.
"""

import copy
import datetime
import json
import math
import os
import re
import shutil
import socket
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.distributed as dist
from huggingface_hub import constants as hub_constants
from huggingface_hub import split_torch_state_dict_into_shards, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.initialization import meta_device_safe_creation_ops
from transformers.utils import cached_file

DATE = datetime.date(2024, 7, 26)  # what Llama's templates print where they know no clock
# Jinja: the system message moves to the head of the user's
FOLD = """\
{%- if messages[0]["role"] == "system" -%}
{%- set first = messages[0]["content"] ~ "\n\n" ~ messages[1]["content"] -%}
{%- set messages = [{"role": "user", "content": first}] + messages[2:] -%}
{%- endif -%}
"""


def load(
    model_name_or_path: str | Path,
    *,
    lora_rank: int = 0,
    lora_alpha: int = 32,
    quant: str = "none",
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    compute_dtype: torch.dtype | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model with fp32 weights, without dropout, and its tokenizer.

    In a process group the model is sharded over the ranks' devices; without one it is whole, on the
    CPU. Weights that adapters freeze are bfloat16 on a GPU, or NF4 (QLoRA). Checkpoints that
    transformers converts while reading, and those to be quantised, are first read whole by every
    rank; rank 0 says so.

    model_name_or_path      folder written by save_pretrained, or a name on the Hugging Face Hub
    lora_rank               0: all weights are trained; r > 0: adapters of rank r on every linear
                            layer but the LM head
    lora_alpha              adapters are scaled by lora_alpha / lora_rank
    quant                   "4bit": the frozen linear layers in NF4 with double quantisation
                            (bitsandbytes), on this rank's device; needs lora_rank
    gradient_checkpointing  recompute activations in the backward pass
    torch_compile           compile the decoder layers: for the first length that they see, then
                            once more for any length, and once without gradients. A deepcopy of the
                            model would run the original's layers: load it again instead
    seed                    of the adapters, which are the same on any number of ranks
    compute_dtype           see `shard`

    ValueError where the folder, its weights, its tokenizer or the chat template are missing.
    """
    tokenizer = load_tokenizer(model_name_or_path, trust_remote_code=trust_remote_code)
    frozen_in_bf16 = lora_rank > 0 and torch.cuda.is_available()
    dtype = torch.bfloat16 if frozen_in_bf16 else torch.float32
    quantised = _quantised(quant, lora_rank, dtype)
    base = skeleton(model_name_or_path, dtype=dtype, trust_remote_code=trust_remote_code)
    generation_config = _generation_config(model_name_or_path, base)
    reader = _reader(model_name_or_path)
    whole = "--quant 4bit" if quantised else read_whole(base, reader)
    if whole:
        if _is_first():
            print(f"{model_name_or_path}: each rank reads all the weights ({whole})", flush=True)
        base = _from_pretrained(base, dtype, trust_remote_code, quantised)
    base.generation_config = generation_config
    if gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = _with_lora(base, lora_rank, lora_alpha) if lora_rank > 0 else base
    if torch_compile:
        for layer in _layers(base):
            layer.forward = torch.compile(layer.forward)  # FSDP2's hooks stay outside
    if dist.is_initialized():
        model = shard(model, compute_dtype=compute_dtype)
    if not whole:
        _fill(model, reader)
    _draw_adapters(model, seed)
    return model.train(), tokenizer


def skeleton(
    model_name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model without dropout or storage (meta device): its names, shapes and layers."""
    config = read_config(model_name_or_path, trust_remote_code=trust_remote_code)
    for part in (config, config.get_text_config()):
        for name, value in [*vars(part).items()]:
            if "drop" in name and isinstance(value, float):  # training mode would turn it on
                setattr(part, name, 0.0)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    with (
        _reading_config(model_name_or_path),
        torch.device("meta"),
        meta_device_safe_creation_ops(),
    ):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation="eager" if capped else None,  # SDPA drops the cap
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # a rate written in the model's code
            module.p = 0.0
    return model


@contextmanager
def _reading_config(name: str | Path) -> Iterator[None]:
    """Within, transformers reads config.json: ValueError where it fails at one of its values."""
    try:
        yield
    except (StrictDataclassError, AttributeError, LookupError, TypeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name}: correct its config.json ({why})") from error


def read_config(
    model_name_or_path: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """A model's config.json; ValueError where a value in it has the wrong type or does not fit."""
    with _reading_config(model_name_or_path):
        return AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)


def load_tokenizer(
    model_name_or_path: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; ValueError where folder, tokenizer or chat template are missing."""
    check_folder(str(model_name_or_path))
    try:
        read_config(model_name_or_path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(
            model_name_or_path, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise _not_loaded(model_name_or_path, error) from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{model_name_or_path}: the tokenizer has no chat template; take an instruct model, or "
            "put a chat_template.jinja beside the tokenizer"
        )
    _adapt_template(tokenizer)
    return tokenizer


def _adapt_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Change a chat template that prints today's date or takes no system message; checkpoints too.

    A run that is resumed tomorrow, or served next year, must see the same prompts.
    """

    def change(edit: Callable[[str], str], why: str) -> None:
        template = tokenizer.chat_template
        is_dict = isinstance(template, dict)
        new = {n: edit(t) for n, t in template.items()} if is_dict else edit(template)
        if new != template:
            tokenizer.chat_template = new
            _say(f"{tokenizer.name_or_path}: the chat template {why}")

    pinned = lambda call: json.dumps(DATE.strftime(call[2]))
    date = f"prints today's date: it is {DATE:%d %b %Y} in this run and its checkpoints"
    change(lambda text: re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", pinned, text), date)
    chat = [{"role": "system", "content": "Turn-0"}, {"role": "user", "content": "Turn-1"}]
    try:
        takes_system = "Turn-0" in tokenizer.apply_chat_template(chat, tokenize=False)
    except TemplateError:
        takes_system = False
    if not takes_system:
        why = "takes no system message: it stands at the head of the user's, in checkpoints too"
        change(lambda text: FOLD + text, why)


@cache
def _say(text: str) -> None:
    """Print a line on rank 0, once."""
    if _is_first():
        print(text, flush=True)


def shard(
    model: nn.Module, mesh: DeviceMesh | None = None, *, compute_dtype: torch.dtype | None = None
) -> nn.Module:
    """The same model, its parameters split over the ranks of `mesh` (FSDP2), on the ranks' devices.

    mesh           one-dimensional; None: all ranks of the process group, GPUs where there are any
    compute_dtype  of matrix products; None: bfloat16 on a GPU, float32 on a CPU

    Weights are gathered by decoder layer; the embedding by itself, unless the LM head shares it.
    Gradients are summed over ranks, in float32. Each backward pass is a collective, so all ranks
    need equally many (packing: a row without responses). A quantised model stays whole on every
    rank, and clip_grad_norm adds up the adapters' gradients.
    """
    assert dist.is_initialized(), "shard needs torch.distributed.init_process_group, also on 1 rank"
    if mesh is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    if compute_dtype is None:
        compute_dtype = torch.float32 if mesh.device_type == "cpu" else torch.bfloat16
    if _is_quantised(model):
        return model
    base = _transformer(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    own = [] if embedding.weight is head.weight else [embedding]
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in (*own, *_layers(base), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # sum, not mean
        module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    return model


@torch.no_grad()
def adapter_norm(model: nn.Module) -> float:
    """Norm of the adapters' B matrices: 0 at first and without adapters; all ranks call."""
    parts = [_full(p) for name, p in model.named_parameters() if ".lora_B." in name]
    return float(sum((part.float() ** 2).sum() for part in parts)) ** 0.5


@torch.no_grad()
def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole weight of the plain transformers model, one at a time, all ranks together.

    Trained and merged weights are fp32; frozen ones keep their dtype. Adapters are merged into the
    weights that they adapt. Tied embeddings come under both names, since a sampler that is sent
    only the embedding would keep its old LM head. A rank holds one more whole weight, no more.
    """
    base = _transformer(model)
    modules = dict(base.named_modules())
    originals = {}
    if _is_quantised(model):  # merging into NF4 would keep its error
        originals = _tensors(base.name_or_path, str(next(base.parameters()).device))
    for name, tensor in base.state_dict().items():  # FSDP2 reshards first: fp32, not the bf16 copy
        if ".lora_" in name or ".base_layer.weight." in name:  # adapters; bitsandbytes' constants
            continue
        owner = name.removesuffix(".base_layer.weight")
        if owner != name:
            whole = originals[owner + ".weight"]() if originals else _full(tensor)
            yield owner + ".weight", whole.float() + _lora_update(modules[owner])
        else:
            yield name.replace(".base_layer.", "."), _full(tensor)


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Norm of the whole gradient, a scalar, before it is scaled to at most `max_norm`."""
    if _is_quantised(model) and dist.is_initialized():
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
    return _full(nn.utils.clip_grad_norm_(model.parameters(), max_norm))


def optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    *,
    offload: bool = False,
) -> torch.optim.AdamW:
    """AdamW over the trained parameters; make it after `shard`. Two groups: matrices, the rest.

    lr, betas     as in torch.optim.AdamW
    weight_decay  of the matrices (ndim >= 2); biases and norms are not decayed
    offload       keep the moments, 8 bytes per parameter, in host memory: see HostAdamW
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind = HostAdamW if offload else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, fused=True)  # one pass over each shard


class HostAdamW(torch.optim.AdamW):
    """AdamW, to the bit, with its moments in pinned host memory outside the step.

    The step moves one parameter's moments at a time to the GPU and back: 16 bytes per parameter
    cross the bus, and the GPU holds only that parameter's moments beside weights and gradients.
    """

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._host, self._block = {}, torch.empty(0)

    def step(self, closure=None):
        assert closure is None, "steps are taken parameter by parameter: no closure"
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    for _, moment in self._moments(parameter):
                        moment.data = moment.to(parameter.device, non_blocking=True)
                    self.param_groups = [group | {"params": [parameter]}]
                    super().step()
                    self._leave(parameter)
        finally:
            self.param_groups = groups
        self._wait()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)  # it moves them to the GPU
        for parameter in self.state:
            self._leave(parameter)
        self._wait()

    @torch.no_grad()
    def _moments(self, parameter):
        """(Key, this rank's part) of both moments, where they exist."""
        state = self.state.get(parameter, {})
        found = [(name, state[name]) for name in ("exp_avg", "exp_avg_sq") if name in state]
        return [((parameter, n), m.to_local() if isinstance(m, DTensor) else m) for n, m in found]

    def _leave(self, parameter):
        """Copy the moments to their place on the host and free the GPU's copy."""
        for key, moment in self._moments(parameter):
            if moment.is_cuda:
                if key not in self._host:
                    self._host[key] = self._pinned(moment)
                moment.data = self._host[key].copy_(moment, non_blocking=True)

    def _pinned(self, moment):
        """Host memory cut from blocks of 1 GiB or more.

        torch rounds whatever it pins up to a power of two bytes, so that a block takes all of it.
        """
        n = moment.numel()
        if n > self._block.numel():
            size = 1 << (max(n, 2**28) - 1).bit_length()
            self._block = torch.empty(size, dtype=moment.dtype, pin_memory=True)
        room, self._block = self._block[:n], self._block[n:]
        return room.view(moment.shape)

    def _wait(self):
        if self._host:
            torch.cuda.synchronize()  # before the host reads them


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    max_shard_size: str = "5GB",
    texts: dict[str, str] | None = None,
) -> None:
    """Write a plain save_pretrained folder, adapters merged, fp32; rank 0 writes, all ranks call.

    Its subfolder `adapter` holds the adapters in peft's format.

    path            appears when it is complete, and replaces an older folder of that name
    max_shard_size  of a safetensors file; rank 0 holds as much on the CPU
    texts           further files: name -> content

    ValueError on all ranks if rank 0's disk lacks the space; OSError with path and bytes if it fills
    up all the same. Then nothing of this folder is left.
    """
    path, base, first = Path(path).resolve(), _transformer(model), _is_first()
    shapes = _shapes(base)
    size = sum(tensor.nbytes for tensor in shapes.values())
    check_disk(path, size)
    temporary = path.with_name(f".{path.name}.incomplete")
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    with whole_or_nothing(temporary, size):
        plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
        files = defaultdict(dict)
        for own_name, tensor in full_tensors(model):
            for name, part in _on_disk(base, own_name, tensor) if first else ():
                if name not in plan.tensor_to_filename:  # a tied weight's second name
                    continue
                file = plan.tensor_to_filename[name]
                files[file][name] = part.float().cpu().contiguous()
                if len(files[file]) == len(plan.filename_to_tensors[file]):
                    save_file(files.pop(file), temporary / file, metadata={"format": "pt"})
        if first:
            assert not files, (
                f"weights without a file: {[list(tensors) for tensors in files.values()]}"
            )
            if plan.is_sharded:
                index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
            base.config.architectures = [type(base).__name__.removeprefix("FSDP")]
            _plain_config(base).save_pretrained(temporary)
            base.generation_config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for name, text in (texts or {}).items():
                (temporary / name).write_text(text, encoding="utf-8")
        if hasattr(model, "peft_config"):
            # _full is a collective: all ranks gather, rank 0 writes
            adapters = {n: _full(p).cpu() for n, p in model.named_parameters() if ".lora_" in n}
            if first:
                folder = temporary / "adapter"
                model.save_pretrained(folder, state_dict=adapters, save_embedding_layers=False)
        if first:
            replace_folder(path, temporary)
    if dist.is_initialized():
        dist.barrier()


def check_folder(name: str) -> None:
    """ValueError with the remedy if `name` is neither a loadable folder nor a Hub name."""
    path = Path(name)
    if not path.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
            raise ValueError(f"{name}: no such folder; give one, or a name on the Hugging Face Hub")
        return _check_hub(name)
    for what, patterns in {
        "config.json": ["config.json"],
        "model.safetensors": ["model.safetensors", "model.safetensors.index.json"],
        "tokenizer": ["tokenizer*", "vocab.*"],
    }.items():
        if not any(True for pattern in patterns for _ in path.glob(pattern)):
            latest = sorted(path.glob("checkpoint-*[0-9]"), key=os.path.getmtime)[-1:]  # of a run
            beside = Path(name.rstrip("/").removesuffix("-state"))
            saved = [
                str(folder) for folder in (*latest, beside) if folder.is_dir() and folder != path
            ]
            remedy = f"take {saved[0]}" if saved else "write it with save_pretrained"
            raise ValueError(f"{name}: no {what} in this folder; {remedy}")


def _check_hub(name: str) -> None:
    """ValueError if a Hub name is neither cached nor reachable, without a minute of retries."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str) or getproxies():
        return
    url = urlsplit(hub_constants.ENDPOINT)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname, port), timeout=5).close()
    except OSError as error:
        raise ValueError(
            f"{name}: no such folder, not in the cache, and {url.hostname} is out of reach "
            f"({error}); give a folder on this machine, e.g. toy_model"
        ) from None


def _not_loaded(name: str | Path, error: OSError) -> ValueError:
    why = str(error).splitlines()[0]
    return ValueError(
        f"{name}: {why} Give a folder on this machine, e.g. toy_model, or check the name"
    )


def weight_files(model_name_or_path: str | Path) -> list[str]:
    """Paths of the model's own safetensors; others in its folder are adapters or copies."""
    found = partial(cached_file, model_name_or_path, _raise_exceptions_for_missing_entries=False)
    if single := found("model.safetensors"):
        return [single]
    index = found("model.safetensors.index.json")
    try:
        if not index:
            raise OSError("no model.safetensors and no model.safetensors.index.json.")
        files = sorted({*json.loads(Path(index).read_text())["weight_map"].values()})
        return [cached_file(model_name_or_path, file) for file in files]
    except OSError as error:
        raise _not_loaded(model_name_or_path, error) from error


def _reader(model_name_or_path: str | Path) -> HuggingFaceStorageReader:
    files = weight_files(model_name_or_path)
    reader = HuggingFaceStorageReader(str(Path(files[0]).parent))
    reader.fs.ls = lambda folder: files  # its own takes every safetensors file there
    return reader


def read_whole(base: PreTrainedModel, reader: HuggingFaceStorageReader | None = None) -> str:
    """Why each rank reads all of a skeleton's weights instead of its slices; "" where it need not."""
    reader = reader or _reader(base.name_or_path)
    weights, on_disk = _weights(base), reader.read_metadata().state_dict_metadata
    if getattr(base.config, "quantization_config", None):
        return "they are quantised"
    if any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(base)):
        return f"transformers converts those of {base.config.model_type}"
    if base.dtype != torch.float32 and base._keep_in_fp32_modules_strict:
        return "some stay in float32"
    for name, weight in weights.items():
        if name not in on_disk or on_disk[name].size != weight.shape:
            return f"transformers renames or reshapes {name}"
    read = _tensors(base.name_or_path)
    for name in (base.state_dict().keys() & read.keys()) - weights.keys():  # a second, tied name
        source = base.all_tied_weights_keys.get(name)
        if source not in read or not torch.equal(read[name](), read[source]()):
            return f"{name} is tied in config.json only"
    return ""


def _from_pretrained(
    base: PreTrainedModel, dtype: torch.dtype, trust_remote_code: bool, quantised: dict
) -> PreTrainedModel:
    """A skeleton's model as transformers reads it: whole, on the CPU unless `quantised` says so."""
    name = base.name_or_path
    try:
        model, info = type(base).from_pretrained(
            name,
            config=base.config,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,  # never a pickle
            trust_remote_code=trust_remote_code,
            **quantised,
        )
    except OSError as error:
        raise _not_loaded(name, error) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name}: {len(missing)} weights are missing, {missing[0]} first; "
            "download or save the model again"
        )
    return model


def _generation_config(model_name_or_path: str | Path, base: PreTrainedModel) -> GenerationConfig:
    """The model's own, made valid: temperature without do_sample can be read but not saved."""
    try:
        config = GenerationConfig.from_pretrained(model_name_or_path)
        try:
            config.validate(strict=True)
        except ValueError:
            config.do_sample = True
            config.validate(strict=True)
    except OSError:
        return base.generation_config
    except ValueError as error:
        raise ValueError(
            f"{model_name_or_path}: correct or delete its generation_config.json: {error}"
        ) from error
    return config


@torch.no_grad()
def _fill(model: nn.Module, reader: HuggingFaceStorageReader) -> None:
    """Give a skeleton, sharded or whole, its storage, weights and non-persistent buffers."""
    base, sharded = _transformer(model), dist.is_initialized()
    model.to_empty(device="cuda" if sharded and torch.cuda.is_available() else "cpu")
    base.tie_weights()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # "assuming ... single"
        checkpoint.load(_weights(base), storage_reader=reader, no_dist=not sharded)
    for tensor in (*base.parameters(), *base.buffers()):
        tensor._is_hf_initialized = True  # so that transformers does not draw them again
    for name, buffer in base.named_non_persistent_buffers():  # rotary frequencies: not on disk
        buffer._is_hf_initialized = False
    for module in base.modules():
        module._is_hf_initialized = False
    base.initialize_weights()


@torch.no_grad()
def _draw_adapters(model: nn.Module, seed: int) -> None:
    """Initialise as peft does, A uniform and B zero; drawn whole, so that ranks do not matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            A = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                A = distribute_tensor(A, mesh, placements, src_data_rank=None)  # no communication
            parameter.copy_(A)
        elif ".lora_B." in name:
            parameter.zero_()


def _with_lora(model: PreTrainedModel, rank: int, alpha: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _quantised(quant: str, lora_rank: int, compute_dtype: torch.dtype) -> dict:
    """Arguments of from_pretrained that load the linear layers in NF4; none for "none"."""
    if quant == "none":
        return {}
    assert quant == "4bit" and lora_rank > 0, (quant, lora_rank)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": nf4, "device_map": {"": device}}


def _is_quantised(model: nn.Module) -> bool:
    return getattr(_transformer(model), "is_quantized", False)


def _tensors(model_name_or_path: str, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """Name -> reader of the weights on disk."""
    readers = {}
    for file in weight_files(model_name_or_path):
        tensors = safe_open(file, "pt", device=device)
        readers |= {name: partial(tensors.get_tensor, name) for name in tensors.keys()}  # noqa: SIM118
    return readers


def _layers(base: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers; ValueError for a family that keeps them under another name."""
    layers = getattr(base.get_decoder(), "layers", None)
    if layers is None:
        family = base.config.model_type
        raise ValueError(
            f"models of type {family} are not supported: their decoder has no `layers`"
        )
    return layers


def _plain_config(base: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the merged model as it is saved: fp32, without quantisation."""
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    config.dtype = torch.float32
    return config


def _transformer(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without its LoRA wrapper if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _full(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _lora_update(layer: nn.Module, adapter: str = "default") -> Tensor:
    """alpha / r * B A of an adapted linear layer, (out, in)."""
    A, B = _full(layer.lora_A[adapter].weight), _full(layer.lora_B[adapter].weight)
    return B @ A * layer.scaling[adapter]


def _weights(base: PreTrainedModel) -> dict[str, Tensor]:
    """Name on disk -> tensor: tied weights once, persistent buffers, no adapters."""
    once = {name for name, _ in (*base.named_parameters(), *base.named_buffers())}
    state = {name: tensor for name, tensor in base.state_dict().items() if name in once}
    return {n.replace(".base_layer.", "."): t for n, t in state.items() if ".lora_" not in n}


def _shapes(base: PreTrainedModel) -> dict[str, Tensor]:
    """What `save` writes, without data and unquantised."""
    shapes = {name: tensor.shape for name, tensor in _weights(base).items()}
    for name, layer in base.named_modules():
        if hasattr(layer, "lora_A"):  # NF4 packs two weights in a byte
            shapes[name + ".weight"] = (layer.out_features, layer.in_features)
    empty = partial(torch.empty, dtype=torch.float32, device="meta")
    return dict(part for n, s in shapes.items() for part in _on_disk(base, n, empty(s)))


def _on_disk(base: PreTrainedModel, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """A weight as checkpoints of this family hold it: experts, which are one tensor here, apart."""
    return revert_weight_conversion(base, {name: tensor}).items()


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def checkpoint_bytes(base: PreTrainedModel, lora_rank: int = 0) -> tuple[int, int]:
    """Bytes of a saved model, and of what is beside it in a checkpoint.

    base  from `skeleton`; adapters are added to it

    The merged model takes 4 bytes per parameter; resuming takes 12 (weight and two moments) per
    trained one; adapters are saved once more in peft's format.
    """
    size = sum(tensor.nbytes for tensor in _shapes(base).values())
    model = _with_lora(base, lora_rank, 1) if lora_rank > 0 else base
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return size, (16 if lora_rank > 0 else 12) * trained


@contextmanager
def whole_or_nothing(folder: Path, size: int):
    """Deletes `folder` where it cannot be written; OSError with its path and `size` in bytes."""
    try:
        yield
    except (OSError, SafetensorError, checkpoint.CheckpointException) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise OSError(
            f"{folder}: {size:,} bytes could not be written ({reason}); make room, choose another "
            "--output_dir, or keep fewer checkpoints (--save_total_limit); earlier checkpoints are "
            "untouched"
        ) from error


def check_disk(path: Path, needed: int, what: str = "the model") -> None:
    """ValueError on all ranks unless rank 0 has `needed` bytes and 5 % more free at `path`."""
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    free = [shutil.disk_usage(folder).free]
    if dist.is_initialized():
        dist.broadcast_object_list(free, src=0)
    if free[0] < 1.05 * needed:
        raise ValueError(
            f"{path}: {what} and 5 % of slack need {1.05 * needed / 1e9:.1f} GB, "
            f"{free[0] / 1e9:.1f} GB are free; make room, choose another --output_dir, "
            "or keep fewer checkpoints (--save_total_limit)"
        )


def check_gpu(devices: Path = Path("/dev")) -> None:
    """ValueError if the machine has a GPU that this PyTorch cannot use: no silent CPU run."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or torch.cuda.is_available() or not any(devices.glob("nvidia[0-9]*")):
        return
    why = "none is visible"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a driver too old; a build for the CPU
        why = str(error).splitlines()[0].rstrip(".")
    raise ValueError(
        f"this machine has a GPU, but PyTorch {torch.__version__} cannot use it ({why}): update "
        "the driver, or install a PyTorch that fits it; "
        'CUDA_VISIBLE_DEVICES="" runs on the CPU'
    )


def replace_folder(path: Path, new: Path) -> None:
    """Rename `new` to `path`; an older folder of that name is deleted once `new` is on disk."""
    for file in filter(Path.is_file, new.iterdir()):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
