"""Break the rules of decoding one at a time and show that their proofs notice.

    python -m tests.decoding.mutations [--only NUMBER ...]

Every mutation changes a copy of the source; the tests named beside it must then fail. One line per
mutation, exit code 1 if a broken rule went unnoticed. Takes some minutes, so CI does not run it; that
every mutation still applies to the source is tested in `test_mutations.py`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("decoding", "tests", "benchmarks", "models", "server", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class Mutation:
    """`old`, which must occur once in `file`, becomes `new`; `tests` are arguments of pytest."""

    rule: str
    file: str
    old: str
    new: str
    tests: str


ACCEPTANCE = "decoding/acceptance.py"
LAW = "tests/decoding/test_acceptance_law.py -k proof_03"
JOINT = "tests/decoding/test_acceptance.py -k proof_02"
ENGINE = "tests/decoding/test_engine.py"
MMTAD = "tests/decoding/methods/test_mmtad.py"
PREFIX = "tests/decoding/test_prefix_cache.py"
GRAPHS = "tests/decoding/test_graphs.py tests/decoding/test_passes.py"

MUTATIONS = (
    Mutation(
        "a rejected chain draws its recovered token from p, not from the residual",
        ACCEPTANCE,
        "next_log_probs = torch.where(recoverable[:, None], residual.log(), at_end.double())",
        "next_log_probs = at_end.double()",
        LAW,
    ),
    Mutation(
        "the residual is not updated after a rejected child",
        ACCEPTANCE,
        "residual = torch.where(rejected, left / mass, residual)",
        "residual = residual * 1",
        LAW,
    ),
    Mutation(
        "q keeps the mass of a child that was drawn without replacement",
        ACCEPTANCE,
        "q = q.scatter(1, token, 0.0)",
        "q = q * 1",
        LAW,
    ),
    Mutation(
        "block verification forgets what earlier tokens left of p",
        ACCEPTANCE,
        "residual = (kept_mass[:, :depth, None] * p[:, :depth] - q).clamp(min=0)",
        "residual = (p[:, :depth] - q).clamp(min=0)",
        LAW,
    ),
    Mutation(
        "a chain goes on behind its first rejection",
        ACCEPTANCE,
        "num_accepted = accepted.long().cumprod(1).sum(1)",
        "num_accepted = accepted.long().sum(1)",
        LAW,
    ),
    Mutation(
        "the joint rule stops at the first ancestor that fails",
        ACCEPTANCE,
        "    depths = rule_depths(tree, limits).masked_fill(~passes, 0)",
        "    passes &= ~(tree.ancestors[:, :, 1:] & ~passes[:, None, 1:]).any(-1)\n"
        "    depths = rule_depths(tree, limits).masked_fill(~passes, 0)",
        f"{JOINT} {MMTAD}",
    ),
    Mutation(
        "among equally deep nodes the first is kept, not the likeliest",
        ACCEPTANCE,
        "return target_joint.masked_fill(~candidates, -torch.inf).argmax(1)",
        "return candidates.int().argmax(1)",
        JOINT,
    ),
    Mutation(
        "a node passes at the threshold, not above it",
        ACCEPTANCE,
        "passes = (target_joint - reference > log_threshold[:, None]) & real",
        "passes = (target_joint - reference >= log_threshold[:, None]) & real",
        f"{JOINT} {MMTAD}",
    ),
    Mutation(
        "an ended beam is judged as a childless leaf",
        ACCEPTANCE,
        "return torch.where(tree.ended, limits[:, None], tree.depths)",
        "return tree.depths + 0 * limits[:, None]",
        f"{JOINT} tests/decoding/test_beam.py {ENGINE} -k 'proof_02 or proof_07'",
    ),
    Mutation(
        "an ended beam leaves the beam",
        "decoding/beam.py",
        "scores[:, :, 0] = torch.where(frozen, beams.scores, scores[:, :, 0])",
        "scores[:, :, 0] = torch.where(frozen, -math.inf, scores[:, :, 0])",
        "tests/decoding/test_beam.py",
    ),
    Mutation(
        "parents are taken by slot, not from the beam that was continued",
        "decoding/beam.py",
        "beams = _extend(tree, chosen, frozen.gather(1, chosen.beams), batch, depth)",
        "chosen.parents = beams.nodes[:, :1].expand_as(chosen.parents)\n"
        "        beams = _extend(tree, chosen, frozen.gather(1, chosen.beams), batch, depth)",
        "tests/decoding/test_beam.py",
    ),
    Mutation(
        "beam search adds no parent's score",
        "decoding/beam.py",
        "scores = beams.scores[:, :, None] + values.double()",
        "scores = 0 * beams.scores[:, :, None] + values.double()",
        "tests/decoding/test_beam.py tests/decoding/methods/test_mtjd.py",
    ),
    Mutation(
        "the bonus is drawn one node too early",
        "decoding/methods/step.py",
        "to_log_probs(gather_at(adjusted, node)[:, None]",
        "to_log_probs(gather_at(adjusted, gather_at(tree.parents, node))[:, None]",
        MMTAD,
    ),
    Mutation(
        "the token behind an end is delivered",
        "decoding/delivery.py",
        "kept = len(row.token_ids) if stop is None else stop + 1",
        "kept = len(row.token_ids) if stop is None else stop + 2",
        f"{ENGINE} -k proof_07",
    ),
    Mutation(
        "the target's reference multiplies the tokens' own chances, not the best ones",
        "decoding/methods/step.py",
        "target = tree.joint(log_probs.amax(-1).double().gather(1, tree.parents))",
        "target = tree.joint(_conditional(tree, log_probs))",
        MMTAD,
    ),
    Mutation(
        "the accepted columns stay where the tree had them",
        "decoding/kv_cache.py",
        "moved = self._by_column.index_select(1, self._flat_slots(rows, sources))",
        "moved = self._by_column.index_select(1, self._flat_slots(rows, destinations))",
        f"{ENGINE} -k proof_05",
    ),
    Mutation(
        "a node sees its siblings",
        "decoding/token_tree.py",
        "self.ancestors[:, nodes] |= self.ancestors.gather(1, index)",
        "self.ancestors[:, nodes] |= self.ancestors.gather(1, index)\n"
        "        self.ancestors[:, nodes, nodes] = True",
        "tests/decoding/test_model.py -k proof_05",
    ),
    Mutation(
        "penalties leave out the node's own path",
        "decoding/adjustments.py",
        "        counts.scatter_add_(2, path_ids, on_path.to(counts.dtype))\n",
        "",
        "tests/decoding/test_adjustments.py -k proof_08",
    ),
    Mutation(
        "min_tokens counts from the root, not from the node",
        "decoding/adjustments.py",
        "too_early = self.num_outputs[:, None] + depths + 1 <= self.min_tokens[:, None]",
        "too_early = self.num_outputs[:, None] + 0 * depths + 1 <= self.min_tokens[:, None]",
        f"{ENGINE} tests/decoding/test_adjustments.py -k 'proof_07 or proof_08'",
    ),
    Mutation(
        "random numbers do not depend on the choice",
        "decoding/batch.py",
        "self.streams = step_streams(self.seeds, self.choices, self.steps)",
        "self.streams = step_streams(self.seeds, 0 * self.choices, self.steps)",
        "tests/decoding/test_batch.py",
    ),
    Mutation(
        "random numbers are the same in every step",
        "decoding/batch.py",
        "        self._begin_step()\n        if self.adjustments is not None:",
        "        if self.adjustments is not None:",
        "tests/decoding/test_batch.py tests/decoding/test_laws.py -k 'advance or proof_03'",
    ),
    Mutation(
        "a sampled tree is pruned: only its likelier first child is tried",
        "decoding/methods/multi_candidate.py",
        "drawn = (log_probs + noise).topk(count, dim=-1).indices",
        "drawn = (log_probs + noise).topk(count, dim=-1).indices\n"
        "            drawn = drawn.gather(-1, log_probs.gather(-1, drawn).argsort(-1, descending=True))",
        "tests/decoding/test_laws.py -k proof_03",
    ),
    Mutation(
        "a draft's last column, which may be missing, is copied",
        "decoding/prefix_cache.py",
        "held.lengths[1] = max(held.lengths[1] - 1, 0)",
        "pass",
        PREFIX,
    ),
    Mutation(
        "sequences of different salts share columns",
        "decoding/prefix_cache.py",
        "if held.salt == salt and held.proven else 0",
        "if held.proven else 0",
        PREFIX,
    ),
    Mutation(
        "columns are copied out of rows that no pass has proven",
        "decoding/prefix_cache.py",
        "if held.salt == salt and held.proven else 0",
        "if held.salt == salt else 0",
        PREFIX,
    ),
    Mutation(
        "a step that broke off leaves what may be copied",
        "decoding/engine.py",
        "        self._prefixes.forget_all()\n",
        "",
        PREFIX,
    ),
    Mutation(
        "a row is moved and its tokens stay behind",
        "decoding/prefix_cache.py",
        "        self._tokens[destination, :length] = self._tokens[source, :length]\n",
        "",
        PREFIX,
    ),
    Mutation(
        "a method holds logits in memory that the next pass uses",
        "decoding/beam.py",
        "levels.append(logits.clone())",
        "levels.append(logits)",
        GRAPHS,
    ),
    Mutation(
        "rows that are padding write over columns of others",
        "decoding/passes.py",
        "self.columns.fill_(trash_column)",
        "self.columns.zero_()",
        GRAPHS,
    ),
    Mutation(
        "rows that a graph filled before are not padding again",
        "decoding/graphs.py",
        "if rows != self._filled:",
        "if self._filled is None:",
        GRAPHS,
    ),
    Mutation(
        "a replay does not get the positions of the columns",
        "decoding/passes.py",
        "        self.key_positions[rows] = other.key_positions\n",
        "",
        GRAPHS,
    ),
    Mutation(
        "the logits of a group are those of the first rows",
        "decoding/graphs.py",
        "return self.logits[rows]",
        "return self.logits[: rows.stop - rows.start]",
        GRAPHS,
    ),
    Mutation(
        "the row where prompts are prefilled is padding",
        "decoding/graphs.py",
        "_doubling(1, cache.rows - 1)",
        "_doubling(1, cache.rows)",
        GRAPHS,
    ),
    Mutation(
        "a recording that gives nothing is taken for right",
        "decoding/graphs.py",
        "        self.logits.fill_(math.nan)\n",
        "",
        GRAPHS,
    ),
)


def apply(mutation: Mutation, root: Path) -> None:
    """Change the source below `root`.

    Raises:
        ValueError: `old` does not occur exactly once.
    """
    path = root / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.rule}: {text.count(mutation.old)} places in {mutation.file}")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def copy(root: Path) -> None:
    """What the tests need, below `root`."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)


def first_failure(mutation: Mutation) -> str | None:
    """The first test that fails with this mutation, None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        apply(mutation, root)
        command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {mutation.tests}"
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=False,
        )
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    if result.returncode not in (0, 1) or (result.returncode == 1 and not failed):
        raise SystemExit(f"{mutation.rule}: pytest ended with {result.returncode}\n{result.stdout[-2000:]}")
    return failed[0].removeprefix("FAILED ").partition(" - ")[0] if failed else None


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.decoding.mutations")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutations, from 1 on")
    arguments = parser.parse_args()
    numbers = arguments.only or list(range(1, len(MUTATIONS) + 1))
    unnoticed = 0
    for number in numbers:
        mutation = MUTATIONS[number - 1]
        started = time.monotonic()
        failure = first_failure(mutation)
        unnoticed += failure is None
        seconds = time.monotonic() - started
        _say(f"{number:2} {mutation.rule}: {failure or 'NOT NOTICED'} ({seconds:.0f} s)")
    _say(f"{unnoticed} of {len(numbers)} went unnoticed")
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
