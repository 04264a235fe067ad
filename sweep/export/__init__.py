"""A trained model for use elsewhere: folder, model card and predictions."""
