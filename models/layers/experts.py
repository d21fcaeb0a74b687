"""SwiGLU experts over routed tokens: one function, the path chosen by device.

    tokens [T, D] --sort assignments by expert--> rows [T K, D] --GEMM, SwiGLU, GEMM per expert--> weighted sum [T, D]

* GPU: grouped_mm over all experts.
* CPU: one autograd function that walks blocks of consecutive experts (about 2,048 rows each), so that gathered rows,
  activation and scatter stay near the cache. The routing weight multiplies the activation [rows, F] and not the
  output [rows, D]: the output is never kept, and the gradient of the weight is a row sum. Kept for backward: x and,
  unless `recompute`, the pre-activations [T K, 2F]; recomputing them costs 2/9 more FLOPs.

No token is dropped and none is padded. An expert without tokens gets a zero gradient.

Letters: T tokens, D hidden, E experts, F expert width, K chosen experts per token, R rows = T K sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BLOCK_ROWS = 2048


def experts(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    *,
    recompute: bool = False,
) -> Tensor:
    """Weighted sum over each token's chosen experts.

    x [T, D] and the weights of the experts share a dtype; gate_up [E, 2F, D] holds the gate's rows first; chosen int64
    [T, K]; weight float [T, K]. Returns [T, D] in the dtype of x. `recompute` trades time for memory in backward.
    """
    if x_TD.device.type == "cpu":
        return _BlockExperts.apply(x_TD, gate_up_EGD, down_EDF, chosen_TK, weight_TK, recompute)
    arguments = x_TD, gate_up_EGD, down_EDF, chosen_TK, weight_TK
    return checkpoint(_grouped_experts, *arguments, use_reentrant=False) if recompute else _grouped_experts(*arguments)


def _grouped_experts(
    x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, chosen_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    order_R = chosen_TK.flatten().argsort(stable=True)
    inverse_R = torch.empty_like(order_R).index_copy_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    ends_E = torch.bincount(chosen_TK.flatten(), minlength=len(gate_up_EGD)).cumsum(0).int()
    x_RD = x_TD.index_select(0, order_R // chosen_TK.shape[1])
    gate_RF, up_RF = F.grouped_mm(x_RD, gate_up_EGD.transpose(1, 2), offs=ends_E).chunk(2, -1)
    weight_R1 = weight_TK.flatten().index_select(0, order_R).unsqueeze(1).to(x_TD.dtype)
    out_RD = F.grouped_mm(F.silu(gate_RF) * up_RF * weight_R1, down_EDF.transpose(1, 2), offs=ends_E)
    return out_RD.index_select(0, inverse_R).view(*chosen_TK.shape, -1).sum(1)


class _Block(NamedTuple):
    """Consecutive experts and their rows: experts[first:last], rows[start:stop], `sizes` rows for each."""

    first: int
    last: int
    start: int
    stop: int
    sizes: Sequence[int]


def _blocks(counts: Sequence[int]) -> list[_Block]:
    out, first, start, rows = [], 0, 0, 0
    for expert, count in enumerate(counts):
        if rows and rows + count > BLOCK_ROWS:
            out.append(_Block(first, expert, start, start + rows, counts[first:expert]))
            first, start, rows = expert, start + rows, 0
        rows += count
    return [*out, _Block(first, len(counts), start, start + rows, counts[first:])]


def _upcasts(x: Tensor) -> bool:
    """Whether fp32 GEMMs beat 16-bit ones: at twice the rate where the CPU lacks bf16 products, else at half."""
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return x.dtype in (torch.bfloat16, torch.float16) and not native


def _gemms(a_RX: Tensor, matrices: Iterable[Tensor], out_RY: Tensor, sizes: Sequence[int]) -> None:
    """out = a @ matrix, each matrix on its own run of rows."""
    for a, matrix, out in zip(a_RX.split(sizes), matrices, out_RY.split(sizes), strict=True):
        torch.mm(a, matrix, out=out)


def _gradients(a_RX: Tensor, b_RY: Tensor, outs: Sequence[Tensor], sizes: Sequence[int], upcast: bool) -> None:
    """out = a^T @ b for each run of rows: zero where the run is empty."""
    for a, b, out in zip(a_RX.t().split(sizes, 1), b_RY.split(sizes), outs, strict=True):
        if upcast:
            out.copy_(torch.mm(a, b))
        else:
            torch.mm(a, b, out=out)


class _Matrices:
    """Views of all experts' matrices, made in one call; upcast one at a time into a buffer where that is faster."""

    def __init__(self, matrices_EXY: Tensor, upcast: bool) -> None:
        self.all = matrices_EXY.unbind(0)
        self.buffer = torch.empty_like(self.all[0], dtype=torch.float32) if upcast else None

    def of(self, block: _Block) -> Iterable[Tensor]:
        matrices = self.all[block.first : block.last]
        return matrices if self.buffer is None else (self.buffer.copy_(matrix) for matrix in matrices)


class _BlockExperts(torch.autograd.Function):
    """The CPU path. All GEMMs of a block write into buffers made once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        chosen_TK: Tensor,
        weight_TK: Tensor,
        recompute: bool,
    ) -> Tensor:
        width, upcast, flat_R = down_EDF.shape[2], _upcasts(x_TD), chosen_TK.flatten()
        order_R = flat_R.argsort(stable=True)
        blocks = _blocks(torch.bincount(flat_R, minlength=len(gate_up_EGD)).tolist())
        x = x_TD.float() if upcast else x_TD
        token_R = order_R // chosen_TK.shape[1]
        weight_R1 = weight_TK.flatten().index_select(0, order_R).unsqueeze(1).to(x.dtype)
        most = max(block.stop - block.start for block in blocks)
        out_TD, y_RD, h_RG = torch.zeros_like(x), x.new_empty(most, x.shape[1]), x.new_empty(most, 2 * width)
        kept_RG = None if recompute else x_TD.new_empty(len(order_R), 2 * width)
        gate_up, down = (_Matrices(weights.transpose(1, 2), upcast) for weights in (gate_up_EGD, down_EDF))
        for block in blocks:
            rows, here = block.stop - block.start, slice(block.start, block.stop)
            h, y, token = h_RG[:rows], y_RD[:rows], token_R[here]
            if kept_RG is not None and not upcast:
                h = kept_RG[here]
            _gemms(x.index_select(0, token), gate_up.of(block), h, block.sizes)
            if kept_RG is not None and upcast:
                kept_RG[here] = h
            act_RF = F.silu(h[:, :width]).mul_(h[:, width:]).mul_(weight_R1[here])
            _gemms(act_RF, down.of(block), y, block.sizes)
            out_TD.index_add_(0, token, y)
        ctx.blocks, ctx.upcast, ctx.most = blocks, upcast, most
        ctx.save_for_backward(x_TD, gate_up_EGD, down_EDF, order_R.int(), weight_TK, kept_RG)
        return out_TD.to(x_TD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up_EGD, down_EDF, order_R, weight_TK, kept_RG = ctx.saved_tensors
        width, upcast, order_R = down_EDF.shape[2], ctx.upcast, order_R.long()
        x, grad_y = (x_TD.float(), grad_TD.float()) if upcast else (x_TD, grad_TD.contiguous())
        token_R = order_R // weight_TK.shape[1]
        weight_R1 = weight_TK.flatten().index_select(0, order_R).unsqueeze(1).to(x.dtype)
        grad_x_TD, grad_weight_R = torch.zeros_like(x), weight_R1.new_empty(len(order_R))
        grad_gate_up_EGD, grad_down_EDF = (  # frozen experts, as in stage 1, save a third of the GEMMs
            torch.empty_like(weights) if wanted else None
            for weights, wanted in zip((gate_up_EGD, down_EDF), ctx.needs_input_grad[1:3], strict=True)
        )
        gate_up, down = _Matrices(gate_up_EGD, upcast), _Matrices(down_EDF, upcast)
        gate_up_t = _Matrices(gate_up_EGD.transpose(1, 2), upcast)
        h_RG, grad_h_RG = (x.new_empty(ctx.most, 2 * width) for _ in range(2))
        grad_act_RF, grad_rows_RD = x.new_empty(ctx.most, width), x.new_empty(ctx.most, x.shape[1])
        for block in ctx.blocks:
            rows, here, ours = block.stop - block.start, slice(block.start, block.stop), slice(block.first, block.last)
            sizes, token, weight = block.sizes, token_R[here], weight_R1[here]
            x_RD, grad_y_RD = x.index_select(0, token), grad_y.index_select(0, token)
            grad_h, grad_act, grad_rows = grad_h_RG[:rows], grad_act_RF[:rows], grad_rows_RD[:rows]
            if kept_RG is None:
                h = h_RG[:rows]
                _gemms(x_RD, gate_up_t.of(block), h, sizes)
            else:
                h = kept_RG[here].to(x.dtype)
            _gemms(grad_y_RD, down.of(block), grad_act, sizes)
            gate, up = h[:, :width], h[:, width:]
            silu = F.silu(gate)
            act = silu * up
            torch.sum(grad_act * act, 1, out=grad_weight_R[here])
            act.mul_(weight)
            grad_act.mul_(weight)
            torch.mul(grad_act, silu, out=grad_h[:, width:])
            torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_h[:, :width])
            if grad_down_EDF is not None:
                _gradients(grad_y_RD, act, grad_down_EDF[ours].unbind(0), sizes, upcast)
            if grad_gate_up_EGD is not None:
                _gradients(grad_h, x_RD, grad_gate_up_EGD[ours].unbind(0), sizes, upcast)
            _gemms(grad_h, gate_up.of(block), grad_rows, sizes)
            grad_x_TD.index_add_(0, token, grad_rows)
        grad_weight_TK = torch.empty_like(grad_weight_R).index_copy_(0, order_R, grad_weight_R).view_as(weight_TK)
        grad_weight_TK = grad_weight_TK.to(weight_TK.dtype)
        return grad_x_TD.to(x_TD.dtype), grad_gate_up_EGD, grad_down_EDF, None, grad_weight_TK, None


class Experts(nn.Module):
    """All experts of a layer in two fused parameters; `recompute` saves memory in backward."""

    def __init__(self, num_experts: int, hidden_size: int, width: int, recompute: bool = False) -> None:
        super().__init__()
        self.num_experts, self.recompute = num_experts, recompute
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """x [T, D], chosen experts int64 [T, K] and their weights [T, K] -> [T, D]."""
        return experts(x_TD, self.gate_up_proj, self.down_proj, chosen_TK, weight_TK, recompute=self.recompute)
