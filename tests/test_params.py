"""Who goes where: by module, not by number of dimensions."""

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, param_groups


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 16, bias=False)
        self.mlp = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(16)


class Model(nn.Module):
    def __init__(self, *, tied=False):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.conv = nn.Conv2d(4, 8, 3)
        self.scale = nn.Parameter(torch.ones(3, 16))
        self.norm = nn.RMSNorm(16)
        self.lm_head = nn.Linear(16, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def names(groups):
    return {g["name"]: [n for n, _ in g["params"]] for g in groups}


def test_modules_decide():
    got = names(param_groups(Model(), rank=4))
    assert got["matrices"] == [f"layers.{i}.{k}.weight" for i in range(3) for k in ("q", "mlp")]
    assert got["embeddings"] == ["embed.weight"]
    assert got["heads"] == ["lm_head.weight"]
    assert got["other"] == ["scale", "conv.weight"]
    assert len(got["vectors"]) == 3 * 3 + 2  # mlp bias, norm weight and bias of each block; conv bias, norm weight


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = Model(tied=True)
    model.layers[0].q.weight.requires_grad_(False)
    groups = param_groups(model, rank=4)
    placed = [p for g in groups for _, p in g["params"]]
    assert len({id(p) for p in placed}) == len(placed)
    assert {id(p) for p in placed} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_tied_head_is_an_embedding():
    got = names(param_groups(Model(tied=True), rank=4))
    assert got["embeddings"] == ["embed.weight"]
    assert "heads" not in got


def test_a_head_that_a_model_declares_is_asked_for():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 20))
    model.get_output_embeddings = lambda: model[1]
    got = names(param_groups(model, rank=2))
    assert got["matrices"] == ["0.weight"]
    assert got["heads"] == ["1.weight"]


def test_a_regular_expression_chooses_modules():
    got = names(param_groups(Model(), rank=4, targets=r"\.q$|^conv$"))
    assert got["matrices"] == ["layers.0.q.weight", "layers.1.q.weight", "layers.2.q.weight", "conv.weight"]
    assert "layers.0.mlp.weight" in got["other"]


def test_a_callable_chooses_modules_and_may_take_embeddings():
    got = names(param_groups(Model(), rank=4, targets=lambda name, module: isinstance(module, nn.Embedding)))
    assert got["matrices"] == ["embed.weight"]


def test_ranks_by_module():
    groups = param_groups(Model(), rank={r"\.q$": 2, r"layers\.0": 0.5})
    assert {g["rank"]: [n for n, _ in g["params"]] for g in groups if g["rank"] is not None} == {
        2: [f"layers.{i}.q.weight" for i in range(3)],
        0.5: ["layers.0.mlp.weight"],
    }
    assert "layers.1.mlp.weight" in names(groups)["other"]
    opt = GaLoreAdamW(groups)
    shapes = {n: tuple(opt.state[p]["exp_avg"].shape) for g in groups for n, p in g["params"]}
    assert shapes["layers.0.q.weight"] == (16, 2)
    assert shapes["layers.0.mlp.weight"] == (32, 8)
    assert shapes["layers.1.mlp.weight"] == (32, 16)


def test_decay_spares_vectors_and_other_lr_spares_matrices():
    groups = param_groups(Model(), rank=4, weight_decay=0.1, other_lr=3e-3, scale=0.5)
    decay = {g["name"]: g["weight_decay"] for g in groups}
    assert decay == {"matrices": 0.1, "embeddings": 0.1, "heads": 0.1, "other": 0.1, "vectors": 0.0}
    opt = GaLoreAdamW(groups, lr=1e-2)
    assert [g["lr"] for g in opt.param_groups] == [1e-2] + [3e-3] * 4
    assert opt.param_groups[0]["scale"] == 0.5
    assert opt.param_groups[0]["param_names"][0] == "layers.0.q.weight"


def test_describe_says_who_went_where():
    text = param_groups(Model(tied=True), rank=4, update_proj_gap=50).describe()
    assert "matrices: 6 parameters, 2,304 elements (rank=4, update_proj_gap=50, weight_decay=0.0)" in text
    assert "    layers.*.q.weight (16×16), 3 of them" in text
    assert "embeddings [AdamW]: 1 parameters, 800 elements" in text
    assert "    layers.*.mlp.bias (32), 3 of them" in text


@pytest.mark.parametrize("make", [GaLoreAdamW, lambda g: torch.optim.AdamW([dict(x) for x in g])])
def test_groups_serve_again_after_an_optimizer_took_them(make):
    groups = param_groups(Model(), rank=4)
    before = groups.describe()
    make(groups)
    assert groups.describe() == before
    GaLoreAdamW(groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "attention"}, "targets='attention' matches no matrix"),
        ({"rank": {r"\.q$": 4, "attn": 8}}, "rank: no target's module name matches 'attn'"),
        ({"update_proj_gpa": 4}, "unknown option 'update_proj_gpa': did you mean 'update_proj_gap'"),
        ({"gap": 4}, "unknown option 'gap'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_a_misspelling(options, message):
    with pytest.raises(ValueError, match=message):
        param_groups(Model(), **options)


def test_rank_one_and_all_ranks_are_not_confused():
    groups = param_groups(Model(), rank={r"\.q$": 1, r"\.mlp$": 1.0})
    assert [(type(g["rank"]), g["rank"], len(g["params"])) for g in groups[:2]] == [(int, 1, 3), (float, 1.0, 3)]


def test_a_linear_called_norm_is_a_matrix():
    class NormalizedLinear(nn.Linear):
        pass

    assert names(param_groups(nn.Sequential(NormalizedLinear(8, 8)), rank=2))["matrices"] == ["0.weight"]


def test_a_rank_given_to_the_optimizer_does_not_reach_the_rest():
    model = Model()
    opt = GaLoreAdamW(param_groups(model, rank=4), rank=2)
    assert "basis" not in opt.state[model.embed.weight]
    assert opt.state[model.layers[0].q.weight]["basis"].shape == (4, 16)


def test_describe_names_what_a_rank_cannot_compress():
    text = param_groups(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)), rank={"0": 4, "1": 16}).describe()
    assert "0.weight (64×16)\n" in text
    assert "1.weight (16×64) [AdamW: rank 16 does not make it smaller]" in text


def test_a_compiled_model_is_routed_as_itself():
    model = Model()
    assert names(param_groups(torch.compile(model), rank=4, targets=r"^layers\.0"))["matrices"] == [
        "layers.0.q.weight",
        "layers.0.mlp.weight",
    ]


def test_groups_without_names_hold_the_same_parameters():
    model = Model()
    groups = param_groups(model, rank=4)
    bare = groups.unnamed()
    assert [[id(p) for p in g["params"]] for g in bare] == [[id(p) for _, p in g["params"]] for g in groups]
    assert [g["rank"] for g in bare] == [g["rank"] for g in groups]


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        param_groups(Model().requires_grad_(False))


def test_the_groups_train():
    model = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 64), nn.RMSNorm(64), nn.Linear(64, 20))
    opt = GaLoreAdamW(param_groups(model, rank=4, scale=1.0, update_proj_gap=10), lr=1e-2)
    x = torch.arange(20)
    losses = []
    for _ in range(80):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x.flip(0))
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
