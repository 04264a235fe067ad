"""The speech LLM: encoder, adapter, splice, LoRA, scoring, metrics, training loop. Knows no Ray and no MLflow."""
