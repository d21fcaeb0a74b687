"""What phases read that train the waveform decoder: pieces of speech, of a codec that the decoder fits.

recipe, corpus with codes, model's sizes --> SegmentReader
"""

from __future__ import annotations

from dataclasses import replace

from data.codec import open_codec
from data.corpus import Corpus
from data.errors import DataError
from data.segment_reader import SegmentReader, Sound
from data.tokenizer import Tokenizer
from data.vision import Patching
from models.omni_config import Code2WavConfig
from train.config import Recipe
from train.layout import ModelLayout
from train.waveform_loss import SAMPLE_RATE


def open_segment_reader(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, layout: ModelLayout) -> SegmentReader:
    """The reader. Raises DataError where the codec is not one that the model's decoder can decode."""
    assert recipe.model.code2wav is not None, "recipes check that there is a decoder"
    data, config = recipe.data, recipe.loss.waveform
    return SegmentReader(
        corpus,
        tokenizer,
        seed=recipe.seed,
        layout=replace(layout, patching=layout.patching or Patching()),  # pictures are not looked at: none is refused
        limits=data.limits,
        sound=sound_of(data.codec, recipe.model.code2wav),
        frames=config.frames,
        context=config.context,
    )


def sound_of(folder: str, decoder: Code2WavConfig) -> Sound:
    """What the codec's codes stand for. Raises DataError where that is not what the decoder gives of them."""
    codec = open_codec(folder)
    sound = Sound.of(codec)
    if sound.sample_rate != SAMPLE_RATE:
        raise DataError(f"data.codec={folder} is of {sound.sample_rate} Hz, and decoders give {SAMPLE_RATE}")
    if sound.samples_per_frame != decoder.samples_per_frame:
        raise DataError(
            f"data.codec={folder} has {sound.samples_per_frame} samples a frame, and model.code2wav gives "
            f"{decoder.samples_per_frame}: the product of its upsample_rates and upsampling_ratios must be that"
        )
    if codec.codebook_size != decoder.codebook_size:
        raise DataError(
            f"data.codec={folder} has {codec.codebook_size} codes in a codebook, and "
            f"model.code2wav.codebook_size={decoder.codebook_size}; they must be equal"
        )
    return sound
