"""Compiling ahead: every kernel that a launch plan needs, at once, while the weights are on their way.

The plan runs once as a rehearsal in which nothing is computed: Triton's launches only say which
compilations they want, PyTorch's calls only give results of the right form.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

import triton
from triton.runtime.jit import JITFunction

_REHEARSAL = threading.Lock()


class _Forms(TorchDispatchMode):
    """PyTorch's calls without their work: views are views, what is written stays as it was, the rest is empty."""

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
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        made = func(*args, **{k: v for k, v in kwargs.items() if k != "device"})
        return tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device=onto), made)


class _Wanted(triton.AsyncCompileMode):
    """Compilations by key: (what compiles, what keeps the result)."""

    def __init__(self) -> None:
        super().__init__(None)
        self.found: dict[Any, tuple[Callable[[], Any], Callable[[Any], None]]] = {}

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> None:
        """Called for each launch of a kernel that is not compiled; without a kernel the launch ends there."""
        self.found.setdefault(key, (compile_fn, finalize_fn))


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


@contextmanager
def compiling(launch: Callable[[], None], progress: bool, strict: bool = True) -> Iterator[int]:
    """Compile the kernels that `launch` would run, in threads, while the block runs; yields how many there are.

    Triton's passes, LLVM and ptxas run outside Python's lock. An error of a compilation is raised at the end, unless
    `strict` is off: then it comes where the kernel is launched.
    """
    with _launching_nothing(), _Wanted() as wanted, _Forms():
        launch()
    workers = max(1, min(len(wanted.found), len(os.sched_getaffinity(0))))
    bar = tqdm(
        total=len(wanted.found), desc="compiling kernels", unit="kernel", delay=1.0, leave=False, disable=not progress
    )
    pool = ThreadPoolExecutor(workers, thread_name_prefix="triton")
    try:
        keep = {pool.submit(compile_fn): finalize_fn for compile_fn, finalize_fn in wanted.found.values()}
        yield len(keep)
        with bar:
            for future in as_completed(keep):
                if strict or future.exception() is None:
                    keep[future](future.result())
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
