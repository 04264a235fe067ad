"""The corpus model: turns and conversations, audio, settings, findings, and the synthetic corpus."""
