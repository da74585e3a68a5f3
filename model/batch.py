"""Everything one forward pass needs. Every shape is stated here.

T tokens in the batch, S sequences, R rows whose logits are wanted, M the most blocks of any sequence.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """The tensors of one step on one rank. Tokens of a sequence lie together, sequences in the order of S.

    Sequences that compute exactly one token come first (`num_decodes` of them), so that a backend can treat the two
    kinds apart without sorting.
    """

    tokens_T: Tensor
    """int64"""
    positions_T: Tensor
    """int64: place of each token in its sequence, from 0"""
    slots_T: Tensor
    """int64: where each token's K and V go: block * block_tokens + offset. Below 0 = nowhere, in a captured step only."""
    block_tables_SM: Tensor
    """int32: blocks of each sequence in order, padded with 0"""
    lengths_S: Tensor
    """int32: `context_lengths`, where the device reads them"""
    query_starts: tuple[int, ...]
    """S + 1 offsets into T: sequence s computes tokens [query_starts[s], query_starts[s + 1])"""
    context_lengths: tuple[int, ...]
    """S: tokens of each sequence that have K and V once this step has written its own. None are told where the step is captured: they
    change from one replay to the next, and only the device reads them then."""
    num_decodes: int
    logit_rows_R: Tensor
    """int64: the tokens (indices into T) whose logits are computed, ascending"""

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @property
    def num_sequences(self) -> int:
        return self.block_tables_SM.shape[0]
