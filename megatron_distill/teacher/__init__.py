"""Teachers: who says how likely each next token is, and how that reaches the loss.

``sglang_topk``: a server scores the finished response; its top-k log-probs travel with the batch (``SGLangTopKTeacher``).
``in_process``: Megatron holds the teacher beside the student, with the same sharding; full-vocabulary logits are made in
the forward step (``megatron_distill.megatron.in_process_teacher``). ``CachedTeacher`` and ``CachedWriter`` keep what a
teacher's server said on disk, keyed by the tokens.

What a server said can be kept on disk, whoever asks again (``CachedTeacher``, ``CachedWriter``).
"""

from megatron_distill.teacher.cache import CachedTeacher, CachedWriter, teacher_identity
from megatron_distill.teacher.sglang_topk import SGLangTopKTeacher

__all__ = ["CachedTeacher", "CachedWriter", "SGLangTopKTeacher", "teacher_identity"]
