"""Ray: joining or starting a cluster, and noticing when it is lost or busy."""
