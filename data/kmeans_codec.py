"""A speech codec that needs no download: residual k-means over log-mel blocks, and a causal vocoder.

    waveform [S] --one gain--> log-mel --data/quantizer.py--> codes [G, T]     encode: whole utterances
    codes [G, T] --data/quantizer.py--> log-mel --data/vocoder.py--> waveform  decode: whole, or as the codes come

    folder: codec.json, codec.safetensors, written by `python -m data.fit_codec`

24 kHz, 12.5 frames a second. Every utterance is brought to one level before it is encoded, so that codebooks need not
learn loudness, and is decoded at that level: loudness is not coded. The gain follows from the loud blocks of the whole
utterance alone: silence around it changes nothing, and the same samples always give the same codes. So encoding is not
causal; decoding is. Cost: encoding 2 ms of one core a second of sound, decoding 11 ms, streamed block by block 90 ms.

Letters: S samples, G codebooks, T frames of codes (blocks), F frames of log-mel.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from data.errors import BadSample, DataError
from data.files import write_atomically
from data.quantizer import BLOCK_FRAMES, BLOCK_VALUES, Quantizer
from data.vocoder import HOP, SAMPLE_RATE, Vocoder, VocoderStream, log_mel
from data.waveform import check_length, check_waveform

FORMAT = "omniloom-kmeans-codec-1"
CONFIG, WEIGHTS = "codec.json", "codec.safetensors"
SAMPLES_PER_FRAME = BLOCK_FRAMES * HOP
MAX_SECONDS = 120.0  # an utterance, as in data/mimi.py
_LEVEL = 0.08  # root mean square of the loud blocks, -22 dB of full scale
_LEAST_LEVEL = 1e-3  # what is quieter is not raised to _LEVEL, else noise would be
_LOUD = 0.01  # of the energy of the loudest block: -20 dB
_QUANTIZER = {"mean": "mean_X", "components": "components_XD", "codebooks": "codebooks_GKD"}


@dataclass(frozen=True)
class CodecSettings:
    """Sizes of a codec; they are in codec.json."""

    codebooks: int = 16
    codebook_size: int = 512
    dimensions: int = 64  # of the PCA
    width: int = 192  # of the vocoder
    layers: int = 4

    def check(self, where: str) -> None:
        """Raise DataError, with `where` in front, for a size that is no number or out of bounds."""
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise DataError(f"{where}{name} must be a whole number from {low} to {high}, not {value!r}")


_BOUNDS = {
    "codebooks": (1, 64),
    "codebook_size": (2, 65_536),
    "dimensions": (1, BLOCK_VALUES),
    "width": (8, 2048),
    "layers": (1, 32),
}


class KMeansCodec:
    """A `data.codec.Codec` in a folder that `python -m data.fit_codec` wrote; runs on the CPU."""

    sample_rate = SAMPLE_RATE
    frame_rate = SAMPLE_RATE / SAMPLES_PER_FRAME
    samples_per_frame = SAMPLES_PER_FRAME

    def __init__(self, folder: Path, levels: int | None = None, max_seconds: float = MAX_SECONDS) -> None:
        """Load from `folder`. Decoding uses the first `levels` codebooks, all by default; encoding always all.

        Utterances longer than `max_seconds` are refused. Raises DataError, naming the file and key, for a folder that
        is missing, incomplete, damaged or of something else, and for levels that the codec does not have.
        """
        settings = _read_settings(folder / CONFIG)
        self.num_codebooks, self.codebook_size = settings.codebooks, settings.codebook_size
        if levels is not None and not 1 <= levels <= self.num_codebooks:
            raise DataError(f"levels must be from 1 to {self.num_codebooks}, the codebooks in {folder}, not {levels}")
        self.levels = levels or self.num_codebooks
        self._max_seconds = max_seconds
        self._quantizer, vocoder = _read_weights(folder / WEIGHTS, settings)
        # float64: how float32 rounds depends on the number of frames in a call, by up to 5e-6 in a sample
        self._dequantizer = Quantizer(*(tensor.double() for tensor in self._quantizer))
        self._vocoder = vocoder.double()
        with open(folder / WEIGHTS, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        self.identity = f"kmeans/{digest}/{self.num_codebooks}"

    @torch.no_grad()
    def encode(self, waveform_S: Tensor) -> Tensor:
        """Mono float [S] at 24 kHz -> codes int64 [num_codebooks, ceil(S / 1920)]. Raises BadSample."""
        check_waveform(waveform_S, SAMPLE_RATE, self._max_seconds)
        if not len(waveform_S):
            return torch.zeros(self.num_codebooks, 0, dtype=torch.int64)
        return self._quantizer.encode(log_mel(levelled(waveform_S.cpu())))

    @torch.no_grad()
    def decode(self, codes_GT: Tensor) -> Tensor:
        """Codes int64 [rows, T], of the first 1 to num_codebooks codebooks -> waveform float32 [T * 1920] at 24 kHz.

        Rows past `levels` are checked and not used. Samples lie within -1 and 1. Raises BadSample.
        """
        check_length(codes_GT.shape[-1] * SAMPLES_PER_FRAME if codes_GT.ndim else 0, SAMPLE_RATE, self._max_seconds)
        stream = self.stream()
        return torch.cat([stream.push(codes_GT), stream.finish()])

    def stream(self) -> CodecStream:
        """A decoder of one utterance that takes codes as they come."""
        return CodecStream(self)

    def mel_of(self, codes_GT: Tensor) -> Tensor:
        """Log-mel float64 [T * 8, 80] that codes of `decode` stand for. Raises BadSample."""
        if codes_GT.ndim != 2 or not 1 <= len(codes_GT) <= self.num_codebooks or codes_GT.dtype is not torch.int64:
            raise BadSample(
                f"codes must be int64 of shape [1 to {self.num_codebooks}, frames], "
                f"not {codes_GT.dtype} {list(codes_GT.shape)}"
            )
        if codes_GT.numel() and (codes_GT.min() < 0 or codes_GT.max() >= self.codebook_size):
            low, high = int(codes_GT.min()), int(codes_GT.max())
            raise BadSample(f"codes go from {low} to {high}, but must lie in 0 .. {self.codebook_size - 1}")
        return self._dequantizer.decode(codes_GT[: self.levels].cpu())

    def vocoder_stream(self) -> VocoderStream:
        """The part of a stream that comes after `mel_of`."""
        return VocoderStream(self._vocoder)


class CodecStream:
    """Sound while codes come. All that `push` and `finish` return, joined, is `decode` of all codes, to 1e-6.

    The sound of a push ends 15 ms before that of its last code. It keeps 24 frames of log-mel, three blocks, however
    long the utterance is: with fewer the layers of the vocoder would see other frames than in the whole.
    """

    def __init__(self, codec: KMeansCodec) -> None:
        self._codec, self._vocoder = codec, codec.vocoder_stream()

    def push(self, codes_Gt: Tensor) -> Tensor:
        """The next codes int64 [rows, t], t from 0 -> samples float32 that are final now. Raises as `decode` does."""
        return self._vocoder.push(self._codec.mel_of(codes_Gt)).clamp(-1.0, 1.0)

    def finish(self) -> Tensor:
        """The last 360 samples, none where no codes came. The next push begins another utterance."""
        return self._vocoder.finish().clamp(-1.0, 1.0)


def levelled(waveform_S: Tensor) -> Tensor:
    """At least one finite sample -> float32 at the level that the codec codes, padded to whole blocks.

    The level is the root mean square over the blocks that are at most 20 dB below the loudest one, the gating of
    loudness meters. An utterance below -60 dB is raised by 38 dB, no more.
    """
    wave_S = functional.pad(waveform_S.double(), (0, -len(waveform_S) % SAMPLES_PER_FRAME))
    energy_T = wave_S.reshape(-1, SAMPLES_PER_FRAME).square().mean(1)
    level = float(energy_T[energy_T >= _LOUD * energy_T.max()].mean().sqrt())
    return (wave_S * (_LEVEL / max(level, _LEAST_LEVEL))).float()


def save_codec(
    folder: Path, settings: CodecSettings, quantizer: Quantizer, vocoder: Vocoder, about: Mapping[str, Any]
) -> None:
    """Write a codec to a new `folder`, which appears when it is whole. `about` says in codec.json how it was made."""
    tensors = {name: getattr(quantizer, field).contiguous() for name, field in _QUANTIZER.items()}
    tensors |= {f"vocoder.{name}": tensor.contiguous() for name, tensor in vocoder.state_dict().items()}
    config = {"format": FORMAT, **asdict(settings), "fitted": dict(about)}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_atomically(partial / WEIGHTS, save(tensors))
        write_atomically(partial / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_settings(path: Path) -> CodecSettings:
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: give a folder that python -m data.fit_codec wrote") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise DataError(f"{path}: format must be {FORMAT!r}, not {str(found)[:80]!r}; fit the codec anew")
    sizes: dict[str, Any] = {field.name: config.get(field.name) for field in fields(CodecSettings)}
    settings = CodecSettings(**sizes)
    settings.check(f"{path}: ")
    return settings


def _read_weights(path: Path, settings: CodecSettings) -> tuple[Quantizer, Vocoder]:
    """Quantizer and vocoder; shapes are compared before anything is read."""
    with torch.device("meta"):  # no memory yet: the sizes are only claims
        vocoder = Vocoder(settings.width, settings.layers)
    shapes = {
        "mean": [BLOCK_VALUES],
        "components": [BLOCK_VALUES, settings.dimensions],
        "codebooks": [settings.codebooks, settings.codebook_size, settings.dimensions],
    } | {f"vocoder.{name}": list(tensor.shape) for name, tensor in vocoder.state_dict().items()}
    if not path.is_file():
        raise DataError(f"{path} is missing: fit the codec anew with python -m data.fit_codec")
    try:
        with safetensors.safe_open(path, "pt") as file:
            for name in sorted(shapes.keys() ^ set(file.keys())):
                raise DataError(f"{path}: {name} is {'missing' if name in shapes else 'unknown'}; fit the codec anew")
            for name, shape in shapes.items():
                about = file.get_slice(name)
                if about.get_shape() != shape or about.get_dtype() != "F32":
                    raise DataError(
                        f"{path}: {name} is {about.get_dtype()} {about.get_shape()}, but {CONFIG} asks for F32 {shape}"
                    )
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); fit the codec anew") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DataError(f"{path}: {name} holds values that are not finite; fit the codec anew")
    quantizer = Quantizer(**{field: tensors[name] for name, field in _QUANTIZER.items()})
    vocoder = Vocoder(settings.width, settings.layers)
    vocoder.load_state_dict({name: tensors[f"vocoder.{name}"] for name in vocoder.state_dict()})
    return quantizer, vocoder.train(False).requires_grad_(False)
