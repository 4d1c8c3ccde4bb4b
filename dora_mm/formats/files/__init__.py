"""Reading what anybody may have written, in bounded time and memory: safetensors files, JSON, models on disk."""
