"""Measuring servers: `outpace bench`. Works against any OpenAI endpoint and needs no engine."""
