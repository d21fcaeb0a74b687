"""Samples to text runs and media, by Qwen's ChatML template; documents as they are, ended by <|endoftext|>.

    <|im_start|>user\\n<|audio_start|><|audio_pad|>...<|audio_end|>Transcribe.<|im_end|>\\n
    <|im_start|>assistant\\nseven<|im_end|>\\n
                            ^^^^^^^^^^^^^^^ the loss: assistant content and its <|im_end|>

Neighbouring text is tokenised in one piece, as transformers' apply_chat_template does, except right after
"assistant\\n", where generation starts: there training cuts as well, so a prompt's ids are always a prefix of the
training ids. A document is cut where its loss goes on or off. Speech of an answer leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from data.errors import BadSample
from data.layout import WRAP
from data.sample import Medium, SampleRecord, all_parts, medium_of, parts_of, text_of
from data.tokenizer import ENDOFTEXT, IM_END, IM_START, Tokenizer


class Run(NamedTuple):
    """A stretch of text without a medium in it."""

    ids: list[int]
    learned: list[bool]  # whether each token carries loss, as the target of the one before it

    def extend(self, ids: Sequence[int], learn: bool) -> None:
        """Append tokens."""
        self.ids.extend(ids)
        self.learned.extend([learn] * len(ids))


def render(
    record: SampleRecord, tokenizer: Tokenizer, prompt_only: bool = False, last_only: bool = False
) -> list[Run | Medium]:
    """Text runs and media of a record in turn: a run first, one after each medium, empty where there is no text.

    With `prompt_only` a conversation's last assistant turn is left out and the ids end in "<|im_start|>assistant\\n",
    ready for generation; a document goes without its end. With `last_only` no answer but the last carries loss.
    Raises BadSample where the record has nothing to prompt.
    """
    if record.segments:
        return _render_document(record, tokenizer, prompt_only)
    messages = record.messages
    if prompt_only and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    pieces: list[Run | Medium] = [Run([], [])]
    newline, start, end = tokenizer.encode("\n"), tokenizer.id(IM_START), tokenizer.id(IM_END)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    for i, message in enumerate(messages):
        learn = message["role"] == "assistant" and message.get("loss", True) and (i == last or not last_only)
        _last(pieces).extend([start], False)
        _render_turn(message, learn, tokenizer, pieces)
        _last(pieces).extend([end], learn)
        _last(pieces).extend(newline, False)
    if prompt_only:
        _last(pieces).extend([start, *tokenizer.encode("assistant\n")], False)
    return pieces


def gaps(record: SampleRecord, tokenizer: Tokenizer) -> list[int]:
    """Text tokens before, between and after the media of a record, without the tokens that wrap a medium."""
    return [len(piece.ids) for piece in render(record, tokenizer) if isinstance(piece, Run)]


def count_text_tokens(record: SampleRecord, tokenizer: Tokenizer) -> int:
    """Tokens of a record but for the placeholders of media."""
    pieces = render(record, tokenizer)
    return sum(len(piece.ids) if isinstance(piece, Run) else wrap(piece) for piece in pieces)


def wrap(medium: Medium) -> int:
    """Tokens around a medium's placeholders."""
    return 2 * WRAP if medium.sound else WRAP


def answer_text(record: SampleRecord) -> str:
    """Text of the last turn, the reference of an evaluation. Raises BadSample if it is not the assistant's."""
    if not record.messages or record.messages[-1]["role"] != "assistant":
        raise BadSample("its last turn is not the assistant's: there is nothing to compare with")
    return text_of(record.messages[-1]["content"])


def rendered_texts(record: SampleRecord) -> list[str]:
    """The stretches of text that `render` tokenises, to train a tokenizer on."""
    heads = [f"{message['role']}\n" for message in record.messages]
    return heads + [part["text"] for part in all_parts(record) if part["type"] == "text"]


def transcription(extension: str, instruction: str, text: str) -> list[dict[str, Any]]:
    """Messages of one transcription: a user's audio and instruction, the assistant's text."""
    heard = [{"type": "audio", "audio": extension}, {"type": "text", "text": instruction}]
    return [
        {"role": "user", "content": heard},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]


def _render_turn(message: Any, learn: bool, tokenizer: Tokenizer, pieces: list[Run | Medium]) -> None:
    """Append the role and the content of a turn."""
    text = f"{message['role']}\n"
    if message["role"] == "assistant":
        _last(pieces).extend(tokenizer.encode(text), False)
        text = ""
    for part in parts_of(message["content"]):
        if part["type"] == "text":
            text += part["text"]
            continue
        if part["type"] == "speech":  # the Talker's; the text before and after it stays one piece
            continue
        _last(pieces).extend(tokenizer.encode(text), learn)
        pieces += [medium_of(part), Run([], [])]
        text = ""
    _last(pieces).extend(tokenizer.encode(text), learn)


def _render_document(record: SampleRecord, tokenizer: Tokenizer, prompt_only: bool) -> list[Run | Medium]:
    pieces: list[Run | Medium] = [Run([], [])]
    text, learn = "", True
    for part in record.segments:
        if part["type"] != "text":
            _last(pieces).extend(tokenizer.encode(text), learn)
            pieces += [medium_of(part), Run([], [])]
            text = ""
            continue
        if part.get("loss", True) != learn:
            _last(pieces).extend(tokenizer.encode(text), learn)
            text, learn = "", not learn
        text += part["text"]
    _last(pieces).extend(tokenizer.encode(text), learn)
    if not prompt_only:
        _last(pieces).extend([tokenizer.id(ENDOFTEXT)], True)
    return pieces


def _last(pieces: list[Run | Medium]) -> Run:
    run = pieces[-1]
    assert isinstance(run, Run)
    return run
