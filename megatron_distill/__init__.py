"""megatron_distill: distil large language models, then reinforce them, inside Megatron's own training loop.

Data flows one way through the modules, and the package listing is the architecture:

    prompts -> rollouts -> teacher -> batches -> losses in megatron -> metrics, curriculum -> weight_sync
    -> evaluate -> report

Importing the package imports nothing heavy: neither torch, Megatron, SGLang nor NeMo-Run.
"""

__version__ = "0.1.0"
