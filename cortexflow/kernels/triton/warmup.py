"""Compiling ahead: every kernel that a launch plan needs, at once, while the weights are on their way.

In a thread the plan runs once as a rehearsal in which nothing is computed: Triton's launches only say which
compilations they want, PyTorch's calls only give results of the right form. A kernel is compiled and loaded
by a thread of its own, with the C function that launches it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

import triton
from cortexflow.kernels.cuda.launch import PREPARING
from triton.runtime.jit import JITFunction

_REHEARSAL = threading.Lock()


class _Dispatch:
    """PyTorch's calls without their work: views are views, what is written stays as it was, the rest is empty.

    Its form comes from the same call over zeros on the host. (PyTorch's `meta` device, and a mode that has this method
    itself, would load its compiler for that: seconds, see `cold_start` in benchmarks/README.md.)
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, parameters = kwargs or {}, func._schema.arguments
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func.is_view or not given:
            return func(*args, **kwargs)
        by_name = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
        written = [by_name[p.name] for p in parameters if p.alias_info is not None and p.alias_info.is_write]
        if written:
            returned = written[: len(func._schema.returns)]  # some write and return nothing
            return returned[0] if len(returned) == 1 else tuple(returned) or None
        onto = given[0].device
        args, kwargs = tree_map_only(torch.Tensor, _zeros, (args, kwargs))
        made = func(*args, **{k: v for k, v in kwargs.items() if k != "device"})
        return tree_map_only(
            torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=onto), made
        )


def _zeros(x: torch.Tensor) -> torch.Tensor:
    """A tensor's form on the host, all zeros: an index there is one of any table's."""
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return torch.zeros(max(0, size), dtype=x.dtype, device="cpu").as_strided(x.shape, x.stride())


class _Forms(_Dispatch, TorchDispatchMode):
    """`_Dispatch` as a mode."""


class _Coming:
    """Stands where a kernel will be: who launches it before that compiles it there and then."""

    def __init__(self, compile_fn: Callable[[], Any]) -> None:
        self.compile = compile_fn
        self.places: list[Callable[[Any], None]] = []  # kernels of one text have one result

    def keep(self, kernel: Any) -> None:
        """Put the kernel where it is looked for."""
        for place in self.places:
            place(kernel)

    def result(self) -> Any:
        """The kernel, as Triton asks for it at a launch."""
        kernel = self.compile()
        self.keep(kernel)
        return kernel


class _Wanted(triton.AsyncCompileMode):
    """Compilations under way, by key; `device` is where kernels are loaded, None without a card."""

    def __init__(self, pool: Executor, device: int | None) -> None:
        super().__init__(None)
        self.found: dict[Any, _Coming] = {}
        self.under_way: dict[Future[Any], _Coming] = {}
        self.pool, self.device = pool, device

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> _Coming:
        """Called for a launch of a kernel that is not there; its next launches find what stands for it."""
        if key not in self.found:
            self.found[key] = coming = _Coming(compile_fn)
            self.under_way[self.pool.submit(_loaded, coming, self.device)] = coming
        self.found[key].places.append(finalize_fn)
        finalize_fn(self.found[key])
        return self.found[key]

    def prepare(self, key: object, load: Callable[[], object]) -> None:
        """Called for a launch of a kernel that is not Triton's: it keeps what it loads itself."""
        if key not in self.found:
            self.found[key] = _Coming(load)
            self.under_way[self.pool.submit(load)] = self.found[key]


@contextmanager
def _launching_nothing() -> Iterator[None]:
    """This thread's launches prepare a kernel and stop; those of others run."""
    me = threading.get_ident()
    with _REHEARSAL:
        run = JITFunction.run

        def prepare(self: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
            return run(self, *args, grid=grid, warmup=warmup or threading.get_ident() == me, **meta)

        JITFunction.run = prepare
        try:
            yield
        finally:
            JITFunction.run = run


def _loaded(coming: _Coming, device: int | None) -> Any:
    """A kernel, compiled, and on the card with what launches it (a C function, compiled as well) where there is one."""
    kernel = coming.compile()
    if device is not None:
        with torch.cuda.device(device):
            kernel.run  # noqa: B018 - Triton loads it when this is first asked for
    return kernel


def _rehearse(launch: Callable[[], None], wanted: _Wanted) -> None:
    """Run `launch` without effect, for the kernels that it wants."""
    place = nullcontext() if wanted.device is None else torch.cuda.device(wanted.device)
    with place, _launching_nothing(), wanted, _Forms():
        before = PREPARING.set(wanted.prepare)
        try:
            launch()
        finally:
            PREPARING.reset(before)


@contextmanager
def compiling(launch: Callable[[], None], progress: bool, strict: bool = True) -> Iterator[None]:
    """Compile the kernels that `launch` would run, in threads, while the block runs; at its end they are there.

    Triton's passes, LLVM and ptxas run outside Python's lock. Errors of `launch` and of compilations are raised at the
    end; with `strict` off a compilation's comes where the kernel is launched.
    """
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 1, thread_name_prefix="triton")
    wanted = _Wanted(pool, torch.cuda.current_device() if torch.cuda.is_available() else None)
    rehearsal = pool.submit(copy_context().run, _rehearse, launch, wanted)
    try:
        yield
        rehearsal.result()
        n = len(wanted.under_way)
        with tqdm(
            total=n, desc="compiling kernels", unit="kernel", delay=1.0, leave=False, disable=not progress
        ) as bar:
            for future in as_completed(wanted.under_way):
                if strict or future.exception() is None:
                    wanted.under_way[future].keep(future.result())
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
