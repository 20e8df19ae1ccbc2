"""The C++ kernels, called through ctypes."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from outpace.config import BLOCK_SIZE
from outpace.device import tensor_of
from outpace.kernels.base import (
    Cache,
    Heads,
    Kernels,
    Layer,
    LayerAttention,
    LayerStack,
    Linear,
    Moves,
    RopeTable,
    Rows,
)
from outpace.kernels.cpu_library import (
    SUFFIXES,
    AttendArgs,
    ChangeArgs,
    LayerArgs,
    LinearArgs,
    RopeArgs,
    load,
)
from outpace.kernels.huge_pages import HugePages
from outpace.kernels.stream_heads import UNIT_EPS, EarlyExit, TokenChange

LANES = 16
PANEL = 2 * LANES  # outputs of a linear layer that lie together: kPanel of cpu.cpp


class NativeKernels(Kernels):
    """The backend in C++."""

    name = "native"

    def __init__(self, dtype: torch.dtype, library: Path, num_threads: int) -> None:
        """Loads a built library.

        Args:
            dtype: The model's: float32 or bfloat16.
            library: What `cpu_library.build` returned.
            num_threads: That share the work, of all such kernels in the process.
        """
        self.build = library.stem
        self._pages = HugePages()
        self._lib = load(library)
        self._lib.set_num_threads(num_threads)
        self._lib.keep_freed_memory()
        own = SUFFIXES[dtype]
        self.tile_rows = getattr(self._lib, f"tile_rows_{own}")()
        self._tile_inputs = getattr(self._lib, f"tile_inputs_{own}")()
        self.cache_group = torch.float32.itemsize // dtype.itemsize
        self._linear = getattr(self._lib, f"linear_{own}")
        self._rms_norm = getattr(self._lib, f"rms_norm_{own}")
        self._add_rms_norm = getattr(self._lib, f"add_rms_norm_{own}")
        self._silu_mul = getattr(self._lib, f"silu_mul_{own}")
        self._rope_and_cache = getattr(self._lib, f"rope_and_cache_{own}")
        self._attend = getattr(self._lib, f"attend_{own}")
        self._move_slots = getattr(self._lib, f"move_slots_{own}")
        self.decoder_layers = getattr(self._lib, f"decoder_layers_{own}")
        self._start_streams = getattr(self._lib, f"start_streams_{own}")
        self._change_first = getattr(self._lib, f"change_first_{own}")
        self._stream_candidates = getattr(self._lib, f"stream_candidates_{own}")
        self._exit_probs = getattr(self._lib, f"exit_probs_{own}")

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """See `Kernels`."""
        num_out, num_in = weight.shape
        packed = self._pages.copy(_panels(F.pad(weight, (0, -num_in % self._tile_inputs))))
        padded = None if bias is None else F.pad(bias, (0, -num_out % PANEL))
        args = LinearArgs(packed.data_ptr(), _address(padded), inputs=num_in, outputs=num_out)
        return NativeLinear(self._linear, args, (packed, padded))

    def changed(self, linear: Linear, down: Linear, up: Linear, rows: torch.Tensor) -> Linear:
        """See `Kernels`."""
        parts = [part for part in (linear, down, up) if isinstance(part, NativeLinear)]
        if len(parts) < 3:  # a shard's are added up
            return super().changed(linear, down, up, rows)
        return parts[0].changed(parts[1], parts[2], rows)

    def stack(self, layers: Sequence[Layer], cache: Cache, last_norm: torch.Tensor, eps: float) -> LayerStack:
        """See `Kernels`."""
        if any(len(_linears(layer)) < 4 for layer in layers):
            return super().stack(layers, cache, last_norm, eps)
        return NativeStack(self, layers, cache, last_norm, eps)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels`."""
        out = torch.empty_like(x)
        self._rms_norm(out.data_ptr(), x.data_ptr(), weight.data_ptr(), eps, *x.shape)
        return out

    def add_rms_norm(
        self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Kernels`."""
        out = torch.empty_like(delta)
        self._add_rms_norm(
            out.data_ptr(), delta.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, *delta.shape
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        rows, width = gate_up.shape
        out = gate_up.new_empty((rows, width // 2))
        self._silu_mul(out.data_ptr(), gate_up.data_ptr(), rows, width // 2)
        return out

    def attention(self, heads: Heads, rope: RopeTable, eps: float, rows: Rows) -> LayerAttention:
        """See `Kernels`."""
        return NativeAttention(self._rope_and_cache, self._attend, heads, rope, eps, rows)

    def move_slots(self, keys: torch.Tensor, values: torch.Tensor, moves: Moves) -> None:
        """See `Kernels`."""
        slots, (layers, blocks, kv_heads) = tensor_of(moves), keys.shape[:3]
        head_dim = values.shape[4]
        self._move_slots(
            keys.data_ptr(),
            values.data_ptr(),
            slots.data_ptr(),
            len(moves),
            layers,
            blocks,
            kv_heads,
            head_dim,
        )

    def filter_logits_(
        self, logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
    ) -> None:
        """See `Kernels`."""
        self._lib.filter_logits(
            logits.data_ptr(), top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(), *logits.shape
        )

    def noisy_argmax(
        self, logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, noisy: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels`."""
        out = torch.empty(len(logits), dtype=torch.int64)
        run = getattr(self._lib, f"noisy_argmax_{SUFFIXES[logits.dtype]}")
        run(
            out.data_ptr(),
            logits.data_ptr(),
            seeds.data_ptr(),
            positions.data_ptr(),
            noisy.data_ptr(),
            *logits.shape,
        )
        return out

    def noisy_topk(
        self,
        logits: torch.Tensor,
        number: int,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        noisy: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels`. Two passes over each row instead of some for each rank."""
        shape = len(logits), number
        ids, probs = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float32)
        run = getattr(self._lib, f"noisy_topk_{SUFFIXES[logits.dtype]}")
        run(
            ids.data_ptr(),
            probs.data_ptr(),
            logits.data_ptr(),
            seeds.data_ptr(),
            positions.data_ptr(),
            noisy.data_ptr(),
            *logits.shape,
            number,
        )
        return ids, probs

    def start_streams(
        self, residual: torch.Tensor, sources: torch.Tensor, rows: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels`."""
        hidden = residual.shape[1]
        out = residual.new_empty((len(sources), hidden))
        self._start_streams(
            out.data_ptr(),
            residual.data_ptr(),
            sources.data_ptr(),
            rows.data_ptr(),
            embeddings.data_ptr(),
            len(sources),
            len(rows),
            len(embeddings),
            hidden,
        )
        return out

    def change_first_(
        self, change: TokenChange, said: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels`."""
        anchors, streams, _ = said.shape
        units = torch.empty((anchors, streams, len(change.said)), dtype=torch.float32)
        args = ctypes.byref(_change_args(change))
        self._change_first(units.data_ptr(), said.data_ptr(), embeddings.data_ptr(), args, anchors, streams)
        return units

    def stream_candidates(
        self,
        change: TokenChange,
        head: Linear,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        embedding: torch.Tensor,
        before: torch.Tensor,
        number: int,
        most: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernels`. One call, since each is slow behind a pass, which leaves nothing in the caches."""
        if not isinstance(head, NativeLinear):  # a shard's
            return super().stream_candidates(change, head, hidden, anchors, embedding, before, number, most)
        shape = (len(anchors), hidden.shape[1], number)
        places, index = torch.empty(shape, dtype=torch.int64), torch.empty((*shape, most), dtype=torch.int64)
        chances = torch.empty((*shape, most), dtype=torch.float32)
        self._stream_candidates(
            places.data_ptr(),
            index.data_ptr(),
            chances.data_ptr(),
            hidden.data_ptr(),
            anchors.data_ptr(),
            embedding.data_ptr(),
            before.data_ptr(),
            ctypes.byref(_change_args(change)),
            head.address,
            *shape,
            most,
        )
        return places, index, chances

    def likeliest_behind(
        self,
        change: TokenChange,
        units: torch.Tensor,
        places: torch.Tensor,
        probs: torch.Tensor,
        temperature: torch.Tensor,
        number: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels`."""
        shape = (*places.shape, number)
        index, chances = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float32)
        self._lib.likeliest_behind(
            index.data_ptr(),
            chances.data_ptr(),
            units.data_ptr(),
            places.data_ptr(),
            probs.data_ptr(),
            temperature.data_ptr(),
            ctypes.byref(_change_args(change)),
            *places.shape,
            number,
        )
        return index, chances

    def exit_probs(
        self,
        weights: EarlyExit,
        x: torch.Tensor,
        rows: torch.Tensor,
        token_ids: torch.Tensor,
        q: torch.Tensor,
    ) -> torch.Tensor:
        """See `Kernels`."""
        probs = torch.empty(len(rows), dtype=torch.float32)
        self._exit_probs(
            probs.data_ptr(),
            x.data_ptr(),
            weights.head.data_ptr(),
            rows.data_ptr(),
            token_ids.data_ptr(),
            q.data_ptr(),
            weights.down.data_ptr(),
            weights.up.data_ptr(),
            weights.bias.data_ptr(),
            weights.scalars.data_ptr(),
            len(rows),
            x.shape[1],
            len(weights.down),
        )
        return probs


class NativeLinear:
    """A linear layer: [rows, in] -> [rows, out].

    Attributes:
        address: Of its `LinearArgs`.
    """

    def __init__(
        self,
        run: ctypes._NamedFuncPointer,
        args: LinearArgs,
        keep: tuple[torch.Tensor | NativeLinear | None, ...],
    ) -> None:
        """Takes what C++ needs to know.

        Args:
            run: `linear` of cpu.cpp, in the model's dtype.
            args: What it computes.
            keep: What the arguments point into.
        """
        self._run, self._args, self._keep = run, args, keep
        self.address = ctypes.addressof(args)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((len(x), self._args.outputs))
        self._run(out.data_ptr(), x.data_ptr(), self.address, len(x))
        return out

    def changed(self, down: NativeLinear, up: NativeLinear, rows: torch.Tensor) -> NativeLinear:
        """See `Kernels.changed`."""
        own, rank = self._args, down._args.outputs
        low_rank = (down._args.packed, up._args.packed, rows.data_ptr())
        args = LinearArgs(own.packed, own.bias, *low_rank, own.inputs, own.outputs, rank, len(rows))
        return NativeLinear(self._run, args, (self, down, up, rows))


class NativeStack(LayerStack):
    """Layers that one call into C++ runs.

    Between two layers, whose weights leave nothing in the caches, Python would take a tenth of their time: so
    all that can be known before a pass is.
    """

    def __init__(
        self,
        kernels: NativeKernels,
        layers: Sequence[Layer],
        cache: Cache,
        last_norm: torch.Tensor,
        eps: float,
    ) -> None:
        super().__init__(kernels, layers, cache, last_norm, eps)
        assert all(of.shape[-1] == kernels.cache_group for pair in cache for of in pair), "another's cache"
        self._run = kernels.decoder_layers
        self._args = (LayerArgs * len(layers))(*map(_layer_args, layers, cache))
        self._last_norm_address = last_norm.data_ptr()

    def run(
        self, attend: LayerAttention, residual: torch.Tensor, first: int = 0, end: int | None = None
    ) -> torch.Tensor:
        """See `LayerStack`."""
        assert isinstance(attend, NativeAttention)
        x = torch.empty_like(residual)
        self._run(
            x.data_ptr(),
            residual.data_ptr(),
            attend.rope_address,
            attend.args_address,
            ctypes.byref(self._args, first * ctypes.sizeof(LayerArgs)),
            (len(self) if end is None else end) - first,
            self._last_norm_address,
            self._eps,
        )
        return x

    def ending_in(self, layers: Sequence[Layer]) -> NativeStack:
        """See `LayerStack`."""
        first, other = len(self) - len(layers), copy.copy(self)
        other.layers = (*self.layers[:first], *layers)
        other._args = type(self._args).from_buffer_copy(self._args)
        other._args[first:] = list(map(_layer_args, layers, self._cache[first:]))
        return other


def _layer_args(layer: Layer, cache: tuple[torch.Tensor, torch.Tensor]) -> LayerArgs:
    return LayerArgs(
        layer.input_norm.data_ptr(),
        _address(layer.q_norm),
        _address(layer.k_norm),
        layer.post_norm.data_ptr(),
        *(linear.address for linear in _linears(layer)),
        *(of.data_ptr() for of in cache),
        layer.window or 0,
    )


def _linears(layer: Layer) -> list[NativeLinear]:
    """All four, or fewer: those of a shard whose outputs are added up are more than linear."""
    every = (layer.qkv, layer.out, layer.gate_up, layer.down)
    return [linear for linear in every if isinstance(linear, NativeLinear)]


class NativeAttention(LayerAttention):
    """Attention of one pass: the arguments that all layers share are laid out once.

    Attributes:
        rope_address: Of its `RopeArgs`.
        args_address: Of its `AttendArgs`.
    """

    def __init__(
        self,
        rope_and_cache: ctypes._NamedFuncPointer,
        attend: ctypes._NamedFuncPointer,
        heads: Heads,
        rope: RopeTable,
        eps: float,
        rows: Rows,
    ) -> None:
        self._rope_and_cache, self._attend = rope_and_cache, attend
        self._keep = (rows, rope)  # the structures below point into their tensors
        shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim)
        self._width = heads.num_heads * heads.head_dim
        positions = rows.positions.data_ptr()
        self._rope = RopeArgs(
            positions, rows.slots.data_ptr(), rope.cos_sin.data_ptr(), len(rows.positions), *shape, eps
        )
        self._args = AttendArgs(
            positions,
            rows.parents.data_ptr(),
            rows.row_starts.data_ptr(),
            rows.context_lens.data_ptr(),
            rows.block_tables.data_ptr(),
            rows.branching.data_ptr(),
            *rows.block_tables.shape,
            *shape,
            heads.head_dim**-0.5,
        )
        self.rope_address, self.args_address = ctypes.addressof(self._rope), ctypes.addressof(self._args)

    def __call__(
        self,
        qkv: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        window: int | None,
    ) -> torch.Tensor:
        """See `LayerAttention`."""
        out = qkv.new_empty((len(qkv), self._width))
        q, k, v = qkv.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
        self._rope_and_cache(
            self.rope_address,
            q,
            k,
            v,
            _address(q_norm),
            _address(k_norm),
        )
        self._attend(self.args_address, q, k, v, out.data_ptr(), window or 0)
        return out


def _change_args(change: TokenChange) -> ChangeArgs:
    weights = (change.said, change.before, change.up, change.befores, change.afters)
    rank, hidden = change.said.shape
    return ChangeArgs(*(of.data_ptr() for of in weights), hidden, rank, UNIT_EPS)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> panels as cpu.cpp describes them: [out / 32, in / group, 32, group], padded with zeros."""
    num_out, num_in = weight.shape
    group = 4 // weight.itemsize
    weight = F.pad(weight, (0, 0, 0, -num_out % PANEL))
    return weight.view(-1, PANEL, num_in // group, group).transpose(1, 2)


def unsupported_reason(head_dim: int, *widths: int) -> str | None:
    """Why the native kernels cannot run a model of these sizes, or None."""
    if BLOCK_SIZE != LANES:
        return f"cache blocks of {BLOCK_SIZE} tokens (native kernels need {LANES})"
    odd = [size for size in (head_dim, *widths) if size % LANES]
    return f"sizes {odd} are not multiples of {LANES}" if odd else None
