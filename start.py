"""Before and after the loops: process group, command line, data, checks, and how a run ends.

    init_distributed   torchrun's process group, or one of a single rank
    parse              flags -> the common knobs (Config of train.py) and the row that --algo names
    table              the methods, and what differs (train.py --list)
    announce           what is about to happen
    Setup              what a rank reads and loads before its loop
    load_examples      training examples and the evaluation subset
    leave              how a rank that cannot continue ends, and the exit codes

Mistakes are found before anything heavy is loaded, and errors name the remedy.
"""

import ctypes
import hashlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm import tqdm
from transformers import HfArgumentParser

import checkpoint
import data
import model as modeling
import rollout
import scoring
from tools import plan, serving

PROGRAM = {
    "prog": "train.py",
    "usage": "train.py --algo NAME [--FLAG VALUE ...] [@FILE ...]",
    "allow_abbrev": False,
}


EXPERTS = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"  # by family
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers
ORIGINAL = "original_max_position_embeddings"
PATIENCE = timedelta(days=1)  # ranks wait for each other's searches, evaluations and saves
TRIED = 64  # expert responses that a reward of one's own is tried on
ECHO = 10  # seconds that a rank waits before it reports a lost peer as its own failure


# ------------------------------------------------------------------------------- the process group


def init_distributed() -> None:
    """Join torchrun's process group, or make one of a single rank."""
    if "RANK" not in os.environ:  # port 0: any free one
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    backend, own_store = "gloo", {}
    if torch.cuda.is_available():
        local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= cards:
            print(f"error: {cards} GPUs are visible: --nproc_per_node={cards}", file=sys.stderr)
            sys.exit(2)
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    if "TORCHELASTIC_RESTART_COUNT" in os.environ and os.environ["GROUP_WORLD_SIZE"] == "1":
        # torchrun keeps one store across restarts: without a prefix, ranks would find the addresses
        # of those that died. Each node counts its own restarts, so several nodes need
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        own_store = {"store": store, "rank": rank, "world_size": world}
    dist.init_process_group(backend, timeout=PATIENCE, **own_store)
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # if torchrun is killed, its ranks still save and exit: 1 is PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


# -------------------------------------------------------------------------------- the command line


def parse(argv: list[str], common: type, rows: dict[str, type]) -> tuple:
    """An instance of `common` and one of the row that --algo names, from the command line.

    Later wins: a default, the row's own default, the command line. @FILE reads flags from a file,
    in which # starts a comment. As one file may serve all rows, its flags of other rows are ignored
    and listed; a typed one is an error.
    """
    words = list(_unfolded(argv))
    typed = {_name(word) for word in argv if word.startswith("--")}
    peek = ArgumentParser(add_help=False, **PROGRAM)
    peek.add_argument("--algo", choices=rows, default=common.algo)
    algo = peek.parse_known_args(words)[0].algo
    row = rows[algo]
    parser = HfArgumentParser((common, row), description=f"{algo}: {row.__doc__}", **PROGRAM)
    _shorten_help(parser)
    defaults = {name: value for name, (value, _) in row.defaults.items()}
    if None in defaults.values():  # it depends on other flags of the row
        own = HfArgumentParser(row, add_help=False, **PROGRAM)
        knobs, _ = own.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        defaults |= {n: getattr(knobs, n) for n, value in defaults.items() if value is None}
    parser.set_defaults(output_dir=f"runs/{algo}", **defaults)
    known = _names(common) | _names(row)
    kept, ignored = [], []
    for flag in _flags(words):
        name = _name(flag[0])
        owners = [other for other in rows if name in _names(rows[other])]
        if name in known or not flag[0].startswith("--") or name == "help":
            kept += flag
        elif not owners:
            near = get_close_matches(name, sorted(known), n=1)
            meant = f"did you mean --{near[0]}? " if near else ""
            parser.error(f"unknown flag --{name}; {meant}--help lists those of --algo {algo}")
        elif name in typed:
            parser.error(f"--{name} belongs to --algo {', '.join(owners)}, not to {algo}")
        else:
            ignored.append(f"--{name}")
    try:
        config, method, rest = parser.parse_args_into_dataclasses(
            kept, look_for_args_file=False, return_remaining_strings=True
        )
        method.check(config)
    except ValueError as error:
        parser.error(str(error))
    if rest:
        parser.error(f"unknown argument {rest[0]}")
    for name, why in {**config.flags_without_effect(), **method.flags_without_effect()}.items():
        if typed & {name, f"no_{name}"}:
            parser.error(f"--{name} has no effect here: {why}")
    if ignored and os.environ.get("RANK", "0") == "0":
        print(f"flags of other methods in the recipe, ignored: {' '.join(ignored)}")
    return config, method


def own_flags(words: list[str], common: type, row: type) -> list[str]:
    """The flags among `words`, and in their @FILEs, that a row reads, with their values."""
    own = _names(common) | _names(row)
    return [word for flag in _flags(_unfolded(words)) if _name(flag[0]) in own for word in flag]


def _shorten_help(parser: ArgumentParser) -> None:
    """--help without --max-steps beside --max_steps, with types for values and short --no_x."""
    for action in parser._actions:
        action.option_strings = [x for x in action.option_strings if "-" not in x.strip("-")]
        if action.option_strings[0].startswith("--no_"):
            action.help, action.default = f"turn off --{action.dest}", SUPPRESS
        elif action.type and not action.choices:
            action.metavar = action.type.__name__.removeprefix("string_to_")


def _unfolded(argv: Iterable[str]) -> Iterator[str]:
    """The words of a command line, each @FILE replaced by those that it holds."""
    for word in argv:
        if not word.startswith("@"):
            yield word
            continue
        try:
            lines = Path(word[1:]).read_text().splitlines()
        except OSError as error:
            ArgumentParser(**PROGRAM).error(f"{word}: {error}")
        yield from _unfolded(part for line in lines for part in line.split("#")[0].split())


def _flags(words: Iterable[str]) -> list[list[str]]:
    """Each flag with its values."""
    flags = []
    for word in words:
        if word.startswith("--") or not flags:
            flags.append([])
        flags[-1].append(word)
    return flags


def _name(word: str) -> str:
    """The name of a flag: "spo_beta" of --spo-beta=0.5."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def _names(knobs: type) -> set[str]:
    """The flags of a dataclass, --no_x included."""
    own = {f.name: f for f in fields(knobs) if f.init}
    return {*own, *(f"no_{name}" for name, f in own.items() if f.default is True)}


def table(rows: dict[str, type], shared: type) -> str:
    """The methods: name and docstring, then the knobs that a row adds to those it builds on."""
    width, lines = max(map(len, rows)), []
    for name, row in {**rows, "(rollouts)": shared}.items():
        lines.append(f"{name:{width}}  {row.__doc__.partition(chr(10))[0]}")
        knobs = row()
        changed = {  # None: the row computes it
            knob: (getattr(knobs, knob) if value is None else value, source)
            for knob, (value, source) in row.defaults.items()
        }
        bases = (base for base in row.__bases__ if base not in (*rows.values(), shared))
        own = {name for part in (row, *bases) for name in part.__dict__.get("__annotations__", {})}
        for f in fields(row):
            if f.init and f.name in own:
                changed[f.name] = getattr(knobs, f.name), f.metadata["help"].replace("%%", "%")
        for knob, (value, about) in changed.items():
            text = " ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{'':{width}}    --{knob} {text}".ljust(width + 36) + f"  {about}")
    end = "A row also has the flags of the rows that it builds on; "
    return "\n".join([*lines, "", f"{end}`--algo ROW --help` lists them all."])


def settings(config, method) -> dict:
    """Every knob of a run by name: the first line of metrics.jsonl."""
    return asdict(config) | {f.name: getattr(method, f.name) for f in fields(method) if f.init}


def announce(config, method, world: int) -> str:
    """What is about to run: every knob, the method in a sentence, tokens per step, the folder."""
    prompts, K = config.train_batch_size, getattr(method, "num_generations", 0)
    knobs = "\n".join(f"  {name} = {value}" for name, value in settings(config, method).items())
    step = f"{prompts} examples, prompts of up to {config.max_prompt_length} tokens"
    if K:
        responses = K + method.learns_from_expert
        longest = config.max_prompt_length + responses * config.max_completion_length
        step = (
            f"{prompts} prompts of up to {config.max_prompt_length} tokens, {prompts * K} "
            f"responses of up to {config.max_completion_length}, "
            f"at most {prompts * longest:,} tokens"
        )
    if hasattr(method, "sft_max_steps"):
        step += f"\n{method.sft_max_steps} steps of SFT, then {method.max_steps} of RL"
    source = " ".join(config.train_file)
    if config.train_file == ["toy"]:
        source = "the toy world (--train_file names other data)"
    return (
        f"{knobs}\n{config.algo}: {method.__doc__.partition(chr(10))[0]}\ndata: {source}\n"
        f"{world} rank(s); a step: {step}\noutput: {config.output_dir}"
    )


# ------------------------------------------------------------------------------ data and bad input


class Stage(NamedTuple):
    """A part of SFT with examples, a schedule and an optimiser state of its own."""

    name: str
    examples: list[data.Example]
    steps: int
    learning_rate: float


@dataclass(eq=False)
class Demonstration:
    """A prompt and its expert response: what SFT trains on and iTool takes the perplexity of."""

    example: data.Example
    prompt: list[int]  # token ids
    target: list[int]  # token ids and EOS
    place: int = 0  # in what it was drawn from

    @property
    def responses(self) -> list[list[int]]:
        return [self.target]


class Setup:
    """What a rank reads and, with `load`, loads before its loop; a user's mistakes are found first.

    config     the settings, adjusted to what this model supports
    longest    tokens of the longest sequence
    gpu_share  of vLLM
    prompts    templates of the user's own
    digests    flag -> what was read: a resumption must find it again
    later      stages after this one, whose room is checked, too; None: it was, before the first
    """

    def __init__(self, config, method, later: Iterable[tuple] | None = ()):
        self.method = method
        self.out = Path(config.output_dir)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if changed := checkpoint.refuse_earlier_run(settings(config, method)):
            self.say(f"resuming with other settings: {', '.join(changed)}")
        self.reward = scoring.Reward(config.reward_file)
        name = config.model_name_or_path
        self.tokenizer = modeling.load_tokenizer(name, trust_remote_code=config.trust_remote_code)
        self.stop_ids = rollout.stop_ids(self.tokenizer, name)
        data.check_turn_end(self.tokenizer, self.stop_ids)
        if config.allow_thinking:
            data.allow_thinking(self.tokenizer)
        elif data.thinks(self.tokenizer):
            self.say(f"thoughts are allowed, as saved with {name}")
        data.check_thinking(self.tokenizer)
        self.tag_length = data.tag_length(self.tokenizer)
        self.longest = longest(config, method, self.tokenizer)
        self.config, changed = suited(config, self.longest)
        self.say(changed)
        self.gpu_share = 0.0
        if later is not None:
            self.gpu_share, arithmetic = check_room([(self.config, method), *later])
            self.say(arithmetic)
        self.prompts = data.read_prompts(name, config.system_prompt, config.user_prompt)
        if saved := [part for part in self.prompts if not getattr(config, f"{part}_prompt")]:
            self.say(f"{' and '.join(saved)} prompt: as saved with {name}")
        self.examples, self.eval_examples, self.digests = load_examples(
            config, self.tokenizer, self.prompts, quiet=self.rank > 0
        )
        self.digests["model_name_or_path"] = f"prompt {data.template_digest(self.tokenizer)}"
        for part, text in self.prompts.items():
            self.digests[f"{part}_prompt"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        if self.reward.file:
            self.digests["reward_file"] = self.reward.digest
            self.say(self.reward.try_on(self.examples[:TRIED]))
        checkpoint.refuse_changed(self.out, config.resume_from_checkpoint, self.digests)
        method.check_examples(self.examples, config)
        # saved with every checkpoint
        serving.add_tool_template(
            self.tokenizer,
            serving.system_prompt_of(self.examples),
            self.prompts.get("user", data.USER_PROMPT),
        )

    def load(self, engine: rollout.Engine | None = None) -> None:
        """Load model, optimiser and engine: what takes time and memory.

        engine  that of an earlier stage: a process makes only one, since vLLM's memory on a GPU
                cannot be freed while the process lives (vllm-project/vllm#36651)
        """
        config = self.config
        self.engine = engine or rollout.make_engine(
            config.engine,
            config.model_name_or_path,
            max_model_len=self.longest,
            max_num_seqs=config.max_num_seqs,
            gpu_memory_utilization=self.gpu_share,
            tensor_parallel_size=config.vllm_tensor_parallel_size,
            dtype="bfloat16" if config.bf16 or torch.cuda.is_available() else "auto",
            logprobs_mode=self.method.logprobs_mode,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
        if data.thinks(self.tokenizer):
            data.allow_thinking(self.engine.tokenizer)
        self.engine.sleep()
        self.model, _ = modeling.load(
            config.model_name_or_path,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            quant=config.quant,
            gradient_checkpointing=config.gradient_checkpointing,
            torch_compile=config.torch_compile,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
            compute_dtype=torch.bfloat16 if config.bf16 else None,
        )
        self.optimizer = modeling.optimizer(
            self.model,
            config.learning_rate,
            (0.9, config.adam_beta2),
            config.weight_decay,
            offload=config.offload_moments,
        )

    def demonstration(self, example: data.Example, place: int = 0) -> Demonstration:
        """The prompt's token ids, as eval.py renders it, and those of the expert response."""
        prompt = data.render(example, self.tokenizer)
        return Demonstration(example, prompt, data.target_ids(example, self.tokenizer), place)

    def counts(self, what: str) -> str:
        """The name of an engine's bar, which is rank 0's and counts its own part."""
        return "" if self.rank else what + f" (rank 0 of {self.world})" * (self.world > 1)

    def say(self, text: str) -> None:
        """Print on rank 0, if there is anything to say."""
        if text and self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()


def load_examples(config, tokenizer, prompts: dict[str, str], quiet: bool) -> tuple:
    """Training examples, the evaluation subset, and a digest of each file flag's examples.

    prompts  templates of the user's own: data.read_prompts
    What is too long is dropped and counted.
    """
    examples = read_sources(config.train_file, config.seed)
    digests = {"train_file": digest(examples)}
    if config.eval_file:
        held_out = read_sources(config.eval_file, config.seed)
        digests["eval_file"] = digest(held_out)
    elif all(source.partition(":")[0] == "toy" for source in config.train_file):
        sources = " ".join(config.train_file)
        level = next((level for level in ("hard-", "house-") if level in sources), "")
        held_out = data.load("toy", f"{level}test")
    else:
        held_out, examples = data.split(examples, config.eval_fraction, config.seed)
    if config.train_fraction < 1:
        examples = data.subset(examples, config.train_fraction, config.seed)
    parts = []
    for name, part in (("train", examples), ("eval", held_out)):
        part = [data.with_prompts(example, prompts) for example in part]
        fitting, drops = data.fit(
            part, tokenizer, config.max_prompt_length, config.max_completion_length
        )
        dropped = "".join(f", {n} dropped: {why}" for why, n in drops.items())
        if not quiet:
            print(f"{name}: {len(fitting)} examples{dropped}")
        if not fitting:
            raise ValueError(
                f"no {name} example fits{dropped}; raise --max_prompt_length (prompt) or "
                "--max_completion_length (target); python data.py stats FILE --tokenizer MODEL "
                "shows lengths"
            )
        parts.append(fitting)
    train, held_out = parts
    if len(train) < config.train_batch_size:
        raise ValueError(
            f"{len(train)} training examples are fewer than --train_batch_size "
            f"{config.train_batch_size}; lower it"
        )
    size = min(config.eval_size, len(held_out))
    return train, random.Random(config.seed).sample(held_out, size), digests


def read_sources(sources: list[str], seed: int) -> list[data.Example]:
    """The examples of --train_file or --eval_file."""
    return [example for source in sources for example in data.load_source(source, seed=seed)]


def digest(examples: list[data.Example]) -> str:
    """Their number and hash: what a resumption must find again."""
    return f"{len(examples)} examples {data.digest(examples)}"


def suited(config, longest: int) -> tuple[Any, str]:
    """The settings, adjusted to what this model supports, and what changed, in a sentence or "".

    longest  tokens of the longest sequence
    ValueError for what cannot be trained, from config.json alone. guard.py sees what is not listed.
    """
    name = config.model_name_or_path
    whole = modeling.read_config(name, trust_remote_code=config.trust_remote_code)
    model = whole.get_text_config()
    get = lambda key: getattr(model, key, None)
    number = lambda key: get(key) if isinstance(get(key), int) else 0  # a family's own are checked
    if model is not whole:
        raise ValueError(
            f"{name} ({whole.model_type}) reads more than text: save its language model alone, as "
            "docs/models.md shows, and train that"
        )
    on_cpu = config.engine == "vllm" and not torch.cuda.is_available()
    experts = any(number(key) > 1 for key in EXPERTS)
    mixer = any(key.startswith("mamba_") for key in vars(model))
    if config.lora_rank and (experts or mixer):
        raise ValueError(
            f"{name} has {'experts' if experts else 'a mixer'}, which adapters do not reach: train "
            "all weights (drop --lora_rank), or choose another model"
        )
    if experts and on_cpu:
        raise ValueError(
            f"{name} is a mixture of experts, and vLLM on a CPU keeps the first weights of "
            "experts: take --engine transformers"
        )
    ropes = get("rope_parameters") or {}
    for rope in (ropes, *ropes.values()):  # one for all layers, or one per kind of layer
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind in ("longrope", "dynamic"):
            room = rope.get(ORIGINAL) or number(ORIGINAL) or number("max_position_embeddings")
            if room and longest > room:
                raise ValueError(
                    f"{name} ({kind}): beyond {room} tokens the positions of a response would "
                    f"depend on the longest one in its batch; {longest} are asked for: lower "
                    "--max_prompt_length or --max_completion_length"
                )
    kinds, reasons = {*(get("layer_types") or ())}, []
    for kind, key in (("sliding", "sliding_window"), ("chunked", "attention_chunk_size")):
        window = number(key)
        if window and window < longest and (not kinds or f"{kind}_attention" in kinds):
            reasons.append(f"a {kind} window of {window} tokens, fewer than {longest}")
    if kinds - ATTENTION or mixer:
        reasons.append("layers without attention")
        if on_cpu:
            raise ValueError(
                f"{name} has {reasons[-1]}, which no engine reads on a CPU: take a GPU"
            )
    if "gpt_oss" in model.model_type:
        reasons.append("attention sinks")
    if reasons and config.engine == "transformers":
        raise ValueError(
            f"{name} has {' and '.join(reasons)}, which --engine transformers does not read: take "
            "--engine vllm, or another model"
        )
    if not reasons or not config.share_prefix:
        return config, ""
    said = f"{name} has {' and '.join(reasons)}: --no_share_prefix is taken, which is slower"
    return replace(config, share_prefix=False), said


def check_machine(config, world: int) -> None:
    """ValueError or ImportError if ranks, GPU or packages do not fit the settings."""
    modeling.check_gpu()
    if config.train_batch_size % world:
        raise ValueError(
            f"--train_batch_size {config.train_batch_size} is not divisible by the {world} ranks; "
            f"take {config.train_batch_size // world * world or world}"
        )
    if config.engine == "transformers" and config.vllm_tensor_parallel_size > 1:
        raise ValueError("--vllm_tensor_parallel_size: --engine transformers has none; drop it")
    if world % config.vllm_tensor_parallel_size:
        raise ValueError(
            f"--vllm_tensor_parallel_size {config.vllm_tensor_parallel_size} does not divide the "
            f"{world} ranks: start with torchrun and a multiple of it"
        )
    if config.report_to != "none" and not find_spec(config.report_to):
        raise ImportError(f"--report_to needs {config.report_to}: pip install {config.report_to}")
    if config.bf16 and not torch.cuda.is_available() and (why := no_bf16(config.quant)):
        raise ValueError(f"--bf16: {why}; drop the flag")
    if config.quant != "none":
        try:
            import_module("bitsandbytes")
        except Exception as error:  # noqa: BLE001 - an installed one may not fit torch or CUDA
            raise ImportError(
                f"--quant 4bit needs bitsandbytes ({type(error).__name__}: {error}): pip install "
                "--upgrade bitsandbytes, or drop the flag"
            ) from error
    compiler = torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++"))
    if config.torch_compile and not compiler:
        raise ValueError("--torch_compile: no C++ compiler; install g++, or drop the flag")


def no_bf16(quant: str = "none") -> str:
    """Why --bf16 makes nothing faster on this CPU; empty where it does."""
    able = torch.cpu.get_capabilities()
    if not (able.get("avx512_bf16") or able.get("amx_bf16")):
        return "this CPU has neither avx512_bf16 nor AMX: bfloat16 would be slower than float32"
    return "with --quant 4bit a CPU computes in float32" if quant != "none" else ""


def check_room(stages: list[tuple]) -> tuple[float, str]:
    """vLLM's share of a GPU and the arithmetic; ValueError if memory or disk is too small.

    stages  (settings, row, ...) of all that begin now: the second must not fail hours later
    """
    rooms, needed, parts = [], 0, []
    for config, method, *_ in stages:
        name, out = config.model_name_or_path, Path(config.output_dir)
        base = modeling.skeleton(name, trust_remote_code=config.trust_remote_code)
        knobs = SimpleNamespace(**{"num_generations": 1, **settings(config, method)})
        # a Hub name's files are not fetched for this
        whole = config.quant == "none" and Path(name).is_dir() and bool(modeling.read_whole(base))
        rooms.append(plan.check_room(knobs, base, whole))
        model, state = modeling.checkpoint_bytes(base, config.lora_rank)
        count = checkpoints_to_come(config, method, checkpoint.saved_steps(out))
        best = int(method.keeps_best and count > 0 and not (out / "checkpoint-best").exists())
        needed += count * (model + state) + best * model
        parts += [f"{count} checkpoints of {(model + state) / 1e9:.1f} GB"] * (count > 0)
        parts += [f"checkpoint-best of {model / 1e9:.1f} GB"] * best
    modeling.check_disk(out / "checkpoint", needed, " + ".join(parts))
    return rooms[0]


def checkpoints_to_come(config, method, there: list[int]) -> int:
    """How many checkpoints more there will be at once, at most; of iTool's unknown number one.

    there  steps of those on the disk
    """
    last, to_come = there[-1] if there else 0, 1
    if hasattr(method, "max_steps"):
        to_come = -(-max(0, method.max_steps - last) // config.save_steps)
    if config.save_total_limit:  # an older one goes when a new one is complete
        to_come = min(to_come, max(1, config.save_total_limit + 1 - len(there)))
    return to_come


def longest(config, method, tokenizer) -> int:
    """Tokens of the longest sequence that the engine will see; ValueError beyond the model's."""
    wanted = config.max_prompt_length + config.max_completion_length
    question = method.question_length(tokenizer, config.max_completion_length)
    room = modeling.read_config(
        config.model_name_or_path, trust_remote_code=config.trust_remote_code
    )
    # None: ALiBi or no attention at all
    room = getattr(room.get_text_config(), "max_position_embeddings", None)
    if room and max(wanted, question) > room:
        remedy = "lower them"
        if question > wanted:
            remedy += " (iTool's question to grade a response needs twice the latter), or "
            remedy += "--self_evaluation none"
        raise ValueError(
            f"{config.model_name_or_path} reads {room} tokens; --max_prompt_length "
            f"{config.max_prompt_length} and --max_completion_length "
            f"{config.max_completion_length} need {max(wanted, question)}: {remedy}"
        )
    return max(wanted, question)


# ----------------------------------------------------------------------------------------- the end


class Interrupted(Exception):
    """SIGTERM or Ctrl-C stopped the run at a safe point; `signal` is its number."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.signal = number


def end(code: int = 0) -> NoReturn:
    """End this process at once: shutting down vLLM may fail (pytorch#145168)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave(error: BaseException) -> NoReturn:
    """Say why this rank ends and end it at once: its peers may be waiting in a collective.

    Exit code 2: a user's mistake or a failed check, one line; 143 after SIGTERM and 130 after
    Ctrl-C, with all saved; 1: anything else, with a traceback. torchrun prints the first failure
    last, from the file that is written here.
    """
    rank = dist.get_rank()
    plain, code = f"error: {error}", 2
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        number = getattr(error, "signal", signal.SIGINT)
        plain, code = str(error) or "interrupted before the first step", 128 + number
    elif not isinstance(error, (ValueError, OSError, ImportError)):
        plain, code = "".join(traceback.format_exception(error)), 1
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(ECHO)  # a peer ended first: torchrun reports it and ends this rank
    else:
        error = error.with_traceback(None)  # so that torchrun prints one line, too
        error.__cause__, error.__suppress_context__ = None, True
    if code in (1, 2) or rank == 0:
        print(plain if rank == 0 else f"rank {rank}: {plain}", file=sys.stderr)
    if code in (1, 2):
        get_error_handler().record_exception(error)
    end(code)
