"""The packed text tower: a causal transformer over caption tokens, pooled at one of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmpt.batch import PackedText
from cmpt.models.transformer import LayerNorm, Linear, Transformer
from cmpt.recipe.schema import Model


class TextTower(nn.Module):
    """Caption tokens -> one embedding per caption.

    Causal attention makes the last token, end-of-text, the only one that has seen the whole caption; and it makes
    padding pointless: what open_clip computes at the end-of-text position of a padded caption is this, exactly.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        tower = model.text
        assert model.vocab_size and model.embed_dim and tower.width
        self.context_length = model.context_length
        self.token_embedding = nn.Embedding(model.vocab_size, tower.width)
        self.positional_embedding = nn.Parameter(torch.empty(model.context_length, tower.width))
        self.transformer = Transformer(
            tower, causal=True, quick=model.quick_gelu, recompute=model.activation_checkpointing
        )
        self.ln_final = LayerNorm(tower.width, tower.layer_norm_eps)
        self.at_largest_id = tower.pooling == "argmax"
        self.proj = Linear(tower.width, model.embed_dim, bias=False)

    def forward(self, text: PackedText, dtype: torch.dtype) -> Tensor:
        """One embedding per packed caption [sequences, E], in packed order, not normalised."""
        x_UD = self.token_embedding(text.ids_U) + F.embedding(text.position_U, self.positional_embedding)
        x_UD = self.transformer(x_UD.to(dtype), text.lengths)
        return self.proj(self.ln_final(x_UD.index_select(0, self._pooled_rows(text))))

    def _pooled_rows(self, text: PackedText) -> Tensor:
        """The row of each caption's pooled token: its end of text, or its first token with the largest id."""
        lengths = torch.tensor(text.lengths, dtype=torch.int64, device=text.ids_U.device)
        end_rows = torch.cumsum(lengths, 0) - 1
        if not self.at_largest_id:
            return end_rows
        captions = torch.arange(len(lengths), device=lengths.device)
        caption_U = torch.repeat_interleave(captions, lengths, output_size=len(text.ids_U))
        # One number that is largest for the largest id and, among equals, for the first place.
        key_U = text.ids_U * self.context_length + (self.context_length - 1 - text.position_U)
        largest = torch.zeros_like(lengths).scatter_reduce(0, caption_U, key_U, "amax")
        place = self.context_length - 1 - largest % self.context_length
        return end_rows - lengths + 1 + place
