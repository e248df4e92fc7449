"""Resume is bit-exact at every step, through files that a process without this package can read."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW

GAP = 6


def model(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 24), nn.Linear(24, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 16))
    return net.to(dtype)


def optimizer(net, **options):
    matrices = [p for n, p in net.named_parameters() if p.dim() == 2 and not n.startswith("0.")]
    rest = [p for n, p in net.named_parameters() if p.dim() != 2 or n.startswith("0.")]
    projected = {"params": matrices, "rank": 4, "update_proj_gap": GAP, "scale": 1.0, **options}
    return GaLoreAdamW([{"params": rest}, projected], lr=1e-2, weight_decay=0.1)


def train(net, opt, first, last):
    for step in range(first, last):
        data = torch.Generator().manual_seed(step)
        x = torch.randint(0, 11, (32,), generator=data)
        opt.zero_grad()
        (net(x).float() - 1).square().mean().backward()
        opt.step()


def states(opt):
    return [{k: v.clone() for k, v in opt.state[p].items()} for g in opt.param_groups for p in g["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{"basis": b, "stagger": s} for b in ("svd", "subspace") for s in (True, False)])
@pytest.mark.parametrize("cut", [0, 1, GAP - 1, GAP, GAP + 1, 2 * GAP - 1, 2 * GAP, 2 * GAP + 1])
def test_resume_is_bit_exact(tmp_path, cut, options, dtype):
    end = 2 * GAP + 4
    straight = model(dtype)
    straight_opt = optimizer(straight, **options)
    train(straight, straight_opt, 0, end)

    first = model(dtype)
    first_opt = optimizer(first, **options)
    train(first, first_opt, 0, cut)
    torch.save({"model": first.state_dict(), "opt": first_opt.state_dict()}, tmp_path / "ck.pt")
    saved = torch.load(tmp_path / "ck.pt", weights_only=True)
    second = model(dtype)
    second_opt = optimizer(second, **options)
    second.load_state_dict(saved["model"])
    second_opt.load_state_dict(saved["opt"])
    train(second, second_opt, cut, end)

    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(states(straight_opt), states(second_opt), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name])


def test_a_process_without_this_package_reads_the_state(tmp_path):
    net = model(torch.bfloat16)
    opt = optimizer(net)
    train(net, opt, 0, 3)
    torch.save(opt.state_dict(), tmp_path / "ck.pt")
    script = f"""
import sys, torch
state = torch.load({str(tmp_path / "ck.pt")!r}, weights_only=True)
assert not any(name.startswith("lowrank_optim") for name in sys.modules)
kinds = sorted({{(k, str(v.dtype)) for s in state["state"].values() for k, v in s.items()}})
torch.save(state, {str(tmp_path / "again.pt")!r})
print(kinds)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    names = [("basis", "exp_avg", "exp_avg_sq", "step")[i] for i in range(4)]
    assert done.stdout.strip() == str([(name, "torch.float32") for name in names])
    # and what it wrote resumes here, bit for bit
    other = copy.deepcopy(net)
    other_opt = optimizer(other)
    other_opt.load_state_dict(torch.load(tmp_path / "again.pt", weights_only=True))
    train(net, opt, 3, 9)
    train(other, other_opt, 3, 9)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_loading_copies_and_leaves_the_dict_alone():
    net = model()
    opt = optimizer(net)
    train(net, opt, 0, 2)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other = copy.deepcopy(net)
    other_opt = optimizer(other)
    other_opt.load_state_dict(saved)
    train(other, other_opt, 2, 5)
    for pid, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(saved["state"][pid][name], value)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_independently_and_alike(copier):
    net = model()
    opt = optimizer(net)
    train(net, opt, 0, GAP - 1)
    twin, twin_opt = copier((net, opt))
    train(net, opt, GAP - 1, GAP + 3)
    train(twin, twin_opt, GAP - 1, GAP + 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_the_loaded_hyperparameters_win_as_in_torch():
    net = model()
    opt = optimizer(net, rank=3)
    train(net, opt, 0, 2)
    other = copy.deepcopy(net)
    other_opt = optimizer(other, rank=5)
    other_opt.load_state_dict(opt.state_dict())
    assert other_opt.param_groups[1]["rank"] == 3
    train(net, opt, 2, 4)
    train(other, other_opt, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_an_older_state_lacks_keys_and_loads():
    net = model()
    opt = optimizer(net)
    train(net, opt, 0, 2)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        for key in ("stagger", "format_version", "maximize"):
            del group[key]
    optimizer(net).load_state_dict(saved)
    other = optimizer(net)
    other.load_state_dict(saved)
    assert other.param_groups[0]["stagger"] is True
    assert other.param_groups[0]["format_version"] == 1


def test_a_checkpoint_of_torch_adamw_goes_on():
    net = model()
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, adamw, 0, 3)
    other = copy.deepcopy(net)
    ours = GaLoreAdamW([{"params": list(other.parameters())}], lr=1e-2)
    ours.load_state_dict(adamw.state_dict())
    train(net, adamw, 3, 6)
    train(other, ours, 3, 6)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_a_state_of_another_layout_or_dtype_becomes_ours(layout, dtype):
    """torch's AdamW keeps moments as the weight is laid out and typed; the values go on in our own tensors."""
    make = {
        "contiguous": lambda: torch.randn(8, 5),
        "channels_last": lambda: torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(5, 8).T,
    }[layout]
    theirs = nn.Parameter(make().to(dtype))
    adamw = torch.optim.AdamW([theirs], lr=1e-2)
    for _ in range(4):
        theirs.grad = torch.randn_like(theirs)
        adamw.step()
    ours = nn.Parameter(theirs.detach().clone())
    opt = GaLoreAdamW([{"params": [ours]}])
    opt.load_state_dict(adamw.state_dict())
    state = opt.state[ours]
    assert state["exp_avg"].is_contiguous()
    assert state["exp_avg"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for _ in range(4):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        opt.step()
        adamw.step()
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_what_a_state_lacks_is_created():
    net = model()
    opt = optimizer(net)
    train(net, opt, 0, 2)
    saved = opt.state_dict()
    pid = saved["param_groups"][1]["params"][0]
    del saved["state"][pid]
    opt.load_state_dict(saved)
    state = opt.state[opt.param_groups[1]["params"][0]]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "basis"}
    assert state["step"] == 0
    train(net, opt, 2, 4)
    saved["state"][pid + 1] = {k: v for k, v in saved["state"][pid + 1].items() if k != "step"}
    with pytest.raises(ValueError, match="has no step"):
        opt.load_state_dict(saved)


def test_names_in_another_order_are_refused():
    a, b = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    opt = GaLoreAdamW([("a", a), ("b", b)], rank=1)
    with pytest.raises(ValueError, match="in another order"):
        GaLoreAdamW([("b", b), ("a", a)], rank=1).load_state_dict(opt.state_dict())


def test_states_that_do_not_fit_are_refused_and_nothing_changes():
    net = model()
    opt = optimizer(net)
    train(net, opt, 0, 2)
    before = states(opt)
    wrong = opt.state_dict()
    pid = wrong["param_groups"][1]["params"][0]
    wrong["state"][pid] = {**wrong["state"][pid], "exp_avg": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"exp_avg of shape \(3, 3\).*needs \(40, 4\)"):
        opt.load_state_dict(wrong)
    newer = opt.state_dict()
    newer["param_groups"][0]["format_version"] = 99
    with pytest.raises(ValueError, match="format 99, by a newer lowrank_optim"):
        opt.load_state_dict(newer)
    for a, b in zip(before, states(opt), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_user_hooks_see_the_kept_dtypes():
    net = model(torch.bfloat16)
    opt = optimizer(net)
    saved = opt.state_dict()
    seen = []
    opt.register_load_state_dict_post_hook(lambda o: seen.extend(v.dtype for s in o.state.values() for v in s.values()))
    opt.register_load_state_dict_pre_hook(lambda o, sd: {**sd, "state": dict(sd["state"])})
    opt.load_state_dict(saved)
    assert set(seen) == {torch.float32}
