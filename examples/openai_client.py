"""Asks a running server through the official client, whole and streamed.

outpace serve &
python examples/openai_client.py
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "unused"),  # any, unless the server was started with --api-key
)
model = client.models.list().data[0].id

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
)
print(answer.choices[0].message.content)

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "List three fruits."}],
    temperature=0.8,
    seed=1,
    max_tokens=64,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"min_p": 0.1},  # fields beyond the OpenAI API have vLLM's names
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n{chunk.usage.completion_tokens} tokens")
