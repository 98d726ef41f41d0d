"""The DeepSeek-V3 language model: NNX modules hold parameters, pure functions do the work."""
