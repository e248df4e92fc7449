"""Coefficients: published tables made again, safe ones let through, unsafe ones refused."""

import math

import pytest
import torch

from lowrank_optim import Muon, orthogonalize, polar_express_coefficients
from lowrank_optim.coefficients import REGISTRY, SAFETY, table

# published: the first eight of the paper for any number of steps, with its own cushion
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# published: five steps in use for speed runs
SPEED_RUN = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# published, each of them used somewhere: negative or infinite just above 1
UNSAFE = {
    "minimax without safety": (
        (8.4703, -25.1081, 18.6293),
        *polar_express_coefficients(5, safety=0.0, cushion=0.0)[1:],
    ),
    "cubic": tuple(
        (a, b, 0.0)
        for a, b in (
            (3.3656576, -3.3420992),
            (2.5744352, -1.4957376),
            (2.5368962, -1.4312570),
            (2.4418906, -1.2764040),
            (2.2230472, -0.9630650),
        )
    ),
    "rows scaled, without scaling them": ((4.0098, -7.0585, 2.4635),),
}


def composed(x, triples):
    for a, b, c in triples:
        x = x * (a + b * x**2 + c * x**4)
    return x


def test_the_generator_makes_the_published_sets():
    made = polar_express_coefficients(8, safety=0.0)
    for ours, theirs in zip(made, POLAR_EXPRESS, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    made = polar_express_coefficients(5, safety=0.02, cushion=0.02)
    for ours, theirs in zip(made, SPEED_RUN, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("lower", [1e-4, 1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_the_generator_is_minimax(steps, lower):
    """The error of the composition is the same at both ends of what it makes of [lower, 1]."""
    x = torch.logspace(math.log10(lower), 0, 20001, dtype=torch.float64)
    made = composed(x, polar_express_coefficients(steps, lower, safety=0.0, cushion=0.0))
    below, above = 1 - float(made.min()), float(made.max()) - 1
    assert below == pytest.approx(above, rel=1e-3, abs=1e-9)
    fewer = composed(x, polar_express_coefficients(steps + 1, lower, safety=0.0, cushion=0.0))
    assert (fewer - 1).abs().max() <= below + 1e-12


@pytest.mark.parametrize("name", list(REGISTRY))
def test_a_registered_table_is_what_it_says(name):
    entry = REGISTRY[name]
    assert entry.source
    x = torch.linspace(1e-4, 1 + SAFETY, 20001, dtype=torch.float64)
    made = composed(x, table(name))
    assert made.isfinite().all()
    assert (made > 0).all()
    inside = composed(torch.logspace(math.log10(3e-3), 0, 20001, dtype=torch.float64), table(name))
    assert (float(inside.min()), float(inside.max())) == pytest.approx(entry.output_range, abs=1e-3)


@pytest.mark.parametrize("triples", UNSAFE.values(), ids=UNSAFE)
def test_unsafe_sets_are_refused(triples):
    with pytest.raises(ValueError, match="Invalid coefficients: step"):
        table(triples)
    with pytest.raises(ValueError, match="Invalid coefficients: step"):
        orthogonalize(torch.eye(3), coefficients=triples)
    with pytest.raises(ValueError, match="Invalid coefficients: step"):
        Muon([torch.nn.Parameter(torch.eye(3))], ns_coefficients=triples, ns_steps=len(triples))


def test_a_set_that_grows_without_bound_is_refused():
    with pytest.raises(ValueError, match="Invalid coefficients"):
        table((3.0, 2.0, 1.0), 8)
    with pytest.raises(ValueError, match="must be positive"):
        table((-1.0, 2.0, 0.0))


def test_steps_cut_and_repeat():
    triple = (1.875, -1.25, 0.375)
    assert table(triple, 3) == (triple,) * 3
    assert table((triple, (2.0, -1.5, 0.5)), 4) == (triple, *[(2.0, -1.5, 0.5)] * 3)
    assert table("you", 2) == table("you")[:2]
    assert len(table("polar_express", 7)) == 7
    assert table([list(triple)], 1) == (triple,)


@pytest.mark.parametrize("values", [(), (1.0, 2.0), "nobody", ((1.0, math.nan, 0.0),), ((1.0,),)])
def test_what_is_no_set_is_named(values):
    with pytest.raises(ValueError, match="Invalid coefficients"):
        table(values)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_are_whole_and_positive(steps):
    with pytest.raises(ValueError, match="Invalid steps"):
        table("you", steps)


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 0), ("lower", 0.0), ("lower", 1.0), ("safety", -1.0), ("safety", math.inf), ("cushion", 1.0)],
)
def test_the_generator_names_what_is_out_of_range(key, value):
    options = {"steps": 3, key: value}
    with pytest.raises(ValueError, match=f"Invalid {key}: {value}"):
        polar_express_coefficients(**options)
