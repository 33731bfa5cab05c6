"""The engines: what turns one `Request` into `Delta`s. Plain asyncio, no Ray."""
