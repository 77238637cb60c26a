"""Would a flipped sign fail a test? Mutates every loss, one place at a time, and runs its tests.

    python tests/mutation/flip_signs.py             every module below
    python tests/mutation/flip_signs.py pairwise    those whose name contains it

A mutant changes one node of one function: ``+`` and ``-`` are swapped, ``*`` and ``/``, a minus is dropped, a
comparison turned round or made (non-)strict, ``and`` and ``or`` swapped, a number raised by 1. Its code takes the place
of the function's in this process, so nothing is written and a mutant costs one short test run, stopped at the first
failure. A mutant that no test notices is a survivor; the exit status is 1 if there is one that is not listed as
equivalent.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

TESTS = Path(__file__).resolve().parents[1]

OF_LOSSES = ["losses/test_loss_values.py", "losses/test_loss_properties.py", "losses/test_loss_equations.py"]
TARGETS = {
    "prefopt.losses.logistic": OF_LOSSES,
    "prefopt.losses.pairwise": OF_LOSSES,
    "prefopt.losses.pointwise": OF_LOSSES,
    "prefopt.losses.transport": OF_LOSSES,
    "prefopt.losses.reference_free": OF_LOSSES,
    "prefopt.losses.rankings": ["test_objective.py"],
    "prefopt.losses.nll": OF_LOSSES,
    "prefopt.losses.divergences": OF_LOSSES,
    "prefopt.losses.transforms": OF_LOSSES,
    "prefopt.losses.running": ["losses/test_reward_shift.py"],
    "prefopt.scoring.sequences": ["test_sequences.py"],
    "prefopt.normalise": ["test_normalise.py"],
    "prefopt.objective.inputs": ["test_objective.py"],
    "prefopt.objective.tables": ["test_objective.py"],
    "prefopt.objective.core": ["test_objective.py", "test_objective_rules.py"],
    "prefopt.objective.rules": ["test_objective_rules.py"],
    "prefopt.objective.terms": ["test_objective.py"],
    "prefopt.objective.rankings": ["test_objective.py"],
    "prefopt.objective.columns": ["test_objective.py"],
}
"""Module -> the tests that must notice a change in it."""

EQUIVALENT = {
    (
        "alpha_shape",
        "abs(alpha) < SMALL_ALPHA",
        "abs(alpha) <= SMALL_ALPHA",
    ): "the formula and the identity agree to rounding at alpha = 1e-12, where alone they would differ",
    ("share", "1.0", "2.0"): "what is divided by it is 0, as it stands in for a count of 0",
}
"""(function, before, after) -> why no test can tell the mutant from the original."""

SWAPS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}


def mutants_of(node: ast.AST) -> Iterator[ast.AST]:
    """Every one-place change of this node itself."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        for other in SWAPS.get(type(node.op), ()):
            changed = copy.deepcopy(node)
            changed.op = other()
            yield changed
    elif isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            for other in SWAPS.get(type(op), ()):
                changed = copy.deepcopy(node)
                changed.ops[place] = other()
                yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.copy_location(ast.Constant(node.value + 1), node)


class Replace(ast.NodeTransformer):
    """Puts ``new`` in the place of the node ``old``."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def functions_in(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, definition) of every function and method."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield f"{node.name}.{method.name}", method


def function_object(namespace: dict, qualified_name: str) -> FunctionType:
    """The function of that name, out of a property where it is one."""
    owner, _, name = qualified_name.rpartition(".")
    found = vars(namespace[owner])[name] if owner else namespace[name]
    return found.fget if isinstance(found, property) else found


def mutants(module: ModuleType) -> Iterator[tuple[str, str, str, FunctionType]]:
    """(function, before, after, mutated function) for every place in the module."""
    assert module.__file__
    tree = ast.parse(Path(module.__file__).read_text())
    for name, definition in functions_in(tree):
        for old in [node for part in (definition.args, *definition.body) for node in ast.walk(part)]:
            for new in mutants_of(old):
                changed = Replace(old, new).visit(copy_but(tree, old))
                yield name, ast.unparse(old), ast.unparse(new), function_object(run(changed, module), name)


def run(tree: ast.Module, module: ModuleType) -> dict:
    """The names that ``tree`` defines in the place of ``module``."""
    namespace = {"__name__": module.__name__, "__file__": module.__file__}
    exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), namespace)
    return namespace


def copy_but(tree: ast.Module, kept: ast.AST) -> ast.Module:
    """A copy of the tree that still holds the node ``kept`` itself."""
    return copy.deepcopy(tree, {id(kept): kept})


def tests_pass(paths: list[str]) -> bool:
    """Whether the tests pass as the code stands."""
    arguments = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", *(str(TESTS / path) for path in paths)]
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        status = pytest.main(arguments)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests did not run (status {status}):\n{output.getvalue()}")
    return status == pytest.ExitCode.OK


@contextlib.contextmanager
def in_place(original: FunctionType, mutated: FunctionType) -> Iterator[None]:
    """``original`` runs as ``mutated``, wherever it was imported to."""
    parts = ("__code__", "__defaults__", "__kwdefaults__")
    saved = [getattr(original, part) for part in parts]
    try:
        for part in parts:
            setattr(original, part, getattr(mutated, part))
        yield
    finally:
        for part, value in zip(parts, saved, strict=True):
            setattr(original, part, value)


def check(module_name: str, paths: list[str]) -> tuple[int, int, list[str]]:
    """(mutants, those known to be equivalent, survivors) of a module."""
    module = importlib.import_module(module_name)
    assert_unchanged_code_passes(module, paths)
    total, equivalent, survivors = 0, 0, []
    for name, before, after, mutated in mutants(module):
        total += 1
        if (name, before, after) in EQUIVALENT:
            equivalent += 1
            continue
        with in_place(function_object(vars(module), name), mutated):
            if tests_pass(paths):
                survivors.append(f"{module_name}.{name}: {before}  ->  {after}")
    return total, equivalent, survivors


def assert_unchanged_code_passes(module: ModuleType, paths: list[str]) -> None:
    """Functions replaced by themselves must pass, or every mutant would seem to be noticed."""
    assert module.__file__
    tree = ast.parse(Path(module.__file__).read_text())
    namespace = run(tree, module)
    with contextlib.ExitStack() as stack:
        for name, _ in functions_in(tree):
            stack.enter_context(in_place(function_object(vars(module), name), function_object(namespace, name)))
        if not tests_pass(paths):
            raise RuntimeError(f"the tests of {module.__name__} fail without any mutation: {paths}")


def main(wanted: list[str]) -> int:
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(TESTS))
    start, totals, survivors = time.monotonic(), [0, 0], []
    for module_name, paths in TARGETS.items():
        if wanted and not any(part in module_name for part in wanted):
            continue
        total, equivalent, alive = check(module_name, paths)
        totals[0] += total
        totals[1] += equivalent
        survivors += alive
        print(f"{module_name}: {total} mutants, {len(alive)} survive", flush=True)
    for survivor in survivors:
        print(f"SURVIVES {survivor}")
    for (name, before, after), reason in EQUIVALENT.items():
        print(f"equivalent {name}: {before}  ->  {after} ({reason})")
    seconds = time.monotonic() - start
    print(f"{totals[0]} mutants, {totals[1]} equivalent, {len(survivors)} survivors, {seconds:.0f} s")
    return 1 if survivors or not totals[0] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
