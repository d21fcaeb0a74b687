"""Messages to tokens and labels, by Qwen's ChatML template.

    <|im_start|>user\\n<|audio_start|><|audio_pad|>...<|audio_end|>Transcribe.<|im_end|>\\n
    <|im_start|>assistant\\nseven<|im_end|>\\n
                            ^^^^^^^^^^^^^^^ the loss: assistant content and its <|im_end|>

Labels are already shifted: labels[t] is the target of position t, that is token t + 1, or -100. Neighbouring
text is tokenised in one piece, as transformers' apply_chat_template does, except right after "assistant\\n",
where generation starts: there training cuts as well, so a prompt's ids are always a prefix of the training
ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.errors import BadSample
from data.tokenizer import AUDIO_END, AUDIO_PAD, AUDIO_START, IM_END, IM_START, ROLES, Tokenizer

IGNORE = -100
Messages = Sequence[Mapping[str, Any]]


def encode(
    messages: Messages, tokenizer: Tokenizer, audio_token_counts: Sequence[int], prompt_only: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and shifted labels of a conversation.

    `audio_token_counts` holds the number of placeholders of every audio part, in order. With `prompt_only`
    the last assistant turn is left out and the ids end in "<|im_start|>assistant\\n", ready for generation;
    labels are all -100. Raises BadSample that names what is wrong in the messages.
    """
    check_messages(messages)
    if prompt_only and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    expected = len(audio_parts(messages))
    if len(audio_token_counts) != expected:
        raise BadSample(f"messages have {expected} audio parts, {len(audio_token_counts)} audio clips were given")
    counts = iter(audio_token_counts)
    ids: list[int] = []
    learned: list[bool] = []
    newline = tokenizer.encode("\n")
    for message in messages:
        answer = message["role"] == "assistant"
        head, body = _turn(message, tokenizer, counts)
        body.append(tokenizer.id(IM_END))
        ids += [tokenizer.id(IM_START), *head, *body, *newline]
        learn = answer and message.get("loss", True)
        learned += [False] * (1 + len(head)) + [learn] * len(body) + [False] * len(newline)
    if prompt_only:
        ids += [tokenizer.id(IM_START), *tokenizer.encode("assistant\n")]
        return ids, [IGNORE] * len(ids)
    labels = [token if learn else IGNORE for token, learn in zip(ids[1:], learned[1:], strict=True)]
    return ids, [*labels, IGNORE]


def count_text_tokens(messages: Messages, tokenizer: Tokenizer) -> int:
    """Tokens of `encode(messages)` without the audio placeholders."""
    return len(encode(messages, tokenizer, [0] * len(audio_parts(messages)))[0])


def audio_parts(messages: Messages) -> list[str]:
    """What the audio parts of the messages name (the extension of a shard's member), in order."""
    return [part["audio"] for message in messages for part in _parts(message) if part["type"] == "audio"]


def answer_text(messages: Messages) -> str:
    """Text of the last turn if it is the assistant's (the reference of an evaluation), else ""."""
    if not messages or messages[-1]["role"] != "assistant":
        return ""
    return "".join(part["text"] for part in _parts(messages[-1]))


def rendered_texts(messages: Messages) -> list[str]:
    """The stretches of text that `encode` tokenises, to train a tokenizer on."""
    heads = [f"{message['role']}\n" for message in messages]
    return heads + [part["text"] for message in messages for part in _parts(message) if part["type"] == "text"]


def transcription(extension: str, instruction: str, text: str) -> list[dict[str, Any]]:
    """Messages of one transcription: a user's audio and instruction, the assistant's text."""
    heard = [{"type": "audio", "audio": extension}, {"type": "text", "text": instruction}]
    return [
        {"role": "user", "content": heard},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]


def check_messages(messages: Any) -> None:
    """Raise BadSample, with the place, unless `messages` is a conversation that this template can render."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadSample('"messages" must be a list with at least one message')
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise BadSample(f"{where} must be an object with role and content")
        if message.get("role") not in ROLES:
            raise BadSample(f"{where}.role is {message.get('role')!r}, must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("loss", True), bool):
            raise BadSample(f"{where}.loss is {message['loss']!r}, must be true or false")
        unknown = set(message) - {"role", "content", "loss"}
        if unknown:
            raise BadSample(f"{where} has unknown keys: {', '.join(sorted(map(str, unknown)))}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, Sequence):
            raise BadSample(f"{where}.content must be text or a list of parts")
        for j, part in enumerate(content):
            _check_part(part, f"{where}.content[{j}]", message["role"])


def _check_part(part: Any, where: str, role: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "audio"):
        raise BadSample(f'{where}.type is {kind!r}, must be "text" or "audio"')
    if kind == "audio" and role == "assistant":
        raise BadSample(f"{where}: an assistant turn holds text only, audio belongs to user and system turns")
    if not isinstance(part.get(kind), str):
        raise BadSample(f"{where}.{kind} is missing or not a string")


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _turn(message: Mapping[str, Any], tokenizer: Tokenizer, counts: Iterator[int]) -> tuple[list[int], list[int]]:
    """Ids of "assistant\\n" and of its content; for other roles nothing and both in one piece."""
    text = f"{message['role']}\n"
    head: list[int] = []
    if message["role"] == "assistant":
        head, text = tokenizer.encode(text), ""
    body: list[int] = []
    for part in _parts(message):
        if part["type"] == "text":
            text += part["text"]
            continue
        body += tokenizer.encode(text) + [tokenizer.id(AUDIO_START)]
        body += [tokenizer.id(AUDIO_PAD)] * next(counts) + [tokenizer.id(AUDIO_END)]
        text = ""
    return head, body + tokenizer.encode(text)
