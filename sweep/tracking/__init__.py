"""MLflow: runs, metrics, artifacts and the model registry."""
