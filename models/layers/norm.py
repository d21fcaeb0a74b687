"""RMSNorm as one autograd function: x and one scale per row are kept for backward, nothing else.

    y = x / sqrt(mean(x^2) + eps) * weight        statistics in fp32, whatever the dtype of x

torch's own rms_norm is made of small operations on CPU (measured: more than twice the cost of this one).
Letters: N rows, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_ND = x_ND.float()
        scale_N1 = torch.linalg.vector_norm(x32_ND, dim=-1, keepdim=True)
        scale_N1 = scale_N1.square_().div_(x_ND.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        # The product with the weight happens in the dtype of x, as in the released model.
        return (x32_ND * scale_N1).to(x_ND.dtype).mul_(weight_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        shape, size = x_ND.shape, x_ND.shape[-1]
        x_ND, grad_ND = x_ND.float().reshape(-1, size), grad_out_ND.float().reshape(-1, size)
        weight32_D, scale_N = weight_D.float(), scale_N1.flatten()
        # With u = x * scale: d weight = sum of grad * u; d x = scale * (grad * weight - u * mean(grad * weight * u)).
        product_ND = grad_ND * x_ND
        grad_weight_D = product_ND.t() @ scale_N
        along_N = (product_ND @ weight32_D).mul_(scale_N.pow(3)).div_(size)
        grad_x_ND = torch.mul(grad_ND, weight32_D, out=product_ND).mul_(scale_N.unsqueeze(1))
        grad_x_ND.addcmul_(x_ND, along_N.unsqueeze(1), value=-1)
        return grad_x_ND.view(shape).to(grad_out_ND.dtype), grad_weight_D.to(weight_D.dtype), None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        """`size` channels; `eps` is added to the mean square."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        """x [..., D] of any float dtype -> the same shape and dtype."""
        return _RMSNorm.apply(x_ND, self.weight, self.eps)
