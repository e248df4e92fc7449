"""What is built holds the package and its kernels, whole, under one name, and nothing else."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LINK = ROOT / "lowrank_optim" / "kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path) -> str:
    """Run without a network, and return what was printed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names(wheel: Path) -> dict[str, int]:
    """Return each file of a wheel with its checksum."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, with everything that could slip into a wheel."""
    copy = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for name in ("lowrank_optim", "kernels", "tests", "experiments", "examples"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but the unpacked wheel."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _wheel(source: Path, out: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    run(*pip, "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_kernels_are_a_link_to_a_folder_that_is_no_package_of_its_own() -> None:
    # with an __init__.py the folder would shadow Hugging Face's `kernels` for whoever runs at the root
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert LINK.is_symlink()
    assert LINK.readlink() == Path("../kernels")
    assert (LINK / "adam.py").samefile(ROOT / "kernels" / "adam.py")


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")
def test_git_keeps_the_link_as_a_link() -> None:
    (entry,) = run("git", "ls-files", "--stage", "lowrank_optim/kernels", cwd=ROOT).splitlines()
    assert entry.split()[0] == "120000"


def test_the_wheel_holds_the_package_and_the_kernels_and_nothing_else(wheel: Path) -> None:
    files = {f"lowrank_optim/{path.name}" for path in (ROOT / "lowrank_optim").glob("*.py")}
    files |= {f"lowrank_optim/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    files |= {"lowrank_optim/py.typed"}
    metadata = f"lowrank_optim-{PROJECT['version']}.dist-info"
    found = set(names(wheel))
    assert {name for name in found if not name.startswith(metadata)} == files
    assert f"{metadata}/licenses/LICENSE" in found
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{metadata}/top_level.txt").decode().split() == ["lowrank_optim"]


def test_an_sdist_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    again = names(_wheel(sdist, tmp_path))
    # RECORD lists the checksums of the others
    assert again == names(wheel)


INSTALLED = """
import importlib.util, pathlib, sys
folder, root = map(pathlib.Path, sys.argv[1:])
sys.path.insert(0, str(folder))
import lowrank_optim
assert pathlib.Path(lowrank_optim.__file__).is_relative_to(folder), lowrank_optim.__file__
if importlib.util.find_spec("triton"):
    import lowrank_optim.kernels.adam
    assert pathlib.Path(lowrank_optim.kernels.adam.__file__).is_relative_to(folder)
import torch
p = torch.nn.Parameter(torch.ones(8, 6))
p.grad = torch.ones(8, 6)
lowrank_optim.GaLoreAdamW([p], rank=2).step()
assert not p.eq(1).any()
for name in ("kernels", "experiments", "tests", "examples"):
    spec = importlib.util.find_spec(name)
    places = [*(spec.submodule_search_locations or []), spec.origin or ""] if spec else []
    assert not any(pathlib.Path(p).resolve().is_relative_to(d) for p in places for d in (folder, root)), places
print(lowrank_optim.__version__)
"""


def test_the_unpacked_wheel_works_alone_and_leaks_no_name(installed: Path, tmp_path: Path) -> None:
    # isolated: neither this folder nor the environment adds to the path
    version = run(sys.executable, "-I", "-c", INSTALLED, installed, ROOT, cwd=tmp_path)
    assert version.strip() == PROJECT["version"]


def test_another_package_called_kernels_wins_even_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'")
    code = f"import sys; sys.path = ['', *sys.path, {str(tmp_path)!r}]; import kernels; print(kernels.whose)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "theirs"


def requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [r for texts in lists for r in map(Requirement, texts) if r.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_constraints_pin_every_direct_dependency_within_its_range(requirement: Requirement) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, lines)}
    assert canonicalize_name(requirement.name) in pins
    (pin,) = pins[canonicalize_name(requirement.name)]
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_metadata_stays_a_range_without_a_cap(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(path).decode()
    lines = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    (hard,) = [Requirement(line) for line in lines if "extra ==" not in line]
    assert hard.name == "torch"
    assert [spec.operator for spec in hard.specifier] == [">="]
    assert "Requires-Python: >=3.11" in metadata.splitlines()
    # what a package index shows
    assert (ROOT / "README.md").read_text().strip() in metadata
