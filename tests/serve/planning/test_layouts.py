"""Which layouts there are, on which hosts, in which order, and why the others cannot be."""

import re
from dataclasses import replace

import pytest

from parallel.topology import Topology
from serve.planning.errors import PlanError
from serve.planning.formats import BF16, FORMATS, STORED_FP8, STORED_QUANTISED
from serve.planning.hardware import GPUS, parse_gpus
from serve.planning.placement import place_replica
from serve.planning.plan import Plan, axis_sizes, make_plan
from serve.planning.serving_limits import serving_limits
from tests.serve.planning.plan_inputs import ask

ADVICE = re.compile(r"\b(use|choose|give)\b")
FLEETS = [("0.5B", "16x24G", 1), ("57B-A14B", "8xH100-80G", 1), ("57B-A14B", "4xA100-80G", 3), ("72B", "8xA100-40G", 2), ("7B", "1x24G", 1)]


@pytest.fixture(scope="module", params=FLEETS, ids=str)
def plan(request: pytest.FixtureRequest) -> Plan:
    size, gpus, hosts = request.param
    return make_plan(ask(f"Qwen2-{size}", gpus, hosts=hosts))


def test_every_valid_layout_is_a_topology_with_all_its_ranks(plan: Plan) -> None:
    assert plan.layouts
    for layout in plan.layouts:
        topology = layout.topology
        assert len(layout.ranks) == topology.size
        assert [topology.coordinates(rank).pp for rank in (0, topology.size - 1)] == [0, topology.pp - 1]


def test_every_valid_layout_holds_its_weights_and_a_context_on_every_rank(plan: Plan) -> None:
    work, gpu = plan.inputs.workload, plan.inputs.fleet.gpu
    for layout in plan.layouts:
        one_group = layout.kv_tokens // layout.topology.dp
        assert one_group >= work.context_tokens
        for rank in layout.ranks:
            kv_bytes = one_group * rank.kv_bytes_per_token
            assert rank.weights.num_bytes + rank.activation_bytes + rank.reserve_bytes + kv_bytes <= gpu.memory_bytes


def test_replicas_fill_no_more_gpus_than_there_are(plan: Plan) -> None:
    fleet = plan.inputs.fleet
    for layout in plan.layouts:
        assert layout.topology.size * layout.placement.replicas <= fleet.num_gpus
        assert layout.placement.gpus_per_host * layout.placement.hosts_per_replica == layout.topology.size
        assert layout.placement.gpus_per_host <= fleet.gpus_per_host
        assert layout.topology.tp <= fleet.gpus_per_host


def test_every_reason_is_a_sentence_that_says_what_to_do(plan: Plan) -> None:
    for one in plan.refused:
        assert ADVICE.search(one.refusal.sentence), one
        assert len(one.refusal.sentence.split()) >= 8


def test_each_combination_of_axes_has_its_answer_once(plan: Plan) -> None:
    asked = list(axis_sizes(plan.inputs.fleet.num_gpus, has_experts=plan.inputs.shape.moe is not None))
    assert len(plan.layouts) + len(plan.refused) == len(asked) == len({tuple(sizes.values()) for sizes in asked})


def test_the_order_is_the_one_that_is_told(plan: Plan) -> None:
    assert [layout.holds_all for layout in plan.layouts] == sorted((layout.holds_all for layout in plan.layouts), reverse=True)
    alike = [layout for layout in plan.layouts if layout.holds_all == plan.layouts[0].holds_all]
    rates = [float(f"{layout.total_tokens_per_s:.3g}") for layout in alike]
    assert rates == sorted(rates, reverse=True)


def reasons(plan: Plan) -> dict[str, str]:
    return {one.refusal.reason: one.refusal.sentence for one in plan.refused}


def test_28_heads_stand_on_8_ranks() -> None:
    made = make_plan(ask("Qwen2-7B", "8x24G"))
    assert Topology(tp=8) in {layout.topology for layout in made.layouts}


def test_the_mixture_lies_on_8_ranks_as_attention_4_x_2_and_experts_8() -> None:
    assert make_plan(ask("Qwen2-57B-A14B", "8xH100-80G", context_tokens=32768, concurrency=64)).layouts[0].topology == Topology(
        tp=4, dp=2, ep=8
    )


def test_weights_that_do_not_fit_are_told_in_gib() -> None:
    made = make_plan(ask("Qwen2-72B", "1xH200"))
    assert not made.layouts
    assert "135.4 GiB for weights" in reasons(made)["weights"]
    assert made.first_served() is None


def test_a_context_that_does_not_fit_is_answered_with_one_that_does() -> None:
    refused = make_plan(ask("Qwen2-7B", "1x24G", context_tokens=131_072))
    assert not refused.layouts
    found = re.search(r"--context (\d+)", reasons(refused)["context"])
    assert found is not None
    assert make_plan(ask("Qwen2-7B", "1x24G", context_tokens=int(found[1]))).layouts


def test_more_ranks_than_heads_layers_or_a_host_have_their_reasons() -> None:
    few_heads = reasons(make_plan(ask("Qwen2-0.5B", "32x24G")))
    assert "use at most 14" in few_heads["heads"]
    assert "use pp=24" in few_heads["layers"]
    assert "stages (pp) across hosts" in " ".join(
        one.refusal.sentence for one in make_plan(ask("Qwen2-72B", "4xA100-80G", hosts=2)).refused if one.refusal.reason == "host"
    )


def test_a_dense_model_is_told_to_use_replicas_instead_of_data_parallelism() -> None:
    dense = [one for one in make_plan(ask("Qwen2-7B", "2x80G")).refused if one.sizes["dp"] == 2 and one.sizes["ep"] == 1]
    assert [one.refusal.sentence.endswith("use more replicas") for one in dense] == [True]


def test_a_context_beyond_the_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(PlanError, match=r"at most 32768 tokens.*rope_scaling"):
        make_plan(ask("Qwen2-7B-Instruct", "8x80G", context_tokens=65_536))


@pytest.mark.parametrize(
    ("topology", "hosts", "expected"),
    [
        (Topology(tp=4), 1, (1, 4, 2)),
        (Topology(tp=3), 2, (1, 3, 4)),  # two a host, two GPUs of each idle
        (Topology(tp=8, pp=2), 2, (2, 8, 1)),
        (Topology(tp=2, pp=8), 4, (2, 8, 2)),
        (Topology(tp=4, dp=4, ep=16), 2, (2, 8, 1)),
        (Topology(tp=16), 2, None),  # a tp group over hosts
        (Topology(tp=8, pp=3), 2, None),  # more than there is
        (Topology(tp=4, pp=3), 2, None),  # two stages on one host, one on the other
    ],
    ids=str,
)
def test_a_replica_takes_whole_hosts_alike(topology: Topology, hosts: int, expected: tuple[int, int, int] | None) -> None:
    found = place_replica(topology, ask("Qwen2-72B", "8x80G", hosts=hosts).fleet)
    assert (found and (found.hosts_per_replica, found.gpus_per_host, found.replicas)) == expected


def test_what_is_served_today_is_asked_in_one_place() -> None:
    assert not any(serving_limits(format) for format in (*FORMATS.values(), *STORED_QUANTISED.values()))
    for limit in serving_limits(STORED_FP8):
        assert len(limit.sentence.split()) > 6
    made = make_plan(ask("Qwen2-57B-A14B", "8xH100-80G"))
    served = made.first_served()
    assert served is not None
    assert all(layout.limits for layout in made.layouts[: made.layouts.index(served)])
    assert all(layout.limits == serving_limits(BF16) for layout in made.layouts)


def test_experts_held_twice_take_room_from_kv_and_no_time() -> None:
    plain = ask("Qwen2-57B-A14B", "8xH100-80G", hosts=2)
    once, twice = ({layout.topology: layout for layout in make_plan(replace(plain, redundant_experts=extra)).layouts} for extra in (0, 1))
    wide = Topology(tp=4, dp=4, ep=16)
    assert twice[wide].kv_tokens < once[wide].kv_tokens
    assert twice[wide].floors == once[wide].floors
    assert twice[Topology(tp=8)].kv_tokens == once[Topology(tp=8)].kv_tokens, "one ep position holds all of them anyway"
    with pytest.raises(PlanError, match="no experts"):
        make_plan(replace(ask("Qwen2-7B", "1x24G"), redundant_experts=1))


@pytest.mark.parametrize(("text", "count", "name"), [("8xH100-80G", 8, "H100-80G"), ("H200", 1, "H200-141G"), ("4 x l4", 4, "L4-24G")])
def test_gpus_are_read_as_people_write_them(text: str, count: int, name: str) -> None:
    assert parse_gpus(text) == (count, GPUS[name])


def test_a_plain_size_is_memory_without_a_speed() -> None:
    count, gpu = parse_gpus("2x48G")
    assert (count, gpu.memory_bytes, gpu.speed) == (2, 48 * 10**9, None)
    assert not make_plan(ask("Qwen2-7B", "2x48G")).has_floors


@pytest.mark.parametrize("text", ["", "8x", "x", "8xH1000", "0xH100", "65xH100", "4x0G", "A100", "8 H100-80G"])
def test_gpus_that_are_not_known_are_answered_with_what_is(text: str) -> None:
    with pytest.raises(PlanError, match=r"write|give"):
        parse_gpus(text)
