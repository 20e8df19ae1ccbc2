"""The flat tensors of one forward pass, what the pass gives back, and what verification decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from outpace.device import upload
from outpace.kernels import Rows
from outpace.request import Sequence, TokenLogprob
from outpace.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's part in a step: how many of its known tokens to compute.

    Attributes:
        sequence: Who runs.
        num_known: Known tokens to compute, at least one.
        samples: Whether they reach the last known token, so that new ones follow.
    """

    sequence: Sequence
    num_known: int
    samples: bool


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """One sequence's share of a batch: `num_known` known tokens, then the nodes of its tree.

    Attributes:
        sequence: Whose rows these are.
        first_row: Its first row in the batch.
        num_known: Known tokens computed in this pass, at least one.
        tree: Draft nodes that follow them.
        first_sample: Where its logits begin among the sampled rows: those of the last known token, then
            one row per node; None while the prompt is not yet at its end.
    """

    sequence: Sequence
    first_row: int
    num_known: int
    tree: DraftTree
    first_sample: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass over ragged rows. Complete when it exists, and on the host at first.

    Row r of a sequence sits in the cache at logical index `context_len + r`. Its position (for rotary
    embedding and attention) is that of its path: a tree node at depth d has the position of the last
    known token plus d, and attends the context and its own ancestors.

    Attributes:
        entries: One per sequence, in row order.
        token_ids: [rows] int64.
        rows: Where each row stands.
        sample_rows: [samples] int64, the rows whose logits are wanted.
    """

    entries: tuple[BatchEntry, ...]
    token_ids: torch.Tensor
    rows: Rows
    sample_rows: torch.Tensor

    @property
    def num_rows(self) -> int:
        """Token rows computed in this pass."""
        return self.token_ids.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device; on the CPU itself."""
        if device.type == "cpu":
            return self
        token_ids, sample_rows, *placed = upload(
            [self.token_ids, self.sample_rows, *fields_of(self.rows)], device
        )
        return replace(self, token_ids=token_ids, sample_rows=sample_rows, rows=Rows(*placed))


def fields_of(rows: Rows) -> list[torch.Tensor]:
    """The tensors of `rows`, in the order in which it takes them."""
    return [getattr(rows, field.name) for field in fields(rows)]


@dataclass(frozen=True, slots=True)
class StreamOutput:
    """What the streams of a pass say of the tokens after next.

    Attributes:
        hidden: [anchors, streams, hidden], last hidden states after the final norm.
        places: For each row that got streams its index in `hidden`: rows are known by the index of their
            entry in the batch and their node in its tree, -1 for the last known token.
        num_rows: Their rows, each counted as the share of the layers that it went through.
    """

    hidden: torch.Tensor
    places: Mapping[tuple[int, int], int]
    num_rows: float


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What the target model says about a batch.

    Attributes:
        logits: [samples, vocab], in the model's dtype.
        hidden: [rows, hidden], last hidden states after the final norm, if a proposer asked for them.
        streams: What streams say that ran beside the rows, if there were any.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    streams: StreamOutput | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What verification decided for one sequence.

    Attributes:
        path: Accepted tree nodes, root side first (depth d + 1 at index d).
        token_ids: Their tokens and then one from the target: never empty.
        logprobs: One per token, if the request asked for them.
    """

    path: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One Decision per batch entry; None where the entry does not sample in this step."""

    decisions: tuple[Decision | None, ...]
