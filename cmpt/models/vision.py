"""The packed vision tower: a pre-norm ViT as CLIP has it, over kept patches only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmpt.batch import PackedPatches
from cmpt.models.transformer import LayerNorm, Linear, Transformer
from cmpt.recipe.schema import Model


class VisionTower(nn.Module):
    """Kept patches -> one embedding per image.

    Every image gets its class token, with average pooling too; positions are those of the whole image, whatever is
    hidden.
    """

    def __init__(self, model: Model, image_size: int) -> None:
        super().__init__()
        tower = model.vision
        assert model.patch_size and model.embed_dim and tower.width
        side = image_size // model.patch_size
        self.grid = (side, side)
        self.patch_embedding = Linear(3 * model.patch_size**2, tower.width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(tower.width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + side * side, tower.width))
        self.ln_pre = LayerNorm(tower.width, tower.layer_norm_eps)
        self.transformer = Transformer(
            tower, causal=False, quick=model.quick_gelu, recompute=model.activation_checkpointing
        )
        self.ln_post = LayerNorm(tower.width, tower.layer_norm_eps)
        self.averages = tower.pooling == "average"
        self.proj = Linear(tower.width, model.embed_dim, bias=False)

    def forward(self, images: PackedPatches, dtype: torch.dtype) -> Tensor:
        """One embedding per packed image [sequences, E], in packed order, not normalised."""
        lengths = [length + 1 for length in images.lengths]  # the class token comes first
        sequences, device = len(lengths), images.patches_TP.device
        counts = torch.tensor(images.lengths, dtype=torch.int64, device=device)
        class_rows = torch.cumsum(counts + 1, 0) - (counts + 1)
        patches = len(images.position_T)
        sequence_T = torch.repeat_interleave(torch.arange(sequences, device=device), counts, output_size=patches)
        patch_rows = torch.arange(patches, device=device) + sequence_T + 1

        place = torch.zeros(patches + sequences, dtype=torch.int64, device=device)
        place[patch_rows] = images.position_T + 1
        table = self.positions(images.grid)
        table = torch.cat([table[:1] + self.class_embedding, table[1:]])  # row 0 is the class token's
        # Looked up in fp32: the gradient of a position is a sum over all images.
        x_TD = F.embedding(place, table).to(dtype)
        x_TD = x_TD.index_add(0, patch_rows, self.patch_embedding(images.patches_TP.to(dtype)))

        x_TD = self.transformer(self.ln_pre(x_TD), lengths)
        if not self.averages:
            return self.proj(self.ln_post(x_TD.index_select(0, class_rows)))
        patches_TD = self.ln_post(x_TD.index_select(0, patch_rows))
        patches_TD = patches_TD.to(torch.promote_types(dtype, torch.float32))  # summed over up to L patches
        sums_SD = patches_TD.new_zeros(sequences, patches_TD.shape[1]).index_add(0, sequence_T, patches_TD)
        return self.proj((sums_SD / counts[:, None]).to(dtype))

    def patch_embeddings(
        self, patches_BLP: Tensor, grid: tuple[int, int], dtype: torch.dtype, with_positions: bool
    ) -> Tensor:
        """What the tower makes of patches before its first block, multiplied in `dtype`: float32 [B, L, D]."""
        embeddings_BLD = (patches_BLP.to(dtype) @ self.patch_embedding.weight.to(dtype).T).float()
        return embeddings_BLD + self.positions(grid)[1:].float() if with_positions else embeddings_BLD

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of patches [1 + L, D]; another grid than its own by bicubic interpolation."""
        if grid == self.grid:
            return self.positional_embedding
        rows, columns = self.grid
        image = self.positional_embedding[1:].view(1, rows, columns, -1).permute(0, 3, 1, 2).float()
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
        patches = image.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1)
        return torch.cat([self.positional_embedding[:1], patches.to(self.positional_embedding.dtype)])
