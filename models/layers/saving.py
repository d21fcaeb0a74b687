"""What a stack of layers keeps from forward to backward, where a long pack makes that too much.

    layers     x --layer--> x'    of decoders and encoders: only x is kept; backward runs the layer again and has its
                                  activations for that long
    offload                       x waits in host memory, page-locked beside a GPU
    tiles      x --cut in n--> feed-forward block, or convolutions: of its activations those of one part exist

Recomputation is torch's (torch.utils.checkpoint, not reentrant), and so is the way to the host
(torch.autograd.graph.save_on_cpu). It does not stop early: sharded engines gather weights in a module's hooks and free
them in others, and experts of several ranks exchange tokens; all of it must run to its end, on every rank.

Cost: `layers` a forward more; `tiles` a forward of the block more, and under ZeRO-3 its weights are gathered for each
part. A part's activations are a share 1 / n of what the block would keep; the layer's own are not cut.

Letters: T tokens, D hidden, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


@dataclass(frozen=True)
class Saving:
    """What is done to keep less; by default nothing."""

    layers: bool = False
    """Keep a layer's input alone, and run the layer again in backward."""
    offload: bool = False
    """Keep those inputs in host memory."""
    tiles: int = 1
    """Parts in which a pack's tokens pass the feed-forward block, each run again in backward. A number, not a size, so
    that it is the same on every rank of a sharded engine."""

    def layer(self, run: Callable[[Tensor], Any], x_TD: Tensor) -> Any:
        """A layer as a function of its input [T, D] alone -> a tensor, or a tuple of them."""
        if not (self.layers and torch.is_grad_enabled()):
            return run(x_TD)
        with save_on_cpu(pin_memory=x_TD.is_cuda) if self.offload else contextlib.nullcontext():
            return again(run, x_TD)

    def block(self, run: Callable[[Tensor], tuple[Tensor, Tensor]], x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The feed-forward block as a function of [1, T, D] -> output [T, D], router logits [T, E].

        DeepSpeed's expert-parallel block, which may stand in ours' place, reads that batch dimension.
        """
        if self.tiles == 1:
            out, logits_TE = run(x_TD.unsqueeze(0))
            return out.view_as(x_TD), logits_TE
        learns = torch.is_grad_enabled()
        parts = [part_TD.unsqueeze(0) for part_TD in x_TD.tensor_split(self.tiles)]
        outs, logits = zip(*(again(run, part) if learns else run(part) for part in parts), strict=True)
        return torch.cat(outs, 1).view_as(x_TD), torch.cat(logits)

    def rows(self, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, about: Tensor) -> Tensor:
        """A function of rows, each by itself, and of what is known of each -> rows."""
        learns = torch.is_grad_enabled() and (self.layers or self.tiles > 1)
        parts = zip(x.tensor_split(self.tiles), about.tensor_split(self.tiles), strict=True)
        made = [again(run, *part) if learns else run(*part) for part in parts]
        return made[0] if self.tiles == 1 else torch.cat(made)


class _Last(torch.autograd.Function):
    """The identity, last in what is run again and so first in its backward.

    What backward asks for first starts the second run. Were that a layer's own tensor, ZeRO-3 would have gathered the
    weights for the layer's backward already, and the end of the second run would take them away under it.
    """

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(outputs[0].new_empty(0))
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        assert ctx.saved_tensors
        return grads


def again(run: Callable[..., Any], *inputs: Tensor) -> Any:
    """Call it now, keep its inputs alone, call it again in backward. Nothing of ours draws random numbers."""

    def whole(*inputs: Tensor) -> Any:
        found = run(*inputs)
        return _Last.apply(found)[0] if isinstance(found, Tensor) else _Last.apply(*found)

    with set_checkpoint_early_stop(False):
        return checkpoint(whole, *inputs, use_reentrant=False, preserve_rng_state=False)


class Saves(nn.Module):
    """A module that asks `saving` what to keep; an engine sets it."""

    saving = Saving()


def keep_less(model: nn.Module, saving: Saving) -> None:
    """Set every such module of a model."""
    for module in model.modules():
        if isinstance(module, Saves):
            module.saving = saving
