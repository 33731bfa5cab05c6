"""lagent's example of `LMDeployServer`. Changed: imports, path, address."""

from raylm import INTERNLM2_META as META
from raylm import LMDeployServer

chatbot = LMDeployServer(
    path="smollm2-135m-instruct",
    model_name="smollm2-135m-instruct",
    server_name="127.0.0.1",
    server_port=0,
    tp=1,
    meta_template=META,
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
    sequence_start=True,
    sequence_end=True,
    ignore_eos=False,
    timeout=30,
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
    sequence_start=True,
    sequence_end=True,
    stream=True,
    ignore_eos=False,
    timeout=30,
    max_new_tokens=2048,
    temperature=0.8,
):
    print(res, end="\n", flush=True)
