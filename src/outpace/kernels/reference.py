"""Every kernel in plain torch: slow, obvious, and what the native ones are tested against."""

from __future__ import annotations

import torch

from outpace.config import BLOCK_SIZE
from outpace.kernels.base import Heads, Kernels, LayerAttention, Linear, RopeTable, Rows
from outpace.kernels.linear import packed_linear
from outpace.kernels.reference_sampling import filter_logits_, noisy_argmax


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / rms(x)` over the last dimension, rounded before the weight as Hugging Face does."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class ReferenceAttention(LayerAttention):
    """Gathers each row's keys by position, then softmax in float32."""

    def __init__(self, heads: Heads, rope: RopeTable, eps: float, rows: Rows) -> None:
        self._heads, self._eps, self._rows = heads, eps, rows
        cos, sin = rope.cos_sin[rows.positions.long()].unsqueeze(1).chunk(2, dim=-1)
        self._cos, self._sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)  # [rows, 1, head_dim]
        self._paths = [path for s in range(len(rows.context_lens)) for path in _paths(rows, s)]

    def __call__(
        self,
        qkv: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        window: int | None,
    ) -> torch.Tensor:
        heads, num_rows = self._heads, len(self._rows.positions)
        q, k, v = qkv.view(num_rows, -1, heads.head_dim).split(
            [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1
        )
        q = self._rotate(q if q_norm is None else rms_norm(q, q_norm, self._eps))
        k = self._rotate(k if k_norm is None else rms_norm(k, k_norm, self._eps))
        block, offset = self._rows.slots.long() // BLOCK_SIZE, self._rows.slots.long() % BLOCK_SIZE
        group = v_cache.shape[-1]
        k_cache[block, :, :, offset] = k.unflatten(-1, (-1, group))
        v_cache[block, :, offset // group, :, offset % group] = v

        out = torch.empty(num_rows, heads.num_heads, heads.head_dim, dtype=qkv.dtype)
        for row, path in enumerate(self._paths):
            slots = path if window is None else path[-window:]
            block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
            keys = k_cache[block, :, :, offset].flatten(-2).float()  # [path, kv_heads, dim]
            values = v_cache[block, :, offset // group, :, offset % group].float()
            query = q[row].float().view(heads.num_kv_heads, -1, heads.head_dim)
            weights = torch.einsum("hgd,phd->hgp", query, keys) * heads.head_dim**-0.5
            mixed = torch.einsum("hgp,phd->hgd", weights.softmax(-1), values)
            out[row] = mixed.reshape(heads.num_heads, heads.head_dim).to(qkv.dtype)
        return out.view(num_rows, -1)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.float().chunk(2, dim=-1)
        return (x.float() * self._cos + torch.cat((-right, left), -1) * self._sin).to(x.dtype)


def _paths(rows: Rows, sequence: int) -> list[torch.Tensor]:
    """For each row of a sequence the cache slots it attends to, by position."""
    table, context = rows.block_tables[sequence].tolist(), int(rows.context_lens[sequence])
    slots = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(context)]
    paths: list[list[int]] = []
    for row in range(int(rows.row_starts[sequence]), int(rows.row_starts[sequence + 1])):
        parent = int(rows.parents[row])
        paths.append([*(paths[parent] if parent >= 0 else slots), int(rows.slots[row])])
    return [torch.tensor(path) for path in paths]


class ReferenceKernels(Kernels):
    """The backend of plain torch."""

    name = "reference"
    build = "reference"

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """See `Kernels`. Products in float32 where torch's with AMX depend on the batch."""
        if weight.dtype is torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16"):
            wide = packed_linear(weight.float(), None if bias is None else bias.float())
            return lambda x: wide(x.float()).to(x.dtype)
        return packed_linear(weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels`."""
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Kernels`."""
        residual += delta
        return rms_norm(residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def attention(self, heads: Heads, rope: RopeTable, eps: float, rows: Rows) -> LayerAttention:
        """See `Kernels`."""
        return ReferenceAttention(heads, rope, eps, rows)

    def filter_logits_(
        self, logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
    ) -> None:
        """See `Kernels`."""
        filter_logits_(logits, top_k, top_p, min_p)

    def noisy_argmax(
        self, logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, noisy: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels`."""
        return noisy_argmax(logits, seeds, positions, noisy)
