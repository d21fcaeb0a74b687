"""Speech from text with espeak-ng, for demo data that needs no download.

    text, voice, rate, pitch --ctypes--> libespeak-ng --callback--> int16 [S] at 22,050 Hz

The library comes with the wheel espeakng-loader (optional extra "demo"). It keeps its state in the process,
so one Synthesizer at a time in a process; several processes are fine. What it says depends a little on what it said
before (phases of its oscillators, state of its noise), so a new Synthesizer loads it anew: the same texts in the same
order give the same samples, in any process. Cost: 5 ms to start, about 2 ms for a 2 s clip.
espeak-ng is GPL-3, which is why nothing but the demo may import this file.
"""

import contextlib
import ctypes
import re
from pathlib import Path
from types import TracebackType

import numpy as np

from data.errors import DataError

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000  # no thread of its own, whose polling would take 20 ms a clip
_RATE, _VOLUME, _PITCH = 1, 2, 3  # espeak_PARAMETER
_UTF8, _BY_CHARACTER = 1, 1
_IPA = 2  # espeak_TextToPhonemes
_MAX_DATA_PATH = 200  # the library copies its data path into a fixed buffer
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesizer:
    """A context that speaks: `with Synthesizer() as espeak: wave = espeak.speak("hello", "en-us+f2")`."""

    def __init__(self, seed: int = 0) -> None:
        """Load and start the library; `seed` is that of its breath noise.

        Raises DataError where the wheel is absent or does not start.
        """
        library, data = _find()
        if len(str(data.parent)) > _MAX_DATA_PATH:
            raise DataError(f"{data}: path too long for espeak-ng; install into a folder with a shorter path")
        self._library = _declare(ctypes.CDLL(str(library)))
        self._pieces: list[np.ndarray] = []
        self._callback = _Callback(self._collect)  # kept: the library holds a bare pointer to it
        folder = str(data.parent).encode()
        self.sample_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, folder, _DONT_EXIT)
        if self.sample_rate <= 0:
            raise DataError(f"espeak-ng does not start with the voices in {data}")
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(seed)  # after the start, which takes the time of day

    def __enter__(self) -> "Synthesizer":
        """Itself."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Release the library's memory and unload it, its state with it; the object is of no use after."""
        self._library.espeak_Terminate()
        unload = ctypes.CDLL(None).dlclose
        unload.argtypes = (ctypes.c_void_p,)
        unload(self._library._handle)

    def speak(self, text: str, voice: str, rate: int = 175, pitch: int = 50) -> np.ndarray:
        """Speech as int16 [S] at `sample_rate` (22,050 Hz).

        `voice` is a language with an optional variant, as "fr" or "en-us+f2"; `rate` is words a minute (80 to
        450), `pitch` 0 to 99. Raises DataError for a voice that does not exist: the library would keep the
        last one.
        """
        self._choose(voice)
        _check(self._library.espeak_SetParameter(_RATE, rate, 0), f"refuses rate {rate}")
        _check(self._library.espeak_SetParameter(_PITCH, pitch, 0), f"refuses pitch {pitch}")
        self._pieces.clear()
        encoded = text.encode()
        status = self._library.espeak_Synth(encoded, len(encoded) + 1, 0, _BY_CHARACTER, 0, _UTF8, None, None)
        _check(status, f"cannot say {text!r}")
        _check(self._library.espeak_Synchronize(), f"cannot say {text!r}")
        if not any(piece.any() for piece in self._pieces):
            raise DataError(f"espeak-ng gives no sound for {text!r} with voice {voice!r}")
        return np.concatenate(self._pieces)

    def phonemes(self, text: str, voice: str) -> str:
        """How `text` would be said, in IPA; a stretch that another language's rules say is led by its "(code)"."""
        self._choose(voice)
        rest, clauses = ctypes.c_char_p(text.encode()), []
        while rest.value:
            clauses.append(self._library.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA) or b"")
        return b" ".join(clauses).decode()

    def _choose(self, voice: str) -> None:
        _, _, variant = voice.partition("+")
        plain = re.fullmatch(r"[\w-]+(\+[\w -]+)?", voice)  # the library would open any path it is given
        if not plain or (variant and not (_find()[1] / "voices" / "!v" / variant).is_file()):
            raise DataError(f"espeak-ng has no voice {voice!r}")
        _check(self._library.espeak_SetVoiceByName(voice.encode()), f"has no voice {voice!r}")

    def _collect(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int | None) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def _find() -> tuple[Path, Path]:
    try:
        import espeakng_loader
    except ImportError:
        raise DataError('speech synthesis needs espeak-ng: pip install "omniloom[demo]"') from None
    with contextlib.suppress(RuntimeError):
        return Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())
    raise DataError("the espeakng-loader wheel lacks its voices; install it again")


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """State the C signatures, so that a wrong call fails in Python."""
    text, number = ctypes.c_char_p, ctypes.c_int
    library.espeak_Initialize.argtypes = (number, number, text, number)
    library.espeak_SetSynthCallback.argtypes = (_Callback,)
    library.espeak_SetSynthCallback.restype = None
    library.espeak_SetVoiceByName.argtypes = (text,)
    library.espeak_SetParameter.argtypes = (number, number, number)
    unsigned = ctypes.c_uint
    library.espeak_Synth.argtypes = (
        *(text, ctypes.c_size_t, unsigned, number, unsigned, unsigned),
        *(ctypes.POINTER(unsigned), ctypes.c_void_p),
    )
    if not hasattr(library, "espeak_ng_SetRandSeed"):
        raise DataError("this espeak-ng cannot be seeded: pip install --upgrade espeakng-loader")
    library.espeak_ng_SetRandSeed.argtypes = (ctypes.c_long,)
    library.espeak_TextToPhonemes.argtypes = (ctypes.POINTER(text), number, number)
    library.espeak_TextToPhonemes.restype = text
    return library


def _check(status: int, trouble: str) -> None:
    if status != 0:
        raise DataError(f"espeak-ng {trouble} (status {status})")
