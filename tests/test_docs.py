"""What the documentation shows runs as it is written."""

import doctest
import importlib
import runpy
from pathlib import Path

import pytest

import lowrank_optim

ROOT = Path(__file__).parent.parent
PUBLIC = [name for name in vars(lowrank_optim) if not name.startswith("_")]


CLASSES = ["galore", "dct", "apollo", "fira", "ldadam", "muon", "lowrank_muon", "trion", "auon", "steepest", "mfac"]
MODULES = [
    *CLASSES,
    "orthogonal",
    "coefficients",
    "memory",
    "params",
    "allocation",
    "diagnostics",
    "fisher",
    "masks",
    "pruning",
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(f"lowrank_optim.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/muon.md",
        "docs/projected.md",
        "docs/ranks.md",
        "docs/mfac.md",
        "docs/pruning.md",
        "docs/kernels.md",
    ],
)
def test_the_code_of_the_documents_runs(document, capsys):
    names: dict[str, object] = {}
    blocks = (ROOT / document).read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        exec(block.split("```")[0], names)


def test_the_plain_example_learns(capsys):
    runpy.run_path(str(ROOT / "examples" / "plain_loop.py"))
    said = capsys.readouterr().out
    assert "matrices: 2 parameters" in said
    assert float(said.split("step 199  loss ")[1].split()[0]) < 0.1


def test_the_links_of_the_documents_lead_somewhere():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    missing = []
    for document in documents:
        for part in document.read_text().split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            if target and "://" not in target and not (document.parent / target).exists():
                missing.append((document.name, target))
    assert not missing
