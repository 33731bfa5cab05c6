"""lagent's example of `TritonClient`. Changed: imports, address, name of the model."""

import os

from raylm import INTERNLM2_META as META
from raylm import TritonClient

chatbot = TritonClient(
    tritonserver_addr=os.environ["TRITON"],
    model_name="vllm",
    meta_template=META,
    session_len=16384 * 2,
    max_new_tokens=1024,
    top_p=0.8,
    top_k=None,
    temperature=0,
    repetition_penalty=1.0,
    stop_words=["<|im_end|>"],
)

response = chatbot.generate(
    inputs="hello",
    session_id=2967,
    request_id="1",
    sequence_start=True,
    sequence_end=True,
    max_new_tokens=2048,
    temperature=0.8,
)
print(response)

for status, res, _ in chatbot.stream_chat(
    inputs=[
        dict(
            role="system",
            content="You are InternLM (书生·浦语), a helpful, honest, and harmless AI assistant developed by Shanghai AI Laboratory (上海人工智能实验室).",
        ),
        dict(role="user", content="hello"),
    ],
    session_id=2967,
    request_id="1",
    sequence_start=True,
    sequence_end=True,
    max_new_tokens=2048,
    temperature=0.8,
):
    print(res, end="\n", flush=True)
