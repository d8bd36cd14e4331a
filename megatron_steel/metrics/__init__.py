"""Recording, reduction, sinks and throughput."""
