"""Conversion of 60,000 xLAM-shaped rows, and how much is tokenised before training starts.

    python bench/data.py                                     two minutes, 1.5 GB -> bench/data.json
    python bench/data.py --rows 2000 --out /tmp/data.json    a few seconds

The rows are synthetic, with the real layout and sizes (three tools, one or two calls, about 2,000
characters). On one core this measures seconds of `data.read_rows` and `data.convert`, peak resident
memory per row at a quarter of the rows and at all of them (constant per row: nothing grows faster
than the data), then seconds of `data.fit` at Table 7's lengths, which tokenises only texts that
might be too long, against tokenising every prompt and target.
"""

import json
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

import common
from common import REPO, data

TYPES = ("str", "int", "float", "bool", "List[str]", "str, optional")
LIMITS = (8192, 1024)  # ToolUPT Table 7: prompt and completion, tokens


def row(number: int) -> dict:
    """A row like those of xlam_function_calling_60k.json: answers and tools are JSON text."""
    rng = random.Random(number)
    word = lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9)))
    text = lambda n: " ".join(word() for _ in range(n))
    tools = []
    for _ in range(rng.randint(1, 5)):
        parameters = {
            word(): {"description": text(8), "type": rng.choice(TYPES), "default": word()}
            for _ in range(rng.randint(1, 5))
        }
        tools.append(
            {"name": f"{word()}_{word()}", "description": text(12), "parameters": parameters}
        )
    calls = [
        {"name": tool["name"], "arguments": {name: text(2) for name in tool["parameters"]}}
        for tool in rng.sample(tools, min(len(tools), rng.randint(1, 2)))
    ]
    answers, tools = json.dumps(calls), json.dumps(tools)
    return {"id": number, "query": text(20), "answers": answers, "tools": tools}


def convert(path: Path, rows: int) -> dict:
    """Seconds and bytes of reading and converting a file; seconds until it is known what fits."""
    before, start = common.resident("VmRSS"), time.process_time()
    examples, drops = data.convert("xlam", data.read_rows(path))
    seconds, grown = time.process_time() - start, common.resident("VmHWM") - before
    tokenizer = common.AutoTokenizer.from_pretrained(REPO / "toy_model")
    start = time.process_time()
    kept, _ = data.fit(examples, tokenizer, *LIMITS)
    fit = time.process_time() - start
    some, start = examples[:1000], time.process_time()
    for example in some:
        data.render(example, tokenizer), data.target_ids(example, tokenizer)
    every = (time.process_time() - start) / len(some) * len(examples)
    return {
        "rows": rows,
        "examples": len(examples),
        "kept": len(kept),
        "dropped": dict(Counter(drops)),
        "convert_s": seconds,
        "bytes_per_row": grown / rows,
        "fit_s": fit,
        "tokenise_all_s": every,
    }


def main() -> None:
    parser = common.parser(__doc__, "data.json")
    parser.add_argument("--rows", type=int, default=60_000)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in (args.rows // 4, args.rows):
            path = Path(folder) / f"{rows}.json"
            path.write_text(json.dumps([row(number) for number in range(rows)]))
            results.append(common.in_a_process(convert, path, rows))
            r = results[-1]
            print(
                f"{rows} rows, {path.stat().st_size / rows:.0f} bytes each: converted in "
                f"{r['convert_s']:.1f} s of one core, {r['bytes_per_row']:.0f} bytes of memory per "
                f"row; what fits is known after {r['fit_s']:.1f} s "
                f"(tokenising everything: {r['tokenise_all_s']:.0f} s)",
                flush=True,
            )
    common.write(args.out, {"machine": common.machine(), "results": results})


if __name__ == "__main__":
    main()
