"""What a recipe reads: its shards, the order of training, and its evaluation sets.

recipe, tokenizer, model's sizes --> corpus --> Plan of each phase, Reader, Evaluator
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from data.augment import Augment
from data.codec import open_codec
from data.corpus import Corpus
from data.costs import Work
from data.errors import DataError
from data.plan import Plan, PlanSettings
from data.prompts import PromptSet
from data.reader import Reader
from data.tokenizer import Tokenizer
from models.config import TranscriberConfig
from models.omni_config import OmniConfig
from train.config import Phase, Recipe, shards_of
from train.evaluate import Evaluator
from train.layout import ModelLayout, media_tokens, work_of
from train.parallel import Model, thinker_of
from train.recipe import Span, spans
from train.waveform_config import DECODER_PHASES
from train.waveform_feed import open_segment_reader

MOST_ROWS = 40  # of a table


@dataclass(frozen=True)
class Course:
    """The order of training in one phase: a plan, and the step of the run at which its own steps begin."""

    plan: Plan
    origin: int
    reader: Reader

    def about(self) -> list[str]:
        """What the data is, and what of it does not take part, as lines. Raises DataError for what may not be."""
        plan, corpus = self.plan, self.plan.corpus
        lines = [f"data: {corpus.num_samples:,} samples in {len(corpus.paths)} shards"]
        for source, count in sorted(plan.dropped.items()):
            lines.append(
                f"dropped as longer than data.sequence_length: {count:,} samples of source {source or 'unknown'}"
            )
        for source, count in sorted(plan.left_out.items()):
            lines.append(f"left out by the mixture: {count:,} samples of source {source}")
        if plan.tally.silent:
            lines.append(f"left out as their answers have no {corpus.sought}: {plan.tally.silent:,} samples")
        left_out = corpus.left_out()
        lines += [f"left out by the index: {line}" for line in left_out[:5]]
        if len(left_out) > 5:
            lines.append(f"and {len(left_out) - 5:,} more left out by the index")
        return lines

    def shares(self, step: int) -> dict[str, float]:
        """Share of the tokens before `step` of each source and language; empty without a mixture."""
        if self.plan.settings.mixture is None:
            return {}
        tokens = self.plan.realised(step - self.origin)
        total = max(sum(tokens.values()), 1)
        return {"/".join(name): round(count / total, 6) for name, count in tokens.items()}

    def asked(self, step: int) -> dict[str, float]:
        """The shares that the mixture asks for at `step`, named as by `shares`; empty without a mixture."""
        if self.plan.settings.mixture is None:
            return {}
        return {"/".join(name): round(share, 6) for name, share in self.plan.asked(step - self.origin).items()}

    def report(self, step: int) -> list[str]:
        """Asked and realised shares before `step`, as lines of a table; none without a mixture."""
        lines = self.plan.mixture_report(step - self.origin)
        more = len(lines) - 1 - MOST_ROWS
        return lines if more <= 0 else [*lines[: 1 + MOST_ROWS], f"and {more} more; metrics.jsonl has them all"]


@dataclass(frozen=True)
class Feed:
    """What a run reads: the course of each phase."""

    spans: Sequence[Span]
    courses: Mapping[str, Course]

    def require(self, stop: int) -> None:
        """Raise DataError where a mixture gives out before step `stop`, if that is cheap to know.

        For new runs: it looks at the whole corpus, which a checkpoint spares a resumed one.
        """
        for span in self.spans:
            course = self.courses[span.name]
            if span.start < stop:
                course.plan.require(min(span.stop, stop) - course.origin)

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint before `step` keeps of the data: how far each plan is, and where its next window begins.

        The steps alone are the state; the cursors spare a resumed run the walk.
        """
        return {
            plan.fingerprint: {"steps": steps, "cursor": asdict(plan.cursor(steps))}
            for plan, steps in self._progress(step).items()
        }

    def seek(self, step: int, position: Mapping[str, Any]) -> None:
        """Go on from a checkpoint before `step`. Raises DataError unless this recipe reads the same so far."""
        progress = self._progress(step)
        if {plan.fingerprint: steps for plan, steps in progress.items()} != {
            plan: saved["steps"] for plan, saved in position.items()
        }:
            raise DataError(
                "the data up to here is not the checkpoint's: data.shards, the sequence length, batch, window, "
                "mixture, sizes of media, speeds, seed, loss.waveform.frames or context or the phases before this step "
                "have changed; go back to them, or start another run with init=THIS_RUN"
            )
        for plan in progress:
            plan.seek(position[plan.fingerprint]["cursor"])

    def _progress(self, step: int) -> dict[Plan, int]:
        """Steps that each plan has given before a step of the run."""
        found: dict[Plan, int] = {}
        for span in self.spans:
            course = self.courses[span.name]
            if span.start < step:
                found[course.plan] = min(step, span.stop) - course.origin
        return found


class Reads(NamedTuple):
    """What a phase reads of the shards."""

    speech: str  # "" text alone, "codes" of answers, "pairs" of them, or "waveform": codes and sound
    speakers: tuple[str, ...]  # empty: all
    sequence_length: int

    @classmethod
    def of(cls, phase: Phase, sequence_length: int) -> Reads:
        """`sequence_length` is that of phases without their own."""
        special = {"off": "", "preference": "pairs"} | dict.fromkeys(DECODER_PHASES, "waveform")
        speech = special.get(phase.speech, "codes")
        return cls(speech, tuple(phase.speakers), phase.sequence_length or sequence_length)


def open_feed(recipe: Recipe, tokenizer: Tokenizer, model: Model) -> Feed:
    """The order of training and what reads it. Raises DataError for shards that cannot be used.

    A phase with a mixture of its own has a plan of its own. The others share one, which stands still meanwhile, with
    the phases that read the same: samples whose answers have codes, or pairs, or are of some speakers. Phases that
    begin at max_steps or later are left alone: their pairs may have yet to be made.
    """
    data = recipe.data
    settings = PlanSettings(
        data.sequence_length,
        data.sequences_per_step,
        data.window,
        tuple(data.speeds),
        data.too_long,
        data.augment.ramp_epochs,
        data.mixture,
    )
    readers: dict[Reads, Reader] = {}
    shared: dict[Reads, Plan] = {}
    steps: Counter[Reads] = Counter()  # that the shared plans have given
    courses = {}
    reached = [span for span in spans(recipe) if not recipe.max_steps or span.start < recipe.max_steps]
    for span in reached:
        reads = Reads.of(span.phase, data.sequence_length)
        reader = readers[reads] = readers.get(reads) or open_reader(recipe, tokenizer, model, reads)
        if absent := sorted(set(reads.speakers) - reader.corpus.speakers):
            raise DataError(f"phases.{span.name}.speakers: no answer of {absent[0]!r} has {reader.corpus.sought}")
        settings = replace(settings, sequence_length=reads.sequence_length)
        make = partial(Plan, reader.corpus, seed=recipe.seed, sizing=reader.sizing, work=work_for(model))
        if span.phase.mixture is not None:
            own, name = replace(settings, mixture=span.phase.mixture), f"phases.{span.name}.mixture"
            courses[span.name] = Course(make(own, mixture=name), span.start, reader)
        else:
            plan = shared[reads] = shared.get(reads) or make(settings)
            courses[span.name] = Course(plan, span.start - steps[reads], reader)
            steps[reads] += span.phase.steps
    return Feed(reached, courses)


def open_reader(recipe: Recipe, tokenizer: Tokenizer, model: Model, reads: Reads) -> Reader:
    """The shards, and what reads of them what a phase reads."""
    data, pairs = recipe.data, reads.speech == "pairs"
    codec = codec_of(data.codec, model) if reads.speech else ""
    corpus = Corpus.open(data.shards, tokenizer.fingerprint, data.store, codec, pairs, reads.speakers)
    if reads.speech == "waveform":
        return open_segment_reader(recipe, corpus, tokenizer, model_layout(model, tokenizer))
    if reads.speech:
        check_speakers(corpus, model)
    return Reader(
        corpus,
        tokenizer,
        seed=recipe.seed,
        layout=model_layout(model, tokenizer),
        limits=data.limits,
        augment=None if data.augment == Augment() else data.augment,
        sequence_length=reads.sequence_length,
        windows=recipe.loss.transcribe.seconds if isinstance(model, TranscriberConfig) else None,
        last_only=data.learn == "last",
    )


def codec_of(folder: str, model: Model) -> str:
    """Identity of a recipe's codec. Raises DataError where its codes are not what the model's Talker says."""
    codec = open_codec(folder)
    assert isinstance(model, OmniConfig) and model.talker is not None, "recipes check that who speaks has a talker"
    groups, size = model.talker.num_code_groups, model.talker.code_predictor.vocab_size
    if codec.num_codebooks != groups:
        raise DataError(
            f"data.codec={folder} has {codec.num_codebooks} codebooks, and "
            f"model.talker.code_predictor.num_code_groups={groups}; they must be equal"
        )
    if codec.codebook_size != size:
        raise DataError(
            f"data.codec={folder} has {codec.codebook_size} codes in a codebook, and "
            f"model.talker.code_predictor.vocab_size={size}; they must be equal"
        )
    return codec.identity


def check_speakers(corpus: Corpus, model: Model) -> None:
    """Raise DataError for voices in the shards that the model's Talker has no id for."""
    assert isinstance(model, OmniConfig) and model.talker is not None, "recipes check that who speaks has a talker"
    if unknown := sorted(corpus.speakers - set(model.talker.speaker_id)):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise DataError(
            f"data.shards: answers are spoken by {', '.join(name or 'nobody that is named' for name in unknown[:5])}"
            f"{more}, but model.talker.speaker_id names {', '.join(model.talker.speaker_id) or 'nobody'}; give every "
            "speaker an id there"
        )


def work_for(model: Model) -> Work:
    """What a model's tokens and frames cost, for the deal to ranks."""
    return work_of(model if isinstance(model, TranscriberConfig) else thinker_of(model))


def model_layout(model: Model, tokenizer: Tokenizer) -> ModelLayout:
    """What the data needs to know of a model."""
    omni = model if isinstance(model, OmniConfig) else None
    return ModelLayout.of(thinker_of(model), media_tokens(thinker_of(model), tokenizer), omni)


def open_evaluator(recipe: Recipe, tokenizer: Tokenizer, model: Model) -> Evaluator:
    """The recipe's evaluation sets. Raises DataError for shards that cannot be used, and for sets of nothing to ask."""
    data, layout = recipe.data, model_layout(model, tokenizer)
    sets = {}
    for name, entry in recipe.eval.sets.items():
        corpus = Corpus.open(shards_of(entry), tokenizer.fingerprint, data.store)
        sets[name] = PromptSet(Reader(corpus, tokenizer, seed=recipe.seed, layout=layout, limits=data.limits))
    evaluator = Evaluator(recipe.eval, sets, tokenizer)
    evaluator.check()
    return evaluator
