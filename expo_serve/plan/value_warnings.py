"""Warns of a pair whose sampled values are not those of a pair."""

from __future__ import annotations

from collections.abc import Iterator

from expo_serve.checkpoint.folder import Checkpoint
from expo_serve.plan.names import is_embedding, is_mtp, is_output, ties_embeddings
from expo_serve.plan.plan import Plan
from expo_serve.plan.samples import differ


def value_warnings(plan: Plan) -> Iterator[str]:
    """Warn of two sides with the same values, and of a stored output that a tied model does not use.

    Raises:
        CheckpointError: a file cannot be read.
    """
    aligned = plan.aligned_or_delta
    if not isinstance(aligned, Checkpoint) or plan.doubts:
        return
    pairs = [(tensor.aligned, tensor.base) for tensor in plan.extrapolated if tensor.base]
    if pairs and not any(one.dtype != other.dtype or differ(one, other) for one, other in pairs):
        yield (
            "the first values of all tensors are the same in base and in aligned, so every alpha may give the same "
            "model; was the training merged into aligned?"
        )
    yield from _unused_output(aligned)


def _unused_output(aligned: Checkpoint) -> Iterator[str]:
    if ties_embeddings(aligned.config) is not True:
        return
    records = [record for record in aligned.tensors.values() if not is_mtp(record, aligned.config)]
    embeddings = [record for record in records if is_embedding(record)]
    outputs = [record for record in records if is_output(record) and len(record.shape) == 2]
    if len(embeddings) == len(outputs) == 1 and embeddings[0].dtype == outputs[0].dtype:
        embedding, output = embeddings[0], outputs[0]
        if differ(output, embedding):
            yield (
                "aligned ties its output to its embedding (tie_word_embeddings true), but stores another output "
                f"({output.name}), which vLLM does not load; if it was trained, set tie_word_embeddings to false in "
                "aligned's config.json"
            )
