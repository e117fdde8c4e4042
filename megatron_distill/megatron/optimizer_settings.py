"""Let a checkpoint's optimizer state go on under the settings of the config, which a fork may change: learning rate, betas.

A patch of megatron-core 0.19, which pairs a checkpoint's parameter groups with the optimizer's by their learning rates among
other things, and finds no partner once these differ; what is not compared (betas, eps) it takes from the checkpoint, whatever
the config says. Here the state comes from the checkpoint, and every setting from the config. What changes during training (lr,
weight decay) is set by Megatron's scheduler, which is loaded next. ``tests/megatron/test_layouts.py`` holds it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

_STATE = ("params", "step")  # of a parameter group; the rest are settings
_RATES = ("max_lr", "min_lr")


@functools.cache
def follow_the_config() -> None:
    """Patch the three optimizers that Megatron builds."""
    from megatron.core.optimizer import optimizer as megatron
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # Told apart by what is no rate: weight decay or none, experts or not.
    keys = [key for key in megatron.param_group_identifier_keys if key not in _RATES]
    for kind in (megatron.FP32Optimizer, megatron.Float16OptimizerWithFloat16Params, DistributedOptimizer):
        kind.load_state_dict = _with_settings_of_now(kind.load_state_dict, keys)


def _with_settings_of_now(load: Callable[[Any, Any], None], keys: Sequence[str]) -> Callable[[Any, Any], None]:
    def load_state_dict(self: Any, loaded: Any) -> None:
        now = {tuple(map(group.get, keys)): group for group in self.optimizer.param_groups}
        if len(now) == len(self.optimizer.param_groups):  # else they differ in rates alone (--decoupled-lr)
            for group in loaded.get("optimizer", loaded)["param_groups"]:
                partner = now.get(tuple(map(group.get, keys)), {})  # without one Megatron refuses, and says why
                group |= {name: value for name, value in partner.items() if name not in _STATE}
        load(self, loaded)

    return load_state_dict
