"""Fast launches of Triton kernels: Triton spends most of a launch on the host rederiving what it derived at the launch before.

Put ``@quick`` above ``@triton.jit``; the launch syntax does not change. The first launch of a kind goes through Triton, and the compiled
kernel is cached under a key: the device, options and constants, and of every other argument at least as much as Triton's compiler
specialises on. The next launch with the same key calls Triton's C launcher directly. In all other cases (profiler hooks, a callable grid,
scratch memory of the kernel, descriptors, debugging, a Triton version not listed below) Triton launches as usual. Under Triton's
interpreter ``@quick`` does nothing, and nor does it before `enable`: only two kinds of these launches have run on a GPU yet, and no model.

Not checked again: whether a tensor is on the device (Triton checks it at the first launch), and whether globals of the kernel's module have
changed (they are constants here).
"""

import inspect
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

logger = logging.getLogger(__name__)

MAX_KEPT = 4096
"""Cached launches per kernel before the cache is cleared, so that an argument that always changes does not fill memory."""
LOW, HIGH = -(2**31), 2**31 - 1
"""Range of an int32; an argument beyond it is an int64 to the kernel."""
EMPTY = inspect.Parameter.empty
UNSET = object()
"""Marks an option that the caller did not give."""
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_pdl")
BEGINNING = "_launch(_x, _y, _z, _get_stream(_device), _function, _cooperative, _pdl, "
LAUNCHES = {
    "3.6": BEGINNING + "None, None, _packed, None, None, None, {arguments})",
    "3.7": BEGINNING + "_packed, None, None, None, None, None, _annotations, _signature, ({arguments},))",
}
"""How Triton's `CudaLauncher` calls the C launcher without scratch memory and hooks, by version."""
VERSION = ".".join(triton.__version__.split(".")[:2])


_is_enabled = False


def enable(is_enabled: bool) -> None:
    """Turn quick launches on or off for this process from now on (`RunnerConfig.quick_launches`)."""
    global _is_enabled
    _is_enabled = is_enabled


class QuickKernel(JITFunction):  # type: ignore[misc]
    """A Triton kernel with quick launches; see the module docstring."""

    def __init__(self, kernel: JITFunction) -> None:
        super().__init__(
            kernel.fn,
            version=kernel.version,
            do_not_specialize=kernel.do_not_specialize,
            do_not_specialize_on_alignment=kernel.do_not_specialize_on_alignment,
            debug=kernel.debug,
            noinline=kernel.noinline,
            repr=kernel._repr,
            launch_metadata=kernel.launch_metadata,
        )
        assert not any(name.startswith("_") for name in self.arg_names)
        self._launch: Callable[..., Any] = self._launch_first
        self._launches: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._kinds: tuple[str, ...] = ()
        """Kind of each argument that is not constexpr: tensor, int or float."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return partial(self._launch, grid) if _is_enabled else super().__getitem__(grid)

    def _launch_first(self, grid: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate the launch function for arguments of these kinds, and call it."""
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        changing = [param for param in self.params if not param.is_constexpr]
        kinds = tuple(kind for param in changing if (kind := _kind(given.get(param.name, param.default))) is not None)
        if len(kinds) < len(changing) or not _is_understood():
            return self.run(*args, grid=grid, warmup=False, **kwargs)
        self._kinds = kinds
        self._launch = _written(self, self._kinds)
        return self._launch(grid, *args, **kwargs)

    def launch_by_triton(self, grid: Any, args: tuple[Any, ...], options: dict[str, Any], to_key: Callable[..., tuple[Any, ...]]) -> None:
        """Launch through Triton, and cache the launch if possible."""
        given = {name: value for name, value in options.items() if value is not UNSET}
        kernel = self.run(*args, grid=grid, warmup=False, **given)
        changing = [(value, param) for value, param in zip(args, self.params, strict=True) if not param.is_constexpr]
        if kernel is None or any(_kind(value) != kind for (value, _), kind in zip(changing, self._kinds, strict=True)):
            return
        if any(param.do_not_specialize and type(value) is int and not LOW <= value <= HIGH for value, param in changing):
            return
        run = kernel.run
        if run.global_scratch_size or run.profile_scratch_size or any(name not in OPTIONS for name in given):
            return
        of_arguments = (run.arg_annotations, run.kernel_signature) if VERSION == "3.7" else (None, None)
        kept = (run.launch, kernel.function, run.launch_cooperative_grid, run.launch_pdl, kernel.packed_metadata, *of_arguments)
        try:
            if len(self._launches) >= MAX_KEPT:
                self._launches.clear()
            self._launches[to_key(*args, **{name: options[name] for name in OPTIONS})] = kept
        except TypeError:  # a constant that is not hashable
            return


def quick(kernel: Any) -> Any:
    """Decorator that adds quick launches to a kernel; under the interpreter it returns the kernel unchanged."""
    return QuickKernel(kernel) if isinstance(kernel, JITFunction) else kernel


@cache
def _is_understood() -> bool:
    """Whether quick launches are supported here. Logged once if not."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    understood = VERSION in LAUNCHES and type(driver.active).__name__ == "CudaDriver" and all(hasattr(hook, "calls") for hook in hooks)
    if not understood:
        logger.info("Triton %s launches its kernels by itself here: how to do that quicker is known of %s", triton.__version__, [*LAUNCHES])
    return understood


def _kind(value: Any) -> str | None:
    """The kind of an argument; None: only Triton can launch it. A bool is not an int to Triton."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    return {int: "int", float: "float"}.get(type(value))


def _written(kernel: QuickKernel, kinds: tuple[str, ...]) -> Callable[..., Any]:
    """Generate the launch function (grid, kernel arguments, options) as straight-line code. Its own names begin with an underscore."""
    of_kind = list(zip((param for param in kernel.params if not param.is_constexpr), kinds, strict=True))
    pointers = [param.name for param, kind in of_kind if kind == "tensor"]
    aligned = [p.name for p, kind in of_kind if kind == "tensor" and not (p.do_not_specialize or p.do_not_specialize_on_alignment)]
    key = ["_device", *(f"{name}.dtype" for name in pointers)]
    if aligned:  # nearly always multiples of 16: then one number stands for all of them in the key
        each = ", ".join(f"_at_{name} & 15" for name in aligned)
        key.append(f"({' | '.join('_at_' + name for name in aligned)}) & 15 and ({each},)")
    for param, kind in of_kind:
        if kind == "int":
            key += [f"{param.name}.__class__", f"{LOW} <= {param.name} <= {HIGH}" if param.do_not_specialize else param.name]
        elif kind == "float":
            key.append(f"{param.name}.__class__")  # Triton does not specialise on their values
    key += [*(param.name for param in kernel.params if param.is_constexpr), *OPTIONS]
    addresses = "; ".join(f"_at_{name} = {name}.data_ptr()" for name in pointers) or "pass"
    passed = ["None" if p.is_constexpr else "_at_" + p.name if p.name in pointers else p.name for p in kernel.params]
    parameters = ", ".join(p.name if p.default is EMPTY else f"{p.name}=_defaults[{p.name!r}]" for p in kernel.params)
    options = ", ".join(f"{name}=_unset" for name in OPTIONS)
    given = ", ".join(f"{name}={name}" for name in OPTIONS)
    slowly = f"_slowly(_grid, ({', '.join(kernel.arg_names)},), dict({given}, **_others), _key_of)"
    source = f"""
def _key_of({parameters}, {options}):
    {addresses}
    _device = _get_device()
    return ({", ".join(key)},)

def _quickly(_grid, {parameters}, {options}, **_others):
    if _others or _hooks or _enter.calls or _leave.calls or _runtime.launch_enter_hook is not _enter or \\
            _runtime.launch_exit_hook is not _leave or _runtime.debug is not _debug:
        return {slowly}
    try:
        {addresses}
        _device = _get_device()
        _launch, _function, _cooperative, _pdl, _packed, _annotations, _signature = _kept[{", ".join(key)},]
        _size = len(_grid)
        _x, _y, _z = _grid if _size == 3 else (_grid[0], _grid[1], 1) if _size == 2 else (_grid[0], 1, 1)
    except (KeyError, AttributeError, TypeError):
        return {slowly}
    {LAUNCHES[VERSION].format(arguments=", ".join(passed))}
"""
    active, runtime = driver.active, knobs.runtime
    get_device = active.get_current_device
    space: dict[str, Any] = {
        "_slowly": kernel.launch_by_triton,
        "_kept": kernel._launches,
        "_hooks": kernel.pre_run_hooks,
        "_runtime": runtime,
        "_enter": runtime.launch_enter_hook,
        "_leave": runtime.launch_exit_hook,
        "_debug": runtime.debug,
        "_get_device": torch._C._cuda_getDevice if get_device is torch.cuda.current_device else get_device,
        "_get_stream": active.get_current_stream,
        "_defaults": {param.name: param.default for param in kernel.params},
        "_unset": UNSET,
    }
    exec(compile(source, f"<quick launch of {kernel.__name__}>", "exec"), space)  # noqa: S102 - of names alone, as Triton does
    written: Callable[..., Any] = space["_quickly"]
    return written
