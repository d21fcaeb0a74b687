"""The Mimi codec (Kyutai, weights CC-BY 4.0), whose first 16 codebooks are those of Qwen3-Omni's Talker.

    folder: config.json, model.safetensors --transformers' MimiModel--> encode, decode

Nothing is downloaded and no code is loaded: the folder is local and its weights are safetensors. `transformers` is an
optional extra ("mimi"), imported here alone.

Utterances are encoded one by one. Mimi's layers each pad a last, incomplete step with zeros of their own, where a
longer neighbour in a batch would put what silence becomes: the last frames' codes would then depend on the batch.

Cost: 2.7 G multiply-adds and 30 MB for a second of sound, encoding or decoding.

Letters: S samples, G codebooks, T frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import BadSample, DataError
from data.waveform import check_length, check_waveform

SAMPLE_RATE = 24_000
NUM_CODEBOOKS = 16
MAX_SECONDS = 120.0  # an utterance: 4 GB


class Mimi:
    """A `data.codec.Codec`."""

    def __init__(self, folder: Path, device: str = "cpu", max_seconds: float = MAX_SECONDS) -> None:
        """Load from `folder`, in float32. Utterances longer than `max_seconds` are refused.

        Raises DataError, naming the file and key, for a folder that is missing, incomplete, damaged or of another
        codec, and where transformers is not installed.
        """
        _check_config(folder / "config.json")
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise DataError(f"{weights} is missing: download the Mimi model as safetensors, in one file")
        self._model, self._device, self._max_seconds = _load(folder).to(device), device, max_seconds
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        self.identity = f"mimi/{digest}/{NUM_CODEBOOKS}"
        self.sample_rate = SAMPLE_RATE
        self.num_codebooks = NUM_CODEBOOKS
        self.codebook_size = int(self._model.config.codebook_size)
        self.frame_rate = float(self._model.config.frame_rate)
        self.samples_per_frame = round(SAMPLE_RATE / self.frame_rate)

    @torch.no_grad()
    def encode(self, waveform_S: Tensor) -> Tensor:
        """Mono float32 [S] at 24 kHz -> codes int64 [16, ceil(S / samples_per_frame)], on the CPU."""
        check_waveform(waveform_S, SAMPLE_RATE, self._max_seconds)
        if not len(waveform_S):
            return torch.zeros(NUM_CODEBOOKS, 0, dtype=torch.int64)
        batch_11S = waveform_S.to(self._device, torch.float32)[None, None]
        return self._model.encode(batch_11S, num_quantizers=NUM_CODEBOOKS).audio_codes[0].cpu()

    def encode_all(self, waveforms: Iterable[Tensor]) -> list[Tensor]:
        """Codes of each utterance, exactly those of `encode`."""
        return [self.encode(waveform_S) for waveform_S in waveforms]

    @torch.no_grad()
    def decode(self, codes_GT: Tensor) -> Tensor:
        """Codes int64 [16, T] -> waveform float32 [T * samples_per_frame] at 24 kHz, on the CPU."""
        if codes_GT.ndim != 2 or len(codes_GT) != NUM_CODEBOOKS or codes_GT.dtype is not torch.int64:
            raise BadSample(
                f"codes must be int64 of shape [{NUM_CODEBOOKS}, frames], not {codes_GT.dtype} {list(codes_GT.shape)}"
            )
        check_length(codes_GT.shape[1] * self.samples_per_frame, SAMPLE_RATE, self._max_seconds)
        if not codes_GT.shape[1]:
            return torch.zeros(0)
        if codes_GT.min() < 0 or codes_GT.max() >= self.codebook_size:
            low, high = int(codes_GT.min()), int(codes_GT.max())
            raise BadSample(f"codes go from {low} to {high}, but must lie in 0 .. {self.codebook_size - 1}")
        return self._model.decode(codes_GT.to(self._device)[None]).audio_values[0, 0].cpu()


def _check_config(path: Path) -> None:
    """Raise DataError unless config.json is that of a Mimi that fits: 24 kHz, mono, 16 codebooks or more."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: give the local folder of a Mimi model") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON") from error
    if not isinstance(config, dict) or config.get("model_type") != "mimi":
        raise DataError(f"{path} is not that of a Mimi model: model_type must be 'mimi'")
    for key, wanted in (("sampling_rate", SAMPLE_RATE), ("audio_channels", 1)):
        if config.get(key) != wanted:
            raise DataError(f"{path}: {key} must be {wanted}, not {config.get(key)}")
    codebooks = config.get("num_quantizers")
    if not isinstance(codebooks, int) or codebooks < NUM_CODEBOOKS:
        raise DataError(f"{path}: num_quantizers must be {NUM_CODEBOOKS} or more, not {codebooks}")


def _load(folder: Path) -> Any:
    """transformers' MimiModel, ready to use; every weight must be in the file, else random ones would be used."""
    try:
        from transformers import MimiModel
    except ImportError as error:
        raise DataError('the Mimi codec needs transformers: pip install "omniloom[mimi]"') from error
    try:
        loaded: Any = MimiModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the library raises its own kinds for a damaged file, key or shape
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot load the Mimi model in {folder}: {reason}") from error
    model, info = loaded
    if lacking := sorted(info["missing_keys"]):
        raise DataError(f"{folder}/model.safetensors lacks {lacking[0]} and {len(lacking) - 1} more tensors of Mimi")
    return model.train(False).requires_grad_(False)
