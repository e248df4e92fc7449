"""Masks that hold, what they refuse, and the schedules that lead to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import Masks, sparsity_schedule


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))


def some(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0, 0.999), st.floats(0, 0.999), st.integers(1, 30), st.sampled_from(["cubic", "geometric"]), st.booleans()
)
def test_schedules_go_from_one_end_to_the_other(one, other, stages, kind, swap):
    initial, sparsity = sorted((one, other), reverse=swap)
    found = sparsity_schedule(sparsity, stages, kind, initial=initial)
    assert len(found) == stages
    assert found[-1] == sparsity
    whole = [initial, *found]
    sign = -1 if swap else 1
    for i, (a, b) in enumerate(zip(whole, found, strict=False), 1):
        assert sign * (b - a) >= -1e-12
        share = i / stages
        left = (1 - initial) ** (1 - share) * (1 - sparsity) ** share
        cubic = sparsity + (initial - sparsity) * (1 - share) ** 3
        assert b == pytest.approx(cubic if kind == "cubic" else 1 - left, abs=1e-12)


def test_all_is_kept_at_first_and_masks_only_narrow():
    model = layers()
    before = [p.detach().clone() for p in model.parameters()]
    masks = Masks(model.named_parameters())
    assert list(masks.params) == ["0.weight", "1.weight"]
    masks.apply_()
    assert masks.sparsity == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    one, other = some(3, 4, seed=1), some(3, 4, seed=2)
    masks.narrow_({"0.weight": one})
    masks.narrow_({"0.weight": other})
    masks.narrow_({})
    assert torch.equal(masks.state_dict()["0.weight"], one & other)
    assert torch.equal(model[0].weight, before[0] * (one & other))
    assert torch.equal(model[1].weight, before[1])
    assert masks.sparsity == int((~(one & other)).sum()) / 18


def test_what_is_pruned_becomes_zero_whatever_it_was():
    model = layers()
    masks = Masks(model.named_parameters())
    mask = some(3, 4)
    masks.narrow_({"0.weight": mask})
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    masks.apply_()
    assert torch.equal(model[0].weight.isnan(), mask)
    assert (model[0].weight[~mask] == 0).all()


def test_a_state_is_not_changed_by_what_comes_later():
    model = layers()
    masks = Masks(model.named_parameters())
    masks.narrow_({"0.weight": some(3, 4, seed=1)})
    state = masks.state_dict()
    kept = {name: mask.clone() for name, mask in state.items()}
    masks.narrow_({"0.weight": some(3, 4, seed=2), "1.weight": some(2, 3)})
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_a_state_takes_the_place_of_what_there_is():
    model, other = layers(), layers()
    masks, sparser = Masks(model.named_parameters()), Masks(other.named_parameters())
    masks.narrow_({"0.weight": some(3, 4)})
    sparser.narrow_({"0.weight": some(3, 4, seed=1), "1.weight": torch.zeros(2, 3, dtype=torch.bool)})
    handle = sparser.hold(torch.optim.SGD(other.parameters(), 1.0))
    sparser.load_state_dict(masks.state_dict())
    assert sparser.sparsity == masks.sparsity
    handle.remove()
    # what was zero stays so, and may be trained again
    assert (other[1].weight == 0).all()
    # and the two share nothing
    sparser.narrow_({"1.weight": some(2, 3)})
    assert masks.state_dict()["1.weight"].all()


def test_a_held_optimizer_follows_masks_that_narrow_later():
    model = layers()
    masks = Masks(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masks.hold(optimizer)
    for mask in (some(3, 4, seed=1), some(3, 4, seed=2)):
        masks.narrow_({"0.weight": mask})
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4)).square().sum().backward()
            optimizer.step()
            assert torch.equal(model[0].weight != 0, masks.state_dict()["0.weight"])


def test_masks_follow_a_model_that_moves():
    model = layers()
    masks = Masks(model.named_parameters())
    masks.narrow_({"0.weight": some(3, 4)})
    # in the place of a GPU, to which `model.to` takes the data and leaves the parameter
    masks.params = {name: nn.Parameter(p.detach().to("meta")) for name, p in masks.params.items()}
    masks.apply_()
    assert {mask.device.type for mask in masks.state_dict().values()} == {"meta"}


def test_nothing_has_changed_where_masks_are_refused():
    model = layers()
    masks = Masks(model.named_parameters())
    before = [p.detach().clone() for p in model.parameters()]
    good = some(3, 4)
    for bad, message in (
        ({"0.weight": good, "1.weight": good[:2, :3], "2": good}, "masks: '2', must be one of 0.weight, 1.weight"),
        ({"0.weight": good, "1.weight": good}, r"mask of 1.weight: .*, must be torch.bool, of shape \(2, 3\)"),
        ({"0.weight": good, "1.weight": torch.zeros(2, 3)}, "mask of 1.weight: .*torch.float32.*, must be torch.bool"),
    ):
        for take in (masks.narrow_, masks.load_state_dict):
            with pytest.raises(ValueError, match=f"Invalid {message}"):
                take(bad)
        assert masks.sparsity == 0
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match=r"Invalid state_dict: \['0.weight'\], must be masks of"):
        masks.load_state_dict({"0.weight": good})


def test_parameters_that_masks_refuse():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for pairs in ([], [("empty", nn.Parameter(torch.ones(0, 3)))]):
        with pytest.raises(ValueError, match="Invalid named_params: .*, must be at least one weight"):
            Masks(pairs)
    for pairs in ([("a", p), ("a", q)], [("a", p), ("b", p)]):
        with pytest.raises(ValueError, match="Invalid named_params: .*, must be each parameter once"):
            Masks(pairs)
    assert Masks([("a", p), ("b", q)]).sparsity == 0
