"""Vision encoder: pixel patches to a quarter as many features in the decoder's width.

    pixels [P, X] --one matrix--> [P, V], + position grid resampled to each image
      --blocks: attention within a frame, 2-D rotary--> [P, V] --merger: 2 x 2 patches--> features [T, D]
                      \\--after the blocks in deepstack_visual_indexes: a merger each--> DeepStack features [T, D]

A frame is one temporal patch: two frames of video, or an image twice. Patches come in merge-block order, the four (at
merge size 2) of a feature side by side, so that merging is a view. Images of any size share a pack; no patch sees
another frame. Cost: 12 V^2 multiply-adds per patch and block, plus 2 V per patch that it sees; positions are two small
matrix products per image, however many frames it has.

Letters: P patches of all images, X values of a patch, V encoder width, H heads, C head_dim, S side of the position
grid, R rows and W columns of patches of an image, T features, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import VisionConfig
from models.layers.attention import Segments, attend, make_segments
from models.layers.rope import rotate
from models.layers.saving import Saves

Grid = tuple[int, int, int]  # frames, rows and columns, in patches
NORM_EPS, ROPE_THETA = 1e-6, 10_000.0


def num_vision_tokens(grid: Grid, merge: int = 2) -> int:
    """Features, and so placeholder tokens, of an image or a video of `grid` patches."""
    frames, rows, columns = grid
    return frames * (rows // merge) * (columns // merge)


class PatchProjection(nn.Conv3d):
    """A convolution without overlap on patches that are cut already: one matrix product."""

    def forward(self, pixels_PX: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[P, X], X = channels x frames x rows x columns -> [P, V]."""
        return F.linear(pixels_PX.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Pixels of a patch to the encoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = PatchProjection(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, pixels_PX: Tensor) -> Tensor:
        """[P, X] -> [P, V]."""
        return self.proj(pixels_PX)


class PositionGrid(nn.Module):
    """A learned square of positions, stretched over every image with its corners on the image's."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side, self.merge = round(config.num_position_embeddings**0.5), config.spatial_merge_size
        self.weight = nn.Parameter(torch.randn(config.num_position_embeddings, config.hidden_size))

    def forward(self, grids: Sequence[Grid]) -> Tensor:
        """Bilinear in fp32 -> [P, V], patches in merge-block order."""
        table_SSV = self.weight.float().view(self.side, self.side, -1)
        parts = [table_SSV[0, :0]]
        for frames, rows, columns in grids:
            rows_RSV = torch.tensordot(self._taps(rows), table_SSV, 1)
            grid_RWV = self._taps(columns) @ rows_RSV
            parts.append(merge_blocks(grid_RWV, self.merge).expand(frames, -1, -1).flatten(0, 1))
        return torch.cat(parts).to(self.weight.dtype)

    def _taps(self, length: int) -> Tensor:
        """Weights float32 [length, S]: each patch lies between two points of the grid, nearer ones weigh more."""
        steps = torch.arange(max(length, self.side), device=self.weight.device, dtype=torch.float32)
        place_L1 = (steps[:length] * (self.side - 1) / max(length - 1, 1)).unsqueeze(1)
        return (1 - (place_L1 - steps[: self.side]).abs()).clamp(min=0)


class VisionAttention(nn.Module):
    """Bidirectional attention within a frame."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_PV: Tensor, rotary: tuple[Tensor, Tensor], frames: Segments) -> Tensor:
        """[P, V] -> [P, V]."""
        q_PHC, k_PHC, v_PHC = self.qkv(x_PV).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        return self.proj(attend(rotate(q_PHC, *rotary), rotate(k_PHC, *rotary), v_PHC, frames, causal=False).flatten(1))


class VisionMLP(nn.Module):
    """Two layers with the tanh form of GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_PV: Tensor) -> Tensor:
        """[P, V] -> [P, V]."""
        return self.linear_fc2(F.gelu(self.linear_fc1(x_PV), approximate="tanh"))


class VisionBlock(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x_PV: Tensor, rotary: tuple[Tensor, Tensor], frames: Segments) -> Tensor:
        """[P, V] -> [P, V]."""
        x_PV = x_PV + self.attn(self.norm1(x_PV), rotary, frames)
        return x_PV + self.mlp(self.norm2(x_PV))


class PatchMerger(nn.Module):
    """A block of patches to one feature; DeepStack's mergers norm the whole block, the last one each patch."""

    def __init__(self, config: VisionConfig, norm_block: bool) -> None:
        super().__init__()
        self.patches = config.spatial_merge_size**2
        width = config.hidden_size * self.patches
        self.norm_block = norm_block
        self.ln_q = nn.LayerNorm(width if norm_block else config.hidden_size, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_hidden_size))

    def forward(self, x_PV: Tensor) -> Tensor:
        """[P, V] -> [T, D]."""
        block = len(x_PV) // self.patches, self.patches * x_PV.shape[1]
        return self.mlp(self.ln_q(x_PV.view(block)) if self.norm_block else self.ln_q(x_PV).view(block))


class VisionEncoder(Saves):
    """Images and videos of a batch to features in the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = PositionGrid(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, norm_block=False)
        self.merger_list = nn.ModuleList(PatchMerger(config, norm_block=True) for _ in config.deepstack_visual_indexes)

    def forward(self, pixels_PX: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pixels float [P, X] of images and videos end to end, `grids` patches each.

        Returns features [T, D], T = sum of `num_vision_tokens`, and DeepStack features, one [T, D] for each of
        `deepstack_visual_indexes`. No images at all are fine: results are empty and every parameter's gradient zero.
        Raises ValueError for grids that do not fit the pixels or the merge size.
        """
        self._check(pixels_PX, grids)
        x_PV = self.patch_embed(pixels_PX) + self.pos_embed(grids)
        rotary, frames = self._rotary(grids, x_PV), make_segments(_frame_lengths(grids), x_PV.device)
        mergers, deepstack = dict(zip(self.config.deepstack_visual_indexes, self.merger_list, strict=True)), []
        for index, block in enumerate(self.blocks):
            x_PV = self.saving.layer(partial(block, rotary=rotary, frames=frames), x_PV)
            if index in mergers:
                deepstack.append(mergers[index](x_PV))
        return self.merger(x_PV), tuple(deepstack)

    def _check(self, pixels_PX: Tensor, grids: Sequence[Grid]) -> None:
        merge = self.config.spatial_merge_size
        for frames, rows, columns in grids:
            if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
                raise ValueError(
                    f"grid {(frames, rows, columns)} must be of positive numbers of frames, rows and columns of "
                    f"patches, with rows and columns multiples of the merge size {merge}"
                )
        expected = sum(_frame_lengths(grids)), self.config.patch_dim
        if tuple(pixels_PX.shape) != expected:
            raise ValueError(
                f"pixels must be {expected}, patches of the {len(grids)} grids x values of a patch, "
                f"not {tuple(pixels_PX.shape)}"
            )

    def _rotary(self, grids: Sequence[Grid], x_PV: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and signed sin [P, C] in the dtype of x: half of the frequencies turn with the row, half with the column.

        Channels i and i + C/2 turn together, as in models/layers/rope.py.
        """
        pair = self.config.hidden_size // self.config.num_heads // 2
        exponent = torch.arange(0, pair, 2, device=x_PV.device, dtype=torch.float32) / pair
        merge, none = self.config.spatial_merge_size, torch.zeros(0, 2, device=x_PV.device)
        place_P2 = torch.cat([none, *(_places(grid, merge, x_PV.device) for grid in grids)])
        angle_PC = (place_P2.unsqueeze(2) / ROPE_THETA**exponent).flatten(1)
        cos_PC, sin_PC = angle_PC.cos(), angle_PC.sin()
        return torch.cat([cos_PC, cos_PC], 1).to(x_PV.dtype), torch.cat([-sin_PC, sin_PC], 1).to(x_PV.dtype)


def merge_blocks(x_RWV: Tensor, merge: int) -> Tensor:
    """Rows and columns of patches [R, W, V] -> [R W, V], block by block of merge x merge patches."""
    rows, columns, width = x_RWV.shape
    return x_RWV.view(rows // merge, merge, columns // merge, merge, width).transpose(1, 2).reshape(-1, width)


def _places(grid: Grid, merge: int, device: torch.device) -> Tensor:
    """Row and column of every patch, float32 [P, 2], in merge-block order."""
    frames, rows, columns = grid
    axes = (torch.arange(n, device=device, dtype=torch.float32) for n in (rows, columns))
    place_RW2 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return merge_blocks(place_RW2, merge).repeat(frames, 1)


def _frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches of every frame."""
    return [rows * columns for frames, rows, columns in grids for _ in range(frames)]
