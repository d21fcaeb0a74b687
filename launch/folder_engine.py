"""A folder of released weights, to be asked as a run's checkpoint is.

    FOLDER --launch/loading.py--> Omni, tokenizer, layout --> FolderEngine: generate, losses, likelihoods
    shards --> Evaluator

Cost: one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.corpus import Corpus
from data.prompts import PromptSet
from data.reader import Reader
from data.tokenizer import Tokenizer, load_tokenizer
from data.types import Batch
from launch.loading import load_model
from models.omni import Omni
from train.config import EvalConfig, shards_of
from train.engines import Shard
from train.engines.scoring import Scoring
from train.engines.setup import continue_greedily
from train.errors import RecipeError
from train.evaluate import Evaluator
from train.feed import model_layout
from train.loss import MAX_LOGITS, Objective
from train.suites.registry import check_sets
from train.typed import build


class FolderEngine(Scoring):
    """A model that answers and does not learn: as much of train.engines.Engine as an evaluation asks."""

    def __init__(self, omni: Omni, device: torch.device) -> None:
        """Take a model that is on the device."""
        self.shard, self.device = Shard(0, 1), device
        thinker = omni.thinker
        self.objective = Objective(thinker, top_k=thinker.config.text.num_experts_per_tok, max_logits=MAX_LOGITS)

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, stop_id: int) -> list[list[int]]:
        """See train.engines.Engine."""
        return continue_greedily(self.objective, batch.to(self.device), max_new_tokens, stop_id)


@dataclass(frozen=True)
class Folder:
    """What a folder holds, and how it is to be evaluated."""

    path: Path
    omni: Omni
    tokenizer: Tokenizer
    config: EvalConfig
    device: torch.device

    def engine(self) -> FolderEngine:
        """The model, to be asked."""
        return FolderEngine(self.omni, self.device)

    def evaluator(self, config: EvalConfig) -> Evaluator:
        """Its evaluation sets. Raises DataError, RecipeError."""
        check_sets(config)
        layout, sets = model_layout(self.omni.config, self.tokenizer), {}
        for name, entry in config.sets.items():
            corpus = Corpus.open(shards_of(entry), self.tokenizer.fingerprint)
            sets[name] = PromptSet(Reader(corpus, self.tokenizer, seed=0, layout=layout))
        evaluator = Evaluator(config, sets, self.tokenizer)
        evaluator.check()
        return evaluator


def open_folder(given: Mapping[str, str], settings: Sequence[str]) -> Folder:
    """The model of given["model"], with `settings` eval.KEY=VALUE. Raises this project's errors."""
    config = eval_config(settings)
    path, device = Path(given["model"]), given["device"] or "cpu"
    omni = load_model(path, given["dtype"] or None, device)
    return Folder(path, omni, load_tokenizer(path), config, torch.device(device))


def eval_config(settings: Sequence[str]) -> EvalConfig:
    """EvalConfig of words eval.KEY=VALUE. Raises RecipeError for others: a folder has no recipe."""
    for word in settings:
        if not word.startswith("eval.") or word.startswith(("eval.sets", "eval.suite", "eval.every")):
            key = word.partition("=")[0]
            raise RecipeError(f"{key} is for run=FOLDER: of a model one can set eval.max_samples and the like")
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
    except OmegaConfBaseException as error:
        raise RecipeError(" ".join(str(error).split())) from None
    assert isinstance(plain, dict)
    config = build(EvalConfig, plain.get("eval", {}), "eval.")
    for key in ("max_new_tokens", "batch_tokens"):
        if getattr(config, key) < 1:
            raise RecipeError(f"eval.{key}={getattr(config, key)}: it must be at least 1")
    return config
