"""What student and teacher must share: the same tokens under the same ids, and tokens that mean "stop".

In: two Hugging Face directories and the configured stop tokens. Out: a ``Vocabulary``, or a refusal that names the first
difference. Padding of the embedding may differ; tokens may not, since a KL compares probabilities id by id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distill.config.json_files import json_of
from megatron_distill.errors import ConfigError, DataError
from megatron_distill.models.hf_config import HfConfig, eos_ids


@dataclass(frozen=True)
class Vocabulary:
    """The shared vocabulary.

    Attributes:
        tokenizer: the student's.
        size: ids that both models' embeddings hold: the columns that a loss compares.
        stop_token_ids: end a response, and count as one action in the loss.
    """

    tokenizer: Any
    size: int
    stop_token_ids: tuple[int, ...]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_vocabulary(student: str | Path, teacher: str | Path, stop_tokens: Sequence[str]) -> Vocabulary:
    """Load both tokenizers, compare them token by token, and look up the stop tokens.

    Args:
        student: Hugging Face directory.
        teacher: Hugging Face directory.
        stop_tokens: texts of the stop tokens; without any, the end tokens of both tokenizers and models.

    Raises:
        DataError: a directory without a tokenizer, or two vocabularies that differ.
        ConfigError: a stop token that is not one token, or no token that ends a response.
    """
    tokenizers = {"student": _tokenizer(student), "teacher": _tokenizer(teacher)}
    ours, theirs = (tokenizers[role].get_vocab() for role in ("student", "teacher"))
    differing = sorted(
        (ours.get(token, theirs.get(token)), token)
        for token in ours.keys() | theirs.keys()
        if ours.get(token) != theirs.get(token)
    )
    if differing:
        _, token = differing[0]
        raise DataError(
            f"teacher.path = {teacher}: its tokenizer must equal the student's, but {len(differing)} tokens differ; the "
            f"first is {token!r}: id {ours.get(token)} for the student, {theirs.get(token)} for the teacher. A KL compares "
            "probabilities id by id. Choose a teacher of the student's family."
        )
    tokenizer = tokenizers["student"]
    sizes = []
    for role, path in (("student", student), ("teacher", teacher)):
        sizes.append(size := HfConfig.from_dir(path).vocab_size)
        if max(ours.values()) >= size:
            raise DataError(
                f"{role}.path = {path}: the tokenizer has ids up to {max(ours.values())}, "
                f"but the {role}'s embedding holds only {size}. The model directory is damaged, or tokenizer and model do not "
                "belong together."
            )
    for token in stop_tokens:
        if token not in ours:
            raise ConfigError(
                f"rollouts.stop_tokens = {token!r}: not one token of {student}. A stop token must be a token of its own. "
                "Name one of: " + ", ".join(map(repr, tokenizer.all_special_tokens)) + "."
            )
    stop_token_ids = tuple(ours[token] for token in stop_tokens)
    if not stop_tokens:
        named = [one.eos_token_id for one in tokenizers.values() if one.eos_token_id is not None]
        stop_token_ids = tuple(dict.fromkeys((*named, *end_token_ids(student), *end_token_ids(teacher))))
    if not stop_token_ids:
        raise ConfigError(
            f"rollouts.stop_tokens = []: the files of {student} and {teacher} name no end token: no response could end. "
            f"{_end_token_remedy(tokenizer)}"
        )
    return Vocabulary(tokenizer, min(sizes), stop_token_ids)


def end_token_ids(path: str | Path) -> tuple[int, ...]:
    """Ids at which a server ends a model's response by itself, whatever it is asked: ``eos_token_id`` in the files of its
    Hugging Face directory, as SGLang unites them.

    Raises:
        DataError: generation_config.json is not one.
    """
    file = Path(path) / "generation_config.json"
    try:
        generation = json_of(file) if file.exists() else {}
        return tuple(dict.fromkeys(map(int, (*eos_ids(HfConfig.from_dir(path).raw), *eos_ids(generation)))))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: is no generation config ({error}). Download the model again, or delete the file."
        ) from error


def require_named_ends(vocabulary: Vocabulary, student: str | Path) -> None:
    """Refuse stop tokens that leave out one at which the student's server ends responses by itself.

    Raises:
        ConfigError: naming it.
    """
    tokenizer = vocabulary.tokenizer
    ends = [one for one in end_token_ids(student) if one not in vocabulary.stop_token_ids and one < len(tokenizer)]
    if ends:
        named, unnamed = (tokenizer.convert_ids_to_tokens(list(ids)) for ids in (vocabulary.stop_token_ids, ends))
        raise ConfigError(
            f"rollouts.stop_tokens = {named}: the student's server ends responses at {', '.join(unnamed)} too, since "
            f"eos_token_id in {student} says so, and the loss would take that for a word like others. Name it as well, or "
            "take it out of config.json and generation_config.json."
        )


def _end_token_remedy(tokenizer: Any) -> str:
    special = ", ".join(map(repr, tokenizer.all_special_tokens[:8]))
    choice = f"Name those that end a response, e.g. one of {special}" if special else "Name those that end a response"
    return f"{choice}; or set eos_token in tokenizer_config.json."


def _tokenizer(path: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        for file in Path(path).glob("*"):
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise OSError(f"{file.name} is a pipe or a device")  # which would be waited for, or read without end
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # files of another shape make transformers raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(
            f"{path}: holds no tokenizer that transformers can read ({reason}). Prompts are encoded with it. Copy "
            "tokenizer.json and tokenizer_config.json into the directory."
        ) from error
    # Said already, of a text longer than the model's positions: such prompts are refused by name, or left out and counted.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer
