"""Curvature over several processes: averaged over data-parallel replicas, or with sharded parameters."""
