"""M-FAC against a dense inverse, and what it keeps."""

import io
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_optim import MFAC, InverseFisher, state_bytes
from lowrank_optim._warn import warn_once
from tests.reference.mfac_numpy import DenseMFAC

SHAPES = ((6, 4), (3,), (2, 3, 2), ())
SIZES = tuple(math.prod(shape) for shape in SHAPES)
Params = list[nn.Parameter]


def parameters(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> Params:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(params: Params, seed: int) -> list[Tensor]:
    """Correlated from step to step, as those of training are."""
    always, now = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    draw = [[torch.randn(p.shape, generator=g, dtype=torch.float64) for g in (always, now)] for p in params]
    return [(common + 0.5 * own).to(p.dtype) for (common, own), p in zip(draw, params, strict=True)]


def step(opt: MFAC, params: Params, grads: list[Tensor | None]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    opt.step()


def flat(tensors: Any) -> Any:
    return torch.cat([x.detach().reshape(-1) for x in tensors]).double().numpy()


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "count": {"divisor": "count"},
    "relative": {"relative_damping": True, "momentum": 0.5},
    "momentum": {"momentum": 0.9},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum": 0.9},
    "parameter": {"scope": "parameter", "relative_damping": True},
    "parameter-count": {"scope": "parameter", "divisor": "count"},
    "sparse": {"sparse": True, "momentum": 0.5},
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("num_grads", [1, 7, 60])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_fifty_steps_are_those_of_a_dense_inverse(options: dict[str, Any], num_grads: int, maximize: bool) -> None:
    params = parameters()
    opt = MFAC(params, lr=0.02, num_grads=num_grads, damping=0.03, maximize=maximize, **options)
    dense = DenseMFAC(
        *(num_grads, 0.03, 0.02, options.get("momentum", 0.0), options.get("weight_decay", 0.0)),
        decoupled=options.get("decoupled_weight_decay", False),
        divisor=options.get("divisor", "window"),
        relative=options.get("relative_damping", False),
        blocks=SIZES if options.get("scope") == "parameter" else None,
    )
    weights = flat(params)
    for t in range(50):
        grads = gradients(params, t)
        weights = dense.step(weights, -flat(grads) if maximize else flat(grads))
        step(opt, params, list(grads))
        np.testing.assert_allclose(flat(params), weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gap", [None, 1, 3])
@pytest.mark.parametrize("basis", ["dct", "identity", "svd", "subspace", "random"])
def test_with_the_full_rank_it_is_the_same_in_rotated_coordinates(basis: str, gap: int | None) -> None:
    params, twins = parameters(), parameters()
    options: dict[str, Any] = {"num_grads": 7, "damping": 0.03, "momentum": 0.5, "lr": 0.02}
    opt = MFAC(params, rank=1.0, basis=basis, update_proj_gap=gap, **options)
    plain = MFAC(twins, **options)
    for t in range(25):
        step(opt, params, list(gradients(params, t)))
        step(plain, twins, list(gradients(params, t)))
        np.testing.assert_allclose(flat(params), flat(twins), rtol=1e-9, atol=1e-9)


def test_in_coordinates_it_is_exact_for_the_projected_gradients_and_forgets_what_leaves() -> None:
    """The two columns with most energy, found again at every third gradient, and a vector beside them."""
    params = parameters(shapes=((5, 4), (3,)))
    opt = MFAC(params, lr=0.02, num_grads=4, damping=0.03, rank=2, basis="identity", update_proj_gap=3)
    # rows of the window, with zeros where nothing is seen
    window: list[Any] = []
    chosen = np.zeros(4, dtype=bool)
    weights = flat(params)
    for t in range(14):
        grads = gradients(params, t)
        matrix, vector = grads[0].numpy(), grads[1].numpy()
        if t % 3 == 0:
            chosen = np.isin(np.arange(4), np.argsort(-np.square(matrix).sum(0))[:2])
            stays = np.concatenate([np.tile(chosen, 5), np.ones(3, dtype=bool)])
            window = [row * stays for row in window]
        window = [*window, np.concatenate([(matrix * chosen).ravel(), vector])][-4:]
        rows = np.array(window)
        weights = weights - 0.02 * np.linalg.solve(0.03 * np.eye(23) + rows.T @ rows / 4, rows[-1])
        step(opt, params, list(grads))
        np.testing.assert_allclose(flat(params), weights, rtol=1e-10, atol=1e-10)


def test_its_window_is_an_inverse_fisher() -> None:
    params = parameters(torch.float32)
    opt = MFAC(params, lr=1.0, num_grads=5, damping=1e-3)
    fisher = InverseFisher(sum(SIZES), num_grads=5, damping=1e-3)
    for t in range(13):
        before, grads = flat(params), gradients(params, t)
        step(opt, params, list(grads))
        fisher.push(torch.from_numpy(flat(grads)).float())
        np.testing.assert_allclose(before - flat(params), fisher.solve_newest().numpy(), rtol=1e-4, atol=1e-4)


def test_a_window_in_bfloat16_is_exact_for_what_it_stores() -> None:
    params = parameters(torch.float32)
    opt = MFAC(params, lr=0.02, num_grads=5, damping=0.03, state_dtype="bfloat16")
    dense, weights = DenseMFAC(5, 0.03, 0.02), flat(params)
    for t in range(13):
        grads = gradients(params, t)
        weights = dense.step(weights, flat([grad.bfloat16() for grad in grads]))
        step(opt, params, list(grads))
        np.testing.assert_allclose(flat(params), weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e18, 1e3, 1e-3, 1e-30])
@pytest.mark.parametrize("relative", [False, True])
def test_gradients_of_any_size_have_finite_updates(scale: float, relative: bool) -> None:
    """Relative damping makes the update of gradients c times as large 1/c of what it was."""
    params, twins = parameters(torch.float32), parameters(torch.float32)
    options: dict[str, Any] = {"num_grads": 4, "damping": 0.1, "relative_damping": relative}
    opt, one = MFAC(params, lr=min(scale, 1e30), **options), MFAC(twins, lr=1.0, **options)
    for t in range(9):
        grads = gradients(params, t)
        step(opt, params, [grad * scale for grad in grads])
        step(one, twins, list(grads))
        assert np.isfinite(flat(params)).all()
        if relative:
            np.testing.assert_allclose(flat(params), flat(twins), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"rank": 2, "update_proj_gap": 2}, {"scope": "parameter"}], ids=str)
def test_a_gradient_that_is_not_finite_enters_no_window(bad: float, options: dict[str, Any]) -> None:
    """It is counted and said once, and training goes on as if it had not come."""
    params, twins = parameters(), parameters()
    opt = MFAC(params, num_grads=3, damping=0.1, momentum=0.5, **options)
    other = MFAC(twins, num_grads=3, damping=0.1, momentum=0.5, **options)
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for t in range(8):
            if t in (0, 4, 5):
                grads = gradients(params, 100 + t)
                for grad in grads:
                    grad.view(-1)[-1] = bad
                step(opt, params, list(grads))
            step(opt, params, list(gradients(params, t)))
            step(other, twins, list(gradients(params, t)))
    assert ["has not entered the window" in str(one.message) for one in said] == [True]
    assert np.array_equal(flat(params), flat(twins))
    assert opt.state[params[0]]["window_refused"] == 3
    assert opt.state[params[0]]["window_step"] == opt.state[params[0]]["step"] == 8


def test_one_bad_parameter_stops_its_group_and_no_other() -> None:
    params = parameters()
    opt = MFAC([{"params": params[:2]}, {"params": params[2:]}], num_grads=3, damping=0.1)
    grads = gradients(params, 0)
    grads[1][0] = math.nan
    before = [p.detach().clone() for p in params]
    step(opt, params, list(grads))
    moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
    assert moved == [False, False, True, True]


def test_what_has_no_gradient_is_zeros_in_the_window_and_stays() -> None:
    params = parameters()
    opt = MFAC(params, lr=0.02, num_grads=4, damping=0.03)
    dense = DenseMFAC(4, 0.03, 0.02)
    weights = flat(params)
    for t in range(12):
        grads: list[Tensor | None] = list(gradients(params, t))
        # the first, which keeps what the group shares, among them
        absent = {t % 4, (t + 1) % 4} if t % 3 else set()
        for i in absent:
            grads[i] = None
        seen = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)]
        whole = dense.step(weights, flat(seen))
        live = np.concatenate([np.full(size, i not in absent) for i, size in enumerate(SIZES)])
        weights = np.where(live, whole, weights)
        step(opt, params, grads)
        np.testing.assert_allclose(flat(params), weights, rtol=1e-10, atol=1e-10)


def test_gradients_may_be_accumulated() -> None:
    """What is in `grad` at a step is one gradient, however many times something was added to it."""
    models = [nn.Linear(4, 2), nn.Linear(4, 2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(8, 4)
    opts = [MFAC(model.parameters(), num_grads=3, damping=0.1) for model in models]
    for _ in range(5):
        models[0](x).square().mean().backward()
        for half in x.chunk(2):
            models[1](half).square().mean().div(2).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_weights_that_are_zero_stay_out_of_the_window_and_zero() -> None:
    params = parameters()
    with torch.no_grad():
        for p in params[:3]:
            p.view(-1)[::2] = 0
    masks = [p != 0 for p in params]
    count = sum(int(mask.sum()) for mask in masks)
    opt = MFAC(params, lr=0.02, num_grads=4, damping=0.03, sparse=True, momentum=0.5, weight_decay=0.1)
    dense = DenseMFAC(4, 0.03, 0.02, 0.5, 0.1)
    kept = np.concatenate([mask.numpy().reshape(-1) for mask in masks])
    weights = flat(params)[kept]
    for t in range(11):
        grads = gradients(params, t)
        weights = dense.step(weights, flat(grads)[kept])
        step(opt, params, list(grads))
        np.testing.assert_allclose(flat(params)[kept], weights, rtol=1e-10, atol=1e-10)
    assert not flat(params)[~kept].any()
    assert state_bytes(opt).by_name["window"] == 4 * count * 8
    # in a model with other zeros the saved places win, as all that is saved does
    other = MFAC(twins := parameters(), sparse=True, momentum=0.5)
    other.load_state_dict(opt.state_dict())
    assert all(
        torch.equal(opt.state[p]["window"], other.state[q]["window"]) for p, q in zip(params, twins, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_state_is_what_the_formula_says(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4))
    k, rank = data.draw(st.integers(1, 9)), data.draw(st.none() | st.integers(1, 7))
    low, momentum = data.draw(st.booleans()), data.draw(st.booleans())
    alone = data.draw(st.booleans())
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    opt = MFAC(
        params,
        momentum=0.9 * momentum,
        num_grads=k,
        rank=rank,
        scope="parameter" if alone else "group",
        state_dtype="bfloat16" if low else "float32",
    )
    expected = (16 * k * k + 24) * (len(params) if alone else 1)
    for shape in shapes:
        m, n = shape[0], math.prod(shape[1:])
        seen = m * n
        if rank is not None and len(shape) > 1:
            r = min(rank, m, n)
            seen = r * max(m, n)
            expected += 4 * r
        expected += 4 + (2 if low else 4) * seen * (k + momentum)
    assert state_bytes(opt).total == expected


def test_a_window_that_has_no_room_is_refused_before_anything_is_allocated() -> None:
    """Of all parameters together, where each alone would have room."""
    p = nn.Parameter(torch.zeros(1 << 20))
    with pytest.raises(MemoryError, match=f"takes {4 * (1 << 20) * (10 << 20) + 16 * (10 << 20) ** 2 + 24:,} bytes"):
        MFAC([p], num_grads=10 << 20)
    opt = MFAC([p], num_grads=2)
    more = [nn.Parameter(torch.zeros(1 << 20)) for _ in range(3)]
    with pytest.raises(MemoryError):
        opt.add_param_group({"params": more, "num_grads": 4 << 20})
    assert len(opt.param_groups) == 1
    assert not any(q in opt.state for q in more)


def test_a_group_whose_first_parameter_is_frozen_is_led_by_another() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    opt = MFAC(params, lr=0.02, num_grads=4, damping=0.03)
    dense, weights = DenseMFAC(4, 0.03, 0.02), flat(params)
    for t in range(10):
        if t == 5:
            params[0].requires_grad_(True)
        grads: list[Tensor | None] = list(gradients(params, t))
        if t < 5:
            grads[0] = None
        seen = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)]
        whole = dense.step(weights, flat(seen))
        weights = np.where(np.arange(len(whole)) >= (24 if t < 5 else 0), whole, weights)
        step(opt, params, grads)
        np.testing.assert_allclose(flat(params), weights, rtol=1e-10, atol=1e-10)
    assert "gram" in opt.state[params[1]]
    assert "gram" not in opt.state[params[0]]


@pytest.mark.parametrize("cut", [1, 4, 9])
@pytest.mark.parametrize("options", [{}, {"rank": 2, "basis": "svd", "update_proj_gap": 3}, {"sparse": True}], ids=str)
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_window(options: dict[str, Any], cut: int) -> None:
    params = parameters(torch.bfloat16)
    opt = MFAC(params, num_grads=6, damping=0.1, momentum=0.5, **options)
    for t in range(cut):
        step(opt, params, list(gradients(params, t)))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = MFAC(twins, num_grads=6, momentum=0.5, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    for t in range(cut, cut + 9):
        step(opt, params, list(gradients(params, t)))
        step(other, twins, list(gradients(params, t)))
    assert np.array_equal(flat(params), flat(twins))


def test_empty_parameters_and_ones_without_any_update_are_fine() -> None:
    params = [nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(3))]
    opt = MFAC(params, num_grads=2, rank=2)
    for _ in range(5):
        step(opt, params, [torch.zeros(0, 4), torch.ones(3)])
    assert params[1].isfinite().all()
    opt.zero_grad()
    opt.step()
    assert opt.state[params[0]]["window_step"] == 5


def test_a_basis_waits_for_a_gradient_that_is_not_zero() -> None:
    """As that of the one factor of an adapter, whose other factor is zero, is at first."""
    params = parameters(shapes=((6, 4), (4, 5)))
    opt = MFAC(params, num_grads=50, damping=0.1, rank=2)
    for t in range(3):
        grads = gradients(params, t)
        step(opt, params, [grads[0] if t else torch.zeros_like(grads[0]), grads[1]])
    assert opt.state[params[0]]["step"] == 2
    assert opt.state[params[1]]["step"] == 3
    assert len(set(opt.state[params[0]]["basis_index"].tolist())) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_grads": 0}, "Invalid num_grads: 0, must be an int >= 1"),
        ({"num_grads": 2.0}, "Invalid num_grads: 2.0"),
        ({"damping": 0.0}, r"Invalid damping: 0.0, must be a number in \[1e-30, 1e30\]"),
        ({"damping": -1e-3}, "Invalid damping: -0.001"),
        ({"damping": math.nan}, "Invalid damping: nan"),
        ({"damping": 10**400}, "Invalid damping: 1000"),
        ({"divisor": "mean"}, "Invalid divisor: 'mean', must be one of window, count"),
        ({"scope": "all"}, "Invalid scope: 'all', must be one of group, parameter"),
        ({"momentum": 1.0}, "Invalid momentum: 1.0"),
        ({"relative_damping": 1}, "Invalid relative_damping: 1, must be a bool"),
        ({"decoupled_weight_decay": None}, "Invalid decoupled_weight_decay: None"),
        ({"rank": 0}, "Invalid rank: 0"),
        ({"rank": 2, "sparse": True}, "Invalid sparse: True, must be False with a rank"),
        ({"basis": "fourier"}, "Invalid basis: 'fourier'"),
        ({"update_proj_gap": 0}, "Invalid update_proj_gap: 0"),
        ({"state_dtype": "int8"}, "Invalid state_dtype: 'int8', must be one of float32, bfloat16"),
    ],
)
def test_bad_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MFAC(parameters(), **options)


def test_a_window_of_another_length_is_an_error_that_says_so() -> None:
    params = parameters()
    opt = MFAC(params, num_grads=4)
    step(opt, params, list(gradients(params, 0)))
    opt.param_groups[0]["num_grads"] = 5
    with pytest.raises(RuntimeError, match="window is torch.float64 of shape"):
        step(opt, params, list(gradients(params, 1)))
    other = MFAC(parameters(shapes=((6, 5), (3,), (2, 3, 2), ())), num_grads=4)
    with pytest.raises(ValueError, match="has window of shape"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_grads", [10, 32])
def test_gradients_that_nearly_repeat_lose_nothing(noise: float, state_dtype: str, num_grads: int) -> None:
    """As those of whole batches at small steps do: their sum is what is left of terms a million times as large."""
    size, damping = 4000, 1e-5
    p = nn.Parameter(torch.zeros(size))
    opt = MFAC([p], lr=1.0, num_grads=num_grads, damping=damping, state_dtype=state_dtype)
    common, rows = torch.randn(size, generator=torch.Generator().manual_seed(0)), []
    for t in range(3 * num_grads):
        # ordinary ones in between, so that a window is careful only for a while
        alike = t % (2 * num_grads + 3) > 5
        own = torch.randn(size, generator=torch.Generator().manual_seed(t + 1))
        grad = common + noise * own if alike else own
        rows.append((grad.bfloat16() if state_dtype == "bfloat16" else grad).double().numpy())
        p.data.zero_()
        p.grad = grad
        opt.step()
        window = np.array(rows[-num_grads:]).astype(np.longdouble)
        gram = (window @ window.T + num_grads * damping * np.eye(len(window))).astype(np.float64)
        weights = np.linalg.solve(gram, np.eye(len(window))[-1])
        exact = num_grads * window.T.astype(np.float64) @ weights
        error = np.linalg.norm(-p.detach().double().numpy() - exact) / np.linalg.norm(exact)
        assert error < 1e-3, t


@pytest.mark.parametrize(
    "sizes", [(1e28, 1e11, 1.0), (1e30, 1e10, 1.0), (1e37, 1.0), (3e38, 1.0), (1e-38, 1.0)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"rank": 8}, {"state_dtype": "bfloat16"}], ids=str)
def test_nothing_that_is_finite_makes_a_weight_that_is_not(sizes: tuple[float, ...], options: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.zeros(100, 20)), nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    opt = MFAC(params, num_grads=4, **options)
    for size in (*sizes, *[1.0] * 6):
        step(opt, params, [(grad * size).clamp(-3e38, 3e38) for grad in gradients(params, 0)])
        assert np.isfinite(flat(params)).all()
    assert opt.state[params[0]]["gram"].isfinite().all()


@pytest.mark.parametrize("num_grads", [2, 4, 32])
@pytest.mark.parametrize("size", [1.0, 1e5, 1e12, 1e28])
@pytest.mark.parametrize("order", ["xx", "xyxx", "xxxxxxxx"])
def test_a_gradient_that_repeats_never_leaps(size: float, num_grads: int, order: str) -> None:
    """F⁻¹g is never longer than √(c/λ)/2, also where float64 cannot tell its matrix from a singular one."""
    p = nn.Parameter(torch.zeros(1200))
    opt = MFAC([p], lr=1.0, num_grads=num_grads, damping=1e-5)
    x, y = (torch.randn(1200, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for which in order:
        p.data.zero_()
        p.grad = (x * size) if which == "x" else y
        opt.step()
        assert float(p.detach().norm()) <= math.sqrt(num_grads / 1e-5) * 1.01
        # and downhill, but for rounding
        assert float(-(p.detach() / (p.detach().norm() + 1e-30)) @ p.grad) >= -1e-3 * float(p.grad.norm())


def test_a_model_that_is_cast_goes_on_from_what_its_window_has_become() -> None:
    """Also where a parameter takes part that has no gradient any more; and the same when such a state is loaded."""
    params = parameters()
    opt = MFAC(params, lr=0.02, num_grads=8, damping=1e-3)
    for t in range(10):
        step(opt, params, [10 * grad for grad in gradients(params, t)])
    saved = opt.state_dict()
    twins = [nn.Parameter(p.detach().float()) for p in params]
    other = MFAC(twins, lr=0.02, num_grads=8, damping=1e-3)
    other.load_state_dict(saved)
    for p in params:
        p.data = p.data.float()
    for t in range(10, 13):
        for one, ours in ((opt, params), (other, twins)):
            step(one, ours, [None, *gradients(ours, t)[1:]])
            windows = torch.cat([one.state[p]["window"].view(8, -1) for p in ours], dim=1).double()
            torch.testing.assert_close(one.state[ours[0]]["gram"], windows @ windows.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_state_that_another_parameter_leads_goes_on(frozen: int) -> None:
    """Because the first one was frozen when it was made, or is now."""
    params, twins = parameters(), parameters()
    (params if frozen == 0 else twins)[0].requires_grad_(False)
    opt, other = (MFAC(some, num_grads=4, damping=0.03) for some in (params, twins))
    for t in range(6):
        step(
            opt,
            params,
            [grad if p.requires_grad else None for p, grad in zip(params, gradients(params, t), strict=True)],
        )
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    other.load_state_dict(opt.state_dict())
    for t in range(6, 12):
        for one, some in ((opt, params), (other, twins)):
            step(one, some, [None, *gradients(some, t)[1:]])
        assert np.array_equal(flat(params), flat(twins))


def test_a_scope_that_changes_is_an_error_and_a_state_of_another_scope_is_not() -> None:
    params, twins = parameters(), parameters()
    opt = MFAC(params, num_grads=4, scope="parameter")
    step(opt, params, list(gradients(params, 0)))
    for name, scope in (("group", "parameter"), ("parameter", "group")):
        other = MFAC(twins, num_grads=4, scope=name)
        source = MFAC(params, num_grads=4, scope=scope)
        step(source, params, list(gradients(params, 0)))
        other.load_state_dict(source.state_dict())
        step(other, twins, list(gradients(twins, 1)))
    opt.param_groups[0]["scope"] = "group"
    with pytest.raises(ValueError, match="4 of the 4 parameters of a group keep what a window shares"):
        step(opt, params, list(gradients(params, 1)))
