"""The model: encoder, adapter and LLM in one sequence of embeddings."""
