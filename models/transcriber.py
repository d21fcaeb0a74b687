"""An audio encoder with the text decoder that it learns with: what `recipe=audio_encoder` trains.

    pack: token ids [T] --all but placeholders of audio--> text [X] --.
          mel --audio_tower, windows of each clip--> frames [E, S] ---+--> audio_decoder --> hidden [X, D]

Packs are those of the Thinker: the same documents, whose placeholders are counted but not read. The encoder's names are
the released ones, so that a Thinker takes it over as it is; the decoder is left behind.

Letters: T tokens of a pack, X of them that are text, N documents, E audio tokens, S their width, D hidden of the
decoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.audio_decoder import AudioDecoder, TextCache
from models.audio_encoder import AudioEncoder
from models.config import TranscriberConfig
from models.generate import Prompts
from models.layers.cache import KVCache
from models.thinker import Features, Media


class Split(NamedTuple):
    """The text of a pack and how much each document has of it."""

    rows_X: Tensor  # int64, of the pack
    text_lengths: list[int]
    frame_lengths: list[int]


def split_pack(token_ids_T: Tensor, doc_lengths: Sequence[int], audio_token_id: int) -> Split:
    """Part text from placeholders of audio."""
    heard_T = token_ids_T == audio_token_id
    ends = torch.tensor([0, *doc_lengths]).cumsum(0)
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), heard_T.cpu().long().cumsum(0)])[ends]
    frames = sums.diff().tolist()
    texts = [length - heard for length, heard in zip(doc_lengths, frames, strict=True)]
    return Split((~heard_T).nonzero().squeeze(1), texts, frames)


class Transcriber(nn.Module):
    """Encoder and decoder. Weights are unset until models.init.init_weights or a load."""

    def __init__(self, config: TranscriberConfig) -> None:
        super().__init__()
        self.config = config
        audio, text = config.thinker.audio, config.thinker.text
        self.audio_tower = AudioEncoder(audio)
        self.audio_decoder = AudioDecoder(config.decoder, text.vocab_size, audio.output_dim)

    def encode(self, media: Media) -> Features:
        """Run the encoder alone. Raises ValueError for pictures."""
        if media.grids:
            raise ValueError(f"{len(media.grids)} images or videos, but this model only hears")
        return Features(self.audio_tower(media.mel_FM, media.mel_lengths, media.windows), None, ())

    def forward(
        self,
        token_ids_T: Tensor,
        doc_lengths: Sequence[int],
        audio_ES: Tensor,
        cache: TextCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pack -> hidden states of its text [X, D], and which rows of the pack these are, int64 [X].

        token_ids int64 [T], doc_lengths sum to T; audio [E, S] are the features of its clips, by `encode`. Raises
        ValueError where these are not as many as the placeholders.
        """
        split = split_pack(token_ids_T, doc_lengths, self.config.thinker.audio_token_id)
        if sum(split.frame_lengths) != len(audio_ES):
            raise ValueError(
                f"{sum(split.frame_lengths)} audio placeholders in the tokens, but {len(audio_ES)} audio tokens from "
                "the encoder; they must be equal"
            )
        text_X = token_ids_T.index_select(0, split.rows_X)
        hidden_XD = self.audio_decoder(text_X, split.text_lengths, audio_ES, split.frame_lengths, cache)
        return hidden_XD, split.rows_X


@torch.no_grad()
def transcribe(
    model: Transcriber,
    prompts: Prompts,
    max_new_tokens: int,
    stop_id: int,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Greedy answers to a pack of prompts, as models.generate.greedy gives a Thinker's.

    Every rank makes the same number of forward calls; `all_done` is asked before every one after the first. The
    encoder's windows are its own.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    audio_id, device = model.config.thinker.audio_token_id, prompts.token_ids_T.device
    split = split_pack(prompts.token_ids_T, prompts.doc_lengths, audio_id)
    past = KVCache(model.config.decoder.num_hidden_layers, split.text_lengths, max_new_tokens, device)
    audio_ES = model.encode(Media(prompts.mel_FM, prompts.mel_lengths, None, prompts.grids)).audio_TD
    cache, decoder = TextCache(past), model.audio_decoder
    hidden_XD, _ = model(prompts.token_ids_T, prompts.doc_lengths, audio_ES, cache)
    hidden_ND = hidden_XD[torch.tensor(split.text_lengths, dtype=torch.int64, device=device).cumsum(0) - 1]
    out: list[list[int]] = [[] for _ in split.text_lengths]
    stopped = [False] * len(out)
    for count in range(1, max_new_tokens + 1):
        logits_NV = decoder.head(hidden_ND)
        logits_NV[:, audio_id] = -torch.inf
        ids_N = logits_NV.argmax(-1)
        for index, token in enumerate(ids_N.tolist()):
            stopped[index] = stopped[index] or token == stop_id
            if not stopped[index]:
                out[index].append(token)
        if count == max_new_tokens or all_done(all(stopped)):
            break
        past.advance()
        hidden_ND = decoder(ids_N, (1,) * len(out), audio_ES, split.frame_lengths, cache)
    return out
