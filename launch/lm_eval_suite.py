"""Tasks of lm-evaluation-harness (the package lm_eval), asked of a run or a model's folder.

    tasks --lm_eval: prompts, few-shot, metrics--> texts --this: tokens, packs, the cache--> log-likelihoods, answers

The package is not one of ours: it is called where it is installed. It reads data sets from the local cache of the
package datasets; nothing is fetched, unless HF_HUB_OFFLINE=0 says so. Context and continuation are tokenised together
and parted where the context ends, as the harness does for its own models.
Cost: a forward of each different context, and a step a token of the continuation.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from data.document import Document, join
from data.files import write_atomically
from data.tokenizer import ENDOFTEXT, Tokenizer
from data.types import Batch
from launch.arguments import parse, whole
from launch.folder_engine import FolderEngine, open_folder
from launch.run_engine import open_run
from models.likelihood import likelihoods
from train.engines.local import LocalEngine
from train.errors import RecipeError

GROUP = 32  # requests that are answered together
INSTALL = "suite=lm_eval needs the package lm_eval: pip install lm-eval"
KNOWN = {
    "run": "",
    "model": "",
    "suite": "",
    "tasks": None,
    "checkpoint": "latest",
    "limit": "0",
    "fewshot": "-1",
    "include": "",
    "dtype": "",
    "device": "",
    "out": "",
}


def lm_eval(argv: Sequence[str]) -> None:
    """Run the suite. Raises this project's errors."""
    given, rest = parse(argv, KNOWN)
    if bool(given["run"]) == bool(given["model"]):
        raise RecipeError("give run=RUN, or model=FOLDER as launch.convert exports it")
    limit, fewshot = whole(given, "limit", 0, 10**9), whole(given, "fewshot", -1, 1000)
    if find_spec("lm_eval") is None:
        raise RecipeError(INSTALL)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    harness, tasks = importlib.import_module("lm_eval"), importlib.import_module("lm_eval.tasks")
    where, step, engine, tokenizer = _opened(given, rest)
    manager = tasks.TaskManager(include_path=given["include"] or None)
    names = [name for name in given["tasks"].split(",") if name]
    try:
        found = harness.simple_evaluate(
            model=adapter(harness)(Asking(engine, tokenizer)),
            tasks=names,
            num_fewshot=None if fewshot < 0 else fewshot,
            limit=limit or None,
            task_manager=manager,
            log_samples=False,
        )
    except (KeyError, ValueError, ConnectionError, FileNotFoundError) as error:
        raise RecipeError(f"tasks={given['tasks']}: lm_eval says: {' '.join(str(error).split())[:300]}") from None
    print(importlib.import_module("lm_eval.utils").make_table(found))
    folder = Path(given["out"] or where / "eval")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"lm_eval-step{step:08d}-results.json"
    body = {"suite": "lm_eval", "step": step, "tasks": names, "results": found["results"]}
    write_atomically(path, (json.dumps(body, ensure_ascii=False, indent=1, default=str) + "\n").encode())
    print(f"written to {path}")


class Asking:
    """Log-likelihoods and answers of texts."""

    def __init__(self, engine: LocalEngine | FolderEngine, tokenizer: Tokenizer) -> None:
        """Take a model that is loaded."""
        self.engine, self.tokenizer = engine, tokenizer
        self.end = tokenizer.id(ENDOFTEXT)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each continuation after its context, nats, and whether greedy decoding gives it."""
        places: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for place, (context, continuation) in enumerate(pairs):
            before, after = self.parted(context, continuation)
            places.setdefault(tuple(before), []).append((place, after))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        contexts = sorted(places, key=lambda ids: (len(ids), ids))
        for start in range(0, len(contexts), GROUP):
            group = contexts[start : start + GROUP]
            choices = [[after for _, after in places[ids]] for ids in group]
            self.engine.objective.train(False)
            scores = likelihoods(self.engine.objective.thinker, self.batch(group), choices)
            for ids, own in zip(group, scores, strict=True):
                for (place, _), score in zip(places[ids], own, strict=True):
                    found[place] = score
        return found

    def parted(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of the context, the end of a document where it is empty, and of the continuation."""
        spaces = context[len(context.rstrip()) :]
        context, continuation = context[: len(context) - len(spaces)], spaces + continuation
        if not context:
            return [self.end], self.tokenizer.encode(continuation)
        before = self.tokenizer.encode(context)
        whole_ids = self.tokenizer.encode(context + continuation)
        after = whole_ids[len(before) :]
        return (whole_ids[: len(before)], after) if after else (before[:-1] or [self.end], before[-1:])

    def answers(self, contexts: Sequence[str], most: int) -> list[str]:
        """Greedy continuations of at most so many tokens."""
        found: list[str] = []
        for start in range(0, len(contexts), GROUP):
            ids = [self.tokenizer.encode(text) or [self.end] for text in contexts[start : start + GROUP]]
            found += map(self.tokenizer.decode, self.engine.generate(self.batch(ids), most, self.end))
        return found

    def batch(self, ids: Sequence[Sequence[int]]) -> Batch:
        """Texts as a pack on the model's device."""
        documents = []
        for each in ids:
            ids_T = torch.tensor(each)
            positions_3T = torch.arange(len(ids_T), dtype=torch.float32).expand(3, -1)
            documents.append(Document("text", ids_T, torch.full_like(ids_T, -100), positions_3T, (), (), ()))
        return join(documents).to(self.engine.device)


def adapter(harness: Any) -> type:
    """A subclass of the harness's model class."""
    base: Any = importlib.import_module("lm_eval.api.model").LM

    class Ours(base):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        def __init__(self, asking: Asking) -> None:
            super().__init__()
            self.asking = asking

        def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return self.asking.likelihoods([request.args[:2] for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            return [logprob for logprob, _ in self.asking.likelihoods([("", r.args[0]) for r in requests])]

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            found = []
            for request in requests:  # each may end at texts of its own
                context, how = request.args[:2]
                (text,) = self.asking.answers([context], int(how.get("max_gen_toks", 256)))
                until = how.get("until", [])
                ends = [text.find(end) for end in ([until] if isinstance(until, str) else until) if end]
                found.append(text[: min([end for end in ends if end >= 0], default=len(text))])
            return found

    return Ours


def _opened(given: dict[str, str], rest: Sequence[str]) -> tuple[Path, int, Any, Tokenizer]:
    if given["model"]:
        folder = open_folder(given, rest)
        return folder.path, 0, folder.engine(), folder.tokenizer
    device = [f"engine.device={given['device']}"] if given["device"] else []
    opened = open_run(Path(given["run"]), [*rest, *device])
    engine, step = opened.engine(given["checkpoint"])
    return opened.folder, step, engine, opened.tokenizer
