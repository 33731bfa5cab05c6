"""The Ray actors: engines, their owner, and the session store."""
