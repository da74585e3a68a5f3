"""Routed experts of an MoE layer: many small gated MLPs, of which each token uses a few. N rows (tokens that reach this rank),
A experts per row, D model width.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.axes import split, whole
from parallel.dispatch import ELSEWHERE, LocalDispatch, TokenDispatch
from parallel.expert_moves import Drop, Move, plan_moves, receive_expert, send_expert
from parallel.expert_placement import ExpertPlacement, balanced_placement
from parallel.groups import ParallelGroups
from parallel.linear import Linear, ShapeMismatch, Slot
from parallel.native.experts import NativeExperts
from parallel.native.library import native
from parallel.packed_format import PackedFormat
from parallel.quantised_format import QuantisedFormat
from parallel.weight_format import Dense, StoredTensor, WeightFormat

if TYPE_CHECKING:
    from parallel.cuda.grouped_experts import GroupedExperts


class RoutedExperts(nn.Module):
    """Experts placed over the ``ep`` axis, each with its intermediate features split over ``expert_tp``.

    Checkpoint parts are named ``{expert}.gate``, ``{expert}.up`` and ``{expert}.down``. Every rank lists the slots of all experts, so
    that strict loading covers them, and reads only those that it `wants`.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        groups: ParallelGroups,
        format: WeightFormat,
        placement: ExpertPlacement | None = None,
        dispatch: TokenDispatch | None = None,
        intermediate_unit: int = 1,
    ) -> None:
        """``intermediate_unit``: features that must stay on one rank together, such as a quantisation group."""
        super().__init__()
        self.placement = placement or balanced_placement(num_experts, groups.ep.size)
        if (self.placement.num_experts, self.placement.num_ranks) != (num_experts, groups.ep.size):
            raise ValueError(f"{self.placement!r} does not fit {num_experts} experts over an ep axis of {groups.ep.size}")
        self.num_held = tuple(len(self.placement.held_by(rank)) for rank in range(groups.ep.size))
        """How many experts each ep position holds; unchanged by moves."""
        self.dispatch = dispatch or LocalDispatch(groups, self.placement)
        self.num_experts = num_experts
        self.ep = groups.ep
        self.load_E: Tensor | None = None
        """Tokens of this rank's sequences sent to each expert since `reset_load`; None if there is only one ep position."""
        self._grouped: GroupedExperts | None = None
        self._native: NativeExperts | None = None
        self._awaited: dict[int, int] = {}
        """While loading: how many tensors of each expert held here are still missing."""

        def make_expert() -> Expert:
            share = split(intermediate_size, groups.expert_tp.rank, groups.expert_tp.size, intermediate_unit)
            up = Linear(in_share=whole(hidden_size), out_parts={"gate": share, "up": share}, bias=False, format=format, bias_dtype=_NO_BIAS)
            down = Linear(in_share=share, out_parts={"down": whole(hidden_size)}, bias=False, format=format, bias_dtype=_NO_BIAS)
            return Expert(up, down)

        self._make_expert = make_expert
        self._template_expert = make_expert()
        self.held = nn.ModuleDict({str(number): make_expert() for number in self.placement.held_by(groups.ep.rank)})

    def slots(self) -> Iterator[Slot]:
        for number in range(self.num_experts):
            for slot in self._template_expert.slots():
                yield Slot(f"{number}.{slot.part}", slot.tensor, slot.shape)

    def wants(self, part: str) -> bool:
        """Whether this rank holds (some of) a part and has to read it."""
        return part.split(".")[0] in self.held

    @property
    def is_streaming(self) -> bool:
        return self._template_expert.up.is_streaming

    def allocate(self, device: torch.device) -> None:
        for expert in self._experts():
            expert.up.allocate(device)
            expert.down.allocate(device)
        self._grouped = self._native = None  # they refer to the previous tensors
        num_slots = sum(1 for _ in self._template_expert.slots())
        self._awaited = {int(number): num_slots for number in self.held}
        if self.ep.size > 1:
            self.load_E = torch.zeros(self.num_experts, dtype=torch.int64, device=device)

    def load(self, part: str, tensor: str, stored: StoredTensor) -> int:
        """Load this rank's share of ``stored`` and return the bytes read: 0 for an expert held elsewhere. An expert's last tensor finishes
        it. Thread-safe.

        Raises:
            ShapeMismatch: also for an expert held elsewhere.
        """
        number, name = part.split(".")
        if not self.wants(part):
            wanted = next(slot.shape for slot in self._template_expert.slots() if (slot.part, slot.tensor) == (name, tensor))
            if stored.shape != wanted:
                raise ShapeMismatch(stored.name, stored.shape, wanted)
            return 0
        expert = self._expert(int(number))
        num_bytes = (expert.down if name == "down" else expert.up).load(name, tensor, stored)
        with _LOADING:
            self._awaited[int(number)] -= 1
            is_whole = not self._awaited[int(number)]
        if is_whole:  # at once, not when all experts are loaded: a layer of 57B-A14B is 3.5 GB as stored, a quarter of that in int4
            self._finish(int(number))
        return num_bytes

    def finish(self) -> None:
        """Check that no tensor is missing. (Each expert was finished with its last tensor.)"""
        incomplete = {number: missing for number, missing in self._awaited.items() if missing}
        assert not incomplete, f"tensors of experts that never came, by expert: {incomplete}"

    def _finish(self, number: int) -> None:
        expert = self._expert(number)
        expert.up.finish()
        expert.down.finish()

    def forward(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """(T, D): for each token the weighted sum of its experts, complete on every rank that has the token.

        ``expert_ids_TA`` (int64) are distinct within a row. Every rank of the stage must call this in the same step.
        """
        if self.load_E is not None:  # integers: deterministic whatever the order of additions on a GPU
            chosen = expert_ids_TA.flatten()
            self.load_E.index_add_(0, chosen, torch.ones_like(chosen))
        return self.dispatch(x_TD, expert_ids_TA, weights_TA, self._compute)

    def reset_load(self) -> None:
        if self.load_E is not None:
            self.load_E.zero_()

    def move_to(self, placement: ExpertPlacement) -> int:
        """Move experts between ranks, one after the other, until they are as in ``placement``. Returns the number of moves.

        All ranks of the ep group must call this between the same two steps with the same placement. Needs memory for one more expert.
        """
        num_moves = 0
        for move in plan_moves(self.placement, placement):
            match move:
                case Drop():
                    if move.rank == self.ep.rank:
                        del self.held[str(move.expert)]
                case Move():
                    num_moves += 1
                    self._send_or_receive(move)
        self.placement = placement
        self._grouped = self._native = None
        self.dispatch.set_placement(placement)
        return num_moves

    def _send_or_receive(self, move: Move) -> None:
        if move.source == self.ep.rank:
            send_expert(self._expert(move.expert).tensors, move.target, self.ep)
        elif move.target == self.ep.rank:
            assert self.load_E is not None
            expert = self._make_expert()
            expert.adopt(receive_expert(move.source, self.ep, self.load_E.device))
            self.held[str(move.expert)] = expert

    def _compute(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """The contribution of this rank's experts to each row, by the fastest available implementation.

        (``torch.nn.functional.grouped_mm`` measured the same as one expert after the other on CPU in torch 2.13.)
        """
        if x_ND.device.type == "cuda" and (grouped := self._on_cuda()) is not None:
            return grouped(x_ND, expert_ids_NA, weights_NA)
        if (native_kernel := self.native_experts()) is not None:
            return native_kernel(x_ND.float(), expert_ids_NA, weights_NA).to(x_ND.dtype)
        return self.compute_sequentially(x_ND, expert_ids_NA, weights_NA)

    def compute_sequentially(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """One pair of matrix products per expert that has rows: the fallback, and the reference for the kernels."""
        ids = expert_ids_NA.flatten()
        order = ids.argsort(stable=True)
        elsewhere, *counts = torch.bincount(ids - ELSEWHERE, minlength=self.num_experts + 1).tolist()
        order = order[elsewhere:]  # assignments of other ranks come first
        if len(order) == 0:
            return torch.zeros_like(x_ND)
        outputs = self._run(x_ND, order // expert_ids_NA.shape[1], {number: count for number, count in enumerate(counts) if count})
        return _weighted_sum(outputs, order, weights_NA)

    def _run(self, x_ND: Tensor, rows: Tensor, counts: dict[int, int]) -> Tensor:
        """Run assignments, sorted by expert, through their experts."""
        used = [self._expert(number) for number in counts]
        parts = x_ND[rows].split(list(counts.values()))
        return torch.cat([expert(x) for expert, x in zip(used, parts, strict=True)])

    def native_experts(self) -> NativeExperts | None:
        """The CPU kernel for all experts of this rank, if there is one for their format."""
        library, format = native(), self._template_expert.up.format
        if library is None or not isinstance(format, PackedFormat) or format.kind not in library.kinds:
            return None
        if not any(self._template_expert.up.out_sizes):
            return None
        if self._native is None and self.held:
            up, down = ({int(n): format.packed(getattr(e, name).tensors) for n, e in self.held.items()} for name in ("up", "down"))
            assert {packed.lanes for packed in (*up.values(), *down.values())} == {library.lanes}, "see Expert.adopt"
            self._native = NativeExperts(library, self.num_experts, up, down)
        return self._native

    def _on_cuda(self) -> "GroupedExperts | None":
        """The CUDA kernels for all experts of this rank, if Triton is installed and they support the format."""
        if (
            self._grouped is None
            and self.held
            and find_spec("triton")
            and isinstance(self._template_expert.up.format, Dense | QuantisedFormat)
        ):
            from parallel.cuda.grouped_experts import GroupedExperts  # imports triton, which may not be installed

            up, down = ({int(n): getattr(e, name).tensors for n, e in self.held.items()} for name in ("up", "down"))
            self._grouped = GroupedExperts(self.num_experts, up, down)
        return self._grouped

    def _expert(self, number: int) -> "Expert":
        expert = self.held[str(number)]
        assert isinstance(expert, Expert)
        return expert

    def _experts(self) -> Iterator["Expert"]:
        return (self._expert(int(number)) for number in self.held)


class Expert(nn.Module):
    """This rank's share of one expert: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, up: Linear, down: Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def slots(self) -> Iterator[Slot]:
        yield from self.up.slots()
        yield from self.down.slots()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All loaded tensors, in the form in which the format multiplies them."""
        return {f"{name}.{tensor}": value for name, layer in self._layers.items() for tensor, value in layer.tensors.items()}

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Use the `tensors` of the same share of an expert from another rank, possibly from a host with another processor."""
        for name, layer in self._layers.items():
            theirs = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            layer.tensors = layer.format.received(theirs) if isinstance(layer.format, PackedFormat) else theirs

    @property
    def _layers(self) -> dict[str, Linear]:
        return {"up": self.up, "down": self.down}

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).split(self.up.out_sizes, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


_LOADING = Lock()
_NO_BIAS = torch.float32  # the dtype that a bias would have


def _weighted_sum(y_sorted: Tensor, order: Tensor, weights_NA: Tensor) -> Tensor:
    """From expert order back to rows: the weighted sum over each row's assignments; those computed elsewhere add nothing.

    Weights multiply in the model's dtype as in transformers' Qwen2MoE; the sum is rounded to it once. Gathering rows (instead of
    scatter-adding them) keeps the order of summation fixed on a GPU too.
    """
    num_rows, num_assigned = weights_NA.shape
    if len(order) < weights_NA.numel():
        y_sorted = torch.cat((y_sorted, y_sorted.new_zeros(1, y_sorted.shape[1])))
    position = order.new_full((weights_NA.numel(),), len(order))
    position[order] = torch.arange(len(order), device=order.device)
    y_NAD = y_sorted[position].view(num_rows, num_assigned, -1)
    summands = y_NAD * weights_NA.to(y_NAD.dtype).unsqueeze(-1)
    return summands.sum(dim=1, dtype=torch.promote_types(y_NAD.dtype, torch.float32)).to(y_NAD.dtype)
