"""lagent's example of `LMDeployPipeline`. Changed: imports, path."""

from raylm import INTERNLM2_META as META
from raylm import LMDeployPipeline

chatbot = LMDeployPipeline(
    path="smollm2-135m-instruct",
    model_name="smollm2-135m-instruct",
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
    max_new_tokens=2048,
    temperature=0.8,
)
print(response)
