"""The GPU backend: Triton kernels, and cuBLAS for linear layers unless they must not depend on the batch."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton

from outpace.kernels.base import Heads, Kernels, LayerAttention, Linear, RopeTable, Rows
from outpace.kernels.gpu import rows as row_kernels
from outpace.kernels.gpu import sampling
from outpace.kernels.gpu.attention import TritonAttention
from outpace.kernels.gpu.linear import invariant_linear


class TritonKernels(Kernels):
    """The backend in Triton.

    Everything but cuBLAS' linear layers gives a row the same bits in any batch.
    """

    name = "triton"

    def __init__(self, batch_invariant: bool) -> None:
        """Compiles nothing yet: Triton does so when a kernel first runs.

        Args:
            batch_invariant: Whether linear layers too are to give a row the same bits in any batch.
        """
        self.build = f"triton {triton.__version__}{', batch invariant' if batch_invariant else ''}"
        self._linear = invariant_linear if batch_invariant else _cublas_linear

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """See `Kernels`."""
        return self._linear(weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels`."""
        return row_kernels.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Kernels`."""
        return row_kernels.add_rms_norm(delta, residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        return row_kernels.silu_mul(gate_up)

    def attention(self, heads: Heads, rope: RopeTable, eps: float, rows: Rows) -> LayerAttention:
        """See `Kernels`."""
        return TritonAttention(heads, rope, eps, rows)

    def filter_logits_(
        self, logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
    ) -> None:
        """See `Kernels`."""
        sampling.filter_logits_(logits, top_k, top_p, min_p)

    def noisy_argmax(
        self, logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, noisy: torch.Tensor
    ) -> torch.Tensor:
        """See `Kernels`."""
        return sampling.noisy_argmax(logits, seeds, positions, noisy)


def _cublas_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    return partial(F.linear, weight=weight, bias=bias)
