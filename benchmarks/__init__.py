"""Programs that measure the engine and the server, and the prompts they use."""
