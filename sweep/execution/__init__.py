"""Ray: cluster, worker groups and trials."""
