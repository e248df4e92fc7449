"""How moments are kept and low-precision weights rounded: against NumPy, within bounds, and in training."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import GaLoreAdamW, Muon, ops, reference, state_bytes
from lowrank_optim._types import Tick
from lowrank_optim.storage import STATE_DTYPES, storage
from tests.reference import storage_numpy as oracle

# some optimizers here are AdamW alone, which GaLoreAdamW remarks on
pytestmark = pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")

CPU = torch.device("cpu")
CODED = {"int8": (8, 256), "int4": (4, 64)}
SIGNED = [pytest.param(True, id="first"), pytest.param(False, id="second")]


def new(shape, dtype=None):
    return torch.zeros(tuple(shape), dtype=dtype or torch.float32)


def keep(state_dtype, x, signed, seed=0):
    """Write `x` and return the state."""
    kept = storage(state_dtype)
    state = kept.init("x", x.shape, new, signed=signed)
    kept.write_([state], "x", [x.clone()], [seed])
    return state


def read(state_dtype, state, shape, dtype=torch.float32):
    return storage(state_dtype).read([state], "x", shape, dtype)[0]


def unpacked(state_dtype, state, numel):
    return (ops.unpack(state["x"], numel) if state_dtype == "int4" else state["x"].flatten()).numpy().astype(int)


# --- noise


@pytest.mark.parametrize("seed", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x2545F491 + 0xFFFFFFFF])
def test_noise_equals_its_formula_in_rows_and_parts(seed):
    before = torch.get_rng_state()
    ours = reference.noise(700, [seed, seed + 300], CPU).numpy().view(np.uint32)
    assert np.array_equal(ours[0], oracle.noise(700, seed))
    # a part of a tensor is rounded as in the whole
    assert np.array_equal(ours[0, 300:], ours[1, :400])
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_has_the_mean_spread_and_independence_of_random_numbers():
    seeds = [Tick(step, 0.25).seed for step in range(1, 2001)]
    for u in (ops.dither(1000, seeds, CPU), (reference.noise(1000, seeds, CPU) & 0xFFFF) / 65536):
        z = (u - 0.5).double() * math.sqrt(12)
        # 1000 means of 2000, 2000 means of 1000, and three means of two millions: a chance of 1e-4 or less each
        assert z.mean(0).abs().max() < 5.5 / math.sqrt(2000)
        assert z.mean(1).abs().max() < 5.5 / math.sqrt(1000)
        assert abs(z.square().mean() - 1) < 4 / math.sqrt(2e6)
        for one, two in ((z[:, 1:], z[:, :-1]), (z[1:], z[:-1]), (z[:, 256:], z[:, :-256])):
            assert abs((one * two).mean()) < 4 / math.sqrt(1.4e6)
        # no direction has more than its share
        assert torch.linalg.matrix_norm(z[:1000], 2) < 1.05 * (math.sqrt(1000) + math.sqrt(1000))


def test_dither_keeps_away_from_both_ends():
    u = ops.dither(1 << 18, [3], CPU)
    assert u.min() == 2**-13
    assert u.max() == 1 - 2**-13
    assert np.allclose(u[0, :500].numpy(), oracle.dither(500, 3), rtol=0, atol=0)


def test_seeds_differ_over_steps_and_matrices():
    turns = [(i + 0.5) / 300 for i in range(300)]
    seeds = {Tick(step, turn).seed for step in range(1, 301) for turn in turns}
    # of 90 000 numbers of 32 bits, chance would let one pair meet
    assert len(seeds) >= 90_000 - 6
    assert all(0 <= seed < 1 << 32 for seed in seeds)


# --- codes


SPREADS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "outliers": lambda rng, n: rng.standard_normal(n) * np.where(rng.random(n) < 0.02, 1e4, 1),
    "orders": lambda rng, n: rng.standard_normal(n) * 10 ** rng.uniform(-12, 0, n),
    "sparse": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.1),
    "zeros": lambda rng, n: np.zeros(n),
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "tiny": lambda rng, n: rng.standard_normal(n) * 1e-30,
    "denormal": lambda rng, n: rng.standard_normal(n) * 1e-40,
    "huge": lambda rng, n: rng.standard_normal(n).clip(-3, 3) * 1e38,
    "alone": lambda rng, n: np.eye(1, n, rng.integers(n))[0],
}


def blocks(size, count, signed):
    """Return `count` blocks of float32, of each spread in turn."""
    rng = np.random.default_rng(0)
    made = [list(SPREADS.values())[i % len(SPREADS)](rng, size) for i in range(count)]
    x = torch.from_numpy(np.stack(made)).float()
    return x if signed else x.abs()


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("state_dtype", CODED)
def test_codes_equal_the_oracle(state_dtype, signed):
    bits, size = CODED[state_dtype]
    x = blocks(size, 100, signed)
    state = keep(state_dtype, x, signed, seed=11)
    codes = unpacked(state_dtype, state, x.numel()).reshape(x.shape)
    up = oracle.dither(x.numel(), 11).reshape(x.shape)
    checked = 0
    for i, block in enumerate(x.double().numpy()):
        if 0 < np.abs(block).max() < 1e-37:
            # such blocks have the scale of the smallest normal number; see the bound
            continue
        if signed:
            expected, scale = oracle.first_moment(block, bits)
        else:
            expected, scale = oracle.second_moment(block, bits, up[i])
        assert state["x_scale"][i] == pytest.approx(scale, rel=1e-7, abs=2e-38)
        differ = codes[i] != expected
        # float32 decides otherwise only on a boundary
        assert np.abs(codes[i] - expected).max() <= 1
        if differ.any():
            where = oracle.place(block, bits, signed)
            edge = np.sqrt(np.floor(where) * (np.floor(where) + 1) + 0.5) if signed else np.round(where + up[i]) - up[i]
            assert np.abs(where - edge)[differ].max() < 1e-4
        assert differ.mean() < 0.02
        checked += 1
    assert checked == 90


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("state_dtype", CODED)
def test_errors_are_within_the_bound_on_ten_thousand_blocks(state_dtype, signed):
    bits, size = CODED[state_dtype]
    x = blocks(size, 10_000, signed)
    state = keep(state_dtype, x, signed, seed=5)
    got, want = read(state_dtype, state, x.shape).double(), x.double()
    scale = want.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.equal(got == 0, want == 0) or signed
    if signed:
        largest = 2 ** (bits - 1) - 1
        bound = (scale * want.abs()).sqrt() / largest + scale / (2 * largest**2)
        assert ((got - want).abs() <= bound * (1 + 1e-5)).all()
        # the largest one is exact, and signs are kept
        assert (got * want >= 0).all()
    else:
        # one of the two neighbours on the grid, or the smallest one above zero
        values = torch.from_numpy(oracle.grid(bits, signed=False))
        at = want / scale
        above = torch.searchsorted(values, at * (1 - 1e-5)).clamp(max=len(values) - 1)
        below = torch.searchsorted(values, at * (1 + 1e-5), right=True) - 1
        low, high = values[below.clamp(min=0)], values[torch.maximum(above, (want > 0).long())]
        # what is written as a denormal number is as coarse as these are
        assert (got / scale >= low * (1 - 1e-5) - 1e-6 * (scale < 1e-30)).all()
        assert (got / scale <= high * (1 + 1e-5) + 1e-6 * (scale < 1e-30)).all()
    normal = (x.abs().amax(1) > 1e-37).nonzero().flatten()
    top = want.abs().amax(1)[normal]
    assert torch.allclose(got.abs().amax(1)[normal], top, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_what_is_read_and_kept_again_stays(state_dtype, signed):
    x = blocks(256, 2000, signed)
    # denormal numbers have too few bits to be the same again
    x = x[x.abs().amax(1) > 1e-37]
    state = keep(state_dtype, x, signed, seed=1)
    once = read(state_dtype, state, x.shape).clone()
    for seed in range(2, 6):
        again = keep(state_dtype, once, signed, seed=seed)
        assert all(torch.equal(again[name], state[name]) for name in state)
        assert torch.equal(read(state_dtype, again, x.shape), once)


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_second_moments_are_rounded_without_losing_small_ones(state_dtype):
    bits, size = CODED[state_dtype]
    torch.manual_seed(0)
    block = torch.rand(size) ** 4
    block[0], block[1], block[2] = 1.0, 0.0, 1e-14
    where = torch.from_numpy(oracle.place(block.double().numpy(), bits, signed=False))
    many = block.expand(20_000, size)
    codes = torch.from_numpy(unpacked(state_dtype, keep(state_dtype, many, False), many.numel())).view(many.shape)
    assert (codes[:, 1] == 0).all()
    assert (codes[:, 2] == 1).all()
    mean, kept = codes.double().mean(0), where > 1
    # six deviations of the mean of so many roundings
    assert ((mean - where).abs()[kept] < 6 * 0.5 / math.sqrt(20_000) + 1e-3).all()


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("state_dtype", CODED)
def test_a_bad_number_spoils_its_block_and_shows(state_dtype, bad, signed):
    size = CODED[state_dtype][1]
    x = blocks(size, 3, True).abs() + 1
    x[1, 7] = bad
    got = read(state_dtype, keep(state_dtype, x, signed), x.shape)
    assert not got[1].isfinite().any()
    assert got[::2].isfinite().all()


def test_bfloat16_keeps_nan_and_infinities_where_they_are():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -0.0])
    got = read("bfloat16", keep("bfloat16", x, True), x.shape)
    assert got.isnan().tolist() == [True, False, False, False, False]
    assert got[1:].tolist() == [math.inf, -math.inf, 1.0, 0.0]


# --- bytes, shapes, parts


@pytest.mark.parametrize("numel", [0, 1, 2, 3, 63, 64, 65, 127, 1000, 1001])
@pytest.mark.parametrize("signed", SIGNED)
def test_packing_equals_the_oracle(numel, signed):
    rng = np.random.default_rng(numel)
    codes = rng.integers(-7, 8, (2, numel)) if signed else rng.integers(0, 16, (2, numel))
    dtype = torch.int8 if signed else torch.uint8
    packed = torch.empty(2, (numel + 1) // 2, dtype=dtype)
    ops.pack_(packed, torch.from_numpy(codes).to(dtype))
    for row, expected in zip(packed, codes, strict=True):
        assert np.array_equal(row.view(torch.uint8).numpy(), oracle.pack(expected))
    assert np.array_equal(ops.unpack(packed, numel).numpy(), codes)


SHAPES = st.lists(st.integers(0, 37), min_size=0, max_size=3).map(tuple)


@settings(max_examples=100, deadline=None)
@given(shape=SHAPES, state_dtype=st.sampled_from(STATE_DTYPES), signed=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_shape_takes_the_bytes_of_the_formula_and_comes_back(shape, state_dtype, signed, seed):
    x = torch.randn(shape) if signed else torch.randn(shape).square()
    state = keep(state_dtype, x, signed, seed)
    assert sum(value.nbytes for value in state.values()) == oracle.state_bytes(x.numel(), state_dtype)
    assert state["x"].shape == (x.shape if state_dtype != "int4" else ((x.numel() + 1) // 2,))
    got = read(state_dtype, state, shape, torch.float64)
    assert got.dtype == (torch.float32 if state_dtype == "float32" else torch.float64)
    assert got.shape == x.shape
    if x.numel() and state_dtype != "float32":
        worst = {"bfloat16": 2**-7, "int8": 4 / 127, "int4": 0.6}[state_dtype]
        assert ((got - x).abs().max() <= worst * x.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_an_optimizer_keeps_the_bytes_of_the_formula(state_dtype, dtype):
    for m, n, rank in ((7, 5, 3), (33, 129, 2), (64, 64, 8)):
        matrix, vector = nn.Parameter(torch.zeros(m, n, dtype=dtype)), nn.Parameter(torch.zeros(n, dtype=dtype))
        opt = GaLoreAdamW([matrix, vector], rank=rank, state_dtype=state_dtype)
        wide = 8 if dtype == torch.float64 else 4
        by = state_bytes(opt).by_parameter
        assert by["0.0"]["basis"] == wide * rank * min(m, n)
        for label, numel in (("0.0", rank * max(m, n)), ("0.1", n)):
            moment = oracle.state_bytes(numel, state_dtype) * (wide // 4 if state_dtype == "float32" else 1)
            kept = sum(size for name, size in by[label].items() if name.startswith("exp_avg"))
            assert kept == 2 * moment


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("numel", [1024, 1000, 333])
def test_parts_and_buckets_are_kept_as_the_whole_is(monkeypatch, state_dtype, signed, numel):
    kept = storage(state_dtype)
    values = [torch.randn(numel) if signed else torch.randn(numel).square() for _ in range(3)]
    seeds = [1, 2, 3]
    states = [keep(state_dtype, value, signed, seed) for value, seed in zip(values, seeds, strict=True)]
    together = [kept.init("x", (numel,), new, signed=signed) for _ in range(3)]
    kept.write_(together, "x", torch.stack(values), seeds)
    read_together = list(kept.read(together, "x", (numel,), torch.float32))
    monkeypatch.setattr(ops, "part_size", lambda device: 256)
    monkeypatch.setattr(reference, "part_size", lambda device: 256)
    for i, state in enumerate(states):
        in_parts = keep(state_dtype, values[i], signed, seeds[i])
        for name in state:
            assert torch.equal(state[name], together[i][name])
            assert torch.equal(state[name], in_parts[name])
        assert torch.equal(read(state_dtype, state, (numel,)), read_together[i])


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
def test_a_large_parameter_is_stepped_in_parts_to_the_same_end(monkeypatch, state_dtype):
    def run():
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(37, 41)) for _ in range(3)] + [nn.Parameter(torch.randn(9))]
        opt = GaLoreAdamW([{"params": params}], lr=0.1, state_dtype=state_dtype)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
        return params, opt

    whole, opt = run()
    for size in (256, 512, 4096):
        monkeypatch.setattr(ops, "part_size", lambda device, size=size: size)
        monkeypatch.setattr(reference, "part_size", lambda device, size=size: size)
        params, other = run()
        for p, q in zip(whole, params, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(opt.state[p][name], other.state[q][name]) for name in opt.state[p])


# --- in training


def fit(state_dtype, dtype, orders, rank=None, steps=300, **options):
    """Least squares with noisy gradients whose sizes span orders of magnitude; return the way that was gone."""
    torch.manual_seed(0)
    target = torch.randn(40, 24, dtype=torch.float64)
    size = 10 ** torch.linspace(-orders, 0, 24, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(40, 24, dtype=dtype))
    group = {"params": [weight], "rank": rank, "update_proj_gap": 50, "scale": 1.0}
    opt = GaLoreAdamW([group], state_dtype=state_dtype, **options)
    data = torch.Generator().manual_seed(1)
    for step in range(steps):
        noise = torch.randn(40, 24, generator=data, dtype=torch.float64)
        weight.grad = ((weight.detach().double() - target + 0.3 * noise) * size).to(dtype)
        opt.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        opt.step()
    return weight.detach().double(), target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("state_dtype", "orders", "near"),
    [("bfloat16", 3, 0.002), ("int8", 3, 0.015), ("int8", 1, 0.015), ("int4", 1, 0.1)],
)
def test_adamw_follows_that_of_full_moments(state_dtype, orders, near, dtype):
    """As a share of the way that was gone; 0.032 of it is still between the full one and the target."""
    full, target = fit("float32", torch.float64, orders)
    ours, _ = fit(state_dtype, dtype, orders, stochastic_rounding=True)
    if dtype == torch.bfloat16:
        # that the weights are bfloat16 is a distance of its own
        near += 0.01
    assert (ours - full).norm() < near * full.norm()
    assert (ours - target).norm() < 1.1 * (full - target).norm() + near * full.norm()


@pytest.mark.parametrize(("state_dtype", "near"), [("bfloat16", 0.02), ("int8", 0.04), ("int4", 0.25)])
def test_galore_follows_that_of_full_moments(state_dtype, near):
    """In float64: bases of nearly equal singular values turn with the last bits of float32, whatever the storage."""
    full, _ = fit("float32", torch.float64, orders=3, rank=8)
    ours, _ = fit(state_dtype, torch.float64, orders=3, rank=8)
    assert (ours - full).norm() < near * full.norm()


def test_four_bits_forget_what_is_a_hundredth_of_its_block():
    """A limit of 15 codes, and the price of rounding to nearest: such elements move by each gradient alone."""
    for state_dtype, low, high in (("int8", 0.9, 1.1), ("int4", 0.03, 0.15)):
        p = nn.Parameter(torch.zeros(64))
        opt = GaLoreAdamW([{"params": [p]}], state_dtype=state_dtype)
        for _ in range(20):
            p.grad = torch.full((64,), 0.005)
            p.grad[0] = 1.0
            opt.step()
        share = p[1:] / p[0]
        assert low < share.min()
        assert share.max() < high


def decayed(state_dtype, beta2=0.999):
    """A second moment after 300 gradients of 1 and 1700 of zero, over what it is in float64."""
    p = nn.Parameter(torch.zeros(4, 64))
    opt = GaLoreAdamW([{"params": [p]}], lr=0.0, betas=(0.9, beta2), state_dtype=state_dtype)
    for step in range(2000):
        p.grad = torch.zeros_like(p) if step >= 300 else torch.ones_like(p)
        # one element of each row goes on, so that its block has a scale
        p.grad[:, 0] = 1.0
        opt.step()
    v = storage(state_dtype).read([opt.state[p]], "exp_avg_sq", p.shape, torch.float64)[0]
    return v[:, 1:] / ((1 - beta2**300) * beta2**1700)


def test_a_plain_bfloat16_second_moment_never_decays_and_ours_does():
    plain = torch.ones(()).bfloat16()
    for _ in range(5000):
        plain = (plain.float() * 0.999).bfloat16()
    assert plain == 1
    # and so it is kept by torch for bfloat16 weights
    theirs = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    adamw = torch.optim.AdamW([theirs], lr=0.0)
    for step in range(2000):
        theirs.grad = torch.full_like(theirs, float(step == 0))
        adamw.step()
    assert adamw.state[theirs]["exp_avg_sq"].min() > 0.9e-3
    # ours falls to 0.18 of itself, each element by its own chances, and their mean is right
    for state_dtype, mean in (("float32", 1e-3), ("bfloat16", 0.03), ("int8", 0.05), ("int4", 0.3)):
        assert abs(decayed(state_dtype).mean() - 1) < mean, state_dtype


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize(("state_dtype", "bias", "spread"), [("bfloat16", 0.01, 0.06), ("int8", 0.03, 0.25)])
def test_a_second_moment_has_the_right_mean(state_dtype, bias, spread, beta2):
    """An average of squares over thousands of steps, of sizes that differ tenfold within a block."""
    kept, data = storage(state_dtype), torch.Generator().manual_seed(0)
    size = 10 ** torch.rand(4096, generator=data)
    state = kept.init("x", size.shape, new, signed=False)
    full = torch.zeros(4096)
    ratios = []
    for step in range(3000):
        square = (size * torch.randn(4096, generator=data)).square()
        full.lerp_(square, 1 - beta2)
        v = kept.read([state], "x", size.shape, torch.float32)[0].lerp_(square, 1 - beta2)
        kept.write_([state], "x", [v], [Tick(step, 0.1).seed])
        if step >= 2000 and step % 100 == 0:
            ratios.append(kept.read([state], "x", size.shape, torch.float32)[0] / full)
    ratio = torch.stack(ratios)
    assert abs(ratio.mean() - 1) < bias
    assert ratio.std() < spread


@pytest.mark.parametrize("beta", [0.8, 0.95])
@pytest.mark.parametrize(("state_dtype", "error"), [("bfloat16", 0.02), ("int8", 0.04), ("int4", 0.55)])
def test_a_first_moment_stays_near(state_dtype, error, beta):
    kept, data = storage(state_dtype), torch.Generator().manual_seed(0)
    mean = torch.randn(4096, generator=data)
    state = kept.init("x", mean.shape, new)
    full = torch.zeros(4096)
    for step in range(1000):
        grad = mean + 3 * torch.randn(4096, generator=data)
        full.lerp_(grad, 1 - beta)
        m = kept.read([state], "x", mean.shape, torch.float32)[0].lerp_(grad, 1 - beta)
        kept.write_([state], "x", [m], [Tick(step, 0.1).seed])
    assert (kept.read([state], "x", mean.shape, torch.float32)[0] - full).norm() < error * full.norm()


# --- weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_a_neighbour_and_without_bias(dtype):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500), 1e-6 * torch.randn(300), torch.tensor([0.0, 1.0, -2.5, 1e-8, 3e4])])
    rounds = torch.stack([reference.rounded_(x.clone(), dtype, [seed * 7919]) for seed in range(4000)])
    assert torch.equal(rounds.to(dtype).float(), rounds)
    if dtype == torch.bfloat16:
        below, above = (torch.from_numpy(side) for side in oracle.bfloat16_neighbours(x.numpy()))
        assert ((rounds == below) | (rounds == above)).all()
        spacing = (above - below).abs()
    else:
        near = x.numpy().astype(np.float16)
        other = np.nextafter(near, np.where(near < x.numpy(), np.inf, -np.inf).astype(np.float16))
        sides = [torch.from_numpy(side.astype(np.float32)) for side in (near, other)]
        assert ((rounds == sides[0]) | (rounds == sides[1])).all()
        spacing = (sides[0] - sides[1]).abs()
    mean = rounds.double().mean(0)
    # six deviations of a mean of 4000
    assert ((mean - x).abs() <= 6 * 0.5 / math.sqrt(4000) * spacing + 1e-12).all()
    exact = x.to(dtype).float() == x
    assert (rounds[:, exact] == x[exact]).all()
    assert exact.sum() >= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_leaves_nan_infinity_and_other_dtypes_alone(dtype):
    # the last two are NaN whose bits would overflow into a number
    bits = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int64).to(torch.int32)
    for seed in range(50):
        x = bits.clone().view(torch.float32)
        got = reference.rounded_(x.repeat(100), dtype, [seed]).to(dtype).view(100, 5)
        assert (got[:, 0] == math.inf).all()
        assert (got[:, 1] == -math.inf).all()
        assert got[:, 2:].isnan().all()
    x = torch.randn(10)
    assert reference.rounded_(x, torch.float32, [0]) is x


# small enough to vanish, at relative steps of 1e-4 against half of 2⁻⁸ (bfloat16) and of 2⁻¹¹ (float16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["galore", "adamw", "muon"])
def test_small_updates_do_not_vanish_with_stochastic_rounding(dtype, kind):
    def run(dtype, stochastic_rounding):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.full((64, 48), 1.0, dtype=dtype))
        options = {"lr": 1e-4, "weight_decay": 0.0, "stochastic_rounding": stochastic_rounding}
        if kind == "muon":
            # an orthogonalized matrix of ones has elements of 1/√(64·48)
            opt = Muon([weight], **options | {"lr": 1e-4 * math.sqrt(64 * 48)}, adjust_lr_fn="none", ns_dtype="float32")
        else:
            params = [weight] if kind == "galore" else [{"params": [weight]}]
            opt = GaLoreAdamW(params, **options, **({"rank": 4, "scale": 1.0} if kind == "galore" else {}))
        for _ in range(1000):
            weight.grad = torch.ones_like(weight)
            opt.step()
        return weight.detach().float()

    full, plain, ours = run(torch.float32, True), run(dtype, False), run(dtype, True)
    moved = (1 - full).mean()
    assert moved > 0.002
    assert plain.eq(1).all()
    assert abs((1 - ours).mean() - moved) < 0.1 * moved


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lr_zero_leaves_weights_bit_identical(dtype, lr):
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(24, 16).to(dtype)),
        nn.Parameter((1e-6 * torch.randn(24, 16)).to(dtype)),
        nn.Parameter(torch.randn(8, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(16, 24).to(dtype).T),
        nn.Parameter(torch.randn(5).to(dtype)),
    ]
    before = copy.deepcopy(params)
    opt = GaLoreAdamW(params, lr=lr, rank=2, weight_decay=0.1, stochastic_rounding=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last"])
@pytest.mark.parametrize("rank", [2, None])
def test_any_layout_is_rounded_without_bias(layout, rank):
    torch.manual_seed(0)
    start = {
        "contiguous": lambda: torch.ones(64, 32),
        "transposed": lambda: torch.ones(32, 64).T,
        "channels_last": lambda: torch.ones(64, 8, 2, 2).to(memory_format=torch.channels_last),
    }[layout]()
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(start.clone().to(dtype))
        opt = GaLoreAdamW([{"params": [p], "rank": rank}], lr=1e-3, scale=1.0, stochastic_rounding=True)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            opt.step()
        means[dtype] = 1 - p.detach().float().mean().item()
    assert means[torch.float32] > 1e-3
    assert means[torch.bfloat16] == pytest.approx(means[torch.float32], rel=0.15)


# --- state dicts


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 7)).to(dtype)


def optimizer(net, state_dtype, **options):
    return GaLoreAdamW(
        net.parameters(), lr=0.02, rank=4, update_proj_gap=3, scale=1.0, state_dtype=state_dtype, **options
    )


def train(net, opt, first, last):
    for step in range(first, last):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()


def assert_same(one, two):
    (net, opt), (other, other_opt) = one, two
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert opt.state[p].keys() == other_opt.state[q].keys()
        for name, value in opt.state[p].items():
            assert value.dtype == other_opt.state[q][name].dtype
            assert torch.equal(value, other_opt.state[q][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_resume_is_bit_exact(state_dtype, dtype):
    """The optimizer that loads was made for another storage: the saved hyperparameters win."""
    net = problem(dtype)
    opt = optimizer(net, state_dtype, stochastic_rounding=True)
    train(net, opt, 0, 4)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = problem(dtype)
    other_opt = optimizer(other, "float32" if state_dtype == "int8" else "int8")
    other.load_state_dict(saved["net"])
    other_opt.load_state_dict(saved["opt"])
    assert_same((net, opt), (other, other_opt))
    train(net, opt, 4, 9)
    train(other, other_opt, 4, 9)
    assert_same((net, opt), (other, other_opt))
    for group in other_opt.param_groups:
        assert group["state_dtype"] == state_dtype
        assert group["stochastic_rounding"] is True


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_state_follows_a_model_that_is_cast(state_dtype):
    net = problem()
    opt = optimizer(net, state_dtype)
    train(net, opt, 0, 2)
    before = {name: [opt.state[p][name].clone() for p in net.parameters()] for name in ("exp_avg", "exp_avg_sq")}
    net.double()
    train(net, opt, 2, 3)
    wide = torch.float64 if state_dtype == "float32" else before["exp_avg"][0].dtype
    for p in net.parameters():
        assert opt.state[p]["exp_avg"].dtype == wide
        assert opt.state[p].get("basis", p).dtype == torch.float64
        assert opt.state[p].get("exp_avg_scale", torch.ones(1)).dtype == torch.float32
    net.bfloat16()
    train(net, opt, 3, 5)
    for p, kept in zip(net.parameters(), before["exp_avg"], strict=True):
        assert opt.state[p]["exp_avg"].dtype == kept.dtype
        assert p.isfinite().all()


@pytest.mark.parametrize("state_dtype", CODED)
def test_numbers_are_not_taken_for_codes_nor_codes_for_numbers(state_dtype):
    net = problem()
    group = [{"params": list(net.parameters())}]
    adamw = torch.optim.AdamW(net.parameters(), lr=0.02)
    train(net, adamw, 0, 2)
    opt = GaLoreAdamW(group, state_dtype=state_dtype)
    train(net, opt, 0, 1)
    before = copy.deepcopy(opt.state_dict())
    # what torch saves does not say how moments are kept, so ours decides
    with pytest.raises(ValueError, match=rf"has exp_avg in torch.float32, and state_dtype='{state_dtype}'.*torch.int8"):
        opt.load_state_dict(adamw.state_dict())
    saved = opt.state_dict()
    for value in saved["param_groups"]:
        del value["state_dtype"]
    with pytest.raises(ValueError, match=r"has exp_avg in torch.int8, and state_dtype='float32'.*torch.float32"):
        GaLoreAdamW(group).load_state_dict(saved)
    for pid, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(value, opt.state_dict()["state"][pid][name])
    # bfloat16 are numbers: they are rounded where that is what is kept
    half = GaLoreAdamW(group, state_dtype="bfloat16")
    half.load_state_dict(adamw.state_dict())
    p = next(net.parameters())
    torch.testing.assert_close(half.state[p]["exp_avg"].float(), adamw.state[p]["exp_avg"], rtol=2**-8, atol=1e-30)


def test_arguments_out_of_range_are_refused():
    p = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="Invalid stochastic_rounding: 1, must be a bool"):
        GaLoreAdamW([p], rank=2, stochastic_rounding=1)
    allowed = "one of float32, bfloat16, int8, int4"
    for bad in ("fp8", None, torch.int8):
        with pytest.raises(ValueError, match=f"Invalid state_dtype: .*, must be {allowed}"):
            GaLoreAdamW([p], rank=2, state_dtype=bad)
    with pytest.raises(ValueError, match="did you mean 'stochastic_rounding'"):
        GaLoreAdamW([{"params": [p], "stochastic_round": True}])
