"""The platform: configuration, the trial ledger, warm Ray slots, MLflow tracking and the command line."""
