"""The decoder block of the TSQ layer (paper, section 3.1; variants in appendix C.3).

Shapes: B videos, T frames, Q queries, H heads, d' dims inside a module.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TSQLayer(nn.Module):
    """One decoder block as in Query2Label; one head and no self-attention by default.

        A = softmax(Q W_q ((X + P) W_k)^T / sqrt(d' / H)),  R = A (X W_v)       (equation 1)
        R' = norm(R_before + dropout(R W_o));  R^ = norm(R' + dropout(FFN(R')))

    Each head works on its d' / H dims. P is the sinusoidal positional embedding, added to the keys
    only; FFN has one hidden ReLU layer of d' units. The queries Q of the first layer are the
    embeddings, which do not enter the residual: R_before is absent there. In a further layer
    R_before is the R^ of the previous layer, and Q is the embeddings + R_before. Self-attention
    replaces Q with norm(Q + SA(Q)). (Query2Label takes the values of SA from the responses so far,
    which are zero in the first layer: with the single layer of table A.4 no information would pass
    between queries.)
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, self_attention: bool) -> None:
        super().__init__()
        self._add_block(dim, num_heads, dropout, self_attention)

    def _add_block(self, dim: int, num_heads: int, dropout: float, self_attention: bool) -> None:
        assert dim % num_heads == 0, f"num_heads {num_heads} does not divide d' = {dim}"
        self.dim, self.num_heads = dim, num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm_response = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, dim)
        self.ffn_out = nn.Linear(dim, dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.mixer = SelfAttention(dim, num_heads, dropout) if self_attention else None

    def project_queries(self, queries: Tensor) -> Tensor:
        """Project queries [Q, d'] or [B, Q, d'] with W_q, after self-attention if present."""
        return self.query(self.mixer(queries) if self.mixer is not None else queries)

    def attend(self, queries: Tensor, frames: Tensor) -> Tensor:
        """Return the attention A [B * H, Q, T].

        Args:
            queries: projected, [Q, d'] (the same for every video) or [B, Q, d'].
            frames: [B, T, d'].
        """
        keys = self.key(frames + _positions(frames.shape[1], self.dim, frames))
        if queries.dim() == 2 and self.num_heads == 1:
            scores = F.linear(keys, queries).transpose(1, 2)
        else:
            queries = queries.expand(len(frames), -1, -1)
            scores = torch.bmm(
                _split_heads(queries, self.num_heads),
                _split_heads(keys, self.num_heads).transpose(1, 2),
            )
        return (scores / math.sqrt(self.dim // self.num_heads)).softmax(dim=-1)

    def respond(self, attention: Tensor, values: Tensor, before: Tensor | None) -> Tensor:
        """Return the response R^ [B, Q, d'].

        Args:
            attention: [B * H, Q, T].
            values: [B, T, d'].
            before: response of the previous layer; None in the first layer.
        """
        gathered = torch.bmm(self.dropout(attention), _split_heads(values, self.num_heads))
        response = self.dropout(self.out(_join_heads(gathered, self.num_heads)))
        response = self.norm_response(response if before is None else before + response)
        hidden = self.ffn_out(self.dropout(F.relu(self.ffn_in(response))))
        return self.norm_ffn(response + self.dropout(hidden))


class SelfAttention(nn.Module):
    """norm(Q + dropout(SA(Q))): each query gathers from similar queries (table A.4)."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor) -> Tensor:
        """Mix queries [Q, d'] or [B, Q, d']; the result has the same shape."""
        batch = queries if queries.dim() == 3 else queries[None]
        projected, keys, values = (
            _split_heads(layer(batch), self.num_heads)
            for layer in (self.query, self.key, self.value)
        )
        weights = (
            torch.bmm(projected, keys.transpose(1, 2)) / math.sqrt(projected.shape[2])
        ).softmax(dim=-1)
        mixed = self.out(_join_heads(torch.bmm(self.dropout(weights), values), self.num_heads))
        return self.norm(queries + self.dropout(mixed).reshape(queries.shape))


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, d'] -> [B * H, N, d' / H]; with one head, the same tensor."""
    return x if num_heads == 1 else x.unflatten(2, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def _join_heads(x: Tensor, num_heads: int) -> Tensor:
    """Invert `_split_heads`."""
    return x if num_heads == 1 else x.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


def _positions(num_frames: int, dim: int, like: Tensor) -> Tensor:
    """Return the sinusoidal positional embedding [T, d'] (Vaswani et al. 2017, section 3.5).

    Its device and dtype are those of `like`.
    """
    position = torch.arange(num_frames, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(
        torch.arange(0, dim, 2, device=like.device, dtype=torch.float32)
        * (-math.log(10000.0) / dim)
    )
    waves = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1)
    return waves.reshape(num_frames, -1)[:, :dim].to(like.dtype)
