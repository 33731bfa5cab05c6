"""One pool of LLM inference actors on a Ray cluster."""
