"""Low-rank adapters (LoRA, arXiv:2106.09685) of linear maps and fused experts: the base is frozen, A and B learn.

    x --W (frozen)--------------> y        y = W x + scale B A x,  A [r, in] drawn, B [out, r] zero: the first step
    x --A--> [r] --B-- scale --> (+)       sees the base alone

A linear map keeps its name and its `weight`; beside it are `lora_A.weight` and `lora_B.weight`, as peft calls them. Of
fused experts each has an A and a B of its own, in two 3-D parameters: `gate_up_proj_lora_A` [E, r, D] and
`gate_up_proj_lora_B` [E, 2F, r], and the same of down_proj. They are applied to the rows of each expert, so the product
B A, as large as the experts, is never made. `delta` makes it, a range at a time, for who merges.

Cost beside the base: 2 r (in + out) FLOPs a row forward; kept for backward are x and the r values.

Letters: R rows sorted by expert, D hidden, E experts, F expert width, X and Y columns, K chosen experts per token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers.experts import Experts

A, B = "lora_A", "lora_B"
FUSED = ("gate_up_proj", "down_proj")


class LoraLinear(nn.Linear):
    """A linear map and its adapter."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        """Takes the parameters of `base` as they are."""
        device, dtype = base.weight.device, base.weight.dtype
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, scale
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return super().forward(input) + self.scale * self.lora_B(self.lora_A(input))


class LoraExperts(Experts):
    """All experts of a layer, and adapters of one or both of their fused parameters."""

    def __init__(self, base: Experts, names: Sequence[str], rank: int, scale: float) -> None:
        """Takes the parameters of `base` as they are; `names` of FUSED get an adapter."""
        nn.Module.__init__(self)
        self.num_experts, self.recompute, self.scale = base.num_experts, base.recompute, scale
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        for name in FUSED:
            weight_EYX = getattr(self, name)
            count, rows, columns = weight_EYX.shape
            for part, shape in ((A, (count, rank, columns)), (B, (count, rows, rank))):
                made = nn.Parameter(weight_EYX.new_empty(shape)) if name in names else None
                self.register_parameter(f"{name}_{part}", made)

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """As Experts.forward. With `recompute` only the inputs are kept for backward."""
        pairs = [getattr(self, f"{name}_{part}") for name in FUSED for part in (A, B)]
        arguments = x_TD, chosen_TK, weight_TK, self.gate_up_proj, self.down_proj, *pairs
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._run, *arguments, use_reentrant=False))
        return self._run(*arguments)

    def _run(
        self,
        x_TD: Tensor,
        chosen_TK: Tensor,
        weight_TK: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        *pairs: Tensor | None,
    ) -> Tensor:
        order_R = chosen_TK.flatten().argsort(stable=True)
        inverse_R = torch.empty_like(order_R).index_copy_(0, order_R, torch.arange(len(order_R), device=x_TD.device))
        counts_E = torch.bincount(chosen_TK.flatten(), minlength=self.num_experts)
        x_RD = x_TD.index_select(0, order_R // chosen_TK.shape[1])
        gate_RF, up_RF = self._map(x_RD, gate_up_EGD, pairs[0], pairs[1], counts_E).chunk(2, -1)
        weight_R1 = weight_TK.flatten().index_select(0, order_R).unsqueeze(1).to(x_TD.dtype)
        out_RD = self._map(F.silu(gate_RF) * up_RF * weight_R1, down_EDF, pairs[2], pairs[3], counts_E)
        return out_RD.index_select(0, inverse_R).view(*chosen_TK.shape, x_TD.shape[1]).sum(1)

    def _map(self, x_RX: Tensor, base_EYX: Tensor, a: Tensor | None, b: Tensor | None, counts_E: Tensor) -> Tensor:
        """Each expert's rows through its matrix and its adapter: [R, X] -> [R, Y]."""
        y_RY = grouped(x_RX, base_EYX, counts_E)
        return y_RY if a is None or b is None else y_RY + self.scale * grouped(grouped(x_RX, a, counts_E), b, counts_E)


def grouped(x_RX: Tensor, weight_EYX: Tensor, counts_E: Tensor) -> Tensor:
    """Rows sorted by expert, `counts_E` for each, times the transposed matrix of their expert: [R, Y].

    torch's grouped GEMM, on GPUs, wants rows of whole 16 bytes: ranks that are multiples of 8 in bf16.
    """
    if x_RX.device.type == "cpu":
        parts = zip(x_RX.split(counts_E.tolist()), weight_EYX.unbind(0), strict=True)
        return torch.cat([F.linear(x, weight_YX) for x, weight_YX in parts])
    return F.grouped_mm(x_RX, weight_EYX.transpose(1, 2), offs=counts_E.cumsum(0).int())


def targets_of(model: nn.Module) -> Iterable[str]:
    """Everything that can have an adapter: linear maps by their module's name, fused experts by their parameter's."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name
        elif type(module) is Experts:
            yield from (f"{name}.{part}" for part in FUSED)


def add_lora(model: nn.Module, wanted: Callable[[str], bool], rank: int, scale: float) -> None:
    """Give adapters to the targets that are `wanted`, in place; their weights are unset until `init_lora`."""
    chosen = [name for name in targets_of(model) if wanted(name)]
    fused: dict[str, list[str]] = {}
    for name in chosen:
        stem, _, last = name.rpartition(".")
        if last in FUSED and isinstance(model.get_submodule(stem), Experts):
            fused.setdefault(stem, []).append(last)
        else:
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            _replace(model, name, LoraLinear(base, rank, scale))
    for name, parts in fused.items():
        base = model.get_submodule(name)
        assert isinstance(base, Experts)
        _replace(model, name, LoraExperts(base, parts, rank, scale))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_lora(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return name.endswith((f".{A}.weight", f".{B}.weight", *(f".{fused}_{part}" for fused in FUSED for part in (A, B))))


@torch.no_grad()
def init_lora(name: str, weight: Tensor, seed: int) -> None:
    """First values of one adapter parameter: of A uniform within 1 / sqrt(in), as peft draws it; of B zero."""
    if name.endswith((f"{B}.weight", f"_{B}")):
        weight.zero_()
        return
    digest = hashlib.sha256(f"{seed}/{name.removeprefix('thinker.')}".encode()).digest()
    generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(weight.shape[-1])
    weight.uniform_(-bound, bound, generator=generator)


def pair_of(target: str) -> tuple[str, str]:
    """Names of the parameters A and B of a target."""
    if target.rpartition(".")[2] in FUSED and ".experts." in target:
        return f"{target}_{A}", f"{target}_{B}"
    return f"{target}.{A}.weight", f"{target}.{B}.weight"


def delta(a_RX: Tensor, b_YR: Tensor, scale: float, start: int, length: int) -> Tensor:
    """Elements [start, start + length) of the flat matrix scale B A, [Y, X], fp32; whole rows of it are made."""
    columns = a_RX.shape[1]
    low, high = start // columns, -(-(start + length) // columns)
    rows = scale * (b_YR[low:high].float() @ a_RX.float())
    return rows.reshape(-1)[start - low * columns :][:length]
