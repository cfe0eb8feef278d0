"""Make the demo's reward model: the base model with one label, whose adapter was trained on the demo's preferences.

It is made once: a folder made from the same sources is left as it is.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import prepare

if TYPE_CHECKING:
    from peft import PeftModel

FOLDER = prepare.HERE / "reward"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def ensure_reward_model(out: Path) -> Path:
    """Return the folder of the reward model, made if it is not there or from another adapter."""
    sources = [FOLDER / name for name in FILES]
    if not all(file.is_file() for file in sources):
        raise prepare.DemoError(f"no adapter in {FOLDER}: make one with train_reward.py")
    base, target = prepare.ensure_base(out), out / "reward-model"
    source = prepare.digest([prepare.REQUIREMENTS, *sources])
    prepare.make_once(target, source, lambda folder: make_reward_model(base, folder))
    return target


def make_reward_model(base: Path, folder: Path) -> None:
    """Merge the adapter into base in float32, round to bfloat16 once, and write a classifier with one label."""
    print("reward-model: merging the adapter and its head into base")
    prepare.quiet_transformers()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    # transformers finds the last token of a padded row by it.
    model.config.pad_token_id = tokenizer.pad_token_id
    merged = PeftModel.from_pretrained(model, str(FOLDER)).merge_and_unload()
    prepare.save(merged.to(torch.bfloat16), tokenizer, folder)


def save_adapter(model: "PeftModel") -> None:
    """Write the adapter and the head in bfloat16, with nothing in them that is about this machine."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    for config in model.peft_config.values():
        config.base_model_name_or_path = prepare.MODEL_NAME
    with tempfile.TemporaryDirectory() as scratch:
        # "auto" would look for the base model's config on a hub.
        model.save_pretrained(scratch, save_embedding_layers=False)
        FOLDER.mkdir(exist_ok=True)
        for name in FILES:
            shutil.copyfile(Path(scratch) / name, FOLDER / name)


def main() -> None:
    """Read the command line and make the reward model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where prepare.py puts the models")
    try:
        ensure_reward_model(parser.parse_args().out)
    except (prepare.DemoError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
