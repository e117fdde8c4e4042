"""Let Megatron's distributed optimizer resume with torch's own Adam, where neither Transformer Engine nor apex brings one.

Patches of megatron-core 0.19, which reads a step count from every parameter's state before there is a state; copies into fp32
parameters in place as if nothing tracked them; looks for a step count among the tensors of a checkpoint that knows no layout,
which has none; and puts the step count of before the load over the loaded one, in one tensor for all parameters, which torch's
Adam would advance once for each. A run resumed under ``student.distributed_optimizer`` is then bit for bit an unbroken one;
``tests/megatron/test_layouts.py`` holds it.
"""

import functools
from typing import Any

import torch


@functools.cache
def mend() -> None:
    """Patch the distributed optimizer of this process, if it is torch's Adam that it wraps."""
    import megatron.core.optimizer.distrib_optimizer as distributed

    if distributed.HAVE_APEX_OR_TE:
        return
    state_dict = distributed.DistributedOptimizer.state_dict
    load_state_dict = distributed.DistributedOptimizer.load_state_dict
    set_states = distributed.DistributedOptimizer._set_main_param_and_optimizer_states

    def with_a_state(self: Any) -> Any:
        adam = self.optimizer
        for parameter in (one for group in adam.param_groups for one in group["params"] if not adam.state[one]):
            moments = {key: torch.zeros_like(parameter) for key in self.optimizer_state_keys}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    def with_a_step_each(self: Any, loaded: Any) -> None:
        step = float(loaded["optimizer"]["param_groups"][0]["step"])
        with torch.no_grad():
            load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)

    def without_a_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        set_states(self, parameter, tensors | {"step": None})

    distributed.DistributedOptimizer.state_dict = with_a_state
    distributed.DistributedOptimizer.load_state_dict = with_a_step_each
    distributed.DistributedOptimizer._set_main_param_and_optimizer_states = without_a_step
