"""The code predictor's training step: all residual codebooks in one causal pass against one pass per codebook.

    .venv/bin/python bench/code_predictor.py

128 frames of 16 codes, hidden size 256, 5 layers, codebooks of 2,048: the released shapes but for the width (1,024).
The peer runs the same modules on the first g + 2 positions of every frame and takes head g, for each g: 135 positions
a frame instead of 16. Forward and backward, fp32, one thread, in turn; the loss is the sum of all cross-entropies.
About a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import compare, matmul_rate, report, void_if_drifted
from models.code_predictor import CodePredictor
from models.omni_config import CodePredictorConfig

FRAMES, GOAL = 128, 5.0
CONFIG = CodePredictorConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
)


def one_pass(predictor: CodePredictor, hidden_ND: Tensor, first_ND: Tensor, codes_RN: Tensor) -> Tensor:
    """What train/speech_loss.py does, with the plain cross-entropy of the peer."""
    logits_NRV = predictor.logits(predictor(hidden_ND, first_ND, codes_RN))
    return F.cross_entropy(logits_NRV.flatten(0, 1), codes_RN.T.flatten(), reduction="sum")


def pass_per_codebook(predictor: CodePredictor, hidden_ND: Tensor, first_ND: Tensor, codes_RN: Tensor) -> Tensor:
    """What a trainer does that calls the predictor as generation without a cache would."""
    total = hidden_ND.new_zeros(())
    embeddings = predictor.model.codec_embedding
    for g, head in enumerate(predictor.lm_head):
        fed = [embed(codes_N) for embed, codes_N in zip(embeddings[:g], codes_RN[:g], strict=True)]
        states_NSD = predictor.model(torch.stack([hidden_ND, first_ND, *fed], dim=1))
        total = total + F.cross_entropy(head(states_NSD[:, -1]), codes_RN[g], reduction="sum")
    return total


def main() -> None:
    """Measure, print the table and the JSON line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    predictor = CodePredictor(CONFIG)
    for name, parameter in predictor.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    hidden_ND, first_ND = torch.randn(2, FRAMES, CONFIG.hidden_size)
    codes_RN = torch.randint(0, CONFIG.vocab_size, (CONFIG.num_code_groups - 1, FRAMES))
    results: dict[str, tuple[float, Tensor]] = {}

    def step(name: str) -> None:
        predictor.zero_grad()
        hidden = hidden_ND.clone().requires_grad_()
        loss = (one_pass if name == "ours" else pass_per_codebook)(predictor, hidden, first_ND, codes_RN)
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in predictor.parameters() if parameter.grad is not None]
        assert hidden.grad is not None
        results[name] = loss.item(), torch.cat([hidden.grad.flatten(), *gradients])

    before = matmul_rate()
    seconds = compare({"ours": lambda: step("ours"), "peer": lambda: step("peer")})
    drift = void_if_drifted(before, matmul_rate())
    (loss, gradient), (peer_loss, peer_gradient) = results["ours"], results["peer"]
    error = abs(loss - peer_loss) / abs(peer_loss)
    error_gradient = ((gradient - peer_gradient).norm() / peer_gradient.norm()).item()
    ratio = seconds["peer"] / seconds["ours"]
    print(f"{'':22}{'CPU s':>10}{'frames/s':>10}")
    for name, title in (("ours", "one pass"), ("peer", "a pass per codebook")):
        print(f"{title:22}{seconds[name]:>10.3f}{FRAMES / seconds[name]:>10.0f}")
    print(f"relative difference: loss {error:.1e}, gradients {error_gradient:.1e}")
    if drift:
        print(drift)
    report(
        bench="code_predictor",
        ours=seconds["ours"],
        peer=seconds["peer"],
        ratio=ratio,
        unit="CPU s per forward and backward; met asks that the loss is the same to 1e-6, too",
        goal=GOAL,
        met=ratio >= GOAL and error < 1e-6 and drift is None,
    )


if __name__ == "__main__":
    main()
