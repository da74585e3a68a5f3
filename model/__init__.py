"""What is computed: the Qwen2 architecture, its KV cache, attention and checkpoints."""
