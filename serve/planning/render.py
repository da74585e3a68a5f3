"""Print a plan: a table of layouts, the assumptions, and why other layouts are invalid."""

import math
from collections.abc import Iterable

from engine.counted import counted
from serve.planning.memory import GIB
from serve.planning.plan import ORDER, Layout, Plan, RefusedLayout
from serve.planning.serving_limits import ServingLimit
from serve.terminal import Column, ColumnTable, results, wrapped

SHOWN = 8
INDENT = "    "
"""Of a refusal's second line and those after it."""


def render(plan: Plan, *, everything: bool = False) -> None:
    """Print to stdout. ``everything``: all layouts and refusals, instead of the best layouts and one refusal of each kind."""
    console = results()

    def say(sentences: Iterable[str]) -> None:
        for sentence in sentences:
            lines = wrapped(sentence, console.width, then=INDENT if sentence.startswith(" ") else "")
            console.print("\n".join(lines), markup=False, soft_wrap=True)

    say([_asked(plan)])
    if plan.layouts:
        shown = list(plan.layouts) if everything else _most_telling(plan)
        console.print(_table(plan, shown))
        say(_notes(plan, shown))
    else:
        say(["", "No layout is valid."])
    say(_refusals(plan.refused, everything))


def shortened(number: float) -> str:
    """At most three digits and a letter: 8.14M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 1000 * size else f"{number / size:,.0f}{letter}"
    return f"{number:.0f}"


def _most_telling(plan: Plan) -> list[Layout]:
    """The best layout of each tp x pp x dp (ep changes little), and always the best one that can be served today."""
    best: dict[tuple[int, int, int], Layout] = {}
    for layout in plan.layouts:
        best.setdefault((layout.topology.tp, layout.topology.pp, layout.topology.dp), layout)
    shown = list(best.values())[:SHOWN]
    first = plan.first_served()
    return shown if first is None or first in shown else [*shown, first]


def _asked(plan: Plan) -> str:
    inputs = plan.inputs
    work = inputs.workload
    return (
        f"{inputs.shape.name} in {inputs.format.name} on {inputs.fleet}: "
        f"{counted(work.concurrency, 'sequence')} of {work.context_tokens:,} tokens, steps of {work.step_tokens:,} tokens"
        f"{', KV in fp8' if work.kv_element_bytes == 1 else ''}"
        f"{', ' + counted(inputs.redundant_experts, 'expert') + ' more on each ep position' if inputs.redundant_experts else ''}"
        f"{f', {inputs.draft.name} as its draft model' if inputs.draft else ''}"
    )


def _table(plan: Plan, layouts: Iterable[Layout]) -> ColumnTable:
    columns = [
        Column(heading="#", is_key=True),
        Column(heading="rep-\nlicas"),
        Column(heading="layout of one", is_text=True),
        *(Column(heading=f"{title}\nGiB/rank") for title in ("weights", "activ.", "reserve", "KV")),
        Column(heading="tokens\nthat fit"),
        Column(heading="at full\ncontext"),
    ]
    if plan.has_floors:
        columns += [Column(heading=heading) for heading in ("tokens/s\nat most", "each ms\nat least", "first s\nat least")]
    columns.append(Column(heading="served\ntoday", is_text=True))
    return ColumnTable(columns, [(str(plan.layouts.index(layout) + 1), *_cells(layout, plan.has_floors)) for layout in layouts])


def _cells(layout: Layout, with_floors: bool) -> list[str]:
    fullest = layout.fullest
    parts = (fullest.held_weights_bytes, fullest.activation_bytes, fullest.reserve_bytes, fullest.kv_budget_bytes)
    replicas = layout.placement.replicas
    cells = [str(replicas), str(layout.topology), *(f"{part / GIB:.1f}" for part in parts), shortened(layout.total_kv_tokens)]
    cells.append(f"{layout.at_full_context * replicas} of {layout.running * replicas}")
    if with_floors:
        floors = layout.floors
        cells += [shortened(layout.total_tokens_per_s), f"{floors.token_s * 1e3:.1f}", f"{floors.first_token_s:.2f}"]
    why = ", ".join(limit.code for limit in layout.limits)
    cells.append(f"{'yes' if layout.is_served_today else 'no'}{f' ({why})' if why else ''}")
    return cells


def _notes(plan: Plan, shown: Iterable[Layout]) -> list[str]:
    lines = [
        "",
        f"{counted(len(plan.layouts), 'layout is', 'layouts are')} valid{'; --all lists each' if len(plan.layouts) > 1 else ''}. {ORDER}",
    ]
    if plan.has_floors:
        lines.append(
            "Speeds are theoretical limits: every byte read once, every product computed once, experts used evenly, "
            "all sequences at full context. Each: time between tokens of a stream; first: time to first token of one full-length prompt."
        )
    else:
        lines.append("Name the GPU (for example 8xH100-80G) to see speeds; the order here is that of a typical GPU.")
    lines += [f"{limit.code}: {limit.sentence}." for limit in _distinct(shown)]
    first = plan.first_served()
    if first is not None and first is not plan.layouts[0]:
        number = plan.layouts.index(first) + 1
        lines.append(f"The best that `manta serve` supports today is number {number}: {first.placement.replicas} x {first.topology}.")
    elif first is None:
        lines.append("`manta serve` supports none of them today.")
    return lines


def _distinct(layouts: Iterable[Layout]) -> list[ServingLimit]:
    return list(dict.fromkeys(limit for layout in layouts for limit in layout.limits))


def _refusals(refused: tuple[RefusedLayout, ...], everything: bool) -> Iterable[str]:
    if not refused:
        return
    yield ""
    yield f"{counted(len(refused), 'layout is', 'layouts are')} invalid{'' if everything else ', for example (--all lists each)'}:"
    if everything:
        yield from (f"  {written(one.sizes)}: {one.refusal.sentence}" for one in refused)
        return
    alike: dict[str, list[RefusedLayout]] = {}
    for one in refused:
        alike.setdefault(one.refusal.reason, []).append(one)
    for ones in alike.values():
        largest = max(ones, key=lambda one: math.prod(one.sizes.values()))  # the one that comes nearest, where memory is short
        yield f"  {f'{len(ones)} like ' if len(ones) > 1 else ''}{written(largest.sizes)}: {largest.refusal.sentence}"


def written(sizes: dict[str, int]) -> str:
    """Axis sizes as text; they need not form a valid topology."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
