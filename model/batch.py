"""The input of one forward pass, with the shape of every tensor.

T tokens in the batch, S sequences, R rows whose logits are needed, M the most blocks of any sequence.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """The tensors of one step on one rank. The tokens of a sequence are adjacent, and sequences are in the order of S.

    Sequences that compute exactly one token come first (`num_decodes` of them), so that a backend can handle the two kinds separately
    without sorting.
    """

    tokens_T: Tensor
    """int64"""
    positions_T: Tensor
    """int64: position of each token in its sequence, from 0"""
    slots_T: Tensor
    """int64: where each token's K and V are written: block * block_tokens + offset. Negative = nowhere; captured steps only."""
    block_tables_SM: Tensor
    """int32: blocks of each sequence in order, padded with 0"""
    lengths_S: Tensor
    """int32: `context_lengths` on the device"""
    query_starts: tuple[int, ...]
    """S + 1 offsets into T: sequence s computes tokens [query_starts[s], query_starts[s + 1])"""
    context_lengths: tuple[int, ...]
    """S: tokens of each sequence that have K and V once this step has written its own. Empty in a captured step: the lengths change from
    one replay to the next, and only the device reads them."""
    num_decodes: int
    logit_rows_R: Tensor
    """int64: the tokens (indices into T) whose logits are computed, ascending"""

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @property
    def num_sequences(self) -> int:
        return self.block_tables_SM.shape[0]
