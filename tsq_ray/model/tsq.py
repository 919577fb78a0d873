"""The Temporal Saliency Query network (paper, section 3): which frames does each category ask for?

Shapes: B videos, T frames, C classes, D dims of an input (Dv visual, Dt textual), d' dims inside a module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_POSITION_RMS = math.sqrt(0.5)
"""Root mean square of a sinusoidal positional embedding."""


@dataclass(frozen=True)
class TSQShape:
    """All that is needed to build a TSQNet; plain values, so `dataclasses.asdict` of it goes into bundle.json."""

    num_classes: int
    """C."""
    visual_dim: int = 1280
    """Dv, dims of a frame's visual feature (MobileNetV2: 1280)."""
    text_dim: int = 768
    """Dt, dims of the text embeddings (BERT: 768)."""
    dim_visual: int = 512
    """d' of the visual query module."""
    dim_textual: int = 256
    """d' of the textual query module."""
    dropout: float = 0.1
    """Dropout in training."""
    swap_values: Literal["input", "projected"] = "input"
    """What swap attention gathers: X after the conv, as equation 3 prints it, or X W_v."""
    modules: Literal["both", "visual"] = "both"
    """VQM and TQM, or the paper's VQM-only."""


@dataclass
class TSQOutput:
    """Coarse predictions z and saliencies A of one batch; what was not computed is None.

    The swap logits exist in training mode only; everything textual is None without a TQM or without text features.
    """

    logits_visual: Tensor
    """z^v, [B, C]."""
    attention_visual: Tensor
    """A^v, [B, C, T]; each row sums to 1."""
    logits_textual: Tensor | None = None
    """z^t, [B, C]."""
    attention_textual: Tensor | None = None
    """A^t, [B, C, T]."""
    logits_t2v: Tensor | None = None
    """Of the visual frames gathered with A^t, [B, C]; A^t is not detached (equation 3)."""
    logits_v2t: Tensor | None = None
    """Of the textual frames gathered with A^v, [B, C]; A^v is detached (table A.2: VQM does not feel beta)."""


class TSQBranch(nn.Module):
    """One query module: reduction d -> d', TSQ layer, class-specific classifier (equations 1 and 2).

    The layer is Query2Label's decoder block with one head, without self-attention and without the queries in the residual:

        Q = conv(E) W_q,  K = (conv(X) + P) W_k,  V = conv(X) W_v,  A = softmax(Q K^T / sqrt(d')),  R = A V
        R' = norm(dropout(R W_o));  R^ = norm(R' + dropout(FFN(R')));  z_c = W_c . R^_c + b_c

    P is the sinusoidal positional embedding, on the keys only; FFN has one hidden ReLU layer of d' units. The projections Q, W_o and
    the two of the FFN are the 4 C d'^2 multiply-adds that the paper's 0.36 G (VQM) and 0.10 G (TQM) need. A 1D convolution of
    kernel 1 is one linear map at each position; E and X share it: section 3.2 adds *a* convolution "to E and X" (the cost is
    the same either way).
    """

    folded_queries: Tensor | None

    def __init__(self, num_classes: int, in_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.embeddings = nn.Parameter(torch.empty(num_classes, in_dim))
        self.conv = nn.Linear(in_dim, dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm_response = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, dim)
        self.ffn_out = nn.Linear(dim, dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.class_weight = nn.Parameter(torch.empty(num_classes, dim))
        self.class_bias = nn.Parameter(torch.zeros(num_classes))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("folded_queries", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the projections; embeddings N(0, 1); classifier rows as a linear layer's. `balance` follows before training."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embeddings)
        bound = 1 / math.sqrt(self.dim)
        nn.init.uniform_(self.class_weight, -bound, bound)
        # a shift of all logits is nothing to softmax, and sigmoid starts at the share 1 / C instead of 1 / 2
        nn.init.constant_(self.class_bias, -math.log(len(self.class_bias)))

    def project(self, frames: Tensor) -> Tensor:
        """The convolution: [B, T, D] -> [B, T, d']."""
        return self.conv(frames.to(self.conv.weight.dtype))

    def attend(self, frames: Tensor) -> Tensor:
        """A [B, C, T] of projected frames [B, T, d'] (equation 1, left)."""
        queries = self.folded_queries if self.folded_queries is not None else self._queries()
        keys = self.key(frames + _positions(frames.shape[1], self.dim, frames))
        scores = F.linear(keys, queries).transpose(1, 2)
        return (scores / math.sqrt(self.dim)).softmax(dim=-1)

    def classify(self, attention: Tensor, values: Tensor) -> Tensor:
        """Logits [B, C] of the responses R = A V (equation 1, right, and 2); attention [B, C, T], values [B, T, d']."""
        response = self.norm_response(self.dropout(self.out(torch.bmm(self.dropout(attention), values))))
        hidden = self.ffn_out(self.dropout(F.relu(self.ffn_in(response))))
        response = self.norm_ffn(response + self.dropout(hidden))
        return torch.einsum("bcd,cd->bc", response, self.class_weight) + self.class_bias

    def _queries(self) -> Tensor:
        return self.query(self.conv(self.embeddings))

    @torch.no_grad()
    def fold(self) -> None:
        """Keep conv(E) W_q, which does not hang on the video."""
        self.folded_queries = self._queries()

    def unfold(self) -> None:
        """Compute the queries from E at each call again."""
        self.folded_queries = None

    def train(self, mode: bool = True) -> TSQBranch:
        """Training drops the folded queries: E is about to change."""
        if mode:
            self.unfold()
        return super().train(mode)


class TSQNet(nn.Module):
    """VQM and TQM with swap attention in training (paper, section 3.2)."""

    def __init__(self, shape: TSQShape) -> None:
        super().__init__()
        self.shape = shape
        self.visual = TSQBranch(shape.num_classes, shape.visual_dim, shape.dim_visual, shape.dropout)
        self.textual: TSQBranch | None = None
        if shape.modules == "both":
            self.textual = TSQBranch(shape.num_classes, shape.text_dim, shape.dim_textual, shape.dropout)

    @torch.no_grad()
    def set_embeddings(self, visual: Tensor | None, textual: Tensor | None) -> None:
        """Start E^v from prototypes [C, Dv] and E^t from the class names' text embeddings [C, Dt]; None leaves the random start.

        Both are in the space of the input features: the convolution projects them as it does the frames.
        """
        for branch, embeddings in ((self.visual, visual), (self.textual, textual)):
            if embeddings is None:
                continue
            assert branch is not None, "textual embeddings given to a VQM-only network"
            expected = tuple(branch.embeddings.shape)
            assert tuple(embeddings.shape) == expected, f"embeddings of shape {tuple(embeddings.shape)}, expected {expected}"
            branch.embeddings.copy_(embeddings)
            branch.unfold()

    @torch.no_grad()
    def balance(self, visual: Tensor, text: Tensor | None) -> None:
        """Start each module so that it attends by similarity, from frames such as these, [N, T, Dv] and [N, T, Dt].

        - The convolution centres the frames and makes them as large as the positional embedding. Features of different encoders
          differ in size by an order of magnitude and have a large mean in common. Where they come out larger, attention is sharp from the
          first step and stays where it happened to look; where smaller, it sees positions instead of frames.
        - W_k starts equal to W_q. With two independent random matrices a prototype is no more like its own frames than like others,
          whatever it was initialised with; so Q K^T starts as the similarity of query and frame.
        """
        for branch, frames in ((self.visual, visual), (self.textual, text)):
            if branch is None or frames is None:
                continue
            flat = frames.to(branch.conv.weight.dtype).flatten(0, -2)
            mean = flat.mean(0)
            size = ((flat - mean) @ branch.conv.weight.T).square().mean().sqrt()
            if size > 0:
                branch.conv.weight.mul_(_POSITION_RMS / size)
            branch.conv.bias.copy_(-(branch.conv.weight @ mean))
            branch.key.weight.copy_(branch.query.weight)
            branch.unfold()

    def forward(self, visual: Tensor, text: Tensor | None) -> TSQOutput:
        """Frames `visual` [B, T, Dv] and object embeddings `text` [B, T, Dt] -> logits and attention of both modules.

        In evaluation mode `text` may be None: then only the VQM runs.
        """
        frames_v = self.visual.project(visual)
        attention_v = self.visual.attend(frames_v)
        values_v = self.visual.value(frames_v)
        output = TSQOutput(self.visual.classify(attention_v, values_v), attention_v)
        if self.textual is None:
            return output
        if text is None:
            assert not self.training, "a network with a TQM trains on both features; text is None"
            return output
        frames_t = self.textual.project(text)
        attention_t = self.textual.attend(frames_t)
        values_t = self.textual.value(frames_t)
        output.logits_textual, output.attention_textual = self.textual.classify(attention_t, values_t), attention_t
        if self.training:
            as_printed = self.shape.swap_values == "input"
            output.logits_t2v = self.visual.classify(attention_t, frames_v if as_printed else values_v)
            output.logits_v2t = self.textual.classify(attention_v.detach(), frames_t if as_printed else values_t)
        return output

    def fold(self) -> None:
        """Compute each module's queries once, for inference (halves its cost); `train()` and new weights drop them.

        The state dict stays the same.
        """
        assert not self.training, "fold() is for inference: call eval() first"
        for branch in (self.visual, self.textual):
            if branch is not None:
                branch.fold()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; folded queries of the old weights are dropped."""
        for branch in (self.visual, self.textual):
            if branch is not None:
                branch.unfold()
        return super().load_state_dict(*args, **kwargs)


def object_embeddings(object_ids: Tensor, object_probs: Tensor, vocabulary: Tensor) -> Tensor:
    """X^t = O W with all but the kept objects zero: ids and probabilities [B, T, 10], vocabulary [1000, D] -> [B, T, D] (section 3.2)."""
    kept = object_ids.shape[-1]
    weights = object_probs.reshape(-1, kept).to(vocabulary.dtype)
    frames = F.embedding_bag(object_ids.reshape(-1, kept).long(), vocabulary, per_sample_weights=weights, mode="sum")
    return frames.reshape(*object_ids.shape[:-1], vocabulary.shape[1])


def _positions(num_frames: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoidal positional embedding [T, d'] (Vaswani et al. 2017, section 3.5), of `like`'s device and dtype."""
    position = torch.arange(num_frames, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    waves = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1)
    return waves.reshape(num_frames, -1)[:, :dim].to(like.dtype)
