"""Seeds, several answers to one prompt, log-probabilities and stop strings.

python examples/sampling.py
"""

from outpace import LLM, SamplingParams

llm = LLM()
prompt = "Once upon a time"

# A seed makes a sampled answer repeatable, whatever runs beside it.
seeded = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=16)
alone = llm.generate(prompt, seeded)[0].outputs[0].text
beside = llm.generate([prompt, "In the beginning", "It was a dark night"], seeded)[0].outputs[0].text
print(f"{alone!r}\n{'the same' if alone == beside else 'NOT the same'} in a batch of three")

# n answers from one seed: the first is the one that n=1 gives, each of the others has a seed of its own.
for answer in llm.generate(prompt, SamplingParams(n=3, temperature=0.8, seed=7, max_tokens=12))[0].outputs:
    print(f"answer {answer.index}: {answer.text!r}")

# Log-probabilities are the model's own, before temperature and filters.
[answer] = llm.generate(prompt, SamplingParams(temperature=0, logprobs=3, max_tokens=4))[0].outputs
for token in answer.logprobs or []:
    best = ", ".join(f"{llm.tokenizer.decode([id])!r} {logprob:.2f}" for id, logprob in token.top)
    print(f"{llm.tokenizer.decode([token.token_id])!r} {token.logprob:.2f}, of {best}")

# A stop string ends the answer before it; no part of it is ever shown.
stopping = SamplingParams(temperature=0, stop=(".", "!"), max_tokens=64)
[answer] = llm.generate(prompt, stopping)[0].outputs
print(f"{answer.text!r} ended by {answer.finish_reason} {answer.stop_reason!r}")
