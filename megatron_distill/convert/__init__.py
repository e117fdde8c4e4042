"""Hugging Face <-> Megatron: names, layouts, live streaming and offline directories.

Modules, in the order in which data flows through them:

- ``layout``          how a Megatron tensor is cut out of Hugging Face tensors, and put back
- ``hf_files``        a Hugging Face directory: sharded safetensors in, an atomic directory out
- ``live``            live sharded parameters: ``load_hf_weights``, ``stream_hf_tensors``, ``save_hf``
- ``metadata_pickle`` a ``torch_dist`` checkpoint's table of contents, read without running what a pickle may hold
- ``megatron_files``  such a checkpoint, read and written one tensor at a time, without building a model
- ``damage``          whether such a checkpoint is whole, by its checksums
- ``offline``         ``hf_to_megatron`` and ``megatron_to_hf`` on top of the two directories
- ``export``          any checkpoint of a run as a Hugging Face directory
- ``inspection``      what a path holds;  ``verify``  whether two checkpoints are the same model

Which names a family's tensors have on either side is told by ``models.families``; ``megatron-distill convert`` and
``megatron-distill export`` are the commands.

Nothing here imports Megatron before it must: the groups that a live model is sharded over are read off the model.
"""
