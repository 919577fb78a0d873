"""The Temporal Saliency Query network (paper, section 3): the salient frames of each category.

Shapes: B videos, T frames, C classes, D dims of an input (Dv visual, Dt textual), d' dims inside a
module, H heads, Q queries (Q = C, or 1 with class-agnostic attention).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsq_ray.model.layers import TSQLayer

_POSITION_RMS = math.sqrt(0.5)
"""Root mean square of the sinusoidal positional embedding."""


@dataclass(frozen=True)
class TSQShape:
    """The hyperparameters of a TSQNet.

    Plain values, because bundle.json stores `dataclasses.asdict` of it.
    """

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
    """What swap attention gathers: X after the convolution, as printed in equation 3, or X W_v."""
    modules: Literal["both", "visual"] = "both"
    """VQM and TQM, or the paper's VQM-only variant."""
    attention: Literal["class-specific", "class-agnostic"] = "class-specific"
    """One query per category, or one query for all (table 7)."""
    classifier: Literal["class-specific", "shared"] = "class-specific"
    """One weight row per category, or one row for all responses (table 7)."""
    num_layers: int = 1
    """Number of consecutive decoder blocks (table A.5)."""
    num_heads: int = 1
    """H, attention heads; must divide d' of both modules (table A.5)."""
    self_attention: bool = False
    """Whether the queries attend to each other before they attend to the frames (table A.4)."""
    top_objects: int = 10
    """Objects per frame whose embeddings form its textual feature (table 9).

    The network itself does not use it.
    """

    @property
    def num_queries(self) -> int:
        """Q."""
        return 1 if self.attention == "class-agnostic" else self.num_classes


@dataclass
class TSQOutput:
    """Coarse predictions z and saliencies A of one batch; None for what was not computed.

    The swap logits exist in training mode only; everything textual is None without a TQM or without
    text features. A is that of the last layer, averaged over its heads.
    """

    logits_visual: Tensor
    """z^v, [B, C]."""
    attention_visual: Tensor
    """A^v, [B, Q, T]; each row sums to 1."""
    logits_textual: Tensor | None = None
    """z^t, [B, C]."""
    attention_textual: Tensor | None = None
    """A^t, [B, Q, T]."""
    logits_t2v: Tensor | None = None
    """From the visual frames gathered with A^t, [B, C]; A^t is not detached (equation 3)."""
    logits_v2t: Tensor | None = None
    """From the textual frames gathered with A^v, [B, C].

    A^v is detached (table A.2: beta does not affect the VQM).
    """


class _BranchOutput(NamedTuple):
    logits: Tensor
    """[B, C]."""
    attentions: list[Tensor]
    """[B * H, Q, T] of each layer."""
    values: list[Tensor]
    """X W_v [B, T, d'] of each layer."""


class TSQBranch(TSQLayer):
    """One query module: reduction D -> d', TSQ layer, classifier (equations 1 and 2).

    The module is its own first layer, so the parameters of the paper's only layer are the module's
    own `query`, `key`, ...; `further` holds any other layers. Queries and frames are
    conv(embeddings) and conv(features). The projections W_q and W_o and the two of the FFN are the
    4 C d'^2 multiply-adds implied by the paper's 0.36 G (VQM) and 0.10 G (TQM). A 1D convolution of
    kernel 1 is one linear map at each position. E and X share it, because section 3.2 adds *a*
    convolution "to E and X" (the cost is the same either way).

    The classifier is z_c = W_c . R^_c + b_c; with a shared row, W . R^_c + b_c; with the single
    response of class-agnostic attention, W_c . R^ + b_c.
    """

    folded_queries: Tensor | None
    folded_embeddings: Tensor | None

    def __init__(self, shape: TSQShape, in_dim: int, dim: int) -> None:
        possible = (shape.attention, shape.classifier) != ("class-agnostic", "shared")
        assert possible, "one response and one row give every class the same score"
        nn.Module.__init__(self)
        self.shape = shape
        self.embeddings = nn.Parameter(torch.empty(shape.num_queries, in_dim))
        self.conv = nn.Linear(in_dim, dim)
        block = dim, shape.num_heads, shape.dropout, shape.self_attention
        self._add_block(*block)
        self.further = nn.ModuleList(TSQLayer(*block) for _ in range(shape.num_layers - 1))
        self.class_weight = nn.Parameter(
            torch.empty(1 if shape.classifier == "shared" else shape.num_classes, dim)
        )
        self.class_bias = nn.Parameter(torch.zeros(shape.num_classes))
        self.register_buffer("folded_queries", None, persistent=False)
        self.register_buffer("folded_embeddings", None, persistent=False)
        self.reset_parameters()

    @property
    def layers(self) -> list[TSQLayer]:
        """All decoder blocks, in order."""
        return [self, *(layer for layer in self.further if isinstance(layer, TSQLayer))]

    def reset_parameters(self) -> None:
        """Initialise: Xavier projections, N(0, 1) embeddings, classifier rows like nn.Linear's.

        Training calls `TSQNet.balance` afterwards.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embeddings)
        bound = 1 / math.sqrt(self.dim)
        nn.init.uniform_(self.class_weight, -bound, bound)
        # softmax ignores a shift of all logits; sigmoid starts at about 1 / C instead of 1 / 2
        nn.init.constant_(self.class_bias, -math.log(len(self.class_bias)))

    def project(self, frames: Tensor) -> Tensor:
        """Apply the convolution: [B, T, D] -> [B, T, d']."""
        return self.conv(frames.to(self.conv.weight.dtype))

    def run(self, frames: Tensor) -> _BranchOutput:
        """Run all layers and the classifier on projected frames [B, T, d']."""
        response: Tensor | None = None
        attentions, values = [], []
        queries, embeddings = self._queries()
        for layer in self.layers:
            if response is not None:
                queries = layer.project_queries(embeddings + response)
            attentions.append(layer.attend(queries, frames))
            values.append(layer.value(frames))
            response = layer.respond(attentions[-1], values[-1], response)
        assert response is not None
        return _BranchOutput(self.classify(response), attentions, values)

    def run_with_attention(self, attentions: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """Return the logits [B, C] with another module's attention (equation 3).

        Args:
            attentions: [B * H, Q, T] of each layer of the other module.
            values: [B, T, d'] for each layer, gathered with that attention.
        """
        response: Tensor | None = None
        for layer, attention, gathered in zip(self.layers, attentions, values, strict=True):
            response = layer.respond(attention, gathered, response)
        assert response is not None
        return self.classify(response)

    def classify(self, response: Tensor) -> Tensor:
        """Return the logits [B, C] of the last layer's response [B, Q, d'] (equation 2)."""
        if self.shape.attention == "class-agnostic":
            return F.linear(response[:, 0], self.class_weight, self.class_bias)
        if self.shape.classifier == "shared":
            return F.linear(response, self.class_weight)[..., 0] + self.class_bias
        return torch.einsum("bcd,cd->bc", response, self.class_weight) + self.class_bias

    def saliency_map(self, attentions: Sequence[Tensor]) -> Tensor:
        """Return A [B, Q, T] of the last layer, averaged over the heads."""
        last = attentions[-1]
        return last if self.num_heads == 1 else last.unflatten(0, (-1, self.num_heads)).mean(1)

    def _queries(self) -> tuple[Tensor, Tensor]:
        """Return the projected queries of the first layer, and conv(E) for the further layers."""
        if self.folded_queries is not None and self.folded_embeddings is not None:
            return self.folded_queries, self.folded_embeddings
        embeddings = self.conv(self.embeddings)
        return self.project_queries(embeddings), embeddings

    @torch.no_grad()
    def fold(self) -> None:
        """Compute once what does not depend on the video."""
        self.folded_queries, self.folded_embeddings = self._queries()

    def unfold(self) -> None:
        """Compute the queries from E on every call again."""
        self.folded_queries = self.folded_embeddings = None

    def train(self, mode: bool = True) -> TSQBranch:
        """Set the mode; training drops the folded queries, because E is about to change."""
        if mode:
            self.unfold()
        return super().train(mode)


class TSQNet(nn.Module):
    """VQM and TQM, with swap attention in training (paper, section 3.2)."""

    def __init__(self, shape: TSQShape) -> None:
        super().__init__()
        self.shape = shape
        self.visual = TSQBranch(shape, shape.visual_dim, shape.dim_visual)
        self.textual: TSQBranch | None = None
        if shape.modules == "both":
            self.textual = TSQBranch(shape, shape.text_dim, shape.dim_textual)

    @torch.no_grad()
    def set_embeddings(self, visual: Tensor | None, textual: Tensor | None) -> None:
        """Initialise E^v with prototypes [C, Dv] and E^t with class name embeddings [C, Dt].

        None keeps the random start. Both are in the space of the input features, since the
        convolution projects them like the frames. The single query of class-agnostic attention
        starts at their mean.
        """
        for branch, embeddings in ((self.visual, visual), (self.textual, textual)):
            if embeddings is None:
                continue
            assert branch is not None, "textual embeddings given to a VQM-only network"
            expected = self.shape.num_classes, branch.embeddings.shape[1]
            assert tuple(embeddings.shape) == expected, (
                f"embeddings of shape {tuple(embeddings.shape)}, expected {expected}"
            )
            branch.embeddings.copy_(
                embeddings.mean(0, keepdim=True)
                if self.shape.attention == "class-agnostic"
                else embeddings
            )
            branch.unfold()

    @torch.no_grad()
    def balance(self, visual: Tensor, text: Tensor | None) -> None:
        """Initialise each module from sample frames, so that attention starts as similarity.

        `visual` is [N, T, Dv], `text` [N, T, Dt].

        - The convolution centres the frames and scales them to the size of the positional
          embedding. Features of different encoders differ in scale by an order of magnitude and
          share a large mean. Larger projections make attention sharp from the first step and keep
          it where it started; smaller ones let it see positions instead of frames.
        - W_k starts equal to W_q in every layer, so Q K^T starts as the similarity of query and
          frame. With two independent random matrices a prototype would be no more similar to its
          own frames than to others, whatever its initial value.
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
            for layer in branch.layers:
                layer.key.weight.copy_(layer.query.weight)
            branch.unfold()

    def forward(self, visual: Tensor, text: Tensor | None) -> TSQOutput:
        """Return logits and attention of both modules.

        Args:
            visual: frame features [B, T, Dv].
            text: object embeddings [B, T, Dt]; in evaluation mode None runs the VQM alone.
        """
        frames_v = self.visual.project(visual)
        visual_out = self.visual.run(frames_v)
        output = TSQOutput(visual_out.logits, self.visual.saliency_map(visual_out.attentions))
        if self.textual is None:
            return output
        if text is None:
            assert not self.training, "a network with a TQM trains on both features; text is None"
            return output
        frames_t = self.textual.project(text)
        text_out = self.textual.run(frames_t)
        output.logits_textual = text_out.logits
        output.attention_textual = self.textual.saliency_map(text_out.attentions)
        if self.training:
            as_printed, layers = self.shape.swap_values == "input", self.shape.num_layers
            output.logits_t2v = self.visual.run_with_attention(
                text_out.attentions, [frames_v] * layers if as_printed else visual_out.values
            )
            detached = [attention.detach() for attention in visual_out.attentions]
            output.logits_v2t = self.textual.run_with_attention(
                detached, [frames_t] * layers if as_printed else text_out.values
            )
        return output

    def fold(self) -> None:
        """Compute once, for inference, what does not depend on the video.

        This halves the cost of one layer. `train()` and loading weights drop the result. The state
        dict does not change.
        """
        assert not self.training, "fold() is for inference: call eval() first"
        for branch in (self.visual, self.textual):
            if branch is not None:
                branch.fold()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict and drop the queries folded with the old weights."""
        for branch in (self.visual, self.textual):
            if branch is not None:
                branch.unfold()
        return super().load_state_dict(*args, **kwargs)


def object_embeddings(object_ids: Tensor, object_probs: Tensor, vocabulary: Tensor) -> Tensor:
    """Return X^t = O W [B, T, D], with all but the kept objects zero in O (section 3.2).

    Args:
        object_ids: [B, T, n], the kept objects.
        object_probs: [B, T, n].
        vocabulary: W [1000, D].
    """
    kept = object_ids.shape[-1]
    ids, weights = (
        object_ids.reshape(-1, kept).long(),
        object_probs.reshape(-1, kept).to(vocabulary.dtype),
    )
    if kept * 8 > len(vocabulary):  # gathering this many rows is slower than the whole product
        frames = weights.new_zeros(len(ids), len(vocabulary)).scatter_(1, ids, weights) @ vocabulary
    else:
        frames = F.embedding_bag(ids, vocabulary, per_sample_weights=weights, mode="sum")
    return frames.reshape(*object_ids.shape[:-1], vocabulary.shape[1])
