"""The peers of bench/data.py, each as its documentation shows it, behind one face.

    shards --peer's own reading, shuffling--> (key, json, media) --work, in its workers--> batches of `size`

`work` is None for undecoded samples, else the same function for all of them. A peer that is not installed is left out.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import DataLoader

from bench.data_corpus import Stored, importable

SHUFFLE = 1000  # samples in a peer's shuffle buffer, the number of their examples
Work = Callable[[str, bytes, dict[str, bytes]], Any]
Collate = Callable[[list[Any]], Any]


class Peer(Protocol):
    """A loader of samples. `name` and `version` are for the table."""

    name: str
    version: str

    def raw(self) -> Iterator[Any]:
        """One epoch of undecoded samples, shuffled, in this process."""
        ...

    def batches(self, work: Work, collate: Collate, size: int, workers: int) -> Iterator[Any]:
        """Batches without end, from `workers` processes, or from this one where there are none."""
        ...

    def resume(self, position: int) -> tuple[float, str]:
        """Wall seconds until the first sample at `position`, or near it, and how it was got."""
        ...


def peers(stored: Stored, folder: Path) -> list[Peer]:
    """Those that are installed."""
    found: list[Peer] = []
    if module := importable("webdataset"):
        found.append(WebDataset(module, stored))
    if (module := importable("streaming")) and stored.mds:
        found.append(Streaming(module, stored))
    if module := importable("megatron.energon"):
        found.append(Energon(module, stored, folder))
    return found


class WebDataset:
    """Plain webdataset: shards in random order, a shuffle buffer, no decoder of its own."""

    name = "webdataset"

    def __init__(self, module: Any, stored: Stored) -> None:
        self.wds, self.version, self.stored = module, module.__version__, stored

    def raw(self) -> Iterator[Any]:
        """One epoch."""
        return iter(self._pipeline(self.stored.tars))

    def batches(self, work: Work, collate: Collate, size: int, workers: int) -> Iterator[Any]:
        """torch's loader, whose workers read shards in turn."""
        dataset = self._pipeline(self.stored.tars).map(lambda sample: work(sample["__key__"], sample["json"], sample))
        return iter(DataLoader(dataset.repeat(), size, num_workers=workers, collate_fn=collate))  # type: ignore

    def resume(self, position: int) -> tuple[float, str]:
        """It keeps no place: samples are read and thrown away."""
        read = min(position, 5_000)
        start = time.perf_counter()
        samples = iter(self._pipeline(self.stored.far_tars))
        for _ in range(read):
            next(samples)
        seconds = (time.perf_counter() - start) / read * position
        return seconds, f"reads and skips; {read:,} samples measured, the rest by proportion"

    def _pipeline(self, tars: list[Path]) -> Any:
        urls = [str(path) for path in tars]
        workers = self.wds.split_by_worker
        return self.wds.WebDataset(urls, shardshuffle=len(urls), workersplitter=workers, seed=0).shuffle(SHUFFLE)


class Streaming:
    """mosaicml-streaming on its own format, local, with its default shuffle."""

    name = "streaming"

    def __init__(self, module: Any, stored: Stored) -> None:
        self.streaming, self.version, self.stored = module, module.__version__, stored

    def raw(self) -> Iterator[Any]:
        """One epoch."""
        return iter(self._dataset(self.stored.mds))

    def batches(self, work: Work, collate: Collate, size: int, workers: int) -> Iterator[Any]:
        """torch's loader; the work is done where a sample is got, as its own subclasses do."""
        dataset = self._dataset(self.stored.mds, size, work)
        while True:
            yield from DataLoader(dataset, size, num_workers=workers, collate_fn=collate)

    def resume(self, position: int) -> tuple[float, str]:
        """By state: the epoch's order is made anew, and what was consumed is cut off."""
        start = time.perf_counter()
        dataset = self._dataset(self.stored.far_mds)
        state = dataset.state_dict(position, from_beginning=True) | {"sample_in_epoch": position}
        dataset.load_state_dict(state)
        next(iter(dataset))
        return time.perf_counter() - start, "by state dict, dataset opened anew"

    def _dataset(self, folder: Path | None, size: int = 1, work: Work | None = None) -> Any:
        self.streaming.base.util.clean_stale_shared_memory()

        class Worked(self.streaming.StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                sample = super().__getitem__(at)
                if work is None:
                    return sample
                return work(sample["key"], sample["json"], {sample["extension"]: sample["media"]})

        return Worked(local=str(folder), shuffle=True, batch_size=size, num_canonical_nodes=1)


class Energon:
    """megatron-energon: crude samples, a cooker for the work, batches in its task encoder."""

    name = "energon"

    def __init__(self, module: Any, stored: Stored, folder: Path) -> None:
        self.energon, self.version = module, module.__version__
        self.folder = stored.tars[0].parent
        options = "--non-interactive --split-ratio 1,0,0 --sample-type CrudeWebdataset --num-workers 1".split()
        command = Path(sys.executable).with_name("energon")
        subprocess.run([command, "prepare", *options, self.folder], check=True, capture_output=True)

    def raw(self) -> Iterator[Any]:
        """One epoch."""
        return iter(self.energon.get_loader(self._dataset(None, None, None, 0, repeat=False)))

    def batches(self, work: Work, collate: Collate, size: int, workers: int) -> Iterator[Any]:
        """Its own savable loader."""
        return iter(self.energon.get_savable_loader(self._dataset(work, collate, size, workers, repeat=True)))

    def resume(self, position: int) -> tuple[float, str]:
        """By a saved state, which holds the place in each shard; to make one, samples must be read."""
        read = min(position, 3_000)
        loader = self.energon.get_savable_loader(self._dataset(None, None, None, 0, repeat=True))
        samples = iter(loader)
        for _ in range(read):
            next(samples)
        state = loader.save_state_rank()
        start = time.perf_counter()
        loader = self.energon.get_savable_loader(self._dataset(None, None, None, 0, repeat=True))
        loader.restore_state_rank(state)
        next(iter(loader))
        return (
            time.perf_counter() - start,
            f"by a state saved after {read:,} samples, since a far one takes long to reach",
        )

    def _dataset(self, work: Work | None, collate: Collate | None, size: int | None, workers: int, repeat: bool) -> Any:
        energon = self.energon

        def cook(sample: Any) -> Any:
            if work is None:
                return sample
            return work(sample["__key__"], sample["json"], sample)

        class Encoder(energon.DefaultTaskEncoder):
            cookers = [energon.Cooker(energon.stateless(cook))]
            decoder = None

            def batch(self, samples: list[Any]) -> Any:
                assert collate is not None
                return collate(samples)

        return energon.get_train_dataset(
            self.folder,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
            batch_size=size,
            shuffle_buffer_size=SHUFFLE,
            max_samples_per_sequence=100,
            task_encoder=Encoder(),
            repeat=repeat,
        )
