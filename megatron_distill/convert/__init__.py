"""Hugging Face <-> Megatron: names, layouts, live streaming and offline directories.

Modules, in the order in which data flows through them:

- ``hf_config``      config.json -> ``HfConfig``, or a refusal that names what we do not understand
- ``families``       one table of names per model family; it drives both directions
- ``layout``         how a Megatron tensor is cut out of Hugging Face tensors, and put back
- ``hf_files``       a Hugging Face directory: sharded safetensors in, an atomic directory out
- ``live``           live sharded parameters: ``load_hf_weights``, ``stream_hf_tensors``, ``save_hf``
- ``megatron_files`` a ``torch_dist`` checkpoint, read and written one tensor at a time, without building a model
- ``offline``        ``hf_to_megatron`` and ``megatron_to_hf`` on top of the two directories
- ``inspection``     what a path holds;  ``verify``  whether two checkpoints are the same model
- ``commands``       the ``megatron-distill convert`` command line

Nothing here imports Megatron before it must: the groups that a live model is sharded over are read off the model.
"""
