"""Speech encoders whose output does not depend on the batch."""
