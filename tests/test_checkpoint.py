import contextlib
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

from experiments import checkpoint
from experiments.checkpoint import CheckpointError, found, load, save
from experiments.pretrain import main
from experiments.run_dir import find_start
from tests import tiny_run


def state(step: int) -> dict[str, object]:
    weights = {"w": torch.full((64, 64), float(step)), "best": math.inf}
    return {**dict.fromkeys(checkpoint.KEYS), "step": step, "position": 0, **weights}


def on_a_full_disk(size: int, code: str, argv: list[str]) -> tuple[int, str, str]:
    """Run `code` where the system lets no file grow beyond `size`; a process of its own, as pytest writes files too."""
    pytest.importorskip("resource", reason="limits of a process are a matter of POSIX")
    limit = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""
    process = tiny_run.spawn(argv, module=("-c", limit + code))
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def truncate(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def test_the_last_k_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, state(step), keep=2)
    assert [p.name for p in found(tmp_path)] == ["step-00000100.pt", "step-00000015.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015.pt", "step-00000100.pt"]
    assert load(found(tmp_path)[0])["w"][0, 0] == 100


def test_a_write_that_breaks_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    checkpoint.write_text(path, "old")

    def half(file) -> None:
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomic(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, state(5), keep=2)
    code = """
from pathlib import Path
from experiments.checkpoint import CheckpointError, save
from tests.test_checkpoint import state
try:
    save(Path(sys.argv[1]), state(10), keep=2)
except CheckpointError as error:
    print(error)
"""
    _, out, err = on_a_full_disk(10_000, code, [str(tmp_path)])
    assert re.fullmatch(r"checkpoint \S+step-00000010\.pt cannot be written \(.+\)\n", out), err
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005.pt"]


def test_a_failed_last_save_loses_neither_summary_nor_table(tmp_path: Path) -> None:
    text = tiny_run.write_text(tmp_path / "a.txt")
    code = "from experiments.pretrain import main\nsys.exit(main(sys.argv[1:]))"
    # plots and metrics fit, a checkpoint does not
    argv = tiny_run.arguments(text, tmp_path / "r", "--train.save_every=0")
    status, out, err = on_a_full_disk(200_000, code, argv)
    assert status == 2, err
    assert "validation loss, nats/token" in out
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["steps"] == 20
    assert re.fullmatch(r"error: checkpoint \S+step-00000020\.pt cannot be written \(.+\)", err.splitlines()[-1])
    assert not list((tmp_path / "r" / "checkpoints").iterdir())
    status, _, err = on_a_full_disk(200_000, code, tiny_run.arguments(text, tmp_path / "r2"))
    assert status == 2
    assert "step-00000005.pt cannot be written" in err


def test_a_half_written_file_is_swept_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.pt.tmp").write_bytes(b"PK")
    assert found(tmp_path) == []
    save(tmp_path, state(10), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010.pt"]


def test_nothing_but_plain_values_is_needed_to_read(tmp_path: Path) -> None:
    full = {**state(3), "rng": checkpoint.rng_state(), "config": {"betas": [0.9, 0.95], "name": None}}
    loaded = torch.load(save(tmp_path, full, keep=1), weights_only=True)
    assert loaded["config"] == full["config"]
    assert loaded["best"] == math.inf


def test_random_states_come_back() -> None:
    model, kept = torch.nn.Linear(2, 2), checkpoint.rng_state()
    expected = (torch.rand(3), random.random())
    optimizer = torch.optim.SGD(model.parameters())
    checkpoint.restore(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": kept}, model, optimizer
    )
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_a_checkpoint_of_another_model_is_one_line() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters())
    saved = {"model": other.state_dict(), "optimizer": optimizer.state_dict(), "rng": checkpoint.rng_state()}
    with pytest.raises(CheckpointError, match="does not fit") as error:
        checkpoint.restore(saved, model, optimizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    path = truncate(save(tmp_path, state(5), keep=2), share)
    with pytest.raises(CheckpointError, match=r"step-00000005\.pt") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, state(5), keep=2)
    content = bytearray(path.read_bytes())
    # inside the weights, where torch.load looks at nothing
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["step"] == 5
    with pytest.raises(CheckpointError, match="checksum"):
        load(path)


def test_another_program_s_file_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "step-00000001.pt")
    with pytest.raises(CheckpointError, match="not written by this program"):
        load(tmp_path / "step-00000001.pt")


def test_a_checkpoint_without_a_part_is_refused(tmp_path: Path) -> None:
    part = state(1)
    del part["optimizer"], part["rng"]
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt lacks optimizer, rng"):
        load(save(tmp_path, part, keep=1))


class _Foreign:
    """What `weights_only` refuses to make."""


def test_an_object_in_a_file_is_refused_in_a_few_words(tmp_path: Path) -> None:
    torch.save({"model": _Foreign()}, tmp_path / "step-00000001.pt")
    with pytest.raises(CheckpointError, match=r"damaged \(Weights only load failed\)"):
        load(tmp_path / "step-00000001.pt")


@pytest.mark.parametrize("seed", range(4))
def test_noise_anywhere_in_a_file_is_an_error_of_ours(tmp_path: Path, seed: int) -> None:
    source, whole = random.Random(seed), save(tmp_path, state(5), keep=2).read_bytes()
    for _ in range(100):
        content = bytearray(whole)
        # names, sizes and methods of the archive's members are at its ends
        at = source.choice([source.randrange(200), -1 - source.randrange(900)])
        content[at] ^= 1 << source.randrange(8)
        found(tmp_path)[0].write_bytes(content)
        # a bit that carries nothing may flip unseen
        with contextlib.suppress(CheckpointError):
            assert load(found(tmp_path)[0])["step"] == 5


def test_auto_falls_back_and_says_so(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path / "checkpoints", state(step), keep=3)
    truncate(tmp_path / "checkpoints" / "step-00000010.pt")
    start, kept = find_start(str(tmp_path), "auto")
    assert kept is not None
    assert kept["step"] == start.step == 5
    assert len(start.notes) == 1
    assert "step-00000010.pt" in start.notes[0]
    assert "step-00000005.pt" in start.notes[0]


def test_an_explicit_damaged_file_is_an_error_that_offers_the_older_one(tmp_path: Path) -> None:
    for step in (3, 5, 10):
        save(tmp_path / "checkpoints", state(step), keep=3)
    named = truncate(tmp_path / "checkpoints" / "step-00000010.pt")
    truncate(tmp_path / "checkpoints" / "step-00000005.pt")
    with pytest.raises(CheckpointError, match=r"step-00000010\.pt.*--resume .*step-00000003\.pt"):
        find_start(None, str(named))


def test_when_none_can_be_read_nothing_starts_over(tmp_path: Path) -> None:
    truncate(save(tmp_path / "checkpoints", state(5), keep=3))
    with pytest.raises(CheckpointError, match="no older checkpoint"):
        find_start(str(tmp_path), "auto")


def test_where_a_run_begins(tmp_path: Path) -> None:
    used, fresh = tmp_path / "used", tmp_path / "fresh"
    save(used / "checkpoints", state(5), keep=3)
    file = used / "checkpoints" / "step-00000005.pt"
    assert find_start(None, "auto")[0].directory is None
    assert find_start(str(fresh), "auto")[1] is None
    assert find_start(str(fresh), "never")[1] is None
    for named in (str(file), str(used)):
        assert find_start(None, named)[0].directory == used.resolve()
        assert find_start(str(fresh), named)[0].directory == fresh
    with pytest.raises(CheckpointError, match="holds a run"):
        find_start(str(used), "never")
    with pytest.raises(CheckpointError, match="does not exist"):
        find_start(None, str(used / "checkpoints" / "step-00000006.pt"))
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_start(None, str(tmp_path))
    loose = tmp_path / "copied.pt"
    loose.write_bytes(file.read_bytes())
    assert find_start(str(fresh), str(loose))[0].directory == fresh
    with pytest.raises(CheckpointError, match="--run_dir"):
        find_start(None, str(loose))
    save(fresh / "checkpoints", state(1), keep=3)
    with pytest.raises(CheckpointError, match="holds another run"):
        find_start(str(fresh), str(file))


def test_a_run_with_a_truncated_checkpoint_ends_as_if_nothing_had_happened(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, whole, hurt = tiny_run.write_text(tmp_path / "a.txt"), tmp_path / "whole", tmp_path / "hurt"
    assert main(tiny_run.arguments(text, whole)) == 0
    assert main(tiny_run.arguments(text, hurt)) == 0
    truncate(hurt / "checkpoints" / "step-00000020.pt")
    capfd.readouterr()
    assert main(tiny_run.arguments(text, hurt)) == 0
    said = capfd.readouterr().err
    assert "step-00000020.pt is truncated or damaged" in said
    assert "resuming from the older" in said
    assert tiny_run.rows(hurt) == tiny_run.rows(whole)
    # the damaged file is kept, out of the way
    assert (hurt / "checkpoints" / "step-00000020.pt.aside").exists()


def test_going_back_keeps_what_came_later_and_a_copy_goes_on_elsewhere(tmp_path: Path) -> None:
    text, first, copy = tiny_run.write_text(tmp_path / "a.txt"), tmp_path / "first", tmp_path / "copy"
    assert main(tiny_run.arguments(text, first)) == 0
    before, middle = tiny_run.files(first), first / "checkpoints" / "step-00000015.pt"
    assert main(tiny_run.arguments(text, copy, f"--resume={middle}")) == 0
    assert tiny_run.rows(copy) == tiny_run.rows(first)
    assert tiny_run.files(first) == before
    assert main(tiny_run.arguments(text, first, f"--resume={middle}")) == 0
    assert tiny_run.rows(first) == tiny_run.rows(copy)
    assert (first / "checkpoints" / "step-00000020.pt.aside").exists()
