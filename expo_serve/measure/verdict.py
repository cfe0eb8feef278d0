"""Is this a pair for ExPO? The method assumes that aligned is base after small steps that taught nothing new."""

from __future__ import annotations

from expo_serve.measure.measurement import Kind, MeasuredPart, Verdict

LARGE_STEP = 0.02
"""Of ``||aligned - base|| / ||aligned||``. Adam moves a weight by the learning rate at most, once a step: published DPO
runs (5e-7, some 500 steps) move none by more than 2.5e-4, about a hundredth of a usual weight (0.02 to 0.03)."""
UNRELATED_STEP = 0.3
"""Fine-tuning of a pretrained model stays far below; two models that were trained apart are at 1 and above."""
_SWAPPED = "whether base and aligned are swapped cannot be told from their values"


def judge(total: MeasuredPart, *, learned_to_talk: bool) -> Verdict:
    """Judge a pair by its values, and by who has a chat template.

    Args:
        total: of all tensors that are extrapolated.
        learned_to_talk: whether only aligned has a chat template.
    """
    step = total.step or 0.0
    numbers = f"the step is {step:.2g} of the weights' size, {total.share_unchanged:.1%} of the values are unchanged"
    if total.share_unchanged == 1:
        return _verdict("same", "Both sides hold the same values: there is nothing to extrapolate.")
    if step >= UNRELATED_STEP:
        text = f"Not a pair: steps far larger than those of any published pair ({numbers}). Give aligned's own base."
        return _verdict("unrelated", text)
    if step >= LARGE_STEP or learned_to_talk:
        why = ["a step this large is usual for fine-tuning of a pretrained model"] if step >= LARGE_STEP else []
        why += ["only aligned has a chat template"] if learned_to_talk else []
        text = (
            "Looks like supervised fine-tuning of a pretrained model, which is ExPO's failure case: "
            f"{', and '.join(why)} ({numbers}). Give the checkpoint after that training as base."
        )
        return _verdict("retrained", text, _SWAPPED)
    return _verdict("alignment", f"Looks like alignment by small steps, which ExPO is for: {numbers}.", _SWAPPED)


def _verdict(kind: Kind, text: str, *remarks: str) -> Verdict:
    return Verdict(kind=kind, text=text, remarks=list(remarks))
