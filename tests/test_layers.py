"""Who may import whom, how long a file may be, and what an import of the package costs."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

NOUNS = {"_types", "_warn", "_half"}
PARTS = NOUNS | {"ops", "passes"}
BASES = {"cosine", "columns", "orthonormal", "random_bases", "bases"}
MATHS = BASES | {"reference", "coefficients", "orthogonal", "steering"}
PLANS = {"schedule", "residuals", "adam", "rules", "pieces", "momentum"}
CORE = PARTS | MATHS | PLANS | {"_checks", "storage", "distributed", "optimizer"}
# what the public optimizers of coordinates share
PROJECTED = CORE | {"projected"}
# what the public optimizers of matrices share
MATRICES = CORE | {"matrices"}

# a room and the rooms it may import; a new file is entered here, after everything that it uses
MAY_IMPORT: dict[str, set[str]] = {
    "_types": set(),
    "_warn": set(),
    "_half": set(),
    "_backend": {"_half", "_warn"},
    "_checks": set(),
    "reference": set(),
    "reference_matrix": set(),
    "reference_apply": {"reference"},
    "reference_moments": {"reference", "reference_matrix"},
    "reference_recursion": set(),
    "reference_columns": {"reference"},
    "ops": {"_types", "_half", "_backend", "reference", "reference_apply", "reference_matrix"},
    "passes": {"_types", "_half", "_backend"},
    # parts use none of each other: they meet in the public files
    "storage": PARTS,
    "cosine": {"ops"},
    "columns": PARTS | {"cosine"},
    "orthonormal": PARTS,
    "random_bases": PARTS | {"orthonormal"},
    "bases": PARTS | {"columns", "orthonormal", "random_bases"},
    "probes": {"_types"},
    "schedule": {"_types"},
    "residuals": PARTS,
    "adam": PARTS,
    "rules": PARTS | {"schedule", "probes"},
    "steering": PARTS,
    "pieces": PARTS | {"steering", "probes"},
    "momentum": PARTS | {"steering"},
    "room": set(),
    "windows": {"ops"},
    "gram": set(),
    "views": NOUNS,
    "preconditioned": NOUNS | {"windows", "gram", "views"},
    "fisher_static": NOUNS | {"windows"},
    "fisher": NOUNS | {"windows", "gram", "room", "fisher_static"},
    "masks": NOUNS | {"_checks"},
    "pruning": NOUNS | {"fisher", "masks"},
    "coefficients": {"_types"},
    "orthogonal": PARTS | {"coefficients"},
    "distributed": {"_types"},
    "_state": {"_types", "_half"},
    "optimizer": {"_types", "_half", "_state", "_checks", "ops", "storage", "distributed", "probes"},
    "projected": CORE,
    "galore": PROJECTED,
    "dct": PROJECTED,
    "apollo": PROJECTED,
    "fira": PROJECTED,
    "ldadam": PROJECTED,
    "mfac": CORE | {"preconditioned", "views", "gram", "room", "_state"},
    "matrices": CORE,
    "muon": MATRICES,
    "lowrank_muon": MATRICES,
    "trion": MATRICES,
    "auon": MATRICES,
    "steepest": MATRICES,
    "roles": CORE,
    "params": CORE | {"roles"},
    "allocation": CORE | {"roles"},
    "memory": CORE,
    "diagnostics": {"probes"},
    "__init__": {
        *("galore", "dct", "apollo", "fira", "ldadam", "muon", "lowrank_muon", "trion", "auon", "steepest"),
        *(
            "mfac",
            "fisher",
            "fisher_static",
            "masks",
            "pruning",
            "orthogonal",
            "coefficients",
            "memory",
            "_backend",
            "params",
            "allocation",
            "diagnostics",
        ),
    },
}

# what may import kernels, inside functions: they choose between these and plain torch
CHOOSING = ("ops", "passes")
PACKAGE = sorted((ROOT / "lowrank_optim").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
# a benchmark of the kernels imports them, because they are what is measured, and the twins that they are held to
MEASURED = {
    "experiments/bench_kernels.py": {
        *("reference", "reference_apply", "reference_matrix", "reference_moments", "reference_recursion"),
    },
}
USERS = sorted([*(ROOT / "experiments").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])


def imports(path: Path) -> Iterator[tuple[str, list[str], bool]]:
    """Yield each import as (module, names, whether it is inside a function); a relative one keeps its dots."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, list[str], bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, [], lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield "." * child.level + (child.module or ""), [alias.name for alias in child.names], lazy
            yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(ast.parse(path.read_text()), lazy=False)


def rooms(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the rooms of the package that a file imports, with whether it does so inside a function."""
    for module, names, lazy in imports(path):
        if module.startswith(".") or module.split(".")[0] == "kernels":
            # package files name their neighbours in full, so that this test and a reader see them
            yield f"not absolute: {module}", lazy
        elif module == "lowrank_optim":
            yield from ((name, lazy) for name in names)
        elif module.startswith("lowrank_optim."):
            yield module.split(".")[1], lazy


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_the_import_rule(path: Path) -> None:
    assert path.stem in MAY_IMPORT, "a new room: say in MAY_IMPORT what it may use"
    for room, lazy in rooms(path):
        assert room in MAY_IMPORT[path.stem] or (path.stem in CHOOSING and room == "kernels" and lazy), room


def test_the_rule_itself_has_no_cycle() -> None:
    known = list(MAY_IMPORT)
    for i, (room, others) in enumerate(MAY_IMPORT.items()):
        assert others <= set(known[:i]), room
    assert {path.stem for path in PACKAGE} == set(known)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_torch_triton_and_each_other(path: Path) -> None:
    beside = {other.stem for other in KERNELS}
    for module, names, _ in imports(path):
        if module.startswith("."):
            assert module.count(".") == 1
            assert module[1:] in beside or set(names) <= beside
        else:
            assert module.split(".")[0] in {"torch", "triton"} | sys.stdlib_module_names, module


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiments_and_examples_use_public_names_only(path: Path) -> None:
    public = public_names()
    measured = MEASURED.get(str(path.relative_to(ROOT)), set())
    for module, names, _ in imports(path):
        top = module.split(".")[0]
        assert top not in ("kernels", "tests"), module
        if measured and module == "lowrank_optim.kernels":
            continue
        if top == "lowrank_optim":
            assert module == "lowrank_optim", f"{module}: only what lowrank_optim itself names is public"
            assert set(names) <= public | {"__version__"} | measured, names


def public_names() -> set[str]:
    """Read them from `__init__`, which re-exports each under its own name and does nothing else."""
    names: set[str] = set()
    for node in ast.parse((ROOT / "lowrank_optim" / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names)
            names |= {alias.name for alias in node.names}
        else:
            assert isinstance(node, ast.Expr | ast.Assign), ast.unparse(node)
    return names


def test_public_names_have_docstrings() -> None:
    import lowrank_optim

    assert public_names() >= {"GaLoreAdamW", "param_groups", "state_bytes", "adamw_state_bytes", "MemoryMeter"}
    assert public_names() >= {"Muon", "LowRankMuon", "Trion", "AuON", "SteepestDescent"}
    assert public_names() >= {"orthogonalize", "polar_express_coefficients"}
    for name in public_names():
        assert getattr(lowrank_optim, name).__doc__, name


@pytest.mark.parametrize("path", [*PACKAGE, *KERNELS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


COST = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import lowrank_optim
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before}), sorted(sys.modules)]))
"""


def test_an_import_is_cheap_and_brings_nothing() -> None:
    fastest = float("inf")
    # of its own time, as a machine may be busy; which makes that longer too, but not each time
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", COST], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, new, everything = json.loads(done.stdout)
        assert set(new) <= {"lowrank_optim", "torch"} | sys.stdlib_module_names
        assert not {"triton", "wandb", "transformers", "scipy", "matplotlib", "jsonargparse"} & set(everything)
        fastest = min(fastest, seconds)
        if fastest < 0.1:
            break
    assert fastest < 0.3
