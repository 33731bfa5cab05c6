"""What raylm takes for granted of lmdeploy and the files around it. Nothing here starts an engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

from raylm.config import APIServerConfig, LMDeployConfig
from raylm.engines.api_server import arguments
from raylm.engines.lmdeploy_worker import ERRORS


def test_every_error_of_lmdeploy_is_mapped() -> None:
    """The table of errors has each code that lmdeploy raises, and no other."""
    code = "from lmdeploy.serve.core.exceptions import ErrorCode; print(*[code.value for code in ErrorCode])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(ERRORS) == sorted(done.stdout.split())


def test_every_quant_policy_can_be_asked_for() -> None:
    """The setting takes each way of lmdeploy's to store the KV cache, and no other."""
    code = "from lmdeploy.messages import QuantPolicy; print(*map(int, QuantPolicy))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken = get_args(LMDeployConfig.model_fields["quant_policy"].annotation)
    assert sorted(taken) == sorted(map(int, done.stdout.split()))


PARSE = """
import json, sys
from lmdeploy.cli.cli import CLI
from lmdeploy.cli.serve import SubCliServe

SubCliServe.add_parsers()
for arguments in json.load(sys.stdin):
    CLI.parser.parse_args(["serve", "api_server", "model", *arguments])
"""


def test_arguments_of_an_api_server() -> None:
    """Its command line takes what raylm tells it, whichever engine is asked for."""
    turbomind = APIServerConfig(path="model", tp=2, session_len=1024, max_batch_size=8, cache_max_entry_count=0.5)
    pytorch = turbomind.updated({"backend": "pytorch", "quant_policy": 42, "dtype": "bfloat16", "api_key": "key"})
    told = json.dumps([arguments(turbomind), arguments(pytorch)])
    subprocess.run([sys.executable, "-c", PARSE], input=told, text=True, check=True)


def test_conversion_happens_once(model_folder: str) -> None:
    """The folder of the built-in model is complete and is not made again."""
    written = Path(model_folder, "model.safetensors").stat().st_mtime_ns
    command = [sys.executable, "-m", "raylm.engines.gguf", "smollm2-135m-instruct"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == model_folder
    assert Path(model_folder, "model.safetensors").stat().st_mtime_ns == written
    assert json.loads(Path(model_folder, "config.json").read_text())["dtype"] == "float32"


DETOKENIZE = """
import sys
from lmdeploy.tokenizer import DetokenizeState, HuggingFaceTokenizer
from raylm.engines.lmdeploy_worker import mend_server

mend_server()
tokenizer = HuggingFaceTokenizer(sys.argv[1])
prompt = tokenizer.encode("Say it in Arabic:", False)
ids = tokenizer.encode(" صفرات 😀 the end 🚀", False)[:-1]  # the last character is half
for width in range(1, len(ids) + 1):
    text, state = "", DetokenizeState(len(prompt))
    for end in [*range(width, len(ids), width), len(ids)]:
        new, state = tokenizer.detokenize_incrementally(prompt + ids[:end], state)
        text += new
    print(text)
"""


def test_no_whole_character_is_lost(model_folder: str) -> None:
    """However many tokens come in a step, an api_server that raylm starts loses nothing but half a character."""
    command = [sys.executable, "-c", DETOKENIZE, model_folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    texts = done.stdout.rstrip("\n").split("\n")
    assert len(texts) > 5
    assert {text.rstrip() for text in texts} == {" صفرات 😀 the end"}
