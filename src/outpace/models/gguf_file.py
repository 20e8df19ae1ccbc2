"""The GGUF container: metadata and tensors of one file, read without the model it describes.

The `gguf` library dequantises; its reader is not used because it builds a numpy array per vocabulary
entry, which takes longer than loading the model.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from outpace.errors import ConfigError, UnsupportedModelError
from outpace.models.stored import WHOLE, Part

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PLAIN_TYPES = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_CHUNK_ELEMENTS = 1 << 18  # dequantised at once: 1 MiB of float32, so that intermediates stay in cache


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is stored.

    Attributes:
        shape: In torch order: rows first.
        kind: Storage type.
        offset: First byte in the file.
        num_bytes: Stored size.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """One GGUF file, mapped into memory.

    Attributes:
        path: The file.
        metadata: Every key of the header; arrays are lists.
        tensors: Every tensor by its GGUF name.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            ConfigError: The file cannot be read, is no GGUF file, is damaged or is one part of several.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                # Copy-on-write: torch takes writable buffers only, and the file must stay as it is.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise ConfigError(f"cannot read {path}: {error}") from error
        if self._data[:4] != b"GGUF":
            raise ConfigError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        try:
            self.metadata, self.tensors = _read_header(self._data)
        except (struct.error, UnicodeDecodeError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"{path} is damaged or not complete: {error}") from error
        if self.metadata.get("split.count", 1) > 1:
            raise UnsupportedModelError(
                f"{path} is one part of a split GGUF; join the parts first (llama-gguf-split --merge)"
            )

    def read(self, name: str, dtype: torch.dtype, part: Part = WHOLE) -> torch.Tensor:
        """One tensor or a part of it, dequantised and converted.

        Args:
            name: Its GGUF name, a key of `tensors`.
            dtype: Type of the result.
            part: Of a vector or a matrix; other rows of a matrix are not dequantised.

        Returns:
            That part of a tensor of `tensors[name].shape`, with its own memory.

        Raises:
            UnsupportedModelError: The `gguf` library cannot dequantise its storage type.
        """
        info = self.tensors[name]
        stored = np.frombuffer(self._data, np.uint8, info.num_bytes, info.offset)
        if plain := _PLAIN_TYPES.get(info.kind):
            return torch.from_numpy(stored).view(plain).reshape(info.shape)[part].to(dtype, copy=True)
        columns = info.shape[-1]
        every = (slice(None),)
        one_row = every * (len(info.shape) == 1)  # which a vector is
        own_rows, own_columns, *_ = (*one_row, *part, *every, *every)
        rows = stored.reshape(math.prod(info.shape[:-1]), -1)[own_rows]
        out = torch.empty(len(rows), len(range(columns)[own_columns]), dtype=dtype)
        step = max(1, _CHUNK_ELEMENTS // columns)
        try:
            for row in range(0, len(rows), step):
                values = gguf.dequantize(rows[row : row + step], info.kind)
                out[row : row + step] = torch.from_numpy(values)[:, own_columns]
        except NotImplementedError as error:
            raise UnsupportedModelError(f"{self.path}: {name}: {error}") from error
        return out.reshape(torch.empty(info.shape, device="meta")[part].shape)


class _Cursor:
    """A position in the header that moves as values are read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 4  # behind the magic

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise ValueError("a string reaches beyond the end of the file")
        return self.data[start : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element_kind, count = self.unpack("IQ")
            if element_kind in _SCALARS:
                return list(self.unpack(f"{count}{_SCALARS[element_kind]}"))
            return [self.value(element_kind) for _ in range(count)]
        return self.unpack(_SCALARS[kind])[0]


def _read_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    cursor = _Cursor(data)
    (version,) = cursor.unpack("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}; versions 2 and 3 (little-endian) are supported")
    num_tensors, num_keys = cursor.unpack("QQ")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        (kind,) = cursor.unpack("I")
        metadata[key] = cursor.value(kind)
    entries = [_read_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(shape) // block * block_bytes
        if start + offset + num_bytes > len(data):
            raise ValueError(f"tensor {name} reaches beyond the end of the file")
        tensors[name] = TensorInfo(shape, kind, start + offset, num_bytes)
    return metadata, tensors


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name = cursor.string()
    (num_dims,) = cursor.unpack("I")
    dims = cursor.unpack(f"{num_dims}Q")
    kind, offset = cursor.unpack("IQ")
    return name, dims[::-1], gguf.GGMLQuantizationType(kind), offset
