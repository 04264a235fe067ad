"""Files of annotation tools: tiers of annotations with times, and coded transcripts."""
