"""The released model's layout with the special tokens of a test's tokenizer."""

from data.tokenizer import AUDIO_END, AUDIO_PAD, AUDIO_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Tokenizer
from models.positions import MediaTokens
from train.layout import ModelLayout


def layout_of(tokenizer: Tokenizer, **changes) -> ModelLayout:
    """A layout; `changes` are other fields of ModelLayout."""
    names = (AUDIO_PAD, IMAGE_PAD, VIDEO_PAD, AUDIO_START, AUDIO_END, VISION_START, VISION_END)
    return ModelLayout(MediaTokens(*map(tokenizer.id, names)), **changes)
