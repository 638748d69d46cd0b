"""A server of the owner's own that speaks OpenAI's dialect: Ollama, vLLM, llama.cpp."""
