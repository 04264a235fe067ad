"""The study: trials, sampler, pruning and candidates."""
