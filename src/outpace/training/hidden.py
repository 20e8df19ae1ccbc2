"""The trunk's hidden states of a corpus: computed when first asked for, then read from disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from outpace.errors import ConfigError
from outpace.training.data import Corpus, PackedRows
from outpace.training.method import TrainBatch
from outpace.training.trunk import Trunk

_KEPT = torch.bfloat16  # on disk


class HiddenStates:
    """Puts hidden states into batches, from files if they are there.

    A frozen trunk gives a document the same states in every epoch and in every run. They are rounded to
    bfloat16, which is what they are when served, and kept as memory-mapped files of [tokens, hidden] per
    layer; beside each a byte per document says whether it is there. Several processes may fill the same
    files: they write the same values.
    """

    def __init__(self, trunk: Trunk, corpus: Corpus, layers: tuple[int, ...], directory: Path | None) -> None:
        """Opens or makes the files.

        Args:
            trunk: Who computes.
            corpus: The documents.
            layers: Which states, as `Trunk.hidden_states` counts them.
            directory: Where they are kept, as `cache_directory` names it; None keeps nothing.

        Raises:
            ConfigError: There is no room for them.
        """
        self._trunk, self._corpus, self._layers = trunk, corpus, layers
        self._states: dict[int, torch.Tensor] = {}  # by layer, as is the next; none where they are not kept
        self._done: dict[int, torch.Tensor] = {}
        if directory is not None and layers:
            self._open(directory)

    def _open(self, directory: Path) -> None:
        width = self._trunk.config.hidden_size
        num_values = int(self._corpus.offsets[-1]) * width
        new = [layer for layer in self._layers if not (directory / f"{layer}.states").exists()]
        needed = len(new) * num_values * _KEPT.itemsize
        try:
            directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(directory).free
            if needed > free:
                raise ConfigError(
                    f"hidden states take {needed} bytes in {directory}, which has {free} free: choose "
                    "another --hidden-cache, or compute them anew each time with --hidden-cache none"
                )
            for layer in self._layers:
                self._done[layer] = _mapped(directory / f"{layer}.done", len(self._corpus), torch.uint8)
                flat = _mapped(directory / f"{layer}.states", num_values, _KEPT)
                self._states[layer] = flat.view(-1, width)
        except OSError as error:
            raise ConfigError(f"cannot keep hidden states in {directory}: {error}") from None

    def attach(self, batch: TrainBatch, rows: PackedRows) -> TrainBatch:
        """The batch with `hidden`, on the trunk's device.

        Args:
            batch: From `collate`.
            rows: What it was made of.
        """
        documents = [document for row in rows for document in row]
        batch = batch.to(self._trunk.device)
        if not self._layers:
            return batch
        if not (self._done and all(bool(of[documents].all()) for of in self._done.values())):
            states = self._trunk.hidden_states(
                batch.token_ids, batch.positions, batch.documents, self._layers
            )
            if not self._done:
                batch.hidden = {layer: of.to(_KEPT).to(of.dtype) for layer, of in states.items()}
                return batch
            self._write(rows, states)
            for of in self._done.values():
                of[documents] = 1
        batch.hidden = {layer: self._read(rows, layer, batch) for layer in self._layers}
        return batch

    def _write(self, rows: PackedRows, states: dict[int, torch.Tensor]) -> None:
        for row, begin, end, first in self._places(rows):
            for layer, of_layer in states.items():
                self._states[layer][first : first + end - begin] = of_layer[row, begin:end].cpu()

    def _read(self, rows: PackedRows, layer: int, batch: TrainBatch) -> torch.Tensor:
        width = self._trunk.config.hidden_size
        states = torch.zeros(*batch.token_ids.shape, width, dtype=_KEPT)
        for row, begin, end, first in self._places(rows):
            states[row, begin:end] = self._states[layer][first : first + end - begin]
        return states.to(self._trunk.device).to(self._trunk.dtype)

    def _places(self, rows: PackedRows) -> list[tuple[int, int, int, int]]:
        """For each document: its batch row, where it begins and ends there, its first token in the corpus."""
        places = []
        for row, documents in enumerate(rows):
            end = 0
            for document in documents:
                first, after = self._corpus.offsets[document : document + 2].tolist()
                begin, end = end, end + after - first
                places.append((row, begin, end, first))
        return places


def cache_directory(root: Path, model_sum: str, corpus: Corpus, dtype: torch.dtype) -> Path:
    """Where hidden states of a model on a corpus are kept: the name is a checksum of both."""
    key = json.dumps([model_sum, corpus.checksum(), str(dtype), str(_KEPT)])
    return root / hashlib.sha256(key.encode()).hexdigest()[:32]


def _mapped(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    """[size], a file mapped into memory; zeros where nothing was written."""
    if not path.exists():
        with path.open("wb") as file:
            file.truncate(size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
