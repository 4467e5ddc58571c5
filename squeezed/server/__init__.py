"""A server over saved contexts: OpenAI's routes, documents as named resources, jobs and metrics.

Needs the extra `server`. `wire/` says what requests and replies look like, `routes/` are the
addresses, `port.py` is what an engine must offer; `local/` is the engine over Transformers.
"""
