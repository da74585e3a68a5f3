"""Which part of a logical axis a rank owns, and the corresponding slices of a stored tensor. Pure arithmetic."""

from dataclasses import dataclass
from typing import Literal

AxisName = Literal["in", "out", "group"]


@dataclass(frozen=True)
class Axis:
    """One dim of a stored tensor, in terms of the layer: its input or its output features.

    ``pack`` is how many logical elements one stored element holds: 1 for dense weights, 8 for int4 packed in int32,
    128 for the scales of a quantisation group of 128.
    """

    name: AxisName
    pack: int = 1


IN = Axis("in")
OUT = Axis("out")


@dataclass(frozen=True)
class Share:
    """The logical elements of an axis that one rank owns: ``spans`` in ascending order, out of ``size``."""

    size: int
    spans: tuple[range, ...]

    def __len__(self) -> int:
        return sum(len(span) for span in self.spans)

    def scaled(self, factor: int) -> "Share":
        """The same share with every element standing for ``factor`` consecutive ones (heads -> rows of heads)."""
        return Share(self.size * factor, tuple(range(s.start * factor, s.stop * factor) for s in self.spans))

    def stored(self, pack: int) -> tuple[slice, ...]:
        """Slices of a stored dim that holds ``pack`` logical elements each. A share that cuts through one is an error."""
        for span in self.spans:
            if any(border % pack and border != self.size for border in (span.start, span.stop)):
                raise ValueError(f"share {span} cuts through a stored element of {pack}; split in units of {pack}")
        return tuple(slice(-(-s.start // pack), -(-s.stop // pack)) for s in self.spans)


def whole(size: int) -> Share:
    return Share(size, (range(size),))


def split(size: int, rank: int, ranks: int, unit: int = 1) -> Share:
    """A contiguous, near-even share of an axis in whole ``unit``s. With fewer units than ranks some shares are empty.

    size=9, ranks=2:           0..4 | 5..8
    size=9728, ranks=3, unit=128 (76 units): 26 | 25 | 25 units
    """
    units = -(-size // unit)
    start, stop = -(-rank * units // ranks), -(-(rank + 1) * units // ranks)
    return Share(size, (range(min(start * unit, size), min(stop * unit, size)),))


@dataclass(frozen=True)
class HeadShare:
    """The query heads one rank holds and the KV heads they attend to.

    Query heads are split evenly; a KV head is held by every rank that has one of its query heads, so it is held
    twice where a border cuts its group, and more often where there are more ranks than KV heads. The function computed is the
    same as on one rank: no head is padded, no head is computed twice.

    9 query / 3 KV heads, 2 ranks:   rank 0: q 0-4, kv 0-1    rank 1: q 5-8, kv 1-2
    28 query / 4 KV heads, 8 ranks:  rank 0: q 0-3, kv 0      rank 1: q 4-6, kv 0     rank 2: q 7-10, kv 1 ...
    """

    query: Share
    kv: Share

    @property
    def kv_of_query(self) -> tuple[int, ...]:
        """For each local query head, the index of its KV head among this rank's."""
        group = self.query.size // self.kv.size
        first_kv = self.kv.spans[0].start
        return tuple(head // group - first_kv for span in self.query.spans for head in span)


def head_share(num_heads: int, num_kv_heads: int, rank: int, ranks: int) -> HeadShare:
    """The heads of one rank. See `HeadShare`; a rank beyond the number of query heads would have none: an error."""
    if ranks > num_heads:
        raise ValueError(f"{num_heads} query heads cannot be shared over {ranks} ranks; use at most {num_heads}")
    group = num_heads // num_kv_heads
    query = split(num_heads, rank, ranks)
    (span,) = query.spans
    kv = range(span.start // group, (span.stop - 1) // group + 1)
    return HeadShare(query=query, kv=Share(num_kv_heads, (kv,)))
