"""The mixture-of-experts layer and the whole decoder's training step, against transformers' default implementation.

    .venv/bin/python bench/moe.py [small|large ...]

CPU time of forward and backward on one thread: of one layer, router included, with natural and with skewed (Zipf)
routing; and of the decoder's training step (embedding to loss and back; the optimizer, equal for both, is left
out). Both hold the same weights and see the same inputs. Bytes saved for backward are counted, not timed. The last
line's ratio is the whole step's at the small size in fp32.

Cost: about five minutes of one core, 3 GB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import compare, matmul_rate, report, saved_bytes, void_if_drifted
from models.config import AudioConfig, TextConfig, ThinkerConfig
from models.hf import to_released_config
from models.thinker import Thinker
from train.loss import cross_entropy_sum

SEEDS, ZIPF = 0, 1.2


@dataclass(frozen=True)
class Size:
    """One of the two sizes, and what is asked of the layer there in fp32."""

    config: TextConfig
    tokens: int
    layer_goal: float
    layer_rounds: int
    step_rounds: int


SIZES = {
    "small": Size(TextConfig(4096, 256, 4, 8, 2, 32, 32, 4, 128, mrope_section=(6, 5, 5)), 1024, 1.05, 15, 9),
    "large": Size(TextConfig(4096, 512, 4, 8, 2, 64, 128, 8, 192, mrope_section=(12, 10, 10)), 4096, 1.3, 5, 3),
}
BF16_GOAL, STEP_GOAL, KEEP_GOAL, RECOMPUTE_GOAL = 1.5, 1.1, 0.3, 0.08


def thinker_config(text: TextConfig) -> ThinkerConfig:
    """The decoder of a size; the audio encoder, which the text of this benchmark leaves idle, is the smallest."""
    audio = AudioConfig(4, 1, 1, 4, text.hidden_size, downsample_hidden_size=1)
    return ThinkerConfig(text, audio, text.vocab_size - 1)


def transformers_thinker(text: TextConfig) -> Any:
    """Transformers' Thinker as it comes: sdpa attention, grouped_mm experts."""
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    released = to_released_config(thinker_config(text))
    parts = {key: released[key] for key in ("text_config", "audio_config", "vision_config", "audio_token_id")}
    model = modeling.Qwen3OmniMoeThinkerForConditionalGeneration(Qwen3OmniMoeThinkerConfig(**parts))
    experts: Any = model.config.text_config
    assert experts._experts_implementation == "grouped_mm"
    return model.train()


def same_weights(theirs: Any, text: TextConfig, recompute: bool) -> Thinker:
    """Our Thinker with the weights of transformers' decoder."""
    ours = Thinker(thinker_config(text), recompute)
    ours.model.load_state_dict(theirs.model.language_model.state_dict())
    ours.lm_head.load_state_dict(theirs.lm_head.state_dict())
    return ours


def layer_work(block: nn.Module, x_TD: Tensor, grad_TD: Tensor, backward: bool = True) -> Any:
    """Forward and, unless told otherwise, backward of one block of either kind."""
    block.zero_grad()
    x_TD = x_TD.detach().requires_grad_()
    out = block(x_TD.unsqueeze(0))
    out = out[0] if isinstance(out, tuple) else out
    if backward:
        out.backward(grad_TD.unsqueeze(0))
    return out, x_TD


def routed_inputs(gate_ED: Tensor, tokens: int, skewed: bool) -> Tensor:
    """Inputs for the layer; skewed ones lean where the router's logits fall as the logarithm of a Zipf law."""
    x_TD = torch.randn(tokens, gate_ED.shape[1])
    if skewed:
        popularity_E = ZIPF * (1 / torch.arange(1.0, len(gate_ED) + 1)).log()[torch.randperm(len(gate_ED))]
        x_TD += torch.linalg.pinv(gate_ED.detach().float()) @ popularity_E
    return x_TD


def step_work(ours: Thinker, token_ids_T: Tensor) -> Tensor:
    """Our training step without the optimizer: mean next-token cross-entropy and its gradients."""
    ours.zero_grad()
    tokens = len(token_ids_T)
    position_ids_3T = torch.arange(tokens, dtype=torch.float32).expand(3, -1)
    mel_FM = torch.empty(0, ours.config.audio.num_mel_bins)
    hidden_TD, _ = ours(token_ids_T, position_ids_3T, (tokens,), mel_FM, ())
    labels_T = F.pad(token_ids_T[1:], (0, 1), value=-100)
    loss = ours.lm_head(hidden_TD, partial(cross_entropy_sum, labels_T=labels_T)) / (tokens - 1)
    loss.backward()
    return loss.detach()


def their_step_work(theirs: nn.Module, token_ids_T: Tensor) -> Tensor:
    """Transformers' training step: the loss of its own forward, and backward."""
    theirs.zero_grad()
    loss = theirs(input_ids=token_ids_T[None], labels=token_ids_T[None], use_cache=False).loss
    loss.backward()
    return loss.detach()


def row(what: str, peer: float, ours: float, goal: float, unit: str = "ms") -> tuple[float, bool]:
    """Print a line of the table; bytes count against the goal as ours / peer, times as peer / ours."""
    ratio = ours / peer if unit == "B/token" else peer / ours
    met = ratio <= goal if unit == "B/token" else ratio >= goal
    sign = "<=" if unit == "B/token" else ">="
    print(
        f"{what:58s}{peer:10.1f}{ours:10.1f} {unit:8s}{ratio:7.3f} {sign} {goal:.2f}  {'ok' if met else 'MISSED'}",
        flush=True,
    )
    return ratio, met


def bench_layer(name: str, size: Size, theirs: Any, blocks: dict[str, nn.Module], dtype: torch.dtype) -> list[bool]:
    """Time and count one layer, natural and skewed; whether each goal was met."""
    peer, met = theirs.model.language_model.layers[0].mlp, []
    label = f"{name} {str(dtype)[6:]} layer"
    for skewed in (False, True):
        x_TD = routed_inputs(peer.gate.weight, size.tokens, skewed).to(dtype)
        grad_TD = torch.randn_like(x_TD)
        works: dict[str, Callable[[], Any]] = {"peer": partial(layer_work, peer, x_TD, grad_TD)}
        works |= {kind: partial(layer_work, block, x_TD, grad_TD) for kind, block in blocks.items()}
        seconds = compare(works, size.layer_rounds)
        goal = 1.0 if skewed else size.layer_goal if dtype is torch.float32 else BF16_GOAL
        routing = "skewed" if skewed else "natural"
        for kind in blocks:
            # Recomputing buys memory with time: its speed is shown, its goal is bytes.
            least = goal if kind == "keep" else 0.0
            met.append(row(f"{label}, {routing}, {kind}", seconds["peer"] * 1e3, seconds[kind] * 1e3, least)[1])
        if not skewed:
            count = {k: saved_bytes(partial(layer_work, b, x_TD, grad_TD, False), b) for k, b in blocks.items()}
            of_peer = saved_bytes(partial(layer_work, peer, x_TD, grad_TD, False), peer) / size.tokens
            for kind, goal in (("keep", KEEP_GOAL), ("recompute", RECOMPUTE_GOAL)):
                met.append(row(f"{label}, saved, {kind}", of_peer, count[kind] / size.tokens, goal, "B/token")[1])
    return met


def bench_size(name: str, size: Size) -> tuple[list[bool], dict[str, float]]:
    """All rows of a size; goals met, and the whole step's figures in fp32."""
    torch.manual_seed(SEEDS)
    theirs, met, step = transformers_thinker(size.config), [], {}
    ours = {kind: same_weights(theirs, size.config, kind == "recompute") for kind in ("keep", "recompute")}
    token_ids_T = torch.randint(0, size.config.vocab_size - 1, (size.tokens,))
    for dtype in (torch.float32, torch.bfloat16):
        for model in (theirs, *ours.values()):
            model.to(dtype)
        blocks = {kind: model.get_submodule("model.layers.0.mlp") for kind, model in ours.items()}
        met += bench_layer(name, size, theirs, blocks, dtype)
        loss, their_loss = step_work(ours["keep"], token_ids_T), their_step_work(theirs, token_ids_T)
        assert abs(loss - their_loss) < (1e-5 if dtype is torch.float32 else 1e-2) * their_loss, (loss, their_loss)
        works = {
            "peer": partial(their_step_work, theirs, token_ids_T),
            "ours": partial(step_work, ours["keep"], token_ids_T),
        }
        seconds = compare(works, size.step_rounds, warmup=0)
        peer, mine = seconds["peer"] * 1e3, seconds["ours"] * 1e3
        ratio, good = row(f"{name} {str(dtype)[6:]} whole step", peer, mine, STEP_GOAL)
        met.append(good)
        if dtype is torch.float32:
            step = {"peer": peer, "ours": mine, "ratio": ratio}
    return met, step


def main(names: list[str]) -> None:
    """Run the sizes asked for, both by default."""
    torch.set_num_threads(1)
    names = names or list(SIZES)
    before = matmul_rate()
    print(f"{'':58s}{'peer':>10s}{'ours':>10s} {'unit':8s}{'ratio':>7s}    goal")
    met, step = [], {}
    for name in names:
        good, of_size = bench_size(name, SIZES[name])
        met += good
        step = step or of_size
    after = matmul_rate()
    print(f"matmul rate before and after: {before:.0f} and {after:.0f} GFLOP/s")
    if void := void_if_drifted(before, after):
        print(void)
    goal_met = all(met) and void is None
    report("moe", **step, unit=f"ms CPU per whole step, {names[0]}, fp32", goal=STEP_GOAL, met=goal_met)


if __name__ == "__main__":
    main(sys.argv[1:])
