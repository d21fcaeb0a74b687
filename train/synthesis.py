"""A model's Talker as an evaluation meets it: it says text, and guesses the next code of recorded speech.

    prompts, texts --models/say.py--> codes of each
    prompts, texts, recorded codes --teacher forcing--> logits of every code of every frame

Cost: `say` as models/say.py has it; `score` one forward of Talker and code predictor, and G * V logits a frame.
Letters: T tokens of a conversation, F frames, G codes of a frame, V codes, R = G - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from data.types import Batch
from models.omni import Omni
from models.say import SaySettings, media_states, say, speaker_id, user_positions
from models.talker_inputs import join, plan_document, talker_inputs


@dataclass(frozen=True)
class Guesses:
    """How well codes were guessed: sums over frames, which add up over batches."""

    frames: int
    correct_G: Tensor  # float64: frames whose likeliest code was the right one
    nll_G: Tensor  # float64: sums of negative log-likelihoods, nats

    @classmethod
    def none(cls, num_code_groups: int) -> Guesses:
        """Of no frames."""
        return cls(0, torch.zeros(num_code_groups).double(), torch.zeros(num_code_groups).double())

    @classmethod
    def of(cls, logits_GFV: Sequence[Tensor], codes_GF: Tensor) -> Guesses:
        """From logits [F, V] of each codebook and the right codes int64 [G, F]; -inf is a code that cannot be."""
        correct, nll = [], []
        for logits_FV, codes_F in zip(logits_GFV, codes_GF, strict=True):
            logp_FV = logits_FV.double().log_softmax(-1)
            correct.append((logp_FV.argmax(-1) == codes_F).sum().double())
            nll.append(-logp_FV.gather(1, codes_F.unsqueeze(1)).sum())
        return cls(codes_GF.shape[1], torch.stack(correct).cpu(), torch.stack(nll).cpu())

    def __add__(self, other: Guesses) -> Guesses:
        """Both together."""
        return Guesses(self.frames + other.frames, self.correct_G + other.correct_G, self.nll_G + other.nll_G)


class Speaking(Protocol):
    """What is evaluated."""

    @property
    def speakers(self) -> Sequence[str]:
        """Names of the voices that there are."""
        ...

    def score(self, prompts: Batch, ids: Sequence[Tensor], speakers: Sequence[str], codes: Sequence[Tensor]) -> Guesses:
        """Guess the codes [G, F] of recordings that say the last turn of conversations `ids` [T]."""
        ...

    def say(self, prompts: Batch, ids: Sequence[Tensor], speakers: Sequence[str]) -> list[Tensor]:
        """Codes int64 [G, F] of the last turn of each of the conversations `ids` [T], whose media are the prompts'."""
        ...

    @property
    def max_frames(self) -> int:
        """Where `say` stops by itself."""
        ...


@dataclass
class OmniSpeaking:
    """An Omni. It draws on from where it was: equal calls in equal order, equal codes."""

    omni: Omni
    settings: SaySettings
    seed: int
    device: torch.device
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Seed the draws."""
        self._generator = torch.Generator(self.device).manual_seed(self.seed)

    @property
    def speakers(self) -> Sequence[str]:
        """See Speaking."""
        return sorted(self._talker.config.speaker_id)

    @property
    def max_frames(self) -> int:
        """See Speaking."""
        return self.settings.max_frames

    @property
    def _talker(self):
        assert self.omni.talker is not None
        return self.omni.talker

    @torch.no_grad()
    def score(self, prompts: Batch, ids: Sequence[Tensor], speakers: Sequence[str], codes: Sequence[Tensor]) -> Guesses:
        """See Speaking."""
        talker, config = self._talker, self.omni.config
        owns = prompts.token_ids_T.split(list(prompts.doc_lengths))
        places = prompts.position_ids_3T.split(list(prompts.doc_lengths), dim=1)
        plans = [
            plan_document(
                config, ids_T, user_positions(config, own_T, place_3T), speaker_id(talker.config, name), codes_GF
            )
            for ids_T, own_T, place_3T, name, codes_GF in zip(ids, owns, places, speakers, codes, strict=True)
        ]
        plan = join(plans, talker.config.num_code_groups).to(self.device)
        text_XH = self.omni.thinker.model.embed_tokens(plan.text_ids_X)
        inputs_PD = talker_inputs(talker, plan, text_XH, media_states(self.omni, prompts.to(self.device)))
        hidden_PD, _ = talker(inputs_PD, plan.position_ids_3P, plan.doc_lengths)
        hidden_FD = hidden_PD[plan.frame_places_F - 1]  # of the positions that predict the frames
        states_FRD = talker.residual_states(hidden_FD, plan.codes_GF)
        heads = [head(states_FRD[:, r]) for r, head in enumerate(talker.code_predictor.lm_head)]
        return Guesses.of([talker.codec_head(hidden_FD), *heads], plan.codes_GF)

    def say(self, prompts: Batch, ids: Sequence[Tensor], speakers: Sequence[str]) -> list[Tensor]:
        """See Speaking."""
        moved = [ids_T.to(self.device) for ids_T in ids]
        spoken = say(
            self.omni, prompts.to(self.device), speakers, self.settings, talker_ids=moved, generator=self._generator
        )
        return [codes_GF.cpu() for codes_GF in spoken]
