"""Runs of tiny random models, one that speaks and one that listens, and spoken answers for them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig
from data.sample import SampleRecord
from data.shards import write_shards
from models.config import AudioConfig, TextConfig
from models.hf import released_pieces
from models.init import init_weights
from models.omni import Omni
from models.omni_config import CodePredictorConfig, TalkerConfig
from tests.data.audio_bytes import encode
from tests.data.corpus_kit import spoken
from tests.data.test_kmeans_codec import SIZES, speechlike, write
from tests.launch.tiny_omni import tiny_tokenizer
from train.checkpoint import Saver
from train.config import EngineConfig, EvalConfig, ModelConfig, Phase, Recipe
from train.engines.build import build_engine
from train.engines.setup import EngineSetup
from train.opening import model_config
from train.recipe import as_yaml

TOKENIZER = tiny_tokenizer()
CODES, GROUPS = SIZES.codebook_size, SIZES.codebooks
SPEAKERS = ("anna", "berta")
TEXTS = ("one two", "three four", "hello world", "what is said here", "two", "hello")
SECONDS = (0.5, 0.8, 0.3, 0.6, 0.4, 0.9)


def said(number: int, speaker: str | None = None, heard: bool = False) -> SampleRecord:
    """A question, spoken or written, and its spoken answer: voices alternate, languages come in threes."""
    name = SPEAKERS[number % 2] if speaker is None else speaker
    asked = spoken("q", 0.3).messages[0] if heard else {"role": "user", "content": "say it"}
    parts = [{"type": "text", "text": TEXTS[number]}, {"type": "speech", "speech": "speech.wav", "speaker": name}]
    wave = speechlike(SECONDS[number], seed=1 + 3 * SPEAKERS.index(name) if name in SPEAKERS else 9).numpy()
    media = {"speech.wav": encode(wave, 24_000)} | (dict(spoken("q", 0.3).media) if heard else {})
    language = "en" if number < 3 else "de"
    return SampleRecord(f"k{number}", [asked, {"role": "assistant", "content": parts}], media, language)


def write_sets(folder: Path) -> Path:
    """Shards below folder/spoken, folder/asked, folder/text; a codec in folder/codec; the tokenizer."""
    write_shards([said(number, heard=number in (1, 4)) for number in range(6)], folder / "spoken", TOKENIZER)
    write_shards([spoken(f"a{number}", 0.4, "two", language="en") for number in range(3)], folder / "asked", TOKENIZER)
    TOKENIZER.save(folder / "tokenizer")
    write(folder / "codec")
    return folder


def model(talks: bool, codes: int = CODES) -> ModelConfig:
    text = TextConfig(TOKENIZER.vocab_size, 32, 2, 4, 2, 8, mrope_section=(2, 1, 1), num_experts=4,
                      num_experts_per_tok=2, moe_intermediate_size=16)  # fmt: skip
    audio = AudioConfig(16, 1, 2, 32, output_dim=32, downsample_hidden_size=8)
    if not talks:
        return ModelConfig(text, audio)
    talk = TextConfig(codes + 20, 16, 2, 2, 1, 8, mrope_section=(2, 1, 1), shared_expert_intermediate_size=8,
                      num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)  # fmt: skip
    predictor = CodePredictorConfig(codes, 16, 16, 1, 2, 1, 8, num_code_groups=GROUPS)
    voices = {name: codes + 10 + place for place, name in enumerate(SPEAKERS)}
    return ModelConfig(
        text, audio, talker=TalkerConfig(talk, predictor, 32, 1, *range(codes, codes + 6), speaker_id=voices)
    )


def write_run(folder: Path, sets: Path, talks: bool, seed: int = 0, **changes: Any) -> Path:
    """A run with one checkpoint, of initial weights."""
    data = DataConfig(
        [f"{sets}/spoken/*.tar"], tokenizer=f"{sets}/tokenizer", codec=f"{sets}/codec" if talks else "", workers=0
    )
    evaluation = EvalConfig(sets={"heldout": [f"{sets}/{'spoken' if talks else 'asked'}/*.tar"]}, max_new_tokens=5)
    settings: dict[str, Any] = {"data": data, "eval": evaluation, "model": model(talks)} | changes
    recipe = Recipe(
        "tiny", run=str(folder), seed=seed, phases={"all": Phase(1)}, engine=EngineConfig(device="cpu"), **settings
    )
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(as_yaml(recipe))
    config = model_config(recipe, TOKENIZER)
    setup = EngineSetup(config, recipe.engine, recipe.optim, recipe.loss, Phase(1), "all", seed, torch.device("cpu"))
    engine = build_engine(setup)
    with Saver(folder, rank=0, world=1, launch_id="tiny", released_pieces=released_pieces) as saver:
        saver.save(3, engine.fragments(), {"identity": asdict(config), "recipe": as_yaml(recipe)})
    engine.close()
    return folder


def tiny_omni(seed: int = 0) -> Omni:
    """The model of `write_run`."""
    recipe = Recipe("tiny", model(True), DataConfig())
    config = model_config(recipe, TOKENIZER)
    omni = Omni(config)  # type: ignore[arg-type]
    init_weights(omni, seed)
    return omni.train(False).requires_grad_(False)
