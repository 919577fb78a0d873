"""A recogniser behind an OpenAI-compatible server: questions, requests, answers; no torch."""
