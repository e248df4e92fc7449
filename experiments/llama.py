"""A LLaMA decoder, small enough to read in one go: RMSNorm, rotary positions, SwiGLU, causal attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a LLaMA model; the defaults are the `tiny` byte-level model of the default run.

    Args:
        vocab_size: Number of token ids. 256 for bytes.
        dim: Width of the residual stream, d.
        layers: Number of blocks.
        heads: Attention heads; `dim / heads` must be an even integer.
        ffn_dim: Width of the feed-forward part, f.
        max_len: Longest sequence that `forward` accepts.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Added to the mean square inside RMSNorm.
        tie_embeddings: Use the embedding matrix as the output head.

    Raises:
        ValueError: If a size is not positive or the heads do not divide `dim` into even parts.
    """

    vocab_size: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 4
    ffn_dim: int = 344
    max_len: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "ffn_dim", "max_len", "rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name} must be positive, got {getattr(self, name)}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"model.dim={self.dim} must be a multiple of 2 * model.heads={2 * self.heads}")


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, float32, each of shape (length, head_dim / 2)."""
    # computed where it is used: a buffer would be rounded by `model.bfloat16()` and positions would blur
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns feature pairs (j, j + D/2) of x (..., T, D) by the angles of their position."""
    # float32 at least: a bfloat16 result is then rounded once, not at every product and sum
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and no biases."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mixes x (B, T, d) over positions t' <= t."""
        # (B, T, d) -> (B, heads, T, d / heads)
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps each position of x (B, T, d) by itself."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then the feed-forward part, each on a normalized residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Adds both parts to x (B, T, d)."""
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The language model.

    Matrices start as normal with standard deviation 0.02, the two that write into the residual stream (`o_proj`,
    `down_proj`) smaller by sqrt(2 * layers), so that depth does not scale the stream.

    Args:
        config: The sizes.
        generator: Source of the initial weights; the seeded global generator if None.
    """

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws every weight anew, in the order of `named_parameters`."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
                continue
            writes_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * self.config.layers) if writes_stream else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predicts the next token at every position.

        Args:
            tokens: Ids, int64, (B, T) with T <= `max_len`.

        Returns:
            Logits (B, T, vocab_size) in the dtype of the weights.

        Raises:
            ValueError: If the sequence is longer than `max_len`.
        """
        length = tokens.shape[1]
        if length > self.config.max_len:
            raise ValueError(f"sequence of {length} tokens is longer than model.max_len={self.config.max_len}")
        cos, sin = rotary_table(length, self.config.dim // self.config.heads, self.config.rope_theta, tokens.device)
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x, cos, sin)
        return self.lm_head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per token, computed in float32, of targets (B, T) given tokens (B, T)."""
        logits = self(tokens).flatten(0, 1)
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())


class Objective(nn.Module):
    """The loss as a module's forward, which is what DistributedDataParallel and torch.compile wrap."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Nats per token of `targets` (B, T) given `tokens` (B, T)."""
        return self.model.loss(tokens, targets)
