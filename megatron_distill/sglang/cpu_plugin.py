"""Lets the published SGLang run on a CPU: a platform and six hooks, found by SGLang through our entry points.

In: SGLang's own start-up, which calls ``activate`` and ``register`` in each of its processes. Out: the path of a platform
class, and hooks in SGLang's registry. Both do nothing where there is an accelerator, or where the official CPU engine
is asked for with ``SGLANG_USE_CPU_ENGINE=1``: a GPU server never sees this file's effects.

What is changed, why, and for which versions (checked with sglang 0.5.23; a test fails once upstream needs it no longer):

==================================  ==============================================================================
what                                why
==================================  ==============================================================================
platform ``PlainTorchCpuPlatform``  rotary embeddings import vLLM's kernels when no accelerator is seen
deterministic back end              seeded sampling refuses the ``torch_native`` attention back end
no batch-invariant kernels          they are Triton kernels and need an accelerator; seeds do not need them
``murmur_hash32`` of our own        the CPU operator is missing from the published kernel wheel
attention in C++                    ``torch_native`` walks a batch in Python, sequence by sequence (``server_kernels``)
fork instead of spawn               three processes would import the same libraries (126 s -> 44 s of CPU time to start)
==================================  ==============================================================================

Importing this module is cheap and imports neither torch nor SGLang: SGLang loads it in every process.
"""

from __future__ import annotations

import os

FORK_VARIABLE = "MEGATRON_DISTILL_SGLANG_FORK"
"""Set to 1 by ``server.command``: this process is a server of its own, which may fork its workers."""

CPU_SERVER_ENV = {
    FORK_VARIABLE: "1",
    # The seeded sampler is decorated with torch.compile, which would need a C++ compiler and half a minute.
    "TORCH_COMPILE_DISABLE": "1",
}
"""Environment of a CPU server. Here rather than set by the hooks: torch reads its variable before they run."""


def is_cpu_only() -> bool:
    """Whether this process has no accelerator and nobody asked for SGLang's official CPU engine."""
    import torch  # slow; SGLang has it loaded by now

    return not torch.accelerator.is_available() and os.environ.get("SGLANG_USE_CPU_ENGINE") != "1"


def activate() -> str | None:
    """Entry point ``sglang.srt.platforms``: the platform's class path, or None to leave the choice to SGLang."""
    return "megatron_distill.sglang.cpu_platform:PlainTorchCpuPlatform" if is_cpu_only() else None


def register() -> None:
    """Entry point ``sglang.srt.plugins``: add the hooks a CPU needs to SGLang's registry."""
    if not is_cpu_only():
        return
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from megatron_distill.sglang import server_kernels
    from megatron_distill.sglang.seeded_sampling import murmur_hash32

    add_deterministic_attention_backend_choices(["torch_native"])
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
        _keep_ordinary_kernels,
        HookType.REPLACE,
    )
    HookRegistry.register("sglang.kernels.ops.sampling.murmur_hash.murmur_hash32", murmur_hash32, HookType.REPLACE)
    server_kernels.register()
    if os.environ.get(FORK_VARIABLE) == "1":
        HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _fork_workers, HookType.AFTER)


def _keep_ordinary_kernels(model_runner: object) -> None:
    """Stands in for ``ModelRunner.maybe_enable_batch_invariant_mode``.

    Without batch-invariant kernels a sequence's logits may differ in the last bits with the batch it runs in, so a seed
    fixes the random numbers, and the tokens up to a near tie.
    """


def _fork_workers(result: None, *args: object, **kwargs: object) -> None:
    """After ``_set_envs_and_config`` chose "spawn": import what the workers need, then choose "fork".

    Safe here because the launcher has run no tensor operation (so no OpenMP team to lose) and started no accelerator; that
    is why it depends on a variable that only our own server processes carry.
    """
    import multiprocessing

    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401

    multiprocessing.set_start_method("fork", force=True)
