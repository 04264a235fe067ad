"""The speech LLM: encoder, adapter, splice, LoRA, scoring, metrics, training loop. Knows no Ray and no MLflow."""

from model.compat import defer_imports

defer_imports()  # here, so that it comes before any import of transformers by this package
