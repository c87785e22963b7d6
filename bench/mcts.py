"""iTool's search against a naive loop on the same trees: seconds and tokens per tree.

    python bench/mcts.py --trees 100 --naive_trees 15
    python bench/mcts.py --trees 100 --naive_trees 12 --self_evaluation cache

    ours    itool.Searcher over vLLM: all trees in lock step, shared prompts cached, the unused rest
            of a sample reused, one forward pass per self-evaluation, equal states graded once
    naive   one transformers `generate` per sample (each of a node's `width`) and four per
            self-evaluation (four tokens each, as iTool samples them), one sequence at a time

The naive loop replays the trees that the search has grown: the same states, as many tokens per
sample, as many nodes to grade. What it samples there does not matter and has no seed. It takes
minutes where ours takes seconds, so --naive_trees limits it to the first trees; all figures are
means per tree. Both arms run in this process, ours before and again after the naive one; its time
is the mean of the two. Results go to bench/mcts.json under the name of --self_evaluation: "paper"
asks as Table 10 does, "cache" puts what all questions share first, so that vLLM's prefix cache
holds it.
"""

import json
import time

import common
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import itool
import mcts
import rollout

EVALUATION_SAMPLES, EVALUATION_TOKENS = 4, 4  # iTool Appendix B.1; a letter and its brackets


class Recorder(itool.Searcher):
    """A search that remembers the length of every draw it used, with tails, by expanded node."""

    def propose(self, nodes: list[mcts.Node], width: int) -> list[list[mcts.Proposal]]:
        groups = super().propose(nodes, width)
        for node, proposals in zip(nodes, groups):
            rest = [len(p.tail.token_ids) if p.tail else 0 for p in proposals]
            self.draws[id(node)] = [len(p.token_ids) + r for p, r in zip(proposals, rest)]
        return groups


def ours(args, tokenizer, examples, prompts, engine) -> tuple[dict, list[mcts.Node], Recorder]:
    """One search of all trees, from an empty prefix cache."""
    engine.llm.reset_prefix_cache()
    searcher = Recorder(
        engine, tokenizer, max_tokens=args.max_tokens, self_evaluation=args.self_evaluation
    )
    searcher.draws = {}
    with tqdm(total=len(examples), desc="ours") as bar:
        start = time.perf_counter()
        roots = searcher.search(
            examples, prompts, mcts.SearchConfig(), lambda done: bar.update(done - bar.n)
        )
        seconds = time.perf_counter() - start
    stats = searcher.stats
    trees = len(examples)
    figures = {
        "seconds": seconds / trees,
        "generated": (stats["sampled_tokens"] + stats["evaluations"]) / trees,
        "expansions": stats["expansions"] / trees,
        "evaluations": stats["evaluations"] / trees,
    }
    return figures, roots, searcher


@torch.no_grad()
def naive(args, tokenizer, examples, roots, searcher) -> dict:
    """The same trees, a call at a time."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    generated = prefilled = 0
    seconds = 0.0
    for example, root in zip(tqdm(examples, desc="naive"), roots):
        jobs, stack = [], [root]
        while stack:
            node = stack.pop()
            stack += node.children
            jobs += [(node.state_ids, n) for n in searcher.draws.get(id(node), [])]
            if node is not root:
                ids = itool.question(
                    tokenizer, args.self_evaluation, example.target, node.state_text
                )
                jobs += [(ids, EVALUATION_TOKENS)] * EVALUATION_SAMPLES
        start = time.perf_counter()
        for ids, n in jobs:
            model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=True,
                temperature=1.5,
                min_new_tokens=n,
                max_new_tokens=n,
                pad_token_id=tokenizer.eos_token_id,
            )
        seconds += time.perf_counter() - start
        generated += sum(n for _, n in jobs)
        prefilled += sum(len(ids) for ids, _ in jobs)
    trees = len(roots)
    return {
        "trees": trees,
        "seconds": seconds / trees,
        "generated": generated / trees,
        "prefilled": prefilled / trees,
    }


def prefilled(roots: list[mcts.Node], stats: dict) -> float:
    """Tokens per tree that ours reads: each prompt, expanded state's steps and question once."""
    tokens = stats["evaluation_tokens"]
    for root in roots:
        stack = [root]
        while stack:
            node = stack.pop()
            stack += node.children
            tokens += len(node.token_ids) if node.children else 0
    return tokens / len(roots)


def main() -> None:
    parser = common.parser(__doc__, "mcts.json")
    parser.add_argument("--model", default="toy_model")
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--naive_trees", type=int, default=0, help="0: all of them")
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--self_evaluation", choices=("paper", "cache"), default="paper")
    args = parser.parse_args()
    machine = common.machine()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    examples = data.load("toy", "train")[: args.trees]
    prompts = [data.render(example, tokenizer) for example in examples]
    longest = max(map(len, prompts)) + args.max_tokens
    question = len(itool.question(tokenizer, "paper", "", "")) + 2 * args.max_tokens + 1
    engine = rollout.make_engine(
        "vllm", args.model, max_model_len=max(longest, question), logprobs_mode="raw_logprobs"
    )
    engine.generate(prompts[:4], n=1, temperature=1.0, max_tokens=4)  # warm

    first, roots, searcher = ours(args, tokenizer, examples, prompts, engine)
    replayed = args.naive_trees or args.trees
    slow = naive(args, tokenizer, examples[:replayed], roots[:replayed], searcher)
    read = prefilled(roots, searcher.stats)
    second, *_ = ours(args, tokenizer, examples, prompts, engine)

    seconds = (first["seconds"] + second["seconds"]) / 2
    result = {
        "ours": {**first, "seconds": seconds, "prefilled": read},
        "naive": slow,
        "ratio": {
            "seconds": slow["seconds"] / seconds,
            "generated": slow["generated"] / first["generated"],
            "prefilled": slow["prefilled"] / read,
        },
        "spread_of_ours": abs(first["seconds"] - second["seconds"]) / seconds,
        "arguments": {name: str(value) for name, value in vars(args).items() if name != "out"},
        "machine": machine,
    }
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.write_text(json.dumps(found | {args.self_evaluation: result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    engine.close()


if __name__ == "__main__":
    main()
