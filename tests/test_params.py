"""Who goes where: by module, not by number of dimensions, unless the caller says otherwise."""

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, param_groups
from tests.small_model import WAYS


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
    text = param_groups(Model(tied=True), rank=4, update_proj_gap=50, weight_decay=0.1).describe()
    assert "matrices: 6 parameters, 2,304 elements (role=matrix, rank=4, update_proj_gap=50, weight_decay=0.1)" in text
    assert "    layers.*.q.weight (16×16), 3 of them" in text
    assert "embeddings [AdamW]: 1 parameters, 800 elements (role=embedding, weight_decay=0.1)" in text
    assert "vectors [AdamW]: 11 parameters, 216 elements (role=vector, weight_decay=0.0)" in text
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


def test_describe_names_what_no_optimizer_would_project():
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    lines = param_groups(model, rank={"0": 4, "1": 16}).describe().splitlines()
    assert "    0.weight (64×16)" in lines
    assert "    1.weight (16×64) [not projected: rank 16 does not make it smaller]" in lines
    # whether 15 of 16 pays depends on what an optimizer keeps, and the optimizer's own rank is not known here
    for rank in (15, 0.9, 1.0, None):
        assert "not projected" not in param_groups(model, rank=rank).describe()
    assert "not projected" not in param_groups(model, rank=16, split={"0": 2, "1": 2}).describe()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))]
)
def test_the_head_of_a_wrapped_model_is_its_head(wrap):
    """`classifier` is one at the top of a model only, and a wrapper puts a name before it."""
    found = {group["role"]: [name for name, _ in group["params"]] for group in param_groups(wrap(Classifier()))}
    assert [name.split(".")[-2] for name in found["head"]] == ["classifier"]
    assert [name.split(".")[-2] for name in found["matrix"]] == ["body"]


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


# what real models are made of


class Encoder(nn.Module):
    """torch's own transformer: attention with query, key and value in one matrix, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(40, 16)
        self.positions = nn.Parameter(torch.zeros(1, 8, 16))
        layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.lm_head = nn.Linear(16, 40)
        self.lm_head.weight = self.tokens.weight

    def forward(self, x):
        return self.lm_head(self.body(self.tokens(x) + self.positions))


class Conv1D(nn.Module):
    """GPT-2's transposed Linear, known by its name."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class GPT2(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(40, 16), nn.Embedding(8, 16)
        self.h = nn.ModuleList(
            nn.ModuleDict({"ln_1": nn.LayerNorm(16), "c_attn": Conv1D(48, 16), "c_proj": Conv1D(16, 16)})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(16, 40, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x):
        x = self.wte(x) + self.wpe(torch.arange(8))
        for block in self.h:
            q, k, v = block["c_attn"](block["ln_1"](x)).chunk(3, -1)
            x = x + block["c_proj"](nn.functional.scaled_dot_product_attention(q, k, v))
        return self.lm_head(x)


class Experts(nn.Module):
    """All experts of a layer as 3-D parameters, their biases as matrices."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.1 * torch.randn(4, 16, 48))
        self.gate_up_bias = nn.Parameter(torch.zeros(4, 48))
        self.down_proj = nn.Parameter(0.1 * torch.randn(4, 24, 16))

    def forward(self, x, weights):
        gate, up = (torch.einsum("btd,edf->betf", x, self.gate_up_proj) + self.gate_up_bias[:, None]).chunk(2, -1)
        return torch.einsum("betf,efd,bte->btd", gate.sigmoid() * up, self.down_proj, weights)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.router = nn.Linear(16, 4, bias=False)
        self.experts = Experts()
        self.expert_conv = nn.Conv1d(16, 16, 3, padding=1)
        self.output = nn.Linear(16, 40)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.experts(x, self.router(x).softmax(-1))
        return self.output(x + self.expert_conv(x.mT).mT)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.features = nn.Sequential(
            nn.Conv1d(16, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU(), nn.ConvTranspose1d(32, 16, 3, padding=1)
        )
        self.classifier = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 40))

    def forward(self, x):
        return self.classifier(self.features(self.embed(x).mT).mT)


ARCHITECTURES = {
    "encoder": (Encoder, {"roles": {r"in_proj": "matrix"}, "split": {r"in_proj": 3}}),
    "gpt2": (GPT2, {"rank": 4}),
    "mixture": (Mixture, {"stacked": r"^experts\.", "roles": {r"experts\..*bias$": "vector"}}),
    "conv_net": (ConvNet, {"targets": r"^features|^classifier\.0", "rank": 0.25, "weight_decay": 0.1}),
}
ROLES = {"matrix", "embedding", "head", "other", "vector"}


def roles(groups):
    return {n: g["role"] for g in groups for n, _ in g["params"]}


@pytest.mark.parametrize(("make", "options"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_real_architectures_are_sorted_whole_and_train(make, options):
    model = make()
    groups = param_groups(model, **options)
    placed = [p for g in groups for _, p in g["params"]]
    assert len(placed) == len({id(p) for p in placed})
    assert {id(p) for p in placed} == {id(p) for p in model.parameters()}
    assert {g["role"] for g in groups} <= ROLES
    assert len({g["name"] for g in groups}) == len(groups)
    assert all(p.dim() > 1 for g in groups if g["role"] != "vector" for _, p in g["params"])
    lines = groups.describe().splitlines()
    for group in groups:
        mark = "" if group["role"] == "matrix" else " [AdamW]"
        assert any(line.startswith(f"{group['name']}{mark}: {len(group['params'])} parameters") for line in lines)
    opt = GaLoreAdamW(groups, lr=1e-2, rank=4)
    x = torch.randint(0, 40, (4, 8))
    losses = []
    for _ in range(15):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_every_group_says_its_role():
    got = roles(param_groups(Encoder()))
    layer = "body.layers.1."
    assert got["tokens.weight"] == "embedding"
    assert got["positions"] == got[layer + "self_attn.in_proj_weight"] == "other"
    assert {got[layer + k] for k in ("self_attn.out_proj.weight", "linear1.weight", "linear2.weight")} == {"matrix"}
    assert {got[layer + k] for k in ("self_attn.in_proj_bias", "norm1.weight", "linear1.bias")} == {"vector"}
    assert got["lm_head.bias"] == "vector"
    assert roles(param_groups(Model()))["lm_head.weight"] == "head"


def test_a_rank_that_is_not_given_is_left_to_the_optimizer():
    groups = param_groups(GPT2())
    assert [(g["role"], g.get("rank", "absent")) for g in groups] == [
        ("matrix", "absent"),
        ("embedding", None),
        ("vector", None),
    ]
    assert "matrices: 4 parameters, 2,048 elements (role=matrix)\n" in groups.describe()


@pytest.mark.parametrize(("given", "rank"), [({}, 128), ({"rank": 7}, 7), ({"rank": 0.5}, 0.5)])
def test_galore_fills_the_rank_of_matrix_groups_alone(given, rank):
    groups = param_groups(nn.Sequential(nn.Embedding(20, 300), nn.Linear(300, 300)))
    opt = GaLoreAdamW(groups.unnamed(), **given)
    assert ["basis" in opt.state[p] for g in opt.param_groups for p in g["params"]] == [True, False, False]
    assert [g["rank"] for g in opt.param_groups] == [rank, None, None]
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(300, 300))], "role": "matrix"})
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(300, 300))], "role": "head"})
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(300, 300))], "role": "matrix", "rank": None})
    assert [g["rank"] for g in opt.param_groups[3:]] == [rank, None, None]
    # galore-torch's groups say no role
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(300, 300))]})
    assert opt.param_groups[-1]["rank"] == given.get("rank")


def test_galore_refuses_a_role_that_does_not_exist():
    with pytest.raises(
        ValueError, match="Invalid role: 'matrx', must be one of matrix, embedding, head, other, vector"
    ):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4, 4))], "role": "matrx"}])


def test_a_decay_that_is_not_given_is_left_to_the_optimizer():
    groups = param_groups(Model())
    assert [g.get("weight_decay") for g in groups] == [None] * 4 + [0.0]
    opt = GaLoreAdamW(groups, weight_decay=0.3)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.3] * 4 + [0.0]


def test_roles_override_what_is_found_and_the_first_pattern_decides():
    given = {
        r"layers\.0\.q$": "other",
        r"layers\.\d\.q": "head",
        r"^scale$": "vector",
        r"mlp\.weight": "embedding",
        "embed": "matrix",
    }
    got = roles(param_groups(Model(), roles=given))
    assert [got[f"layers.{i}.q.weight"] for i in range(3)] == ["other", "head", "head"]
    assert got["scale"] == "vector"
    assert got["layers.0.mlp.weight"] == "embedding"
    assert got["embed.weight"] == "matrix"
    # nobody spoke of these
    assert got["lm_head.weight"] == "head"
    assert got["conv.weight"] == "other"


def test_a_bias_beside_its_matrix_stays_a_vector():
    got = roles(param_groups(Model(), roles={"mlp": "matrix", "^conv": "matrix"}))
    assert {got["layers.0.mlp.weight"], got["conv.weight"]} == {"matrix"}
    assert {got["layers.0.mlp.bias"], got["conv.bias"]} == {"vector"}


def test_a_tied_head_answers_to_both_names():
    for pattern in ("lm_head", "embed", r"lm_head\.weight$"):
        assert roles(param_groups(Model(tied=True), roles={pattern: "other"}))["embed.weight"] == "other"


def test_automatic_roles_may_be_asked_for():
    assert param_groups(model := Model(), roles="auto").describe() == param_groups(model).describe()


@pytest.mark.parametrize("split", [3, [16, 16, 16], (16, 32)])
def test_a_split_makes_a_group_of_its_own(split):
    groups = param_groups(Encoder(), rank=4, roles={"in_proj": "matrix"}, split={"in_proj_weight$": split})
    by_split = {g.get("split"): [n for n, _ in g["params"]] for g in groups if g["role"] == "matrix"}
    kept = split if split == 3 else tuple(split)
    assert by_split[kept] == [f"body.layers.{i}.self_attn.in_proj_weight" for i in range(2)]
    assert len(by_split[None]) == 6
    assert f"matrices (rank 4, split {kept}): 2 parameters" in groups.describe()


def test_the_first_split_that_is_found_decides():
    groups = param_groups(Model(), split={r"layers\.0\.q": 4, r"\.q$": 2})
    assert {n: g.get("split") for g in groups if g["role"] == "matrix" for n, _ in g["params"] if ".q" in n} == {
        "layers.0.q.weight": 4,
        "layers.1.q.weight": 2,
        "layers.2.q.weight": 2,
    }


def test_stacked_experts_are_batches_of_matrices():
    groups = param_groups(Mixture(), stacked="expert")
    stacks = [g for g in groups if g.get("flatten") is False]
    assert [(g["role"], [n for n, _ in g["params"]]) for g in stacks] == [
        ("matrix", ["experts.gate_up_proj", "experts.down_proj"])
    ]
    # a matrix of biases is no stack, nor is a convolution, whatever it is called
    assert roles(groups)["experts.gate_up_bias"] == roles(groups)["expert_conv.weight"] == "other"
    assert all("flatten" not in g for g in groups if g is not stacks[0])
    # their own rows and columns are what a rank is short of, not the number of experts
    assert "    experts.down_proj (4×24×16)\n" in param_groups(Mixture(), stacked="experts", rank=4).describe()
    # without the option nothing says that they are matrices
    assert roles(param_groups(Mixture()))["experts.down_proj"] == "other"
    assert not any("flatten" in g for g in param_groups(Mixture(), roles={"experts": "matrix"}))


def test_the_weight_of_a_norm_is_no_stack():
    model = nn.Sequential(nn.LayerNorm([2, 8, 8]), Experts())
    got = roles(param_groups(model, stacked=r"^\d"))
    assert got["0.weight"] == got["0.bias"] == "vector"
    assert got["1.down_proj"] == "matrix"


def test_a_split_of_stacked_experts_cuts_the_rows_of_each():
    groups = param_groups(Mixture(), stacked="experts", split={"down_proj": [8, 16]})
    assert [g["split"] for g in groups if "split" in g] == [(8, 16)]
    with pytest.raises(ValueError, match=r"for experts.down_proj: 5, must be a number that divides its 24 rows"):
        param_groups(Mixture(), stacked="experts", split={"down_proj": 5})


def test_a_targeted_convolution_is_one_matrix():
    groups = param_groups(ConvNet(), targets="^features")
    matrices = [g for g in groups if g["role"] == "matrix"]
    assert [n for n, _ in matrices[0]["params"]] == ["features.0.weight", "features.3.weight"]
    assert len(matrices) == 1
    assert "flatten" not in matrices[0]
    assert {n for n, role in roles(groups).items() if role == "vector"} >= {"features.1.weight", "features.1.bias"}


def test_options_go_to_matrices_and_those_of_the_fallback_to_the_rest():
    options = {"momentum": 0.9, "ns_steps": 3, "method": "gram", "residual": None, "state_dtype": "int8", "gamma": 2.0}
    groups = param_groups(Model(), **options, fallback_betas=(0.8, 0.9), fallback_eps=1e-6)
    for group in groups:
        if group["role"] == "matrix":
            assert group.items() >= options.items()
            assert not {"fallback_betas", "fallback_eps"} & group.keys()
        else:
            assert not options.keys() & group.keys()
            assert (group["fallback_betas"], group["fallback_eps"]) == ((0.8, 0.9), 1e-6)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Model, {"roles": {"attn": "matrix"}}, "roles: no trainable parameter's or its module's name matches 'attn'"),
        (Model, {"roles": {"q": "matrix", r"\.q$": "other"}}, r"roles: .* matches .* or an earlier pattern takes all"),
        (
            Model,
            {"roles": {"mlp": "matrx"}},
            r"roles\['mlp'\]: 'matrx', must be one of matrix, embedding, head, other, v",
        ),
        (Model, {"roles": "matrix"}, "roles: 'matrix', must be 'auto' or a mapping"),
        (
            Model,
            {"roles": {r"norm$": "matrix"}},
            "roles.*: 'matrix', must be 'vector': it names vectors alone, such as",
        ),
        (Model, {"roles": {r"mlp\.bias": "other"}}, "roles.*: 'other', must be 'vector'.*such as layers.0.mlp.bias"),
        (Model, {"split": {"attn": 3}}, "split: no matrix's or its module's name matches 'attn'"),
        (Model, {"split": {"embed": 2}}, "split: no matrix's or its module's name matches 'embed'"),
        (Model, {"split": {"mlp": 3}}, r"split\['mlp'\] for layers.0.mlp.weight: 3, must be .* its 32 rows"),
        (Model, {"split": {"mlp": [16, 8]}}, r"layers.0.mlp.weight: \[16, 8\], .* sizes that add up to 32"),
        (Model, {"split": {"mlp": [40, -8]}}, r"layers.0.mlp.weight: \[40, -8\]"),
        (Model, {"split": {"mlp": 0}}, "layers.0.mlp.weight: 0"),
        (Model, {"split": {"mlp": True}}, "layers.0.mlp.weight: True"),
        (Model, {"split": {"mlp": "2"}}, "layers.0.mlp.weight: '2'"),
        (Model, {"split": {"mlp": 2.0}}, "layers.0.mlp.weight: 2.0"),
        (GPT2, {"split": {"c_attn": 3}}, "h.0.c_attn.weight: 3, must not name a Conv1D.*blocks of columns"),
        (Model, {"stacked": "experts"}, "stacked: no batch of matrices.* matches 'experts'"),
        (Model, {"stacked": "conv"}, "stacked: no batch of matrices"),
        (Mixture, {"stacked": "gate_up_bias"}, "stacked: no batch of matrices"),
        (Model, {"ns_step": 4}, "unknown option 'ns_step': did you mean 'ns_steps'"),
    ],
)
def test_what_cannot_be_is_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        param_groups(make(), **options)


@pytest.mark.parametrize("way", WAYS)
def test_every_number_of_every_class_may_be_given_to_the_matrices(way):
    """Under its own name, and no other group has it."""
    model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 8), nn.LayerNorm(8))
    # `fallback_lr` is no group's, but fills the `lr` of some
    options = {key: value for key, value in way.options.items() if key != "fallback_lr"}
    groups = param_groups(model, **options)
    opt = way.kind(groups)
    for key, value in options.items():
        assert opt.param_groups[0][key] == value
        if key not in ("rank", "weight_decay"):
            assert all(key not in group for group in groups[1:])
    # what the optimizer is given says the same of the matrix
    (matrix,), alike = opt.param_groups[0]["params"], way(param_groups(model))
    kept = [{name: (v.shape, v.dtype) for name, v in one.state[matrix].items()} for one in (opt, alike)]
    assert kept[0] == kept[1]
