"""Pruning by OBS: against dense solutions, on true quadratics, and masks that nothing revives."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import InverseFisher, Masks, Muon, OBSPruner, obs_prune, obs_scores, sparsity_schedule
from tests.reference import fisher_numpy, obs_numpy

DAMPING = 1e-2


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(d, m, block_size=None, seed=0, damping=DAMPING):
    """Return weights, F⁻¹ and the dense F of the same gradients."""
    grads, weights = draw(m, d, seed=seed), draw(d, seed=seed + 1)
    fisher = InverseFisher(d, m, damping, block_size=block_size, dtype=torch.float64)
    for grad in grads:
        fisher.push(grad)
    return weights, fisher, fisher_numpy.matrix(grads.numpy(), damping, m, block_size)


def expected(weights, dense, sparsity, joint, alive=None):
    """Return what obs_prune should, in NumPy."""
    alive = np.ones(len(weights), dtype=bool) if alive is None else alive
    scores = obs_numpy.scores(weights.numpy(), dense)
    pruned = obs_numpy.lowest(scores, round(sparsity * len(weights)), alive)
    change = (obs_numpy.joint if joint else obs_numpy.independent)(weights.numpy(), dense, pruned)
    return weights.numpy() + change, pruned


def quadratic(d=10, m=40):
    """Return a loss with its minimum at w, its Hessian F, and F⁻¹ from gradients where each residual is ±1."""
    x, w = draw(m, d, seed=3), draw(d, seed=4)

    def loss(v):
        return ((x @ (v - w)).square() / 2).mean() + DAMPING / 2 * (v - w).square().sum()

    fisher = InverseFisher(d, m, DAMPING, dtype=torch.float64)
    for row in x:
        at = torch.linalg.lstsq(row[None], torch.ones(1, 1, dtype=torch.float64)).solution[:, 0]
        at = (w + at).requires_grad_()
        fisher.push(torch.autograd.grad((row @ (at - w)).square() / 2, at)[0])
    return w, fisher, loss


def test_one_weight_on_a_true_quadratic():
    w, fisher, loss = quadratic()
    scores = obs_scores(w, fisher)
    for joint in (True, False):
        new, mask = obs_prune(w, fisher, 0.1, joint=joint)
        k = int(scores.argmin())
        assert new[k] == 0
        assert mask.tolist() == [i != k for i in range(10)]
        column = fisher.solve(torch.eye(10, dtype=torch.float64)[k])
        torch.testing.assert_close(new, (w - w[k] * column / column[k]) * mask)
        assert loss(new).item() == pytest.approx(scores[k].item(), rel=1e-9)
        assert loss(new) < loss(w * mask)


def test_the_joint_update_is_the_minimum_of_a_true_quadratic():
    w, fisher, loss = quadratic()
    new, mask = obs_prune(w, fisher, 0.5)
    v = (w * mask).requires_grad_()
    hessian = torch.autograd.functional.hessian(loss, v.detach())
    gradient = torch.autograd.grad(loss(v), v)[0]
    step = torch.linalg.solve(hessian[mask][:, mask], gradient[mask])
    torch.testing.assert_close(new[mask], v.detach()[mask] - step)
    assert loss(new) < loss(obs_prune(w, fisher, 0.5, joint=False)[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 20), st.floats(0, 0.99), st.sampled_from([None, 1, 3, 7]), st.integers(0, 99))
def test_both_updates_are_the_dense_ones(d, m, sparsity, block_size, seed):
    weights, fisher, dense = problem(d, m, block_size, seed)
    rises = []
    for joint in (True, False):
        new, mask = obs_prune(weights, fisher, sparsity, joint=joint)
        want, pruned = expected(weights, dense, sparsity, joint)
        assert np.flatnonzero(~mask.numpy()).tolist() == pruned.tolist()
        assert (new[~mask] == 0).all()
        np.testing.assert_allclose(new.numpy(), want, rtol=1e-7, atol=1e-8)
        rises.append(obs_numpy.rise((new - weights).numpy(), dense))
    assert rises[0] <= rises[1] * (1 + 1e-9) + 1e-12
    # stationary: what F says of the kept is zero
    best = obs_prune(weights, fisher, sparsity)[0].numpy() - weights.numpy()
    kept = np.setdiff1d(np.arange(d), pruned)
    assert np.abs((dense @ best)[kept]).max(initial=0) <= 1e-9 * max(1.0, np.abs(dense).max() * np.abs(best).max())


def test_where_the_two_differ():
    # two weights that make up for each other: alone either costs little, both cost much
    fisher = InverseFisher(3, 2, 1e-6, dtype=torch.float64)
    fisher.push(torch.tensor([1.0, 1.0, 0.2]))
    fisher.push(torch.tensor([0.0, 0.0, 1.0]))
    weights = torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64)
    dense = fisher_numpy.matrix(np.array([[1.0, 1.0, 0.2], [0.0, 0.0, 1.0]]), 1e-6, 2)
    one, other = (obs_prune(weights, fisher, 2 / 3, joint=joint)[0] for joint in (True, False))
    rises = [obs_numpy.rise((new - weights).numpy(), dense) for new in (one, other)]
    assert rises[0] < 0.97 * rises[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.floats(0, 0.999), st.floats(0, 1), st.integers(0, 99))
def test_counts_are_exact_and_what_was_pruned_stays(d, sparsity, before, seed):
    weights, fisher, _ = problem(d, 4, seed=seed)
    alive = draw(d, seed=seed + 7).argsort() >= round(before * d)
    new, mask = obs_prune(weights, fisher, sparsity, mask=alive)
    assert int((~mask).sum()) == max(round(sparsity * d), int((~alive).sum()))
    assert not (mask & ~alive).any()
    assert (new[~mask] == 0).all()


def test_masked_weights_take_no_part():
    d, m = 12, 9
    alive = torch.arange(d) % 3 > 0
    grads, weights = draw(m, d) * alive, draw(d, seed=1) * alive
    whole = InverseFisher(d, m, DAMPING, dtype=torch.float64)
    part = InverseFisher(int(alive.sum()), m, DAMPING, dtype=torch.float64)
    for grad in grads:
        whole.push(grad)
        part.push(grad[alive])
    for joint in (True, False):
        new, mask = obs_prune(weights, whole, 8 / 12, mask=alive, joint=joint)
        less, kept = obs_prune(weights[alive], part, 4 / 8, joint=joint)
        torch.testing.assert_close(new[alive], less)
        assert torch.equal(mask[alive], kept)


def test_what_was_pruned_stays_out_of_the_joint_update_whatever_its_gradients():
    weights, fisher, dense = problem(12, 9)
    alive = torch.arange(12) % 3 > 0
    new, mask = obs_prune(weights, fisher, 8 / 12, mask=alive)
    kept, gone = np.flatnonzero(mask), np.flatnonzero(alive & ~mask)
    want = weights.numpy() * mask.numpy()
    want[kept] += np.linalg.solve(dense[np.ix_(kept, kept)], dense[np.ix_(kept, gone)] @ weights.numpy()[gone])
    np.testing.assert_allclose(new.numpy(), want, rtol=1e-9, atol=1e-12)


def test_ties_go_to_the_first():
    fisher = InverseFisher(6, 1, 1.0)
    _, mask = obs_prune(torch.tensor([2.0, -1.0, 1.0, 1.0, -1.0, 2.0]), fisher, 0.5)
    assert mask.tolist() == [True, False, False, False, True, True]


def test_what_was_pruned_counts_before_weights_that_are_zero_by_themselves():
    fisher = InverseFisher(4, 1, 1.0)
    alive = torch.tensor([True, True, True, False])
    assert torch.equal(obs_prune(torch.tensor([0.0, 1.0, 2.0, 0.0]), fisher, 0.25, mask=alive)[1], alive)
    model = net()
    nn.init.zeros_(model[0].weight)
    pruner = OBSPruner(matrices(model), 12)
    last = torch.arange(64).view(4, 16) != 63
    pruner.masks.narrow_({"2.weight": last})
    pruner.prune(losses_of(model), 2 / 192, recomputations=1)
    assert pruner.masks.sparsity == 2 / 192
    assert torch.equal(pruner.masks.state_dict()["2.weight"], last)


def test_without_gradients_it_is_magnitude_pruning():
    weights = draw(30, seed=2)
    for fisher in (InverseFisher(30, 4), InverseFisher(30, 4)):
        new, mask = obs_prune(weights, fisher, 0.4)
        keep = weights.abs() > weights.abs().sort().values[11]
        assert torch.equal(mask, keep)
        torch.testing.assert_close(new, weights * keep)
        fisher.push(torch.zeros(30))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 5)])
def test_patterns_of_matrices(n, m):
    weights, fisher, dense = problem(6 * 2 * m, 5)
    for joint in (True, False):
        new, mask = obs_prune(weights.view(6, 2 * m), fisher, pattern=(n, m), joint=joint)
        scores = obs_numpy.scores(weights.numpy(), dense).reshape(6, 2 * m)
        assert mask.tolist() == obs_numpy.pattern(scores, n, m).tolist()
        assert new.shape == (6, 2 * m)
        assert (new[~mask] == 0).all()


def test_patterns_of_other_shapes_go_along_the_input_dimension():
    weights, fisher, _ = problem(3 * 8 * 2 * 5, 5)
    _, mask = obs_prune(weights.view(3, 8, 2, 5), fisher, pattern=(2, 4))
    assert (mask.view(3, 2, 4, 2, 5).sum(2) == 2).all()
    weights, fisher, _ = problem(8, 5)
    assert obs_prune(weights, fisher, pattern=(1, 4))[1].view(2, 4).sum(1).tolist() == [1, 1]


def test_less_than_a_pattern_is_on_the_way_to_it():
    weights, fisher, _ = problem(48, 5)
    mask = torch.ones(6, 8, dtype=torch.bool)
    matrix = weights.view(6, 8)
    whole = obs_prune(matrix, fisher, pattern=(2, 4))[1]
    for sparsity in (0.1, 0.3, 0.5):
        _, mask = obs_prune(matrix, fisher, sparsity, mask=mask, pattern=(2, 4))
        assert int((~mask).sum()) == round(48 * sparsity)
        # of the same scores the same weights
        assert (mask | ~whole).all()
    assert torch.equal(mask, whole)


def test_a_mask_that_is_sparser_than_the_pattern_stays():
    weights, fisher, _ = problem(8, 3)
    alive = torch.tensor([[False] * 4, [True] * 4])
    _, mask = obs_prune(weights.view(2, 4), fisher, pattern=(2, 4), mask=alive)
    assert mask.sum(1).tolist() == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_inputs_are_left_alone(dtype):
    weights, fisher, _ = problem(20, 5)
    weights = weights.to(dtype)
    before = weights.clone()
    new, mask = obs_prune(weights, fisher, 0.5)
    assert new.dtype == dtype
    assert mask.dtype == torch.bool
    assert torch.equal(weights, before)


def test_a_weight_that_the_data_decide_has_a_finite_score():
    # 1 − λ[F⁻¹] is 0 to the last digit
    fisher = InverseFisher(2, 1, 1e-18)
    fisher.push(torch.tensor([1e3, 0.0]))
    new, mask = obs_prune(torch.tensor([1e-9, 1.0]), fisher, 0.5)
    assert torch.isfinite(new).all()
    assert torch.isfinite(obs_scores(torch.ones(2), fisher)).all()
    assert int(mask.sum()) == 1


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def matrices(model):
    return [(name, p) for name, p in model.named_parameters() if p.dim() > 1]


def losses_of(model, count=12, size=4):
    def losses():
        for i in range(count):
            x = draw(size, 8, seed=i).float()
            yield nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))

    return losses


def zeros(model):
    return sum(int((p == 0).sum()) for _, p in matrices(model))


def backward(model, seed=0):
    x = draw(16, 8, seed=seed).float()
    nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()


@pytest.mark.parametrize("joint", [True, False])
def test_a_round_of_the_pruner_is_obs_prune_on_all_weights(joint):
    model = net()
    params = [p for _, p in matrices(model)]
    fisher = InverseFisher(192, 12, 1e-3, dtype=torch.float64)
    for loss in losses_of(model)():
        fisher.push(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
    flat = torch.cat([p.detach().flatten() for p in params])
    new, mask = obs_prune(flat, fisher, 0.7, joint=joint)
    pruner = OBSPruner(matrices(model), 12, 1e-3, joint=joint, dtype=torch.float64)
    pruner.prune(losses_of(model), 0.7, recomputations=1)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in params]), new)
    assert torch.equal(torch.cat([m.flatten() for m in pruner.masks.state_dict().values()]), mask)


@pytest.mark.parametrize("options", [{}, {"block_size": 50}, {"joint": False}, {"dtype": torch.bfloat16}])
def test_the_pruner_reaches_its_sparsity_and_touches_nothing_else(options):
    model = net()
    before = copy.deepcopy(model)
    pruner = OBSPruner(matrices(model), 12, **options)
    with torch.no_grad():
        pruner.prune(losses_of(model), 0.9, recomputations=4)
    assert zeros(model) == round(0.9 * 192)
    assert pruner.masks.sparsity == round(0.9 * 192) / 192
    assert torch.equal(model[0].bias, before[0].bias)
    assert all(p.grad is None for p in model.parameters())
    pruner.prune(losses_of(model), 0.5)
    assert zeros(model) == round(0.9 * 192)


def test_rounds_lose_less_than_magnitudes():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(150):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()

    def loss(pruned):
        with torch.no_grad():
            return sum(float(x) for x in losses_of(pruned, 1, 500)())

    found = {}
    for name, count in (("magnitude", 0), ("obs", 64)):
        pruned = copy.deepcopy(model)
        pruner = OBSPruner(matrices(pruned), 64, 1e-5)
        draws = losses_of(pruned, count, 1) if count else lambda: [0 * pruned[0].weight.sum()]  # noqa: B023
        pruner.prune(draws, 0.6, recomputations=4)
        found[name] = loss(pruned)
    assert found["obs"] < 0.8 * found["magnitude"]


def test_pattern_in_rounds():
    model = net()
    pruner = OBSPruner(matrices(model), 12, pattern=(2, 4))
    pruner.prune(losses_of(model), recomputations=3)
    for _, p in matrices(model):
        assert ((p != 0).view(-1, 4).sum(1) == 2).all()


def test_fewer_gradients_than_the_window_and_none_that_is_finite():
    model = net()
    pruner = OBSPruner(matrices(model), 1000)
    pruner.prune(losses_of(model, 3), 0.5, recomputations=2)
    assert zeros(model) == 96
    # which say nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="Invalid losses: .* must be at least one loss with a finite gradient"):
            pruner.prune(lambda: [model[0].weight.sum() * float("nan")], 0.75, recomputations=1)
    assert zeros(model) == 96
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(ValueError, match="Invalid losses: .* must be at least one loss"):
        pruner.prune(lambda: [], 0.9)


@pytest.mark.parametrize("joint", [True, False])
def test_a_window_that_counts_its_gradients_may_be_larger(joint):
    found = []
    for num_grads in (12, 40):
        model = net()
        pruner = OBSPruner(matrices(model), num_grads, 1e-3, joint=joint, divisor="count", dtype=torch.float64)
        pruner.prune(losses_of(model), 0.7, recomputations=2)
        found.append(torch.cat([p.detach().flatten() for _, p in matrices(model)]))
    torch.testing.assert_close(found[0], found[1])


def test_no_loss_is_asked_for_that_is_not_used():
    model, asked = net(), []

    def losses():
        for loss in losses_of(model)():
            asked.append(loss)
            yield loss

    OBSPruner(matrices(model), 5).prune(losses, 0.7, recomputations=3)
    assert len(asked) == 3 * 5


def optimizers(model, name):
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)]
    others = [p for p in model.parameters() if p.dim() == 1]
    return [
        Muon([p for _, p in matrices(model)], lr=1e-2, weight_decay=0.1),
        torch.optim.SGD(others, 1e-2, momentum=0.9),
    ]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_masks_hold_through_training(name):
    model = net()
    opts = optimizers(model, name)
    # momentum from before the pruning would revive
    for step in range(3):
        backward(model, step)
        for opt in opts:
            opt.step()
    pruner = OBSPruner(matrices(model), 12)
    pruner.prune(losses_of(model), 0.8, recomputations=2)
    masks = {name: mask.clone() for name, mask in pruner.masks.state_dict().items()}
    handles = [pruner.masks.hold(opt) for opt in opts]
    before = model[0].weight.detach().clone()
    for step in range(5):
        backward(model, step)
        for opt in opts:
            opt.step()
        for key, p in matrices(model):
            assert (p[~masks[key]] == 0).all()
    assert not torch.equal(before, model[0].weight)
    for handle in handles:
        handle.remove()
    backward(model)
    for opt in opts:
        opt.step()
    assert zeros(model) < round(0.8 * 192)


def test_gradual_pruning_only_prunes_more():
    model = net()
    pruner = OBSPruner(matrices(model), 12)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    pruner.masks.hold(optimizer)
    last = 0
    for stage in sparsity_schedule(0.9, 4):
        pruner.prune(losses_of(model), stage, recomputations=1)
        backward(model)
        optimizer.step()
        assert zeros(model) == round(192 * stage) > last
        last = zeros(model)


def test_masks_resume():
    model = net()
    pruner = OBSPruner(matrices(model), 12)
    pruner.prune(losses_of(model), 0.8, recomputations=2)
    file = io.BytesIO()
    torch.save(pruner.masks.state_dict(), file)
    file.seek(0)
    other = net(1)
    masks = Masks(matrices(other))
    masks.load_state_dict(torch.load(file, weights_only=True))
    assert masks.sparsity == pruner.masks.sparsity
    for key, p in matrices(other):
        assert torch.equal(p == 0, ~pruner.masks.state_dict()[key])
    before = masks.state_dict()
    for bad in ({}, {**before, "x": before["0.weight"]}, {**before, "0.weight": before["2.weight"]}):
        with pytest.raises(ValueError, match="Invalid"):
            masks.load_state_dict(bad)
        assert all(torch.equal(mask, before[name]) for name, mask in masks.state_dict().items())


def test_schedules():
    assert sparsity_schedule(0.9, 1) == [0.9]
    np.testing.assert_allclose(sparsity_schedule(0.8, 2), [0.7, 0.8])
    np.testing.assert_allclose(sparsity_schedule(0.75, 2, "geometric"), [0.5, 0.75])
    np.testing.assert_allclose(sparsity_schedule(0.9, 3, "geometric", initial=0.2), 1 - 0.8 / 2 ** np.arange(1, 4))
    assert all(a < b for a, b in zip([0, *sparsity_schedule(0.98, 8)], sparsity_schedule(0.98, 8), strict=False))


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, float("nan"), True, "0.5", None])
def test_bad_sparsities(sparsity):
    weights, fisher, _ = problem(8, 3)
    model = net()
    for call in (
        lambda: obs_prune(weights, fisher, sparsity),
        lambda: sparsity_schedule(sparsity, 2),
        lambda: OBSPruner(matrices(model)).prune(losses_of(model), sparsity),
    ):
        with pytest.raises(ValueError, match=rf"Invalid sparsity: {sparsity!r}, must be a number in \[0, 1\)"):
            call()


@pytest.mark.parametrize("pattern", [(4, 4), (0, 4), (2, 3.0), 4, (1, 2, 3), [2, 4], (True, 4), (-1, 2)])
def test_bad_patterns(pattern):
    weights, fisher, _ = problem(8, 3)
    with pytest.raises(ValueError, match=r"Invalid pattern: .*, must be \(n, m\), ints with 1 <= n < m"):
        obs_prune(weights, fisher, pattern=pattern)
    with pytest.raises(ValueError, match="Invalid pattern"):
        OBSPruner(matrices(net()), pattern=pattern)


def test_bad_arguments():
    weights, fisher, _ = problem(8, 3)
    model = net()
    for call, message in (
        (lambda: obs_prune(weights[:7], fisher, 0.5), r"weights: \(7,\), must be 8 numbers"),
        (lambda: obs_scores(weights[:7], fisher), r"weights: \(7,\), must be 8 numbers"),
        (lambda: obs_prune(weights, fisher, 0.5, mask=torch.ones(8)), "mask: .*must be torch.bool"),
        (lambda: obs_prune(weights, fisher, 0.5, mask=torch.ones(7, dtype=torch.bool)), r"mask: .*shape \(8,\)"),
        (lambda: obs_prune(weights, fisher, 0.6, pattern=(2, 4)), "sparsity: 0.6, must be at most the 0.5 of"),
        (lambda: obs_prune(weights.view(2, 4), fisher, pattern=(2, 3)), r"pattern: \(2, 3\), .*3 divides the input"),
        (lambda: obs_prune(torch.ones(()), InverseFisher(1), pattern=(1, 2)), "pattern: .*input dimension"),
        (lambda: OBSPruner(matrices(model), pattern=(1, 3)), r"pattern: .*dimension of \(16, 8\)"),
        (lambda: OBSPruner([]), "named_params"),
        (lambda: OBSPruner(matrices(model), 0), "num_grads: 0, must be an int >= 1"),
        (lambda: OBSPruner(matrices(model), damping=0.0), "damping: 0.0, must be"),
        (lambda: OBSPruner(matrices(model), block_size=0), "block_size: 0, must be"),
        (lambda: OBSPruner(matrices(model), divisor="rows"), "divisor: 'rows', must be"),
        (lambda: OBSPruner(matrices(model), dtype=torch.float16), "dtype: torch.float16, must be"),
        (lambda: OBSPruner(matrices(model)).prune(losses_of(model), 0.5, recomputations=0), "recomputations: 0"),
        (lambda: Masks(matrices(model)).narrow_({"x": torch.ones(2)}), "masks: 'x', must be one of 0.weight"),
        (lambda: Masks(matrices(model)).narrow_({"0.weight": torch.ones(16, 8)}), "mask of 0.weight: .*torch.bool"),
        (lambda: sparsity_schedule(0.5, 0), "stages: 0, must be an int >= 1"),
        (lambda: sparsity_schedule(0.5, 2, "linear"), "kind: 'linear', must be one of cubic, geometric"),
        (lambda: sparsity_schedule(0.5, 2, initial=1.0), "initial: 1.0, must be a number"),
    ):
        with pytest.raises(ValueError, match=f"Invalid {message}"):
            call()
    assert zeros(model) == 0


def test_the_experiment_runs(tmp_path):
    pytest.importorskip("sklearn", reason="the digits ship with scikit-learn")
    from experiments.prune import main

    main(["--quick", "--results", str(tmp_path)])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert "M-FAC, joint update" in (tmp_path / "prune_digits.md").read_text()


def test_a_pattern_holds_where_masks_from_elsewhere_do_not_have_it():
    model = net()
    pruner = OBSPruner(matrices(model), 12, pattern=(2, 4))
    # as sparse as the pattern, and nothing like it
    pruner.masks.narrow_({name: torch.arange(p.numel()).view(p.shape) % 8 >= 4 for name, p in matrices(model)})
    assert pruner.masks.sparsity == 0.5
    pruner.prune(losses_of(model), recomputations=3)
    for _, p in matrices(model):
        assert ((p != 0).view(-1, 4).sum(1) <= 2).all()


def test_what_is_masked_outside_of_a_pattern_counts():
    fisher = InverseFisher(8, 1)
    weights, mask = torch.tensor([5.0, 5, 5, 1, 9, 9, 9, 9]), torch.tensor([False] * 3 + [True] * 5)
    new, mask = obs_prune(weights, fisher, 0.375, mask=mask, pattern=(2, 4))
    assert int((new == 0).sum()) == int((~mask).sum()) == 3


def test_a_sparsity_that_has_been_reached_asks_for_nothing_and_one_weight_stays():
    layer = nn.Linear(10, 1, bias=False)
    pruner = OBSPruner([("weight", layer.weight)], 4)
    asked = []

    def losses():
        for _ in range(4):
            # by the weights that are left
            asked.append(int((layer.weight == 0).sum()))
            yield layer(torch.randn(3, 10)).square().mean()

    pruner.prune(losses, 0.34, recomputations=2)
    count = len(asked)
    layer.weight.data += 1
    pruner.prune(losses, 0.34)
    assert len(asked) == count
    pruner.prune(losses, 0.99)
    assert set(asked[count : count + 4]) == {3}
    assert int((layer.weight != 0).sum()) == 1
