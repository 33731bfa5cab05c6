"""A GGUF file as the model folder that lmdeploy and transformers read, in float32.

The folder is eight times the size of a 4-bit file, so this is for the built-in models: development and tests. Anybody
else gives lmdeploy the folder that the file was made from.

    python -m raylm.engines.gguf smollm2-135m-instruct      # prints the folder, making it first if need be
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from filelock import FileLock

from raylm.errors import EngineStartError
from raylm.models import resolve

_COMPLETE = "complete"
"""This file is in a folder that is all there: it is written last."""


def to_folder(file: Path) -> Path:
    """Return the folder made of `file`, beside it in the cache; made at the first call.

    Any number of processes may do this at once: one converts, the others wait for it.

    Raises:
        EngineStartError: transformers cannot read the file, or the folder cannot be written.
    """
    folder = file.with_suffix(".float32")
    try:
        with FileLock(file.with_suffix(".lock")):
            if not (folder / _COMPLETE).exists():
                _convert(file, folder)
    except OSError as error:
        raise EngineStartError(
            f"cannot make {folder} of {file.name}: {error}. Set RAYLM_CACHE to a folder that can be written and has "
            f"{16 * file.stat().st_size >> 20} MiB free"
        ) from error
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write `folder`. The caller holds the lock."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise EngineStartError(
            f"cannot import what reads GGUF files ({error}); install it with: pip install 'raylm[lmdeploy]'"
        ) from error
    logging.disable_progress_bar()
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    shutil.rmtree(folder, ignore_errors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _check(partial, model)
        (partial / _COMPLETE).touch()
        os.sync()  # the name is trusted from now on, so what it stands for is on the disk first
        partial.replace(folder)
    except (ValueError, RuntimeError, KeyError, ImportError) as error:
        raise EngineStartError(f"transformers cannot read {file}: {error}; give a model folder instead") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(folder: Path, model: object) -> None:
    """Raise ValueError unless `folder` loads as a plain model of the same weights, with a chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.state_dict()  # type: ignore[attr-defined]
    found = again.state_dict()
    if found.keys() != expected.keys():
        raise ValueError(f"the folder has other weights: {sorted(found.keys() ^ expected.keys())[:3]}")
    for name, weight in found.items():
        if weight.dtype != torch.float32 or not torch.equal(weight, expected[name]):
            raise ValueError(f"weight {name} changed")
    if not AutoTokenizer.from_pretrained(folder).chat_template:
        raise ValueError("it has no chat template")


def main() -> None:
    """Convert the model named on the command line and print the folder."""
    try:
        print(to_folder(resolve(sys.argv[1])))  # noqa: T201
    except EngineStartError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
