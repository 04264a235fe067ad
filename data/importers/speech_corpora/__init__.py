"""Data sets in the forms of speech toolkits: Hugging Face datasets, Kaldi and lhotse."""
