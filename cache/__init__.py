"""Who is in which slot: expert cache, eviction policies, statistics. Plain Python, no torch."""
