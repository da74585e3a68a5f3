"""Quick launches against Triton's. Nothing is compiled or launched here; fakes record what would be launched."""

from typing import Any, ClassVar

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from parallel.cuda import quick_launch
from parallel.cuda.quick_launch import QuickKernel, quick

MEMORY = torch.zeros(4096, dtype=torch.uint8)
STREAM = 77


class CudaDriver:
    """The part of Triton's interface that a launch uses."""

    def __init__(self) -> None:
        self.device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return STREAM + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Launcher(CudaLauncher):  # type: ignore[misc]
    """Triton's own, except for its last step."""

    seen: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, options: Any, scratch_size: int) -> None:
        self.launch = lambda *args: self.seen.append(args)
        self.global_scratch_size, self.profile_scratch_size = scratch_size, 0
        self.global_scratch_align = self.profile_scratch_align = 16
        self.launch_cooperative_grid, self.launch_pdl = options.launch_cooperative_grid, options.launch_pdl
        self.num_ctas, self.arg_annotations, self.kernel_signature = 1, (), b""


class Compiled:
    """What Triton's compiler would have produced."""

    scratch_size = 0

    def __init__(self, function: str, options: Any) -> None:
        self.function, self.run = function, Launcher(options, self.scratch_size)
        self.packed_metadata = (options.num_warps, options.num_ctas, 0)

    def launch_metadata(self, grid: Any, stream: int, *args: object) -> None:
        return None


class Uncompiled:
    """A kernel whose variants are distinguished by everything that Triton's compiler specialises on."""

    compiled = 0

    def _do_compile(self, key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool) -> Compiled:
        type(self).compiled += 1
        self.device_caches[device][0][key] = kernel = Compiled(f"{device} {signature} {constexprs} {options} {attrs}", options)  # type: ignore[attr-defined]
        return kernel


class SlowKernel(Uncompiled, JITFunction):  # type: ignore[misc]
    pass


class FastKernel(Uncompiled, QuickKernel):
    pass


def some_kernel(a, loose, free_pointer, n, free, eps, WIDTH: tl.constexpr, AGAIN: tl.constexpr = 3):  # type: ignore[no-untyped-def]
    tl.store(a, n)


def slow_kernel() -> SlowKernel:
    return SlowKernel(some_kernel, do_not_specialize=["free", "free_pointer"], do_not_specialize_on_alignment=["loose"])


@pytest.fixture
def cuda_driver(monkeypatch: pytest.MonkeyPatch) -> CudaDriver:
    found = CudaDriver()
    monkeypatch.setattr(driver, "_active", found)
    quick_launch._is_understood.cache_clear()
    monkeypatch.setattr(Launcher, "seen", [])
    monkeypatch.setattr(quick_launch, "_is_enabled", True)
    return found


def pointer(dtype: torch.dtype, offset: int) -> torch.Tensor:
    return MEMORY[offset : offset + 1024].view(dtype)


POINTERS = st.builds(pointer, st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.sampled_from([0, 8, 16, 24, 32]))
SIZES = st.sampled_from([0, 1, 2, 3, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**63, True, False, 1.0, 2.0])
FLOATS = st.sampled_from([0.0, 0.5, 1.0, 16.0, 1, 2])
WIDTHS = st.sampled_from([1, 16, True, 0.5, "ieee", "tf32", None])
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "AGAIN": st.integers(3, 4),
        "num_warps": st.sampled_from([4, 8]),
        "num_stages": st.integers(2, 3),
        "launch_pdl": st.booleans(),
        "enable_fp_fusion": st.booleans(),
        "launch_cooperative_grid": st.booleans(),
    },
)
CALLS = st.tuples(st.tuples(POINTERS, POINTERS, POINTERS | st.none(), SIZES, SIZES, FLOATS, WIDTHS), OPTIONS, st.integers(0, 1))
USUAL = (pointer(torch.float32, 0), pointer(torch.float32, 0), pointer(torch.float32, 0), 3, 3, 0.5, 16)


def launched(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], grid: Any = (3, 2)) -> tuple[Any, ...] | str:
    """The arguments of Triton's last step, with tensors as addresses and without those that kernels do not get; or an error."""
    Launcher.seen.clear()
    try:
        kernel[grid](*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    (seen,) = Launcher.seen
    return tuple(_plain(value) for value in seen)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(each) for each in value)
    if isinstance(value, torch.Tensor):
        return int, value.data_ptr()
    return None if value is None or isinstance(value, knobs.HookChain) else (type(value), value)


def without_constants(seen: tuple[Any, ...] | str) -> Any:
    """The last two kernel arguments are constants, which the launcher skips."""
    if isinstance(seen, str):
        return seen
    return (*seen[:-1], seen[-1][:-2]) if quick_launch.VERSION != "3.6" else seen[:-2]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CALLS, min_size=1, max_size=12))
def test_quick_launches_equal_tritons(cuda_driver: CudaDriver, calls: list[Any]) -> None:
    slow, fast = slow_kernel(), FastKernel(slow_kernel())
    fast[1,](*USUAL)
    for args, options, device in calls * 2:
        cuda_driver.device = device
        assert without_constants(launched(fast, args, options)) == without_constants(launched(slow, args, options))


def test_only_the_first_launch_of_a_kind_goes_through_triton(cuda_driver: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastKernel(slow_kernel())
    expected = launched(fast, USUAL, {"num_warps": 8})
    monkeypatch.setattr(fast, "run", None)
    assert without_constants(launched(fast, USUAL, {"num_warps": 8})) == without_constants(expected)
    others = (pointer(torch.float32, 16), pointer(torch.float32, 8), pointer(torch.float32, 8), 3, 2**31 - 1, 1.5, 16)
    assert (
        launched(fast, others, {"num_warps": 8}, grid=[5, 1, 2]) != expected
    )  # another grid, tensor_addresses and numbers, and no TypeError
    with pytest.raises(TypeError, match="NoneType"):
        fast[3, 2](*USUAL, num_warps=4)


def test_profiler_hooks_see_every_launch(cuda_driver: CudaDriver) -> None:
    fast, seen = FastKernel(slow_kernel()), []
    launched(fast, USUAL, {})
    fast.add_pre_run_hook(lambda *args, **kwargs: seen.append("before"))
    launched(fast, USUAL, {})
    fast.pre_run_hooks.clear()
    hook = seen.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert any(isinstance(value, knobs.HookChain) for value in _raw(fast))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert not any(isinstance(value, knobs.HookChain) for value in _raw(fast))
    assert seen == ["before"]


def _raw(kernel: Any) -> tuple[Any, ...]:
    Launcher.seen.clear()
    kernel[3,](*USUAL)
    return Launcher.seen[0]


def test_kernels_with_scratch_memory_or_callable_grids_are_launched_by_triton(
    cuda_driver: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = FastKernel(slow_kernel())
    launched(fast, USUAL, {})
    assert launched(fast, USUAL, {}, grid=lambda given: (given["n"],)) == launched(slow_kernel(), USUAL, {}, grid=(3,))
    monkeypatch.setattr(Compiled, "scratch_size", 1)
    triton.set_allocator(lambda size, align, stream: MEMORY)
    try:
        expected = launched(fast, USUAL, {"num_warps": 8})
        assert launched(fast, USUAL, {"num_warps": 8}) == expected
        assert not isinstance(expected, str)
        assert (int, MEMORY.data_ptr()) in expected
    finally:
        triton.set_allocator(None)


def test_ever_changing_sizes_do_not_fill_memory(cuda_driver: CudaDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_launch, "MAX_KEPT", 8)
    fast = FastKernel(slow_kernel())
    for n in range(40):
        launched(fast, (*USUAL[:3], n, *USUAL[4:]), {})
        assert len(fast._launches) <= 8


def test_with_another_triton_version_all_launches_are_tritons(
    cuda_driver: CudaDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quick_launch, "VERSION", "9.9")
    caplog.set_level("INFO")
    fast = FastKernel(slow_kernel())
    for _ in range(3):
        assert launched(fast, USUAL, {}) == launched(slow_kernel(), USUAL, {})
    assert not fast._launches
    assert len(caplog.records) == 1


def test_unless_enabled_all_launches_are_tritons(cuda_driver: CudaDriver) -> None:
    quick_launch.enable(False)
    fast = FastKernel(slow_kernel())
    for _ in range(2):
        assert launched(fast, USUAL, {}) == launched(slow_kernel(), USUAL, {})
    assert not fast._launches
    quick_launch.enable(True)
    launched(fast, USUAL, {})
    assert fast._launches


def test_the_interpreter_is_not_affected() -> None:
    interpreted = triton.runtime.interpreter.InterpretedFunction(some_kernel)
    assert quick(interpreted) is interpreted
    assert isinstance(quick(slow_kernel()), QuickKernel)
