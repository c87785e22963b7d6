"""The search against worked games and a slow twin, the splitter against a slow scanner."""

import itertools
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import mcts
from mcts import Node, Proposal, SearchConfig

ORACLE = json.loads((Path(__file__).parent / "oracles" / "mcts.json").read_text(encoding="utf-8"))
GAMES = ORACLE["mcts"]


def walk(node):
    yield node
    for child in node.children:
        yield from walk(child)


def ends(node):
    """Iterations that ended at the node."""
    return node.N - sum(child.N for child in node.children)


def statistics(root):
    """All numbers of a tree, keyed by path text: two trees are equal where these are."""
    return [
        ([n.text for n in node.path], node.token_ids, node.N, node.Q, node.V, node.R, node.reward)
        + (node.O, node.C, node.prior, node.terminal, node.reason)
        for node in walk(root)
    ]


# ---- the worked games ----


class Table:
    """A game of the oracle as the two functions of `search`; token ids spell the label."""

    def __init__(self, table):
        self.table = table
        self.visited = []  # labels of expanded states, in order

    @staticmethod
    def label(node):
        return "/".join(bytes(n.token_ids).decode() for n in node.path[1:])

    def propose(self, nodes, width):
        self.visited += [self.label(node) for node in nodes]
        return [
            [
                Proposal(text, list(name.encode()), [math.log(p)] * len(name), terminal)
                for name, text, p, _, _, terminal in self.table.get(self.label(node), [])
            ]
            for node in nodes
        ]

    def evaluate(self, nodes):
        entries = []
        for node in nodes:
            *above, name = self.label(node).split("/")
            entry = next(row for row in self.table["/".join(above)] if row[0] == name)
            entries.append((entry[4], entry[3]))
        return entries


def game_config(params, **overrides):
    names = {"sim": "simulation", "iters": "iterations", "c_puct": "c", "gamma": "discount"}
    return SearchConfig(**{names.get(key, key): value for key, value in params.items()} | overrides)


def play(name):
    config = game_config(GAMES[name]["params"])
    table = Table(GAMES[name]["table"])
    root = Node(token_ids=[0])
    assert mcts.search([root], table.propose, table.evaluate, config) == [root]
    return root, table, config


@pytest.mark.parametrize("name", GAMES)
def test_game_nodes(name):
    root, table, _ = play(name)
    nodes = {"/".join(filter(None, ["root", Table.label(node)])): node for node in walk(root)}
    assert list(nodes) == [row["path"] for row in GAMES[name]["nodes"]]
    for row in GAMES[name]["nodes"]:
        node = nodes[row["path"]]
        assert (node.N, ends(node), node.depth) == (row["N"], row["ends"], row["depth"])
        assert (node.terminal, bool(node.children)) == (row["terminal"], row["expanded"])
        got = [node.prior, node.C, node.O, node.R, node.reward, node.V, node.Q]
        assert got == pytest.approx(
            [row[key] for key in ("prior", "C", "O", "R", "r", "V", "Q")], abs=1e-9
        )
    assert len(table.visited) == GAMES[name]["expansions"]


@pytest.mark.parametrize("name", GAMES)
def test_game_paths(name):
    """The path of each iteration, seen as the nodes whose N rose, and what it expanded."""
    game = GAMES[name]
    config, table, root = game_config(game["params"], iterations=1), Table(game["table"]), Node()
    for iteration in game["iterations"]:
        before = {id(node): node.N for node in walk(root)}
        table.visited.clear()
        mcts.search([root], table.propose, table.evaluate, config)
        risen = [node for node in walk(root) if node.N > before.get(id(node), 0)]
        labels = [bytes(node.token_ids).decode() or "root" for node in risen]
        assert labels == (iteration["path"] or [])
        expanded = [label.split("/")[-1] or "root" for label in table.visited]
        assert expanded == iteration.get("expanded", [])
        if iteration["path"]:
            assert root.V == pytest.approx(iteration["root_V"], abs=1e-9)
            assert risen[-1].R == pytest.approx(iteration["R_end"], abs=1e-9)


@pytest.mark.parametrize("name", GAMES)
def test_game_pairs(name):
    root, _, config = play(name)
    rows = GAMES[name]["pairs_kept"] + GAMES[name]["pairs_dropped"]
    expected = {row["node"]: row for row in rows}
    pairs = mcts.all_pairs(root, config)
    assert len(pairs) == len(rows)
    for pair in pairs:
        row = expected["/".join(filter(None, ["root", Table.label(pair.node)]))]
        assert pair.dropped_by == row.get("dropped_by", [])
        assert pair.node.state_text == row["prefix"]
        for child, side in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            assert bytes(child.token_ids).decode() == row[side]
            assert child.text == row[f"{side}_text"]
            assert child.Q == pytest.approx(row[f"Q_{side}"], abs=1e-9)
        assert mcts.similarity(pair.chosen.text, pair.rejected.text) == row["similarity"]
    kept = mcts.preference_pairs(root, config)
    assert [Table.label(pair.node) for pair in kept] == [
        row["node"].removeprefix("root").lstrip("/") for row in GAMES[name]["pairs_kept"]
    ]


# ---- random games ----


class Game:
    """A random policy, fixed by the seed: duplicates, early and over-long ends, dead states."""

    def __init__(self, seed, config):
        self.seed, self.config = seed, config
        self.proposed, self.evaluated = [], []  # nodes per call

    def children(self, path):
        """[(text, p, C, finished, reason)] of a state given by the texts of its path."""
        rng = random.Random(f"{self.seed} {path}")
        if rng.random() < 0.05:
            return []
        rows = []
        for _ in range(self.config.width):
            reason = rng.choices(["eos", "length", None], [0.2, 0.1, 0.7])[0]
            rows.append((f" {rng.randrange(6)}", rng.random(), rng.uniform(-2, 1), reason))
        return rows

    def propose(self, nodes, width):
        self.proposed.append(list(nodes))
        assert width == self.config.width
        return [
            [
                Proposal(text, [ord(text[1])], [math.log(p)], reason is not None, reason)
                for text, p, _, reason in self.children(tuple(n.text for n in node.path[1:]))
            ]
            for node in nodes
        ]

    def outcome(self, path):
        *_, self_eval, reason = next(r for r in self.children(path[:-1]) if r[0] == path[-1])
        right = random.Random(f"{self.seed} {path} outcome").random() < 0.4
        if reason is None and len(path) < self.config.depth:
            return 0, self_eval
        return (1 if right and reason != "length" else -1), self_eval

    def evaluate(self, nodes):
        self.evaluated.append(list(nodes))
        return [self.outcome(tuple(n.text for n in node.path[1:])) for node in nodes]


def random_config(rng):
    return SearchConfig(
        depth=rng.randint(1, 5),
        width=rng.randint(1, 4),
        simulation=rng.randint(0, 4),
        iterations=rng.randint(1, 12),
        c=rng.choice([0.0, 0.5, 1.0, 3.0]),
        discount=rng.choice([0.0, 0.5, 0.9, 1.0]),
        visit_floor=rng.choice([0, 0, 1]),
        revisit=rng.random() < 0.7,
    )


def slow_search(game, config):
    """iTool Section 3.2 by recursion; V and Q are unfolded from Eqs. 8 and 9 at every use."""
    kids, prior, reward, grade = {}, {(): 1.0}, {(): 0.0}, {(): 0.0}
    visits, over = {(): 0}, {(): False}

    def value(s):  # Eq. 8
        weights = [max(visits[k], config.visit_floor) for k in kids.get(s, [])]
        if sum(weights) == 0:
            return 0.0
        return sum(w * action_value(k) for w, k in zip(weights, kids[s])) / sum(weights)

    def action_value(s):  # Eq. 9
        return reward[s] + config.discount * value(s)

    def exhausted(s):
        return over[s] or (bool(kids.get(s)) and all(exhausted(k) for k in kids[s]))

    def best(s, candidates):  # Eq. 5
        def score(k):
            return action_value(k) + config.c * prior[k] * visits[s] ** 0.5 / (1 + visits[k])

        top = max(score(k) for k in candidates)
        return max((k for k in candidates if score(k) == top), key=lambda k: prior[k])

    def expand(s):
        kids[s] = []
        for text, p, _, reason in game.children(s):
            child = (*s, text)
            if child in kids[s]:
                continue
            outcome, self_eval = game.outcome(child)  # Eq. 6
            kids[s].append(child)
            prior[child], grade[child], visits[child] = p, outcome + self_eval, 0
            reward[child] = grade[child] - grade[s]
            over[child] = reason is not None or len(child) == config.depth
        over[s] = not kids[s]

    def visit(s, expansions):
        if kids.get(s):
            open_kids = [k for k in kids[s] if config.revisit or not exhausted(k)]
            visit(best(s, open_kids), expansions)
        elif not over[s]:
            roll_out(s, expansions)
        visits[s] += 1

    def roll_out(s, expansions):
        expand(s)
        if not kids[s]:
            return
        child = best(s, kids[s])
        if not over[child] and expansions > 1:
            roll_out(child, expansions - 1)
        visits[child] += 1

    for _ in range(config.iterations):
        if not config.revisit and exhausted(()):
            break
        visit((), config.simulation + 1)
    return {s: (visits[s], action_value(s) if s else 0.0, value(s), grade[s]) for s in visits}


def test_search_equals_slow_recursion():
    rng = random.Random(0)
    expanded = 0
    for seed in range(300):
        config = random_config(rng)
        root = Node()
        game = Game(seed, config)
        mcts.search([root], game.propose, game.evaluate, config)
        expected = slow_search(Game(seed, config), config)
        got = {tuple(n.text for n in node.path[1:]): node for node in walk(root)}
        assert got.keys() == expected.keys()
        for path, node in got.items():
            assert node.N == expected[path][0], (seed, path)
            gaps = [a - b for a, b in zip((node.Q, node.V, node.R), expected[path][1:])]
            assert max(map(abs, gaps)) < 1e-9, (seed, path)
        expanded += len(got)
    assert expanded > 2000  # the games are not trivial


def test_invariants_on_random_games():
    """What holds after every single iteration, whatever the tree."""
    rng = random.Random(1)
    means = 0
    for seed in range(300):
        config = random_config(rng)
        game, root = Game(seed, config), Node()
        reached = []  # R of the end of every iteration
        for _ in range(config.iterations):
            before = {id(node): ends(node) for node in walk(root)}
            one = SearchConfig(**vars(config) | {"iterations": 1})
            mcts.search([root], game.propose, game.evaluate, one)
            reached += [n.R for n in walk(root) if ends(n) > before.get(id(n), 0)]
            nodes = list(walk(root))
            assert root.N == len(reached) == sum(ends(node) for node in nodes)
            low, high = min(n.R for n in nodes[1:] or nodes), max(n.R for n in nodes[1:] or nodes)
            for node in nodes:
                assert ends(node) >= 0 and len(node.children) <= config.width
                assert node.depth <= config.depth
                assert len({child.text for child in node.children}) == len(node.children)
                assert (node.O == 0) == (not node.terminal or node.reason == "dead")
                weights = [max(child.N, config.visit_floor) for child in node.children]
                mean = 0.0
                if sum(weights):
                    mean = sum(w * k.Q for w, k in zip(weights, node.children)) / sum(weights)
                assert abs(node.V - mean) < 1e-9
                if node is not root:
                    assert abs(node.reward - (node.R - node.parent.R)) < 1e-9
                    assert abs(node.Q - (node.reward + config.discount * node.V)) < 1e-9
                    if config.discount == 1.0:
                        base = node.parent.R
                        assert low - base - 1e-9 <= node.Q <= high - base + 1e-9
            if config.simulation + 1 >= config.depth:  # every path is played to an end
                assert all(node.terminal for node in nodes if ends(node))
                if config.discount == 1.0 and not config.visit_floor and root.children:
                    assert root.V == pytest.approx(sum(reached) / len(reached), abs=1e-9)
                    means += 1
        assert root.N == config.iterations or not config.revisit
    assert means > 100


def test_one_search_equals_repeated_single_iterations():
    config = SearchConfig(iterations=7, c=2.0)
    whole, steps = Node(), Node()
    game = Game(3, config)
    mcts.search([whole], game.propose, game.evaluate, config)
    for _ in range(7):
        mcts.search([steps], game.propose, game.evaluate, SearchConfig(iterations=1, c=2.0))
    assert statistics(whole) == statistics(steps)


class Many:
    """Several games behind one engine; the root's token id names the game."""

    def __init__(self, seeds, config):
        self.games = {seed: Game(seed, config) for seed in seeds}
        self.waves = []

    def propose(self, nodes, width):
        self.waves.append([node.path[0].token_ids[0] for node in nodes])
        return [self.games[n.path[0].token_ids[0]].propose([n], width)[0] for n in nodes]

    def evaluate(self, nodes):
        self.waves[-1].append("evaluated")
        return [self.games[n.path[0].token_ids[0]].evaluate([n])[0] for n in nodes]


def test_interleaved_trees_equal_sequential_ones_in_any_order():
    config = SearchConfig(depth=4, iterations=6, c=2.0)
    seeds = list(range(40))
    alone = {}
    for seed in seeds:
        root, game = Node(token_ids=[seed]), Game(seed, config)
        mcts.search([root], game.propose, game.evaluate, config)
        alone[seed] = (statistics(root), len(game.proposed))
    for order in (seeds, seeds[::-1], random.Random(2).sample(seeds, 40)):
        engine = Many(seeds, config)
        roots = [Node(token_ids=[seed]) for seed in order]
        assert mcts.search(roots, engine.propose, engine.evaluate, config) is roots
        assert [statistics(root) for root in roots] == [alone[seed][0] for seed in order]
        # One wave per expansion of the longest tree, and at most one evaluation in each.
        assert len(engine.waves) == max(count for _, count in alone.values())
        assert all(wave.count("evaluated") <= 1 for wave in engine.waves)
        assert engine.waves[0][:-1] == order


def test_cached_evaluation_gives_the_same_tree():
    config = SearchConfig(depth=4, iterations=8)
    game, cache = Game(5, config), {}

    def cached(nodes):
        new = [node for node in nodes if node.state_text not in cache]
        if new:
            cache.update(zip([node.state_text for node in new], game.evaluate(new)))
        return [cache[node.state_text] for node in nodes]

    plain, twice, thrice = Node(), Node(), Node()
    mcts.search([plain], game.propose, game.evaluate, config)
    mcts.search([twice], game.propose, cached, config)
    calls = len(game.evaluated)
    mcts.search([thrice], game.propose, cached, config)
    assert statistics(plain) == statistics(twice) == statistics(thrice)
    assert len(game.evaluated) == calls  # the third search was free


# ---- one node at a time ----


def test_puct_case():
    case = ORACLE["puct"]["inputs"]
    node = Node(N=case["N_parent"])
    rows = zip(case["Q"], case["prior"], case["N_child"])
    node.children = [Node(parent=node, Q=q, prior=p, N=int(n)) for q, p, n in rows]
    pick = mcts.puct(node, case["c"])  # two children tie at 0.6: the higher prior wins
    assert node.children.index(pick) == ORACLE["puct"]["expected"]["paper_pick"]
    node.children[2].Q += 0.01
    assert mcts.puct(node, 1.0) is node.children[2]
    assert mcts.puct(node, 0.0) is node.children[0]  # no exploration: the highest Q


def test_puct_ties_and_fresh_node():
    node = Node()
    node.children = [
        Node(Q=q, prior=p) for q, p in ((0.1, 0.9), (0.5, 0.2), (0.5, 0.3), (0.5, 0.3))
    ]
    assert mcts.puct(node, 1.0) is node.children[2]  # N = 0: by Q, then prior, then index
    node.N = 4
    assert mcts.puct(node, 1.0) is node.children[0]  # 0.1 + 2 * 0.9
    with pytest.raises(AssertionError):
        mcts.puct(Node(), 1.0)


def test_backup_by_hand():
    root = Node()
    a, b = Node(parent=root, reward=0.5), Node(parent=root, reward=0.2, Q=0.2)
    a1 = Node(parent=a, reward=-1.4, Q=-1.4)
    a2 = Node(parent=a, reward=-2.0, Q=-2.0)
    root.children, a.children = [a, b], [a1, a2]
    mcts.backup([root, a, a1], 0.9)
    assert (root.N, a.N, a1.N, a2.N, b.N) == (1, 1, 1, 0, 0)
    assert [a1.Q, a.V, a.Q, root.V, root.Q] == pytest.approx([-1.4, -1.4, -0.76, -0.76, 0.0])
    mcts.backup([root, a, a1], 0.9, visit_floor=1)
    assert a.V == pytest.approx((2 * -1.4 + 1 * -2.0) / 3)
    assert root.V == pytest.approx((2 * (0.5 + 0.9 * a.V) + 1 * 0.2) / 3)


def test_children_drop_empty_and_equal_proposals():
    def propose(nodes, width):
        return [
            [
                Proposal("", [], [], False),
                Proposal("x", [1], [math.log(0.5)], False, tail="first"),
                Proposal("x", [2, 3], [-1.0, -1.0], True, "eos"),
                Proposal("", [9], [-0.5], True, "eos", tail=None),  # the bare end of a sequence
                Proposal("y", [4], [-0.1], True, "length"),
                Proposal("z", [5], [-0.1], False),
            ]
        ] * len(nodes)

    config = SearchConfig(width=3, iterations=1, simulation=0)
    root = Node(token_ids=[7])
    mcts.search([root], propose, lambda nodes: [(0.0, 0.0)] * len(nodes), config)
    assert [child.text for child in root.children] == ["x", "", "y"]
    x, end, y = root.children
    assert (x.token_ids, x.prior, x.tail, x.terminal) == ([1], pytest.approx(0.5), "first", False)
    assert (end.terminal, end.reason, y.terminal, y.reason) == (True, "eos", True, "length")
    assert y.state_ids == [7, 4] and y.state_text == "y"


def test_dead_state_ends_its_path():
    def propose(nodes, width):
        first = [Proposal("a", [1], [-0.1], False), Proposal("b", [2], [-0.2], True, "eos")]
        return [[] if node.parent else first for node in nodes]

    def evaluate(nodes):
        return [(int(node.terminal), 0.9 if node.text == "a" else -1.0) for node in nodes]

    for revisit, visits in ((True, 4), (False, 1)):
        root = Node()
        config = SearchConfig(iterations=4, revisit=revisit, c=0.0)
        mcts.search([root], propose, evaluate, config)
        a = root.children[0]
        assert (a.terminal, a.reason, a.O, a.N, root.N) == (True, "dead", 0, visits, visits)
    barren = Node()
    mcts.search([barren], lambda nodes, width: [[]], None, SearchConfig())
    assert (barren.reason, barren.N, barren.V) == ("dead", 5, 0.0)


def test_wrong_answers_of_the_model_functions_are_errors():
    one = [[Proposal("a", [1], [-0.1], True)]]
    with pytest.raises(ValueError):
        mcts.search([Node()], lambda nodes, width: [], None, SearchConfig())
    with pytest.raises(ValueError):
        mcts.search([Node()], lambda nodes, width: one, lambda nodes: [], SearchConfig())
    root = Node()
    with pytest.raises(AssertionError, match="twice"):
        mcts.search([root, root], None, None, SearchConfig())
    with pytest.raises(ValueError, match="width=0"):
        SearchConfig(width=0)
    assert mcts.search([], None, None, SearchConfig()) == []


@pytest.mark.parametrize("case", ORACLE["prior"])
def test_prior(case):
    logps = case["token_logprobs"]
    for power, key in ((1.0, "mean"), (0.0, "sum"), (1.25, "xie_len1.25")):
        root = Node()
        drafts = [[Proposal("a", [1] * len(logps), logps, True, "eos")]]
        config = SearchConfig(length_power=power)
        mcts.search(
            [root], lambda nodes, width, drafts=drafts: drafts, lambda nodes: [(1, 0)], config
        )
        assert root.children[0].prior == pytest.approx(case[key], abs=1e-9)


# ---- self-evaluation ----


def test_confidence():
    for case in ORACLE["confidence"]["cases"]:
        assert mcts.confidence(case["probs"]) == pytest.approx(case["C_normalised"], abs=1e-9)
    expected = ORACLE["confidence"]["four_sample_distributions_mean"]["C"]
    scores = [mcts.confidence(case["probs"]) for case in ORACLE["confidence"]["cases"]]
    assert sum(scores) / 4 == pytest.approx(expected, abs=1e-9)
    case = ORACLE["selfeval"]
    probs = dict(zip("ABCD", case["inputs"]["p"]))
    assert mcts.confidence(probs) == pytest.approx(case["expected"]["C"])
    assert mcts.OPTION_WEIGHTS == ORACLE["confidence"]["weights"]


def test_confidence_edges():
    assert mcts.confidence({}) == mcts.confidence(dict.fromkeys("ABCD", 0.0)) == 0.0
    assert mcts.confidence({"X": 1.0}) == 0.0  # another letter has no weight
    assert mcts.confidence({"A": 1e-30}) == 1.0 and mcts.confidence({"D": 0.4, "X": 0.6}) == -2.0
    for case in ORACLE["confidence"]["four_sample_letters"]:  # letters as an empirical distribution
        counts = {letter: case["letters"].count(letter) for letter in "ABCD"}
        assert mcts.confidence(counts) == pytest.approx(case["C"])


def test_eval_prompt_keeps_braces_of_the_response():
    text = mcts.EVAL_PROMPT["user"].format(gt_ans='[f(a={"k": 1})]', response="{response} {")
    assert text.startswith(
        'Ground Truth Response: [f(a={"k": 1})]\nGenerated Response by Model: {response} {\n'
    )
    assert "almost identical to the ground truth response.\n(B)" in text
    assert set(mcts.EVAL_PROMPT) == {"system", "user", "assistant"}
    assert not any("{" in mcts.EVAL_PROMPT[role] for role in ("system", "assistant"))


# ---- fragments ----

FRAGMENTS = [
    ("", []),
    (" \n ", [" \n "]),
    ("[]", ["[]"]),
    ("[f()]", ["[f()]"]),
    ("[f(a=1) , g()]", ["[f(a=1) ,", " g()]"]),
    ("[f(a=1) ]\n", ["[f(a=1) ]\n"]),
    ("[f(a=1)] Done, ok. Bye", ["[f(a=1)]", " Done, ok. Bye"]),
    ("[f(a=1) g(b=2)]", ["[f(a=1) g(b=2)]"]),
    ("[f(a=(1, 2), b=g(3, 4))]", ["[f(a=(1, 2),", " b=g(3, 4))]"]),
    ("[my.tool/x y(p='a, (b', q=2)]", ["[my.tool/x y(p='a, (b',", " q=2)]"]),
    ('[f(a="unclosed, b=2), g()]', ['[f(a="unclosed, b=2), g()]']),
    (
        "<tool_call>\n[f(a=1, b=2)]\n</tool_call>",
        ["<tool_call>\n[f(a=1,", " b=2)]\n</tool_call>"],
    ),
    (
        '{"name": "f", "parameters": {"a": 1, "b": "x, y}", "c": [1, 2]}}',
        ['{"name": "f", "parameters": {"a": 1,', ' "b": "x, y}",', ' "c": [1, 2]}}'],
    ),
    (
        '<tool_call>\n[{"n": "f", "p": {"a": {"k": 1, "l": 2}, "b": "\\", }"}}, {}]\n</tool_call>',
        [
            '<tool_call>\n[{"n": "f", "p": {"a": {"k": 1, "l": 2},',
            ' "b": "\\", }"}},',
            " {}]\n</tool_call>",
        ],
    ),
    ('{"name": "it\'s", "p": {"a": "b\'s", "c": 1}}', None),  # ' is no quote in JSON
    ("Hello.\n\nWait... ok? 3.5!", ["Hello.\n\n", "Wait...", " ok?", " 3.5!"]),
    ("\n\nHi. There", ["\n\nHi.", " There"]),
    ("<answer>\nIt is 5. Bye.\n</answer>", ["<answer>\n", "It is 5.", " Bye.\n", "</answer>"]),
]


@pytest.mark.parametrize("text, expected", FRAGMENTS)
def test_fragments_by_hand(text, expected):
    expected = expected or (text and ['{"name": "it\'s", "p": {"a": "b\'s",', ' "c": 1}}']) or []
    assert mcts.split_fragments(text) == expected


@pytest.mark.parametrize("case", ORACLE["fragments"])
def test_fragment_cases(case):
    assert mcts.split_fragments(case["text"]) == case["fragments"]


@pytest.mark.parametrize("case", ORACLE["token_fragments"])
def test_token_fragment_cases(case):
    assert mcts.split_tokens(case["tokens"]) == case["fragments"]


def slow_fragments(text):
    """The cuts letter by letter; the state before each is found by scanning from the start."""
    head = text.lstrip()
    if head.startswith("<tool_call>"):
        head = head[len("<tool_call>") :].lstrip()
    no_blanks = "".join(head.split())
    if no_blanks[:1] == "{" or no_blanks[:2] == "[{":
        mode, quotes, openers, stacks, call_end = "json", '"', "[{", ("[", "{{", "[{{"), "}"
    elif no_blanks[:1] == "[":
        mode, quotes, openers, stacks, call_end = "call", "\"'", "[({", ("[", "[("), ")"
    else:
        mode = "text"

    def state(before):
        stack, quote, skip, closed = "", None, False, False
        for ch in before:
            if skip:
                skip = False
            elif quote:
                skip = ch == "\\"
                quote = None if ch == quote else quote
            elif not ch.isspace():
                closed = False
                if ch in quotes:
                    quote = ch
                elif ch in openers:
                    stack += ch
                elif stack and stack[-1] + ch in ("[]", "()", "{}"):
                    stack = stack[:-1]
                    closed = ch == call_end and stack == "["
        return stack, quote, closed

    cuts = [0]
    for i, ch in enumerate(text):
        if mode == "text":
            if ch == "\n" or (ch in ".!?" and text[i + 1 : i + 2].isspace()):
                cuts.append(i + 1)
        elif ch in ",]":
            stack, quote, closed = state(text[:i])
            if not quote and ch == "," and stack in stacks:
                cuts.append(i + 1)
            if not quote and ch == "]" and closed:
                rest = text[i + 1 :]
                tag = rest.lstrip().startswith("</tool_call>")
                blanks = len(rest) - len(rest.lstrip())
                cuts.append(i + 1 + (blanks + len("</tool_call>") if tag else 0))
    cuts.append(len(text))
    fragments = []
    for fragment in (text[a:b] for a, b in itertools.pairwise(cuts)):
        if fragments and (not fragment.strip() or not fragments[-1].strip()):
            fragments[-1] += fragment
        elif fragment:
            fragments.append(fragment)
    return fragments


PARTS = list("[](){}\"'\\,,.!? \n=1a") + ["[f(a=", '{"n": {"k": ', "<tool_call>", "</tool_call>"]
STARTS = ["", "[", "[f(", '[{"n": {', '{"n": {', "<tool_call>\n", "<tool_call>[{", "Ok. "]


def random_texts(count, seed, most=40):
    rng = random.Random(seed)
    for _ in range(count):
        yield rng.choice(STARTS) + "".join(rng.choices(PARTS, k=rng.randrange(most)))


def test_fragments_equal_slow_scanner():
    cut = 0
    for text in random_texts(2000, seed=0):
        fragments = mcts.split_fragments(text)
        assert fragments == slow_fragments(text), text
        assert "".join(fragments) == text
        assert all(fragment.strip() for fragment in fragments) or not text.strip()
        cut += len(fragments) > 1
    assert cut > 500


def test_cutting_a_prefix_first_gives_the_same_boundaries():
    for text in random_texts(1000, seed=1):
        fragments = mcts.split_fragments(text)
        for count in range(len(fragments)):
            assert mcts.split_fragments("".join(fragments[:count])) == fragments[:count], text


def test_tokens_are_cut_where_the_text_is():
    rng = random.Random(2)
    for text in random_texts(1000, seed=3):
        pieces, rest = [], text
        while rest:
            size = rng.randint(0, 4)  # 0: a token that decodes to nothing
            pieces.append(rest[:size])
            rest = rest[size:]
        pieces += [""] * rng.randrange(2)  # the end of the sequence
        groups = mcts.split_tokens(pieces)
        assert [piece for group in groups for piece in group] == pieces
        assert all("".join(group) for group in groups) or not text
        got, total = set(), 0
        for group in groups:
            total += len("".join(group))
            got.add(total)
        token_ends = [len("".join(pieces[: k + 1])) for k in range(len(pieces))]
        wanted, total = set(), 0
        for fragment in mcts.split_fragments(text):
            total += len(fragment)
            wanted.add(min(end for end in token_ends if end >= total))
        assert (got if text else set()) == wanted, pieces
    assert mcts.split_tokens([]) == [] and mcts.split_tokens(["", ""]) == [["", ""]]


def test_first_fragment_continues_the_state():
    prefix, rest = list('[f(a="x, y",'), list(" b=[1, 2], c=3), g()]")
    assert "".join(rest[: mcts.first_fragment(prefix, rest)]) == " b=[1, 2],"
    assert mcts.first_fragment([], prefix + rest) == len(prefix)
    assert mcts.first_fragment(list("[f(a="), list('"q, r"')) == 6  # inside a quote, no boundary
    assert mcts.first_fragment(list("Version 3."), list("5 is fine. Ok")) == len("5 is fine.")
    assert mcts.first_fragment(list("Hello."), list("\nWorld. Ok")) == len("\nWorld.")
    assert mcts.first_fragment(list("Hello."), []) == 0
    for text in random_texts(300, seed=4):
        steps, done = [], 0
        while done < len(text):
            done += mcts.first_fragment(list(text[:done]), list(text[done:]))
            steps.append(done)
        total = 0
        assert steps == [total := total + len(fragment) for fragment in mcts.split_fragments(text)]


@pytest.mark.parametrize(
    "unit", ["[", "(", ",", '"', "'", "\\", '"\\', "\n", "[f(a,", "{", " ", "\ud800", "[f(),"]
)
def test_long_model_output_is_cut_in_linear_time(unit):
    """50,000 characters: a quadratic scanner would not come back."""
    text = "[f(" + unit * (50_000 // len(unit))
    for sample in (text, text[3:], "[{" + text):
        assert "".join(mcts.split_fragments(sample)) == sample


# ---- the unused rest of a sample ----


class Writer:
    """Samples whole calls, a character a token; with `reuse` it spends node.tail as a draw."""

    def __init__(self, reuse, config):
        self.reuse, self.config, self.draws, self.rest = reuse, config, 0, {}

    def sample(self, state, k):
        rng = random.Random(f"{state} {k}")
        items = [f" {rng.choice('xyz')}={rng.randrange(3)}" for _ in range(rng.randint(1, 5))]
        return ("" if state else "[f(k=0,") + ",".join(items) + ")]"

    def propose(self, nodes, width):
        return [self.proposals(node, width) for node in nodes]

    def proposals(self, node, width):
        state = node.state_text
        first = (
            node.tail if self.reuse else self.rest.get(state)
        )  # the same characters, drawn again
        samples = [first] if first else []
        samples += [self.sample(state, k) for k in range(len(samples), width)]
        self.draws += width - (self.reuse and bool(first))
        proposals = []
        for text in samples:
            size = mcts.first_fragment(list(state), list(text))
            if node.depth + 1 == self.config.depth:
                size = len(text)
            action, rest = text[:size], text[size:]
            self.rest.setdefault(state + action, rest)
            tail = rest if self.reuse else None
            ids, logps = [ord(ch) for ch in action], [-0.01 * ord(ch) for ch in action]
            proposals.append(Proposal(action, ids, logps, not rest, None if rest else "eos", tail))
        return proposals

    def evaluate(self, nodes):
        return [
            (
                int(n.terminal) * (1 if "x=1" in n.state_text else -1),
                len(n.state_text) % 7 / 7 - 0.5,
            )
            for n in nodes
        ]


def test_tail_saves_draws_and_changes_nothing():
    saved = 0
    for seed in range(20):
        config = SearchConfig(depth=2 + seed % 3, iterations=6, c=float(seed))
        fresh, thrifty = Writer(False, config), Writer(True, config)
        one, other = Node(token_ids=[1]), Node(token_ids=[1])
        mcts.search([one], fresh.propose, fresh.evaluate, config)
        mcts.search([other], thrifty.propose, thrifty.evaluate, config)
        assert statistics(one) == statistics(other)
        assert thrifty.draws < fresh.draws
        saved += fresh.draws - thrifty.draws
        for pair in mcts.all_pairs(other, config):
            assert pair.prefix_ids + pair.chosen_ids == pair.chosen.state_ids
            assert pair.prefix_ids + pair.rejected_ids == pair.rejected.state_ids
            assert pair.prefix_ids[0] == 1
    assert saved > 20


# ---- preference pairs ----


def siblings(*rows):
    """A root with one child per (text, Q, N, prior)."""
    root = Node(token_ids=[5])
    root.children = [
        Node(parent=root, text=text, token_ids=[10 + i], Q=q, N=n, prior=p, depth=1)
        for i, (text, q, n, p) in enumerate(rows)
    ]
    return root


def test_pair_reasons_and_thresholds():
    def reasons(chosen, rejected, **config):
        root = siblings((*chosen, 0, 0.5), (*rejected, 0, 0.5))
        (pair,) = mcts.all_pairs(root, SearchConfig(**config))
        return pair.dropped_by

    assert reasons(("a b", 0.5), ("c d", 0.1)) == []
    assert reasons(("a b", 0.3), ("c d", 0.2)) == []  # both limits are inclusive, in floats too
    assert reasons(("a b", 0.299), ("c d", 0.1)) == ["accept_q"]
    assert reasons(("a b", 0.5), ("c d", 0.401)) == ["gap"]
    assert reasons(("a b", 0.9), ("b a", 0.1)) == ["similarity"]
    assert reasons(("a b", 0.2), ("a b c", 0.15)) == ["similarity", "gap", "accept_q"]
    words = " ".join(map(str, range(20)))
    assert reasons((words, 0.9), (words.replace("19", "x"), 0.1)) == []  # exactly 0.95
    assert reasons(("a", 0.9), ("a", 0.1), max_similarity=1.0) == ["similarity"]  # equal texts
    assert reasons(("a b", -0.2), ("c d", -0.5), min_q=-0.3) == []


def test_pair_ties():
    root = siblings(("a", 1, 0, 0.5), ("b", 1, 2, 0.1), ("c", 1, 2, 0.4), ("d", 1, 2, 0.4))
    (pair,) = mcts.all_pairs(root)
    assert (pair.chosen.text, pair.rejected.text) == ("c", "a")
    root = siblings(("a", 1, 0, 0.5), ("b", 1, 0, 0.5), ("c", 1, 0, 0.5))
    (pair,) = mcts.all_pairs(root)
    assert (pair.chosen.text, pair.rejected.text) == ("a", "c")
    assert mcts.all_pairs(siblings(("a", 1, 0, 0.5))) == []  # a single child: nothing to prefer
    assert mcts.preference_pairs(root) == [] and pair.dropped_by == ["gap"]


@pytest.mark.parametrize("case", ORACLE["similarity"])
def test_similarity(case):
    assert mcts.similarity(case["a"], case["b"]) == pytest.approx(case["overlap"])
    assert mcts.similarity(case["b"], case["a"]) == pytest.approx(case["overlap"])
    assert (mcts.similarity(case["a"], case["b"]) > 0.95) == case["excluded_overlap"]


def test_similarity_of_blanks_and_of_one_changed_value():
    assert mcts.similarity("", "a") == mcts.similarity("a", " ") == 0.0
    assert mcts.similarity(" ", "\n") == 1.0
    assert mcts.similarity("x y z u v 1", "x y z u v 2") == pytest.approx(5 / 6)


# ---- show ----


def test_tree_round_trip_through_json():
    root, _, config = play("S_small_gamma0.9")
    data = json.loads(json.dumps(mcts.tree_to_dict(root, config, id="q1", step=3)))
    again = mcts.tree_from_dict(data)
    assert statistics(again) == statistics(root)
    assert (data["id"], data["step"], SearchConfig(**data["config"])) == ("q1", 3, config)
    assert all(child.parent is node for node in walk(again) for child in node.children)


def test_show_prints_and_draws(tmp_path, capsys):
    root, _, config = play("S_small_gamma0.9")
    nasty = siblings(("\x1b[31m<&>\n\u2028\"'\x00", 1, 3, 0.5), ("\ud800 \u4f60", 0.2, 0, 0.5))
    nasty.children[0].terminal, nasty.children[0].O = True, 1
    lines = [mcts.tree_to_dict(root, config, id="q1"), mcts.tree_to_dict(nasty)]
    file, picture = tmp_path / "trees.jsonl", tmp_path / "trees.svg"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    mcts.main(["show", str(file)])
    out = capsys.readouterr().out
    assert "id: q1" in out and "3 pairs, 2 kept" in out and "1 pairs, 1 kept" in out
    rows = {line.split("- ")[-1]: line.split()[:6] for line in out.split("\n")}
    assert rows['[get_weather(city="Lyon",'] == ["4", "+0.526", "0.40", "+0", "+0.200", "+"]
    assert rows['[get_weather(city="Paris",'] == ["1", "-0.760", "0.60", "+0", "+0.500", "-"]
    dropped = rows[' unit="K")] dropped: accept_q']
    assert dropped == ["1", "-1.400", "0.30", "-1", "+0.100", "(+)"]
    assert "\x1b" not in out and "\x00" not in out and "\\x1b[31m<&>\\n\\u2028" in out
    drawing = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    boxes = [box for box in drawing.iter(f"{space}rect") if box.get("rx")]
    assert len(boxes) == 7 + 3
    assert len(list(drawing.iter(f"{space}path"))) == 6 + 2
    frames = [box.get("stroke") for box in boxes]
    assert frames.count("#1a7f37") == frames.count("#cf222e") == 3 + 1
    places = {(box.get("x"), box.get("y")) for box in boxes}
    assert len(places) == len(boxes)  # none hides another
    width, height = float(drawing.get("width")), float(drawing.get("height"))
    assert all(float(x) + 250 <= width and float(y) + 44 <= height for x, y in places)


def test_show_colours_a_terminal_only(tmp_path, capsys):
    root, _, config = play("S_small_gamma0.9")
    green = '\x1b[32m[get_weather(city="Lyon",\x1b[0m'
    assert green in mcts.format_tree(root, config, color=True)
    assert "\x1b" not in mcts.format_tree(root, config)


def test_show_refuses_other_files(tmp_path):
    root, _, config = play("M_table7_gamma1.0")
    tree = json.dumps(mcts.tree_to_dict(root, config))
    file = tmp_path / "trees.jsonl"
    for line in ("{}", "[1]", "7", '{"nodes": []}', '{"nodes": [', ""):
        file.write_text(f"{tree}\n{line}\n", encoding="utf-8")
        with pytest.raises(SystemExit, match="line 2: not a tree .*mcts.tree_to_dict"):
            mcts.main(["show", str(file)])
    file.write_text("")
    with pytest.raises(SystemExit, match="no tree"):
        mcts.main(["show", str(file)])
    with pytest.raises(SystemExit, match="No such file"):
        mcts.main(["show", str(tmp_path / "gone.jsonl")])


def test_file_works_alone(tmp_path):
    """Copied into an empty folder, without site-packages."""
    shutil.copy(mcts.__file__, tmp_path / "mcts.py")
    code = "import mcts; print(mcts.split_fragments('[f(a=1, b=2)]'))"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "['[f(a=1,', ' b=2)]']"
