"""Byte-level BPE with Qwen's control tokens, loaded from a Hugging Face folder or trained for a demo.

    folder/tokenizer.json --> Tokenizer --> ids          texts --train_tokenizer--> Tokenizer --save--> folder

Text is only ever text: a user who writes "<|im_end|>" or "<|audio_pad|>" gets plain bytes, never the control
token. Control tokens are placed by data.chat alone, through `id`. Cost: about 1 us a token; a 150k vocabulary
loads in 0.5 s.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from data.errors import DataError

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
AUDIO_START, AUDIO_END, AUDIO_PAD = "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION = (VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
TTS = ("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>")
REQUIRED_TOKENS = (ENDOFTEXT, IM_START, IM_END, AUDIO_START, AUDIO_END, AUDIO_PAD)
CONTROL_TOKENS = (ENDOFTEXT, IM_START, IM_END, *VISION, AUDIO_START, AUDIO_END, *TTS, AUDIO_PAD)
ROLES = ("system", "user", "assistant")
TEMPLATE_VERSION = 1  # raise whenever data.chat turns the same messages into other tokens

# How Qwen cuts text before BPE: contractions, words, single digits, punctuation, line ends, spaces. Beyond that Han
# characters stand alone: no spaces part Chinese words, and merges learnt from few sentences join what no other has.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{Han}|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})\p{L})+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'audio' %}{{ '<|audio_start|><|audio_pad|><|audio_end|>' }}"
    "{% elif part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Tokenizer:
    """Text to ids and back, control tokens by name; made by `load_tokenizer` or `train_tokenizer`."""

    def __init__(self, definition: dict, origin: str) -> None:
        """`definition` is the content of a tokenizer.json; `origin` names it in errors."""
        self._definition = definition
        try:
            added = [_guarded(token) for token in definition.get("added_tokens") or []]
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(definition | {"added_tokens": added}))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{origin}: not a tokenizer that the tokenizers library reads: {error}") from error
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        special = {token["content"] for token in added if token["special"]}
        missing = [name for name in REQUIRED_TOKENS if name not in special]
        if missing:
            raise DataError(f"{origin}: tokenizer lacks {', '.join(missing)}; add these special tokens")

    def __reduce__(self) -> tuple:
        """Worker processes get the definition and build their own backend."""
        return Tokenizer, (self._definition, "tokenizer")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no control token can come out of it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], keep_control_tokens: bool = False) -> str:
        """Text of `ids`, control tokens left out unless asked for; stray bytes become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=not keep_control_tokens)

    def id(self, name: str) -> int:
        """Id of the control token `name`. Raises DataError where the vocabulary lacks it."""
        token_id = self._backend.token_to_id(name)
        if token_id is None:
            raise DataError(f"tokenizer has no token {name!r}")
        return token_id

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the highest id plus one, control tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the definition and the chat template's version: same fingerprint, same token counts."""
        canonical = json.dumps(self._definition, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(f"template {TEMPLATE_VERSION}\n{canonical}".encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and a tokenizer_config.json that transformers' AutoTokenizer loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": IM_END,
            "pad_token": ENDOFTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        }
        for name, content in (("tokenizer.json", self._definition), ("tokenizer_config.json", config)):
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def _guarded(token: dict) -> dict:
    """Control tokens marked special: a published file may list one as ordinary, found inside any text."""
    return token | {"special": token["special"] or token["content"] in CONTROL_TOKENS}


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Tokenizer of a folder with a tokenizer.json. Raises DataError that names the file and what is wrong."""
    path = Path(folder) / "tokenizer.json"
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a folder that holds a tokenizer.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(definition, dict):
        raise DataError(f"{path}: not a tokenizer, the JSON is not an object")
    return Tokenizer(definition, str(path))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE trained on `texts`; the same texts in the same order give the same tokenizer.

    `vocab_size` includes the 256 bytes, the roles and the control tokens, and is not reached where the texts have
    no more to merge. Each role is one token whatever the texts are, as the Talker's plan needs.
    """
    least = 256 + len(ROLES) + len(CONTROL_TOKENS)
    if vocab_size < least:
        raise DataError(f"vocab_size {vocab_size} is below {least} (256 bytes, the roles, the control tokens)")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend = _with_roles(backend, vocab_size - len(CONTROL_TOKENS))
    backend.add_special_tokens(list(CONTROL_TOKENS))  # after the text, as Qwen numbers them
    return Tokenizer(json.loads(backend.to_str()), "trained tokenizer")


def _with_roles(backend: tokenizers.Tokenizer, size: int) -> tokenizers.Tokenizer:
    """Add the roles that the texts did not teach; where `size` is reached, in the place of the last merges."""
    while True:
        missing = [role for role in ROLES if len(backend.encode(role).ids) != 1]
        if backend.get_vocab_size() + len(missing) <= size:
            break
        backend = _without_last_merge(backend)
    backend.add_tokens([AddedToken(role, single_word=True, normalized=False) for role in missing])
    return backend


def _without_last_merge(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """What training with a vocabulary smaller by one gives."""
    definition = json.loads(backend.to_str())
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    last = max(vocab, key=vocab.__getitem__)
    del vocab[last]
    definition["model"]["merges"] = [pair for pair in merges if last not in (*pair, "".join(pair))]
    return tokenizers.Tokenizer.from_str(json.dumps(definition))
