"""Step-wise Monte Carlo tree search over tool calls, and the preference pairs read off its trees
(iTool, Section 3.2).

    Eq. 5   s' = argmax_a Q(s,a) + c p(a|s) sqrt(N(s)) / (1 + N(s'))      puct
    Eq. 6   R(s) = O(s) + C(s);  r(s,a) = R(s') - R(s), R(root) = 0       search
    Eq. 7   C(s) = sum_o w_o p_o,  o in A..D,  w = 1, 0.1, -1, -2         confidence, EVAL_PROMPT
    Eq. 8   V(s) = sum_a N(s') Q(s,a) / sum_a N(s')                       backup
    Eq. 9   Q(s,a) = r(s,a) + discount V(s')                              backup

A state is the prompt plus the response so far. An action is one fragment: about one argument of a
call, or one sentence. The model is two functions, `propose` (samples) and `evaluate` (O and C), so
everything here runs without one.

Departures from the paper, and choices where it is silent:
 1. Fragments end at the commas and brackets that separate calls or arguments, quotes and nesting
    respected, not at every `' , .)`: a third of all calls have a , . or ) inside an argument value.
 2. The last level is free: at `depth` the action is the whole rest of the response, so that every
    path has an outcome.
 3. r is R(s') - R(s), the benefit of the action; the other order would reward harm.
 4. C is the exact expectation over the normalised probabilities of the four options, of which the
    paper's average over four samples is an estimate.
 5. C conditions on ground truth and response only: Eq. 7 also names the query and the tools, but
    the prompt of Table 10, which we use, shows neither.
 6. p(a|s) = exp(mean log-prob): a product would make long fragments vanish from Eq. 5. It is taken
    at temperature 1, although samples are drawn at 1.5.
 7. "simulation" counts the roll-out steps after the leaf's own expansion (1 + 2 = depth 3); their
    nodes stay in the tree.
 8. The discount of Eq. 9 is 1.0, as in Xie et al. 2024. "Similarity above 95 %" is word overlap, as
    in the authors' code: common words over the words of the shorter step.

Try it:  python mcts.py show trees.jsonl      (trees of `tree_to_dict`, one a line; also trees.svg)
Standard library only, no sibling imported: copy this file on its own.
"""

import argparse
import bisect
import html
import itertools
import json
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

EVAL_PROMPT = {
    # Table 10. Its last two printed lines are the system message; {placeholder} filled in by us.
    "system": "You are an AI specialized in tool use.\n"
    "Your task is to assess the potential veracity of the generated response.",
    "user": """Ground Truth Response: {gt_ans}
Generated Response by Model: {response}

User Instruction:
Please assess the quality of the generated response relative to the ground truth response.
Note: A generated response that is a fragment of the ground truth response is also excellent.

Evaluation Criteria:

1. Function Name: Is the name of all the function called correct?
2. Parameter Count: Is the number of parameters for all the function correct?
3. Parameter Names: Are the names of all the parameters for the function correct?
4. Parameter Value/Types: Are the value/types of all the parameters for the function correct?
5. Semantic Similarity: Is the generated response semantically close to the ground truth response?

Please directly choose from the following options to judge the overall quality:
(A) Excellent: The generated response meets all criteria and is almost identical to the \
ground truth response.
(B) Acceptable: The generated response meets most criteria but has minor discrepancies.
(C) Fair: The generated response meets some criteria but has significant issues.
(D) Poor: The generated response fails to meet most or all criteria.""",
    "assistant": "The option of overall quality is",  # append " (": the next token is the letter
}
OPTION_WEIGHTS = {"A": 1.0, "B": 0.1, "C": -1.0, "D": -2.0}  # Appendix B.1


@dataclass(frozen=True)
class SearchConfig:
    """Limits of the search (Table 7) and of the pairs (Appendix B.1)."""

    depth: int = 3  # fragments per path, the last one free   # Table 7
    width: int = 3  # children per node                       # Table 7
    simulation: int = 2  # roll-out steps after an expansion  # Table 7
    iterations: int = 5  # select-expand-backup rounds        # Table 7
    c: float = 1.0  # exploration, Eq. 5                      # Table 7
    discount: float = 1.0  # gamma of Eq. 9                   # Xie et al.: the paper gives no value
    visit_floor: int = 0  # 1: Eq. 8 with max(1, N), as Xie et al.
    revisit: bool = True  # False: skip exhausted subtrees, as AlphaMath; the search may end early
    max_similarity: float = 0.95  # drop pairs above           # Appendix B.1
    min_gap: float = 0.1  # drop pairs with a smaller Q gap    # Appendix B.1
    min_q: float = 0.3  # drop pairs with a lower chosen Q     # Appendix B.1
    length_power: float = 1.0  # p = exp(sum logp / n**this): 1 mean, 0 product, 1.25 Xie et al.

    def __post_init__(self) -> None:
        least = {"depth": 1, "width": 1, "simulation": 0, "iterations": 0, "visit_floor": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {minimum}")


@dataclass(frozen=True)
class Proposal:
    """One sampled action, cut to a fragment or, on the last level, to the end of the response."""

    text: str
    token_ids: list[int]  # (n,) of this action; empty: the action is dropped
    logps: list[float]  # (n,) nats, at temperature 1, whatever the sampling temperature
    finished: bool  # the response ends here
    reason: str | None = None  # why it ends: "eos" | "length"
    tail: Any = None  # unused rest of the sample, in any form; it comes back as node.tail


@dataclass(eq=False)
class Node:
    """A state, and the action that led to it; a root is Node(token_ids=prompt_ids)."""

    parent: "Node | None" = field(default=None, repr=False)
    children: list["Node"] = field(default_factory=list, repr=False)
    text: str = ""  # of this action only
    token_ids: list[int] = field(default_factory=list)  # of this action only; root: the prompt
    prior: float = 1.0  # p(a|s) of Eq. 5, in (0, 1]
    depth: int = 0
    terminal: bool = False
    reason: str | None = None  # "eos" | "length" | "dead": no sample gave a child
    O: float = 0.0  # outcome: +1, -1, or 0 where not terminal
    C: float = 0.0  # self-evaluation, [-2, 1]
    R: float = 0.0  # O + C
    reward: float = 0.0  # R - parent.R
    N: int = 0  # finished iterations through this node
    Q: float = 0.0  # of the action that led here
    V: float = 0.0  # of this state
    tail: Any = field(default=None, repr=False)  # Proposal.tail

    @property
    def path(self) -> list["Node"]:
        """The nodes from the root to this one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    @property
    def state_ids(self) -> list[int]:
        """Token ids of the whole state: prompt and response so far."""
        return [token for node in self.path for token in node.token_ids]

    @property
    def response_ids(self) -> list[int]:
        """Token ids of the response so far, without the prompt."""
        return [token for node in self.path[1:] for token in node.token_ids]

    @property
    def state_text(self) -> str:
        """The response so far, without the prompt."""
        return "".join(node.text for node in self.path[1:])


@dataclass(frozen=True, eq=False)
class Pair:
    """Best and worst action of a state: its path is the question, the two steps are the answers."""

    prefix_ids: list[int]  # prompt and path to `node`
    chosen_ids: list[int]
    rejected_ids: list[int]
    node: Node
    chosen: Node  # children of `node`
    rejected: Node
    dropped_by: list[str]  # "similarity", "gap", "accept_q": all that apply; kept: []


# ---- fragments ----


def split_fragments(text: str) -> list[str]:
    """The response cut into actions; "".join of them is `text`, and "" gives [].

    text   the whole response from its start (brackets and quotes count from there)

    [f(a=1, b="x, y"), g()]   cut after the commas between arguments and between calls, and after
                              the `]` that follows a call
    {"name": ., ".": {.}}     the same in JSON, one call or a list; none before the first argument
    anything else             cut after a newline, and after . ! ? before white space
    Calls may be wrapped in <tool_call> tags; the closing tag belongs to the last fragment. Broken
    syntax is cut by the same rules. A blank fragment joins the one before it, or the next one at
    the start.
    """
    return [text[start:end] for start, end in itertools.pairwise([0, *_fragment_ends(text)])]


def split_tokens(pieces: list[str]) -> list[list[str]]:
    """The tokens of a response grouped into actions; each ends with its last character's token.

    pieces   decoded text of each token; special tokens as "", or the end-of-sequence token would
             become a separate action
    """
    text = "".join(pieces)
    totals = list(itertools.accumulate(map(len, pieces)))  # characters up to the end of each token
    groups, start = [], 0
    for end in _fragment_ends(text):
        token = bisect.bisect_left(totals, end)
        cut = token + 1 if totals[token] < len(text) else len(pieces)
        if cut > start:  # several fragments may end in one token
            groups.append(pieces[start:cut])
            start = cut
    return groups or ([pieces] if pieces else [])


def first_fragment(prefix: list[str], pieces: list[str]) -> int:
    """Number of tokens in the first action of a new sample, len(pieces) where nothing cuts it.

    prefix   decoded tokens of the state's response so far; brackets and quotes count from its start
    pieces   decoded tokens of the sample that continues it, special tokens as ""
    """
    end = -len(prefix)  # in tokens of `pieces`
    for group in split_tokens(prefix + pieces):
        end += len(group)
        if end > 0 and "".join(pieces[:end]).strip():
            return end
    return len(pieces)


# ---- search ----


def puct(node: Node, c: float, revisit: bool = True) -> Node:
    """The child with the highest Q + c p sqrt(N(node)) / (1 + N(child)) (Eq. 5).

    c         weight of the exploration term
    revisit   False: leave out children below which nothing is left to explore
    Ties: higher prior, then lower index. A node just expanded has N = 0: the pick is by Q alone.
    """
    children = [child for child in node.children if revisit or not _closed(child)]
    assert children, f"no child to select below {node}"
    scale = math.sqrt(node.N)
    return max(children, key=lambda s: (s.Q + c * s.prior * scale / (1 + s.N), s.prior))


def backup(path: list[Node], discount: float, visit_floor: int = 0) -> None:
    """Count a visit to every node of the path, then update V (Eq. 8) and Q (Eq. 9) upwards.

    path          nodes from the root to the end of the iteration
    visit_floor   least weight of a child in Eq. 8; 0 leaves unvisited children out
    V is 0 while no child has weight; the root has no Q.
    """
    for node in path:
        node.N += 1
    for node in reversed(path):
        weights = [max(child.N, visit_floor) for child in node.children]
        if any(weights):
            total = sum(weight * child.Q for weight, child in zip(weights, node.children))
            node.V = total / sum(weights)
        if node is not path[0]:
            node.Q = node.reward + discount * node.V


def search(
    roots: list[Node],
    propose: Callable[[list[Node], int], list[list[Proposal]]],
    evaluate: Callable[[list[Node]], list[tuple[float, float]]],
    config: SearchConfig,
) -> list[Node]:
    """The roots, searched in place: `config.iterations` times select, expand, roll out and backup.

    roots      one per example, distinct
    propose    (nodes, width) -> a list of Proposals per node; the first `width` of different text
               become children; where node.depth + 1 == config.depth a Proposal is the whole rest
               of the response. One of them may be cut from node.tail, a draw already paid for
    evaluate   nodes -> (O, C) per node; O = 0 where not node.terminal, -1 where reason is "length"
    All trees advance in lock step: a wave is one call of each for all of them. Within a tree the
    order is sequential, so its result does not depend on the other trees.
    """
    assert len({id(root) for root in roots}) == len(roots), "a root occurs twice in roots"
    running = [_iterations(root, config) for root in roots]
    while wave := [(tree, leaf) for tree in running if (leaf := next(tree, None)) is not None]:
        running = [tree for tree, _ in wave]
        _expand([leaf for _, leaf in wave], propose, evaluate, config)
    return roots


def confidence(option_probs: dict[str, float]) -> float:
    """Self-evaluation C of a state: the mean weight of the options (Eq. 7), in [-2, 1].

    option_probs   next-token probability of each letter A, B, C, D; missing ones are 0; normalised
    0.0 where the four have no mass. Log that mass: below 0.01 the prompt fails for this model.
    """
    mass = sum(option_probs.get(letter, 0.0) for letter in OPTION_WEIGHTS)
    if not mass > 0:
        return 0.0
    return sum(w * option_probs.get(letter, 0.0) / mass for letter, w in OPTION_WEIGHTS.items())


# ---- preference pairs ----


def preference_pairs(root: Node, config: SearchConfig = SearchConfig()) -> list[Pair]:
    """The pairs to train on: `all_pairs` less the dropped ones."""
    return [pair for pair in all_pairs(root, config) if not pair.dropped_by]


def all_pairs(root: Node, config: SearchConfig = SearchConfig()) -> list[Pair]:
    """Highest against lowest Q for each state with two children or more, dropped pairs included.

    In preorder. Ties: chosen has more visits, higher prior, lower index; rejected the reverse.
    Unvisited children take part with Q = r.
    """
    pairs = []
    for node in _preorder(root):
        if len(node.children) < 2:
            continue
        keys = [(s.Q, s.N, s.prior, -index) for index, s in enumerate(node.children)]
        chosen, rejected = (node.children[keys.index(pick(keys))] for pick in (max, min))
        dropped_by = _reasons(chosen, rejected, config)
        ids = (list(node.state_ids), list(chosen.token_ids), list(rejected.token_ids))
        pairs.append(Pair(*ids, node, chosen, rejected, dropped_by))
    return pairs


def similarity(a: str, b: str) -> float:
    """Overlap |A & B| / min(|A|, |B|) of the two steps' sets of words, in [0, 1].

    Two blanks: 1, one blank: 0. Not an edit distance: long steps that differ in one digit of
    a value would count as alike, and these are the pairs iTool is after.
    """
    words_a, words_b = set(a.split()), set(b.split())
    if not words_a or not words_b:
        return float(words_a == words_b)
    return len(words_a & words_b) / min(len(words_a), len(words_b))


# ---- trees on disk and on the screen ----


def tree_to_dict(root: Node, config: SearchConfig = SearchConfig(), **about: Any) -> dict:
    """The tree as JSON data: {**about, "config", "nodes"}, nodes in preorder with parent indices.

    about   what else to keep with it, such as id, target or step
    Tails are left out.
    """
    nodes = list(_preorder(root))
    index = {id(node): i for i, node in enumerate(nodes)}
    rows = [
        {"parent": index.get(id(node.parent)), **{name: getattr(node, name) for name in _SAVED}}
        for node in nodes
    ]
    return {**about, "config": asdict(config), "nodes": rows}


def tree_from_dict(data: dict) -> Node:
    """The root of a tree written by `tree_to_dict`; its config: SearchConfig(**data["config"])."""
    nodes: list[Node] = []
    for row in data["nodes"]:
        parent = None if row["parent"] is None else nodes[row["parent"]]
        nodes.append(Node(parent=parent, **{name: row[name] for name in _SAVED}))
        if parent is not None:
            parent.children.append(nodes[-1])
    return nodes[0]


def format_tree(root: Node, config: SearchConfig = SearchConfig(), color: bool = False) -> str:
    """The tree as text, an action per line: + chosen, - rejected, in brackets where dropped.

    color   with ANSI colours: chosen green, rejected red
    """
    marks = _marks(root, config)
    lines = ["    N       Q      p   O       C"]
    stack = [(root, "", "")]  # node, indent of its line, indent of the lines below
    while stack:
        node, indent, below = stack.pop()
        mark, why = marks.get(id(node), ("", ""))
        numbers = f"{node.Q:+8.3f} {node.prior:6.2f} {node.O:+3.0f} {node.C:+7.3f} {mark:>4}"
        text = " ".join(filter(None, [_printable(node.text), node.reason, why]))
        if node is root:
            numbers = " " * len(numbers)
            text = f"root: {len(root.token_ids)} prompt tokens, V {root.V:+.3f}"
        code = {"+": "\033[32m", "-": "\033[31m"}.get(mark.strip("()")) if color else None
        lines.append(f"{node.N:5d}{numbers}  {indent}" + (f"{code}{text}\033[0m" if code else text))
        for child in reversed(node.children):
            last = child is node.children[-1]
            stack.append(
                (child, below + ("`- " if last else "|- "), below + ("   " if last else "|  "))
            )
    return "\n".join(lines)


def svg(trees: list[tuple[Node, SearchConfig]]) -> str:
    """A self-contained picture of the trees (Figure 11), root left, one action per box.

    Frame: green chosen, red rejected, dashed where the pair was dropped. Fill: the outcome.
    Long fragments end in an ellipsis; hovering over them shows the whole text.
    """
    parts, top, width = [], _ROW, 0
    for root, config in trees:
        marks, places = _marks(root, config), _places(root)
        for node in _preorder(root):
            parts += _svg_node(node, places, top, *marks.get(id(node), ("", "")))
        top += (1 + max(row for _, row in places.values())) * _ROW + _ROW // 2
        width = max(width, (1 + max(column for column, _ in places.values())) * _COLUMN)
    width, top = max(width, 3 * _COLUMN), math.ceil(top)
    legend = "green chosen, red rejected, dashed: pair dropped; filled: finished, correct or wrong"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" '
        'font-family="monospace" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="10" y="24">{legend}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def read_trees(path: Path) -> list[tuple[dict, Node, SearchConfig]]:
    """The trees of a file, one of `tree_to_dict` per line: data, root, config."""
    trees = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                data = json.loads(line)
                trees.append((data, tree_from_dict(data), SearchConfig(**data["config"])))
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a tree ({error!r}); a line must be the JSON of "
                    "what mcts.tree_to_dict returns"
                ) from None
    if not trees:
        raise ValueError(f"{path} holds no tree")
    return trees


def main(argv: list[str] | None = None) -> None:
    """python mcts.py show FILE"""
    parser = argparse.ArgumentParser(description="Print search trees and draw them.")
    show = parser.add_subparsers(dest="command", required=True).add_parser("show")
    show.add_argument("file", type=Path, help="trees of tree_to_dict, one per line")
    sys.stdout.reconfigure(errors="backslashreplace")  # the locale may lack what a model writes
    path = parser.parse_args(argv).file
    picture = path.with_suffix(".svg")
    try:
        trees = read_trees(path)
        # first, since the text may go to a pipe that closes
        picture.write_text(svg([tree[1:] for tree in trees]), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for data, root, config in trees:
        about = {name: value for name, value in data.items() if name not in ("config", "nodes")}
        print("\n".join(f"{name}: {_printable(str(value))}" for name, value in about.items()))
        print(format_tree(root, config, color=sys.stdout.isatty()))
        kept = len(preference_pairs(root, config))
        print(f"{len(all_pairs(root, config))} pairs, {kept} kept\n")
    print(f"picture: {picture}")


# ---- private ----

# A string with escapes; an unclosed one runs to the end of the text.
_DOUBLE = r'"[^"\\]*(?:\\.[^"\\]*)*"?'
_SINGLE = _DOUBLE.replace('"', "'")
_JSON_TOKEN = re.compile(rf"{_DOUBLE}|\S", re.DOTALL)
_PYTHON_TOKEN = re.compile(rf"{_DOUBLE}|{_SINGLE}|\S", re.DOTALL)
_CLOSING_TAG = re.compile(r"(?:\s*</tool_call>)?")
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_SAVED = [f.name for f in fields(Node) if f.name not in ("parent", "children", "tail")]
_COLUMN, _ROW = 300, 60  # pixels


def _fragment_ends(text: str) -> list[int]:
    """Character offsets at which the fragments of `text` end, ascending."""
    ends: list[int] = []
    leading = True  # nothing but white space so far
    for start, end in itertools.pairwise([0, *_cuts(text), len(text)]):
        blank = not text[start:end].strip()
        if ends and (blank or leading):
            ends[-1] = end
        elif end > start:
            ends.append(end)
        leading = leading and blank
    return ends


def _cuts(text: str) -> list[int]:
    """Ends of the fragments as character offsets, with or without the end of the text."""
    head = text.lstrip().removeprefix("<tool_call>").lstrip()
    if head.startswith("{") or (head.startswith("[") and head[1:].lstrip().startswith("{")):
        brackets, commas = {"[": "]", "{": "}"}, (["["], ["{", "{"], ["[", "{", "{"])
        return _call_cuts(text, _JSON_TOKEN, brackets, commas, call_end="}")
    if head.startswith("["):
        brackets, commas = {"[": "]", "(": ")", "{": "}"}, (["["], ["[", "("])
        return _call_cuts(text, _PYTHON_TOKEN, brackets, commas, call_end=")")
    return [match.end() for match in _SENTENCE_END.finditer(text)]


def _call_cuts(
    text: str, token: re.Pattern, brackets: dict[str, str], commas: tuple, call_end: str
) -> list[int]:
    """Cuts at a comma where the open brackets are one of `commas`, and at a `]` after a call."""
    cuts, stack, after_call = [], [], False
    for match in token.finditer(text):
        mark = match[0]
        if mark == "," and stack in commas:
            cuts.append(match.end())
        elif mark == "]" and after_call:
            cuts.append(_CLOSING_TAG.match(text, match.end()).end())
        after_call = False
        if mark in brackets:
            stack.append(mark)
        elif stack and mark == brackets[stack[-1]]:  # others are ignored
            stack.pop()
            after_call = mark == call_end and stack == ["["]
    return cuts


def _iterations(root: Node, config: SearchConfig) -> Iterator[Node]:
    """One tree's search as a coroutine: yields each leaf, which `search` expands at once."""
    for _ in range(config.iterations):
        if not config.revisit and _closed(root):
            return
        path = [root]
        while path[-1].children:  # select
            path.append(puct(path[-1], config.c, config.revisit))
        for _ in range(1 + config.simulation):  # expand, then roll out
            if path[-1].terminal:
                break
            yield path[-1]
            if path[-1].children:
                path.append(puct(path[-1], config.c))
        backup(path, config.discount, config.visit_floor)


def _expand(
    leaves: list[Node], propose: Callable, evaluate: Callable, config: SearchConfig
) -> None:
    """Give each leaf its evaluated children, or mark it dead where no sample gave one."""
    for leaf, proposals in zip(leaves, propose(leaves, config.width), strict=True):
        leaf.children = _children(leaf, proposals, config)
        if not leaf.children:
            leaf.terminal, leaf.reason = True, "dead"
    children = [child for leaf in leaves for child in leaf.children]
    grades = evaluate(children) if children else []
    for child, (outcome, self_eval) in zip(children, grades, strict=True):
        child.O, child.C, child.R = outcome, self_eval, outcome + self_eval  # Eq. 6
        child.reward = child.Q = child.R - child.parent.R


def _children(leaf: Node, proposals: list[Proposal], config: SearchConfig) -> list[Node]:
    """The first `width` non-empty proposals of different text as nodes, not yet evaluated."""
    distinct: dict[str, Proposal] = {}
    for p in proposals:
        if len(p.token_ids):
            assert len(p.logps), f"no log-probs for the action {p.text!r}"
            distinct.setdefault(p.text, p)
    return [
        Node(
            parent=leaf,
            text=p.text,
            token_ids=list(p.token_ids),
            prior=math.exp(math.fsum(p.logps) / len(p.logps) ** config.length_power),
            depth=leaf.depth + 1,
            terminal=p.finished or leaf.depth + 1 == config.depth,
            reason=p.reason,
            tail=p.tail,
        )
        for p in itertools.islice(distinct.values(), config.width)
    ]


def _closed(node: Node) -> bool:
    """Whether nothing is left to explore at or below the node."""
    return node.terminal or (bool(node.children) and all(map(_closed, node.children)))


def _preorder(root: Node) -> Iterator[Node]:
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack += reversed(node.children)


def _reasons(chosen: Node, rejected: Node, config: SearchConfig) -> list[str]:
    """The filters of Appendix B.1 that the pair fails; their limits are inclusive."""
    tol = 1e-9
    alike = chosen.text == rejected.text or (
        similarity(chosen.text, rejected.text) > config.max_similarity + tol
    )
    close = chosen.Q - rejected.Q < config.min_gap - tol
    filters = {"similarity": alike, "gap": close, "accept_q": chosen.Q < config.min_q - tol}
    return [name for name, fails in filters.items() if fails]


def _marks(root: Node, config: SearchConfig) -> dict[int, tuple[str, str]]:
    """id(node) -> ("+" | "-" | "(+)" | "(-)", reasons) for the two steps of every pair."""
    marks = {}
    for pair in all_pairs(root, config):
        why = ", ".join(pair.dropped_by)
        for node, mark in ((pair.chosen, "+"), (pair.rejected, "-")):
            marks[id(node)] = (f"({mark})", f"dropped: {why}") if why else (mark, "")
    return marks


def _printable(text: str) -> str:
    """Model text without control characters, which could move the cursor or break XML."""
    return "".join(ch if ch.isprintable() else ascii(ch)[1:-1] for ch in text)


def _places(root: Node) -> dict[int, tuple[int, float]]:
    """id(node) -> (column, row): a leaf takes the next row, others the middle of their children."""
    nodes, rows = list(_preorder(root)), {}
    leaves = itertools.count()
    for node in nodes:
        if not node.children:
            rows[id(node)] = next(leaves)
    for node in reversed(nodes):
        if node.children:
            rows[id(node)] = (rows[id(node.children[0])] + rows[id(node.children[-1])]) / 2
    return {id(node): (node.depth, rows[id(node)]) for node in nodes}


def _svg_node(node: Node, places: dict, top: int, mark: str, why: str) -> list[str]:
    """The box of one node and the line from its parent."""
    column, row = places[id(node)]
    x, y = 10 + column * _COLUMN, top + row * _ROW
    color = {"+": "#1a7f37", "-": "#cf222e"}.get(mark.strip("()"), "#57606a")
    dash = ' stroke-dasharray="5 3"' if why else ""
    style = f'stroke="{color}" stroke-width="{2 if mark else 1}"{dash}'
    fill = {1: "#dafbe1", -1: "#ffebe9"}.get(node.O, "#eaeef2") if node.terminal else "white"
    text = _printable(node.text).strip() if node.parent else f"prompt, {len(node.token_ids)} tokens"
    short = text if len(text) <= 32 else text[:31] + "\u2026"
    value = f"Q {node.Q:+.2f} p {node.prior:.2f}" if node.parent else f"V {node.V:+.2f}"
    value += f" N {node.N} O {node.O:+g} C {node.C:+.2f}"
    parts = []
    if node.parent:
        parent_row = places[id(node.parent)][1]
        parts = [f'<path d="M{x - 50} {top + parent_row * _ROW + 22} L{x} {y + 22}" {style}/>']
    hover = html.escape(" ".join(filter(None, [mark, text, node.reason, why])))
    title = f"<title>{hover}</title>"
    frame = f'<rect x="{x}" y="{y}" width="250" height="44" rx="6" fill="{fill}" {style}>'
    return parts + [
        f"{frame}{title}</rect>",
        f'<text x="{x + 8}" y="{y + 18}">{html.escape(short)}{title}</text>',
        f'<text x="{x + 8}" y="{y + 35}" fill="{color}">{value}</text>',
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
