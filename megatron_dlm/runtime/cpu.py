"""Makes the pip package megatron-core train on CPU with gloo; applied on CPU only.

Megatron Core 0.16.1 writes "cuda" as a constant in many places and asks torch.cuda for the
current device and the random state. Each remedy is as small as its cause: constants are rewritten
when its modules are loaded, six names of torch.cuda answer for the CPU, the random-state tracker
forks the CPU generator, and a lone data-parallel rank exchanges nothing with itself.
tests/policy/test_megatron_surface.py makes an upgrade of Megatron Core fail loudly.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
rewritten_constants: Counter[str] = Counter()
"""Rewritten constants per module imported so far (read by the policy test)."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc malloc.h


def adapt_megatron() -> None:
    """Install the adapter; must run before anything imports megatron.core. Idempotent."""
    if any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    if any(name.startswith("megatron.core") for name in sys.modules):
        raise RuntimeError("megatron.core was imported before the CPU adapter was installed")
    sys.meta_path.insert(0, _MegatronFinder())
    _silence_warnings_about_cuda()
    _answer_for_cuda()
    _adapt_random_state()
    _skip_collectives_with_oneself()
    _adapt_experts()
    _keep_freed_memory()


class _RewritingLoader(importlib.machinery.SourceFileLoader):
    """Loads a module of megatron.core with its device constants replaced."""

    def get_code(self, fullname: str) -> types.CodeType | None:
        code = super().get_code(fullname)
        return None if code is None else _rewrite(code, fullname)

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == "megatron.core.jit":
            # torch.compile pays on GPUs; here it would cost seconds at import and need a compiler.
            setattr(module, "jit_fuser", lambda function: function)  # noqa: B010


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _RewritingLoader(spec.loader.name, spec.loader.path)
        return spec


def _rewrite(code: types.CodeType, module: str) -> types.CodeType:
    return code.replace(co_consts=tuple(_replace(constant, module) for constant in code.co_consts))


def _replace(constant: Any, module: str) -> Any:
    if isinstance(constant, types.CodeType):
        return _rewrite(constant, module)
    if isinstance(constant, (tuple, frozenset)):
        return type(constant)(_replace(item, module) for item in constant)
    if isinstance(constant, str) and constant in _CONSTANTS:
        rewritten_constants[module] += 1
        return _CONSTANTS[constant]
    return constant


def _silence_warnings_about_cuda() -> None:
    """Megatron Core warns at import that GPU libraries are missing; on CPU that is no news."""
    for category in (UserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _answer_for_cuda() -> None:
    cpu = torch.device("cpu")
    answers: dict[str, Any] = {
        "current_device": lambda: cpu,
        "synchronize": lambda device=None: None,
        "Stream": torch.cpu.Stream,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        # On a CPU build it silently does nothing, which would leave all trackers unseeded.
        "manual_seed": torch.manual_seed,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010


def _adapt_random_state() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    megatron_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: (
        torch.set_rng_state(new_state)
    )
    megatron_random.CudaRNGStatesTracker.fork = _fork


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """CudaRNGStatesTracker.fork on the CPU generator.

    Megatron's own warns on every fork because the CPU state it guards is the one being forked.
    """
    if name not in tracker.states_:
        raise KeyError(f"random state {name} was not added to the tracker")
    outer_name, outer_state = tracker._current_state_name, torch.get_rng_state()
    if outer_name in tracker.states_:
        tracker.states_[outer_name] = outer_state
    torch.set_rng_state(tracker.states_[name])
    tracker._current_state_name = name
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(tracker.states_.get(outer_name, outer_state))
        tracker._current_state_name = outer_name


def _adapt_experts() -> None:
    """Routing without Transformer Engine's GEMM, and split sizes that gloo accepts: numbers, and
    equal ones where ranks share an expert."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # the name is bound only where TE is installed
        moe_utils.te_general_gemm = None
    token_dispatcher.MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _split_sizes_on_host
    mappings._gather_along_first_dim = _gather_of_any_sizes(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_of_any_sizes(
        mappings._reduce_scatter_along_first_dim
    )


def _split_sizes_on_host(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """MoEAlltoAllTokenDispatcher's own turns only CUDA tensors into numbers."""
    if not dispatcher.drop_and_pad and point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            sizes = getattr(dispatcher, name)
            if torch.is_tensor(sizes):
                setattr(dispatcher, name, sizes.numpy())
    return tokens_per_expert


def _gather_of_any_sizes(equal: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """gloo gathers equal sizes only: pad to the largest, then cut."""

    def gather(
        input_: torch.Tensor,
        group: Any,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return equal(input_, group, None, use_global_buffer)
        largest = max(output_split_sizes)
        padded = input_.new_zeros((largest, *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        whole = equal(padded, group).split(largest)
        return torch.cat(
            [part[:size] for part, size in zip(whole, output_split_sizes, strict=True)]
        )

    return gather


def _reduce_scatter_of_any_sizes(equal: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """gloo scatters equal sizes only: sum everything everywhere, then keep the own part."""

    def reduce_scatter(
        input_: torch.Tensor,
        group: Any,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return equal(input_, group, None, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].contiguous()

    return reduce_scatter


def _skip_collectives_with_oneself() -> None:
    """gloo copies a lone rank's gradients and parameters onto themselves, 4 % of a step."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(output: torch.Tensor, input: torch.Tensor, **options: Any) -> Any:
        alone = options["group"].size() == 1 and output.data_ptr() == input.data_ptr()
        # An asynchronous caller waits for a handle, which only the collective can give.
        if alone and not options.get("async_op"):
            return None
        return collective(output, input, **options)

    return call


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks: returning them to the kernel costs page faults every step."""
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)
