"""Resume is bit-exact at every step, through files that a process without this package can read."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, param_groups
from tests.small_model import ALL, CLASSES, WAYS

# one way is AdamW alone, which the optimizer remarks on
pytestmark = pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")

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


def of(way, net, **options):
    """The groups of a whole model: matrices, an embedding, a head by its name, vectors."""
    return way(param_groups(net), **options)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [*((way, torch.bfloat16) for way in ALL), *((way.values[0], torch.float32) for way in CLASSES)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_every_way_resumes_bit_exactly_wherever_it_is_cut(way, dtype):
    """Before the first step and after each until refreshes have come round twice; low precision rounded by chance."""
    options = {"lr": 0.02, "weight_decay": 0.1}
    if dtype == torch.bfloat16 and "stochastic_rounding" in inspect.signature(way.kind).parameters:
        options["stochastic_rounding"] = True
    end = 2 * way.options.get("update_proj_gap", 1) + 3
    straight = model(dtype)
    straight_opt = of(way, straight, **options)
    files = []
    for cut in range(end):
        files.append(io.BytesIO())
        torch.save({"model": straight.state_dict(), "opt": straight_opt.state_dict()}, files[-1])
        train(straight, straight_opt, cut, cut + 1)
    for cut, file in enumerate(files):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = model(dtype)
        other_opt = of(way, other, **options)
        other.load_state_dict(saved["model"])
        other_opt.load_state_dict(saved["opt"])
        train(other, other_opt, cut, end)
        assert same_run((straight, straight_opt), (other, other_opt)), cut


def same_run(one, two):
    weights = zip(one[0].parameters(), two[0].parameters(), strict=True)
    kept = zip(states(one[1]), states(two[1]), strict=True)
    return all(torch.equal(a, b) for a, b in weights) and all(
        a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a) for a, b in kept
    )


def test_a_process_without_this_package_reads_the_state(tmp_path):
    nets = {way.name: model(torch.bfloat16) for way in ALL}
    opts = {way.name: of(way, nets[way.name]) for way in ALL}
    for name, net in nets.items():
        train(net, opts[name], 0, 3)
        torch.save(opts[name].state_dict(), tmp_path / f"{name}.pt")
    script = """
import sys, pathlib, torch
for file in sorted(pathlib.Path().glob("*.pt")):
    state = torch.load(file, weights_only=True)
    kinds = sorted({(k, str(v.dtype)) for s in state["state"].values() for k, v in s.items()})
    torch.save(state, file.with_suffix(".again"))
    print(file.stem, kinds)
assert not any(name.startswith("lowrank_optim") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    kinds = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert kinds["svd"] == str([(name, "torch.float32") for name in ("basis", "exp_avg", "exp_avg_sq", "step")])
    for way in ALL:
        # and what it wrote resumes here, bit for bit
        net, opt = nets[way.name], opts[way.name]
        other = copy.deepcopy(net)
        other_opt = of(way, other)
        other_opt.load_state_dict(torch.load(tmp_path / f"{way.name}.again", weights_only=True))
        train(net, opt, 3, 7)
        train(other, other_opt, 3, 7)
        assert same_run((net, opt), (other, other_opt)), way.name


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


@pytest.mark.parametrize("way", WAYS)
def test_copies_go_on_independently_and_alike(way):
    net = model()
    opt = of(way, net)
    train(net, opt, 0, 2)
    twins = [copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))]
    train(net, opt, 2, 6)
    for twin, twin_opt in twins:
        train(twin, twin_opt, 2, 6)
        assert same_run((net, opt), (twin, twin_opt))


@pytest.mark.parametrize("way", WAYS)
def test_the_loaded_hyperparameters_win_as_in_torch(way):
    """Also over those that decide which tensors there are: what loads was made with none of the options."""
    net = model()
    opt = of(way, net, lr=0.02, weight_decay=0.2)
    train(net, opt, 0, 2)
    other = copy.deepcopy(net)
    other_opt = way.kind(param_groups(other), lr=0.5)
    other_opt.load_state_dict(opt.state_dict())
    for group, loaded in zip(opt.param_groups, other_opt.param_groups, strict=True):
        assert {key: loaded[key] for key in group if key != "params"} == {
            k: v for k, v in group.items() if k != "params"
        }
    train(net, opt, 2, 6)
    train(other, other_opt, 2, 6)
    assert same_run((net, opt), (other, other_opt))


@pytest.mark.parametrize("way", CLASSES)
def test_an_older_state_lacks_keys_and_loads(way):
    net = model()
    opt = of(way, net)
    train(net, opt, 0, 2)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        for key in ("stagger", "method", "format_version", "maximize", "state_dtype"):
            group.pop(key, None)
    other = of(way, net)
    other.load_state_dict(saved)
    for group in other.param_groups:
        assert group["format_version"] == 1
        assert group["maximize"] is False
        assert group["state_dtype"] == "float32"
    assert all(torch.equal(a[k], b[k]) for a, b in zip(states(opt), states(other), strict=True) for k in a)


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
