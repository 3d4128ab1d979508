"""Ray clusters: joining or starting one, and noticing when it is lost or busy."""
