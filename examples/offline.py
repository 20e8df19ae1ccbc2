"""Answers prompts and conversations in this process, without a server.

python examples/offline.py
"""

from outpace import LLM, SamplingParams

llm = LLM()  # SmolLM2-135M-Instruct; LLM("MODEL") takes a directory, a GGUF file or a hub id
params = SamplingParams(temperature=0, max_tokens=24)

for result in llm.generate(["The capital of France is", "Water boils at"], params):
    print(f"{result.prompt!r} goes on with {result.outputs[0].text!r}")

question = {"role": "user", "content": "What is the capital of France?"}
[result] = llm.chat([question], params)
answer = result.outputs[0].text
print("assistant:", answer)

# The next turn finds the blocks of the first one in the prefix cache.
follow_up = {"role": "user", "content": "What is it known for?"}
[result] = llm.chat([question, {"role": "assistant", "content": answer}, follow_up], params)
print("assistant:", result.outputs[0].text)
print(f"{result.num_cached_tokens} of {len(result.prompt_token_ids)} prompt tokens came from the cache")
