import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from experiments.llama import Attention, Llama, LlamaConfig, rotary_table, rotate

CONFIGS = Path(__file__).parent.parent / "experiments" / "configs"
SMALL = LlamaConfig(vocab_size=31, dim=24, layers=2, heads=3, ffn_dim=40, max_len=16)

# millions of parameters: the names of GaLore's configurations, and LLaMA's own 6.74 billion for 7B
PUBLISHED = {
    "9m": 9.0,
    "20m": 19.5,
    "60m": 58,
    "100m": 100,
    "130m": 134,
    "250m": 247,
    "350m": 368,
    "1b": 1339,
    "3b": 2686,
    "7b": 6738,
}


def tokens_of(config: LlamaConfig, batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def read_config(name: str) -> LlamaConfig:
    return LlamaConfig(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"])


def test_no_position_sees_the_future() -> None:
    model, tokens = Llama(SMALL), tokens_of(SMALL)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % SMALL.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    # and every later position does see the change
    assert ((before[:, 7:] - after[:, 7:]).abs().amax(dim=-1) > 1e-6).all()


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64)
    cos, sin = rotary_table(64, 8, 10000.0, torch.device("cpu"))

    def score(at: int, seen_from: int) -> Tensor:
        return rotate(q, cos[at], sin[at]) @ rotate(k, cos[seen_from], sin[seen_from])

    torch.testing.assert_close(score(9, 4), score(52, 47), rtol=0, atol=1e-5)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-2
    torch.testing.assert_close(rotate(q, cos[33], sin[33]).norm(), q.norm(), rtol=1e-6, atol=0)


def test_attention_equals_the_formula_in_complex_numbers() -> None:
    config = LlamaConfig(dim=24, heads=3, rope_theta=100.0)
    attention = Attention(config).double()
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    cos, sin = rotary_table(5, 8, config.rope_theta, x.device)
    got = attention(x, cos, sin)[0].detach().numpy()

    weights = {
        name: getattr(attention, name).weight.detach().numpy() for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    turn = np.exp(1j * np.arange(5)[:, None] * config.rope_theta ** (-np.arange(4) / 4))
    heads = []
    for h in range(3):
        q, k, v = (x[0].numpy() @ weights[f"{name}_proj"][8 * h : 8 * h + 8].T for name in "qkv")
        zq, zk = ((a[:, :4] + 1j * a[:, 4:]) * turn for a in (q, k))
        mixed = np.zeros((5, 8))
        for t in range(5):
            scores = np.exp([(zq[t] * zk[s].conj()).sum().real / math.sqrt(8) for s in range(t + 1)])
            mixed[t] = scores @ v[: t + 1] / scores.sum()
        heads.append(mixed)
    want = np.concatenate(heads, axis=1) @ weights["o_proj"].T
    # the angles are float32 numbers, the rest is float64
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.peers
def test_logits_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers (extra `peers`)")
    model = Llama(SMALL)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=SMALL.vocab_size,
            hidden_size=SMALL.dim,
            intermediate_size=SMALL.ffn_dim,
            num_hidden_layers=SMALL.layers,
            num_attention_heads=SMALL.heads,
            rms_norm_eps=SMALL.norm_eps,
            tie_word_embeddings=False,
        )
    )
    renamed = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn.": "self_attn."}
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, other in renamed.items():
            name = name.replace(ours, other)
        weights[name if name.startswith("lm_head") else f"model.{name}"] = tensor
    theirs.load_state_dict(weights)
    tokens = tokens_of(SMALL)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = Llama(read_config(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], rel=0.01)


def test_every_model_file_is_one_of_ours_and_tiny_is_the_default() -> None:
    assert set(PUBLISHED) | {"tiny"} <= {file.stem for file in CONFIGS.glob("*.yaml")}
    assert read_config("tiny") == LlamaConfig()


def test_matrices_have_the_names_that_the_optimizer_groups_by() -> None:
    linears = {name for name, module in Llama(SMALL).named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {f"layers.{n}.attn.{p}_proj" for n in range(2) for p in "qkvo"}
    blocks |= {f"layers.{n}.mlp.{p}_proj" for n in range(2) for p in ("gate", "up", "down")}
    assert linears == blocks | {"lm_head"}
    assert all(p.ndim in (1, 2) for p in Llama(SMALL).parameters())


def test_a_new_model_predicts_all_tokens_equally() -> None:
    config = LlamaConfig()
    loss = Llama(config).loss(tokens_of(config, 4, 64), tokens_of(config, 4, 64, seed=1))
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    assert loss.dtype == torch.float32


def test_the_generator_decides_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        model = Llama(SMALL, torch.Generator().manual_seed(seed))
        return torch.nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    torch.manual_seed(5)
    one = Llama(SMALL).lm_head.weight
    torch.manual_seed(5)
    assert torch.equal(one, Llama(SMALL).lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_batch_is_learned_by_heart(dtype: torch.dtype) -> None:
    model = Llama(SMALL).to(dtype)
    tokens = tokens_of(SMALL, 4, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # from ln 31 = 3.4; a first token that starts two sequences differently cannot be known
    assert loss.item() < 0.3
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


def test_bfloat16_weights_keep_far_positions_apart() -> None:
    config = LlamaConfig(vocab_size=31, dim=24, layers=1, heads=3, ffn_dim=40, max_len=600)
    model, tokens = Llama(config), tokens_of(config, 1, 600)
    with torch.no_grad():
        exact, rounded = model(tokens), model.bfloat16()(tokens).float()
    # positions rounded to bfloat16 would be off by a whole turn here
    error = (exact - rounded)[:, 500:].norm() / exact[:, 500:].norm()
    assert error < 0.02


def test_tied_embeddings_are_one_tensor() -> None:
    model = Llama(LlamaConfig(tie_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    untied = sum(p.numel() for p in Llama(LlamaConfig()).parameters())
    assert untied - sum(p.numel() for p in model.parameters()) == 256 * 128


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 0}, "model.dim must be positive, got 0"),
        ({"norm_eps": float("nan")}, "model.norm_eps must be positive, got nan"),
        ({"dim": 100, "heads": 8}, r"model.dim=100 must be a multiple of 2 \* model.heads=16"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**wrong)


def test_a_sequence_longer_than_max_len_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence of 17 tokens is longer than model.max_len=16"):
        Llama(SMALL)(tokens_of(SMALL, 1, 17))
