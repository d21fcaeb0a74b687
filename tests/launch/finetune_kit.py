"""A tiny released checkpoint as transformers writes it, conversations as a user has them, and runs on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeConfig

from data.convert import main as convert_data
from models.hf_config import omni_to_released
from tests.launch.tiny_omni import tiny_config, tiny_tokenizer
from train.main import main as train

WORDS = ["one", "two", "three", "four", "hello", "world"]


def write_released(folder: Path) -> Path:
    """Transformers' whole model with random weights, its tokenizer, and a file that lies beside."""
    tokenizer = tiny_tokenizer()
    model = modeling.Qwen3OmniMoeForConditionalGeneration(
        Qwen3OmniMoeConfig(**omni_to_released(tiny_config(tokenizer)))
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "preprocessor_config.json").write_text('{"feature_size": 128}')
    return folder


def write_chats(folder: Path, tokenizer: Path, rows: int = 24) -> Path:
    """A JSONL of OpenAI's messages, converted to shards as the documentation says; the folder of the shards."""
    folder.mkdir(parents=True)
    lines = []
    for row in range(rows):
        turns: list[dict[str, Any]] = [{"role": "system", "content": "hello"}]
        for turn in range(1 + row % 3):
            turns.append({"role": "user", "content": f"what is {WORDS[(row + turn) % 6]}?"})
            turns.append(
                {"role": "assistant", "content": f"{WORDS[(row + turn + 1) % 6]} world", "weight": turn % 2 ^ 1}
            )
        lines.append(json.dumps({"messages": turns}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    arguments = ["openai", folder / "chats.jsonl", folder / "shards", "--tokenizer", tokenizer]
    assert convert_data([str(word) for word in arguments]) == 0
    return folder / "shards/train"


def finetune(recipe: str, base: Path | None, shards: Path, run: Path, *settings: str, steps: int = 3) -> int:
    """The exit status of a run of a few steps on one process."""
    weights = [f"model.weights={base}"] if base else []
    return train(
        [
            f"recipe={recipe}",
            "engine=local",
            "engine.precision=fp32",
            *weights,
            f"data.shards=[{shards}/*.tar]",
            "data.sequence_length=128",
            "data.sequences_per_step=2",
            "data.window=32",
            "data.workers=0",
            f"phases.all.steps={steps}",
            "optim.warmup_steps=0",
            "optim.lr=1e-2",
            "save.every=2",
            "log.every=1",
            f"run={run}",
            *settings,
        ]
    )


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """What transformers' whole model says to a prompt, [T, V]."""
    with torch.no_grad():
        return model.thinker(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def load(folder: Path) -> Any:
    """By transformers, with nothing missing, nothing unexpected, nothing of another shape."""
    model, info = modeling.Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.float().train(False)
